//go:build planted_delete_used

package planted

// Bug is the fault that is planted.
const Bug = DeleteUsed
