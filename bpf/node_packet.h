/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What conntrack and policy need of a packet, read from its headers: whole IPv4 with
 * TCP or UDP where it lies, all else, fragments and ICMP errors among it, piece by
 * piece.
 *
 * Whoever includes this defines struct addr, the reasons to drop and NSEC_PER_SEC
 * beforehand. Needs node_tuple.h.
 */

#define MAX_FRAGMENTS	16384

/* A flow's key has no direction: both ends are in it, in an order of their own. */
struct conn_key {
	struct addr addr[2];	/* by end */
	__u16 port[2];		/* host order; ICMP query: identifier, request's type; other ICMP: type, code */
	__u8 protocol;
	__u8 asker;		/* ICMP query: the end that asks, plus 1 */
	__u8 pad[2];
} __attribute__((aligned(8)));

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

/* Linux' own (net.ipv4.ipfrag_time). */
const volatile __u32 fragment_timeout = 30;

#define TCP_FIN	0x01
#define TCP_SYN	0x02
#define TCP_RST	0x04
#define TCP_ACK	0x10

#define IP_MORE_FRAGMENTS	0x2000
#define IP_OFFSET		0x1fff

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
	__u64 now;		/* CLOCK_MONOTONIC, precise to a tick; not read from the packet */
	__u32 packets;		/* as on the wire */
	__u32 bytes;
	__u32 longest;		/* of those packets, its IP length; of plain ones alone (read_plain) */
	__u32 id;		/* of the datagram that a fragment is of */
	__u8 end;		/* that sent it: index into the key */
	__u8 flags;		/* enum packet_flag */
	__u8 tcp_flags;
	__u8 ttl;
};

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

/* Sets tuple and key of a TCP or UDP packet between v4 addresses: as set_key would, by
 * half as many steps. */
static __always_inline void set_plain(struct packet *p, __be32 saddr, __be32 daddr, __u64 sport, __u64 dport,
				      __u64 protocol)
{
	word *tuple = (void *)&p->tuple, *key = (void *)&p->key;
	__u64 src = mapped_v4(saddr), dst = mapped_v4(daddr);
	bool end = src != dst ? src > dst : sport > dport;

	_Static_assert(offsetof(struct tuple, sport) == 32 && offsetof(struct tuple, protocol) == 36 &&
		       sizeof(p->tuple) == 40, "little-endian words");
	tuple[0] = 0;
	tuple[1] = src;
	tuple[2] = 0;
	tuple[3] = dst;
	tuple[4] = sport | dport << 16 | protocol << 32;
	p->end = end;
	key[0] = 0;
	key[1] = end ? dst : src;
	key[2] = 0;
	key[3] = end ? src : dst;
	/* set_rest, with one choice and not two. */
	key[4] = (end ? dport | sport << 16 : sport | dport << 16) | protocol << 32;
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
	set_plain(p, ip->saddr, ip->daddr, bpf_ntohs(*(__be16 *)(void *)l4), bpf_ntohs(*(__be16 *)(void *)(l4 + 2)),
		  ip->protocol);
	p->id = 0;
	p->ttl = ip->ttl;
	p->packets = 1;
	have = skb->len - ETH_HLEN;
	p->bytes = have;
	p->longest = have;
	if (skb->gso_size) {
		p->longest = sizeof(*ip) + header + skb->gso_size;
		segments = skb->gso_segs;
		if (segments > 1) {
			p->packets = segments;
			p->bytes += (segments - 1) * (sizeof(*ip) + header);
		}
	} else if (bpf_ntohs(ip->tot_len) > have) {
		p->flags |= PACKET_SHORT;
	}
	return true;
}

static __always_inline struct fragment_key fragment_of(struct __sk_buff *skb, const struct network *n)
{
	return (struct fragment_key){
		.src = n->src, .dst = n->dst, .id = n->id, .ifindex = skb->ifindex, .protocol = n->protocol,
	};
}

/* Reads what the first fragment of the packet's datagram told; 0, or the reason to drop it. */
static __noinline int read_later(struct __sk_buff *skb, struct packet *p, const struct network *n)
{
	struct fragment_key fk ADDR_ALIGNED = fragment_of(skb, n);
	struct fragment *first = bpf_map_lookup_elem(&fragments, &fk);
	struct tuple *t = &p->tuple;

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
	return 0;
}

/* Keeps what a datagram's first fragment tells of it, for those that come later. */
static __noinline int keep_first(struct __sk_buff *skb, struct packet *p, const struct network *n)
{
	const struct tuple *t = &p->tuple;
	struct fragment_key fk ADDR_ALIGNED = fragment_of(skb, n);
	struct fragment first = {
		.expires_ns = p->now + fragment_timeout * NSEC_PER_SEC,
		.sport = t->sport, .dport = t->dport,
		.icmp_type = t->icmp_type, .icmp_code = t->icmp_code, .query = t->query,
		.opens = !!(p->flags & PACKET_OPENS),
	};

	p->flags |= PACKET_FRAGMENT;
	bpf_map_update_elem(&fragments, &fk, &first, BPF_ANY);
	return 0;
}

/*
 * Reads what conntrack and policy need of a packet whose Ethernet frame carries
 * IPv4, or IPv6 if v6. It returns 0, or the reason to drop it. With errors, the
 * tuple of an ICMP error becomes that of the flow.
 */
__noinline __cold int read_other(struct __sk_buff *skb, struct packet *p, int v6, int errors)
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
		bad = read_later(skb, p, &n);
		if (!bad)
			set_key(p);
		return bad;
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
	if (n.fragment == 1)
		keep_first(skb, p, &n);
	set_key(p);
	return 0;
}

/* Reads a packet by whichever of the two can: not in line, for programs with little
 * stack to spare. */
__noinline int read_packet(struct __sk_buff *skb, struct packet *p, int v6)
{
	if (!p)
		return DROP_MALFORMED;
	return !v6 && read_plain(skb, p) ? 0 : read_other(skb, p, v6, 1);
}
