//go:build planted_no_tombstones

package planted

// Bug is the fault that is planted.
const Bug = NoTombstones
