// Package agentapi is what is spoken on the node agent's unix socket: by the
// CNI plugin for each of its verbs, and by people's tools for a look inside.
//
//	tool                                  agent
//	  │ connect                             │
//	  │ length (4 bytes, big endian) ─────► │
//	  │ JSON Request                        │
//	  │                                     │ works; the request's context ends
//	  │                                     │ when the peer hangs up
//	  │ ◄───────────── length JSON Response │
//	  │ close                               │
//
// One request and one response per connection, each at most MaxMessage bytes.
// The plugin's calls have the same frame and another body: package pipe has it,
// and package cni what it means. The namespace of a container travels as an open
// file next to the call, because the agent may not see the mounts of the
// runtime. Plugin and agent may be of different versions, as during an update:
// variables and fields that are not known are let be, and a call of a version
// that is not known is answered with CNI's own error. Whatever else does not
// parse is answered with an error. Then the connection is closed; files that
// came along are closed too.
//
// Server and client may be used from several goroutines.
package agentapi
