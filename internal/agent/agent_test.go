package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/agentapi/pipe"
	"github.com/underlay-cni/underlay/internal/datapath"
	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// rig is an agent between fakes.
type rig struct {
	t      *testing.T
	a      *Agent
	cloud  *fakeCloud
	kernel *fakeDatapath
	socket string
	stop   func()
	netns  *os.File
	sweep  time.Duration
	tune   func(*ipam.Config)
	rival  string // where another agent is; guarded by cloud.mu

	orchestrator Orchestrator
	judges       bool // the kernel judges by security groups
}

// run runs fn in a bubble of virtual time, with a cloud and a kernel.
func run(t *testing.T, typ string, fn func(*rig)) {
	socket := filepath.Join(t.TempDir(), "agent.sock")
	netns, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer netns.Close()
	synctest.Test(t, func(t *testing.T) {
		c := newCloud(typ)
		r := &rig{t: t, cloud: c, kernel: newDatapath(c), socket: socket, netns: netns, stop: func() {}}
		defer func() { r.stop() }()
		fn(r)
	})
}

// start starts an agent; one that runs is stopped first.
func (r *rig) start() {
	r.stop()
	opts := Options{Version: "test", Cluster: "test", Socket: r.socket, Datapath: r.kernel, Metadata: fakeIMDS{r.cloud},
		ConnectEC2: func(context.Context, string) (EC2, error) { return r.cloud, nil }, Logger: slog.New(slog.DiscardHandler), Sweep: r.sweep, Tune: r.tune, Rival: r.theRival, Orchestrator: r.orchestrator}
	if r.judges {
		opts.SetPolicy = r.kernel.SetPolicy
	}
	r.a = New(opts)
	r.kernel.before = r.a.BeforeReady
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- r.a.Run(ctx) }()
	r.stop = func() {
		cancel()
		if err := <-ended; err != nil {
			r.t.Errorf("run: %v", err)
		}
		r.stop = func() {}
	}
}

func (r *rig) theRival(context.Context) string {
	r.cloud.mu.Lock()
	defer r.cloud.mu.Unlock()
	return r.rival
}

func (r *rig) setRival(where string) {
	r.cloud.mu.Lock()
	defer r.cloud.mu.Unlock()
	r.rival = where
}

func (r *rig) add(id string) (*agentapi.Result, error) {
	return r.a.Add(r.t.Context(), &agentapi.Attachment{ContainerID: id, IfName: "eth0", Netns: "/run/netns/" + id, Pod: agentapi.Pod{Namespace: "ns", Name: id}}, 0, r.netns)
}

func (r *rig) mustAdd(id string) netip.Addr {
	r.t.Helper()
	res, err := r.add(id)
	if err != nil {
		r.t.Fatalf("add %s: %v", id, err)
	}
	return res.Addr
}

func (r *rig) del(id string) {
	r.t.Helper()
	if err := r.a.Del(r.t.Context(), &agentapi.Attachment{ContainerID: id, IfName: "eth0"}); err != nil {
		r.t.Fatalf("del %s: %v", id, err)
	}
}

