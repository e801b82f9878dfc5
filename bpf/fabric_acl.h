/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Network ACLs: at the boundary of a subnet, for each packet that leaves or
 * enters it. They know no flows: an answer needs an entry of its own.
 */

/* AWS: 20 entries per direction, can be raised to 40. */
#define ACL_ENTRIES 40

/* The remote side is net/mask: the destination of what leaves, the source of what enters. */
struct acl_entry {
	__be32 net;
	__be32 mask;
	__u16 from; /* destination port; ICMP: type, ANY: all */
	__u16 to; /* ICMP: code, ANY: all */
	__u8 protocol;
	__u8 all_protocols;
	__u8 allow;
	__u8 pad;
};

/* Replaced whole, as a policy is. */
struct acl {
	__u64 version; /* digest of all that follows */
	__u32 count[2]; /* by direction */
	struct acl_entry entries[2][ACL_ENTRIES]; /* by direction, in their order: the first that matches wins */
};

struct acl *shown_acl __attribute__((unused));

struct subnet_key {
	__u32 vni;
	__be32 subnet; /* network address */
};

struct acl_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct acl));
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, struct subnet_key);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__array(values, struct acl_map);
} acls SEC(".maps");

struct acl_question {
	const struct acl_entry *entries;
	__be32 address; /* the remote side's */
	__u32 count;
	__u16 dport;
	__u8 protocol;
	__u8 type;
	__u8 code;
	__u8 allow; /* the answer; no entry: deny */
};

#define ENTRIES_PER_TURN 8
_Static_assert(ACL_ENTRIES % ENTRIES_PER_TURN == 0, "the last turn is as long as the others");

static __always_inline int entry_concerns(const struct acl_entry *e, const struct acl_question *q)
{
	if ((q->address & e->mask) != e->net)
		return 0;
	if (e->all_protocols)
		return 1;
	if (e->protocol != q->protocol)
		return 0;
	if (q->protocol == IPPROTO_TCP || q->protocol == IPPROTO_UDP)
		return q->dport >= e->from && q->dport <= e->to;
	if (q->protocol == IPPROTO_ICMP)
		return (e->from == ANY || e->from == q->type) && (e->to == ANY || e->to == q->code);
	return 1;
}

static long acl_match(__u64 turn, struct acl_question *q)
{
	__u64 first = turn * ENTRIES_PER_TURN;
	const struct acl_entry *e;

	if (first > ACL_ENTRIES - ENTRIES_PER_TURN)
		return 1;
	e = &q->entries[first];
#pragma unroll
	for (int k = 0; k < ENTRIES_PER_TURN; k++) {
		if (first + k >= q->count)
			return 1;
		if (entry_concerns(&e[k], q)) {
			q->allow = e[k].allow;
			return 1;
		}
	}
	return 0;
}

/* acl_allows says whether a subnet's ACL lets a packet leave or enter it. */
__noinline int acl_allows(const struct packet *p, __u32 vni, __be32 subnet, __u32 which)
{
	__u32 direction = which & INGRESS; /* 0 or 1, as the verifier sees */
	struct subnet_key key = {.vni = vni, .subnet = subnet};
	struct acl_question q = {};
	__u32 zero = 0;
	struct acl *acl;
	void *inner;

	if (!p)
		return 0;
	inner = bpf_map_lookup_elem(&acls, &key);
	acl = inner ? bpf_map_lookup_elem(inner, &zero) : 0;
	if (!acl)
		return 0;
	q.entries = acl->entries[direction];
	q.count = acl->count[direction];
	q.address = direction == EGRESS ? p->tuple.daddr : p->tuple.saddr;
	q.dport = p->tuple.dport;
	q.protocol = p->tuple.protocol;
	q.type = p->icmp_type;
	q.code = p->icmp_code;
	bpf_loop(ACL_ENTRIES / ENTRIES_PER_TURN, acl_match, &q, 0);
	return q.allow;
}
