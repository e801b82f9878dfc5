package ipam

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/vpc"
)

func TestOnePodOnASmallNodeHoldsThree(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	w.start()
	w.pass(5 * time.Second)
	if w.held() != 2 {
		t.Errorf("idle node holds %d addresses, want its own and one", w.held())
	}
	w.add(1, Pool{})
	if _, ok := w.replies[1]; !ok {
		t.Error("a free address was at hand and the request waits")
	}
	w.pass(5 * time.Second)
	w.got(1)
	if w.held() != 3 {
		t.Errorf("with one pod the node holds %d addresses, want 3", w.held())
	}
}

func TestMinimumCountsWhatIsInUse(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	w.s.Config.Floor, w.s.Config.Minimum = 1, 6
	w.start()
	for pods, want := range []int{6, 6, 6, 6, 6, 6, 7, 8} { // pool addresses with so many pods
		w.pass(10 * time.Second)
		if got := w.held() - 1; got != want { // without the node's own
			t.Errorf("with %d pods the pool holds %d addresses, want %d", pods, got, want)
		}
		w.add(RequestID(pods+1), Pool{})
	}
}

func TestFloorBeyondTheTypeIsNoTrouble(t *testing.T) {
	w := newWorld(t, "t3.small", 1) // 3 ENIs of 4 addresses
	w.s.Config.Floor = 100
	w.start()
	w.pass(time.Minute)
	if w.held() != 12 {
		t.Errorf("the node holds %d addresses, want all 12", w.held())
	}
	if trouble := w.s.Trouble[Pool{}]; trouble != nil {
		t.Errorf("a full pool is trouble: %v", trouble)
	}
	w.add(1, Pool{})
	w.pass(time.Second)
	w.got(1)
}

func TestBurstFillsENIsInParallel(t *testing.T) {
	for _, prefixes := range []bool{false, true} {
		t.Run(fmt.Sprint("prefixes=", prefixes), func(t *testing.T) {
			w := newWorld(t, "m6i.4xlarge", 1)
			w.s.Config.Prefixes = prefixes
			w.start()
			w.pass(time.Second)
			began, calls := w.now, w.calls
			for i := range 230 {
				w.add(RequestID(i+1), Pool{})
				w.pass(100 * time.Microsecond)
			}
			for len(w.replies) < 230 && w.now.Sub(began) < 50*time.Second {
				w.pass(10 * time.Millisecond)
			}
			seen := map[netip.Addr]bool{}
			for i := range 230 {
				a := w.got(RequestID(i + 1))
				if seen[a] {
					t.Fatalf("%s given twice", a)
				}
				seen[a] = true
			}
			t.Logf("230 pods in %s, %d calls", w.now.Sub(began), w.calls-calls)
			if d := w.now.Sub(began); d > 5*time.Second {
				t.Errorf("took %s", d)
			}
			if n := w.calls - calls; n > 50 {
				t.Errorf("%d calls", n)
			}
		})
	}
}

func TestNodeFullIsSaidAtOnce(t *testing.T) {
	w := newWorld(t, "t3.small", 1) // 3 ENIs × 4: 9 pods
	w.start()
	for i := range 9 {
		w.add(RequestID(i+1), Pool{})
	}
	w.pass(10 * time.Second)
	for i := range 9 {
		w.got(RequestID(i + 1))
	}
	w.add(10, Pool{})
	r, ok := w.replies[10]
	if !ok || r.Err == nil || r.Err.Kind != KindNodeFull {
		t.Fatalf("reply %+v, want node-full at once", r)
	}
	if msg := r.Err.Error(); !strings.Contains(msg, "at most 9") || !strings.Contains(msg, "larger instance type") {
		t.Errorf("message %q", msg)
	}

	// An address that cools down is worth waiting for.
	w.send(Released{At: w.now, Addr: w.got(3), When: w.now})
	w.add(11, Pool{})
	if r, ok := w.replies[11]; ok {
		t.Fatalf("answered %+v while an address cools down", r)
	}
	w.pass(29 * time.Second)
	if _, ok := w.replies[11]; ok {
		t.Fatal("the cooldown was cut short")
	}
	w.pass(2 * time.Second)
	if w.got(11) != w.got(3) || w.forgot[w.got(3)] != 1 {
		t.Errorf("got %s, forgot %v", w.got(11), w.forgot)
	}
}

