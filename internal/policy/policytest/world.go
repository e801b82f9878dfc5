package policytest

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"

	"github.com/underlay-cni/underlay/internal/policy"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// World is an input, endpoints in it, and the places where verdicts are likely
// to change.
type World struct {
	policy.Input
	Endpoints []policy.Endpoint

	r     *rand.Rand
	large bool // many rules, of which few are for everybody
	addrs []netip.Addr
	ports []uint16
	icmp  [][2]uint8
}

var (
	keys       = []string{"app", "tier", "env"}
	values     = []string{"a", "b", "c"}
	namespaces = []string{"default", "shop", "system"}
	portNames  = []string{"http", "dns", "metrics"}
	protocols  = []policy.Protocol{policy.TCP, policy.UDP, policy.SCTP}
)

// New makes a world. One in eight has groups with hundreds of rules.
func New(seed uint64) *World {
	w := &World{r: rand.New(rand.NewPCG(seed, 0x756e6465726c6179))}
	w.Groups = map[vpc.SecurityGroupID]policy.SecurityGroup{}
	w.PrefixLists = map[vpc.PrefixListID][]netip.Prefix{}
	w.Members = map[vpc.SecurityGroupID][]netip.Prefix{}
	w.Namespaces = map[string]map[string]string{}
	for _, ns := range namespaces {
		w.Namespaces[ns] = w.labels()
	}
	for i := range 2 + w.r.IntN(30) {
		w.Pods = append(w.Pods, w.pod(i))
	}
	for i := range w.r.IntN(4) {
		w.PrefixLists[vpc.PrefixListID(fmt.Sprintf("pl-%017d", i))] = w.prefixes(8)
	}
	for i := range 1 + w.r.IntN(5) {
		w.Members[groupID(i)] = w.prefixes(20)
	}
	rules, groups := 12, 1+w.r.IntN(5)
	if seed%8 == 7 {
		rules, groups, w.large = 500, 5, true
	}
	for i := range groups {
		w.Groups[groupID(i)] = policy.SecurityGroup{Ingress: w.groupRules(rules), Egress: w.groupRules(rules)}
	}
	if w.r.IntN(2) == 0 {
		w.Exempt = []policy.Exemption{
			{Name: "Amazon DNS", Prefix: netip.MustParsePrefix("10.0.0.2/32")},
			{Name: "Amazon Time Sync Service", Prefix: netip.MustParsePrefix("169.254.169.123/32")},
		}
		w.note(w.Exempt[0].Prefix)
		w.note(w.Exempt[1].Prefix)
	}
	for i := range w.r.IntN(9) {
		w.Policies = append(w.Policies, w.policy(i))
	}
	for range 6 {
		ep := policy.Endpoint{Pod: w.Pods[w.r.IntN(len(w.Pods))], AuditGroups: w.r.IntN(6) == 0, Stack: w.r.IntN(6) == 0}
		ep.HostNetwork = false
		var groups []vpc.SecurityGroupID
		for i := range len(w.Groups) {
			if w.r.IntN(3) > 0 {
				groups = append(groups, groupID(i))
			}
		}
		ep.Groups = vpc.NewGroupSet(groups)
		w.Endpoints = append(w.Endpoints, ep)
	}
	return w
}

func groupID(i int) vpc.SecurityGroupID { return vpc.SecurityGroupID(fmt.Sprintf("sg-%017d", i)) }

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

func (w *World) labels() map[string]string {
	m := map[string]string{}
	for _, k := range keys {
		if w.r.IntN(3) > 0 {
			m[k] = pick(w.r, values)
		}
	}
	return m
}

// addr returns an address out of few, so that things meet.
func (w *World) addr() netip.Addr {
	var b [16]byte
	switch w.r.IntN(8) {
	case 0, 1: // IPv6
		b = netip.MustParseAddr("2600:1f18::").As16()
		b[7], b[14], b[15] = byte(w.r.IntN(3)), byte(w.r.IntN(2)), byte(w.r.IntN(256))
		return netip.AddrFrom16(b)
	case 2: // anywhere
		binary.BigEndian.PutUint32(b[:], w.r.Uint32())
		return netip.AddrFrom4([4]byte(b[:4]))
	}
	return netip.AddrFrom4([4]byte{10, 0, byte(w.r.IntN(4)), byte(w.r.IntN(256))})
}

func (w *World) prefix() netip.Prefix {
	a := w.addr()
	host := []int{0, 0, 0, 4, 8, w.r.IntN(20), a.BitLen()}
	p, err := a.Prefix(a.BitLen() - pick(w.r, host))
	if err != nil {
		panic(err)
	}
	w.note(p)
	return p
}

