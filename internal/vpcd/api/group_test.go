package api

import (
	"fmt"
	"strings"
	"testing"
)

func TestGroupRules(t *testing.T) {
	w := newWorld(t)
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	made := w.must("CreateSecurityGroup", "GroupName=web", "GroupDescription=front end", "VpcId="+vpcID,
		"TagSpecification.1.ResourceType=security-group", "TagSpecification.1.Tag.1.Key=a", "TagSpecification.1.Tag.1.Value=b")
	web := made.get("groupId")
	w.want(made, "tagSet.value", "b")
	db := w.must("CreateSecurityGroup", "GroupName=db", "GroupDescription=data", "VpcId="+vpcID).get("groupId")
	d := w.must("DescribeSecurityGroups", "GroupId.1="+web)
	w.want(d, "securityGroupInfo.ipPermissions.ipProtocol", "")
	w.want(d, "securityGroupInfo.ipPermissionsEgress.ipRanges.cidrIp", "0.0.0.0/0")

	n := w.must("AuthorizeSecurityGroupIngress", "GroupId="+web,
		"IpPermissions.1.IpProtocol=tcp", "IpPermissions.1.FromPort=80", "IpPermissions.1.ToPort=80",
		"IpPermissions.1.IpRanges.1.CidrIp=10.0.7.9/16", "IpPermissions.1.IpRanges.1.Description=inside", "IpPermissions.1.Ipv6Ranges.1.CidrIpv6=::/0",
		"IpPermissions.2.IpProtocol=icmp", "IpPermissions.2.FromPort=8", "IpPermissions.2.ToPort=-1", "IpPermissions.2.IpRanges.1.CidrIp=0.0.0.0/0",
		"IpPermissions.3.IpProtocol=6", "IpPermissions.3.FromPort=80", "IpPermissions.3.ToPort=80", "IpPermissions.3.Groups.1.GroupId="+db,
		"TagSpecification.1.ResourceType=security-group-rule", "TagSpecification.1.Tag.1.Key=r", "TagSpecification.1.Tag.1.Value=s")
	w.want(n, "securityGroupRuleSet.ipProtocol", "tcp,tcp,icmp,tcp")
	w.want(n, "securityGroupRuleSet.cidrIpv4", "10.0.0.0/16,0.0.0.0/0")
	w.want(n, "securityGroupRuleSet.referencedGroupInfo.groupId", db)
	d = w.must("DescribeSecurityGroups", "GroupId.1="+web)
	w.want(d, "securityGroupInfo.ipPermissions.ipProtocol", "tcp,icmp") // one entry per protocol and ports
	w.want(d, "securityGroupInfo.ipPermissions.groups.groupId", db)
	w.want(d, "securityGroupInfo.ipPermissions.ipRanges.description", "inside")
	for f, v := range map[string]string{"ip-permission.cidr": "10.0.0.0/16", "ip-permission.group-id": db, "ip-permission.from-port": "80", "ip-permission.protocol": "icmp", "group-name": "web", "ip-permission.group-name": "db"} {
		w.want(w.must("DescribeSecurityGroups", "Filter.1.Name="+f, "Filter.1.Value.1="+v), "securityGroupInfo.groupId", web)
	}
	rules := strings.Split(n.get("securityGroupRuleSet.securityGroupRuleId"), ",")
	w.want(w.must("DescribeSecurityGroupRules", "SecurityGroupRuleId.1="+rules[2]), "securityGroupRuleSet.ipProtocol", "icmp")
	all := w.must("DescribeSecurityGroupRules", "Filter.1.Name=group-id", "Filter.1.Value.1="+web)
	if k := len(all.at("securityGroupRuleSet")); k != 5 {
		t.Errorf("%d rules, want 5", k)
	}
	w.want(w.must("DescribeSecurityGroupRules", "Filter.1.Name=tag:r", "Filter.1.Value.1=s", "SecurityGroupRuleId.1="+rules[0]), "securityGroupRuleSet.tagSet.key", "r")

	w.fails("InvalidPermission.Duplicate", "AuthorizeSecurityGroupIngress", "GroupId="+web, "IpProtocol=tcp", "FromPort=80", "ToPort=80", "CidrIp=10.0.0.0/16")
	w.fails("DependencyViolation", "DeleteSecurityGroup", "GroupId="+db)
	gone := w.must("RevokeSecurityGroupIngress", "GroupId="+web, "IpProtocol=tcp", "FromPort=80", "ToPort=80", "CidrIp=10.0.0.0/16")
	w.want(gone, "revokedSecurityGroupRuleSet.securityGroupRuleId", rules[0])
	w.must("RevokeSecurityGroupIngress", "GroupId="+web, "SecurityGroupRuleId.1="+rules[3])
	w.fails("InvalidPermission.NotFound", "RevokeSecurityGroupIngress", "GroupId="+web, "IpProtocol=tcp", "FromPort=80", "ToPort=80", "CidrIp=10.0.0.0/16")
	w.fails("InvalidSecurityGroupRuleId.NotFound", "RevokeSecurityGroupEgress", "GroupId="+web, "SecurityGroupRuleId.1="+rules[2]) // of the other direction
	w.must("RevokeSecurityGroupEgress", "GroupId="+web, "IpPermissions.1.IpProtocol=-1", "IpPermissions.1.IpRanges.1.CidrIp=0.0.0.0/0")
	w.must("AuthorizeSecurityGroupEgress", "GroupId="+web, "IpPermissions.1.IpProtocol=udp", "IpPermissions.1.FromPort=53", "IpPermissions.1.ToPort=53", "IpPermissions.1.IpRanges.1.CidrIp=0.0.0.0/0")
	w.want(w.must("DescribeSecurityGroups", "GroupId.1="+web), "securityGroupInfo.ipPermissionsEgress.ipProtocol", "udp")
	w.must("DeleteSecurityGroup", "GroupId="+db)

	e := w.eni(subnet, "SecurityGroupId.1="+web)
	w.fails("DependencyViolation", "DeleteSecurityGroup", "GroupId="+web)
	w.must("DeleteNetworkInterface", "NetworkInterfaceId="+e)
	w.want(w.must("DeleteSecurityGroup", "GroupId="+web), "return", "true")
	w.want(w.must("DescribeTags"), "tagSet.key", "") // those of its rules went as well
}

