/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Connection tracking of the node: one entry for each flow of a pod, as a hook
 * sees its addresses. A connection that netfilter translates is two flows, one
 * on either side of the translation.
 *
 * The key has no direction: both ends are in it, in an order of their own, so
 * that one look-up finds the flow whoever sends. Of all that the entry keeps by
 * end, index 0 is the key's end 0.
 *
 * Whoever includes this defines struct addr, the reasons to drop and NSEC_PER_SEC
 * beforehand.
 */

#define MAX_CONNS	262144
#define MAX_FRAGMENTS	16384

struct conn_key {
	struct addr addr[2];	/* by end */
	__u16 port[2];		/* host order; ICMP query: identifier, request's type; other ICMP: type, code */
	__u8 protocol;
	__u8 asker;		/* ICMP query: the end that asks, plus 1 */
	__u8 pad[2];
} __attribute__((aligned(8)));

/* Who forwards a flow, for life (D6). */
enum provenance {
	PROVENANCE_STACK = 1,	/* the kernel's stack, with all that netfilter does */
	PROVENANCE_DIRECT,	/* our programs, from its first packet on */
};

enum conn_state {
	CONN_OPENING = 1,	/* not answered yet, or not acknowledged */
	CONN_ESTABLISHED,	/* UDP: more than one request and response */
	CONN_CLOSED,		/* RST, or a FIN from both ends */
};

/* Bits that packets set as they come, shifted left by the end. Two CPUs may lose
 * one to each other until the next packet, so no verdict is among them. */
enum conn_seen {
	CONN_SEEN = 1,		/* something that this end sent */
	CONN_SENDER = 4,	/* the end is a pod here, and from_pod counts what it sends */
};

enum conn_flag {
	CONN_LOCAL = 16,	/* direct, and both ends are pods here of one subnet */
	CONN_MIDFLOW = 32,	/* its beginning was not seen */
	CONN_DENIED = 64,	/* a gate refuses it: the entry counts, and admits nothing */
	CONN_UNTRACKED = 128,	/* AWS does not track it: it ends with its groups' rules */
};

struct conn_verdict {
	__u32 rule;		/* that decided; 0: the default, or not judged */
	__u32 epoch;		/* of the table that it is in */
};

/*
 * What decides about a flow's packets. It is read at once, and exchanged at once:
 * while a program holds a pointer to an entry, another CPU may judge the flow, or
 * put another entry in its place, and the memory of one that was deleted is the
 * next one's at once (kernel/bpf/memalloc.c), this or another flow's.
 */
struct gates {
	__u8 opener;		/* end */
	__u8 provenance;	/* enum provenance */
	__u8 flags;		/* enum conn_flag */
	__u8 pad;
	__u8 judged[2];		/* by end whose pod was judged: bit g: by gate g */
	__u8 allowed[2];	/* bit g: gate g lets it pass */
} __attribute__((aligned(8)));

/* A flow. Times are CLOCK_MONOTONIC, precise to a tick of the kernel. Packets
 * are those on the wire (a segmentation offload's apart), bytes IP lengths. */
struct conn {
	struct conn_key key;	/* the first that the kernel writes of an entry */
	struct gates gates;
	__u64 created_ns;
	__u64 last_ns;
	__u64 packets[2];	/* by end that sent them */
	__u64 bytes[2];
	__u32 ifindex[2];	/* host veth of the pod that is this end; 0: none here */
	struct conn_verdict verdict[2][GATES]; /* by end whose pod was judged */
	__u32 timeout_s;	/* idle time after which it is over */
	__u32 eni_ifindex;	/* by which it leaves the node; 0: not known */
	__u8 tcp_flags[2];	/* all seen, by end that sent them */
	__u8 audit[2];		/* bit g: only because gate g enforces nothing */
	__u8 state;		/* enum conn_state */
	__u8 seen;		/* enum conn_seen */
	__u16 share;		/* slot of the pod in whose share of the table it is; 0: nobody's */
	__u32 generation;	/* policy_now() when the verdicts were last compared */
	__u16 slot[2];		/* of that pod, as last seen: good while slots agrees */
};

