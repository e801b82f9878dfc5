package api

import (
	"testing"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func TestModifyRules(t *testing.T) {
	w := newWorld(t)
	vpcID, _ := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	group := w.must("CreateSecurityGroup", "GroupName=g", "GroupDescription=g", "VpcId="+vpcID).get("groupId")
	add := func(port string) string {
		return w.must("AuthorizeSecurityGroupIngress", "GroupId="+group, "IpProtocol=tcp", "FromPort="+port, "ToPort="+port, "CidrIp=10.0.0.0/8",
			"TagSpecification.1.ResourceType=security-group-rule", "TagSpecification.1.Tag.1.Key=k", "TagSpecification.1.Tag.1.Value=v").get("securityGroupRuleSet.securityGroupRuleId")
	}
	one, two := add("80"), add("443")
	change := func(id string, params ...string) []string {
		out := []string{"GroupId=" + group, "SecurityGroupRule.1.SecurityGroupRuleId=" + id}
		for _, p := range params {
			out = append(out, "SecurityGroupRule.1.SecurityGroupRule."+p)
		}
		return out
	}
	w.want(w.must("ModifySecurityGroupRules", change(one, "IpProtocol=udp", "FromPort=53", "ToPort=54", "ReferencedGroupId="+group, "Description=dns")...), "return", "true")
	d := w.must("DescribeSecurityGroupRules", "SecurityGroupRuleId.1="+one)
	const r = "securityGroupRuleSet."
	w.want(d, r+"ipProtocol", "udp")
	w.want(d, r+"toPort", "54")
	w.want(d, r+"cidrIpv4", "")
	w.want(d, r+"referencedGroupInfo.groupId", group)
	w.want(d, r+"description", "dns")
	w.want(d, r+"tagSet.value", "v")
	w.want(d, r+"isEgress", "false")
	w.fails("InvalidPermission.Duplicate", "ModifySecurityGroupRules", change(one, "IpProtocol=tcp", "FromPort=443", "ToPort=443", "CidrIpv4=10.0.0.0/8")...)
	w.fails("InvalidParameterCombination", "ModifySecurityGroupRules", change(one, "IpProtocol=tcp", "FromPort=1", "ToPort=1", "CidrIpv4=10.0.0.0/8", "CidrIpv6=::/0")...)
	w.fails("InvalidPermission.Malformed", "ModifySecurityGroupRules", change(one, "IpProtocol=-1")...)
	w.fails("InvalidSecurityGroupRuleId.NotFound", "ModifySecurityGroupRules", change("sgr-00000000000000000", "IpProtocol=-1", "CidrIpv4=10.0.0.0/8")...)

	w.must("UpdateSecurityGroupRuleDescriptionsIngress", "GroupId="+group, "SecurityGroupRuleDescription.1.SecurityGroupRuleId="+two, "SecurityGroupRuleDescription.1.Description=tls")
	w.want(w.must("DescribeSecurityGroupRules", "SecurityGroupRuleId.1="+two), r+"description", "tls")
	w.fails("InvalidSecurityGroupRuleId.NotFound", "UpdateSecurityGroupRuleDescriptionsEgress", "GroupId="+group, "SecurityGroupRuleDescription.1.SecurityGroupRuleId="+two)
	all := []string{"GroupId=" + group, "IpPermissions.1.IpProtocol=-1", "IpPermissions.1.IpRanges.1.CidrIp=0.0.0.0/0", "IpPermissions.1.IpRanges.1.Description=out"}
	w.must("UpdateSecurityGroupRuleDescriptionsEgress", all...)
	w.want(w.must("DescribeSecurityGroups", "GroupId.1="+group), "securityGroupInfo.ipPermissionsEgress.ipRanges.description", "out")
	w.fails("InvalidPermission.NotFound", "UpdateSecurityGroupRuleDescriptionsIngress", all...)
	w.fails("InvalidParameterValue", "UpdateSecurityGroupRuleDescriptionsEgress", "GroupId="+group, "IpPermissions.1.IpProtocol=-1",
		"IpPermissions.1.IpRanges.1.CidrIp=0.0.0.0/0", "IpPermissions.1.IpRanges.1.Description=<out>")

	d = w.must("GetSecurityGroupsForVpc", "VpcId="+vpcID, "Filter.1.Name=group-name", "Filter.1.Value.1=g")
	w.want(d, "securityGroupForVpcSet.groupId", group)
	w.want(d, "securityGroupForVpcSet.primaryVpcId", vpcID)
}

// A rule may name a group of a peered VPC. When the peering or the group goes,
// the rule stays, matches nothing, and can be taken back.
func TestRulesAcrossPeering(t *testing.T) {
	w := newWorld(t)
	one, _ := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	two, _ := w.vpc("10.1.0.0/16", "10.1.0.0/24")
	mine := w.must("CreateSecurityGroup", "GroupName=mine", "GroupDescription=g", "VpcId="+one).get("groupId")
	theirs := w.must("CreateSecurityGroup", "GroupName=theirs", "GroupDescription=g", "VpcId="+two).get("groupId")
	rule := []string{"GroupId=" + mine, "IpPermissions.1.IpProtocol=tcp", "IpPermissions.1.FromPort=80", "IpPermissions.1.ToPort=80", "IpPermissions.1.Groups.1.GroupId=" + theirs}
	w.fails("InvalidGroup.NotFound", "AuthorizeSecurityGroupIngress", rule...)
	const pcx = vpc.PeeringID("pcx-00000000000000001")
	peer := func(status store.PeeringStatus) {
		t.Helper()
		if err := w.store.Update(func(tx *store.Tx) error {
			tx.PutPeering(&store.Peering{ID: pcx, Status: status, Requester: store.PeeringSide{VPC: vpc.VPCID(one)}, Accepter: store.PeeringSide{VPC: vpc.VPCID(two)}})
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	peer(store.PeeringActive)
	d := w.must("AuthorizeSecurityGroupIngress", rule...)
	w.want(d, "securityGroupRuleSet.referencedGroupInfo.vpcId", two)
	w.want(d, "securityGroupRuleSet.referencedGroupInfo.vpcPeeringConnectionId", string(pcx))
	w.fails("InvalidPermission.Duplicate", "AuthorizeSecurityGroupIngress", append(rule, "IpPermissions.1.Groups.1.VpcPeeringConnectionId="+string(pcx))...)
	d = w.must("DescribeSecurityGroupReferences", "GroupId.1="+theirs)
	w.want(d, "securityGroupReferenceSet.referencingVpcId", one)
	w.want(d, "securityGroupReferenceSet.vpcPeeringConnectionId", string(pcx))
	w.want(w.must("DescribeStaleSecurityGroups", "VpcId="+one), "staleSecurityGroupSet.groupId", "")

	peer(store.PeeringDeleted)
	d = w.must("DescribeStaleSecurityGroups", "VpcId="+one)
	w.want(d, "staleSecurityGroupSet.groupId", mine)
	w.want(d, "staleSecurityGroupSet.staleIpPermissions.groups.groupId", theirs)
	w.want(d, "staleSecurityGroupSet.staleIpPermissions.groups.peeringStatus", "deleted")
	w.must("RevokeSecurityGroupIngress", rule...)
	peer(store.PeeringActive)
	w.must("AuthorizeSecurityGroupIngress", rule...)
	w.must("DeleteSecurityGroup", "GroupId="+theirs)
	w.want(w.must("DescribeStaleSecurityGroups", "VpcId="+one), "staleSecurityGroupSet.staleIpPermissions.fromPort", "80")
	w.must("RevokeSecurityGroupIngress", rule...)
	w.want(w.must("DescribeStaleSecurityGroups", "VpcId="+one), "staleSecurityGroupSet.groupId", "")
}
