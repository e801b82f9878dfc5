//go:build planted_pool_ignored

package planted

// Bug is the fault that is planted.
const Bug = PoolIgnored