/* Grown by need: 256 bytes of kernel memory an entry. When it is full no flow
 * begins; those that are there go on. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_CONNS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct conn_key);
	__type(value, struct conn);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} conns SEC(".maps");

/* What only the first fragment of a datagram tells. A hook sees addresses of
 * its own side of a translation, so each device has its own. */
struct fragment_key {
	struct addr src;
	struct addr dst;
	__u32 id;
	__u32 ifindex;
	__u32 protocol;
};

struct fragment {
	__u64 expires_ns;
	__u16 sport;
	__u16 dport;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 query;
	__u8 opens;		/* the datagram is what a flow begins with */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_FRAGMENTS);
	__type(key, struct fragment_key);
	__type(value, struct fragment);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} fragments SEC(".maps");

/* What the datapath counts of itself, by packet. */
enum path_count {
	PATH_DIRECT = 0,	/* forwarded by our programs */
	PATH_STACK,		/* of pods, left to the stack */
	PATH_EXCEPTION,		/* of direct flows, left to the stack: too long, TTL, IP options */
	PATH_BEGUN_DIRECT,	/* flows */
	PATH_BEGUN_STACK,	/* flows */
	PATH_MIDFLOW,		/* flows whose beginning was not seen */
	PATH_EVICTED,		/* flows that were over, removed to make room */
	PATH_NO_ROOM,		/* flows that found none, or none in their pod's share */
	PATH_COUNTS,		/* how many there are */
};

/* Room in the table, so that a new count does not change the layout. */
#define PATH_SLOTS	16

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, PATH_SLOTS);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} paths SEC(".maps");

/* Idle times in seconds. The first three are EC2's ConnectionTrackingSpecification
 * (EC2 user guide, idle connection tracking timeout); AWS publishes the last, and
 * not those between. */
const volatile __u32 tcp_established_timeout = 432000;
const volatile __u32 udp_timeout = 30;
const volatile __u32 udp_stream_timeout = 180;
const volatile __u32 tcp_opening_timeout = 60;
const volatile __u32 tcp_closed_timeout = 10;
const volatile __u32 icmp_timeout = 30;
const volatile __u32 other_timeout = 600;
/* Linux' own (net.ipv4.ipfrag_time). */
const volatile __u32 fragment_timeout = 30;
/* Tests move the clock on by this, in ns. */
const volatile __u64 clock_offset = 0;

#define TCP_FIN	0x01
#define TCP_SYN	0x02
#define TCP_RST	0x04
#define TCP_ACK	0x10

#define IP_MORE_FRAGMENTS	0x2000
#define IP_OFFSET		0x1fff

#define EINVAL	22
#define EEXIST	17

enum packet_flag {
	PACKET_FRAGMENT = 1,	/* part of a datagram, the first included */
	PACKET_ERROR = 2,	/* ICMP error: the tuple is the flow's that it is about */
	PACKET_OPENS = 4,	/* what a flow begins with */
	PACKET_OPTIONS = 8,	/* IP options, or extension headers */
	PACKET_SHORT = 16,	/* shorter than its IP header says */
	PACKET_IPV6 = 32,
	PACKET_HERE = 64,	/* from a pod of this node, and by no wire */
};

/* A packet as conntrack sees it. Of an ICMP error the tuple is that of the flow
 * which it is about, in the direction in which the error goes. */
struct packet {
	struct tuple tuple;
	struct conn_key key;
	__u64 now;
	__u64 tick;		/* of the kernel, at which its clock was read */
	__u64 clock;
	__u32 packets;		/* as on the wire */
	__u32 bytes;
	__u32 id;		/* of the datagram that a fragment is of */
	__u8 end;		/* that sent it: index into the key */
	__u8 flags;		/* enum packet_flag */
	__u8 tcp_flags;
	__u8 ttl;
};

/* Sets the packet's time. The kernel's coarse clock moves with its ticks: while
 * there was none since this CPU's last packet, that one's time is good still. */
static __always_inline void set_now(struct packet *p)
{
	__u64 tick = bpf_jiffies64();

	if (p->tick != tick) {
		p->tick = tick;
		p->clock = bpf_ktime_get_coarse_ns();
	}
	p->now = p->clock + clock_offset;
}

