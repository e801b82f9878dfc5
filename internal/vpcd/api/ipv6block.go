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

// amazonPool is the pool that EC2's own IPv6 blocks are of.
const amazonPool = "Amazon"

// newIPv6Block returns an association with an IPv6 block that no VPC has.
func newIPv6Block(s *store.State) (store.CIDRAssociation, error) {
	p, ok := s.FreeIPv6Block()
	if !ok {
		return store.CIDRAssociation{}, query.Errorf("InsufficientCidrBlocks", "There is no free IPv6 CIDR block left in %s.", store.IPv6Pool)
	}
	return store.CIDRAssociation{ID: vpc.NewID("vpc-cidr-assoc"), CIDR: p}, nil
}

// allowIPv6 adds to a VPC that has got its first IPv6 block what allows all of
// IPv6 beside that which allows all of IPv4: rule 101 of the default network ACL
// (VPC User Guide, "Default network ACL", 2026), and the egress rule of security
// groups (VPC User Guide, "Security groups", 2023). Where the rules of a
// direction are not those it came with, they stay as they are.
func allowIPv6(tx *store.Tx, v *store.VPC) {
	if len(v.IPv6CIDRs) != 1 {
		return
	}
	old := tx.DefaultACL(v.ID)
	acl := *old
	acl.Entries = slices.Clone(old.Entries)
	for _, egress := range []bool{false, true} {
		var have []store.ACLEntry
		for _, e := range acl.Entries {
			if e.Egress == egress {
				have = append(have, e)
			}
		}
		e := store.ACLEntry{Number: 100, Egress: egress, Protocol: -1, Allow: true, CIDR: anywhere, ICMPType: -1, ICMPCode: -1}
		if len(have) != 1 || have[0] != e {
			continue
		}
		e.Number, e.CIDR = 101, anywhereIPv6
		i, _ := entryAt(acl.Entries, egress, e.Number)
		acl.Entries = slices.Insert(acl.Entries, i, e)
	}
	if len(acl.Entries) != len(old.Entries) {
		tx.PutACL(&acl)
	}
	var groups []*store.Group
	for _, g := range tx.Groups.All() {
		if g.VPC == v.ID && onlyAllOut(g) {
			groups = append(groups, g)
		}
	}
	for _, old := range groups {
		g := *old
		g.Rules = append(slices.Clone(old.Rules), allOut(anywhereIPv6))
		tx.PutGroup(&g)
	}
}

// onlyAllOut reports whether the egress rules of a group are those it came with in
// a VPC without IPv6.
func onlyAllOut(g *store.Group) bool {
	n := 0
	for _, r := range g.Rules {
		if !r.Egress {
			continue
		}
		if n++; !r.SamePermission(allOut(anywhere)) {
			return false
		}
	}
	return n == 1
}

