package ipam

import (
	"testing"
	"time"
)

// reads lets time pass and returns when EC2 was read, since the start.
func reads(w *world, until time.Duration) []time.Duration {
	var at []time.Duration
	for {
		n, ok := w.next()
		if !ok || n.Sub(epoch) > until {
			return at
		}
		before := w.s.Reads[EC2].began
		w.step(n)
		if b := w.s.Reads[EC2].began; b.After(before) {
			at = append(at, b.Sub(epoch))
		}
	}
}

// Nodes that start at one moment do not read EC2 at one moment ever after.
func TestNodesReadApart(t *testing.T) {
	seen := map[time.Duration]int{}
	const nodes = 200
	for seed := range uint64(nodes) {
		w := newWorld(t, "m5.large", seed)
		w.s.Config.Seed = seed
		w.start()
		at := reads(w, 61*time.Minute)
		if len(at) < 6 || len(at) > 8 {
			t.Fatalf("EC2 was read at %v: want once per %s", at, w.s.Config.Reconcile)
		}
		if gap := at[3] - at[2]; gap < w.s.Config.Reconcile || gap > w.s.Config.Reconcile+time.Second {
			t.Fatalf("EC2 was read at %v: want once per %s", at, w.s.Config.Reconcile)
		}
		seen[at[2].Truncate(10*time.Second)]++
	}
	for at, n := range seen {
		if n > nodes/10 {
			t.Errorf("%d of %d nodes read within the ten seconds from %s on", n, nodes, at)
		}
	}
}

// While the account is short of requests, a node that knows what it has reads
// less often.
func TestThrottledReadsGrowRare(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	w.start()
	w.pass(time.Minute)
	w.s.Reads[EC2].wanted = time.Time{} // as when a read is under way
	w.s.Reads[EC2].retry.steps = 2      // refused twice, then let through
	w.send(ObservedEC2{At: w.now, Read: w.now, ENIs: w.view()})
	if next := w.s.Reads[EC2].wanted.Sub(w.now); next < 2*w.s.Config.Reconcile || next > 4*w.s.Config.Reconcile {
		t.Errorf("the next read comes after %s", next)
	}
	for range 12 {
		w.send(ReadFailed{At: w.now, Source: EC2, Class: ClassThrottled})
	}
	if next := w.s.Reads[EC2].wanted.Sub(w.now); next < time.Minute || next > 3*time.Minute {
		t.Errorf("after twelve refusals it tries again after %s", next)
	}
}

// Pods that start together, 20 ms apart, cost a few calls and not one each.
func TestPodsThatComeOneByOneShareCalls(t *testing.T) {
	w := newWorld(t, "m6i.4xlarge", 1)
	w.start()
	w.pass(10 * time.Second)
	before := w.calls
	const pods = 28
	for i := range RequestID(pods) {
		w.add(i+1, Pool{})
		w.pass(20 * time.Millisecond)
	}
	w.pass(5 * time.Second)
	for i := range RequestID(pods) {
		w.got(i + 1)
	}
	if n := w.calls - before; n > 4 {
		t.Errorf("%d calls for %d pods within %s", n, pods, pods*20*time.Millisecond)
	}
}

// While calls are scarce, pods that come and come cost two: one that was
// refused, and one for all of them. Nor are more addresses taken than the type
// takes pods.
func TestScarceCallsAskAhead(t *testing.T) {
	w := newWorld(t, "m6i.4xlarge", 1)
	w.s.Config.Prefixes = true
	w.start()
	w.pass(10 * time.Second)
	asked := 0
	w.fail = func(a Action) (Outcome, Class) {
		if asked++; asked == 1 {
			return Refused, ClassThrottled
		}
		return Done, ClassOther
	}
	const pods = 200
	for i := range RequestID(pods) {
		w.add(i+1, Pool{})
		w.pass(20 * time.Millisecond)
	}
	w.pass(time.Second)
	for i := range RequestID(pods) {
		w.got(i + 1)
	}
	if asked > 2 {
		t.Errorf("%d calls for %d pods", asked, pods)
	}
	if n, most := w.held(), w.s.Config.Limits.MaxPods(1)+PrefixAddresses; n > most {
		t.Errorf("%d addresses are held, want at most %d", n, most)
	}
}

// Once no further pods come, nothing is taken ahead.
func TestScarceCallsAskForWhatWaits(t *testing.T) {
	w := newWorld(t, "m6i.4xlarge", 1)
	w.start()
	w.pass(10 * time.Second)
	w.fail = func(Action) (Outcome, Class) { return Refused, ClassThrottled }
	const pods = 20
	for i := range RequestID(pods) {
		w.add(i+1, Pool{})
		w.pass(20 * time.Millisecond)
	}
	w.pass(time.Second)
	w.fail = nil
	w.pass(5 * time.Second)
	if n := w.held(); n > 1+pods+w.s.Config.Floor {
		t.Errorf("%d addresses are held for %d pods", n, pods)
	}
}