static __always_inline void count(__u32 what)
{
	__u64 *n = bpf_map_lookup_elem(&paths, &what);

	if (n)
		(*n)++;
}

/* Reads an ICMP or ICMPv6 header that asks or answers. */
static __always_inline void set_query(struct tuple *t, const __u8 *icmp)
{
	__u8 type = icmp[0], query = QUERY_NONE;

	if (t->protocol == IPPROTO_ICMPV6) {
		if (type == 128 || type == 129) /* RFC 4443, 4 */
			query = type == 128 ? QUERY_REQUEST : QUERY_REPLY;
		type = 128;
	} else if (type == 0 || type == 8) { /* echo, RFC 792 */
		query = type ? QUERY_REQUEST : QUERY_REPLY;
		type = 8;
	} else if (type >= 13 && type <= 18) { /* timestamp, information, mask (RFC 950) */
		query = type & 1 ? QUERY_REQUEST : QUERY_REPLY;
		type = (type - 1) | 1;
	}
	if (!query)
		return;
	t->query = query;
	t->sport = (__u16)icmp[4] << 8 | icmp[5];
	t->dport = type;
}

static __always_inline bool icmp_error(__u8 protocol, __u8 type)
{
	if (protocol == IPPROTO_ICMPV6)
		return type >= 1 && type <= 4; /* RFC 4443, 3 */
	return type == 3 || type == 4 || type == 5 || type == 11 || type == 12;
}

/* Extension headers that are gone through before the packet is given up
 * (RFC 8200, 4.1 names seven). */
#define EXTENSIONS 8

/* Finds the upper-layer header behind IPv6's: its offset, or 0 if there is none
 * within reach. *frag gets the offset field of a fragment header, if there is
 * one, *id its identification. */
static __noinline __u32 skip_extensions(struct __sk_buff *skb, __u32 offset, __u8 *next, __u32 *frag,
					__u32 *id)
{
	__u8 h[8];

	for (int i = 0; i < EXTENSIONS; i++) {
		switch (*next) {
		case 0:   /* hop-by-hop */
		case 43:  /* routing */
		case 60:  /* destination options */
		case 135: /* mobility */
			if (bpf_skb_load_bytes(skb, offset, h, 8))
				return 0;
			*next = h[0];
			offset += ((__u32)h[1] + 1) * 8;
			break;
		case 51: /* authentication: counted in units of 4 (RFC 4302, 2.2) */
			if (bpf_skb_load_bytes(skb, offset, h, 8))
				return 0;
			*next = h[0];
			offset += ((__u32)h[1] + 2) * 4;
			break;
		case 44: /* fragment */
			if (bpf_skb_load_bytes(skb, offset, h, 8))
				return 0;
			*next = h[0];
			*frag = (__u32)h[2] << 8 | h[3];
			*id = (__u32)h[4] << 24 | (__u32)h[5] << 16 | (__u32)h[6] << 8 | h[7];
			offset += 8;
			if (*frag & 0xfff8) /* not the first: what follows is payload */
				return offset;
			break;
		default:
			return offset;
		}
	}
	return 0;
}

/* What an IP header says, of either version. */
struct network {
	struct addr src;
	struct addr dst;
	__u32 offset;		/* of the upper layer's header */
	__u32 header;		/* length of all before it */
	__u32 length;		/* IP length as the header says */
	__u32 id;
	__u8 protocol;
	__u8 ttl;
	__u8 options;
	__u8 fragment;		/* 1 the first, 2 another */
};

static __noinline int read_ipv4(struct __sk_buff *skb, __u32 offset, struct network *n)
{
	struct iphdr ip;

	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5)
		return DROP_MALFORMED;
	map_v4(&n->src, ip.saddr);
	map_v4(&n->dst, ip.daddr);
	n->header = ip.ihl * 4;
	n->offset = offset + n->header;
	n->length = bpf_ntohs(ip.tot_len);
	n->id = bpf_ntohs(ip.id);
	n->protocol = ip.protocol;
	n->ttl = ip.ttl;
	n->options = ip.ihl > 5;
	n->fragment = 0;
	if (ip.frag_off & bpf_htons(IP_OFFSET))
		n->fragment = 2;
	else if (ip.frag_off & bpf_htons(IP_MORE_FRAGMENTS))
		n->fragment = 1;
	return 0;
}

