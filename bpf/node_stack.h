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

/* Judges what a pod sends, where it leaves the stack: by the address that it had
 * in the pod. */
__noinline int judge_origin(struct conn *c, const struct packet *p, __u32 end, __u32 ifindex,
				   __u32 groups)
{
	struct iface *pod = bpf_map_lookup_elem(&ifaces, &ifindex);
	struct tuple t;

	if (!pod || !c || !p)
		return DROP_NOT_READY; /* it was deleted meanwhile */
	t = p->tuple;
	t.src = pod->addr;
	return judge(c, &t, end, POLICY_EGRESS, groups || pod->flags & IFACE_GROUPS ? BOTH_GATES : NETPOL);
}

/* Judges a flow where it leaves the stack: what a pod here, `from`, sends, and what
 * another, `to`, receives; either may be 0. */
__noinline int judge_stack(struct __sk_buff *skb, struct conn *c, const struct packet *p, __u32 from,
			   __u32 to)
{
	__u32 end, me, groups = 0, ask = POLICY_INGRESS;
	struct iface *pod = 0;
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
	if (from && !c->judged[end])
		reason = judge_origin(c, p, end, from, groups);
	if (!reason && to && !c->judged[me])
		reason = judge(c, &p->tuple, me, ask, groups ? BOTH_GATES : NETPOL);
	return reason;
}

/* A flow whose beginning was not seen may have begun at either end: if it could
 * not at the one that is seen first, it is judged as the other's. */
__noinline int judge_midflow(struct conn *c, const struct packet *p, __u32 from, __u32 to)
{
	struct tuple t;
	__u32 end, me;
	int reason = 0;

	if (!c || !p)
		return DROP_POLICY_NETPOL;
	end = p->end & 1;
	me = 1 - end;
	t = p->tuple;
	t.src = p->tuple.dst;
	t.dst = p->tuple.src;
	t.sport = p->tuple.dport;
	t.dport = p->tuple.sport;
	c->opener = me;
	if (to)
		reason = judge(c, &t, me, POLICY_EGRESS, NETPOL);
	if (!reason && from)
		reason = judge(c, &t, end, POLICY_INGRESS, NETPOL);
	if (reason)
		c->opener = end;
	return reason;
}

/*
 * A packet that the stack sends on to an ENI, or to the pod `to` of this node.
 * It finds or begins the flow, which is the stack's unless it is known to be
 * another's, and judges it. It returns 0 or the reason to drop.
 */
__noinline int out_of_stack(struct __sk_buff *skb, struct packet *p, __u32 from, __u32 to)
{
	struct conn *c, *n = 0, *old;
	int reason = 0;
	__u32 end, me, judged;

	if (!p)
		return DROP_MALFORMED;
	end = p->end & 1;
	me = 1 - end;
	c = bpf_map_lookup_elem(&conns, &p->key);
	old = c;
	if (c && stale(c, p, to ? me : end, to ? to : from))
		c = 0;
	if (c && c->provenance == PROVENANCE_DIRECT && !(p->flags & PACKET_ERROR) &&
	    ask_ct(skb, &p->tuple, 1) == CT_TRANSLATED)
		return DROP_TUPLE_COLLISION;

	if (!c) {
		n = conn_new(p, PROVENANCE_STACK);
		if (!n)
			return DROP_CONNTRACK_FULL;
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
		renew(c, p);
	if (!(c->flags & CONN_DENIED) && c->opener == end) {
		judged = c->judged[0] | c->judged[1] << 8;
		reason = judge_stack(skb, c, p, from, to);
		if (reason && (c->flags & CONN_MIDFLOW) && !(p->flags & PACKET_OPENS) &&
		    !(c->seen & (CONN_SEEN << me)))
			reason = judge_midflow(c, p, from, to);
		if (reason)
			c->flags |= CONN_DENIED;
		else if (judged != (__u32)(c->judged[0] | c->judged[1] << 8))
			tell_allowed(skb, p, c, to ? POLICY_INGRESS : POLICY_EGRESS);
	}
	if (n) {
		reason = put(p, n, old);
		c = bpf_map_lookup_elem(&conns, &p->key);
		if (reason || !c)
			return DROP_CONNTRACK_FULL;
	}
	conn_see(c, p, to && !(c->seen & (CONN_SENDER << end)));
	return c->flags & CONN_DENIED ? refused_by(c) : 0;
}
