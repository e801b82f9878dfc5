package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/datapath"
	"github.com/underlay-cni/underlay/internal/policy"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// gatekeeper puts into the kernel what security groups say of the traffic
// between the node's own pods, which the VPC does not see (D9). What comes over
// the wire the VPC has judged.
//
// It works on the node as a whole: whose rules, which pods have which groups;
// what comes out for an endpoint is put in place when it is another than before.
//
// On a node where no pod has asked for groups nothing is judged and no rule is
// read. Where one has, its traffic with every other pod is judged as the VPC
// would: the sender's egress rules and the receiver's ingress rules. That is so
// for pods with the node's own groups too, but not between two of these: they
// never asked for anything.
type gatekeeper struct {
	a    *Agent
	put  func(datapath.Endpoint, policy.Tables) error
	book *ruleBook
	wake chan struct{} // size 1: pods have come or gone

	// joining are endpoints whose ADD is under way: they are members of their
	// groups before their first packet.
	joinMu  sync.Mutex
	joining map[key]datapath.Endpoint

	// mu is held while tables are made and put in place.
	mu      sync.Mutex
	applied map[key]applied
	names   policy.Rules
}

type applied struct {
	link   int // the host's interface index: no two endpoints ever have the same
	digest policy.Digest
	judged bool
}

func newGatekeeper(a *Agent, put func(datapath.Endpoint, policy.Tables) error) *gatekeeper {
	return &gatekeeper{a: a, put: put, book: newRuleBook(a.metrics.call, a.incident), wake: make(chan struct{}, 1), joining: map[key]datapath.Endpoint{}, applied: map[key]applied{}}
}

// neighbours are the groups that pods with the node's own groups have beside
// them: what lets these reach each other.
const neighbours = vpc.SecurityGroupID("node-local")

// admit has the policy of an endpoint in the kernel when it returns nil, and the
// endpoint in the tables of the others. The caller calls leave when its ADD has
// ended.
func (g *gatekeeper) admit(ctx context.Context, ep datapath.Endpoint) error {
	k := key{ep.ContainerID, ep.IfName}
	g.joinMu.Lock()
	g.joining[k] = ep
	g.joinMu.Unlock()
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
			if _, err := g.book.await(ctx, more.groups); err != nil {
				return err
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
	g.joinMu.Lock()
	delete(g.joining, k)
	g.joinMu.Unlock()
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

// changed has the tables looked at again soon.
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
		_, news := g.book.current()
		g.mu.Lock()
		err := g.apply(ctx)
		g.mu.Unlock()
		var more *needRules
		if err != nil && !errors.As(err, &more) && ctx.Err() == nil {
			g.a.incident("policy", err.Error())
		}
		select {
		case <-ctx.Done():
			return
		case <-news:
		case <-g.wake:
		case <-tick.C:
		}
	}
}

// needRules says that rules have to be read first.
type needRules struct{ groups []vpc.SecurityGroupID }

func (e *needRules) Error() string {
	return fmt.Sprintf("the rules of %v are not read yet", e.groups)
}

// member is an endpoint with the groups that its interface carries now.
type member struct {
	ep     datapath.Endpoint
	groups vpc.GroupSet
	asked  bool // for them
	joins  bool // its ADD is under way, its gate shut
}

// members returns the node's endpoints, those whose ADD is under way included.
func (g *gatekeeper) members(ctx context.Context) (map[key]member, error) {
	eps := map[key]datapath.Endpoint{}
	g.a.mu.Lock()
	maps.Copy(eps, g.a.endpoints)
	g.a.mu.Unlock()
	joins := map[key]bool{}
	g.joinMu.Lock()
	for k, ep := range g.joining {
		joins[k] = eps[k].HostIfIndex != ep.HostIfIndex
		eps[k] = ep
	}
	g.joinMu.Unlock()
	out := make(map[key]member, len(eps))
	err := g.a.ask(ctx, func(o *owner) {
		own := o.state.Primary()
		for k, ep := range eps {
			m := member{ep: ep, groups: ep.Groups, joins: joins[k]}
			if e := o.state.ENI(ep.ENI); e != nil {
				m.groups, m.asked = e.Groups, e.Pool.Groups != ""
			} else {
				m.asked = own != nil && ep.Groups != own.Groups
			}
			out[k] = m
		}
	})
	return out, err
}