static __noinline int read_ipv6(struct __sk_buff *skb, __u32 offset, struct network *n)
{
	struct ipv6hdr ip;
	__u32 frag = 0, id = 0;
	__u8 next;

	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)) || ip.version != 6)
		return DROP_MALFORMED;
	__builtin_memcpy(&n->src, &ip.saddr, 16);
	__builtin_memcpy(&n->dst, &ip.daddr, 16);
	next = ip.nexthdr;
	n->offset = skip_extensions(skb, offset + sizeof(ip), &next, &frag, &id);
	if (!n->offset)
		return DROP_MALFORMED;
	n->header = n->offset - offset;
	n->length = sizeof(ip) + bpf_ntohs(ip.payload_len);
	n->id = id;
	n->protocol = next;
	n->ttl = ip.hop_limit;
	n->options = next != ip.nexthdr;
	n->fragment = frag & 0xfff8 ? 2 : frag & 1 ? 1 : 0;
	return 0;
}

/* Sets all of a key that is not addresses: one word, as the kernel reads it. */
static __always_inline void set_rest(struct conn_key *k, __u64 port0, __u64 port1, __u64 protocol, __u64 asker)
{
	_Static_assert(offsetof(struct conn_key, port) == 32 && offsetof(struct conn_key, protocol) == 36 &&
		       offsetof(struct conn_key, asker) == 37 && sizeof(*k) == 40, "little-endian words");

	*(word *)(void *)k->port = port0 | port1 << 16 | protocol << 32 | asker << 40;
}

/* Makes the key of a tuple; p->end is the end that sends. */
static __always_inline void set_key(struct packet *p)
{
	const struct tuple *t = &p->tuple;
	struct conn_key *k = &p->key;
	const word *src = (const void *)&t->src, *dst = (const void *)&t->dst;
	__u64 low, high, asker = 0;
	__u32 end;

	/* Any order will do that is the same for both directions. */
	if (src[1] != dst[1])
		end = src[1] > dst[1];
	else if (src[0] != dst[0])
		end = src[0] > dst[0];
	else
		end = t->sport > t->dport;
	p->end = end;
	copy_addr(&k->addr[0], end ? &t->dst : &t->src);
	copy_addr(&k->addr[1], end ? &t->src : &t->dst);
	low = end ? t->dport : t->sport;
	high = end ? t->sport : t->dport;
	if ((t->protocol == IPPROTO_ICMP || t->protocol == IPPROTO_ICMPV6) && !t->query) {
		low = t->icmp_type;
		high = t->icmp_code;
	}
	if (t->query) {
		/* The same for question and answer, and another for a question
		 * that goes the other way. */
		low = t->sport;
		high = t->dport;
		asker = (t->query == QUERY_REQUEST ? end : 1 - end) + 1;
	}
	set_rest(k, low, high, t->protocol, asker);
}

/* Turns the tuple into that of the flow which an ICMP error at offset is about,
 * if it is to be known. */
static __noinline int read_error(struct __sk_buff *skb, __u32 offset, struct packet *p)
{
	struct network n ADDR_ALIGNED = {};
	struct tuple *t = &p->tuple;
	__u8 l4[8];
	int bad;

	bad = t->protocol == IPPROTO_ICMPV6 ? read_ipv6(skb, offset, &n) : read_ipv4(skb, offset, &n);
	/* An error goes to whoever sent the packet, or it is forged. */
	if (bad || n.fragment == 2 || !same_addr(&n.src, &t->dst) ||
	    bpf_skb_load_bytes(skb, n.offset, l4, sizeof(l4)))
		return 0;
	/* The flow's tuple as who sends the error would send it. */
	t->src = n.dst;
	t->protocol = n.protocol;
	t->query = QUERY_NONE;
	if (n.protocol == IPPROTO_TCP || n.protocol == IPPROTO_UDP || n.protocol == IPPROTO_SCTP) {
		t->dport = (__u16)l4[0] << 8 | l4[1];
		t->sport = (__u16)l4[2] << 8 | l4[3];
	} else if (n.protocol == IPPROTO_ICMP || n.protocol == IPPROTO_ICMPV6) {
		set_query(t, l4);
		if (t->query == QUERY_REQUEST)
			t->query = QUERY_REPLY;
		else if (t->query == QUERY_REPLY)
			t->query = QUERY_REQUEST;
	}
	p->flags |= PACKET_ERROR;
	return 0;
}

