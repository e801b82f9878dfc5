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

// change makes a change of the world, of a kind that the fabric enforces.
func (g *generator) change() {
	for range 10 {
		if g.tryChange() {
			return
		}
	}
}

func (g *generator) tryChange() bool {
	f := g.features
	if g.moves && g.chance(0.2) {
		return g.move()
	}
	if len(g.world.Gateways) > 0 && g.chance(0.4) {
		return g.gatewayChange()
	}
	if f.Groups && (g.emphasis == onGroups || g.emphasis == onAll) && g.chance(0.5) {
		if g.chance(0.4) {
			return g.openPort(pick(g, g.groups("")))
		}
		return g.cut()
	}
	d := vpcmodel.Direction(g.chance(0.5))
	e := pick(g, g.enis(""))
	kind := g.IntN(16)
	if g.chance(0.5) {
		// Half of the changes are of what the world is about.
		kind = pick(g, [][]int{onGroups: {0, 1, 2, 3, 4, 5}, onACLs: {6, 7, 8, 9}, onRoutes: {10, 11, 12}, onAll: {5, 9, 12}, onGateways: {5, 9, 12}}[g.emphasis])
	}
	switch kind {
	case 0, 1, 2:
		return f.Groups && g.allow(pick(g, g.groups("")), d)
	case 3, 4:
		if !f.Groups {
			return false
		}
		return g.revoke(pick(g, g.groups("")), d)
	case 5:
		if f.Groups {
			g.setGroups(e)
		}
		return f.Groups
	case 6, 7:
		return f.ACLs && g.entry(pick(g, g.acls("")), d)
	case 8:
		return f.ACLs && g.unentry(pick(g, g.acls("")), d)
	case 9:
		if !f.ACLs {
			return false
		}
		v := g.world.Subnets[g.world.ENIs[e].Subnet].VPC
		return g.do(vpcmodel.SetACL{Subnet: pick(g, g.subnets(v)), ACL: pick(g, g.acls(v))})
	case 10:
		return f.Tables && g.route(pick(g, g.tables("")))
	case 11:
		return f.Tables && g.unroute(pick(g, g.tables("")))
	case 12:
		if !f.Tables {
			return false
		}
		v := g.world.Subnets[g.world.ENIs[e].Subnet].VPC
		return g.do(vpcmodel.SetTable{Subnet: pick(g, g.subnets(v)), Table: pick(g, g.tables(v))})
	case 13:
		return g.do(vpcmodel.SetCheck{ENI: e, On: g.world.ENIs[e].NoCheck})
	case 14:
		return g.address2(e)
	default:
		switch n := g.IntN(20); {
		case n < 1:
			return f.Peerings && g.world.Peerings["x1"].Active && g.do(vpcmodel.DeletePeering{ID: "x1"})
		case n < 8:
			return f.Lists && !g.routed() && g.setList(pick(g, g.lists()))
		}
		return g.address2(e)
	}
}

// cut revokes what lets an untracked flow pass, and has it go on.
func (g *generator) cut() bool {
	if len(g.past) == 0 {
		return false
	}
	p := pick(g, g.past)
	v := g.world.Peek(&p.sent)
	for tries := 0; tries < 3 && v.Sender != vpcmodel.Untracked && v.Receiver != vpcmodel.Untracked; tries++ {
		p = pick(g, g.past)
		v = g.world.Peek(&p.sent)
	}
	e, d := g.world.ENIs[p.to], vpcmodel.In
	if e == nil || p.sent.From == vpcmodel.Internet {
		return false
	}
	if v.Sender == vpcmodel.Untracked && g.chance(0.7) {
		e, d = g.world.ENIs[p.packet.From], vpcmodel.Out
	} else if v.Receiver != vpcmodel.Untracked {
		return false
	}
	done := false
	for _, id := range e.Groups {
		for _, r := range slices.Clone(g.world.Groups[id].Rules[d]) {
			if id != g.open[g.world.Groups[id].VPC] && r.CIDR.IsValid() && r.CIDR.Bits() == 0 && r.CIDR.Addr().Is6() == p.packet.Src.Is6() && (r.Proto == -1 || r.Proto == int(p.packet.Proto)) {
				done = g.do(vpcmodel.Revoke{Group: id, Dir: d, Rule: r}) || done
			}
		}
	}
	if done {
		again := p.packet
		if again.Proto == packet.ProtoTCP {
			again.Flags = vpcmodel.ACK
		}
		g.queue = append(g.queue, again)
	}
	return done
}

