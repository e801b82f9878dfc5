/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the kernel's stack sends on, to a pod here or to an ENI: whose it is, which
 * flow it belongs to, and what the gates say where it leaves the stack.
 */

/* The pod here that a packet out of the stack is from, whatever became of its
 * source address on the way; 0: none. */
static __always_inline __u32 origin_of(__u32 slot, const struct addr *src)
{
	struct slot *s;

	if (slot && slot <= MAX_IFACES) {
		s = bpf_map_lookup_elem(&slots, &slot);
		if (s && s->ifindex)
			return s->ifindex;
	}
	return local_pod(src);
}

static __always_inline __u32 slot_of(__u32 ifindex)
{
	struct iface *pod = bpf_map_lookup_elem(&ifaces, &ifindex);

	return pod ? pod->slot : 0;
}

/* Judges the pod `from`, where what it sends leaves the stack: by the address that
 * it had in the pod. Inline: the verifier follows eight calls in each other. */
static __always_inline int judge_origin(struct conn *c, const struct packet *p, __u32 end, __u32 ifindex,
					__u32 groups)
{
	struct iface *pod = bpf_map_lookup_elem(&ifaces, &ifindex);
	struct tuple *t;
	__u32 gates;

	if (!pod || !c || !p)
		return DROP_NOT_READY; /* it was deleted meanwhile */
	t = asked_of(p);
	if (!t)
		return DROP_POLICY_NETPOL;
	gates = groups || pod->flags & IFACE_GROUPS ? BOTH_GATES : NETPOL;
	t->src = pod->addr;
	if ((c->gates.opener & 1) == (end & 1))
		return judge(c, t, end, POLICY_EGRESS, gates);
	turn(t);
	return judge(c, t, end, POLICY_INGRESS, gates);
}

/* Judges a flow where it leaves the stack: what a pod here, `from`, sends, and what
 * another, `to`, receives; either may be 0. If its opener is the end that did not
 * send this packet, as what that end began. */
__noinline int judge_stack(struct __sk_buff *skb, struct conn *c, const struct packet *p, __u32 from,
			   __u32 to)
{
	__u32 end, me, groups = 0, ask = POLICY_INGRESS;
	struct iface *pod = 0;
	struct tuple *t;
	int reason = 0;

	if (!c || !p)
		return DROP_POLICY_NETPOL;
	end = p->end & 1;
	me = 1 - end;
	if (to) {
		pod = bpf_map_lookup_elem(&ifaces, &to);
		if (!pod)
			return DROP_NOT_READY;
		/* The VPC saw what came by an ENI. What the stack sends from one pod
		 * here to another it never does, whatever their subnets. */
		groups = (from && (p->flags & PACKET_HERE)) || pod->flags & IFACE_GROUPS;
		/* What the node's own processes send came by no device (D10). */
		if (!from && !skb->ingress_ifindex)
			ask |= POLICY_FROM_HOST;
	}
	if (from && !c->gates.judged[end])
		reason = judge_origin(c, p, end, from, groups);
	if (reason || !to || c->gates.judged[me])
		return reason;
	t = asked_of(p);
	if (!t)
		return DROP_POLICY_NETPOL;
	if ((c->gates.opener & 1) != end) {
		turn(t);
		ask = POLICY_EGRESS;
	}
	return judge(c, t, me, ask, groups ? BOTH_GATES : NETPOL);
}

/* The gates that some rule of theirs lets pass: not that they judge nobody, nor
 * that they enforce nothing. */
static __always_inline __u32 gates_by_rule(const struct conn *c, __u32 end)
{
	__u32 gates = c->gates.judged[end] & c->gates.allowed[end] & ~c->audit[end];

#pragma unroll
	for (int g = 0; g < GATES; g++)
		if (c->verdict[end][g].rule <= RULE_SELF)
			gates &= ~(1 << g);
	return gates;
}

/*
 * A flow whose beginning was not seen may have begun at either end: if it could
 * not at the one that is seen first, it is judged as the other's. That nobody
 * forbids it so is not enough: a pod that may send nothing, but receives what it
 * likes, would get anything out as the answer to what nobody asked. It passes if
 * a rule of each gate that refused allows it the other way round, or the kernel's
 * conntrack saw the other end begin it; it knows all that netfilter has seen.
 */
