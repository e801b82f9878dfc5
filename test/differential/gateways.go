package differential

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/test/vpcmodel"
)

// hosts are addresses of the internet, which is everywhere outside of VPCs. None is
// of the block that Elastic IPs are from.
var hosts = []netip.Addr{netip.MustParseAddr("203.0.113.9"), netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("192.0.2.200"), netip.MustParseAddr("198.18.99.9")}

// privates are addresses that no internet gateway carries, and no VPC has.
var privates = []netip.Addr{netip.MustParseAddr("192.168.7.7"), netip.MustParseAddr("172.20.7.7"), netip.MustParseAddr("100.64.7.7"), netip.MustParseAddr("10.200.7.7")}

// buildGateways gives a VPC an internet gateway, Elastic IPs, a NAT gateway in its
// second subnet, and a table for the gateway.
func (g *generator) buildGateways(i, n int, v vpc.VPCID) {
	w := vpcmodel.GatewayID(fmt.Sprintf("w%d", i))
	g.do(vpcmodel.MakeGateway{ID: w, VPC: v})
	for k := range 4 {
		g.do(vpcmodel.MakeElastic{ID: vpcmodel.ElasticID(fmt.Sprintf("p%d%d", i, k)), Public: netip.AddrFrom4([4]byte{198, 18, byte(i), byte(k + 1)})})
	}
	if g.features.NAT {
		g.nats++
		g.do(vpcmodel.MakeNAT{ID: vpcmodel.NATID(fmt.Sprintf("n%d", g.nats)), Subnet: vpc.SubnetID(fmt.Sprintf("s%d2", i)),
			Private: netip.AddrFrom4([4]byte{10, byte(n), 2, 240}), Public: vpcmodel.ElasticID(fmt.Sprintf("p%d0", i))})
	}
	for range 3 {
		g.associate()
	}
	edge := vpcmodel.TableID(fmt.Sprintf("edge%d", i))
	g.do(vpcmodel.MakeTable{ID: edge, VPC: v})
	g.do(vpcmodel.AddRoute{Table: edge, Route: vpcmodel.Route{CIDR: g.world.Subnets[pick(g, g.subnets(v))].CIDR, ENI: pick(g, g.enis(v))}})
	if g.chance(0.4) {
		g.do(vpcmodel.SetEdge{Gateway: w, Table: edge})
	}
}

// leadOut gives the subnets of a VPC routes by its gateways: the first by the NAT
// gateway, most of the time, the second by the internet gateway.
func (g *generator) leadOut(i int, v vpc.VPCID) {
	for n := range 2 {
		table := vpcmodel.TableID(fmt.Sprintf("out%d%d", i, n+1))
		g.do(vpcmodel.MakeTable{ID: table, VPC: v})
		r := vpcmodel.Route{CIDR: prefix("0.0.0.0/0"), Gateway: vpcmodel.GatewayID(fmt.Sprintf("w%d", i))}
		if nat := g.natOf(v); n == 0 && nat != "" && g.chance(0.7) {
			r.Gateway, r.NAT = "", nat
		}
		g.do(vpcmodel.AddRoute{Table: table, Route: r})
		g.do(vpcmodel.SetTable{Subnet: vpc.SubnetID(fmt.Sprintf("s%d%d", i, n+1)), Table: table})
	}
}

func (g *generator) gatewayOf(v vpc.VPCID) vpcmodel.GatewayID {
	for id, w := range g.world.Gateways {
		if w.VPC == v {
			return id
		}
	}
	return ""
}

func (g *generator) natOf(v vpc.VPCID) vpcmodel.NATID {
	for _, id := range sortedKeys(g.world.NATs) {
		if n := g.world.NATs[id]; !n.Deleted && g.world.Subnets[n.Subnet].VPC == v {
			return id
		}
	}
	return ""
}

// associate gives an address of an interface a public one.
func (g *generator) associate() bool {
	e := g.world.ENIs[pick(g, g.enis(""))]
	return g.do(vpcmodel.Associate{ID: pick(g, sortedKeys(g.world.Elastics)), ENI: e.ID, Private: g.address(e)})
}

// gatewayChange makes a change that gateways are concerned with.
func (g *generator) gatewayChange() bool {
	id := pick(g, sortedKeys(g.world.Gateways))
	w := g.world.Gateways[id]
	switch n := g.IntN(10); {
	case n < 3:
		return g.associate()
	case n < 5:
		return g.do(vpcmodel.Disassociate{ID: pick(g, sortedKeys(g.world.Elastics))})
	case n < 8:
		if w.VPC == "" {
			return false
		}
		if w.Table != "" {
			return g.do(vpcmodel.SetEdge{Gateway: id})
		}
		return g.do(vpcmodel.SetEdge{Gateway: id, Table: vpcmodel.TableID("edge" + string(id)[1:])})
	case n < 9:
		if w.VPC == "" {
			return g.do(vpcmodel.AttachGateway{ID: id, VPC: vpc.VPCID("v" + string(id)[1:])})
		}
		if w.Table != "" {
			return false
		}
		// It goes when nothing of its VPC has a public address.
		for _, p := range sortedKeys(g.world.Elastics) {
			if e := g.world.ENIs[g.world.Elastics[p].ENI]; e != nil && g.world.Subnets[e.Subnet].VPC == w.VPC {
				g.do(vpcmodel.Disassociate{ID: p})
			}
		}
		return g.do(vpcmodel.DetachGateway{ID: id})
	default:
		if g.nats < 4 && g.features.NAT {
			return g.renewNAT(w.VPC)
		}
		return false
	}
}