func (r *rig) inspect() *agentapi.Inspection {
	r.t.Helper()
	in, err := r.a.Inspect(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	return in
}

func wantCode(t *testing.T, err error, code agentapi.Code, says string) {
	t.Helper()
	var e *agentapi.Error
	if !errors.As(err, &e) || e.Code != code || !strings.Contains(e.Message, says) {
		t.Errorf("error %v, want code %d and %q", err, code, says)
	}
}

// addresses returns what the agent holds in a state.
func (r *rig) addresses(state string) (out []netip.Addr) {
	for _, ad := range r.inspect().Addresses {
		if ad.State == state {
			out = append(out, ad.IP)
		}
	}
	return out
}

func (r *rig) metrics() string {
	w := httptest.NewRecorder()
	r.a.Metrics().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	return w.Body.String()
}

// The limits that the agent tells of are those of its mode: with prefixes or
// without, by the default network card's interfaces, by what it was told.
func TestLimitsInTheNodesMode(t *testing.T) {
	for _, tc := range []struct {
		name, typ string
		tune      func(*ipam.Config)
		want      agentapi.Limits
	}{
		{"single addresses", "m5.large", nil, agentapi.Limits{ENIs: 3, IPv4PerENI: 10, Addresses: 27, MaxPods: 29}},
		{"prefixes", "m5.large", func(c *ipam.Config) { c.Prefixes = true }, agentapi.Limits{ENIs: 3, IPv4PerENI: 10, Addresses: 432, MaxPods: 434}},
		{"no prefixes before Nitro", "m4.large", func(c *ipam.Config) { c.Prefixes = true }, agentapi.Limits{ENIs: 2, IPv4PerENI: 10, Addresses: 18, MaxPods: 20}},
		{"two interfaces at the most", "m5.large", func(c *ipam.Config) { c.MaxENIs = 2 }, agentapi.Limits{ENIs: 2, IPv4PerENI: 10, Addresses: 18, MaxPods: 29}},
		{"four network cards", "p4d.24xlarge", nil, agentapi.Limits{ENIs: 15, IPv4PerENI: 50, Addresses: 735, MaxPods: 737}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			run(t, tc.typ, func(r *rig) {
				r.tune = tc.tune
				r.start()
				r.mustAdd("c1")
				if got := r.inspect().Limits; got != tc.want {
					t.Errorf("limits %+v, want %+v", got, tc.want)
				}
			})
		})
	}
}

// Flows are idle for as long as the VPC remembers them: by what EC2 says of the
// interface, or by its instance type.
func TestIdleTimesOfInterfaces(t *testing.T) {
	for typ, want := range map[string]time.Duration{"m5.large": 120 * time.Hour, "c8a.12xlarge": 350 * time.Second} {
		run(t, typ, func(r *rig) {
			r.start()
			r.mustAdd("c1")
			idle := func() []vpc.IdleTimeouts {
				r.kernel.mu.Lock()
				defer r.kernel.mu.Unlock()
				var out []vpc.IdleTimeouts
				for _, e := range r.kernel.enis {
					out = append(out, e.Idle)
				}
				return out
			}
			if got := idle(); len(got) == 0 || got[0] != (vpc.IdleTimeouts{TCPEstablished: want}) {
				t.Errorf("%s: %+v, want established TCP %s", typ, got, want)
			}
			said := vpc.IdleTimeouts{TCPEstablished: 10 * time.Minute, UDP: 45 * time.Second, UDPStream: 60 * time.Second}
			r.cloud.mu.Lock()
			for _, e := range r.cloud.enis {
				e.Idle = said
			}
			r.cloud.mu.Unlock()
			time.Sleep(10 * time.Minute) // EC2 is read again
			synctest.Wait()
			if got := idle(); len(got) == 0 || got[0] != said {
				t.Errorf("%s: %+v, want what EC2 says now: %+v", typ, got, said)
			}
		})
	}
}

func TestLifeOfAnEndpoint(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		r.start()
		a := r.mustAdd("c1")
		if b := r.mustAdd("c1"); a != b {
			t.Errorf("a repeated ADD answered %s, then %s", a, b)
		}
		at := &agentapi.Attachment{ContainerID: "c1", IfName: "eth0", Addr: a}
		if err := r.a.Check(r.t.Context(), at, r.netns); err != nil {
			t.Errorf("check: %v", err)
		}
		if err := r.a.Status(r.t.Context()); err != nil {
			t.Errorf("status: %v", err)
		}
		wrong := *at
		wrong.Addr = netip.MustParseAddr("10.0.0.200")
		wantCode(t, r.a.Check(r.t.Context(), &wrong, r.netns), agentapi.CodeCheckFailed, "recreate")
		r.kernel.broken["c1"] = errors.New("route to " + a.String() + " is missing")
		wantCode(t, r.a.Check(r.t.Context(), at, r.netns), agentapi.CodeCheckFailed, "route to")
		if b := r.mustAdd("c1"); b == a {
			t.Errorf("the broken endpoint was answered again as %s", b)
		}
		delete(r.kernel.broken, "c1")
		r.del("c1")
		r.del("c1")
		wantCode(t, r.a.Check(r.t.Context(), at, r.netns), agentapi.CodeUnknownContainer, "ADD")
		in := r.inspect()
		if len(in.Endpoints) != 2 || in.Endpoints[0].State != "tombstone" || !in.Healthy || in.Node.InstanceID != string(testInstance) || in.Limits.MaxPods != 29 {
			t.Errorf("inspection %+v", in)
		}
		time.Sleep(31 * time.Second)
		synctest.Wait()
		if eps, _ := r.kernel.Endpoints(); len(eps) != 0 {
			t.Errorf("tombstones left after the cooldown: %v", eps)
		}
		got := r.metrics()
		for _, want := range []string{`underlay_ready 1`, `underlay_addresses{state="bound"} 0`, `underlay_dropped_packets_total{reason="source"} 3`, `underlay_ec2_calls_total{call="assign",outcome="done"}`} {
			if !strings.Contains(got, want) {
				t.Errorf("metrics lack %s:\n%s", want, got)
			}
		}
	})
}