func TestTroubleReachesWhoWaits(t *testing.T) {
	for _, tc := range []struct {
		name    string
		class   Class
		outcome Outcome
		kind    Kind
		within  time.Duration
		says    string
	}{
		{"subnet full", ClassSubnetFull, Refused, KindSubnetFull, 51 * time.Second, "larger subnet"},
		{"throttled", ClassThrottled, Refused, KindThrottled, 51 * time.Second, "throttles"},
		{"denied", ClassDenied, Refused, KindDenied, time.Second, "IAM policy"},
		{"no answer", ClassUnavailable, Unknown, KindUnavailable, 51 * time.Second, "EC2 endpoint"},
		{"other", ClassOther, Refused, KindRefused, 51 * time.Second, "log"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, "m5.large", 1)
			w.s.Config.Floor = 0
			happened := false
			w.fail = func(a Action) (Outcome, Class) { happened = true; return tc.outcome, tc.class }
			w.rng = rand.New(rand.NewPCG(3, 3))
			w.start()
			w.pass(time.Second)
			calls := w.calls
			if tc.outcome == Unknown {
				w.fail = func(Action) (Outcome, Class) { return Unknown, tc.class }
				w.free = 0 // what may have happened did not
			}
			w.add(1, Pool{})
			w.pass(tc.within)
			r, ok := w.replies[1]
			if !ok || r.Err == nil {
				w.dump()
				t.Fatalf("reply %+v (%v), asked %v", r, ok, happened)
			}
			if r.Err.Kind != tc.kind || !strings.Contains(r.Err.Error(), tc.says) {
				t.Errorf("%s: %v", r.Err.Kind, r.Err)
			}
			if n := w.calls - calls; n > 60 {
				t.Errorf("%d calls in %s", n, tc.within)
			}
		})
	}
}

// A step of growth that EC2 denies is told to who waits, whichever it is: an
// interface that was made and attached is of no use until it is ours to keep.
func TestDeniedStepOfGrowthReachesWhoWaits(t *testing.T) {
	for _, denied := range []Action{CreateENI{}, AttachENI{}, SetDeleteOnTermination{}} {
		t.Run(fmt.Sprintf("%T", denied), func(t *testing.T) {
			w := newWorld(t, "m5.large", 1)
			w.fail = func(a Action) (Outcome, Class) {
				if fmt.Sprintf("%T", a) == fmt.Sprintf("%T", denied) {
					return Refused, ClassDenied
				}
				return Done, 0
			}
			w.start()
			w.addTwelve()
			w.pass(51 * time.Second)
			told := 0
			for _, r := range w.replies {
				if r.Err == nil {
					continue
				}
				if told++; r.Err.Kind != KindDenied {
					t.Errorf("answer: %v", r.Err)
				}
			}
			if len(w.replies) != 12 || told != 3 || w.s.Trouble[Pool{}] == nil { // the rest fill the ENI at hand
				t.Errorf("%d answers, %d errors, want 12 and 3; trouble %v", len(w.replies), told, w.s.Trouble[Pool{}])
			}
		})
	}
}

// At the account's quota of interfaces those that are there are filled, and who
// goes without is told of the quota: the node is not full.
func TestQuotaIsToldThoughOtherENIsGrow(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	w.fail = func(a Action) (Outcome, Class) {
		if _, ok := a.(CreateENI); ok {
			return Refused, ClassAccountLimit
		}
		return Done, 0
	}
	w.start()
	w.addTwelve()
	w.pass(51 * time.Second)
	served := 0
	for _, r := range w.replies {
		if r.Err == nil {
			served++
		} else if r.Err.Kind != KindQuota {
			t.Errorf("answer: %v", r.Err)
		}
	}
	if len(w.replies) != 12 || served != 9 {
		t.Errorf("%d answers, %d of them addresses; want 12 and 9", len(w.replies), served)
	}
}

