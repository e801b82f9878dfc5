//go:build planted_partial_whole

package planted

// Bug is the fault that is planted.
const Bug = PartialWhole
