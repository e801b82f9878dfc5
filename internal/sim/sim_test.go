package sim

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// small returns a scenario that takes milliseconds.
func small(s Scenario) Config {
	c := Default()
	c.Scenario, c.Nodes, c.PodsPerNode, c.InstanceType = s, 12, 8, "m5.xlarge"
	return c
}

func run(t *testing.T, c Config) *Report {
	t.Helper()
	r, err := Run(context.Background(), c, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestEqualSeedsGiveEqualBytes(t *testing.T) {
	text := func(c Config) string {
		r := run(t, c)
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		svg, err := r.Plot()
		if err != nil {
			t.Fatal(err)
		}
		return string(b) + string(svg)
	}
	for _, s := range Scenarios {
		c := small(s)
		c.Buckets, c.Prefixes = EmptyBuckets, s == Wave
		first := text(c)
		if again := text(c); again != first {
			t.Errorf("%s: two runs with one seed differ", s)
		}
		c.Seed = 2
		if text(c) == first {
			t.Errorf("%s: another seed changes nothing", s)
		}
	}
}

// What nodes believe to hold is what the cloud gave them, and what the subnets
// lack is what interfaces hold: after each scenario, with and without prefixes,
// throttled and not.
func TestNothingIsLostOrMadeUp(t *testing.T) {
	for _, s := range Scenarios {
		for _, prefixes := range []bool{false, true} {
			for _, model := range []string{Underlay, AWSVPCCNI} {
				c := small(s)
				c.Prefixes, c.Buckets = prefixes, EmptyBuckets
				c.Limit, c.Over = 20*time.Minute, 5*time.Minute
				if err := c.Check(); err != nil {
					t.Fatal(err)
				}
				c.verify = func(st *ipam.State) {
					if err := st.Verify(); err != nil {
						t.Fatalf("%s prefixes %t: %v", s, prefixes, err)
					}
				}
				w, err := runModel(context.Background(), &c, model, nil)
				if err != nil {
					t.Fatal(err)
				}
				conserved(t, w, fmt.Sprintf("%s prefixes %t %s", s, prefixes, model))
			}
		}
	}
}

func conserved(t *testing.T, w *world, where string) {
	t.Helper()
	held := map[netip.Addr]bool{}
	for _, e := range w.cloud.enis {
		for _, a := range addresses(e) {
			if held[a] {
				t.Errorf("%s: %s is on two interfaces", where, a)
			}
			held[a] = true
		}
	}
	if len(held) != w.cloud.held {
		t.Errorf("%s: interfaces hold %d addresses, the cloud counts %d", where, len(held), w.cloud.held)
	}
	taken := 0
	cidrs, free := w.cfg.layout()
	for i, s := range w.cloud.subnets {
		taken += free[i] - s.free
		for a := range held {
			if cidrs[i].Contains(a) && s.used[s.index(a)/64]>>(s.index(a)%64)&1 == 0 {
				t.Errorf("%s: %s is held and free in its subnet", where, a)
			}
		}
	}
	if taken != len(held) {
		t.Errorf("%s: subnets miss %d addresses, interfaces hold %d", where, taken, len(held))
	}
	owner := map[netip.Addr]*pod{}
	for _, h := range w.hosts {
		if !h.alive {
			continue
		}
		var cloud, node []netip.Addr
		for _, e := range h.enis {
			cloud = append(cloud, addresses(e)...)
		}
		switch m := h.cni.(type) {
		case *agent:
			for _, e := range m.state.ENIs {
				node = append(node, e.Primary)
				for _, a := range e.Addrs {
					node = append(node, a.Addr)
				}
			}
		case *awscni:
			for _, e := range m.enis {
				node = append(node, e.e.primary)
				for _, a := range e.ips {
					node = append(node, a.addr)
				}
			}
		}
		less := func(a, b netip.Addr) int { return a.Compare(b) }
		if d := cmp.Diff(sorted(cloud, less), sorted(node, less), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" && settled(h) {
			t.Errorf("%s: %s: the cloud's addresses (-) are not the node's (+):\n%s", where, h.id, d)
		}
		for _, p := range h.pods {
			if !p.up {
				continue
			}
			if o := owner[p.addr]; o != nil {
				t.Errorf("%s: %s has two pods", where, p.addr)
			}
			owner[p.addr] = p
			if !held[p.addr] {
				t.Errorf("%s: a pod has %s, which nobody holds", where, p.addr)
			}
		}
	}
	if len(owner) != w.m.used {
		t.Errorf("%s: %d pods have an address, %d are counted", where, len(owner), w.m.used)
	}
}

// settled reports whether no call is under way that one side knows of already.
func settled(h *host) bool {
	if g, isAgent := h.cni.(*agent); isAgent {
		return len(g.state.Calls) == 0
	}
	for _, e := range h.enis {
		if !e.attached {
			return false
		}
	}
	return true
}

func addresses(e *iface) []netip.Addr {
	out := []netip.Addr{e.primary}
	for _, g := range e.grants {
		out = append(out, g.addrs...)
		for _, p := range g.prefixes {
			for a := p.Addr(); p.Contains(a); a = a.Next() {
				out = append(out, a)
			}
		}
	}
	return out
}

func sorted(in []netip.Addr, less func(a, b netip.Addr) int) []netip.Addr {
	slices.SortFunc(in, less)
	return in
}

// Each scenario does what it says, in both models.
func TestScenarios(t *testing.T) {
	const nodes, per = 12, 8
	for _, tt := range []struct {
		scenario    Scenario
		pods, nodes int
	}{
		{Rollout, nodes * per, nodes},
		{Burst, nodes * per, nodes},
		{Wave, nodes * per / 4, nodes},
		{Churn, nodes / 4 * per, nodes},
		{ZoneLoss, nodes / 3 * per, nodes * 2 / 3},
		{Exhaustion, nodes * per, nodes},
	} {
		r := run(t, small(tt.scenario))
		if len(r.Outcomes) != 2 {
			t.Fatalf("%s: %d outcomes", tt.scenario, len(r.Outcomes))
		}
		for _, o := range r.Outcomes {
			if o.Pods != tt.pods || o.Nodes != tt.nodes {
				t.Errorf("%s: %s had %d pods and left %d nodes, want %d and %d", tt.scenario, o.Model, o.Pods, o.Nodes, tt.pods, tt.nodes)
			}
			if o.Model == Underlay && (o.PodsReady != o.Pods || o.FailedADDs != 0) {
				t.Errorf("%s: %d of %d pods got up, %d ADDs failed: %v", tt.scenario, o.PodsReady, o.Pods, o.FailedADDs, o.FailedWhy)
			}
			if o.LeakedENIs != 0 {
				t.Errorf("%s: %s leaked %d interfaces", tt.scenario, o.Model, o.LeakedENIs)
			}
			if want := nodes * per; o.UsedEnd != want && o.PodsReady == o.Pods {
				t.Errorf("%s: %s: %d pods are up at the end, want %d", tt.scenario, o.Model, o.UsedEnd, want)
			}
			last := o.Series[len(o.Series)-1]
			if last.Pods != o.UsedEnd || last.Calls > o.CallsTotal || len(o.Series) > maxSamples {
				t.Errorf("%s: %s: the last of %d samples is %+v, the outcome has %d pods and %d calls", tt.scenario, o.Model, len(o.Series), last, o.UsedEnd, o.CallsTotal)
			}
		}
	}
}

// In subnets that have a tenth more than pods and nodes take, Underlay serves
// all and a warm interface on each node does not.
func TestExhaustionShowsWhoHoards(t *testing.T) {
	c := small(Exhaustion)
	c.Nodes, c.PodsPerNode, c.Limit = 30, 12, 20*time.Minute
	r := run(t, c)
	own, other := r.Outcomes[0], r.Outcomes[1]
	if own.PodsReady != own.Pods || own.FailedADDs > 0 {
		t.Errorf("Underlay: %d of %d pods, %d failed ADDs", own.PodsReady, own.Pods, own.FailedADDs)
	}
	if other.PodsReady == other.Pods {
		t.Errorf("the AWS VPC CNI served all %d pods from subnets that hold no warm interfaces", other.Pods)
	}
	c.Spare = -0.2
	r = run(t, c)
	if own := r.Outcomes[0]; own.PodsReady == own.Pods || own.FailedWhy[ipam.KindSubnetFull.String()] == 0 {
		t.Errorf("Underlay with a fifth too few addresses: %d of %d pods, failures %v", own.PodsReady, own.Pods, own.FailedWhy)
	}
}

// Twenty idle nodes get 230 pods each with empty buckets, all at one moment or
// one after the other as a runtime makes them. What the buckets allow at the
// best is less than the 50 s after which an ADD gives up: so none may fail, and
// all must be up within 1.2 times the least.
func TestTwentyNodesAtOnce(t *testing.T) {
	for _, apart := range []time.Duration{0, 20 * time.Millisecond} {
		for _, prefixes := range []bool{false, true} {
			for seed := range uint64(5) {
				c := Default()
				c.Scenario, c.Nodes, c.PodsPerNode, c.Buckets, c.Apart, c.Compare, c.Seed, c.Prefixes = Burst, 20, 230, EmptyBuckets, apart, false, seed, prefixes
				r := run(t, c)
				o := r.Outcomes[0]
				ratio := float64(o.LastReady) / float64(r.Minimum.Seconds)
				t.Logf("seed %d, pods %s apart, prefixes %t: %s, at least %s, ratio %.2f; %d calls, %d throttled; %d addresses held",
					seed, apart, prefixes, clockTime(o.LastReady), clockTime(r.Minimum.Seconds), ratio, o.CallsTotal, o.Throttled, o.HeldPeak)
				if time.Duration(r.Minimum.Seconds) >= c.AddTimeout {
					t.Errorf("the least possible is %s: no ADD could be served in time", clockTime(r.Minimum.Seconds))
				}
				if o.PodsReady != o.Pods || o.FailedADDs > 0 {
					t.Errorf("seed %d, pods %s apart, prefixes %t: %d of %d pods, %d failed ADDs: %v", seed, apart, prefixes, o.PodsReady, o.Pods, o.FailedADDs, o.FailedWhy)
				}
				if ratio > 1.2 {
					t.Errorf("seed %d, pods %s apart, prefixes %t: %.2f times the least possible", seed, apart, prefixes, ratio)
				}
			}
		}
	}
}

func TestMinimum(t *testing.T) {
	c := Default()
	c.Scenario, c.Nodes, c.PodsPerNode, c.Buckets, c.Apart, c.Jitter = Burst, 20, 230, EmptyBuckets, 0, 0
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	m := c.minimum()
	// 8 interfaces of 29 hold 232: 7 more on each node, 140 in all, at 5/s 28 s;
	// then the call, the attachment and IMDS.
	if want := 28*time.Second + c.Call + c.Attach + c.IMDSLag; time.Duration(m.Seconds) != want || m.Binds != "CreateNetworkInterface" {
		t.Errorf("least %s, %s binds; want %s by CreateNetworkInterface", time.Duration(m.Seconds), m.Binds, want)
	}
	want := []CallCount{{Action: "AssignPrivateIpAddresses", Calls: 20}, {Action: "CreateNetworkInterface", Calls: 140},
		{Action: "AttachNetworkInterface", Calls: 140}, {Action: "ModifyNetworkInterfaceAttribute", Calls: 140}}
	if d := cmp.Diff(want, m.Calls); d != "" {
		t.Error(d)
	}
	// 20 pods need one call per node, of which a full bucket has 100.
	c.PodsPerNode, c.Nodes, c.Buckets = 20, 1000, FullBuckets
	if m, want := c.minimum(), 180*time.Second+c.IMDSLag; time.Duration(m.Seconds) != want || len(m.Calls) != 1 || m.Calls[0].Calls != 1000 {
		t.Errorf("least %s with %v, want %s with 1,000 calls", time.Duration(m.Seconds), m.Calls, want)
	}
}

// The figures that were measured with the real AWS VPC CNI (v1.23.1, emulated
// EC2 with the default latencies, one m6i.4xlarge, 230 pods at once, retries
// after 2 s). Times are to agree within 20 %, and what it holds closely. The
// failed ADDs are not: there the machine itself was slow to repeat them.
func TestAWSModelAgreesWithMeasurements(t *testing.T) {
	base := Default()
	base.Scenario, base.Nodes, base.Zones, base.PodsPerNode, base.Apart, base.Retry, base.Jitter = Burst, 1, 1, 230, 0, 2*time.Second, 0
	for _, tt := range []struct {
		name string
		tune func(*Config)
		last time.Duration
	}{
		{"defaults", func(*Config) {}, 71 * time.Second},
		{"prefixes, WARM_PREFIX_TARGET=1", func(c *Config) { c.Prefixes = true }, 69 * time.Second},
	} {
		c := base
		tt.tune(&c)
		o := run(t, c).Outcomes[1]
		t.Logf("%s: %s (measured %s), %d failed ADDs, %d interfaces", tt.name, clockTime(o.LastReady), tt.last, o.FailedADDs, o.ENIsPeak)
		if o.PodsReady != 230 || within(time.Duration(o.LastReady), tt.last) > 0.2 {
			t.Errorf("%s: %d pods, the last after %s; measured %s", tt.name, o.PodsReady, clockTime(o.LastReady), tt.last)
		}
		if o.FailedADDs == 0 {
			t.Errorf("%s: no ADD failed", tt.name)
		}
	}
	// WARM_IP_TARGET=5, MINIMUM_IP_TARGET=10: 203 of 230 after 241 s.
	c := base
	c.AWS.WarmIP, c.AWS.MinimumIP = 5, 10
	o := run(t, c).Outcomes[1]
	up := 0
	for _, s := range o.Series {
		if time.Duration(s.T) <= 241*time.Second {
			up = s.Pods
		}
	}
	t.Logf("WARM_IP_TARGET=5: %d pods after 241 s (measured 203)", up)
	if up < 203*80/100 || up > min(229, 203*120/100) {
		t.Errorf("WARM_IP_TARGET=5: %d pods after 241 s, measured 203", up)
	}
}

// Throttled throughout, a node made 28 DescribeSubnets per minute.
func TestAWSModelThrottled(t *testing.T) {
	c := Default()
	c.Scenario, c.Nodes, c.Zones, c.PodsPerNode, c.Retry = Burst, 1, 1, 230, 2*time.Second
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	w, err := newWorld(&c, newAWS)
	if err != nil {
		t.Fatal(err)
	}
	w.tell = func() error { return nil }
	if err := w.warm(0); err != nil {
		t.Fatal(err)
	}
	w.burst()
	w.acct.size[describeSubnets], w.acct.tokens[describeSubnets] = [2]int64{0, 0}, 0
	if _, err := w.until(w.clk.now+5*time.Minute, nil); err != nil {
		t.Fatal(err)
	}
	if n := float64(w.acct.refused[describeSubnets]) / 5; n < 28*0.85 || n > 28*1.15 {
		t.Errorf("%.1f DescribeSubnets per minute, measured 28", n)
	}
}

func within(a, b time.Duration) float64 { return max(float64(a-b), float64(b-a)) / float64(b) }

func TestBuckets(t *testing.T) {
	a, err := newAccount()
	if err != nil {
		t.Fatal(err)
	}
	a.begin(0, false)
	n := 0
	for a.take(attachInterface, 0) {
		n++
	}
	if n != 50 {
		t.Errorf("a full bucket gave %d tokens, want 50", n)
	}
	if a.take(attachInterface, 199*time.Millisecond) || !a.take(attachInterface, 200*time.Millisecond) || a.take(attachInterface, 200*time.Millisecond) {
		t.Error("5 tokens per second are one each 200 ms")
	}
	if !a.take(assignAddresses, 200*time.Millisecond) {
		t.Error("another action has its own bucket")
	}
	a.begin(time.Second, true)
	if a.take(createInterface, time.Second) {
		t.Error("an empty bucket gave a token")
	}
	n = 0
	for a.take(createInterface, time.Hour) {
		n++
	}
	if n != 100 {
		t.Errorf("after an hour the bucket gave %d tokens, want 100", n)
	}
}

func TestCheck(t *testing.T) {
	for want, tune := range map[string]func(*Config){
		"scenario":              func(c *Config) { c.Scenario = "flood" },
		"instance type":         func(c *Config) { c.InstanceType = "m9.nano" },
		"0 nodes":               func(c *Config) { c.Nodes = 0 },
		"holds 232 pods":        func(c *Config) { c.PodsPerNode = 300 },
		"of the lost zone":      func(c *Config) { c.Scenario, c.PodsPerNode = ZoneLoss, 200 },
		"one zone":              func(c *Config) { c.Scenario, c.Zones = ZoneLoss, 1 },
		"no subnet of /12":      func(c *Config) { c.SubnetBits = 12 },
		"do not fit":            func(c *Config) { c.SubnetBits, c.Subnets, c.Zones = 16, 200, 3 },
		"buckets cannot be":     func(c *Config) { c.Buckets = "half" },
		"holds no prefixes":     func(c *Config) { c.InstanceType, c.Prefixes, c.PodsPerNode = "m4.large", true, 2 },
		"while some are repl":   func(c *Config) { c.Scenario, c.PodsPerNode = Wave, 232 },
		"a duration is neg":     func(c *Config) { c.ReadLag = -1 },
		"cannot be retried":     func(c *Config) { c.Retry = 0 },
		"a jitter of 2 is":      func(c *Config) { c.Jitter = 2 },
		"-1 of the addresses":   func(c *Config) { c.Spare = -1 },
		"a target is negative":  func(c *Config) { c.AWS.WarmENI = -1 },
		"0 is no share":         func(c *Config) { c.Share = 0 },
		"cannot be ended after": func(c *Config) { c.Limit = 0 },
	} {
		c := Default()
		tune(&c)
		_, err := Run(context.Background(), c, nil)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "; ") && !strings.Contains(err.Error(), "use ") {
			t.Errorf("want an error that says %q and what to do, got %v", want, err)
		}
	}
}

func TestCanceledRunEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	c := Default()
	c.Nodes = 500
	_, err := Run(ctx, c, func(p Progress) {
		if p.Events > 0 {
			cancel()
		}
	})
	if err == nil || ctx.Err() == nil {
		t.Errorf("a canceled run ended with %v", err)
	}
}