func TestShortSubnetGivesWhatItHas(t *testing.T) {
	w := newWorld(t, "m6i.4xlarge", 1)
	w.free = 11
	w.start()
	for i := range 20 {
		w.add(RequestID(i+1), Pool{})
	}
	w.pass(20 * time.Second)
	n := 0
	for _, r := range w.replies {
		if r.Err == nil {
			n++
		}
	}
	if n < 10 {
		t.Errorf("%d of 11 addresses served", n)
	}
}

func TestFragmentedSubnetFallsBackToSingles(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	w.s.Config.Prefixes = true
	tried, whole := 0, false
	w.fail = func(a Action) (Outcome, Class) {
		if _, ok := a.(AssignPrefixes); ok {
			if tried++; !whole {
				return Refused, ClassNoPrefix
			}
		}
		return Done, 0
	}
	w.start()
	w.add(1, Pool{})
	w.pass(10 * time.Second)
	w.got(1)
	if tried != 1 || w.held() > 3 {
		t.Errorf("%d tries for a prefix, %d addresses held", tried, w.held())
	}
	whole = true
	w.pass(20 * time.Minute) // the longest it waits
	for id := range RequestID(4) {
		w.add(2+id, Pool{})
	}
	w.pass(10 * time.Second)
	if tried < 2 || w.held() < 1+16 {
		t.Errorf("healed: %d tries for a prefix, %d addresses held", tried, w.held())
	}
}

func TestUnknownEndIsReadBeforeItIsRepeated(t *testing.T) {
	for _, happens := range []bool{false, true} {
		w := newWorld(t, "m5.large", 1)
		w.s.Config.Floor = 0
		w.start()
		w.pass(time.Second)
		once := true
		w.fail = func(a Action) (Outcome, Class) {
			if _, ok := a.(AssignAddresses); ok && once {
				once = false
				return Unknown, ClassUnavailable
			}
			return Done, 0
		}
		for w.rng = rand.New(rand.NewPCG(uint64(w.seq), 9)); ; { // find the coin that we want
			c := *w.rng
			if (c.IntN(2) == 0) == happens {
				break
			}
			w.rng.IntN(2)
		}
		w.add(1, Pool{})
		w.pass(10 * time.Second)
		w.got(1)
		if w.held() != 2 {
			t.Errorf("happens=%v: holds %d addresses, want 2: the end of the call was guessed", happens, w.held())
		}
	}
}

func TestStaleReadEvictsNobody(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	w.start()
	w.add(1, Pool{})
	w.pass(time.Minute)
	addr := w.got(1)
	w.hide = true
	w.pass(30 * time.Minute)
	if a, _ := w.s.Lookup(addr); a == nil || a.State != Bound || len(w.reports) != 1 || w.reports[0].Addr != addr {
		w.dump()
		t.Errorf("after stale reads %+v, reports %+v; want bound, and one report", a, w.reports)
	}
	if held := w.held(); held > 10 {
		t.Errorf("stale reads made the node take %d addresses", held)
	}
	w.hide = false
	w.pass(11 * time.Minute)
	if a, _ := w.s.Lookup(addr); a.Reported || !a.Missing.IsZero() {
		t.Errorf("listed again and still %+v", a)
	}
}

func TestRestartKnowsAllAndWritesNothing(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	w.start()
	for i := range 12 {
		w.add(RequestID(i+1), Pool{})
	}
	w.pass(30 * time.Second)
	w.send(Released{At: w.now, Addr: w.got(2), When: w.now})
	w.pass(10 * time.Second)
	var eps []Endpoint
	for i := range 12 {
		ep := Endpoint{Addr: w.got(RequestID(i + 1)), Owner: fmt.Sprintf("c%d/eth0", i+1), Live: i != 1}
		if !ep.Live {
			ep.Released = w.now.Add(-10 * time.Second)
		}
		eps = append(eps, ep)
	}
	cfg := w.s.Config
	w.s, w.queue, w.timer = State{Config: cfg}, nil, time.Time{}
	calls := w.calls
	w.start(eps...)
	w.pass(5 * time.Second)
	if n := w.calls - calls; n != 1 {
		t.Errorf("%d calls after the restart, want one read", n)
	}
	for i, ep := range eps {
		a, e := w.s.Lookup(ep.Addr)
		if a == nil || e == nil || (a.State == Bound) != (i != 1) {
			t.Errorf("endpoint %s is %+v", ep.Addr, a)
		}
	}
	w.add(100, Pool{})
	w.pass(time.Second)
	if w.got(100) == eps[1].Addr {
		t.Error("an address in cooldown was given out after a restart")
	}
}

