package api

import (
	"testing"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// publicOf is the public address that an instance shows, and that of its
// interface with who owns it.
func (w *world) publicOf(i string) (instance, nic string) {
	w.t.Helper()
	const s = "reservationSet.instancesSet."
	d := w.must("DescribeInstances", "InstanceId.1="+i)
	return d.get(s + "ipAddress"), d.get(s+"networkInterfaceSet.association.publicIp") + " " + d.get(s+"networkInterfaceSet.association.ipOwnerId")
}

func (w *world) wantPublic(i, want string) {
	w.t.Helper()
	instance, nic := w.publicOf(i)
	wantNIC := want + " amazon"
	if want == "" {
		wantNIC = " "
	}
	if instance != want || nic != wantNIC {
		w.t.Errorf("public address of %s is %q, of its interface %q, want %q", i, instance, nic, want)
	}
}

// An instance has a public address for its life if its subnet or its launch says
// so: a new one when it is started again, none when it is stopped or gone. It is
// no Elastic IP address.
func TestPublicAddresses(t *testing.T) {
	w := newWorld(t)
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	const first, second = "198.51.100.1", "198.51.100.2"
	w.wantPublic(w.instance(subnet, "m5.large"), "")
	w.must("ModifySubnetAttribute", "SubnetId="+subnet, "MapPublicIpOnLaunch.Value=true")
	w.want(w.must("DescribeSubnets", "Filter.1.Name=map-public-ip-on-launch", "Filter.1.Value.1=true"), "subnetSet.mapPublicIpOnLaunch", "true")
	i := w.instance(subnet, "m5.large")
	w.wantPublic(i, first)
	eni := w.must("DescribeInstances", "InstanceId.1="+i).get("reservationSet.instancesSet.networkInterfaceSet.networkInterfaceId")
	d := w.must("DescribeNetworkInterfaces", "Filter.1.Name=association.public-ip", "Filter.1.Value.1="+first)
	w.want(d, "networkInterfaceSet.networkInterfaceId", eni)
	w.want(d, "networkInterfaceSet.association.allocationId", "")
	w.want(d, "networkInterfaceSet.association.associationId", "")

	// The launch goes before the subnet; several interfaces have none.
	nic := func(n, device, more string) []string {
		return []string{"NetworkInterface." + n + ".DeviceIndex=" + device, "NetworkInterface." + n + ".SubnetId=" + subnet, "NetworkInterface." + n + more}
	}
	run := func(params ...string) string {
		return w.must("RunInstances", append([]string{image, "InstanceType=m5.large", "MinCount=1", "MaxCount=1"}, params...)...).get("instancesSet.instanceId")
	}
	w.wantPublic(run(nic("1", "0", ".AssociatePublicIpAddress=false")...), "")
	two := run(append(nic("1", "0", ".Description=x"), nic("2", "1", ".Description=x")...)...)
	if got, _ := w.publicOf(two); got != "" {
		t.Errorf("with two interfaces: %s", got)
	}
	w.must("ModifySubnetAttribute", "SubnetId="+subnet, "MapPublicIpOnLaunch.Value=false")
	asked := run(nic("1", "0", ".AssociatePublicIpAddress=true")...)
	w.wantPublic(asked, second)

	// They are no Elastic IP addresses, of which there are five at most.
	w.want(w.must("DescribeAddresses"), "addressesSet.publicIp", "")
	w.fails("InvalidAddress.NotFound", "DisassociateAddress", "PublicIp="+first)
	w.fails("InvalidAddress.NotFound", "DescribeAddresses", "PublicIp.1="+first)
	var elastics []string
	for range 5 {
		elastics = append(elastics, w.elastic())
	}
	w.fails("AddressLimitExceeded", "AllocateAddress")

	// An Elastic IP address takes its place, and gives it back.
	igw := w.online(vpcID)
	w.must("AssociateAddress", "AllocationId="+elastics[0], "InstanceId="+i)
	if got, nic := w.publicOf(i); got != "198.51.100.3" || nic != "198.51.100.3 123456789012" {
		t.Errorf("with an Elastic IP address: %s, %s", got, nic)
	}
	w.must("DisassociateAddress", "PublicIp=198.51.100.3")
	w.wantPublic(i, first)
	w.must("AssociateAddress", "AllocationId="+elastics[0], "InstanceId="+i)
	w.must("AssociateAddress", "AllocationId="+elastics[0], "InstanceId="+asked, "AllowReassociation=true")
	w.wantPublic(i, first)
	w.must("DisassociateAddress", "PublicIp=198.51.100.3")
	w.wantPublic(asked, second)
	w.fails("DependencyViolation", "DetachInternetGateway", "InternetGatewayId="+igw, "VpcId="+vpcID)

	// Stopped and started; with a second interface there is no new one.
	w.must("StopInstances", "InstanceId.1="+i)
	w.wantPublic(i, "")
	w.must("StartInstances", "InstanceId.1="+i)
	w.wantPublic(i, first)
	more := w.eni(subnet)
	at := w.must("AttachNetworkInterface", "NetworkInterfaceId="+more, "InstanceId="+i, "DeviceIndex=1").get("attachmentId")
	if got, _ := w.publicOf(i); got != first {
		t.Errorf("after an interface more: %q", got)
	}
	w.must("StopInstances", "InstanceId.1="+i)
	w.must("StartInstances", "InstanceId.1="+i)
	if got, _ := w.publicOf(i); got != "" {
		t.Errorf("started with two interfaces: %q", got)
	}
	w.must("DetachNetworkInterface", "AttachmentId="+at)

	// Changed while it runs.
	set := func(to string) {
		w.must("ModifyNetworkInterfaceAttribute", "NetworkInterfaceId="+eni, "AssociatePublicIpAddress="+to)
		w.want(w.must("DescribeNetworkInterfaceAttribute", "NetworkInterfaceId="+eni, "Attribute=associatePublicIpAddress"), "associatePublicIpAddress", to)
	}
	set("true")
	w.wantPublic(i, first)
	set("false")
	w.wantPublic(i, "")
	set("true")

	// It is there after a restart, and gone with the instance, whether its
	// interface stays or not.
	w.restart()
	w.wantPublic(i, first)
	attachment := w.must("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+eni).get("networkInterfaceSet.attachment.attachmentId")
	w.must("ModifyNetworkInterfaceAttribute", "NetworkInterfaceId="+eni, "Attachment.AttachmentId="+attachment, "Attachment.DeleteOnTermination=false")
	w.must("TerminateInstances", "InstanceId.1="+i, "InstanceId.2="+asked)
	w.want(w.must("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+eni), "networkInterfaceSet.association.publicIp", "")
	if x := w.store.View(); x.Addresses.Len() != len(elastics) || x.ElasticOf(vpc.ENIID(eni), x.ENI(vpc.ENIID(eni)).Primary) != nil {
		t.Errorf("%d addresses are left, want %d", x.Addresses.Len(), len(elastics))
	}
	w.must("DetachInternetGateway", "InternetGatewayId="+igw, "VpcId="+vpcID)
}
