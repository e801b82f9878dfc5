//go:build planted_no_records

package planted

// Bug is the fault that is planted.
const Bug = NoRecords