// apply makes everybody's tables and puts those in place that have changed. mu
// is held. A *needRules says that some wait for rules, which are on their way.
func (g *gatekeeper) apply(ctx context.Context) error {
	members, err := g.members(ctx)
	if err != nil {
		return err
	}
	for k := range g.applied {
		if _, ok := members[k]; !ok {
			delete(g.applied, k)
		}
	}
	needed := neededGroups(members)
	g.book.want(needed)
	read, _ := g.book.current()
	var errs []error
	if !read.holds(needed) {
		// Those whose gates are shut wait for them; nobody waits for those.
		errs = append(errs, &needRules{needed})
		maps.DeleteFunc(members, func(_ key, m member) bool { return m.joins && m.asked })
		if needed = neededGroups(members); !read.holds(needed) {
			return errs[0]
		}
	}
	in := input(members, read)
	compiler := policy.NewCompiler(in)
	for k, m := range members {
		var t policy.Tables
		if len(needed) > 0 {
			groups := m.groups
			if !m.asked {
				groups = vpc.NewGroupSet(append(groups.Groups(), neighbours))
			}
			if t, err = compiler.Compile(&policy.Endpoint{Pod: policy.Pod{Namespace: m.ep.PodNamespace, Name: m.ep.PodName, Addrs: []netip.Addr{m.ep.Addr}}, Groups: groups}); err != nil {
				errs = append(errs, fmt.Errorf("make the policy of %s: %w", m.ep.Addr, err))
				continue
			}
		}
		now := applied{link: m.ep.HostIfIndex}
		if table := t.Gates[policy.Groups]; table != nil {
			now.digest, now.judged = table.Digest, true
		}
		if was, ok := g.applied[k]; ok && was == now {
			continue
		}
		err := g.put(m.ep, t)
		if errors.Is(err, datapath.ErrNotFound) {
			delete(g.applied, k) // deleted meanwhile
			continue
		}
		if err != nil {
			delete(g.applied, k)
			errs = append(errs, fmt.Errorf("put the policy of %s in place: %w", m.ep.Addr, err))
			continue
		}
		g.applied[k] = now
	}
	g.names = compiler.Rules()
	return errors.Join(errs...)
}

// neededGroups returns the groups whose rules are needed, sorted: those of all
// pods if one has asked for some, or none.
func neededGroups(members map[key]member) []vpc.SecurityGroupID {
	asked := false
	var out []vpc.SecurityGroupID
	for _, m := range members {
		asked = asked || m.asked
		out = append(out, m.groups.Groups()...)
	}
	if !asked {
		return nil
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// input is what the node's pods and the rules say together. A group's members
// are those on this node: the others' packets come over the wire.
func input(members map[key]member, read *rules) *policy.Input {
	in := &policy.Input{
		Groups: map[vpc.SecurityGroupID]policy.SecurityGroup{}, Members: map[vpc.SecurityGroupID][]netip.Prefix{}, PrefixLists: map[vpc.PrefixListID][]netip.Prefix{},
	}
	for _, id := range read.groups {
		in.Groups[id] = policy.SecurityGroup{} // one without rules too
	}
	for _, r := range read.rules {
		group := in.Groups[r.Group]
		rule := policy.GroupRule{ID: r.ID, Protocol: r.Protocol, FromPort: r.FromPort, ToPort: r.ToPort, CIDR: r.CIDR, PrefixList: r.PrefixList, Group: r.Referenced}
		if r.Egress {
			group.Egress = append(group.Egress, rule)
		} else {
			group.Ingress = append(group.Ingress, rule)
		}
		in.Groups[r.Group] = group
	}
	among := policy.GroupRule{ID: "pods without groups of their own", Protocol: policy.AnyProtocol, FromPort: policy.AnyPort, ToPort: policy.AnyPort, Group: neighbours}
	in.Groups[neighbours] = policy.SecurityGroup{Ingress: []policy.GroupRule{among}, Egress: []policy.GroupRule{among}}
	for id, l := range read.lists {
		in.PrefixLists[id] = l.entries
	}
	for _, m := range members {
		one := netip.PrefixFrom(m.ep.Addr, m.ep.Addr.BitLen())
		groups := m.groups.Groups()
		if !m.asked {
			groups = append(groups, neighbours)
		}
		for _, id := range groups {
			in.Members[id] = append(in.Members[id], one)
		}
	}
	for _, list := range in.Members {
		slices.SortFunc(list, netip.Prefix.Compare) // equal nodes have equal tables
	}
	return in
}

// status is what people see of it.
func (g *gatekeeper) status() *agentapi.GroupPolicy {
	g.mu.Lock()
	judged := 0
	for _, p := range g.applied {
		if p.judged {
			judged++
		}
	}
	g.mu.Unlock()
	b := g.book
	b.mu.Lock()
	defer b.mu.Unlock()
	out := &agentapi.GroupPolicy{Mode: "vpc", Judged: judged, Groups: len(b.wanted), Rules: len(b.now.rules)}
	if len(b.wanted) > 0 {
		out.EverySeconds = 1 / b.rate
		if !b.read.IsZero() {
			read := b.read
			out.Read = &read
		}
		if b.err != nil {
			out.Error = b.err.Error()
		}
	}
	return out
}
