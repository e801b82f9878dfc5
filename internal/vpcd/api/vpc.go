package api

import (
	"cmp"
	"context"
	"net/netip"
	"slices"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func (a *API) vpcHandlers(h map[string]query.Handler) {
	h["CreateVpc"] = handle("CreateVpc", "CidrBlock AmazonProvidedIpv6CidrBlock InstanceTenancy TagSpecification", a.createVpc)
	h["DeleteVpc"] = handle("DeleteVpc", "VpcId", a.deleteVpc)
	h["DescribeVpcs"] = handle("DescribeVpcs", "VpcId Filter NextToken MaxResults", a.describeVpcs)
	h["ModifyVpcAttribute"] = handle("ModifyVpcAttribute", "VpcId EnableDnsHostnames EnableDnsSupport EnableNetworkAddressUsageMetrics", a.modifyVpcAttribute)
	h["DescribeVpcAttribute"] = handle("DescribeVpcAttribute", "VpcId Attribute", a.describeVpcAttribute)
	h["AssociateVpcCidrBlock"] = handle("AssociateVpcCidrBlock", "VpcId CidrBlock AmazonProvidedIpv6CidrBlock", a.associateVpcCidrBlock)
	h["DisassociateVpcCidrBlock"] = handle("DisassociateVpcCidrBlock", "AssociationId", a.disassociateVpcCidrBlock)
}

// parseCIDR reads an IPv4 block and brings it to its canonical form.
func parseCIDR(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || !p.Addr().Is4() {
		return netip.Prefix{}, query.Errorf("InvalidParameterValue", "Value (%s) for parameter cidrBlock is invalid. This is not a valid CIDR block.", s)
	}
	return p.Masked(), nil
}

func parseVPCBlock(s *string) (netip.Prefix, error) {
	if s == nil {
		return netip.Prefix{}, query.Errorf("MissingParameter", "The request must contain the parameter cidrBlock")
	}
	p, err := parseCIDR(*s)
	if err != nil {
		return p, err
	}
	if p.Bits() < 16 || p.Bits() > 28 {
		return p, query.Errorf("InvalidVpc.Range", "The CIDR '%s' is invalid.", p)
	}
	return p, nil
}

func (a *API) createVpc(_ context.Context, req *query.CreateVpcRequest) (*query.CreateVpcResponse, error) {
	cidr, err := parseVPCBlock(req.CidrBlock)
	if err != nil {
		return nil, err
	}
	tags, err := specified(req.TagSpecification, "vpc")
	if err != nil {
		return nil, err
	}
	v := &store.VPC{
		ID:         vpc.VPCID(vpc.NewID("vpc")),
		CIDRs:      []store.CIDRAssociation{{ID: vpc.NewID("vpc-cidr-assoc"), CIDR: cidr}},
		Tenancy:    cmp.Or(deref(req.InstanceTenancy), "default"),
		DNSSupport: true,
		Created:    a.now(),
	}
	after, err := a.update(func(tx *store.Tx) error {
		if most := a.quota(chaos.QuotaVPCs); tx.VPCs.Len() >= most {
			return quotaReached("VpcLimitExceeded", "VPCs", most)
		}
		if most := a.quota(chaos.QuotaGroups); tx.Groups.Len() >= most { // it comes with one
			return quotaReached("SecurityGroupLimitExceeded", "security groups", most)
		}
		v.VNI = tx.NewVNI()
		// One set of DHCP options serves the region; the first VPC makes it.
		for _, o := range tx.State.DHCPOptions.All() {
			if o.Default {
				v.DHCPOptions = o.ID
			}
		}
		v.DHCPOptions = cmp.Or(v.DHCPOptions, vpc.NewID("dopt"))
		if deref(req.AmazonProvidedIpv6CidrBlock) {
			c, err := newIPv6Block(&tx.State)
			if err != nil {
				return err
			}
			v.IPv6CIDRs = append(v.IPv6CIDRs, c)
		}
		g := newGroup(v, defaultGroupName, "default VPC security group")
		g.Rules = append(g.Rules, store.Rule{ID: vpc.NewID("sgr"), Protocol: "-1", From: -1, To: -1, Group: g.ID, GroupOwner: a.account})
		v.DefaultGroup = g.ID
		tx.PutVPC(v)
		allowIPv6(tx, v)
		tx.PutGroup(g)
		tx.SetTags(string(v.ID), tags["vpc"])
		return nil
	})
	if err != nil {
		return nil, err
	}
	out := after.vpc(v, "pending")
	out.Ipv6CidrBlockAssociationSet = collect(v.IPv6CIDRs, func(c store.CIDRAssociation) query.VpcIpv6CidrBlockAssociation {
		return *after.ipv6Association(c, "associating")
	})
	return &query.CreateVpcResponse{Vpc: &out}, nil
}

func (a *API) deleteVpc(_ context.Context, req *query.DeleteVpcRequest) (*query.DeleteVpcResponse, error) {
	_, err := a.update(func(tx *store.Tx) error {
		v, err := findVPC(&tx.State, *req.VpcId)
		if err != nil {
			return err
		}
		depends := depends("vpc", string(v.ID))
		for _, n := range tx.Subnets.All() {
			if n.VPC == v.ID {
				return depends
			}
		}
		for _, g := range tx.Groups.All() {
			if g.VPC == v.ID && g.ID != v.DefaultGroup {
				return depends
			}
		}
		for _, t := range tx.RouteTables.All() {
			if t.VPC == v.ID && t.Main() == nil {
				return depends
			}
		}
		for _, l := range tx.ACLs.All() {
			if l.VPC == v.ID && !l.Default {
				return depends
			}
		}
		for _, g := range tx.EgressOnlyGateways.All() {
			if g.VPC == v.ID {
				return depends
			}
		}
		if tx.GatewayOf(v.ID) != nil || peeringsOf(&tx.State, v.ID, store.PeeringActive)+peeringsOf(&tx.State, v.ID, store.PeeringPending) > 0 {
			return depends
		}
		tx.DeleteGroup(v.DefaultGroup)
		tx.DeleteVPC(v.ID)
		return nil
	})
	return nil, err
}

var vpcAttributes = attributes[*store.VPC]{
	"vpc-id":          func(_ view, o *store.VPC) []string { return []string{string(o.ID)} },
	"cidr":            func(_ view, o *store.VPC) []string { return []string{o.CIDRs[0].CIDR.String()} },
	"dhcp-options-id": func(_ view, o *store.VPC) []string { return []string{o.DHCPOptions} },
	"is-default":      func(view, *store.VPC) []string { return []string{"false"} },
	"owner-id":        func(v view, _ *store.VPC) []string { return []string{v.api.account} },
	"state":           func(view, *store.VPC) []string { return []string{"available"} },
	"cidr-block-association.state": func(view, *store.VPC) []string {
		return []string{"associated"}
	},
	"cidr-block-association.cidr-block": func(_ view, o *store.VPC) []string {
		return collect(o.CIDRs, func(c store.CIDRAssociation) string { return c.CIDR.String() })
	},
	"cidr-block-association.association-id": func(_ view, o *store.VPC) []string {
		return collect(o.CIDRs, func(c store.CIDRAssociation) string { return c.ID })
	},
	"ipv6-cidr-block-association.ipv6-cidr-block": func(_ view, o *store.VPC) []string {
		return collect(o.IPv6CIDRs, func(c store.CIDRAssociation) string { return c.CIDR.String() })
	},
	"ipv6-cidr-block-association.association-id": func(_ view, o *store.VPC) []string {
		return collect(o.IPv6CIDRs, func(c store.CIDRAssociation) string { return c.ID })
	},
	"ipv6-cidr-block-association.ipv6-pool": func(_ view, o *store.VPC) []string {
		return collect(o.IPv6CIDRs, func(store.CIDRAssociation) string { return amazonPool })
	},
	"ipv6-cidr-block-association.state": func(_ view, o *store.VPC) []string {
		return collect(o.IPv6CIDRs, func(store.CIDRAssociation) string { return "associated" })
	},
}

// collect maps a slice.
func collect[T, R any](in []T, fn func(T) R) []R {
	out := make([]R, len(in))
	for i, x := range in {
		out[i] = fn(x)
	}
	return out
}

func (a *API) describeVpcs(_ context.Context, req *query.DescribeVpcsRequest) (*query.DescribeVpcsResponse, error) {
	v := a.read()
	match, err := matcher(v, "DescribeVpcs", req.Filter, vpcAttributes, nil, func(v view, o *store.VPC) map[string]string { return v.TagsOf(string(o.ID)) })
	if err != nil {
		return nil, err
	}
	c, err := paging("DescribeVpcs", req.Filter, len(req.VpcId), req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	items := entries(v.VPCs)
	if len(req.VpcId) > 0 {
		named, err := findAll(v.State, req.VpcId, findVPC)
		if err != nil {
			return nil, err
		}
		items = listed(named, func(o *store.VPC) string { return string(o.ID) })
	}
	found, next := take(c, items, match)
	return &query.DescribeVpcsResponse{
		NextToken: next,
		VpcSet:    collect(found, func(o *store.VPC) query.Vpc { return v.vpc(o, "available") }),
	}, nil
}

func (v view) vpc(o *store.VPC, state string) query.Vpc {
	out := query.Vpc{
		OwnerId:                 &v.api.account,
		InstanceTenancy:         &o.Tenancy,
		CidrBlockAssociationSet: collect(o.CIDRs, func(c store.CIDRAssociation) query.VpcCidrBlockAssociation { return *association(c, "associated") }),
		IsDefault:               new(false),
		TagSet:                  v.tags(string(o.ID)),
		BlockPublicAccessStates: &query.BlockPublicAccessStates{InternetGatewayBlockMode: new("off")},
		VpcId:                   text(o.ID),
		State:                   &state,
		CidrBlock:               new(o.CIDRs[0].CIDR.String()),
		DhcpOptionsId:           text(o.DHCPOptions),
	}
	for _, c := range o.IPv6CIDRs { // without any EC2 leaves the list out
		out.Ipv6CidrBlockAssociationSet = append(out.Ipv6CidrBlockAssociationSet, *v.ipv6Association(c, "associated"))
	}
	return out
}

func association(c store.CIDRAssociation, state string) *query.VpcCidrBlockAssociation {
	return &query.VpcCidrBlockAssociation{AssociationId: &c.ID, CidrBlock: new(c.CIDR.String()), CidrBlockState: &query.CidrBlockState{State: &state}}
}

func (a *API) modifyVpcAttribute(_ context.Context, req *query.ModifyVpcAttributeRequest) (*query.ModifyVpcAttributeResponse, error) {
	given := 0
	for _, b := range []*query.AttributeBooleanValue{req.EnableDnsHostnames, req.EnableDnsSupport, req.EnableNetworkAddressUsageMetrics} {
		if b != nil && b.Value != nil {
			given++
		}
	}
	if given != 1 {
		return nil, query.Errorf("InvalidParameterCombination", "One attribute must be given, and no more than one. Got %d.", given)
	}
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findVPC(&tx.State, *req.VpcId)
		if err != nil {
			return err
		}
		v := *old
		for _, s := range []struct {
			from *query.AttributeBooleanValue
			to   *bool
		}{{req.EnableDnsHostnames, &v.DNSHostnames}, {req.EnableDnsSupport, &v.DNSSupport}, {req.EnableNetworkAddressUsageMetrics, &v.UsageMetrics}} {
			if s.from != nil && s.from.Value != nil {
				*s.to = *s.from.Value
			}
		}
		tx.PutVPC(&v)
		return nil
	})
	return nil, err
}

