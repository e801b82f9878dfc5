package api

import "testing"

// A group is usable in the VPCs that it is associated with, until nothing there
// uses it any more.
func TestGroupsOfSeveralVPCs(t *testing.T) {
	w := newWorld(t)
	one, _ := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	two, subnet := w.vpc("10.1.0.0/16", "10.1.0.0/24")
	three, _ := w.vpc("10.2.0.0/16", "10.2.0.0/24")
	group := func(vpcID, name string) string {
		return w.must("CreateSecurityGroup", "GroupName="+name, "GroupDescription=x", "VpcId="+vpcID).get("groupId")
	}
	g := group(one, "shared")
	own := w.must("DescribeSecurityGroups", "Filter.1.Name=vpc-id", "Filter.1.Value.1="+one, "Filter.2.Name=group-name", "Filter.2.Value.1=default").get("securityGroupInfo.groupId")
	in := func(id, vpcID string) []string { return []string{"GroupId=" + id, "VpcId=" + vpcID} }
	w.fails("InvalidGroup.NotFound", "CreateNetworkInterface", "SubnetId="+subnet, "SecurityGroupId.1="+g)
	w.fails("OperationNotPermitted", "AssociateSecurityGroupVpc", in(own, two)...)
	w.fails("InvalidParameterValue", "AssociateSecurityGroupVpc", in(g, one)...)
	w.fails("InvalidParameterValue", "DisassociateSecurityGroupVpc", in(g, two)...)
	w.fails("InvalidVpcID.NotFound", "AssociateSecurityGroupVpc", in(g, "vpc-00000000000000000")...)
	for range 2 {
		w.want(w.must("AssociateSecurityGroupVpc", in(g, two)...), "state", "associated")
	}
	w.must("AssociateSecurityGroupVpc", in(g, three)...)
	w.restart()

	const s = "securityGroupVpcAssociationSet."
	d := w.must("DescribeSecurityGroupVpcAssociations", "Filter.1.Name=vpc-id", "Filter.1.Value.1="+two, "Filter.2.Name=state", "Filter.2.Value.1=associated")
	w.want(d, s+"groupId", g)
	w.want(d, s+"vpcId", two)
	w.want(d, s+"state", "associated")
	if n := len(w.must("DescribeSecurityGroupVpcAssociations", "MaxResults=5").at("securityGroupVpcAssociationSet")); n != 2 {
		t.Errorf("%d associations, want 2", n)
	}
	w.want(w.must("GetSecurityGroupsForVpc", "VpcId="+two, "Filter.1.Name=group-name", "Filter.1.Value.1=shared"), "securityGroupForVpcSet.primaryVpcId", one)

	eni := w.eni(subnet, "SecurityGroupId.1="+g)
	w.want(w.must("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+eni), "networkInterfaceSet.groupSet.groupName", "shared")
	other := group(two, "other")
	rule := []string{"GroupId=" + other, "IpPermissions.1.IpProtocol=tcp", "IpPermissions.1.FromPort=80", "IpPermissions.1.ToPort=80", "IpPermissions.1.Groups.1.GroupId=" + g}
	w.must("AuthorizeSecurityGroupIngress", rule...)
	w.fails("DependencyViolation", "DisassociateSecurityGroupVpc", in(g, two)...)
	w.must("ModifyNetworkInterfaceAttribute", "NetworkInterfaceId="+eni, "SecurityGroupId.1="+other)
	w.fails("DependencyViolation", "DisassociateSecurityGroupVpc", in(g, two)...)
	w.must("RevokeSecurityGroupIngress", rule...)
	w.fails("DependencyViolation", "DeleteSecurityGroup", "GroupId="+g)
	w.want(w.must("DisassociateSecurityGroupVpc", in(g, two)...), "state", "disassociated")
	w.fails("InvalidGroup.NotFound", "ModifyNetworkInterfaceAttribute", "NetworkInterfaceId="+eni, "SecurityGroupId.1="+g)

	// An association goes with its VPC.
	w.must("DeleteSubnet", "SubnetId="+w.must("DescribeSubnets", "Filter.1.Name=vpc-id", "Filter.1.Value.1="+three).get("subnetSet.subnetId"))
	w.must("DeleteVpc", "VpcId="+three)
	w.want(w.must("DescribeSecurityGroupVpcAssociations"), s+"groupId", "")
	w.must("DeleteSecurityGroup", "GroupId="+g)
}

func TestReset(t *testing.T) {
	w := newWorld(t)
	_, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	e := w.eni(subnet)
	w.must("ModifyNetworkInterfaceAttribute", "NetworkInterfaceId="+e, "SourceDestCheck.Value=false")
	w.fails("InvalidParameterCombination", "ResetNetworkInterfaceAttribute", "NetworkInterfaceId="+e)
	w.must("ResetNetworkInterfaceAttribute", "NetworkInterfaceId="+e, "SourceDestCheck=")
	w.want(w.must("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+e), "networkInterfaceSet.sourceDestCheck", "true")
	w.want(w.must("DescribeVpcBlockPublicAccessOptions"), "vpcBlockPublicAccessOptions.internetGatewayBlockMode", "off")
}
