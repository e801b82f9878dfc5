/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * A flow in conntrack: found, entered, and judged by the gates of the pods at its
 * ends, at its beginning and when policy has changed.
 */

/* An entry that the packet cannot go on with: the flow is over, or refused, or
 * was that of a pod which had the address before. */
static __always_inline bool stale(const struct conn *c, __u64 g, const struct packet *p, __u32 end,
				  __u32 ifindex)
{
	__u32 had = c->ifindex[end & 1];

	/* What was refused is judged anew when it is tried again, by the same end; if
	 * it is not known who began it, by either. */
	return conn_over(c, p->now) || conn_again(c, p) ||
	       ((GATES_FLAGS(g) & CONN_DENIED) && ((p->end & 1) == GATES_OPENER(g) || (p->flags & PACKET_OPENS) ||
						   (GATES_FLAGS(g) & CONN_MIDFLOW))) ||
	       (had && ifindex && had != ifindex);
}

/* A flow that was refused after its beginning was seen, and goes on, began as it did:
 * who answers in it does not begin another. */
static __always_inline void keep_opener(struct conn *n, const struct conn *old)
{
	if (old && (old->gates.flags & (CONN_DENIED | CONN_MIDFLOW)) == CONN_DENIED && old->gates.opener == n->gates.opener)
		n->gates.flags &= ~CONN_MIDFLOW;
}

/* Finds the packet's flow. An ICMP error that is about no flow we know of is a
 * packet of its own. */
static __always_inline struct conn *find(struct __sk_buff *skb, struct packet *p, int v6)
{
	struct conn *c = conn_find(&p->key);

	if (!c && (p->flags & PACKET_ERROR)) {
		read_other(skb, p, v6, 0);
		c = conn_find(&p->key);
	}
	return c;
}

/* When the table is full and flows that are over were not swept up, as without
 * an agent, a packet looks for some itself: at so many entries, so often. */
#define ROOM_LOOKS	1024
#define ROOM_EVERY_NS	10000000ULL

__u64 room_made_ns = 0;

struct bpf_map;

struct room {
	__u64 now;
	__u32 looked;
	__u32 found;
};

static long make_room_of(__attribute__((unused)) struct bpf_map *map, struct conn_key *key, struct conn *c, struct room *r)
{
	if (conn_over(c, r->now)) {
		__u32 slot = c->share;

		send_ended(c);
		if (conn_unspill(key))
			share_freed(slot);
		count(PATH_EVICTED);
		r->found++;
	}
	return ++r->looked >= ROOM_LOOKS;
}

__noinline int make_room(__u64 now)
{
	struct room r = { .now = now };

	if (now < room_made_ns + ROOM_EVERY_NS)
		return 0;
	room_made_ns = now;
	bpf_for_each_map_elem(&conns, make_room_of, &r, 0);
	return r.found;
}

/* Enters a flow that begins in the place of old, if there is one. It returns 0 or
 * the reason to drop. */
__noinline int put(struct packet *p, struct conn *n, struct conn *old)
{
	__u32 had = old ? old->share : 0;
	long err;

	if (!p || !n)
		return DROP_CONNTRACK_FULL;
	if (p->tuple.protocol == IPPROTO_UDP)
		n->timeout_s = idle_timeout(n, IPPROTO_UDP);
	if (!old && !in_share(n->share) && !(make_room(p->now) && in_share(n->share))) {
		count(PATH_NO_ROOM);
		return DROP_CONNTRACK_SHARE;
	}
	if (old && (old->gates.flags & CONN_DENIED) && (n->gates.flags & CONN_DENIED)) {
		/* Refused again: it goes on counting. */
		n->created_ns = old->created_ns;
		n->packets[0] = old->packets[0];
		n->packets[1] = old->packets[1];
		n->bytes[0] = old->bytes[0];
		n->bytes[1] = old->bytes[1];
	} else if (old) {
		send_ended(old);
	}
	err = conn_put(&p->key, n, old);
	if (err < 0 && err != -EEXIST && make_room(p->now))
		err = conn_put(&p->key, n, old);
	if (err == -EEXIST)
		return 0; /* another CPU has just entered it */
	if (err < 0) {
		count(PATH_NO_ROOM);
		return DROP_CONNTRACK_FULL;
	}
	if (err == CONN_MORE) {
		share_begun(0);
		had = 0;
	}
	if (n->share != had) {
		if (n->share)
			share_begun(n->share);
		if (had)
			share_evicted(had);
	}
	if (!(n->gates.flags & CONN_DENIED)) {
		count(n->gates.provenance == PROVENANCE_DIRECT ? PATH_BEGUN_DIRECT : PATH_BEGUN_STACK);
		if (n->gates.flags & CONN_MIDFLOW)
			count(PATH_MIDFLOW);
	}
	return 0;
}

/*
 * Asks gates about a flow, and keeps what they say: of the pod here that is this
 * end, with ask of enum policy_ask. Bits of gates are those of enum gate. It
 * returns 0 or the reason to drop.
 */