func TestOrphanOfACrashIsUsedOrSwept(t *testing.T) {
	w := newWorld(t, "t3.small", 1)
	e := w.newENI()
	e.Tags[TagCluster], e.Tags[TagInstance] = "test", string(testInstance)
	w.start()
	for i := range 5 {
		w.add(RequestID(i+1), Pool{})
	}
	w.pass(10 * time.Second)
	for i := range 5 {
		w.got(RequestID(i + 1))
	}
	if e.Instance == "" || len(w.enis) != 2 {
		t.Errorf("the half-made ENI was not used: %d ENIs", len(w.enis))
	}

	w = newWorld(t, "t3.small", 1)
	e = w.newENI()
	e.Tags[TagCluster], e.Tags[TagInstance] = "test", string(testInstance)
	w.start()
	w.pass(2 * time.Minute)
	if len(w.enis) != 1 {
		t.Error("the half-made ENI was not swept")
	}
}

func TestForeignENIsAreLeftAlone(t *testing.T) {
	w := newWorld(t, "t3.small", 1)
	f := w.newENI()
	f.Instance, f.DeviceIndex, f.Attached = testInstance, 1, true
	f.Secondary = []netip.Addr{w.take(), w.take()}
	before := len(f.Secondary)
	w.start()
	for i := range 6 {
		w.add(RequestID(i+1), Pool{})
	}
	w.pass(10 * time.Second)
	for i := range 6 {
		if a := w.got(RequestID(i + 1)); f.Holds(a) {
			t.Errorf("%s is the foreign ENI's", a)
		}
	}
	if len(f.Secondary) != before || f.DeleteOnTermination {
		t.Error("the foreign ENI was changed")
	}
	w.add(7, Pool{})
	if r := w.replies[7]; r.Err == nil || r.Err.Max != 6 {
		t.Errorf("reply %+v, want node-full with 6", r)
	}
}

func TestENIsOfOtherKindsAreLeftAlone(t *testing.T) {
	for _, tc := range []struct {
		name string
		set  func(*vpc.ENI)
	}{
		{"untagged", func(e *vpc.ENI) { e.Tags = nil }},
		{"no_manage", func(e *vpc.ENI) { e.Tags[TagNoManage] = "true" }},
		{"another cluster's", func(e *vpc.ENI) { e.Tags[TagCluster] = "other" }},
		{"trunk", func(e *vpc.ENI) { e.Type = "trunk" }},
		{"EFA", func(e *vpc.ENI) { e.Type = "efa" }},
		{"a managed service's", func(e *vpc.ENI) { e.RequesterOwned = true }},
		{"second card", func(e *vpc.ENI) { e.NetworkCard = 1 }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, "m5.large", 1)
			f := w.newENI()
			f.Instance, f.DeviceIndex, f.Attached = testInstance, 1, true
			f.Tags = map[string]string{TagCluster: "test", TagInstance: string(testInstance)}
			f.Secondary = []netip.Addr{w.take()}
			tc.set(f)
			w.start()
			for i := range 12 {
				w.add(RequestID(i+1), Pool{})
			}
			w.pass(20 * time.Second)
			for i := range 12 {
				if a := w.got(RequestID(i + 1)); f.Holds(a) {
					t.Errorf("%s is of an interface that is not ours", a)
				}
			}
			if len(w.enis) != 3 || len(f.Secondary) != 1 || f.DeleteOnTermination {
				t.Errorf("%d interfaces, the foreign one is %+v", len(w.enis), f)
			}
		})
	}
}

