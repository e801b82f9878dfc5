//go:build planted_nothing_returned

package planted

// Bug is the fault that is planted.
const Bug = NothingReturned
