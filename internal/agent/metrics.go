package agent

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/underlay-cni/underlay/internal/agent/recorder"
	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/flowlog"
	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// metrics are the agent's numbers. Labels are bounded: states, names of calls,
// outcomes, error codes, drop reasons, the node's subnets and, as many as it has
// interfaces, its sets of security groups; never a pod or an address.
type metrics struct {
	registry *prometheus.Registry
	adds     *prometheus.HistogramVec
	addErrs  *prometheus.CounterVec
	dels     *prometheus.CounterVec
	calls    *prometheus.CounterVec
}

func newMetrics(a *Agent) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		adds: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "underlay_add_duration_seconds", Help: "Time an ADD took in the agent, waiting included.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 25, 50}}, []string{"result"}),
		addErrs: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "underlay_add_errors_total", Help: "ADDs that ended with an error, by its CNI code."}, []string{"code"}),
		dels:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "underlay_dels_total", Help: "DELs, by result."}, []string{"result"}),
		calls:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "underlay_ec2_calls_total", Help: "Calls to EC2, by what they do and how they ended."}, []string{"call", "outcome"}),
	}
	m.registry.MustRegister(m.adds, m.addErrs, m.dels, m.calls, &view{a: a})
	return m
}

func outcomeName(err error) string {
	o, _ := outcome(err)
	return [...]string{ipam.Done: "done", ipam.Refused: "refused", ipam.Unknown: "unknown"}[o]
}

func (m *metrics) call(name string, err error) { m.calls.WithLabelValues(name, outcomeName(err)).Inc() }

func resultName(err error) string {
	if err != nil {
		return "error"
	}
	return "ok"
}

func (m *metrics) added(d time.Duration, err error) {
	m.adds.WithLabelValues(resultName(err)).Observe(d.Seconds())
	if err != nil {
		code := agentapi.CodeInternal
		var e *agentapi.Error
		if errors.As(err, &e) {
			code = e.Code
		}
		m.addErrs.WithLabelValues(strconv.Itoa(int(code))).Inc()
	}
}

func (m *metrics) deleted(err error) { m.dels.WithLabelValues(resultName(err)).Inc() }

// Metrics serves the agent's numbers to Prometheus.
func (a *Agent) Metrics() http.Handler {
	return promhttp.HandlerFor(a.metrics.registry, promhttp.HandlerOpts{})
}

// view collects what the owner and the datapath know at the time of a scrape.
type view struct{ a *Agent }

var (
	descReady     = prometheus.NewDesc("underlay_ready", "1 when ADDs can be served.", nil, nil)
	descENIs      = prometheus.NewDesc("underlay_enis", "Network interfaces of the node, by state.", []string{"state"}, nil)
	descAddresses = prometheus.NewDesc("underlay_addresses", "Addresses of the pool, by state; primaries are not of it.", []string{"state"}, nil)
	descSets      = prometheus.NewDesc("underlay_group_set_addresses", "Addresses of each set of security groups that has interfaces on the node, by state; groups are sorted IDs, joined by commas.", []string{"groups", "state"}, nil)
	descSetENIs   = prometheus.NewDesc("underlay_group_set_enis", "Network interfaces of each set of security groups.", []string{"groups"}, nil)
	descSetsLeft  = prometheus.NewDesc("underlay_group_sets_allocatable", "How many further sets of security groups the node has interfaces for.", nil, nil)
	descRulesAge  = prometheus.NewDesc("underlay_group_rules_age_seconds", "How old what is known of security groups is, while pods need it, by who reads it: the agent (own) or a poller that others follow, too.", []string{"source"}, nil)
	descWaiting   = prometheus.NewDesc("underlay_adds_waiting", "ADDs that wait for an address.", nil, nil)
	descExhausted = prometheus.NewDesc("underlay_subnet_exhausted", "1 for a subnet of the node where EC2 found no free address, or no free prefix, when last asked.", []string{"subnet", "lacks"}, nil)
	descNotices   = prometheus.NewDesc("underlay_notices_dropped_total", "What pods' users were not told, in Kubernetes' events, for want of room.", nil, nil)
	descRecords   = prometheus.NewDesc("underlay_flow_records_total", "Flow records made.", []string{"direction", "action"}, nil)
	descRecorded  = prometheus.NewDesc("underlay_flow_packets_total", "Packets in flow records.", []string{"direction", "action"}, nil)
	descBytes     = prometheus.NewDesc("underlay_flow_bytes_total", "IP bytes in flow records.", []string{"direction", "action"}, nil)
	descSkipped   = prometheus.NewDesc("underlay_flow_skipped_packets_total", "Packets that pods' interfaces counted and no flow record could be made of.", nil, nil)
	descFailures  = prometheus.NewDesc("underlay_flow_failures_total", "Intervals whose flow records could not be read or written in time; later ones make up for them.", nil, nil)
	descDrops     = prometheus.NewDesc("underlay_dropped_packets_total", "Packets that the node's programs dropped, by reason.", []string{"reason"}, nil)
)

