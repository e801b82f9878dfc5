// Command pause is the first process of a pod. It holds the pod's namespaces
// open until a signal ends it and, where the containers of a pod share a PID
// namespace, reaps what they leave behind. registry.k8s.io/pause of a lab is made
// of it. It uses the standard library alone: the cache of kubebuild knows it by
// the files of this folder and by Go's version.
package main
