package ipam

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// do carries out an action, and judges it first.
func (m *model) do(a Action) {
	switch a := a.(type) {
	case SetTimer:
		m.timer = a.At
	case Reread:
		if slices.ContainsFunc(m.reads, func(r reading) bool { return r.src == a.Source }) {
			m.fail("two reads of %s in flight", a.Source)
		}
		m.reads = append(m.reads, reading{a.Source, m.now})
	case Forget:
		m.judgeForget(a)
		delete(m.tombs, a.Addr)
	case Report:
		if e := m.holder(a.Addr); e != nil {
			m.fail("%s is reported as lost, and is on %s", a.Addr, e.ID)
		}
	case Reply:
		m.reply(a)
	default:
		m.judgeCall(a)
		m.calm++
		m.calls = append(m.calls, flight{act: a, began: m.now})
	}
}

func (m *model) judgeForget(a Forget) {
	t, ok := m.tombs[a.Addr]
	switch {
	case !ok:
		// A release whose tombstone is gone already, or an address that others
		// used: there is nothing to forget, and nothing is lost.
	case m.now.Before(t.Add(m.cfg.Cooldown)):
		m.fail("tombstone of %s forgotten %s before the cooldown is over", a.Addr, t.Add(m.cfg.Cooldown).Sub(m.now))
	}
}

func (m *model) reply(a Reply) {
	i := slices.IndexFunc(m.pods, func(p pod) bool { return p.state == podWaiting && p.req == a.Request })
	if i < 0 {
		m.fail("request %d is answered, and does not wait", a.Request)
		return
	}
	p := &m.pods[i]
	if a.Err != nil {
		p.state = podIdle
		m.judgeRefusal(a.Err, p)
		return
	}
	m.judgeReply(a, p.pool)
	p.state, p.addr = podHanded, a.Addr
}

// judgeRefusal checks what a pod is told that gets no address.
func (m *model) judgeRefusal(e *Error, p *pod) {
	if p.pool.Groups != "" && (e.Kind == KindSetsFull || e.Kind == KindNodeFull) && m.now.Before(p.deadline) {
		m.fail("%s is refused for want of an interface %s before its deadline", p.owner, p.deadline.Sub(m.now))
	}
	if e.Kind != KindSetsFull {
		return
	}
	n := e.Others
	for _, u := range e.Sets {
		n += u.ENIs
		pods := 0
		for _, o := range m.pods {
			if o.state >= podHanded && o.pool.Groups == u.Groups {
				pods++
			}
		}
		if pods != u.Pods {
			m.fail("%s hears of %d pods of %q, which has %d", p.owner, u.Pods, u.Groups, pods)
		}
	}
	if n < m.cfg.Limits.ENIs && e.Cause == "" {
		m.fail("%s hears of %d interfaces, the node takes %d", p.owner, n, m.cfg.Limits.ENIs)
	}
}

// vacate notes that a pod gave its address back.
func (m *model) vacate(p *pod) {
	if e := m.holder(p.addr); e != nil {
		m.vacant[e.ID] = m.now
	}
}

// judgeLinger checks that an interface of a set may go. That the plan learnt of
// other groups on it since is reason enough.
func (m *model) judgeLinger(e *vpc.ENI) {
	since, ok := m.vacant[e.ID]
	if e.Tags[TagPool] != "" && ok && !m.moved[e.ID] && m.now.Before(since.Add(m.cfg.SetLinger)) {
		m.fail("%s of the set %s is deleted %s after its last pod", e.ID, e.Tags[TagPool], m.now.Sub(since))
	}
}

// carries returns the groups of an interface. Of one whose groups somebody
// changed the plan has to know what it last read.
func (m *model) carries(e *vpc.ENI) vpc.GroupSet {
	if k := m.s.ENI(e.ID); k != nil && m.moved[e.ID] {
		return k.Groups
	}
	return vpc.NewGroupSet(e.Groups)
}

