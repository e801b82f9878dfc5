//go:build planted_sets_refused

package planted

// Bug is the fault that is planted.
const Bug = SetsRefused
