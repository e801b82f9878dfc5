package api

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
)

// vpc6 makes a VPC with an IPv6 block, 2001:db8:0:100::/56 if it is the first,
// and a subnet with the first /64 of it.
func (w *world) vpc6(cidr, subnet string) (vpcID, subnetID string) {
	w.t.Helper()
	v := w.must("CreateVpc", "CidrBlock="+cidr, "AmazonProvidedIpv6CidrBlock=true")
	vpcID = v.get("vpc.vpcId")
	block := strings.Replace(v.get("vpc.ipv6CidrBlockAssociationSet.ipv6CidrBlock"), "/56", "/64", 1)
	return vpcID, w.must("CreateSubnet", "VpcId="+vpcID, "CidrBlock="+subnet, "Ipv6CidrBlock="+block, "AvailabilityZone=us-east-1a").get("subnet.subnetId")
}

// entriesOf lists what a network ACL has, as egress/number/block.
func (w *world) entriesOf(filter, value string) string {
	var out []string
	for _, e := range w.must("DescribeNetworkAcls", "Filter.1.Name="+filter, "Filter.1.Value.1="+value, "Filter.2.Name=default", "Filter.2.Value.1=true").at("networkAclSet.entrySet") {
		out = append(out, e.get("egress")+"/"+e.get("ruleNumber")+"/"+e.get("cidrBlock")+e.get("ipv6CidrBlock")+"/"+e.get("ruleAction"))
	}
	return strings.Join(out, " ")
}

func (w *world) egressOf(group string) string {
	g := w.must("DescribeSecurityGroups", "GroupId.1="+group)
	return g.get("securityGroupInfo.ipPermissionsEgress.ipRanges.cidrIp") + " " + g.get("securityGroupInfo.ipPermissionsEgress.ipv6Ranges.cidrIpv6")
}

