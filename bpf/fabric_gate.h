/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The gates of an ENI: its security groups and their connection tracking. What
 * goes from one ENI to another passes two, the sender's egress gate and the
 * receiver's ingress gate; each ENI knows its own flows and nobody else's.
 *
 * A flow's first packet is judged by the rules, one after the other; what
 * follows finds the flow. Only whole IPv4 headers come here.
 */

/* Security groups that an ENI can have at most (AWS's quota, 5, can be raised to 16). */
#define GROUPS 16
/* AWS: groups per ENI times rules per group and direction is at most 1000. */
#define RULES 1000

enum direction {
	EGRESS, /* what the ENI's guest sends */
	INGRESS, /* what it receives */
};

/* The peer is whoever has an address of net/mask; with a group, whatever ENI has that group. */
struct rule {
	__u64 group; /* number of the peer's group, 0: none */
	__be32 net;
	__be32 mask;
	__u16 from; /* destination port; ICMP: type, ANY: all */
	__u16 to; /* ICMP: code, ANY: all */
	__u8 protocol;
	__u8 all_protocols;
	__u8 pad[2];
};

#define ANY 0xffff

enum open_flag {
	OPEN_TCP = 1,
	OPEN_UDP = 2,
};

/* These show the types to bpf2go. */
volatile const enum direction directions = INGRESS;
volatile const enum open_flag open_flags = OPEN_TCP | OPEN_UDP;
struct policy *shown_policy __attribute__((unused));

/* What an ENI's groups come to. Never changed once it is in map policies. */
struct policy {
	__u64 version; /* digest of all that follows: equal policies have equal ones */
	__u64 groups[GROUPS]; /* numbers of the ENI's groups, the rest 0 */
	__u32 tcp_timeout; /* s, of established connections */
	__u32 udp_timeout; /* s */
	__u32 stream_timeout; /* s, of UDP flows with more than one answer */
	__u32 open[2]; /* by direction: protocols of which all ports are open to 0.0.0.0/0 */
	__u32 count[2]; /* by direction: how many rules there are */
	__u32 pad;
	struct rule rules[2][RULES]; /* by direction; those for 0.0.0.0/0 first */
};

/*
 * Made anew and put in place whole, so that no packet is judged by half of one;
 * when the system call returns, no program has its predecessor any more.
 */
struct policy_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct policy));
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, __u32); /* ifindex of a fabric end */
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__array(values, struct policy_map);
} policies SEC(".maps");

/*
 * A flow as one ENI sees it. Without ports (neither TCP nor UDP) they are 0;
 * those of an ICMP query are its identifier and its type.
 */
struct flow_key {
	__u32 ifindex; /* fabric end */
	__be32 local;
	__be32 remote;
	__u16 local_port;
	__u16 remote_port;
	__u8 protocol;
	__u8 asked; /* ICMP: 1: the local side sends the query, 2: the remote one */
	__u8 pad[2];
};

/* A fabric end's own. Neither changes while it stands. */
struct own {
	__u8 mac[6];
	__u16 mtu; /* IP length of what it takes; 0: not noted */
};

struct flow {
	__u64 expires; /* ns of the monotonic clock */
	__u64 version; /* untracked: of the policy that allows it; tracked: 0 */
	__u64 packets[2]; /* by direction, as on the wire */
	__u64 bytes[2]; /* IP lengths */
	__u64 passed; /* where the last one went that the ENI sent, 0: nowhere (fabric_again.h) */
	struct own own;
	__u32 tcp_timeout; /* s; the policy's when the flow began */
	__u32 udp_timeout;
	__u32 stream_timeout;
	__u8 opener; /* direction of the first packet */
	__u8 flags[2]; /* by direction: all TCP flags seen */
	__u8 replaces; /* of one that is about to begin: in the place of a tracked one */
};

