package api

import (
	"context"
	"slices"

	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// modifySecurityGroupRules replaces rules, all or none; each keeps its id, its
// direction and its tags.
func (a *API) modifySecurityGroupRules(_ context.Context, req *query.ModifySecurityGroupRulesRequest) (*query.ModifySecurityGroupRulesResponse, error) {
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findGroup(&tx.State, *req.GroupId)
		if err != nil {
			return err
		}
		g := *old
		g.Rules = slices.Clone(old.Rules)
		for _, u := range req.SecurityGroupRule {
			i, err := ruleOf(&g, deref(u.SecurityGroupRuleId))
			if err != nil {
				return err
			}
			if u.SecurityGroupRule == nil {
				return query.Errorf("MissingParameter", "The request must contain the parameter securityGroupRule")
			}
			r, err := a.parseRule(&tx.State, old, g.Rules[i].Egress, u.SecurityGroupRule)
			if err != nil {
				return err
			}
			r.ID = g.Rules[i].ID
			g.Rules[i] = r
		}
		for i, r := range g.Rules {
			if slices.ContainsFunc(g.Rules[:i], r.SamePermission) {
				return query.Errorf("InvalidPermission.Duplicate", "the specified rule %q already exists", describe(r))
			}
		}
		for _, egress := range []bool{false, true} {
			if err := a.checkRuleCount(&tx.State, g.Rules, egress); err != nil {
				return err
			}
		}
		tx.PutGroup(&g)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.ModifySecurityGroupRulesResponse{Return: new(true)}, nil
}

// ruleOf returns the place of a rule in its group.
func ruleOf(g *store.Group, id string) (int, error) {
	if err := checkID("sgr", id); err != nil {
		return 0, err
	}
	i := slices.IndexFunc(g.Rules, func(r store.Rule) bool { return r.ID == id })
	if i < 0 {
		return 0, query.Errorf("InvalidSecurityGroupRuleId.NotFound", "The security group rule ID '%s' does not exist", id)
	}
	return i, nil
}

// parseRule reads a rule in the form of ModifySecurityGroupRules.
func (a *API) parseRule(s *store.State, g *store.Group, egress bool, q *query.SecurityGroupRuleRequest) (store.Rule, error) {
	p := query.IpPermission{IpProtocol: q.IpProtocol, FromPort: q.FromPort, ToPort: q.ToPort}
	if q.CidrIpv4 != nil {
		p.IpRanges = []query.IpRange{{CidrIp: q.CidrIpv4, Description: q.Description}}
	}
	if q.CidrIpv6 != nil {
		p.Ipv6Ranges = []query.Ipv6Range{{CidrIpv6: q.CidrIpv6, Description: q.Description}}
	}
	if q.PrefixListId != nil {
		p.PrefixListIds = []query.PrefixListId{{PrefixListId: q.PrefixListId, Description: q.Description}}
	}
	if q.ReferencedGroupId != nil {
		p.Groups = []query.UserIdGroupPair{{GroupId: q.ReferencedGroupId, Description: q.Description}}
	}
	rules, err := a.parsePermissions(s, g, egress, []query.IpPermission{p}, query.IpPermission{}, nil)
	if err != nil {
		return store.Rule{}, err
	}
	if len(rules) != 1 {
		return store.Rule{}, query.Errorf("InvalidParameterCombination", "A rule must have exactly one of cidrIpv4, cidrIpv6, prefixListId, referencedGroupId")
	}
	return rules[0], nil
}

func (a *API) updateDescriptionsIngress(_ context.Context, req *query.UpdateSecurityGroupRuleDescriptionsIngressRequest) (*query.UpdateSecurityGroupRuleDescriptionsIngressResponse, error) {
	if err := a.updateDescriptions(req.GroupId, false, req.IpPermissions, req.SecurityGroupRuleDescription); err != nil {
		return nil, err
	}
	return &query.UpdateSecurityGroupRuleDescriptionsIngressResponse{Return: new(true)}, nil
}

func (a *API) updateDescriptionsEgress(_ context.Context, req *query.UpdateSecurityGroupRuleDescriptionsEgressRequest) (*query.UpdateSecurityGroupRuleDescriptionsEgressResponse, error) {
	if err := a.updateDescriptions(req.GroupId, true, req.IpPermissions, req.SecurityGroupRuleDescription); err != nil {
		return nil, err
	}
	return &query.UpdateSecurityGroupRuleDescriptionsEgressResponse{Return: new(true)}, nil
}

// updateDescriptions replaces the descriptions of rules; one that is not given
// is removed.
func (a *API) updateDescriptions(group *string, egress bool, list []query.IpPermission, byID []query.SecurityGroupRuleDescription) error {
	if group == nil {
		return query.Errorf("MissingParameter", "The request must contain the parameter groupId")
	}
	if (len(list) > 0) == (len(byID) > 0) {
		return query.Errorf("InvalidParameterCombination", "Give either the ids of rules or permissions")
	}
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findGroup(&tx.State, *group)
		if err != nil {
			return err
		}
		g := *old
		g.Rules = slices.Clone(old.Rules)
		for _, d := range byID {
			i, err := ruleOf(&g, deref(d.SecurityGroupRuleId))
			if err != nil {
				return err
			}
			if g.Rules[i].Egress != egress {
				return query.Errorf("InvalidSecurityGroupRuleId.NotFound", "The security group rule ID '%s' does not exist in this direction", g.Rules[i].ID)
			}
			if g.Rules[i].Description = deref(d.Description); !groupText(g.Rules[i].Description) {
				return badRuleDescription()
			}
		}
		wanted, err := a.parsePermissions(&tx.State, old, egress, list, query.IpPermission{}, nil)
		if err != nil {
			return err
		}
		for _, r := range wanted {
			i := slices.IndexFunc(g.Rules, r.SamePermission)
			if i < 0 {
				return query.Errorf("InvalidPermission.NotFound", "The specified rule does not exist in this security group: %q", describe(r))
			}
			g.Rules[i].Description = r.Description
		}
		tx.PutGroup(&g)
		return nil
	})
	return err
}

func badRuleDescription() error {
	return query.Errorf("InvalidParameterValue", "Invalid rule description. Valid descriptions are strings less than 256 characters from the following set: a-zA-Z0-9. _-:/()#,@[]+=&;{}!$*")
}