func TestIPv6Blocks(t *testing.T) {
	w := newWorld(t)
	const block = "2001:db8:0:100::/56"
	made := w.must("CreateVpc", "CidrBlock=10.0.0.0/16", "AmazonProvidedIpv6CidrBlock=true")
	const a = "ipv6CidrBlockAssociationSet."
	w.want(made, "vpc."+a+"ipv6CidrBlock", block)
	w.want(made, "vpc."+a+"ipv6CidrBlockState.state", "associating")
	one := made.get("vpc.vpcId")
	d := w.must("DescribeVpcs", "VpcId.1="+one)
	for path, want := range map[string]string{
		"ipv6CidrBlock": block, "ipv6CidrBlockState.state": "associated", "ipv6Pool": "Amazon", "networkBorderGroup": "us-east-1", "ipSource": "amazon", "ipv6AddressAttribute": "public",
	} {
		w.want(d, "vpcSet."+a+path, want)
	}
	other := w.must("CreateVpc", "CidrBlock=10.1.0.0/16", "AmazonProvidedIpv6CidrBlock=false").get("vpc.vpcId")
	w.want(w.must("DescribeVpcs", "VpcId.1="+other), "vpcSet."+a+"ipv6CidrBlock", "")
	group := w.must("CreateSecurityGroup", "GroupName=new", "GroupDescription=g", "VpcId="+one).get("groupId")
	old := w.must("CreateSecurityGroup", "GroupName=old", "GroupDescription=g", "VpcId="+other).get("groupId")
	narrow := w.must("CreateSecurityGroup", "GroupName=narrow", "GroupDescription=g", "VpcId="+other).get("groupId")
	w.must("RevokeSecurityGroupEgress", "GroupId="+narrow, "IpPermissions.1.IpProtocol=-1", "IpPermissions.1.IpRanges.1.CidrIp=0.0.0.0/0")
	w.must("AuthorizeSecurityGroupEgress", "GroupId="+narrow, "IpPermissions.1.IpProtocol=-1", "IpPermissions.1.IpRanges.1.CidrIp=10.0.0.0/8")
	const v4 = "true/100/0.0.0.0/0/allow true/32767/0.0.0.0/0/deny false/100/0.0.0.0/0/allow false/32767/0.0.0.0/0/deny"
	const both = "true/100/0.0.0.0/0/allow true/101/::/0/allow true/32767/0.0.0.0/0/deny true/32768/::/0/deny " +
		"false/100/0.0.0.0/0/allow false/101/::/0/allow false/32767/0.0.0.0/0/deny false/32768/::/0/deny"
	for vpcID, want := range map[string]string{one: both, other: v4} {
		if got := w.entriesOf("vpc-id", vpcID); got != want {
			t.Errorf("default ACL of %s: %s", vpcID, got)
		}
	}
	for g, want := range map[string]string{group: "0.0.0.0/0 ::/0", old: "0.0.0.0/0 ", narrow: "10.0.0.0/8 "} {
		if got := w.egressOf(g); got != want {
			t.Errorf("egress of %s: %s, want %s", g, got, want)
		}
	}

	// A VPC gets its block later: what it came with allows IPv6 then, what was
	// changed stays.
	acl := w.store.View().DefaultACL(vpc.VPCID(other))
	w.must("DeleteNetworkAclEntry", "NetworkAclId="+string(acl.ID), "RuleNumber=100", "Egress=false")
	w.must("CreateNetworkAclEntry", "NetworkAclId="+string(acl.ID), "RuleNumber=90", "RuleAction=allow", "Egress=false", "Protocol=-1", "CidrBlock=10.0.0.0/8")
	got := w.must("AssociateVpcCidrBlock", "VpcId="+other, "AmazonProvidedIpv6CidrBlock=true")
	w.want(got, "vpcId", other)
	w.want(got, "ipv6CidrBlockAssociation.ipv6CidrBlock", "2001:db8:0:200::/56")
	w.want(got, "ipv6CidrBlockAssociation.ipv6CidrBlockState.state", "associating")
	w.want(got, "cidrBlockAssociation", "")
	second := got.get("ipv6CidrBlockAssociation.associationId")
	if got, want := w.entriesOf("vpc-id", other), "true/100/0.0.0.0/0/allow true/101/::/0/allow true/32767/0.0.0.0/0/deny true/32768/::/0/deny "+
		"false/90/10.0.0.0/8/allow false/32767/0.0.0.0/0/deny false/32768/::/0/deny"; got != want {
		t.Errorf("default ACL: %s", got)
	}
	for g, want := range map[string]string{old: "0.0.0.0/0 ::/0", narrow: "10.0.0.0/8 "} {
		if got := w.egressOf(g); got != want {
			t.Errorf("egress of %s: %s, want %s", g, got, want)
		}
	}
	for name, value := range map[string]string{"ipv6-cidr-block": "2001:db8:0:200::/56", "association-id": second} {
		w.want(w.must("DescribeVpcs", "Filter.1.Name=ipv6-cidr-block-association."+name, "Filter.1.Value.1="+value), "vpcSet.vpcId", other)
	}
	for name, value := range map[string]string{"ipv6-pool": "Amazon", "state": "associated"} {
		n := w.must("DescribeVpcs", "Filter.1.Name=ipv6-cidr-block-association."+name, "Filter.1.Value.1="+value)
		if ids := strings.Split(n.get("vpcSet.vpcId"), ","); len(ids) != 2 {
			t.Errorf("%s=%s: %v", name, value, ids)
		}
	}

	// A subnet has a /64 of it.
	subnet := w.must("CreateSubnet", "VpcId="+other, "CidrBlock=10.1.0.0/24", "Ipv6CidrBlock=2001:db8:0:201::/64")
	w.want(subnet, "subnet."+a+"ipv6CidrBlockState.state", "associating")
	id, assoc := subnet.get("subnet.subnetId"), subnet.get("subnet."+a+"associationId")
	plain := w.must("CreateSubnet", "VpcId="+other, "CidrBlock=10.1.1.0/24").get("subnet.subnetId")
	for name, value := range map[string]string{"ipv6-cidr-block": "2001:db8:0:201::/64", "association-id": assoc, "state": "associated"} {
		w.want(w.must("DescribeSubnets", "Filter.1.Name=ipv6-cidr-block-association."+name, "Filter.1.Value.1="+value), "subnetSet.subnetId", id)
	}
	for _, c := range []struct {
		code, action string
		params       []string
	}{
		{"InvalidSubnet.Range", "AssociateSubnetCidrBlock", []string{"SubnetId=" + plain, "Ipv6CidrBlock=2001:db8:0:101::/64"}},
		{"InvalidSubnet.Conflict", "AssociateSubnetCidrBlock", []string{"SubnetId=" + plain, "Ipv6CidrBlock=2001:db8:0:201::/64"}},
		{"InvalidSubnet.Conflict", "CreateSubnet", []string{"VpcId=" + other, "CidrBlock=10.1.2.0/24", "Ipv6CidrBlock=2001:db8:0:201::/64"}},
		{"InvalidParameterValue", "AssociateSubnetCidrBlock", []string{"SubnetId=" + plain, "Ipv6CidrBlock=2001:db8:0:200::/60"}},
		{"InvalidParameterValue", "AssociateSubnetCidrBlock", []string{"SubnetId=" + plain, "Ipv6CidrBlock=10.1.0.0/24"}},
		{"InvalidParameterValue", "AssociateSubnetCidrBlock", []string{"SubnetId=" + plain, "Ipv6CidrBlock=::ffff:10.0.0.0/64"}},
		{"MissingParameter", "AssociateSubnetCidrBlock", []string{"SubnetId=" + plain}},
		{"UnsupportedOperation", "AssociateSubnetCidrBlock", []string{"SubnetId=" + plain, "Ipv6IpamPoolId=ipam-pool-1"}},
		{"CidrLimitExceeded", "AssociateSubnetCidrBlock", []string{"SubnetId=" + id, "Ipv6CidrBlock=2001:db8:0:202::/64"}},
		{"InvalidSubnetID.NotFound", "AssociateSubnetCidrBlock", []string{"SubnetId=subnet-00000000000000000", "Ipv6CidrBlock=2001:db8:0:202::/64"}},
		{"InvalidSubnetCidrBlockAssociationID.NotFound", "DisassociateSubnetCidrBlock", []string{"AssociationId=subnet-cidr-assoc-00000000000000000"}},
		{"InvalidSubnetCidrBlockAssociationId.Malformed", "DisassociateSubnetCidrBlock", []string{"AssociationId=subnet-0"}},
		{"InvalidParameterValue", "ModifySubnetAttribute", []string{"SubnetId=" + plain, "AssignIpv6AddressOnCreation.Value=true"}},
		{"InvalidCidrBlock.InUse", "DisassociateVpcCidrBlock", []string{"AssociationId=" + second}},
		{"InvalidParameterCombination", "AssociateVpcCidrBlock", []string{"VpcId=" + other, "CidrBlock=10.9.0.0/16", "AmazonProvidedIpv6CidrBlock=true"}},
		{"MissingParameter", "AssociateVpcCidrBlock", []string{"VpcId=" + other, "AmazonProvidedIpv6CidrBlock=false"}},
		{"UnsupportedOperation", "AssociateVpcCidrBlock", []string{"VpcId=" + other, "Ipv6CidrBlock=2001:db8::/56", "Ipv6Pool=pool"}},
	} {
		w.fails(c.code, c.action, c.params...)
	}
	w.want(w.must("AssociateSubnetCidrBlock", "SubnetId="+plain, "Ipv6CidrBlock=2001:db8:0:202::7/64"), "ipv6CidrBlockAssociation.ipv6CidrBlock", "2001:db8:0:202::/64")
	w.must("ModifySubnetAttribute", "SubnetId="+id, "AssignIpv6AddressOnCreation.Value=true")
	w.fails("InvalidCidrBlock.InUse", "DisassociateSubnetCidrBlock", "AssociationId="+assoc)
	e := w.eni(id)
	w.must("ModifySubnetAttribute", "SubnetId="+id, "AssignIpv6AddressOnCreation.Value=false")
	w.fails("InvalidCidrBlock.InUse", "DisassociateSubnetCidrBlock", "AssociationId="+assoc)
	w.restart()
	w.must("UnassignIpv6Addresses", "NetworkInterfaceId="+e, "Ipv6Addresses.1=2001:db8:0:201::4")
	gone := w.must("DisassociateSubnetCidrBlock", "AssociationId="+assoc)
	w.want(gone, "subnetId", id)
	w.want(gone, "ipv6CidrBlockAssociation.ipv6CidrBlockState.state", "disassociating")
	w.want(w.must("DescribeSubnets", "SubnetId.1="+id), "subnetSet."+a+"ipv6CidrBlock", "")
	w.must("DeleteSubnet", "SubnetId="+plain)
	gone = w.must("DisassociateVpcCidrBlock", "AssociationId="+second)
	w.want(gone, "ipv6CidrBlockAssociation.ipv6CidrBlock", "2001:db8:0:200::/56")
	w.want(gone, "ipv6CidrBlockAssociation.ipv6CidrBlockState.state", "disassociating")
	w.fails("InvalidVpcCidrBlockAssociationID.NotFound", "DisassociateVpcCidrBlock", "AssociationId="+second)
	w.want(w.must("DescribeVpcs", "VpcId.1="+other), "vpcSet."+a+"ipv6CidrBlock", "")

	if err := w.chaos.Set(chaos.Settings{Throttle: "off", Quotas: map[chaos.Quota]int{chaos.QuotaIPv6CIDRs: 2}}); err != nil {
		t.Fatal(err)
	}
	w.must("AssociateVpcCidrBlock", "VpcId="+one, "AmazonProvidedIpv6CidrBlock=true")
	w.fails("CidrLimitExceeded", "AssociateVpcCidrBlock", "VpcId="+one, "AmazonProvidedIpv6CidrBlock=true")
}

