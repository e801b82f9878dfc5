// Package kubernetes judges Underlay on a real Kubernetes: labs brought up by
// "underlay up --kubernetes", upstream's own network specs (package upstream),
// and checks of our own: pods on secondary ENIs, which way packets between pods
// take, everything killed under traffic, scaling up and down without a trace,
// upgrade and uninstall.
//
// Its tests run by "make e2e-k8s". They need a build of Kubernetes, which takes
// a while the first time, and a good part of an hour; without TEST_KUBERNETES=1
// they are skipped.
package kubernetes
