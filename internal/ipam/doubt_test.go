package ipam

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// second adds an interface of the node's own, at device index 1 unless it is
// attached nowhere.
func (w *world) second(attached bool) *vpc.ENI {
	e := w.newENI()
	e.Tags[TagCluster], e.Tags[TagInstance] = "test", string(testInstance)
	if attached {
		w.join(e)
	}
	return e
}

func (w *world) join(e *vpc.ENI) {
	e.Instance, e.DeviceIndex, e.Attached, e.DeleteOnTermination = testInstance, 1, true, true
	e.Attachment = vpc.AttachmentID("eni-attach-" + string(e.ID)[4:])
	w.attached[e.ID] = w.now
}

// An agent before us attached an interface, and reads showed that late: when we
// delete it as one that nobody wants, EC2 refuses, and a read tells why. It must
// not stay, nor be asked for again and again.
func TestOrphanThatWasAttachedGoes(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	e := w.second(false)
	w.start()
	deletes := 0
	w.fail = func(a Action) (Outcome, Class) {
		d, ok := a.(DeleteENI)
		if !ok {
			return Done, ClassOther
		}
		if deletes++; e.Instance == "" {
			w.join(e)
		}
		if d.Attachment != e.Attachment {
			return Refused, ClassInUse
		}
		return Done, ClassOther
	}
	w.pass(orphanGrace + 30*time.Second)
	if w.enis[e.ID] != nil || deletes > 3 {
		t.Errorf("%s is there: %t, after %d calls to delete it; want it gone after three", e.ID, w.enis[e.ID] != nil, deletes)
	}
}

// An interface was deleted by a call whose answer was lost, and EC2 gave its
// addresses to another one at once. A read from before all this must not take
// them from there.
func TestStaleReadOfADeletedInterface(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	b := w.second(true)
	b.Secondary = []netip.Addr{w.take(), w.take()}
	w.start()
	var stale []vpc.ENI
	w.fail = func(a Action) (Outcome, Class) {
		if d, ok := a.(DeleteENI); ok && stale == nil {
			stale = w.view()
			w.remove(d.ENI)
			return Unknown, ClassUnavailable
		}
		return Done, ClassOther
	}
	for w.now.Sub(epoch) < 10*time.Minute && stale == nil {
		w.pass(time.Second)
	}
	if stale == nil {
		t.Fatal("the interface is not given back")
	}
	had := append([]netip.Addr{b.Primary}, b.Secondary...)
	for id := range RequestID(5) {
		w.add(id+1, Pool{})
	}
	// What assigns and reads anew takes moments; the read began in between.
	var moved []netip.Addr
	for w.now.Sub(epoch) < 10*time.Minute && len(moved) == 0 {
		w.pass(10 * time.Millisecond)
		for _, a := range w.s.Primary().Addrs {
			if slices.Contains(had, a.Addr) {
				moved = append(moved, a.Addr)
			}
		}
	}
	w.send(ObservedEC2{At: w.now, Read: w.now, ENIs: stale}) // the world verifies the state
	for _, x := range moved {
		if _, e := w.s.Lookup(x); e == nil || e.Device != 0 {
			t.Errorf("%s, which EC2 gave to the first interface a moment ago, is now on %+v", x, e)
		}
	}
	w.pass(10 * time.Second)
	for id := range RequestID(5) {
		w.got(id + 1)
	}
}

// An address that only a read tells of is believed in after a while. It may have
// been given back and assigned anew meanwhile, so that the wait for IMDS begins
// again.
func TestBelievedAddressIsAwaitedAnew(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	old := w.take()
	w.mapped[old] = epoch.Add(time.Hour)
	for _, e := range w.enis {
		e.Secondary = append(e.Secondary, old)
	}
	w.start()
	for a, _ := w.s.Lookup(old); a == nil || a.Hearsay; a, _ = w.s.Lookup(old) {
		if w.pass(100 * time.Millisecond); w.now.Sub(epoch) > 5*time.Minute {
			t.Fatalf("%s is never believed in", old)
		}
	}
	believed := w.now
	if a, _ := w.s.Lookup(old); a.State != Assigned {
		t.Fatalf("%s is %s at once", old, a.State)
	}
	w.pass(w.s.Config.UsableWait + time.Second)
	if a, _ := w.s.Lookup(old); a.State != Free {
		t.Errorf("%s after it was believed in, %s is %s", w.now.Sub(believed), old, a.State)
	}
}

// The first read of a new agent is old, the second is not: until that is
// confirmed an interface may seem to hold more than it can.
func TestTwoReadsThatDoNotFit(t *testing.T) {
	cfg := modelConfig(2, 3)
	e := vpc.ENI{ID: "eni-1", Instance: testInstance, Attached: true, Attachment: "eni-attach-1", Primary: firstAddr}
	addr := func(i int) netip.Addr {
		b := firstAddr.As4()
		b[3] += byte(i)
		return netip.AddrFrom4(b)
	}
	s, _ := Step(State{}, Started{At: epoch, Config: cfg})
	for i, held := range [][]netip.Addr{{addr(1), addr(2)}, {addr(2), addr(3)}, {addr(3), addr(4)}} {
		e.Secondary = held
		at := epoch.Add(time.Duration(i) * cfg.ReadLag)
		s, _ = Step(s, ObservedEC2{At: at, Read: at, ENIs: []vpc.ENI{e}})
		if err := s.Verify(); err != nil {
			t.Fatalf("read %d: %v", i+1, err)
		}
		if n := s.room(s.ENIs[0], 1); n != 0 {
			t.Errorf("read %d: room for %d", i+1, n)
		}
	}
	e.Secondary = []netip.Addr{addr(1), addr(2), addr(3)} // one read cannot say that
	at := epoch.Add(time.Hour)
	s, _ = Step(s, ObservedEC2{At: at, Read: at, ENIs: []vpc.ENI{e}})
	if s.Verify() == nil {
		t.Error("three addresses and a primary on an interface of three are fine")
	}
}

// While an attachment is on its way, its device index is nobody else's, though
// a read showed another interface there in between.
func TestDeviceIndexOfAnAttachmentInFlight(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	e := w.second(false)
	w.start()
	w.pass(time.Second)
	s := &w.s
	mine := s.ENI(e.ID)
	s.Calls[99] = &Call{ID: 99, Kind: CallAttach, ENI: mine.ID, Device: 1}
	mine.Call = 99 // and its Device was claimed
	if d := s.nextDevice(); d != 2 {
		t.Errorf("the next device index is %d, want 2", d)
	}
	w.join(e)
	w.send(CallDone{At: w.now, Call: 99, ENI: &vpc.ENI{ID: e.ID, Attachment: e.Attachment}})
	if mine := w.s.ENI(e.ID); mine.Device != 1 || mine.Phase != Attached {
		t.Errorf("attached as %+v", mine)
	}
}
