package api

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

var (
	anywhere     = netip.MustParsePrefix("0.0.0.0/0")
	anywhereIPv6 = netip.MustParsePrefix("::/0")
)

func (a *API) ruleHandlers(h map[string]query.Handler) {
	const flat = " CidrIp FromPort ToPort IpProtocol "
	const permissions = " IpPermissions.IpProtocol IpPermissions.FromPort IpPermissions.ToPort IpPermissions.IpRanges IpPermissions.Ipv6Ranges" +
		" IpPermissions.Groups.GroupId IpPermissions.Groups.UserId IpPermissions.Groups.Description IpPermissions.Groups.VpcId" +
		" IpPermissions.Groups.VpcPeeringConnectionId IpPermissions.PrefixListIds "
	h["AuthorizeSecurityGroupIngress"] = handle("AuthorizeSecurityGroupIngress", "GroupId TagSpecification"+flat+permissions, a.authorizeIngress)
	h["AuthorizeSecurityGroupEgress"] = handle("AuthorizeSecurityGroupEgress", "GroupId TagSpecification"+flat+permissions, a.authorizeEgress)
	h["RevokeSecurityGroupIngress"] = handle("RevokeSecurityGroupIngress", "GroupId SecurityGroupRuleId"+flat+permissions, a.revokeIngress)
	h["RevokeSecurityGroupEgress"] = handle("RevokeSecurityGroupEgress", "GroupId SecurityGroupRuleId"+flat+permissions, a.revokeEgress)
	h["DescribeSecurityGroupRules"] = handle("DescribeSecurityGroupRules", "SecurityGroupRuleId Filter NextToken MaxResults", a.describeSecurityGroupRules)
	h["ModifySecurityGroupRules"] = handle("ModifySecurityGroupRules", "GroupId SecurityGroupRule", a.modifySecurityGroupRules)
	h["UpdateSecurityGroupRuleDescriptionsIngress"] = handle("UpdateSecurityGroupRuleDescriptionsIngress",
		"GroupId SecurityGroupRuleDescription"+permissions, a.updateDescriptionsIngress)
	h["UpdateSecurityGroupRuleDescriptionsEgress"] = handle("UpdateSecurityGroupRuleDescriptionsEgress",
		"GroupId SecurityGroupRuleDescription"+permissions, a.updateDescriptionsEgress)
}

func ruleCIDR(r store.Rule, v4 bool) string {
	if r.CIDR.IsValid() && r.CIDR.Addr().Is4() == v4 {
		return r.CIDR.String()
	}
	return ""
}

// portsShown reports whether a rule's ports are part of its description: those
// of a rule for all protocols are not.
func portsShown(r store.Rule) bool { return r.Protocol != "-1" }

func rulePort(r store.Rule, port int) string {
	if !portsShown(r) {
		return ""
	}
	return strconv.Itoa(port)
}

// protocolNames are the numbers that EC2 shows by name (IANA protocol numbers).
var protocolNames = map[string]string{"6": "tcp", "17": "udp", "1": "icmp", "58": "icmpv6", "all": "-1"}

// parseHead reads protocol and ports of a permission.
func parseHead(p query.IpPermission) (store.Rule, error) {
	r := store.Rule{Protocol: strings.ToLower(deref(p.IpProtocol)), From: -1, To: -1}
	if r.Protocol == "" {
		return r, query.Errorf("MissingParameter", "The request must contain the parameter ipProtocol")
	}
	r.Protocol = cmp.Or(protocolNames[r.Protocol], r.Protocol)
	from, to := int(deref(p.FromPort)), int(deref(p.ToPort))
	switch r.Protocol {
	case "tcp", "udp":
		if p.FromPort == nil || p.ToPort == nil {
			return r, query.Errorf("InvalidParameterValue", "Invalid value 'Must specify both from and to ports with TCP/UDP.' for portRange.")
		}
		if from == -1 && to == -1 {
			from, to = 0, 65535
		}
		if from < 0 || to > 65535 || from > to {
			return r, query.Errorf("InvalidParameterValue", "Invalid TCP/UDP port range (%d:%d)", from, to)
		}
		r.From, r.To = from, to
	case "icmp", "icmpv6":
		if p.FromPort != nil {
			r.From = from
		}
		if p.ToPort != nil {
			r.To = to
		}
		if r.From < -1 || r.From > 255 || r.To < -1 || r.To > 255 || r.From == -1 && r.To != -1 {
			return r, query.Errorf("InvalidParameterValue", "Invalid ICMP type and code (%d:%d)", r.From, r.To)
		}
	case "-1":
	default:
		if n, err := strconv.Atoi(r.Protocol); err != nil || n < 0 || n > 255 {
			return r, query.Errorf("InvalidParameterValue", "Invalid value '%s' for IP protocol. Unknown protocol.", r.Protocol)
		}
	}
	return r, nil
}

