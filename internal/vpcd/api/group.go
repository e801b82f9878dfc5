package api

import (
	"context"
	"net/netip"
	"slices"
	"strings"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

const defaultGroupName = "default"

func (a *API) groupHandlers(h map[string]query.Handler) {
	h["CreateSecurityGroup"] = handle("CreateSecurityGroup", "GroupName GroupDescription VpcId TagSpecification", a.createSecurityGroup)
	h["DeleteSecurityGroup"] = handle("DeleteSecurityGroup", "GroupId", a.deleteSecurityGroup)
	h["DescribeSecurityGroups"] = handle("DescribeSecurityGroups", "GroupId Filter NextToken MaxResults", a.describeSecurityGroups)
	a.ruleHandlers(h)
}

// newGroup makes a group as EC2 does: nothing comes in, everything goes out, of
// IPv6 if the VPC has a block of it.
func newGroup(v *store.VPC, name, description string) *store.Group {
	g := &store.Group{
		ID: vpc.SecurityGroupID(vpc.NewID("sg")), VPC: v.ID, Name: name, Description: description,
		Rules: []store.Rule{allOut(anywhere)},
	}
	if len(v.IPv6CIDRs) > 0 {
		g.Rules = append(g.Rules, allOut(anywhereIPv6))
	}
	return g
}

// allOut is the rule that allows everything to go out to a block.
func allOut(to netip.Prefix) store.Rule {
	return store.Rule{ID: vpc.NewID("sgr"), Egress: true, Protocol: "-1", From: -1, To: -1, CIDR: to}
}

// groupText reports whether s is a legal name or description of a group.
func groupText(s string) bool {
	return len(s) <= 255 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ._-:/()#,@[]+=&;{}!$*") == ""
}

func (a *API) createSecurityGroup(_ context.Context, req *query.CreateSecurityGroupRequest) (*query.CreateSecurityGroupResponse, error) {
	name, description := *req.GroupName, *req.GroupDescription
	switch {
	case name == "" || !groupText(name) || strings.TrimSpace(name) != name:
		return nil, query.Errorf("InvalidParameterValue", "Value (%s) for parameter groupName is invalid. It must not be empty. Constraints: up to 255 characters of a-z, A-Z, 0-9, spaces, and ._-:/()#,@[]+=&;{}!$*", name)
	case strings.HasPrefix(strings.ToLower(name), "sg-"):
		return nil, query.Errorf("InvalidParameterValue", "Invalid value '%s' for groupName: group names may not be in the format sg-*", name)
	case name == defaultGroupName:
		return nil, query.Errorf("InvalidGroup.Reserved", "The security group name '%s' is reserved", name)
	case description == "" || !groupText(description):
		return nil, query.Errorf("InvalidParameterValue", "Invalid security group description. Valid descriptions are strings of 1 to 255 characters from the following set: a-zA-Z0-9. _-:/()#,@[]+=&;{}!$*")
	case req.VpcId == nil:
		return nil, query.Errorf("VPCIdNotSpecified", "No default VPC for this user. Specify a VpcId.")
	}
	tags, err := specified(req.TagSpecification, "security-group")
	if err != nil {
		return nil, err
	}
	var g *store.Group
	after, err := a.update(func(tx *store.Tx) error {
		v, err := findVPC(&tx.State, *req.VpcId)
		if err != nil {
			return err
		}
		if most := a.quota(chaos.QuotaGroups); tx.Groups.Len() >= most {
			return quotaReached("SecurityGroupLimitExceeded", "security groups", most)
		}
		for _, o := range tx.Groups.All() {
			if o.VPC == v.ID && o.Name == name {
				return query.Errorf("InvalidGroup.Duplicate", "The security group '%s' already exists for VPC '%s'", name, v.ID)
			}
		}
		g = newGroup(v, name, description)
		tx.PutGroup(g)
		tx.SetTags(string(g.ID), tags["security-group"])
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.CreateSecurityGroupResponse{
		GroupId: text(g.ID), TagSet: after.tags(string(g.ID)), SecurityGroupArn: new(a.arn("security-group", string(g.ID))),
	}, nil
}

func (a *API) deleteSecurityGroup(_ context.Context, req *query.DeleteSecurityGroupRequest) (*query.DeleteSecurityGroupResponse, error) {
	if req.GroupId == nil {
		return nil, query.Errorf("MissingParameter", "The request must contain the parameter groupId")
	}
	_, err := a.update(func(tx *store.Tx) error {
		g, err := findGroup(&tx.State, *req.GroupId)
		if err != nil {
			return err
		}
		if g.Name == defaultGroupName {
			return query.Errorf("CannotDelete", "the specified group: \"%s\" name: \"%s\" cannot be deleted by a user", g.ID, g.Name)
		}
		depends := query.Errorf("DependencyViolation", "resource %s has a dependent object", g.ID)
		for _, e := range tx.ENIs.All() {
			if slices.Contains(e.Groups, g.ID) {
				return depends
			}
		}
		for _, o := range tx.Groups.All() {
			// In another VPC the rule stays and matches nothing.
			if o.ID != g.ID && o.VPC == g.VPC && slices.ContainsFunc(o.Rules, func(r store.Rule) bool { return r.Group == g.ID }) {
				return depends
			}
		}
		tx.DeleteGroup(g.ID)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.DeleteSecurityGroupResponse{Return: new(true), GroupId: req.GroupId}, nil
}

// ruleValues makes an attribute of those rules of a group that go one way.
func ruleValues(egress bool, value func(r store.Rule) string) func(view, *store.Group) []string {
	return func(_ view, g *store.Group) []string {
		var out []string
		for _, r := range g.Rules {
			if s := value(r); r.Egress == egress && s != "" {
				out = append(out, s)
			}
		}
		return out
	}
}

var groupAttributes = func() attributes[*store.Group] {
	attrs := attributes[*store.Group]{
		"description": func(_ view, g *store.Group) []string { return []string{g.Description} },
		"group-id":    func(_ view, g *store.Group) []string { return []string{string(g.ID)} },
		"group-name":  func(_ view, g *store.Group) []string { return []string{g.Name} },
		"owner-id":    func(v view, _ *store.Group) []string { return []string{v.api.account} },
		"vpc-id":      func(_ view, g *store.Group) []string { return []string{string(g.VPC)} },
	}
	for prefix, egress := range map[string]bool{"ip-permission.": false, "egress.ip-permission.": true} {
		for name, value := range map[string]func(r store.Rule) string{
			"cidr":           func(r store.Rule) string { return ruleCIDR(r, true) },
			"ipv6-cidr":      func(r store.Rule) string { return ruleCIDR(r, false) },
			"from-port":      func(r store.Rule) string { return rulePort(r, r.From) },
			"to-port":        func(r store.Rule) string { return rulePort(r, r.To) },
			"group-id":       func(r store.Rule) string { return string(r.Group) },
			"prefix-list-id": func(r store.Rule) string { return r.PrefixList },
			"protocol":       func(r store.Rule) string { return r.Protocol },
			"user-id":        func(r store.Rule) string { return r.GroupOwner },
		} {
			attrs[prefix+name] = ruleValues(egress, value)
		}
		attrs[prefix+"group-name"] = func(v view, g *store.Group) []string {
			var out []string
			for _, r := range g.Rules {
				if o := v.Group(r.Group); r.Egress == egress && o != nil {
					out = append(out, o.Name)
				}
			}
			return out
		}
	}
	return attrs
}()

func (a *API) describeSecurityGroups(_ context.Context, req *query.DescribeSecurityGroupsRequest) (*query.DescribeSecurityGroupsResponse, error) {
	v := a.read()
	match, err := matcher(v, "DescribeSecurityGroups", req.Filter, groupAttributes, nil, func(v view, g *store.Group) map[string]string { return v.TagsOf(string(g.ID)) })
	if err != nil {
		return nil, err
	}
	c, err := paging("DescribeSecurityGroups", req.Filter, len(req.GroupId), req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	items := entries(v.Groups)
	if len(req.GroupId) > 0 {
		named, err := findAll(v.State, req.GroupId, findGroup)
		if err != nil {
			return nil, err
		}
		items = listed(named, func(g *store.Group) string { return string(g.ID) })
	}
	found, next := take(c, items, match)
	return &query.DescribeSecurityGroupsResponse{NextToken: next, SecurityGroupInfo: collect(found, v.group)}, nil
}

func (v view) group(g *store.Group) query.SecurityGroup {
	return query.SecurityGroup{
		GroupId:             text(g.ID),
		GroupName:           &g.Name,
		GroupDescription:    &g.Description,
		VpcId:               text(g.VPC),
		OwnerId:             &v.api.account,
		SecurityGroupArn:    new(v.api.arn("security-group", string(g.ID))),
		TagSet:              v.tags(string(g.ID)),
		IpPermissions:       v.permissions(g, false),
		IpPermissionsEgress: v.permissions(g, true),
	}
}

// permissions returns the rules of one direction, those of the same protocol
// and ports together.
func (v view) permissions(g *store.Group, egress bool) []query.IpPermission {
	type head struct {
		protocol string
		from, to int
	}
	at := map[head]int{}
	out := []query.IpPermission{}
	for _, r := range g.Rules {
		if r.Egress != egress {
			continue
		}
		h := head{r.Protocol, r.From, r.To}
		i, ok := at[h]
		if !ok {
			i = len(out)
			at[h] = i
			out = append(out, query.IpPermission{
				IpProtocol: new(r.Protocol), Groups: []query.UserIdGroupPair{}, IpRanges: []query.IpRange{},
				Ipv6Ranges: []query.Ipv6Range{}, PrefixListIds: []query.PrefixListId{},
			})
			if portsShown(r) {
				out[i].FromPort, out[i].ToPort = integer(r.From), integer(r.To)
			}
		}
		v.addPeer(&out[i], r)
	}
	return out
}

// groupPair describes the group that a rule names.
func (v view) groupPair(r store.Rule) query.UserIdGroupPair {
	out := query.UserIdGroupPair{
		GroupId: text(r.Group), UserId: text(r.GroupOwner), Description: text(r.Description), VpcId: text(r.GroupVPC), VpcPeeringConnectionId: text(r.Peering),
	}
	if p := v.Peering(r.Peering); p != nil {
		out.PeeringStatus = text(p.Status)
	} else if r.Peering != "" {
		out.PeeringStatus = text(store.PeeringDeleted)
	}
	return out
}

// addPeer adds the peer of a rule to a permission.
func (v view) addPeer(p *query.IpPermission, r store.Rule) {
	switch {
	case r.Group != "":
		p.Groups = append(p.Groups, v.groupPair(r))
	case r.PrefixList != "":
		p.PrefixListIds = append(p.PrefixListIds, query.PrefixListId{PrefixListId: new(r.PrefixList), Description: text(r.Description)})
	case r.CIDR.Addr().Is4():
		p.IpRanges = append(p.IpRanges, query.IpRange{CidrIp: new(r.CIDR.String()), Description: text(r.Description)})
	default:
		p.Ipv6Ranges = append(p.Ipv6Ranges, query.Ipv6Range{CidrIpv6: new(r.CIDR.String()), Description: text(r.Description)})
	}
}

// groupsFor looks up the groups that an interface in a VPC is to have: those
// named, or the default group of the VPC.
func (a *API) groupsFor(s *store.State, v *store.VPC, ids []string) ([]vpc.SecurityGroupID, error) {
	if len(ids) == 0 {
		return []vpc.SecurityGroupID{v.DefaultGroup}, nil
	}
	var out []vpc.SecurityGroupID
	for _, id := range ids {
		g, err := findGroup(s, id)
		if err != nil {
			return nil, err
		}
		if g.VPC != v.ID {
			return nil, query.Errorf("InvalidGroup.NotFound", "The security group '%s' does not exist in VPC '%s'", id, v.ID)
		}
		if !slices.Contains(out, g.ID) {
			out = append(out, g.ID)
		}
	}
	if most := a.quota(chaos.QuotaGroupsPerInterface); len(out) > most {
		return nil, query.Errorf("SecurityGroupsPerInterfaceLimitExceeded", "You have exceeded the maximum number of security groups allowed per network interface: %d", most)
	}
	return out, nil
}

// groupSet describes the groups of an interface.
func (v view) groupSet(ids []vpc.SecurityGroupID) []query.GroupIdentifier {
	return collect(ids, func(id vpc.SecurityGroupID) query.GroupIdentifier {
		out := query.GroupIdentifier{GroupId: text(id)}
		if g := v.Group(id); g != nil {
			out.GroupName = &g.Name
		}
		return out
	})
}
