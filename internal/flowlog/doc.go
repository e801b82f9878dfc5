// Package flowlog makes flow records of what a node's datapath counts, and
// writes them as lines of any format of VPC flow logs.
//
//	Sample ──Log.Step──▶ []Record ──Format.Line──▶ "2 123456789012 eni-… 10.0.0.9 …"
//	(connections, refused packets,     (one per pod, direction, connection
//	counters of the pods' interfaces)   and interval)
//
// A record is what one pod sent or received on one connection within one
// interval. Two pods of one node that talk to each other make records for each
// side, as two interfaces of a VPC do.
//
// # Invariants
//
//   - Nothing is counted twice: a record holds what a connection has counted
//     since the step before.
//   - What was recorded for an interface, and what was skipped there, is what the
//     interface's own counters say. A step that finds more in the counters than it
//     can record says so in a record of status SKIPDATA.
//   - A Log is plain data: written out and read back, it goes on where it was.
//
// The package is pure: it reads no clock and does no I/O. A Log belongs to one
// goroutine.
package flowlog
