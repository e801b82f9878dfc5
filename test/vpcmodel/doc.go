// Package vpcmodel says what a VPC does to a packet: a plain model of AWS's
// semantics, slow and obvious, against which vpcd's fabric is compared.
//
// It was written from the facts alone (docs/reference/vpc-semantics.md lists
// them, sentence by sentence, with the test that holds each) and shares no code
// with the fabric, so that one misunderstanding cannot make both agree (D4). It
// imports the nouns of internal/vpc and the protocol numbers of internal/packet,
// nothing else of this module.
//
// A World holds VPCs and what is in them, a clock, and for each interface the
// flows that it tracks. Statements change it: each makes an object, changes one,
// lets time pass, or sends a packet; Apply answers a packet with a Verdict. A
// Script is a list of statements. It has a text form, one statement per line,
// which Parse reads and String prints:
//
//	vpc v1 10.0.0.0/16
//	subnet s1 v1 10.0.1.0/24
//	group g1 v1
//	allow g1 in tcp 80 10.0.0.0/16
//	allow g1 out all 0.0.0.0/0
//	eni e1 s1 i1 10.0.1.10
//	eni e2 s1 i2 10.0.1.11 10.0.1.32/28
//	groups e1 g1
//	groups e2 g1
//	send 1 e1 tcp 10.0.1.10:1024 > 10.0.1.33:80 S => e2
//
// With IPv6 a VPC has a block of it, a subnet a second block, an interface addresses
// and /80 prefixes beside those of IPv4:
//
//	vpc v1 10.0.0.0/16 2001:db8:1::/56
//	subnet s1 v1 10.0.1.0/24 2001:db8:1:1::/64
//	eni e1 s1 i1 10.0.1.10 2001:db8:1:1::10 2001:db8:1:1:a::/80
//	send 1 e1 icmpv6 2001:db8:1:1::10 > 2001:db8:1:1::20 128/0 ident 7
//
// Statements that a test leaves out have AWS's defaults, except that a group has
// exactly the rules that it is given ("newgroup" and "defaultgroup" make one as
// AWS does), and that names stand where AWS has identifiers.
//
// A packet's way through Send, each step a function of its own:
//
//	source check → egress gate → route → ACL out → ACL in → destination check → ingress gate
//
// Where the facts are an inference, Settings holds the choice. All values belong
// to one goroutine.
package vpcmodel
