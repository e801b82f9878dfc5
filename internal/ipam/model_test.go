package ipam

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// model is the world around the plan, reduced to what matters to it: EC2, IMDS
// and the links, the commit records and tombstones that outlive the agent, the
// pods, and what is in flight between them. It takes one move at a time and
// judges what the plan does about it. Nothing in it takes time; time passes by
// moves alone.
//
// What it assumes. A call whose answer was lost takes effect within ReadLag or
// never. One that gives back or deletes, and whose agent died, takes effect
// before the next agent starts or never: that one could not tell. A read of EC2
// shows a state that EC2 had within ReadLag before the read began. IMDS lists
// late, and for ReadLag what was given back and nobody has yet, but not to an
// agent that began after. Nobody else touches the ENIs.
type model struct {
	cfg   Config
	s     State
	up    bool // the agent runs
	now   time.Time
	timer time.Time

	enis   []*vpc.ENI
	tokens map[string]vpc.ENIID
	params map[string]CreateENI // of the first call with the token
	used   map[netip.Addr]time.Time
	live   map[netip.Addr]bool // IMDS lists it
	link   map[vpc.ENIID]bool
	past   []past
	left   []left                  // given back, and perhaps still listed by IMDS
	vacant map[vpc.ENIID]time.Time // since when no pod has an address on it
	moved  map[vpc.ENIID]bool      // somebody changed its groups once
	seq    int

	calls  []flight
	ghosts []flight // the answer is lost, the effect may still come
	reads  []reading
	unsure map[vpc.ENIID]time.Time // unknown ends of calls that must not be repeated blindly
	tokOf  map[CallID]string
	calm   int // mutations so far

	pods   []pod
	tombs  map[netip.Addr]time.Time
	budget budget
	bad    error
	log    func(string, ...any)
}

// budget is how often things may still go wrong.
type budget struct{ faults, lags, crashes int8 }

type past struct {
	until time.Time
	enis  []vpc.ENI
}

type left struct {
	addr netip.Addr
	eni  vpc.ENIID
	at   time.Time
}

type flight struct {
	act   Action
	began time.Time
	until time.Time // of a ghost
	ended *CallDone // the effect has come, the answer has not
}

type reading struct {
	src   Source
	began time.Time
}

type podState uint8

const (
	podIdle podState = iota
	podWaiting
	podHanded // answered, not committed
	podBound  // committed
)

type pod struct {
	state    podState
	owner    string
	pool     Pool
	req      RequestID
	deadline time.Time
	addr     netip.Addr
}

func (p *pod) has(a netip.Addr) bool { return p.state >= podHanded && p.addr == a }

type moveKind uint8

const (
	moveStart  moveKind = iota
	moveAdd             // i: pod
	moveCancel          // i: pod
	moveCommit          // i: pod
	moveUndo            // i: pod; its ADD failed behind the answer
	moveDelete          // i: pod; how 1: the agent dies behind the tombstone
	moveEffect          // i: call; its effect comes before its answer
	moveEnd             // i: call; how: an end
	moveGhost           // i: ghost
	moveRead            // i: read; how: readFresh …
	moveTick
	movePass  // d
	moveCrash // how 1: what gives back has happened
	moveDrift // somebody changes the groups of a set's interface, or puts them back
)

// The ways a read ends.
const (
	readFresh = iota
	readFailed
	readLags // readLags + n: n changes back
)

// The ways a call ends.
const (
	endDone = iota
	endPartial
	endLost     // unknown, and it happened
	endLostLate // unknown, and it may still happen
	endNever    // unknown, and it never happens
	endRefused  // endRefused + a Class
)

// move is one thing that happens. With die > 0 the agent dies while it carries
// out what the plan says to it: die-1 actions are carried out.
type move struct {
	kind moveKind
	i    int
	how  int
	d    time.Duration
	die  int
}

func (v move) String() string {
	name := [...]string{"start", "add", "cancel", "commit", "undo", "delete", "effect", "end", "ghost", "read", "tick", "pass", "crash", "drift"}[v.kind]
	s := fmt.Sprintf("%s %d how=%d", name, v.i, v.how)
	if v.d > 0 {
		s += " " + v.d.String()
	}
	if v.die > 0 {
		s += fmt.Sprintf(", dies after %d actions", v.die-1)
	}
	return s
}

