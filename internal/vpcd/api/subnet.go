package api

import (
	"cmp"
	"context"
	"slices"
	"strconv"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// How instances of a subnet are named.
const (
	ipName       = "ip-name"
	resourceName = "resource-name"
)

func (a *API) subnetHandlers(h map[string]query.Handler) {
	h["CreateSubnet"] = handle("CreateSubnet", "VpcId CidrBlock Ipv6CidrBlock AvailabilityZone AvailabilityZoneId TagSpecification", a.createSubnet)
	h["DeleteSubnet"] = handle("DeleteSubnet", "SubnetId", a.deleteSubnet)
	h["DescribeSubnets"] = handle("DescribeSubnets", "SubnetId Filter NextToken MaxResults", a.describeSubnets)
	h["ModifySubnetAttribute"] = handle("ModifySubnetAttribute", "SubnetId AssignIpv6AddressOnCreation PrivateDnsHostnameTypeOnLaunch EnableResourceNameDnsARecordOnLaunch", a.modifySubnetAttribute)
}

// pickZone returns the zone that a request names, by name or id, or the first.
func (a *API) pickZone(name, id *string) (zone, error) {
	if name != nil && id != nil {
		return zone{}, query.Errorf("InvalidParameterCombination", "Only one of AvailabilityZone and AvailabilityZoneId may be given")
	}
	if name == nil && id == nil {
		return a.zones[0], nil
	}
	for _, z := range a.zones {
		if name != nil && z.name == *name || id != nil && z.id == *id {
			return z, nil
		}
	}
	names := collect(a.zones, func(z zone) string {
		if name == nil {
			return z.id
		}
		return z.name
	})
	return zone{}, query.Errorf("InvalidParameterValue", "Value (%s) for parameter availabilityZone is invalid. Subnets can currently only be created in the following availability zones: %s.", deref(cmp.Or(name, id)), quoted(names))
}

func (a *API) createSubnet(_ context.Context, req *query.CreateSubnetRequest) (*query.CreateSubnetResponse, error) {
	if req.CidrBlock == nil {
		return nil, query.Errorf("MissingParameter", "The request must contain the parameter cidrBlock")
	}
	cidr, err := parseCIDR(*req.CidrBlock)
	if err != nil {
		return nil, err
	}
	if cidr.Bits() < 16 || cidr.Bits() > 28 {
		return nil, query.Errorf("InvalidSubnet.Range", "The CIDR '%s' is invalid.", cidr)
	}
	z, err := a.pickZone(req.AvailabilityZone, req.AvailabilityZoneId)
	if err != nil {
		return nil, err
	}
	tags, err := specified(req.TagSpecification, "subnet")
	if err != nil {
		return nil, err
	}
	var ipv6 store.CIDRAssociation
	if req.Ipv6CidrBlock != nil {
		if ipv6, err = newSubnetIPv6(*req.Ipv6CidrBlock); err != nil {
			return nil, err
		}
	}
	n := &store.Subnet{ID: vpc.SubnetID(vpc.NewID("subnet")), CIDR: cidr, IPv6: ipv6, Zone: z.name, HostType: ipName, Created: a.now()}
	after, err := a.update(func(tx *store.Tx) error {
		v, err := findVPC(&tx.State, *req.VpcId)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(v.CIDRs, func(c store.CIDRAssociation) bool {
			return c.CIDR.Bits() <= cidr.Bits() && c.CIDR.Contains(cidr.Addr())
		}) {
			return query.Errorf("InvalidSubnet.Range", "The CIDR '%s' is invalid: it is not within a CIDR block of %s.", cidr, v.ID)
		}
		beside := 0
		for _, o := range tx.Subnets.All() {
			if o.VPC != v.ID {
				continue
			}
			if beside++; o.CIDR.Overlaps(cidr) {
				return query.Errorf("InvalidSubnet.Conflict", "The CIDR '%s' conflicts with another subnet", cidr)
			}
		}
		if most := a.quota(chaos.QuotaSubnets); beside >= most {
			return quotaReached("SubnetLimitExceeded", "subnets of the VPC", most)
		}
		if ipv6.CIDR.IsValid() {
			if err := checkSubnetIPv6(&tx.State, v, ipv6.CIDR); err != nil {
				return err
			}
		}
		n.VPC = v.ID
		tx.PutSubnet(n)
		tx.SetTags(string(n.ID), tags["subnet"])
		return nil
	})
	if err != nil {
		return nil, err
	}
	out := after.subnet(n)
	out.Ipv6CidrBlockAssociationSet = subnetIPv6(n, "associating")
	return &query.CreateSubnetResponse{Subnet: &out}, nil
}

func (a *API) deleteSubnet(_ context.Context, req *query.DeleteSubnetRequest) (*query.DeleteSubnetResponse, error) {
	_, err := a.update(func(tx *store.Tx) error {
		n, err := findSubnet(&tx.State, *req.SubnetId)
		if err != nil {
			return err
		}
		for _, e := range tx.ENIs.All() {
			if e.Subnet == n.ID {
				return query.Errorf("DependencyViolation", "The subnet '%s' has dependencies and cannot be deleted.", n.ID)
			}
		}
		tx.DeleteSubnet(n.ID)
		return nil
	})
	return nil, err
}

func (a *API) modifySubnetAttribute(_ context.Context, req *query.ModifySubnetAttributeRequest) (*query.ModifySubnetAttributeResponse, error) {
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findSubnet(&tx.State, *req.SubnetId)
		if err != nil {
			return err
		}
		n := *old // what else is accepted is as it was
		if t := req.PrivateDnsHostnameTypeOnLaunch; t != nil {
			n.HostType = *t
		}
		if b := req.EnableResourceNameDnsARecordOnLaunch; b != nil && b.Value != nil {
			n.ResourceNameA = *b.Value
		}
		if b := req.AssignIpv6AddressOnCreation; b != nil && b.Value != nil {
			if *b.Value && !n.IPv6.CIDR.IsValid() {
				return query.Errorf("InvalidParameterValue", "Invalid value 'true' for assign-ipv6-address-on-creation. Cannot set assign-ipv6-address-on-creation to true unless the subnet (%s) has an IPv6 CIDR block associated with it.", n.ID)
			}
			n.AssignIPv6 = *b.Value
		}
		tx.PutSubnet(&n)
		return nil
	})
	return nil, err
}