// parsePermissions reads rules in either of their forms. The rules have no
// identifiers yet.
func (a *API) parsePermissions(s *store.State, g *store.Group, egress bool, list []query.IpPermission, flat query.IpPermission, cidr *string) ([]store.Rule, error) {
	if flat.IpProtocol != nil || flat.FromPort != nil || flat.ToPort != nil || cidr != nil {
		if len(list) > 0 {
			return nil, query.Errorf("InvalidParameterCombination", "The parameter ipPermissions may not be used together with ipProtocol, ports and cidrIp")
		}
		if cidr == nil {
			return nil, query.Errorf("MissingParameter", "The request must contain the parameter cidrIp")
		}
		flat.IpRanges = []query.IpRange{{CidrIp: cidr}}
		list = []query.IpPermission{flat}
	}
	var out []store.Rule
	for _, p := range list {
		head, err := parseHead(p)
		if err != nil {
			return nil, err
		}
		head.Egress = egress
		n := len(out)
		for _, x := range p.IpRanges {
			r := head
			if r.CIDR, err = ruleBlock(deref(x.CidrIp), true); err != nil {
				return nil, err
			}
			r.Description = deref(x.Description)
			out = append(out, r)
		}
		for _, x := range p.Ipv6Ranges {
			r := head
			if r.CIDR, err = ruleBlock(deref(x.CidrIpv6), false); err != nil {
				return nil, err
			}
			r.Description = deref(x.Description)
			out = append(out, r)
		}
		for _, x := range p.Groups {
			r := head
			if err := a.groupPeer(s, g, &r, x); err != nil {
				return nil, err
			}
			r.Description = deref(x.Description)
			out = append(out, r)
		}
		for _, x := range p.PrefixListIds {
			r := head
			list, err := findPrefixList(s, deref(x.PrefixListId))
			if err != nil {
				return nil, err
			}
			r.PrefixList, r.Description = string(list.ID), deref(x.Description)
			out = append(out, r)
		}
		if len(out) == n {
			return nil, query.Errorf("InvalidPermission.Malformed", "A permission names no peer: give a CIDR block, a security group or a prefix list")
		}
	}
	for i, r := range out {
		if !groupText(r.Description) {
			return nil, badRuleDescription()
		}
		if slices.ContainsFunc(out[:i], r.SamePermission) {
			return nil, query.Errorf("InvalidParameterValue", "The same permission must not appear multiple times")
		}
	}
	return out, nil
}

// groupPeer makes a group the peer of a rule of g: one of the same VPC, or of
// one that an active peering connection leads to. A group that is gone may be
// named as long as a rule of g names it.
func (a *API) groupPeer(s *store.State, g *store.Group, r *store.Rule, x query.UserIdGroupPair) error {
	id := deref(x.GroupId)
	peer, err := findGroup(s, id)
	if err != nil {
		if i := slices.IndexFunc(g.Rules, func(o store.Rule) bool { return o.GroupVPC != "" && string(o.Group) == id }); i >= 0 {
			r.Group, r.GroupOwner, r.GroupVPC, r.Peering = g.Rules[i].Group, g.Rules[i].GroupOwner, g.Rules[i].GroupVPC, g.Rules[i].Peering
			return nil
		}
		return err
	}
	wrong := x.VpcId != nil && *x.VpcId != string(peer.VPC) || x.UserId != nil && *x.UserId != a.account
	if peer.VPC != g.VPC {
		p := s.PeeringBetween(g.VPC, peer.VPC)
		if p == nil || x.VpcPeeringConnectionId != nil && *x.VpcPeeringConnectionId != string(p.ID) {
			i := slices.IndexFunc(g.Rules, func(o store.Rule) bool { return o.Group == peer.ID })
			if i < 0 {
				wrong = true
			} else { // it was reached once
				r.GroupVPC, r.Peering = g.Rules[i].GroupVPC, g.Rules[i].Peering
			}
		} else {
			r.GroupVPC, r.Peering = peer.VPC, p.ID
		}
	}
	if wrong {
		return query.Errorf("InvalidGroup.NotFound", "You have specified two resources that belong to different networks: '%s' and '%s'.", g.ID, peer.ID)
	}
	r.Group, r.GroupOwner = peer.ID, a.account
	return nil
}