func TestIPv6Addresses(t *testing.T) {
	w := newWorld(t)
	_, subnet := w.vpc6("10.0.0.0/16", "10.0.0.0/24")
	const block = "2001:db8:0:100:"
	made := w.must("CreateNetworkInterface", "SubnetId="+subnet, "Ipv6AddressCount=2")
	e := made.get("networkInterface.networkInterfaceId")
	w.want(made, "networkInterface.ipv6AddressesSet.ipv6Address", block+":4,"+block+":5")
	w.want(made, "networkInterface.ipv6AddressesSet.isPrimaryIpv6", "false,false")
	w.want(made, "networkInterface.ipv6Address", block+":4")
	got := w.must("AssignIpv6Addresses", "NetworkInterfaceId="+e, "Ipv6Addresses.1="+block+":a", "Ipv6Addresses.2="+block+"0:0:0:b")
	w.want(got, "assignedIpv6Addresses", block+":a,"+block+":b")
	w.want(got, "networkInterfaceId", e)
	w.want(w.must("AssignIpv6Addresses", "NetworkInterfaceId="+e, "Ipv6AddressCount=1"), "assignedIpv6Addresses", block+":6")
	p := w.must("AssignIpv6Addresses", "NetworkInterfaceId="+e, "Ipv6PrefixCount=1")
	w.want(p, "assignedIpv6PrefixSet", block+"1::/80")
	w.want(w.must("AssignIpv6Addresses", "NetworkInterfaceId="+e, "Ipv6Prefix.1="+block+"7::/80"), "assignedIpv6PrefixSet", block+"7::/80")
	byName := w.eni(subnet, "Ipv6Addresses.1.Ipv6Address="+block+":42")
	prefixed := w.eni(subnet, "Ipv6Prefix.1.Ipv6Prefix="+block+"8::/80")
	for _, c := range []struct {
		code string
		how  []string
	}{
		{"InvalidIPAddress.InUse", []string{"Ipv6Addresses.1=" + block + ":a"}}, // its own
		{"InvalidIPAddress.InUse", []string{"Ipv6Addresses.1=" + block + ":42"}},
		{"InvalidIPAddress.InUse", []string{"Ipv6Addresses.1=" + block + "7::9"}}, // within a prefix
		{"InvalidIPAddress.InUse", []string{"Ipv6Prefix.1=" + block + "8::/80"}},
		{"InvalidParameterValue", []string{"Ipv6Addresses.1=" + block + ":3"}}, // reserved
		{"InvalidParameterValue", []string{"Ipv6Addresses.1=" + block + "ffff:ffff:ffff:ffff"}},
		{"InvalidParameterValue", []string{"Ipv6Prefix.1=" + block + ":/80"}}, // with those that are reserved
		{"InvalidParameterValue", []string{"Ipv6Prefix.1=2001:db8:0:100:ffff::/80"}},
		{"InvalidParameterValue", []string{"Ipv6Prefix.1=" + block + "9::/96"}},
		{"InvalidParameterValue", []string{"Ipv6Prefix.1=" + block + "9::1/80"}},
		{"InvalidParameterValue", []string{"Ipv6Addresses.1=2001:db8:0:101::9"}}, // another subnet's
		{"InvalidParameterValue", []string{"Ipv6Addresses.1=10.0.0.9"}},
		{"InvalidParameterValue", []string{"Ipv6Addresses.1=::ffff:10.0.0.9"}},
		{"InvalidParameterValue", []string{"Ipv6Addresses.1=" + block + ":c%eth0"}},
		{"InvalidParameterValue", []string{"Ipv6Addresses.1=" + block + ":c", "Ipv6Addresses.2=" + block + ":c"}},
		{"InvalidParameterValue", []string{"Ipv6AddressCount=-1"}},
		{"InvalidParameterCombination", []string{"Ipv6AddressCount=1", "Ipv6Addresses.1=" + block + ":c"}},
		{"InvalidParameterValue", []string{"Ipv6AddressCount=1", "Ipv6PrefixCount=1"}},
		{"MissingParameter", nil},
		{"MissingParameter", []string{"Ipv6AddressCount=0"}},
		{"PrivateIpAddressLimitExceeded", []string{"Ipv6AddressCount=100"}},
	} {
		w.fails(c.code, "AssignIpv6Addresses", append([]string{"NetworkInterfaceId=" + e}, c.how...)...)
	}
	for value, want := range map[string]string{block + ":a": e, block + ":42": byName, block + ":f00": ""} {
		w.want(w.must("DescribeNetworkInterfaces", "Filter.1.Name=ipv6-addresses.ipv6-address", "Filter.1.Value.1="+value), "networkInterfaceSet.networkInterfaceId", want)
	}
	w.want(w.must("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+prefixed), "networkInterfaceSet.ipv6PrefixSet.ipv6Prefix", block+"8::/80")

	w.fails("InvalidParameterValue", "UnassignIpv6Addresses", "NetworkInterfaceId="+e, "Ipv6Addresses.1="+block+":a", "Ipv6Addresses.2="+block+":42")
	w.fails("InvalidParameterValue", "UnassignIpv6Addresses", "NetworkInterfaceId="+e, "Ipv6Prefix.1="+block+"8::/80")
	w.fails("MissingParameter", "UnassignIpv6Addresses", "NetworkInterfaceId="+e)
	w.fails("InvalidNetworkInterfaceID.NotFound", "UnassignIpv6Addresses", "NetworkInterfaceId=eni-00000000000000000", "Ipv6Addresses.1="+block+":a")
	out := w.must("UnassignIpv6Addresses", "NetworkInterfaceId="+e, "Ipv6Addresses.1="+block+":4", "Ipv6Addresses.2="+block+":a")
	w.want(out, "unassignedIpv6Addresses", block+":4,"+block+":a")
	w.want(w.must("UnassignIpv6Addresses", "NetworkInterfaceId="+e, "Ipv6Prefix.1="+block+"7::/80"), "unassignedIpv6PrefixSet", block+"7::/80")
	w.restart()
	d := w.must("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+e)
	w.want(d, "networkInterfaceSet.ipv6AddressesSet.ipv6Address", block+":5,"+block+":b,"+block+":6")
	w.want(d, "networkInterfaceSet.ipv6PrefixSet.ipv6Prefix", block+"1::/80")
	w.want(w.must("AssignIpv6Addresses", "NetworkInterfaceId="+e, "Ipv6AddressCount=2"), "assignedIpv6Addresses", block+":4,"+block+":7")
	w.must("DeleteNetworkInterface", "NetworkInterfaceId="+byName)
	w.must("AssignIpv6Addresses", "NetworkInterfaceId="+e, "Ipv6Addresses.1="+block+":42")

	// A subnet that gives addresses, and a request that does not want one.
	w.must("ModifySubnetAttribute", "SubnetId="+subnet, "AssignIpv6AddressOnCreation.Value=true")
	w.want(w.must("DescribeSubnets"), "subnetSet.assignIpv6AddressOnCreation", "true")
	for _, c := range []struct{ how, want string }{{"Description=any", block + ":8"}, {"Ipv6AddressCount=0", ""}, {"Ipv6AddressCount=2", block + ":9," + block + ":a"}, {"Ipv6PrefixCount=1", ""}} {
		w.want(w.must("CreateNetworkInterface", "SubnetId="+subnet, c.how), "networkInterface.ipv6AddressesSet.ipv6Address", c.want)
	}

	if err := w.chaos.Set(chaos.Settings{Throttle: "off", Addresses: chaos.AddressesScattered}); err != nil {
		t.Fatal(err)
	}
	far := w.must("AssignIpv6Addresses", "NetworkInterfaceId="+w.eni(subnet, "Ipv6AddressCount=0"), "Ipv6AddressCount=5").get("assignedIpv6Addresses")
	all := strings.Split(far, ",")
	if slices.Sort(all); len(slices.Compact(all)) != 5 || strings.Count(far, block+":") == 5 {
		t.Errorf("scattered: %s", far)
	}
	w.must("AssignIpv6Addresses", "NetworkInterfaceId="+w.eni(subnet, "Ipv6AddressCount=0"), "Ipv6PrefixCount=5")
}

func TestIPv6Instances(t *testing.T) {
	w := newWorld(t)
	vpcID, subnet := w.vpc6("10.0.0.0/16", "10.0.0.0/24")
	plain := w.must("CreateSubnet", "VpcId="+vpcID, "CidrBlock=10.0.1.0/24", "AvailabilityZone=us-east-1a").get("subnet.subnetId")
	const block, s = "2001:db8:0:100:", "reservationSet.instancesSet."
	run := func(params ...string) []string {
		return append([]string{image, "MinCount=1", "MaxCount=1", "InstanceType=m5.large"}, params...)
	}
	i := w.must("RunInstances", run("SubnetId="+subnet, "Ipv6AddressCount=1")...).get("instancesSet.instanceId")
	named := w.must("RunInstances", run("SubnetId="+subnet, "Ipv6Address.1.Ipv6Address="+block+":77")...).get("instancesSet.instanceId")
	listed := w.must("RunInstances", run(
		"NetworkInterface.1.DeviceIndex=0", "NetworkInterface.1.SubnetId="+subnet, "NetworkInterface.1.Ipv6AddressCount=2",
		"NetworkInterface.2.DeviceIndex=1", "NetworkInterface.2.SubnetId="+subnet, "NetworkInterface.2.Ipv6PrefixCount=1",
	)...).get("instancesSet.instanceId")
	d := w.must("DescribeInstances", "InstanceId.1="+listed)
	w.want(d, s+"ipv6Address", block+":5")
	w.want(d, s+"networkInterfaceSet.ipv6AddressesSet.ipv6Address", block+":5,"+block+":6")
	w.want(d, s+"networkInterfaceSet.ipv6PrefixSet.ipv6Prefix", block+"1::/80")
	for f, x := range map[string][2]string{
		"ipv6-address": {block + ":4", i}, "network-interface.ipv6-address": {block + ":77", named},
		"network-interface.ipv6-addresses.ipv6-address": {block + ":6", listed}, "network-interface.ipv6-prefixes.ipv6-prefix": {block + "1::/80", listed},
	} {
		w.want(w.must("DescribeInstances", "Filter.1.Name="+f, "Filter.1.Value.1="+x[0]), s+"instanceId", x[1])
	}
	many := w.must("RunInstances", image, "MinCount=3", "MaxCount=3", "InstanceType=m5.large", "SubnetId="+subnet, "Ipv6AddressCount=1")
	for k, x := range many.at("instancesSet") {
		w.want(x, "ipv6Address", fmt.Sprintf("%s:%x", block, 7+k))
	}

	// m5.large: 10 addresses per interface of either family; m3.medium has no IPv6,
	// m4.large no prefixes.
	free := w.eni(subnet, "Ipv6AddressCount=11")
	for _, c := range []struct {
		code   string
		params []string
	}{
		{"InvalidInterface.IpAddressLimitExceeded", run("SubnetId="+subnet, "Ipv6AddressCount=11")},
		{"InvalidParameterValue", run("SubnetId="+plain, "Ipv6AddressCount=1")},
		{"UnsupportedOperation", []string{image, "MinCount=1", "MaxCount=1", "InstanceType=m3.medium", "SubnetId=" + subnet, "Ipv6AddressCount=1"}},
		{"UnsupportedOperation", []string{image, "MinCount=1", "MaxCount=1", "InstanceType=m4.large",
			"NetworkInterface.1.DeviceIndex=0", "NetworkInterface.1.SubnetId=" + subnet, "NetworkInterface.1.Ipv6PrefixCount=1"}},
		{"InvalidParameterCombination", []string{image, "MinCount=1", "MaxCount=2", "InstanceType=m5.large", "SubnetId=" + subnet, "Ipv6Address.1.Ipv6Address=" + block + ":88"}},
		{"InvalidParameterCombination", run("Ipv6AddressCount=1", "NetworkInterface.1.DeviceIndex=0", "NetworkInterface.1.SubnetId="+subnet)},
		{"InvalidParameterCombination", run("NetworkInterface.1.DeviceIndex=0", "NetworkInterface.1.NetworkInterfaceId="+free, "NetworkInterface.1.Ipv6AddressCount=1")},
		{"InvalidInterface.IpAddressLimitExceeded", run("NetworkInterface.1.DeviceIndex=0", "NetworkInterface.1.NetworkInterfaceId="+free)},
		{"UnsupportedOperation", run("SubnetId="+subnet, "Ipv6Address.1.Ipv6Address="+block+":88", "Ipv6Address.1.IsPrimaryIpv6=true")},
		{"UnsupportedOperation", run("SubnetId="+subnet, "Ipv6AddressCount=1", "EnablePrimaryIpv6=true")},
	} {
		w.fails(c.code, "RunInstances", c.params...)
	}
	w.fails("PrivateIpAddressLimitExceeded", "AttachNetworkInterface", "NetworkInterfaceId="+free, "InstanceId="+i, "DeviceIndex=1")
	small := w.instance(subnet, "m3.medium", "Ipv6AddressCount=0")
	w.fails("UnsupportedOperation", "AttachNetworkInterface", "NetworkInterfaceId="+w.eni(subnet, "Ipv6AddressCount=1"), "InstanceId="+small, "DeviceIndex=1")
	e := w.must("DescribeInstances", "InstanceId.1="+i).get(s + "networkInterfaceSet.networkInterfaceId")
	w.must("AssignIpv6Addresses", "NetworkInterfaceId="+e, "Ipv6AddressCount=8")
	w.must("AssignIpv6Addresses", "NetworkInterfaceId="+e, "Ipv6PrefixCount=1")
	w.fails("PrivateIpAddressLimitExceeded", "AssignIpv6Addresses", "NetworkInterfaceId="+e, "Ipv6PrefixCount=1")
	w.must("TerminateInstances", "InstanceId.1="+i)
	w.must("DescribeInstances")
	w.want(w.must("AssignIpv6Addresses", "NetworkInterfaceId="+w.eni(subnet), "Ipv6AddressCount=1"), "assignedIpv6Addresses", block+":4")
}

func TestIPv6Routes(t *testing.T) {
	w := newWorld(t)
	vpcID, subnet := w.vpc6("10.0.0.0/16", "10.0.0.0/24")
	w.online(vpcID)
	i := w.instance(subnet, "m5.large")
	eni := w.must("DescribeInstances").get("reservationSet.instancesSet.networkInterfaceSet.networkInterfaceId")
	table := string(w.store.View().MainTable(vpc.VPCID(vpcID)).ID)
	igw := string(w.store.View().GatewayOf(vpc.VPCID(vpcID)).ID)
	made := w.must("CreateEgressOnlyInternetGateway", "VpcId="+vpcID, "ClientToken=tok", "TagSpecification.1.ResourceType=egress-only-internet-gateway", "TagSpecification.1.Tag.1.Key=k", "TagSpecification.1.Tag.1.Value=v")
	eigw := made.get("egressOnlyInternetGateway.egressOnlyInternetGatewayId")
	w.want(made, "egressOnlyInternetGateway.attachmentSet.state", "attached")
	w.want(made, "egressOnlyInternetGateway.attachmentSet.vpcId", vpcID)
	w.want(made, "clientToken", "tok")
	w.fails("IdempotentParameterMismatch", "CreateEgressOnlyInternetGateway", "VpcId="+vpcID, "ClientToken=tok")
	w.want(w.must("DescribeEgressOnlyInternetGateways", "Filter.1.Name=tag:k", "Filter.1.Value.1=v"), "egressOnlyInternetGatewaySet.egressOnlyInternetGatewayId", eigw)
	w.must("CreateTags", "ResourceId.1="+eigw, "Tag.1.Key=x", "Tag.1.Value=y")
	w.want(w.must("DescribeTags", "Filter.1.Name=resource-type", "Filter.1.Value.1=egress-only-internet-gateway"), "tagSet.key", "k,x")

	route := func(to string) node {
		for _, r := range w.must("DescribeRouteTables", "RouteTableId.1="+table).at("routeTableSet.routeSet") {
			if r.get("destinationIpv6CidrBlock") == to {
				return r
			}
		}
		return node{}
	}
	to := func(cidr string, params ...string) []string {
		return append([]string{"RouteTableId=" + table, "DestinationIpv6CidrBlock=" + cidr}, params...)
	}
	const block = "2001:db8:0:100::/56"
	w.want(route(block), "gatewayId", "local")
	w.want(route(block), "state", "active")
	w.want(route(block), "origin", "CreateRouteTable")
	w.must("CreateRoute", to("::/0", "EgressOnlyInternetGatewayId="+eigw)...)
	w.want(route("::/0"), "egressOnlyInternetGatewayId", eigw)
	w.want(route("::/0"), "destinationCidrBlock", "")
	w.must("CreateRoute", to("3fff::7/20", "GatewayId="+igw)...)
	w.want(route("3fff::/20"), "gatewayId", igw)
	w.must("CreateRoute", to("2001:db8:0:100::/64", "NetworkInterfaceId="+eni)...) // a whole subnet
	w.want(route("2001:db8:0:100::/64"), "instanceId", i)
	for f, v := range map[string]string{"route.destination-ipv6-cidr-block": "3fff::/20", "route.egress-only-internet-gateway-id": eigw} {
		w.want(w.must("DescribeRouteTables", "Filter.1.Name="+f, "Filter.1.Value.1="+v), "routeTableSet.routeTableId", table)
	}
	list := w.must("CreateManagedPrefixList", "PrefixListName=six", "AddressFamily=IPv6", "MaxEntries=2", "Entry.1.Cidr=2001:db8:f::/48").get("prefixList.prefixListId")
	four := w.must("CreateManagedPrefixList", "PrefixListName=four", "AddressFamily=IPv4", "MaxEntries=2", "Entry.1.Cidr=192.0.2.0/24").get("prefixList.prefixListId")
	nat := w.must("CreateNatGateway", "SubnetId="+subnet, "ConnectivityType=private").get("natGateway.natGatewayId")
	for _, c := range []struct {
		code   string
		params []string
	}{
		{"RouteAlreadyExists", to("::/0", "GatewayId="+igw)},
		{"RouteAlreadyExists", to(block, "NetworkInterfaceId="+eni)},
		{"InvalidParameterValue", to("2001:db8:0:100::/60", "NetworkInterfaceId="+eni)}, // no whole subnet
		{"InvalidParameterValue", to("2001:db8:0:101::/64", "GatewayId="+igw)},
		{"InvalidParameterValue", to("fd00:ec2::/40", "NetworkInterfaceId="+eni)},
		{"InvalidParameterValue", to("10.7.0.0/16", "NetworkInterfaceId="+eni)},
		{"InvalidParameterValue", to("::ffff:10.0.0.0/104", "NetworkInterfaceId="+eni)},
		{"InvalidParameterValue", []string{"RouteTableId=" + table, "DestinationCidrBlock=2001:db8::/48", "NetworkInterfaceId=" + eni}},
		{"InvalidParameterValue", []string{"RouteTableId=" + table, "DestinationCidrBlock=172.16.0.0/12", "EgressOnlyInternetGatewayId=" + eigw}},
		{"InvalidParameterValue", []string{"RouteTableId=" + table, "DestinationPrefixListId=" + four, "EgressOnlyInternetGatewayId=" + eigw}},
		{"InvalidParameterCombination", to("2001:db8:1::/48", "DestinationCidrBlock=172.16.0.0/12", "NetworkInterfaceId="+eni)},
		{"InvalidParameterCombination", to("2001:db8:1::/48", "EgressOnlyInternetGatewayId="+eigw, "NetworkInterfaceId="+eni)},
		{"UnsupportedOperation", to("64:ff9b::/96", "NatGatewayId="+nat)},
		{"InvalidEgressOnlyInternetGatewayId.NotFound", to("2001:db8:1::/48", "EgressOnlyInternetGatewayId=eigw-00000000000000000")},
		{"InvalidEgressOnlyInternetGatewayId.Malformed", to("2001:db8:1::/48", "EgressOnlyInternetGatewayId=igw-0")},
	} {
		w.fails(c.code, "CreateRoute", c.params...)
	}
	w.must("CreateRoute", "RouteTableId="+table, "DestinationPrefixListId="+list, "EgressOnlyInternetGatewayId="+eigw)
	w.fails("InvalidRoute.NotFound", "ReplaceRoute", to("2001:db8:1::/48", "GatewayId="+igw)...)
	w.must("ReplaceRoute", to("::/0", "GatewayId="+igw)...)
	w.want(route("::/0"), "gatewayId", igw)
	w.must("ReplaceRoute", to("::/0", "EgressOnlyInternetGatewayId="+eigw)...)
	w.must("ReplaceRoute", to(block, "NetworkInterfaceId="+eni)...)
	w.want(route(block), "networkInterfaceId", eni)
	w.fails("InvalidParameterValue", "DeleteRoute", to(block)...)
	w.must("ReplaceRoute", to(block, "LocalTarget=true")...)
	w.want(route(block), "gatewayId", "local")
	w.must("DeleteRoute", to("2001:db8:0:100::/64")...)
	w.fails("InvalidRoute.NotFound", "DeleteRoute", to("2001:db8:0:100::/64")...)
	w.must("DeleteEgressOnlyInternetGateway", "EgressOnlyInternetGatewayId="+eigw)
	w.want(route("::/0"), "state", "blackhole")
	w.fails("InvalidEgressOnlyInternetGatewayId.NotFound", "DeleteEgressOnlyInternetGateway", "EgressOnlyInternetGatewayId="+eigw)
	w.fails("InvalidEgressOnlyInternetGatewayId.NotFound", "DescribeEgressOnlyInternetGateways", "EgressOnlyInternetGatewayId.1="+eigw)
	w.restart()
	w.want(route("::/0"), "egressOnlyInternetGatewayId", eigw)
	w.must("DeleteRoute", to("::/0")...)

	// The families have a quota each.
	if err := w.chaos.Set(chaos.Settings{Throttle: "off", Quotas: map[chaos.Quota]int{chaos.QuotaRoutes: 5, chaos.QuotaEgressOnly: 1}}); err != nil {
		t.Fatal(err)
	}
	w.must("CreateRoute", to("2001:db8:2::/48", "GatewayId="+igw)...) // with local, 3fff::/20 and the list of two
	w.fails("RouteLimitExceeded", "CreateRoute", to("2001:db8:3::/48", "GatewayId="+igw)...)
	w.must("CreateRoute", "RouteTableId="+table, "DestinationCidrBlock=192.0.2.0/24", "NetworkInterfaceId="+eni)

	// A VPC does not go before its gateway.
	bare, _ := w.vpc("10.5.0.0/16", "10.5.0.0/24")
	g := w.must("CreateEgressOnlyInternetGateway", "VpcId="+bare).get("egressOnlyInternetGateway.egressOnlyInternetGatewayId")
	w.fails("EgressOnlyInternetGatewayLimitExceeded", "CreateEgressOnlyInternetGateway", "VpcId="+bare)
	w.fails("InvalidParameterValue", "CreateRoute", to("2001:db8:1::/48", "EgressOnlyInternetGatewayId="+g)...)
	w.must("DeleteSubnet", "SubnetId="+w.must("DescribeSubnets", "Filter.1.Name=vpc-id", "Filter.1.Value.1="+bare).get("subnetSet.subnetId"))
	w.fails("DependencyViolation", "DeleteVpc", "VpcId="+bare)
	w.must("DeleteEgressOnlyInternetGateway", "EgressOnlyInternetGatewayId="+g)
	w.must("DeleteVpc", "VpcId="+bare)
}

func TestIPv6RoutesAgainstBlocks(t *testing.T) {
	w := newWorld(t)
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	table := string(w.store.View().MainTable(vpc.VPCID(vpcID)).ID)
	e := w.eni(subnet)
	// A block that a route is within does not become the VPC's.
	w.must("CreateRoute", "RouteTableId="+table, "DestinationIpv6CidrBlock=2001:db8:0:140::/60", "NetworkInterfaceId="+e)
	w.fails("CidrConflict", "AssociateVpcCidrBlock", "VpcId="+vpcID, "AmazonProvidedIpv6CidrBlock=true")
	w.must("DeleteRoute", "RouteTableId="+table, "DestinationIpv6CidrBlock=2001:db8:0:140::/60")
	block := w.must("AssociateVpcCidrBlock", "VpcId="+vpcID, "AmazonProvidedIpv6CidrBlock=true").get("ipv6CidrBlockAssociation.associationId")
	w.must("ReplaceRoute", "RouteTableId="+table, "DestinationIpv6CidrBlock=2001:db8:0:100::/56", "NetworkInterfaceId="+e)
	w.must("DisassociateVpcCidrBlock", "AssociationId="+block)
	if n := len(w.store.View().RouteTable(vpc.RouteTableID(table)).Routes); n != 0 {
		t.Errorf("%d routes are left", n)
	}
}

func TestIPv6Peering(t *testing.T) {
	w := newWorld(t)
	one, _ := w.vpc6("10.0.0.0/16", "10.0.0.0/24")
	other, _ := w.vpc("10.1.0.0/16", "10.1.0.0/24")
	const s = "vpcPeeringConnectionSet."
	p := w.must("CreateVpcPeeringConnection", "VpcId="+one, "PeerVpcId="+other)
	id := p.get("vpcPeeringConnection.vpcPeeringConnectionId")
	w.want(p, "vpcPeeringConnection.requesterVpcInfo.ipv6CidrBlockSet.ipv6CidrBlock", "2001:db8:0:100::/56")
	w.want(p, "vpcPeeringConnection.accepterVpcInfo.ipv6CidrBlockSet.ipv6CidrBlock", "")
	w.must("AssociateVpcCidrBlock", "VpcId="+other, "AmazonProvidedIpv6CidrBlock=true")
	w.must("AcceptVpcPeeringConnection", "VpcPeeringConnectionId="+id)
	d := w.must("DescribeVpcPeeringConnections")
	w.want(d, s+"status.code", "active")
	w.want(d, s+"accepterVpcInfo.ipv6CidrBlockSet.ipv6CidrBlock", "2001:db8:0:200::/56")
	table := string(w.store.View().MainTable(vpc.VPCID(one)).ID)
	w.must("CreateRoute", "RouteTableId="+table, "DestinationIpv6CidrBlock=2001:db8:0:200::/56", "VpcPeeringConnectionId="+id)
	w.want(w.must("DescribeRouteTables", "RouteTableId.1="+table), "routeTableSet.routeSet.vpcPeeringConnectionId", id)
}

// Rules of groups and ACLs take no IPv4 in the clothes of IPv6, nor one family in
// the place of the other.
func TestIPv6Rules(t *testing.T) {
	w := newWorld(t)
	vpcID, _ := w.vpc6("10.0.0.0/16", "10.0.0.0/24")
	g := w.must("CreateSecurityGroup", "GroupName=g", "GroupDescription=g", "VpcId="+vpcID).get("groupId")
	acl := string(w.store.View().DefaultACL(vpc.VPCID(vpcID)).ID)
	allow := func(peer string) []string {
		return []string{"GroupId=" + g, "IpPermissions.1.IpProtocol=tcp", "IpPermissions.1.FromPort=80", "IpPermissions.1.ToPort=80", "IpPermissions.1." + peer}
	}
	entry := func(number, cidr string) []string {
		return []string{"NetworkAclId=" + acl, "RuleNumber=" + number, "RuleAction=deny", "Egress=false", "Protocol=-1", cidr}
	}
	w.must("AuthorizeSecurityGroupIngress", allow("Ipv6Ranges.1.CidrIpv6=2001:db8:0:100::9/64")...)
	w.want(w.must("DescribeSecurityGroups", "GroupId.1="+g), "securityGroupInfo.ipPermissions.ipv6Ranges.cidrIpv6", "2001:db8:0:100::/64")
	w.fails("InvalidPermission.Duplicate", "AuthorizeSecurityGroupIngress", allow("Ipv6Ranges.1.CidrIpv6=2001:db8:0:100::/64")...)
	list := w.must("CreateManagedPrefixList", "PrefixListName=six", "AddressFamily=IPv6", "MaxEntries=3", "Entry.1.Cidr=2001:db8:f::1/48").get("prefixList.prefixListId")
	w.want(w.must("GetManagedPrefixListEntries", "PrefixListId="+list), "entrySet.cidr", "2001:db8:f::/48")
	w.must("AuthorizeSecurityGroupIngress", allow("PrefixListIds.1.PrefixListId="+list)...)
	w.must("AuthorizeSecurityGroupIngress", "GroupId="+g, "IpPermissions.1.IpProtocol=icmpv6", "IpPermissions.1.FromPort=128", "IpPermissions.1.ToPort=-1", "IpPermissions.1.Ipv6Ranges.1.CidrIpv6=::/0")
	for _, bad := range []string{"Ipv6Ranges.1.CidrIpv6=10.0.0.0/8", "Ipv6Ranges.1.CidrIpv6=::ffff:10.0.0.0/104", "Ipv6Ranges.1.CidrIpv6=2001:db8::/129", "IpRanges.1.CidrIp=2001:db8::/32", "IpRanges.1.CidrIp=::ffff:10.0.0.0/104"} {
		w.fails("InvalidParameterValue", "AuthorizeSecurityGroupIngress", allow(bad)...)
	}
	w.must("CreateNetworkAclEntry", entry("50", "Ipv6CidrBlock=2001:db8:9::1/48")...)
	w.want(w.must("DescribeNetworkAcls", "Filter.1.Name=entry.ipv6-cidr", "Filter.1.Value.1=2001:db8:9::/48"), "networkAclSet.networkAclId", acl)
	for _, bad := range []string{"Ipv6CidrBlock=10.0.0.0/8", "Ipv6CidrBlock=::ffff:10.0.0.0/104", "CidrBlock=2001:db8::/32"} {
		w.fails("InvalidParameterValue", "CreateNetworkAclEntry", entry("51", bad)...)
	}
	w.fails("InvalidParameterValue", "ModifyManagedPrefixList", "PrefixListId="+list, "CurrentVersion=1", "AddEntry.1.Cidr=10.0.0.0/8")
	w.fails("InvalidParameterValue", "ModifyManagedPrefixList", "PrefixListId="+list, "CurrentVersion=1", "AddEntry.1.Cidr=::ffff:10.0.0.0/104")
}
