package policy

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// The spaces that an endpoint's other end is looked up in.
const (
	ipv4 = iota
	ipv6
	families
)

var (
	lastOf    = [families]point{ipv4: {0, 1<<32 - 1}, ipv6: {^uint64(0), ^uint64(0)}}
	lastPort  = point{0, 1<<24 - 1} // protocol<<16 | port, or type<<8 | code
	everybody = [families][]span{{{last: lastOf[ipv4]}}, {{last: lastOf[ipv6]}}}
	anyPort   = []span{{last: lastPort}}
)

// addresses are unions of spans, by family.
type addresses [families][]span

func (a *addresses) add(p netip.Prefix) {
	if !p.IsValid() {
		return
	}
	f := family(p.Addr())
	a[f] = append(a[f], spanOf(p))
}

func (a *addresses) addAddr(ip netip.Addr) { a.add(netip.PrefixFrom(ip, ip.BitLen())) }

func (a *addresses) unite() {
	for f := range a {
		a[f] = union(a[f])
	}
}

func (a *addresses) contain(ip netip.Addr) bool {
	spans, p := a[family(ip)], pointOf(ip)
	i, _ := slices.BinarySearchFunc(spans, p, func(s span, p point) int { return s.last.compare(p) })
	return i < len(spans) && spans[i].first.compare(p) <= 0
}

func family(a netip.Addr) int {
	if a.Is4() {
		return ipv4
	}
	return ipv6
}

// rule is one bit of a direction's bitmaps: what has a peer and a port of these
// is allowed by the rule of that name.
type rule struct {
	name  string
	peers addresses
	ports []span
	// The families of which the rule's peer is 0.0.0.0/0 or ::/0.
	everybody [families]bool
}

// Bits of a direction's protocols of which all ports are open to everybody, by
// family: open<<family.
const (
	openTCP = 1
	openUDP = 4
)

// direction is what a Table says of one.
type direction struct {
	mode     uint32
	fallback string // the verdict's rule if no rule allows
	open     uint32
	rules    []rule
}

// Modes of a direction; those of bpf/node_policy.h.
const (
	modeNone    = 0 // everything passes, by no rule
	modeEnforce = 1
	modeAudit   = 2
)

// UnknownGroupError says that an endpoint has a group whose rules the Input
// lacks: nothing can be said of its packets yet.
type UnknownGroupError struct{ Group vpc.SecurityGroupID }

func (e *UnknownGroupError) Error() string {
	return fmt.Sprintf("the rules of security group %s are not known: read them from EC2 first, or see whether the group exists", e.Group)
}

// Compiler turns an Input into Tables, endpoint by endpoint. What endpoints have
// in common is worked out once. It is for one goroutine.
type Compiler struct {
	in       *Input
	ids      map[string]RuleID
	names    Rules
	groups   map[vpc.SecurityGroupID]*addresses
	lists    map[vpc.PrefixListID]*addresses
	policies map[string][]*policy // by namespace, sorted by name
	ports    map[portName][]podPort
	tables   map[string]*Table // by what they are made of
}

type policy struct {
	NetworkPolicy
	selects matcher
	peers   [2][]*addresses // by direction and rule, as needed
}

type portName struct {
	name     string
	protocol Protocol
}

type podPort struct {
	addr netip.Addr
	port uint16
}

// NewCompiler returns a compiler of in.
func NewCompiler(in *Input) *Compiler {
	c := &Compiler{
		in: in, ids: map[string]RuleID{}, names: Rules{},
		groups: map[vpc.SecurityGroupID]*addresses{}, lists: map[vpc.PrefixListID]*addresses{},
		policies: map[string][]*policy{}, ports: map[portName][]podPort{}, tables: map[string]*Table{},
	}
	for _, p := range in.Policies {
		c.policies[p.Namespace] = append(c.policies[p.Namespace], &policy{
			NetworkPolicy: p, selects: newMatcher(p.PodSelector),
			peers: [2][]*addresses{make([]*addresses, len(p.Egress)), make([]*addresses, len(p.Ingress))},
		})
	}
	for _, ps := range c.policies {
		slices.SortStableFunc(ps, func(a, b *policy) int { return cmp.Compare(a.Name, b.Name) })
	}
	for _, pod := range in.Pods {
		if pod.HostNetwork {
			continue
		}
		for _, n := range pod.Ports {
			k := portName{n.Name, n.Protocol}
			for _, a := range pod.Addrs {
				c.ports[k] = append(c.ports[k], podPort{a, n.Port})
			}
		}
	}
	return c
}