func TestBurst(t *testing.T) {
	run(t, "m6i.4xlarge", func(r *rig) {
		r.start()
		r.mustAdd("first")
		began := time.Now()
		var wg sync.WaitGroup
		var mu sync.Mutex
		seen := map[netip.Addr]string{}
		for i := range 230 {
			wg.Go(func() {
				id := fmt.Sprintf("c%d", i)
				res, err := r.add(id)
				if err != nil {
					t.Errorf("add %s: %v", id, err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				if o, dup := seen[res.Addr]; dup {
					t.Errorf("%s: %s and %s", res.Addr, o, id)
				}
				seen[res.Addr] = id
			})
		}
		wg.Wait()
		t.Logf("230 pods in %s of virtual time, %d writes", time.Since(began), r.cloud.written())
		if d := time.Since(began); d > 5*time.Second {
			t.Errorf("took %s", d)
		}
	})
}

func TestRestartWritesNothing(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		r.start()
		addrs := map[string]netip.Addr{}
		for i := range 11 {
			id := fmt.Sprintf("c%d", i)
			addrs[id] = r.mustAdd(id)
		}
		time.Sleep(10 * time.Second)
		r.del("c3")
		time.Sleep(5 * time.Second)
		writes := r.cloud.written()
		r.start()
		began := time.Now()
		for id, a := range addrs {
			if id == "c3" {
				continue
			}
			if b := r.mustAdd(id); a != b {
				t.Errorf("%s had %s, after the restart %s", id, a, b)
			}
		}
		if d := time.Since(began); d > 500*time.Millisecond {
			t.Errorf("served after %s", d)
		}
		time.Sleep(5 * time.Second)
		if n := r.cloud.written(); n != writes {
			t.Errorf("the restart wrote to EC2: %v", r.cloud.writes[writes:])
		}
		if a := r.mustAdd("new"); a == addrs["c3"] {
			t.Errorf("%s was given out within its cooldown", a)
		}
	})
}