// errVoid says that a move is the same as another one without it.
var errVoid = errors.New("void")

func modelConfig(enis, ips int) Config {
	c := Default()
	c.Instance, c.Cluster = testInstance, "test"
	c.Limits = vpc.InstanceLimits{Type: "model", ENIs: enis, ENIsDefaultCard: enis, IPv4PerENI: ips, Hypervisor: "nitro"}
	c.Cooldown, c.UsableWait, c.Linger, c.SetLinger = 2*time.Second, 3*time.Second, 4*time.Second, 7*time.Second
	c.Reconcile, c.Confirm, c.ReadLag = time.Minute, time.Second, 3*time.Second
	return c
}

const modelDeadline = 20 * time.Second

func newModel(cfg Config, pods int, b budget) *model {
	m := &model{cfg: cfg, now: epoch, tokens: map[string]vpc.ENIID{}, params: map[string]CreateENI{}, used: map[netip.Addr]time.Time{}, live: map[netip.Addr]bool{},
		link: map[vpc.ENIID]bool{}, unsure: map[vpc.ENIID]time.Time{}, tokOf: map[CallID]string{}, tombs: map[netip.Addr]time.Time{}, vacant: map[vpc.ENIID]time.Time{}, moved: map[vpc.ENIID]bool{}, budget: b}
	e := m.newENI()
	e.Instance, e.Attachment, e.Attached = testInstance, "eni-attach-0", true
	e.Tags = nil
	for i := range pods {
		m.pods = append(m.pods, pod{owner: fmt.Sprintf("pod%d", i)})
	}
	return m
}

// otherPool is a pool beside the node's own, in another subnet.
var otherPool = Pool{Subnet: "subnet-2", Groups: "sg-app,sg-db"}

// thirdPool is a further set of groups in the node's own subnet.
var thirdPool = Pool{Groups: "sg-web"}

// crowded has more sets of groups than a small node has interfaces for.
func (m *model) crowded() *model {
	for i := range m.pods {
		m.pods[i].pool = [...]Pool{thirdPool, otherPool, {}}[i%3]
	}
	return m
}

// mixed has every third pod from the second on ask for otherPool.
func (m *model) mixed() *model {
	for i := 1; i < len(m.pods); i += 3 {
		m.pods[i].pool = otherPool
	}
	return m
}

func (m *model) clone() *model {
	c := *m
	c.s = m.s.Clone()
	c.enis = make([]*vpc.ENI, len(m.enis))
	for i, e := range m.enis {
		d := copyENI(e)
		c.enis[i] = &d
	}
	c.tokens, c.params, c.used, c.live = maps.Clone(m.tokens), maps.Clone(m.params), maps.Clone(m.used), maps.Clone(m.live)
	c.link, c.unsure, c.tokOf, c.tombs = maps.Clone(m.link), maps.Clone(m.unsure), maps.Clone(m.tokOf), maps.Clone(m.tombs)
	c.past, c.calls, c.ghosts, c.left = slices.Clone(m.past), slices.Clone(m.calls), slices.Clone(m.ghosts), slices.Clone(m.left)
	c.reads, c.pods = slices.Clone(m.reads), slices.Clone(m.pods)
	c.vacant, c.moved = maps.Clone(m.vacant), maps.Clone(m.moved)
	return &c
}

func copyENI(e *vpc.ENI) vpc.ENI {
	d := *e
	d.Secondary, d.Prefixes = slices.Clone(e.Secondary), slices.Clone(e.Prefixes)
	return d
}

func (m *model) fail(format string, args ...any) {
	if m.bad == nil {
		m.bad = fmt.Errorf(format, args...)
	}
}

