package ipam

import (
	"net/netip"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// Event is something that happened. Each carries its time; times never go
// back (an earlier one counts as the latest seen).
type Event interface{ at() time.Time }

// Source is something that can be read again.
type Source uint8

// The sources: EC2 is the truth, IMDS says that a mapping is live, Links that
// the datapath has configured an interface, and what others have configured.
const (
	EC2 Source = iota
	IMDS
	Links
	sources = 3
)

func (s Source) String() string { return [...]string{"ec2", "imds", "links"}[s] }

type (
	// Started is the first event: the configuration and what the kernel's
	// commit records say.
	Started struct {
		At        time.Time
		Config    Config
		Endpoints []Endpoint
	}

	// ObservedEC2 is a complete read of the node's interfaces: attached to the
	// instance, or tagged as made for it.
	ObservedEC2 struct {
		At   time.Time
		Read time.Time // when the read began
		ENIs []vpc.ENI
	}

	// ObservedIMDS is a complete read of the instance's own metadata.
	ObservedIMDS struct {
		At   time.Time
		ENIs []MetadataENI
	}

	// ObservedLinks lists the interfaces whose links the datapath configured,
	// and the addresses that others use in the node's namespace: configured on
	// a device, or routed to one.
	ObservedLinks struct {
		At    time.Time
		Ready []vpc.ENIID
		Host  []netip.Addr
	}

	// ReadFailed ends a Reread without a result.
	ReadFailed struct {
		At     time.Time
		Source Source
		Class  Class
		Err    string
	}

	// AddRequested asks for an address. Owner is unique among those who have
	// or want one.
	AddRequested struct {
		At       time.Time
		ID       RequestID
		Owner    string
		Pool     Pool
		Deadline time.Time
	}

	// Canceled withdraws a request; one that was answered already is ignored.
	Canceled struct {
		At time.Time
		ID RequestID
	}

	// Released gives an address back. Unused means that no packet can have
	// carried it since it was bound, so that it needs no cooldown.
	Released struct {
		At     time.Time
		Addr   netip.Addr
		When   time.Time // of the release, where the cooldown starts
		Unused bool
	}

	// CallDone is the end of a mutation.
	CallDone struct {
		At       time.Time
		Call     CallID
		Outcome  Outcome
		Class    Class  // when refused or unknown
		Err      string // when refused or unknown
		ENI      *vpc.ENI
		Addrs    []netip.Addr   // Assign: what was given, perhaps fewer than asked
		Prefixes []netip.Prefix // Assign: what was given
	}

	// Tick says what time it is.
	Tick struct{ At time.Time }
)

// Endpoint is a commit record as read back from the kernel.
type Endpoint struct {
	Addr     netip.Addr
	ENI      vpc.ENIID
	Owner    string
	Live     bool      // false: a tombstone
	Released time.Time // of a tombstone
}

// MetadataENI is one interface as IMDS lists it.
type MetadataENI struct {
	ID       vpc.ENIID
	Addrs    []netip.Addr // primary first
	Prefixes []netip.Prefix
}

func (m *MetadataENI) holds(a netip.Addr) bool {
	e := vpc.ENI{Secondary: m.Addrs, Prefixes: m.Prefixes}
	return e.Holds(a)
}

// Outcome is how a mutation ended.
type Outcome uint8

// The outcomes. Unknown: it may or may not have happened.
const (
	Done Outcome = iota
	Refused
	Unknown
)

// Class is why a call or read was refused, as far as the plan cares.
type Class uint8

// The classes.
const (
	ClassOther        Class = iota
	ClassThrottled          // ask more slowly
	ClassDenied             // credentials or permissions
	ClassSubnetFull         // the subnet has too few free addresses
	ClassNoPrefix           // the subnet has no aligned free /28
	ClassENIFull            // the interface holds no more
	ClassSlots              // the instance takes no further interface
	ClassAccountLimit       // the account takes no further interface
	ClassNotFound           // the interface or attachment does not exist
	ClassInUse              // the interface is attached elsewhere, or an index is taken
	ClassUnavailable        // no answer, or the server's own error
	ClassGroups             // a security group is not there, or they are too many for one interface
)

func (e Started) at() time.Time       { return e.At }
func (e ObservedEC2) at() time.Time   { return e.At }
func (e ObservedIMDS) at() time.Time  { return e.At }
func (e ObservedLinks) at() time.Time { return e.At }
func (e ReadFailed) at() time.Time    { return e.At }
func (e AddRequested) at() time.Time  { return e.At }
func (e Canceled) at() time.Time      { return e.At }
func (e Released) at() time.Time      { return e.At }
func (e CallDone) at() time.Time      { return e.At }
func (e Tick) at() time.Time          { return e.At }
