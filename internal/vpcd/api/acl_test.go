package api

import (
	"strconv"
	"testing"

	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
)

func TestNetworkACLs(t *testing.T) {
	w := newWorld(t)
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	const s = "networkAclSet."
	d := w.must("DescribeNetworkAcls", "Filter.1.Name=association.subnet-id", "Filter.1.Value.1="+subnet)
	w.want(d, s+"default", "true")
	w.want(d, s+"vpcId", vpcID)
	w.want(d, s+"entrySet.egress", "true,true,false,false")
	w.want(d, s+"entrySet.ruleNumber", "100,32767,100,32767")
	w.want(d, s+"entrySet.ruleAction", "allow,deny,allow,deny")
	w.want(d, s+"entrySet.protocol", "-1,-1,-1,-1")
	first := d.get(s + "networkAclId")
	assoc := d.get(s + "associationSet.networkAclAssociationId")
	w.fails("InvalidParameterValue", "DeleteNetworkAcl", "NetworkAclId="+first)

	made := w.must("CreateNetworkAcl", "VpcId="+vpcID, "ClientToken=tok", "TagSpecification.1.ResourceType=network-acl", "TagSpecification.1.Tag.1.Key=k", "TagSpecification.1.Tag.1.Value=v")
	own := made.get("networkAcl.networkAclId")
	w.want(made, "networkAcl.entrySet.ruleAction", "deny,deny")
	w.want(made, "networkAcl.default", "false")
	w.want(made, "networkAcl.tagSet.value", "v")
	w.want(made, "clientToken", "tok")
	w.fails("IdempotentParameterMismatch", "CreateNetworkAcl", "VpcId="+vpcID, "ClientToken=tok")
	w.want(w.must("CreateNetworkAcl", "VpcId="+vpcID, "ClientToken=tok", "TagSpecification.1.ResourceType=network-acl", "TagSpecification.1.Tag.1.Key=k", "TagSpecification.1.Tag.1.Value=v"),
		"networkAcl.networkAclId", own)

	entry := func(number int, params ...string) []string {
		return append([]string{"NetworkAclId=" + own, "RuleNumber=" + strconv.Itoa(number), "RuleAction=allow", "Egress=false"}, params...)
	}
	tcp := []string{"Protocol=tcp", "CidrBlock=10.1.2.3/16", "PortRange.From=80", "PortRange.To=443"}
	w.must("CreateNetworkAclEntry", entry(200, tcp...)...)
	w.must("CreateNetworkAclEntry", entry(100, "Protocol=1", "CidrBlock=0.0.0.0/0", "Icmp.Type=8", "Icmp.Code=-1")...)
	w.must("CreateNetworkAclEntry", entry(150, "Protocol=47", "Ipv6CidrBlock=2001:db8::/32")...)
	w.must("CreateNetworkAclEntry", "NetworkAclId="+own, "RuleNumber=100", "RuleAction=deny", "Egress=true", "Protocol=-1", "CidrBlock=0.0.0.0/0", "PortRange.From=7", "PortRange.To=7")
	w.fails("NetworkAclEntryAlreadyExists", "CreateNetworkAclEntry", entry(200, tcp...)...)
	for name, params := range map[string][]string{
		"InvalidParameterValue":       {"Protocol=tcp", "CidrBlock=10.0.0.0/8", "PortRange.From=9", "PortRange.To=8"},
		"MissingParameter":            {"Protocol=6", "CidrBlock=10.0.0.0/8"},
		"InvalidParameterCombination": {"Protocol=-1", "CidrBlock=10.0.0.0/8", "Ipv6CidrBlock=::/0"},
	} {
		w.fails(name, "CreateNetworkAclEntry", entry(300, params...)...)
	}
	w.fails("MissingParameter", "CreateNetworkAclEntry", entry(300, "Protocol=icmp", "CidrBlock=10.0.0.0/8")...)
	w.fails("MissingParameter", "CreateNetworkAclEntry", entry(300, "Protocol=-1")...)
	w.fails("InvalidParameterValue", "CreateNetworkAclEntry", entry(300, "Protocol=ipip", "CidrBlock=10.0.0.0/8")...)
	w.fails("InvalidParameterValue", "CreateNetworkAclEntry", entry(32767, "Protocol=-1", "CidrBlock=10.0.0.0/8")...)
	w.fails("InvalidParameterValue", "CreateNetworkAclEntry", entry(0, "Protocol=-1", "CidrBlock=10.0.0.0/8")...)
	w.fails("InvalidNetworkAclEntry.NotFound", "ReplaceNetworkAclEntry", entry(99, tcp...)...)
	w.must("ReplaceNetworkAclEntry", entry(200, "Protocol=17", "CidrBlock=10.1.0.0/16", "PortRange.From=-1", "PortRange.To=-1")...)
	d = w.must("DescribeNetworkAcls", "NetworkAclId.1="+own)
	w.want(d, s+"entrySet.ruleNumber", "100,32767,100,150,200,32767") // egress first, by number
	w.want(d, s+"entrySet.protocol", "-1,-1,1,47,17,-1")
	w.want(d, s+"entrySet.cidrBlock", "0.0.0.0/0,0.0.0.0/0,0.0.0.0/0,10.1.0.0/16,0.0.0.0/0")
	w.want(d, s+"entrySet.ipv6CidrBlock", "2001:db8::/32")
	w.want(d, s+"entrySet.portRange.to", "65535")
	w.want(d, s+"entrySet.icmpTypeCode.type", "8")
	for f, v := range map[string]string{"entry.protocol": "udp", "entry.icmp.type": "8", "entry.port-range.to": "65535", "entry.ipv6-cidr": "2001:db8::/32", "tag:k": "v", "entry.rule-number": "150"} {
		w.want(w.must("DescribeNetworkAcls", "Filter.1.Name="+f, "Filter.1.Value.1="+v), s+"networkAclId", own)
	}
	w.must("DeleteNetworkAclEntry", "NetworkAclId="+own, "RuleNumber=100", "Egress=false")
	w.fails("InvalidNetworkAclEntry.NotFound", "DeleteNetworkAclEntry", "NetworkAclId="+own, "RuleNumber=100", "Egress=false")

	moved := w.must("ReplaceNetworkAclAssociation", "AssociationId="+assoc, "NetworkAclId="+own).get("newAssociationId")
	w.want(w.must("ReplaceNetworkAclAssociation", "AssociationId="+moved, "NetworkAclId="+own), "newAssociationId", moved)
	w.fails("InvalidAssociationID.NotFound", "ReplaceNetworkAclAssociation", "AssociationId="+assoc, "NetworkAclId="+first)
	w.fails("DependencyViolation", "DeleteNetworkAcl", "NetworkAclId="+own)
	other, _ := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	foreign := w.must("DescribeNetworkAcls", "Filter.1.Name=vpc-id", "Filter.1.Value.1="+other).get(s + "networkAclId")
	w.fails("InvalidParameterValue", "ReplaceNetworkAclAssociation", "AssociationId="+moved, "NetworkAclId="+foreign)
	w.restart()
	w.want(w.must("DescribeNetworkAcls", "Filter.1.Name=association.association-id", "Filter.1.Value.1="+moved), s+"networkAclId", own)

	w.must("DeleteSubnet", "SubnetId="+subnet)
	w.fails("DependencyViolation", "DeleteVpc", "VpcId="+vpcID)
	w.must("DeleteNetworkAcl", "NetworkAclId="+own)
	w.fails("InvalidNetworkAclID.NotFound", "DescribeNetworkAcls", "NetworkAclId.1="+own)
	w.must("DeleteVpc", "VpcId="+vpcID)
	w.fails("InvalidNetworkAclID.NotFound", "DescribeNetworkAcls", "NetworkAclId.1="+first)
}