func ruleBlock(s string, v4 bool) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Addr().Is4() != v4 || p.Addr().Is4In6() {
		return p, query.Errorf("InvalidParameterValue", "CIDR block %s is malformed", s)
	}
	return p.Masked(), nil
}

func (a *API) authorizeIngress(_ context.Context, req *query.AuthorizeSecurityGroupIngressRequest) (*query.AuthorizeSecurityGroupIngressResponse, error) {
	rules, err := a.authorize(req.GroupId, false, req.IpPermissions, query.IpPermission{IpProtocol: req.IpProtocol, FromPort: req.FromPort, ToPort: req.ToPort}, req.CidrIp, req.TagSpecification)
	if err != nil {
		return nil, err
	}
	return &query.AuthorizeSecurityGroupIngressResponse{Return: new(true), SecurityGroupRuleSet: rules}, nil
}

func (a *API) authorizeEgress(_ context.Context, req *query.AuthorizeSecurityGroupEgressRequest) (*query.AuthorizeSecurityGroupEgressResponse, error) {
	rules, err := a.authorize(req.GroupId, true, req.IpPermissions, query.IpPermission{IpProtocol: req.IpProtocol, FromPort: req.FromPort, ToPort: req.ToPort}, req.CidrIp, req.TagSpecification)
	if err != nil {
		return nil, err
	}
	return &query.AuthorizeSecurityGroupEgressResponse{Return: new(true), SecurityGroupRuleSet: rules}, nil
}