// An address that the node itself, an Elastic IP or another CNI uses is not
// handed out, not given back, and rests before a pod gets it.
func TestForeignAddressesAreUsed(t *testing.T) {
	for _, tc := range []struct {
		name     string
		prefixes bool
		set      func(*world, []netip.Addr)
	}{
		{"on the host", false, func(w *world, a []netip.Addr) { w.host = a }},
		{"Elastic IP", false, func(w *world, a []netip.Addr) { w.enis["eni-00000000000000001"].Elastic = a }},
		{"on the host, in a prefix", true, func(w *world, a []netip.Addr) { w.host = a }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, "m5.large", 1)
			w.s.Config.Prefixes = tc.prefixes
			own := w.enis["eni-00000000000000001"]
			if tc.prefixes {
				w.assignPrefixes(own.ID, 1)
			} else {
				own.Secondary = []netip.Addr{w.take(), w.take(), w.take()}
			}
			taken := slices.Clone(own.Secondary)
			if tc.prefixes {
				taken = []netip.Addr{own.Prefixes[0].Addr().Next()}
			}
			tc.set(w, taken)
			w.start()
			for i := range 4 {
				w.add(RequestID(i+1), Pool{})
			}
			w.pass(10 * time.Second)
			for i := range 4 {
				if a := w.got(RequestID(i + 1)); slices.Contains(taken, a) {
					t.Errorf("%s is in use by others and was handed out", a)
				}
			}
			for i := range 4 {
				w.send(Released{At: w.now, Addr: w.got(RequestID(i + 1)), When: w.now})
			}
			w.pass(30 * time.Minute)
			for _, a := range taken {
				if !own.Holds(a) {
					t.Errorf("%s is in use by others and was given back", a)
				}
			}
			// It is free again: at the next look, and after a cooldown.
			tc.set(w, nil)
			w.pass(w.s.Config.Reconcile + w.s.Config.Cooldown)
			for _, a := range taken {
				if ad, _ := w.s.Lookup(a); ad != nil && ad.Foreign() {
					t.Errorf("%s is still foreign", a)
				}
			}
			w.pass(w.s.Config.Reconcile + w.s.Config.Linger)
			if got := w.held(); !tc.prefixes && got > 3 {
				t.Errorf("%d addresses are held at the end", got)
			}
		})
	}
}

func TestForeignAddressRestsBeforeAPodGetsIt(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	own := w.enis["eni-00000000000000001"]
	own.Secondary = []netip.Addr{w.take()}
	w.host = slices.Clone(own.Secondary)
	w.start()
	w.pass(5 * time.Second)
	w.host = nil
	w.send(ObservedLinks{At: w.now, Ready: []vpc.ENIID{own.ID}})
	if a, _ := w.s.Lookup(own.Secondary[0]); a.State != Cooling || !a.Until.Equal(w.now.Add(w.s.Config.Cooldown)) {
		t.Errorf("%+v, want it to cool down", a)
	}
}

func TestPoolsBySecurityGroups(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	w.start()
	w.pass(time.Second)
	w.add(1, Pool{Groups: "sg-app,sg-db"})
	w.add(2, Pool{})
	w.add(3, Pool{Groups: "sg-app,sg-db"})
	w.pass(10 * time.Second)
	on := func(id RequestID) vpc.GroupSet {
		return vpc.NewGroupSet(w.enis[w.replies[id].ENI].Groups)
	}
	w.got(1)
	w.got(2)
	w.got(3)
	if on(1) != "sg-app,sg-db" || on(3) != "sg-app,sg-db" || on(2) != "sg-node" || w.replies[1].ENI != w.replies[3].ENI {
		t.Errorf("pods ended on %s, %s, %s", on(1), on(2), on(3))
	}
	// The pool has no floor: its interface goes when it was unused for a while.
	w.send(Released{At: w.now, Addr: w.got(1), When: w.now})
	w.send(Released{At: w.now, Addr: w.got(3), When: w.now})
	w.pass(w.s.Config.Cooldown + w.s.Config.SetLinger - time.Second)
	if n := len(w.enis); n != 2 {
		t.Errorf("%d interfaces are left, want the set's own still there", n)
	}
	w.pass(11 * time.Second)
	if n := len(w.enis); n != 1 {
		t.Errorf("%d interfaces are left, want the node's own", n)
	}
}

