// Package dns is the resolver of each VPC: what answers at the third address of
// its primary block and at 169.254.169.253.
//
//	datagram or connection of one ENI → the ENI's VPC → Answer → the same way back
//
// It answers from what the VPC is at that moment, and asks nobody: nothing leaves
// the machine. What it does not know of itself is not to be had.
//
//	ip-10-0-0-5.ec2.internal                 A, for addresses that interfaces of the VPC hold
//	i-0123456789abcdef0.ec2.internal         A, where EnableResourceNameDnsARecord says so
//	5.0.0.10.in-addr.arpa                    PTR, the name that EC2 shows
//	ec2-198-51-100-1.compute-1.amazonaws.com A: the private address within the VPC, the public one elsewhere
//	internet.test                            A, the lab's server on its internet
//
// Other names of these domains, of private and link-local reverse zones and of
// .test, .invalid and .local do not exist (NXDOMAIN). All others end as for a resolver
// whose internet is down: SERVFAIL.
//
// Everything is safe for concurrent use.
package dns
