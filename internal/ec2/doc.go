// Package ec2 is the door to the EC2 API: the calls the node makes, with what
// must hold for each of them, and the meaning of EC2's error codes.
//
// The SDK's retries are off: Assign and Attach are not idempotent, and when to
// try again is the plan's to decide (package ipam). CreateNetworkInterface
// carries a ClientToken and its tags; an interface is never without them.
// Reads are filtered and paginated, so that they draw on the account's larger
// bucket. Codes are classified in error.go alone.
//
// Clients are safe for concurrent use. Each call is bounded by a time-out of
// its own.
package ec2

//go:generate go run ./gen
