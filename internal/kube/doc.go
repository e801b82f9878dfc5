// Package kube is the agent's client of the Kubernetes API: its own Node object,
// Events on the node's pods, and one look at its own DaemonSet. It lists and
// watches nothing.
//
//	Publish(Status) ─► wanted state ─► keepNode: read own Node, patch what differs
//	Tell(Pod, …)    ─► notices      ─► sendEvents: post, or count onto the one there
//	Leaving()       ─► is our DaemonSet gone, or does this pod alone end?
//
// All of it is best effort: Publish, Tell and Served write down what is wanted
// and return; the loops of Run come round to it, with growing delays while the
// API server is away. CNI waits for none of it. What is remembered is bounded;
// what does not fit is counted. A node's object is patched at the most every
// 30 s, and only where it differs; events cost at the most one write per 5 s
// after a burst of 25.
//
// Patches touch what is ours: one taint, one condition, one resource, our
// annotations. There is no update of a whole object.
//
// The agent runs beside every pod's network and has 40 MB. Measured on
// linux/amd64 with client-go 0.37.2, a program that makes one HTTP request: 5.8
// MB resident with net/http alone (which the agent has anyway), 11.0 MB with
// client-go's REST client and core/v1's types, as here, 19.8 MB with its
// clientset of all API groups; program files of 5.8, 14.1 and 26.6 MB. So there
// is no clientset, no informer and no dynamic client. The whole agent, with 230
// pods, its API server and 25 events posted, has 34 MB resident (38 MB at its
// most), of which 15 MB are its own. client-go brings what is
// not ours to write: finding the API server, TLS, tokens that are read again
// when they are exchanged, Retry-After.
//
// This package alone imports k8s.io. A Client's methods are safe for concurrent
// use.
package kube
