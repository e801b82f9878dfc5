package vpc

import "net/netip"

// MaxGroups is how many security groups an ENI carries at the most, unless the
// account's quota says otherwise (Amazon VPC quotas, "Security groups per
// network interface").
const MaxGroups = 5

// SecurityGroup names a security group.
type SecurityGroup struct {
	ID   SecurityGroupID
	Name string
	VPC  VPCID
}

// SecurityGroupRule is one rule of a group. Of CIDR, PrefixList and Referenced
// one is set.
type SecurityGroupRule struct {
	ID     string // sgr-0123456789abcdef0
	Group  SecurityGroupID
	Egress bool
	// Protocol is the IP protocol's number, -1 for all.
	Protocol int
	// Of TCP and UDP the range of destination ports, both included; of ICMP and
	// ICMPv6 type and code. -1: any.
	FromPort, ToPort int
	CIDR             netip.Prefix
	PrefixList       PrefixListID
	Referenced       SecurityGroupID
}