/* read_other for what most packets are: whole IPv4 without options, TCP or UDP,
 * readable where it lies. False: it is another, and nothing was read that matters. */
static __always_inline bool read_plain(struct __sk_buff *skb, struct packet *p)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct iphdr *ip = data + ETH_HLEN;
	struct tuple *t = &p->tuple;
	__u32 header, segments, have;
	__u8 *l4 = (void *)(ip + 1);

	if ((void *)(l4 + 8) > end || ip->version != 4 || ip->ihl != 5 ||
	    (ip->frag_off & bpf_htons(IP_MORE_FRAGMENTS | IP_OFFSET)))
		return false;
	p->flags = 0;
	p->tcp_flags = 0;
	if (ip->protocol == IPPROTO_UDP) {
		header = 8;
		p->flags = PACKET_OPENS;
	} else if (ip->protocol == IPPROTO_TCP) {
		if ((void *)(l4 + 14) > end)
			return false;
		header = (l4[12] >> 4) * 4;
		if (header < 20)
			return false;
		p->tcp_flags = l4[13];
		if ((l4[13] & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN)
			p->flags = PACKET_OPENS;
	} else {
		return false;
	}
	map_v4(&t->src, ip->saddr);
	map_v4(&t->dst, ip->daddr);
	t->sport = bpf_ntohs(*(__be16 *)(void *)l4);
	t->dport = bpf_ntohs(*(__be16 *)(void *)(l4 + 2));
	t->protocol = ip->protocol;
	t->icmp_type = 0;
	t->icmp_code = 0;
	t->query = QUERY_NONE;
	set_now(p);
	p->id = 0;
	p->ttl = ip->ttl;
	p->packets = 1;
	have = skb->len - ETH_HLEN;
	p->bytes = have;
	if (skb->gso_size) {
		segments = skb->gso_segs;
		if (segments > 1) {
			p->packets = segments;
			p->bytes += (segments - 1) * (sizeof(*ip) + header);
		}
	} else if (bpf_ntohs(ip->tot_len) > have) {
		p->flags |= PACKET_SHORT;
	}
	set_key(p);
	return true;
}

/*
 * Reads what conntrack and policy need of a packet whose Ethernet frame carries
 * IPv4, or IPv6 if v6. It returns 0, or the reason to drop it. With errors, the
 * tuple of an ICMP error becomes that of the flow.
 */
