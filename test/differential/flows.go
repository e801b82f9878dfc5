package differential

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/test/vpcmodel"
)

// candidates are how many packets are made up for each that is sent.
const candidates = 12

// send appends a packet: of several, mostly the one whose verdict is by the rules
// that were tried least.
func (g *generator) send() {
	best := g.candidate()
	if n := len(g.queue); n > 0 {
		best, g.queue = &g.queue[n-1], g.queue[:n-1]
	} else if g.chance(0.8) {
		score := g.score(best)
		for range candidates {
			if p := g.candidate(); g.score(p) > score {
				best, score = p, g.score(p)
			}
		}
	}
	g.next++
	best.ID = g.next
	s := vpcmodel.Send{Packet: *best}
	v, err := s.Judge(g.world)
	if err != nil {
		panic(err) // candidates are of interfaces that are there
	}
	g.script = append(g.script, s)
	g.counts.Add(v)
	if v.Delivered() && !g.bypassed(best, v) {
		seen := *best
		if v.Seen != nil {
			seen = *v.Seen
		}
		g.past = append(g.past, passed{seen, *best, v.To})
		if len(g.past) > 30 {
			g.past = g.past[1:]
		}
	}
}

// score is high for what was tried seldom.
func (g *generator) score(p *vpcmodel.Packet) float64 {
	v := g.world.Peek(p)
	c := Counts{}
	c.Add(v)
	score := 0.0
	for _, kind := range slices.Sorted(maps.Keys(c)) { // sums of floats depend on the order
		verdicts, n := g.wanted[kind], c[kind]
		if n.Pass > 0 && strings.Contains(verdicts, "+") {
			score += 1 / float64(1+g.counts[kind].Pass)
		}
		if n.Drop > 0 && strings.Contains(verdicts, "-") {
			score += 1 / float64(1+g.counts[kind].Drop)
		}
	}
	return score
}

// candidate makes a packet up: half of the time one that has to do with a packet
// before.
func (g *generator) candidate() *vpcmodel.Packet {
	var p *vpcmodel.Packet
	if len(g.past) > 0 && g.chance(0.5) {
		p = g.followUp()
	}
	if p == nil && len(g.world.Gateways) > 0 && g.chance(0.3) {
		p = g.fromInternet()
	}
	if p == nil && g.chance(0.6) {
		p = g.aimed()
	}
	if p == nil {
		p = g.newFlow()
	}
	g.stretch(p)
	return g.tidy(p)
}

// newFlow is the first packet of a flow.
func (g *generator) newFlow() *vpcmodel.Packet {
	from := g.world.ENIs[pick(g, g.enis(""))]
	six := g.six()
	p := &vpcmodel.Packet{From: from.ID, Src: g.addressOf(from, six), Dst: g.destination(from, six)}
	if g.chance(0.06) {
		p.Src = g.destination(from, six) // spoofed, or forwarded when the check is off
	}
	g.transport(p)
	if isService(g.world.Peek(p)) {
		g.ask(p)
		return p
	}
	if six && g.chance(0.05) {
		g.discovery(p)
		return p
	}
	if g.chance(0.05) && !p.Dst.IsMulticast() {
		p.Direct = pick(g, g.enis(g.world.Subnets[from.Subnet].VPC))
		if p.Direct == from.ID {
			p.Direct = ""
		}
	}
	return p
}

// ask makes a packet one that a service takes: whole, of TCP or UDP.
func (g *generator) ask(p *vpcmodel.Packet) {
	*p = vpcmodel.Packet{From: p.From, Src: p.Src, Dst: p.Dst, Proto: packet.ProtoUDP, SrcPort: uint16(40000 + g.IntN(4)), DstPort: 53}
	if g.chance(0.5) {
		p.Proto, p.Flags, p.DstPort = packet.ProtoTCP, vpcmodel.SYN, 80
	}
}

