/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The short way of packets whose like has passed.
 *
 * Where a TCP or UDP packet goes, and whether ACLs, destination check and the
 * rules of groups let it, depends on its tuple, on its Ethernet destination and
 * on what Set has written, and on nothing else. Set counts what it writes (map
 * generations), after it has written it. So the sender's flow keeps that a
 * packet of it has come through all checks, where it went, and in which
 * generation: until the next, its like come through as well. What does change
 * from packet to packet is asked each time: both ENIs' flows must live, and the
 * packet must not be too long. Any doubt, and the packet takes the long way,
 * which judges it as if there were no other.
 *
 * A program that has read a generation may have met younger entries, and notes
 * what it found under the older number; so what is noted under a number is never
 * older than it.
 */

/* How often Set has written. Never 0 once Open has returned. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} generations SEC(".maps");

/*
 * What a flow keeps is one word, so that it is written and read as one: the
 * generation, above it the receiver's fabric end, the traffic path, and whether
 * the frame was for the router.
 */
#define PASSED_IFINDEX_SHIFT 32
#define PASSED_IFINDEX_MASK 0xffffffu
#define PASSED_PATH_SHIFT 56
#define PASSED_PATH_MASK 0x7f
#define PASSED_ROUTED (1ull << 63)

/* Judges what did not pass before: a program, for a stack of its own. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} judges SEC(".maps");

static __always_inline __u32 generation(void)
{
	__u32 zero = 0;
	__u32 *g = bpf_map_lookup_elem(&generations, &zero);

	return g ? *(volatile __u32 *)g : 0;
}

/* goes_on says whether a flow is there that a packet continues; a SYN may begin another. */
static __always_inline int goes_on(const struct flow *f, const struct packet *p)
{
	return f && f->own.mtu && f->expires > p->now;
}

/* note_passed lets the like of a packet that has passed take the short way. */
static __noinline void note_passed(const struct packet *p, const struct eni *self, __u32 ifindex,
				   const struct way *w, __u32 since)
{
	struct flow_key key;
	struct flow *f;

	if (!since || w->to->ifindex > PASSED_IFINDEX_MASK ||
	    (p->tuple.protocol != IPPROTO_TCP && p->tuple.protocol != IPPROTO_UDP))
		return;
	set_flow_key(&key, w->to->ifindex, INGRESS, &p->tuple);
	f = bpf_map_lookup_elem(&flows, &key);
	if (!f)
		return;
	if (!f->own.mtu) {
		__builtin_memcpy(f->own.mac, w->to->mac, 6);
		f->own.mtu = w->to->mtu;
	}
	set_flow_key(&key, ifindex, EGRESS, &p->tuple);
	f = bpf_map_lookup_elem(&flows, &key);
	if (!f)
		return;
	if (!f->own.mtu) {
		__builtin_memcpy(f->own.mac, self->mac, 6);
		f->own.mtu = self->mtu;
	}
	*(volatile __u64 *)&f->passed =
		(same_mac(w->source, self->mac) ? 0 : PASSED_ROUTED) |
		(__u64)path_of(w) << PASSED_PATH_SHIFT |
		(__u64)w->to->ifindex << PASSED_IFINDEX_SHIFT | since;
}

/*
 * pass_again delivers a packet whose like has passed; 0: it is none, and
 * nothing has been done to it or counted of it.
 */
static __always_inline int pass_again(struct __sk_buff *skb)
{
	void *end = (void *)(long)skb->data_end;
	struct ethhdr *eth = (void *)(long)skb->data;
	struct iphdr *iph = (void *)(eth + 1);
	__u8 *l4 = (void *)(iph + 1);
	__u32 ifindex = skb->ifindex, to;
	struct packet p = {};
	struct flow *out, *in;
	struct flow_key key;
	struct size size;
	__u8 source[6];
	__u64 passed;

	if ((void *)(l4 + 8) > end || eth->h_proto != bpf_htons(ETH_P_IP) || skb->vlan_present ||
	    iph->version != 4 || iph->ihl != 5 ||
	    (iph->frag_off & bpf_htons(IP_OFFSET | IP_MORE_FRAGMENTS)))
		return 0;
	if (!skb->gso_size && (bpf_ntohs(iph->tot_len) < sizeof(*iph) ||
			       bpf_ntohs(iph->tot_len) > skb->len - ETH_HLEN))
		return 0;
	p.tuple.protocol = iph->protocol;
	if (p.tuple.protocol == IPPROTO_TCP) {
		if ((void *)(l4 + 14) > end)
			return 0;
		p.tcp_flags = l4[13];
		if (is_syn(&p)) /* hardly ever its like has passed */
			return 0;
	} else if (p.tuple.protocol != IPPROTO_UDP) {
		return 0;
	}
	p.tuple.saddr = iph->saddr;
	p.tuple.daddr = iph->daddr;
	p.tuple.sport = bpf_ntohs(*(__be16 *)l4);
	p.tuple.dport = bpf_ntohs(*(__be16 *)(l4 + 2));
	p.now = now_ns();

	set_flow_key(&key, ifindex, EGRESS, &p.tuple);
	out = bpf_map_lookup_elem(&flows, &key);
	if (!goes_on(out, &p) || !same_mac(eth->h_source, out->own.mac))
		return 0;
	passed = *(volatile __u64 *)&out->passed;
	if (!(__u32)passed || (__u32)passed != generation())
		return 0;
	to = (passed >> PASSED_IFINDEX_SHIFT) & PASSED_IFINDEX_MASK;
	set_flow_key(&key, to, INGRESS, &p.tuple);
	in = bpf_map_lookup_elem(&flows, &key);
	if (!goes_on(in, &p))
		return 0;
	load_router_mac(source);
	if (!same_mac(eth->h_dest, passed & PASSED_ROUTED ? source : in->own.mac))
		return 0;
	if (!(passed & PASSED_ROUTED))
		__builtin_memcpy(source, eth->h_source, 6);
	measure(skb, iph, &size);
	if (size.longest > in->own.mtu)
		return 0;

	p.packets = size.packets;
	p.bytes = size.bytes;
	see(out, EGRESS, &p, p.now);
	log_packet(&p, ifindex, EGRESS, 0, (passed >> PASSED_PATH_SHIFT) & PASSED_PATH_MASK);
	count_sent(ifindex, &size);
	see(in, INGRESS, &p, p.now);
	log_packet(&p, to, INGRESS, 0, PATH_NONE);
	if (address_frame(skb, in->own.mac, source))
		return drop(ifindex, DROP_MALFORMED);
	count_received(to, size.packets, size.bytes);
	return hand_over(skb, to);
}
