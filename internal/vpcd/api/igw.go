package api

import (
	"context"
	"iter"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func (a *API) gatewayHandlers(h map[string]query.Handler) {
	h["CreateInternetGateway"] = handle("CreateInternetGateway", "TagSpecification", a.createInternetGateway)
	h["DeleteInternetGateway"] = handle("DeleteInternetGateway", "InternetGatewayId", a.deleteInternetGateway)
	h["DescribeInternetGateways"] = handle("DescribeInternetGateways", "InternetGatewayId Filter NextToken MaxResults", a.describeInternetGateways)
	h["AttachInternetGateway"] = handle("AttachInternetGateway", "InternetGatewayId VpcId", a.attachInternetGateway)
	h["DetachInternetGateway"] = handle("DetachInternetGateway", "InternetGatewayId VpcId", a.detachInternetGateway)
}

func (a *API) createInternetGateway(_ context.Context, req *query.CreateInternetGatewayRequest) (*query.CreateInternetGatewayResponse, error) {
	tags, err := specified(req.TagSpecification, "internet-gateway")
	if err != nil {
		return nil, err
	}
	g := &store.InternetGateway{ID: vpc.GatewayID(vpc.NewID("igw")), Created: a.now()}
	after, err := a.update(func(tx *store.Tx) error {
		if most := a.quota(chaos.QuotaGateways); tx.Gateways.Len() >= most {
			return quotaReached("InternetGatewayLimitExceeded", "internet gateways", most)
		}
		tx.PutGateway(g)
		tx.SetTags(string(g.ID), tags["internet-gateway"])
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.CreateInternetGatewayResponse{InternetGateway: new(after.gateway(g))}, nil
}

func (a *API) deleteInternetGateway(_ context.Context, req *query.DeleteInternetGatewayRequest) (*query.DeleteInternetGatewayResponse, error) {
	_, err := a.update(func(tx *store.Tx) error {
		g, err := findGateway(&tx.State, *req.InternetGatewayId)
		if err != nil {
			return err
		}
		if g.VPC != "" {
			return depends("internetGateway", string(g.ID))
		}
		tx.DeleteGateway(g.ID)
		return nil
	})
	return nil, err
}

func (a *API) attachInternetGateway(_ context.Context, req *query.AttachInternetGatewayRequest) (*query.AttachInternetGatewayResponse, error) {
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findGateway(&tx.State, *req.InternetGatewayId)
		if err != nil {
			return err
		}
		v, err := findVPC(&tx.State, *req.VpcId)
		if err != nil {
			return err
		}
		if old.VPC != "" {
			return query.Errorf("Resource.AlreadyAssociated", "resource %s is already attached to network %s", old.ID, old.VPC)
		}
		if have := tx.GatewayOf(v.ID); have != nil {
			return query.Errorf("InvalidParameterValue", "Network %s already has an internet gateway attached", v.ID)
		}
		g := *old
		g.VPC = v.ID
		tx.PutGateway(&g)
		return nil
	})
	return nil, err
}

func (a *API) detachInternetGateway(_ context.Context, req *query.DetachInternetGatewayRequest) (*query.DetachInternetGatewayResponse, error) {
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findGateway(&tx.State, *req.InternetGatewayId)
		if err != nil {
			return err
		}
		v, err := findVPC(&tx.State, *req.VpcId)
		if err != nil {
			return err
		}
		if old.VPC != v.ID {
			return query.Errorf("Gateway.NotAttached", "resource %s is not attached to network %s", old.ID, v.ID)
		}
		for _, x := range tx.Addresses.All() {
			if e := tx.ENI(x.ENI); e != nil && e.VPC == v.ID {
				return query.Errorf("DependencyViolation", "Network %s has some mapped public address(es). Please unmap those public address(es) before detaching the gateway.", v.ID)
			}
		}
		tx.DropEdge(old.ID)
		g := *old
		g.VPC = ""
		tx.PutGateway(&g)
		return nil
	})
	return nil, err
}

func (v view) gateway(g *store.InternetGateway) query.InternetGateway {
	out := query.InternetGateway{
		InternetGatewayId: text(g.ID), OwnerId: &v.api.account, TagSet: v.tags(string(g.ID)), AttachmentSet: []query.InternetGatewayAttachment{},
	}
	if g.VPC != "" {
		// EC2 answers "available", which its model does not list.
		out.AttachmentSet = append(out.AttachmentSet, query.InternetGatewayAttachment{VpcId: text(g.VPC), State: new("available")})
	}
	return out
}

var gatewayListing = listing[*store.InternetGateway]{
	action: "DescribeInternetGateways",
	all:    func(v view) iter.Seq2[string, *store.InternetGateway] { return entries(v.Gateways) },
	find:   findGateway,
	key:    func(g *store.InternetGateway) string { return string(g.ID) },
	attrs: attributes[*store.InternetGateway]{
		"internet-gateway-id": value(func(g *store.InternetGateway) string { return string(g.ID) }),
		"owner-id":            owned[*store.InternetGateway],
		"attachment.vpc-id":   value(func(g *store.InternetGateway) string { return string(g.VPC) }),
		"attachment.state": value(func(g *store.InternetGateway) string {
			if g.VPC == "" {
				return ""
			}
			return "available"
		}),
	},
}

func (a *API) describeInternetGateways(_ context.Context, req *query.DescribeInternetGatewaysRequest) (*query.DescribeInternetGatewaysResponse, error) {
	v := a.read()
	found, next, err := gatewayListing.page(v, req.InternetGatewayId, req.Filter, req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	return &query.DescribeInternetGatewaysResponse{NextToken: next, InternetGatewaySet: collect(found, v.gateway)}, nil
}
