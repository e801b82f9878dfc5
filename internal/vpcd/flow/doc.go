// Package flow knows VPC flow logs: the format that one asks for, what a record
// says in it, and the files that records go to, in S3's layout. The table of
// the fields is that of package vpc.
//
// It is pure and keeps nothing; all of it is safe for concurrent use.
package flow