// routed reports whether a route is by a prefix list: its entries then stay, as
// some cannot be routes.
func (g *generator) routed() bool {
	for _, t := range g.world.Tables {
		if slices.ContainsFunc(t.Routes, func(r vpcmodel.Route) bool { return r.List != "" }) {
			return true
		}
	}
	return false
}

// address2 assigns or unassigns a secondary address or a prefix.
func (g *generator) address2(id vpc.ENIID) bool {
	e := g.world.ENIs[id]
	if len(e.Others) > 0 && g.chance(0.5) {
		return g.do(vpcmodel.Unassign{ENI: id, CIDR: pick(g, e.Others)})
	}
	if g.six() {
		return g.do(vpcmodel.Assign{ENI: id, CIDR: g.assigned6(e)})
	}
	base := g.world.Subnets[e.Subnet].CIDR.Addr().As4()
	base[3] = byte(200 + g.IntN(8))
	bits := 32
	if g.chance(0.4) {
		base[3], bits = byte(16*(9+g.IntN(3))), 28
	}
	return g.do(vpcmodel.Assign{ENI: id, CIDR: netip.PrefixFrom(netip.AddrFrom4(base), bits)})
}

func (g *generator) revoke(id vpc.SecurityGroupID, d vpcmodel.Direction) bool {
	rules := g.world.Groups[id].Rules[d]
	if len(rules) == 0 {
		return false
	}
	r := pick(g, rules)
	for range 3 { // what everybody may makes untracked flows, which are then cut
		if o := pick(g, rules); o.CIDR.IsValid() && o.CIDR.Bits() == 0 {
			r = o
		}
	}
	return g.do(vpcmodel.Revoke{Group: id, Dir: d, Rule: r})
}

func (g *generator) acls(v vpc.VPCID) (out []vpcmodel.ACLID) {
	for id, a := range g.world.ACLs {
		if v == "" || a.VPC == v {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

func (g *generator) unentry(id vpcmodel.ACLID, d vpcmodel.Direction) bool {
	entries := g.world.ACLs[id].Entries[d]
	if len(entries) == 0 {
		return false
	}
	return g.do(vpcmodel.DeleteEntry{ACL: id, Dir: d, Number: pick(g, entries).Number})
}

func (g *generator) tables(v vpc.VPCID) (out []vpcmodel.TableID) {
	for id, t := range g.world.Tables {
		if (v == "" || t.VPC == v) && !strings.HasPrefix(string(id), "edge") {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

func (g *generator) unroute(id vpcmodel.TableID) bool {
	routes := g.world.Tables[id].Routes
	if len(routes) == 0 {
		return false
	}
	r := pick(g, routes)
	return g.do(vpcmodel.DeleteRoute{Table: id, Route: vpcmodel.Route{CIDR: r.CIDR, List: r.List}})
}

// move detaches an interface, or attaches one that is detached to another
// instance of its VPC.
func (g *generator) move() bool {
	for _, id := range slices.Sorted(maps.Keys(g.second)) {
		e := g.world.ENIs[id]
		if e.Attached || g.chance(0.3) {
			continue
		}
		to := g.world.ENIs[pick(g, g.enis(g.world.Subnets[e.Subnet].VPC))]
		return g.do(vpcmodel.Attach{ENI: id, To: to.Instance})
	}
	id := pick(g, slices.Sorted(maps.Keys(g.second)))
	return g.world.ENIs[id].Attached && g.do(vpcmodel.Detach{ENI: id})
}
