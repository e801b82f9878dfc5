package ipam

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

const testInstance = vpc.InstanceID("i-0123456789abcdef0")

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// world is EC2, IMDS and the kernel as far as ipam can tell: it carries out
// the actions, with the latencies and failures it is told to have.
type world struct {
	t   testing.TB
	s   State
	now time.Time
	rng *rand.Rand

	enis   map[vpc.ENIID]*vpc.ENI
	tokens map[string]vpc.ENIID
	used   map[netip.Addr]bool
	nextIP netip.Addr
	free   int // addresses left in the subnet
	seq    int

	callLatency, attachLatency, imdsLag time.Duration
	mapped                              map[netip.Addr]time.Time // when IMDS lists it
	attached                            map[vpc.ENIID]time.Time  // when the link is there
	fail                                func(a Action) (Outcome, Class)
	hide                                bool         // EC2 lists no secondary address
	noReads                             Class        // how EC2 refuses to be read; ClassOther: it does not
	host                                []netip.Addr // what others have configured on the node

	timer   time.Time
	queue   []queued
	replies map[RequestID]Reply
	calls   int
	reports []Report
	forgot  map[netip.Addr]int
	trace   []string
}

type queued struct {
	at time.Time
	ev func() Event
}

func newWorld(t testing.TB, typ string, seed uint64) *world {
	limits, ok := vpc.LimitsOf(typ)
	if !ok {
		t.Fatalf("unknown type %s", typ)
	}
	w := &world{t: t, now: epoch, rng: rand.New(rand.NewPCG(seed, 1)), enis: map[vpc.ENIID]*vpc.ENI{}, tokens: map[string]vpc.ENIID{}, used: map[netip.Addr]bool{},
		nextIP: netip.MustParseAddr("10.0.0.16"), free: 4000, callLatency: 50 * time.Millisecond, attachLatency: time.Second, imdsLag: 500 * time.Millisecond,
		mapped: map[netip.Addr]time.Time{}, attached: map[vpc.ENIID]time.Time{}, replies: map[RequestID]Reply{}, forgot: map[netip.Addr]int{}}
	e := w.newENI()
	e.Instance, e.Attachment, e.Attached, e.DeviceIndex = testInstance, "eni-attach-00000000000000000", true, 0
	w.attached[e.ID] = epoch
	w.s.Config = Default()
	w.s.Config.Instance, w.s.Config.Cluster, w.s.Config.Limits = testInstance, "test", limits
	return w
}

func (w *world) start(eps ...Endpoint) {
	w.send(Started{At: w.now, Config: w.s.Config, Endpoints: eps})
}

func (w *world) newENI() *vpc.ENI {
	w.seq++
	e := &vpc.ENI{ID: vpc.ENIID(fmt.Sprintf("eni-%017x", w.seq)), Subnet: "subnet-1", MAC: fmt.Sprintf("02:00:00:00:00:%02x", w.seq),
		Groups: []vpc.SecurityGroupID{"sg-node"}, Tags: map[string]string{}}
	e.Primary = w.take()
	w.enis[e.ID] = e
	return e
}

func (w *world) take() netip.Addr {
	for w.used[w.nextIP] {
		w.nextIP = w.nextIP.Next()
	}
	a := w.nextIP
	w.used[a] = true
	w.free--
	w.mapped[a] = w.now.Add(w.imdsLag)
	return a
}

func (w *world) takePrefix() (netip.Prefix, bool) {
	p := netip.MustParsePrefix("10.0.4.0/28")
	for range 200 {
		if !w.used[p.Addr()] {
			for a := p.Addr(); p.Contains(a); a = a.Next() {
				w.used[a] = true
				w.mapped[a] = w.now.Add(w.imdsLag)
				w.free--
			}
			return p, true
		}
		last := p.Addr()
		for p.Contains(last) {
			last = last.Next()
		}
		p = netip.PrefixFrom(last, 28)
	}
	return p, false
}