/*
 * When it is full, no flow begins that must be tracked; those that are there go
 * on. Its 40 MiB are taken at once: a connection is two flows, and begins the
 * sooner for it.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__type(key, struct flow_key);
	__type(value, struct flow);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} flows SEC(".maps");

/* What only the first fragment of a datagram tells. */
struct fragment_key {
	__u32 ifindex; /* fabric end of the sender */
	__be32 saddr;
	__be32 daddr;
	__u16 id;
	__u8 protocol;
	__u8 pad;
};

struct fragment {
	__u64 expires; /* ns of the monotonic clock */
	__u16 sport;
	__u16 dport;
	__u8 query;
	__u8 pad[3];
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct fragment_key);
	__type(value, struct fragment);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} fragments SEC(".maps");

/* Idle times that AWS does not publish, in seconds. */
volatile const __u32 tcp_handshake_timeout = 60; /* no answer to a SYN yet */
volatile const __u32 tcp_closed_timeout = 10; /* after both FIN, or RST */
volatile const __u32 icmp_timeout = 30;
/* AWS: "within 600 seconds" (EC2 user guide, security group connection tracking). */
volatile const __u32 other_timeout = 600;
/* How long fragments are waited for: Linux's own (net.ipv4.ipfrag_time). */
volatile const __u32 fragment_timeout = 30;

/*
 * Whether an egress rule's group is that of whoever holds the destination, also
 * if a middlebox receives the packet first. AWS says that a group is not known
 * behind a middlebox, and speaks of the source.
 */
volatile const __u8 egress_groups_by_address = 1;

/* Tests move the clock on by this, in ns. */
volatile __u64 clock_offset;

#define NSEC_PER_SEC 1000000000ULL

/* Precise to a tick of the kernel, which is enough for seconds. */
static __always_inline __u64 now_ns(void)
{
	return bpf_ktime_get_coarse_ns() + clock_offset;
}

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define IP_MORE_FRAGMENTS 0x2000
#define IP_OFFSET 0x1fff

enum icmp_query {
	QUERY_NONE,
	QUERY_REQUEST,
	QUERY_REPLY,
};

/* Who talks to whom: ports in host order; those of an ICMP query as in flow_key. */
struct tuple {
	__be32 saddr;
	__be32 daddr;
	__u16 sport;
	__u16 dport;
	__u8 protocol;
	__u8 query; /* enum icmp_query */
};

/* A packet as the gates see it. */
struct packet {
	struct tuple tuple;
	struct tuple about; /* of an ICMP error: the packet that it is about */
	__u8 is_error; /* about is set */
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 first_fragment; /* others follow */
	__u8 always_tracked; /* whatever the rules: through a NAT gateway (EC2 user guide) */
	__u16 id; /* of a first fragment's datagram */
	__u64 now; /* when it came, ns of the monotonic clock */
	__u16 packets; /* as on the wire */
	__u8 by_rules; /* that it may leave: map asked says whose */
	__u8 pad;
	__u32 bytes;
};

/* set_query reads an ICMP header that asks or answers. */
static __always_inline void set_query(struct tuple *t, const __u8 *icmp)
{
	__u8 type = icmp[0];

	switch (type) {
	case 8: /* echo */
	case 13: /* timestamp */
	case 15: /* information */
	case 17: /* address mask */
		t->query = QUERY_REQUEST;
		break;
	case 0: /* an echo's reply has type 0, the others' the next number */
		type = 8;
		t->query = QUERY_REPLY;
		break;
	case 14:
	case 16:
	case 18:
		type--;
		t->query = QUERY_REPLY;
		break;
	default:
		return;
	}
	t->sport = (__u16)icmp[4] << 8 | icmp[5];
	t->dport = type;
}

