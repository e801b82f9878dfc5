package differential

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"

	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/test/vpcmodel"
)

// generator makes one script up. It runs the model as it goes: what is worth
// sending next depends on what became of the packets before.
type generator struct {
	*rand.Rand
	features Features
	script   vpcmodel.Script
	world    *vpcmodel.World

	emphasis emphasis
	dual     bool               // its VPCs have blocks of IPv6
	moves    bool               // interfaces move between instances
	second   map[vpc.ENIID]bool // those that may: each is not its instance's first
	vpcs     []vpc.VPCID
	nats     int               // NAT gateways that were made
	next     int               // ID of the next packet
	queue    []vpcmodel.Packet // to be sent next
	past     []passed          // the last packets that were delivered
	open     map[vpc.VPCID]vpc.SecurityGroupID
	counts   Counts
	wanted   map[string]string
}

// emphasis is what a world is about. Where all gates judge alike, few packets come
// as far as the last.
type emphasis int

const (
	onGroups emphasis = iota
	onACLs
	onRoutes
	onAll
	onGateways
)

// emphases are those of the worlds of consecutive seeds.
var emphases = []emphasis{onGroups, onACLs, onRoutes, onACLs, onGroups, onACLs, onAll, onGateways, onGateways}

// chanceOf are, by emphasis, the chances that an interface has groups of its own
// instead of one that allows all, that a subnet has an ACL, and a route table.
var chanceOf = [...]struct{ groups, acl, table float64 }{
	onGroups:   {0.97, 0.1, 0.15},
	onACLs:     {0.05, 0.7, 0.05},
	onRoutes:   {0.1, 0.1, 0.9},
	onAll:      {0.6, 0.4, 0.4},
	onGateways: {0.3, 0.3, 0.1},
}

// passed is a packet that was delivered, and to whom.
type passed struct {
	packet vpcmodel.Packet // as the receiver saw it
	sent   vpcmodel.Packet
	to     vpc.ENIID
}

// Generate makes up a world and the packets that are sent in it, at least flows.
func Generate(seed uint64, features Features, flows int) vpcmodel.Script {
	g := &generator{
		Rand: rand.New(rand.NewPCG(seed, 1)), features: features,
		world: vpcmodel.NewWorld(vpcmodel.Defaults()), open: map[vpc.VPCID]vpc.SecurityGroupID{},
		counts: Counts{}, wanted: wanted(features), second: map[vpc.ENIID]bool{},
	}
	g.emphasis, g.dual = emphases[seed%uint64(len(emphases))], features.dual(seed)
	g.build()
	for g.next < flows {
		for range 1 + g.IntN(3) {
			g.change()
		}
		for range 15 + g.IntN(25) {
			g.send()
		}
	}
	return g.script
}

// do appends a statement, unless the world has no place for it.
func (g *generator) do(st vpcmodel.Statement) bool {
	if st.Apply(g.world) != nil {
		return false
	}
	g.script = append(g.script, st)
	return true
}

// chance is true with probability p.
func (g *generator) chance(p float64) bool { return g.Float64() < p }

func pick[T any](g *generator, items []T) T { return items[g.IntN(len(items))] }

func prefix(format string, args ...any) netip.Prefix {
	return netip.MustParsePrefix(fmt.Sprintf(format, args...))
}

// outside are destinations that no VPC has, for routes to middleboxes.
var outside = []netip.Prefix{prefix("203.0.113.0/24"), prefix("192.0.2.0/25"), prefix("192.0.2.0/24"), prefix("0.0.0.0/0")}