func TestSubnet(t *testing.T) {
	w, err := newWorld(func() *Config { c := small(Exhaustion); _ = c.Check(); return &c }(), newAgent)
	if err != nil {
		t.Fatal(err)
	}
	s := newSubnet("subnet-1", 0, netip.MustParsePrefix("10.1.0.0/26"), w.cloud.rng)
	if s.free != 59 {
		t.Fatalf("a /26 has %d free addresses, want 59", s.free)
	}
	p, there := s.takePrefix()
	if !there || p.Bits() != vpc.PrefixBits || p.Masked() != p || s.free != 43 {
		t.Fatalf("got %s, %d left", p, s.free)
	}
	seen := map[netip.Addr]bool{}
	for s.free > 0 {
		a, _ := s.take()
		if seen[a] || p.Contains(a) || !netip.MustParsePrefix("10.1.0.0/26").Contains(a) {
			t.Fatalf("gave %s", a)
		}
		seen[a] = true
	}
	for _, last := range []string{"10.1.0.0", "10.1.0.3", "10.1.0.63"} {
		if seen[netip.MustParseAddr(last)] {
			t.Errorf("%s is EC2's own", last)
		}
	}
	if _, there := s.take(); there {
		t.Error("an empty subnet gave an address")
	}
	if _, there := s.takePrefix(); there {
		t.Error("an empty subnet gave a prefix")
	}
	s.releasePrefix(p)
	if q, there := s.takePrefix(); !there || q != p {
		t.Errorf("got %s, want %s again", q, p)
	}
}

func TestTable(t *testing.T) {
	var b bytes.Buffer
	run(t, small(Rollout)).Write(&b)
	for _, want := range []string{"Underlay", "AWS VPC CNI", "last pod ready after", "× the least possible", "throttled", "addresses held, at the end", "The least possible is"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, b.String())
		}
	}
}
