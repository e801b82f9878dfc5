package e2e

import (
	"fmt"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/underlay-cni/underlay/test/lab"
)

// What the AWS CLI and the Go SDK do with gateways, Elastic IPs, peering
// connections and DHCP options. boto3 does it in testdata/networks.py.

func cliGateways(c cli) {
	vpc := c.must("create-vpc --cidr-block 10.0.0.0/16", "Vpc.VpcId")
	subnet := c.must("create-subnet --cidr-block 10.0.0.0/24 --vpc-id "+vpc, "Subnet.SubnetId")
	eni := c.must("create-network-interface --subnet-id "+subnet, "NetworkInterface.NetworkInterfaceId")
	igw := c.must("create-internet-gateway", "InternetGateway.InternetGatewayId")
	c.must("attach-internet-gateway --internet-gateway-id "+igw+" --vpc-id "+vpc, "")
	c.want(vpc, "describe-internet-gateways --internet-gateway-ids "+igw, "InternetGateways[].Attachments[].VpcId")
	address := c.must("allocate-address --domain vpc", "AllocationId")
	assoc := c.must("associate-address --allocation-id "+address+" --network-interface-id "+eni, "AssociationId")
	c.want(eni, "describe-addresses --allocation-ids "+address, "Addresses[].NetworkInterfaceId")
	c.must("disassociate-address --association-id "+assoc, "")
	nat := c.must("create-nat-gateway --subnet-id "+subnet+" --allocation-id "+address, "NatGateway.NatGatewayId")
	c.must("wait nat-gateway-available --nat-gateway-ids "+nat, "")
	c.refused("InvalidIPAddress.InUse", "release-address --allocation-id "+address)
	c.want(nat, "delete-nat-gateway --nat-gateway-id "+nat, "NatGatewayId")
	lab.Eventually(c.t, 60*time.Second, "the NAT gateway is deleted", func() error {
		if s := c.must("describe-nat-gateways --nat-gateway-ids "+nat, "NatGateways[].State"); s != "deleted" {
			return fmt.Errorf("%s", s)
		}
		return nil
	})
	c.must("release-address --allocation-id "+address, "")
	c.must("detach-internet-gateway --internet-gateway-id "+igw+" --vpc-id "+vpc, "")
	c.must("delete-internet-gateway --internet-gateway-id "+igw, "")
	c.must("delete-network-interface --network-interface-id "+eni, "")
	c.must("delete-subnet --subnet-id "+subnet, "")
	c.must("delete-vpc --vpc-id "+vpc, "")
}

func cliPeerings(c cli) {
	one := c.must("create-vpc --cidr-block 10.10.0.0/16", "Vpc.VpcId")
	pcx := c.must("create-vpc-peering-connection --vpc-id "+one+" --peer-vpc-id "+one, "VpcPeeringConnection.VpcPeeringConnectionId")
	c.want("failed", "describe-vpc-peering-connections --vpc-peering-connection-ids "+pcx, "VpcPeeringConnections[].Status.Code")
	dopt := c.must("create-dhcp-options --dhcp-configurations Key=ntp-servers,Values=10.0.0.5", "DhcpOptions.DhcpOptionsId")
	c.must("associate-dhcp-options --dhcp-options-id "+dopt+" --vpc-id "+one, "")
	c.want("10.0.0.5", "describe-dhcp-options --dhcp-options-ids "+dopt, "DhcpOptions[].DhcpConfigurations[].Values[].Value")
	c.must("associate-dhcp-options --dhcp-options-id default --vpc-id "+one, "")
	c.must("delete-dhcp-options --dhcp-options-id "+dopt, "")
	two := c.must("create-vpc --cidr-block 10.11.0.0/16", "Vpc.VpcId")
	pcx = c.must("create-vpc-peering-connection --vpc-id "+one+" --peer-vpc-id "+two, "VpcPeeringConnection.VpcPeeringConnectionId")
	c.must("reject-vpc-peering-connection --vpc-peering-connection-id "+pcx, "")
	pcx = c.must("create-vpc-peering-connection --vpc-id "+one+" --peer-vpc-id "+two, "VpcPeeringConnection.VpcPeeringConnectionId")
	c.must("accept-vpc-peering-connection --vpc-peering-connection-id "+pcx, "")
	c.must("modify-vpc-peering-connection-options --requester-peering-connection-options AllowDnsResolutionFromRemoteVpc=true --vpc-peering-connection-id "+pcx, "")
	c.refused("DependencyViolation", "delete-vpc --vpc-id "+two)
	c.must("delete-vpc-peering-connection --vpc-peering-connection-id "+pcx, "")
	c.must("wait vpc-peering-connection-deleted --vpc-peering-connection-ids "+pcx, "")
	c.must("delete-vpc --vpc-id "+two, "")
	c.must("delete-vpc --vpc-id "+one, "")
}