// A pool in another subnet gets an interface there, with the node's own groups
// unless it names some; a later agent finds it by its subnet.
func TestPoolsBySubnet(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	w.start()
	w.pass(time.Second)
	there := Pool{Subnet: "subnet-2"}
	w.add(1, there)
	w.add(2, Pool{})
	w.pass(10 * time.Second)
	w.got(2)
	first := w.enis[w.replies[1].ENI]
	if w.got(1); first.Subnet != "subnet-2" || vpc.NewGroupSet(first.Groups) != "sg-node" || w.enis[w.replies[2].ENI].Subnet != "subnet-1" {
		t.Errorf("pods ended in %s (%v) and %s", first.Subnet, first.Groups, w.enis[w.replies[2].ENI].Subnet)
	}

	bound := []Endpoint{{Addr: w.got(1), Owner: "c1/eth0", ENI: first.ID, Live: true}, {Addr: w.got(2), Owner: "c2/eth0", Live: true}}
	w.s = State{Config: w.s.Config}
	w.start(bound...)
	w.pass(5 * time.Second)
	w.add(3, there)
	w.add(4, Pool{})
	w.pass(10 * time.Second)
	w.got(3)
	w.got(4)
	if w.replies[3].ENI != first.ID || w.enis[w.replies[4].ENI].Subnet != "subnet-1" {
		t.Errorf("after a restart pods ended on %s and %s, want %s and one in subnet-1", w.replies[3].ENI, w.replies[4].ENI, first.ID)
	}
}

// A pool gets no interface when the others have all: its pods wait and then
// hear who has them and what to do, and the default pool's go on.
func TestPoolWithoutAnInterface(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	w.start()
	w.pass(time.Second)
	w.add(1, Pool{Groups: "sg-a"})
	w.add(2, Pool{Groups: "sg-b"})
	w.pass(10 * time.Second)
	w.got(1)
	w.got(2)
	w.add(3, Pool{Groups: "sg-c"})
	w.add(4, Pool{})
	w.pass(time.Second)
	w.got(4)
	if r, ok := w.replies[3]; ok {
		t.Errorf("a third set on a type of three interfaces is answered at once: %+v", r)
	}
	if why, attaching, ok := w.s.Waits(3); !ok || attaching || why == nil || why.Kind != KindSetsFull {
		t.Errorf("it waits for %v, attaching %v, %v", why, attaching, ok)
	}
	w.send(Released{At: w.now, Addr: w.got(2), When: w.now})
	w.pass(2 * time.Minute)
	r := w.replies[3]
	if r.Err == nil || r.Err.Kind != KindSetsFull {
		t.Fatalf("a third set on a type of three interfaces: %+v", r)
	}
	for _, says := range []string{"security groups sg-c", "the 3 of a m5.large", "the node's own groups: 1 (1 pod)", "sg-a: 1 (1 pod)", "sg-b: 1 (no pod, goes back at 03:1", "; schedule the pod on another node"} {
		if !strings.Contains(r.Err.Error(), says) {
			t.Errorf("the error does not say %q: %s", says, r.Err)
		}
	}
	if n := w.s.SlotsLeft(); n != 0 {
		t.Errorf("%d slots are left", n)
	}
	// The idle set's interface makes room in the end.
	w.pass(w.s.Config.SetLinger)
	if n := w.s.SlotsLeft(); n != 1 {
		t.Errorf("%d slots are left", n)
	}
	w.add(5, Pool{Groups: "sg-c"})
	w.pass(10 * time.Second)
	w.got(5)
}

// A pod whose set finds its interface full gets the address of one that goes.
func TestSetWaitsForItsOwnPods(t *testing.T) {
	w := newWorld(t, "t3.small", 1) // three interfaces of four addresses
	w.start()
	w.pass(time.Second)
	a, b := Pool{Groups: "sg-a"}, Pool{Groups: "sg-b"}
	for id := range RequestID(3) {
		w.add(id+1, a)
	}
	w.add(10, b)
	w.pass(10 * time.Second)
	w.add(4, a)
	w.pass(5 * time.Second)
	w.send(Released{At: w.now, Addr: w.got(1), When: w.now})
	w.pass(w.s.Config.Cooldown + time.Second)
	if got := w.got(4); got != w.got(1) {
		t.Errorf("got %s, want %s, the only one there", got, w.got(1))
	}
}

