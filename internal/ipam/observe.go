package ipam

import (
	"net/netip"
	"slices"
	"time"

	"github.com/underlay-cni/underlay/internal/ipam/planted"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// Tags that decide whose an ENI is.
const (
	TagCluster  = "cluster.k8s.amazonaws.com/name"     // value: the cluster's name
	TagInstance = "node.k8s.amazonaws.com/instance_id" // value: the instance it was made for
	TagNoManage = "node.k8s.amazonaws.com/no_manage"   // value "true": hands off
	TagPool     = "underlay.dev/security-group-pool"   // value: the pool's group set; absent: the node's own groups
)

// managed reports whether the ENI is ours to take addresses from.
func (s *State) managed(v *vpc.ENI) bool {
	if v.RequesterOwned || v.Tags[TagNoManage] == "true" || v.NetworkCard != 0 {
		return false
	}
	if v.Instance == s.Config.Instance && v.DeviceIndex == 0 {
		return true
	}
	if v.Type != "" && v.Type != "interface" { // trunk, branch, efa, …: made for something else
		return false
	}
	return v.Tags[TagCluster] == s.Config.Cluster && v.Tags[TagInstance] == string(s.Config.Instance)
}

func (p *step) newENI(v *vpc.ENI) *ENI {
	e := &ENI{ID: v.ID, MAC: v.MAC, Idle: v.Idle, Subnet: v.Subnet, Primary: v.Primary, Groups: vpc.NewGroupSet(v.Groups),
		Managed: p.s.managed(v), Pool: Pool{Groups: vpc.GroupSet(v.Tags[TagPool])}, Device: -1, Since: p.now}
	if v.Subnet != p.s.home {
		e.Pool.Subnet = v.Subnet
	}
	if v.Instance == p.s.Config.Instance && v.DeviceIndex == 0 {
		e.Pool = Pool{} // whatever tags it has
	}
	for _, o := range p.s.ENIs {
		if o.Primary == v.Primary {
			o.Primary = netip.Addr{} // it was the primary of one that was deleted
		}
		if a := o.find(v.Primary); a != nil && a.State != Bound {
			p.lose(o, a) // given back and taken again, before we heard of it
		}
	}
	if v.Instance == p.s.Config.Instance {
		e.Device, e.Phase, e.Attachment = v.DeviceIndex, Attached, v.Attachment
		e.Keep = v.DeviceIndex != 0 && !v.DeleteOnTermination
	}
	return e
}

// observedEC2 merges a read of EC2 into the state. What a read lacks is
// believed at the second time only; what a pod uses is never taken away.
func (p *step) observedEC2(ev ObservedEC2) {
	s := p.s
	// Nodes that started together do not read together ever after; and while
	// the account is short of requests, all read less often.
	pause := s.Config.Reconcile << min(s.Reads[EC2].retry.steps, 3)
	if !s.Known || pause > s.Config.Reconcile {
		pause = spread(pause*3/4, s.Config.Seed, uint64(s.Reads[EC2].retry.steps))
	}
	p.readDone(EC2)
	p.want(EC2, p.now.Add(pause))
	p.want(Links, p.now) // what is new here may be in use on the host
	first := !s.Known
	s.Known = true
	if first {
		delete(s.Trouble, Pool{})
	}
	for _, v := range ev.ENIs {
		if v.Instance == s.Config.Instance && v.DeviceIndex == 0 {
			s.home = v.Subnet
		}
	}
	listed := make(map[vpc.ENIID]bool, len(ev.ENIs))
	for i := range ev.ENIs {
		v := &ev.ENIs[i]
		listed[v.ID] = true
		p.mergeENI(v, ev.Read)
	}
	for _, e := range slices.Clone(s.ENIs) {
		if listed[e.ID] || e.Call != 0 || ev.Read.Before(e.Touched) {
			continue
		}
		p.missingENI(e, ev.Read)
	}
	for _, a := range s.Lost {
		if slices.ContainsFunc(ev.ENIs, func(v vpc.ENI) bool { return v.Instance == s.Config.Instance && v.Holds(a.Addr) }) {
			a.Missing, a.Reported = time.Time{}, false // on an interface that is not ours to manage
			continue
		}
		if a.State == Bound {
			p.missingAddr(a, nil, ev.Read)
		}
	}
	s.sortENIs()
}

func (p *step) mergeENI(v *vpc.ENI, read time.Time) {
	s := p.s
	if t, ok := s.GoneENI[v.ID]; ok && read.Sub(t) < s.Config.ReadLag {
		return
	}
	ours := v.Instance == s.Config.Instance
	e := s.ENI(v.ID)
	if e == nil {
		if !ours && (!s.managed(v) || p.creating()) {
			return // not ours, or the one that a call in flight makes
		}
		e = p.newENI(v)
		if e.Device >= 0 {
			p.claim(e)
		}
		s.ENIs = append(s.ENIs, e)
	}
	if e.Call != 0 || read.Before(e.Touched) {
		return // the read may be older than what the call did or does
	}
	e.Missing, e.Unsure, e.Full = time.Time{}, false, false
	e.Groups = vpc.NewGroupSet(v.Groups)
	e.MAC, e.Idle = v.MAC, v.Idle
	if !e.Primary.IsValid() && !p.elsewhere(e, v.Primary, read) {
		e.Primary = v.Primary // it never changes
	}
	if e.Phase != Retiring {
		e.Managed = s.managed(v)
	}
	switch {
	case ours && e.Phase == Detached:
		e.Phase, e.Since, e.Attachment, e.Device = Attached, p.now, v.Attachment, v.DeviceIndex
		p.claim(e)
	case ours && e.Phase == Attached:
		e.Attachment = v.Attachment
	case !ours && e.Phase == Attached && read.Sub(e.Touched) >= s.Config.ReadLag && e.count(Bound) == 0:
		e.Phase, e.Attachment, e.Device, e.Link = Detached, "", -1, false
	case ours && e.Phase == Retiring:
		// Attached by an agent before us, as it turns out: it has to come off first,
		// and holds its index until then.
		e.Attachment, e.Device = v.Attachment, v.DeviceIndex
		p.claim(e)
	case !ours && e.Phase == Retiring:
		e.Attachment = ""
	}
	if e.Phase == Attached && e.Device != 0 {
		e.Keep = !v.DeleteOnTermination
	}
	if e.Managed {
		p.mergeAddrs(e, v, read)
	}
}

func (p *step) mergeAddrs(e *ENI, v *vpc.ENI, read time.Time) {
	for _, pfx := range v.Prefixes {
		p.adoptPrefixSeen(e, pfx, read)
	}
	for _, addr := range v.Secondary {
		if e.find(addr) == nil && !p.recentlyGone(addr, read) && !p.elsewhere(e, addr, read) {
			p.adopt(e, addr, netip.Prefix{})
			p.hearsay(e, addr)
		}
	}
	for _, a := range slices.Clone(e.Addrs) {
		if v.Holds(a.Addr) {
			if a.Hearsay {
				p.believe(a, read)
			}
			p.setForeign(a, slices.Contains(v.Elastic, a.Addr), a.Host)
			a.Missing, a.Reported = time.Time{}, false
			if a.State == Returning {
				p.returned(e, a, read)
			}
			continue
		}
		p.missingAddr(a, e, read)
	}
	e.Prefixes = slices.DeleteFunc(e.Prefixes, func(pfx netip.Prefix) bool {
		return !slices.Contains(v.Prefixes, pfx) && !slices.ContainsFunc(e.Addrs, func(a *Address) bool { return a.Prefix == pfx })
	})
}

// sure returns from when on a read tells how a call of unknown end, no later
// than t, ended: it may take effect a while after its answer was lost, and a
// read may be older than the effect by as much.
func (p *step) sure(t time.Time) time.Time { return t.Add(2 * p.s.Config.ReadLag) }

// returned handles an address that a read lists although we gave it back by a
// call whose end is unknown.
func (p *step) returned(e *ENI, a *Address, read time.Time) {
	if sure := p.sure(e.Touched); read.Before(sure) && planted.Bug != planted.StaleReturn {
		p.want(EC2, sure)
		return
	}
	a.State, a.Since = Free, p.now // the call did not happen
}

// forgetReturned drops what EC2 just gave and we think we are giving back: the
// call to give it back, whose end is unknown, has happened in between.
func (p *step) forgetReturned(e *ENI, ev CallDone) {
	for _, a := range slices.Clone(e.Addrs) {
		given := slices.Contains(ev.Addrs, a.Addr) || slices.ContainsFunc(ev.Prefixes, func(x netip.Prefix) bool { return x.Contains(a.Addr) })
		if given && a.State != Bound && a.State != Cooling {
			e.remove(a)
		}
	}
}

func (p *step) recentlyGone(addr netip.Addr, read time.Time) bool {
	t, ok := p.s.Gone[addr]
	return ok && read.Sub(t) < p.s.Config.ReadLag
}

// elsewhere reports whether EC2 gave addr to another interface so recently that
// a read which lists it on e may be older: e had it before, and lost it by a
// call whose end is unknown.
func (p *step) elsewhere(e *ENI, addr netip.Addr, read time.Time) bool {
	for _, o := range p.s.ENIs {
		given := o.Since // as its primary, when it was made
		if a := o.find(addr); a != nil {
			given = a.Assigned
		} else if o.Primary != addr {
			continue
		}
		if sure := given.Add(p.s.Config.ReadLag); o != e && read.Before(sure) {
			p.want(EC2, sure)
			return true
		}
	}
	return false
}

// creating reports whether an ENI is being made.
func (p *step) creating() bool {
	for _, c := range p.s.Calls {
		if c.Kind == CallCreate {
			return true
		}
	}
	return false
}

// claim gives e the device index that EC2 says it has, and takes it from
// whoever had reserved it.
func (p *step) claim(e *ENI) {
	for _, o := range p.s.ENIs {
		if o != e && o.Device == e.Device {
			o.Device = -1
		}
	}
	for _, c := range p.s.Calls {
		if c.Kind == CallCreate && c.Device == e.Device {
			c.Device = -1
		}
	}
	for _, id := range p.s.callIDs() {
		if c := p.s.Calls[id]; c.Kind == CallCreate && c.Device < 0 {
			c.Device = p.s.nextDevice(e)
		}
	}
}

// adopt takes an address that EC2 says is on e into the pool. One that a pod
// has is taken over with its state.
func (p *step) adopt(e *ENI, addr netip.Addr, pfx netip.Prefix) {
	s := p.s
	if addr == e.Primary || e.find(addr) != nil {
		return
	}
	delete(s.Gone, addr)
	a := &Address{Addr: addr, Prefix: pfx, State: Assigned, Since: p.now, Assigned: p.now}
	if i := slices.IndexFunc(s.Lost, func(l *Address) bool { return l.Addr == addr }); i >= 0 {
		a = s.Lost[i]
		a.Prefix, a.Missing, a.Reported, a.Assigned = pfx, time.Time{}, false, p.now
		s.Lost = slices.Delete(s.Lost, i, i+1)
	}
	// Moved from another ENI: EC2 moves addresses only when told to, so the
	// other has lost it.
	for _, o := range s.ENIs {
		if o == e {
			continue
		}
		if o.Primary == addr {
			o.Primary = netip.Addr{} // deleted, by a call whose end we do not know yet
		}
		if old := o.find(addr); old != nil {
			o.remove(old)
			if old.State == Bound || old.State == Cooling {
				a = old
				a.Prefix, a.Missing, a.Reported, a.Assigned = pfx, time.Time{}, false, p.now
			}
		}
	}
	e.insert(a)
}

func (p *step) adoptPrefix(e *ENI, pfx netip.Prefix) {
	pfx = pfx.Masked()
	if pfx.Bits() != vpc.PrefixBits || !pfx.Addr().Is4() {
		return
	}
	if !slices.Contains(e.Prefixes, pfx) {
		e.Prefixes = append(e.Prefixes, pfx)
	}
	for a := pfx.Addr(); pfx.Contains(a); a = a.Next() {
		p.adopt(e, a, pfx)
	}
}

func (p *step) adoptPrefixSeen(e *ENI, pfx netip.Prefix, read time.Time) {
	if first := pfx.Masked().Addr(); slices.Contains(e.Prefixes, pfx.Masked()) || p.recentlyGone(first, read) || p.elsewhere(e, first, read) {
		return
	}
	p.adoptPrefix(e, pfx)
	for a := pfx.Masked().Addr(); pfx.Contains(a); a = a.Next() {
		p.hearsay(e, a)
	}
}

// hearsay marks an address that nothing but a read tells of.
func (p *step) hearsay(e *ENI, addr netip.Addr) {
	if a := e.find(addr); a != nil && a.State == Assigned {
		a.Hearsay = true
	}
}

// believe ends the doubt about an address when a read lists it that is too
// young to be older than a return by an agent before us: that may have been
// under way when we began, and take effect a while later.
func (p *step) believe(a *Address, read time.Time) {
	if sure := p.sure(a.Assigned); read.Before(sure) {
		if a.State == Assigned {
			p.want(EC2, sure)
		}
		return
	}
	// It may have gone and come again meanwhile: IMDS may be late from now on.
	a.Hearsay, a.Assigned = false, p.now
}

func (e *ENI) remove(a *Address) {
	e.Addrs = slices.DeleteFunc(e.Addrs, func(b *Address) bool { return a == b })
}

// missingAddr handles an address that a read of EC2 does not list; e is nil
// for one that no ENI lists.
func (p *step) missingAddr(a *Address, e *ENI, read time.Time) {
	s := p.s
	if planted.Bug == planted.StaleEvicts && a.State == Bound && e != nil {
		e.remove(a)
		return
	}
	if !a.Assigned.IsZero() && read.Sub(a.Assigned) < s.Config.ReadLag {
		return // EC2 gave it so recently that a read may not show it yet
	}
	if a.Missing.IsZero() {
		a.Missing = read
		p.want(EC2, p.now.Add(s.Config.Confirm))
		return
	}
	if read.Sub(a.Missing) < s.Config.Confirm {
		p.want(EC2, a.Missing.Add(s.Config.Confirm))
		return
	}
	if a.State == Bound {
		if !a.Reported {
			a.Reported = true
			r := Report{Addr: a.Addr, Owner: a.Owner}
			if e != nil {
				r.ENI = e.ID
			}
			p.do(r)
		}
		return
	}
	if e != nil {
		p.lose(e, a)
	}
}

// lose takes an address off its ENI. One that cools down is kept aside until
// its tombstone may go.
func (p *step) lose(e *ENI, a *Address) {
	e.remove(a)
	if a.State == Cooling || a.State == Bound {
		a.Prefix = netip.Prefix{}
		p.s.Lost = append(p.s.Lost, a)
	}
}

func (p *step) missingENI(e *ENI, read time.Time) {
	s := p.s
	if e.Missing.IsZero() {
		e.Missing = read
		p.want(EC2, p.now.Add(s.Config.Confirm))
		return
	}
	if read.Sub(e.Missing) < s.Config.Confirm || read.Sub(e.Touched) < s.Config.ReadLag && e.Phase != Retiring {
		p.want(EC2, p.now.Add(s.Config.Confirm))
		return
	}
	if e.count(Bound) == 0 {
		p.dropENI(e)
		return
	}
	e.Unsure = false
	for _, a := range slices.Clone(e.Addrs) {
		if a.Missing.IsZero() {
			a.Missing = e.Missing
		}
		p.missingAddr(a, e, read)
	}
}

// returns reports whether c gives a back. Others on the ENI may be Returning by
// an earlier call whose end is unknown.
func (c *Call) returns(a *Address) bool { return a.State == Returning && a.Since.Equal(c.Began) }

// dropReturning removes what a call gave back.
func (p *step) dropReturning(e *ENI, c *Call) {
	for _, a := range slices.Clone(e.Addrs) {
		if c.returns(a) {
			e.remove(a)
			p.s.Gone[a.Addr] = p.now
		}
	}
	e.Prefixes = slices.DeleteFunc(e.Prefixes, func(pfx netip.Prefix) bool {
		return !slices.ContainsFunc(e.Addrs, func(a *Address) bool { return a.Prefix == pfx })
	})
}

func (p *step) dropENI(e *ENI) {
	s := p.s
	for _, a := range slices.Clone(e.Addrs) {
		p.lose(e, a)
		s.Gone[a.Addr] = p.now
	}
	s.GoneENI[e.ID] = p.now
	s.ENIs = slices.DeleteFunc(s.ENIs, func(o *ENI) bool { return o == e })
}
