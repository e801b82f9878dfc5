// Package imds is the instance metadata service, version 2 (and 1, where an
// instance permits it), of the instances of a VPC.
//
//	listener of one ENI → Server of its instance → Source → tree of items → answer
//
// A Server belongs to one instance: who it is talking to is decided by the
// interface that the connection came in by, never by an address. What it tells
// comes from a Source, asked anew for each request, which may run behind the
// truth as the real service does.
//
// Tokens hold no state here. A token is its time of expiry and a MAC over that
// and the instance's id, by a key that the caller keeps across restarts: so
// they are of one instance only, and survive the process.
//
// The hop limit of token answers is the IP TTL of their packets. It is a
// property of the socket, so the connection ends with the answer.
//
// Everything is safe for concurrent use.
package imds
