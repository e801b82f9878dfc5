package e2e

import (
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
)

// What the three clients of clients_test.go do with network ACLs, routes and
// what these lead to. boto3 does it in testdata/networks.py.

func cliRouting(c cli) {
	vpc := c.must("create-vpc --cidr-block 10.0.0.0/16", "Vpc.VpcId")
	subnet := c.must("create-subnet --cidr-block 10.0.0.0/24 --vpc-id "+vpc, "Subnet.SubnetId")
	eni := c.must("create-network-interface --subnet-id "+subnet, "NetworkInterface.NetworkInterfaceId")

	acl := c.must("create-network-acl --vpc-id "+vpc, "NetworkAcl.NetworkAclId")
	entry := " --ingress --network-acl-id " + acl + " --rule-number 100 "
	c.must("create-network-acl-entry --protocol tcp --port-range From=80,To=80 --cidr-block 0.0.0.0/0 --rule-action allow"+entry, "")
	c.must("replace-network-acl-entry --protocol icmp --icmp-type-code Type=8,Code=-1 --cidr-block 0.0.0.0/0 --rule-action allow"+entry, "")
	c.want("1 8", "describe-network-acls --network-acl-ids "+acl, "NetworkAcls[].Entries[?RuleNumber==`100`][].[Protocol,IcmpTypeCode.Type][]")
	c.must("delete-network-acl-entry"+entry, "")
	assoc := c.must("describe-network-acls --filters Name=association.subnet-id,Values="+subnet, "NetworkAcls[].Associations[].NetworkAclAssociationId")
	c.must("replace-network-acl-association --network-acl-id "+acl+" --association-id "+assoc, "NewAssociationId")
	c.refused("DependencyViolation", "delete-network-acl --network-acl-id "+acl)

	table := c.must("create-route-table --vpc-id "+vpc, "RouteTable.RouteTableId")
	tied := c.must("associate-route-table --route-table-id "+table+" --subnet-id "+subnet, "AssociationId")
	c.must("create-route --destination-cidr-block 192.168.0.0/16 --network-interface-id "+eni+" --route-table-id "+table, "")
	c.must("replace-route --destination-cidr-block 10.0.0.0/16 --local-target --route-table-id "+table, "")
	c.want("local None None "+eni, "describe-route-tables --route-table-ids "+table, "RouteTables[].Routes[].[GatewayId,NetworkInterfaceId][]")
	c.must("delete-route --destination-cidr-block 192.168.0.0/16 --route-table-id "+table, "")
	main := c.must("describe-route-tables --filters Name=association.main,Values=true Name=vpc-id,Values="+vpc, "RouteTables[].RouteTableId")
	tied = c.must("replace-route-table-association --association-id "+tied+" --route-table-id "+main, "NewAssociationId")
	c.must("disassociate-route-table --association-id "+tied, "")
	c.must("delete-route-table --route-table-id "+table, "")

	c.must("delete-network-interface --network-interface-id "+eni, "")
	c.must("delete-subnet --subnet-id "+subnet, "")
	c.must("delete-network-acl --network-acl-id "+acl, "")
	c.must("delete-vpc --vpc-id "+vpc, "")
}

