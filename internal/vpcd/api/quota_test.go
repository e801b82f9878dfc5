package api

import (
	"fmt"
	"testing"

	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
)

func TestQuotas(t *testing.T) {
	w := newWorld(t)
	set := func(q map[chaos.Quota]int) {
		t.Helper()
		if err := w.chaos.Set(chaos.Settings{Throttle: "off", Quotas: q}); err != nil {
			t.Fatal(err)
		}
	}
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	zoneB := w.must("CreateSubnet", "VpcId="+vpcID, "CidrBlock=10.0.1.0/24", "AvailabilityZone=us-east-1b").get("subnet.subnetId")
	group := w.must("CreateSecurityGroup", "GroupName=g", "GroupDescription=g", "VpcId="+vpcID).get("groupId")
	other := w.must("CreateSecurityGroup", "GroupName=o", "GroupDescription=o", "VpcId="+vpcID).get("groupId")

	set(map[chaos.Quota]int{chaos.QuotaInterfaces: 2})
	i := w.instance(subnet, "m5.large")
	e := w.eni(subnet)
	w.fails("NetworkInterfaceLimitExceeded", "CreateNetworkInterface", "SubnetId="+subnet)
	w.fails("NetworkInterfaceLimitExceeded", "RunInstances", image, "InstanceType=m5.large", "MinCount=1", "MaxCount=1", "SubnetId="+subnet)
	w.must("AttachNetworkInterface", "NetworkInterfaceId="+e, "InstanceId="+i, "DeviceIndex=1") // what there is may be used
	w.eni(zoneB)                                                                                // each zone has its own
	w.restart()
	set(map[chaos.Quota]int{chaos.QuotaInterfaces: 2}) // settings die with the process; what is counted does not
	w.fails("NetworkInterfaceLimitExceeded", "CreateNetworkInterface", "SubnetId="+subnet)
	w.must("TerminateInstances", "InstanceId.1="+i) // takes its first interface along
	w.eni(subnet)
	w.fails("NetworkInterfaceLimitExceeded", "CreateNetworkInterface", "SubnetId="+subnet)

	rule := func(port int) []string {
		return []string{"GroupId=" + group, "IpProtocol=tcp", fmt.Sprintf("FromPort=%d", port), fmt.Sprintf("ToPort=%d", port), "CidrIp=10.0.0.0/8"}
	}
	set(map[chaos.Quota]int{chaos.QuotaGroups: 3, chaos.QuotaVPCs: 1, chaos.QuotaSubnets: 2, chaos.QuotaCIDRs: 2, chaos.QuotaGroupsPerInterface: 1, chaos.QuotaRules: 2})
	w.fails("VpcLimitExceeded", "CreateVpc", "CidrBlock=10.1.0.0/16")
	w.fails("SubnetLimitExceeded", "CreateSubnet", "VpcId="+vpcID, "CidrBlock=10.0.2.0/24")
	w.fails("SecurityGroupLimitExceeded", "CreateSecurityGroup", "GroupName=h", "GroupDescription=h", "VpcId="+vpcID)
	w.must("AssociateVpcCidrBlock", "VpcId="+vpcID, "CidrBlock=10.2.0.0/16")
	w.fails("CidrLimitExceeded", "AssociateVpcCidrBlock", "VpcId="+vpcID, "CidrBlock=10.3.0.0/16")
	w.fails("SecurityGroupsPerInterfaceLimitExceeded", "ModifyNetworkInterfaceAttribute", "NetworkInterfaceId="+e, "SecurityGroupId.1="+group, "SecurityGroupId.2="+other)
	w.want(w.must("DescribeAccountAttributes", "AttributeName.1=vpc-max-security-groups-per-interface"), "accountAttributeSet.attributeValueSet.attributeValue", "1")
	w.must("AuthorizeSecurityGroupIngress", rule(1)...)
	w.must("AuthorizeSecurityGroupIngress", rule(2)...)
	w.fails("RulesPerSecurityGroupLimitExceeded", "AuthorizeSecurityGroupIngress", rule(3)...)

	set(nil) // AWS's own
	for n := 1; n < 5; n++ {
		w.must("CreateVpc", fmt.Sprintf("CidrBlock=10.%d.0.0/16", 10+n))
	}
	w.fails("VpcLimitExceeded", "CreateVpc", "CidrBlock=10.20.0.0/16")
}
