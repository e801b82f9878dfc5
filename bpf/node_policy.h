/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The policy of endpoints: two gates, security groups and NetworkPolicy, that
 * know nothing of each other. A flow's first packet is judged here; what
 * follows is conntrack's, which keeps the verdict.
 *
 * A table is one gate of an endpoint, both directions, as package policy makes
 * it (internal/policy/doc.go): an array of cells of 64 bytes, never changed once
 * it is in map policy_tables, and put in place whole. What is looked up in it is
 * the same for every number of rules up to 512, and grows with the logarithm, to
 * base 16, of the number of addresses.
 *
 * Needs node_tuple.h.
 */

/* What policy_judge is asked: a direction, and what else is known. */
enum policy_ask {
	POLICY_EGRESS = 0,	/* what the endpoint sends */
	POLICY_INGRESS = 1,	/* what it receives */
	POLICY_DIRECTION = 1,	/* the bit of the two above */
	POLICY_FROM_HOST = 2,	/* the packet came from no interface: the node's own */
	POLICY_NO_GROUPS = 4,	/* the gate of security groups is not asked, and allows */
};

/* Rules' ids that stand for no rule; those of package policy. */
enum policy_rule {
	RULE_NONE = 0,		/* the gate does not judge the endpoint */
	RULE_HOST = 1,		/* the node reaches its own pods */
	RULE_SELF = 2,		/* a pod reaches itself */
};

enum policy_flags {
	POLICY_STACK = 1,	/* its packets are never forwarded directly */
};

/* What the gates say of a flow. */
struct verdict {
	__u32 rule[GATES];	/* that decided; below 16: enum policy_rule */
	__u32 epoch[GATES];	/* of the table, 0: the gate does not judge */
	__u32 generation;	/* policy_now() when the question was asked */
	__u8 allow[GATES];
	__u8 audit[GATES];	/* allowed only because the gate enforces nothing */
	__u8 untracked;		/* AWS does not track the flow: it ends with its rules */
	__u8 stack;		/* the endpoint's packets are never forwarded directly */
	__u8 pad[2];
};

/* The policy of one host veth. The key stands in the value as well: an entry's
 * memory may be another's as soon as it is deleted, under a program that reads
 * it (kernel/bpf/hashtab.c does not wait for readers). */
struct policy_endpoint {
	__u32 ifindex;
	__u32 flags;
	__u32 table[GATES];	/* number in policy_tables, 0: the gate does not judge */
	__u32 epoch[GATES];	/* of the tables, 0: there is none */
};

struct policy_cell {
	union {
		__u32 w[16];
		__u64 d[8];
	};
};

#define POLICY_TABLE_VERSION	1

/* The first cell of a table. */
struct policy_head {
	__u32 version;
	__u32 epoch;
	__u32 reserved[2];
	__u8 digest[16];
	__u32 rest[8];
};

enum policy_mode {
	MODE_NONE = 0,		/* everything passes, by no rule */
	MODE_ENFORCE = 1,
	MODE_AUDIT = 2,
};

/* The second cell describes egress, the third ingress. Trees and lists are given
 * by their first cell. */
struct policy_direction {
	__u32 mode;
	__u32 open;		/* protocols of which all ports are open to everybody */
	__u32 fallback;		/* the rule if none allows */
	__u8 levels4, levels6, levels_port;
	__u8 each;		/* cells of a bitmap */
	__u32 ipv4, ipv4_bitmaps;
	__u32 ipv6, ipv6_bitmaps;
	__u32 ports, port_bitmaps;
	__u32 bitmaps;
	__u32 rules;
	__u32 everybody4, everybody6;	/* bitmaps of rules for everybody */
	__u32 rest[2];
};

_Static_assert(sizeof(struct policy_cell) == 64, "a cell is a cache line");
_Static_assert(sizeof(struct policy_head) == 64, "a cell");
_Static_assert(sizeof(struct policy_direction) == 64, "a cell");

