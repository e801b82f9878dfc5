//go:build planted_orphan_leaked

package planted

// Bug is the fault that is planted.
const Bug = OrphanLeaked
