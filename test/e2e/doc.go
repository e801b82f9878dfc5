// Package e2e drives the whole as a user would: the built commands, labs whose
// nodes are network namespaces, and clients that know nothing of us.
package e2e