// note remembers both ends of a prefix and what is beyond them.
func (w *World) note(p netip.Prefix) {
	first := p.Masked().Addr()
	b := first.AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	for _, a := range []netip.Addr{first, last, first.Prev(), last.Next()} {
		if a.IsValid() {
			w.addrs = append(w.addrs, a)
		}
	}
}

func (w *World) prefixes(most int) []netip.Prefix {
	var out []netip.Prefix
	for range w.r.IntN(most) {
		out = append(out, w.prefix())
	}
	return out
}

func (w *World) port() uint16 {
	p := pick(w.r, []uint16{53, 80, 443, 8080, 0xffff, uint16(w.r.IntN(1 << 16)), uint16(1 + w.r.IntN(100))})
	w.ports = append(w.ports, p, p-1, p+1)
	return p
}

func (w *World) pod(i int) policy.Pod {
	p := policy.Pod{Namespace: pick(w.r, namespaces), Name: fmt.Sprintf("pod-%d", i), Labels: w.labels(), HostNetwork: w.r.IntN(10) == 0}
	for range 1 + w.r.IntN(2) {
		a := w.addr()
		w.addrs = append(w.addrs, a)
		p.Addrs = append(p.Addrs, a)
	}
	for _, name := range portNames {
		if w.r.IntN(2) == 0 {
			p.Ports = append(p.Ports, policy.NamedPort{Name: name, Protocol: pick(w.r, protocols), Port: w.port()})
		}
	}
	return p
}

func (w *World) groupRules(most int) []policy.GroupRule {
	var out []policy.GroupRule
	for range w.r.IntN(most) {
		r := policy.GroupRule{ID: fmt.Sprintf("sgr-%017x", w.r.Uint64()>>1), FromPort: policy.AnyPort, ToPort: policy.AnyPort}
		wide := !w.large || w.r.IntN(100) == 0
		kind, peer := w.r.IntN(8), w.r.IntN(6)
		if !wide {
			kind, peer = max(kind, 2), max(peer, 4)
		}
		switch kind {
		case 0:
			r.Protocol = policy.AnyProtocol
		case 1:
			r.Protocol = pick(w.r, []int{47, 50, int(policy.SCTP)})
		case 2:
			r.Protocol = pick(w.r, []int{int(policy.ICMP), int(policy.ICMPv6)})
			if w.r.IntN(3) > 0 {
				r.FromPort = w.r.IntN(16)
				if w.r.IntN(2) == 0 {
					r.ToPort = w.r.IntN(4)
				}
				w.icmp = append(w.icmp, [2]uint8{uint8(r.FromPort), uint8(max(0, r.ToPort))})
			}
		default:
			r.Protocol = pick(w.r, []int{int(policy.TCP), int(policy.UDP)})
			switch w.r.IntN(4) {
			case 0:
				if wide && w.r.IntN(2) == 0 {
					r.FromPort, r.ToPort = 0, 0xffff
				}
			case 1:
				a, b := w.port(), w.port()
				r.FromPort, r.ToPort = int(min(a, b)), int(max(a, b))
			default:
				r.FromPort = int(w.port())
				r.ToPort = r.FromPort
			}
		}
		switch peer {
		case 0:
			r.PrefixList = vpc.PrefixListID(fmt.Sprintf("pl-%017d", w.r.IntN(4)))
		case 1, 2:
			r.Group = groupID(w.r.IntN(6))
		case 3:
			r.CIDR = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
			if w.r.IntN(3) == 0 {
				r.CIDR = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
			}
		default:
			r.CIDR = w.prefix()
		}
		out = append(out, r)
	}
	return out
}

func (w *World) selector() policy.Selector {
	var s policy.Selector
	if w.r.IntN(3) == 0 {
		return s
	}
	if w.r.IntN(2) == 0 {
		s.MatchLabels = map[string]string{pick(w.r, keys): pick(w.r, values)}
	}
	for range w.r.IntN(2) {
		q := policy.Requirement{Key: pick(w.r, keys), Operator: pick(w.r, []policy.Operator{policy.In, policy.NotIn, policy.Exists, policy.DoesNotExist})}
		if q.Operator == policy.In || q.Operator == policy.NotIn {
			q.Values = []string{pick(w.r, values), pick(w.r, values)}
		}
		s.Expressions = append(s.Expressions, q)
	}
	return s
}

func (w *World) policy(i int) policy.NetworkPolicy {
	p := policy.NetworkPolicy{
		Namespace: pick(w.r, namespaces), Name: fmt.Sprintf("policy-%d", i), PodSelector: w.selector(),
		Ingress: w.policyRules(), Egress: w.policyRules(), Audit: w.r.IntN(4) == 0,
	}
	switch w.r.IntN(4) {
	case 0:
		p.Types = []policy.Direction{policy.Ingress}
	case 1:
		p.Types = []policy.Direction{policy.Egress}
	case 2:
		p.Types = []policy.Direction{policy.Egress, policy.Ingress}
	}
	return p
}

