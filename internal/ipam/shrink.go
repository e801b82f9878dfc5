package ipam

import (
	"slices"

	"github.com/underlay-cni/underlay/internal/ipam/planted"
)

// shrink gives back what lingered above the floor.
func (p *step) shrink(pool Pool) {
	s := p.s
	free, coming, _ := s.count(pool)
	surplus := free - s.floor(pool)
	if s.waiting(pool) > 0 || coming > 0 || surplus < 0 || planted.Bug == planted.NothingReturned || s.Mutate.active(p.now) || p.pressed() {
		return
	}
	// Whole interfaces first, those at the highest index first. One that holds
	// nothing but the floor goes too, if the floor has room elsewhere.
	for _, e := range slices.Backward(s.ENIs) {
		if e.Pool != pool || e.Device == 0 || !e.ready() || e.NoNeed.IsZero() && planted.Bug != planted.DeleteUsed || p.busy(e) {
			continue
		}
		if len(e.Addrs) > surplus+s.roomBeside(e, p.per(e.Subnet)) {
			continue
		}
		if p.due(e.NoNeed.Add(s.linger(pool))) {
			surplus -= len(e.Addrs)
			p.retire(e)
		}
	}
	var candidates []*ENI
	for _, e := range s.ENIs {
		if e.Pool == pool && e.ready() && !p.busy(e) {
			candidates = append(candidates, e)
		}
	}
	slices.SortStableFunc(candidates, func(a, b *ENI) int { return a.count(Bound) - b.count(Bound) })
	for _, e := range candidates {
		if e.drifted() { // nobody will have what is free there
			p.unassign(e, len(e.Addrs))
			continue
		}
		if surplus <= 0 {
			continue
		}
		surplus -= p.unassign(e, surplus)
	}
}

// roomBeside returns the room on the pool's other interfaces.
func (s *State) roomBeside(e *ENI, per int) int {
	n := 0
	for _, o := range s.ENIs {
		if o != e && o.Pool == e.Pool && o.ready() {
			n += s.room(o, per)
		}
	}
	return n
}

// spare reports whether a may be given back.
func spare(e *ENI, a *Address) bool {
	return a.State == Free && !a.Foreign() && a.Missing.IsZero() && e.Missing.IsZero() && e.ready()
}

// unassign gives back up to n addresses of e that lingered, and returns how
// many.
func (p *step) unassign(e *ENI, n int) int {
	linger := p.s.Config.Linger
	act := Unassign{ENI: e.ID}
	gone := 0
	for _, pfx := range e.Prefixes {
		whole := gone+PrefixAddresses <= n
		for _, a := range e.Addrs {
			if a.Prefix == pfx {
				whole = whole && spare(e, a) && p.due(a.Since.Add(linger))
			}
		}
		if whole {
			act.Prefixes = append(act.Prefixes, pfx)
			gone += PrefixAddresses
		}
	}
	for _, a := range slices.Backward(e.Addrs) {
		if gone < n && !a.Prefix.IsValid() && (spare(e, a) && p.due(a.Since.Add(linger)) || planted.Bug == planted.ReturnCooling && a.State == Cooling) {
			act.Addrs = append(act.Addrs, a.Addr)
			gone++
		}
	}
	if gone == 0 {
		return 0
	}
	for _, a := range e.Addrs {
		if slices.Contains(act.Addrs, a.Addr) || a.Prefix.IsValid() && slices.Contains(act.Prefixes, a.Prefix) {
			a.State, a.Since = Returning, p.now
		}
	}
	act.Call = p.call(e, Call{Kind: CallUnassign})
	p.do(act)
	return gone
}
