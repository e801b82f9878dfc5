package store

import (
	"iter"
	"net/netip"
	"slices"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// The states of a route, spelled as EC2 does.
const (
	RouteActive    = "active"
	RouteBlackhole = "blackhole"
)

// RouteTable, ACL, Gateway, EgressOnly, Address, NAT, Peering, PrefixList, DHCP and
// FlowLog return the object with this id, or nil.
func (s *State) RouteTable(id vpc.RouteTableID) *RouteTable { v, _ := s.RouteTables.Get(id); return v }
func (s *State) ACL(id vpc.NetworkACLID) *NetworkACL        { v, _ := s.ACLs.Get(id); return v }
func (s *State) Gateway(id vpc.GatewayID) *InternetGateway  { v, _ := s.Gateways.Get(id); return v }
func (s *State) EgressOnly(id vpc.EgressOnlyID) *EgressOnlyGateway {
	v, _ := s.EgressOnlyGateways.Get(id)
	return v
}
func (s *State) Address(id vpc.AllocationID) *Address       { v, _ := s.Addresses.Get(id); return v }
func (s *State) NAT(id vpc.NATGatewayID) *NATGateway        { v, _ := s.NATs.Get(id); return v }
func (s *State) Peering(id vpc.PeeringID) *Peering          { v, _ := s.Peerings.Get(id); return v }
func (s *State) PrefixList(id vpc.PrefixListID) *PrefixList { v, _ := s.PrefixLists.Get(id); return v }
func (s *State) DHCP(id string) *DHCPOptions                { v, _ := s.DHCPOptions.Get(id); return v }
func (s *State) FlowLog(id string) *FlowLog                 { v, _ := s.FlowLogs.Get(id); return v }

// MainTable returns the main route table of a VPC. Each VPC has one.
func (s *State) MainTable(id vpc.VPCID) *RouteTable {
	t, _ := s.mainTables.Get(id)
	return s.RouteTable(t)
}

// ExplicitTable returns the route table that a subnet or an internet gateway is
// tied to by an association of its own, or nil.
func (s *State) ExplicitTable(id string) *RouteTable {
	t, ok := s.explicitTables.Get(id)
	if !ok {
		return nil
	}
	return s.RouteTable(t)
}

// TableOf returns the route table that a subnet uses: its own, or the main one
// of the VPC. It is nil for a subnet that does not exist.
func (s *State) TableOf(id vpc.SubnetID) *RouteTable {
	if t := s.ExplicitTable(string(id)); t != nil {
		return t
	}
	n := s.Subnet(id)
	if n == nil {
		return nil
	}
	return s.MainTable(n.VPC)
}

// RoutesOf returns the routes of a table: first those to the VPC's blocks, then
// the others in the order of creation.
func (s *State) RoutesOf(t *RouteTable) []Route {
	var out []Route
	v := s.VPC(t.VPC)
	if v == nil {
		return nil
	}
	for _, c := range slices.Concat(v.CIDRs, v.IPv6CIDRs) {
		if !slices.ContainsFunc(t.Routes, func(r Route) bool { return r.CIDR == c.CIDR }) {
			out = append(out, Route{CIDR: c.CIDR, Target: Target{Local: true}})
		}
	}
	return append(out, t.Routes...)
}

// RouteState returns whether packets can follow a route of a table, or end
// there because its target is gone, detached, stopped or not yet accepted.
func (s *State) RouteState(t *RouteTable, r Route) string {
	if s.reachable(t, r.Target) {
		return RouteActive
	}
	return RouteBlackhole
}

func (s *State) reachable(t *RouteTable, to Target) bool {
	switch {
	case to.Local:
		return true
	case to.Gateway != "":
		g := s.Gateway(to.Gateway)
		return g != nil && g.VPC == t.VPC
	case to.EgressOnly != "":
		g := s.EgressOnly(to.EgressOnly)
		return g != nil && g.VPC == t.VPC
	case to.NAT != "":
		n := s.NAT(to.NAT)
		return n != nil && (n.State == NATPending || n.State == NATAvailable)
	case to.ENI != "":
		e := s.ENI(to.ENI)
		if e == nil || e.Attachment == nil || e.Attachment.Status != Attached {
			return false
		}
		if e.Attachment.Instance == "" {
			return true // a service's
		}
		i := s.Instance(e.Attachment.Instance)
		return i != nil && i.State == Running
	case to.Peering != "":
		p := s.Peering(to.Peering)
		return p != nil && p.Status == PeeringActive
	}
	return false
}

// DefaultACL returns the default network ACL of a VPC. Each VPC has one.
func (s *State) DefaultACL(id vpc.VPCID) *NetworkACL {
	a, _ := s.defaultACLs.Get(id)
	return s.ACL(a)
}

// ACLOf returns the network ACL of a subnet, or nil for a subnet that does not
// exist.
func (s *State) ACLOf(id vpc.SubnetID) *NetworkACL {
	a, _ := s.subnetACLs.Get(id)
	return s.ACL(a)
}

// GatewayOf returns the internet gateway that is attached to a VPC, or nil.
func (s *State) GatewayOf(id vpc.VPCID) *InternetGateway {
	g, _ := s.vpcGateways.Get(id)
	return s.Gateway(g)
}

// ElasticOf returns the Elastic IP address that leads to a private address of
// an interface, or nil.
func (s *State) ElasticOf(e vpc.ENIID, private netip.Addr) *Address {
	id, _ := s.elastics.Get(elasticKey{e, private})
	return s.Address(id)
}

// ElasticsOf iterates over the Elastic IP addresses that lead to an interface,
// by private address.
func (s *State) ElasticsOf(e vpc.ENIID) iter.Seq[*Address] {
	return func(yield func(*Address) bool) {
		for k, id := range s.elastics.From(elasticKey{eni: e}) {
			if k.eni != e || !yield(s.Address(id)) {
				return
			}
		}
	}
}

// ByPublic returns the Elastic IP address of this number, or nil.
func (s *State) ByPublic(a netip.Addr) *Address {
	id, _ := s.publics.Get(a)
	return s.Address(id)
}

// PeeringBetween returns the active peering connection of two VPCs, or nil.
func (s *State) PeeringBetween(a, b vpc.VPCID) *Peering {
	for _, p := range s.Peerings.All() {
		if p.Status == PeeringActive && p.Other(a) == b {
			return p
		}
	}
	return nil
}