// Somebody changes the groups of a set's interface: its pods stay, no further
// one gets an address there, and it goes when it is empty.
func TestSetWithForeignGroups(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	w.start()
	w.pass(time.Second)
	a := Pool{Groups: "sg-a"}
	w.add(1, a)
	w.pass(10 * time.Second)
	w.got(1)
	first := w.replies[1].ENI
	w.enis[first].Groups = []vpc.SecurityGroupID{"sg-z"}
	w.pass(w.s.Config.Reconcile + time.Minute)
	w.add(2, a)
	w.pass(10 * time.Second)
	w.got(2)
	if w.replies[2].ENI == first {
		t.Errorf("a pod of sg-a got an address on an interface of sg-z")
	}
	for _, u := range w.s.Sets() {
		if u.Groups == "sg-a" && (u.ENIs != 2 || u.Pods != 2 || u.Drifted != 1) {
			t.Errorf("the set is %+v", u)
		}
	}
	w.send(Released{At: w.now, Addr: w.got(1), When: w.now})
	w.pass(w.s.Config.Cooldown + 20*time.Second)
	if w.enis[first] != nil {
		t.Errorf("the interface with other groups is still there")
	}
}

// EC2 refuses a set: its pods hear so at once, and nobody else waits for it.
func TestSetThatEC2Refuses(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	w.fail = func(a Action) (Outcome, Class) {
		if c, ok := a.(CreateENI); ok && c.Pool.Groups == "sg-gone" {
			return Refused, ClassGroups
		}
		return Done, ClassOther
	}
	w.start()
	w.pass(time.Second)
	w.add(1, Pool{Groups: "sg-gone"})
	w.pass(300 * time.Millisecond)
	if r := w.replies[1]; r.Err == nil || r.Err.Kind != KindGroups || !strings.Contains(r.Err.Error(), "sg-gone") {
		t.Errorf("a set that EC2 refuses: %+v", r)
	}
	w.add(2, Pool{Groups: "sg-a"})
	w.pass(4 * time.Second)
	w.got(2)
}

func TestCanceledAndUnused(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	w.start()
	w.pass(time.Second)
	w.add(1, Pool{})
	a := w.got(1)
	w.send(Released{At: w.now, Addr: a, Unused: true})
	w.add(2, Pool{})
	if w.got(2) != a {
		t.Errorf("got %s, want the unused %s", w.got(2), a)
	}
	w.add(3, Pool{})
	w.send(Canceled{At: w.now, ID: 3})
	w.pass(time.Minute)
	if r, ok := w.replies[3]; ok {
		t.Errorf("a canceled request was answered: %+v", r)
	}
}

func TestCloneSharesNothing(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	w.start()
	w.add(1, Pool{})
	w.pass(10 * time.Second)
	before := w.s.Clone()
	snapshot := fmt.Sprintf("%+v", before.ENIs[0])
	held := before.Held()
	w.add(2, Pool{})
	w.send(Released{At: w.now, Addr: w.got(1), When: w.now})
	w.pass(10 * time.Minute)
	if got := fmt.Sprintf("%+v", before.ENIs[0]); got != snapshot || before.Held() != held {
		t.Errorf("the clone changed (-before +after):\n%s", cmp.Diff(snapshot, got))
	}
}

// TestRandom drives random histories with failures and a restart now and then,
// and holds the promises against each.
func TestRandom(t *testing.T) {
	runs := 150
	if testing.Short() {
		runs = 50
	}
	for seed := range uint64(runs) {
		ok := t.Run(fmt.Sprint(seed), func(t *testing.T) { randomHistory(t, seed) })
		if !ok {
			return
		}
	}
}