// Rules returns the names of all rules in the tables compiled so far.
func (c *Compiler) Rules() Rules { return c.names.Clone() }

// id returns the id of a rule's name.
func (c *Compiler) id(name string) RuleID {
	if id, ok := c.ids[name]; ok {
		return id
	}
	h := fnv.New32a()
	h.Write([]byte(name))
	id := max(RuleID(h.Sum32()), firstRule)
	for c.names[id] != "" {
		id = max(id+1, firstRule)
	}
	c.ids[name], c.names[id] = id, name
	return id
}

// Compile returns the tables of an endpoint. Errors: *UnknownGroupError,
// *TooLargeError.
func (c *Compiler) Compile(ep *Endpoint) (Tables, error) {
	t := Tables{Stack: ep.Stack}
	if ep.Groups != "" {
		key := string(ep.Groups) + " " + strconv.FormatBool(ep.AuditGroups)
		if c.tables[key] == nil {
			gate, err := c.groupGate(ep)
			if err != nil {
				return Tables{}, err
			}
			if c.tables[key], err = c.table(gate); err != nil {
				return Tables{}, fmt.Errorf("security groups %s: %w", ep.Groups, err)
			}
		}
		t.Gates[Groups] = c.tables[key]
	}
	chosen := [2]choice{Egress: c.choose(ep, Egress), Ingress: c.choose(ep, Ingress)}
	if chosen[Egress].mode != modeNone || chosen[Ingress].mode != modeNone {
		key := fmt.Sprintf("%s %v %v %v", ep.Namespace, chosen[Egress], chosen[Ingress], chosen[Ingress].named(ep))
		if c.tables[key] == nil {
			table, err := c.table([2]direction{
				Egress:  c.policyDirection(ep, Egress, chosen[Egress]),
				Ingress: c.policyDirection(ep, Ingress, chosen[Ingress]),
			})
			if err != nil {
				return Tables{}, fmt.Errorf("network policies of pod %s/%s: %w", ep.Namespace, ep.Name, err)
			}
			c.tables[key] = table
		}
		t.Gates[Policies] = c.tables[key]
	}
	return t, nil
}

func (c *Compiler) groupGate(ep *Endpoint) (gate [2]direction, err error) {
	var exempt []rule
	for _, e := range c.in.Exempt {
		r := rule{name: "exempt: " + e.Name, ports: anyPort}
		r.peers.add(e.Prefix)
		exempt = append(exempt, r)
	}
	for _, dir := range []Direction{Egress, Ingress} {
		d := &gate[dir]
		d.mode = modeEnforce
		if ep.AuditGroups {
			d.mode = modeAudit
		}
		d.fallback = fmt.Sprintf("%s %s: no rule allows it", ep.Groups, dir)
		d.rules = slices.Clone(exempt)
		for _, id := range ep.Groups.Groups() {
			group, ok := c.in.Groups[id]
			if !ok {
				return gate, &UnknownGroupError{id}
			}
			rules := slices.Clone(group.Ingress)
			if dir == Egress {
				rules = slices.Clone(group.Egress)
			}
			slices.SortStableFunc(rules, func(a, b GroupRule) int { return strings.Compare(a.ID, b.ID) })
			for _, gr := range rules {
				r := rule{name: fmt.Sprintf("%s %s %s", id, dir, gr.ID), peers: *c.groupPeers(gr), ports: groupPorts(gr)}
				if gr.Group == "" && gr.PrefixList == "" && gr.CIDR.IsValid() && gr.CIDR.Bits() == 0 {
					f := family(gr.CIDR.Addr())
					r.everybody[f] = true
					d.open |= openPorts(r.ports) << f
				}
				d.rules = append(d.rules, r)
			}
		}
	}
	return gate, nil
}

// openPorts says of which protocols spans have every port.
func openPorts(ports []span) (open uint32) {
	for _, s := range ports {
		for bit, protocol := range map[uint32]Protocol{openTCP: TCP, openUDP: UDP} {
			if whole := protocolSpan(protocol); s.first.compare(whole.first) <= 0 && s.last.compare(whole.last) >= 0 {
				open |= bit
			}
		}
	}
	return open
}

