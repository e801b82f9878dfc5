// Package cni is what CNI means to the agent: it judges a call that the plugin
// handed on as it was (package pipe), has the agent do it, and forms what the
// plugin prints.
//
// The order of the checks, the error codes and the results' forms are those of
// the CNI library's skel, whose types and versions it uses; skel itself reads a
// process's environment. Whatever is wrong with a call is told by an error with
// a code and the next step, never by the connection.
//
// Functions are safe for concurrent use.
package cni
