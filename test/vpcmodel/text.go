package vpcmodel

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// String writes the script, one statement per line.
func (s Script) String() string {
	var b strings.Builder
	for _, st := range s {
		b.WriteString(st.String())
		b.WriteByte('\n')
	}
	return b.String()
}

var protocols = map[string]int{"all": -1, "icmp": int(packet.ProtoICMP), "tcp": int(packet.ProtoTCP), "udp": int(packet.ProtoUDP), "icmpv6": int(packet.ProtoICMPv6)}

func protocol(n int) string {
	for name, number := range protocols {
		if number == n {
			return name
		}
	}
	return strconv.Itoa(n)
}

// String is the protocol and its ports: "tcp 80-90", "icmp 8/0", "icmp any/any", "all".
func (m Match) String() string {
	name := protocol(m.Proto)
	switch m.kind() {
	case "tcp", "udp":
		if m.From == m.To {
			return name + " " + strconv.Itoa(m.From)
		}
		return fmt.Sprintf("%s %d-%d", name, m.From, m.To)
	case "icmp":
		part := func(n int) string {
			if n == -1 {
				return "any"
			}
			return strconv.Itoa(n)
		}
		return name + " " + part(m.From) + "/" + part(m.To)
	}
	return name
}

func (r Rule) String() string {
	switch {
	case r.Group != "":
		return r.Match.String() + " group " + string(r.Group)
	case r.List != "":
		return r.Match.String() + " list " + string(r.List)
	}
	return r.Match.String() + " " + r.CIDR.String()
}

func (r Route) dest() string {
	if r.List != "" {
		return "list " + string(r.List)
	}
	return r.CIDR.String()
}

func fields(verb string, parts ...any) string {
	var b strings.Builder
	b.WriteString(verb)
	for _, p := range parts {
		if text := fmt.Sprint(p); text != "" {
			b.WriteByte(' ')
			b.WriteString(text)
		}
	}
	return b.String()
}

func spaced[T any](items []T) string {
	words := make([]string, len(items))
	for i, it := range items {
		words[i] = fmt.Sprint(it)
	}
	return strings.Join(words, " ")
}

func bare(c netip.Prefix) string {
	if c.IsSingleIP() {
		return c.Addr().String()
	}
	return c.String()
}

func (s MakeVPC) String() string { return fields("vpc", s.ID, spaced(s.CIDRs)) }
func (s MakeSubnet) String() string {
	if s.CIDR6.IsValid() {
		return fields("subnet", s.ID, s.VPC, s.CIDR, s.CIDR6)
	}
	return fields("subnet", s.ID, s.VPC, s.CIDR)
}
func (s MakeENI) String() string {
	others := make([]string, len(s.Others))
	for i, c := range s.Others {
		others[i] = bare(c)
	}
	return fields("eni", s.ID, s.Subnet, s.Instance, s.Primary, spaced(others))
}
func (s MakeGroup) String() string   { return fields(s.As, s.ID, s.VPC) }
func (s MakeACL) String() string     { return fields(s.As, s.ID, s.VPC) }
func (s MakeTable) String() string   { return fields("table", s.ID, s.VPC) }
func (s MakePeering) String() string { return fields("peer", s.ID, s.A, s.B) }
func (s SetList) String() string     { return fields("list", s.ID, spaced(s.CIDRs)) }
func (s Allow) String() string       { return fields("allow", s.Group, s.Dir, s.Rule) }
func (s Revoke) String() string      { return fields("revoke", s.Group, s.Dir, s.Rule) }
func (s DeleteGroup) String() string { return fields("delete", s.ID) }
func (s SetGroups) String() string   { return fields("groups", s.ENI, spaced(s.Groups)) }
func (s SetCheck) String() string {
	if s.On {
		return fields("check", s.ENI, "on")
	}
	return fields("check", s.ENI, "off")
}
func (s SetTimeouts) String() string {
	return fields("timeouts", s.ENI, s.TCPEstablished, s.UDPStream, s.UDP)
}
func (s Assign) String() string   { return fields("assign", s.ENI, bare(s.CIDR)) }
func (s Unassign) String() string { return fields("unassign", s.ENI, bare(s.CIDR)) }
func (s Detach) String() string   { return fields("detach", s.ENI) }
func (s AddEntry) String() string {
	action := "deny"
	if s.Allow {
		action = "allow"
	}
	return fields("entry", s.ACL, s.Dir, s.Number, action, s.Match, s.CIDR)
}
func (s DeleteEntry) String() string { return fields("unentry", s.ACL, s.Dir, s.Number) }
func (s SetACL) String() string      { return fields("aclof", s.Subnet, s.ACL) }
func (s AddRoute) String() string {
	switch {
	case s.ENI != "":
		return fields("route", s.Table, s.dest(), "eni", s.ENI)
	case s.Gateway != "":
		return fields("route", s.Table, s.dest(), "igw", s.Gateway)
	case s.NAT != "":
		return fields("route", s.Table, s.dest(), "nat", s.NAT)
	}
	return fields("route", s.Table, s.dest(), "peer", s.Peering)
}
func (s DeleteRoute) String() string   { return fields("unroute", s.Table, s.dest()) }
func (s SetTable) String() string      { return fields("tableof", s.Subnet, s.Table) }
func (s DeletePeering) String() string { return fields("unpeer", s.ID) }
func (s Wait) String() string          { return fields("wait", s.For) }

