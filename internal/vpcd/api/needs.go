package api

import (
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/iam"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// makes lists what actions make, as kinds of resources: who makes something
// needs the permission for it before it has a name.
var makes = map[string][]string{
	"CreateVpc":                     {"vpc"},
	"CreateSubnet":                  {"subnet"},
	"CreateSubnetCidrReservation":   {"subnet-cidr-reservation"},
	"CreateSecurityGroup":           {"security-group"},
	"CreateNetworkInterface":        {"network-interface"},
	"RunInstances":                  {"instance", "network-interface"},
	"AuthorizeSecurityGroupIngress": {"security-group-rule"},
	"AuthorizeSecurityGroupEgress":  {"security-group-rule"},
	"CreateRouteTable":              {"route-table"},
	"CreateNetworkAcl":              {"network-acl"},
	"CreateManagedPrefixList":       {"prefix-list"},
	"CreateInternetGateway":         {"internet-gateway"},
	"AllocateAddress":               {"elastic-ip"},
	"CreateNatGateway":              {"natgateway"},
	"CreateVpcPeeringConnection":    {"vpc-peering-connection"},
	"CreateDhcpOptions":             {"dhcp-options"},
	"CreateFlowLogs":                {"vpc-flow-log"},

	"CreateEgressOnlyInternetGateway": {"egress-only-internet-gateway"},
}

// Needs returns the IAM permissions that a call needs (Service Authorization
// Reference, "Actions, resources, and condition keys for Amazon EC2", read
// 2026): on each resource that it names and each kind that it makes; and, for
// tags given at creation, ec2:CreateTags. Calls that read are on no resource in
// particular. The resources of a call that names an attachment are the
// interface and the instance, those of one that names an association are what it
// ties together.
func (a *API) Needs(c query.Call) []iam.Need {
	name := c.Action.Name
	action := "ec2:" + name
	for _, p := range []string{"Describe", "Get", "List", "Search"} {
		if strings.HasPrefix(name, p) {
			return []iam.Need{{Action: action, Resource: "*"}}
		}
	}
	arns := map[string]bool{}
	for _, kind := range makes[name] {
		arns[a.arn(kind, "*")] = true
	}
	eachID(reflect.ValueOf(c.Request).Elem(), "", func(id string) {
		if strings.HasPrefix(id, "eni-attach-") {
			if e := a.store.View().ByAttachment(vpc.AttachmentID(id)); e != nil {
				arns[a.arn("network-interface", string(e.ID))] = true
				arns[a.arn("instance", string(e.Attachment.Instance))] = true
			}
		} else if tied := associated(a.store.View(), id); tied != nil {
			for _, id := range tied {
				arns[a.arn(resourceTypes[prefixOf(id)], id)] = true
			}
		} else if kind := resourceTypes[prefixOf(id)]; kind != "" {
			arns[a.arn(kind, id)] = true
		}
	})
	if len(arns) == 0 {
		arns["*"] = true
	}
	var needs []iam.Need
	for _, arn := range slices.Sorted(maps.Keys(arns)) {
		needs = append(needs, iam.Need{Action: action, Resource: arn})
	}
	if f := reflect.ValueOf(c.Request).Elem().FieldByName("TagSpecification"); f.IsValid() {
		for _, s := range f.Interface().([]query.TagSpecification) {
			if len(s.Tag) > 0 {
				needs = append(needs, iam.Need{Action: "ec2:CreateTags", Resource: a.arn(deref(s.ResourceType), "*")})
			}
		}
	}
	return needs
}

// associated returns the ids of what an association ties together, or nothing.
func associated(s *store.State, id string) []string {
	switch prefixOf(id) {
	case "rtbassoc":
		if t, i, err := findAssociation(s, id); err == nil {
			x := t.Associations[i]
			return slices.Concat([]string{string(t.ID)}, some(string(x.Subnet)), some(string(x.Gateway)))
		}
	case "aclassoc":
		for _, l := range s.ACLs.All() {
			if i := slices.IndexFunc(l.Associations, func(x store.ACLAssociation) bool { return x.ID == id }); i >= 0 {
				return []string{string(l.ID), string(l.Associations[i].Subnet)}
			}
		}
	case "vpc-cidr-assoc":
		for _, v := range s.VPCs.All() {
			if slices.ContainsFunc(slices.Concat(v.CIDRs, v.IPv6CIDRs), func(c store.CIDRAssociation) bool { return c.ID == id }) {
				return []string{string(v.ID)}
			}
		}
	case "subnet-cidr-assoc":
		for _, n := range s.Subnets.All() {
			if n.IPv6.ID == id {
				return []string{string(n.ID)}
			}
		}
	case "eipassoc":
		if x := byAssociation(s, id); x != nil {
			return []string{string(x.ID), string(x.ENI)}
		}
	}
	return nil
}

// eachID calls fn for each string below v whose field's name ends in Id.
func eachID(v reflect.Value, name string, fn func(string)) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			eachID(v.Elem(), name, fn)
		}
	case reflect.Slice:
		for i := range v.Len() {
			eachID(v.Index(i), name, fn)
		}
	case reflect.Struct:
		for f, field := range v.Fields() {
			if f.IsExported() {
				eachID(field, f.Name, fn)
			}
		}
	case reflect.String:
		if strings.HasSuffix(name, "Id") {
			fn(v.String())
		}
	default: // numbers, truths and times name nothing
	}
}