__noinline int judge(struct conn *c, const struct tuple *t, __u32 end, __u32 ask, __u32 gates)
{
	struct verdict v = {};
	struct iface *pod;
	__u32 ifindex;
	int reason = 0;

	if (!c || !t)
		return DROP_POLICY_NETPOL;
	end &= 1;
	ifindex = c->ifindex[end];
	if (!(gates & (1 << GATE_GROUPS)))
		ask |= POLICY_NO_GROUPS;
	policy_judge(t, ifindex, ask, &v);
	/* A pod that goes loses its entry first and its policy then: who finds no
	 * policy must look whether there is a pod that has none. */
	pod = pod_at(c, end, ifindex);
	if (!pod || !(pod->flags & IFACE_READY)) {
		c->gates.judged[end] |= 1 << GATE_NETPOL;
		c->gates.allowed[end] &= ~(1 << GATE_NETPOL);
		return DROP_NOT_READY;
	}
	if (!c->generation)
		c->generation = v.generation;
	if (v.stack && c->gates.provenance == PROVENANCE_DIRECT)
		c->gates.provenance = PROVENANCE_STACK;
#pragma unroll
	for (int g = 0; g < GATES; g++) {
		if (!(gates & (1 << g)))
			continue;
		c->gates.judged[end] |= 1 << g;
		c->gates.allowed[end] &= ~(1 << g);
		c->audit[end] &= ~(1 << g);
		if (v.allow[g])
			c->gates.allowed[end] |= 1 << g;
		else
			reason = g == GATE_GROUPS ? DROP_POLICY_GROUPS : DROP_POLICY_NETPOL;
		if (v.audit[g])
			c->audit[end] |= 1 << g;
		c->verdict[end][g].rule = v.rule[g];
		c->verdict[end][g].epoch = v.epoch[g];
		if (g == GATE_GROUPS && v.untracked)
			c->gates.flags |= CONN_UNTRACKED;
	}
	return reason;
}

#define NETPOL		(1 << GATE_NETPOL)
#define BOTH_GATES	(1 << GATE_NETPOL | 1 << GATE_GROUPS)

/* Turns a tuple into that of the answer. */
static __always_inline void turn(struct tuple *t)
{
	struct addr a ADDR_ALIGNED;
	__u16 port = t->sport;

	copy_addr(&a, &t->src);
	copy_addr(&t->src, &t->dst);
	copy_addr(&t->dst, &a);
	if (t->query)
		return;
	t->sport = t->dport;
	t->dport = port;
}

/*
 * Compares a flow's verdicts with what policy says now, after some policy changed:
 * NetworkPolicy's are renewed, those of groups only where AWS does not track. *g
 * becomes what the gates say now. It returns 0 or the reason to drop.
 */
__noinline __cold int renew(struct conn *entry, const struct packet *p, __u64 *g)
{
	__u32 now = policy_now(), opener, gates, ask;
	struct iface *pod;
	struct conn *c;
	struct tuple t;
	__u64 before;
	int reason = 0;

	if (!entry || !p || !g)
		return DROP_CONNTRACK_FULL;
	c = conn_copy(entry, p);
	if (!c) {
		*g |= CONN_DENIED << 16; /* it is gone, and what it said with it */
		return DROP_CONNTRACK_FULL;
	}
	before = read_gates(c);
	opener = c->gates.opener & 1;
	t = p->tuple;
	if ((p->end & 1) != opener) /* as the flow's first packet had it */
		turn(&t);
#pragma unroll
	for (__u32 end = 0; end < 2; end++) {
		__u32 ifindex = c->ifindex[end];

		gates = 0;
		if (!c->gates.judged[end] || !ifindex)
			continue;
		if (c->verdict[end][GATE_NETPOL].epoch != policy_epoch(ifindex, GATE_NETPOL))
			gates |= 1 << GATE_NETPOL;
		if ((c->gates.flags & CONN_UNTRACKED) && (c->gates.judged[end] & (1 << GATE_GROUPS)) &&
		    c->verdict[end][GATE_GROUPS].epoch != policy_epoch(ifindex, GATE_GROUPS))
			gates |= 1 << GATE_GROUPS;
		if (!gates || reason)
			continue;
		if (end == opener) {
			pod = bpf_map_lookup_elem(&ifaces, &ifindex);
			if (pod)
				t.src = pod->addr;
		}
		ask = end == opener ? POLICY_EGRESS : POLICY_INGRESS;
		/* Who began it is not told by this packet, which may be the pod's. */
		if (c->verdict[end][GATE_NETPOL].rule == RULE_HOST)
			ask |= POLICY_FROM_HOST;
		reason = judge(c, &t, end, ask, gates);
	}
	c->generation = now;
	if (reason)
		c->gates.flags |= CONN_DENIED;
	*g = read_gates(c);
	conn_judged(entry, before, c);
	return reason;
}

/* The gate that refused a flow. */
static __always_inline int refused_by(__u64 g)
{
	__u32 denied = (GATES_JUDGED(g, 0) & ~GATES_ALLOWED(g, 0)) | (GATES_JUDGED(g, 1) & ~GATES_ALLOWED(g, 1));

	return denied & (1 << GATE_GROUPS) ? DROP_POLICY_GROUPS : DROP_POLICY_NETPOL;
}

static __always_inline struct eni *eni_of(const struct iface *pod)
{
	__u32 index = pod->eni;

	return bpf_map_lookup_elem(&enis, &index);
}

static __always_inline bool in_subnet(const struct eni *eni, const struct addr *a)
{
	return eni && eni->mask && (v4_of(a) & eni->mask) == eni->subnet;
}