func (w *World) policyRules() []policy.PolicyRule {
	var out []policy.PolicyRule
	for range w.r.IntN(4) {
		var r policy.PolicyRule
		for range w.r.IntN(3) {
			r.Peers = append(r.Peers, w.peer())
		}
		for range w.r.IntN(4) {
			p := policy.Port{Protocol: pick(w.r, []policy.Protocol{0, policy.TCP, policy.UDP, policy.SCTP})}
			switch w.r.IntN(4) {
			case 0:
				p.Name = pick(w.r, portNames)
			case 1:
				a, b := w.port(), w.port()
				p.Port, p.End = min(a, b), max(a, b)
			case 2:
				p.Port = w.port()
			}
			r.Ports = append(r.Ports, p)
		}
		out = append(out, r)
	}
	return out
}

func (w *World) peer() policy.Peer {
	if w.r.IntN(2) == 0 {
		b := &policy.Block{CIDR: w.prefix()}
		for range w.r.IntN(3) {
			// Within the block, as Kubernetes asks.
			a := b.CIDR.Masked().Addr().AsSlice()
			for i := b.CIDR.Bits(); i < len(a)*8; i++ {
				if w.r.IntN(2) == 0 {
					a[i/8] |= 0x80 >> (i % 8)
				}
			}
			in, _ := netip.AddrFromSlice(a)
			e, err := in.Prefix(b.CIDR.Bits() + w.r.IntN(in.BitLen()-b.CIDR.Bits()+1))
			if err != nil {
				panic(err)
			}
			w.note(e)
			b.Except = append(b.Except, e)
		}
		return policy.Peer{Block: b}
	}
	var p policy.Peer
	if w.r.IntN(3) > 0 {
		s := w.selector()
		p.PodSelector = &s
	}
	if p.PodSelector == nil || w.r.IntN(2) == 0 {
		s := w.selector()
		p.NamespaceSelector = &s
	}
	return p
}

// Flow makes a flow of an endpoint in a direction; most touch something.
func (w *World) Flow(ep *policy.Endpoint, dir policy.Direction) policy.Flow {
	remote := w.addr()
	if len(w.addrs) > 0 && w.r.IntN(4) > 0 {
		remote = pick(w.r, w.addrs)
	}
	f := policy.Flow{FromHost: w.r.IntN(64) == 0}
	f.Protocol = pick(w.r, []policy.Protocol{policy.TCP, policy.TCP, policy.TCP, policy.UDP, policy.UDP, policy.SCTP, policy.ICMP, policy.ICMPv6, 47, policy.Protocol(w.r.IntN(256))})
	// Sometimes what one rule is about.
	var rule *policy.GroupRule
	if groups := ep.Groups.Groups(); len(groups) > 0 && w.r.IntN(4) == 0 {
		rules := w.Groups[pick(w.r, groups)].Ingress
		if dir == policy.Egress {
			rules = w.Groups[pick(w.r, groups)].Egress
		}
		if len(rules) > 0 {
			rule = &rules[w.r.IntN(len(rules))]
			if rule.CIDR.IsValid() {
				remote = rule.CIDR.Addr()
			}
			if rule.Protocol >= 0 {
				f.Protocol = policy.Protocol(rule.Protocol)
			}
		}
	}
	own := netip.MustParseAddr("10.0.9.9")
	if remote.Is6() {
		own = netip.MustParseAddr("2600:1f18:9::9")
	}
	if i := slices.IndexFunc(ep.Addrs, func(a netip.Addr) bool { return a.Is4() == remote.Is4() }); i >= 0 {
		own = ep.Addrs[i]
	}
	f.Src, f.Dst = remote, own
	if dir == policy.Egress {
		f.Src, f.Dst = own, remote
	}
	switch f.Protocol {
	case policy.TCP, policy.UDP, policy.SCTP:
		f.SrcPort, f.DstPort = uint16(w.r.IntN(1<<16)), uint16(w.r.IntN(1<<16))
		if len(w.ports) > 0 && w.r.IntN(4) > 0 {
			f.DstPort = pick(w.r, w.ports)
		}
		if rule != nil && rule.FromPort >= 0 {
			f.DstPort = uint16(rule.FromPort)
		}
	case policy.ICMP, policy.ICMPv6:
		f.ICMPType, f.ICMPCode = uint8(w.r.IntN(20)), uint8(w.r.IntN(5))
		if len(w.icmp) > 0 && w.r.IntN(2) > 0 {
			t := pick(w.r, w.icmp)
			f.ICMPType, f.ICMPCode = t[0], t[1]
		}
	}
	return f
}
