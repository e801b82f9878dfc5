// Package flow knows the format of VPC flow log records: which fields there are,
// since which version, and of which type.
//
// It is pure and keeps nothing; all of it is safe for concurrent use.
package flow
