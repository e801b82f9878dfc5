package api

import (
	"context"
	"iter"
	"net/netip"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func (a *API) peeringHandlers(h map[string]query.Handler) {
	h["CreateVpcPeeringConnection"] = handle("CreateVpcPeeringConnection", "VpcId PeerVpcId PeerOwnerId PeerRegion TagSpecification", a.createPeering)
	h["AcceptVpcPeeringConnection"] = handle("AcceptVpcPeeringConnection", "VpcPeeringConnectionId", a.acceptPeering)
	h["RejectVpcPeeringConnection"] = handle("RejectVpcPeeringConnection", "VpcPeeringConnectionId", a.rejectPeering)
	h["DeleteVpcPeeringConnection"] = handle("DeleteVpcPeeringConnection", "VpcPeeringConnectionId", a.deletePeering)
	h["DescribeVpcPeeringConnections"] = handle("DescribeVpcPeeringConnections", "VpcPeeringConnectionId Filter NextToken MaxResults", a.describePeerings)
	h["ModifyVpcPeeringConnectionOptions"] = handle("ModifyVpcPeeringConnectionOptions",
		"VpcPeeringConnectionId AccepterPeeringConnectionOptions.AllowDnsResolutionFromRemoteVpc RequesterPeeringConnectionOptions.AllowDnsResolutionFromRemoteVpc", a.modifyPeeringOptions)
}

// How long a request waits to be accepted, and how long what is over is still
// described (VPC Peering Guide, "VPC peering connection lifecycle", read 2026).
const (
	peeringExpires   = 7 * 24 * time.Hour
	peeringExpired   = 2 * 24 * time.Hour
	peeringForgotten = 2 * time.Hour
)

func blocks(v *store.VPC) []netip.Prefix {
	return collect(v.CIDRs, func(c store.CIDRAssociation) netip.Prefix { return c.CIDR })
}

func ipv6Blocks(v *store.VPC) []netip.Prefix {
	return collect(v.IPv6CIDRs, func(c store.CIDRAssociation) netip.Prefix { return c.CIDR })
}

func overlap(a, b []netip.Prefix) bool {
	for _, x := range a {
		for _, y := range b {
			if x.Overlaps(y) {
				return true
			}
		}
	}
	return false
}

// peeringsOf counts the peering connections of a VPC in a state.
func peeringsOf(s *store.State, id vpc.VPCID, status store.PeeringStatus) int {
	n := 0
	for _, p := range s.Peerings.All() {
		if p.Status == status && (p.Requester.VPC == id || p.Accepter.VPC == id) {
			n++
		}
	}
	return n
}

// fail makes a peering connection one that failed: its VPCs overlap. That is no
// error of the request.
func fail(p *store.Peering, now time.Time) {
	p.Status, p.Due = store.PeeringFailed, now.Add(peeringForgotten)
	p.Message = "Failed due to incorrect VPC-ID, Account ID, or overlapping CIDR range"
}

func (a *API) createPeering(_ context.Context, req *query.CreateVpcPeeringConnectionRequest) (*query.CreateVpcPeeringConnectionResponse, error) {
	switch {
	case req.PeerVpcId == nil:
		return nil, query.Errorf("MissingParameter", "The request must contain the parameter peerVpcId")
	case req.PeerRegion != nil && *req.PeerRegion != a.region:
		return nil, query.Errorf("UnsupportedOperation", "This vpcd is the region '%s' alone.", a.region)
	case req.PeerOwnerId != nil && *req.PeerOwnerId != a.account:
		return nil, query.Errorf("UnsupportedOperation", "This vpcd has the account '%s' alone.", a.account)
	}
	tags, err := specified(req.TagSpecification, "vpc-peering-connection")
	if err != nil {
		return nil, err
	}
	now := a.now()
	p := &store.Peering{ID: vpc.PeeringID(vpc.NewID("pcx")), Status: store.PeeringPending, Message: "Pending Acceptance by " + a.account, Created: now, Due: now.Add(peeringExpires)}
	after, err := a.update(func(tx *store.Tx) error {
		one, err := findVPC(&tx.State, *req.VpcId)
		if err != nil {
			return err
		}
		other, err := findVPC(&tx.State, *req.PeerVpcId)
		if err != nil {
			return err
		}
		for _, o := range tx.Peerings.All() {
			if (o.Status == store.PeeringPending || o.Status == store.PeeringActive) && o.Other(one.ID) == other.ID {
				return query.Errorf("VpcPeeringConnectionAlreadyExists", "A VPC peering connection between %s and %s already exists: %s", one.ID, other.ID, o.ID)
			}
		}
		p.Requester = store.PeeringSide{VPC: one.ID, CIDRs: blocks(one), IPv6CIDRs: ipv6Blocks(one)}
		p.Accepter = store.PeeringSide{VPC: other.ID, CIDRs: blocks(other), IPv6CIDRs: ipv6Blocks(other)}
		if overlap(p.Requester.CIDRs, p.Accepter.CIDRs) {
			fail(p, now)
		} else if most := a.quota(chaos.QuotaPendingPeerings); peeringsOf(&tx.State, one.ID, store.PeeringPending) >= most {
			return quotaReached("OutstandingVpcPeeringConnectionLimitExceeded", "VPC peering connection requests of the VPC", most)
		}
		tx.PutPeering(p)
		tx.SetTags(string(p.ID), tags["vpc-peering-connection"])
		return nil
	})
	if err != nil {
		return nil, err
	}
	out := after.peering(p)
	out.Status = &query.VpcPeeringConnectionStatus{Code: new("initiating-request"), Message: new("Initiating Request to " + a.account)}
	return &query.CreateVpcPeeringConnectionResponse{VpcPeeringConnection: &out}, nil
}

// movePeering changes the state of a peering connection; change returns false
// when it cannot be done from where it is.
func (a *API) movePeering(id, to string, change func(tx *store.Tx, p *store.Peering) (bool, error)) (view, *store.Peering, error) {
	var p store.Peering
	after, err := a.update(func(tx *store.Tx) error {
		old, err := findPeering(&tx.State, id)
		if err != nil {
			return err
		}
		p = *old
		ok, err := change(tx, &p)
		if err != nil {
			return err
		}
		if !ok {
			return query.Errorf("InvalidStateTransition", "Invalid state transition for %s, attempted to transition from %s to %s", old.ID, old.Status, to)
		}
		tx.PutPeering(&p)
		return nil
	})
	return after, &p, err
}

func (a *API) acceptPeering(_ context.Context, req *query.AcceptVpcPeeringConnectionRequest) (*query.AcceptVpcPeeringConnectionResponse, error) {
	id := deref(req.VpcPeeringConnectionId)
	after, p, err := a.movePeering(id, "active", func(tx *store.Tx, p *store.Peering) (bool, error) {
		if p.Status != store.PeeringPending {
			return false, nil
		}
		for _, side := range []*store.PeeringSide{&p.Requester, &p.Accepter} {
			v := tx.VPC(side.VPC)
			if v == nil {
				return false, noVPC(string(side.VPC))
			}
			side.CIDRs, side.IPv6CIDRs = blocks(v), ipv6Blocks(v) // they may have got more since
			if most := a.quota(chaos.QuotaPeerings); peeringsOf(&tx.State, v.ID, store.PeeringActive) >= most {
				return false, quotaReached("ActiveVpcPeeringConnectionPerVpcLimitExceeded", "active VPC peering connections of the VPC", most)
			}
		}
		if overlap(p.Requester.CIDRs, p.Accepter.CIDRs) {
			fail(p, a.now())
			return true, nil
		}
		p.Status, p.Message, p.Due = store.PeeringActive, "Active", time.Time{}
		return true, nil
	})
	if err != nil {
		return nil, err
	}
	out := after.peering(p)
	if p.Status == store.PeeringActive {
		out.Status = &query.VpcPeeringConnectionStatus{Code: new("provisioning"), Message: new("Provisioning")}
	}
	return &query.AcceptVpcPeeringConnectionResponse{VpcPeeringConnection: &out}, nil
}

func (a *API) rejectPeering(_ context.Context, req *query.RejectVpcPeeringConnectionRequest) (*query.RejectVpcPeeringConnectionResponse, error) {
	if _, _, err := a.movePeering(*req.VpcPeeringConnectionId, "rejected", func(_ *store.Tx, p *store.Peering) (bool, error) {
		ok := p.Status == store.PeeringPending
		p.Status, p.Message, p.Due = store.PeeringRejected, "Rejected by "+a.account, a.now().Add(peeringForgotten)
		return ok, nil
	}); err != nil {
		return nil, err
	}
	return &query.RejectVpcPeeringConnectionResponse{Return: new(true)}, nil
}

func (a *API) deletePeering(_ context.Context, req *query.DeleteVpcPeeringConnectionRequest) (*query.DeleteVpcPeeringConnectionResponse, error) {
	if _, _, err := a.movePeering(*req.VpcPeeringConnectionId, "deleted", func(_ *store.Tx, p *store.Peering) (bool, error) {
		ok := p.Status == store.PeeringPending || p.Status == store.PeeringActive
		p.Status, p.Message, p.Due = store.PeeringDeleted, "Deleted by "+a.account, a.now().Add(peeringForgotten)
		return ok, nil
	}); err != nil {
		return nil, err
	}
	return &query.DeleteVpcPeeringConnectionResponse{Return: new(true)}, nil
}

// settlePeering ends the wait of a request that nobody accepted, or forgets one
// that is over.
func settlePeering(tx *store.Tx, old *store.Peering, now time.Time) {
	if old.Status != store.PeeringPending {
		tx.DeletePeering(old.ID)
		return
	}
	p := *old
	p.Status, p.Message, p.Due = store.PeeringExpired, "Expired", now.Add(peeringExpired)
	tx.PutPeering(&p)
}

func (a *API) modifyPeeringOptions(_ context.Context, req *query.ModifyVpcPeeringConnectionOptionsRequest) (*query.ModifyVpcPeeringConnectionOptionsResponse, error) {
	one, other := req.RequesterPeeringConnectionOptions, req.AccepterPeeringConnectionOptions
	if one == nil && other == nil {
		return nil, query.Errorf("MissingParameter", "The request must contain one of the parameters accepterPeeringConnectionOptions, requesterPeeringConnectionOptions")
	}
	_, p, err := a.movePeering(*req.VpcPeeringConnectionId, "", func(_ *store.Tx, p *store.Peering) (bool, error) {
		if p.Status != store.PeeringActive {
			return false, query.Errorf("OperationNotPermitted", "Peering %s is not active. Peering options can be added only to active peerings.", p.ID)
		}
		for side, set := range map[*store.PeeringSide]*query.PeeringOptions{&p.Requester: one, &p.Accepter: other} {
			if set != nil && set.AllowDnsResolutionFromRemoteVpc != nil {
				side.DNS = *set.AllowDnsResolutionFromRemoteVpc
			}
		}
		return true, nil
	})
	if err != nil {
		return nil, err
	}
	resp := &query.ModifyVpcPeeringConnectionOptionsResponse{}
	if one != nil {
		resp.RequesterPeeringConnectionOptions = &query.PeeringOptions{AllowDnsResolutionFromRemoteVpc: &p.Requester.DNS}
	}
	if other != nil {
		resp.AccepterPeeringConnectionOptions = &query.PeeringOptions{AllowDnsResolutionFromRemoteVpc: &p.Accepter.DNS}
	}
	return resp, nil
}

func (v view) peeringSide(s store.PeeringSide) *query.VpcPeeringConnectionVpcInfo {
	out := &query.VpcPeeringConnectionVpcInfo{
		VpcId: text(s.VPC), OwnerId: &v.api.account, Region: &v.api.region, CidrBlock: new(s.CIDRs[0].String()),
		CidrBlockSet: collect(s.CIDRs, func(p netip.Prefix) query.CidrBlock { return query.CidrBlock{CidrBlock: new(p.String())} }),
		PeeringOptions: &query.PeeringOptions{
			AllowDnsResolutionFromRemoteVpc: new(s.DNS), AllowEgressFromLocalClassicLinkToRemoteVpc: new(false), AllowEgressFromLocalVpcToRemoteClassicLink: new(false),
		},
	}
	for _, p := range s.IPv6CIDRs {
		out.Ipv6CidrBlockSet = append(out.Ipv6CidrBlockSet, query.Ipv6CidrBlock{Ipv6CidrBlock: new(p.String())})
	}
	return out
}

func (v view) peering(p *store.Peering) query.VpcPeeringConnection {
	out := query.VpcPeeringConnection{
		VpcPeeringConnectionId: text(p.ID), RequesterVpcInfo: v.peeringSide(p.Requester), AccepterVpcInfo: v.peeringSide(p.Accepter),
		Status: &query.VpcPeeringConnectionStatus{Code: text(p.Status), Message: text(p.Message)}, TagSet: v.tags(string(p.ID)),
	}
	if p.Status == store.PeeringPending {
		out.ExpirationTime = moment(p.Due)
	}
	return out
}

func cidrStrings(s store.PeeringSide) []string { return collect(s.CIDRs, netip.Prefix.String) }

var peeringListing = listing[*store.Peering]{
	action: "DescribeVpcPeeringConnections",
	all:    func(v view) iter.Seq2[string, *store.Peering] { return entries(v.Peerings) },
	find:   findPeering,
	key:    func(p *store.Peering) string { return string(p.ID) },
	attrs: attributes[*store.Peering]{
		"vpc-peering-connection-id":     value(func(p *store.Peering) string { return string(p.ID) }),
		"status-code":                   value(func(p *store.Peering) string { return string(p.Status) }),
		"status-message":                value(func(p *store.Peering) string { return p.Message }),
		"requester-vpc-info.vpc-id":     value(func(p *store.Peering) string { return string(p.Requester.VPC) }),
		"accepter-vpc-info.vpc-id":      value(func(p *store.Peering) string { return string(p.Accepter.VPC) }),
		"requester-vpc-info.owner-id":   owned[*store.Peering],
		"accepter-vpc-info.owner-id":    owned[*store.Peering],
		"requester-vpc-info.cidr-block": func(_ view, p *store.Peering) []string { return cidrStrings(p.Requester) },
		"accepter-vpc-info.cidr-block":  func(_ view, p *store.Peering) []string { return cidrStrings(p.Accepter) },
		"expiration-time": value(func(p *store.Peering) string {
			if p.Status != store.PeeringPending {
				return ""
			}
			return p.Due.UTC().Format("2006-01-02T15:04:05.000Z")
		}),
	},
}

func (a *API) describePeerings(_ context.Context, req *query.DescribeVpcPeeringConnectionsRequest) (*query.DescribeVpcPeeringConnectionsResponse, error) {
	v := a.read()
	found, next, err := peeringListing.page(v, req.VpcPeeringConnectionId, req.Filter, req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	return &query.DescribeVpcPeeringConnectionsResponse{NextToken: next, VpcPeeringConnectionSet: collect(found, v.peering)}, nil
}
