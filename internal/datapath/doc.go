// Package datapath owns what a node does with its pods' packets: the BPF
// programs and maps, the host veths, the routes, rules and tables that bear our
// protocol number, and the nftables table `inet underlay`. Nothing else on the
// node is changed, except ip_forward and the devices of the ENIs that SetENIs
// is given.
//
//	pod eth0 ── host veth ─ from_pod ─ guard ─ rule fwmark ─ to_eni ─ ENI
//	  (/32)     (group ul)  identity,│ (nft)   (one per ENI)          ╱
//	                        flow     └──────────── direct ───────────╱
//	pod eth0 ── host veth ─ to_pod ─ pods' table ─ rule 20 ─ from_eni ─ ENI
//	       └──────────────────── direct ───────────────────┘
//
// A flow whose first packet the kernel's stack would only route bypasses it, for
// life; everything else takes it. bpf/node_packet.h reads packets, bpf/node_conn.h
// is conntrack, bpf/node_direct.h says which flows are direct, bpf/node_policy.h
// judges.
//
// # State
//
// The kernel is the only state. The commit record of an endpoint is its entry
// in the pinned map `endpoints`, keyed by address and made with BPF_NOEXIST, so
// that no address ever has two owners:
//
//	Add ──> Adding ──> Live ──Delete──> Tombstone ──Forget──> (nothing)
//	           └── on an error or after a crash: (nothing)
//
// # Order of Add, and what a crash leaves
//
//  1. the record, Adding. From here on there is something to be undone.
//  2. the counters and the entry in `ifaces`, gate shut, under an ifindex that
//     we choose: the maps know the device before it exists.
//  3. the veth, in place with one RTM_NEWLINK, both ends down. No program
//     stands on it yet, but nothing can pass a device that is down, and what
//     passed would meet the guard in nftables.
//  4. the programs, first on their hooks (hook.go).
//  5. the pod's end: address, up, gateway, routes.
//  6. the host's end: label, up, neighbour, the /32 route.
//  7. a look whether the pod's end has its carrier: its first packet is not lost.
//  8. Options.BeforeReady: the endpoint's policy.
//  9. the gate opens: the first packet passes.
//  10. the record, Live.
//
// A crash after 1–9 leaves the record Adding, which Open undoes whole: nobody
// was told that the pod has the address. After 10 the endpoint is whole.
//
// # Order of Delete
//
//  1. the record, Tombstone with its time of release: the answer can be given.
//  2. the entry in `ifaces`: nothing passes any more; then its policy.
//  3. the route. Here Delete returns.
//  4. the device, pins if there are any, the counters: by the reaper, with others' (reap.go).
//
// After a crash anywhere Open finds a tombstone and sweeps all that no live
// endpoint stands behind. It looks at what is there, not at what was done:
// whatever the state, one Open leads to the same end.
//
// # Concurrency
//
// All methods are safe for concurrent use. Operations on one container and
// interface wait for each other; at most two Adds are in the kernel at once,
// which takes one lock for all of it. One process at a time has the directory
// of pins (flock). The reaper, the sweeper, who moves busy pods' programs (move.go)
// and, with Options.Ended, the reader of its ring run from Open to Close; no other goroutine outlives the method that
// starts it.
package datapath
