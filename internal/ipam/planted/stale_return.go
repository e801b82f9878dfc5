//go:build planted_stale_return

package planted

// Bug is the fault that is planted.
const Bug = StaleReturn
