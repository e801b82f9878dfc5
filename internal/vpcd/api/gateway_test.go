package api

import (
	"fmt"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// online makes an internet gateway and attaches it.
func (w *world) online(vpcID string) string {
	w.t.Helper()
	id := w.must("CreateInternetGateway").get("internetGateway.internetGatewayId")
	w.must("AttachInternetGateway", "InternetGatewayId="+id, "VpcId="+vpcID)
	return id
}

func (w *world) elastic(params ...string) string {
	w.t.Helper()
	return w.must("AllocateAddress", params...).get("allocationId")
}

func TestInternetGateways(t *testing.T) {
	w := newWorld(t)
	one, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	two, _ := w.vpc("10.1.0.0/16", "10.1.0.0/24")
	made := w.must("CreateInternetGateway", "TagSpecification.1.ResourceType=internet-gateway", "TagSpecification.1.Tag.1.Key=k", "TagSpecification.1.Tag.1.Value=v")
	id := made.get("internetGateway.internetGatewayId")
	w.want(made, "internetGateway.attachmentSet.vpcId", "")
	w.want(made, "internetGateway.tagSet.value", "v")
	at := func(v string) []string { return []string{"InternetGatewayId=" + id, "VpcId=" + v} }
	w.fails("Gateway.NotAttached", "DetachInternetGateway", at(one)...)
	w.must("AttachInternetGateway", at(one)...)
	w.fails("Resource.AlreadyAssociated", "AttachInternetGateway", at(two)...)
	other := w.must("CreateInternetGateway").get("internetGateway.internetGatewayId")
	w.fails("InvalidParameterValue", "AttachInternetGateway", "InternetGatewayId="+other, "VpcId="+one)
	const s = "internetGatewaySet."
	d := w.must("DescribeInternetGateways", "Filter.1.Name=attachment.vpc-id", "Filter.1.Value.1="+one)
	w.want(d, s+"internetGatewayId", id)
	w.want(d, s+"attachmentSet.state", "available")
	w.fails("DependencyViolation", "DeleteInternetGateway", "InternetGatewayId="+id)
	w.fails("Gateway.NotAttached", "DetachInternetGateway", at(two)...)

	// A route to it is a black hole once it is detached.
	table := string(w.store.View().MainTable(vpc.VPCID(one)).ID)
	w.must("CreateRoute", "RouteTableId="+table, "DestinationCidrBlock=0.0.0.0/0", "GatewayId="+id)
	w.fails("Gateway.NotAttached", "CreateRoute", "RouteTableId="+table, "DestinationCidrBlock=1.0.0.0/8", "GatewayId="+other)
	foreign := string(w.store.View().MainTable(vpc.VPCID(two)).ID)
	w.fails("InvalidParameterValue", "CreateRoute", "RouteTableId="+foreign, "DestinationCidrBlock=0.0.0.0/0", "GatewayId="+id)
	w.must("AssociateAddress", "AllocationId="+w.elastic(), "NetworkInterfaceId="+w.eni(subnet))
	w.fails("DependencyViolation", "DetachInternetGateway", at(one)...)
	w.must("DisassociateAddress", "PublicIp=198.51.100.1")
	w.fails("DependencyViolation", "DeleteVpc", "VpcId="+one)
	w.must("DetachInternetGateway", at(one)...)
	w.want(w.must("DescribeRouteTables", "RouteTableId.1="+table), rts+"routeSet.state", "active,blackhole")
	w.must("DeleteInternetGateway", "InternetGatewayId="+id)
	w.fails("InvalidInternetGatewayID.NotFound", "DescribeInternetGateways", "InternetGatewayId.1="+id)
	w.want(w.must("DescribeRouteTables", "Filter.1.Name=route.gateway-id", "Filter.1.Value.1="+id), rts+"routeTableId", table)
}

func TestElasticAddresses(t *testing.T) {
	w := newWorld(t)
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	made := w.must("AllocateAddress", "Domain=vpc", "TagSpecification.1.ResourceType=elastic-ip", "TagSpecification.1.Tag.1.Key=k", "TagSpecification.1.Tag.1.Value=v")
	id := made.get("allocationId")
	w.want(made, "publicIp", "198.51.100.1")
	w.want(made, "domain", "vpc")
	w.fails("UnsupportedOperation", "AllocateAddress", "Domain=standard")
	w.fails("InvalidAddress.NotFound", "AllocateAddress", "Address=203.0.113.1")
	w.fails("InvalidIPAddress.InUse", "AllocateAddress", "Address=198.51.100.1")
	second := w.elastic("Address=198.51.100.200")
	i := w.instance(subnet, "m5.large")
	eni := w.must("DescribeInstances", "InstanceId.1="+i).get("reservationSet.instancesSet.networkInterfaceSet.networkInterfaceId")
	w.must("AssignPrivateIpAddresses", "NetworkInterfaceId="+eni, "PrivateIpAddress.1=10.0.0.20")
	w.must("AssignPrivateIpAddresses", "NetworkInterfaceId="+eni, "Ipv4Prefix.1=10.0.0.32/28")
	w.fails("Gateway.NotAttached", "AssociateAddress", "AllocationId="+id, "InstanceId="+i)
	w.online(vpcID)
	w.must("ModifyVpcAttribute", "VpcId="+vpcID, "EnableDnsHostnames.Value=true")

	assoc := w.must("AssociateAddress", "AllocationId="+id, "InstanceId="+i).get("associationId")
	w.want(w.must("AssociateAddress", "AllocationId="+id, "NetworkInterfaceId="+eni), "associationId", assoc)
	w.fails("Resource.AlreadyAssociated", "AssociateAddress", "AllocationId="+id, "NetworkInterfaceId="+eni, "PrivateIpAddress=10.0.0.20")
	w.fails("Resource.AlreadyAssociated", "AssociateAddress", "AllocationId="+second, "NetworkInterfaceId="+eni)
	w.fails("InvalidParameterValue", "AssociateAddress", "AllocationId="+second, "NetworkInterfaceId="+eni, "PrivateIpAddress=10.0.0.21")
	w.must("AssociateAddress", "AllocationId="+second, "NetworkInterfaceId="+eni, "PrivateIpAddress=10.0.0.20")
	third := w.elastic()
	w.must("AssociateAddress", "AllocationId="+third, "NetworkInterfaceId="+eni, "PrivateIpAddress=10.0.0.40") // of the prefix
	w.fails("InvalidIPAddress.InUse", "ReleaseAddress", "AllocationId="+id)

	d := w.must("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+eni)
	const n = "networkInterfaceSet."
	w.want(d, n+"association.publicIp", "198.51.100.1")
	w.want(d, n+"association.allocationId", id)
	w.want(d, n+"publicDnsName", "ec2-198-51-100-1.compute-1.amazonaws.com")
	w.want(d, n+"privateIpAddressesSet.association.publicIp", "198.51.100.1,198.51.100.200")
	d = w.must("DescribeInstances", "Filter.1.Name=ip-address", "Filter.1.Value.1=198.51.100.1")
	w.want(d, "reservationSet.instancesSet.ipAddress", "198.51.100.1")
	w.want(d, "reservationSet.instancesSet.dnsName", "ec2-198-51-100-1.compute-1.amazonaws.com")
	for f, v := range map[string]string{"association.public-ip": "198.51.100.1", "addresses.association.public-ip": "198.51.100.2", "association.association-id": assoc} {
		w.want(w.must("DescribeNetworkInterfaces", "Filter.1.Name="+f, "Filter.1.Value.1="+v), n+"networkInterfaceId", eni)
	}
	const a = "addressesSet."
	d = w.must("DescribeAddresses", "PublicIp.1=198.51.100.200")
	w.want(d, a+"allocationId", second)
	w.want(d, a+"privateIpAddress", "10.0.0.20")
	w.want(d, a+"instanceId", i)
	w.want(w.must("DescribeAddresses", "Filter.1.Name=instance-id", "Filter.1.Value.1="+i, "Filter.2.Name=tag:k", "Filter.2.Value.1=v"), a+"allocationId", id)
	w.fails("InvalidAllocationID.NotFound", "DescribeAddresses", "AllocationId.1=eipalloc-00000000000000000")

	// It leaves with the private address, moves if that is allowed, and is there
	// after a restart.
	w.must("UnassignPrivateIpAddresses", "NetworkInterfaceId="+eni, "PrivateIpAddress.1=10.0.0.20")
	w.want(w.must("DescribeAddresses", "AllocationId.1="+second), a+"associationId", "")
	other := w.eni(subnet)
	w.must("AssociateAddress", "PublicIp=198.51.100.1", "NetworkInterfaceId="+other, "AllowReassociation=true")
	w.restart()
	w.want(w.must("DescribeAddresses", "AllocationId.1="+id), a+"networkInterfaceId", other)
	assoc = w.must("DescribeAddresses", "AllocationId.1="+id).get(a + "associationId")
	w.must("DisassociateAddress", "AssociationId="+assoc)
	w.fails("InvalidAssociationID.NotFound", "DisassociateAddress", "AssociationId="+assoc)
	w.must("ReleaseAddress", "AllocationId="+id)
	w.fails("InvalidAllocationID.NotFound", "ReleaseAddress", "AllocationId="+id)
	w.must("TerminateInstances", "InstanceId.1="+i)
	w.must("DescribeInstances")
	w.want(w.must("DescribeAddresses", "AllocationId.1="+third), a+"associationId", "")
	w.elastic()
	w.elastic()
	w.elastic()
	w.fails("AddressLimitExceeded", "AllocateAddress")
}

func TestNATGateways(t *testing.T) {
	w := newWorld(t)
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	set := func(q map[chaos.Quota]int) {
		t.Helper()
		if err := w.chaos.Set(chaos.Settings{AttachLatency: time.Second, Throttle: "off", Quotas: q}); err != nil {
			t.Fatal(err)
		}
	}
	set(map[chaos.Quota]int{chaos.QuotaNATs: 2})
	one, two := w.elastic(), w.elastic()
	for _, c := range []struct {
		code   string
		params []string
	}{
		{"MissingParameter", []string{"AllocationId=" + one}},
		{"MissingParameter", []string{"SubnetId=" + subnet}},
		{"InvalidParameterCombination", []string{"SubnetId=" + subnet, "ConnectivityType=private", "AllocationId=" + one}},
		{"InvalidAllocationID.NotFound", []string{"SubnetId=" + subnet, "AllocationId=eipalloc-00000000000000000"}},
		{"Resource.AlreadyAssociated", []string{"SubnetId=" + subnet, "AllocationId=" + one, "SecondaryAllocationId.1=" + one}},
		{"InvalidIPAddress.InUse", []string{"SubnetId=" + subnet, "AllocationId=" + one, "PrivateIpAddress=" + func() string {
			return w.must("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+w.eni(subnet)).get("networkInterfaceSet.privateIpAddress")
		}()}},
		{"UnsupportedOperation", []string{"VpcId=" + vpcID, "AvailabilityMode=regional"}},
	} {
		w.fails(c.code, "CreateNatGateway", c.params...)
	}
	const s = "natGatewaySet."
	// Without an internet gateway it fails, after a while.
	failed := w.must("CreateNatGateway", "SubnetId="+subnet, "AllocationId="+one).get("natGateway.natGatewayId")
	w.clock.Advance(time.Second)
	d := w.must("DescribeNatGateways", "NatGatewayId.1="+failed)
	w.want(d, s+"state", "failed")
	w.want(d, s+"failureCode", "Gateway.NotAttached")
	w.online(vpcID)

	create := []string{"SubnetId=" + subnet, "AllocationId=" + one, "SecondaryAllocationId.1=" + two, "ClientToken=tok", "PrivateIpAddress=10.0.0.99",
		"TagSpecification.1.ResourceType=natgateway", "TagSpecification.1.Tag.1.Key=k", "TagSpecification.1.Tag.1.Value=v"}
	d = w.must("CreateNatGateway", create...)
	id := d.get("natGateway.natGatewayId")
	w.want(d, "natGateway.state", "pending")
	w.want(w.must("CreateNatGateway", create...), "natGateway.natGatewayId", id)
	w.clock.Advance(time.Second)
	d = w.must("DescribeNatGateways", "Filter.1.Name=state", "Filter.1.Value.1=available", "Filter.2.Name=tag:k", "Filter.2.Value.1=v")
	w.want(d, s+"natGatewayId", id)
	w.want(d, s+"connectivityType", "public")
	w.want(d, s+"natGatewayAddressSet.publicIp", "198.51.100.1,198.51.100.2")
	w.want(d, s+"natGatewayAddressSet.isPrimary", "true,false")
	w.fails("InvalidParameterValue", "DescribeNatGateways", "Filter.1.Name=color", "Filter.1.Value.1=red")
	eni := w.must("DescribeNetworkInterfaces", "Filter.1.Name=interface-type", "Filter.1.Value.1=nat_gateway")
	const n = "networkInterfaceSet."
	w.want(eni, n+"requesterManaged", "true")
	w.want(eni, n+"privateIpAddress", "10.0.0.99")
	w.want(eni, n+"sourceDestCheck", "false")
	w.want(eni, n+"groupSet.groupId", "")
	w.want(eni, n+"description", "Interface for NAT Gateway "+id)
	w.fails("AuthFailure", "AssignPrivateIpAddresses", "NetworkInterfaceId="+eni.get(n+"networkInterfaceId"), "SecondaryPrivateIpAddressCount=1")
	w.fails("OperationNotPermitted", "AssociateAddress", "AllocationId="+one, "NetworkInterfaceId="+w.eni(subnet), "AllowReassociation=true")
	w.fails("AuthFailure", "DisassociateAddress", "PublicIp=198.51.100.1")
	w.fails("InvalidIPAddress.InUse", "ReleaseAddress", "AllocationId="+one)
	table := string(w.store.View().MainTable(vpc.VPCID(vpcID)).ID)
	w.must("CreateRoute", "RouteTableId="+table, "DestinationCidrBlock=0.0.0.0/0", "NatGatewayId="+id)
	w.restart()
	set(map[chaos.Quota]int{chaos.QuotaNATs: 2})

	private := w.must("CreateNatGateway", "SubnetId="+subnet, "ConnectivityType=private", "SecondaryPrivateIpAddressCount=2").get("natGateway.natGatewayId")
	d = w.must("DescribeNatGateways", "NatGatewayId.1="+private)
	w.want(d, s+"natGatewayAddressSet.isPrimary", "true,false,false")
	w.want(d, s+"natGatewayAddressSet.publicIp", "")
	w.fails("NatGatewayLimitExceeded", "CreateNatGateway", "SubnetId="+subnet, "ConnectivityType=private")

	w.want(w.must("DeleteNatGateway", "NatGatewayId="+id), "natGatewayId", id)
	w.want(w.must("DescribeRouteTables", "RouteTableId.1="+table), rts+"routeSet.state", "active,blackhole")
	w.want(w.must("DescribeNatGateways", "NatGatewayId.1="+id), s+"state", "deleting")
	w.fails("DependencyViolation", "DeleteSubnet", "SubnetId="+subnet)
	w.clock.Advance(time.Second)
	d = w.must("DescribeNatGateways", "NatGatewayId.1="+id)
	w.want(d, s+"state", "deleted")
	w.want(d, s+"natGatewayAddressSet.publicIp", "198.51.100.1,198.51.100.2")
	w.must("ReleaseAddress", "AllocationId="+one)
	w.fails("NatGatewayNotFound", "CreateRoute", "RouteTableId="+table, "DestinationCidrBlock=1.0.0.0/8", "NatGatewayId="+id)
	w.clock.Advance(natFor)
	w.fails("NatGatewayNotFound", "DescribeNatGateways", "NatGatewayId.1="+id)
	w.fails("NatGatewayNotFound", "DeleteNatGateway", "NatGatewayId="+failed)
}

func TestPeerings(t *testing.T) {
	w := newWorld(t)
	one, _ := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	two, _ := w.vpc("10.1.0.0/16", "10.1.0.0/24")
	same, _ := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	const s = "vpcPeeringConnectionSet."
	peer := func(a, b string) string {
		t.Helper()
		d := w.must("CreateVpcPeeringConnection", "VpcId="+a, "PeerVpcId="+b)
		w.want(d, "vpcPeeringConnection.status.code", "initiating-request")
		return d.get("vpcPeeringConnection.vpcPeeringConnectionId")
	}
	state := func(id string) string {
		t.Helper()
		return w.must("DescribeVpcPeeringConnections", "VpcPeeringConnectionId.1="+id).get(s + "status.code")
	}
	is := func(id, want string) {
		t.Helper()
		if got := state(id); got != want {
			t.Errorf("%s is %s, want %s", id, got, want)
		}
	}
	failed := peer(one, same)
	is(failed, "failed")
	w.fails("InvalidStateTransition", "AcceptVpcPeeringConnection", "VpcPeeringConnectionId="+failed)
	w.fails("UnsupportedOperation", "CreateVpcPeeringConnection", "VpcId="+one, "PeerVpcId="+two, "PeerOwnerId=210987654321")
	w.fails("InvalidVpcID.NotFound", "CreateVpcPeeringConnection", "VpcId="+one, "PeerVpcId=vpc-00000000000000000")

	id := peer(one, two)
	is(id, "pending-acceptance")
	w.fails("VpcPeeringConnectionAlreadyExists", "CreateVpcPeeringConnection", "VpcId="+two, "PeerVpcId="+one)
	table := string(w.store.View().MainTable(vpc.VPCID(one)).ID)
	w.must("CreateRoute", "RouteTableId="+table, "DestinationCidrBlock=10.1.0.0/16", "VpcPeeringConnectionId="+id)
	w.want(w.must("DescribeRouteTables", "RouteTableId.1="+table), rts+"routeSet.state", "active,blackhole")
	w.fails("OperationNotPermitted", "ModifyVpcPeeringConnectionOptions", "VpcPeeringConnectionId="+id, "RequesterPeeringConnectionOptions.AllowDnsResolutionFromRemoteVpc=true")
	w.must("AssociateVpcCidrBlock", "VpcId="+two, "CidrBlock=100.64.0.0/16")
	d := w.must("AcceptVpcPeeringConnection", "VpcPeeringConnectionId="+id)
	w.want(d, "vpcPeeringConnection.status.code", "provisioning")
	w.want(d, "vpcPeeringConnection.accepterVpcInfo.cidrBlockSet.cidrBlock", "10.1.0.0/16,100.64.0.0/16")
	is(id, "active")
	w.want(w.must("DescribeRouteTables", "RouteTableId.1="+table), rts+"routeSet.state", "active,active")
	w.want(w.must("ModifyVpcPeeringConnectionOptions", "VpcPeeringConnectionId="+id, "RequesterPeeringConnectionOptions.AllowDnsResolutionFromRemoteVpc=true"),
		"requesterPeeringConnectionOptions.allowDnsResolutionFromRemoteVpc", "true")
	w.fails("UnsupportedOperation", "ModifyVpcPeeringConnectionOptions", "VpcPeeringConnectionId="+id, "RequesterPeeringConnectionOptions.AllowEgressFromLocalClassicLinkToRemoteVpc=true")
	w.want(w.must("DescribeVpcPeeringConnections", "Filter.1.Name=accepter-vpc-info.cidr-block", "Filter.1.Value.1=100.64.0.0/16"), s+"vpcPeeringConnectionId", id)
	w.fails("CidrConflict", "AssociateVpcCidrBlock", "VpcId="+one, "CidrBlock=100.64.0.0/20")
	w.fails("InvalidStateTransition", "RejectVpcPeeringConnection", "VpcPeeringConnectionId="+id)
	w.restart()
	is(id, "active")
	w.fails("DependencyViolation", "DeleteVpc", "VpcId="+two)
	w.want(w.must("DeleteVpcPeeringConnection", "VpcPeeringConnectionId="+id), "return", "true")
	is(id, "deleted")
	w.want(w.must("DescribeRouteTables", "RouteTableId.1="+table), rts+"routeSet.state", "active,blackhole")

	again := peer(two, one)
	w.must("RejectVpcPeeringConnection", "VpcPeeringConnectionId="+again)
	is(again, "rejected")
	w.clock.Advance(peeringForgotten)
	for _, gone := range []string{failed, id, again} {
		w.fails("InvalidVpcPeeringConnectionID.NotFound", "DescribeVpcPeeringConnections", "VpcPeeringConnectionId.1="+gone)
	}
	waits := peer(one, two)
	w.clock.Advance(peeringExpires)
	is(waits, "expired")
	if err := w.chaos.Set(chaos.Settings{Throttle: "off", Quotas: map[chaos.Quota]int{chaos.QuotaPeerings: 0, chaos.QuotaPendingPeerings: 1}}); err != nil {
		t.Fatal(err)
	}
	third, _ := w.vpc("10.3.0.0/16", "10.3.0.0/24")
	waits = peer(one, two)
	w.fails("OutstandingVpcPeeringConnectionLimitExceeded", "CreateVpcPeeringConnection", "VpcId="+one, "PeerVpcId="+third)
	w.fails("ActiveVpcPeeringConnectionPerVpcLimitExceeded", "AcceptVpcPeeringConnection", "VpcPeeringConnectionId="+waits)
}

func TestDHCPOptions(t *testing.T) {
	w := newWorld(t)
	vpcID, _ := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	other, _ := w.vpc("10.1.0.0/16", "10.1.0.0/24")
	const s = "dhcpOptionsSet."
	d := w.must("DescribeDhcpOptions")
	region := d.get(s + "dhcpOptionsId")
	w.want(d, s+"dhcpConfigurationSet.key", "domain-name,domain-name-servers")
	w.want(d, s+"dhcpConfigurationSet.valueSet.value", "ec2.internal,AmazonProvidedDNS")
	w.want(w.must("DescribeVpcs", "Filter.1.Name=dhcp-options-id", "Filter.1.Value.1="+region), "vpcSet.dhcpOptionsId", region+","+region)
	config := func(n int, key string, values ...string) []string {
		out := []string{fmt.Sprintf("DhcpConfiguration.%d.Key=%s", n, key)}
		for i, v := range values {
			out = append(out, fmt.Sprintf("DhcpConfiguration.%d.Value.%d=%s", n, i+1, v))
		}
		return out
	}
	own := w.must("CreateDhcpOptions", append(config(1, "domain-name", "example.org"), config(2, "ntp-servers", "10.0.0.7", "10.0.0.8")...)...).get("dhcpOptions.dhcpOptionsId")
	for _, bad := range [][]string{
		config(1, "colour", "red"), config(1, "domain-name-servers", "dns"), config(1, "netbios-node-type", "3"),
		config(1, "ntp-servers", "1.1.1.1", "1.1.1.2", "1.1.1.3", "1.1.1.4", "1.1.1.5"),
		append(config(1, "domain-name", "a"), config(2, "domain-name", "b")...),
	} {
		w.fails("InvalidParameterValue", "CreateDhcpOptions", bad...)
	}
	w.want(w.must("DescribeDhcpOptions", "Filter.1.Name=value", "Filter.1.Value.1=10.0.0.8"), s+"dhcpOptionsId", own)
	w.must("AssociateDhcpOptions", "DhcpOptionsId="+own, "VpcId="+vpcID)
	w.fails("DependencyViolation", "DeleteDhcpOptions", "DhcpOptionsId="+own)
	w.must("AssociateDhcpOptions", "DhcpOptionsId=default", "VpcId="+vpcID)
	w.must("DeleteDhcpOptions", "DhcpOptionsId="+own)
	w.fails("InvalidDhcpOptionID.NotFound", "AssociateDhcpOptions", "DhcpOptionsId="+own, "VpcId="+vpcID)
	w.must("AssociateDhcpOptions", "DhcpOptionsId=default", "VpcId="+other)
	w.must("DeleteDhcpOptions", "DhcpOptionsId="+region)
	w.restart()
	w.want(w.must("DescribeVpcs", "VpcId.1="+vpcID), "vpcSet.dhcpOptionsId", store.NoDHCPOptions)
	third, _ := w.vpc("10.2.0.0/16", "10.2.0.0/24")
	if id := w.must("DescribeVpcs", "VpcId.1="+third).get("vpcSet.dhcpOptionsId"); id == store.NoDHCPOptions || id == region {
		t.Errorf("a new VPC has the options %s", id)
	}
}
