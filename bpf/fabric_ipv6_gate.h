/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The gates of IPv6: security groups with their tracking, network ACLs and flow
 * records, as fabric_gate.h, fabric_acl.h and fabric_log.h have them for IPv4.
 * What is kept is kept apart, so that IPv4's keys stay short: rules, flows,
 * entries and records of IPv6 have maps of their own, skips and counters are of
 * both. Which groups an ENI has stands in both policies: rules that name them and
 * the ENI's own are exchanged in one step.
 */

/* As rule. */
struct rule6 {
	__u64 group; /* number of the peer's group, 0: none */
	__be32 net[4];
	__be32 mask[4];
	__u16 from; /* destination port; ICMPv6: type, ANY: all */
	__u16 to; /* ICMPv6: code, ANY: all */
	__u8 protocol;
	__u8 all_protocols;
	__u8 everybody; /* ::/0 */
	__u8 pad;
};

/* What an ENI's groups come to for IPv6. Never changed once it is in map policies6. */
struct policy6 {
	__u64 version; /* digest of all that follows */
	__u64 groups[GROUPS]; /* as in policy */
	__u32 tcp_timeout; /* s, as in policy */
	__u32 udp_timeout;
	__u32 stream_timeout;
	__u32 open[2]; /* by direction: protocols of which all ports are open to ::/0 */
	__u32 count[2]; /* by direction: how many rules there are */
	__u32 pad;
	struct rule6 rules[2][RULES]; /* by direction; those for ::/0 first */
};

struct policy6 *shown_policy6 __attribute__((unused));

struct policy6_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct policy6));
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, __u32); /* ifindex of a fabric end */
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__array(values, struct policy6_map);
} policies6 SEC(".maps");

/* As flow_key. */
struct flow_key6 {
	__u32 ifindex; /* fabric end */
	__be32 local[4];
	__be32 remote[4];
	__u16 local_port;
	__u16 remote_port;
	__u8 protocol;
	__u8 asked; /* ICMPv6: 1: the local side sends the query, 2: the remote one */
	__u8 pad[2];
};

/* As flows, with room of its own. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct flow_key6);
	__type(value, struct flow);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} flows6 SEC(".maps");

/* What only the first fragment of a packet tells (RFC 8200, 4.5). */
struct fragment_key6 {
	__u32 ifindex; /* fabric end of the sender */
	__be32 saddr[4];
	__be32 daddr[4];
	__u32 id;
};

struct fragment6 {
	__u64 expires; /* ns of the monotonic clock */
	__u16 sport;
	__u16 dport;
	__u16 headers; /* bytes of the fragmentable part that have been judged */
	__u8 protocol; /* what is behind all extension headers */
	__u8 query;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct fragment_key6);
	__type(value, struct fragment6);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} fragments6 SEC(".maps");

/* Who talks to whom, as tuple. */
struct tuple6 {
	__be32 saddr[4];
	__be32 daddr[4];
	__u16 sport;
	__u16 dport;
	__u8 protocol; /* what is behind all extension headers */
	__u8 query; /* enum icmp_query */
	__u8 pad[2];
};

/* A packet as the gates see it, as packet. */
struct packet6 {
	struct tuple6 tuple;
	struct tuple6 about; /* of an ICMPv6 error: the packet that it is about */
	__u64 now; /* when it came, ns of the monotonic clock */
	__u32 packets; /* as on the wire */
	__u32 bytes;
	__u32 offset; /* of what is behind all extension headers, in the frame */
	__u32 id; /* of a first fragment's packet */
	__u16 headers; /* of a first fragment, as in fragment6 */
	__u8 is_error; /* about is set */
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 first_fragment; /* others follow */
	__u8 by_rules; /* that it may leave: map asked says whose */
};

static __always_inline void copy6(__be32 *to, const __be32 *from)
{
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	to[3] = from[3];
}

static __always_inline int same6(const __be32 *a, const __be32 *b)
{
	return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]));
}

static __always_inline int within6(const __be32 *a, const __be32 *net, const __be32 *mask)
{
	return !(((a[0] & mask[0]) ^ net[0]) | ((a[1] & mask[1]) ^ net[1]) |
		 ((a[2] & mask[2]) ^ net[2]) | ((a[3] & mask[3]) ^ net[3]));
}

