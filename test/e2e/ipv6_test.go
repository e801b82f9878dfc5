package e2e

import (
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
)

// What the AWS CLI and the Go SDK do with IPv6. boto3 does it in testdata/ipv6.py.

func cliIPv6(c cli) {
	vpc := c.must("create-vpc --cidr-block 10.20.0.0/16", "Vpc.VpcId")
	block := c.must("associate-vpc-cidr-block --amazon-provided-ipv6-cidr-block --vpc-id "+vpc, "Ipv6CidrBlockAssociation.Ipv6CidrBlock")
	c.want(block, "describe-vpcs --vpc-ids "+vpc, "Vpcs[].Ipv6CidrBlockAssociationSet[].Ipv6CidrBlock")
	subnet := c.must("create-subnet --cidr-block 10.20.0.0/24 --vpc-id "+vpc, "Subnet.SubnetId")
	part := strings.TrimSuffix(block, "56") + "64"
	assoc := c.must("associate-subnet-cidr-block --ipv6-cidr-block "+part+" --subnet-id "+subnet, "Ipv6CidrBlockAssociation.AssociationId")
	c.must("modify-subnet-attribute --assign-ipv6-address-on-creation --subnet-id "+subnet, "")
	first := strings.TrimSuffix(part, "/64")
	eni := c.must("create-network-interface --subnet-id "+subnet, "NetworkInterface.NetworkInterfaceId")
	c.want(first+"4", "describe-network-interfaces --network-interface-ids "+eni, "NetworkInterfaces[].Ipv6Addresses[].Ipv6Address")
	c.want(first+"5 "+first+"6", "assign-ipv6-addresses --ipv6-address-count 2 --network-interface-id "+eni, "AssignedIpv6Addresses")
	c.want(first+"4 "+first+"6", "unassign-ipv6-addresses --ipv6-addresses "+first+"4 "+first+"6 --network-interface-id "+eni, "UnassignedIpv6Addresses")
	c.refused("InvalidCidrBlock.InUse", "disassociate-subnet-cidr-block --association-id "+assoc)
	eigw := c.must("create-egress-only-internet-gateway --vpc-id "+vpc, "EgressOnlyInternetGateway.EgressOnlyInternetGatewayId")
	c.want("attached", "describe-egress-only-internet-gateways --egress-only-internet-gateway-ids "+eigw, "EgressOnlyInternetGateways[].Attachments[].State")
	table := c.must("describe-route-tables --filters Name=vpc-id,Values="+vpc, "RouteTables[].RouteTableId")
	c.must("create-route --destination-ipv6-cidr-block ::/0 --egress-only-internet-gateway-id "+eigw+" --route-table-id "+table, "")
	c.want(table, "describe-route-tables --filters Name=route.egress-only-internet-gateway-id,Values="+eigw, "RouteTables[].RouteTableId")
	c.must("delete-route --destination-ipv6-cidr-block ::/0 --route-table-id "+table, "")
	c.must("delete-egress-only-internet-gateway --egress-only-internet-gateway-id "+eigw, "")
	c.must("delete-network-interface --network-interface-id "+eni, "")
	c.must("modify-subnet-attribute --no-assign-ipv6-address-on-creation --subnet-id "+subnet, "")
	c.must("disassociate-subnet-cidr-block --association-id "+assoc, "")
	c.must("delete-subnet --subnet-id "+subnet, "")
	c.must("delete-vpc --vpc-id "+vpc, "")
}

