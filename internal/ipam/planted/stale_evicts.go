//go:build planted_stale_evicts

package planted

// Bug is the fault that is planted.
const Bug = StaleEvicts
