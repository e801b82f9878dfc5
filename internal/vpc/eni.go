package vpc

import (
	"net/netip"
	"slices"
	"strings"
)

// PrefixBits is the length of a delegated IPv4 prefix (EC2 knows no other).
const PrefixBits = 28

// IPv6PrefixBits is the length of a delegated IPv6 prefix (likewise).
const IPv6PrefixBits = 80

// ENI is an elastic network interface as EC2 describes it.
type ENI struct {
	ID             ENIID
	VPC            VPCID
	Subnet         SubnetID
	MAC            string // "02:…", lower case
	Primary        netip.Addr
	Secondary      []netip.Addr   // secondary private IPv4 addresses, in EC2's order
	Prefixes       []netip.Prefix // delegated /28s
	Elastic        []netip.Addr   // those of the private addresses that an Elastic IP leads to
	Type           string         // "interface", "trunk", "efa", …; "" counts as "interface"
	Groups         []SecurityGroupID
	Description    string
	Tags           map[string]string
	RequesterOwned bool // requester-managed: a managed service's, not ours to change

	Instance            InstanceID   // "" when not attached
	Attachment          AttachmentID // "" when not attached
	DeviceIndex         int          // valid when attached
	NetworkCard         int          // valid when attached
	Attached            bool         // the attachment's status is "attached", not "attaching" or "detaching"
	DeleteOnTermination bool
}

// Holds reports whether a is an address of the ENI: primary, secondary, or
// within a delegated prefix.
func (e *ENI) Holds(a netip.Addr) bool {
	if a == e.Primary || slices.Contains(e.Secondary, a) {
		return true
	}
	return slices.ContainsFunc(e.Prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}

// Subnet is one subnet of a VPC.
type Subnet struct {
	ID               SubnetID
	VPC              VPCID
	CIDR             netip.Prefix
	AvailabilityZone string
	Available        int // free addresses, as DescribeSubnets counts them: without those in reservations
	Reservations     []Reservation
}

// Reservation is a subnet CIDR reservation: a range whose addresses EC2 gives
// to nobody who asks for any.
type Reservation struct {
	CIDR     netip.Prefix
	Prefixes bool // delegated prefixes come from it
}

// Router returns the address of the subnet's router: the network address plus
// one. EC2 reserves the first four addresses of a subnet and its last.
func Router(subnet netip.Prefix) netip.Addr {
	return subnet.Masked().Addr().Next()
}

// GroupSet is a set of security groups in canonical form: sorted, without
// repetition, joined by commas. Two ENIs carry the same set if and only if
// their GroupSets are equal.
type GroupSet string

// NewGroupSet returns the canonical form of groups, which is left as it was.
func NewGroupSet(groups []SecurityGroupID) GroupSet {
	s := slices.Clone(groups)
	slices.Sort(s)
	s = slices.Compact(s)
	parts := make([]string, len(s))
	for i, g := range s {
		parts[i] = string(g)
	}
	return GroupSet(strings.Join(parts, ","))
}

// Groups returns the members of the set, sorted.
func (g GroupSet) Groups() []SecurityGroupID {
	if g == "" {
		return nil
	}
	var out []SecurityGroupID
	for p := range strings.SplitSeq(string(g), ",") {
		out = append(out, SecurityGroupID(p))
	}
	return out
}