__noinline int read_other(struct __sk_buff *skb, struct packet *p, int v6, int errors)
{
	struct network n ADDR_ALIGNED = {};
	__u32 header, segments, have;
	__u8 l4[14] = {};
	struct tuple *t;
	int bad;

	if (!p)
		return DROP_MALFORMED;
	t = &p->tuple;
	bad = v6 && ipv6_allowed ? read_ipv6(skb, ETH_HLEN, &n) : read_ipv4(skb, ETH_HLEN, &n);
	if (bad)
		return bad;
	t->src = n.src;
	t->dst = n.dst;
	t->sport = 0;
	t->dport = 0;
	t->protocol = n.protocol;
	t->icmp_type = 0;
	t->icmp_code = 0;
	t->query = QUERY_NONE;
	set_now(p);
	p->id = n.id;
	p->ttl = n.ttl;
	p->tcp_flags = 0;
	p->flags = (n.options ? PACKET_OPTIONS : 0) | (v6 ? PACKET_IPV6 : 0);
	p->packets = 1;
	have = skb->len - ETH_HLEN;
	p->bytes = have;
	if (!skb->gso_size && n.length > have)
		p->flags |= PACKET_SHORT;

	if (n.fragment == 2) {
		struct fragment_key fk = {
			.src = n.src, .dst = n.dst, .id = n.id,
			.ifindex = skb->ifindex, .protocol = n.protocol,
		};
		struct fragment *first = bpf_map_lookup_elem(&fragments, &fk);

		p->flags |= PACKET_FRAGMENT;
		if (!first || first->expires_ns <= p->now)
			return DROP_FRAGMENT;
		t->sport = first->sport;
		t->dport = first->dport;
		t->icmp_type = first->icmp_type;
		t->icmp_code = first->icmp_code;
		t->query = first->query;
		if (first->opens)
			p->flags |= PACKET_OPENS;
		set_key(p);
		return 0;
	}

	header = 0;
	switch (n.protocol) {
	case IPPROTO_TCP: /* up to the flags */
		if (bpf_skb_load_bytes(skb, n.offset, l4, 14))
			return DROP_MALFORMED;
		p->tcp_flags = l4[13];
		header = (l4[12] >> 4) * 4;
		if (header < 20)
			return DROP_MALFORMED;
		if ((l4[13] & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN)
			p->flags |= PACKET_OPENS;
		break;
	case IPPROTO_UDP:
		header = 8;
		p->flags |= PACKET_OPENS;
		if (bpf_skb_load_bytes(skb, n.offset, l4, 8))
			return DROP_MALFORMED;
		break;
	case IPPROTO_SCTP:
		p->flags |= PACKET_OPENS;
		if (bpf_skb_load_bytes(skb, n.offset, l4, 8))
			return DROP_MALFORMED;
		break;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		if (bpf_skb_load_bytes(skb, n.offset, l4, 8))
			return DROP_MALFORMED;
		t->icmp_type = l4[0];
		t->icmp_code = l4[1];
		set_query(t, l4);
		if (t->query == QUERY_REQUEST)
			p->flags |= PACKET_OPENS;
		break;
	default:
		p->flags |= PACKET_OPENS;
	}
	if (n.protocol == IPPROTO_TCP || n.protocol == IPPROTO_UDP || n.protocol == IPPROTO_SCTP) {
		t->sport = (__u16)l4[0] << 8 | l4[1];
		t->dport = (__u16)l4[2] << 8 | l4[3];
	} else if (errors && icmp_error(n.protocol, l4[0]) &&
		   (n.protocol == IPPROTO_ICMP || n.protocol == IPPROTO_ICMPV6)) {
		read_error(skb, n.offset + 8, p);
	}
	segments = skb->gso_segs;
	if (segments > 1 && skb->gso_size) {
		p->packets = segments;
		p->bytes += (segments - 1) * (n.header + header);
	}
	if (n.fragment == 1) {
		struct fragment_key fk = {
			.src = n.src, .dst = n.dst, .id = n.id,
			.ifindex = skb->ifindex, .protocol = n.protocol,
		};
		struct fragment first = {
			.expires_ns = p->now + fragment_timeout * NSEC_PER_SEC,
			.sport = t->sport, .dport = t->dport,
			.icmp_type = t->icmp_type, .icmp_code = t->icmp_code, .query = t->query,
			.opens = !!(p->flags & PACKET_OPENS),
		};

		p->flags |= PACKET_FRAGMENT;
		bpf_map_update_elem(&fragments, &fk, &first, BPF_ANY);
	}
	set_key(p);
	return 0;
}

static __always_inline int read_packet(struct __sk_buff *skb, struct packet *p, int v6)
{
	return !v6 && read_plain(skb, p) ? 0 : read_other(skb, p, v6, 1);
}

static __always_inline bool same_key(const struct conn_key *a, const struct conn_key *b)
{
	const volatile __u64 *x = (const void *)a, *y = (const void *)b;

	return !((x[0] ^ y[0]) | (x[1] ^ y[1]) | (x[2] ^ y[2]) | (x[3] ^ y[3]) | (x[4] ^ y[4]));
}

_Static_assert(sizeof(struct conn_key) == 40, "five words");

/* A flow's gates in one word. */
static __always_inline __u64 read_gates(const struct conn *c)
{
	return *(const volatile __u64 *)&c->gates;
}

/* What is in such a word. */
#define GATES_OPENER(g)		((__u8)(g))
#define GATES_PROVENANCE(g)	((__u8)((g) >> 8))
#define GATES_FLAGS(g)		((__u8)((g) >> 16))
#define GATES_JUDGED(g, end)	((__u8)((g) >> (32 + 8 * (end))))
#define GATES_ALLOWED(g, end)	((__u8)((g) >> (48 + 8 * (end))))

_Static_assert(offsetof(struct gates, provenance) == 1 && offsetof(struct gates, flags) == 2 &&
	       offsetof(struct gates, judged) == 4 && offsetof(struct gates, allowed) == 6 &&
	       __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "as the macros have it");

/* Reads the gates of a flow's entry; false if it has become another flow's
 * meanwhile. A value is written from its beginning on: who finds the key there
 * afterwards has read what belongs to it. */
static __always_inline bool gates_of(const struct conn *c, const struct conn_key *k, __u64 *g)
{
	*g = read_gates(c);
	return same_key(&c->key, k);
}

/* Whether the flow is over: the entry waits to be swept up. */
static __always_inline bool conn_over(const struct conn *c, __u64 now)
{
	return c->last_ns + c->timeout_s * NSEC_PER_SEC < now;
}

/* Whether the packet begins the flow anew: a connection that was closed is
 * opened again by a SYN. */
static __always_inline bool conn_again(const struct conn *c, const struct packet *p)
{
	return c->state == CONN_CLOSED && p->tuple.protocol == IPPROTO_TCP && (p->flags & PACKET_OPENS);
}

static __always_inline __u32 opening_timeout(__u8 protocol)
{
	switch (protocol) {
	case IPPROTO_TCP:
		return tcp_opening_timeout;
	case IPPROTO_UDP:
		return udp_timeout;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return icmp_timeout;
	}
	return other_timeout;
}

/* Idle times of one ENI's flows, in seconds; 0: those of every ENI. */
struct idle {
	__u32 tcp_established;
	__u32 udp;
	__u32 udp_stream;
	__u32 reserved;
};

/* By index of the ENI. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 32);	/* as enis */
	__type(key, __u32);
	__type(value, struct idle);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} eni_idle SEC(".maps");