func TestNetworkACLQuotas(t *testing.T) {
	w := newWorld(t)
	if err := w.chaos.Set(chaos.Settings{Throttle: "off", Quotas: map[chaos.Quota]int{chaos.QuotaACLs: 2, chaos.QuotaACLRules: 1}}); err != nil {
		t.Fatal(err)
	}
	vpcID, _ := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	own := w.must("CreateNetworkAcl", "VpcId="+vpcID).get("networkAcl.networkAclId")
	w.fails("NetworkAclLimitExceeded", "CreateNetworkAcl", "VpcId="+vpcID)
	entry := func(number, egress, cidr string) []string {
		return []string{"NetworkAclId=" + own, "RuleNumber=" + number, "RuleAction=allow", "Egress=" + egress, "Protocol=-1", cidr}
	}
	w.must("CreateNetworkAclEntry", entry("1", "false", "CidrBlock=10.0.0.0/8")...)
	w.fails("NetworkAclEntryLimitExceeded", "CreateNetworkAclEntry", entry("2", "false", "CidrBlock=10.0.0.0/8")...)
	w.must("CreateNetworkAclEntry", entry("2", "false", "Ipv6CidrBlock=::/0")...) // each family and direction has its own
	w.must("CreateNetworkAclEntry", entry("2", "true", "CidrBlock=10.0.0.0/8")...)
	w.fails("NetworkAclEntryLimitExceeded", "ReplaceNetworkAclEntry", entry("1", "false", "Ipv6CidrBlock=2001:db8::/32")...)
	w.must("ReplaceNetworkAclEntry", entry("2", "false", "Ipv6CidrBlock=2001:db8::/32")...)
}
