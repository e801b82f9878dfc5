// Package kubebuild makes what a lab with Kubernetes runs: Kubernetes' programs,
// CoreDNS and Helm out of their Go modules, and container images out of these,
// without a registry, a container engine or a release archive. It keeps them:
//
//	CACHE/kubernetes/lock                  flock: one builder at a time, and who it is
//	                /v1.37.2-3f2a…/bin       kube-apiserver, kubelet, helm, …
//	                              /images    OCI archives: pause-59f1….tar, …
//	                              /manifest.json  what of that is whole, and from which inputs
//	                              /build.log the compiler's last output
//
// CACHE is $UNDERLAY_CACHE, else "underlay" in the user's cache folder. The hash
// in a folder's name is of all that decides about its programs: go.mod and go.sum
// of hack/kubernetes, hack/coredns and hack/helm, sources of our own, flags, Go's
// version and the architecture. So two checkouts share a folder or do not meet.
// What depends on more (the tests, which are source; images, which hold the
// distribution's tools and Underlay's own programs) is looked up by a key in the
// manifest; an image has it in its name as well, since what a running lab was
// told to import must not change under it.
//
// Invariants: a file is made aside, synced, renamed into place, and only then
// entered in the manifest, which is itself replaced by a rename; what the
// manifest does not have, with that key and size, does not count. A builder that
// is killed leaves what it has finished, and a scratch folder that the next one
// sweeps. Nothing is compiled that another folder has under the same key: it is
// linked. Ensure with nothing to do reads and takes no lock.
//
// Ensure may be called by many goroutines and processes at once.
package kubebuild