/* How long a flow may be idle in its state: as the ENI has it of the pod that
 * began it, or of the one that it goes to. Asked where the state changes. */
__noinline __u32 idle_timeout(const struct conn *c, __u32 protocol)
{
	bool stream = c && c->state == CONN_ESTABLISHED;
	__u32 ifindex, set = 0, usual;
	struct iface *pod;
	struct idle *i;

	if (!c)
		return 0;
	ifindex = c->ifindex[c->gates.opener & 1];
	if (!ifindex)
		ifindex = c->ifindex[1 - (c->gates.opener & 1)];
	pod = bpf_map_lookup_elem(&ifaces, &ifindex);
	i = pod ? bpf_map_lookup_elem(&eni_idle, &pod->eni) : 0;
	if (protocol == IPPROTO_TCP) {
		set = i ? i->tcp_established : 0;
		usual = tcp_established_timeout;
	} else if (stream) {
		set = i ? i->udp_stream : 0;
		usual = udp_stream_timeout;
	} else {
		set = i ? i->udp : 0;
		usual = udp_timeout;
	}
	return set ? set : usual;
}

/* Follows the flow's state with a packet, and counts it if counts. */
static __always_inline void conn_see(struct conn *c, const struct packet *p, bool counts)
{
	__u32 end = p->end & 1;
	__u8 flags;

	if (counts) {
		__sync_fetch_and_add(&c->packets[end], p->packets);
		__sync_fetch_and_add(&c->bytes[end], p->bytes);
	}
	/* What is said about a flow does not keep it alive. */
	if (p->flags & PACKET_ERROR)
		return;
	if ((__s64)(p->now - c->last_ns) > 0)
		c->last_ns = p->now;
	if (!(c->seen & (CONN_SEEN << end)))
		c->seen |= CONN_SEEN << end;

	if (p->tuple.protocol == IPPROTO_TCP) {
		if (!(p->tcp_flags & ~c->tcp_flags[end]) && c->state != CONN_OPENING)
			return;
		flags = c->tcp_flags[end] | p->tcp_flags;
		c->tcp_flags[end] = flags;
		if ((flags & TCP_RST) || (c->tcp_flags[0] & c->tcp_flags[1] & TCP_FIN)) {
			c->state = CONN_CLOSED;
			c->timeout_s = tcp_closed_timeout;
		} else if (c->state == CONN_OPENING && end == c->gates.opener && (flags & TCP_ACK) &&
			   c->tcp_flags[1 - end]) {
			/* Answered, and the answer acknowledged. */
			c->state = CONN_ESTABLISHED;
			c->timeout_s = idle_timeout(c, IPPROTO_TCP);
		} else if (c->state == CONN_OPENING && (c->gates.flags & CONN_MIDFLOW) && c->tcp_flags[0] &&
			   c->tcp_flags[1]) {
			c->state = CONN_ESTABLISHED;
			c->timeout_s = idle_timeout(c, IPPROTO_TCP);
		}
		return;
	}
	if (p->tuple.protocol == IPPROTO_UDP && c->state == CONN_OPENING && c->packets[0] > 1 &&
	    c->packets[1] > 1) {
		/* More than one request and response (EC2 user guide). */
		c->state = CONN_ESTABLISHED;
		c->timeout_s = idle_timeout(c, IPPROTO_UDP);
	}
}

