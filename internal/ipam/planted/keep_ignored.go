//go:build planted_keep_ignored

package planted

// Bug is the fault that is planted.
const Bug = KeepIgnored
