// Package install puts the CNI plugin and its configuration list where a
// container runtime looks for them, and takes them away.
//
//	underlay-cni ──► <bin>/.new-underlay-cni-…  ─ fsync, rename ─► <bin>/underlay-cni
//	                      then
//	conflist     ──► <net.d>/.new-…conflist-…   ─ fsync, rename ─► <net.d>/10-underlay.conflist
//
// A runtime begins to use the network when the list is there, so that the
// plugin comes first, and goes last. Each file is there whole or not at all,
// whatever dies in between: what a dead process left half-made (.new-…) goes
// with the next call, and no runtime reads such a name. A rename replaces a
// plugin that runs: who runs the old one keeps it. A file that is as it should
// be is not touched.
//
// One process at a time calls it for the same files; the node's agent holds its
// lock.
package install
