/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The kernel's routing, asked about a packet.
 *
 * Where it sends what is kept for as long as the kernel keeps its own routes of
 * sockets: until its number of changes is another, which each change of a route, a
 * rule, an address, a device or a setting of forwarding raises (rt_genid in
 * net/ipv4/route.c). So an answer that is kept is the one that would be given.
 */

/* Of include/uapi/linux/bpf.h since Linux 6.10; the mark lies where smac does. */
#define FIB_LOOKUP_SKIP_NEIGH	(1 << 2)
#define FIB_LOOKUP_MARK		(1 << 5)

/* Asks the kernel's routing about a packet with a mark; how is of FIB_LOOKUP_…. It
 * returns 0 if the stack would send it on, and fills in how. */
static __always_inline long lookup_fib(struct __sk_buff *skb, struct bpf_fib_lookup *fib, const struct tuple *t,
				       __u32 mark, __u32 how)
{
	__builtin_memset(fib, 0, sizeof(*fib));
	fib->family = 2; /* AF_INET */
	fib->l4_protocol = t->protocol;
	fib->sport = bpf_htons(t->sport);
	fib->dport = bpf_htons(t->dport);
	fib->ifindex = skb->ifindex;
	fib->ipv4_src = v4_of(&t->src);
	fib->ipv4_dst = v4_of(&t->dst);
	__builtin_memcpy(fib->smac, &mark, sizeof(mark));
	return bpf_fib_lookup(skb, fib, sizeof(*fib), how | FIB_LOOKUP_MARK);
}

/* What we read of the kernel's. */
struct netns_ipv4 {
	unsigned int fib_rules_require_fldissect;
	unsigned char sysctl_fib_multipath_hash_policy;
	struct {
		int counter;
	} rt_genid;
} __attribute__((preserve_access_index));

struct net {
	struct netns_ipv4 ipv4;
} __attribute__((preserve_access_index));

struct net_device {
	struct {
		struct net *net;
	} nd_net;
} __attribute__((preserve_access_index));

struct sk_buff {
	struct net_device *dev;
} __attribute__((preserve_access_index));

#define FIELD_EXISTS 2 /* BPF_FIELD_EXISTS of __builtin_preserve_field_info */

/* Linux 6.2. */
extern void *bpf_cast_to_kern_ctx(void *) __ksym __weak;

/* Reads the number of changes; false if there is none to read, or if the way that a
 * packet takes depends on more than its addresses, its device and its mark. */
static __always_inline bool routing_id(struct __sk_buff *skb, __u32 *id)
{
	struct sk_buff *kernels;
	struct netns_ipv4 *v4;

	if (!bpf_cast_to_kern_ctx)
		return false;
	kernels = bpf_cast_to_kern_ctx(skb);
	v4 = &kernels->dev->nd_net.net->ipv4;
	if (!__builtin_preserve_field_info(v4->fib_rules_require_fldissect, FIELD_EXISTS) ||
	    v4->fib_rules_require_fldissect)
		return false;
	if (__builtin_preserve_field_info(v4->sysctl_fib_multipath_hash_policy, FIELD_EXISTS) &&
	    v4->sysctl_fib_multipath_hash_policy)
		return false;
	*id = v4->rt_genid.counter;
	return true;
}

/* A way that was asked for. */
struct way {
	__be32 src, dst;
	__u32 from;		/* device by which the packet came, 0: nobody's place */
	__u32 mark;
	__u32 id;		/* of the routing */
	__u32 to;		/* device by which it goes on; 0: by none */
};

#define WAYS	1024

/* By a hash of the addresses. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, WAYS);
	__type(key, __u32);
	__type(value, struct way);
} ways SEC(".maps");

/* The device by which the stack would send the packet on; 0 if it would not, as
 * when the destination is the node's own. */
__noinline __u32 ask_fib(struct __sk_buff *skb, const struct tuple *t, __u32 mark)
{
	struct bpf_fib_lookup fib;
	__u32 place, id = 0, to;
	__be32 src, dst;
	struct way *w = 0;

	if (!t)
		return 0;
	src = v4_of(&t->src);
	dst = v4_of(&t->dst);
	if (routing_id(skb, &id)) {
		place = ((src ^ dst >> 7) * 0x9e3779b1) >> 22;
		w = bpf_map_lookup_elem(&ways, &place);
		if (w && w->id == id && w->src == src && w->dst == dst && w->from == skb->ifindex && w->mark == mark)
			return w->to;
	}
	to = lookup_fib(skb, &fib, t, mark, FIB_LOOKUP_SKIP_NEIGH) ? 0 : fib.ifindex;
	if (w) {
		w->src = src;
		w->dst = dst;
		w->from = skb->ifindex;
		w->mark = mark;
		w->id = id;
		w->to = to;
	}
	return to;
}

_Static_assert(WAYS == 1 << (32 - 22), "as many places as the hash has values");
