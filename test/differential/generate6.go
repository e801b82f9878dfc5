package differential

import (
	"net/netip"
	"slices"

	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/test/vpcmodel"
)

// outside6 are destinations of IPv6 that no VPC has.
var outside6 = []netip.Prefix{prefix("2001:db8:ffff:1::/64"), prefix("2001:db8:ffff:1::/65"), prefix("2001:db8:ffff::/48"), prefix("::/0")}

// hosts6 are addresses of these.
var hosts6 = []netip.Addr{
	netip.MustParseAddr("2001:db8:ffff:1::9"), netip.MustParseAddr("2001:db8:ffff:1:8000::9"), netip.MustParseAddr("2001:db8:ffff:2::9"), netip.MustParseAddr("3fff::9"),
}

func outsideOf(six bool) []netip.Prefix {
	if six {
		return outside6
	}
	return outside
}

// six is true for what is to be of IPv6, in a world that has it: more than half, as
// the other worlds have IPv4 alone.
func (g *generator) six() bool { return g.dual && g.chance(0.7) }

// blocks are the CIDR blocks of the v-th VPC. No two have the same of IPv6.
func (g *generator) blocks(v, n int) []netip.Prefix {
	blocks := []netip.Prefix{prefix("10.%d.0.0/16", n)}
	if g.dual {
		blocks = append(blocks, prefix("2001:db8:%x::/56", v))
	}
	return blocks
}

func (g *generator) subnet6(v, s int) netip.Prefix {
	if !g.dual {
		return netip.Prefix{}
	}
	return prefix("2001:db8:%x:%x::/64", v, s)
}

// others6 are the IPv6 addresses and prefixes of the e-th interface of a subnet.
func (g *generator) others6(v, s, e int) []netip.Prefix {
	out := []netip.Prefix{prefix("2001:db8:%x:%x::%x0/128", v, s, e)}
	if g.chance(0.4) {
		out = append(out, prefix("2001:db8:%x:%x::%x1/128", v, s, e))
	}
	if g.chance(0.5) {
		out = append(out, prefix("2001:db8:%x:%x:%x::/80", v, s, e))
	}
	return out
}

// assigned6 is an address or a prefix that an interface may be given.
func (g *generator) assigned6(e *vpcmodel.ENI) netip.Prefix {
	a := g.world.Subnets[e.Subnet].CIDR6.Addr().As16()
	if g.chance(0.4) {
		a[9] = byte(9 + g.IntN(3))
		return netip.PrefixFrom(netip.AddrFrom16(a), 80)
	}
	a[14], a[15] = 1, byte(g.IntN(8))
	return netip.PrefixFrom(netip.AddrFrom16(a), 128)
}

// everyone are the blocks that mean everybody.
func (g *generator) everyone() []netip.Prefix {
	if g.dual {
		return []netip.Prefix{prefix("0.0.0.0/0"), prefix("::/0")}
	}
	return []netip.Prefix{prefix("0.0.0.0/0")}
}

// lists are the prefix lists of the world; p3 is of IPv6.
func (g *generator) lists() []vpcmodel.ListID {
	if g.dual {
		return []vpcmodel.ListID{"p1", "p2", "p3"}
	}
	return []vpcmodel.ListID{"p1", "p2"}
}

// cidr6 is cidr for IPv6. Some blocks end within the interface's part of the
// address.
func (g *generator) cidr6(e *vpcmodel.ENI) netip.Prefix {
	switch g.IntN(8) {
	case 0, 1:
		return prefix("::/0")
	case 2:
		return g.world.VPCs[g.world.Subnets[e.Subnet].VPC].CIDRs[1]
	case 3, 4:
		return g.world.Subnets[e.Subnet].CIDR6
	case 5, 6:
		return netip.PrefixFrom(g.address6(e), pick(g, []int{80, 96, 122, 124})).Masked()
	default:
		return netip.PrefixFrom(g.address6(e), 128)
	}
}

func (g *generator) addressOf(e *vpcmodel.ENI, six bool) netip.Addr {
	if six {
		return g.address6(e)
	}
	return g.address(e)
}

// address6 is one of an ENI's addresses of IPv6; of one that has none, an address
// of its subnet that is nobody's.
func (g *generator) address6(e *vpcmodel.ENI) netip.Addr {
	others := slices.DeleteFunc(slices.Clone(e.Others), func(p netip.Prefix) bool { return p.Addr().Is4() })
	if len(others) == 0 {
		return g.nobody6(e.Subnet)
	}
	c := pick(g, others)
	if c.IsSingleIP() {
		return c.Addr()
	}
	a := c.Addr().As16()
	a[10], a[15] = byte(0x80*g.IntN(2)), byte(g.IntN(4))
	return netip.AddrFrom16(a)
}

// nobody6 is an address of a subnet that nobody has.
func (g *generator) nobody6(s vpc.SubnetID) netip.Addr {
	a := g.world.Subnets[s].CIDR6.Addr().As16()
	a[14], a[15] = 2, byte(g.IntN(4))
	return netip.AddrFrom16(a)
}

// destination6 is an address of IPv6 that a packet of an ENI of v may be for.
func (g *generator) destination6(from *vpcmodel.ENI, v vpc.VPCID) netip.Addr {
	switch n := g.IntN(40); {
	case n < 26:
		return g.otherAddress(from, v, true)
	case n < 32:
		return g.otherAddress(from, pick(g, g.vpcs), true)
	case n < 37:
		return pick(g, hosts6)
	case n < 38:
		return pick(g, []netip.Addr{netip.MustParseAddr("fd00:ec2::9"), netip.MustParseAddr("fe80::9"), netip.MustParseAddr("ff02::fb")})
	default:
		return g.nobody6(pick(g, g.subnets(pick(g, []vpc.VPCID{v, pick(g, g.vpcs)}))))
	}
}

// discovery makes a packet neighbour discovery: most often a solicitation, to
// where a packet for the address would go, or to all whom it may concern.
func (g *generator) discovery(p *vpcmodel.Packet) {
	*p = vpcmodel.Packet{From: p.From, Src: p.Src, Dst: p.Dst, Proto: packet.ProtoICMPv6, Type: pick(g, []uint8{133, 134, 135, 135, 135, 136, 137})}
	switch n := g.IntN(4); {
	case n == 0 && p.Type == 135:
		a, group := p.Dst.As16(), netip.MustParseAddr("ff02::1:ff00:0").As16()
		copy(group[13:], a[13:])
		p.Dst = netip.AddrFrom16(group)
	case n == 1:
		p.Dst = netip.MustParseAddr("ff02::1")
	}
}

func isICMP(proto uint8) bool { return proto == packet.ProtoICMP || proto == packet.ProtoICMPv6 }
