package ipam

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/underlay-cni/underlay/internal/ipam/planted"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// orphanGrace is how long an ENI of ours that is attached nowhere is kept
// before it is deleted: longer than any attachment takes.
const orphanGrace = time.Minute

// plan brings the state forward as far as it goes now, level-triggered: it
// looks at what is, not at what happened.
func (p *step) plan() {
	s := p.s
	if !s.Started {
		return
	}
	p.age()
	p.serve()
	p.expire()
	if s.Known {
		p.repair()
		pools := s.pools()
		maps.DeleteFunc(s.Trouble, func(pool Pool, e *Error) bool { return e.Kind == KindSetsFull && s.waiting(pool) == 0 })
		for _, pool := range pools {
			p.grow(pool)
			p.giveUp(pool)
		}
		for _, pool := range pools {
			p.shrink(pool)
		}
	}
	p.reads()
	if !p.next.Equal(s.timer) {
		s.timer = p.next
		p.do(SetTimer{At: p.next})
	}
}

// pools returns the pools in use, the default pool first.
func (s *State) pools() []Pool {
	set := map[Pool]bool{{}: true}
	for _, e := range s.ENIs {
		if e.Managed {
			set[e.Pool] = true
		}
	}
	for _, r := range s.Waiting {
		set[r.Pool] = true
	}
	return slices.SortedFunc(maps.Keys(set), Pool.compare)
}

func (s *State) callIDs() []CallID { return slices.Sorted(maps.Keys(s.Calls)) }

// age moves addresses whose time has come.
func (p *step) age() {
	s := p.s
	for _, e := range s.ENIs {
		if !e.Managed {
			continue
		}
		// To give something back needs nothing: who returns one address after the
		// other would else keep the interface each time.
		c := s.Calls[e.Call]
		idle := (e.Call == 0 || c != nil && c.Kind == CallUnassign) && e.Phase != Retiring
		for _, a := range e.Addrs {
			switch a.State {
			case Cooling:
				if p.due(a.Until) {
					a.State, a.Since = Free, p.now
					p.do(Forget{Addr: a.Addr})
				}
			case Assigned:
				if e.ready() && (a.Live || planted.Bug == planted.NotLive || !a.Hearsay && p.due(a.Assigned.Add(s.Config.UsableWait))) {
					a.State, a.Since = Free, p.now
				}
			}
			idle = idle && (a.State == Free || a.State == Returning) && !a.Foreign()
		}
		if !idle {
			e.NoNeed = time.Time{}
		} else if e.NoNeed.IsZero() {
			e.NoNeed = p.now
		}
	}
	s.Lost = slices.DeleteFunc(s.Lost, func(a *Address) bool {
		switch a.State {
		case Bound:
			return false
		case Cooling:
			if !p.due(a.Until) {
				return false
			}
			p.do(Forget{Addr: a.Addr})
		}
		return true
	})
	old := func(t time.Time) bool { return p.now.Sub(t) > 2*s.Config.ReadLag }
	maps.DeleteFunc(s.Gone, func(_ netip.Addr, t time.Time) bool { return old(t) })
	maps.DeleteFunc(s.GoneENI, func(_ vpc.ENIID, t time.Time) bool { return old(t) })
}

// due reports whether t has come; if not, the plan looks again then.
func (p *step) due(t time.Time) bool {
	if !t.After(p.now) {
		return true
	}
	p.at(t)
	return false
}

// serve answers those who wait, in order of arrival.
func (p *step) serve() {
	s := p.s
	dry := map[Pool]bool{}
	s.Waiting = slices.DeleteFunc(s.Waiting, func(r Request) bool {
		if dry[r.Pool] || !r.Deadline.After(p.now) {
			return false
		}
		a, e := s.pick(r.Pool)
		if a == nil {
			dry[r.Pool] = true
			return false
		}
		a.State, a.Owner, a.Since = Bound, r.Owner, p.now
		e.NoNeed = time.Time{}
		p.do(Reply{Request: r.ID, Addr: a.Addr, ENI: e.ID})
		return true
	})
}

// usable reports whether a may be handed out on e now.
func usable(e *ENI, a *Address) bool {
	return spare(e, a) && !e.drifted()
}