const flagLetters = "FSRPA"

func (s Send) String() string {
	want := ""
	if s.Want != "" {
		want = "=> " + s.Want
	}
	return fields("send", s.ID, s.From, s.Packet.String(), want)
}

// String is the packet as a script has it, after the interface's name.
func (p *Packet) String() string {
	out := fields(protocol(int(p.Proto)), address(p.Src, p.SrcPort, p.ports()), ">", address(p.Dst, p.DstPort, p.ports()))
	switch {
	case p.Proto == packet.ProtoTCP:
		out += " "
		for i, letter := range flagLetters {
			if p.Flags&(1<<i) != 0 {
				out += string(letter)
			}
		}
	case p.icmp():
		out += fmt.Sprintf(" %d/%d", p.Type, p.Code)
		if p.About == nil {
			out += fmt.Sprintf(" ident %d", p.Ident)
		}
	}
	if q := p.About; q != nil {
		quoted := q.packet()
		out += fields(" about", protocol(int(q.Proto)), address(q.Src, q.SrcPort, quoted.ports()), ">", address(q.Dst, q.DstPort, quoted.ports()))
		if quoted.icmp() {
			out += fmt.Sprintf(" quoting %d", q.Ident)
		}
	}
	if p.Direct != "" {
		out += " direct " + string(p.Direct)
	}
	if p.Fragments > 0 {
		out += fmt.Sprintf(" fragments %d", p.Fragments)
	}
	if p.Orphan {
		out += " orphan"
	}
	if p.Length > 0 {
		out += fmt.Sprintf(" length %d", p.Length)
	}
	if p.MayFragment {
		out += " nodf"
	}
	return out
}

func address(a netip.Addr, port uint16, ports bool) string {
	if ports {
		return netip.AddrPortFrom(a, port).String()
	}
	return a.String()
}

// Parse reads a script. Empty lines and what follows a # are left out.
func Parse(text string) (Script, error) {
	var s Script
	for i, line := range strings.Split(text, "\n") {
		line, _, _ = strings.Cut(line, "#")
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		p := &parser{words: words[1:]}
		st := p.statement(words[0])
		if p.err == nil && len(p.words) > 0 {
			p.err = fmt.Errorf("%q is too much", strings.Join(p.words, " "))
		}
		if p.err != nil {
			return nil, fmt.Errorf("line %d, %q: %w", i+1, strings.TrimSpace(line), p.err)
		}
		s = append(s, st)
	}
	return s, nil
}

// parser takes words from the front of a line. The first error stays.
type parser struct {
	words []string
	err   error
}

func (p *parser) fail(format string, args ...any) {
	if p.err == nil {
		p.err = fmt.Errorf(format, args...)
	}
}

func (p *parser) word() string {
	if len(p.words) == 0 {
		p.fail("ends too early")
		return ""
	}
	w := p.words[0]
	p.words = p.words[1:]
	return w
}

// peek reports whether the next word is w, and takes it if so.
func (p *parser) peek(w string) bool {
	if len(p.words) == 0 || p.words[0] != w {
		return false
	}
	p.words = p.words[1:]
	return true
}

func (p *parser) number() int {
	w := p.word()
	n, err := strconv.Atoi(w)
	if err != nil {
		p.fail("%q is not a number", w)
	}
	return n
}

func (p *parser) addr() netip.Addr {
	w := p.word()
	a, err := netip.ParseAddr(w)
	if err != nil {
		p.fail("%w", err)
	}
	return a
}

