// Package query speaks the EC2 Query API: form-encoded requests in, XML out.
//
// model.json describes every action that the API is known to have: its
// parameters, the elements of its answer, the filters it takes and the bounds
// of its MaxResults. gen turns the model into Go types (zz_*.go), whose struct
// tags carry the wire names; one decoder and one encoder serve them all.
//
//	HTTP → form → Request struct → checks → Gate → handler → Response struct → XML
//
// Everything that does not depend on the state of a VPC is refused here, before
// a handler sees it: unknown, missing, doubled and malformed parameters, values
// outside an enumeration, bounds of MaxResults, an unknown version. A handler
// gets a request that is well-formed, and answers with a Response or an *Error.
//
// Requests are decoded without regard to what indexes their lists carry: the
// memory used is proportional to the body, which is limited.
//
// The package holds no state. Everything exported is safe for concurrent use.
package query

//go:generate go run ./gen