// moves lists what can happen next.
func (m *model) moves() []move {
	if !m.up {
		out := []move{{kind: moveStart}, {kind: movePass, d: time.Second}}
		for i := range m.ghosts {
			out = append(out, move{kind: moveGhost, i: i})
		}
		return out
	}
	// What the node says of itself comes at once, unless it is to be late.
	if m.budget.lags == 0 && m.budget.crashes == 0 {
		for i, r := range m.reads {
			if r.src != EC2 {
				return []move{{kind: moveRead, i: i}}
			}
		}
	}
	var out []move
	own := m.s.Primary()
	ready := m.s.Known && own != nil && own.Link
	for i, p := range m.pods {
		switch p.state {
		case podIdle:
			if ready {
				out = append(out, move{kind: moveAdd, i: i})
			}
		case podWaiting:
			out = append(out, move{kind: moveCancel, i: i})
		case podHanded:
			out = append(out, move{kind: moveCommit, i: i})
			if m.budget.faults > 0 {
				out = append(out, move{kind: moveUndo, i: i})
			}
		case podBound:
			out = append(out, move{kind: moveDelete, i: i})
			if m.budget.crashes > 0 {
				out = append(out, move{kind: moveDelete, i: i, how: 1})
			}
		}
	}
	for i, c := range m.calls {
		out = append(out, move{kind: moveEnd, i: i})
		if m.budget.lags > 0 && c.ended == nil {
			out = append(out, move{kind: moveEffect, i: i})
		}
		if m.budget.faults > 0 {
			for _, how := range ends(c) {
				out = append(out, move{kind: moveEnd, i: i, how: how})
			}
		}
	}
	for i := range m.ghosts {
		out = append(out, move{kind: moveGhost, i: i})
	}
	for i, r := range m.reads {
		out = append(out, move{kind: moveRead, i: i})
		if m.budget.lags == 0 {
			continue
		}
		out = append(out, move{kind: moveRead, i: i, how: readFailed})
		if r.src != EC2 {
			out = append(out, move{kind: moveRead, i: i, how: readLags})
			continue
		}
		for n := range m.past {
			if r.began.Sub(m.past[len(m.past)-1-n].until) < m.cfg.ReadLag {
				out = append(out, move{kind: moveRead, i: i, how: readLags + n})
			}
		}
	}
	if m.budget.faults > 0 && len(m.calls) == 0 {
		for i, e := range m.enis {
			if e.Tags[TagPool] != "" && e.Instance != "" {
				out = append(out, move{kind: moveDrift, i: i})
			}
		}
	}
	if !m.timer.IsZero() {
		out = append(out, move{kind: moveTick})
	}
	if m.timer.IsZero() || m.timer.Sub(m.now) > time.Second {
		out = append(out, move{kind: movePass, d: time.Second})
	}
	if m.budget.crashes > 0 {
		for _, v := range out {
			switch v.kind {
			case moveCommit, moveGhost, movePass, moveEffect:
				continue
			}
			for die := 1; die <= 3; die++ {
				w := v
				w.die = die
				out = append(out, w)
			}
		}
		out = append(out, move{kind: moveCrash}, move{kind: moveCrash, how: 1})
	}
	return out
}

// ends lists the bad ends that a call can have.
func ends(c flight) []int {
	if c.ended != nil {
		return []int{endLost}
	}
	out := []int{endLost, endLostLate, endNever, endRefused + int(ClassThrottled), endRefused + int(ClassUnavailable)}
	grows := []int{endRefused + int(ClassDenied), endRefused + int(ClassSubnetFull)}
	switch a := c.act.(type) {
	case AssignAddresses:
		out = append(out, grows...)
		if a.N > 1 {
			out = append(out, endPartial)
		}
	case AssignPrefixes:
		out = append(append(out, grows...), endRefused+int(ClassNoPrefix))
	case CreateENI:
		out = append(append(out, grows...), endRefused+int(ClassAccountLimit))
	}
	return out
}

