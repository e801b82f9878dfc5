// Package differential compares vpcd's fabric with the model of test/vpcmodel, on
// real packets: worlds are made up at random, built in a running vpcd by the EC2
// API, and each packet of their scripts is sent as a frame from inside its
// instance. Who receives it must be who the model says.
//
//	seed ─▶ generate ─▶ script ─┬─▶ model ────────────────▶ verdicts ─┐
//	                            └─▶ EC2 API, frames ─▶ who received ──┴─▶ equal?
//	                                                                       │ no
//	                                        smaller scripts that differ ◀──┘ shrink
//
// The instances' kernels take no part: their interfaces have no addresses, so
// that nothing answers by itself. Frames go out and come in by packet sockets.
// One batch is all packets between two changes; after it a frame between two
// interfaces of a VPC of their own tells that the batch is through, since all are
// sent by one thread on one CPU, whose queue keeps their order.
//
// The internet's end is one more port. What gateways translate is known by the
// number that each packet carries; public addresses, VPCs' blocks of IPv6 and the
// ports of NAT gateways are the cloud's choice, so a script has its own for them
// (runner.real). At the end
// of a script the flow records of its interfaces must be what the model adds up
// (runner.compareRecords).
//
// TestChangedUnderTraffic has packets judged straight after an answer, TestKilled
// judges a vpcd that is killed under calls and traffic: worlds that
// change all the time are probed all the time, and what a packet meets must be what
// the model says of the rules before or after the change that is open (watched).
//
//	go test ./test/differential -run 'TestKilled$' -kills 200    # more of it
//
// What the fabric does not enforce yet, Enforced leaves out of worlds; a run says so.
package differential

//go:generate go run ./ledger