func (p *parser) cidr() netip.Prefix { return p.prefix(p.word()) }

func (p *parser) prefix(w string) netip.Prefix {
	if !strings.Contains(w, "/") {
		a, err := netip.ParseAddr(w)
		if err != nil {
			p.fail("%w", err)
			return netip.Prefix{}
		}
		return single(a)
	}
	c, err := netip.ParsePrefix(w)
	if err != nil {
		p.fail("%w", err)
	}
	return c.Masked()
}

func (p *parser) cidrs() (out []netip.Prefix) {
	for len(p.words) > 0 {
		out = append(out, p.cidr())
	}
	return out
}

func (p *parser) duration() time.Duration {
	d, err := time.ParseDuration(p.word())
	if err != nil {
		p.fail("%w", err)
	}
	return d
}

func (p *parser) direction() Direction {
	switch w := p.word(); w {
	case "in":
		return In
	case "out":
		return Out
	default:
		p.fail("%q is neither in nor out", w)
		return In
	}
}

func (p *parser) protocol() int {
	w := p.word()
	if n, ok := protocols[w]; ok {
		return n
	}
	n, err := strconv.Atoi(w)
	if err != nil || n < 0 || n > 255 {
		p.fail("%q is no protocol", w)
	}
	return n
}

func (p *parser) match() Match {
	m := Match{Proto: p.protocol(), From: -1, To: -1}
	switch m.kind() {
	case "tcp", "udp":
		w := p.word()
		from, to, ranged := strings.Cut(w, "-")
		if !ranged {
			to = from
		}
		var err1, err2 error
		m.From, err1 = strconv.Atoi(from)
		m.To, err2 = strconv.Atoi(to)
		if err1 != nil || err2 != nil {
			p.fail("%q is no range of ports", w)
		}
	case "icmp":
		kind, code, _ := strings.Cut(p.word(), "/")
		m.From, m.To = p.part(kind), p.part(code)
	}
	return m
}

func (p *parser) part(w string) int {
	if w == "any" {
		return -1
	}
	n, err := strconv.Atoi(w)
	if err != nil {
		p.fail("%q is neither a number nor any", w)
	}
	return n
}

func (p *parser) rule() Rule {
	r := Rule{Match: p.match()}
	switch {
	case p.peek("group"):
		r.Group = vpc.SecurityGroupID(p.word())
	case p.peek("list"):
		r.List = ListID(p.word())
	default:
		r.CIDR = p.cidr()
	}
	return r
}

func (p *parser) route(target bool) Route {
	var r Route
	if p.peek("list") {
		r.List = ListID(p.word())
	} else {
		r.CIDR = p.cidr()
	}
	if target {
		if p.peek("eni") {
			r.ENI = vpc.ENIID(p.word())
		} else if p.peek("peer") {
			r.Peering = PeeringID(p.word())
		} else if p.peek("igw") {
			r.Gateway = GatewayID(p.word())
		} else if p.peek("nat") {
			r.NAT = NATID(p.word())
		} else {
			p.fail("want eni, peer, igw or nat")
		}
	}
	return r
}

