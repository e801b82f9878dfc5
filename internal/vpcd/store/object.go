package store

import (
	"net/netip"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// VPC is a virtual private cloud.
type VPC struct {
	ID             vpc.VPCID
	VNI            uint32            // number of the VPC on the fabric, > 0, never reused
	CIDRs          []CIDRAssociation // of IPv4, the primary block first
	IPv6CIDRs      []CIDRAssociation `json:",omitempty"` // /56s of IPv6Pool, in the order of association
	Tenancy        string
	DNSSupport     bool
	DNSHostnames   bool
	UsageMetrics   bool // enableNetworkAddressUsageMetrics
	DefaultGroup   vpc.SecurityGroupID
	DHCPOptions    string
	DefaultForZone bool // of the account's default VPC
	Created        time.Time
}

// CIDRAssociation is one address block of a VPC or, of IPv6, of a subnet.
type CIDRAssociation struct {
	ID   string // vpc-cidr-assoc-…, subnet-cidr-assoc-…
	CIDR netip.Prefix
}

// Subnet is one subnet of a VPC.
type Subnet struct {
	ID       vpc.SubnetID
	VPC      vpc.VPCID
	CIDR     netip.Prefix
	IPv6     CIDRAssociation `json:",omitzero"` // a /64 of one of the VPC's IPv6 blocks; zero: none
	Zone     string          // us-east-1a
	HostType string          // ip-name or resource-name: how instances launched here are named
	// ResourceNameA says that the names of instances launched here resolve.
	ResourceNameA bool `json:",omitempty"`
	// AssignIPv6 gives each interface made here an IPv6 address.
	AssignIPv6 bool `json:",omitempty"`
	Created    time.Time
}

// Reservation sets addresses of a subnet aside: none of them is given to an
// interface that asks for any address.
type Reservation struct {
	ID          string // scr-…
	Subnet      vpc.SubnetID
	CIDR        netip.Prefix
	Prefixes    bool // type prefix: delegated prefixes come from it; else explicit
	Description string
	Created     time.Time
}

// InstanceState is the state of an instance, spelled as EC2 does.
type InstanceState string

// The states of an instance's life.
const (
	Pending      InstanceState = "pending"
	Running      InstanceState = "running"
	Stopping     InstanceState = "stopping"
	Stopped      InstanceState = "stopped"
	ShuttingDown InstanceState = "shutting-down"
	Terminated   InstanceState = "terminated"
)

// Power says whether an instance has its network namespace.
type Power string

// The settings of Power. A namespace that was there before PowerCycle is not
// the one that is there after it: what is in it ends as a machine's memory does.
const (
	PowerOn    Power = ""
	PowerOff   Power = "off"
	PowerCycle Power = "cycle" // off; on again as soon as the namespace is gone
)

// Instance is a virtual machine: a network namespace.
type Instance struct {
	ID                 vpc.InstanceID
	Reservation        string // r-…
	Type               string
	Image              string
	KeyName            string
	VPC                vpc.VPCID
	Subnet             vpc.SubnetID // of the primary interface
	Zone               string
	State              InstanceState
	Power              Power
	Due                time.Time // when State turns into the next one; zero: never by itself
	Launched           time.Time // or last started
	Reason             string    // StateReason code, of a stopped or terminated instance
	ClientToken        string
	LaunchIndex        int
	Metadata           MetadataOptions
	UserData           string // base64, as it came
	Profile            string // ARN or name of the instance profile
	Monitoring         bool
	TerminationLocked  bool // DisableApiTermination
	StopLocked         bool // DisableApiStop
	ShutdownTerminates bool // InstanceInitiatedShutdownBehavior is "terminate"
	HostType           string
	ResourceNameA      bool `json:",omitempty"` // the name i-… resolves: EnableResourceNameDnsARecord
}

// MetadataOptions says how the instance may use IMDS.
type MetadataOptions struct {
	Tokens   string // optional or required
	HopLimit int    // 1..64
	Endpoint string // enabled or disabled
	Tags     string // enabled or disabled
}

// AttachmentStatus is the status of an attachment, spelled as EC2 does.
type AttachmentStatus string

// The states of an attachment's life.
const (
	Attaching AttachmentStatus = "attaching"
	Attached  AttachmentStatus = "attached"
	Detaching AttachmentStatus = "detaching"
)

// Attachment ties an interface to an instance, or a requester-managed one to
// the service that owns it.
type Attachment struct {
	ID                  vpc.AttachmentID
	Instance            vpc.InstanceID // "" for a managed service
	InstanceOwner       string         // account, or the service's name
	DeviceIndex         int
	NetworkCard         int
	Status              AttachmentStatus
	Since               time.Time // AttachTime
	Due                 time.Time // when Attaching or Detaching ends
	DeleteOnTermination bool
}

// ENI is an elastic network interface.
type ENI struct {
	ID               vpc.ENIID
	VPC              vpc.VPCID
	Subnet           vpc.SubnetID
	Zone             string
	MAC              string // 02:…, lower case, one interface per VPC
	Primary          netip.Addr
	Secondary        []netip.Addr   // in the order of assignment
	Prefixes         []netip.Prefix // /28s, in the order of assignment
	IPv6             []netip.Addr   `json:",omitempty"` // in the order of assignment
	IPv6Prefixes     []netip.Prefix `json:",omitempty"` // /80s, in the order of assignment
	Groups           []vpc.SecurityGroupID
	Description      string
	SourceDestCheck  bool
	RequesterManaged bool
	RequesterID      string           // who made it: account id, or the service
	Service          string           // name of the managed service it belongs to, or ""
	NAT              vpc.NATGatewayID `json:",omitempty"` // the NAT gateway that it belongs to; it has no groups
	Conntrack        Conntrack
	Attachment       *Attachment // nil when available
	Created          time.Time
}

// Conntrack holds the idle timeouts of an interface's tracked flows, in
// seconds; zero stands for the instance type's default.
type Conntrack struct {
	TCPEstablished, UDP, UDPStream int
}

// Slots returns how many of the instance type's addresses per interface the
// interface takes: the primary, each secondary, and one for each prefix.
func (e *ENI) Slots() int { return 1 + len(e.Secondary) + len(e.Prefixes) }

// IPv6Slots returns how many of the instance type's IPv6 addresses per interface
// the interface takes.
func (e *ENI) IPv6Slots() int { return len(e.IPv6) + len(e.IPv6Prefixes) }

// Group is a security group.
type Group struct {
	ID          vpc.SecurityGroupID
	VPC         vpc.VPCID
	Name        string
	Description string
	Rules       []Rule // in the order of creation
}

// Rule is one rule of a security group. Exactly one of CIDR, PrefixList and
// Group says who the peer is.
type Rule struct {
	ID          string // sgr-…
	Egress      bool
	Protocol    string // tcp, udp, icmp, icmpv6, -1, or a number
	From, To    int    // ports, or ICMP type and code; -1: all
	CIDR        netip.Prefix
	PrefixList  string
	Group       vpc.SecurityGroupID
	GroupOwner  string
	GroupVPC    vpc.VPCID     // of a group of another VPC; "" for one of the same
	Peering     vpc.PeeringID // by which the group of the other VPC was found
	Description string
}

// SamePermission reports whether two rules allow the same: all but identifier
// and description, and by which peering the group was found, are equal.
func (r Rule) SamePermission(o Rule) bool {
	r.ID, o.ID, r.Description, o.Description = "", "", "", ""
	r.GroupVPC, o.GroupVPC, r.Peering, o.Peering = "", "", "", ""
	return r == o
}

// Stale reports whether a rule names a group of another VPC that is gone, or
// that no active peering connection leads to: it matches nothing.
func (s *State) Stale(g *Group, r Rule) bool {
	return r.GroupVPC != "" && (s.Group(r.Group) == nil || s.PeeringBetween(g.VPC, r.GroupVPC) == nil)
}

// Token remembers the answer to a request that carried a client token.
type Token struct {
	Key     string // action, a slash, the token
	Params  string // digest of the parameters
	Results []string
	Created time.Time
}

// Service is a managed service outside all instances, behind an interface that
// it alone may change.
type Service struct {
	Name        string
	ENI         vpc.ENIID
	RequesterID string // amazon-rds
	Description string
}