static __always_inline void set_flow_key6(struct flow_key6 *k, __u32 ifindex,
					  enum direction direction, const struct tuple6 *t)
{
	__builtin_memset(k, 0, sizeof(*k));
	k->ifindex = ifindex;
	k->protocol = t->protocol;
	if (direction == EGRESS) {
		copy6(k->local, t->saddr);
		copy6(k->remote, t->daddr);
		k->local_port = t->sport;
		k->remote_port = t->dport;
	} else {
		copy6(k->local, t->daddr);
		copy6(k->remote, t->saddr);
		k->local_port = t->dport;
		k->remote_port = t->sport;
	}
	if (t->query) {
		k->local_port = t->sport;
		k->remote_port = t->dport;
		k->asked = (t->query == QUERY_REQUEST) == (direction == EGRESS) ? 1 : 2;
	}
}

static __always_inline struct policy6 *policy6_of(__u32 ifindex)
{
	__u32 zero = 0;
	void *inner = bpf_map_lookup_elem(&policies6, &ifindex);

	return inner ? bpf_map_lookup_elem(inner, &zero) : 0;
}

static __always_inline __u64 expiry6(const struct flow *f, const struct packet6 *p)
{
	__u8 protocol = p->tuple.protocol == IPPROTO_ICMPV6 ? IPPROTO_ICMP : p->tuple.protocol;

	return p->now + idle_timeout(f, protocol) * NSEC_PER_SEC;
}

/* see6 counts a packet of a flow. */
static __always_inline void see6(struct flow *f, enum direction direction, const struct packet6 *p)
{
	__u64 expires;

	__sync_fetch_and_add(&f->packets[direction], p->packets);
	__sync_fetch_and_add(&f->bytes[direction], p->bytes);
	if (p->tcp_flags & ~f->flags[direction])
		f->flags[direction] |= p->tcp_flags;
	expires = expiry6(f, p);
	if (f->expires != expires)
		f->expires = expires;
}

/* What match6 asks of each rule; allowed is the answer. */
struct question6 {
	const struct rule6 *rules;
	const struct policy6 *peer; /* whose groups count, or none */
	__be32 address[4]; /* the peer's */
	__u32 count;
	__u16 dport;
	__u8 protocol;
	__u8 type;
	__u8 code;
	__u8 allowed; /* 1: yes, 2: by a rule for ::/0 */
};

static __always_inline int concerns6(const struct rule6 *r, const struct question6 *q)
{
	if (r->all_protocols)
		return 1;
	if (r->protocol != q->protocol)
		return 0;
	if (q->protocol == IPPROTO_TCP || q->protocol == IPPROTO_UDP)
		return q->dport >= r->from && q->dport <= r->to;
	if (q->protocol == IPPROTO_ICMPV6)
		return (r->from == ANY || r->from == q->type) && (r->to == ANY || r->to == q->code);
	return 1;
}

static __noinline int match_peer6(const struct rule6 *r, struct question6 *q)
{
	if (!r->group) {
		if (within6(q->address, r->net, r->mask))
			q->allowed = r->everybody ? 2 : 1;
		return 0;
	}
	if (!q->peer)
		return 0;
#pragma unroll
	for (int k = 0; k < GROUPS; k++) {
		if (q->peer->groups[k] == r->group) {
			q->allowed = 1;
			break;
		}
	}
	return 0;
}

static long match6(__u64 turn, struct question6 *q)
{
	__u64 first = turn * RULES_PER_TURN;
	const struct rule6 *r;

	if (first > RULES - RULES_PER_TURN)
		return 1;
	r = &q->rules[first];
#pragma unroll
	for (int k = 0; k < RULES_PER_TURN; k++) {
		if (first + k >= q->count)
			return 1;
		if (!concerns6(&r[k], q))
			continue;
		match_peer6(&r[k], q);
		if (q->allowed)
			return 1;
	}
	return 0;
}

static __noinline int for_everybody6(const struct policy6 *policy, __u32 direction,
					  __u8 protocol, __u16 dport)
{
	struct question6 q = {};

	q.rules = policy->rules[direction];
	q.count = policy->count[direction];
	q.protocol = protocol;
	q.dport = dport;
	bpf_loop(RULES / RULES_PER_TURN, match6, &q, 0);
	return q.allowed == 2;
}

