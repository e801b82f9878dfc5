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
	"github.com/underlay-cni/underlay/internal/groups"
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
	book *groups.Book
	wake chan struct{} // size 1: pods have come or gone

	// joining are endpoints whose ADD is under way: they are members of their
	// groups before their first packet.
	joinMu  sync.Mutex
	joining map[key]datapath.Endpoint

	// mu is held while tables are made and put in place.
	mu      sync.Mutex
	applied map[key]applied
	names   policy.Rules // of the rules in them
}

type applied struct {
	link   int // the host's interface index: no two endpoints ever have the same
	digest policy.Digest
	judged bool
	here   bool
}

func newGatekeeper(a *Agent, put func(datapath.Endpoint, policy.Tables) error) *gatekeeper {
	return &gatekeeper{a: a, put: put, book: newBook(a), wake: make(chan struct{}, 1), joining: map[key]datapath.Endpoint{}, applied: map[key]applied{}}
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
		}
	}
}

// needRules says that rules have to be read first.
type needRules struct{ need groups.Need }

func (e *needRules) Error() string {
	return fmt.Sprintf("the rules of %v are not read yet", e.need.Groups)
}

// member is an endpoint with the groups that its interface carries now.
type member struct {
	ep     datapath.Endpoint
	groups vpc.GroupSet
	asked  bool // for them
	here   bool // the node alone judges by them: to the VPC they are the node's
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
			if ep.GroupsHere {
				m.asked, m.here = true, true
			} else if e := o.state.ENI(ep.ENI); e != nil {
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
	needed := needOf(members)
	g.book.Want(needed)
	read, _ := g.book.Current()
	var errs []error
	if !read.Holds(needed) {
		// Those whose gates are shut wait for them; nobody waits for those.
		errs = append(errs, &needRules{needed})
		maps.DeleteFunc(members, func(_ key, m member) bool { return m.joins && m.asked })
		if needed = needOf(members); !read.Holds(needed) {
			return errs[0]
		}
	}
	var compiler *policy.Compiler
	if len(needed.Groups) > 0 {
		in := input(members, read)
		if needed.Members {
			in.Exempt = g.a.exempt()
		}
		compiler = policy.NewCompiler(in)
	}
	for k, m := range members {
		var t policy.Tables
		if compiler != nil {
			groups := m.groups
			if !m.asked {
				groups = vpc.NewGroupSet(append(groups.Groups(), neighbours))
			}
			if t, err = compiler.Compile(&policy.Endpoint{Pod: policy.Pod{Namespace: m.ep.PodNamespace, Name: m.ep.PodName, Addrs: []netip.Addr{m.ep.Addr}}, Groups: groups}); err != nil {
				errs = append(errs, fmt.Errorf("make the policy of %s: %w", m.ep.Addr, err))
				continue
			}
		}
		now := applied{link: m.ep.HostIfIndex, here: m.here}
		if table := t.Gates[policy.Groups]; table != nil {
			now.digest, now.judged = table.Digest, true
		}
		if was, ok := g.applied[k]; ok && was == now {
			continue
		}
		if m.joins && !now.judged {
			g.applied[k] = now // there is nothing to take away from a new one
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
	if compiler != nil {
		g.names = compiler.Rules()
	}
	return errors.Join(errs...)
}

// needOf returns what must be known for the pods: the rules of everybody's groups
// if one has asked for some, and who carries the groups that these name if there
// is one by whose groups the node alone judges.
func needOf(members map[key]member) (out groups.Need) {
	asked := false
	for _, m := range members {
		asked = asked || m.asked
		out.Members = out.Members || m.here
		out.Groups = append(out.Groups, m.groups.Groups()...)
	}
	if !asked {
		return groups.Need{}
	}
	slices.Sort(out.Groups)
	out.Groups = slices.Compact(out.Groups)
	return out
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

// input is what the node's pods and the rules say together. A group's members
// are those on this node: the others' packets come over the wire. For pods by
// whose groups the node alone judges EC2's members are read too.
func input(members map[key]member, read *groups.Snapshot) *policy.Input {
	in := &policy.Input{
		Groups: map[vpc.SecurityGroupID]policy.SecurityGroup{}, Members: map[vpc.SecurityGroupID][]netip.Prefix{}, PrefixLists: map[vpc.PrefixListID][]netip.Prefix{},
	}
	for id, g := range read.Groups {
		var group policy.SecurityGroup
		for i := range g.Rules {
			r := &g.Rules[i]
			rule := policy.GroupRule{ID: r.ID, Protocol: r.Protocol, FromPort: r.FromPort, ToPort: r.ToPort, CIDR: r.CIDR, PrefixList: r.PrefixList, Group: r.Referenced}
			if r.Egress {
				group.Egress = append(group.Egress, rule)
			} else {
				group.Ingress = append(group.Ingress, rule)
			}
		}
		in.Groups[id] = group
	}
	among := policy.GroupRule{ID: "pods without groups of their own", Protocol: policy.AnyProtocol, FromPort: policy.AnyPort, ToPort: policy.AnyPort, Group: neighbours}
	in.Groups[neighbours] = policy.SecurityGroup{Ingress: []policy.GroupRule{among}, Egress: []policy.GroupRule{among}}
	for id, l := range read.Lists {
		in.PrefixLists[id] = l.Entries
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
	for id, m := range read.Members {
		in.Members[id] = append(in.Members[id], m.Addrs...)
	}
	for _, list := range in.Members {
		slices.SortFunc(list, netip.Prefix.Compare) // equal nodes have equal tables
	}
	return in
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