struct policy_table {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_INNER_MAP);	/* each with as many cells as it has */
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct policy_cell));
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, NODE_POLICY_TABLES);
	__uint(key_size, sizeof(__u32));
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__array(values, struct policy_table);
} policy_tables SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);		/* as ifaces */
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);			/* ifindex of a host veth */
	__type(value, struct policy_endpoint);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} policy_endpoints SEC(".maps");

/* Raised after each change of any endpoint's policy, never 0. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} policy_generation SEC(".maps");

/*
 * policy_now returns the generation of all tables. A flow whose verdict was given
 * in this generation need not be looked at again; in another one, its verdict
 * stands as long as its endpoint's epoch does (policy_epoch).
 */
static __always_inline __u32 policy_now(void)
{
	__u32 zero = 0;
	__u32 *g = bpf_map_lookup_elem(&policy_generation, &zero);

	return g ? *(volatile __u32 *)g : 0;
}

/* policy_entry reads an endpoint's entry; false if there is none. */
static __always_inline bool policy_entry(__u32 ifindex, struct policy_endpoint *out)
{
	volatile struct policy_endpoint *e;

	/* Twice: the entry may have been exchanged while it was read. */
#pragma unroll
	for (int i = 0; i < 2; i++) {
		e = bpf_map_lookup_elem(&policy_endpoints, &ifindex);
		if (!e)
			return false;
		out->table[GATE_GROUPS] = e->table[GATE_GROUPS];
		out->table[GATE_NETPOL] = e->table[GATE_NETPOL];
		out->epoch[GATE_GROUPS] = e->epoch[GATE_GROUPS];
		out->epoch[GATE_NETPOL] = e->epoch[GATE_NETPOL];
		out->flags = e->flags;
		/* Last: the kernel copies a value from its beginning on. */
		out->ifindex = e->ifindex;
		if (out->ifindex == ifindex)
			return true;
	}
	return false;
}

/* policy_epoch returns the epoch of a gate's table, 0 if the gate does not judge
 * the endpoint. */
static __always_inline __u32 policy_epoch(__u32 ifindex, __u32 gate)
{
	struct policy_endpoint e;

	if (!policy_entry(ifindex, &e))
		return 0;
	return gate == GATE_GROUPS ? e.epoch[GATE_GROUPS] : e.epoch[GATE_NETPOL];
}

static __always_inline struct policy_cell *policy_cell(void *table, __u32 i)
{
	return bpf_map_lookup_elem(table, &i);
}

/* The i-th word of a list that begins with a cell; 0 beyond the table's end. */
static __always_inline __u32 policy_word(void *table, __u32 first, __u32 i)
{
	struct policy_cell *c = policy_cell(table, first + i / 16);

	return c ? c->w[i & 15] : 0;
}

/* Comparisons without a branch, which would double what the verifier has to follow
 * with each. The compiler must not see that they are comparisons. */
static __always_inline __u64 less32(__u32 a, __u32 b)
{
	__u64 x = a, y = b;

	asm volatile("" : "+r"(x));
	return (x - y) >> 63;
}

static __always_inline __u64 less64(__u64 a, __u64 b)
{
	asm volatile("" : "+r"(a));
	return ((~a & b) | ((~a | b) & (a - b))) >> 63;
}

static __always_inline __u64 equal64(__u64 a, __u64 b)
{
	__u64 x = a ^ b;

	asm volatile("" : "+r"(x));
	return ((x | -x) >> 63) ^ 1;
}

/* A rank that no list has: the bitmap there is 0, which no rule is in. */
#define NOWHERE	0xffffffff

#define POLICY_MAX_LEVELS	5
#define POLICY_MAX_LEVELS6	8

/*
 * policy_rank returns the number of the interval that a key is in: intervals are
 * given by their last keys, in a complete tree of 16 per cell, whose inner nodes
 * have the last of each child.
 */
