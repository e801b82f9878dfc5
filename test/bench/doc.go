// Package bench measures Underlay against the floor it stands on, each pair
// interleaved in one run, and prints ratios: an absolute time on a machine that
// others share proves nothing. docs/bench/latest.json keeps the rows of the last
// run that was committed.
package bench
