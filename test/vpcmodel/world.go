package vpcmodel

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// Names of objects; in a script any word does.
type (
	ListID    string // a managed prefix list
	ACLID     string
	TableID   string // a route table
	PeeringID string
)

// MTU within a VPC and over a peering of one region: "Same-region MTU 9001".
const MTU = 9001

// World is all that decides about packets.
type World struct {
	Settings Settings
	Now      time.Duration // since the world began

	VPCs     map[vpc.VPCID]*VPC
	Subnets  map[vpc.SubnetID]*Subnet
	ENIs     map[vpc.ENIID]*ENI
	Groups   map[vpc.SecurityGroupID]*Group
	Lists    map[ListID][]netip.Prefix
	ACLs     map[ACLID]*ACL
	Tables   map[TableID]*Table
	Peerings map[PeeringID]*Peering
	Gateways map[GatewayID]*Gateway
	Elastics map[ElasticID]*Elastic
	NATs     map[NATID]*NAT

	noted     []Record // of the packet that is on its way
	tracksAll bool     // it comes from a NAT gateway

	peeked map[*ENI][]*flow // during Peek: flows as they were, of interfaces that it has come to
}

// NewWorld returns an empty world.
func NewWorld(s Settings) *World {
	return &World{
		Settings: s,
		VPCs:     map[vpc.VPCID]*VPC{}, Subnets: map[vpc.SubnetID]*Subnet{}, ENIs: map[vpc.ENIID]*ENI{},
		Groups: map[vpc.SecurityGroupID]*Group{}, Lists: map[ListID][]netip.Prefix{},
		ACLs: map[ACLID]*ACL{}, Tables: map[TableID]*Table{}, Peerings: map[PeeringID]*Peering{},
		Gateways: map[GatewayID]*Gateway{}, Elastics: map[ElasticID]*Elastic{}, NATs: map[NATID]*NAT{},
	}
}

// VPC is a VPC with its CIDR blocks, for each of which every route table has a
// local route.
type VPC struct {
	ID         vpc.VPCID
	CIDRs      []netip.Prefix // the first is of IPv4; those of IPv6 are /56
	DefaultACL ACLID          // "" if no statement has named it; it then allows all
}

// Contains reports whether a lies in one of the VPC's CIDR blocks.
func (v *VPC) Contains(a netip.Addr) bool {
	return slices.ContainsFunc(v.CIDRs, func(p netip.Prefix) bool { return p.Contains(a) })
}

// hasIPv6 reports whether the VPC has a block of IPv6.
func (v *VPC) hasIPv6() bool {
	return slices.ContainsFunc(v.CIDRs, func(p netip.Prefix) bool { return p.Addr().Is6() })
}

// Subnet is a subnet; it "has exactly one" ACL.
type Subnet struct {
	ID    vpc.SubnetID
	VPC   vpc.VPCID
	CIDR  netip.Prefix
	CIDR6 netip.Prefix // a /64, or invalid
	ACL   ACLID        // "" is the VPC's default ACL
	Table TableID      // "" is the VPC's main table as it was made: local routes alone
}

// Contains reports whether a lies in one of the subnet's CIDR blocks.
func (s *Subnet) Contains(a netip.Addr) bool { return s.CIDR.Contains(a) || s.CIDR6.Contains(a) }

// ENI is an interface. One that is not Attached holds its addresses but sends and
// receives nothing.
type ENI struct {
	ID       vpc.ENIID
	Subnet   vpc.SubnetID
	Instance vpc.InstanceID
	Attached bool
	Primary  netip.Addr     // of IPv4
	Others   []netip.Prefix // secondary addresses as /32, delegated prefixes as /28; IPv6 as /128 and /80
	Groups   []vpc.SecurityGroupID
	NoCheck  bool // source/destination check off
	Timeouts Timeouts

	flows []*flow
}

// holds reports whether a is one of the ENI's addresses; those within its
// prefixes count if prefixes is set.
func (e *ENI) holds(a netip.Addr, prefixes bool) bool {
	return a == e.Primary || slices.ContainsFunc(e.Others, func(p netip.Prefix) bool {
		return (prefixes || p.IsSingleIP()) && p.Contains(a)
	})
}

// Direction of a packet as the ENI or the subnet sees it.
type Direction bool