static __noinline __u32 policy_rank(void *table, __u32 first, __u32 levels, __u32 key)
{
	__u32 node = 0, inner = 0, width = 1, n = 0;
	struct policy_cell *c;

	for (__u32 level = 0; level < POLICY_MAX_LEVELS; level++) {
		c = policy_cell(table, first + node);
		if (!c)
			return NOWHERE;
		n = 0;
#pragma unroll
		for (int i = 0; i < 16; i++) {
			n += less32(c->w[i], key);
			/* One after the other, in few registers. */
			asm volatile("" : "+r"(n));
		}
		if (level + 1 >= levels)
			break;
		node = node * 16 + 1 + n;
		inner += width;
		width *= 16;
	}
	return (node - inner) * 16 + n;
}

/* The same with 4 keys of two words per cell. */
static __noinline __u32 policy_rank6(void *table, __u32 first, __u32 levels, __u64 hi, __u64 lo)
{
	__u32 node = 0, inner = 0, width = 1, n = 0;
	struct policy_cell *c;

	for (__u32 level = 0; level < POLICY_MAX_LEVELS6; level++) {
		c = policy_cell(table, first + node);
		if (!c)
			return NOWHERE;
		n = 0;
#pragma unroll
		for (int i = 0; i < 4; i++) {
			n += less64(c->d[2 * i], hi) | (equal64(c->d[2 * i], hi) & less64(c->d[2 * i + 1], lo));
			asm volatile("" : "+r"(n));
		}
		if (level + 1 >= levels)
			break;
		node = node * 4 + 1 + n;
		inner += width;
		width *= 4;
	}
	return (node - inner) * 4 + n;
}

/* Cells of a bitmap at most, of 512 rules each. */
#define POLICY_MAX_EACH	4

/* The number of the lowest bit that is set: how many are below it. */
static __always_inline __u32 lowest_bit(__u64 x)
{
	return __builtin_popcountll((x & -x) - 1);
}

/* policy_common returns the id of the first rule that is in both of two bitmaps, 0
 * if none is. That it is read from the table, and no number counted here, lets
 * the verifier forget by which way it came. */
static __noinline __u32 policy_common(void *table, const struct policy_direction *d, __u32 a, __u32 b)
{
	struct policy_cell *x = 0, *y = 0;
	__u32 each = d->each, i, word = 0;
	__u64 any = 0, both = 0;

	for (i = 0; i < POLICY_MAX_EACH; i++) {
		if (i >= each)
			return 0;
		x = policy_cell(table, d->bitmaps + a * each + i);
		y = policy_cell(table, d->bitmaps + b * each + i);
		if (!x || !y)
			return 0;
#pragma unroll
		for (int k = 0; k < 8; k++)
			any |= x->d[k] & y->d[k];
		if (any)
			break;
	}
	if (!any || !x || !y)
		return 0;
#pragma unroll
	for (int k = 7; k >= 0; k--) {
		__u64 w = x->d[k] & y->d[k];
		__u64 here = equal64(w, 0) - 1; /* all ones unless w is 0 */

		both = (w & here) | (both & ~here);
		word = (k & here) | (word & ~here);
	}
	return policy_word(table, d->rules, i * 512 + word * 64 + lowest_bit(both));
}

/* Bits of policy_direction.open; IPv6's are shifted left by one. */
#define OPEN_POLICY_TCP	1
#define OPEN_POLICY_UDP	4

/* policy_gate asks one table. Not static: it is verified by itself and once. */
__noinline int policy_gate(const struct tuple *t, __u32 number, __u32 direction, __u32 gate,
				  struct verdict *v)
{
	struct policy_direction *d, *other;
	__u32 address, everybody, port, open, rank, rule, want;
	const struct addr *remote;
	void *table;

	if (!t || !v)
		return 0;
	/* What cannot be looked up is denied. */
	gate &= 1;
	v->allow[gate] = 0;
	table = bpf_map_lookup_elem(&policy_tables, &number);
	if (!table)
		return 0;
	d = (void *)policy_cell(table, direction ? 2 : 1);
	if (!d)
		return 0;
	if (d->mode == MODE_NONE) {
		v->allow[gate] = 1;
		return 0;
	}