func (w *world) after(d time.Duration, ev func() Event) {
	w.queue = append(w.queue, queued{w.now.Add(d), ev})
	slices.SortStableFunc(w.queue, func(a, b queued) int { return a.at.Compare(b.at) })
}

func (w *world) send(ev Event) {
	var acts []Action
	w.s, acts = Step(w.s, ev)
	if len(w.trace) < 4000 {
		w.trace = append(w.trace, fmt.Sprintf("%8s %T%+v", w.now.Sub(epoch), ev, ev))
	}
	if err := w.s.Verify(); err != nil {
		w.dump()
		w.t.Fatalf("after %T%+v: %v", ev, ev, err)
	}
	for _, a := range acts {
		w.do(a)
	}
}

func (w *world) dump() {
	for _, l := range w.trace[max(0, len(w.trace)-60):] {
		w.t.Log(l)
	}
}

func (w *world) do(a Action) {
	if len(w.trace) < 4000 {
		w.trace = append(w.trace, fmt.Sprintf("%8s     → %T%+v", w.now.Sub(epoch), a, a))
	}
	switch a := a.(type) {
	case SetTimer:
		w.timer = a.At
	case Reply:
		if _, dup := w.replies[a.Request]; dup {
			w.t.Fatalf("request %d answered twice", a.Request)
		}
		w.replies[a.Request] = a
	case Forget:
		w.forgot[a.Addr]++
	case Report:
		w.reports = append(w.reports, a)
	case Reread:
		w.read(a.Source)
	case AssignAddresses:
		w.mutate(a, a.Call, func() CallDone { return w.assign(a.ENI, a.N) })
	case AssignPrefixes:
		w.mutate(a, a.Call, func() CallDone { return w.assignPrefixes(a.ENI, a.N) })
	case Unassign:
		w.mutate(a, a.Call, func() CallDone { return w.unassign(a) })
	case CreateENI:
		w.mutate(a, a.Call, func() CallDone { return w.create(a) })
	case AttachENI:
		w.mutate(a, a.Call, func() CallDone { return w.attach(a) })
	case SetDeleteOnTermination:
		w.mutate(a, a.Call, func() CallDone { w.enis[a.ENI].DeleteOnTermination = true; return CallDone{} })
	case DeleteENI:
		w.mutate(a, a.Call, func() CallDone { return w.remove(a.ENI) })
	}
}

func (w *world) mutate(a Action, id CallID, apply func() CallDone) {
	w.calls++
	outcome, class := Done, ClassOther
	if w.fail != nil {
		outcome, class = w.fail(a)
	}
	var done CallDone
	// The effect happens half-way, the answer comes at the end.
	happens := outcome == Done || outcome == Unknown && w.rng.IntN(2) == 0
	w.after(w.callLatency/2, func() Event {
		if happens {
			done = apply()
		}
		return nil
	})
	w.after(w.callLatency, func() Event {
		done.At, done.Call = w.now, id
		if outcome != Done {
			done = CallDone{At: w.now, Call: id, Outcome: outcome, Class: class, Err: "injected"}
		}
		return done
	})
}

func refused(c Class) CallDone { return CallDone{Outcome: Refused, Class: c, Err: "refused"} }

func slots(e *vpc.ENI) int { return 1 + len(e.Secondary) + len(e.Prefixes) }

func (w *world) assign(id vpc.ENIID, n int) CallDone {
	e := w.enis[id]
	switch {
	case e == nil:
		return refused(ClassNotFound)
	case slots(e)+n > w.s.Config.Limits.IPv4PerENI:
		return refused(ClassENIFull)
	case n > w.free:
		return refused(ClassSubnetFull)
	}
	var d CallDone
	for range n {
		d.Addrs = append(d.Addrs, w.take())
	}
	e.Secondary = append(e.Secondary, d.Addrs...)
	return d
}