// apply makes a move and returns what was wrong with what came of it.
func (m *model) apply(v move) error {
	switch v.kind {
	case moveStart:
		m.start(v.die)
	case moveAdd:
		p := &m.pods[v.i]
		m.seq++
		p.state, p.req, p.deadline = podWaiting, RequestID(m.seq), m.now.Add(modelDeadline)
		m.step(AddRequested{At: m.now, ID: p.req, Owner: p.owner, Pool: p.pool, Deadline: p.deadline}, v.die)
	case moveCancel:
		p := &m.pods[v.i]
		p.state = podIdle
		m.step(Canceled{At: m.now, ID: p.req}, v.die)
	case moveCommit:
		m.pods[v.i].state = podBound
	case moveUndo:
		p := &m.pods[v.i]
		m.budget.faults--
		p.state = podIdle
		m.vacate(p)
		m.step(Released{At: m.now, Addr: p.addr, Unused: true}, v.die)
	case moveDelete:
		p := &m.pods[v.i]
		p.state, m.tombs[p.addr] = podIdle, m.now
		m.vacate(p)
		if v.how == 1 {
			m.crash(false)
			break
		}
		m.step(Released{At: m.now, Addr: p.addr, When: m.now}, v.die)
	case moveEffect:
		m.budget.lags--
		d := m.effect(m.calls[v.i].act)
		m.calls[v.i].ended = &d
	case moveEnd:
		m.end(v)
	case moveGhost:
		g := m.ghosts[v.i]
		m.ghosts = slices.Delete(m.ghosts, v.i, v.i+1)
		m.effect(g.act)
	case moveRead:
		m.answer(v)
	case moveTick:
		m.pass(m.timer.Sub(m.now))
		m.timer = time.Time{}
		m.step(Tick{At: m.now}, v.die)
	case movePass:
		m.pass(v.d)
	case moveCrash:
		m.crash(v.how == 1)
	case moveDrift:
		m.budget.faults--
		m.drift(m.enis[v.i])
	}
	if m.bad == nil && m.up {
		if err := m.s.Verify(); err != nil {
			return err
		}
		m.deadlines()
	}
	return m.bad
}

func (m *model) pass(d time.Duration) {
	if d > 0 {
		m.now = m.now.Add(d)
	}
	m.left = slices.DeleteFunc(m.left, func(l left) bool { return m.now.Sub(l.at) > m.cfg.ReadLag })
	m.past = slices.DeleteFunc(m.past, func(p past) bool { return m.now.Sub(p.until) > 2*m.cfg.ReadLag })
	m.ghosts = slices.DeleteFunc(m.ghosts, func(g flight) bool { return m.now.After(g.until) })
}

func (m *model) start(die int) {
	ev := Started{At: m.now, Config: m.cfg}
	for _, p := range m.pods {
		if p.state == podBound {
			ev.Endpoints = append(ev.Endpoints, Endpoint{Addr: p.addr, Owner: p.owner, Live: true})
		}
	}
	for a, t := range m.tombs {
		ev.Endpoints = append(ev.Endpoints, Endpoint{Addr: a, Released: t})
	}
	slices.SortFunc(ev.Endpoints, func(a, b Endpoint) int { return a.Addr.Compare(b.Addr) })
	m.up, m.left = true, nil
	m.step(ev, die)
}

// crash ends the agent: what it knew is gone, what it asked for may happen.
func (m *model) crash(given bool) {
	m.budget.crashes--
	m.up, m.s, m.timer, m.reads = false, State{}, time.Time{}, nil
	open := m.ghosts
	for _, c := range m.calls {
		if c.ended == nil {
			c.until = m.now.Add(m.cfg.ReadLag)
			open = append(open, c)
		}
	}
	m.ghosts = nil
	for _, c := range open {
		switch c.act.(type) {
		case Unassign, DeleteENI:
			if given {
				m.effect(c.act)
			}
		default:
			m.ghosts = append(m.ghosts, c)
		}
	}
	m.calls, m.unsure, m.tokOf = nil, map[vpc.ENIID]time.Time{}, map[CallID]string{}
	for i := range m.pods {
		if p := &m.pods[i]; p.state == podWaiting || p.state == podHanded {
			if p.state == podHanded {
				m.vacate(p)
			}
			p.state = podIdle
		}
	}
}