func (c *Compiler) groupPeers(r GroupRule) *addresses {
	var known *addresses
	var prefixes []netip.Prefix
	switch {
	case r.Group != "":
		known, prefixes = c.groups[r.Group], c.in.Members[r.Group]
	case r.PrefixList != "":
		known, prefixes = c.lists[r.PrefixList], c.in.PrefixLists[r.PrefixList]
	default:
		prefixes = []netip.Prefix{r.CIDR}
	}
	if known != nil {
		return known
	}
	a := new(addresses)
	for _, p := range prefixes {
		a.add(p)
	}
	a.unite()
	switch {
	case r.Group != "":
		c.groups[r.Group] = a
	case r.PrefixList != "":
		c.lists[r.PrefixList] = a
	}
	return a
}

func protocolSpan(p Protocol) span {
	return span{point{0, uint64(p) << 16}, point{0, uint64(p)<<16 | 0xffff}}
}

// portSpan returns the ports from..to of a protocol, none if there are none.
func portSpan(p Protocol, from, to int) []span {
	from, to = max(from, 0), min(to, 0xffff)
	if from > to {
		return nil
	}
	base := uint64(p) << 16
	return []span{{point{0, base | uint64(from)}, point{0, base | uint64(to)}}}
}

func groupPorts(r GroupRule) []span {
	if r.Protocol == AnyProtocol {
		return anyPort
	}
	if r.Protocol < 0 || r.Protocol > 255 {
		return nil
	}
	p := Protocol(r.Protocol)
	switch p {
	case TCP, UDP:
		if r.FromPort != AnyPort {
			return portSpan(p, r.FromPort, r.ToPort)
		}
	case ICMP, ICMPv6:
		switch {
		case r.FromPort == AnyPort:
		case r.FromPort < 0 || r.FromPort > 255 || r.ToPort < AnyPort || r.ToPort > 255:
			return nil
		case r.ToPort == AnyPort:
			return portSpan(p, r.FromPort<<8, r.FromPort<<8|0xff)
		default:
			return portSpan(p, r.FromPort<<8|r.ToPort, r.FromPort<<8|r.ToPort)
		}
	}
	return []span{protocolSpan(p)}
}

// choice is the policies that judge an endpoint in a direction.
type choice struct {
	mode     uint32
	policies []*policy
}

// String tells choices of one namespace apart.
func (c choice) String() string {
	names := make([]string, len(c.policies))
	for i, p := range c.policies {
		names[i] = p.Name
	}
	return fmt.Sprint(c.mode, names)
}

// named returns the endpoint's ports if a rule for ingress names any.
func (c choice) named(ep *Endpoint) []NamedPort {
	for _, p := range c.policies {
		for _, r := range p.Ingress {
			if slices.ContainsFunc(r.Ports, func(p Port) bool { return p.Name != "" }) {
				return ep.Ports
			}
		}
	}
	return nil
}

func (c *Compiler) choose(ep *Endpoint, dir Direction) choice {
	enforced, audited := choice{mode: modeEnforce}, choice{mode: modeAudit}
	for _, p := range c.policies[ep.Namespace] {
		switch {
		case !p.isolates(dir) || !p.selects.match(ep.Labels):
		case p.Audit:
			audited.policies = append(audited.policies, p)
		default:
			enforced.policies = append(enforced.policies, p)
		}
	}
	switch {
	case len(enforced.policies) > 0:
		return enforced
	case len(audited.policies) > 0:
		return audited
	}
	return choice{mode: modeNone}
}

func (c *Compiler) policyDirection(ep *Endpoint, dir Direction, chosen choice) direction {
	d := direction{mode: chosen.mode}
	if d.mode == modeNone {
		return d
	}
	var names []string
	for _, p := range chosen.policies {
		names = append(names, p.Namespace+"/"+p.Name)
		for i := range p.peers[dir] {
			d.rules = append(d.rules, c.policyRules(ep, p, dir, i)...)
		}
	}
	d.fallback = fmt.Sprintf("%s %s: no rule allows it", strings.Join(names, ","), dir)
	return d
}

func (p *policy) isolates(dir Direction) bool {
	if len(p.Types) > 0 {
		return slices.Contains(p.Types, dir)
	}
	return dir == Ingress || len(p.Egress) > 0
}

