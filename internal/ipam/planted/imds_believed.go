//go:build planted_imds_believed

package planted

// Bug is the fault that is planted.
const Bug = IMDSBelieved
