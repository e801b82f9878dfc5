package store

import (
	"net/netip"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// RouteTable is a route table. The routes to the VPC's own blocks are not
// stored unless their target was replaced: RoutesOf makes them.
type RouteTable struct {
	ID           vpc.RouteTableID
	VPC          vpc.VPCID
	Associations []RouteAssociation // in the order of creation
	Routes       []Route            // in the order of creation
	ClientToken  string
	Created      time.Time
}

// RouteAssociation ties a route table to what uses it: to the subnets of the VPC
// that are tied to none (Main), to one subnet, or to what comes in by a gateway
// (an edge association).
type RouteAssociation struct {
	ID      string // rtbassoc-…
	Main    bool
	Subnet  vpc.SubnetID
	Gateway vpc.GatewayID
}

// Main returns the association that makes the table its VPC's main one, or nil.
func (t *RouteTable) Main() *RouteAssociation {
	for i := range t.Associations {
		if t.Associations[i].Main {
			return &t.Associations[i]
		}
	}
	return nil
}

// Route is one route. One of CIDR and PrefixList is set.
type Route struct {
	CIDR       netip.Prefix // of IPv4 or IPv6
	PrefixList vpc.PrefixListID
	Target     Target
	Made       bool // by CreateRoute; else it came with the table
}

// SameDestination reports whether two routes are to the same destination, which
// no two routes of a table are.
func (r Route) SameDestination(o Route) bool {
	return r.CIDR == o.CIDR && r.PrefixList == o.PrefixList
}

// Target is where a route leads: one of its fields is set.
type Target struct {
	Local   bool             // within the VPC
	Gateway vpc.GatewayID    // an internet gateway
	NAT     vpc.NATGatewayID // a NAT gateway
	ENI     vpc.ENIID        // an interface: the packets go to its MAC
	Peering vpc.PeeringID
	// EgressOnly is an egress-only internet gateway, of a route of IPv6.
	EgressOnly vpc.EgressOnlyID `json:",omitempty"`
}

// LastRule is the number of the entry that each network ACL ends with and that
// denies all. It is not stored.
const LastRule = 32767

// LastRuleIPv6 is that of the entry that denies all of IPv6, which a network ACL
// of a VPC with an IPv6 block has.
const LastRuleIPv6 = 32768

// NetworkACL is a network ACL. Each subnet is tied to exactly one.
type NetworkACL struct {
	ID           vpc.NetworkACLID
	VPC          vpc.VPCID
	Default      bool // the one that came with the VPC
	Associations []ACLAssociation
	Entries      []ACLEntry // by direction, ingress first, and number
	ClientToken  string
	Created      time.Time
}

// ACLAssociation ties a network ACL to a subnet.
type ACLAssociation struct {
	ID     string // aclassoc-…
	Subnet vpc.SubnetID
}

// ACLEntry is one entry of a network ACL. The lowest number that matches wins.
type ACLEntry struct {
	Number   int // 1..32766
	Egress   bool
	Protocol int // IANA number; -1: all
	Allow    bool
	CIDR     netip.Prefix // of the remote side, IPv4 or IPv6
	From, To int          // destination ports of TCP and UDP
	ICMPType int          // of ICMP and ICMPv6; -1: all
	ICMPCode int          // -1: all
}

// PrefixList is a customer-managed prefix list. The newest version is the one
// in force.
type PrefixList struct {
	ID            vpc.PrefixListID
	Name          string
	V6            bool
	MaxEntries    int // what a reference to it counts for
	Versions      []PrefixListVersion
	LatestVersion int64  // number of the last of Versions; 1 is the first there ever was
	State         string // create-complete, modify-complete or modify-failed
	StateMessage  string
	ClientToken   string
	Created       time.Time
}

// PrefixListVersion is what a prefix list held from one change to the next.
type PrefixListVersion struct {
	Entries []PrefixListEntry // by prefix
}

// PrefixListEntry is one prefix of a list.
type PrefixListEntry struct {
	CIDR        netip.Prefix
	Description string
}

// Entries returns what is in force.
func (p *PrefixList) Entries() []PrefixListEntry { return p.Versions[len(p.Versions)-1].Entries }

// Version returns what a version held, and false when it is not kept.
func (p *PrefixList) Version(n int64) ([]PrefixListEntry, bool) {
	i := int64(len(p.Versions)) - 1 - (p.LatestVersion - n)
	if i < 0 || n > p.LatestVersion {
		return nil, false
	}
	return p.Versions[i].Entries, true
}

// DHCPOptions is a set of DHCP options.
type DHCPOptions struct {
	ID      string // dopt-…
	Default bool   // what the region gives: Options is empty then
	Options []DHCPOption
	Created time.Time
}

// DHCPOption is one option of a set.
type DHCPOption struct {
	Key    string // domain-name, domain-name-servers, ntp-servers, …
	Values []string
}

// NoDHCPOptions is what VPC.DHCPOptions holds for a VPC without options.
const NoDHCPOptions = "default"

// FlowLog is a subscription to the flow records of an interface, or of all
// those of a subnet or VPC, those that come later too.
type FlowLog struct {
	ID              string // fl-…
	Resource        string // vpc-…, subnet-… or eni-…
	Traffic         string // ACCEPT, REJECT or ALL
	DestinationType string // s3
	Destination     string // arn:aws:s3:::bucket/folder/
	Format          string // ${version} ${account-id} …
	Interval        int    // MaxAggregationInterval, seconds
	FileFormat      string // plain-text or parquet
	HivePartitions  bool
	HourPartitions  bool
	ClientToken     string
	Created         time.Time
}