func (w *world) assignPrefixes(id vpc.ENIID, n int) CallDone {
	e := w.enis[id]
	if e == nil {
		return refused(ClassNotFound)
	}
	if slots(e)+n > w.s.Config.Limits.IPv4PerENI {
		return refused(ClassENIFull)
	}
	var d CallDone
	for range n {
		if p, ok := w.takePrefix(); ok {
			d.Prefixes = append(d.Prefixes, p)
		}
	}
	if len(d.Prefixes) == 0 {
		return refused(ClassNoPrefix)
	}
	e.Prefixes = append(e.Prefixes, d.Prefixes...)
	return d
}

func (w *world) unassign(a Unassign) CallDone {
	e := w.enis[a.ENI]
	if e == nil {
		return refused(ClassNotFound)
	}
	for _, x := range a.Addrs {
		e.Secondary = slices.DeleteFunc(e.Secondary, func(y netip.Addr) bool { return x == y })
		w.release(x)
	}
	for _, x := range a.Prefixes {
		e.Prefixes = slices.DeleteFunc(e.Prefixes, func(y netip.Prefix) bool { return x == y })
		for i := x.Addr(); x.Contains(i); i = i.Next() {
			w.release(i)
		}
	}
	return CallDone{}
}

func (w *world) release(a netip.Addr) {
	delete(w.mapped, a)
	if w.used[a] {
		delete(w.used, a)
		w.free++
		if a.Less(w.nextIP) {
			w.nextIP = a
		}
	}
}

func (w *world) create(a CreateENI) CallDone {
	if id, ok := w.tokens[a.Token]; ok {
		c := *w.enis[id]
		return CallDone{ENI: &c}
	}
	if a.N+1 > w.free {
		return refused(ClassSubnetFull)
	}
	e := w.newENI()
	w.tokens[a.Token] = e.ID
	e.Groups = a.Groups
	e.Tags[TagCluster], e.Tags[TagInstance] = "test", string(testInstance)
	e.Subnet = a.Subnet
	if a.Pool.Groups != "" {
		e.Tags[TagPool] = string(a.Pool.Groups)
	}
	if a.Prefixes {
		w.assignPrefixes(e.ID, a.N)
	} else {
		w.assign(e.ID, a.N)
	}
	c := *e
	c.Secondary, c.Prefixes = slices.Clone(e.Secondary), slices.Clone(e.Prefixes)
	return CallDone{ENI: &c}
}

func (w *world) attach(a AttachENI) CallDone {
	e := w.enis[a.ENI]
	if e == nil {
		return refused(ClassNotFound)
	}
	if e.Instance != "" {
		return refused(ClassInUse)
	}
	n := 0
	for _, o := range w.enis {
		if o.Instance != "" {
			n++
			if o.DeviceIndex == a.Device {
				return refused(ClassInUse)
			}
		}
	}
	if n >= w.s.Config.Limits.ENIs {
		return refused(ClassSlots)
	}
	e.Instance, e.DeviceIndex, e.Attachment = testInstance, a.Device, vpc.AttachmentID("eni-attach-"+string(a.ENI)[4:])
	w.attached[e.ID] = w.now.Add(w.attachLatency)
	c := *e
	return CallDone{ENI: &c}
}

func (w *world) remove(id vpc.ENIID) CallDone {
	e := w.enis[id]
	if e == nil {
		return refused(ClassNotFound)
	}
	w.release(e.Primary)
	w.unassign(Unassign{ENI: id, Addrs: slices.Clone(e.Secondary), Prefixes: slices.Clone(e.Prefixes)})
	delete(w.enis, id)
	delete(w.attached, id)
	return CallDone{}
}

func (w *world) view() []vpc.ENI {
	var out []vpc.ENI
	for _, e := range w.enis {
		c := *e
		c.Secondary, c.Prefixes = slices.Clone(e.Secondary), slices.Clone(e.Prefixes)
		if w.hide {
			c.Secondary, c.Prefixes = nil, nil
		}
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b vpc.ENI) int {
		if a.ID < b.ID {
			return -1
		}
		return 1
	})
	return out
}

