// Package bench measures Underlay against the floor it stands on, each pair
// interleaved in one run, and prints ratios: an absolute time on a machine that
// others share proves nothing. docs/bench/latest.json keeps the rows of the last
// run that was committed, docs/bench/node.md and node.svg what they say of the
// node's datapath.
//
//	BenchmarkNode      the datapath against node to node, the AWS-style path,
//	                   VXLAN and a bare veth pair, which it sets up itself
//	BenchmarkUnderlay  pods of a lab, and ADD and DEL
//	BenchmarkFabric    the VPC's wires
//	BenchmarkVPCD      the API, against the rates asked of it
//
// -turns says how often each pair is measured, -slice for how long.
package bench
