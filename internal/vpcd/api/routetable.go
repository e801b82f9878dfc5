package api

import (
	"context"
	"iter"
	"slices"
	"strconv"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func (a *API) routeTableHandlers(h map[string]query.Handler) {
	h["CreateRouteTable"] = handle("CreateRouteTable", "VpcId TagSpecification ClientToken", a.createRouteTable)
	h["DeleteRouteTable"] = handle("DeleteRouteTable", "RouteTableId", a.deleteRouteTable)
	h["DescribeRouteTables"] = handle("DescribeRouteTables", "RouteTableId Filter NextToken MaxResults", a.describeRouteTables)
	h["AssociateRouteTable"] = handle("AssociateRouteTable", "RouteTableId SubnetId GatewayId", a.associateRouteTable)
	h["DisassociateRouteTable"] = handle("DisassociateRouteTable", "AssociationId", a.disassociateRouteTable)
	h["ReplaceRouteTableAssociation"] = handle("ReplaceRouteTableAssociation", "AssociationId RouteTableId", a.replaceRouteTableAssociation)
}

func (a *API) createRouteTable(_ context.Context, req *query.CreateRouteTableRequest) (*query.CreateRouteTableResponse, error) {
	tags, err := specified(req.TagSpecification, "route-table")
	if err != nil {
		return nil, err
	}
	params := *req
	params.ClientToken, params.DryRun = nil, nil
	var made string
	after, err := a.update(func(tx *store.Tx) error {
		v, err := findVPC(&tx.State, *req.VpcId)
		if err != nil {
			return err
		}
		made, err = onceOnly(tx, "CreateRouteTable", req.ClientToken, params, a.now(), func() (string, error) {
			n := 0
			for _, t := range tx.RouteTables.All() {
				if t.VPC == v.ID {
					n++
				}
			}
			if most := a.quota(chaos.QuotaRouteTables); n >= most {
				return "", quotaReached("RouteTableLimitExceeded", "route tables of the VPC", most)
			}
			t := &store.RouteTable{ID: vpc.RouteTableID(vpc.NewID("rtb")), VPC: v.ID, ClientToken: deref(req.ClientToken), Created: a.now()}
			tx.PutRouteTable(t)
			tx.SetTags(string(t.ID), tags["route-table"])
			return string(t.ID), nil
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	t, err := findRouteTable(after.State, made)
	if err != nil {
		return nil, err
	}
	return &query.CreateRouteTableResponse{RouteTable: new(after.routeTable(t)), ClientToken: req.ClientToken}, nil
}

func (a *API) deleteRouteTable(_ context.Context, req *query.DeleteRouteTableRequest) (*query.DeleteRouteTableResponse, error) {
	_, err := a.update(func(tx *store.Tx) error {
		t, err := findRouteTable(&tx.State, *req.RouteTableId)
		if err != nil {
			return err
		}
		if len(t.Associations) > 0 { // to the VPC as its main table, too
			return depends("routeTable", string(t.ID))
		}
		tx.DeleteRouteTable(t.ID)
		return nil
	})
	return nil, err
}

func associationState(s string) *query.RouteTableAssociationState {
	return &query.RouteTableAssociationState{State: &s}
}

func (a *API) associateRouteTable(_ context.Context, req *query.AssociateRouteTableRequest) (*query.AssociateRouteTableResponse, error) {
	if (req.SubnetId == nil) == (req.GatewayId == nil) {
		return nil, query.Errorf("InvalidParameterCombination", "The request must contain exactly one of the parameters subnetId, gatewayId")
	}
	made := store.RouteAssociation{ID: vpc.NewID("rtbassoc")}
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findRouteTable(&tx.State, *req.RouteTableId)
		if err != nil {
			return err
		}
		user := deref(req.SubnetId) + deref(req.GatewayId)
		if req.SubnetId != nil {
			n, err := findSubnet(&tx.State, user)
			if err != nil {
				return err
			}
			if n.VPC != old.VPC {
				return twoNetworks("route table "+string(old.ID), "subnet "+string(n.ID))
			}
			made.Subnet = n.ID
		} else {
			g, err := a.attachedGateway(&tx.State, user, old)
			if err != nil {
				return err
			}
			for _, r := range old.Routes {
				if err := checkEdgeRoute(&tx.State, old, r); err != nil {
					return err
				}
			}
			made.Gateway = g.ID
		}
		if have := tx.ExplicitTable(user); have != nil {
			if have.ID == old.ID { // the association that there is answers
				i := slices.IndexFunc(old.Associations, func(x store.RouteAssociation) bool {
					return string(x.Subnet) == user || string(x.Gateway) == user
				})
				made = old.Associations[i]
				return nil
			}
			return query.Errorf("Resource.AlreadyAssociated", "the specified association for route table %s conflicts with an existing association", old.ID)
		}
		t := *old
		t.Associations = append(slices.Clone(old.Associations), made)
		tx.PutRouteTable(&t)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.AssociateRouteTableResponse{AssociationId: &made.ID, AssociationState: associationState("associated")}, nil
}

// findAssociation returns the route table with an association, and its place.
func findAssociation(s *store.State, id string) (*store.RouteTable, int, error) {
	if err := checkID("rtbassoc", id); err != nil {
		return nil, 0, err
	}
	for _, t := range s.RouteTables.All() {
		if i := slices.IndexFunc(t.Associations, func(x store.RouteAssociation) bool { return x.ID == id }); i >= 0 {
			return t, i, nil
		}
	}
	return nil, 0, noAssociation(id)
}

func (a *API) disassociateRouteTable(_ context.Context, req *query.DisassociateRouteTableRequest) (*query.DisassociateRouteTableResponse, error) {
	_, err := a.update(func(tx *store.Tx) error {
		old, i, err := findAssociation(&tx.State, *req.AssociationId)
		if err != nil {
			return err
		}
		if old.Associations[i].Main {
			return query.Errorf("InvalidParameterValue", "cannot disassociate the main route table association %s", *req.AssociationId)
		}
		t := *old
		t.Associations = slices.Delete(slices.Clone(old.Associations), i, i+1)
		tx.PutRouteTable(&t)
		return nil
	})
	return nil, err
}

// replaceRouteTableAssociation ties a subnet or a gateway to another route
// table, or makes another the main one of the VPC.
func (a *API) replaceRouteTableAssociation(_ context.Context, req *query.ReplaceRouteTableAssociationRequest) (*query.ReplaceRouteTableAssociationResponse, error) {
	made := vpc.NewID("rtbassoc")
	_, err := a.update(func(tx *store.Tx) error {
		to, err := findRouteTable(&tx.State, *req.RouteTableId)
		if err != nil {
			return err
		}
		from, i, err := findAssociation(&tx.State, *req.AssociationId)
		if err != nil {
			return err
		}
		x := from.Associations[i]
		switch {
		case from.ID == to.ID:
			made = x.ID
			return nil
		case from.VPC != to.VPC:
			return twoNetworks("route table "+string(to.ID), "route table "+string(from.ID))
		}
		if x.Gateway != "" {
			for _, r := range to.Routes {
				if err := checkEdgeRoute(&tx.State, to, r); err != nil {
					return err
				}
			}
		}
		t := *from
		t.Associations = slices.Delete(slices.Clone(from.Associations), i, i+1)
		tx.PutRouteTable(&t)
		x.ID = made
		u := *to
		u.Associations = append(slices.Clone(to.Associations), x)
		tx.PutRouteTable(&u)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.ReplaceRouteTableAssociationResponse{NewAssociationId: &made, AssociationState: associationState("associated")}, nil
}

func (v view) routeTable(t *store.RouteTable) query.RouteTable {
	return query.RouteTable{
		RouteTableId:      text(t.ID),
		VpcId:             text(t.VPC),
		OwnerId:           &v.api.account,
		PropagatingVgwSet: []query.PropagatingVgw{},
		TagSet:            v.tags(string(t.ID)),
		AssociationSet: collect(t.Associations, func(x store.RouteAssociation) query.RouteTableAssociation {
			return query.RouteTableAssociation{
				Main: new(x.Main), RouteTableAssociationId: new(x.ID), RouteTableId: text(t.ID), SubnetId: text(x.Subnet), GatewayId: text(x.Gateway),
				AssociationState: associationState("associated"),
			}
		}),
		RouteSet: collect(v.RoutesOf(t), func(r store.Route) query.Route { return v.route(t, r) }),
	}
}

func routeAssociations(_ view, t *store.RouteTable) []store.RouteAssociation { return t.Associations }

func tableRoutes(v view, t *store.RouteTable) []query.Route { return v.routeTable(t).RouteSet }

func routeValues(of func(r query.Route) *string) func(view, *store.RouteTable) []string {
	return values(tableRoutes, func(_ view, r query.Route) string { return deref(of(r)) })
}

var routeTableListing = listing[*store.RouteTable]{
	action: "DescribeRouteTables",
	all:    func(v view) iter.Seq2[string, *store.RouteTable] { return entries(v.RouteTables) },
	find:   findRouteTable,
	key:    func(t *store.RouteTable) string { return string(t.ID) },
	attrs: attributes[*store.RouteTable]{
		"route-table-id": value(func(t *store.RouteTable) string { return string(t.ID) }),
		"vpc-id":         value(func(t *store.RouteTable) string { return string(t.VPC) }),
		"owner-id":       owned[*store.RouteTable],
		"association.main": values(routeAssociations, func(_ view, x store.RouteAssociation) string {
			return strconv.FormatBool(x.Main)
		}),
		"association.route-table-association-id": values(routeAssociations, func(_ view, x store.RouteAssociation) string { return x.ID }),
		"association.subnet-id":                  values(routeAssociations, func(_ view, x store.RouteAssociation) string { return string(x.Subnet) }),
		"association.gateway-id":                 values(routeAssociations, func(_ view, x store.RouteAssociation) string { return string(x.Gateway) }),
		"association.route-table-id": func(_ view, t *store.RouteTable) []string {
			if len(t.Associations) == 0 {
				return nil
			}
			return []string{string(t.ID)}
		},
		"route.destination-cidr-block":     routeValues(func(r query.Route) *string { return r.DestinationCidrBlock }),
		"route.destination-prefix-list-id": routeValues(func(r query.Route) *string { return r.DestinationPrefixListId }),
		"route.gateway-id":                 routeValues(func(r query.Route) *string { return r.GatewayId }),
		"route.instance-id":                routeValues(func(r query.Route) *string { return r.InstanceId }),
		"route.nat-gateway-id":             routeValues(func(r query.Route) *string { return r.NatGatewayId }),
		"route.vpc-peering-connection-id":  routeValues(func(r query.Route) *string { return r.VpcPeeringConnectionId }),
		"route.origin":                     routeValues(func(r query.Route) *string { return r.Origin }),
		"route.state":                      routeValues(func(r query.Route) *string { return r.State }),

		"route.destination-ipv6-cidr-block":     routeValues(func(r query.Route) *string { return r.DestinationIpv6CidrBlock }),
		"route.egress-only-internet-gateway-id": routeValues(func(r query.Route) *string { return r.EgressOnlyInternetGatewayId }),
	},
}

func (a *API) describeRouteTables(_ context.Context, req *query.DescribeRouteTablesRequest) (*query.DescribeRouteTablesResponse, error) {
	v := a.read()
	found, next, err := routeTableListing.page(v, req.RouteTableId, req.Filter, req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	return &query.DescribeRouteTablesResponse{NextToken: next, RouteTableSet: collect(found, v.routeTable)}, nil
}
