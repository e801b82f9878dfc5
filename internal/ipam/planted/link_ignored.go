//go:build planted_link_ignored

package planted

// Bug is the fault that is planted.
const Bug = LinkIgnored
