// Package agent runs a node: it owns the state of package ipam, carries out
// the actions, and serves the CNI plugin.
//
//	plugin ─ socket ─ handler (one goroutine per request)
//	                     │ post                     ┌──► EC2 calls ──┐
//	                     ▼                          │                │ post
//	                  owner: ipam.Step(state, event) ──► IMDS, links ┤
//	                     │                          │                │
//	                     └── reply to the handler   └──► timer ──────┘
//	                     handler ─► datapath (Add, Delete, Check)
//
// One goroutine, the owner, holds the state; everything else posts to it.
// Calls to EC2 and reads run beside it and post how they ended. Handlers wait
// for the owner's reply, then work on the datapath themselves, each container
// and interface under its own lock.
//
// The agent keeps nothing: what it knows after a start comes from the kernel's
// commit records, EC2 and IMDS. It serves the socket from the first moment,
// and says what it waits for until it is ready. When it ends, however it ends,
// the pods' packets go on.
package agent
