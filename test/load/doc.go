// Package load puts a node under load and failure: bursts of pods, an EC2 that
// is away, an agent that is killed again and again. What it asserts is counted,
// not timed; times are logged.
//
//	go test ./test/load -run Kill -kills 500    # more of it
package load