// policyRules returns what one rule comes to: one, and with named ports of
// whoever is sent to, one for each number that such a name has somewhere.
func (c *Compiler) policyRules(ep *Endpoint, p *policy, dir Direction, i int) []rule {
	all := p.Ingress
	if dir == Egress {
		all = p.Egress
	}
	pr := all[i]
	if p.peers[dir][i] == nil {
		p.peers[dir][i] = c.policyPeers(p, pr.Peers)
	}
	r := rule{name: fmt.Sprintf("%s/%s %s[%d]", p.Namespace, p.Name, dir, i), peers: *p.peers[dir][i]}
	if len(pr.Ports) == 0 {
		r.ports = anyPort
		return []rule{r}
	}
	named := map[span]*addresses{}
	for _, port := range pr.Ports {
		protocol := cmp.Or(port.Protocol, TCP)
		switch {
		case port.Name != "" && dir == Ingress:
			for _, n := range ep.Ports {
				if n.Name == port.Name && n.Protocol == protocol {
					r.ports = append(r.ports, portSpan(protocol, int(n.Port), int(n.Port))...)
				}
			}
		case port.Name != "":
			for _, n := range c.ports[portName{port.Name, protocol}] {
				if !r.peers.contain(n.addr) {
					continue
				}
				s := portSpan(protocol, int(n.port), int(n.port))[0]
				if named[s] == nil {
					named[s] = new(addresses)
				}
				named[s].addAddr(n.addr)
			}
		case port.Port == 0:
			r.ports = append(r.ports, protocolSpan(protocol))
		default:
			r.ports = append(r.ports, portSpan(protocol, int(port.Port), int(cmp.Or(port.End, port.Port)))...)
		}
	}
	r.ports = union(r.ports)
	out := []rule{r}
	for s, peers := range named {
		peers.unite()
		out = append(out, rule{name: r.name, peers: *peers, ports: []span{s}})
	}
	slices.SortFunc(out[1:], func(a, b rule) int { return a.ports[0].first.compare(b.ports[0].first) })
	return out
}

func (c *Compiler) policyPeers(p *policy, peers []Peer) *addresses {
	if len(peers) == 0 {
		return &addresses{everybody[ipv4], everybody[ipv6]}
	}
	out := new(addresses)
	for _, peer := range peers {
		if peer.Block != nil {
			var block, holes addresses
			block.add(peer.Block.CIDR)
			for _, e := range peer.Block.Except {
				holes.add(e)
			}
			holes.unite()
			for f := range out {
				out[f] = append(out[f], without(block[f], holes[f])...)
			}
			continue
		}
		pods := matcher{}
		if peer.PodSelector != nil {
			pods = newMatcher(*peer.PodSelector)
		}
		in := map[string]bool{p.Namespace: true}
		if peer.NamespaceSelector != nil {
			in = map[string]bool{}
			namespaces := newMatcher(*peer.NamespaceSelector)
			for name, labels := range c.in.Namespaces {
				in[name] = namespaces.match(labels)
			}
		}
		for i := range c.in.Pods {
			pod := &c.in.Pods[i]
			if pod.HostNetwork || !in[pod.Namespace] || !pods.match(pod.Labels) {
				continue
			}
			for _, a := range pod.Addrs {
				out.addAddr(a)
			}
		}
	}
	out.unite()
	return out
}

// matcher is a selector whose requirements have one form: the label's value is
// among values, or it is not; absent says what holds for a pod without the label.
type matcher []requirement

type requirement struct {
	key    string
	absent bool
	any    bool // whatever the value
	among  map[string]bool
	negate bool
}

func newMatcher(s Selector) matcher {
	var m matcher
	for k, v := range s.MatchLabels {
		m = append(m, requirement{key: k, among: map[string]bool{v: true}})
	}
	for _, e := range s.Expressions {
		among := map[string]bool{}
		for _, v := range e.Values {
			among[v] = true
		}
		switch e.Operator {
		case In:
			m = append(m, requirement{key: e.Key, among: among})
		case NotIn:
			m = append(m, requirement{key: e.Key, among: among, negate: true, absent: true})
		case Exists:
			m = append(m, requirement{key: e.Key, any: true})
		case DoesNotExist:
			m = append(m, requirement{key: e.Key, any: true, negate: true, absent: true})
		default: // an operator of a later Kubernetes: nothing is selected
			m = append(m, requirement{key: e.Key})
		}
	}
	return m
}

func (m matcher) match(labels map[string]string) bool {
	for _, r := range m {
		v, ok := labels[r.key]
		if !ok && r.absent {
			continue
		}
		if !ok || (r.any || r.among[v]) == r.negate {
			return false
		}
	}
	return true
}
