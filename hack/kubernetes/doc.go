// Package kubernetes holds nothing: its module says which versions Kubernetes'
// own programs, its end-to-end tests and Ginkgo are built from, apart from
// Underlay's module, which needs none of that.
//
// The programs stand in go.mod as tools, so that "go mod tidy" keeps what they
// need. Staging modules (k8s.io/api and so on) are v0.0.0 in Kubernetes' own
// go.mod and are replaced by their releases here, one line for each. To move to
// another release: change the version of k8s.io/kubernetes, all the v0.X.Y that
// belong to it, and "godebug" as upstream's go.mod has it; then go mod tidy, and
// compare the names of images in internal/cli/kubebuild with
// test/utils/image/manifest.go of that release (a test there says which).
package kubernetes
