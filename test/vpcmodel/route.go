package vpcmodel

import (
	"net/netip"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// unforwarded: "Destination inside 169.254.168.0/22 … refused; wider routes
// accepted but those packets are not forwarded", and fd00:ec2::/32 alike.
var unforwarded = []netip.Prefix{netip.MustParsePrefix("169.254.168.0/22"), netip.MustParsePrefix("fd00:ec2::/32")}

// hop is where a route leads: one of eni, gateway and nat, or why nowhere. rule is
// the kind of route, for counts.
type hop struct {
	eni       *ENI
	gateway   *Gateway
	nat       *NAT
	natAnswer bool // for nat's own address
	rule, why string
}

// route finds where a packet of a subnet goes: facts 3.3.
func (w *World) route(s *Subnet, p *Packet) hop {
	if p.Direct != "" {
		// "packet whose destination MAC is another ENI's bypasses route table".
		// A MAC is known in its subnet alone.
		if e := w.ENIs[p.Direct]; e != nil && e.Attached && e.Subnet == s.ID {
			return hop{eni: e, rule: "direct"}
		}
		return hop{rule: "direct", why: "no interface of the subnet has that MAC"}
	}
	if p.Dst.IsMulticast() || p.Dst == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return hop{rule: "multicast", why: "no broadcast, no multicast"}
	}
	if p.Dst.IsLinkLocalUnicast() && (p.Dst.Is6() || !w.Settings.LinkLocalRouted) || p.Src.Is6() && p.Src.IsLinkLocalUnicast() {
		return hop{rule: "link-local", why: "no router forwards link-local addresses"}
	}
	for _, c := range unforwarded {
		if c.Contains(p.Dst) {
			return hop{rule: "link-local", why: "addresses of the VPC's services are not forwarded"}
		}
	}
	// A route more specific than the local one is "not to hosts in the same
	// subnet".
	if s.Contains(p.Dst) {
		return w.local(s.VPC, p.Dst, "same subnet")
	}
	best, length := w.longest(w.VPCs[s.VPC], w.Tables[s.Table], p.Dst)
	switch {
	case length < 0:
		return hop{rule: "none", why: "no route"}
	case best == nil:
		return w.local(s.VPC, p.Dst, "local")
	case best.ENI != "":
		kind := "eni" + best.kind(w.VPCs[s.VPC])
		e := w.ENIs[best.ENI]
		if e == nil || !e.Attached {
			return hop{rule: kind, why: "blackhole: the interface is not attached"}
		}
		return hop{eni: e, rule: kind}
	case best.Gateway != "":
		g := w.Gateways[best.Gateway]
		if g == nil || g.VPC != s.VPC {
			return hop{rule: "igw", why: "blackhole: the internet gateway is not attached"}
		}
		return hop{gateway: g, rule: "igw"}
	case best.NAT != "":
		n := w.NATs[best.NAT]
		if n == nil || n.Deleted {
			return hop{rule: "nat", why: "blackhole: the NAT gateway is deleted"}
		}
		return hop{nat: n, rule: "nat"}
	default:
		return w.over(s.VPC, best, p)
	}
}

// kind says how a route stands to the local ones.
func (r *Route) kind(v *VPC) string {
	if r.List != "" {
		return " list"
	}
	for _, c := range v.CIDRs {
		switch {
		case r.CIDR == c:
			return " instead of local"
		case c.Bits() < r.CIDR.Bits() && c.Contains(r.CIDR.Addr()):
			return " within local"
		}
	}
	return ""
}

// local delivers within the VPC, by its mapping.
func (w *World) local(v vpc.VPCID, a netip.Addr, rule string) hop {
	if e := w.holder(v, a); e != nil {
		return hop{eni: e, rule: rule}
	}
	if n := w.natAt(v, a); n != nil {
		return hop{nat: n, natAnswer: true, rule: rule}
	}
	return hop{rule: rule, why: "no interface has the address"}
}

// longest returns the route with the longest prefix that holds a, and that
// length: "LPM". nil with a length ≥ 0 is the local route, "Local route per VPC
// CIDR"; a length < 0 is no route.
func (w *World) longest(v *VPC, t *Table, a netip.Addr) (*Route, int) {
	var best *Route
	length := -1
	for _, c := range v.CIDRs {
		if c.Contains(a) && c.Bits() > length {
			length = c.Bits()
		}
	}
	if t == nil {
		return best, length
	}
	for i := range t.Routes {
		r := &t.Routes[i]
		if r.List != "" {
			for _, c := range w.Lists[r.List] {
				// "static CIDR beats prefix-list route": at equal length the
				// list's gives way, to the local route as well.
				if c.Contains(a) && c.Bits() > length {
					best, length = r, c.Bits()
				}
			}
			continue
		}
		if !r.CIDR.Contains(a) || r.CIDR.Bits() < length {
			continue
		}
		// At equal length this replaces the local route's target, or what a
		// list brought.
		best, length = r, r.CIDR.Bits()
	}
	return best, length
}

// over sends a packet over a peering.
func (w *World) over(own vpc.VPCID, r *Route, p *Packet) hop {
	kind := "peering" + r.kind(w.VPCs[own])
	x := w.Peerings[r.Peering]
	if x == nil || !x.Active {
		return hop{rule: kind, why: "blackhole: the peering is not active"}
	}
	other := x.B
	if own == x.B {
		other = x.A
	}
	if w.Settings.PeeringChecksSource && !w.VPCs[own].Contains(p.Src) {
		return hop{rule: kind, why: "the source is not of the VPC that sends it"}
	}
	// "no transit": beyond the peering there is that VPC and nothing else.
	if !w.VPCs[other].Contains(p.Dst) {
		return hop{rule: kind + " transit", why: "the peer is not the way to other networks"}
	}
	return w.local(other, p.Dst, kind)
}
