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
} __attribute__((aligned(8)));

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

/* Addresses are written, copied and compared by words: a processor that reads a word
 * which was just stored byte by byte waits until all of it is in its cache. Those on
 * a program's stack must be aligned for it. */
#define ADDR_ALIGNED __attribute__((aligned(8)))

/* A function that few packets come to: the code that calls it is moved out of the way of
 * the others, which then meet fewer cache lines. In .text, where the loader looks for it. */
#define __cold __attribute__((cold, section(".text")))

/* Words that hold what has another type, too. */
typedef __u64 __attribute__((may_alias)) word;
typedef __u32 __attribute__((may_alias)) half_word;
typedef __u16 __attribute__((may_alias)) quarter_word;

static __always_inline void copy_addr(struct addr *to, const struct addr *from)
{
	const word *y = (const void *)from;
	word *x = (void *)to;

	x[0] = y[0];
	x[1] = y[1];
}

/* The second word of a v4-mapped address; the first is 0: 10 bytes 0, 2 bytes 0xff, and
 * the address. */
static __always_inline __u64 mapped_v4(__be32 from)
{
	return bpf_htonl(0xffff) | (__u64)from << 32;
}

static __always_inline void map_v4(struct addr *to, __be32 from)
{
	word *x = (void *)to;

	x[0] = 0;
	x[1] = mapped_v4(from);
}

static __always_inline bool same_addr(const struct addr *a, const struct addr *b)
{
	const word *x = (const void *)a, *y = (const void *)b;

	return ((x[0] ^ y[0]) | (x[1] ^ y[1])) == 0;
}

static __always_inline bool is_v4(const struct addr *a)
{
	const __u64 *hi = (const void *)a->b;
	const __u32 *w = (const void *)a->b;

	return !*hi && w[2] == bpf_htonl(0xffff);
}
