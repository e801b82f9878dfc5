// Package nl speaks rtnetlink and enters network namespaces.
//
// It owns the form of the messages: a Conn is a socket that stays in the
// namespace where it was opened; a Batch is several requests in one system
// call, each answered; the readers (Links, Routes, Rules, Addrs, Neighs)
// repeat a dump that the kernel declares inconsistent. Do runs a function on a
// thread that is in another namespace; Listen takes ports that last.
//
// The messages are built here rather than by a library because three things
// decide how long a pod waits: both ends of a veth made in place with chosen
// indexes, several requests per system call, and no dump of all links on that
// way.
//
// Invariants: a request succeeds, or its error names the request and carries
// the kernel's errno (errors.Is(err, unix.EEXIST)) and explanation. Nothing
// here starts a goroutine inside a changed namespace.
package nl
