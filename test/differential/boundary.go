package differential

import (
	"fmt"
	"slices"
	"strconv"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/test/vpcmodel"
)

// applyBoundary makes ACLs, route tables and peerings.
func (c *cloud) applyBoundary(st vpcmodel.Statement) error {
	switch s := st.(type) {
	case vpcmodel.MakeACL:
		return c.makeACL(s)
	case vpcmodel.AddEntry:
		return c.addEntry(s)
	case vpcmodel.DeleteEntry:
		return c.do("DeleteNetworkAclEntry", "NetworkAclId", id(c, s.ACL), "RuleNumber", strconv.Itoa(s.Number), "Egress", strconv.FormatBool(bool(s.Dir)))
	case vpcmodel.SetACL:
		return c.setACL(s)
	case vpcmodel.MakeTable:
		return c.create(string(s.ID), []string{"routeTable", "routeTableId"}, "CreateRouteTable", "VpcId", id(c, s.VPC))
	case vpcmodel.AddRoute:
		action, params := "CreateRoute", append([]string{"RouteTableId", id(c, s.Table)}, c.destination(s.Route)...)
		if c.isLocal(s.Table, s.Route) {
			action = "ReplaceRoute"
		}
		switch {
		case s.ENI != "":
			return c.do(action, append(params, "NetworkInterfaceId", id(c, s.ENI))...)
		case s.Gateway != "":
			return c.do(action, append(params, "GatewayId", id(c, s.Gateway))...)
		case s.NAT != "":
			return c.do(action, append(params, "NatGatewayId", id(c, s.NAT))...)
		}
		return c.do(action, append(params, "VpcPeeringConnectionId", id(c, s.Peering))...)
	case vpcmodel.DeleteRoute:
		params := append([]string{"RouteTableId", id(c, s.Table)}, c.destination(s.Route)...)
		if c.isLocal(s.Table, s.Route) {
			return c.do("ReplaceRoute", append(params, "LocalTarget", "true")...)
		}
		return c.do("DeleteRoute", params...)
	case vpcmodel.SetTable:
		return c.setTable(s)
	case vpcmodel.MakePeering:
		return c.makePeering(s)
	case vpcmodel.ShareGroup:
		return c.do("AssociateSecurityGroupVpc", "GroupId", id(c, s.Group), "VpcId", id(c, s.VPC))
	case vpcmodel.DeletePeering:
		return c.do("DeleteVpcPeeringConnection", "VpcPeeringConnectionId", id(c, s.ID))
	}
	return c.applyGateway(st)
}

func (c *cloud) destination(r vpcmodel.Route) []string {
	if r.List != "" {
		return []string{"DestinationPrefixListId", id(c, r.List)}
	}
	if r.CIDR.Addr().Is6() {
		return []string{"DestinationIpv6CidrBlock", c.block(r.CIDR).String()}
	}
	return []string{"DestinationCidrBlock", r.CIDR.String()}
}

// isLocal reports whether a route is the local one with another target.
func (c *cloud) isLocal(t vpcmodel.TableID, r vpcmodel.Route) bool {
	return r.CIDR.IsValid() && slices.Contains(c.world.VPCs[c.world.Tables[t].VPC].CIDRs, r.CIDR)
}

func (c *cloud) makeACL(s vpcmodel.MakeACL) error {
	if s.As == "acl" {
		return c.create(string(s.ID), []string{"networkAcl", "networkAclId"}, "CreateNetworkAcl", "VpcId", id(c, s.VPC))
	}
	a, err := c.call("DescribeNetworkAcls", "Filter.1.Name", "vpc-id", "Filter.1.Value.1", id(c, s.VPC), "Filter.2.Name", "default", "Filter.2.Value.1", "true")
	if err != nil {
		return err
	}
	c.ids[string(s.ID)] = a.text("networkAclSet", "item", "networkAclId")
	return nil
}

