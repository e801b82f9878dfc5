package api

import (
	"strings"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// malformed are the codes that answer an identifier which is not of its form
// (EC2 spells them in several ways).
var malformed = map[string]string{
	"vpc":            "InvalidVpcId.Malformed",
	"vpc-cidr-assoc": "InvalidVpcCidrBlockAssociationId.Malformed",
	"subnet":         "InvalidSubnetId.Malformed",
	"scr":            "InvalidSubnetCidrReservationID.Malformed",
	"i":              "InvalidInstanceID.Malformed",
	"eni":            "InvalidNetworkInterfaceId.Malformed",
	"eni-attach":     "InvalidNetworkInterfaceAttachmentId.Malformed",
	"sg":             "InvalidGroupId.Malformed",
	"sgr":            "InvalidSecurityGroupRuleId.Malformed",
	"ami":            "InvalidAMIID.Malformed",
	"rtb":            "InvalidRouteTableId.Malformed",
	"rtbassoc":       "InvalidAssociationID.Malformed",
	"acl":            "InvalidNetworkAclId.Malformed",
	"aclassoc":       "InvalidAssociationID.Malformed",
	"igw":            "InvalidInternetGatewayId.Malformed",
	"nat":            "NatGatewayMalformed",
	"eipalloc":       "InvalidAllocationID.Malformed",
	"eipassoc":       "InvalidAssociationID.Malformed",
	"pcx":            "InvalidVpcPeeringConnectionId.Malformed",
	"pl":             "InvalidPrefixListId.Malformed",
	"dopt":           "InvalidDhcpOptionsId.Malformed",
	"fl":             "InvalidFlowLogId.Malformed",

	"subnet-cidr-assoc": "InvalidSubnetCidrBlockAssociationId.Malformed",
	"eigw":              "InvalidEgressOnlyInternetGatewayId.Malformed",
}

func checkID(prefix, id string) error {
	if err := vpc.CheckID(prefix, id); err != nil {
		return query.Errorf(malformed[prefix], "Invalid id: %q (expecting \"%s-...\")", id, prefix)
	}
	return nil
}

func noVPC(id string) error {
	return query.Errorf("InvalidVpcID.NotFound", "The vpc ID '%s' does not exist", id)
}

func noSubnet(id string) error {
	return query.Errorf("InvalidSubnetID.NotFound", "The subnet ID '%s' does not exist", id)
}

func noENI(id string) error {
	return query.Errorf("InvalidNetworkInterfaceID.NotFound", "The networkInterface ID '%s' does not exist", id)
}

func noInstance(ids ...string) error {
	if len(ids) == 1 {
		return query.Errorf("InvalidInstanceID.NotFound", "The instance ID '%s' does not exist", ids[0])
	}
	return query.Errorf("InvalidInstanceID.NotFound", "The instance IDs %s do not exist", quoted(ids))
}

func noGroup(id string) error {
	return query.Errorf("InvalidGroup.NotFound", "The security group '%s' does not exist", id)
}

func findVPC(s *store.State, id string) (*store.VPC, error) {
	if err := checkID("vpc", id); err != nil {
		return nil, err
	}
	if v := s.VPC(vpc.VPCID(id)); v != nil {
		return v, nil
	}
	return nil, noVPC(id)
}

func findSubnet(s *store.State, id string) (*store.Subnet, error) {
	if err := checkID("subnet", id); err != nil {
		return nil, err
	}
	if n := s.Subnet(vpc.SubnetID(id)); n != nil {
		return n, nil
	}
	return nil, noSubnet(id)
}

func findReservation(s *store.State, id string) (*store.Reservation, error) {
	if err := checkID("scr", id); err != nil {
		return nil, err
	}
	if r, ok := s.Reservations.Get(id); ok {
		return r, nil
	}
	return nil, query.Errorf("InvalidSubnetCidrReservationID.NotFound", "The subnet CIDR reservation ID '%s' does not exist", id)
}

func findENI(s *store.State, id string) (*store.ENI, error) {
	if err := checkID("eni", id); err != nil {
		return nil, err
	}
	if e := s.ENI(vpc.ENIID(id)); e != nil {
		return e, nil
	}
	return nil, noENI(id)
}

func findInstance(s *store.State, id string) (*store.Instance, error) {
	if err := checkID("i", id); err != nil {
		return nil, err
	}
	if i := s.Instance(vpc.InstanceID(id)); i != nil {
		return i, nil
	}
	return nil, noInstance(id)
}

func findGroup(s *store.State, id string) (*store.Group, error) {
	if err := checkID("sg", id); err != nil {
		return nil, err
	}
	if g := s.Group(vpc.SecurityGroupID(id)); g != nil {
		return g, nil
	}
	return nil, noGroup(id)
}

func findRouteTable(s *store.State, id string) (*store.RouteTable, error) {
	if err := checkID("rtb", id); err != nil {
		return nil, err
	}
	if t := s.RouteTable(vpc.RouteTableID(id)); t != nil {
		return t, nil
	}
	return nil, query.Errorf("InvalidRouteTableID.NotFound", "The routeTable ID '%s' does not exist", id)
}

func findACL(s *store.State, id string) (*store.NetworkACL, error) {
	if err := checkID("acl", id); err != nil {
		return nil, err
	}
	if l := s.ACL(vpc.NetworkACLID(id)); l != nil {
		return l, nil
	}
	return nil, query.Errorf("InvalidNetworkAclID.NotFound", "The networkAcl ID '%s' does not exist", id)
}

func findGateway(s *store.State, id string) (*store.InternetGateway, error) {
	if err := checkID("igw", id); err != nil {
		return nil, err
	}
	if g := s.Gateway(vpc.GatewayID(id)); g != nil {
		return g, nil
	}
	return nil, query.Errorf("InvalidInternetGatewayID.NotFound", "The internetGateway ID '%s' does not exist", id)
}

func findEgressOnly(s *store.State, id string) (*store.EgressOnlyGateway, error) {
	if err := checkID("eigw", id); err != nil {
		return nil, err
	}
	if g := s.EgressOnly(vpc.EgressOnlyID(id)); g != nil {
		return g, nil
	}
	return nil, query.Errorf("InvalidEgressOnlyInternetGatewayId.NotFound", "The egress only internet gateway ID '%s' does not exist", id)
}

func findNAT(s *store.State, id string) (*store.NATGateway, error) {
	if err := checkID("nat", id); err != nil {
		return nil, err
	}
	if n := s.NAT(vpc.NATGatewayID(id)); n != nil {
		return n, nil
	}
	return nil, query.Errorf("NatGatewayNotFound", "The Nat Gateway %s was not found", id)
}

func findPeering(s *store.State, id string) (*store.Peering, error) {
	if err := checkID("pcx", id); err != nil {
		return nil, err
	}
	if p := s.Peering(vpc.PeeringID(id)); p != nil {
		return p, nil
	}
	return nil, query.Errorf("InvalidVpcPeeringConnectionID.NotFound", "The vpcPeeringConnection ID '%s' does not exist", id)
}

func findPrefixList(s *store.State, id string) (*store.PrefixList, error) {
	if err := checkID("pl", id); err != nil {
		return nil, err
	}
	if p := s.PrefixList(vpc.PrefixListID(id)); p != nil {
		return p, nil
	}
	return nil, query.Errorf("InvalidPrefixListID.NotFound", "The prefix list ID '%s' does not exist", id)
}

// noAssociation answers the id of an association, of whatever kind, that there
// is not.
func noAssociation(id string) error {
	return query.Errorf("InvalidAssociationID.NotFound", "The association ID '%s' does not exist", id)
}

// twoNetworks answers who would tie together what is of two VPCs.
func twoNetworks(one, other string) error {
	return query.Errorf("InvalidParameterValue", "%s and %s belong to different networks", one, other)
}

// depends answers who would delete what others need.
func depends(kind, id string) error {
	return query.Errorf("DependencyViolation", "The %s '%s' has dependencies and cannot be deleted.", kind, id)
}

// findAll looks up several identifiers with one of the finders.
func findAll[T any](s *store.State, ids []string, find func(*store.State, string) (T, error)) ([]T, error) {
	out := make([]T, 0, len(ids))
	for _, id := range ids {
		o, err := find(s, id)
		if err != nil {
			return nil, err
		}
		out = append(out, o)
	}
	return out, nil
}

// prefixOf returns what an identifier begins with: "eni-attach" of
// "eni-attach-0123".
func prefixOf(id string) string {
	i := strings.LastIndexByte(id, '-')
	if i < 0 {
		return ""
	}
	return id[:i]
}