/* Where a packet is read, and an entry prepared: not on the stack, which is short.
 * Programs do not interrupt each other on a CPU. */
struct scratch {
	struct packet packet;
	struct conn conn;
	struct tuple asked;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratch SEC(".maps");

static __always_inline struct packet *packet_new(void)
{
	__u32 zero = 0;
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);

	return s ? &s->packet : 0;
}

/* A packet's tuple, to be changed and asked about. */
static __always_inline struct tuple *asked_of(const struct packet *p)
{
	__u32 zero = 0;
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);

	if (!s)
		return 0;
	s->asked = p->tuple;
	return &s->asked;
}

/* The entry that conn_new or conn_copy made last on this CPU. */
static __always_inline struct conn *conn_made(void)
{
	__u32 zero = 0;
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);

	return s ? &s->conn : 0;
}

/* A copy of an entry, to be judged; 0 if it has become another flow's meanwhile. */
static __always_inline struct conn *conn_copy(const struct conn *c, const struct packet *p)
{
	struct conn *made = conn_made();

	if (!made)
		return 0;
	*made = *c;
	return same_key(&c->key, &p->key) ? made : 0;
}

/*
 * Enters what the gates said of a copy into the entry, unless it has changed since
 * it had the gates `from`: what this packet may does not depend on it. What the
 * next comparison of verdicts goes by comes last.
 */
static __always_inline void conn_judged(struct conn *c, __u64 from, const struct conn *made)
{
	if (!same_key(&c->key, &made->key) ||
	    __sync_val_compare_and_swap((__u64 *)(void *)&c->gates, from, read_gates(made)) != from)
		return;
	__builtin_memcpy(c->audit, made->audit, sizeof(c->audit));
	__builtin_memcpy(c->verdict, made->verdict, sizeof(c->verdict));
	c->generation = made->generation;
}

/* An entry, not yet in the table, for a packet that begins a flow. */
static __always_inline struct conn *conn_new(const struct packet *p, __u8 provenance)
{
	__u32 zero = 0;
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);
	struct conn *c;

	if (!s)
		return 0;
	c = &s->conn;
	__builtin_memset(c, 0, sizeof(*c));
	c->key = p->key;
	c->created_ns = p->now;
	c->last_ns = p->now;
	c->gates.opener = p->end & 1;
	c->gates.provenance = provenance;
	c->state = CONN_OPENING;
	c->timeout_s = opening_timeout(p->tuple.protocol);
	if (!(p->flags & PACKET_OPENS))
		c->gates.flags = CONN_MIDFLOW;
	return c;
}