// step gives the plan an event and carries out what it says. With die > 0 the
// agent dies after die-1 actions.
func (m *model) step(ev Event, die int) {
	var acts []Action
	m.s, acts = Step(m.s, ev)
	if die > len(acts) {
		m.bad = errVoid
		return
	}
	for i, a := range acts {
		if die == i+1 {
			m.crash(false)
			return
		}
		m.tell(a)
		m.do(a)
	}
}

// tell writes down an action that is worth it.
func (m *model) tell(a Action) {
	switch a.(type) {
	case SetTimer, Reread:
	default:
		if m.log != nil {
			m.log("%12s → %T%+v", m.now.Sub(epoch), a, a)
		}
	}
}

// end ends a call.
func (m *model) end(v move) {
	c := m.calls[v.i]
	m.calls = slices.Delete(m.calls, v.i, v.i+1)
	id, eni := mutation(c.act)
	done := CallDone{}
	if c.ended != nil {
		done = *c.ended
	}
	if v.how != endDone {
		m.budget.faults--
	}
	switch {
	case v.how == endDone && c.ended == nil:
		done = m.effect(c.act)
	case v.how == endDone:
	case v.how == endPartial:
		a := c.act.(AssignAddresses)
		a.N = (a.N + 1) / 2
		done = m.effect(a)
	case v.how >= endRefused:
		done = refused(Class(v.how - endRefused))
	default:
		if v.how == endLost && c.ended == nil {
			m.effect(c.act)
		}
		if v.how == endLostLate {
			c.until = m.now.Add(m.cfg.ReadLag)
			m.ghosts = append(m.ghosts, c)
		}
		done = CallDone{Outcome: Unknown, Class: ClassUnavailable, Err: "lost"}
		switch c.act.(type) {
		case AssignAddresses, AssignPrefixes, AttachENI:
			m.unsure[eni] = m.now
		}
	}
	done.At, done.Call = m.now, id
	m.step(done, v.die)
}

// answer ends a read.
func (m *model) answer(v move) {
	r := m.reads[v.i]
	m.reads = slices.Delete(m.reads, v.i, v.i+1)
	if v.how != readFresh {
		m.budget.lags--
	}
	if v.how == readFailed {
		m.step(ReadFailed{At: m.now, Source: r.src, Class: ClassUnavailable, Err: "lost"}, v.die)
		return
	}
	switch r.src {
	case EC2:
		view := m.view()
		if v.how >= readLags {
			view = m.past[len(m.past)-1-(v.how-readLags)].enis
		}
		for id, t := range m.unsure {
			if !r.began.Before(t) {
				delete(m.unsure, id)
			}
		}
		m.step(ObservedEC2{At: m.now, Read: r.began, ENIs: view}, v.die)
	case IMDS:
		ev := ObservedIMDS{At: m.now}
		for _, e := range m.enis {
			if e.Instance == "" {
				continue
			}
			l := MetadataENI{ID: e.ID, Addrs: []netip.Addr{e.Primary}}
			for _, a := range e.Secondary {
				if v.how == readFresh {
					m.live[a] = true
				}
				if m.live[a] {
					l.Addrs = append(l.Addrs, a)
				}
			}
			for _, p := range e.Prefixes {
				if v.how == readFresh {
					m.live[p.Addr()] = true
				}
				if m.live[p.Addr()] {
					l.Prefixes = append(l.Prefixes, p)
				}
			}
			for _, x := range m.left {
				if v.how != readFresh && x.eni == e.ID && m.used[x.addr].IsZero() {
					l.Addrs = append(l.Addrs, x.addr)
				}
			}
			ev.ENIs = append(ev.ENIs, l)
		}
		m.step(ev, v.die)
	case Links:
		ev := ObservedLinks{At: m.now}
		for _, e := range m.enis {
			if v.how == readFresh && e.Instance != "" {
				if k := m.s.ENI(e.ID); k != nil && k.Phase == Attached {
					m.link[e.ID] = true
				}
			}
			if m.link[e.ID] {
				ev.Ready = append(ev.Ready, e.ID)
			}
		}
		m.step(ev, v.die)
	}
}

func (m *model) view() []vpc.ENI {
	out := make([]vpc.ENI, len(m.enis))
	for i, e := range m.enis {
		out[i] = copyENI(e)
	}
	return out
}