func (a *API) authorize(group *string, egress bool, list []query.IpPermission, flat query.IpPermission, cidr *string, specs []query.TagSpecification) ([]query.SecurityGroupRule, error) {
	if group == nil {
		return nil, query.Errorf("MissingParameter", "The request must contain the parameter groupId")
	}
	tags, err := specified(specs, "security-group-rule")
	if err != nil {
		return nil, err
	}
	var made []store.Rule
	after, err := a.update(func(tx *store.Tx) error {
		old, err := findGroup(&tx.State, *group)
		if err != nil {
			return err
		}
		made, err = a.parsePermissions(&tx.State, old, egress, list, flat, cidr)
		if err != nil {
			return err
		}
		if len(made) == 0 {
			return query.Errorf("MissingParameter", "The request must contain the parameter ipPermissions")
		}
		g := *old
		g.Rules = slices.Clone(old.Rules)
		for i, r := range made {
			if slices.ContainsFunc(old.Rules, r.SamePermission) {
				return query.Errorf("InvalidPermission.Duplicate", "the specified rule %q already exists", describe(r))
			}
			made[i].ID = vpc.NewID("sgr")
			g.Rules = append(g.Rules, made[i])
			tx.SetTags(made[i].ID, tags["security-group-rule"])
		}
		if err := a.checkRuleCount(&tx.State, g.Rules, egress); err != nil {
			return err
		}
		tx.PutGroup(&g)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return collect(made, func(r store.Rule) query.SecurityGroupRule { return after.rule(*group, r) }), nil
}

// checkRuleCount returns an error if a group may not have these rules.
func (a *API) checkRuleCount(s *store.State, rules []store.Rule, egress bool) error {
	if most := a.quota(chaos.QuotaRules); countRules(s, rules, egress, true) > most || countRules(s, rules, egress, false) > most {
		return query.Errorf("RulesPerSecurityGroupLimitExceeded", "The maximum number of rules per security group has been reached.")
	}
	return nil
}

// countRules counts the rules of one direction and address family; one whose
// peer is a group counts in both families, one whose peer is a prefix list
// counts for as many as that may have.
func countRules(s *store.State, rules []store.Rule, egress, v4 bool) int {
	n := 0
	for _, r := range rules {
		switch {
		case r.Egress != egress:
		case r.PrefixList != "":
			if p := s.PrefixList(vpc.PrefixListID(r.PrefixList)); p != nil && p.V6 != v4 {
				n += p.MaxEntries
			}
		case !r.CIDR.IsValid() || r.CIDR.Addr().Is4() == v4:
			n++
		}
	}
	return n
}

// describe says what a rule allows, in the words of EC2's messages.
func describe(r store.Rule) string {
	peer := cmp.Or(string(r.Group), r.PrefixList)
	if peer == "" {
		peer = r.CIDR.String()
	}
	if r.Protocol == "-1" {
		return fmt.Sprintf("peer: %s, ALL, ALLOW", peer)
	}
	return fmt.Sprintf("peer: %s, %s, from port: %d, to port: %d, ALLOW", peer, strings.ToUpper(r.Protocol), r.From, r.To)
}

func (a *API) revokeIngress(_ context.Context, req *query.RevokeSecurityGroupIngressRequest) (*query.RevokeSecurityGroupIngressResponse, error) {
	gone, err := a.revoke(req.GroupId, false, req.SecurityGroupRuleId, req.IpPermissions, query.IpPermission{IpProtocol: req.IpProtocol, FromPort: req.FromPort, ToPort: req.ToPort}, req.CidrIp)
	if err != nil {
		return nil, err
	}
	return &query.RevokeSecurityGroupIngressResponse{Return: new(true), UnknownIpPermissionSet: []query.IpPermission{}, RevokedSecurityGroupRuleSet: gone}, nil
}

func (a *API) revokeEgress(_ context.Context, req *query.RevokeSecurityGroupEgressRequest) (*query.RevokeSecurityGroupEgressResponse, error) {
	gone, err := a.revoke(req.GroupId, true, req.SecurityGroupRuleId, req.IpPermissions, query.IpPermission{IpProtocol: req.IpProtocol, FromPort: req.FromPort, ToPort: req.ToPort}, req.CidrIp)
	if err != nil {
		return nil, err
	}
	return &query.RevokeSecurityGroupEgressResponse{Return: new(true), UnknownIpPermissionSet: []query.IpPermission{}, RevokedSecurityGroupRuleSet: gone}, nil
}

// revoke removes rules. There are no default VPCs here, so that a rule that
// does not exist is always an error and nothing is revoked.
func (a *API) revoke(group *string, egress bool, ids []string, list []query.IpPermission, flat query.IpPermission, cidr *string) ([]query.RevokedSecurityGroupRule, error) {
	if group == nil {
		return nil, query.Errorf("MissingParameter", "The request must contain the parameter groupId")
	}
	var gone []query.RevokedSecurityGroupRule
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findGroup(&tx.State, *group)
		if err != nil {
			return err
		}
		wanted, err := a.parsePermissions(&tx.State, old, egress, list, flat, cidr)
		if err != nil {
			return err
		}
		if (len(wanted) > 0) == (len(ids) > 0) {
			return query.Errorf("InvalidParameterCombination", "Give either the ids of rules or permissions")
		}
		g := *old
		g.Rules = slices.Clone(old.Rules)
		drop := func(i int) {
			gone = append(gone, revoked(g.ID, g.Rules[i]))
			tx.SetTags(g.Rules[i].ID, nil)
			g.Rules = slices.Delete(g.Rules, i, i+1)
		}
		for _, id := range ids {
			if err := checkID("sgr", id); err != nil {
				return err
			}
			i := slices.IndexFunc(g.Rules, func(r store.Rule) bool { return r.ID == id && r.Egress == egress })
			if i < 0 {
				return query.Errorf("InvalidSecurityGroupRuleId.NotFound", "The security group rule ID '%s' does not exist", id)
			}
			drop(i)
		}
		for _, r := range wanted {
			i := slices.IndexFunc(g.Rules, r.SamePermission)
			if i < 0 {
				return query.Errorf("InvalidPermission.NotFound", "The specified rule does not exist in this security group: %q", describe(r))
			}
			drop(i)
		}
		tx.PutGroup(&g)
		return nil
	})
	return gone, err
}

func revoked(g vpc.SecurityGroupID, r store.Rule) query.RevokedSecurityGroupRule {
	return query.RevokedSecurityGroupRule{
		SecurityGroupRuleId: new(r.ID), GroupId: text(g), IsEgress: new(r.Egress), IpProtocol: new(r.Protocol),
		FromPort: integer(r.From), ToPort: integer(r.To), CidrIpv4: text(ruleCIDR(r, true)), CidrIpv6: text(ruleCIDR(r, false)),
		PrefixListId: text(r.PrefixList), ReferencedGroupId: text(r.Group), Description: text(r.Description),
	}
}

