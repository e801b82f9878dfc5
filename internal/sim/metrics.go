package sim

import (
	"slices"
	"time"
)

// maxSamples bounds a series; beyond it every other sample goes and the
// interval doubles.
const maxSamples = 600

// metrics counts what a run shows. It begins anew when the scenario does.
type metrics struct {
	start      time.Duration
	running    bool // the scenario has begun
	nodes      int
	unlaunched int
	wanted     int // pods scheduled
	ready      int // pods that got up
	withdrawn  int // pods gone before they were up
	used       int // pods that are up: addresses in use
	retried    int // pods of which an ADD failed
	failed     int
	why        map[string]int
	waits      []time.Duration
	last       time.Duration // the last pod got up

	waiting  int // pods scheduled, not up, not gone
	usedPeak int

	series []Sample
	every  time.Duration
}

func (m *metrics) up(p *pod, now time.Duration) {
	m.used++
	m.waiting--
	m.usedPeak = max(m.usedPeak, m.used)
	if m.running {
		m.ready++
		m.last = now
		m.waits = append(m.waits, now-p.due)
	}
}

func (m *metrics) fail(p *pod, why string) {
	if !m.running {
		return
	}
	m.failed++
	m.why[why]++
	if !p.tried {
		p.tried = true
		m.retried++
	}
}

// begin starts the scenario: what was before does not count.
func (w *world) begin() {
	m := &w.m
	*m = metrics{start: w.clk.now, running: true, nodes: m.nodes, unlaunched: m.unlaunched, used: m.used, usedPeak: m.used, waiting: m.waiting, why: map[string]int{}, every: time.Second}
	w.acct.begin(w.clk.now, w.cfg.Buckets == EmptyBuckets)
	c := w.cloud
	c.heldPeak, c.eniPeak, c.nauPeak = c.held, len(c.enis), c.nau()
	w.sample()
}

// grew takes the peaks.
func (c *cloud) grew() {
	c.heldPeak, c.eniPeak, c.nauPeak = max(c.heldPeak, c.held), max(c.eniPeak, len(c.enis)), max(c.nauPeak, c.nau())
}

// nau returns the network address units in use: one per address, one per
// prefix (Amazon VPC user guide, "Network Address Usage").
func (c *cloud) nau() int { return c.held - c.prefixes*(prefixSize-1) }

// Sample is what a series holds of one moment. Counts of calls are sums since
// the start.
type Sample struct {
	T         seconds `json:"t"`
	Pods      int     `json:"pods"`    // up
	Pending   int     `json:"pending"` // not yet up
	Held      int     `json:"held"`    // addresses
	ENIs      int     `json:"enis"`
	Calls     int     `json:"calls"` // the throttled included
	Throttled int     `json:"throttled"`
	Failed    int     `json:"failedADDs"`
}

// sample takes a sample now and every so often.
func (w *world) sample() {
	m := &w.m
	calls, refused := w.acct.totals()
	m.series = append(m.series, Sample{T: seconds(w.clk.now - m.start), Pods: m.used, Pending: m.waiting, Held: w.cloud.held, ENIs: len(w.cloud.enis),
		Calls: calls, Throttled: refused, Failed: m.failed})
	if len(m.series) >= maxSamples {
		kept := m.series[:0]
		for i := 0; i < len(m.series); i += 2 {
			kept = append(kept, m.series[i])
		}
		m.series = kept
		w.clk.after(m.every, w.sample) // this one went, being the last of an even number
		m.every *= 2
		return
	}
	w.clk.after(m.every, w.sample)
}

// percentile returns the value that a share p of the sorted durations does not
// exceed.
func percentile(sorted []time.Duration, p float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	i := int(p*float64(len(sorted))+0.999999) - 1
	return sorted[min(max(i, 0), len(sorted)-1)]
}

// CallCount is what became of the calls of one action.
type CallCount struct {
	Action    string `json:"action"`
	Calls     int    `json:"calls"` // the throttled included
	Throttled int    `json:"throttled"`
}

// Outcome is what one model did.
type Outcome struct {
	Model      string         `json:"model"`
	Pods       int            `json:"pods"`      // that were to get up
	PodsReady  int            `json:"podsReady"` // that did
	Unlaunched int            `json:"nodesNotLaunched"`
	LastReady  seconds        `json:"lastReady"` // since the start
	WaitP50    seconds        `json:"waitP50"`   // of those that got up
	WaitP99    seconds        `json:"waitP99"`
	WaitMax    seconds        `json:"waitMax"`
	FailedADDs int            `json:"failedADDs"`
	FailedWhy  map[string]int `json:"failedWhy"`
	PodsFailed int            `json:"podsWithFailedADDs"`
	Calls      []CallCount    `json:"calls"`
	CallsTotal int            `json:"callsTotal"`
	Throttled  int            `json:"throttledTotal"`
	HeldPeak   int            `json:"heldPeak"`
	HeldEnd    int            `json:"heldEnd"`
	UsedPeak   int            `json:"usedPeak"`
	UsedEnd    int            `json:"usedEnd"`
	NAUPeak    int            `json:"networkAddressUnitsPeak"`
	ENIsPeak   int            `json:"enisPeak"`
	ENIsEnd    int            `json:"enisEnd"`
	Nodes      int            `json:"nodesEnd"`
	LeakedENIs int            `json:"leakedENIs"` // of nodes that are gone, at the end
	End        seconds        `json:"end"`        // of the run
	Events     uint64         `json:"events"`
	Series     []Sample       `json:"series"`
}

// ThrottledShare returns how many of the calls were refused, as a share.
func (o *Outcome) ThrottledShare() float64 {
	return float64(o.Throttled) / float64(max(1, o.CallsTotal))
}

func (w *world) outcome(model string) Outcome {
	m, c := &w.m, w.cloud
	slices.Sort(m.waits)
	o := Outcome{Model: model, Pods: m.wanted - m.withdrawn, PodsReady: m.ready, Unlaunched: m.unlaunched, FailedADDs: m.failed, FailedWhy: m.why, PodsFailed: m.retried,
		HeldPeak: c.heldPeak, HeldEnd: c.held, UsedPeak: m.usedPeak, UsedEnd: m.used, NAUPeak: c.nauPeak, ENIsPeak: c.eniPeak, ENIsEnd: len(c.enis), Nodes: m.nodes,
		End: seconds(w.clk.now - m.start), Events: w.clk.ran, Series: m.series}
	if m.ready > 0 {
		o.LastReady = seconds(m.last - m.start)
	}
	o.WaitP50, o.WaitP99, o.WaitMax = seconds(percentile(m.waits, .5)), seconds(percentile(m.waits, .99)), seconds(percentile(m.waits, 1))
	o.CallsTotal, o.Throttled = w.acct.totals()
	for a := range action(actions) {
		if n := w.acct.calls[a] + w.acct.refused[a]; n > 0 {
			o.Calls = append(o.Calls, CallCount{Action: a.String(), Calls: n, Throttled: w.acct.refused[a]})
		}
	}
	for _, e := range c.loose {
		if !e.host.alive {
			o.LeakedENIs++
		}
	}
	return o
}