func TestStartWaitsAndSaysForWhat(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		r.cloud.noIMDS = errors.New("connection refused")
		r.start()
		time.Sleep(time.Second)
		wantCode(t, r.a.Status(r.t.Context()), agentapi.CodeNotAvailable, "169.254.169.254")
		_, err := r.add("c1")
		wantCode(t, err, agentapi.CodeTryAgain, "connection refused")
		r.del("c1") // needs no cloud
		if in := r.inspect(); in.Healthy || in.Reason == "" || len(in.LastErrors) == 0 {
			t.Errorf("inspection %+v", in)
		}
		r.cloud.mu.Lock()
		r.cloud.noIMDS = nil
		r.cloud.mu.Unlock()
		r.cloud.setFail(func(call string) error {
			if call == "describe" {
				return apiError("UnauthorizedOperation")
			}
			return nil
		})
		time.Sleep(20 * time.Second)
		wantCode(t, r.a.Status(r.t.Context()), agentapi.CodeNotAvailable, "IAM")
		r.cloud.setFail(nil)
		time.Sleep(40 * time.Second)
		r.mustAdd("c1")
		if err := r.a.Status(r.t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestEC2SaysNo(t *testing.T) {
	for _, tc := range []struct {
		err    string
		code   agentapi.Code
		says   string
		within time.Duration
	}{
		{"UnauthorizedOperation", agentapi.CodeDenied, "IAM policy", time.Second},
		{"InsufficientFreeAddressesInSubnet", agentapi.CodeSubnetFull, "larger subnet", 51 * time.Second},
		{"RequestLimitExceeded", agentapi.CodeTryAgain, "throttles", 51 * time.Second},
		{"InternalError", agentapi.CodeTryAgain, "does not answer", 51 * time.Second},
	} {
		t.Run(tc.err, func(t *testing.T) {
			run(t, "m5.large", func(r *rig) {
				r.cloud.setFail(func(call string) error {
					if call == "assign" || call == "create" {
						return apiError(tc.err)
					}
					return nil
				})
				r.start()
				time.Sleep(200 * time.Millisecond)
				began := time.Now()
				_, err := r.add("c1")
				wantCode(t, err, tc.code, tc.says)
				if d := time.Since(began); d > tc.within {
					t.Errorf("answered after %s", d)
				}
				wantCode(t, r.a.Status(r.t.Context()), agentapi.CodeNotAvailable, tc.says)
				full := `underlay_subnet_exhausted{lacks="address",subnet="` + string(testSubnet) + `"} `
				if want := tc.code == agentapi.CodeSubnetFull; strings.Contains(r.metrics(), full+"1") != want {
					t.Errorf("the subnet counts as exhausted: %t, want %t:\n%s", !want, want, r.metrics())
				}
				if n := r.cloud.written(); n > 60 {
					t.Errorf("%d calls", n)
				}
				r.cloud.setFail(nil)
				time.Sleep(90 * time.Second)
				r.mustAdd("c2")
				if !strings.Contains(r.metrics(), full+"0") {
					t.Errorf("the subnet has room again, and the metrics do not say so:\n%s", r.metrics())
				}
			})
		})
	}
}

func TestWithdrawnAdd(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		r.start()
		r.mustAdd("c0")
		ctx, cancel := context.WithCancel(r.t.Context())
		r.cloud.setFail(func(call string) error {
			if call == "assign" {
				return apiError("RequestLimitExceeded")
			}
			return nil
		})
		time.Sleep(5 * time.Second)
		r.mustAdd("c1") // takes what was free
		ended := make(chan error)
		go func() {
			_, err := r.a.Add(ctx, &agentapi.Attachment{ContainerID: "c2", IfName: "eth0"}, 0, r.netns)
			ended <- err
		}()
		time.Sleep(time.Second)
		if in := r.inspect(); in.Waiting != 1 {
			t.Errorf("%d requests wait", in.Waiting)
		}
		cancel()
		if err := <-ended; err == nil {
			t.Error("withdrawn and served")
		}
		if in := r.inspect(); in.Waiting != 0 {
			t.Errorf("%d requests wait after the withdrawal", in.Waiting)
		}
	})
}

func TestKernelSaysNo(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		r.start()
		time.Sleep(5 * time.Second)
		r.kernel.addErr = errors.New("out of memory")
		held := r.inspect().ENIs[0].Addresses.Total
		for range 5 {
			_, err := r.add("c1")
			wantCode(t, err, agentapi.CodeDatapath, "out of memory")
		}
		time.Sleep(5 * time.Second)
		if n := r.inspect().ENIs[0].Addresses; n.Total > held+1 || n.Cooling > 0 {
			t.Errorf("failed ADDs took addresses: %+v, %d before", n, held)
		}
		r.kernel.addErr = nil

		// A record that nobody told us of holds the free address.
		free := r.inspect().Addresses[0].IP
		r.kernel.mu.Lock()
		r.kernel.records[free] = datapath.Endpoint{ContainerID: "ghost", IfName: "eth0", Addr: free, State: datapath.Live}
		r.kernel.mu.Unlock()
		if a := r.mustAdd("c1"); a == free {
			t.Error("the ghost's address was given out")
		}
	})
}

