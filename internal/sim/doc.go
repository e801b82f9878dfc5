// Package sim runs thousands of nodes in virtual time: each the real
// ipam.Step, all against one account's token buckets and one model of EC2; and
// beside it, on the same events, a model of the AWS VPC CNI.
//
//	scenario ─► pods, nodes ─► cni ─┬─ agent: ipam.Step and what the agent does around it
//	                ▲               └─ awscni: the AWS VPC CNI's loop
//	                │                    │ calls
//	             answers ◄── cloud ◄─────┘
//	                         subnets, interfaces, IMDS · account: token buckets
//
// One goroutine, one heap of events, no clock but its own. What is random
// comes from generators that the seed starts: one for what happens to the
// cluster, the same for both models, and one for latencies and the choices of
// EC2. So equal configurations give equal reports, to the byte.
//
// Invariants, which tests hold: the addresses that nodes believe to hold are
// those that the cloud's interfaces have; a subnet's free count is its size
// less what is taken; no token is given that the bucket did not have.
//
// docs/reference/sim.md says what is modelled, and what is not.
package sim