func (a *API) describeVpcAttribute(_ context.Context, req *query.DescribeVpcAttributeRequest) (*query.DescribeVpcAttributeResponse, error) {
	v, err := findVPC(a.read().State, *req.VpcId)
	if err != nil {
		return nil, err
	}
	resp := &query.DescribeVpcAttributeResponse{VpcId: text(v.ID)}
	switch *req.Attribute {
	case "enableDnsSupport":
		resp.EnableDnsSupport = &query.AttributeBooleanValue{Value: &v.DNSSupport}
	case "enableDnsHostnames":
		resp.EnableDnsHostnames = &query.AttributeBooleanValue{Value: &v.DNSHostnames}
	case "enableNetworkAddressUsageMetrics":
		resp.EnableNetworkAddressUsageMetrics = &query.AttributeBooleanValue{Value: &v.UsageMetrics}
	default:
		return nil, query.Errorf("InvalidParameterValue", "Value (%s) for parameter attribute is invalid. Unknown attribute.", *req.Attribute)
	}
	return resp, nil
}

// families are the ranges whose blocks a VPC may not mix (VPC user guide, "VPC
// CIDR blocks", the table of restrictions; read 2026). What is in none of them
// may stand beside any, except beside 198.19.0.0/16.
var families = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("198.19.0.0/16"),
}

