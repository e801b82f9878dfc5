// Package api serves the actions of the EC2 API: one file per kind of object,
// one function per action.
//
//	query.Server ── typed request ── guard (is every parameter honoured?) ── handler
//	                                                  │ Describe*: a snapshot, as old as the read lag
//	                                                  └ others: one store.Update, then the answer
//
// # Invariants
//
//   - A parameter that a handler does not honour is refused with
//     UnsupportedOperation, by the guard, from one list per action (params.go).
//     The exceptions are in the table harmless, each with its reason.
//   - A call changes everything it says or nothing: all its changes are one
//     transaction of the store, and the answer is sent after the commit.
//   - What is announced by an action's model but no object here can have (a
//     public address, say) is a filter that matches nothing. A filter whose
//     truth is not known here (the memory of an instance type) is refused.
//   - Requester-managed interfaces are changed by CreateManagedService and
//     DeleteManagedService alone.
//
// # Addresses
//
// Addresses, /28 prefixes and, of IPv6, /80 prefixes are allocated lowest first, so that a run can be
// repeated and a freed address comes back at once: what is wrong with a reuse
// shows. EC2 promises no order, and in the field its single addresses lie all
// over a subnet, until no /28 is whole: the setting Addresses scatters them.
// Which are free, and what CIDR reservations set aside, is asked of the store.
//
// # Quotas
//
// Limits of instance types, of addresses and of tags (50) are kept, and the
// quotas of an account, which are settings (package chaos). Of the addresses in
// use in all of a VPC there is no quota.
//
// # Life cycles
//
// Attachments go attaching → attached and detaching → gone; instances pending →
// running, stopping → stopped, and shutting-down → terminated → forgotten; NAT
// gateways pending → available or failed, and deleting → deleted → forgotten;
// what a peering connection waits for expires, and what is over is forgotten.
// Each waits for a time that is stored with it; Run moves what is due, also what
// was due while no vpcd ran.
//
// # Concurrency
//
// Everything exported may be called from any goroutine. The API holds no state
// of its own.
package api

//go:generate go run ./gen