func (c *cloud) addEntry(s vpcmodel.AddEntry) error {
	action := "deny"
	if s.Allow {
		action = "allow"
	}
	params := []string{"NetworkAclId", id(c, s.ACL), "RuleNumber", strconv.Itoa(s.Number), "Protocol", protocolOf(s.Proto),
		"RuleAction", action, "Egress", strconv.FormatBool(bool(s.Dir))}
	if s.CIDR.Addr().Is6() {
		params = append(params, "Ipv6CidrBlock", c.block(s.CIDR).String())
	} else {
		params = append(params, "CidrBlock", s.CIDR.String())
	}
	switch s.Proto {
	case 6, 17:
		params = append(params, "PortRange.From", strconv.Itoa(s.From), "PortRange.To", strconv.Itoa(s.To))
	case 1, 58:
		params = append(params, "Icmp.Type", strconv.Itoa(s.From), "Icmp.Code", strconv.Itoa(s.To))
	}
	return c.do("CreateNetworkAclEntry", params...)
}

// aclAssociation is the identifier of the tie between a subnet and its ACL.
func (c *cloud) aclAssociation(subnet vpc.SubnetID) (string, error) {
	if known := c.aclOf[subnet]; known != "" {
		return known, nil
	}
	a, err := c.call("DescribeNetworkAcls", "Filter.1.Name", "association.subnet-id", "Filter.1.Value.1", id(c, subnet))
	if err != nil {
		return "", err
	}
	// The ACL may have other subnets; theirs are listed as well.
	for _, item := range a.items("networkAclSet", "item", "associationSet") {
		if item["subnetId"] == id(c, subnet) {
			return item["networkAclAssociationId"], nil
		}
	}
	return "", fmt.Errorf("no ACL names subnet %s: %s", subnet, a.body)
}

func (c *cloud) setACL(s vpcmodel.SetACL) error {
	association, err := c.aclAssociation(s.Subnet)
	if err != nil {
		return err
	}
	a, err := c.call("ReplaceNetworkAclAssociation", "AssociationId", association, "NetworkAclId", id(c, s.ACL))
	if err != nil {
		return err
	}
	c.aclOf[s.Subnet] = a.text("newAssociationId")
	return nil
}

func (c *cloud) setTable(s vpcmodel.SetTable) error {
	if old := c.tableOf[s.Subnet]; old != "" {
		a, err := c.call("ReplaceRouteTableAssociation", "AssociationId", old, "RouteTableId", id(c, s.Table))
		if err != nil {
			return err
		}
		c.tableOf[s.Subnet] = a.text("newAssociationId")
		return nil
	}
	a, err := c.call("AssociateRouteTable", "SubnetId", id(c, s.Subnet), "RouteTableId", id(c, s.Table))
	if err != nil {
		return err
	}
	c.tableOf[s.Subnet] = a.text("associationId")
	return nil
}

func (c *cloud) makePeering(s vpcmodel.MakePeering) error {
	if err := c.create(string(s.ID), []string{"vpcPeeringConnection", "vpcPeeringConnectionId"}, "CreateVpcPeeringConnection", "VpcId", id(c, s.A), "PeerVpcId", id(c, s.B)); err != nil {
		return err
	}
	c.peerings = append(c.peerings, c.ids[string(s.ID)])
	if !c.world.Peerings[s.ID].Active {
		return nil // it has failed
	}
	return c.do("AcceptVpcPeeringConnection", "VpcPeeringConnectionId", id(c, s.ID))
}

// tableAssociation is the identifier of the tie between a subnet and the route
// table that was chosen for it, "" if none was.
func (c *cloud) tableAssociation(subnet vpc.SubnetID) (string, error) {
	a, err := c.call("DescribeRouteTables", "Filter.1.Name", "association.subnet-id", "Filter.1.Value.1", id(c, subnet))
	if err != nil {
		return "", err
	}
	for _, item := range a.items("routeTableSet", "item", "associationSet") {
		if item["subnetId"] == id(c, subnet) {
			return item["routeTableAssociationId"], nil
		}
	}
	return "", nil
}