func (v view) rule(group string, r store.Rule) query.SecurityGroupRule {
	out := query.SecurityGroupRule{
		SecurityGroupRuleId: new(r.ID), GroupId: &group, GroupOwnerId: &v.api.account, IsEgress: new(r.Egress), IpProtocol: new(r.Protocol),
		FromPort: integer(r.From), ToPort: integer(r.To), CidrIpv4: text(ruleCIDR(r, true)), CidrIpv6: text(ruleCIDR(r, false)),
		PrefixListId: text(r.PrefixList), Description: text(r.Description), TagSet: v.tags(r.ID),
		SecurityGroupRuleArn: new(v.api.arn("security-group-rule", r.ID)),
	}
	if r.Group != "" {
		out.ReferencedGroupInfo = &query.ReferencedGroupInfo{GroupId: text(r.Group), UserId: text(r.GroupOwner)}
		pair := v.groupPair(r)
		out.ReferencedGroupInfo.VpcPeeringConnectionId, out.ReferencedGroupInfo.PeeringStatus = pair.VpcPeeringConnectionId, pair.PeeringStatus
		if out.ReferencedGroupInfo.VpcId = pair.VpcId; pair.VpcId == nil {
			if g := v.Group(r.Group); g != nil {
				out.ReferencedGroupInfo.VpcId = text(g.VPC)
			}
		}
	}
	return out
}

// groupRule is a rule with the group that it is of.
type groupRule struct {
	group *store.Group
	store.Rule
}

// findRule looks a rule up by its id.
func findRule(s *store.State, id string) (*store.Group, store.Rule, error) {
	if err := checkID("sgr", id); err != nil {
		return nil, store.Rule{}, err
	}
	for _, g := range s.Groups.All() {
		if i := slices.IndexFunc(g.Rules, func(r store.Rule) bool { return r.ID == id }); i >= 0 {
			return g, g.Rules[i], nil
		}
	}
	return nil, store.Rule{}, query.Errorf("InvalidSecurityGroupRuleId.NotFound", "The security group rule ID '%s' does not exist", id)
}

var ruleAttributes = attributes[groupRule]{
	"group-id":               func(_ view, r groupRule) []string { return []string{string(r.group.ID)} },
	"security-group-rule-id": func(_ view, r groupRule) []string { return []string{r.ID} },
}

func (a *API) describeSecurityGroupRules(_ context.Context, req *query.DescribeSecurityGroupRulesRequest) (*query.DescribeSecurityGroupRulesResponse, error) {
	v := a.read()
	match, err := matcher(v, "DescribeSecurityGroupRules", req.Filter, ruleAttributes, nil, func(v view, r groupRule) map[string]string { return v.TagsOf(r.ID) })
	if err != nil {
		return nil, err
	}
	c, err := paging("DescribeSecurityGroupRules", req.Filter, len(req.SecurityGroupRuleId), req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	items := allRules(v.State)
	if len(req.SecurityGroupRuleId) > 0 {
		var named []groupRule
		for _, id := range req.SecurityGroupRuleId {
			g, r, err := findRule(v.State, id)
			if err != nil {
				return nil, err
			}
			named = append(named, groupRule{g, r})
		}
		items = listed(named, func(r groupRule) string { return r.ID })
	}
	found, next := take(c, items, match)
	return &query.DescribeSecurityGroupRulesResponse{NextToken: next, SecurityGroupRuleSet: collect(found, func(r groupRule) query.SecurityGroupRule {
		return v.rule(string(r.group.ID), r.Rule)
	})}, nil
}

// allRules iterates over all rules by group and id.
func allRules(s *store.State) iter.Seq2[string, groupRule] {
	return func(yield func(string, groupRule) bool) {
		for _, g := range s.Groups.All() {
			rules := slices.Clone(g.Rules)
			slices.SortFunc(rules, func(a, b store.Rule) int { return cmp.Compare(a.ID, b.ID) })
			for _, r := range rules {
				if !yield(string(g.ID)+"\x00"+r.ID, groupRule{g, r}) {
					return
				}
			}
		}
	}
}
