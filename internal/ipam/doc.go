// Package ipam decides which addresses a node holds and which pod has which.
//
// It is pure: Step takes a state and an event and returns the next state and
// the actions that somebody else carries out. It does no I/O, starts no
// goroutine and reads no clock; time comes with the events. The node agent
// runs it, and so can a simulator or a model checker.
//
// The life of an address:
//
//	EC2 assigns it        IMDS lists it, or a
//	      │               bounded wait passed
//	      ▼                     │
//	  Assigned ────────────────► Free ◄────────── cooldown over (Forget)
//	                             │  │                   ▲
//	            a request is     │  │ lingered, surplus │
//	            answered         ▼  ▼                   │
//	                          Bound  Returning          │
//	                             │                      │
//	                             └── Released ──► Cooling
//
// Invariants (State.Verify): an address is on one ENI and has at most one
// owner; one mutation is in flight per ENI; device indices are not shared;
// every request that waits has a deadline and ends at it. What EC2 says of an
// address that a pod uses is reported when it is bad news, and never acted on.
//
// The plan. Need = waiting + floor − (free + on its way), per pool; a pool is
// the ENIs of one subnet that carry one set of security groups. Need goes to
// the room of the ENIs at hand first, in calls sized to it; what is left goes to
// further ENIs, in parallel. Addresses and ENIs that lingered unused above the
// floor go back.
//
// A call ends done, refused or unknown. Unknown is never repeated before EC2
// was read again, except for the creation of an ENI, which carries a token
// that makes it safe. After a throttled call the calls of its kind go on one by
// one (see pace): the account's buckets belong to all nodes.
//
// A model checker (model_test.go, explore_test.go) tries what can happen around
// the plan; package planted holds faults that it must find.
package ipam
