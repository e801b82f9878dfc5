package api

import (
	"context"

	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func (a *API) groupRefHandlers(h map[string]query.Handler) {
	h["DescribeSecurityGroupReferences"] = handle("DescribeSecurityGroupReferences", "GroupId", a.describeSecurityGroupReferences)
	h["DescribeStaleSecurityGroups"] = handle("DescribeStaleSecurityGroups", "VpcId NextToken MaxResults", a.describeStaleSecurityGroups)
	h["GetSecurityGroupsForVpc"] = handle("GetSecurityGroupsForVpc", "VpcId Filter NextToken MaxResults", a.getSecurityGroupsForVpc)
}

// describeSecurityGroupReferences lists the VPCs at the other end of a peering
// connection whose groups name one of the given groups.
func (a *API) describeSecurityGroupReferences(_ context.Context, req *query.DescribeSecurityGroupReferencesRequest) (*query.DescribeSecurityGroupReferencesResponse, error) {
	v := a.read()
	groups, err := findAll(v.State, req.GroupId, findGroup)
	if err != nil {
		return nil, err
	}
	type reference struct{ group, vpc, peering string }
	seen := map[reference]bool{}
	resp := &query.DescribeSecurityGroupReferencesResponse{SecurityGroupReferenceSet: []query.SecurityGroupReference{}}
	for _, g := range groups {
		for _, o := range v.Groups.All() {
			for _, r := range o.Rules {
				ref := reference{string(g.ID), string(o.VPC), string(r.Peering)}
				if r.Group != g.ID || r.GroupVPC == "" || seen[ref] {
					continue
				}
				seen[ref] = true
				resp.SecurityGroupReferenceSet = append(resp.SecurityGroupReferenceSet, query.SecurityGroupReference{
					GroupId: &ref.group, ReferencingVpcId: &ref.vpc, VpcPeeringConnectionId: &ref.peering,
				})
			}
		}
	}
	return resp, nil
}

// describeStaleSecurityGroups lists the groups of a VPC with rules that name a
// group of another VPC which is gone, or whose peering connection is.
func (a *API) describeStaleSecurityGroups(_ context.Context, req *query.DescribeStaleSecurityGroupsRequest) (*query.DescribeStaleSecurityGroupsResponse, error) {
	v := a.read()
	o, err := findVPC(v.State, *req.VpcId)
	if err != nil {
		return nil, err
	}
	c, err := paging("DescribeStaleSecurityGroups", within(string(o.ID)), 0, req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	found, next := take(c, entries(v.Groups), func(g *store.Group) bool {
		return g.VPC == o.ID && len(v.stale(g, false))+len(v.stale(g, true)) > 0
	})
	return &query.DescribeStaleSecurityGroupsResponse{NextToken: next, StaleSecurityGroupSet: collect(found, func(g *store.Group) query.StaleSecurityGroup {
		return query.StaleSecurityGroup{
			GroupId: text(g.ID), GroupName: &g.Name, Description: &g.Description, VpcId: text(g.VPC),
			StaleIpPermissions: v.stale(g, false), StaleIpPermissionsEgress: v.stale(g, true),
		}
	})}, nil
}

// stale returns the stale rules of one direction.
func (v view) stale(g *store.Group, egress bool) []query.StaleIpPermission {
	out := []query.StaleIpPermission{}
	for _, r := range g.Rules {
		if r.Egress != egress || !v.Stale(g, r) {
			continue
		}
		p := query.StaleIpPermission{IpProtocol: new(r.Protocol), IpRanges: []string{}, PrefixListIds: []string{}, Groups: []query.UserIdGroupPair{v.groupPair(r)}}
		if portsShown(r) {
			p.FromPort, p.ToPort = integer(r.From), integer(r.To)
		}
		out = append(out, p)
	}
	return out
}

var forVPCAttributes = attributes[*store.Group]{
	"group-id":       groupAttributes["group-id"],
	"group-name":     groupAttributes["group-name"],
	"description":    groupAttributes["description"],
	"owner-id":       groupAttributes["owner-id"],
	"primary-vpc-id": groupAttributes["vpc-id"],
}

// getSecurityGroupsForVpc lists the groups that interfaces of a VPC may have: its
// own, and those of others that are associated with it.
func (a *API) getSecurityGroupsForVpc(_ context.Context, req *query.GetSecurityGroupsForVpcRequest) (*query.GetSecurityGroupsForVpcResponse, error) {
	v := a.read()
	o, err := findVPC(v.State, *req.VpcId)
	if err != nil {
		return nil, err
	}
	match, err := matcher(v, "GetSecurityGroupsForVpc", req.Filter, forVPCAttributes, nil, nil)
	if err != nil {
		return nil, err
	}
	c, err := paging("GetSecurityGroupsForVpc", req.Filter, 0, req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	found, next := take(c, entries(v.Groups), func(g *store.Group) bool { return g.UsableIn(o.ID) && match(g) })
	return &query.GetSecurityGroupsForVpcResponse{NextToken: next, SecurityGroupForVpcSet: collect(found, func(g *store.Group) query.SecurityGroupForVpc {
		return query.SecurityGroupForVpc{
			GroupId: text(g.ID), GroupName: &g.Name, Description: &g.Description, OwnerId: &a.account, PrimaryVpcId: text(g.VPC), TagSet: v.tags(string(g.ID)),
		}
	})}, nil
}
