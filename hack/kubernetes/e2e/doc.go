// Package e2e is a test binary of upstream's network specs: the judge of a
// cluster that runs Underlay. It links test/e2e/network and
// test/e2e/common/network of Kubernetes, and of the rest what these import: no
// cloud provider, no CSI driver, whose compilation takes longer than the specs.
//
// specs.txt says of each spec that it links whether it is run, and if not, why.
// test/kubernetes of the main module holds the binary and the list against each
// other, runs what is to run, and counts.
package e2e