// While calls are throttled, none is made for the floor alone: on other nodes
// pods wait.
func TestFloorWaitsWhileCallsAreScarce(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	w.fail = func(a Action) (Outcome, Class) {
		if w.now.Sub(epoch) < time.Second {
			return Refused, ClassThrottled
		}
		return Done, ClassOther
	}
	w.start()
	w.pass(pressure - time.Second)
	if n := w.held(); n != 1 {
		t.Errorf("%d addresses are held while calls are scarce and nobody waits", n)
	}
	w.add(1, Pool{}) // now somebody does
	w.pass(5 * time.Second)
	w.got(1)
	w.pass(2 * pressure)
	if n := w.held(); n != 3 {
		t.Errorf("%d addresses are held at the end, want the node's, the pod's and the floor's", n)
	}
}

// Five minutes after everything is deleted a node is back at its floor, in
// calls of the order of its interfaces, and then silent; in the defaults.
func TestBackAtTheFloorWithinFiveMinutes(t *testing.T) {
	for _, mode := range []struct {
		name     string
		prefixes bool
		held     int // the node's own address, and the floor
	}{{"single addresses", false, 2}, {"prefixes", true, 17}} {
		t.Run(mode.name, func(t *testing.T) {
			w := newWorld(t, "m6i.4xlarge", 1)
			w.s.Config.Prefixes = mode.prefixes
			w.start()
			const pods = 230
			for i := range RequestID(pods) {
				w.add(i+1, Pool{})
			}
			w.pass(20 * time.Second)
			for i := range RequestID(pods) {
				w.send(Released{At: w.now, Addr: w.got(i + 1)})
			}
			before := w.calls
			w.pass(5 * time.Minute)
			if n := w.held(); n != mode.held || len(w.enis) != 1 {
				t.Errorf("%d addresses on %d interfaces are held, want %d on one", n, len(w.enis), mode.held)
			}
			// Per interface a deletion or a return in chunks; and EC2 read.
			if n := w.calls - before; n > 4*w.s.Config.ENIs() {
				t.Errorf("%d calls to return what %d pods had", n, pods)
			}
			before = w.calls
			w.pass(9 * time.Minute) // one read of EC2 may fall into it
			if n := w.calls - before; n > 1 {
				t.Errorf("%d calls at the floor, where nothing is to be done", n)
			}
		})
	}
}

// The same after pods that came and went in rounds, so that their addresses
// linger to different times: that one is returned does not make its interface
// one that was just needed.
func TestBackAtTheFloorAfterRounds(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	w.callLatency = time.Second // much happens while a call is on its way
	w.start()
	id := RequestID(0)
	for range 3 {
		first := id + 1
		for range 20 {
			id++
			w.add(id, Pool{})
		}
		w.pass(25 * time.Second)
		for i := first; i <= id; i++ {
			w.send(Released{At: w.now, Addr: w.got(i)})
			w.pass(300 * time.Millisecond)
		}
	}
	w.pass(5 * time.Minute)
	if n := w.held(); n != 2 || len(w.enis) != 1 {
		t.Errorf("%d addresses on %d interfaces are held, want the node's own and the floor on one", n, len(w.enis))
	}
}

// A hundred pods that come and go one after the other live on few addresses,
// and EC2 hears little of them.
func TestChurnCostsFewCalls(t *testing.T) {
	for _, gap := range []time.Duration{100 * time.Millisecond, time.Second, 10 * time.Second} {
		t.Run(gap.String(), func(t *testing.T) {
			w := newWorld(t, "m5.large", 1)
			w.start()
			w.pass(10 * time.Second)
			before := w.calls
			for i := range RequestID(100) {
				w.add(i+1, Pool{})
				w.pass(gap)
				for {
					if _, ok := w.replies[i+1]; ok {
						break
					}
					w.pass(100 * time.Millisecond)
				}
				w.send(Released{At: w.now, Addr: w.got(i + 1)})
			}
			n := w.calls - before - int(w.now.Sub(epoch)/w.s.Config.Reconcile) // the reads that come anyway
			t.Logf("%d calls, %d addresses held", n, w.held())
			if n > 20 {
				t.Errorf("a hundred pods %s apart cost %d calls", gap, n)
			}
		})
	}
}

// EC2 says that the device index is taken, by an interface that no read shows
// yet: the node must not make one interface after the other meanwhile.
func TestTakenDeviceIndexMakesNoStorm(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	w.start()
	w.fail = func(a Action) (Outcome, Class) {
		if _, ok := a.(AttachENI); ok {
			return Refused, ClassInUse
		}
		return Done, ClassOther
	}
	for i := range RequestID(12) { // more than the first interface holds
		w.add(i+1, Pool{})
	}
	w.pass(time.Minute)
	if n := len(w.enis); n > 13 {
		t.Errorf("%d interfaces were made in a minute", n-1)
	}
	if w.calls > 150 {
		t.Errorf("%d calls in a minute", w.calls)
	}
}