// aimed is a packet for which a certain rule of a group or entry of an ACL is made,
// or which misses it by little.
func (g *generator) aimed() *vpcmodel.Packet {
	e := g.world.ENIs[pick(g, g.enis(""))]
	v := g.world.Subnets[e.Subnet].VPC
	d := vpcmodel.Direction(g.chance(0.5))
	var m vpcmodel.Match
	var far []netip.Prefix // where the other end is
	six := g.six()
	acl := g.world.Subnets[e.Subnet].ACL
	switch {
	case acl != "" && g.chance(0.5):
		if len(g.world.ACLs[acl].Entries[d]) == 0 {
			return nil
		}
		entry := pick(g, g.world.ACLs[acl].Entries[d])
		m, far, six = entry.Match, []netip.Prefix{entry.CIDR}, entry.CIDR.Addr().Is6()
	default:
		x := g.world.Groups[pick(g, e.Groups)]
		if x == nil || len(x.Rules[d]) == 0 || g.open[v] == x.ID {
			return nil
		}
		r := pick(g, x.Rules[d])
		m = r.Match
		switch {
		case r.List != "":
			far = g.world.Lists[r.List]
			six = far[0].Addr().Is6()
		case r.Group != "":
			for _, id := range g.enis("") {
				if o := g.world.ENIs[id]; slices.Contains(o.Groups, r.Group) {
					far = append(append(far, netip.PrefixFrom(o.Primary, 32)), o.Others...)
				}
			}
			if m.Proto == int(packet.ProtoICMP) || m.Proto == int(packet.ProtoICMPv6) {
				six = g.dual && (m.Proto == int(packet.ProtoICMPv6)) != g.chance(0.1)
			}
		default:
			far, six = []netip.Prefix{r.CIDR}, r.CIDR.Addr().Is6()
		}
	}
	other := g.within(e, far)
	if other == nil {
		return nil
	}
	from, to := e, other
	if d == vpcmodel.In {
		from, to = other, e
	}
	p := &vpcmodel.Packet{From: from.ID, Src: g.inside(from, far, six), Dst: g.inside(to, far, six)}
	if forwards := g.middlebox(v); forwards != nil && forwards != to && g.chance(0.6) {
		p.From = forwards.ID // it may send what is another's
	}
	g.matching(p, m)
	return p
}

// middlebox is an ENI of a VPC with the check off, or nil.
func (g *generator) middlebox(v vpc.VPCID) *vpcmodel.ENI {
	var all []vpc.ENIID
	for _, id := range g.enis(v) {
		if g.world.ENIs[id].NoCheck {
			all = append(all, id)
		}
	}
	if len(all) == 0 {
		return nil
	}
	return g.world.ENIs[pick(g, all)]
}

// within finds an ENI other than e that has an address in one of the blocks, or
// else any.
func (g *generator) within(e *vpcmodel.ENI, blocks []netip.Prefix) *vpcmodel.ENI {
	var all, fit []vpc.ENIID
	for _, id := range g.enis("") {
		o := g.world.ENIs[id]
		a, b := g.world.Subnets[o.Subnet].VPC, g.world.Subnets[e.Subnet].VPC
		if o == e || a != b && (a == "v3" || b == "v3") {
			continue
		}
		all = append(all, id)
		if slices.ContainsFunc(blocks, func(c netip.Prefix) bool { return c.Contains(o.Primary) || slices.ContainsFunc(o.Others, c.Overlaps) }) {
			fit = append(fit, id)
		}
	}
	switch {
	case len(fit) > 0 && g.chance(0.8):
		return g.world.ENIs[pick(g, fit)]
	case len(all) > 0:
		return g.world.ENIs[pick(g, all)]
	}
	return nil
}

// inside is an address of an ENI, in one of the blocks if a few tries find one.
func (g *generator) inside(e *vpcmodel.ENI, blocks []netip.Prefix, six bool) netip.Addr {
	a := g.addressOf(e, six)
	for range 5 {
		if slices.ContainsFunc(blocks, func(c netip.Prefix) bool { return c.Contains(a) }) {
			break
		}
		a = g.addressOf(e, six)
	}
	return a
}

// matching gives a packet a protocol and ports that m is about, or nearly.
func (g *generator) matching(p *vpcmodel.Packet, m vpcmodel.Match) {
	if m.Proto == -1 || g.chance(0.1) {
		g.transport(p)
		return
	}
	p.Proto = uint8(m.Proto)
	if p.Src.Is6() && m.Proto == int(packet.ProtoICMP) {
		p.Proto = packet.ProtoICMPv6
	} else if p.Src.Is4() && m.Proto == int(packet.ProtoICMPv6) {
		p.Proto = packet.ProtoICMP
	}
	switch p.Proto {
	case packet.ProtoTCP, packet.ProtoUDP:
		if p.Proto == packet.ProtoTCP {
			p.Flags = vpcmodel.SYN
		}
		p.SrcPort = uint16(40000 + g.IntN(4))
		p.DstPort = uint16(pick(g, []int{m.From, m.To, m.From + g.IntN(m.To-m.From+1), max(0, m.From-1), min(65535, m.To+1)}))
	case packet.ProtoICMP:
		p.Type, p.Ident = 8, uint16(1+g.IntN(4))
		if m.From == 13 || g.chance(0.3) {
			p.Type = 13
		}
		p.Code = uint8(max(0, m.To))
		if g.chance(0.2) {
			p.Code = 1 - min(1, p.Code)
		}
	case packet.ProtoICMPv6:
		p.Type, p.Ident = 128, uint16(1+g.IntN(4))
		if m.From == 144 || g.chance(0.2) {
			p.Type = 144
		}
		p.Code = uint8(max(0, m.To))
		if g.chance(0.2) {
			p.Code = 1 - min(1, p.Code)
		}
	default:
		if g.chance(0.3) {
			p.Proto = uint8(pick(g, others))
		}
	}
}