func randomHistory(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 7))
	w := newWorld(t, []string{"t3.small", "m5.large", "c5.xlarge"}[rng.IntN(3)], seed)
	w.s.Config.Prefixes = rng.IntN(3) == 0
	w.s.Config.Seed = seed
	if rng.IntN(4) == 0 {
		w.free = 20 + rng.IntN(30)
	}
	rate := rng.IntN(30)
	w.fail = func(Action) (Outcome, Class) {
		if rng.IntN(100) >= rate {
			return Done, 0
		}
		if rng.IntN(3) == 0 {
			return Unknown, ClassUnavailable
		}
		return Refused, []Class{ClassThrottled, ClassOther, ClassSubnetFull, ClassNotFound, ClassENIFull, ClassDenied, ClassInUse}[rng.IntN(7)]
	}
	w.start()
	var (
		live     = map[RequestID]netip.Addr{} // pods that run
		waiting  = map[RequestID]time.Time{}
		released = map[netip.Addr]time.Time{}
		id       RequestID
	)
	collect := func() {
		for q, deadline := range waiting {
			r, ok := w.replies[q]
			if !ok {
				if w.now.After(deadline) {
					w.dump()
					t.Fatalf("request %d waits past its deadline", q)
				}
				continue
			}
			delete(waiting, q)
			if r.Err != nil {
				continue
			}
			for o, a := range live {
				if a == r.Addr {
					w.dump()
					t.Fatalf("%s is in the hands of %d and %d", a, o, q)
				}
			}
			if at, ok := released[r.Addr]; ok && w.now.Sub(at) < w.s.Config.Cooldown {
				w.dump()
				t.Fatalf("%s was given out %s after its release", r.Addr, w.now.Sub(at))
			}
			if e := w.enis[r.ENI]; e == nil || !e.Holds(r.Addr) {
				w.dump()
				t.Fatalf("%s was given out and is not on %s", r.Addr, r.ENI)
			}
			live[q] = r.Addr
		}
	}
	for range 120 {
		switch n := rng.IntN(20); {
		case n < 9:
			for range 1 + rng.IntN(6) {
				id++
				waiting[id] = w.now.Add(50 * time.Second)
				w.add(id, []Pool{{}, {}, {}, {Groups: "sg-a"}}[rng.IntN(4)])
			}
		case n < 17:
			for q, a := range live {
				delete(live, q)
				released[a] = w.now
				w.send(Released{At: w.now, Addr: a, When: w.now})
				break
			}
		case n == 17 && len(waiting) > 0:
			for q := range waiting {
				if _, ok := w.replies[q]; !ok {
					delete(waiting, q)
					w.send(Canceled{At: w.now, ID: q})
				}
				break
			}
		case n == 18: // the agent is killed, its calls go on
			collect()
			var eps []Endpoint
			for q, a := range live {
				eps = append(eps, Endpoint{Addr: a, Owner: fmt.Sprintf("c%d/eth0", q), Live: true})
			}
			for a, at := range released {
				used := false
				for _, b := range live {
					used = used || a == b
				}
				if !used && w.now.Sub(at) < w.s.Config.Cooldown {
					eps = append(eps, Endpoint{Addr: a, Released: at})
				}
			}
			cfg := w.s.Config
			clear(waiting) // their plugins got an error
			queue := w.queue
			w.queue, w.timer = nil, time.Time{}
			for _, q := range queue {
				w.queue = append(w.queue, queued{q.at, func() Event { q.ev(); return nil }})
			}
			w.s = State{Config: cfg}
			w.start(eps...)
		}
		w.pass(time.Duration(rng.IntN(8000)) * time.Millisecond)
		collect()
		for q, a := range live {
			if e := w.enis[w.replies[q].ENI]; e == nil || !e.Holds(a) {
				w.dump()
				t.Fatalf("%s of a running pod is gone from EC2", a)
			}
		}
	}
	w.fail, w.free = nil, max(w.free, 100)
	w.pass(time.Minute)
	collect()
	if len(waiting) > 0 {
		t.Fatalf("%d requests never ended", len(waiting))
	}
	for _, a := range live {
		w.send(Released{At: w.now, Addr: a, When: w.now})
	}
	w.pass(40 * time.Minute)
	want := 2
	if w.s.Config.Prefixes {
		want = 17
	}
	if w.held() > want {
		w.dump()
		t.Errorf("empty, the node holds %d addresses on %d ENIs, want %d", w.held(), len(w.enis), want)
	}
	calls := w.calls
	w.pass(9 * time.Minute)
	if n := w.calls - calls; n > 1 {
		w.dump()
		t.Errorf("%d calls in nine quiet minutes", n)
	}
}