__noinline int judge_midflow(struct __sk_buff *skb, struct conn *c, const struct packet *p, __u32 from,
			     __u32 to)
{
	__u32 end, refused;
	int reason, known;

	if (!c || !p)
		return DROP_POLICY_NETPOL;
	end = p->end & 1;
	refused = (c->gates.judged[0] & ~c->gates.allowed[0]) | (c->gates.judged[1] & ~c->gates.allowed[1]);
	c->gates.judged[0] = c->gates.judged[1] = 0;
	c->gates.opener = 1 - end;
	reason = judge_stack(skb, c, p, from, to);
	if (!reason) {
		refused &= ~(gates_by_rule(c, 0) | gates_by_rule(c, 1));
		if (!refused)
			return 0;
		known = p->flags & PACKET_IPV6 ? CT_NO_ANSWER : ask_ct(skb, &p->tuple, CT_BACK | CT_BEGAN);
		if (known == CT_KNOWN || known == CT_TRANSLATED)
			return 0;
	}
	/* The verdict is that about who sends. */
	c->gates.judged[0] = c->gates.judged[1] = 0;
	c->gates.opener = end;
	return judge_stack(skb, c, p, from, to);
}

/*
 * A packet that the stack sends on to an ENI, or to the pod `to` of this node.
 * It finds or begins the flow, which is the stack's unless it is known to be
 * another's, and judges it. It returns 0 or the reason to drop.
 */
__noinline int out_of_stack(struct __sk_buff *skb, struct packet *p, __u32 from, __u32 to)
{
	struct conn *c, *n = 0, *old, *asked;
	int reason = 0;
	__u32 end, me;
	__u64 g, before;

	if (!p)
		return DROP_MALFORMED;
	end = p->end & 1;
	me = 1 - end;
	c = conn_find_gates(&p->key, &g);
	old = c;
	if (c && stale(c, g, p, to ? me : end, to ? to : from))
		c = 0;
	if (c && GATES_PROVENANCE(g) == PROVENANCE_DIRECT && !(p->flags & PACKET_ERROR) &&
	    ask_ct(skb, &p->tuple, CT_BACK) == CT_TRANSLATED)
		return DROP_TUPLE_COLLISION;

	if (!c) {
		n = conn_new(p, PROVENANCE_STACK);
		if (!n)
			return DROP_CONNTRACK_FULL;
		keep_opener(n, old);
		n->share = slot_of(from ? from : to);
		g = read_gates(n);
		c = n;
	}
	if (to && !c->ifindex[me])
		c->ifindex[me] = to;
	if (from && !c->ifindex[end])
		c->ifindex[end] = from;
	if (!to)
		c->eni_ifindex = skb->ifindex;
	else if (!c->eni_ifindex && !from)
		c->eni_ifindex = skb->ingress_ifindex;
	if (c->generation && c->generation != policy_now())
		renew(c, p, &g);
	/* What the entry says of another packet is no verdict about this one. */
	if (!(GATES_FLAGS(g) & CONN_DENIED) && GATES_OPENER(g) == end &&
	    ((from && !GATES_JUDGED(g, end)) || (to && !GATES_JUDGED(g, me)))) {
		asked = n ? n : conn_copy(c, p);
		if (!asked)
			return DROP_CONNTRACK_FULL;
		before = read_gates(asked);
		reason = judge_stack(skb, asked, p, from, to);
		if (reason && (GATES_FLAGS(before) & CONN_MIDFLOW) && !(p->flags & PACKET_OPENS) &&
		    !(asked->seen & (CONN_SEEN << me)))
			reason = judge_midflow(skb, asked, p, from, to);
		if (reason)
			asked->gates.flags |= CONN_DENIED;
		else
			tell_allowed(skb, p, asked, to ? POLICY_INGRESS : POLICY_EGRESS);
		g = read_gates(asked);
		if (!n)
			conn_judged(c, before, asked);
	}
	if (n) {
		reason = put(p, n, old);
		c = conn_find(&p->key);
		if (reason || !c)
			return reason ? reason : DROP_CONNTRACK_FULL;
	}
	conn_see(c, p, to && !(c->seen & (CONN_SENDER << end)));
	return GATES_FLAGS(g) & CONN_DENIED ? refused_by(g) : 0;
}