// associateIPv6 gives a VPC an IPv6 block.
func (a *API) associateIPv6(id string) (*query.AssociateVpcCidrBlockResponse, error) {
	var c store.CIDRAssociation
	after, err := a.update(func(tx *store.Tx) error {
		old, err := findVPC(&tx.State, id)
		if err != nil {
			return err
		}
		if most := a.quota(chaos.QuotaIPv6CIDRs); len(old.IPv6CIDRs) >= most {
			return query.Errorf("CidrLimitExceeded", "This network '%s' has met its maximum number of allowed CIDRs: %d", old.ID, most)
		}
		if c, err = newIPv6Block(&tx.State); err != nil {
			return err
		}
		if err := checkRoutes(&tx.State, old, c.CIDR); err != nil {
			return err
		}
		v := *old
		v.IPv6CIDRs = append(slices.Clone(old.IPv6CIDRs), c)
		tx.PutVPC(&v)
		allowIPv6(tx, &v)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.AssociateVpcCidrBlockResponse{VpcId: &id, Ipv6CidrBlockAssociation: after.ipv6Association(c, "associating")}, nil
}

// disassociateIPv6 takes the ith IPv6 block from a VPC. What allows IPv6 in
// network ACLs and security groups stays.
func disassociateIPv6(tx *store.Tx, old *store.VPC, i int) error {
	c := old.IPv6CIDRs[i]
	for _, n := range tx.Subnets.All() {
		if n.VPC == old.ID && n.IPv6.CIDR.IsValid() && c.CIDR.Overlaps(n.IPv6.CIDR) {
			return query.Errorf("InvalidCidrBlock.InUse", "The vpc %s currently has a subnet within CIDR block %s", old.ID, c.CIDR)
		}
	}
	dropLocal(tx, old, c.CIDR)
	v := *old
	v.IPv6CIDRs = slices.Delete(slices.Clone(old.IPv6CIDRs), i, i+1)
	tx.PutVPC(&v)
	return nil
}

func (v view) ipv6Association(c store.CIDRAssociation, state string) *query.VpcIpv6CidrBlockAssociation {
	return &query.VpcIpv6CidrBlockAssociation{
		AssociationId: &c.ID, Ipv6CidrBlock: new(c.CIDR.String()), Ipv6CidrBlockState: &query.CidrBlockState{State: &state},
		NetworkBorderGroup: &v.api.region, Ipv6Pool: new(amazonPool), Ipv6AddressAttribute: new("public"), IpSource: new("amazon"),
	}
}

// newSubnetIPv6 reads an IPv6 block for a subnet.
func newSubnetIPv6(s string) (store.CIDRAssociation, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || !p.Addr().Is6() || p.Addr().Is4In6() || p.Bits() != store.SubnetIPv6Bits {
		return store.CIDRAssociation{}, query.Errorf("InvalidParameterValue", "invalid value for parameter ipv6-cidr-block: %s. It must be a /%d.", s, store.SubnetIPv6Bits)
	}
	return store.CIDRAssociation{ID: vpc.NewID("subnet-cidr-assoc"), CIDR: p.Masked()}, nil
}

// checkSubnetIPv6 returns an error unless a subnet of the VPC may have the block.
func checkSubnetIPv6(s *store.State, v *store.VPC, p netip.Prefix) error {
	if !slices.ContainsFunc(v.IPv6CIDRs, func(c store.CIDRAssociation) bool { return c.CIDR.Contains(p.Addr()) }) {
		return query.Errorf("InvalidSubnet.Range", "The IPv6 CIDR '%s' is invalid: it is not within an IPv6 CIDR block of %s.", p, v.ID)
	}
	for _, o := range s.Subnets.All() {
		if o.VPC == v.ID && o.IPv6.CIDR == p {
			return query.Errorf("InvalidSubnet.Conflict", "The IPv6 CIDR '%s' conflicts with another subnet", p)
		}
	}
	return nil
}

func subnetIPv6(n *store.Subnet, state string) []query.SubnetIpv6CidrBlockAssociation {
	if !n.IPv6.CIDR.IsValid() {
		return []query.SubnetIpv6CidrBlockAssociation{}
	}
	return []query.SubnetIpv6CidrBlockAssociation{{
		AssociationId: new(n.IPv6.ID), Ipv6CidrBlock: new(n.IPv6.CIDR.String()), Ipv6CidrBlockState: &query.CidrBlockState{State: &state},
		Ipv6AddressAttribute: new("public"), IpSource: new("amazon"),
	}}
}

// ofSubnetIPv6 makes an attribute of a subnet's IPv6 block.
func ofSubnetIPv6(of func(x query.SubnetIpv6CidrBlockAssociation) *string) func(view, *store.Subnet) []string {
	return values(func(_ view, n *store.Subnet) []query.SubnetIpv6CidrBlockAssociation {
		return subnetIPv6(n, "associated")
	},
		func(_ view, x query.SubnetIpv6CidrBlockAssociation) string { return deref(of(x)) })
}

// associateSubnetCidrBlock gives a subnet its IPv6 block. That it has no second
// one is EC2's rule (EC2 API Reference, AssociateSubnetCidrBlock, 2026), the code
// of the refusal is inferred.
func (a *API) associateSubnetCidrBlock(_ context.Context, req *query.AssociateSubnetCidrBlockRequest) (*query.AssociateSubnetCidrBlockResponse, error) {
	if req.Ipv6CidrBlock == nil {
		return nil, query.Errorf("MissingParameter", "The request must contain the parameter ipv6CidrBlock")
	}
	c, err := newSubnetIPv6(*req.Ipv6CidrBlock)
	if err != nil {
		return nil, err
	}
	var n store.Subnet
	if _, err := a.update(func(tx *store.Tx) error {
		old, err := findSubnet(&tx.State, *req.SubnetId)
		if err != nil {
			return err
		}
		if old.IPv6.CIDR.IsValid() {
			return query.Errorf("CidrLimitExceeded", "The subnet '%s' has an IPv6 CIDR block, %s, and cannot have another one. Disassociate it first.", old.ID, old.IPv6.CIDR)
		}
		if err := checkSubnetIPv6(&tx.State, tx.VPC(old.VPC), c.CIDR); err != nil {
			return err
		}
		n = *old
		n.IPv6 = c
		tx.PutSubnet(&n)
		return nil
	}); err != nil {
		return nil, err
	}
	return &query.AssociateSubnetCidrBlockResponse{SubnetId: text(n.ID), Ipv6CidrBlockAssociation: &subnetIPv6(&n, "associating")[0]}, nil
}

// disassociateSubnetCidrBlock takes its IPv6 block from a subnet. The words for
// one that interfaces have addresses of are inferred.
func (a *API) disassociateSubnetCidrBlock(_ context.Context, req *query.DisassociateSubnetCidrBlockRequest) (*query.DisassociateSubnetCidrBlockResponse, error) {
	id := *req.AssociationId
	if err := checkID("subnet-cidr-assoc", id); err != nil {
		return nil, err
	}
	resp := &query.DisassociateSubnetCidrBlockResponse{}
	_, err := a.update(func(tx *store.Tx) error {
		for _, old := range tx.Subnets.All() {
			if old.IPv6.ID != id {
				continue
			}
			if old.AssignIPv6 {
				return query.Errorf("InvalidCidrBlock.InUse", "The subnet IPv6 CIDR block with association ID %s may not be disassociated, because its subnet has assign-ipv6-address-on-creation set to true.", id)
			}
			for _, e := range tx.ENIs.All() {
				if e.Subnet == old.ID && e.IPv6Slots() > 0 {
					return query.Errorf("InvalidCidrBlock.InUse", "The subnet IPv6 CIDR block with association ID %s may not be disassociated, because network interface %s has an address of it.", id, e.ID)
				}
			}
			resp.SubnetId, resp.Ipv6CidrBlockAssociation = text(old.ID), &subnetIPv6(old, "disassociating")[0]
			n := *old
			n.IPv6 = store.CIDRAssociation{}
			tx.PutSubnet(&n)
			return nil
		}
		return query.Errorf("InvalidSubnetCidrBlockAssociationID.NotFound", "The subnet CIDR block with association ID '%s' does not exist", id)
	})
	return resp, err
}