func (p *parser) statement(verb string) Statement {
	switch verb {
	case "vpc":
		return MakeVPC{VPC{ID: vpc.VPCID(p.word()), CIDRs: p.cidrs()}}
	case "subnet":
		s := Subnet{ID: vpc.SubnetID(p.word()), VPC: vpc.VPCID(p.word()), CIDR: p.cidr()}
		if len(p.words) > 0 {
			s.CIDR6 = p.cidr()
		}
		return MakeSubnet{s}
	case "eni":
		return MakeENI{ID: vpc.ENIID(p.word()), Subnet: vpc.SubnetID(p.word()), Instance: vpc.InstanceID(p.word()), Primary: p.addr(), Others: p.cidrs()}
	case "group", "newgroup", "defaultgroup":
		return MakeGroup{verb, vpc.SecurityGroupID(p.word()), vpc.VPCID(p.word())}
	case "acl", "defaultacl":
		return MakeACL{verb, ACLID(p.word()), vpc.VPCID(p.word())}
	case "table":
		return MakeTable{TableID(p.word()), vpc.VPCID(p.word())}
	case "peer":
		return MakePeering{PeeringID(p.word()), vpc.VPCID(p.word()), vpc.VPCID(p.word())}
	case "list":
		return SetList{ListID(p.word()), p.cidrs()}
	case "allow":
		return Allow{vpc.SecurityGroupID(p.word()), p.direction(), p.rule()}
	case "revoke":
		return Revoke{vpc.SecurityGroupID(p.word()), p.direction(), p.rule()}
	case "share":
		return ShareGroup{vpc.SecurityGroupID(p.word()), vpc.VPCID(p.word())}
	case "delete":
		return DeleteGroup{vpc.SecurityGroupID(p.word())}
	case "groups":
		s := SetGroups{ENI: vpc.ENIID(p.word())}
		for len(p.words) > 0 {
			s.Groups = append(s.Groups, vpc.SecurityGroupID(p.word()))
		}
		return s
	case "check":
		return SetCheck{vpc.ENIID(p.word()), p.word() == "on"}
	case "timeouts":
		return SetTimeouts{vpc.ENIID(p.word()), Timeouts{p.duration(), p.duration(), p.duration()}}
	case "assign":
		return Assign{vpc.ENIID(p.word()), p.cidr()}
	case "unassign":
		return Unassign{vpc.ENIID(p.word()), p.cidr()}
	case "detach":
		return Detach{vpc.ENIID(p.word())}
	case "entry":
		return AddEntry{ACLID(p.word()), p.direction(), Entry{Number: p.number(), Allow: p.word() == "allow", Match: p.match(), CIDR: p.cidr()}}
	case "unentry":
		return DeleteEntry{ACLID(p.word()), p.direction(), p.number()}
	case "aclof":
		return SetACL{vpc.SubnetID(p.word()), ACLID(p.word())}
	case "route":
		return AddRoute{TableID(p.word()), p.route(true)}
	case "unroute":
		return DeleteRoute{TableID(p.word()), p.route(false)}
	case "tableof":
		return SetTable{vpc.SubnetID(p.word()), TableID(p.word())}
	case "unpeer":
		return DeletePeering{PeeringID(p.word())}
	case "wait":
		return Wait{p.duration()}
	case "send":
		return p.send()
	}
	if s := p.gatewayStatement(verb); s != nil {
		return s
	}
	p.fail("%q is no statement", verb)
	return nil
}

func (p *parser) endpoint(ports bool) (netip.Addr, uint16) {
	if !ports {
		return p.addr(), 0
	}
	w := p.word()
	ap, err := netip.ParseAddrPort(w)
	if err != nil {
		p.fail("%w", err)
	}
	return ap.Addr(), ap.Port()
}

func (p *parser) send() Statement {
	if i := slices.Index(p.words, "=>"); i >= 0 {
		want := strings.Join(p.words[i+1:], " ")
		p.words = p.words[:i]
		s := p.send().(Send)
		s.Want = want
		return s
	}
	s := Send{Packet: Packet{ID: p.number(), From: vpc.ENIID(p.word()), Proto: uint8(p.protocol())}}
	q := &s.Packet
	q.Src, q.SrcPort = p.endpoint(q.ports())
	if !p.peek(">") {
		p.fail("want >")
	}
	q.Dst, q.DstPort = p.endpoint(q.ports())
	switch {
	case q.Proto == packet.ProtoTCP:
		for _, letter := range p.word() {
			i := strings.IndexRune(flagLetters, letter)
			if i < 0 {
				p.fail("%q is none of the flags %s", letter, flagLetters)
				break
			}
			q.Flags |= 1 << i
		}
	case q.icmp():
		kind, code, _ := strings.Cut(p.word(), "/")
		q.Type, q.Code = uint8(p.part(kind)), uint8(p.part(code))
		if p.peek("ident") {
			q.Ident = uint16(p.number())
		}
	}
	if p.peek("about") {
		a := &Quote{Proto: uint8(p.protocol())}
		quoted := a.packet()
		a.Src, a.SrcPort = p.endpoint(quoted.ports())
		if !p.peek(">") {
			p.fail("want >")
		}
		a.Dst, a.DstPort = p.endpoint(quoted.ports())
		if p.peek("quoting") {
			a.Ident = uint16(p.number())
		}
		q.About = a
	}
	if p.peek("direct") {
		q.Direct = vpc.ENIID(p.word())
	}
	if p.peek("fragments") {
		q.Fragments = p.number()
	}
	q.Orphan = p.peek("orphan")
	if p.peek("length") {
		q.Length = p.number()
	}
	q.MayFragment = p.peek("nodf")
	return s
}
