// Package agentapi is what is spoken on the node agent's unix socket: by the
// CNI plugin for each of its verbs, and by people's tools for a look inside.
//
//	plugin                                agent
//	  │ connect                             │
//	  │ length (4 bytes, big endian) ─────► │
//	  │ JSON Request, netns as SCM_RIGHTS   │
//	  │                                     │ works; the request's context ends
//	  │                                     │ when the plugin hangs up
//	  │ ◄───────────── length JSON Response │
//	  │ close                               │
//
// One request and one response per connection, each at most MaxMessage bytes.
// The namespace of a container travels as an open file next to the request,
// because the agent may not see the mounts of the runtime; its path goes along
// as text, for people. Whatever does not parse is answered with an error of
// code CodeDecoding and the connection is closed; files that came along are
// closed too.
//
// The package knows the standard library alone: the plugin that links it must
// start fast. Server and client may be used from several goroutines.
package agentapi