// build makes the objects. Two VPCs can be peered, a third has the addresses of
// the first.
func (g *generator) build() {
	nets := []int{0, 1, 0}[:2+g.IntN(2)]
	for i, n := range nets {
		id := vpc.VPCID(fmt.Sprintf("v%d", i+1))
		g.vpcs = append(g.vpcs, id)
		g.do(vpcmodel.MakeVPC{VPC: vpcmodel.VPC{ID: id, CIDRs: g.blocks(i+1, n)}})
		open := vpc.SecurityGroupID(fmt.Sprintf("open%d", i+1))
		g.open[id] = open
		g.do(vpcmodel.MakeGroup{As: "group", ID: open, VPC: id})
		for _, d := range []vpcmodel.Direction{vpcmodel.In, vpcmodel.Out} {
			for _, c := range g.everyone() {
				g.do(vpcmodel.Allow{Group: open, Dir: d, Rule: vpcmodel.Rule{Match: vpcmodel.Match{Proto: -1, From: -1, To: -1}, CIDR: c}})
			}
		}
		for s := range 2 {
			subnet := vpc.SubnetID(fmt.Sprintf("s%d%d", i+1, s+1))
			g.do(vpcmodel.MakeSubnet{Subnet: vpcmodel.Subnet{ID: subnet, VPC: id, CIDR: prefix("10.%d.%d.0/24", n, s+1), CIDR6: g.subnet6(i+1, s+1)}})
			for e := range 2 - i/2 {
				g.makeENI(i+1, n, s+1, e+1, subnet)
			}
		}
	}
	if g.features.Peerings {
		g.do(vpcmodel.MakePeering{ID: "x1", A: "v1", B: "v2"})
	}
	if g.features.Lists {
		for _, id := range g.lists() {
			g.setList(id)
		}
	}
	for i, v := range g.vpcs {
		if g.features.Groups {
			g.buildGroups(i+1, v)
		}
		if g.features.ACLs {
			g.buildACLs(i+1, v)
		}
	}
	if g.features.Groups {
		// Only now, so that references of both sides of the peering find their groups.
		for _, id := range g.groups("") {
			if g.chance(0.4) {
				g.openPort(id)
			}
			for _, d := range []vpcmodel.Direction{vpcmodel.In, vpcmodel.Out} {
				for range 1 + g.IntN(3) {
					g.allow(id, d)
				}
			}
		}
	}
	for i, v := range g.vpcs {
		if g.features.Tables {
			g.buildTables(i+1, v)
		}
	}
	if g.features.Internet && (g.emphasis == onGateways || g.emphasis == onAll) {
		for i, v := range g.vpcs[:2] {
			g.buildGateways(i+1, nets[i], v)
			g.leadOut(i+1, v)
		}
	}
	for _, e := range g.enis("") {
		g.setGroups(e)
		if g.chance(0.3) {
			g.do(vpcmodel.SetCheck{ENI: e})
		}
	}
}

func (g *generator) makeENI(v, n, s, e int, subnet vpc.SubnetID) {
	id := vpc.ENIID(fmt.Sprintf("e%d%d%d", v, s, e))
	m := vpcmodel.MakeENI{ID: id, Subnet: subnet, Instance: vpc.InstanceID("i" + string(id[1:])),
		Primary: netip.AddrFrom4([4]byte{10, byte(n), byte(s), byte(10 * e)})}
	if g.chance(0.5) {
		m.Others = append(m.Others, prefix("10.%d.%d.%d/32", n, s, 10*e+1))
	}
	if g.chance(0.4) {
		m.Others = append(m.Others, prefix("10.%d.%d.%d/28", n, s, 16*(e+4)))
	}
	if g.dual {
		m.Others = append(m.Others, g.others6(v, s, e)...)
	}
	if s == 2 && e == 2 && (g.chance(0.5) || g.moves) {
		// A second interface of the first subnet's instance.
		m.Instance = vpc.InstanceID(fmt.Sprintf("i%d11", v))
		g.second[id] = true
	}
	g.do(m)
}

