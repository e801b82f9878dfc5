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

func (a *API) natHandlers(h map[string]query.Handler) {
	h["CreateNatGateway"] = handle("CreateNatGateway",
		"SubnetId AllocationId ConnectivityType PrivateIpAddress SecondaryAllocationId SecondaryPrivateIpAddress SecondaryPrivateIpAddressCount ClientToken TagSpecification", a.createNATGateway)
	h["DeleteNatGateway"] = handle("DeleteNatGateway", "NatGatewayId", a.deleteNATGateway)
	h["DescribeNatGateways"] = handle("DescribeNatGateways", "NatGatewayId Filter NextToken MaxResults", a.describeNATGateways)
}

// maxNATAddresses is how many addresses a NAT gateway may have (VPC User Guide,
// "NAT gateway basics", read 2026).
const maxNATAddresses = 8

// natFor is how long a deleted or failed NAT gateway is still described (same
// source: about an hour).
const natFor = time.Hour

// natWanted is a CreateNatGateway request, read.
type natWanted struct {
	private     bool
	allocations []string // of a public one, the primary first
	addrs       wanted
}

func parseNAT(req *query.CreateNatGatewayRequest) (natWanted, error) {
	n := natWanted{private: deref(req.ConnectivityType) == "private"}
	switch {
	case req.SubnetId == nil:
		return n, query.Errorf("MissingParameter", "The request must include the SubnetId parameter. Add the required parameter and retry the request.")
	case n.private && (req.AllocationId != nil || len(req.SecondaryAllocationId) > 0):
		return n, query.Errorf("InvalidParameterCombination", "A NAT gateway of the connectivity type private has no Elastic IP addresses")
	case !n.private && req.AllocationId == nil:
		return n, query.Errorf("MissingParameter", "The request must include the AllocationId parameter. Add the required parameter and retry the request.")
	case !n.private && req.SecondaryPrivateIpAddressCount != nil:
		return n, query.Errorf("InvalidParameterCombination", "SecondaryPrivateIpAddressCount is for NAT gateways of the connectivity type private")
	case !n.private && len(req.SecondaryPrivateIpAddress) > len(req.SecondaryAllocationId):
		return n, query.Errorf("InvalidParameterCombination", "There are more secondary private IP addresses than secondary allocation ids")
	}
	var list []query.PrivateIpAddressSpecification
	for _, s := range req.SecondaryPrivateIpAddress {
		list = append(list, query.PrivateIpAddressSpecification{PrivateIpAddress: &s})
	}
	var err error
	if n.addrs, err = parseWanted(req.PrivateIpAddress, list, req.SecondaryPrivateIpAddressCount, nil, nil); err != nil {
		return n, err
	}
	if !n.private {
		n.allocations = append([]string{*req.AllocationId}, req.SecondaryAllocationId...)
		n.addrs.addrCount = len(req.SecondaryAllocationId) - len(n.addrs.secondary)
	}
	if 1+n.addrs.slots() > maxNATAddresses {
		return n, query.Errorf("InvalidParameterValue", "A NAT gateway has %d addresses at most", maxNATAddresses)
	}
	return n, nil
}