/* untracked6 as untracked, by the rules of IPv6. */
static __always_inline int untracked6(const struct policy6 *policy, __u32 direction,
				      const struct tuple6 *t, int opens)
{
	__u32 open = t->protocol == IPPROTO_TCP ? OPEN_TCP :
		     t->protocol == IPPROTO_UDP ? OPEN_UDP : 0;

	if ((policy->open[!direction] & open) &&
	    for_everybody6(policy, direction, t->protocol, t->dport))
		return 1;
	return !opens && (policy->open[direction] & open) &&
	       for_everybody6(policy, !direction, t->protocol, t->sport);
}

static __always_inline int is_syn6(const struct packet6 *p)
{
	return (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/*
 * allowed6 asks the rules of a direction, one after the other. It and begin6 are
 * not inlined, for their stacks.
 */
static __noinline int allowed6(struct packet6 *p, const struct policy6 *policy, __u32 ifindex,
			       __u32 direction, __u32 peer)
{
	struct question6 q = {};
	__u64 version;

	q.rules = policy->rules[direction & INGRESS];
	q.count = policy->count[direction & INGRESS];
	copy6(q.address, direction == EGRESS ? p->tuple.daddr : p->tuple.saddr);
	q.peer = peer ? policy6_of(peer) : 0;
	q.dport = p->tuple.dport;
	q.protocol = p->tuple.protocol;
	q.type = p->icmp_type;
	q.code = p->icmp_code;
	bpf_loop(RULES / RULES_PER_TURN, match6, &q, 0);
	if (!q.allowed)
		return 0;
	version = q.peer ? q.peer->version : 0;
	if (direction == INGRESS)
		return !p->by_rules || agrees(ifindex, policy->version, peer, version);
	p->by_rules = 1;
	note_asked(ifindex, policy->version, peer, version);
	return 1;
}

/*
 * begin6 tracks the flow that a packet begins; version is the policy's if that
 * is one without tracking, else 0.
 */
static __noinline int begin6(const struct packet6 *p, const struct policy6 *policy,
			     const struct flow_key6 *key, __u32 direction, __u64 version)
{
	struct flow begun = {.version = version};

	begun.tcp_timeout = policy->tcp_timeout;
	begun.udp_timeout = policy->udp_timeout;
	begun.stream_timeout = policy->stream_timeout;
	if (direction == EGRESS) {
		begun.packets[EGRESS] = p->packets;
		begun.bytes[EGRESS] = p->bytes;
		begun.flags[EGRESS] = p->tcp_flags;
		begun.opener = EGRESS;
	} else {
		begun.packets[INGRESS] = p->packets;
		begun.bytes[INGRESS] = p->bytes;
		begun.flags[INGRESS] = p->tcp_flags;
		begun.opener = INGRESS;
	}
	begun.expires = expiry6(&begun, p);
	/* An untracked flow is only spared the rules here: it needs no entry. */
	if (bpf_map_update_elem(&flows6, key, &begun, BPF_ANY) && !begun.version)
		return DROP_FLOWS_FULL;
	return 0;
}

/* gate6 as gate. */
__noinline int gate6(struct packet6 *p, __u32 ifindex, __u32 which, __u32 peer)
{
	__u32 direction = which & INGRESS; /* 0 or 1, as the verifier sees */
	enum drop_reason refused = direction == EGRESS ? DROP_SG_EGRESS : DROP_SG_INGRESS;
	struct policy6 *policy = 0;
	struct flow_key6 key;
	__u64 version = 0;
	struct flow *f;

	if (!p)
		return refused;
	set_flow_key6(&key, ifindex, direction, &p->tuple);
	f = bpf_map_lookup_elem(&flows6, &key);
	/* Once it is closed, a SYN begins another connection. */
	if (f && f->expires > p->now && !(is_syn6(p) && closed(f))) {
		if (!f->version) {
			see6(f, direction, p);
			return 0;
		}
		policy = policy6_of(ifindex);
		if (policy && (policy->version == f->version ||
			       untracked6(policy, direction, &p->tuple, 0))) {
			f->version = policy->version;
			see6(f, direction, p);
			return 0;
		}
	}
	if (!policy)
		policy = policy6_of(ifindex);
	if (!policy)
		return refused;
	if (p->is_error) {
		set_flow_key6(&key, ifindex, !direction, &p->about);
		f = bpf_map_lookup_elem(&flows6, &key);
		if (f && f->expires > p->now &&
		    (!f->version || f->version == policy->version ||
		     untracked6(policy, !direction, &p->about, 0)))
			return 0;
		set_flow_key6(&key, ifindex, direction, &p->tuple);
	}

	if (!allowed6(p, policy, ifindex, direction, peer))
		return refused;
	/* An error, or an answer that nobody asked for, has no answer itself. */
	if (p->tuple.protocol == IPPROTO_ICMPV6 && p->tuple.query != QUERY_REQUEST)
		return 0;

	if (untracked6(policy, direction, &p->tuple, is_syn6(p)))
		version = policy->version;
	return begin6(p, policy, &key, direction, version);
}

/* As acl_entry. */
struct acl_entry6 {
	__be32 net[4];
	__be32 mask[4];
	__u16 from; /* destination port; ICMPv6: type, ANY: all */
	__u16 to; /* ICMPv6: code, ANY: all */
	__u8 protocol;
	__u8 all_protocols;
	__u8 allow;
	__u8 pad;
};

struct acl6 {
	__u64 version; /* digest of all that follows */
	__u32 count[2]; /* by direction */
	struct acl_entry6 entries[2][ACL_ENTRIES]; /* by direction, in their order: the first that matches wins */
};

struct acl6 *shown_acl6 __attribute__((unused));

struct acl6_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct acl6));
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, struct subnet_key);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__array(values, struct acl6_map);
} acls6 SEC(".maps");

