// Package planted names faults that can be built into ipam, so that a test can
// show that the model catches each. A build tag plants one; without a tag, Bug
// is None and the compiler drops every trace of them.
package planted

// Kind is a fault.
type Kind uint8

// The faults.
const (
	None            Kind = iota
	ShortCooldown        // an address is used again after half its cooldown
	BlindRepeat          // a call whose end is unknown is repeated without a read
	SharedDevice         // the device index of a creation in flight counts as free
	NewToken             // a creation is repeated with another token
	NoTombstones         // a new agent overlooks the tombstones
	NoRecords            // a new agent overlooks the commit records
	ReturnCooling        // an address that cools down is given back
	PartialWhole         // an Assign that gave less counts as whole
	NoDeadline           // a request waits past its deadline
	KeepIgnored          // an interface is used before DeleteOnTermination is set
	LinkIgnored          // an interface is used before its link is configured
	NotLive              // an address is used before IMDS lists it
	ForgetEarly          // a tombstone goes with the release
	OrphanLeaked         // what is attached nowhere stays for ever
	TwoMutations         // a second call starts on an interface
	FloorForgotten       // no address is kept ready
	NothingReturned      // surplus stays for ever
	StaleReturn          // a stale read revives what was given back
	DeleteUsed           // an interface in use is deleted
	StaleEvicts          // a read that lacks a bound address ends its use
	PoolIgnored          // a pod gets an address of other security groups
	IMDSBelieved         // what IMDS lists is ours, whatever EC2 says
	LingerForgotten      // the interface of a set of security groups goes as early as any
	SetsRefused          // a pod whose set finds no interface does not wait
	DriftIgnored         // a pod gets an address on an interface whose groups somebody changed
)