/* set_about reads the packet that an ICMP error at offset is about. */
static __noinline void set_about(struct __sk_buff *skb, __u32 offset, struct packet *p)
{
	struct iphdr inner;
	__u8 l4[8];

	if (bpf_skb_load_bytes(skb, offset, &inner, sizeof(inner)))
		return;
	/* The error goes to whoever sent the packet, or it is forged. */
	if (inner.version != 4 || inner.ihl < 5 || inner.saddr != p->tuple.daddr ||
	    (inner.frag_off & bpf_htons(IP_OFFSET)))
		return;
	if (bpf_skb_load_bytes(skb, offset + inner.ihl * 4, l4, sizeof(l4)))
		return;
	p->about.saddr = inner.saddr;
	p->about.daddr = inner.daddr;
	p->about.protocol = inner.protocol;
	if (inner.protocol == IPPROTO_TCP || inner.protocol == IPPROTO_UDP) {
		p->about.sport = (__u16)l4[0] << 8 | l4[1];
		p->about.dport = (__u16)l4[2] << 8 | l4[3];
	} else if (inner.protocol == IPPROTO_ICMP) {
		set_query(&p->about, l4);
		if (!p->about.query)
			return;
	}
	p->is_error = 1;
}

/*
 * parse reads what the gates need of a frame that ipv4_header has looked at; p
 * is all zero. It returns 0, or the reason why the packet cannot be judged. Not
 * static, as gate.
 */
__noinline int parse(struct __sk_buff *skb, struct packet *p)
{
	struct iphdr *iph = (void *)(long)skb->data + ETH_HLEN;
	__u16 frag_off;
	__u32 offset;
	__u8 l4[14] = {};

	if (!p || (void *)(iph + 1) > (void *)(long)skb->data_end)
		return DROP_MALFORMED;
	offset = ETH_HLEN + iph->ihl * 4;
	frag_off = bpf_ntohs(iph->frag_off);
	p->now = now_ns();
	p->tuple.saddr = iph->saddr;
	p->tuple.daddr = iph->daddr;
	p->tuple.protocol = iph->protocol;
	if (frag_off & IP_OFFSET) {
		struct fragment_key key = {
			.ifindex = skb->ifindex,
			.saddr = iph->saddr,
			.daddr = iph->daddr,
			.id = bpf_ntohs(iph->id),
			.protocol = iph->protocol,
		};
		struct fragment *first = bpf_map_lookup_elem(&fragments, &key);

		if (!first || first->expires <= p->now)
			return DROP_FRAGMENT;
		p->tuple.sport = first->sport;
		p->tuple.dport = first->dport;
		p->tuple.query = first->query;
		return 0;
	}
	if (frag_off & IP_MORE_FRAGMENTS) {
		p->first_fragment = 1;
		p->id = bpf_ntohs(iph->id);
	}
	switch (iph->protocol) {
	case IPPROTO_TCP:
		/* Up to the flags. */
		if (bpf_skb_load_bytes(skb, offset, l4, 14))
			return DROP_MALFORMED;
		p->tcp_flags = l4[13];
		break;
	case IPPROTO_UDP:
		if (bpf_skb_load_bytes(skb, offset, l4, 8))
			return DROP_MALFORMED;
		break;
	case IPPROTO_ICMP:
		if (bpf_skb_load_bytes(skb, offset, l4, 8))
			return DROP_MALFORMED;
		p->icmp_type = l4[0];
		p->icmp_code = l4[1];
		set_query(&p->tuple, l4);
		/* Unreachable, source quench, redirect, time exceeded, parameter problem. */
		if (l4[0] == 3 || l4[0] == 4 || l4[0] == 5 || l4[0] == 11 || l4[0] == 12)
			set_about(skb, offset + 8, p);
		return 0;
	default:
		return 0;
	}
	p->tuple.sport = (__u16)l4[0] << 8 | l4[1];
	p->tuple.dport = (__u16)l4[2] << 8 | l4[3];
	return 0;
}