// pick chooses a free address: on the fullest ENI, there in the fullest
// prefix, so that the others drain; among equals the one that is free the
// longest.
func (s *State) pick(pool Pool) (*Address, *ENI) {
	var (
		best     *Address
		on       *ENI
		bestRank [2]int
	)
	for _, e := range s.ENIs {
		if e.Pool != pool && planted.Bug != planted.PoolIgnored || !e.ready() {
			continue
		}
		bound := e.count(Bound)
		inPrefix := map[netip.Prefix]int{}
		if len(e.Prefixes) > 0 {
			for _, a := range e.Addrs {
				if a.State == Bound {
					inPrefix[a.Prefix]++
				}
			}
		}
		for _, a := range e.Addrs {
			if !usable(e, a) {
				continue
			}
			rank := [2]int{bound, 0}
			if a.Prefix.IsValid() {
				rank[1] = inPrefix[a.Prefix]
			}
			if best == nil || rank[0] > bestRank[0] || rank[0] == bestRank[0] &&
				(rank[1] > bestRank[1] || rank[1] == bestRank[1] && a.Since.Before(best.Since)) {
				best, on, bestRank = a, e, rank
			}
		}
	}
	return best, on
}

// expire ends the requests whose deadline has come.
func (p *step) expire() {
	s := p.s
	s.Waiting = slices.DeleteFunc(s.Waiting, func(r Request) bool {
		if !p.due(r.Deadline) || planted.Bug == planted.NoDeadline {
			return false
		}
		e := Error{Kind: KindSlow}
		if t := s.Trouble[r.Pool]; t != nil {
			e = *t
		}
		if e.Kind == KindSetsFull { // as it is now
			e = *p.setsFull(r.Pool, e.Cause)
		}
		e.Waited = p.now.Sub(r.Since).Round(time.Millisecond)
		p.do(Reply{Request: r.ID, Err: &e})
		return true
	})
}

// call registers a mutation on e (nil for a creation) and returns its number.
func (p *step) call(e *ENI, c Call) CallID {
	s := p.s
	s.NextID++
	c.ID, c.Began = s.NextID, p.now
	if e != nil {
		c.ENI, c.Pool, c.Subnet = e.ID, e.Pool, e.Subnet
		e.Call = c.ID
	}
	s.Calls[c.ID] = &c
	return c.ID
}

// busy reports whether no mutation may start on e now.
func (p *step) busy(e *ENI) bool {
	return e.Call != 0 && planted.Bug != planted.TwoMutations || e.Unsure || !e.Missing.IsZero() || !p.due(e.Retry.until)
}

// repair finishes what was begun: repeats creations whose end is unknown,
// attaches what was made, sets DeleteOnTermination, deletes what retires and
// what nobody wants.
func (p *step) repair() {
	s := p.s
	if !p.due(s.Mutate.until) {
		return
	}
	for _, id := range s.callIDs() {
		if c := s.Calls[id]; c.Retry && p.may(CallCreate) {
			c.Retry = false
			if planted.Bug == planted.NewToken {
				c.Token += "-2"
			}
			p.create(c)
		}
	}
	for _, e := range s.ENIs {
		if !e.Managed || p.busy(e) {
			continue
		}
		switch {
		case e.Phase == Retiring:
			if !p.may(CallDelete) {
				continue
			}
			p.do(DeleteENI{Call: p.call(e, Call{Kind: CallDelete}), ENI: e.ID, Attachment: e.Attachment})
		case e.Phase == Detached && e.Device >= 0:
			if !p.may(CallAttach) {
				continue
			}
			p.do(AttachENI{Call: p.call(e, Call{Kind: CallAttach, Device: e.Device}), ENI: e.ID, Device: e.Device})
		case planted.Bug != planted.OrphanLeaked && e.Phase == Detached && e.count(Bound) == 0 && p.due(e.Since.Add(orphanGrace)):
			if p.may(CallDelete) {
				p.retire(e)
			}
		case e.Phase == Attached && e.drifted() && !e.NoNeed.IsZero(): // no pod will have it again
			if p.may(CallDelete) {
				p.retire(e)
			}
		case e.Phase == Attached && e.Keep:
			if !p.may(CallKeep) {
				continue
			}
			p.do(SetDeleteOnTermination{Call: p.call(e, Call{Kind: CallKeep}), ENI: e.ID, Attachment: e.Attachment})
		}
	}
}

