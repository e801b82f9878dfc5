package store

import (
	"net/netip"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// InternetGateway is an internet gateway. A VPC has one at most.
type InternetGateway struct {
	ID      vpc.GatewayID
	VPC     vpc.VPCID // "" when detached
	Created time.Time
}

// EgressOnlyGateway is an egress-only internet gateway: connections of IPv6 go
// out by it, none come in.
type EgressOnlyGateway struct {
	ID          vpc.EgressOnlyID
	VPC         vpc.VPCID // it is attached all its life
	ClientToken string
	Created     time.Time
}

// ElasticPool is where Elastic IP addresses are from: a block for documentation
// (TEST-NET-2, RFC 5737), which nobody on the real internet has.
var ElasticPool = netip.MustParsePrefix("198.51.100.0/24")

// Address is an Elastic IP address. It is associated when ENI is not "".
type Address struct {
	ID          vpc.AllocationID
	Public      netip.Addr
	Association string    // eipassoc-…
	ENI         vpc.ENIID // whose address Private is
	Private     netip.Addr
	NAT         vpc.NATGatewayID // the NAT gateway that uses it
	Created     time.Time
}

// NATState is the state of a NAT gateway, spelled as EC2 does.
type NATState string

// The states of a NAT gateway's life.
const (
	NATPending   NATState = "pending"
	NATAvailable NATState = "available"
	NATDeleting  NATState = "deleting"
	NATDeleted   NATState = "deleted"
	NATFailed    NATState = "failed"
)

// NATGateway is a NAT gateway. Its interface is requester-managed.
type NATGateway struct {
	ID          vpc.NATGatewayID
	VPC         vpc.VPCID
	Subnet      vpc.SubnetID
	ENI         vpc.ENIID
	Private     bool // connectivity type private: no public address
	State       NATState
	Due         time.Time // when State turns into the next one; zero: never by itself
	Failure     string    // error code, of one that failed
	Message     string    // what else there is to say of it
	Addresses   []NATAddress
	ClientToken string
	Created     time.Time
	Deleted     time.Time
}

// NATAddress is an address that a NAT gateway puts in the place of others.
type NATAddress struct {
	Private    netip.Addr
	Allocation vpc.AllocationID // "" of a private NAT gateway
	Public     netip.Addr       // what it was when the gateway was deleted, too
	Primary    bool
	Drains     time.Time // when it is taken away, of one whose connections may still end
}

// PeeringStatus is the status of a peering connection, spelled as EC2 does.
type PeeringStatus string

// The states of a peering connection's life. What is made within one account
// is neither initiated nor provisioned for long enough to be seen.
const (
	PeeringPending  PeeringStatus = "pending-acceptance"
	PeeringActive   PeeringStatus = "active"
	PeeringFailed   PeeringStatus = "failed"
	PeeringRejected PeeringStatus = "rejected"
	PeeringExpired  PeeringStatus = "expired"
	PeeringDeleted  PeeringStatus = "deleted"
)

// Peering is a VPC peering connection. Of one that is over the VPCs may be gone.
type Peering struct {
	ID        vpc.PeeringID
	Requester PeeringSide
	Accepter  PeeringSide
	Status    PeeringStatus
	Message   string
	Due       time.Time // when it expires or is forgotten
	Created   time.Time
}

// PeeringSide is one VPC of a peering connection.
type PeeringSide struct {
	VPC       vpc.VPCID
	CIDRs     []netip.Prefix // as they were when the request was made
	IPv6CIDRs []netip.Prefix `json:",omitempty"` // likewise
	DNS       bool           // AllowDnsResolutionFromRemoteVpc
}

// Other returns the VPC at the other end, or "".
func (p *Peering) Other(v vpc.VPCID) vpc.VPCID {
	switch v {
	case p.Requester.VPC:
		return p.Accepter.VPC
	case p.Accepter.VPC:
		return p.Requester.VPC
	}
	return ""
}
