/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The short way, which most packets take: whole IPv4 with TCP or UDP, of a direct flow that
 * is there, goes on, and was judged under the policy of now. It does for them what the long
 * way does, which follows every other packet; so a condition that is missing here is a
 * fault, one too many costs time alone.
 *
 * What such a packet costs is cache lines, of code as of data. So all that is known of it
 * is in registers, the packet is not written to memory, and nothing is asked that stands in
 * a line of its own. Nothing is changed before it is certain that the packet takes this way.
 *
 * Needs node_table.h, node_direct.h and node_judge.h.
 */

#define LONG_WAY	-100	/* no TC_ACT_… */

/* Gates of a flow whose packets may take the short way. */
#define SHORT_MASK	((__u64)0xff << 8 | (__u64)CONN_DENIED << 16)
#define SHORT_GATES	((__u64)PROVENANCE_DIRECT << 8)

_Static_assert(GATES_PROVENANCE(SHORT_GATES) == PROVENANCE_DIRECT && GATES_PROVENANCE(SHORT_MASK) == 0xff &&
	       GATES_FLAGS(SHORT_MASK) == CONN_DENIED, "as gates are");

/* Reads a packet and finds its flow; 0: it takes the long way. */
static __always_inline struct conn *short_flow(struct __sk_buff *skb, struct packet *p, __u64 *g, struct cpu *cpu)
{
	struct conn *c;

	if (!short_way || !direct_enabled || !cpu || skb->vlan_present || !read_plain(skb, p) ||
	    for_stack(skb, p))
		return 0;
	/* It may begin the flow anew. */
	if (p->tuple.protocol == IPPROTO_TCP && (p->flags & PACKET_OPENS))
		return 0;
	c = conn_first(&p->key, g);
	if (!c || (*g & SHORT_MASK) != SHORT_GATES)
		return 0;
	p->now = time_of(cpu);
	if (conn_over(c, p->now) || (c->generation && c->generation != policy_now()))
		return 0;
	return c;
}

/* The pod here that is an end of a flow, if its gate is open; 0: ask more. */
static __always_inline struct iface *short_pod(const struct conn *c, __u32 end, __u32 ifindex)
{
	__u32 number = c->slot[end & 1];
	struct slot *s = bpf_map_lookup_elem(&slots, &number);

	if (!s || s->ifindex != ifindex || c->ifindex[end & 1] != ifindex || !(s->iface.flags & IFACE_READY))
		return 0;
	return &s->iface;
}

/* conn_see. What is called when a connection ends gets a key in memory. */
static __always_inline void short_see(struct conn *c, const struct packet *p, bool counts)
{
	struct conn_key k;

	if (conn_step(c, p, counts)) {
		k = p->key;
		conn_left(&k, c);
	}
}

static __noinline int short_from_pod(struct __sk_buff *skb)
{
	struct cpu *cpu = this_cpu();
	struct iface *pod, *to = 0;
	struct router *r = 0;
	__u32 end, ifindex = 0;
	struct packet p;
	struct ethhdr *eth;
	struct conn *c;
	__u64 g;

	c = short_flow(skb, &p, &g, cpu);
	if (!c)
		return LONG_WAY;
	end = p.end & 1;
	pod = short_pod(c, end, skb->ifindex);
	eth = (void *)(long)skb->data;
	if (!pod || (void *)(eth + 1) > (void *)(long)skb->data_end)
		return LONG_WAY;
	if (eth->h_proto != bpf_htons(ETH_P_IP) || !same_mac(eth->h_source, pod->pod_mac) ||
	    !same_addr(&p.tuple.src, &pod->addr))
		return LONG_WAY;
	if (GATES_FLAGS(g) & CONN_LOCAL) {
		ifindex = c->ifindex[1 - end];
		to = short_pod(c, 1 - end, ifindex);
		if (!to || !same_addr(&p.tuple.dst, &to->addr) || too_long(skb, ifindex))
			return LONG_WAY;
	} else {
		r = router_of(cpu, pod->eni);
		if (!r->known || p.now - r->asked_ns >= ROUTER_NS || p.longest > r->mtu)
			return LONG_WAY;
		/* Of a tunnel's the segments are longer than its own header says. */
		if (skb->gso_size && p.tuple.protocol != IPPROTO_TCP)
			return LONG_WAY;
	}
	if (!lower_ttl_here(skb))
		return LONG_WAY;
	if (!(c->seen & (CONN_SENDER << end)))
		c->seen |= CONN_SENDER << end;
	short_see(c, &p, true);
	count_traffic(pod, &p, true);
	cpu->direct++;
	return to ? enter_pod(skb, &p, ifindex, to) : leave_by_router(skb, r);
}

static __noinline int short_from_eni(struct __sk_buff *skb)
{
	struct cpu *cpu = this_cpu();
	__u32 end, ifindex;
	struct iface *pod;
	struct packet p;
	struct conn *c;
	__u64 g;

	if (skb->protocol != bpf_htons(ETH_P_IP))
		return LONG_WAY;
	c = short_flow(skb, &p, &g, cpu);
	if (!c || (GATES_FLAGS(g) & CONN_LOCAL))
		return LONG_WAY;
	end = p.end & 1;
	ifindex = c->ifindex[1 - end];
	pod = short_pod(c, 1 - end, ifindex);
	if (!pod || !same_addr(&p.tuple.dst, &pod->addr) || too_long(skb, ifindex) || !lower_ttl_here(skb))
		return LONG_WAY;
	short_see(c, &p, !(c->seen & (CONN_SENDER << end)));
	cpu->direct++;
	return enter_pod(skb, &p, ifindex, pod);
}