func (p *step) retire(e *ENI) {
	e.Phase, e.Link = Retiring, false
	p.do(DeleteENI{Call: p.call(e, Call{Kind: CallDelete}), ENI: e.ID, Attachment: e.Attachment})
}

func (p *step) create(c *Call) {
	n := c.N
	if c.Prefix {
		n /= PrefixAddresses
	}
	p.do(CreateENI{Call: c.ID, Subnet: c.Subnet, Groups: c.Groups.Groups(), Pool: c.Pool, Device: c.Device, N: n, Prefixes: c.Prefix, Token: c.Token, Created: c.Began})
}

// count returns what a pool has to offer: free addresses, and those on their
// way to be free without further calls.
func (s *State) count(pool Pool) (free, coming, suspect int) {
	for _, e := range s.ENIs {
		if e.Pool != pool || !e.Managed || e.Phase == Retiring || e.Device < 0 || e.drifted() {
			continue
		}
		for _, a := range e.Addrs {
			switch {
			case a.State != Free && a.State != Assigned || a.Foreign():
			case !a.Missing.IsZero() || !e.Missing.IsZero():
				suspect++
			case usable(e, a):
				free++
			case a.Hearsay && s.Now.After(a.Assigned.Add(s.Config.UsableWait)):
				// IMDS does not list it: nobody should wait for it.
			default:
				coming++
			}
		}
	}
	for _, c := range s.Calls {
		if c.Pool == pool && (c.Kind == CallAssign || c.Kind == CallCreate) {
			coming += c.N
		}
	}
	return free, coming, suspect
}

func (s *State) waiting(pool Pool) int {
	n := 0
	for _, r := range s.Waiting {
		if r.Pool == pool {
			n++
		}
	}
	return n
}

// floor returns how many free addresses a pool keeps ready.
func (s *State) floor(pool Pool) int {
	if pool != (Pool{}) || planted.Bug == planted.FloorForgotten {
		return 0
	}
	if s.Config.Minimum == 0 {
		return s.Config.Floor
	}
	bound := 0
	for _, e := range s.ENIs {
		if e.Managed && e.Pool == pool {
			bound += e.count(Bound)
		}
	}
	return max(s.Config.Floor, s.Config.Minimum-bound)
}

// room returns how many more addresses e can hold.
func (s *State) room(e *ENI, per int) int {
	if !e.Managed || e.Phase == Retiring || e.Full || e.Device < 0 || !e.Missing.IsZero() || e.drifted() {
		return 0
	}
	return max(0, s.Config.Limits.IPv4PerENI-e.slots()-s.asked(e)) * per
}

// nextDevice returns the lowest free device index, -1 when the type takes no
// further interface. Extra counts as attached.
func (s *State) nextDevice(extra ...*ENI) int {
	used, n := s.devices(extra...)
	if n+1 >= s.Config.ENIs() { // device 0 is the node's own, always
		return -1
	}
	for d := 1; d <= maxDevice; d++ {
		if !used[d] {
			return d
		}
	}
	return -1
}

// devices returns the device indices in use, and how many they are beside 0.
func (s *State) devices(extra ...*ENI) (used map[int]bool, n int) {
	used = map[int]bool{0: true}
	for _, e := range append(slices.Clone(extra), s.ENIs...) {
		if e.Device >= 0 && !used[e.Device] {
			n++
		}
		if e.Device >= 0 {
			used[e.Device] = true
		}
	}
	for _, c := range s.Calls {
		if c.Kind == CallCreate && c.Device >= 0 && planted.Bug != planted.SharedDevice {
			used[c.Device] = true
			n++
		}
		if c.Kind == CallAttach && !used[c.Device] { // claimed by another since
			used[c.Device] = true
			n++
		}
	}
	return used, n
}

// per returns how the subnet gives addresses now: 16 at a time, or one.
func (p *step) per(subnet vpc.SubnetID) int {
	s := p.s
	if s.Config.PerSlot() == 1 {
		return 1
	}
	if t := s.Subnets[subnet]; t != nil && !p.due(t.noPrefix.until) {
		return 1
	}
	return PrefixAddresses
}