// drift changes the groups of a set's interface, or puts them back.
func (m *model) drift(e *vpc.ENI) {
	before := past{until: m.now, enis: m.view()}
	own := vpc.GroupSet(e.Tags[TagPool])
	if vpc.NewGroupSet(e.Groups) == own {
		e.Groups = []vpc.SecurityGroupID{"sg-drift"}
	} else {
		e.Groups = own.Groups()
	}
	m.moved[e.ID] = true
	m.remember(before)
}

// judgeReply checks that an address may be handed out now.
func (m *model) judgeReply(a Reply, pool Pool) {
	for _, p := range m.pods {
		if p.has(a.Addr) {
			m.fail("%s in two hands: %s has it", a.Addr, p.owner)
		}
	}
	if t, ok := m.tombs[a.Addr]; ok {
		m.fail("%s handed out %s after its release, with its tombstone", a.Addr, m.now.Sub(t))
	}
	e := m.holder(a.Addr)
	switch {
	case e == nil:
		m.fail("%s handed out, which EC2 does not have on any interface", a.Addr)
	case e.ID != a.ENI:
		m.fail("%s handed out as on %s, and is on %s", a.Addr, a.ENI, e.ID)
	case e.Instance != testInstance:
		m.fail("%s handed out on %s, which is not attached", a.Addr, e.ID)
	case e.DeviceIndex != 0 && !e.DeleteOnTermination:
		m.fail("%s handed out on %s before delete-on-termination", a.Addr, e.ID)
	case m.carries(e) != cmp.Or(pool.Groups, nodeGroups):
		m.fail("%s handed out on %s, which carries %s, to a pod of %s", a.Addr, e.ID, e.Groups, cmp.Or(pool.Groups, nodeGroups))
	case e.Subnet != cmp.Or(pool.Subnet, nodeSubnet):
		m.fail("%s handed out on %s, which is in %s, to a pod of %s", a.Addr, e.ID, e.Subnet, cmp.Or(pool.Subnet, nodeSubnet))
	case !m.link[e.ID]:
		m.fail("%s handed out on %s, whose link is not ready", a.Addr, e.ID)
	case !m.listed(e, a.Addr) && m.now.Sub(m.used[a.Addr]) < m.cfg.UsableWait:
		m.fail("%s handed out %s after its assignment, not yet live", a.Addr, m.now.Sub(m.used[a.Addr]))
	}
}

// listed reports whether IMDS lists an address.
func (m *model) listed(e *vpc.ENI, a netip.Addr) bool {
	for _, p := range e.Prefixes {
		if p.Contains(a) {
			return m.live[p.Addr()]
		}
	}
	return m.live[a]
}

func (m *model) holder(a netip.Addr) *vpc.ENI {
	for _, e := range m.enis {
		if a != e.Primary && e.Holds(a) {
			return e
		}
	}
	return nil
}

// mutation returns the number of a call and the interface it is about.
func mutation(a Action) (CallID, vpc.ENIID) {
	switch a := a.(type) {
	case AssignAddresses:
		return a.Call, a.ENI
	case AssignPrefixes:
		return a.Call, a.ENI
	case Unassign:
		return a.Call, a.ENI
	case CreateENI:
		return a.Call, ""
	case AttachENI:
		return a.Call, a.ENI
	case SetDeleteOnTermination:
		return a.Call, a.ENI
	case DeleteENI:
		return a.Call, a.ENI
	}
	panic(fmt.Sprintf("%T is no mutation", a))
}