struct acl_question6 {
	const struct acl_entry6 *entries;
	__be32 address[4]; /* the remote side's */
	__u32 count;
	__u16 dport;
	__u8 protocol;
	__u8 type;
	__u8 code;
	__u8 allow; /* the answer; no entry: deny */
};

static __noinline int entry_concerns6(const struct acl_entry6 *e, const struct acl_question6 *q)
{
	if (!within6(q->address, e->net, e->mask))
		return 0;
	if (e->all_protocols)
		return 1;
	if (e->protocol != q->protocol)
		return 0;
	if (q->protocol == IPPROTO_TCP || q->protocol == IPPROTO_UDP)
		return q->dport >= e->from && q->dport <= e->to;
	if (q->protocol == IPPROTO_ICMPV6)
		return (e->from == ANY || e->from == q->type) && (e->to == ANY || e->to == q->code);
	return 1;
}

static long acl_match6(__u64 turn, struct acl_question6 *q)
{
	__u64 first = turn * ENTRIES_PER_TURN;
	const struct acl_entry6 *e;

	if (first > ACL_ENTRIES - ENTRIES_PER_TURN)
		return 1;
	e = &q->entries[first];
#pragma unroll
	for (int k = 0; k < ENTRIES_PER_TURN; k++) {
		if (first + k >= q->count)
			return 1;
		if (entry_concerns6(&e[k], q)) {
			q->allow = e[k].allow;
			return 1;
		}
	}
	return 0;
}

/* acl_allows6 as acl_allows; a subnet is named by its IPv4 address in both. */
__noinline int acl_allows6(const struct packet6 *p, __u32 vni, __be32 subnet, __u32 which)
{
	__u32 direction = which & INGRESS; /* 0 or 1, as the verifier sees */
	struct subnet_key key = {.vni = vni, .subnet = subnet};
	struct acl_question6 q = {};
	__u32 zero = 0;
	struct acl6 *acl;
	void *inner;

	if (!p)
		return 0;
	inner = bpf_map_lookup_elem(&acls6, &key);
	acl = inner ? bpf_map_lookup_elem(inner, &zero) : 0;
	if (!acl)
		return 0;
	q.entries = acl->entries[direction];
	q.count = acl->count[direction];
	copy6(q.address, direction == EGRESS ? p->tuple.daddr : p->tuple.saddr);
	q.dport = p->tuple.dport;
	q.protocol = p->tuple.protocol;
	q.type = p->icmp_type;
	q.code = p->icmp_code;
	bpf_loop(ACL_ENTRIES / ENTRIES_PER_TURN, acl_match6, &q, 0);
	return q.allow;
}

