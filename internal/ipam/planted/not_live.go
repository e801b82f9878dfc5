//go:build planted_not_live

package planted

// Bug is the fault that is planted.
const Bug = NotLive