// judgeCall checks that a call may be made now.
func (m *model) judgeCall(a Action) {
	_, id := mutation(a)
	for _, c := range m.calls {
		if _, other := mutation(c.act); id != "" && other == id {
			m.fail("two mutations of %s in flight: %T and %T", id, c.act, a)
		}
	}
	switch a := a.(type) {
	case AssignAddresses, AssignPrefixes:
		m.judgeRepeat(a, id)
	case AttachENI:
		m.judgeRepeat(a, id)
		m.judgeDevice(a.Device, a.ENI)
	case CreateENI:
		m.judgeDevice(a.Device, "")
		if old, ok := m.tokOf[a.Call]; ok && old != a.Token {
			m.fail("creation %d is repeated with another token", a.Call)
		}
		m.tokOf[a.Call] = a.Token
		if old, ok := m.params[a.Token]; ok && (old.N != a.N || old.Subnet != a.Subnet || old.Prefixes != a.Prefixes || old.Pool != a.Pool || !old.Created.Equal(a.Created) || !slices.Equal(old.Groups, a.Groups)) {
			m.fail("token %s is used for %+v and %+v", a.Token, old, a)
		}
		m.params[a.Token] = a
	case Unassign:
		for _, x := range a.Addrs {
			m.judgeGift(x, "unassign")
		}
		for _, p := range a.Prefixes {
			for x := p.Addr(); p.Contains(x); x = x.Next() {
				m.judgeGift(x, "unassign")
			}
		}
	case DeleteENI:
		for _, e := range m.enis {
			if e.ID != a.ENI {
				continue
			}
			m.judgeLinger(e)
			for _, p := range m.pods {
				if p.state >= podHanded && e.Holds(p.addr) {
					m.judgeGift(p.addr, "delete")
				}
			}
			for x := range m.tombs {
				if e.Holds(x) {
					m.judgeGift(x, "delete")
				}
			}
		}
	}
}

func (m *model) judgeRepeat(a Action, id vpc.ENIID) {
	if t, ok := m.unsure[id]; ok {
		m.fail("%T on %s, %s after one whose end is unknown, without a read between", a, id, m.now.Sub(t))
	}
}

func (m *model) judgeDevice(d int, id vpc.ENIID) {
	for _, e := range m.enis {
		// One that the plan has not heard of may have the index: EC2 says so.
		if k := m.s.ENI(e.ID); e.Instance != "" && e.DeviceIndex == d && e.ID != id && k != nil && k.Phase == Attached {
			m.fail("device index %d is shared: %s has it", d, e.ID)
		}
	}
	for _, c := range m.calls {
		switch c := c.act.(type) {
		case CreateENI:
			if c.Device == d {
				m.fail("device index %d is shared: two calls in flight", d)
			}
		case AttachENI:
			if c.Device == d {
				m.fail("device index %d is shared: two calls in flight", d)
			}
		}
	}
}

// judgeGift checks that an address may go back to the subnet.
func (m *model) judgeGift(a netip.Addr, what string) {
	for _, p := range m.pods {
		if p.has(a) {
			m.fail("%s of %s, which %s uses", what, a, p.owner)
		}
	}
	if t, ok := m.tombs[a]; ok {
		m.fail("%s of %s %s after its release, before its cooldown is over", what, a, m.now.Sub(t))
	}
}

// deadlines checks that whoever waits is answered in time.
func (m *model) deadlines() {
	for _, p := range m.pods {
		if p.state != podWaiting {
			continue
		}
		if late := m.now.Sub(p.deadline); late > 0 && m.timer.IsZero() {
			m.fail("%s waits %s past its deadline", p.owner, late)
		}
		if m.timer.IsZero() || m.timer.After(p.deadline) {
			m.fail("%s waits, and nothing wakes the plan at its deadline", p.owner)
		}
	}
}

// effect does in EC2 what a call asks for.
func (m *model) effect(a Action) CallDone {
	before := past{until: m.now, enis: m.view()}
	d := m.change(a)
	if d.Outcome == Done {
		m.remember(before)
	}
	return d
}

// remember keeps what EC2 was before a change, for reads that lag.
func (m *model) remember(before past) {
	m.past = append(m.past, before)
	if len(m.past) > 2 {
		m.past = slices.Clone(m.past[len(m.past)-2:])
	}
}