func sdkRouting(t *testing.T, c *ec2.Client) {
	t.Helper()
	ctx := t.Context()
	s := aws.String
	vpc := ok[*ec2.CreateVpcOutput](t)(c.CreateVpc(ctx, &ec2.CreateVpcInput{CidrBlock: s("10.0.0.0/16")})).Vpc.VpcId
	subnet := ok[*ec2.CreateSubnetOutput](t)(c.CreateSubnet(ctx, &ec2.CreateSubnetInput{VpcId: vpc, CidrBlock: s("10.0.0.0/24")})).Subnet.SubnetId
	eni := ok[*ec2.CreateNetworkInterfaceOutput](t)(c.CreateNetworkInterface(ctx, &ec2.CreateNetworkInterfaceInput{SubnetId: subnet})).NetworkInterface.NetworkInterfaceId

	acl := ok[*ec2.CreateNetworkAclOutput](t)(c.CreateNetworkAcl(ctx, &ec2.CreateNetworkAclInput{VpcId: vpc})).NetworkAcl.NetworkAclId
	ok[*ec2.CreateNetworkAclEntryOutput](t)(c.CreateNetworkAclEntry(ctx, &ec2.CreateNetworkAclEntryInput{
		NetworkAclId: acl, RuleNumber: aws.Int32(100), Protocol: s("-1"), RuleAction: types.RuleActionAllow, Egress: aws.Bool(true), CidrBlock: s("0.0.0.0/0"),
	}))
	ok[*ec2.ReplaceNetworkAclEntryOutput](t)(c.ReplaceNetworkAclEntry(ctx, &ec2.ReplaceNetworkAclEntryInput{
		NetworkAclId: acl, RuleNumber: aws.Int32(100), Protocol: s("17"), RuleAction: types.RuleActionDeny, Egress: aws.Bool(true), CidrBlock: s("10.0.0.0/8"),
		PortRange: &types.PortRange{From: aws.Int32(53), To: aws.Int32(53)},
	}))
	tied := ok[*ec2.DescribeNetworkAclsOutput](t)(c.DescribeNetworkAcls(ctx, &ec2.DescribeNetworkAclsInput{
		Filters: []types.Filter{{Name: s("association.subnet-id"), Values: []string{*subnet}}},
	})).NetworkAcls[0]
	equal(t, *tied.IsDefault, true)
	moved := ok[*ec2.ReplaceNetworkAclAssociationOutput](t)(c.ReplaceNetworkAclAssociation(ctx, &ec2.ReplaceNetworkAclAssociationInput{
		AssociationId: tied.Associations[0].NetworkAclAssociationId, NetworkAclId: acl,
	})).NewAssociationId
	own := ok[*ec2.DescribeNetworkAclsOutput](t)(c.DescribeNetworkAcls(ctx, &ec2.DescribeNetworkAclsInput{NetworkAclIds: []string{*acl}})).NetworkAcls[0]
	equal(t, *own.Entries[0].PortRange.To, 53)
	equal(t, *own.Associations[0].NetworkAclAssociationId, *moved)
	ok[*ec2.DeleteNetworkAclEntryOutput](t)(c.DeleteNetworkAclEntry(ctx, &ec2.DeleteNetworkAclEntryInput{NetworkAclId: acl, RuleNumber: aws.Int32(100), Egress: aws.Bool(true)}))

	table := ok[*ec2.CreateRouteTableOutput](t)(c.CreateRouteTable(ctx, &ec2.CreateRouteTableInput{VpcId: vpc})).RouteTable.RouteTableId
	assoc := ok[*ec2.AssociateRouteTableOutput](t)(c.AssociateRouteTable(ctx, &ec2.AssociateRouteTableInput{RouteTableId: table, SubnetId: subnet})).AssociationId
	ok[*ec2.CreateRouteOutput](t)(c.CreateRoute(ctx, &ec2.CreateRouteInput{RouteTableId: table, DestinationCidrBlock: s("192.168.0.0/16"), NetworkInterfaceId: eni}))
	ok[*ec2.ReplaceRouteOutput](t)(c.ReplaceRoute(ctx, &ec2.ReplaceRouteInput{RouteTableId: table, DestinationCidrBlock: s("192.168.0.0/16"), NetworkInterfaceId: eni}))
	routes := ok[*ec2.DescribeRouteTablesOutput](t)(c.DescribeRouteTables(ctx, &ec2.DescribeRouteTablesInput{RouteTableIds: []string{*table}})).RouteTables[0].Routes
	equal(t, routes[0].Origin, types.RouteOriginCreateRouteTable)
	equal(t, routes[1].State, types.RouteStateBlackhole)
	ok[*ec2.DeleteRouteOutput](t)(c.DeleteRoute(ctx, &ec2.DeleteRouteInput{RouteTableId: table, DestinationCidrBlock: s("192.168.0.0/16")}))
	main := ok[*ec2.DescribeRouteTablesOutput](t)(c.DescribeRouteTables(ctx, &ec2.DescribeRouteTablesInput{Filters: []types.Filter{
		{Name: s("vpc-id"), Values: []string{*vpc}}, {Name: s("association.main"), Values: []string{"true"}},
	}})).RouteTables[0].RouteTableId
	assoc = ok[*ec2.ReplaceRouteTableAssociationOutput](t)(c.ReplaceRouteTableAssociation(ctx, &ec2.ReplaceRouteTableAssociationInput{AssociationId: assoc, RouteTableId: main})).NewAssociationId
	ok[*ec2.DisassociateRouteTableOutput](t)(c.DisassociateRouteTable(ctx, &ec2.DisassociateRouteTableInput{AssociationId: assoc}))
	ok[*ec2.DeleteRouteTableOutput](t)(c.DeleteRouteTable(ctx, &ec2.DeleteRouteTableInput{RouteTableId: table}))

	ok[*ec2.DeleteNetworkInterfaceOutput](t)(c.DeleteNetworkInterface(ctx, &ec2.DeleteNetworkInterfaceInput{NetworkInterfaceId: eni}))
	ok[*ec2.DeleteSubnetOutput](t)(c.DeleteSubnet(ctx, &ec2.DeleteSubnetInput{SubnetId: subnet}))
	ok[*ec2.DeleteNetworkAclOutput](t)(c.DeleteNetworkAcl(ctx, &ec2.DeleteNetworkAclInput{NetworkAclId: acl}))
	ok[*ec2.DeleteVpcOutput](t)(c.DeleteVpc(ctx, &ec2.DeleteVpcInput{VpcId: vpc}))
}