// Describe implements prometheus.Collector.
func (v *view) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descReady, descENIs, descAddresses, descSets, descSetENIs, descSetsLeft, descRulesAge, descWaiting, descExhausted, descNotices, descRecords, descRecorded, descBytes, descSkipped, descFailures, descDrops} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (v *view) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, n int, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(n), labels...)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	ready := 0
	if v.a.unready() == "" {
		ready = 1
	}
	gauge(descReady, ready)
	var n agentapi.Counts
	enis := map[string]int{}
	waiting := 0
	exhausted := map[vpc.SubnetID][2]int{} // of addresses, of prefixes
	var groups []agentapi.GroupSet
	setsLeft := 0
	if v.a.ask(ctx, func(o *owner) {
		n, waiting = countAll(&o.state), len(o.state.Waiting)
		groups, setsLeft = sets(&o.state), o.state.SlotsLeft()
		for _, e := range o.state.ENIs {
			enis[state(e)]++
			if e.Managed {
				exhausted[e.Subnet] = [2]int{}
			}
		}
		addresses, prefixes := o.state.Exhausted(time.Now())
		for i, ids := range [][]vpc.SubnetID{addresses, prefixes} {
			for _, id := range ids {
				n := exhausted[id]
				n[i] = 1
				exhausted[id] = n
			}
		}
	}) == nil {
		gauge(descAddresses, n.Assigned, "assigned")
		gauge(descAddresses, n.Free, "free")
		gauge(descAddresses, n.Bound, "bound")
		gauge(descAddresses, n.Cooling, "cooling")
		gauge(descAddresses, n.Foreign, "foreign")
		gauge(descWaiting, waiting)
		gauge(descSetsLeft, setsLeft)
		for _, g := range groups {
			if g.ENIs == 0 {
				continue // its pods wait, and it may never have one
			}
			name := strings.Join(g.Groups, ",")
			if g.Node {
				name = "node" // whatever they are: a pod can ask for the same
			}
			gauge(descSetENIs, g.ENIs, name)
			gauge(descSets, g.InUse, name, "bound")
			gauge(descSets, g.Free, name, "free")
			gauge(descSets, g.Cooling, name, "cooling")
			gauge(descSets, g.Coming, name, "assigned")
		}
		for s, c := range enis {
			gauge(descENIs, c, s)
		}
		for id, n := range exhausted {
			gauge(descExhausted, n[0], string(id), "address")
			gauge(descExhausted, n[1], string(id), "prefix")
		}
	}
	if v.a.gate != nil {
		if age, source, ok := v.a.gate.age(); ok {
			ch <- prometheus.MustNewConstMetric(descRulesAge, prometheus.GaugeValue, age.Seconds(), source)
		}
	}
	if o := v.a.opts.Orchestrator; o != nil {
		ch <- prometheus.MustNewConstMetric(descNotices, prometheus.CounterValue, float64(o.Dropped()))
	}
	v.flows(ch)
	drops, err := v.a.opts.Datapath.Counters()
	if err != nil {
		return // a scrape without them says so by their absence
	}
	for reason, c := range drops {
		ch <- prometheus.MustNewConstMetric(descDrops, prometheus.CounterValue, float64(c), reason)
	}
}

// flows are the sums of the flow records.
func (v *view) flows(ch chan<- prometheus.Metric) {
	v.a.mu.Lock()
	f := v.a.flows
	v.a.mu.Unlock()
	if f == nil {
		return
	}
	// The latest failure is counted among the totals.
	t, _ := f.Totals()
	count := func(d *prometheus.Desc, n uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), labels...)
	}
	for _, d := range []flowlog.Direction{flowlog.Egress, flowlog.Ingress} {
		for accepted, action := range map[bool]string{true: "accept", false: "reject"} {
			k := recorder.Kind{Direction: d, Accepted: accepted}
			count(descRecords, t.Records[k], d.String(), action)
			count(descRecorded, t.Packets[k], d.String(), action)
			count(descBytes, t.Bytes[k], d.String(), action)
		}
	}
	count(descSkipped, t.Skipped)
	count(descFailures, t.Failures)
}
