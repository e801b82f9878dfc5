package api

import (
	"context"
	"iter"
	"slices"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func (a *API) groupVPCHandlers(h map[string]query.Handler) {
	h["AssociateSecurityGroupVpc"] = handle("AssociateSecurityGroupVpc", "GroupId VpcId", a.associateSecurityGroupVpc)
	h["DisassociateSecurityGroupVpc"] = handle("DisassociateSecurityGroupVpc", "GroupId VpcId", a.disassociateSecurityGroupVpc)
	h["DescribeSecurityGroupVpcAssociations"] = handle("DescribeSecurityGroupVpcAssociations", "Filter NextToken MaxResults", a.describeSecurityGroupVpcAssociations)
}

// Associations here are made and ended before the call is answered.
const (
	groupAssociated    = "associated"
	groupDisassociated = "disassociated"
)

// associateSecurityGroupVpc lets interfaces of another VPC have a group. Asked
// for what there is it changes nothing. Default groups and default VPCs cannot
// (EC2 API reference, AssociateSecurityGroupVpc); AWS's codes for that are not
// published.
func (a *API) associateSecurityGroupVpc(_ context.Context, req *query.AssociateSecurityGroupVpcRequest) (*query.AssociateSecurityGroupVpcResponse, error) {
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findGroup(&tx.State, *req.GroupId)
		if err != nil {
			return err
		}
		v, err := findVPC(&tx.State, *req.VpcId)
		if err != nil {
			return err
		}
		switch {
		case old.Name == defaultGroupName:
			return query.Errorf("OperationNotPermitted", "The default security group '%s' cannot be associated with another VPC.", old.ID)
		case v.DefaultForZone:
			return query.Errorf("OperationNotPermitted", "No security group of another VPC can be associated with the default VPC '%s'.", v.ID)
		case old.VPC == v.ID:
			return query.Errorf("InvalidParameterValue", "The security group '%s' was created in VPC '%s', and needs no association with it.", old.ID, v.ID)
		case old.UsableIn(v.ID):
			return nil
		}
		g := *old
		g.VPCs = append(slices.Clone(old.VPCs), v.ID)
		slices.Sort(g.VPCs)
		tx.PutGroup(&g)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.AssociateSecurityGroupVpcResponse{State: new(groupAssociated)}, nil
}

// disassociateSecurityGroupVpc takes a group from a VPC that does not use it:
// neither has an interface of it the group, nor does a group of it name it.
func (a *API) disassociateSecurityGroupVpc(_ context.Context, req *query.DisassociateSecurityGroupVpcRequest) (*query.DisassociateSecurityGroupVpcResponse, error) {
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findGroup(&tx.State, *req.GroupId)
		if err != nil {
			return err
		}
		v, err := findVPC(&tx.State, *req.VpcId)
		if err != nil {
			return err
		}
		if !slices.Contains(old.VPCs, v.ID) {
			return query.Errorf("InvalidParameterValue", "The security group '%s' is not associated with VPC '%s'.", old.ID, v.ID)
		}
		for _, e := range tx.ENIs.All() {
			if e.VPC == v.ID && slices.Contains(e.Groups, old.ID) {
				return query.Errorf("DependencyViolation", "The network interface '%s' of VPC '%s' has the security group '%s'. Give it other groups first.", e.ID, v.ID, old.ID)
			}
		}
		for _, o := range tx.Groups.All() {
			if o.VPC == v.ID && namesWithin(o, old.ID) {
				return query.Errorf("DependencyViolation", "A rule of the security group '%s' of VPC '%s' names '%s'. Revoke it first.", o.ID, v.ID, old.ID)
			}
		}
		dropGroupVPC(tx, old, v.ID)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.DisassociateSecurityGroupVpcResponse{State: new(groupDisassociated)}, nil
}

// namesWithin reports whether a rule of a group names another as one of its own
// VPC, not by a peering connection.
func namesWithin(g *store.Group, id vpc.SecurityGroupID) bool {
	return slices.ContainsFunc(g.Rules, func(r store.Rule) bool { return r.Group == id && r.GroupVPC == "" })
}

func dropGroupVPC(tx *store.Tx, old *store.Group, id vpc.VPCID) {
	g := *old
	g.VPCs = slices.DeleteFunc(slices.Clone(old.VPCs), func(v vpc.VPCID) bool { return v == id })
	tx.PutGroup(&g)
}

// dropGroupVPCs ends the associations of other VPCs' groups with one that goes.
func dropGroupVPCs(tx *store.Tx, id vpc.VPCID) {
	var held []*store.Group
	for _, g := range tx.Groups.All() {
		if slices.Contains(g.VPCs, id) {
			held = append(held, g)
		}
	}
	for _, g := range held {
		dropGroupVPC(tx, g, id)
	}
}

// groupVPC is a group and a VPC that it is associated with.
type groupVPC struct {
	group vpc.SecurityGroupID
	vpc   vpc.VPCID
}

// groupVPCs iterates over associations, by group and VPC.
func (v view) groupVPCs() iter.Seq2[string, groupVPC] {
	return func(yield func(string, groupVPC) bool) {
		for id, g := range entries(v.Groups) {
			for _, other := range g.VPCs {
				if !yield(id+" "+string(other), groupVPC{g.ID, other}) {
					return
				}
			}
		}
	}
}

var groupVPCAttributes = attributes[groupVPC]{
	"group-id":       value(func(x groupVPC) string { return string(x.group) }),
	"group-owner-id": owned[groupVPC],
	"state":          value(func(groupVPC) string { return groupAssociated }),
	"vpc-id":         value(func(x groupVPC) string { return string(x.vpc) }),
	"vpc-owner-id":   owned[groupVPC],
}

func (a *API) describeSecurityGroupVpcAssociations(_ context.Context, req *query.DescribeSecurityGroupVpcAssociationsRequest) (*query.DescribeSecurityGroupVpcAssociationsResponse, error) {
	v := a.read()
	match, err := matcher(v, "DescribeSecurityGroupVpcAssociations", req.Filter, groupVPCAttributes, nil, nil)
	if err != nil {
		return nil, err
	}
	c, err := paging("DescribeSecurityGroupVpcAssociations", req.Filter, 0, req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	found, next := take(c, v.groupVPCs(), match)
	return &query.DescribeSecurityGroupVpcAssociationsResponse{NextToken: next, SecurityGroupVpcAssociationSet: collect(found, func(x groupVPC) query.SecurityGroupVpcAssociation {
		return query.SecurityGroupVpcAssociation{
			GroupId: text(x.group), VpcId: text(x.vpc), VpcOwnerId: &a.account, GroupOwnerId: &a.account, State: new(groupAssociated),
		}
	})}, nil
}