func TestLostAddressIsReportedNotTaken(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		r.start()
		a := r.mustAdd("c1")
		time.Sleep(time.Minute)
		r.cloud.mu.Lock()
		for _, e := range r.cloud.enis {
			e.Secondary = nil
		}
		r.cloud.mu.Unlock()
		time.Sleep(15 * time.Minute)
		in := r.inspect()
		if len(in.Endpoints) != 1 || in.Endpoints[0].Problem == "" || in.Healthy {
			t.Errorf("inspection %+v", in)
		}
		wantCode(t, r.a.Check(r.t.Context(), &agentapi.Attachment{ContainerID: "c1", IfName: "eth0"}, r.netns), agentapi.CodeCheckFailed, "no longer lists "+a.String())
	})
}

func TestSpooledRelease(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		r.start()
		a := r.mustAdd("c1")
		r.mustAdd("c2")
		r.stop()
		if err := pipe.Spool(r.socket, "c1", "eth0"); err != nil {
			t.Fatal(err)
		}
		r.start()
		time.Sleep(time.Second)
		for _, ep := range r.inspect().Endpoints {
			if want := map[bool]string{true: "tombstone", false: "live"}[ep.ContainerID == "c1"]; ep.State != want {
				t.Errorf("%s is %s, want %s", ep.ContainerID, ep.State, want)
			}
		}
		if b := r.mustAdd("c1"); a == b {
			t.Errorf("%s was given out within its cooldown", a)
		}
		time.Sleep(time.Minute)
		if _, ok := r.a.endpoint(key{"c1", "eth0"}); !ok {
			t.Error("the release from before took the endpoint from after")
		}
	})
}

func TestGC(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		r.start()
		for i := range 5 {
			r.mustAdd(fmt.Sprintf("c%d", i))
		}
		if err := r.a.GC(r.t.Context(), []agentapi.Attachment{{ContainerID: "c1", IfName: "eth0"}, {ContainerID: "c4", IfName: "eth0"}, {ContainerID: "c2", IfName: "eth9"}}); err != nil {
			t.Fatal(err)
		}
		var live []string
		for _, ep := range r.inspect().Endpoints {
			if ep.State == "live" {
				live = append(live, ep.ContainerID)
			}
		}
		if len(live) != 2 {
			t.Errorf("live after GC: %v", live)
		}
	})
}

func TestNodeFull(t *testing.T) {
	run(t, "t3.small", func(r *rig) {
		r.start()
		for i := range 9 {
			r.mustAdd(fmt.Sprintf("c%d", i))
		}
		_, err := r.add("more")
		wantCode(t, err, agentapi.CodeNodeFull, "at most 9")
		if err := r.a.Status(r.t.Context()); err != nil {
			t.Errorf("a full node that runs pods is called unavailable: %v", err)
		}
	})
}

func TestLockIsForOne(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "agent.sock")
	log := slog.New(slog.DiscardHandler)
	first, err := Lock(t.Context(), socket, log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Lock(ctx, socket, log); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the second agent: %v", err)
	}
	first.Close()
	second, err := Lock(t.Context(), socket, log)
	if err != nil {
		t.Fatal(err)
	}
	second.Close()
}

func TestCodesForEveryKind(t *testing.T) {
	for k := ipam.KindSlow; k <= ipam.KindRefused; k++ {
		var e *agentapi.Error
		if err := addressError(&ipam.Error{Kind: k}); !errors.As(err, &e) || e.Code == 0 || !strings.Contains(e.Message, ";") {
			t.Errorf("%s: %v has no code or no next step", k, err)
		}
	}
}

