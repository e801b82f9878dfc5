// Package upstream runs Kubernetes' own network specs against a cluster and
// says what came of each.
//
// A Ledger (hack/kubernetes/e2e/specs.txt) lists every spec that the test
// binary links, under what is done with it: run, or skipped for a reason. Check
// holds ledger and binary against each other, so that a spec that upstream adds,
// renames or drops is noticed; Run runs what the ledger runs; and the ledger's
// floor is how many must have been executed at least.
//
// A spec that the ledger runs and that skips itself at run time was not
// executed: that is a failure, since else a cluster without nodes would pass.
package upstream
