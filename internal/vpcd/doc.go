// Package vpcd is a VPC in one process: it wires the EC2 API, IMDS, the store
// and the packet fabric together.
//
//	EC2 clients ──► query ──► chaos ──► api ──► store ──┬─► reconciler ──► fabric
//	instances ────► imds ◄── (as old as the IMDS lag) ──┘   (as old as the mapping lag)
//
// The store is the only state. What the fabric should be is a pure function of
// a snapshot (desired), set whole by the one reconciler, which runs after
// each change, again when a lagging address mapping is due, and after an error.
// The reconciler writes one thing back: that the namespace of an instance whose
// power cycles is gone, so that the next one is made.
// The flow logger ends the fabric's intervals of flow records and writes them
// into the files of flow logs; what it tells of an interface is what the fabric
// was told when the interface was made.
//
// Each attached interface of an instance has two listeners in the fabric's
// namespace: IMDS, and the EC2 API.
//
// # Lifetime
//
// Run serves until its context ends; then connections are finished, the
// fabric's process side is closed and the store. The packets of instances keep
// flowing without a process, and the next Run adopts what is there. Destroy
// removes the lab from the machine.
//
// # Concurrency
//
// One goroutine reconciles and owns all listeners. Requests read snapshots.
package vpcd