	remote = direction ? &t->src : &t->dst;
	if (is_v4(remote)) {
		rank = policy_rank(table, d->ipv4, d->levels4,
				   bpf_ntohl(*(const __be32 *)(const void *)&remote->b[12]));
		address = policy_word(table, d->ipv4_bitmaps, rank);
		everybody = d->everybody4;
	} else {
		const __u64 *w = (const void *)remote->b;

		rank = policy_rank6(table, d->ipv6, d->levels6, bpf_be64_to_cpu(w[0]),
				    bpf_be64_to_cpu(w[1]));
		address = policy_word(table, d->ipv6_bitmaps, rank);
		everybody = d->everybody6;
	}

	want = (__u32)t->protocol << 16;
	open = 0;
	switch (t->protocol) {
	case IPPROTO_TCP:
		open = OPEN_POLICY_TCP;
		want |= t->dport;
		break;
	case IPPROTO_UDP:
		open = OPEN_POLICY_UDP;
		want |= t->dport;
		break;
	case IPPROTO_SCTP:
		want |= t->dport;
		break;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		want |= (__u32)t->icmp_type << 8 | t->icmp_code;
		break;
	}
	rank = policy_rank(table, d->ports, d->levels_port, want);
	port = policy_word(table, d->port_bitmaps, rank);

	/* Bitmap 0 is empty. */
	rule = address && port ? policy_common(table, d, address, port) : 0;
	if (!rule) {
		v->allow[gate] = v->audit[gate] = d->mode == MODE_AUDIT;
		v->rule[gate] = d->fallback;
		return 0;
	}
	v->allow[gate] = 1;
	v->rule[gate] = rule;
	if (gate != GATE_GROUPS || !open || !everybody)
		return 0;
	other = (void *)policy_cell(table, direction ? 1 : 2);
	if (other && (other->open & (is_v4(remote) ? open : open << 1)))
		v->untracked = policy_common(table, d, everybody, port) != 0;
	return 0;
}

/*
 * policy_judge asks both gates of the endpoint at host veth ifindex about the
 * first packet of a flow; ask is of enum policy_ask. Not static, as above. An endpoint without a table for a gate is not judged by it:
 * whether it must have one is IFACE_READY's business. It returns 0.
 */
__noinline int policy_judge(const struct tuple *t, __u32 ifindex, __u32 ask, struct verdict *v)
{
	struct policy_endpoint e;
	__u32 own;

	if (!t || !v)
		return 0;
	__builtin_memset(v, 0, sizeof(*v));
	v->generation = policy_now();
	v->allow[GATE_GROUPS] = v->allow[GATE_NETPOL] = 1;
	if (policy_entry(ifindex, &e)) {
		v->stack = !!(e.flags & POLICY_STACK);
		v->epoch[GATE_GROUPS] = e.epoch[GATE_GROUPS];
		v->epoch[GATE_NETPOL] = e.epoch[GATE_NETPOL];
	} else {
		e.table[GATE_GROUPS] = e.table[GATE_NETPOL] = 0;
	}
	own = 0;
	if ((ask & POLICY_FROM_HOST) && (ask & POLICY_DIRECTION) == POLICY_INGRESS)
		own = RULE_HOST;
	else if (same_addr(&t->src, &t->dst))
		own = RULE_SELF;
	if (own) {
		v->rule[GATE_GROUPS] = v->rule[GATE_NETPOL] = own;
		return 0;
	}
	if (e.table[GATE_GROUPS] && !(ask & POLICY_NO_GROUPS))
		policy_gate(t, e.table[GATE_GROUPS], ask & POLICY_DIRECTION, GATE_GROUPS, v);
	if (e.table[GATE_NETPOL])
		policy_gate(t, e.table[GATE_NETPOL], ask & POLICY_DIRECTION, GATE_NETPOL, v);
	return 0;
}
