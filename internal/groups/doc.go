// Package groups keeps what EC2 says of security groups: their rules, the prefix
// lists that these name, and the addresses of who carries the groups that they
// name.
//
//	EC2 ──reads, within a budget──► Poller ──Subscription──► Book   of one node,
//	                                   │                            that polls itself
//	                                   └──► Server ══socket══► Book of each node:
//	                                          the groups that concern it
//
// A [Poller] reads what its subscribers need, all of it at once, however many
// they are: EC2's buckets belong to the account, and a poll for each node would
// drain them. A [Book] is what a node knows. It follows a poller elsewhere if it
// is told of one, and has one in the process that takes its place when it is
// away. What is not needed by anybody is neither read nor kept.
//
// A [Snapshot] is never changed once somebody has it, and what is equal in two
// of them is the same pointer, so that differences are found without a look at
// the rules.
//
// # On the wire
//
// Messages are JSON behind their length (4 bytes, big endian). The book sends
// what it needs, at any time and whole; the poller answers with what has changed
// since its message before, and with one that says how old that is every
// [beat]. Messages are numbered from 1 in each connection; the first is whole.
// Whoever hears what makes no sense closes the connection, and the book comes
// back and begins anew. Until then, and until a poller has told all that is
// needed, it keeps what it knew last.
//
// All types are safe for concurrent use.
package groups