func sdkGateways(t *testing.T, c *ec2.Client) {
	t.Helper()
	ctx := t.Context()
	s := aws.String
	vpc := ok[*ec2.CreateVpcOutput](t)(c.CreateVpc(ctx, &ec2.CreateVpcInput{CidrBlock: s("10.0.0.0/16")})).Vpc.VpcId
	subnet := ok[*ec2.CreateSubnetOutput](t)(c.CreateSubnet(ctx, &ec2.CreateSubnetInput{VpcId: vpc, CidrBlock: s("10.0.0.0/24")})).Subnet.SubnetId
	eni := ok[*ec2.CreateNetworkInterfaceOutput](t)(c.CreateNetworkInterface(ctx, &ec2.CreateNetworkInterfaceInput{SubnetId: subnet})).NetworkInterface.NetworkInterfaceId

	igw := ok[*ec2.CreateInternetGatewayOutput](t)(c.CreateInternetGateway(ctx, &ec2.CreateInternetGatewayInput{})).InternetGateway.InternetGatewayId
	ok[*ec2.AttachInternetGatewayOutput](t)(c.AttachInternetGateway(ctx, &ec2.AttachInternetGatewayInput{InternetGatewayId: igw, VpcId: vpc}))
	found := ok[*ec2.DescribeInternetGatewaysOutput](t)(c.DescribeInternetGateways(ctx, &ec2.DescribeInternetGatewaysInput{InternetGatewayIds: []string{*igw}}))
	equal(t, *found.InternetGateways[0].Attachments[0].VpcId, *vpc)
	address := ok[*ec2.AllocateAddressOutput](t)(c.AllocateAddress(ctx, &ec2.AllocateAddressInput{})).AllocationId
	assoc := ok[*ec2.AssociateAddressOutput](t)(c.AssociateAddress(ctx, &ec2.AssociateAddressInput{AllocationId: address, NetworkInterfaceId: eni})).AssociationId
	held := ok[*ec2.DescribeAddressesOutput](t)(c.DescribeAddresses(ctx, &ec2.DescribeAddressesInput{AllocationIds: []string{*address}})).Addresses[0]
	equal(t, *held.NetworkInterfaceId, *eni)
	ok[*ec2.DisassociateAddressOutput](t)(c.DisassociateAddress(ctx, &ec2.DisassociateAddressInput{AssociationId: assoc}))
	nat := ok[*ec2.CreateNatGatewayOutput](t)(c.CreateNatGateway(ctx, &ec2.CreateNatGatewayInput{SubnetId: subnet, AllocationId: address})).NatGateway.NatGatewayId
	byID := &ec2.DescribeNatGatewaysInput{NatGatewayIds: []string{*nat}}
	if err := ec2.NewNatGatewayAvailableWaiter(c, func(o *ec2.NatGatewayAvailableWaiterOptions) { o.MinDelay, o.MaxDelay = time.Second/10, time.Second }).Wait(ctx, byID, sdkWait); err != nil {
		t.Fatal(err)
	}
	second := ok[*ec2.AllocateAddressOutput](t)(c.AllocateAddress(ctx, &ec2.AllocateAddressInput{})).AllocationId
	more := ok[*ec2.AssociateNatGatewayAddressOutput](t)(c.AssociateNatGatewayAddress(ctx, &ec2.AssociateNatGatewayAddressInput{NatGatewayId: nat, AllocationIds: []string{*second}}))
	equal(t, more.NatGatewayAddresses[0].Status, types.NatGatewayAddressStatusAssociating)
	less := ok[*ec2.DisassociateNatGatewayAddressOutput](t)(c.DisassociateNatGatewayAddress(ctx, &ec2.DisassociateNatGatewayAddressInput{
		NatGatewayId: nat, AssociationIds: []string{*more.NatGatewayAddresses[0].AssociationId}, MaxDrainDurationSeconds: aws.Int32(1),
	}))
	equal(t, less.NatGatewayAddresses[0].Status, types.NatGatewayAddressStatusDisassociating)
	private := ok[*ec2.CreateNatGatewayOutput](t)(c.CreateNatGateway(ctx, &ec2.CreateNatGatewayInput{SubnetId: subnet, ConnectivityType: types.ConnectivityTypePrivate})).NatGateway.NatGatewayId
	if err := ec2.NewNatGatewayAvailableWaiter(c, func(o *ec2.NatGatewayAvailableWaiterOptions) { o.MinDelay, o.MaxDelay = time.Second/10, time.Second }).Wait(ctx,
		&ec2.DescribeNatGatewaysInput{NatGatewayIds: []string{*private}}, sdkWait); err != nil {
		t.Fatal(err)
	}
	own := ok[*ec2.AssignPrivateNatGatewayAddressOutput](t)(c.AssignPrivateNatGatewayAddress(ctx, &ec2.AssignPrivateNatGatewayAddressInput{NatGatewayId: private, PrivateIpAddressCount: aws.Int32(1)}))
	ok[*ec2.UnassignPrivateNatGatewayAddressOutput](t)(c.UnassignPrivateNatGatewayAddress(ctx, &ec2.UnassignPrivateNatGatewayAddressInput{
		NatGatewayId: private, PrivateIpAddresses: []string{*own.NatGatewayAddresses[0].PrivateIp},
	}))
	ok[*ec2.DeleteNatGatewayOutput](t)(c.DeleteNatGateway(ctx, &ec2.DeleteNatGatewayInput{NatGatewayId: private}))
	ok[*ec2.DeleteNatGatewayOutput](t)(c.DeleteNatGateway(ctx, &ec2.DeleteNatGatewayInput{NatGatewayId: nat}))
	lab.Eventually(t, sdkWait, "the NAT gateway is deleted", func() error {
		if n := ok[*ec2.DescribeNatGatewaysOutput](t)(c.DescribeNatGateways(ctx, byID)).NatGateways[0]; n.State != types.NatGatewayStateDeleted {
			return fmt.Errorf("%s", n.State)
		}
		return nil
	})
	for _, id := range []*string{address, second} {
		ok[*ec2.ReleaseAddressOutput](t)(c.ReleaseAddress(ctx, &ec2.ReleaseAddressInput{AllocationId: id}))
	}
	ok[*ec2.DetachInternetGatewayOutput](t)(c.DetachInternetGateway(ctx, &ec2.DetachInternetGatewayInput{InternetGatewayId: igw, VpcId: vpc}))
	ok[*ec2.DeleteInternetGatewayOutput](t)(c.DeleteInternetGateway(ctx, &ec2.DeleteInternetGatewayInput{InternetGatewayId: igw}))

	peer := ok[*ec2.CreateVpcOutput](t)(c.CreateVpc(ctx, &ec2.CreateVpcInput{CidrBlock: s("10.1.0.0/16")})).Vpc.VpcId
	request := func() *string {
		return ok[*ec2.CreateVpcPeeringConnectionOutput](t)(c.CreateVpcPeeringConnection(ctx, &ec2.CreateVpcPeeringConnectionInput{VpcId: vpc, PeerVpcId: peer})).VpcPeeringConnection.VpcPeeringConnectionId
	}
	ok[*ec2.RejectVpcPeeringConnectionOutput](t)(c.RejectVpcPeeringConnection(ctx, &ec2.RejectVpcPeeringConnectionInput{VpcPeeringConnectionId: request()}))
	pcx := request()
	ok[*ec2.AcceptVpcPeeringConnectionOutput](t)(c.AcceptVpcPeeringConnection(ctx, &ec2.AcceptVpcPeeringConnectionInput{VpcPeeringConnectionId: pcx}))
	ok[*ec2.ModifyVpcPeeringConnectionOptionsOutput](t)(c.ModifyVpcPeeringConnectionOptions(ctx, &ec2.ModifyVpcPeeringConnectionOptionsInput{
		VpcPeeringConnectionId: pcx, RequesterPeeringConnectionOptions: &types.PeeringConnectionOptionsRequest{AllowDnsResolutionFromRemoteVpc: aws.Bool(true)},
	}))
	one := ok[*ec2.DescribeVpcPeeringConnectionsOutput](t)(c.DescribeVpcPeeringConnections(ctx, &ec2.DescribeVpcPeeringConnectionsInput{VpcPeeringConnectionIds: []string{*pcx}}))
	equal(t, one.VpcPeeringConnections[0].Status.Code, types.VpcPeeringConnectionStateReasonCodeActive)
	ok[*ec2.DeleteVpcPeeringConnectionOutput](t)(c.DeleteVpcPeeringConnection(ctx, &ec2.DeleteVpcPeeringConnectionInput{VpcPeeringConnectionId: pcx}))

	dopt := ok[*ec2.CreateDhcpOptionsOutput](t)(c.CreateDhcpOptions(ctx, &ec2.CreateDhcpOptionsInput{
		DhcpConfigurations: []types.NewDhcpConfiguration{{Key: s("domain-name"), Values: []string{"example.org"}}},
	})).DhcpOptions.DhcpOptionsId
	ok[*ec2.AssociateDhcpOptionsOutput](t)(c.AssociateDhcpOptions(ctx, &ec2.AssociateDhcpOptionsInput{DhcpOptionsId: dopt, VpcId: peer}))
	_, err := c.DeleteDhcpOptions(ctx, &ec2.DeleteDhcpOptionsInput{DhcpOptionsId: dopt})
	refused(t, "DependencyViolation", err)
	ok[*ec2.AssociateDhcpOptionsOutput](t)(c.AssociateDhcpOptions(ctx, &ec2.AssociateDhcpOptionsInput{DhcpOptionsId: s("default"), VpcId: peer}))
	sets := ok[*ec2.DescribeDhcpOptionsOutput](t)(c.DescribeDhcpOptions(ctx, &ec2.DescribeDhcpOptionsInput{DhcpOptionsIds: []string{*dopt}}))
	equal(t, *sets.DhcpOptions[0].DhcpConfigurations[0].Values[0].Value, "example.org")
	ok[*ec2.DeleteDhcpOptionsOutput](t)(c.DeleteDhcpOptions(ctx, &ec2.DeleteDhcpOptionsInput{DhcpOptionsId: dopt}))

	ok[*ec2.DeleteNetworkInterfaceOutput](t)(c.DeleteNetworkInterface(ctx, &ec2.DeleteNetworkInterfaceInput{NetworkInterfaceId: eni}))
	ok[*ec2.DeleteSubnetOutput](t)(c.DeleteSubnet(ctx, &ec2.DeleteSubnetInput{SubnetId: subnet}))
	ok[*ec2.DeleteVpcOutput](t)(c.DeleteVpc(ctx, &ec2.DeleteVpcInput{VpcId: peer}))
	ok[*ec2.DeleteVpcOutput](t)(c.DeleteVpc(ctx, &ec2.DeleteVpcInput{VpcId: vpc}))
}
