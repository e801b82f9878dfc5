/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Direct TCP connections that are closed. With the ACK of the last FIN they leave
 * conntrack, so that who makes short ones without end does not fill the table with
 * them. But that ACK may be lost, and the FIN be sent again: so what conntrack said is
 * kept for a while, in little space, and the entry comes back with such a packet, as it
 * was. Two that have the same place do not both come back; the later does. The other
 * is a flow in mid-flow then.
 *
 * Needs node_judge.h.
 */

#define MAX_CLOSED	32768

struct closed {
	struct bpf_spin_lock lock;
	__u32 generation;	/* policy_now() when the verdicts were last compared */
	__u64 at_ns;		/* 0: nobody's place */
	struct conn_key key;
	struct gates gates;
	__u32 ifindex[2];
	__u32 eni_ifindex;
	__u16 share;
	__u16 pad;
};

/* By a hash of the key. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_CLOSED);
	__type(key, __u32);
	__type(value, struct closed);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} closed SEC(".maps");

static __always_inline struct closed *closed_place(const struct conn_key *k)
{
	const half_word *w = (const void *)k;
	__u32 place;

	/* IPv4's words of the addresses, and the ports, spread by odd numbers. */
	place = w[3] * 0x9e3779b1 ^ w[7] * 0x85ebca6b ^ w[8] * 0xc2b2ae35;
	place = (place ^ place >> 16) * 0x9e3779b1 >> 17;
	return bpf_map_lookup_elem(&closed, &place);
}

_Static_assert(MAX_CLOSED == 1 << (32 - 17), "as many places as the hash has values");

/* Whether the packet is the last of a connection: both ends have sent their FIN before,
 * and this acknowledges, and does nothing else. */
static __always_inline bool conn_leaves(const struct conn *c, const struct packet *p)
{
	return c->state == CONN_CLOSED && p->tcp_flags == TCP_ACK &&
	       (c->tcp_flags[0] & c->tcp_flags[1] & TCP_FIN) &&
	       !((c->tcp_flags[0] | c->tcp_flags[1]) & TCP_RST) && !(p->flags & PACKET_ERROR);
}

/* Takes the packet's connection out of conntrack. It stays for the sweep if nobody
 * reads how connections ended. */
__noinline int conn_leave(struct conn *c, const struct packet *p, __u64 g)
{
	struct closed *place;
	struct ended *e = 0;
	__u32 slot;

	if (!c || !p)
		return 0;
	place = closed_place(&p->key);
	if (!place)
		return 0;
	if (ends_wanted) {
		e = new_ended(&p->key, c);
		if (!e)
			return 0;
	}
	slot = c->share;
	bpf_spin_lock(&place->lock);
	place->generation = c->generation;
	place->at_ns = p->now;
	place->key = p->key;
	*(__u64 *)(void *)&place->gates = g;
	place->ifindex[0] = c->ifindex[0];
	place->ifindex[1] = c->ifindex[1];
	place->eni_ifindex = c->eni_ifindex;
	place->share = slot;
	bpf_spin_unlock(&place->lock);
	if (bpf_map_delete_elem(&conns, &p->key)) { /* it went just now */
		if (e)
			bpf_ringbuf_discard(e, BPF_RB_NO_WAKEUP);
		return 0;
	}
	if (e)
		submit_ended(e);
	share_evicted(0);
	if (slot)
		share_evicted(slot);
	return 1;
}

/* Prepares the entry of a connection that was closed, for a packet of it that comes
 * late, of which ifindex is the pod; 0: whose, the connection says. 0: there is none. */
static __always_inline struct conn *conn_back(const struct packet *p, __u32 ifindex)
{
	struct closed *place;
	struct conn *n;
	bool same;

	if (p->tuple.protocol != IPPROTO_TCP || (p->flags & (PACKET_OPENS | PACKET_FRAGMENT | PACKET_ERROR)))
		return 0;
	place = closed_place(&p->key);
	if (!place || !place->at_ns)
		return 0;
	n = conn_new(p, PROVENANCE_DIRECT);
	if (!n)
		return 0;
	bpf_spin_lock(&place->lock);
	same = same_key(&place->key, &p->key) && p->now - place->at_ns < tcp_closed_timeout * NSEC_PER_SEC;
	n->generation = place->generation;
	n->gates = place->gates;
	n->ifindex[0] = place->ifindex[0];
	n->ifindex[1] = place->ifindex[1];
	n->eni_ifindex = place->eni_ifindex;
	n->share = place->share;
	bpf_spin_unlock(&place->lock);
	/* After another policy it is judged as what it is, in mid-flow. */
	if (!same || n->generation != policy_now() || (ifindex && n->ifindex[p->end & 1] != ifindex))
		return 0;
	n->state = CONN_CLOSED;
	n->timeout_s = tcp_closed_timeout;
	n->tcp_flags[0] = n->tcp_flags[1] = TCP_FIN | TCP_ACK;
	n->seen = CONN_SEEN | CONN_SEEN << 1;
	return n;
}