// destination is an address that a packet of an ENI may be for.
func (g *generator) destination(from *vpcmodel.ENI, six bool) netip.Addr {
	v := g.world.Subnets[from.Subnet].VPC
	if six {
		return g.destination6(from, v)
	}
	if g.gatewayOf(v) != "" && g.chance(0.3) {
		if g.chance(0.1) {
			return pick(g, privates)
		}
		return pick(g, hosts)
	}
	switch n := g.IntN(40); {
	case n < 26:
		return g.otherAddress(from, v, false)
	case n < 33:
		return g.otherAddress(from, pick(g, g.vpcs), false)
	case n < 37:
		return pick(g, hosts)
	case n < 38:
		if g.features.Exempt && g.chance(0.5) {
			dns := g.world.VPCs[v].CIDRs[0].Addr().Next().Next()
			return pick(g, []netip.Addr{dns, netip.MustParseAddr("169.254.169.253"), netip.MustParseAddr("169.254.169.254")})
		}
		return netip.MustParseAddr("169.254.168.9")
	default: // an address that perhaps nobody has
		a := g.world.Subnets[pick(g, g.subnets(pick(g, []vpc.VPCID{v, pick(g, g.vpcs)})))].CIDR.Addr().As4()
		a[3] = byte(200 + g.IntN(50))
		return netip.AddrFrom4(a)
	}
}

// otherAddress is the address of an ENI other than from, if there is one.
func (g *generator) otherAddress(from *vpcmodel.ENI, v vpc.VPCID, six bool) netip.Addr {
	for range 4 {
		if e := g.world.ENIs[pick(g, g.enis(v))]; e != from {
			return g.addressOf(e, six)
		}
	}
	return g.addressOf(from, six)
}

// transport fills in protocol and ports.
func (g *generator) transport(p *vpcmodel.Packet) {
	switch n := g.IntN(20); {
	case n < 8:
		p.Proto, p.Flags = packet.ProtoTCP, vpcmodel.SYN
	case n < 14:
		p.Proto = packet.ProtoUDP
		if g.features.Fragments && g.chance(0.15) {
			p.Fragments = 2 + g.IntN(3)
		} else if g.features.Fragments && g.chance(0.05) {
			p.Orphan = true
		}
	case n < 17:
		p.Proto, p.Type, p.Ident = packet.ProtoICMP, 8, uint16(1+g.IntN(4))
		if g.chance(0.3) {
			p.Type, p.Code = 13, uint8(g.IntN(2))
		}
		if p.Src.Is6() {
			p.Proto, p.Type = packet.ProtoICMPv6, map[uint8]uint8{8: 128, 13: 144}[p.Type]
		}
	default:
		p.Proto = uint8(pick(g, others))
	}
	if p.Proto == packet.ProtoTCP || p.Proto == packet.ProtoUDP {
		p.SrcPort = uint16(40000 + g.IntN(4))
		p.DstPort = uint16(pick(g, ports))
		if g.chance(0.15) {
			p.DstPort = uint16(pick(g, []int{21, 23, 79, 81, 442, 444, 8081, 0, 65535}))
		}
	}
}