func familyOf(p netip.Prefix) int {
	return slices.IndexFunc(families, func(f netip.Prefix) bool { return f.Contains(p.Addr()) })
}

func (a *API) associateVpcCidrBlock(_ context.Context, req *query.AssociateVpcCidrBlockRequest) (*query.AssociateVpcCidrBlockResponse, error) {
	if deref(req.AmazonProvidedIpv6CidrBlock) {
		if req.CidrBlock != nil {
			return nil, query.Errorf("InvalidParameterCombination", "The parameters cidrBlock and amazonProvidedIpv6CidrBlock exclude each other")
		}
		return a.associateIPv6(*req.VpcId)
	}
	cidr, err := parseVPCBlock(req.CidrBlock)
	if err != nil {
		return nil, err
	}
	c := store.CIDRAssociation{ID: vpc.NewID("vpc-cidr-assoc"), CIDR: cidr}
	if _, err := a.update(func(tx *store.Tx) error {
		old, err := findVPC(&tx.State, *req.VpcId)
		if err != nil {
			return err
		}
		if most := a.quota(chaos.QuotaCIDRs); len(old.CIDRs) >= most {
			return query.Errorf("CidrLimitExceeded", "This network '%s' has met its maximum number of allowed CIDRs: %d", old.ID, most)
		}
		for _, have := range old.CIDRs {
			if have.CIDR.Overlaps(cidr) {
				return query.Errorf("CidrConflict", "The CIDR '%s' conflicts with another network in its network: '%s'", cidr, have.CIDR)
			}
			if f, g := familyOf(have.CIDR), familyOf(cidr); f != g && f >= 0 && g >= 0 {
				return query.Errorf("InvalidVpc.Range", "The CIDR '%s' is restricted. Use a CIDR from the same private address range as the current VPC CIDR, or use a publicly-routable CIDR or one of 100.64.0.0/10.", cidr)
			}
		}
		for _, p := range tx.Peerings.All() {
			if o := tx.VPC(p.Other(old.ID)); p.Status == store.PeeringActive && o != nil && overlap(blocks(o), []netip.Prefix{cidr}) {
				return query.Errorf("CidrConflict", "The CIDR '%s' overlaps a CIDR of '%s', which VPC peering connection '%s' leads to", cidr, o.ID, p.ID)
			}
		}
		if err := checkRoutes(&tx.State, old, cidr); err != nil {
			return err
		}
		v := *old
		v.CIDRs = append(slices.Clone(old.CIDRs), c)
		tx.PutVPC(&v)
		return nil
	}); err != nil {
		return nil, err
	}
	return &query.AssociateVpcCidrBlockResponse{VpcId: req.VpcId, CidrBlockAssociation: association(c, "associating")}, nil
}

