package api

import (
	"context"
	"net/netip"
	"slices"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func (a *API) routeHandlers(h map[string]query.Handler) {
	const route = "RouteTableId DestinationCidrBlock DestinationIpv6CidrBlock DestinationPrefixListId" +
		" GatewayId EgressOnlyInternetGatewayId InstanceId NetworkInterfaceId VpcPeeringConnectionId NatGatewayId"
	h["CreateRoute"] = handle("CreateRoute", route, a.createRoute)
	h["ReplaceRoute"] = handle("ReplaceRoute", route+" LocalTarget", a.replaceRoute)
	h["DeleteRoute"] = handle("DeleteRoute", "RouteTableId DestinationCidrBlock DestinationIpv6CidrBlock DestinationPrefixListId", a.deleteRoute)
}

// reservedRoutes may not be the destination of a route: within lie the services
// that the VPC itself answers for. A wider route is accepted and leads nobody
// there.
var reservedRoutes = []netip.Prefix{netip.MustParsePrefix("169.254.168.0/22"), netip.MustParsePrefix("fd00:ec2::/32")}

// parseDestination reads where a route goes to: to a block of IPv4 or IPv6, or to
// what is in a prefix list.
func parseDestination(s *store.State, cidr, ipv6, list *string) (store.Route, error) {
	var r store.Route
	given := 0
	for _, p := range []*string{cidr, ipv6, list} {
		if p != nil {
			given++
		}
	}
	if given != 1 {
		return r, query.Errorf("InvalidParameterCombination",
			"The request must contain exactly one of the parameters destinationCidrBlock, destinationIpv6CidrBlock, destinationPrefixListId")
	}
	if list != nil {
		p, err := findPrefixList(s, *list)
		if err != nil {
			return r, err
		}
		r.PrefixList = p.ID
		return r, nil
	}
	name, text := "destinationCidrBlock", deref(cidr)
	if ipv6 != nil {
		name, text = "destinationIpv6CidrBlock", *ipv6
	}
	p, err := netip.ParsePrefix(text)
	if err != nil || p.Addr().Is4() != (ipv6 == nil) || p.Addr().Is4In6() {
		return r, query.Errorf("InvalidParameterValue", "Value (%s) for parameter %s is invalid. This is not a valid CIDR block.", text, name)
	}
	r.CIDR = p.Masked()
	for _, not := range reservedRoutes {
		if r.CIDR.Bits() >= not.Bits() && not.Contains(r.CIDR.Addr()) {
			return r, query.Errorf("InvalidParameterValue", "Value (%s) for parameter %s is invalid. It is within the reserved range %s.", r.CIDR, name, not)
		}
	}
	return r, nil
}

// isIPv6 reports whether a route is of IPv6.
func isIPv6(s *store.State, r store.Route) bool {
	if p := s.PrefixList(r.PrefixList); p != nil {
		return p.V6
	}
	return r.CIDR.IsValid() && r.CIDR.Addr().Is6()
}

// destination says where a route goes to, for messages.
func destination(r store.Route) string {
	if r.PrefixList != "" {
		return string(r.PrefixList)
	}
	return r.CIDR.String()
}

// targets are the parameters that say where a route leads.
type targets struct {
	gateway, instance, eni, peering, nat, egressOnly *string
	local                                            bool
}

// parseTarget reads where a route of a table leads.
func (a *API) parseTarget(s *store.State, t *store.RouteTable, to targets) (store.Target, error) {
	var out store.Target
	given := 0
	for _, p := range []*string{to.gateway, to.instance, to.eni, to.peering, to.nat, to.egressOnly} {
		if p != nil {
			given++
		}
	}
	if to.local {
		given++
	}
	if given != 1 {
		return out, query.Errorf("InvalidParameterCombination",
			"The request must contain exactly one of gatewayId, egressOnlyInternetGatewayId, natGatewayId, networkInterfaceId, vpcPeeringConnectionId or instanceId")
	}
	table := "route table " + string(t.ID)
	switch {
	case to.local:
		out.Local = true
	case to.gateway != nil:
		g, err := a.attachedGateway(s, *to.gateway, t)
		if err != nil {
			return out, err
		}
		out.Gateway = g.ID
	case to.egressOnly != nil:
		g, err := findEgressOnly(s, *to.egressOnly)
		if err != nil {
			return out, err
		}
		if g.VPC != t.VPC {
			return out, twoNetworks(table, "egress-only internet gateway "+string(g.ID))
		}
		out.EgressOnly = g.ID
	case to.nat != nil:
		n, err := findNAT(s, *to.nat)
		if err != nil {
			return out, err
		}
		if n.State == store.NATDeleted || n.State == store.NATDeleting || n.State == store.NATFailed {
			return out, query.Errorf("NatGatewayNotFound", "The Nat Gateway %s was not found", n.ID)
		}
		if n.VPC != t.VPC {
			return out, twoNetworks(table, "NAT gateway "+string(n.ID))
		}
		out.NAT = n.ID
	case to.peering != nil:
		p, err := findPeering(s, *to.peering)
		if err != nil {
			return out, err
		}
		// Before it is accepted the route is a black hole (VPC Peering Guide,
		// "Update your route tables", read 2026).
		if p.Status != store.PeeringActive && p.Status != store.PeeringPending {
			return out, query.Errorf("InvalidStateTransition", "The VPC peering connection %s is in the state %s", p.ID, p.Status)
		}
		if p.Other(t.VPC) == "" {
			return out, twoNetworks(table, "VPC peering connection "+string(p.ID))
		}
		out.Peering = p.ID
	default:
		e, err := targetInterface(s, to)
		if err != nil {
			return out, err
		}
		if e.VPC != t.VPC {
			return out, twoNetworks(table, "interface "+string(e.ID))
		}
		out.ENI = e.ID
	}
	return out, nil
}

// targetInterface returns the interface that a route names, by itself or by its
// instance.
func targetInterface(s *store.State, to targets) (*store.ENI, error) {
	if to.eni != nil {
		return findENI(s, *to.eni)
	}
	i, err := findInstance(s, *to.instance)
	if err != nil {
		return nil, err
	}
	var only *store.ENI
	for e := range s.InterfacesOf(i.ID) {
		if only != nil {
			return nil, query.Errorf("InvalidInstanceID", "There are multiple interfaces attached to instance '%s'. Please specify an interface ID for the operation instead.", i.ID)
		}
		only = e
	}
	if only == nil {
		return nil, query.Errorf("InvalidInstanceID", "There is no interface attached to instance '%s'.", i.ID)
	}
	return only, nil
}

// attachedGateway returns an internet gateway that is attached to the VPC of a
// route table.
func (a *API) attachedGateway(s *store.State, id string, t *store.RouteTable) (*store.InternetGateway, error) {
	if prefixOf(id) != "igw" {
		return nil, query.Errorf("InvalidGatewayID.NotFound", "The gateway ID '%s' does not exist", id)
	}
	if err := checkID("igw", id); err != nil {
		return nil, err
	}
	g := s.Gateway(vpc.GatewayID(id))
	switch {
	case g == nil:
		return nil, query.Errorf("InvalidGatewayID.NotFound", "The gateway ID '%s' does not exist", id)
	case g.VPC == "":
		return nil, query.Errorf("Gateway.NotAttached", "resource %s is not attached to network %s", g.ID, t.VPC)
	case g.VPC != t.VPC:
		return nil, twoNetworks("route table "+string(t.ID), "network gateway "+id)
	}
	return g, nil
}

// isLocal reports whether a destination is a block of the VPC.
func isLocal(v *store.VPC, p netip.Prefix) bool {
	return slices.ContainsFunc(slices.Concat(v.CIDRs, v.IPv6CIDRs), func(c store.CIDRAssociation) bool { return c.CIDR == p })
}

func isSubnet(s *store.State, id vpc.VPCID, p netip.Prefix) bool {
	for _, n := range s.Subnets.All() {
		if n.VPC == id && (n.CIDR == p || n.IPv6.CIDR == p) {
			return true
		}
	}
	return false
}

// checkDestination returns an error if a table may not have a route with this
// target to this destination: what is more specific than the local route must
// be a whole subnet and lead to an interface or a NAT gateway (VPC User Guide,
// "Routing for a middlebox appliance", read 2026). Nor may the target be of the
// other address family: an egress-only internet gateway has IPv6 alone, and a NAT
// gateway here IPv4 alone, as there is no NAT64.
func checkDestination(s *store.State, t *store.RouteTable, r store.Route) error {
	v := s.VPC(t.VPC)
	if v == nil {
		return noVPC(string(t.VPC))
	}
	switch v6 := isIPv6(s, r); {
	case v6 && r.Target.NAT != "":
		return query.Errorf("UnsupportedOperation", "The route %s is of IPv6, which the NAT gateways of vpcd do not translate. Lead it to an egress-only internet gateway.", destination(r))
	case !v6 && r.Target.EgressOnly != "":
		return query.Errorf("InvalidParameterValue", "The route %s is not of IPv6. That to an egress-only internet gateway must be.", destination(r))
	}
	within := r.CIDR.IsValid() && slices.ContainsFunc(slices.Concat(v.CIDRs, v.IPv6CIDRs), func(c store.CIDRAssociation) bool {
		return c.CIDR.Bits() <= r.CIDR.Bits() && c.CIDR.Contains(r.CIDR.Addr())
	})
	if within && !r.Target.Local {
		if r.Target.ENI == "" && r.Target.NAT == "" {
			return query.Errorf("InvalidParameterValue", "The destination CIDR block %s is equal to or more specific than one of this VPC's CIDR blocks. This route can target only an interface or an instance.", r.CIDR)
		}
		if !isLocal(v, r.CIDR) && !isSubnet(s, t.VPC, r.CIDR) {
			return query.Errorf("InvalidParameterValue", "The destination CIDR block %s is more specific than one of this VPC's CIDR blocks. It must be the CIDR block of a subnet.", r.CIDR)
		}
	}
	for _, x := range t.Associations {
		if x.Gateway != "" {
			return checkEdgeRoute(s, t, r)
		}
	}
	return nil
}

// checkEdgeRoute returns an error if a route may not be in the table of a
// gateway: it must lead to an interface or be local, and go to a block of the
// VPC or a whole subnet (VPC User Guide, "Gateway route tables", read 2026).
func checkEdgeRoute(s *store.State, t *store.RouteTable, r store.Route) error {
	if r.Target.ENI == "" && !r.Target.Local {
		return query.Errorf("InvalidParameterValue", "The route %s of route table %s does not lead to a network interface. That of a gateway must, or be local.", destination(r), t.ID)
	}
	if !r.CIDR.IsValid() || !isLocal(s.VPC(t.VPC), r.CIDR) && !isSubnet(s, t.VPC, r.CIDR) {
		return query.Errorf("InvalidParameterValue", "The route %s of route table %s goes neither to a CIDR block of the VPC nor to a subnet. That of a gateway must.", destination(r), t.ID)
	}
	return nil
}

// routeSlots returns how many of a table's routes those of one address family
// count for.
func routeSlots(s *store.State, routes []store.Route, v6 bool) int {
	n := 0
	for _, r := range routes {
		if isIPv6(s, r) != v6 {
			continue
		}
		if p := s.PrefixList(r.PrefixList); p != nil {
			n += p.MaxEntries
		} else {
			n++
		}
	}
	return n
}

func (a *API) createRoute(_ context.Context, req *query.CreateRouteRequest) (*query.CreateRouteResponse, error) {
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findRouteTable(&tx.State, *req.RouteTableId)
		if err != nil {
			return err
		}
		r, err := parseDestination(&tx.State, req.DestinationCidrBlock, req.DestinationIpv6CidrBlock, req.DestinationPrefixListId)
		if err != nil {
			return err
		}
		r.Made = true
		if r.Target, err = a.parseTarget(&tx.State, old, targets{req.GatewayId, req.InstanceId, req.NetworkInterfaceId, req.VpcPeeringConnectionId, req.NatGatewayId, req.EgressOnlyInternetGatewayId, false}); err != nil {
			return err
		}
		all := tx.RoutesOf(old)
		if slices.ContainsFunc(all, r.SameDestination) {
			return query.Errorf("RouteAlreadyExists", "The route identified by %s already exists.", destination(r))
		}
		if err := checkDestination(&tx.State, old, r); err != nil {
			return err
		}
		if most := a.quota(chaos.QuotaRoutes); routeSlots(&tx.State, append(all, r), isIPv6(&tx.State, r)) > most {
			return quotaReached("RouteLimitExceeded", "routes of the route table", most)
		}
		t := *old
		t.Routes = append(slices.Clone(old.Routes), r)
		tx.PutRouteTable(&t)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.CreateRouteResponse{Return: new(true)}, nil
}

func noRoute(t *store.RouteTable, r store.Route) error {
	kind := "destination-cidr-block"
	switch {
	case r.PrefixList != "":
		kind = "destination-prefix-list-id"
	case r.CIDR.Addr().Is6():
		kind = "destination-ipv6-cidr-block"
	}
	return query.Errorf("InvalidRoute.NotFound", "no route with %s %s in route table %s", kind, destination(r), t.ID)
}

// replaceRoute gives a route another target. That to a block of the VPC may
// leave its local target and come back to it.
func (a *API) replaceRoute(_ context.Context, req *query.ReplaceRouteRequest) (*query.ReplaceRouteResponse, error) {
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findRouteTable(&tx.State, *req.RouteTableId)
		if err != nil {
			return err
		}
		r, err := parseDestination(&tx.State, req.DestinationCidrBlock, req.DestinationIpv6CidrBlock, req.DestinationPrefixListId)
		if err != nil {
			return err
		}
		to := targets{req.GatewayId, req.InstanceId, req.NetworkInterfaceId, req.VpcPeeringConnectionId, req.NatGatewayId, req.EgressOnlyInternetGatewayId, deref(req.LocalTarget)}
		if r.Target, err = a.parseTarget(&tx.State, old, to); err != nil {
			return err
		}
		local := isLocal(tx.VPC(old.VPC), r.CIDR)
		i := slices.IndexFunc(old.Routes, r.SameDestination)
		switch {
		case i < 0 && !local:
			return noRoute(old, r)
		case r.Target.Local && !local:
			return query.Errorf("InvalidParameterValue", "The route %s cannot be local: it is not that to a CIDR block of the VPC", r.CIDR)
		}
		if err := checkDestination(&tx.State, old, r); err != nil {
			return err
		}
		t := *old
		t.Routes = slices.Clone(old.Routes)
		r.Made = !local
		switch {
		case r.Target.Local && i >= 0:
			t.Routes = slices.Delete(t.Routes, i, i+1)
		case r.Target.Local: // it is
		case i >= 0:
			t.Routes[i] = r
		default:
			t.Routes = append(t.Routes, r)
		}
		tx.PutRouteTable(&t)
		return nil
	})
	return nil, err
}