// giveUp ends at once the requests that nothing can serve before their
// deadline: the type's limits are reached, or EC2 denies what is needed, and
// no address on its way or in cooldown is left for them.
func (p *step) giveUp(pool Pool) {
	s := p.s
	if s.waiting(pool) == 0 {
		return
	}
	_, coming, suspect := s.count(pool)
	if coming > 0 || suspect > 0 {
		return
	}
	var reason *Error
	t, noSlots := s.Trouble[pool], s.slotsOut.After(p.now)
	if t != nil && t.Kind == KindGroups && !slices.ContainsFunc(s.ENIs, func(e *ENI) bool { return e.Pool == pool && e.Managed }) {
		p.failAll(pool, t)
		return
	}
	denied := t != nil && t.Kind == KindDenied
	if denied && s.Mutate.active(p.now) {
		reason = t
	} else if !denied || noSlots {
		grows := s.nextDevice() >= 0 && (!noSlots || t != nil && t.Kind == KindQuota)
		for _, e := range s.ENIs {
			if e.Pool != pool || !e.Managed {
				continue
			}
			if e.Call != 0 || e.Unsure || e.Full || e.Phase == Retiring || e.Phase == Detached || s.room(e, 1) > 0 {
				grows = true
			}
		}
		if grows {
			return
		}
		if reason = t; !denied {
			if pool.Groups != "" && planted.Bug != planted.SetsRefused {
				return // another set's pods may go before the deadline, or rest long enough
			}
			reason = p.full(pool, "")
		}
	}
	if reason == nil {
		return
	}
	p.failAll(pool, reason)
}

// failAll ends the pool's requests, but as many as addresses in cooldown are
// left for.
func (p *step) failAll(pool Pool, reason *Error) {
	s := p.s
	var until []time.Time
	for _, e := range s.ENIs {
		if e.Pool != pool || !e.ready() {
			continue
		}
		for _, a := range e.Addrs {
			if a.State == Cooling {
				until = append(until, a.Until)
			}
		}
	}
	slices.SortFunc(until, time.Time.Compare)
	i := 0
	s.Waiting = slices.DeleteFunc(s.Waiting, func(r Request) bool {
		if r.Pool != pool {
			return false
		}
		if i < len(until) && until[i].Before(r.Deadline) {
			i++
			return false
		}
		e := *reason
		e.Waited = p.now.Sub(r.Since).Round(time.Millisecond)
		p.do(Reply{Request: r.ID, Err: &e})
		return true
	})
}

// reads asks for what must be read again.
func (p *step) reads() {
	s := p.s
	wantLinks, wantIMDS := false, false
	for _, e := range s.ENIs {
		if !e.Managed {
			continue
		}
		if r := &s.Reads[EC2]; e.Unsure && !r.inFlight {
			if r.began.Before(e.Touched) {
				p.want(EC2, later(p.now, e.Touched.Add(500*time.Millisecond)))
			} else { // read, and not settled: the ENI is not listed
				p.want(EC2, later(p.now, r.began.Add(s.Config.Confirm)))
			}
		}
		if e.Phase != Attached {
			continue
		}
		wantLinks = wantLinks || !e.Link
		for _, a := range e.Addrs {
			wantIMDS = wantIMDS || a.State == Assigned && !a.Live
		}
	}
	p.poll(Links, wantLinks)
	if s.Known {
		p.poll(IMDS, wantIMDS)
	}
	for src := range Source(sources) {
		r := &s.Reads[src]
		if r.inFlight || r.wanted.IsZero() {
			continue
		}
		if !p.due(later(r.wanted, r.retry.until)) {
			continue
		}
		r.wanted, r.inFlight, r.began = time.Time{}, true, p.now
		p.do(Reread{Source: src})
	}
}

// poll asks for a local source again and again while something is awaited
// there: at once, then after 50 and 100 ms, every 200 ms for as long as it takes
// as a rule, and every 500 ms from then on.
func (p *step) poll(src Source, needed bool) {
	r := &p.s.Reads[src]
	if !needed {
		r.polls = 0
		return
	}
	if r.inFlight || !r.wanted.IsZero() {
		return
	}
	d := time.Duration(0)
	if r.polls > 0 {
		d = min(25*time.Millisecond<<min(r.polls, 3), 200*time.Millisecond)
	}
	if r.polls > 12 {
		d = 500 * time.Millisecond
	}
	r.polls++
	p.want(src, p.now.Add(d))
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
