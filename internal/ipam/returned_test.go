package ipam

import (
	"net/netip"
	"testing"
	"time"
)

// lingered returns a node that just asked to give one address back, and that
// address.
func lingered(t *testing.T) (*model, Unassign) {
	m := newModel(modelConfig(2, 4), 2, budget{faults: 9, lags: 9})
	m.assign(m.enis[0], 2)
	for range 100 {
		for _, c := range m.calls {
			if u, ok := c.act.(Unassign); ok {
				return m, u
			}
		}
		v := move{kind: moveTick}
		switch {
		case !m.up:
			v.kind = moveStart
		case len(m.reads) > 0:
			v.kind = moveRead
		}
		mustApply(t, m, v)
	}
	t.Fatal("nothing is given back")
	return nil, Unassign{}
}

func mustApply(t *testing.T, m *model, moves ...move) {
	t.Helper()
	for _, v := range moves {
		if err := m.apply(v); err != nil {
			t.Fatalf("%s: %v", v, err)
		}
	}
}

// A call to give an address back happened, and its answer was lost. A read that
// does not show that yet must not put the address back into use.
func TestLostUnassignAndLaggingRead(t *testing.T) {
	m, u := lingered(t)
	mustApply(t, m, move{kind: moveEnd, how: endLost}, move{kind: moveTick}, move{kind: moveRead, how: readLags})
	if a, _ := m.s.Lookup(u.Addrs[0]); a == nil || a.State != Returning {
		t.Fatalf("%s after a read that may be stale: %+v", u.Addrs[0], a)
	}
	for range m.pods {
		mustApply(t, m, move{kind: moveAdd, i: 0}) // the model judges the answer
		m.pods[0], m.pods[1] = m.pods[1], m.pods[0]
	}
	if err := m.settle(); err != nil {
		t.Fatal(err)
	}
}

// EC2 may assign at once what was given back by a call whose answer was lost:
// then the address begins anew, and is not live before IMDS lists it.
func TestLostUnassignAndNewAssignment(t *testing.T) {
	m, u := lingered(t)
	e := m.s.ENIs[0]
	mustApply(t, m, move{kind: moveEnd, how: endLost}, move{kind: moveTick}, move{kind: moveRead})
	m.calls = append(m.calls, flight{act: AssignAddresses{Call: 99, ENI: e.ID, N: 1}, began: m.now})
	m.s.Calls[99] = &Call{ID: 99, Kind: CallAssign, ENI: e.ID, N: 1, Subnet: e.Subnet}
	e.Call = 99
	mustApply(t, m, move{kind: moveEnd})
	a, _ := m.s.Lookup(u.Addrs[0])
	if a == nil || a.State != Assigned || a.Live {
		t.Fatalf("%s, assigned just now: %+v", u.Addrs[0], a)
	}
}

// A refused call to give something back says nothing about an earlier one whose
// end is unknown.
func TestLostUnassignAndRefusedOne(t *testing.T) {
	m, u := lingered(t)
	mustApply(t, m, move{kind: moveEnd, how: endLost}, move{kind: moveTick}, move{kind: moveRead, how: readLags})
	for _, outcome := range []Outcome{Refused, Done} {
		s := m.s.Clone()
		s.ENIs[0].Call = 99
		s.Calls[99] = &Call{ID: 99, Kind: CallUnassign, ENI: s.ENIs[0].ID, Began: m.now}
		s, _ = Step(s, CallDone{At: m.now, Call: 99, Outcome: outcome, Class: ClassThrottled})
		if a, _ := s.Lookup(u.Addrs[0]); a == nil || a.State != Returning {
			t.Errorf("%s after another call ended %v: %+v", u.Addrs[0], outcome, a)
		}
	}
}

// The agent before us gave an address back while our first read was under way.
// Nothing but that read tells of it: it is not handed out, and soon forgotten.
func TestAddressThatAnEarlierAgentReturned(t *testing.T) {
	w := newWorld(t, "m5.large", 1)
	old := w.take()
	for _, e := range w.enis {
		e.Secondary = append(e.Secondary, old)
	}
	w.start()
	for _, e := range w.enis {
		w.unassign(Unassign{ENI: e.ID, Addrs: []netip.Addr{old}})
	}
	w.used[old] = true // somebody else has it now
	w.pass(2 * w.s.Config.UsableWait)
	if a, _ := w.s.Lookup(old); a == nil || a.State != Assigned {
		t.Fatalf("%s, which one read listed and IMDS does not: %+v", old, a)
	}
	for id := range RequestID(3) {
		w.add(id+1, Pool{})
	}
	w.pass(5 * time.Second)
	for id := range RequestID(3) {
		if got := w.got(id + 1); got == old {
			t.Errorf("%s was handed out", old)
		}
	}
	w.pass(3 * w.s.Config.ReadLag)
	if a, _ := w.s.Lookup(old); a != nil {
		t.Errorf("%s is still believed in: %+v", old, a)
	}
}

func TestCloneOfNothing(t *testing.T) {
	s, _ := Step(State{}.Clone(), ReadFailed{At: epoch, Source: EC2, Class: ClassUnavailable})
	if got := s.Now.Sub(epoch); got != 0 || s.Trouble[Pool{}] == nil {
		t.Fatalf("after a failed read: %s, %+v", time.Duration(got), s.Trouble)
	}
}
