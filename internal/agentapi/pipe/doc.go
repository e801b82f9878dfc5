// Package pipe is the plugin's end of the agent's socket: it carries one start
// of the CNI plugin to the agent as it is, and the agent's answer back.
//
//	plugin                                       agent
//	  │ connect                                    │
//	  │ length (4 bytes, big endian) ────────────► │
//	  │ 0, version, "CNI_X=…" 0 … 0, stdin;        │ judges and works; a call
//	  │ netns as SCM_RIGHTS                        │ ends when the plugin hangs up
//	  │ ◄────────────── length, exit status, stdout │
//	  │ close                                      │
//
// A call's first byte is 0, by which the agent tells it from the JSON that
// people's tools speak on the same socket (package agentapi).
//
// The plugin is started for each operation on each pod, and what a Go program
// links it pays for at each start: page by page, in initialisers and in the
// first use of each kind of memory. This package knows syscall alone. Packages
// net, os, fmt and encoding/json are not linked, and nothing here decides
// anything about CNI but what must be said without an agent. docs/bench/README.md
// has what that saved.
//
// Functions without a receiver are safe for concurrent use; a Caller is not.
package pipe
