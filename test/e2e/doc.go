// Package e2e drives the whole as a user would: the built commands, labs whose
// nodes are network namespaces, and clients that know nothing of us.
//
// Each lab is named t<pid><letter>, so that a later run finds and removes what a
// killed one left. Traffic stays between addresses inside such labs.
package e2e
