//go:build planted_two_mutations

package planted

// Bug is the fault that is planted.
const Bug = TwoMutations