func sdkIPv6(t *testing.T, c *ec2.Client) {
	t.Helper()
	ctx := t.Context()
	s := aws.String
	v := ok[*ec2.CreateVpcOutput](t)(c.CreateVpc(ctx, &ec2.CreateVpcInput{CidrBlock: s("10.0.0.0/16"), AmazonProvidedIpv6CidrBlock: aws.Bool(true)})).Vpc
	vpc, block := v.VpcId, *v.Ipv6CidrBlockAssociationSet[0].Ipv6CidrBlock
	equal(t, block, "2001:db8:0:100::/56")
	n := ok[*ec2.CreateSubnetOutput](t)(c.CreateSubnet(ctx, &ec2.CreateSubnetInput{VpcId: vpc, CidrBlock: s("10.0.0.0/24"), Ipv6CidrBlock: s("2001:db8:0:100::/64")})).Subnet
	subnet := n.SubnetId
	equal(t, n.Ipv6CidrBlockAssociationSet[0].Ipv6CidrBlockState.State, types.SubnetCidrBlockStateCodeAssociating)
	acls := ok[*ec2.DescribeNetworkAclsOutput](t)(c.DescribeNetworkAcls(ctx, &ec2.DescribeNetworkAclsInput{Filters: []types.Filter{{Name: s("entry.ipv6-cidr"), Values: []string{"::/0"}}}}))
	equal(t, len(acls.NetworkAcls[0].Entries), 8)

	run := ok[*ec2.RunInstancesOutput](t)(c.RunInstances(ctx, &ec2.RunInstancesInput{
		ImageId: s("ami-0123456789abcdef0"), InstanceType: types.InstanceTypeM5Large, MinCount: aws.Int32(1), MaxCount: aws.Int32(1), SubnetId: subnet, Ipv6AddressCount: aws.Int32(1),
	}))
	equal(t, *run.Instances[0].Ipv6Address, "2001:db8:0:100::4")
	found := ok[*ec2.DescribeInstancesOutput](t)(c.DescribeInstances(ctx, &ec2.DescribeInstancesInput{Filters: []types.Filter{{Name: s("ipv6-address"), Values: []string{"2001:db8:0:100::4"}}}}))
	equal(t, *found.Reservations[0].Instances[0].NetworkInterfaces[0].Ipv6Addresses[0].Ipv6Address, "2001:db8:0:100::4")
	eni := found.Reservations[0].Instances[0].NetworkInterfaces[0].NetworkInterfaceId

	got := ok[*ec2.AssignIpv6AddressesOutput](t)(c.AssignIpv6Addresses(ctx, &ec2.AssignIpv6AddressesInput{NetworkInterfaceId: eni, Ipv6PrefixCount: aws.Int32(1)}))
	equal(t, got.AssignedIpv6Prefixes[0], "2001:db8:0:100:1::/80")
	_, err := c.AssignIpv6Addresses(ctx, &ec2.AssignIpv6AddressesInput{NetworkInterfaceId: eni, Ipv6AddressCount: aws.Int32(9)})
	refused(t, "PrivateIpAddressLimitExceeded", err)
	gone := ok[*ec2.UnassignIpv6AddressesOutput](t)(c.UnassignIpv6Addresses(ctx, &ec2.UnassignIpv6AddressesInput{NetworkInterfaceId: eni, Ipv6Prefixes: got.AssignedIpv6Prefixes}))
	equal(t, gone.UnassignedIpv6Prefixes[0], "2001:db8:0:100:1::/80")

	other := ok[*ec2.CreateSubnetOutput](t)(c.CreateSubnet(ctx, &ec2.CreateSubnetInput{VpcId: vpc, CidrBlock: s("10.0.1.0/24")})).Subnet.SubnetId
	assoc := ok[*ec2.AssociateSubnetCidrBlockOutput](t)(c.AssociateSubnetCidrBlock(ctx, &ec2.AssociateSubnetCidrBlockInput{SubnetId: other, Ipv6CidrBlock: s("2001:db8:0:101::/64")}))
	free := ok[*ec2.DisassociateSubnetCidrBlockOutput](t)(c.DisassociateSubnetCidrBlock(ctx, &ec2.DisassociateSubnetCidrBlockInput{AssociationId: assoc.Ipv6CidrBlockAssociation.AssociationId}))
	equal(t, *free.SubnetId, *other)

	eigw := ok[*ec2.CreateEgressOnlyInternetGatewayOutput](t)(c.CreateEgressOnlyInternetGateway(ctx, &ec2.CreateEgressOnlyInternetGatewayInput{VpcId: vpc})).EgressOnlyInternetGateway.EgressOnlyInternetGatewayId
	for p := ec2.NewDescribeEgressOnlyInternetGatewaysPaginator(c, &ec2.DescribeEgressOnlyInternetGatewaysInput{MaxResults: aws.Int32(5)}); p.HasMorePages(); {
		all := ok[*ec2.DescribeEgressOnlyInternetGatewaysOutput](t)(p.NextPage(ctx)).EgressOnlyInternetGateways
		equal(t, all[0].Attachments[0].State, types.AttachmentStatusAttached)
	}
	table := ok[*ec2.CreateRouteTableOutput](t)(c.CreateRouteTable(ctx, &ec2.CreateRouteTableInput{VpcId: vpc})).RouteTable.RouteTableId
	ok[*ec2.CreateRouteOutput](t)(c.CreateRoute(ctx, &ec2.CreateRouteInput{RouteTableId: table, DestinationIpv6CidrBlock: s("::/0"), EgressOnlyInternetGatewayId: eigw}))
	routes := ok[*ec2.DescribeRouteTablesOutput](t)(c.DescribeRouteTables(ctx, &ec2.DescribeRouteTablesInput{RouteTableIds: []string{*table}})).RouteTables[0].Routes
	equal(t, len(routes), 3)
	equal(t, *routes[1].DestinationIpv6CidrBlock, block)
	equal(t, *routes[2].EgressOnlyInternetGatewayId, *eigw)
	deleted := ok[*ec2.DeleteEgressOnlyInternetGatewayOutput](t)(c.DeleteEgressOnlyInternetGateway(ctx, &ec2.DeleteEgressOnlyInternetGatewayInput{EgressOnlyInternetGatewayId: eigw}))
	equal(t, *deleted.ReturnCode, true)
	routes = ok[*ec2.DescribeRouteTablesOutput](t)(c.DescribeRouteTables(ctx, &ec2.DescribeRouteTablesInput{RouteTableIds: []string{*table}})).RouteTables[0].Routes
	equal(t, routes[2].State, types.RouteStateBlackhole)
}
