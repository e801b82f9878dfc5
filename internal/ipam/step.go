package ipam

import (
	"net/netip"
	"slices"
	"time"

	"github.com/underlay-cni/underlay/internal/ipam/planted"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// Step returns the state after ev and what is to be done about it. Like
// append, it takes s over: whoever needs the old state keeps a Clone.
func Step(s State, ev Event) (State, []Action) {
	if at := ev.at(); at.After(s.Now) {
		s.Now = at
	}
	if s.GoneENI == nil {
		s.Calls = map[CallID]*Call{}
		s.Subnets = map[vpc.SubnetID]*subnetState{}
		s.Trouble = map[Pool]*Error{}
		s.Gone = map[netip.Addr]time.Time{}
		s.GoneENI = map[vpc.ENIID]time.Time{}
		s.overflow = map[Pool]time.Time{}
	}
	p := &step{s: &s, now: s.Now}
	switch ev := ev.(type) {
	case Started:
		p.started(ev)
	case ObservedEC2:
		p.observedEC2(ev)
	case ObservedIMDS:
		p.observedIMDS(ev)
	case ObservedLinks:
		p.observedLinks(ev)
	case ReadFailed:
		p.readFailed(ev)
	case AddRequested:
		p.addRequested(ev)
	case Canceled:
		s.Waiting = slices.DeleteFunc(s.Waiting, func(r Request) bool { return r.ID == ev.ID })
	case Released:
		p.released(ev)
	case CallDone:
		p.callDone(ev)
	case Tick:
		s.timer = time.Time{}
	}
	p.plan()
	return s, p.out
}

// step is one Step at work.
type step struct {
	s    *State
	now  time.Time
	out  []Action
	next time.Time // earliest time at which the plan has something to do
}

func (p *step) do(a Action) { p.out = append(p.out, a) }

// at remembers that the plan wants to look again at t.
func (p *step) at(t time.Time) {
	if t.After(p.now) && (p.next.IsZero() || t.Before(p.next)) {
		p.next = t
	}
}

// want asks for a read of src at t, or earlier if it is wanted earlier.
func (p *step) want(src Source, t time.Time) {
	r := &p.s.Reads[src]
	if r.wanted.IsZero() || t.Before(r.wanted) {
		r.wanted = t
	}
}

func (p *step) started(ev Started) {
	s := p.s
	s.Config, s.Started = ev.Config, true
	for _, ep := range ev.Endpoints {
		if a, _ := s.Lookup(ep.Addr); a != nil || planted.Bug == planted.NoTombstones && !ep.Live || planted.Bug == planted.NoRecords && ep.Live {
			continue
		}
		a := &Address{Addr: ep.Addr, State: Bound, Owner: ep.Owner, Since: p.now}
		if !ep.Live {
			a.State, a.Owner, a.Since = Cooling, "", ep.Released
			a.Until = p.cooledDown(ep.Released)
		}
		s.Lost = append(s.Lost, a)
	}
	p.want(EC2, p.now)
}

// cooledDown returns the end of a cooldown that started at t; a time in the
// future, from a clock that was set back, counts as now.
func (p *step) cooledDown(t time.Time) time.Time {
	if t.After(p.now) {
		t = p.now
	}
	if planted.Bug == planted.ShortCooldown {
		return t.Add(p.s.Config.Cooldown / 2)
	}
	return t.Add(p.s.Config.Cooldown)
}

func (p *step) addRequested(ev AddRequested) {
	s := p.s
	if slices.ContainsFunc(s.Waiting, func(r Request) bool { return r.ID == ev.ID }) {
		return
	}
	if a, e := s.owned(ev.Owner); a != nil {
		r := Reply{Request: ev.ID, Addr: a.Addr}
		if e != nil {
			r.ENI = e.ID
		}
		p.do(r)
		return
	}
	// A newer request of the same owner takes the place of the older.
	for i, r := range s.Waiting {
		if r.Owner == ev.Owner {
			p.do(Reply{Request: r.ID, Err: &Error{Kind: KindSlow, Waited: p.now.Sub(r.Since)}})
			s.Waiting = slices.Delete(s.Waiting, i, i+1)
			break
		}
	}
	s.Waiting = append(s.Waiting, Request{ID: ev.ID, Owner: ev.Owner, Pool: ev.Pool, Since: p.now, Deadline: ev.Deadline})
}

// owned returns the address bound to owner.
func (s *State) owned(owner string) (*Address, *ENI) {
	for _, e := range s.ENIs {
		for _, a := range e.Addrs {
			if a.State == Bound && a.Owner == owner {
				return a, e
			}
		}
	}
	for _, a := range s.Lost {
		if a.State == Bound && a.Owner == owner {
			return a, nil
		}
	}
	return nil, nil
}

func (p *step) released(ev Released) {
	a, _ := p.s.Lookup(ev.Addr)
	if a == nil || a.State != Bound {
		return
	}
	a.Owner, a.Reported, a.Since = "", false, p.now
	if ev.Unused {
		a.State = Free
		return
	}
	a.State, a.Until = Cooling, p.cooledDown(ev.When)
	if planted.Bug == planted.ForgetEarly {
		p.do(Forget{Addr: a.Addr})
	}
}

func (p *step) observedIMDS(ev ObservedIMDS) {
	p.readDone(IMDS)
	for i := range ev.ENIs {
		m := &ev.ENIs[i]
		e := p.s.ENI(m.ID)
		if e == nil {
			continue
		}
		if planted.Bug == planted.IMDSBelieved {
			for _, x := range m.Addrs {
				p.adopt(e, x, netip.Prefix{})
			}
		}
		for _, a := range e.Addrs {
			if !a.Live && m.holds(a.Addr) {
				a.Live = true
			}
		}
	}
}

func (p *step) observedLinks(ev ObservedLinks) {
	p.readDone(Links)
	host := make(map[netip.Addr]bool, len(ev.Host))
	for _, a := range ev.Host {
		host[a] = true
	}
	for _, e := range p.s.ENIs {
		e.Link = e.Managed && e.Phase == Attached && slices.Contains(ev.Ready, e.ID)
		for _, a := range e.Addrs {
			p.setForeign(a, a.Elastic, host[a.Addr])
		}
	}
}

// setForeign notes who else uses an address. One that others used goes to a
// pod after a cooldown only, as one that a pod used.
func (p *step) setForeign(a *Address, elastic, host bool) {
	was := a.Foreign()
	a.Elastic, a.Host = elastic, host
	if was && !a.Foreign() && a.State == Free {
		a.State, a.Since, a.Until = Cooling, p.now, p.cooledDown(p.now)
	}
}

func (p *step) readDone(src Source) {
	r := &p.s.Reads[src]
	r.inFlight = false
	r.retry.reset()
}

func (p *step) readFailed(ev ReadFailed) {
	r := &p.s.Reads[ev.Source]
	r.inFlight = false
	limit := 30 * time.Second
	switch {
	case ev.Class == ClassThrottled && p.s.Known:
		limit = 2 * time.Minute // those that know nothing yet go first
	case ev.Class != ClassThrottled && (!p.s.Known || len(p.s.Waiting) > 0):
		limit = 8 * time.Second // the node serves nobody until then; at its start an ADD waits ten
	}
	r.retry.fail(p.now, time.Second, limit, p.s.Config.Seed)
	r.wanted = r.retry.until
	if ev.Source == EC2 && !p.s.Known {
		p.trouble(Pool{}, &Error{Kind: kindOf(ev.Class), Cause: ev.Err})
	}
}

func (p *step) trouble(pool Pool, e *Error) { p.s.Trouble[pool] = e }

func (s *State) subnet(id vpc.SubnetID) *subnetState {
	t := s.Subnets[id]
	if t == nil {
		t = &subnetState{}
		s.Subnets[id] = t
	}
	return t
}

func (p *step) callDone(ev CallDone) {
	s := p.s
	c := s.Calls[ev.Call]
	if c == nil {
		return
	}
	delete(s.Calls, ev.Call)
	e := s.ENI(c.ENI)
	if e != nil && e.Call == ev.Call {
		e.Call, e.Touched = 0, p.now
	}
	if e == nil && c.Kind != CallCreate {
		return // the ENI is gone, and with it what the call was about
	}
	switch ev.Outcome {
	case Done:
		p.callSucceeded(c, e, ev)
	case Refused:
		p.callRefused(c, e, ev)
	case Unknown:
		s.Mutate.fail(p.now, time.Second, 15*time.Second, s.Config.Seed)
		p.trouble(c.Pool, &Error{Kind: KindUnavailable, Cause: ev.Err})
		if c.Kind == CallCreate {
			c.Retry = true
			s.Calls[ev.Call] = c
			return
		}
		e.Unsure = planted.Bug != planted.BlindRepeat
	}
}

func (p *step) callSucceeded(c *Call, e *ENI, ev CallDone) {
	s := p.s
	s.Mutate.reset()
	s.Pace[c.Kind].passed()
	switch c.Kind {
	case CallAssign:
		if len(ev.Addrs)+len(ev.Prefixes) == 0 {
			e.Retry.fail(p.now, time.Second, 30*time.Second, s.Config.Seed)
			return
		}
		e.Retry.reset()
		p.grew(c)
		p.forgetReturned(e, ev)
		for _, a := range ev.Addrs {
			p.adopt(e, a, netip.Prefix{})
		}
		if planted.Bug == planted.PartialWhole && len(ev.Addrs) > 0 && len(ev.Addrs) < c.N {
			p.adopt(e, ev.Addrs[len(ev.Addrs)-1].Next(), netip.Prefix{})
		}
		for _, pfx := range ev.Prefixes {
			p.adoptPrefix(e, pfx)
		}
	case CallUnassign:
		e.Retry.reset()
		p.dropReturning(e, c)
	case CallCreate:
		if ev.ENI == nil || s.ENI(ev.ENI.ID) != nil {
			p.want(EC2, p.now)
			return
		}
		p.grew(c)
		n := p.newENI(ev.ENI)
		n.Managed, n.Pool, n.Device, n.Touched = true, c.Pool, c.Device, p.now
		s.ENIs = append(s.ENIs, n)
		for _, a := range ev.ENI.Secondary {
			p.adopt(n, a, netip.Prefix{})
		}
		for _, pfx := range ev.ENI.Prefixes {
			p.adoptPrefix(n, pfx)
		}
		s.sortENIs()
	case CallAttach:
		e.Retry.reset()
		e.Phase, e.Since, e.Keep, e.Device = Attached, p.now, true, c.Device
		p.claim(e)
		if ev.ENI != nil {
			e.Attachment, e.Keep = ev.ENI.Attachment, !ev.ENI.DeleteOnTermination
		}
		s.Reads[Links].polls, s.Reads[IMDS].polls = 0, 0
	case CallKeep:
		e.Retry.reset()
		e.Keep = false
	case CallDelete:
		p.dropENI(e)
	}
}

// grew clears what stood against growth: EC2 just gave something.
func (p *step) grew(c *Call) {
	s := p.s
	// Addresses for an ENI that is there do not tell that there may be another.
	if c.Kind != CallAssign || !s.slotsOut.After(p.now) {
		delete(s.Trouble, c.Pool)
	}
	t := s.subnet(c.Subnet)
	t.full.reset()
	if c.Prefix {
		t.noPrefix.reset()
	} else if t.chunk > 0 && c.N >= t.chunk {
		t.chunk *= 2 // the next may be larger again
		if t.chunk >= s.Config.Limits.IPv4PerENI {
			t.chunk = 0
		}
	}
	s.Reads[IMDS].polls = 0
}

// indexTaken is how long a pool gets no further ENI when EC2 says that the
// device index is taken: the read that follows takes a second and the lag.
const indexTaken = 5 * time.Second

// badGroups is how long EC2 is not asked again for an interface with groups that
// it just refused.
const badGroups = 5 * time.Second

func (p *step) callRefused(c *Call, e *ENI, ev CallDone) {
	s, seed := p.s, p.s.Config.Seed
	grows := c.Kind == CallAssign || c.Kind == CallCreate || c.Kind == CallAttach || c.Kind == CallKeep
	trouble := &Error{Kind: kindOf(ev.Class), Subnet: c.Subnet, Cause: ev.Err}
	if c.Kind == CallUnassign {
		for _, a := range e.Addrs {
			if c.returns(a) {
				a.State, a.Since = Free, p.now
			}
		}
	}
	switch ev.Class {
	case ClassThrottled:
		s.Pace[c.Kind].throttled(p.now, seed)
	case ClassDenied:
		if c.Kind == CallCreate {
			// What EC2 denies is a further ENI, not addresses for those at hand.
			s.slotsOut, s.slotsWhy = p.now.Add(time.Minute), trouble
		} else {
			s.Mutate.fail(p.now, 10*time.Second, time.Minute, seed)
		}
	case ClassUnavailable:
		s.Mutate.fail(p.now, time.Second, 15*time.Second, seed)
	case ClassSubnetFull:
		t := s.subnet(c.Subnet)
		if c.N > 1 && !c.Prefix {
			t.chunk = c.N / 2
		} else if c.Prefix {
			t.noPrefix.fail(p.now, time.Minute, 10*time.Minute, seed)
		} else {
			t.chunk = 1
			t.full.fail(p.now, 5*time.Second, time.Minute, seed)
		}
	case ClassNoPrefix:
		// The subnet is fragmented; single addresses until it may have healed.
		s.subnet(c.Subnet).noPrefix.fail(p.now, 2*time.Minute, 20*time.Minute, seed)
		trouble = nil
	case ClassENIFull:
		if e != nil {
			e.Full = true
		}
		p.want(EC2, p.now.Add(time.Second))
		trouble = nil
	case ClassSlots:
		trouble = p.full(c.Pool, ev.Err)
		s.slotsOut, s.slotsWhy = p.now.Add(time.Minute), trouble
		if e != nil {
			e.Device = -1
		}
		p.want(EC2, p.now.Add(time.Second))
	case ClassAccountLimit:
		s.slotsOut, s.slotsWhy = p.now.Add(time.Minute), trouble
	case ClassGroups:
		// Other pools' calls go on: nothing is wrong with the node.
		trouble.Groups = c.Groups
		s.overflow[c.Pool] = p.now.Add(badGroups)
	case ClassNotFound:
		if c.Kind == CallDelete {
			p.dropENI(e)
			return
		}
		p.want(EC2, p.now.Add(time.Second))
	case ClassInUse:
		if c.Kind == CallAttach {
			// The index may be taken by an interface that we do not know of. Until a
			// read shows it, nothing further is made for this index.
			e.Device = -1
			s.overflow[e.Pool] = p.now.Add(indexTaken)
		}
		p.want(EC2, p.now.Add(time.Second))
	}
	if e != nil {
		switch ev.Class {
		case ClassThrottled, ClassSubnetFull, ClassNoPrefix, ClassDenied, ClassUnavailable: // not the interface's fault
		default:
			e.Retry.fail(p.now, time.Second, 30*time.Second, seed)
		}
	}
	if c.Kind == CallCreate && (ev.Class == ClassOther || ev.Class == ClassNotFound || ev.Class == ClassInUse) {
		s.Mutate.fail(p.now, time.Second, 30*time.Second, seed)
	}
	if grows && trouble != nil {
		p.trouble(c.Pool, trouble)
	}
}

// full is why the node has no further interface for a pool.
func (p *step) full(pool Pool, cause string) *Error {
	e := p.setsFull(pool, cause)
	if pool.Groups == "" {
		e.Kind, e.Max = KindNodeFull, p.s.Capacity()
	}
	return e
}

func (s *State) sortENIs() {
	rank := func(e *ENI) int {
		if e.Device < 0 {
			return maxDevice + 1
		}
		return e.Device
	}
	slices.SortFunc(s.ENIs, func(a, b *ENI) int {
		if d := rank(a) - rank(b); d != 0 {
			return d
		}
		if a.ID < b.ID {
			return -1
		}
		if a.ID > b.ID {
			return 1
		}
		return 0
	})
}
