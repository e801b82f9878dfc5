// Package policy decides what an endpoint may send and receive, by two gates
// that know nothing of each other: the security groups of AWS, and Kubernetes'
// NetworkPolicy. Both must allow (D10).
//
// It is pure: no I/O, no clock, no goroutine. Input is what the world says
// (rules, who is a member of which group, pods with their labels); what comes
// out is either a verdict or tables that the kernel's programs judge by:
//
//	Input ──── Evaluate(endpoint, flow) ───────────────► Verdict × 2
//	  └─ NewCompiler ─ Compile(endpoint) ─► Tables ─ bpf/node_policy.h ─┘
//
// Evaluate is the reference: slow, over the input as it stands, rule after
// rule. The compiler shares no code with it; tests compare the two, and both
// with the kernel.
//
// # The table
//
// A Table is one gate of an endpoint, both directions, as an array of cells of
// 64 bytes. It holds no pointer and no name, is built aside and put in place
// whole; endpoints with equal policy have equal tables, by their Digest, and
// share one in the kernel. A direction has
//
//	an index of the remote IPv4 addresses   ┐ intervals in order, in a search
//	an index of the remote IPv6 addresses   │ tree of cells; each interval has
//	an index of (protocol, port)            ┘ the number of a bitmap
//	bitmaps, one bit per rule
//	the rules' ids
//
// A packet looks its address and its port up, ANDs the two bitmaps and takes
// the first bit that is left: the rule that allows it. None: the fallback. A
// ports' list, a peers' list, a prefix list or a group's ten thousand members are
// one bit each, so that what a packet costs depends on the rules' number
// hardly, and on the members' as the depth of a tree does.
//
// # Rule ids
//
// A RuleID is a hash of the rule's name, so that it is the same on each node
// and after each restart with nothing kept. Names are the operator's:
// "sg-0123… ingress sgr-0456…", "default/allow-dns egress[0]". Two names of one
// node's rules with one hash are told apart by order; Compiler.Rules has the
// table of the ids that are in use.
package policy