// renewNAT deletes a NAT gateway, or makes one where there is none and leads a
// table to it.
func (g *generator) renewNAT(v vpc.VPCID) bool {
	if v == "" {
		return false
	}
	if id := g.natOf(v); id != "" {
		return g.do(vpcmodel.DeleteNAT{ID: id})
	}
	s := g.subnets(v)[1]
	a := g.world.Subnets[s].CIDR.Addr().As4()
	a[3] = byte(240 + g.nats)
	g.nats++
	id := vpcmodel.NATID(fmt.Sprintf("n%d", g.nats))
	for _, p := range sortedKeys(g.world.Elastics) {
		if g.do(vpcmodel.MakeNAT{ID: id, Subnet: s, Private: netip.AddrFrom4(a), Public: p}) {
			table := vpcmodel.TableID(fmt.Sprintf("out%s1", string(v)[1:]))
			g.do(vpcmodel.DeleteRoute{Table: table, Route: vpcmodel.Route{CIDR: prefix("0.0.0.0/0")}})
			g.do(vpcmodel.AddRoute{Table: table, Route: vpcmodel.Route{CIDR: prefix("0.0.0.0/0"), NAT: id}})
			return true
		}
	}
	return false
}

// fromInternet is a packet from outside to a public address.
func (g *generator) fromInternet() *vpcmodel.Packet {
	p := &vpcmodel.Packet{From: vpcmodel.Internet, Src: pick(g, hosts), Dst: g.world.Elastics[pick(g, sortedKeys(g.world.Elastics))].Public}
	if g.chance(0.05) {
		p.Src = pick(g, privates)
	}
	g.transport(p)
	return p
}

// bypassed reports whether a packet for a NAT gateway was led elsewhere by the
// internet gateway's table. Its port is the gateway's choice: nothing follows on it.
func (g *generator) bypassed(p *vpcmodel.Packet, v vpcmodel.Verdict) bool {
	if p.From != vpcmodel.Internet || v.NAT != "" {
		return false
	}
	for _, e := range g.world.Elastics {
		if e.Public == p.Dst && e.NAT != "" {
			return true
		}
	}
	return false
}

// tidy takes away from a packet what a gateway's translation is not compared in.
func (g *generator) tidy(p *vpcmodel.Packet) *vpcmodel.Packet {
	if len(g.world.Gateways) == 0 {
		return p
	}
	v := g.world.Peek(p)
	if v.Seen == nil && v.NAT == "" && !strings.HasPrefix(v.Rule, "nat ") {
		if v.Told > 0 {
			p.Fragments, p.Orphan = 0, false
		}
		return p
	}
	p.Fragments, p.Orphan = 0, false
	if v.NAT != "" || strings.HasPrefix(v.Rule, "nat ") {
		// The gateway's connection tracking has states of its own.
		if p.Proto == packet.ProtoTCP {
			p.Flags = vpcmodel.SYN
			if p.From == vpcmodel.Internet {
				p.Flags |= vpcmodel.ACK
			}
		}
		if p.Proto == packet.ProtoICMP && p.About == nil {
			p.Code = 0 // an answer has the code of its query, for some
		}
		// Nobody but the gateway speaks for it.
		if e := g.world.ENIs[p.From]; e != nil && !holds(e, p.Src) {
			p.Src = e.Primary
		}
		if p.About != nil || p.Length > vpcmodel.GatewayMTU && p.Length <= vpcmodel.NATMTU || p.MayFragment {
			p.About, p.Length, p.MayFragment = nil, 0, false
			if p.Proto == packet.ProtoICMP {
				p.Type, p.Code, p.Ident = 8, 0, uint16(1+g.IntN(4))
			}
		}
	}
	return p
}

// stretch makes a packet to the outside as long as an MTU, or longer.
func (g *generator) stretch(p *vpcmodel.Packet) {
	if len(g.world.Gateways) == 0 || p.Fragments > 0 || p.Orphan || p.About != nil || p.From == vpcmodel.Internet ||
		!slices.Contains(hosts, p.Dst) || !g.chance(0.5) {
		return
	}
	p.Length = pick(g, []int{1400, 1499, 1500, 1501, 1502, 3000, 8500, 8501, 8501, 9001, 9001})
	p.MayFragment = g.chance(0.3) && p.Proto == packet.ProtoUDP
	// Whether the sender of what is dropped anyway is told, no fact says.
	short := *p
	short.Length = 0
	if !g.world.Peek(&short).Delivered() {
		p.Length, p.MayFragment = 0, false
	}
}