func (m *model) change(a Action) CallDone {
	_, id := mutation(a)
	i := slices.IndexFunc(m.enis, func(e *vpc.ENI) bool { return e.ID == id })
	if i < 0 && id != "" {
		return refused(ClassNotFound)
	}
	switch a := a.(type) {
	case AssignAddresses:
		if slots(m.enis[i])+a.N > m.cfg.Limits.IPv4PerENI {
			return refused(ClassENIFull)
		}
		return CallDone{Addrs: m.assign(m.enis[i], a.N)}
	case AssignPrefixes:
		if slots(m.enis[i])+a.N > m.cfg.Limits.IPv4PerENI {
			return refused(ClassENIFull)
		}
		return CallDone{Prefixes: m.assignPrefixes(m.enis[i], a.N)}
	case Unassign:
		for _, x := range a.Addrs {
			if !slices.Contains(m.enis[i].Secondary, x) {
				return refused(ClassOther)
			}
		}
		m.drop(m.enis[i], a.Addrs, a.Prefixes)
	case CreateENI:
		if known, ok := m.tokens[a.Token]; ok {
			for _, e := range m.enis {
				if e.ID == known {
					c := copyENI(e)
					return CallDone{ENI: &c}
				}
			}
		}
		e := m.newENI()
		m.tokens[a.Token], e.Groups = e.ID, a.Groups
		e.Subnet = a.Subnet
		if a.Pool.Groups != "" {
			e.Tags[TagPool] = string(a.Pool.Groups)
		}
		if a.Prefixes {
			m.assignPrefixes(e, a.N)
		} else {
			m.assign(e, a.N)
		}
		c := copyENI(e)
		return CallDone{ENI: &c}
	case AttachENI:
		n := 0
		for _, o := range m.enis {
			if o.Instance == "" {
				continue
			}
			n++
			if o == m.enis[i] || o.DeviceIndex == a.Device {
				return refused(ClassInUse)
			}
		}
		if n >= m.cfg.Limits.ENIs {
			return refused(ClassSlots)
		}
		e := m.enis[i]
		e.Instance, e.DeviceIndex, e.Attached, e.Attachment = testInstance, a.Device, true, vpc.AttachmentID("eni-attach-"+string(id)[4:])
		return CallDone{ENI: &vpc.ENI{ID: id, Attachment: e.Attachment}}
	case SetDeleteOnTermination:
		if m.enis[i].Attachment != a.Attachment {
			return refused(ClassNotFound)
		}
		m.enis[i].DeleteOnTermination = true
	case DeleteENI:
		e := m.enis[i]
		if e.Instance != "" && e.Attachment != a.Attachment {
			return refused(ClassInUse)
		}
		m.drop(e, e.Secondary, e.Prefixes)
		delete(m.used, e.Primary)
		delete(m.link, id)
		m.enis = slices.Delete(m.enis, i, i+1)
	}
	return CallDone{}
}

func (m *model) newENI() *vpc.ENI {
	m.seq++
	e := &vpc.ENI{ID: vpc.ENIID(fmt.Sprintf("eni-%03d", m.seq)), Subnet: nodeSubnet, MAC: "02:00:00:00:00:01", Groups: []vpc.SecurityGroupID{"sg-node"},
		Tags: map[string]string{TagCluster: "test", TagInstance: string(testInstance)}}
	e.Primary = m.take()
	m.enis = append(m.enis, e)
	return e
}

// What the node's own interface carries, and where it is.
const (
	nodeGroups = vpc.GroupSet("sg-node")
	nodeSubnet = vpc.SubnetID("subnet-1")
)

var (
	firstAddr   = netip.MustParseAddr("10.0.0.16")
	firstPrefix = netip.MustParsePrefix("10.0.4.0/28")
)

// take gives the lowest free address of the subnet, as EC2 may at any time:
// what was given back comes again at once.
func (m *model) take() netip.Addr {
	a := firstAddr
	for !m.used[a].IsZero() {
		a = a.Next()
	}
	m.used[a] = m.now
	return a
}

func (m *model) assign(e *vpc.ENI, n int) []netip.Addr {
	var out []netip.Addr
	for range n {
		out = append(out, m.take())
	}
	e.Secondary = append(slices.Clone(e.Secondary), out...)
	return out
}

func (m *model) assignPrefixes(e *vpc.ENI, n int) []netip.Prefix {
	var out []netip.Prefix
	p := firstPrefix
	for len(out) < n {
		last := p.Addr()
		taken := !m.used[p.Addr()].IsZero()
		for ; p.Contains(last); last = last.Next() {
			if !taken {
				m.used[last] = m.now
			}
		}
		if !taken {
			out = append(out, p)
		}
		p = netip.PrefixFrom(last, 28)
	}
	e.Prefixes = append(slices.Clone(e.Prefixes), out...)
	return out
}

