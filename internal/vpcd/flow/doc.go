// Package flow knows the format of VPC flow log records, as a flow log asks for
// it; the table of the fields is that of package vpc.
//
// It is pure and keeps nothing; all of it is safe for concurrent use.
package flow
