// Package fabric is the VPC's wires: one network namespace (ul-LAB-fabric), a
// veth pair for each attached ENI between it and the guest, and one pair of BPF
// programs (bpf/fabric.c) that deliver by mapping instead of by a bridge or the
// kernel's routes.
//
//	guest netns                      fabric netns                    guest netns
//	 eth0 ──veth── e5k2… ── from_guest: source check, route,  ──redirect_peer──▶ eth0
//	                        mapping, egress gate, ACLs, destination
//	                        check, ingress gate, MACs
//	 eth0 ──veth── e5k2… ── from_guest ─▶ from_guest_ipv6: the same for IPv6 ──redirect_peer──▶ eth0
//	 eth0 ──veth── e5k2… ── from_guest ─▶ stack ─▶ socket bound to e5k2…
//	      ◀─────────────── to_guest ◀── (169.254.169.254, 169.254.171.24)
//	 eth0 ──veth── e5k2… ── from_guest ─▶ to_internet: one address for another ─▶ ul-LAB-internet
//	      ◀─redirect_peer── from_internet ◀──veth── internet ◀──
//
// It owns everything of a lab in the kernel that is not inside a node: the
// fabric's namespace, the guests' namespaces, the internet's, the pairs, and what is pinned
// below Options.BPFFS (maps in v5/, one TCX link per pair and direction in
// v5/links/). It shares no judgement with the node: what a VPC delivers is
// decided here alone.
//
// # Invariants
//
//   - The kernel is the state. Set makes it equal to the Config that it is
//     given, whatever it was before; nothing remembers a former Config.
//   - An interface is whole when its entry in map enis has ENI_READY, which is
//     written last. A pair without it was half made and is made anew.
//   - A pair whose identity changed (MAC, guest, device index, subnet, the
//     address that Configure gave it) is made anew; whatever else changed is
//     changed in place.
//   - The guest's end belongs to the guest: it is written to only before the
//     interface is ready.
//   - What an ENI's security groups allow, and a subnet's ACL, is replaced whole:
//     no frame is judged by half of it, and when Set returns none by what was
//     before. An ENI or subnet without either passes nothing.
//   - Tracked flows are the kernel's: they outlive the process, and the rules
//     that let them begin, and end with their interface.
//   - What of a Config is not valid is left out so that less is allowed, never
//     more.
//   - A frame is delivered to one guest, or to the fabric's own stack if it is
//     for a service, or dropped and counted under a [DropReason].
//   - The process is not in the packets' way: its death and the next Open lose
//     none.
//
// # Concurrency
//
// A Fabric may be used by many goroutines. Set is serialised by a mutex;
// Counters and ListenTCP do not wait for it. One process at a time has a lab
// open: Open takes a lock on the fabric's namespace.
package fabric
