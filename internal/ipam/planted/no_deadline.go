//go:build planted_no_deadline

package planted

// Bug is the fault that is planted.
const Bug = NoDeadline
