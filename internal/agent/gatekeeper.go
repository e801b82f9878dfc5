package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/datapath"
	"github.com/underlay-cni/underlay/internal/groups"
	"github.com/underlay-cni/underlay/internal/policy"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// gatekeeper puts into the kernel what security groups say of the traffic
// between the node's own pods, which the VPC does not see (D9). What comes over
// the wire the VPC has judged.
//
// It knows the node as a whole: whose rules, which pods have which groups. What
// comes and goes it is told of, so that an ADD costs the same beside one pod and
// beside hundreds; tables are made once for pods of equal groups, and put in
// place where they are others than before.
//
// On a node where no pod has asked for groups nothing is judged and no rule is
// read. Where one has, its traffic with every other pod is judged as the VPC
// would: the sender's egress rules and the receiver's ingress rules. That is so
// for pods with the node's own groups too, but not between two of these: they
// never asked for anything.
type gatekeeper struct {
	a    *Agent
	put  func(datapath.Endpoint, policy.Tables) error
	book *groups.Book
	wake chan struct{} // size 1: pods have come or gone

	// noteMu guards what is to be looked at.
	noteMu sync.Mutex
	// joining are endpoints whose ADD is under way: they are members of their
	// groups before their first packet.
	joining map[key]datapath.Endpoint
	touched map[key]struct{} // came, went or failed since the last look
	all     bool             // of everybody

	// mu is held while tables are made and put in place.
	mu      sync.Mutex
	roster  *roster
	differs bool // the roster, from the one that the tables are of
	applied map[key]applied
	read    *groups.Snapshot   // of which the tables are
	exempt  []policy.Exemption // likewise
	names   policy.Rules       // of the rules in them
	looked  uint64             // how often a pod was looked at, but for looks at all
}

type applied struct {
	link   int // the host's interface index: no two endpoints ever have the same
	digest policy.Digest
	judged bool
	here   bool
}

func newGatekeeper(a *Agent, put func(datapath.Endpoint, policy.Tables) error) *gatekeeper {
	return &gatekeeper{a: a, put: put, book: newBook(a), wake: make(chan struct{}, 1), joining: map[key]datapath.Endpoint{}, touched: map[key]struct{}{}, all: true,
		roster: newRoster(), applied: map[key]applied{}}
}

// admit has the policy of an endpoint in the kernel when it returns nil, and the
// endpoint in the tables of the others. The caller calls leave when its ADD has
// ended.
func (g *gatekeeper) admit(ctx context.Context, ep datapath.Endpoint) error {
	k := key{ep.ContainerID, ep.IfName}
	g.noteMu.Lock()
	g.joining[k] = ep
	g.touched[k] = struct{}{}
	g.noteMu.Unlock()
	for {
		var err error
		g.mu.Lock()
		// Whoever was at it while we waited may have had us in its view already.
		done := g.applied[k].link == ep.HostIfIndex
		if !done {
			err = g.apply(ctx)
			done = g.applied[k].link == ep.HostIfIndex
		}
		g.mu.Unlock()
		var more *needRules
		switch {
		case done: // others may have failed; they are tried again
			return nil
		case errors.As(err, &more):
			if err := g.book.Await(ctx, more.need); err != nil {
				return &rulesError{err}
			}
		case err != nil:
			return err
		default:
			return fmt.Errorf("the endpoint of %s is gone", ep.Addr)
		}
	}
}

// leave ends what admit began: the endpoint is live now, or gone.
func (g *gatekeeper) leave(k key) {
	g.noteMu.Lock()
	delete(g.joining, k)
	g.touched[k] = struct{}{}
	g.noteMu.Unlock()
	g.changed()
}

// gone says that an endpoint is.
func (g *gatekeeper) gone(k key) {
	g.noteMu.Lock()
	g.touched[k] = struct{}{}
	g.noteMu.Unlock()
	g.changed()
}

// rules are the names of the rules in the kernel; none without a gatekeeper.
func (g *gatekeeper) rules() policy.Rules {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.names
}