func (a *API) deleteRoute(_ context.Context, req *query.DeleteRouteRequest) (*query.DeleteRouteResponse, error) {
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findRouteTable(&tx.State, *req.RouteTableId)
		if err != nil {
			return err
		}
		r, err := parseDestination(&tx.State, req.DestinationCidrBlock, req.DestinationIpv6CidrBlock, req.DestinationPrefixListId)
		if err != nil {
			return err
		}
		if isLocal(tx.VPC(old.VPC), r.CIDR) {
			return query.Errorf("InvalidParameterValue", "cannot remove local route %s in route table %s", r.CIDR, old.ID)
		}
		i := slices.IndexFunc(old.Routes, r.SameDestination)
		if i < 0 {
			return noRoute(old, r)
		}
		t := *old
		t.Routes = slices.Delete(slices.Clone(old.Routes), i, i+1)
		tx.PutRouteTable(&t)
		return nil
	})
	return nil, err
}

func (v view) route(t *store.RouteTable, r store.Route) query.Route {
	out := query.Route{
		DestinationCidrBlock: text(cidrOf(r.CIDR, true)), DestinationIpv6CidrBlock: text(cidrOf(r.CIDR, false)), DestinationPrefixListId: text(r.PrefixList),
		NatGatewayId: text(r.Target.NAT), NetworkInterfaceId: text(r.Target.ENI), VpcPeeringConnectionId: text(r.Target.Peering), GatewayId: text(r.Target.Gateway),
		EgressOnlyInternetGatewayId: text(r.Target.EgressOnly),
		Origin:                      new("CreateRouteTable"), State: new(v.RouteState(t, r)),
	}
	if r.Target.Local {
		out.GatewayId = new("local")
	}
	if r.Made {
		out.Origin = new("CreateRoute")
	}
	if e := v.ENI(r.Target.ENI); e != nil && e.Attachment != nil && e.Attachment.Instance != "" {
		out.InstanceId, out.InstanceOwnerId = text(e.Attachment.Instance), text(e.Attachment.InstanceOwner)
	}
	return out
}
