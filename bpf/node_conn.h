/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What is known of a packet's flow. */

/* A packet's addresses: who sends to whom. 16-byte addresses, v4-mapped. */
struct tuple {
	struct addr src;
	struct addr dst;
	__u16 sport;		/* host order; 0: the protocol has none */
	__u16 dport;
	__u8 protocol;		/* IPPROTO_… */
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 query;		/* enum icmp_query */
};

/* The two gates, each with its own verdict (D10). */
enum gate {
	GATE_GROUPS = 0,	/* security groups */
	GATE_NETPOL,		/* NetworkPolicy */
	GATES,
};
