package ipam

import (
	"cmp"
	"fmt"
	"time"
)

// gather is the pause between two calls for addresses on one interface. Pods
// that start together come some 20 ms apart: they are to cost a few calls and
// not one each, and none can have its address before IMDS lists it anyway.
const gather = 250 * time.Millisecond

// grow asks for what a pool lacks.
func (p *step) grow(pool Pool) {
	s := p.s
	free, coming, suspect := s.count(pool)
	waiting := s.waiting(pool)
	need := waiting + s.floor(pool) - free - coming - suspect
	if need <= 0 {
		delete(s.overflow, pool)
		if free > 0 || coming == 0 {
			delete(s.Trouble, pool) // it got over it
		}
		return
	}
	if waiting == 0 && p.pressed() {
		return // nobody waits for the floor; on other nodes somebody does
	}
	if !p.due(s.Mutate.until) {
		return
	}
	later := 0 // room that is there, but not now
	wait, soon := p.gathering(pool)
	for _, e := range s.ENIs {
		per := p.per(e.Subnet)
		room := s.room(e, per)
		if e.Pool != pool || room == 0 {
			continue
		}
		t := s.subnet(e.Subnet)
		if p.busy(e) || e.Phase == Detached || e.Keep || !p.due(e.Touched.Add(gather)) || !p.due(t.full.until) || wait || !p.may(CallAssign) {
			later += room
			continue
		}
		n := min(need-later, room)
		if n <= 0 {
			break
		}
		need -= p.assign(e, p.atLeast(min(n+soon, room), room), per, t)
		later += s.room(e, per)
	}
	if need -= later; need <= 0 {
		delete(s.overflow, pool)
		return
	}
	p.extend(pool, need)
}

// assign asks for at least n addresses on e, fewer if the subnet is short, and
// returns how many it asked for.
func (p *step) assign(e *ENI, n, per int, t *subnetState) int {
	if per > 1 {
		slots := (n + per - 1) / per
		p.do(AssignPrefixes{Call: p.call(e, Call{Kind: CallAssign, N: slots * per, Prefix: true}), ENI: e.ID, N: slots})
		return slots * per
	}
	if t.chunk > 0 {
		n = min(n, t.chunk)
	}
	p.do(AssignAddresses{Call: p.call(e, Call{Kind: CallAssign, N: n}), ENI: e.ID, N: n})
	return n
}

// extend gets further ENIs for need addresses that have no room on those at
// hand.
func (p *step) extend(pool Pool, need int) {
	s := p.s
	own := s.Primary()
	if own == nil {
		return
	}
	subnet := cmp.Or(pool.Subnet, own.Subnet)
	per := p.per(subnet)
	t := s.subnet(subnet)
	capacity := (s.Config.Limits.IPv4PerENI - 1) * per
	for _, c := range s.Calls {
		if c.Kind == CallCreate && c.Pool == pool {
			need -= max(0, capacity-c.N)
		}
	}
	if need <= 0 || capacity <= 0 {
		delete(s.overflow, pool)
		return
	}
	if s.overflow[pool].IsZero() {
		s.overflow[pool] = p.now
	}
	if !p.due(s.slotsOut) {
		p.noSlot(pool)
		return
	}
	if !p.due(s.overflow[pool].Add(s.Config.Settle)) || !p.due(t.full.until) {
		return
	}
	for need > 0 {
		d := s.nextDevice()
		why := s.Trouble[pool]
		if d < 0 {
			if pool.Groups != "" && (why == nil || why.Kind != KindDenied) {
				p.trouble(pool, p.setsFull(pool, ""))
			}
			return
		}
		if why != nil && why.Kind == KindSetsFull {
			delete(s.Trouble, pool) // there is one again
		}
		if e := p.orphan(pool); e != nil {
			if !p.may(CallAttach) {
				return
			}
			e.Device = d
			p.do(AttachENI{Call: p.call(e, Call{Kind: CallAttach, Device: d}), ENI: e.ID, Device: d})
			need -= capacity
			continue
		}
		if !p.may(CallCreate) {
			return
		}
		c := Call{Kind: CallCreate, Pool: pool, Subnet: subnet, Groups: cmp.Or(pool.Groups, own.Groups), Device: d, N: min(need, capacity), Prefix: per > 1}
		if per > 1 {
			c.N = (c.N + per - 1) / per * per
		} else if t.chunk > 0 {
			c.N = min(c.N, t.chunk)
		}
		id := p.call(nil, c)
		made := s.Calls[id]
		made.Token = fmt.Sprintf("underlay-%s-%d-%d", s.Config.Instance, id, p.now.UnixNano())
		if len(made.Token) > 64 { // EC2's limit for a ClientToken
			made.Token = made.Token[len(made.Token)-64:]
		}
		p.create(made)
		need -= capacity
	}
}

// noSlot notes why a pool gets no further ENI while EC2 refuses them, perhaps to
// another pool.
func (p *step) noSlot(pool Pool) {
	s := p.s
	if t := s.Trouble[pool]; t != nil && t.Kind != KindSetsFull || s.slotsWhy == nil || s.waiting(pool) == 0 {
		return
	}
	why := *s.slotsWhy
	if why.Kind == KindNodeFull || why.Kind == KindSetsFull {
		why = *p.full(pool, why.Cause)
	}
	p.trouble(pool, &why)
}

// orphan returns an ENI of the pool that is made and attached nowhere.
func (p *step) orphan(pool Pool) *ENI {
	for _, e := range p.s.ENIs {
		if e.Managed && e.Pool == pool && e.Phase == Detached && e.Device < 0 && !p.busy(e) {
			return e
		}
	}
	return nil
}
