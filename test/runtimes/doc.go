// Package runtimes runs real container runtimes, as Debian ships them, on the
// nodes of a lab: containerd with its ctr, podman, and the CNI project's cnitool.
//
// Each runs on a machine of its own (host.sh): the node's network namespace, and
// mounts, processes and cgroups that nobody else sees. The real machine has
// nothing of it, and everything ends with the test.
package runtimes