// What others take away from the interfaces' routing is put back at once when
// it is heard of, and soon when it is not.
func TestRepair(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		r.start()
		r.mustAdd("c1")
		sets := func() int {
			r.kernel.mu.Lock()
			defer r.kernel.mu.Unlock()
			return r.kernel.sets
		}
		synctest.Wait()
		before := sets()
		for range 5 { // a burst is one change
			r.kernel.damage <- struct{}{}
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if got := sets() - before; got < 1 || got > 2 {
			t.Errorf("%d repairs of one burst of damage", got)
		}
		// An address that the host takes for itself is not a pod's any more.
		taken := r.addresses("free")
		r.kernel.mu.Lock()
		r.kernel.foreign = taken
		r.kernel.mu.Unlock()
		r.kernel.damage <- struct{}{}
		time.Sleep(repairSettle + time.Millisecond)
		synctest.Wait()
		if got := r.addresses("foreign"); !slices.Equal(got, taken) || len(taken) == 0 {
			t.Errorf("foreign are %v, want %v", got, taken)
		}
		before = sets()
		time.Sleep(repairEvery)
		synctest.Wait()
		if sets() == before {
			t.Error("nothing was looked at unasked")
		}
	})
}

// The VPC's ranges are followed, and what others have in the way is told.
func TestSurvey(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		first, second := netip.MustParsePrefix("10.0.0.0/16"), netip.MustParsePrefix("198.51.100.0/24")
		set := func(obstacle string, err error, cidrs ...netip.Prefix) {
			r.cloud.mu.Lock()
			r.cloud.cidrs, r.cloud.noIMDS = cidrs, err
			r.cloud.mu.Unlock()
			r.kernel.mu.Lock()
			r.kernel.obstacle = obstacle
			r.kernel.mu.Unlock()
		}
		look := func(want ...netip.Prefix) agentapi.Inspection {
			t.Helper()
			synctest.Wait()
			r.kernel.mu.Lock()
			got := r.kernel.vpc
			r.kernel.mu.Unlock()
			if !slices.Equal(got, want) {
				t.Errorf("the datapath knows %v of the VPC, want %v", got, want)
			}
			in, err := r.a.Inspect(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(in.Node.VPCCIDRs, want) {
				t.Errorf("told are %v, want %v", in.Node.VPCCIDRs, want)
			}
			return *in
		}
		says := func(in agentapi.Inspection, op, text string) bool {
			return slices.ContainsFunc(in.LastErrors, func(i agentapi.Incident) bool { return i.Op == op && strings.Contains(i.Message, text) })
		}
		set("", nil, first)
		r.start()
		if in := look(first); len(in.LastErrors) > 0 {
			t.Errorf("incidents: %+v", in.LastErrors)
		}
		set("FORWARD drops", nil, first, second)
		time.Sleep(repairEvery)
		if in := look(first, second); !says(in, "forwarding", "FORWARD drops") || !in.Healthy {
			t.Errorf("healthy: %v, incidents: %+v", in.Healthy, in.LastErrors)
		}
		set("", errors.New("no metadata"), first)
		time.Sleep(repairEvery)
		if in := look(first, second); !says(in, "vpc", "stay as they were known") {
			t.Errorf("incidents: %+v", in.LastErrors)
		}
	})
}

// Peered VPCs are asked for seldom, and a refusal is no more than told.
func TestPeers(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		peer := netip.MustParsePrefix("198.51.100.0/24")
		set := func(err error, peers ...netip.Prefix) {
			r.cloud.mu.Lock()
			defer r.cloud.mu.Unlock()
			r.cloud.peers, r.cloud.noPeers = peers, err
		}
		known := func(want ...netip.Prefix) {
			t.Helper()
			synctest.Wait()
			r.kernel.mu.Lock()
			defer r.kernel.mu.Unlock()
			if !slices.Equal(r.kernel.peers, want) {
				t.Errorf("the datapath knows the peers %v, want %v", r.kernel.peers, want)
			}
		}
		set(errors.New("not allowed"))
		r.start()
		r.mustAdd("c1")
		known()
		in, err := r.a.Inspect(context.Background())
		if err != nil || !in.Healthy || !slices.ContainsFunc(in.LastErrors, func(i agentapi.Incident) bool {
			return i.Op == "peers" && strings.Contains(i.Message, "--snat-exclude")
		}) {
			t.Errorf("%+v, %v", in, err)
		}
		set(nil, peer)
		time.Sleep(peersAgain)
		known(peer)
		set(nil)
		time.Sleep(peersEvery / 2)
		known(peer)
		time.Sleep(peersEvery / 2)
		known()
	})
}
