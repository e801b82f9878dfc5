package api

import (
	"context"
	"iter"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func (a *API) egressOnlyHandlers(h map[string]query.Handler) {
	h["CreateEgressOnlyInternetGateway"] = handle("CreateEgressOnlyInternetGateway", "VpcId TagSpecification ClientToken", a.createEgressOnly)
	h["DeleteEgressOnlyInternetGateway"] = handle("DeleteEgressOnlyInternetGateway", "EgressOnlyInternetGatewayId", a.deleteEgressOnly)
	h["DescribeEgressOnlyInternetGateways"] = handle("DescribeEgressOnlyInternetGateways", "EgressOnlyInternetGatewayId Filter NextToken MaxResults", a.describeEgressOnly)
}

// createEgressOnly makes an egress-only internet gateway. Its VPC needs no IPv6
// block. The code of the quota is inferred.
func (a *API) createEgressOnly(_ context.Context, req *query.CreateEgressOnlyInternetGatewayRequest) (*query.CreateEgressOnlyInternetGatewayResponse, error) {
	tags, err := specified(req.TagSpecification, "egress-only-internet-gateway")
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
		made, err = onceOnly(tx, "CreateEgressOnlyInternetGateway", req.ClientToken, params, a.now(), func() (string, error) {
			if most := a.quota(chaos.QuotaEgressOnly); tx.EgressOnlyGateways.Len() >= most {
				return "", quotaReached("EgressOnlyInternetGatewayLimitExceeded", "egress-only internet gateways", most)
			}
			g := &store.EgressOnlyGateway{ID: vpc.EgressOnlyID(vpc.NewID("eigw")), VPC: v.ID, ClientToken: deref(req.ClientToken), Created: a.now()}
			tx.PutEgressOnly(g)
			tx.SetTags(string(g.ID), tags["egress-only-internet-gateway"])
			return string(g.ID), nil
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	g, err := findEgressOnly(after.State, made)
	if err != nil {
		return nil, err
	}
	return &query.CreateEgressOnlyInternetGatewayResponse{EgressOnlyInternetGateway: new(after.egressOnly(g)), ClientToken: req.ClientToken}, nil
}

// deleteEgressOnly removes an egress-only internet gateway. Routes to it stay, as
// black holes (VPC User Guide, "Egress-only internet gateways", 2026).
func (a *API) deleteEgressOnly(_ context.Context, req *query.DeleteEgressOnlyInternetGatewayRequest) (*query.DeleteEgressOnlyInternetGatewayResponse, error) {
	_, err := a.update(func(tx *store.Tx) error {
		g, err := findEgressOnly(&tx.State, *req.EgressOnlyInternetGatewayId)
		if err != nil {
			return err
		}
		tx.DeleteEgressOnly(g.ID)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.DeleteEgressOnlyInternetGatewayResponse{ReturnCode: new(true)}, nil
}

func (v view) egressOnly(g *store.EgressOnlyGateway) query.EgressOnlyInternetGateway {
	return query.EgressOnlyInternetGateway{
		EgressOnlyInternetGatewayId: text(g.ID), TagSet: v.tags(string(g.ID)),
		AttachmentSet: []query.InternetGatewayAttachment{{VpcId: text(g.VPC), State: new("attached")}},
	}
}

var egressOnlyListing = listing[*store.EgressOnlyGateway]{
	action: "DescribeEgressOnlyInternetGateways",
	all:    func(v view) iter.Seq2[string, *store.EgressOnlyGateway] { return entries(v.EgressOnlyGateways) },
	find:   findEgressOnly,
	key:    func(g *store.EgressOnlyGateway) string { return string(g.ID) },
	attrs:  attributes[*store.EgressOnlyGateway]{}, // by tags alone
}

func (a *API) describeEgressOnly(_ context.Context, req *query.DescribeEgressOnlyInternetGatewaysRequest) (*query.DescribeEgressOnlyInternetGatewaysResponse, error) {
	v := a.read()
	found, next, err := egressOnlyListing.page(v, req.EgressOnlyInternetGatewayId, req.Filter, req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	return &query.DescribeEgressOnlyInternetGatewaysResponse{NextToken: next, EgressOnlyInternetGatewaySet: collect(found, v.egressOnly)}, nil
}