/* remember_fragment lets the other fragments of a datagram follow this one. */
static __noinline void remember_fragment(__u32 ifindex, const struct packet *p)
{
	struct fragment_key key = {
		.ifindex = ifindex,
		.saddr = p->tuple.saddr,
		.daddr = p->tuple.daddr,
		.id = p->id,
		.protocol = p->tuple.protocol,
	};
	struct fragment value = {
		.expires = p->now + fragment_timeout * NSEC_PER_SEC,
		.sport = p->tuple.sport,
		.dport = p->tuple.dport,
		.query = p->tuple.query,
	};

	bpf_map_update_elem(&fragments, &key, &value, BPF_ANY);
}

static __always_inline void set_flow_key(struct flow_key *k, __u32 ifindex,
					 enum direction direction, const struct tuple *t)
{
	__builtin_memset(k, 0, sizeof(*k));
	k->ifindex = ifindex;
	k->protocol = t->protocol;
	if (direction == EGRESS) {
		k->local = t->saddr;
		k->remote = t->daddr;
		k->local_port = t->sport;
		k->remote_port = t->dport;
	} else {
		k->local = t->daddr;
		k->remote = t->saddr;
		k->local_port = t->dport;
		k->remote_port = t->sport;
	}
	if (t->query) {
		/* The same for query and answer, and not for a query the other way. */
		k->local_port = t->sport;
		k->remote_port = t->dport;
		k->asked = (t->query == QUERY_REQUEST) == (direction == EGRESS) ? 1 : 2;
	}
}

static __always_inline struct policy *policy_of(__u32 ifindex)
{
	__u32 zero = 0;
	void *inner = bpf_map_lookup_elem(&policies, &ifindex);

	return inner ? bpf_map_lookup_elem(inner, &zero) : 0;
}

static __always_inline int closed(const struct flow *f)
{
	return ((f->flags[EGRESS] | f->flags[INGRESS]) & TCP_RST) ||
	       (f->flags[EGRESS] & f->flags[INGRESS] & TCP_FIN);
}

static __always_inline __u32 idle_timeout(const struct flow *f, __u8 protocol)
{
	__u8 asked = f->opener == EGRESS ? f->flags[EGRESS] : f->flags[INGRESS];
	__u8 answered = f->opener == EGRESS ? f->flags[INGRESS] : f->flags[EGRESS];

	switch (protocol) {
	case IPPROTO_TCP:
		if (closed(f))
			return tcp_closed_timeout;
		/* Answered, and the answer acknowledged. */
		if (answered && (asked & TCP_ACK))
			return f->tcp_timeout;
		return tcp_handshake_timeout;
	case IPPROTO_UDP:
		/* More than one request and response (EC2 user guide). */
		if (f->packets[EGRESS] > 1 && f->packets[INGRESS] > 1)
			return f->stream_timeout;
		return f->udp_timeout;
	case IPPROTO_ICMP:
		return icmp_timeout;
	}
	return other_timeout;
}

/* see counts a packet of a flow. */
static __always_inline void see(struct flow *f, enum direction direction, const struct packet *p,
				__u64 now)
{
	__u64 expires;

	__sync_fetch_and_add(&f->packets[direction], p->packets);
	__sync_fetch_and_add(&f->bytes[direction], p->bytes);
	if (p->tcp_flags & ~f->flags[direction])
		f->flags[direction] |= p->tcp_flags;
	expires = now + idle_timeout(f, p->tuple.protocol) * NSEC_PER_SEC;
	if (f->expires != expires)
		f->expires = expires;
}

/* What match asks of each rule; allowed is the answer. */
struct question {
	const struct rule *rules;
	const struct policy *peer; /* whose groups count, or none */
	__be32 address; /* the peer's */
	__u32 count;
	__u16 dport;
	__u8 protocol;
	__u8 type;
	__u8 code;
	__u8 allowed; /* 1: yes, 2: by a rule for 0.0.0.0/0 */
};