/* As record_key. */
struct record_key6 {
	__u32 ifindex; /* fabric end; 0: the entry that is about the interval */
	__be32 saddr[4];
	__be32 daddr[4];
	__u16 sport; /* 0 unless TCP or UDP */
	__u16 dport;
	__u8 protocol;
	__u8 direction;
	__u8 verdict;
	__u8 path;
};

struct record_map6 {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__uint(key_size, sizeof(struct record_key6));
	__uint(value_size, sizeof(struct record));
};

/* An interval's records of IPv6, as records. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__array(values, struct record_map6);
} records6 SEC(".maps");

struct record_key6 *shown_record_key6 __attribute__((unused));

/* not_recorded6 counts a packet that is in no record: with the interval, and for good. */
static __noinline int not_recorded6(void *interval, const struct record_key6 *of,
				    const struct packet6 *p)
{
	struct record_key6 about = {};
	struct skip_key key = {};
	struct skip none = {};
	struct counters *c;
	struct record *r;
	struct skip *s;

	r = interval ? bpf_map_lookup_elem(interval, &about) : 0;
	key.interval = r ? r->packets : 0;
	key.ifindex = of->ifindex;
	key.direction = of->direction;
	key.refused = of->verdict != VERDICT_ACCEPT;
	s = bpf_map_lookup_elem(&skips, &key);
	if (!s) {
		bpf_map_update_elem(&skips, &key, &none, BPF_NOEXIST);
		s = bpf_map_lookup_elem(&skips, &key);
	}
	if (s) {
		__sync_fetch_and_add(&s->packets, p->packets);
		__sync_fetch_and_add(&s->bytes, p->bytes);
	}
	c = bpf_map_lookup_elem(&counts, &key.ifindex);
	if (!c || key.refused)
		return 0;
	if (key.direction == EGRESS) {
		c->skipped_tx_packets += p->packets;
		c->skipped_tx_bytes += p->bytes;
	} else {
		c->skipped_rx_packets += p->packets;
		c->skipped_rx_bytes += p->bytes;
	}
	return 0;
}

/* log_packet6 as log_packet. */
__noinline int log_packet6(const struct packet6 *p, __u32 ifindex, __u32 direction, __u32 reason,
			   __u32 path)
{
	struct record_key6 key = {};
	struct record begun = {};
	struct record *r;
	__u32 zero = 0;
	void *interval;

	if (!p)
		return 0;
	switch (reason) {
	case 0:
		break;
	case DROP_SG_EGRESS:
	case DROP_SG_INGRESS:
		key.verdict = VERDICT_GROUPS;
		break;
	case DROP_ACL_EGRESS:
	case DROP_ACL_INGRESS:
		key.verdict = VERDICT_ACL;
		break;
	default:
		return 0;
	}
	key.ifindex = ifindex;
	copy6(key.saddr, p->tuple.saddr);
	copy6(key.daddr, p->tuple.daddr);
	key.protocol = p->tuple.protocol;
	if (key.protocol == IPPROTO_TCP || key.protocol == IPPROTO_UDP) {
		key.sport = p->tuple.sport;
		key.dport = p->tuple.dport;
	}
	key.direction = direction;
	if (!reason)
		key.path = path; /* what is refused takes none */
	interval = bpf_map_lookup_elem(&records6, &zero);
	if (!interval)
		return not_recorded6(0, &key, p);
	r = bpf_map_lookup_elem(interval, &key);
	if (!r) {
		begun.packets = p->packets;
		begun.bytes = p->bytes;
		begun.first = p->now;
		begun.last = p->now;
		see_flags(&begun, p->tcp_flags);
		if (!bpf_map_update_elem(interval, &key, &begun, BPF_NOEXIST)) {
			__builtin_memset(&key, 0, sizeof(key));
			r = bpf_map_lookup_elem(interval, &key);
			if (r)
				__sync_fetch_and_add(&r->bytes, 1);
			return 0;
		}
		/* Another CPU may have been first. */
		r = bpf_map_lookup_elem(interval, &key);
		if (!r)
			return not_recorded6(interval, &key, p);
	}
	__sync_fetch_and_add(&r->packets, p->packets);
	__sync_fetch_and_add(&r->bytes, p->bytes);
	if (r->last < p->now)
		r->last = p->now;
	if (p->tcp_flags & (TCP_FIN | TCP_SYN | TCP_RST))
		see_flags(r, p->tcp_flags);
	return 0;
}