// enis lists the attached ENIs of a VPC, or of all, in order.
func (g *generator) enis(v vpc.VPCID) (out []vpc.ENIID) {
	for id, e := range g.world.ENIs {
		if e.Attached && (v == "" || g.world.Subnets[e.Subnet].VPC == v) {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

// groups lists the groups of a VPC, or of all, without the open ones.
func (g *generator) groups(v vpc.VPCID) (out []vpc.SecurityGroupID) {
	for id, x := range g.world.Groups {
		if (v == "" || x.VPC == v) && g.open[x.VPC] != id {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

func (g *generator) buildGroups(i int, v vpc.VPCID) {
	for n := range 3 {
		g.do(vpcmodel.MakeGroup{As: "group", ID: vpc.SecurityGroupID(fmt.Sprintf("g%d%d", i, n+1)), VPC: v})
	}
}

func (g *generator) setGroups(e vpc.ENIID) {
	v := g.world.Subnets[g.world.ENIs[e].Subnet].VPC
	groups := []vpc.SecurityGroupID{g.open[v]}
	if all := g.groups(v); g.features.Groups && len(all) > 0 && g.chance(chanceOf[g.emphasis].groups) {
		g.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		groups = all[:1+g.IntN(min(2, len(all)))]
	}
	g.do(vpcmodel.SetGroups{ENI: e, Groups: groups})
}

// The ports that rules are about; packets are for these and their neighbours.
var ports = []int{22, 53, 80, 443, 8080}

// match is what a rule is about; six is the family of its ICMP.
func (g *generator) match(six bool) vpcmodel.Match {
	switch n := g.IntN(20); {
	case n < 3:
		return vpcmodel.Match{Proto: -1, From: -1, To: -1}
	case n < 8:
		return g.portMatch(int(packet.ProtoTCP))
	case n < 12:
		return g.portMatch(int(packet.ProtoUDP))
	case n < 16:
		m := vpcmodel.Match{Proto: int(packet.ProtoICMP), From: pick(g, []int{-1, 8, 8, 13, 3}), To: -1}
		if six {
			m = vpcmodel.Match{Proto: int(packet.ProtoICMPv6), From: pick(g, []int{-1, 128, 128, 144, 1}), To: -1}
		}
		if m.From >= 0 && g.chance(0.5) {
			m.To = g.IntN(2)
		}
		return m
	default:
		return vpcmodel.Match{Proto: pick(g, others), From: -1, To: -1}
	}
}

// others are protocols without ports that nothing else on the way looks into.
var others = []int{47, 50, 132}

func (g *generator) portMatch(proto int) vpcmodel.Match {
	switch g.IntN(6) {
	case 0:
		return vpcmodel.Match{Proto: proto, From: 0, To: 65535}
	case 1:
		return vpcmodel.Match{Proto: proto, From: 22, To: 80}
	case 2:
		return vpcmodel.Match{Proto: proto, From: 443, To: 8080}
	default:
		p := pick(g, ports)
		return vpcmodel.Match{Proto: proto, From: p, To: p}
	}
}

// cidr is a block that some addresses of the world are in, of IPv6 if six is set.
func (g *generator) cidr(six bool) netip.Prefix {
	e := g.world.ENIs[pick(g, g.enis(""))]
	if six {
		return g.cidr6(e)
	}
	switch g.IntN(8) {
	case 0, 1:
		return prefix("0.0.0.0/0")
	case 2, 3:
		return g.world.VPCs[g.world.Subnets[e.Subnet].VPC].CIDRs[0]
	case 4, 5:
		return g.world.Subnets[e.Subnet].CIDR
	case 6:
		return netip.PrefixFrom(g.address(e), 28).Masked()
	default:
		return netip.PrefixFrom(g.address(e), 32)
	}
}

// address is one of an ENI's addresses of IPv4.
func (g *generator) address(e *vpcmodel.ENI) netip.Addr {
	others := slices.DeleteFunc(slices.Clone(e.Others), func(p netip.Prefix) bool { return p.Addr().Is6() })
	if len(others) == 0 || g.chance(0.4) {
		return e.Primary
	}
	c := pick(g, others)
	a := c.Addr()
	if !c.IsSingleIP() {
		for range g.IntN(16) {
			a = a.Next()
		}
	}
	return a
}

func (g *generator) rule(v vpc.VPCID) vpcmodel.Rule {
	six := g.six()
	r := vpcmodel.Rule{Match: g.match(six)}
	switch n := g.IntN(10); {
	case n < 4 && len(g.groups("")) > 0:
		own := g.groups(v)
		if g.features.Peerings && g.chance(0.3) {
			own = g.groups(map[vpc.VPCID]vpc.VPCID{"v1": "v2", "v2": "v1", "v3": "v3"}[v])
		}
		r.Group = pick(g, own)
	case n < 6 && len(g.world.Lists) > 0:
		r.List = pick(g, []vpcmodel.ListID{"p1", "p2"})
		if six {
			r.List = "p3"
		}
	default:
		r.CIDR = g.cidr(six)
	}
	return r
}

func (g *generator) allow(id vpc.SecurityGroupID, d vpcmodel.Direction) bool {
	x := g.world.Groups[id]
	if len(x.Rules[d]) > 6 {
		return false
	}
	return g.do(vpcmodel.Allow{Group: id, Dir: d, Rule: g.rule(x.VPC)})
}

// openPort has a group let everybody in at a port, and all out: such flows go
// untracked.
func (g *generator) openPort(id vpc.SecurityGroupID) bool {
	port := pick(g, ports)
	proto := int(pick(g, []uint8{packet.ProtoTCP, packet.ProtoUDP}))
	everybody := prefix("0.0.0.0/0")
	if g.six() {
		everybody = prefix("::/0")
	}
	in := g.do(vpcmodel.Allow{Group: id, Dir: vpcmodel.In, Rule: vpcmodel.Rule{Match: vpcmodel.Match{Proto: proto, From: port, To: port}, CIDR: everybody}})
	out := g.do(vpcmodel.Allow{Group: id, Dir: vpcmodel.Out, Rule: vpcmodel.Rule{Match: vpcmodel.Match{Proto: -1, From: -1, To: -1}, CIDR: everybody}})
	return in || out
}

func (g *generator) setList(id vpcmodel.ListID) bool {
	var cidrs []netip.Prefix
	six := id == "p3"
	for range 1 + g.IntN(3) {
		c := g.cidr(six)
		if c.Bits() == 0 || g.chance(0.3) {
			c = pick(g, outsideOf(six)[:3])
		}
		if !slices.Contains(cidrs, c) {
			cidrs = append(cidrs, c)
		}
	}
	return g.do(vpcmodel.SetList{ID: id, CIDRs: cidrs})
}

func (g *generator) buildACLs(i int, v vpc.VPCID) {
	for n := range 2 {
		id := vpcmodel.ACLID(fmt.Sprintf("a%d%d", i, n+1))
		g.do(vpcmodel.MakeACL{As: "acl", ID: id, VPC: v})
		for _, d := range []vpcmodel.Direction{vpcmodel.In, vpcmodel.Out} {
			for range 3 + g.IntN(5) {
				g.entry(id, d)
			}
			for i, c := range g.everyone() {
				if g.chance(0.7) {
					g.do(vpcmodel.AddEntry{ACL: id, Dir: d, Entry: vpcmodel.Entry{Number: 30000 + i, Allow: true, Match: vpcmodel.Match{Proto: -1, From: -1, To: -1}, CIDR: c}})
				}
			}
		}
	}
	for _, s := range g.subnets(v) {
		if g.chance(chanceOf[g.emphasis].acl) {
			g.do(vpcmodel.SetACL{Subnet: s, ACL: vpcmodel.ACLID(fmt.Sprintf("a%d%d", i, 1+g.IntN(2)))})
		}
	}
}

func (g *generator) entry(id vpcmodel.ACLID, d vpcmodel.Direction) bool {
	if len(g.world.ACLs[id].Entries[d]) > 10 {
		return false
	}
	six := g.six()
	e := vpcmodel.Entry{Number: 1 + g.IntN(400), Allow: g.chance(0.45), Match: g.match(six), CIDR: g.cidr(six)}
	if e.Proto == -1 {
		// Not often, and for few: what comes after it would never be tried.
		a := g.addressOf(g.world.ENIs[pick(g, g.enis(""))], six)
		bits := 28 + 2*g.IntN(3)
		if six {
			bits = 120 + 4*g.IntN(3)
		}
		e.CIDR = netip.PrefixFrom(a, bits).Masked()
	}
	return g.do(vpcmodel.AddEntry{ACL: id, Dir: d, Entry: e})
}

func (g *generator) subnets(v vpc.VPCID) (out []vpc.SubnetID) {
	for id, s := range g.world.Subnets {
		if s.VPC == v {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

func (g *generator) buildTables(i int, v vpc.VPCID) {
	for n := range 2 {
		id := vpcmodel.TableID(fmt.Sprintf("r%d%d", i, n+1))
		g.do(vpcmodel.MakeTable{ID: id, VPC: v})
		if g.features.Peerings && v != "v3" && g.chance(0.8) {
			other := g.world.VPCs[map[vpc.VPCID]vpc.VPCID{"v1": "v2", "v2": "v1"}[v]]
			for _, c := range other.CIDRs {
				g.do(vpcmodel.AddRoute{Table: id, Route: vpcmodel.Route{CIDR: c, Peering: "x1"}})
			}
		}
		for range 1 + g.IntN(3) {
			g.route(id)
		}
	}
	for _, s := range g.subnets(v) {
		if g.chance(chanceOf[g.emphasis].table) {
			g.do(vpcmodel.SetTable{Subnet: s, Table: vpcmodel.TableID(fmt.Sprintf("r%d%d", i, 1+g.IntN(2)))})
		}
	}
}

func (g *generator) route(id vpcmodel.TableID) bool {
	t := g.world.Tables[id]
	six := g.six()
	r := vpcmodel.Route{CIDR: pick(g, outsideOf(six))}
	switch n := g.IntN(10); {
	case n < 3 && six:
		r.CIDR = g.world.Subnets[pick(g, g.subnets(t.VPC))].CIDR6
	case n < 3:
		r.CIDR = g.world.Subnets[pick(g, g.subnets(t.VPC))].CIDR
	case n < 4 && six:
		r.CIDR = g.world.VPCs[t.VPC].CIDRs[1]
	case n < 4:
		r.CIDR = g.world.VPCs[t.VPC].CIDRs[0]
	case n < 6 && !six && len(g.world.Lists) > 0:
		// Lists whose entries lie in the VPC are refused as routes.
		r = vpcmodel.Route{List: pick(g, []vpcmodel.ListID{"p1", "p2"})}
		if slices.ContainsFunc(g.world.Lists[r.List], func(c netip.Prefix) bool { return c.Addr().Is4() && c.Overlaps(prefix("10.0.0.0/8")) }) {
			return false
		}
	}
	r.ENI = pick(g, g.enis(t.VPC))
	if w := g.gatewayOf(t.VPC); w != "" && r.CIDR.IsValid() && slices.Contains(outside, r.CIDR) && g.chance(0.6) {
		r.ENI = ""
		if r.NAT = g.natOf(t.VPC); r.NAT == "" || g.chance(0.5) {
			r.NAT, r.Gateway = "", w
		}
		return g.do(vpcmodel.AddRoute{Table: id, Route: r})
	}
	if g.features.Peerings && t.VPC != "v3" && r.CIDR.IsValid() && !slices.ContainsFunc(g.world.VPCs[t.VPC].CIDRs, r.CIDR.Overlaps) && g.chance(0.6) {
		r.ENI, r.Peering = "", "x1"
	}
	return g.do(vpcmodel.AddRoute{Table: id, Route: r})
}