// The two directions.
const (
	In  Direction = false
	Out Direction = true
)

func (d Direction) String() string {
	if d == Out {
		return "out"
	}
	return "in"
}

// Group is a security group.
type Group struct {
	ID    vpc.SecurityGroupID
	VPC   vpc.VPCID
	Rules map[Direction][]Rule
	Also  []vpc.VPCID // others that it is associated with
}

// Match is what rules of groups and entries of ACLs say about a packet's protocol.
type Match struct {
	Proto    int // -1 is all
	From, To int // destination ports of TCP and UDP, 0..65535; ICMP: type and code, -1 any
}

// Rule of a security group, which allows. One of CIDR, Group and List is set: the
// source of an ingress rule, the destination of an egress rule.
type Rule struct {
	Match
	CIDR  netip.Prefix
	Group vpc.SecurityGroupID
	List  ListID
}

// ACL is a network ACL.
type ACL struct {
	ID      ACLID
	VPC     vpc.VPCID
	Entries map[Direction][]Entry
}

// Entry of an ACL.
type Entry struct {
	Number int // 1..32766
	Allow  bool
	Match
	CIDR netip.Prefix
}

// Table is a route table: the routes besides the local ones.
type Table struct {
	ID     TableID
	VPC    vpc.VPCID
	Routes []Route
}

// Route of a table. One of CIDR and List is the destination; one of ENI, Peering,
// Gateway and NAT is the target. A route to a CIDR of the VPC replaces the local route's
// target.
type Route struct {
	CIDR    netip.Prefix
	List    ListID
	ENI     vpc.ENIID
	Peering PeeringID
	Gateway GatewayID
	NAT     NATID
}

// Peering between two VPCs. One that is deleted stays in routes as their target.
type Peering struct {
	ID     PeeringID
	A, B   vpc.VPCID
	Active bool
}

// holder returns the attached ENI of a VPC that holds a, or nil.
func (w *World) holder(v vpc.VPCID, a netip.Addr) *ENI {
	for _, e := range w.ENIs {
		if e.Attached && w.Subnets[e.Subnet].VPC == v && e.holds(a, true) {
			return e
		}
	}
	return nil
}

// peered reports whether an active peering joins a and b.
func (w *World) peered(a, b vpc.VPCID) bool {
	for _, p := range w.Peerings {
		if p.Active && (p.A == a && p.B == b || p.A == b && p.B == a) {
			return true
		}
	}
	return false
}

// Clone returns a world that is the same and shares nothing that a statement or a
// packet changes.
func (w *World) Clone() *World {
	c := *w
	c.VPCs, c.Subnets, c.Peerings = copies(w.VPCs), copies(w.Subnets), copies(w.Peerings)
	c.ENIs, c.Groups, c.ACLs, c.Tables = copies(w.ENIs), copies(w.Groups), copies(w.ACLs), copies(w.Tables)
	c.Gateways, c.Elastics, c.NATs, c.noted = copies(w.Gateways), copies(w.Elastics), copies(w.NATs), nil
	c.Lists = maps.Clone(w.Lists) // their entries are replaced, never changed
	for _, v := range c.VPCs {
		v.CIDRs = slices.Clone(v.CIDRs)
	}
	for _, e := range c.ENIs {
		e.Others, e.Groups, e.flows = slices.Clone(e.Others), slices.Clone(e.Groups), clone(e.flows)
	}
	for _, g := range c.Groups {
		g.Rules = lists(g.Rules)
	}
	for _, a := range c.ACLs {
		a.Entries = lists(a.Entries)
	}
	for _, t := range c.Tables {
		t.Routes = slices.Clone(t.Routes)
	}
	for _, n := range c.NATs {
		n.flows = n.cloned()
	}
	return &c
}

func copies[K comparable, V any](m map[K]*V) map[K]*V {
	out := make(map[K]*V, len(m))
	for k, v := range m {
		c := *v
		out[k] = &c
	}
	return out
}

func lists[K comparable, V any](m map[K][]V) map[K][]V {
	out := make(map[K][]V, len(m))
	for k, v := range m {
		out[k] = slices.Clone(v)
	}
	return out
}

// vpcOf returns the VPC that an ENI is in.
func (w *World) vpcOf(e *ENI) vpc.VPCID { return w.Subnets[e.Subnet].VPC }
