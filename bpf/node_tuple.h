/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Who talks to whom, as conntrack and policy see it. Needs struct addr.
 */

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

enum icmp_query {
	QUERY_NONE = 0,		/* not an ICMP query */
	QUERY_REQUEST,		/* sport is its identifier, dport the request's type */
	QUERY_REPLY,		/* the same */
};

/* The two gates, each with its own verdict (D10). */
enum gate {
	GATE_GROUPS = 0,	/* security groups */
	GATE_NETPOL,		/* NetworkPolicy */
	GATES,
};

static __always_inline bool same_addr(const struct addr *a, const struct addr *b)
{
	const __u64 *x = (const void *)a, *y = (const void *)b;

	return ((x[0] ^ y[0]) | (x[1] ^ y[1])) == 0;
}

static __always_inline bool is_v4(const struct addr *a)
{
	const __u64 *hi = (const void *)a->b;
	const __u32 *w = (const void *)a->b;

	return !*hi && w[2] == bpf_htonl(0xffff);
}
