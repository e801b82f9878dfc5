package api

import (
	"encoding/base64"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func TestInstanceLife(t *testing.T) {
	w := newWorld(t)
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	if err := w.chaos.Set(chaos.Settings{AttachLatency: time.Second, Throttle: "off"}); err != nil {
		t.Fatal(err)
	}
	kept := w.eni(subnet)
	id := w.must("RunInstances", image, "InstanceType=m5.large", "MinCount=1", "MaxCount=1", "KeyName=k", "BlockDeviceMapping.1.DeviceName=/dev/xvda",
		"MetadataOptions.HttpTokens=required", "MetadataOptions.HttpPutResponseHopLimit=2", "UserData="+base64.StdEncoding.EncodeToString([]byte("hello")),
		"NetworkInterface.1.DeviceIndex=0", "NetworkInterface.1.SubnetId="+subnet, "NetworkInterface.1.PrivateIpAddress=10.0.0.50",
		"NetworkInterface.2.DeviceIndex=1", "NetworkInterface.2.NetworkInterfaceId="+kept,
		"TagSpecification.1.ResourceType=network-interface", "TagSpecification.1.Tag.1.Key=from", "TagSpecification.1.Tag.1.Value=launch",
		"TagSpecification.2.ResourceType=volume", "TagSpecification.2.Tag.1.Key=x", "TagSpecification.2.Tag.1.Value=y").get("instancesSet.instanceId")
	state := func() string {
		return w.must("DescribeInstances", "InstanceId.1="+id).get("reservationSet.instancesSet.instanceState.name")
	}
	if s := state(); s != "pending" {
		t.Error(s)
	}
	w.fails("IncorrectState", "AttachNetworkInterface", "InstanceId="+id, "NetworkInterfaceId="+w.eni(subnet), "DeviceIndex=2")
	w.want(w.must("DescribeInstanceStatus", "InstanceId.1="+id), "instanceStatusSet.instanceId", "")
	w.want(w.must("DescribeInstanceStatus", "InstanceId.1="+id, "IncludeAllInstances=true"), "instanceStatusSet.instanceState.name", "pending")
	w.clock.Advance(time.Second)
	d := w.must("DescribeInstances", "InstanceId.1="+id)
	const i = "reservationSet.instancesSet."
	w.want(d, i+"instanceState.name", "running")
	w.want(d, i+"instanceState.code", "16")
	w.want(d, i+"metadataOptions.httpTokens", "required")
	w.want(d, i+"metadataOptions.httpPutResponseHopLimit", "2")
	w.want(d, i+"privateIpAddress", "10.0.0.50")
	w.want(d, i+"keyName", "k")
	w.want(d, i+"networkInterfaceSet.attachment.deviceIndex", "0,1")
	w.want(d, i+"networkInterfaceSet.attachment.deleteOnTermination", "true,false")
	w.want(w.must("DescribeInstanceStatus"), "instanceStatusSet.instanceStatus.status", "ok")
	eni0 := strings.Split(d.get(i+"networkInterfaceSet.networkInterfaceId"), ",")[0]
	w.want(w.must("DescribeTags", "Filter.1.Name=key", "Filter.1.Value.1=from"), "tagSet.resourceId", eni0)
	w.want(w.must("DescribeInstanceAttribute", "InstanceId="+id, "Attribute=userData"), "userData.value", base64.StdEncoding.EncodeToString([]byte("hello")))
	w.want(w.must("DescribeInstanceAttribute", "InstanceId="+id, "Attribute=instanceType"), "instanceType.value", "m5.large")
	w.want(w.must("ModifyInstanceMetadataOptions", "InstanceId="+id, "HttpPutResponseHopLimit=3"), "instanceMetadataOptions.httpPutResponseHopLimit", "3")
	w.fails("InvalidParameterValue", "ModifyInstanceMetadataOptions", "InstanceId="+id, "HttpPutResponseHopLimit=65")

	w.must("ModifyInstanceAttribute", "InstanceId="+id, "DisableApiTermination.Value=true")
	w.fails("OperationNotPermitted", "TerminateInstances", "InstanceId.1="+id)
	w.must("ModifyInstanceAttribute", "InstanceId="+id, "DisableApiTermination.Value=false")
	w.must("ModifyInstanceAttribute", "InstanceId="+id, "SourceDestCheck.Value=false")
	w.want(w.must("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+eni0), "networkInterfaceSet.sourceDestCheck", "false")

	for f, v := range map[string]string{
		"instance-state-name": "running", "vpc-id": vpcID, "private-ip-address": "10.0.0.50", "instance-type": "m5.*",
		"network-interface.network-interface-id": kept, "network-interface.addresses.private-ip-address": "10.0.0.50", "metadata-options.http-tokens": "required",
		"network-interface.attachment.device-index": "1", "instance.group-name": "default", "private-dns-name": "ip-10-0-0-50.ec2.internal",
	} {
		w.want(w.must("DescribeInstances", "Filter.1.Name="+f, "Filter.1.Value.1="+v), i+"instanceId", id)
		w.want(w.must("DescribeInstances", "Filter.1.Name="+f, "Filter.1.Value.1=no"), i+"instanceId", "")
	}

	gone := w.must("TerminateInstances", "InstanceId.1="+id)
	w.want(gone, "instancesSet.currentState.name", "shutting-down")
	w.want(gone, "instancesSet.previousState.name", "running")
	w.clock.Advance(time.Second)
	d = w.must("DescribeInstances", "InstanceId.1="+id)
	w.want(d, i+"instanceState.name", "terminated")
	w.want(d, i+"vpcId", "")
	w.want(d, i+"privateIpAddress", "")
	w.want(d, i+"networkInterfaceSet.networkInterfaceId", "")
	w.want(d, i+"stateReason.code", "Client.UserInitiatedShutdown")
	w.want(w.must("TerminateInstances", "InstanceId.1="+id), "instancesSet.previousState.name", "terminated")
	w.fails("InvalidNetworkInterfaceID.NotFound", "DescribeNetworkInterfaces", "NetworkInterfaceId.1="+eni0)
	w.want(w.must("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+kept), "networkInterfaceSet.status", "available")
	w.clock.Advance(terminatedFor)
	w.fails("InvalidInstanceID.NotFound", "DescribeInstances", "InstanceId.1="+id)
}

func TestStopAndStart(t *testing.T) {
	w := newWorld(t)
	_, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	if err := w.chaos.Set(chaos.Settings{AttachLatency: time.Second, Throttle: "off"}); err != nil {
		t.Fatal(err)
	}
	id := w.instance(subnet, "m5.large", "DisableApiStop=true")
	w.fails("IncorrectInstanceState", "StopInstances", "InstanceId.1="+id) // pending
	w.clock.Advance(time.Second)
	w.fails("OperationNotPermitted", "StopInstances", "InstanceId.1="+id)
	w.want(w.must("DescribeInstanceAttribute", "InstanceId="+id, "Attribute=disableApiStop"), "disableApiStop.value", "true")
	w.must("ModifyInstanceAttribute", "InstanceId="+id, "DisableApiStop.Value=false")
	w.fails("UnsupportedOperation", "StopInstances", "InstanceId.1="+id, "Hibernate=true")
	w.fails("InvalidInstanceID.NotFound", "StopInstances", "InstanceId.1="+id, "InstanceId.2=i-00000000000000000")

	const i = "reservationSet.instancesSet."
	power := func() store.Power { return w.store.View().Instance(vpc.InstanceID(id)).Power }
	before := w.must("DescribeInstances", "InstanceId.1="+id)
	d := w.must("StopInstances", "InstanceId.1="+id)
	w.want(d, "instancesSet.previousState.name", "running")
	w.want(d, "instancesSet.currentState.name", "stopping")
	w.want(d, "instancesSet.currentState.code", "64")
	if power() != store.PowerOn {
		t.Error("the namespace goes before the instance is stopped")
	}
	w.fails("IncorrectInstanceState", "StartInstances", "InstanceId.1="+id)
	w.fails("IncorrectInstanceState", "RebootInstances", "InstanceId.1="+id)
	w.clock.Advance(time.Second)
	d = w.must("DescribeInstances", "InstanceId.1="+id, "Filter.1.Name=instance-state-code", "Filter.1.Value.1=80")
	w.want(d, i+"instanceState.name", "stopped")
	w.want(d, i+"stateReason.code", "Client.UserInitiatedShutdown")
	for _, same := range []string{"privateIpAddress", "vpcId", "networkInterfaceSet.networkInterfaceId", "networkInterfaceSet.attachment.status", "networkInterfaceSet.macAddress"} {
		w.want(d, i+same, before.get(i+same))
	}
	w.want(w.must("DescribeInstanceStatus", "IncludeAllInstances=true"), "instanceStatusSet.instanceStatus.status", "not-applicable")
	if power() != store.PowerOff {
		t.Error("a stopped instance has its namespace")
	}
	w.want(w.must("StopInstances", "InstanceId.1="+id), "instancesSet.currentState.name", "stopped")

	// Interfaces come and go while it is stopped.
	eni := w.eni(subnet)
	at := w.must("AttachNetworkInterface", "InstanceId="+id, "NetworkInterfaceId="+eni, "DeviceIndex=1").get("attachmentId")
	w.clock.Advance(time.Second)
	w.want(w.must("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+eni), "networkInterfaceSet.attachment.status", "attached")
	w.must("DetachNetworkInterface", "AttachmentId="+at)

	w.want(w.must("StartInstances", "InstanceId.1="+id), "instancesSet.currentState.name", "pending")
	w.clock.Advance(time.Second)
	d = w.must("DescribeInstances", "InstanceId.1="+id)
	w.want(d, i+"instanceState.name", "running")
	w.want(d, i+"privateIpAddress", before.get(i+"privateIpAddress"))
	w.want(d, i+"stateReason.code", "")
	if d.get(i+"launchTime") == before.get(i+"launchTime") {
		t.Error("the launch time is that of the first start")
	}
	if power() != store.PowerCycle { // nobody makes namespaces here
		t.Errorf("started with the power %q", power())
	}
	w.want(w.must("StartInstances", "InstanceId.1="+id), "instancesSet.currentState.name", "running")
	w.must("RebootInstances", "InstanceId.1="+id)

	w.want(w.must("StopInstances", "InstanceId.1="+id, "Force=true"), "instancesSet.currentState.name", "stopping")
	if power() != store.PowerOff {
		t.Error("force waits for the instance")
	}
	w.clock.Advance(time.Second)
	w.want(w.must("TerminateInstances", "InstanceId.1="+id), "instancesSet.previousState.name", "stopped")
	if power() != store.PowerOff {
		t.Error("a stopped instance gets a namespace to shut down in")
	}
	w.fails("IncorrectInstanceState", "StartInstances", "InstanceId.1="+id)
}

func TestRunInstancesCounts(t *testing.T) {
	w := newWorld(t)
	vpcID, _ := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	tiny := w.must("CreateSubnet", "VpcId="+vpcID, "CidrBlock=10.0.1.0/28").get("subnet.subnetId") // 11 addresses
	n := w.must("RunInstances", image, "InstanceType=t3.small", "MinCount=1", "MaxCount=5", "SubnetId="+tiny)
	w.want(n, "instancesSet.amiLaunchIndex", "0,1,2,3,4")
	w.want(w.must("DescribeInstances", "Filter.1.Name=reservation-id", "Filter.1.Value.1="+n.get("reservationId")), "reservationSet.reservationId", n.get("reservationId"))
	// Three addresses each: two more instances, and no more.
	n = w.must("RunInstances", image, "InstanceType=t3.small", "MinCount=2", "MaxCount=5",
		"NetworkInterface.1.DeviceIndex=0", "NetworkInterface.1.SubnetId="+tiny, "NetworkInterface.1.SecondaryPrivateIpAddressCount=2")
	w.want(n, "instancesSet.amiLaunchIndex", "0,1")
	w.want(w.must("DescribeSubnets", "SubnetId.1="+tiny), "subnetSet.availableIpAddressCount", "0")
	before := w.store.View()
	w.fails("InsufficientFreeAddressesInSubnet", "RunInstances", image, "InstanceType=t3.small", "MinCount=1", "MaxCount=1", "SubnetId="+tiny)
	if w.store.View() != before {
		t.Error("a refused launch left something behind")
	}
}

func TestRunInstancesAllOrNothing(t *testing.T) {
	w := newWorld(t)
	vpcID, _ := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	tiny := w.must("CreateSubnet", "VpcId="+vpcID, "CidrBlock=10.0.1.0/28").get("subnet.subnetId")
	w.fails("InsufficientFreeAddressesInSubnet", "RunInstances", image, "InstanceType=t3.small", "MinCount=12", "MaxCount=20", "SubnetId="+tiny)
	if v := w.store.View(); v.Instances.Len()+v.ENIs.Len() != 0 {
		t.Errorf("%d instances, %d interfaces", v.Instances.Len(), v.ENIs.Len())
	}
}

func TestRunInstancesToken(t *testing.T) {
	w := newWorld(t)
	_, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	run := []string{image, "InstanceType=t3.small", "MinCount=2", "MaxCount=2", "SubnetId=" + subnet, "ClientToken=tok"}
	ids := w.must("RunInstances", run...).get("instancesSet.instanceId")
	w.want(w.must("RunInstances", run...), "instancesSet.instanceId", ids)
	run[2] = "MinCount=1"
	w.fails("IdempotentParameterMismatch", "RunInstances", run...)
}

func TestRunInstancesErrors(t *testing.T) {
	w := newWorld(t)
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	zoneB := w.must("CreateSubnet", "VpcId="+vpcID, "CidrBlock=10.0.1.0/24", "AvailabilityZone=us-east-1b").get("subnet.subnetId")
	i := w.instance(subnet, "m5.large")
	used := w.must("DescribeInstances", "InstanceId.1="+i).get("reservationSet.instancesSet.networkInterfaceSet.networkInterfaceId")
	free := w.eni(subnet)
	nic := func(k int, params ...string) []string {
		var out []string
		for _, p := range params {
			out = append(out, fmt.Sprintf("NetworkInterface.%d.%s", k, p))
		}
		return out
	}
	four := append(nic(1, "DeviceIndex=0", "SubnetId="+subnet), nic(2, "DeviceIndex=1", "SubnetId="+subnet)...)
	four = append(append(four, nic(3, "DeviceIndex=2", "SubnetId="+subnet)...), nic(4, "DeviceIndex=3", "SubnetId="+subnet)...)
	for _, c := range []struct {
		code   string
		params []string
	}{
		{"MissingInput", nil},
		{"InvalidAMIID.Malformed", []string{"SubnetId=" + subnet, "ImageId=debian"}},
		{"InvalidParameterValue", []string{"SubnetId=" + subnet, "MinCount=2"}},
		{"InvalidParameterValue", []string{"SubnetId=" + subnet, "MinCount=0"}},
		{"InvalidParameterValue", []string{"SubnetId=" + subnet, "UserData=%%%"}},
		{"InvalidParameterValue", []string{"SubnetId=" + subnet, "MetadataOptions.HttpPutResponseHopLimit=0"}},
		{"InvalidParameterCombination", []string{"SubnetId=" + subnet, "PrivateIpAddress=10.0.0.77", "MaxCount=2"}},
		{"InvalidParameterCombination", append(nic(1, "DeviceIndex=0", "SubnetId="+subnet), "SubnetId="+subnet)},
		{"InvalidParameterCombination", append(nic(1, "DeviceIndex=0", "SubnetId="+subnet), "SecurityGroupId.1=sg-00000000000000000")},
		{"InvalidParameterCombination", append(nic(1, "DeviceIndex=0", "SubnetId="+subnet), "PrivateIpAddress=10.0.0.77")},
		{"InvalidParameterCombination", nic(1, "DeviceIndex=1", "SubnetId="+subnet)},
		{"InvalidParameterValue", nic(1, "SubnetId="+subnet)},
		{"InvalidParameterValue", append(nic(1, "DeviceIndex=0", "SubnetId="+subnet), nic(2, "DeviceIndex=0", "SubnetId="+subnet)...)},
		{"InvalidNetworkInterface.InUse", nic(1, "DeviceIndex=0", "NetworkInterfaceId="+used)},
		{"InvalidParameterCombination", nic(1, "DeviceIndex=0", "NetworkInterfaceId="+free, "SubnetId="+subnet)},
		{"InvalidParameterCombination", nic(1, "DeviceIndex=0", "NetworkInterfaceId="+free, "DeleteOnTermination=true")},
		{"InvalidParameterCombination", append(nic(1, "DeviceIndex=0", "NetworkInterfaceId="+free), "MaxCount=2")},
		{"InvalidParameterCombination", append(nic(1, "DeviceIndex=0", "SubnetId="+subnet), nic(2, "DeviceIndex=1", "SubnetId="+zoneB)...)},
		{"InvalidParameterCombination", []string{"SubnetId=" + subnet, "Placement.AvailabilityZone=us-east-1b"}},
		{"AttachmentLimitExceeded", four},
		{"InvalidInterface.IpAddressLimitExceeded", nic(1, "DeviceIndex=0", "SubnetId="+subnet, "SecondaryPrivateIpAddressCount=10")},
		{"UnsupportedOperation", append(nic(1, "DeviceIndex=0", "SubnetId="+subnet, "Ipv4PrefixCount=1"), "InstanceType=m4.large")},
		{"UnsupportedOperation", []string{"SubnetId=" + subnet, "LaunchTemplate.LaunchTemplateId=lt-1"}},
		{"InvalidParameterCombination", append(nic(1, "DeviceIndex=0", "SubnetId="+subnet, "AssociatePublicIpAddress=true"), nic(2, "DeviceIndex=1", "SubnetId="+subnet)...)},
		{"InvalidParameterCombination", nic(1, "DeviceIndex=0", "NetworkInterfaceId="+free, "AssociatePublicIpAddress=true")},
		{"UnsupportedOperation", []string{"SubnetId=" + subnet, "HibernationOptions.Configured=true"}},
		{"InvalidSubnetID.NotFound", []string{"SubnetId=subnet-00000000000000000"}},
		{"InvalidGroup.NotFound", []string{"SubnetId=" + subnet, "SecurityGroupId.1=sg-00000000000000000"}},
	} {
		w.fails(c.code, "RunInstances", append([]string{image, "InstanceType=m5.large", "MinCount=1", "MaxCount=1"}, c.params...)...)
	}
	w.fails("InvalidInstanceID.NotFound", "TerminateInstances", "InstanceId.1="+i, "InstanceId.2=i-00000000000000000")
	w.want(w.must("DescribeInstances", "InstanceId.1="+i), "reservationSet.instancesSet.instanceState.name", "running")
	w.fails("InvalidInstanceID.Malformed", "DescribeInstances", "InstanceId.1=web")
	w.fails("InvalidParameterCombination", "DescribeInstances", "InstanceId.1="+i, "MaxResults=10")
}

func TestInstanceTypes(t *testing.T) {
	w := newWorld(t)
	d := w.must("DescribeInstanceTypes", "InstanceType.1=m5.large")
	const i = "instanceTypeSet."
	w.want(d, i+"networkInfo.maximumNetworkInterfaces", "3")
	w.want(d, i+"networkInfo.ipv4AddressesPerInterface", "10")
	w.want(d, i+"hypervisor", "nitro")
	w.want(d, i+"vCpuInfo.defaultVCpus", "2")
	w.want(d, i+"processorInfo.supportedArchitectures", "x86_64")
	w.want(w.must("DescribeInstanceTypes", "InstanceType.1=m6g.large"), i+"processorInfo.supportedArchitectures", "arm64")
	w.fails("InvalidInstanceType", "DescribeInstanceTypes", "InstanceType.1=m5.gigantic")
	w.fails("UnsupportedOperation", "DescribeInstanceTypes", "Filter.1.Name=memory-info.size-in-mib", "Filter.1.Value.1=8192")
	page := w.must("DescribeInstanceTypes", "MaxResults=100", "Filter.1.Name=instance-type", "Filter.1.Value.1=m5*")
	if n := len(page.at("instanceTypeSet")); n < 40 {
		t.Errorf("%d types of m5*", n)
	}
	n := w.must("DescribeInstanceTypes", "MaxResults=5")
	w.must("DescribeInstanceTypes", "MaxResults=5", "NextToken="+n.get("nextToken"))
	off := w.must("DescribeInstanceTypeOfferings", "LocationType=availability-zone", "Filter.1.Name=instance-type", "Filter.1.Value.1=m5.large")
	w.want(off, "instanceTypeOfferingSet.location", "us-east-1a,us-east-1b,us-east-1c")
}