func no(view, *store.Subnet) []string { return []string{"false"} }

var subnetAttributes = attributes[*store.Subnet]{
	"availability-zone":               func(_ view, n *store.Subnet) []string { return []string{n.Zone} },
	"availability-zone-id":            func(v view, n *store.Subnet) []string { return []string{v.api.zoneID(n.Zone)} },
	"available-ip-address-count":      func(v view, n *store.Subnet) []string { return []string{strconv.Itoa(v.Space(n.ID).Free())} },
	"cidr-block":                      func(_ view, n *store.Subnet) []string { return []string{n.CIDR.String()} },
	"default-for-az":                  no,
	"enable-dns64":                    no,
	"ipv6-native":                     no,
	"map-customer-owned-ip-on-launch": no,
	"map-public-ip-on-launch":         no,
	"owner-id":                        func(v view, _ *store.Subnet) []string { return []string{v.api.account} },
	"state":                           func(view, *store.Subnet) []string { return []string{"available"} },
	"subnet-arn":                      func(v view, n *store.Subnet) []string { return []string{v.api.arn("subnet", string(n.ID))} },
	"subnet-id":                       func(_ view, n *store.Subnet) []string { return []string{string(n.ID)} },
	"vpc-id":                          func(_ view, n *store.Subnet) []string { return []string{string(n.VPC)} },
	"private-dns-name-options-on-launch.hostname-type":                        func(_ view, n *store.Subnet) []string { return []string{n.HostType} },
	"private-dns-name-options-on-launch.enable-resource-name-dns-a-record":    func(_ view, n *store.Subnet) []string { return []string{strconv.FormatBool(n.ResourceNameA)} },
	"private-dns-name-options-on-launch.enable-resource-name-dns-aaaa-record": no,

	"ipv6-cidr-block-association.ipv6-cidr-block": ofSubnetIPv6(func(x query.SubnetIpv6CidrBlockAssociation) *string { return x.Ipv6CidrBlock }),
	"ipv6-cidr-block-association.association-id":  ofSubnetIPv6(func(x query.SubnetIpv6CidrBlockAssociation) *string { return x.AssociationId }),
	"ipv6-cidr-block-association.state":           ofSubnetIPv6(func(x query.SubnetIpv6CidrBlockAssociation) *string { return x.Ipv6CidrBlockState.State }),
}

func (a *API) describeSubnets(_ context.Context, req *query.DescribeSubnetsRequest) (*query.DescribeSubnetsResponse, error) {
	v := a.read()
	match, err := matcher(v, "DescribeSubnets", req.Filter, subnetAttributes, nil, func(v view, n *store.Subnet) map[string]string { return v.TagsOf(string(n.ID)) })
	if err != nil {
		return nil, err
	}
	c, err := paging("DescribeSubnets", req.Filter, len(req.SubnetId), req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	items := entries(v.Subnets)
	if len(req.SubnetId) > 0 {
		named, err := findAll(v.State, req.SubnetId, findSubnet)
		if err != nil {
			return nil, err
		}
		items = listed(named, func(n *store.Subnet) string { return string(n.ID) })
	}
	found, next := take(c, items, match)
	return &query.DescribeSubnetsResponse{NextToken: next, SubnetSet: collect(found, v.subnet)}, nil
}

func (v view) subnet(n *store.Subnet) query.Subnet {
	return query.Subnet{
		AvailabilityZone:            &n.Zone,
		AvailabilityZoneId:          text(v.api.zoneID(n.Zone)),
		AvailableIpAddressCount:     integer(v.Space(n.ID).Free()),
		CidrBlock:                   new(n.CIDR.String()),
		DefaultForAz:                new(false),
		MapPublicIpOnLaunch:         new(false),
		MapCustomerOwnedIpOnLaunch:  new(false),
		AssignIpv6AddressOnCreation: &n.AssignIPv6,
		Ipv6CidrBlockAssociationSet: subnetIPv6(n, "associated"),
		EnableDns64:                 new(false),
		Ipv6Native:                  new(false),
		OwnerId:                     &v.api.account,
		TagSet:                      v.tags(string(n.ID)),
		SubnetArn:                   new(v.api.arn("subnet", string(n.ID))),
		PrivateDnsNameOptionsOnLaunch: &query.PrivateDnsNameOptions{
			HostnameType:                    &n.HostType,
			EnableResourceNameDnsARecord:    &n.ResourceNameA,
			EnableResourceNameDnsAAAARecord: new(false),
		},
		BlockPublicAccessStates: &query.BlockPublicAccessStates{InternetGatewayBlockMode: new("off")},
		SubnetId:                text(n.ID),
		State:                   new("available"),
		VpcId:                   text(n.VPC),
	}
}