func TestGroupErrors(t *testing.T) {
	w := newWorld(t)
	vpcID, _ := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	other := w.must("CreateVpc", "CidrBlock=10.0.0.0/16").get("vpc.vpcId")
	foreign := w.must("CreateSecurityGroup", "GroupName=g", "GroupDescription=d", "VpcId="+other).get("groupId")
	g := w.must("CreateSecurityGroup", "GroupName=g", "GroupDescription=d", "VpcId="+vpcID).get("groupId")
	def := w.must("DescribeSecurityGroups", "Filter.1.Name=vpc-id", "Filter.1.Value.1="+vpcID, "Filter.2.Name=group-name", "Filter.2.Value.1=default").get("securityGroupInfo.groupId")
	perm := func(params ...string) []string {
		out := []string{"GroupId=" + g}
		for _, p := range params {
			out = append(out, "IpPermissions.1."+p)
		}
		return out
	}
	anyone := "IpRanges.1.CidrIp=0.0.0.0/0"
	for _, c := range []struct {
		code, action string
		params       []string
	}{
		{"InvalidGroup.Duplicate", "CreateSecurityGroup", []string{"GroupName=g", "GroupDescription=d", "VpcId=" + vpcID}},
		{"InvalidGroup.Reserved", "CreateSecurityGroup", []string{"GroupName=default", "GroupDescription=d", "VpcId=" + vpcID}},
		{"InvalidParameterValue", "CreateSecurityGroup", []string{"GroupName=sg-x", "GroupDescription=d", "VpcId=" + vpcID}},
		{"InvalidParameterValue", "CreateSecurityGroup", []string{"GroupName=x", "GroupDescription=<d>", "VpcId=" + vpcID}},
		{"VPCIdNotSpecified", "CreateSecurityGroup", []string{"GroupName=x", "GroupDescription=d"}},
		{"CannotDelete", "DeleteSecurityGroup", []string{"GroupId=" + def}},
		{"InvalidGroup.NotFound", "DeleteSecurityGroup", []string{"GroupId=sg-00000000000000000"}},
		{"InvalidGroupId.Malformed", "DescribeSecurityGroups", []string{"GroupId.1=web"}},
		{"UnsupportedOperation", "DescribeSecurityGroups", []string{"GroupName.1=web"}},
		{"MissingParameter", "AuthorizeSecurityGroupIngress", []string{"GroupId=" + g}},
		{"InvalidPermission.Malformed", "AuthorizeSecurityGroupIngress", perm("IpProtocol=tcp", "FromPort=1", "ToPort=2")},
		{"InvalidParameterValue", "AuthorizeSecurityGroupIngress", perm("IpProtocol=tcp", "FromPort=2", "ToPort=1", anyone)},
		{"InvalidParameterValue", "AuthorizeSecurityGroupIngress", perm("IpProtocol=tcp", anyone)},
		{"InvalidParameterValue", "AuthorizeSecurityGroupIngress", perm("IpProtocol=tcp", "FromPort=0", "ToPort=65536", anyone)},
		{"InvalidParameterValue", "AuthorizeSecurityGroupIngress", perm("IpProtocol=icmp", "FromPort=256", "ToPort=0", anyone)},
		{"InvalidParameterValue", "AuthorizeSecurityGroupIngress", perm("IpProtocol=xyz", anyone)},
		{"InvalidParameterValue", "AuthorizeSecurityGroupIngress", perm("IpProtocol=-1", "IpRanges.1.CidrIp=10.0.0.0/33")},
		{"InvalidParameterValue", "AuthorizeSecurityGroupIngress", perm("IpProtocol=-1", anyone, "IpRanges.2.CidrIp=0.0.0.0/0")},
		{"InvalidGroup.NotFound", "AuthorizeSecurityGroupIngress", perm("IpProtocol=-1", "Groups.1.GroupId="+foreign)},
		{"InvalidPrefixListId.Malformed", "AuthorizeSecurityGroupIngress", perm("IpProtocol=-1", "PrefixListIds.1.PrefixListId=pl-1")},
		{"InvalidParameterCombination", "AuthorizeSecurityGroupIngress", append(perm("IpProtocol=-1", anyone), "IpProtocol=tcp", "FromPort=1", "ToPort=1", "CidrIp=0.0.0.0/0")},
		{"InvalidParameterCombination", "RevokeSecurityGroupIngress", []string{"GroupId=" + g}},
		{"InvalidSecurityGroupRuleId.NotFound", "DescribeSecurityGroupRules", []string{"SecurityGroupRuleId.1=sgr-00000000000000000"}},
	} {
		w.fails(c.code, c.action, c.params...)
	}
	var many []string
	for i := range 60 {
		many = append(many, fmt.Sprintf("IpRanges.%d.CidrIp=10.%d.0.0/16", i+1, i))
	}
	w.must("AuthorizeSecurityGroupIngress", perm(append(many, "IpProtocol=-1")...)...)
	w.must("AuthorizeSecurityGroupIngress", perm("IpProtocol=-1", "Ipv6Ranges.1.CidrIpv6=::/0")...) // the other family
	w.fails("RulesPerSecurityGroupLimitExceeded", "AuthorizeSecurityGroupIngress", perm("IpProtocol=-1", anyone)...)
}