// checkRoutes returns an error if a VPC may not have a block because there are
// routes of its own within.
func checkRoutes(s *store.State, v *store.VPC, cidr netip.Prefix) error {
	for _, t := range s.RouteTables.All() {
		for _, r := range t.Routes {
			if t.VPC == v.ID && r.CIDR.IsValid() && cidr.Bits() <= r.CIDR.Bits() && cidr.Contains(r.CIDR.Addr()) {
				return query.Errorf("CidrConflict", "The CIDR '%s' conflicts with the route %s of route table '%s'. Delete it first.", cidr, r.CIDR, t.ID)
			}
		}
	}
	return nil
}

// dropLocal takes the route to a block that a VPC has no more from its route
// tables, of those where it had another target.
func dropLocal(tx *store.Tx, v *store.VPC, cidr netip.Prefix) {
	for _, t := range tx.RouteTables.All() {
		if k := slices.IndexFunc(t.Routes, func(r store.Route) bool { return r.CIDR == cidr }); k >= 0 && t.VPC == v.ID {
			without := *t
			without.Routes = slices.Delete(slices.Clone(t.Routes), k, k+1)
			tx.PutRouteTable(&without)
		}
	}
}

func (a *API) disassociateVpcCidrBlock(_ context.Context, req *query.DisassociateVpcCidrBlockRequest) (*query.DisassociateVpcCidrBlockResponse, error) {
	id := *req.AssociationId
	if err := checkID("vpc-cidr-assoc", id); err != nil {
		return nil, err
	}
	resp := &query.DisassociateVpcCidrBlockResponse{}
	_, err := a.update(func(tx *store.Tx) error {
		for _, old := range tx.VPCs.All() {
			if i := slices.IndexFunc(old.IPv6CIDRs, func(c store.CIDRAssociation) bool { return c.ID == id }); i >= 0 {
				c := old.IPv6CIDRs[i]
				resp.VpcId, resp.Ipv6CidrBlockAssociation = text(old.ID), a.fresh(&tx.State).ipv6Association(c, "disassociating")
				return disassociateIPv6(tx, old, i)
			}
			i := slices.IndexFunc(old.CIDRs, func(c store.CIDRAssociation) bool { return c.ID == id })
			if i < 0 {
				continue
			}
			c := old.CIDRs[i]
			if i == 0 {
				return query.Errorf("OperationNotPermitted", "The vpc CIDR block with association ID %s may not be disassociated. It is the primary IPv4 CIDR block of the VPC", id)
			}
			for _, n := range tx.Subnets.All() {
				if n.VPC == old.ID && c.CIDR.Overlaps(n.CIDR) {
					return query.Errorf("DependencyViolation", "The vpc CIDR block with association ID %s has a subnet, '%s'. Delete it first.", id, n.ID)
				}
			}
			dropLocal(tx, old, c.CIDR)
			v := *old
			v.CIDRs = slices.Delete(slices.Clone(old.CIDRs), i, i+1)
			tx.PutVPC(&v)
			resp.VpcId, resp.CidrBlockAssociation = text(v.ID), association(c, "disassociating")
			return nil
		}
		return query.Errorf("InvalidVpcCidrBlockAssociationID.NotFound", "The vpc CIDR block association ID '%s' does not exist", id)
	})
	return resp, err
}
