package vpcmodel

import (
	"net/netip"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// unforwarded: "Destination inside 169.254.168.0/22 … refused; wider routes
// accepted but those packets are not forwarded", and fd00:ec2::/32 alike.
var unforwarded = []netip.Prefix{netip.MustParsePrefix("169.254.168.0/22"), netip.MustParsePrefix("fd00:ec2::/32")}

// route finds the ENI that a packet goes to, or why there is none: facts 3.3.
// rule is the kind of route, for counts.
func (w *World) route(from *ENI, p *Packet) (to *ENI, rule, why string) {
	s := w.Subnets[from.Subnet]
	if p.Direct != "" {
		// "packet whose destination MAC is another ENI's bypasses route table".
		// A MAC is known in its subnet alone.
		if e := w.ENIs[p.Direct]; e != nil && e.Attached && e.Subnet == from.Subnet {
			return e, "direct", ""
		}
		return nil, "direct", "no interface of the subnet has that MAC"
	}
	if p.Dst.IsMulticast() || p.Dst == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return nil, "multicast", "no broadcast, no multicast"
	}
	if p.Dst.Is4() && p.Dst.IsLinkLocalUnicast() && !w.Settings.LinkLocalRouted {
		return nil, "link-local", "no router forwards link-local addresses"
	}
	for _, c := range unforwarded {
		if c.Contains(p.Dst) {
			return nil, "link-local", "addresses of the VPC's services are not forwarded"
		}
	}
	// A route more specific than the local one is "not to hosts in the same
	// subnet".
	if s.CIDR.Contains(p.Dst) {
		return w.local(s.VPC, p.Dst, "same subnet")
	}
	best, length := w.longest(s, p.Dst)
	switch {
	case length < 0:
		return nil, "none", "no route"
	case best == nil:
		return w.local(s.VPC, p.Dst, "local")
	case best.ENI != "":
		kind := "eni" + best.kind(w.VPCs[s.VPC])
		e := w.ENIs[best.ENI]
		if e == nil || !e.Attached {
			return nil, kind, "blackhole: the interface is not attached"
		}
		return e, kind, ""
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
func (w *World) local(v vpc.VPCID, a netip.Addr, rule string) (*ENI, string, string) {
	if e := w.holder(v, a); e != nil {
		return e, rule, ""
	}
	return nil, rule, "no interface has the address"
}

// longest returns the route with the longest prefix that holds a, and that
// length: "LPM". nil with a length ≥ 0 is the local route, "Local route per VPC
// CIDR"; a length < 0 is no route.
func (w *World) longest(s *Subnet, a netip.Addr) (*Route, int) {
	var best *Route
	length := -1
	for _, c := range w.VPCs[s.VPC].CIDRs {
		if c.Contains(a) && c.Bits() > length {
			length = c.Bits()
		}
	}
	if s.Table == "" {
		return best, length
	}
	t := w.Tables[s.Table]
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
func (w *World) over(own vpc.VPCID, r *Route, p *Packet) (*ENI, string, string) {
	kind := "peering" + r.kind(w.VPCs[own])
	x := w.Peerings[r.Peering]
	if x == nil || !x.Active {
		return nil, kind, "blackhole: the peering is not active"
	}
	other := x.B
	if own == x.B {
		other = x.A
	}
	if w.Settings.PeeringChecksSource && !w.VPCs[own].Contains(p.Src) {
		return nil, kind, "the source is not of the VPC that sends it"
	}
	// "no transit": beyond the peering there is that VPC and nothing else.
	if !w.VPCs[other].Contains(p.Dst) {
		return nil, kind + " transit", "the peer is not the way to other networks"
	}
	return w.local(other, p.Dst, kind)
}