func (w *world) read(src Source) {
	began := w.now
	switch src {
	case EC2:
		w.calls++
		if w.noReads != ClassOther {
			w.after(w.callLatency, func() Event { return ReadFailed{At: w.now, Source: EC2, Class: w.noReads, Err: "injected"} })
			return
		}
		view := w.view()
		w.after(w.callLatency, func() Event { return ObservedEC2{At: w.now, Read: began, ENIs: view} })
	case IMDS:
		w.after(time.Millisecond, func() Event {
			ev := ObservedIMDS{At: w.now}
			for _, e := range w.view() {
				if at, ok := w.attached[e.ID]; !ok || w.now.Before(at) {
					continue
				}
				m := MetadataENI{ID: e.ID}
				for _, a := range append([]netip.Addr{e.Primary}, e.Secondary...) {
					if !w.now.Before(w.mapped[a]) {
						m.Addrs = append(m.Addrs, a)
					}
				}
				for _, p := range e.Prefixes {
					if !w.now.Before(w.mapped[p.Addr()]) {
						m.Prefixes = append(m.Prefixes, p)
					}
				}
				ev.ENIs = append(ev.ENIs, m)
			}
			return ev
		})
	case Links:
		w.after(time.Millisecond, func() Event {
			ev := ObservedLinks{At: w.now, Host: w.host}
			for id, at := range w.attached {
				if !w.now.Before(at) {
					ev.Ready = append(ev.Ready, id)
				}
			}
			return ev
		})
	}
}

// run lets time pass until t.
func (w *world) run(t time.Time) {
	for steps := 0; ; steps++ {
		if steps > 200000 {
			w.dump()
			w.t.Fatal("no end in sight")
		}
		next, ok := w.next()
		if !ok || next.After(t) {
			w.now = later(w.now, t)
			return
		}
		w.step(next)
	}
}

// next returns when something happens next, and whether anything does.
func (w *world) next() (t time.Time, ok bool) {
	if len(w.queue) > 0 {
		t, ok = w.queue[0].at, true
	}
	if !w.timer.IsZero() && (!ok || w.timer.Before(t)) {
		t, ok = w.timer, true
	}
	return t, ok
}

// step lets happen what happens next, at t.
func (w *world) step(t time.Time) {
	w.now = later(w.now, t)
	if len(w.queue) > 0 && !w.queue[0].at.After(w.now) {
		q := w.queue[0]
		w.queue = w.queue[1:]
		if ev := q.ev(); ev != nil {
			w.send(ev)
		}
		return
	}
	w.timer = time.Time{}
	w.send(Tick{At: w.now})
}

func (w *world) pass(d time.Duration) { w.run(w.now.Add(d)) }

func (w *world) add(id RequestID, pool Pool) {
	w.send(AddRequested{At: w.now, ID: id, Owner: fmt.Sprintf("c%d/eth0", id), Pool: pool, Deadline: w.now.Add(50 * time.Second)})
}

// addTwelve has twelve pods come at once: three more than an m5.large's first
// interface has room for.
func (w *world) addTwelve() {
	for w.held() < 2 { // it has just got its floor, so the rest is asked for a moment later
		w.pass(time.Millisecond)
	}
	for i := range 12 {
		w.add(RequestID(i+1), Pool{})
	}
}

// held counts what the node takes from the subnet.
func (w *world) held() int {
	n := 0
	for _, e := range w.enis {
		n += 1 + len(e.Secondary) + 16*len(e.Prefixes)
	}
	return n
}

// got returns the address a request was answered with.
func (w *world) got(id RequestID) netip.Addr {
	w.t.Helper()
	r, ok := w.replies[id]
	if !ok {
		w.dump()
		w.t.Fatalf("request %d: no answer at %s", id, w.now.Sub(epoch))
	}
	if r.Err != nil {
		w.dump()
		w.t.Fatalf("request %d: %v", id, r.Err)
	}
	return r.Addr
}
