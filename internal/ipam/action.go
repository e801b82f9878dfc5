package ipam

import (
	"net/netip"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// Action is something to do. Actions are carried out in their order as far as
// they are local (Forget before the Reply that hands the address out again);
// calls to EC2 run side by side, and each ends with a CallDone.
type Action interface{ action() }

type (
	// AssignAddresses asks for N further secondary addresses.
	AssignAddresses struct {
		Call CallID
		ENI  vpc.ENIID
		N    int
	}

	// AssignPrefixes asks for N further /28 prefixes.
	AssignPrefixes struct {
		Call CallID
		ENI  vpc.ENIID
		N    int
	}

	// Unassign gives addresses and prefixes back.
	Unassign struct {
		Call     CallID
		ENI      vpc.ENIID
		Addrs    []netip.Addr
		Prefixes []netip.Prefix
	}

	// CreateENI makes an interface with its tags and, beside its primary, N
	// secondary addresses or prefixes. Device is reserved for it. A repetition
	// has the same Token and the same parameters.
	CreateENI struct {
		Call     CallID
		Subnet   vpc.SubnetID
		Groups   []vpc.SecurityGroupID
		Pool     Pool
		Device   int
		N        int
		Prefixes bool
		Token    string
		Created  time.Time // for a tag: the same in each repetition
	}

	// AttachENI attaches an interface at a device index.
	AttachENI struct {
		Call   CallID
		ENI    vpc.ENIID
		Device int
	}

	// SetDeleteOnTermination makes EC2 delete the interface with the instance.
	SetDeleteOnTermination struct {
		Call       CallID
		ENI        vpc.ENIID
		Attachment vpc.AttachmentID
	}

	// DeleteENI detaches the interface, if Attachment is set, and deletes it.
	DeleteENI struct {
		Call       CallID
		ENI        vpc.ENIID
		Attachment vpc.AttachmentID
	}

	// Reply ends a request: with Addr on ENI, or with Err.
	Reply struct {
		Request RequestID
		Addr    netip.Addr
		ENI     vpc.ENIID
		Err     *Error
	}

	// Forget says that the cooldown of an address is over: its tombstone goes.
	Forget struct{ Addr netip.Addr }

	// Reread asks for an ObservedEC2, ObservedIMDS or ObservedLinks, or a
	// ReadFailed.
	Reread struct{ Source Source }

	// Report tells people that EC2, asked twice, does not list an address
	// that a pod uses. Nothing else is done about it.
	Report struct {
		Addr  netip.Addr
		ENI   vpc.ENIID
		Owner string
	}

	// SetTimer asks for a Tick at the given time, in place of what an earlier
	// SetTimer asked for. Zero: no Tick is wanted.
	SetTimer struct{ At time.Time }
)

func (AssignAddresses) action()        {}
func (AssignPrefixes) action()         {}
func (Unassign) action()               {}
func (CreateENI) action()              {}
func (AttachENI) action()              {}
func (SetDeleteOnTermination) action() {}
func (DeleteENI) action()              {}
func (Reply) action()                  {}
func (Forget) action()                 {}
func (Reread) action()                 {}
func (Report) action()                 {}
func (SetTimer) action()               {}