// followUp is a packet that continues, answers, forwards or is about one before.
func (g *generator) followUp() *vpcmodel.Packet {
	last := g.past[len(g.past)-1-g.IntN(min(len(g.past), 1+g.IntN(len(g.past))))]
	if last.to == vpcmodel.Internet || last.sent.From == vpcmodel.Internet {
		return g.followOutside(last)
	}
	p, to := last.packet, g.world.ENIs[last.to]
	if to == nil || !to.Attached {
		return nil
	}
	p.Direct, p.Length = "", 0
	mine := p.Dst == to.Primary || holds(to, p.Dst)
	switch n := g.IntN(20); {
	case !mine && n < 12:
		// A middlebox sends on what is not for it.
		p.From = to.ID
		return &p
	case n < 5:
		if p.Proto == packet.ProtoTCP {
			p.Flags = pick(g, []uint8{vpcmodel.ACK, vpcmodel.ACK, vpcmodel.PSH | vpcmodel.ACK, vpcmodel.FIN | vpcmodel.ACK, vpcmodel.RST, vpcmodel.SYN})
		}
		return &p
	case n < 7 && mine && p.About == nil && !isICMP(p.Proto) || n < 6 && p.About == nil && (p.Type == 8 || p.Type == 128):
		q := &vpcmodel.Packet{From: to.ID, Src: p.Dst, Dst: p.Src, Proto: packet.ProtoICMP, Type: 3, Code: uint8(pick(g, []int{1, 3, 4})),
			About: &vpcmodel.Quote{Src: p.Src, Dst: p.Dst, Proto: p.Proto, SrcPort: p.SrcPort, DstPort: p.DstPort, Ident: p.Ident}}
		if p.Src.Is6() {
			q.Proto, q.Type, q.Code = packet.ProtoICMPv6, pick(g, []uint8{1, 2, 3}), 0
			if q.Type == 1 {
				q.Code = uint8(g.IntN(5))
			}
		}
		if g.chance(0.3) && q.About.SrcPort > 0 {
			q.About.SrcPort++ // about a packet that was never sent
		}
		return q
	case mine:
		return g.answer(p, to.ID)
	}
	return nil
}

// followOutside is followUp for a packet from or to the internet.
func (g *generator) followOutside(last passed) *vpcmodel.Packet {
	p, to := last.packet, g.world.ENIs[last.to]
	switch n := g.IntN(10); {
	case n < 3:
		again := last.sent
		again.Length, again.MayFragment = 0, false
		if e := g.world.ENIs[again.From]; e != nil && !e.Attached {
			return nil
		}
		if again.Proto == packet.ProtoTCP {
			again.Flags = pick(g, []uint8{vpcmodel.ACK, vpcmodel.ACK, vpcmodel.PSH | vpcmodel.ACK, vpcmodel.FIN | vpcmodel.ACK, vpcmodel.SYN})
		}
		return &again
	case to != nil && !to.Attached:
		return nil
	case to != nil && p.Dst != to.Primary && !holds(to, p.Dst):
		p.From = to.ID // a middlebox
		return &p
	case n < 4 && p.About == nil && p.Proto != packet.ProtoICMP && last.sent.From == vpcmodel.Internet:
		return &vpcmodel.Packet{From: last.to, Src: p.Dst, Dst: p.Src, Proto: packet.ProtoICMP, Type: 3, Code: uint8(pick(g, []int{1, 3, 4})),
			About: &vpcmodel.Quote{Src: p.Src, Dst: p.Dst, Proto: p.Proto, SrcPort: p.SrcPort, DstPort: p.DstPort, Ident: p.Ident}}
	}
	return g.answer(p, last.to)
}

func holds(e *vpcmodel.ENI, a netip.Addr) bool {
	for _, c := range e.Others {
		if c.Contains(a) {
			return true
		}
	}
	return false
}

func (g *generator) answer(p vpcmodel.Packet, to vpc.ENIID) *vpcmodel.Packet {
	if p.About != nil {
		return nil
	}
	r := &vpcmodel.Packet{From: to, Src: p.Dst, Dst: p.Src, Proto: p.Proto, SrcPort: p.DstPort, DstPort: p.SrcPort, Ident: p.Ident}
	switch p.Proto {
	case packet.ProtoTCP:
		r.Flags = pick(g, []uint8{vpcmodel.SYN | vpcmodel.ACK, vpcmodel.SYN | vpcmodel.ACK, vpcmodel.ACK, vpcmodel.FIN | vpcmodel.ACK, vpcmodel.RST | vpcmodel.ACK})
	case packet.ProtoICMP:
		switch p.Type {
		case 8:
			r.Type = 0
		case 13:
			r.Type = 14
		default:
			return nil
		}
		if g.chance(0.2) {
			r.Ident++
		}
	case packet.ProtoICMPv6:
		if p.Type != 128 {
			return nil
		}
		r.Type = 129
		if g.chance(0.2) {
			r.Ident++
		}
	}
	return r
}
