package api

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
)

func TestENILife(t *testing.T) {
	w := newWorld(t)
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	i := w.instance(subnet, "m5.large")
	made := w.must("CreateNetworkInterface", "SubnetId="+subnet, "Description=for pods", "SecondaryPrivateIpAddressCount=1",
		"TagSpecification.1.ResourceType=network-interface", "TagSpecification.1.Tag.1.Key=a", "TagSpecification.1.Tag.1.Value=b")
	id := made.get("networkInterface.networkInterfaceId")
	w.want(made, "networkInterface.status", "pending")
	w.want(made, "networkInterface.vpcId", vpcID)
	w.want(made, "networkInterface.privateIpAddressesSet.privateIpAddress", "10.0.0.5,10.0.0.6")
	w.want(made, "networkInterface.privateIpAddressesSet.primary", "true,false")
	w.want(made, "networkInterface.groupSet.groupName", "default")
	w.want(made, "networkInterface.sourceDestCheck", "true")
	w.want(made, "networkInterface.requesterManaged", "false")
	w.want(w.must("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+id), "networkInterfaceSet.status", "available")

	if err := w.chaos.Set(chaos.Settings{AttachLatency: 2 * time.Second, Throttle: "off"}); err != nil {
		t.Fatal(err)
	}
	at := w.must("AttachNetworkInterface", "NetworkInterfaceId="+id, "InstanceId="+i, "DeviceIndex=1").get("attachmentId")
	status := func() string {
		n := w.must("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+id)
		return n.get("networkInterfaceSet.status") + "/" + n.get("networkInterfaceSet.attachment.status")
	}
	if s := status(); s != "in-use/attaching" {
		t.Error(s)
	}
	w.clock.Advance(1999 * time.Millisecond)
	if s := status(); s != "in-use/attaching" {
		t.Error(s)
	}
	w.restart() // what was under way goes on, though the latency is forgotten
	if s := status(); s != "in-use/attaching" {
		t.Error(s)
	}
	w.clock.Advance(time.Millisecond)
	if s := status(); s != "in-use/attached" {
		t.Error(s)
	}
	d := w.must("DescribeNetworkInterfaces", "Filter.1.Name=attachment.instance-id", "Filter.1.Value.1="+i, "Filter.2.Name=attachment.device-index", "Filter.2.Value.1=1")
	w.want(d, "networkInterfaceSet.networkInterfaceId", id)
	w.want(d, "networkInterfaceSet.attachment.attachmentId", at)
	w.want(d, "networkInterfaceSet.attachment.deleteOnTermination", "false")
	w.want(d, "networkInterfaceSet.attachment.instanceOwnerId", "123456789012")

	w.must("ModifyNetworkInterfaceAttribute", "NetworkInterfaceId="+id, "Attachment.AttachmentId="+at, "Attachment.DeleteOnTermination=true")
	w.must("ModifyNetworkInterfaceAttribute", "NetworkInterfaceId="+id, "SourceDestCheck.Value=false")
	w.must("ModifyNetworkInterfaceAttribute", "NetworkInterfaceId="+id, "Description.Value=changed")
	g := w.must("CreateSecurityGroup", "GroupName=app", "GroupDescription=app", "VpcId="+vpcID).get("groupId")
	w.must("ModifyNetworkInterfaceAttribute", "NetworkInterfaceId="+id, "SecurityGroupId.1="+g)
	for attr, want := range map[string][2]string{
		"description": {"description.value", "changed"}, "sourceDestCheck": {"sourceDestCheck.value", "false"},
		"groupSet": {"groupSet.groupId", g}, "attachment": {"attachment.deleteOnTermination", "true"},
	} {
		w.want(w.must("DescribeNetworkInterfaceAttribute", "NetworkInterfaceId="+id, "Attribute="+attr), want[0], want[1])
	}

	if err := w.chaos.Set(chaos.Settings{AttachLatency: time.Second, Throttle: "off"}); err != nil {
		t.Fatal(err)
	}
	w.must("DetachNetworkInterface", "AttachmentId="+at)
	if s := status(); s != "in-use/detaching" {
		t.Error(s)
	}
	w.fails("IncorrectState", "DetachNetworkInterface", "AttachmentId="+at)
	w.fails("InvalidParameterValue", "DeleteNetworkInterface", "NetworkInterfaceId="+id)
	w.clock.Advance(time.Second)
	if s := status(); s != "available/" {
		t.Error(s)
	}
	w.fails("InvalidAttachmentID.NotFound", "DetachNetworkInterface", "AttachmentId="+at)
	w.must("DeleteNetworkInterface", "NetworkInterfaceId="+id)
	w.fails("InvalidNetworkInterfaceID.NotFound", "DeleteNetworkInterface", "NetworkInterfaceId="+id)
	w.want(w.must("DescribeSubnets"), "subnetSet.availableIpAddressCount", "250") // the instance's own
}

func TestENIErrors(t *testing.T) {
	w := newWorld(t)
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	other := w.must("CreateVpc", "CidrBlock=10.9.0.0/16").get("vpc.vpcId")
	foreign := w.must("DescribeSecurityGroups", "Filter.1.Name=vpc-id", "Filter.1.Value.1="+other).get("securityGroupInfo.groupId")
	zoneB := w.must("CreateSubnet", "VpcId="+vpcID, "CidrBlock=10.0.1.0/24", "AvailabilityZone=us-east-1b").get("subnet.subnetId")
	i := w.instance(subnet, "m5.large") // 3 interfaces of 10 addresses
	old := w.instance(subnet, "m4.large")
	e := w.eni(subnet)
	inB := w.eni(zoneB)
	big := w.eni(subnet, "SecondaryPrivateIpAddressCount=10")
	prefixed := w.eni(subnet, "Ipv4PrefixCount=1")
	primary := w.must("DescribeInstances", "InstanceId.1="+i)
	at0 := primary.get("reservationSet.instancesSet.networkInterfaceSet.attachment.attachmentId")
	eni0 := primary.get("reservationSet.instancesSet.networkInterfaceSet.networkInterfaceId")
	var groups []string
	for k := range 6 {
		groups = append(groups, w.must("CreateSecurityGroup", fmt.Sprintf("GroupName=g%d", k), "GroupDescription=g", "VpcId="+vpcID).get("groupId"))
	}
	for _, c := range []struct {
		code, action string
		params       []string
	}{
		{"MissingParameter", "CreateNetworkInterface", nil},
		{"InvalidSubnetID.NotFound", "CreateNetworkInterface", []string{"SubnetId=subnet-00000000000000000"}},
		{"InvalidParameterValue", "CreateNetworkInterface", []string{"SubnetId=" + subnet, "PrivateIpAddress=10.0.0.1"}}, // reserved
		{"InvalidParameterValue", "CreateNetworkInterface", []string{"SubnetId=" + subnet, "PrivateIpAddress=10.0.0.255"}},
		{"InvalidParameterValue", "CreateNetworkInterface", []string{"SubnetId=" + subnet, "PrivateIpAddress=10.0.1.5"}},
		{"InvalidParameterValue", "CreateNetworkInterface", []string{"SubnetId=" + subnet, "PrivateIpAddress=ten"}},
		{"InvalidIPAddress.InUse", "CreateNetworkInterface", []string{"SubnetId=" + subnet, "PrivateIpAddress=10.0.0.4"}},
		{"InvalidParameterValue", "CreateNetworkInterface", []string{"SubnetId=" + subnet, "Ipv4Prefix.1.Ipv4Prefix=10.0.0.8/28"}},
		{"InvalidParameterValue", "CreateNetworkInterface", []string{"SubnetId=" + subnet, "Ipv4Prefix.1.Ipv4Prefix=10.0.0.240/28"}}, // has the broadcast address
		{"InvalidParameterCombination", "CreateNetworkInterface", []string{"SubnetId=" + subnet, "Ipv4PrefixCount=1", "SecondaryPrivateIpAddressCount=1"}},
		{"InvalidParameterCombination", "CreateNetworkInterface", []string{"SubnetId=" + subnet, "PrivateIpAddress=10.0.0.99", "PrivateIpAddresses.1.Primary=true", "PrivateIpAddresses.1.PrivateIpAddress=10.0.0.98"}},
		{"SecurityGroupsPerInterfaceLimitExceeded", "CreateNetworkInterface", append([]string{"SubnetId=" + subnet}, numbered("SecurityGroupId", groups...)...)},
		{"InvalidGroup.NotFound", "CreateNetworkInterface", []string{"SubnetId=" + subnet, "SecurityGroupId.1=" + foreign}},
		{"InvalidGroupId.Malformed", "CreateNetworkInterface", []string{"SubnetId=" + subnet, "SecurityGroupId.1=default"}},
		{"PrivateIpAddressLimitExceeded", "CreateNetworkInterface", []string{"SubnetId=" + subnet, "SecondaryPrivateIpAddressCount=200"}},
		{"UnsupportedOperation", "CreateNetworkInterface", []string{"SubnetId=" + subnet, "InterfaceType=trunk"}},
		{"UnsupportedOperation", "CreateNetworkInterface", []string{"SubnetId=" + subnet, "EnablePrimaryIpv6=true"}},
		{"InvalidParameterValue", "CreateNetworkInterface", []string{"SubnetId=" + subnet, "ConnectionTrackingSpecification.UdpTimeout=5"}},
		{"InvalidNetworkInterfaceId.Malformed", "DeleteNetworkInterface", []string{"NetworkInterfaceId=eni-attach-00000000000000000"}},
		{"InvalidParameterValue", "DeleteNetworkInterface", []string{"NetworkInterfaceId=" + eni0}},
		{"OperationNotPermitted", "DetachNetworkInterface", []string{"AttachmentId=" + at0}},
		{"InvalidNetworkInterfaceAttachmentId.Malformed", "DetachNetworkInterface", []string{"AttachmentId=" + eni0}},
		{"InvalidNetworkInterface.InUse", "AttachNetworkInterface", []string{"NetworkInterfaceId=" + eni0, "InstanceId=" + i, "DeviceIndex=1"}},
		{"InvalidParameterValue", "AttachNetworkInterface", []string{"NetworkInterfaceId=" + e, "InstanceId=" + i, "DeviceIndex=0"}},
		{"InvalidParameterValue", "AttachNetworkInterface", []string{"NetworkInterfaceId=" + e, "InstanceId=" + i, "DeviceIndex=1", "NetworkCardIndex=1"}},
		{"InvalidParameterCombination", "AttachNetworkInterface", []string{"NetworkInterfaceId=" + inB, "InstanceId=" + i, "DeviceIndex=1"}},
		{"PrivateIpAddressLimitExceeded", "AttachNetworkInterface", []string{"NetworkInterfaceId=" + big, "InstanceId=" + i, "DeviceIndex=1"}},
		{"UnsupportedOperation", "AttachNetworkInterface", []string{"NetworkInterfaceId=" + prefixed, "InstanceId=" + old, "DeviceIndex=1"}},
		{"InvalidInstanceID.NotFound", "AttachNetworkInterface", []string{"NetworkInterfaceId=" + e, "InstanceId=i-00000000000000000", "DeviceIndex=1"}},
		{"InvalidParameterCombination", "ModifyNetworkInterfaceAttribute", []string{"NetworkInterfaceId=" + e, "SourceDestCheck.Value=false", "Description.Value=x"}},
		{"InvalidAttachmentID.NotFound", "ModifyNetworkInterfaceAttribute", []string{"NetworkInterfaceId=" + e, "Attachment.AttachmentId=" + at0, "Attachment.DeleteOnTermination=true"}},
		{"MissingParameter", "DescribeNetworkInterfaceAttribute", []string{"NetworkInterfaceId=" + e}},
		{"InvalidNetworkInterfaceID.NotFound", "DescribeNetworkInterfaces", []string{"NetworkInterfaceId.1=eni-00000000000000000"}},
		{"DependencyViolation", "DeleteSubnet", []string{"SubnetId=" + subnet}},
	} {
		w.fails(c.code, c.action, c.params...)
	}
	w.must("AttachNetworkInterface", "NetworkInterfaceId="+e, "InstanceId="+i, "DeviceIndex=1")
	w.must("AttachNetworkInterface", "NetworkInterfaceId="+prefixed, "InstanceId="+i, "DeviceIndex=2")
	if m := w.fails("AttachmentLimitExceeded", "AttachNetworkInterface", "NetworkInterfaceId="+w.eni(subnet), "InstanceId="+i, "DeviceIndex=3"); m != "Interface count 4 exceeds the limit for m5.large" {
		t.Errorf("message %q", m)
	}
}

func TestAssignAndUnassign(t *testing.T) {
	w := newWorld(t)
	_, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	i := w.instance(subnet, "m5.large")
	e := w.must("DescribeInstances").get("reservationSet.instancesSet.networkInterfaceSet.networkInterfaceId")
	n := w.must("AssignPrivateIpAddresses", "NetworkInterfaceId="+e, "SecondaryPrivateIpAddressCount=2")
	w.want(n, "assignedPrivateIpAddressesSet.privateIpAddress", "10.0.0.5,10.0.0.6")
	n = w.must("AssignPrivateIpAddresses", "NetworkInterfaceId="+e, "Ipv4PrefixCount=2")
	w.want(n, "assignedIpv4PrefixSet.ipv4Prefix", "10.0.0.16/28,10.0.0.32/28")
	w.must("AssignPrivateIpAddresses", "NetworkInterfaceId="+e, "PrivateIpAddress.1=10.0.0.200", "PrivateIpAddress.2=10.0.0.201")
	w.must("AssignPrivateIpAddresses", "NetworkInterfaceId="+e, "Ipv4Prefix.1=10.0.0.64/28")
	w.want(w.must("DescribeSubnets"), "subnetSet.availableIpAddressCount", fmt.Sprint(251-5-3*16))

	// Eight of ten taken: the primary and each prefix count one.
	if m := w.fails("PrivateIpAddressLimitExceeded", "AssignPrivateIpAddresses", "NetworkInterfaceId="+e, "SecondaryPrivateIpAddressCount=3"); m != "Number of private addresses will exceed limit." {
		t.Errorf("message %q", m)
	}
	w.fails("PrivateIpAddressLimitExceeded", "AssignPrivateIpAddresses", "NetworkInterfaceId="+e, "Ipv4PrefixCount=3")
	w.must("AssignPrivateIpAddresses", "NetworkInterfaceId="+e, "SecondaryPrivateIpAddressCount=2")
	w.fails("PrivateIpAddressLimitExceeded", "AssignPrivateIpAddresses", "NetworkInterfaceId="+e, "SecondaryPrivateIpAddressCount=1")

	free := w.eni(subnet)
	for _, c := range []struct {
		code, action string
		params       []string
	}{
		{"MissingParameter", "AssignPrivateIpAddresses", nil},
		{"InvalidParameterCombination", "AssignPrivateIpAddresses", []string{"PrivateIpAddress.1=10.0.0.210", "SecondaryPrivateIpAddressCount=1"}},
		{"Resource.AlreadyAssigned", "AssignPrivateIpAddresses", []string{"PrivateIpAddress.1=10.0.0.200"}},
		{"InvalidIPAddress.InUse", "AssignPrivateIpAddresses", []string{"PrivateIpAddress.1=10.0.0.4", "AllowReassignment=true"}},
		{"InvalidIPAddress.InUse", "AssignPrivateIpAddresses", []string{"PrivateIpAddress.1=10.0.0.70", "AllowReassignment=true"}}, // of a prefix
		{"Resource.AlreadyAssigned", "AssignPrivateIpAddresses", []string{"Ipv4Prefix.1=10.0.0.64/28"}},
		{"InvalidIPAddress.InUse", "AssignPrivateIpAddresses", []string{"Ipv4Prefix.1=10.0.0.192/28"}}, // 10.0.0.200 is in it
		{"InvalidParameterValue", "AssignPrivateIpAddresses", []string{"Ipv4Prefix.1=10.0.0.0/28"}},
		{"InvalidParameterValue", "AssignPrivateIpAddresses", []string{"PrivateIpAddress.1=10.0.0.220", "PrivateIpAddress.2=10.0.0.220"}},
		{"InvalidParameterValue", "AssignPrivateIpAddresses", []string{"PrivateIpAddress.1=10.0.9.1"}},
		{"InvalidParameterValue", "AssignPrivateIpAddresses", []string{"SecondaryPrivateIpAddressCount=-1"}},
		{"MissingParameter", "UnassignPrivateIpAddresses", nil},
		{"InvalidParameterValue", "UnassignPrivateIpAddresses", []string{"PrivateIpAddress.1=10.0.0.200"}},
		{"InvalidParameterValue", "UnassignPrivateIpAddresses", []string{"Ipv4Prefix.1=10.0.0.64/28"}},
		{"InvalidParameterCombination", "UnassignPrivateIpAddresses", []string{"PrivateIpAddress.1=10.0.0.200", "Ipv4Prefix.1=10.0.0.64/28"}},
	} {
		w.fails(c.code, c.action, append(c.params, "NetworkInterfaceId="+free)...)
	}
	w.fails("InvalidParameterValue", "UnassignPrivateIpAddresses", "NetworkInterfaceId="+e, "PrivateIpAddress.1=10.0.0.4") // the primary

	moved := w.must("AssignPrivateIpAddresses", "NetworkInterfaceId="+free, "PrivateIpAddress.1=10.0.0.200", "AllowReassignment=true")
	w.want(moved, "assignedPrivateIpAddressesSet.privateIpAddress", "10.0.0.200")
	w.want(w.must("DescribeNetworkInterfaces", "Filter.1.Name=private-ip-address", "Filter.1.Value.1=10.0.0.200"), "networkInterfaceSet.networkInterfaceId", free)
	w.must("AssignPrivateIpAddresses", "NetworkInterfaceId="+free, "PrivateIpAddress.1=10.0.0.200", "AllowReassignment=true") // to where it is

	w.must("UnassignPrivateIpAddresses", "NetworkInterfaceId="+e, "PrivateIpAddress.1=10.0.0.5", "PrivateIpAddress.2=10.0.0.6")
	w.must("UnassignPrivateIpAddresses", "NetworkInterfaceId="+e, "Ipv4Prefix.1=10.0.0.16/28")
	d := w.must("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+e)
	w.want(d, "networkInterfaceSet.ipv4PrefixSet.ipv4Prefix", "10.0.0.32/28,10.0.0.64/28")
	w.want(d, "networkInterfaceSet.attachment.instanceId", i)
	// Lowest first: what was given back comes first.
	w.want(w.must("AssignPrivateIpAddresses", "NetworkInterfaceId="+free, "SecondaryPrivateIpAddressCount=1"), "assignedPrivateIpAddressesSet.privateIpAddress", "10.0.0.5")

	old := w.instance(subnet, "m4.large")
	oldENI := w.must("DescribeInstances", "InstanceId.1="+old).get("reservationSet.instancesSet.networkInterfaceSet.networkInterfaceId")
	w.fails("UnsupportedOperation", "AssignPrivateIpAddresses", "NetworkInterfaceId="+oldENI, "Ipv4PrefixCount=1")
}

func TestSubnetExhaustion(t *testing.T) {
	w := newWorld(t)
	vpcID, _ := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	small := w.must("CreateSubnet", "VpcId="+vpcID, "CidrBlock=10.0.1.0/26").get("subnet.subnetId") // 59 addresses, 2 whole blocks
	e := w.eni(small, "PrivateIpAddress=10.0.1.20")                                                 // in the second block
	w.must("AssignPrivateIpAddresses", "NetworkInterfaceId="+e, "Ipv4PrefixCount=1")
	// 42 are free, and no block is whole.
	if m := w.fails("InsufficientCidrBlocks", "AssignPrivateIpAddresses", "NetworkInterfaceId="+e, "Ipv4PrefixCount=1"); m != "The specified subnet does not have enough free cidr blocks to satisfy the request." {
		t.Errorf("message %q", m)
	}
	if m := w.fails("InsufficientFreeAddressesInSubnet", "AssignPrivateIpAddresses", "NetworkInterfaceId="+e, "SecondaryPrivateIpAddressCount=43"); m != "The specified subnet does not have enough free addresses to satisfy the request." {
		t.Errorf("message %q", m)
	}
	w.must("AssignPrivateIpAddresses", "NetworkInterfaceId="+e, "SecondaryPrivateIpAddressCount=42")
	w.want(w.must("DescribeSubnets", "SubnetId.1="+small), "subnetSet.availableIpAddressCount", "0")
	if m := w.fails("InvalidParameterValue", "AssignPrivateIpAddresses", "NetworkInterfaceId="+e, "Ipv4PrefixCount=1"); m != "There aren't sufficient free Ipv4 addresses or prefixes" {
		t.Errorf("message %q", m)
	}
	w.fails("InsufficientFreeAddressesInSubnet", "CreateNetworkInterface", "SubnetId="+small)
	w.fails("InsufficientFreeAddressesInSubnet", "RunInstances", image, "InstanceType=m5.large", "MinCount=1", "MaxCount=1", "SubnetId="+small)
}

func TestENIToken(t *testing.T) {
	w := newWorld(t)
	_, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	first := w.must("CreateNetworkInterface", "SubnetId="+subnet, "ClientToken=abc")
	w.want(first, "clientToken", "abc")
	id := first.get("networkInterface.networkInterfaceId")
	w.restart()
	w.want(w.must("CreateNetworkInterface", "SubnetId="+subnet, "ClientToken=abc"), "networkInterface.networkInterfaceId", id)
	w.fails("IdempotentParameterMismatch", "CreateNetworkInterface", "SubnetId="+subnet, "ClientToken=abc", "Description=other")
	w.fails("InvalidParameterValue", "CreateNetworkInterface", "SubnetId="+subnet, "ClientToken=ü")
	if n := w.store.View().ENIs.Len(); n != 1 {
		t.Errorf("%d interfaces", n)
	}
	w.clock.Advance(25 * time.Hour)
	if err := w.api.forget(); err != nil {
		t.Fatal(err)
	}
	if again := w.must("CreateNetworkInterface", "SubnetId="+subnet, "ClientToken=abc").get("networkInterface.networkInterfaceId"); again == id {
		t.Error("the token is remembered for ever")
	}
}

func TestManagedService(t *testing.T) {
	w := newWorld(t)
	_, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	ctx := context.Background()
	e, err := w.api.CreateManagedService(ctx, ManagedService{Name: "db-1", Subnet: vpc.SubnetID(subnet)})
	if err != nil {
		t.Fatal(err)
	}
	id := string(e.ID)
	d := w.must("DescribeNetworkInterfaces", "Filter.1.Name=requester-managed", "Filter.1.Value.1=true")
	w.want(d, "networkInterfaceSet.networkInterfaceId", id)
	w.want(d, "networkInterfaceSet.requesterId", "amazon-rds")
	w.want(d, "networkInterfaceSet.status", "in-use")
	w.want(d, "networkInterfaceSet.attachment.instanceOwnerId", "amazon-rds")
	w.want(d, "networkInterfaceSet.attachment.instanceId", "")
	w.want(d, "networkInterfaceSet.attachment.status", "attached")
	at := d.get("networkInterfaceSet.attachment.attachmentId")
	w.fails("AuthFailure", "ModifyNetworkInterfaceAttribute", "NetworkInterfaceId="+id, "Description.Value=mine")
	w.fails("AuthFailure", "AssignPrivateIpAddresses", "NetworkInterfaceId="+id, "SecondaryPrivateIpAddressCount=1")
	w.fails("OperationNotPermitted", "DetachNetworkInterface", "AttachmentId="+at)
	w.fails("InvalidParameterValue", "DeleteNetworkInterface", "NetworkInterfaceId="+id)
	var qe *query.Error
	if _, err := w.api.CreateManagedService(ctx, ManagedService{Name: "db-1", Subnet: vpc.SubnetID(subnet)}); !errors.As(err, &qe) {
		t.Errorf("a second db-1: %v", err)
	}
	if _, err := w.api.CreateManagedService(ctx, ManagedService{Name: "../x", Subnet: vpc.SubnetID(subnet)}); !errors.As(err, &qe) {
		t.Errorf("../x: %v", err)
	}
	w.restart()
	if err := w.api.DeleteManagedService(ctx, "db-1"); err != nil {
		t.Fatal(err)
	}
	if err := w.api.DeleteManagedService(ctx, "db-1"); !errors.Is(err, ErrNoService) {
		t.Errorf("deleted again: %v", err)
	}
	w.fails("InvalidNetworkInterfaceID.NotFound", "DescribeNetworkInterfaces", "NetworkInterfaceId.1="+id)
	w.must("DeleteSubnet", "SubnetId="+subnet)
}

func TestReadLag(t *testing.T) {
	w := newWorld(t)
	_, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	if err := w.chaos.Set(chaos.Settings{ReadLag: 2 * time.Second, Throttle: "off"}); err != nil {
		t.Fatal(err)
	}
	w.clock.Advance(time.Minute)
	id := w.eni(subnet)
	w.fails("InvalidNetworkInterfaceID.NotFound", "DescribeNetworkInterfaces", "NetworkInterfaceId.1="+id)
	w.must("AssignPrivateIpAddresses", "NetworkInterfaceId="+id, "SecondaryPrivateIpAddressCount=1") // writes see what is
	w.clock.Advance(1999 * time.Millisecond)
	w.fails("InvalidNetworkInterfaceID.NotFound", "DescribeNetworkInterfaces", "NetworkInterfaceId.1="+id)
	w.clock.Advance(time.Millisecond)
	w.want(w.must("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+id), "networkInterfaceSet.networkInterfaceId", id)
}

// With some reads fresh a client sees what it made come, go and come again.
func TestFreshReads(t *testing.T) {
	w := newWorld(t)
	_, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	w.clock.Advance(time.Minute)
	if err := w.chaos.Set(chaos.Settings{ReadLag: time.Second, FreshReads: 0.5, Throttle: "off"}); err != nil {
		t.Fatal(err)
	}
	e := w.eni(subnet)
	seen, missed := 0, 0
	for range 200 {
		if _, status := w.post("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+e); status == 200 {
			seen++
		} else {
			missed++
		}
	}
	if seen < 50 || missed < 50 { // half of 200, give or take seven sigma
		t.Errorf("seen %d times, missed %d times", seen, missed)
	}
}