func (a *API) createNATGateway(_ context.Context, req *query.CreateNatGatewayRequest) (*query.CreateNatGatewayResponse, error) {
	want, err := parseNAT(req)
	if err != nil {
		return nil, err
	}
	tags, err := specified(req.TagSpecification, "natgateway")
	if err != nil {
		return nil, err
	}
	params := *req
	params.ClientToken, params.DryRun = nil, nil
	var made string
	after, err := a.update(func(tx *store.Tx) error {
		s, err := findSubnet(&tx.State, *req.SubnetId)
		if err != nil {
			return err
		}
		made, err = onceOnly(tx, "CreateNatGateway", req.ClientToken, params, a.now(), func() (string, error) {
			n, err := a.makeNAT(tx, s, want)
			if err != nil {
				return "", err
			}
			n.ClientToken = deref(req.ClientToken)
			tx.PutNAT(n)
			tx.SetTags(string(n.ID), tags["natgateway"])
			return string(n.ID), nil
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	n, err := findNAT(after.State, made)
	if err != nil {
		return nil, err
	}
	return &query.CreateNatGatewayResponse{NatGateway: new(after.natGateway(n)), ClientToken: req.ClientToken}, nil
}

// makeNAT makes a NAT gateway with its requester-managed interface, whose
// addresses the Elastic IP addresses lead to.
func (a *API) makeNAT(tx *store.Tx, s *store.Subnet, want natWanted) (*store.NATGateway, error) {
	beside := 0
	for _, o := range tx.NATs.All() {
		if o.State == store.NATPending || o.State == store.NATAvailable || o.State == store.NATDeleting {
			if n := tx.Subnet(o.Subnet); n != nil && n.Zone == s.Zone {
				beside++
			}
		}
	}
	if most := a.quota(chaos.QuotaNATs); beside >= most {
		return nil, quotaReached("NatGatewayLimitExceeded", "NAT gateways of the availability zone", most)
	}
	elastic, err := freeElastic(&tx.State, want.allocations)
	if err != nil {
		return nil, err
	}
	now := a.now()
	n := &store.NATGateway{
		ID: vpc.NATGatewayID(vpc.NewID("nat")), VPC: s.VPC, Subnet: s.ID, Private: want.private, State: store.NATPending, Due: a.due(now), Created: now,
	}
	e, err := a.makeENI(tx, s, spec{addrs: want.addrs, description: "Interface for NAT Gateway " + string(n.ID)})
	if err != nil {
		return nil, err
	}
	// No group guards it, and what it forwards is not its own.
	e.Groups, e.SourceDestCheck = nil, false
	e.RequesterManaged, e.RequesterID, e.NAT = true, "amazon-vpc", n.ID
	e.Attachment = a.attachmentOf("", 0, 1, false)
	e.Attachment.InstanceOwner, e.Attachment.Status, e.Attachment.Due = "amazon-aws", store.Attached, time.Time{}
	tx.PutENI(e)
	n.ENI = e.ID
	for i, private := range append([]netip.Addr{e.Primary}, e.Secondary...) {
		x := store.NATAddress{Private: private, Primary: i == 0}
		if !want.private {
			x.Allocation, x.Public = elastic[i].ID, elastic[i].Public
			tx.PutAddress(&store.Address{
				ID: elastic[i].ID, Public: elastic[i].Public, Created: elastic[i].Created,
				Association: vpc.NewID("eipassoc"), ENI: e.ID, Private: private, NAT: n.ID,
			})
		}
		n.Addresses = append(n.Addresses, x)
	}
	return n, nil
}

// deleteNATGateway begins to delete a NAT gateway. Routes to it are black holes
// at once.
func (a *API) deleteNATGateway(_ context.Context, req *query.DeleteNatGatewayRequest) (*query.DeleteNatGatewayResponse, error) {
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findNAT(&tx.State, *req.NatGatewayId)
		if err != nil {
			return err
		}
		n := *old
		now := a.now()
		switch old.State {
		case store.NATPending, store.NATAvailable:
			n.State, n.Deleted, n.Due = store.NATDeleting, now, a.due(now)
		case store.NATFailed: // nothing is left of it
			n.State, n.Deleted, n.Due = store.NATDeleted, now, now.Add(natFor)
		default:
			return nil // it is on its way
		}
		tx.PutNAT(&n)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.DeleteNatGatewayResponse{NatGatewayId: req.NatGatewayId}, nil
}

// settleNAT finishes what a NAT gateway is about. A public one in a VPC without
// an internet gateway fails (VPC User Guide, "Troubleshoot NAT gateways", read
// 2026).
func settleNAT(tx *store.Tx, old *store.NATGateway, now time.Time) {
	n := *old
	switch old.State {
	case store.NATPending:
		n.State, n.Due = store.NATAvailable, time.Time{}
		if !n.Private && tx.GatewayOf(n.VPC) == nil {
			n.State, n.Due = store.NATFailed, now.Add(natFor)
			n.Failure, n.Message = "Gateway.NotAttached", "Network "+string(n.VPC)+" has no Internet gateway attached"
			tx.DeleteENI(n.ENI)
		}
	case store.NATDeleting:
		n.State, n.Due = store.NATDeleted, now.Add(natFor)
		tx.DeleteENI(n.ENI)
	case store.NATDeleted, store.NATFailed:
		tx.DeleteNAT(n.ID)
		return
	default:
		settleDrains(tx, &n, now)
	}
	tx.PutNAT(&n)
}

func (v view) natGateway(n *store.NATGateway) query.NatGateway {
	out := query.NatGateway{
		NatGatewayId: text(n.ID), VpcId: text(n.VPC), SubnetId: text(n.Subnet), State: text(n.State), ConnectivityType: new("public"),
		AvailabilityMode: new("zonal"), CreateTime: moment(n.Created), FailureCode: text(n.Failure), FailureMessage: text(n.Message),
		TagSet: v.tags(string(n.ID)),
	}
	if n.Private {
		out.ConnectivityType = new("private")
	}
	if !n.Deleted.IsZero() {
		out.DeleteTime = moment(n.Deleted)
	}
	out.NatGatewayAddressSet = v.natAddresses(n, n.Addresses, "")
	return out
}

var natListing = listing[*store.NATGateway]{
	action: "DescribeNatGateways",
	all:    func(v view) iter.Seq2[string, *store.NATGateway] { return entries(v.NATs) },
	find:   findNAT,
	key:    func(n *store.NATGateway) string { return string(n.ID) },
	attrs: attributes[*store.NATGateway]{
		"nat-gateway-id": value(func(n *store.NATGateway) string { return string(n.ID) }),
		"state":          value(func(n *store.NATGateway) string { return string(n.State) }),
		"subnet-id":      value(func(n *store.NATGateway) string { return string(n.Subnet) }),
		"vpc-id":         value(func(n *store.NATGateway) string { return string(n.VPC) }),
	},
}

func (a *API) describeNATGateways(_ context.Context, req *query.DescribeNatGatewaysRequest) (*query.DescribeNatGatewaysResponse, error) {
	v := a.read()
	found, next, err := natListing.page(v, req.NatGatewayId, req.Filter, req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	return &query.DescribeNatGatewaysResponse{NextToken: next, NatGatewaySet: collect(found, v.natGateway)}, nil
}