/* Rules per turn of the loop: a turn is a call, which costs more than a rule. */
#define RULES_PER_TURN 8
_Static_assert(RULES % RULES_PER_TURN == 0, "the last turn is as long as the others");

/* concerns tells whether a rule is about the packet's protocol and ports. */
static __always_inline int concerns(const struct rule *r, const struct question *q)
{
	if (r->all_protocols)
		return 1;
	if (r->protocol != q->protocol)
		return 0;
	if (q->protocol == IPPROTO_TCP || q->protocol == IPPROTO_UDP)
		return q->dport >= r->from && q->dport <= r->to;
	if (q->protocol == IPPROTO_ICMP)
		return (r->from == ANY || r->from == q->type) && (r->to == ANY || r->to == q->code);
	return 1;
}

/* match_peer asks whether a rule is about the peer. */
static __noinline int match_peer(const struct rule *r, struct question *q)
{
	if (!r->group) {
		if ((q->address & r->mask) == r->net)
			q->allowed = r->mask ? 1 : 2;
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

static long match(__u64 turn, struct question *q)
{
	__u64 first = turn * RULES_PER_TURN;
	const struct rule *r;

	if (first > RULES - RULES_PER_TURN)
		return 1;
	r = &q->rules[first];
#pragma unroll
	for (int k = 0; k < RULES_PER_TURN; k++) {
		if (first + k >= q->count)
			return 1;
		if (!concerns(&r[k], q))
			continue;
		match_peer(&r[k], q);
		if (q->allowed)
			return 1;
	}
	return 0;
}

/* Whether a rule for 0.0.0.0/0 allows it: those rules come first. */
static __always_inline int for_everybody(const struct policy *policy, __u32 direction,
					 __u8 protocol, __u16 dport)
{
	struct question q = {};

	q.rules = policy->rules[direction];
	q.count = policy->count[direction];
	q.protocol = protocol;
	q.dport = dport;
	bpf_loop(RULES / RULES_PER_TURN, match, &q, 0);
	return q.allowed == 2;
}

/*
 * untracked says whether the rules make the packet's flow one that needs no
 * tracking: the one that the packet begins, or the one that it answers. The
 * latter matters when nothing is known of the flow any more; taken for the
 * beginning of one, the answer would have it tracked from then on, and no change
 * would cut it. A SYN of no known flow answers none.
 */
static __always_inline int untracked(const struct policy *policy, __u32 direction,
				     const struct tuple *t, int opens)
{
	__u32 open = t->protocol == IPPROTO_TCP ? OPEN_TCP :
		     t->protocol == IPPROTO_UDP ? OPEN_UDP : 0;

	if ((policy->open[!direction] & open) &&
	    for_everybody(policy, direction, t->protocol, t->dport))
		return 1;
	return !opens && (policy->open[direction] & open) &&
	       for_everybody(policy, !direction, t->protocol, t->sport);
}

static __always_inline int is_syn(const struct packet *p)
{
	return (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/*
 * By which policies rules let the packet that is under way leave its sender. A
 * change of one ENI's groups changes its own rules and what those of others make
 * of it: a packet is judged by what was before at both ends, or by what is after.
 */
struct asked {
	__u32 own; /* fabric end of the sender */
	__u32 peer; /* whose groups counted, 0: nobody's */
	__u64 own_version;
	__u64 peer_version;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct asked);
} asked SEC(".maps");

static __always_inline void note_asked(__u32 own, __u64 own_version, __u32 peer, __u64 peer_version)
{
	__u32 zero = 0;
	struct asked *a = bpf_map_lookup_elem(&asked, &zero);

	if (!a)
		return;
	a->own = own;
	a->own_version = own_version;
	a->peer = peer;
	a->peer_version = peer_version;
}

/* agrees says whether the receiver's gate has met the same policies. */
static __always_inline int agrees(__u32 own, __u64 own_version, __u32 peer, __u64 peer_version)
{
	__u32 zero = 0;
	struct asked *a = bpf_map_lookup_elem(&asked, &zero);

	return a && (a->peer != own || a->peer_version == own_version) &&
	       (a->own != peer || a->own_version == peer_version);
}

/*
 * gate says whether an ENI's security groups let a packet pass: 0, or the
 * reason why not. peer is the ENI whose groups the rules may name, 0 if none is
 * known: a source counts only with the ENI that sends from it (AWS: references
 * to groups do not reach through a middlebox). Not static: so it is verified by
 * itself and once.
 */
__noinline int gate(struct packet *p, __u32 ifindex, __u32 which, __u32 peer)
{
	__u32 direction = which & INGRESS; /* 0 or 1, as the verifier sees */
	enum drop_reason refused = direction == EGRESS ? DROP_SG_EGRESS : DROP_SG_INGRESS;
	struct policy *policy = 0;
	struct question q = {};
	struct flow begun = {};
	struct flow_key key;
	struct flow *f;
	__u64 now;

	if (!p)
		return refused;
	now = p->now;
	set_flow_key(&key, ifindex, direction, &p->tuple);
	f = bpf_map_lookup_elem(&flows, &key);
	begun.replaces = f && !f->version;
	/* Once it is closed, a SYN begins another connection. */
	if (f && f->expires > now && !(is_syn(p) && closed(f))) {
		if (f->version) {
			policy = policy_of(ifindex);
			if (policy && (policy->version == f->version ||
				       untracked(policy, direction, &p->tuple, 0))) {
				f->version = policy->version;
				see(f, direction, p, now);
				return 0;
			}
		} else {
			see(f, direction, p, now);
			return 0;
		}
	}
	if (!policy)
		policy = policy_of(ifindex);
	if (!policy)
		return refused;
	if (p->is_error) {
		set_flow_key(&key, ifindex, !direction, &p->about);
		f = bpf_map_lookup_elem(&flows, &key);
		/* An untracked flow goes on if it is one by the rules of today. */
		if (f && f->expires > now &&
		    (!f->version || f->version == policy->version ||
		     untracked(policy, !direction, &p->about, 0)))
			return 0;
		set_flow_key(&key, ifindex, direction, &p->tuple);
	}

	q.rules = policy->rules[direction];
	q.count = policy->count[direction];
	q.address = direction == EGRESS ? p->tuple.daddr : p->tuple.saddr;
	q.peer = peer ? policy_of(peer) : 0;
	q.dport = p->tuple.dport;
	q.protocol = p->tuple.protocol;
	q.type = p->icmp_type;
	q.code = p->icmp_code;
	bpf_loop(RULES / RULES_PER_TURN, match, &q, 0);
	if (!q.allowed)
		return refused;
	if (direction == EGRESS) {
		p->by_rules = 1;
		note_asked(ifindex, policy->version, peer, q.peer ? q.peer->version : 0);
	} else if (p->by_rules && !agrees(ifindex, policy->version, peer, q.peer ? q.peer->version : 0)) {
		return refused;
	}
	/* An error, or an answer that nobody asked for, has no answer itself. */
	if (p->tuple.protocol == IPPROTO_ICMP && p->tuple.query != QUERY_REQUEST)
		return 0;

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
	if (!p->always_tracked && untracked(policy, direction, &p->tuple, is_syn(p)))
		begun.version = policy->version;
	begun.expires = now + idle_timeout(&begun, p->tuple.protocol) * NSEC_PER_SEC;
	if (!begun.version && !begun.replaces && !may_track(key.ifindex))
		return DROP_CONNTRACK_ALLOWANCE;
	begun.replaces = 0;
	/* An untracked flow is only spared the rules here: it needs no entry. */
	if (bpf_map_update_elem(&flows, &key, &begun, BPF_ANY) && !begun.version)
		return DROP_FLOWS_FULL;
	return 0;
}