func (m *model) drop(e *vpc.ENI, addrs []netip.Addr, prefixes []netip.Prefix) {
	for _, a := range addrs {
		delete(m.used, a)
		delete(m.live, a)
		m.left = append(m.left, left{a, e.ID, m.now})
	}
	for _, p := range prefixes {
		for a := p.Addr(); p.Contains(a); a = a.Next() {
			delete(m.used, a)
			delete(m.live, a)
		}
	}
	e.Secondary = slices.DeleteFunc(slices.Clone(e.Secondary), func(a netip.Addr) bool { return slices.Contains(addrs, a) })
	e.Prefixes = slices.DeleteFunc(slices.Clone(e.Prefixes), func(p netip.Prefix) bool { return slices.Contains(prefixes, p) })
}

// settle lets everything run undisturbed, and returns what is then wrong.
func (m *model) settle() error {
	m.budget = budget{}
	if err := m.calmFor(8 * time.Minute); err != nil {
		return fmt.Errorf("settling: %w", err)
	}
	if m.calm > 80 {
		return fmt.Errorf("%d calls to settle", m.calm)
	}
	if err := m.calmFor(10 * time.Minute); err != nil {
		return fmt.Errorf("settled: %w", err)
	}
	if m.calm > 0 {
		return fmt.Errorf("%d further calls after it settled", m.calm)
	}
	bound, held := map[Pool]int{}, map[Pool]int{}
	enis := m.cfg.Limits.ENIs // for the default pool
	for _, p := range m.pods {
		switch p.state {
		case podWaiting:
			return fmt.Errorf("%s waits for ever", p.owner)
		case podBound:
			bound[p.pool]++
			if m.holder(p.addr) == nil {
				return fmt.Errorf("%s has %s, which is lost", p.owner, p.addr)
			}
		}
	}
	for _, e := range m.enis {
		if e.Instance == "" {
			return fmt.Errorf("%s is an orphan", e.ID)
		}
		pool := Pool{Groups: vpc.GroupSet(e.Tags[TagPool])}
		if e.Subnet != nodeSubnet {
			pool.Subnet = e.Subnet
		}
		if pool != (Pool{}) {
			enis--
		}
		held[pool] += len(e.Secondary) + 16*len(e.Prefixes)
	}
	if len(m.tombs) > 0 {
		return fmt.Errorf("%d tombstones are left", len(m.tombs))
	}
	want := min(bound[Pool{}]+m.cfg.Floor, enis*(m.cfg.Limits.IPv4PerENI-1))
	if n := held[Pool{}]; !m.cfg.Prefixes && n != want || n < want {
		return fmt.Errorf("%d addresses held, %d bound: the floor is %d", n, bound[Pool{}], m.cfg.Floor)
	}
	for _, pool := range []Pool{otherPool, thirdPool} {
		if n := held[pool]; !m.cfg.Prefixes && n != bound[pool] || bound[pool] == 0 && n > 0 {
			return fmt.Errorf("%d addresses held in pool %s, %d bound: it has no floor", n, pool, bound[pool])
		}
	}
	return nil
}

// calmFor runs what is due for a time, every call and read at its best.
func (m *model) calmFor(d time.Duration) error {
	end := m.now.Add(d)
	m.calm = 0
	for n := 0; ; n++ {
		if n > 20000 {
			return fmt.Errorf("no end in sight after %d moves", n)
		}
		v := move{kind: moveTick}
		waiting := slices.IndexFunc(m.pods, func(p pod) bool { return p.state == podHanded })
		switch {
		case !m.up:
			v = move{kind: moveStart}
		case waiting >= 0:
			v = move{kind: moveCommit, i: waiting}
		case len(m.calls) > 0:
			v = move{kind: moveEnd}
		case len(m.reads) > 0:
			v = move{kind: moveRead}
		case m.timer.IsZero() || m.timer.After(end):
			m.pass(end.Sub(m.now))
			return nil
		}
		if err := m.apply(v); err != nil {
			return err
		}
	}
}
