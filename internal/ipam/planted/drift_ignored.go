//go:build planted_drift_ignored

package planted

// Bug is the fault that is planted.
const Bug = DriftIgnored