// changed has what is noted looked at soon.
func (g *gatekeeper) changed() {
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

// run keeps the tables up to date until ctx ends.
func (g *gatekeeper) run(ctx context.Context) {
	const again = 5 * time.Second // after a failure, and to see what others do to interfaces
	tick := time.NewTicker(again)
	defer tick.Stop()
	for {
		_, news := g.book.Current()
		g.mu.Lock()
		err := g.apply(ctx)
		g.mu.Unlock()
		var more *needRules
		if err != nil && !errors.As(err, &more) && ctx.Err() == nil && !errors.Is(err, errStopping) {
			g.a.incident("policy", err.Error())
		}
		select {
		case <-ctx.Done():
			return
		case <-news:
		case <-g.wake:
		case <-tick.C:
			g.noteMu.Lock()
			g.all = true
			g.noteMu.Unlock()
		}
	}
}

// needRules says that rules have to be read first.
type needRules struct{ need groups.Need }

func (e *needRules) Error() string {
	return fmt.Sprintf("the rules of %v are not read yet", e.need.Groups)
}

// look brings the roster up to date with what was noted, and returns whom that is
// about. mu is held.
func (g *gatekeeper) look(ctx context.Context) (about map[key]struct{}, err error) {
	g.noteMu.Lock()
	about, all := g.touched, g.all
	g.touched, g.all = map[key]struct{}{}, false
	if all {
		for k := range g.joining {
			about[k] = struct{}{}
		}
	}
	joining := make(map[key]datapath.Endpoint, len(g.joining))
	for k := range about {
		if ep, ok := g.joining[k]; ok {
			joining[k] = ep
		}
	}
	g.noteMu.Unlock()

	g.a.mu.Lock()
	if all {
		for k := range g.a.endpoints {
			about[k] = struct{}{}
		}
		for k := range g.roster.members {
			about[k] = struct{}{}
		}
	}
	here := make(map[key]member, len(about))
	for k := range about {
		ep, live := g.a.endpoints[k]
		joins := false
		if j, ok := joining[k]; ok {
			joins = !live || ep.HostIfIndex != j.HostIfIndex
			ep, live = j, true
		}
		if live {
			here[k] = member{ep: ep, groups: ep.Groups, joins: joins}
		}
	}
	g.a.mu.Unlock()
	if !all {
		g.looked += uint64(len(about))
	}
	if len(about) == 0 {
		return about, nil
	}

	err = g.a.ask(ctx, func(o *owner) {
		own := o.state.Primary()
		for k, m := range here {
			if m.ep.GroupsHere {
				m.asked, m.here = true, true
			} else if e := o.state.ENI(m.ep.ENI); e != nil {
				m.groups, m.asked = e.Groups, e.Pool.Groups != ""
			} else {
				m.asked = own != nil && m.ep.Groups != own.Groups
			}
			here[k] = m
		}
	})
	if err != nil {
		g.again(about)
		return nil, err
	}
	for k := range about {
		if m, ok := here[k]; ok {
			g.differs = g.roster.put(k, m) || g.differs
			continue
		}
		g.differs = g.roster.drop(k) || g.differs
		delete(g.applied, k)
	}
	return about, nil
}

// again has somebody looked at the next time.
func (g *gatekeeper) again(about map[key]struct{}) {
	g.noteMu.Lock()
	defer g.noteMu.Unlock()
	for k := range about {
		g.touched[k] = struct{}{}
	}
}

// apply makes the tables of whom a change is about and puts those in place that
// have changed. mu is held. A *needRules says that some wait for rules, which are
// on their way.
func (g *gatekeeper) apply(ctx context.Context) error {
	about, err := g.look(ctx)
	if err != nil {
		return err
	}
	needed := g.roster.need()
	g.book.Want(needed)
	read, _ := g.book.Current()
	var errs []error
	if !read.Holds(needed) {
		// Those whose gates are shut wait for them; nobody waits for those.
		errs = append(errs, &needRules{needed})
		if !g.without(about, func(m *member) bool {
			return !read.Holds(groups.Need{Groups: m.groups.Groups(), Members: needed.Members})
		}, read) && !g.without(about, func(*member) bool { return true }, read) {
			g.again(about)
			return errs[0]
		}
		needed = g.roster.need()
	}
	errs = append(errs, g.compile(read, needed, about)...)
	failed := map[key]struct{}{}
	for k := range about {
		m, ok := g.roster.members[k]
		if !ok {
			continue
		}
		set := g.roster.sets[m.like()]
		if !set.made {
			continue // it has no tables, and is looked at when it has
		}
		now := applied{link: m.ep.HostIfIndex, here: m.here}
		now.digest, now.judged = set.digest()
		if was, ok := g.applied[k]; ok && was == now {
			continue
		}
		if m.joins && !now.judged {
			g.applied[k] = now // there is nothing to take away from a new one
			continue
		}
		err := g.put(m.ep, set.tables)
		if err == nil {
			g.applied[k] = now
			continue
		}
		delete(g.applied, k)
		if !errors.Is(err, datapath.ErrNotFound) { // else deleted meanwhile
			failed[k] = struct{}{}
			errs = append(errs, fmt.Errorf("put the policy of %s in place: %w", m.ep.Addr, err))
		}
	}
	g.again(failed)
	return errors.Join(errs...)
}

// without takes those out for now who join with groups that they asked for, if
// they are of that kind, and reports whether what is read is enough then.
func (g *gatekeeper) without(about map[key]struct{}, kind func(*member) bool, read *groups.Snapshot) bool {
	waits := map[key]struct{}{}
	for k := range about {
		if m, ok := g.roster.members[k]; ok && m.joins && m.asked && kind(&m) {
			g.differs = g.roster.drop(k) || g.differs
			waits[k] = struct{}{}
		}
	}
	g.again(waits)
	return read.Holds(g.roster.need())
}

// compile makes the tables anew if something differs, and adds to about whose are
// others than before.
func (g *gatekeeper) compile(read *groups.Snapshot, needed groups.Need, about map[key]struct{}) (errs []error) {
	var exempt []policy.Exemption
	if needed.Members {
		exempt = g.a.exempt()
	}
	if !g.differs && read == g.read && slices.Equal(exempt, g.exempt) {
		return nil
	}
	g.read, g.exempt, g.differs = read, exempt, false
	var compiler *policy.Compiler
	if len(needed.Groups) > 0 {
		in := g.roster.input(read)
		in.Exempt = exempt
		compiler = policy.NewCompiler(in)
	}
	for l, set := range g.roster.sets {
		was, judged := set.digest()
		made := set.made
		set.tables, set.made = policy.Tables{}, true
		if compiler != nil {
			// Whose pod it is makes no difference: there are no network policies yet.
			t, err := compiler.Compile(&policy.Endpoint{Groups: vpc.NewGroupSet(l.list())})
			if err != nil {
				set.made, g.differs = false, true // it is tried again
				errs = append(errs, fmt.Errorf("make the policy of pods with %s: %w", l.groups, err))
				continue
			}
			set.tables = t
		}
		if now, judges := set.digest(); !made || now != was || judges != judged {
			for k := range set.keys {
				about[k] = struct{}{}
			}
			g.looked += uint64(len(set.keys))
		}
	}
	if compiler != nil {
		g.names = compiler.Rules()
	}
	return errs
}

// exempt is what no security group judges (VPC user guide, "Security group
// rules"): the VPC's DNS, time and instance metadata.
func (a *Agent) exempt() []policy.Exemption {
	out := []policy.Exemption{
		{Name: "Amazon DNS", Prefix: netip.MustParsePrefix("169.254.169.253/32")},
		{Name: "Amazon Time Sync", Prefix: netip.MustParsePrefix("169.254.169.123/32")},
		{Name: "instance metadata", Prefix: netip.MustParsePrefix("169.254.169.254/32")},
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.identity.VPCCIDRs) > 0 { // of the VPC's first range, the base plus two
		dns := vpc.Router(a.identity.VPCCIDRs[0]).Next()
		out = append(out, policy.Exemption{Name: "Amazon DNS", Prefix: netip.PrefixFrom(dns, dns.BitLen())})
	}
	return out
}

// age is that of what is known; ok is false while nothing has to be, or nothing
// was read.
func (g *gatekeeper) age() (age time.Duration, source string, ok bool) {
	st := g.book.Status()
	if len(g.book.Wanted().Groups) == 0 || st.Read.IsZero() {
		return 0, "", false
	}
	return time.Since(st.Read), string(st.Source), true
}

// status is what people see of it.
func (g *gatekeeper) status() *agentapi.GroupPolicy {
	g.mu.Lock()
	judged, here := 0, 0
	for _, p := range g.applied {
		if p.judged {
			judged++
		}
		if p.here {
			here++
		}
	}
	g.mu.Unlock()
	now, _ := g.book.Current()
	wanted, st := g.book.Wanted(), g.book.Status()
	out := &agentapi.GroupPolicy{Mode: g.a.opts.GroupsMode, Judged: judged, Host: here, Groups: len(wanted.Groups), Rules: now.Rules(), Source: string(st.Source), Poller: g.a.opts.GroupsPoller}
	for _, m := range now.Members {
		out.Members += len(m.Addrs)
	}
	if st.Away != nil {
		out.PollerError = st.Away.Error()
	}
	if len(wanted.Groups) > 0 {
		out.EverySeconds = st.Every.Seconds()
		if !st.Read.IsZero() {
			out.Read = &st.Read
		}
		if st.Err != nil {
			out.Error = st.Err.Error()
		}
	}
	return out
}
