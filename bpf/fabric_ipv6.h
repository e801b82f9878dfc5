/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * IPv6: the way of what an ENI's guest sends, beside that of IPv4 and apart from
 * it: addresses, routes and what gates keep have maps of their own. ENIs, MACs,
 * groups, counters and deliveries are the same. It is a program, not a
 * function: it has a stack of its own, and IPv4 does not pay for it.
 *
 * No gateway carries IPv6: what a route leads to one is dropped and counted.
 */

#define DELEGATED_BITS 80 /* of a delegated prefix */

/* An address or a delegated prefix of an ENI. */
struct address6 {
	__u32 vni;
	__u32 bits; /* 128, or DELEGATED_BITS: the rest of addr is 0 */
	__be32 addr[4];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct address6);
	__type(value, struct target);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} mappings6 SEC(".maps");

/* Not in map routes, where ::/0 would be the default of IPv4 too. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct route_key);
	__type(value, struct route);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} routes6 SEC(".maps");

static __noinline struct target *mapping6(__u32 vni, const __be32 *ip)
{
	struct address6 key = {.vni = vni, .bits = 128};
	struct target *t;

	copy6(key.addr, ip);
	t = bpf_map_lookup_elem(&mappings6, &key);
	if (t)
		return t;
	key.bits = DELEGATED_BITS;
	key.addr[2] &= bpf_htonl(0xffff0000);
	key.addr[3] = 0;
	return bpf_map_lookup_elem(&mappings6, &key);
}

static __noinline struct route *route_to6(__u64 table, const __be32 *ip)
{
	struct route_key key = {.prefixlen = 64 + 128, .table = {table, table >> 32}};

	__builtin_memcpy(key.addr, ip, 16);
	return bpf_map_lookup_elem(&routes6, &key);
}

/* ff00::/8 */
static __always_inline int multicast6(const __be32 *ip)
{
	return (ip[0] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000);
}

/* fe80::/10 */
static __always_inline int link_local6(const __be32 *ip)
{
	return (ip[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* fd00:ec2::/32, where AWS has the services that IPv4 has at 169.254.0.0/16. */
static __always_inline int service_block6(const __be32 *ip)
{
	return ip[0] == bpf_htonl(0xfd000ec2);
}

static __always_inline int unspecified6(const __be32 *ip)
{
	return !(ip[0] | ip[1] | ip[2] | ip[3]);
}

/* ::/96 without ::, and ::ffff:0:0/96: loopback and addresses of IPv4, which no wire carries. */
static __always_inline int not_of_wires6(const __be32 *ip)
{
	return !(ip[0] | ip[1]) &&
	       ((!ip[2] && ip[3]) || ip[2] == bpf_htonl(0x0000ffff));
}

static __always_inline int in_subnet6(const struct eni *self, const __be32 *ip)
{
	return within6(ip, self->subnet6, self->netmask6);
}

/*
 * set_link_local makes the link-local address that belongs to a MAC (modified
 * EUI-64; RFC 4291, appendix A). It is the only one that an ENI has; that AWS
 * takes no other is inference.
 */
static __always_inline void set_link_local(__be32 *ip, const __u8 *mac)
{
	ip[0] = bpf_htonl(0xfe800000);
	ip[1] = 0;
	ip[2] = bpf_htonl((__u32)(mac[0] ^ 2) << 24 | (__u32)mac[1] << 16 | (__u32)mac[2] << 8 |
			  0xff);
	ip[3] = bpf_htonl(0xfe000000 | (__u32)mac[3] << 16 | (__u32)mac[4] << 8 | mac[5]);
}

/* own_link_local says whether an address is the link-local one of a MAC. */
static __noinline int own_link_local(const __u8 *mac, const __be32 *ip)
{
	__be32 own[4];

	set_link_local(own, mac);
	return same6(own, ip);
}

/* read_header6 reads an IPv6 header that does not contradict the frame. */
static __always_inline int read_header6(struct __sk_buff *skb, struct ipv6hdr *ip)
{
	__u32 length;

	if (skb->len < ETH_HLEN + sizeof(*ip) ||
	    bpf_skb_load_bytes(skb, ETH_HLEN, ip, sizeof(*ip)) || ip->version != 6)
		return -1;
	length = bpf_ntohs(ip->payload_len);
	/* A GSO frame of 64 KiB and more has none. Jumbograms (RFC 2675) are no GSO. */
	if (!length && skb->gso_size)
		return 0;
	return length > skb->len - ETH_HLEN - sizeof(*ip) ? -1 : 0;
}

/* What a checksum begins with (RFC 8200, 8.1). */
struct pseudo6 {
	__be32 saddr[4];
	__be32 daddr[4];
	__be32 length;
	__be32 protocol;
};

#include "fabric_nd.h"

/* How many extension headers a packet may have. Linux's own bound for options is 8, too. */
#define EXTENSION_HEADERS 8

/* Where walk is in a packet's chain of headers. */
struct chain {
	__u32 at; /* of the header, in the frame */
	__u32 end; /* of the packet, in the frame */
	__u32 fragmentable; /* where the part begins that fragments carry */
	__u32 id; /* of the fragments' packet */
	__u16 start; /* of a later fragment, in bytes; 0: of the first */
	__u8 protocol; /* of the header at at */
	__u8 fragment; /* it is one of several */
	__u8 extended; /* there are extension headers */
};

/*
 * walk goes along extension headers to what is behind them, or to a later
 * fragment's data: 0, or why not. What leads elsewhere than to the header's
 * destination (a routing header that is not at its end), is out of order
 * (RFC 8200, 4.1: hop-by-hop options come first), fragments a fragment or never
 * ends is not understood, and so not let through. ESP and what is unknown are
 * protocols without ports.
 */
__noinline int walk(struct __sk_buff *skb, struct chain *c)
{
	__u8 header[8];
	__u32 length;
	int fragments = 0;

	if (!c)
		return DROP_MALFORMED;
	for (int i = 0; i <= EXTENSION_HEADERS; i++) {
		switch (c->protocol) {
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
		case IPPROTO_AH:
		case IPPROTO_FRAGMENT:
			break;
		default:
			return 0;
		}
		c->extended = 1;
		if (c->at > 0xffff || c->at + sizeof(header) > c->end ||
		    bpf_skb_load_bytes(skb, c->at, header, sizeof(header)))
			return DROP_MALFORMED;
		length = 8 + header[1] * 8;
		switch (c->protocol) {
		case IPPROTO_HOPOPTS:
			if (i)
				return DROP_EXTENSION;
			break;
		case IPPROTO_ROUTING:
			if (header[3]) /* segments left */
				return DROP_EXTENSION;
			break;
		case IPPROTO_AH:
			length = 8 + header[1] * 4; /* RFC 4302, 2.2 */
			break;
		case IPPROTO_FRAGMENT:
			if (fragments++)
				return DROP_EXTENSION;
			length = 8;
			c->start = ((__u16)header[2] << 8 | header[3]) & 0xfff8;
			c->fragment = c->start || (header[3] & 1);
			c->id = (__u32)header[4] << 24 | (__u32)header[5] << 16 |
				(__u32)header[6] << 8 | header[7];
			c->fragmentable = c->at + length;
			break;
		}
		c->protocol = header[0];
		c->at += length;
		if (c->at > c->end)
			return DROP_MALFORMED;
		if (c->start)
			return 0;
	}
	return DROP_EXTENSION;
}

/* set_query6 reads an ICMPv6 header that asks or answers: an echo alone does. */
static __always_inline void set_query6(struct tuple6 *t, const __u8 *icmp)
{
	if (icmp[0] != 128 && icmp[0] != 129)
		return;
	t->query = icmp[0] == 128 ? QUERY_REQUEST : QUERY_REPLY;
	t->sport = (__u16)icmp[4] << 8 | icmp[5];
	t->dport = 128;
}

/* set_about6 reads the packet that an ICMPv6 error at offset is about. */
static __noinline void set_about6(struct __sk_buff *skb, __u32 offset, __u32 end,
				  struct packet6 *p)
{
	struct chain c = {.at = offset + sizeof(struct ipv6hdr), .end = end};
	struct ipv6hdr inner;
	__u8 l4[8];

	if (c.at > end || bpf_skb_load_bytes(skb, offset, &inner, sizeof(inner)))
		return;
	/* The error goes to whoever sent the packet, or it is forged. */
	__builtin_memcpy(p->about.saddr, &inner.saddr, 16);
	if (inner.version != 6 || !same6(p->about.saddr, p->tuple.daddr))
		return;
	__builtin_memcpy(p->about.daddr, &inner.daddr, 16);
	c.protocol = inner.nexthdr;
	if (walk(skb, &c) || c.start || c.at > 0xffff || c.at + sizeof(l4) > end ||
	    bpf_skb_load_bytes(skb, c.at, l4, sizeof(l4)))
		return;
	p->about.protocol = c.protocol;
	if (c.protocol == IPPROTO_TCP || c.protocol == IPPROTO_UDP) {
		p->about.sport = (__u16)l4[0] << 8 | l4[1];
		p->about.dport = (__u16)l4[2] << 8 | l4[3];
	} else if (c.protocol == IPPROTO_ICMPV6) {
		set_query6(&p->about, l4);
		if (!p->about.query)
			return;
	}
	p->is_error = 1;
}

/*
 * parse6 reads what the gates need of a frame: 0, or the reason why the packet
 * cannot be judged. p has its addresses and is zero otherwise.
 */
__noinline int parse6(struct __sk_buff *skb, struct packet6 *p)
{
	struct chain c = {.at = ETH_HLEN + sizeof(struct ipv6hdr)};
	struct ipv6hdr ip;
	__u8 l4[14] = {};
	__u32 need = 0;
	int reason;

	if (!p || read_header6(skb, &ip))
		return DROP_MALFORMED;
	p->now = now_ns();
	c.protocol = ip.nexthdr;
	c.end = ip.payload_len || !skb->gso_size ? c.at + bpf_ntohs(ip.payload_len) : skb->len;
	reason = walk(skb, &c);
	if (reason)
		return reason;
	p->offset = c.at;
	p->id = c.id;
	if (c.start) {
		struct fragment_key6 key = {.ifindex = skb->ifindex, .id = c.id};
		struct fragment6 *first;

		copy6(key.saddr, p->tuple.saddr);
		copy6(key.daddr, p->tuple.daddr);
		first = bpf_map_lookup_elem(&fragments6, &key);
		/* It must not write over what has been judged (RFC 5722). */
		if (!first || first->expires <= p->now || c.start < first->headers)
			return DROP_FRAGMENT;
		p->tuple.protocol = first->protocol;
		p->tuple.sport = first->sport;
		p->tuple.dport = first->dport;
		p->tuple.query = first->query;
		return 0;
	}
	p->tuple.protocol = c.protocol;
	switch (c.protocol) {
	case IPPROTO_TCP:
		need = 14; /* up to the flags */
		break;
	case IPPROTO_UDP:
	case IPPROTO_ICMPV6:
		need = 8;
		break;
	}
	/* The first fragment has all headers (RFC 7112), or nobody could judge it. */
	if (c.at > 0xffff || c.at + need > c.end)
		return DROP_MALFORMED;
	if (c.fragment) {
		p->first_fragment = 1;
		p->headers = c.at + need - c.fragmentable;
	}
	if (c.protocol == IPPROTO_TCP) {
		if (bpf_skb_load_bytes(skb, c.at, l4, 14))
			return DROP_MALFORMED;
		p->tcp_flags = l4[13];
	} else if (need) {
		if (bpf_skb_load_bytes(skb, c.at, l4, 8))
			return DROP_MALFORMED;
	} else {
		return 0;
	}
	if (c.protocol != IPPROTO_ICMPV6) {
		p->tuple.sport = (__u16)l4[0] << 8 | l4[1];
		p->tuple.dport = (__u16)l4[2] << 8 | l4[3];
		return 0;
	}
	p->icmp_type = l4[0];
	p->icmp_code = l4[1];
	/* Neighbour discovery has no extension headers here (RFC 6980), and is not for other guests. */
	if (neighbour_discovery(l4[0]))
		return DROP_EXTENSION;
	set_query6(&p->tuple, l4);
	if (l4[0] < 128) /* an error (RFC 4443, 2.1) */
		set_about6(skb, c.at + 8, c.end, p);
	return 0;
}

/* remember_fragment6 lets the other fragments of a packet follow this one. */
static __noinline void remember_fragment6(__u32 ifindex, const struct packet6 *p)
{
	struct fragment_key6 key = {.ifindex = ifindex, .id = p->id};
	struct fragment6 value = {
		.expires = p->now + fragment_timeout * NSEC_PER_SEC,
		.sport = p->tuple.sport,
		.dport = p->tuple.dport,
		.headers = p->headers,
		.protocol = p->tuple.protocol,
		.query = p->tuple.query,
	};

	copy6(key.saddr, p->tuple.saddr);
	copy6(key.daddr, p->tuple.daddr);
	bpf_map_update_elem(&fragments6, &key, &value, BPF_ANY);
}

/* measure6 as measure, of a frame that parse6 has read. */
static __always_inline void measure6(struct __sk_buff *skb, const struct packet6 *p,
				     struct size *s)
{
	__u32 length = skb->len - ETH_HLEN, headers = p->offset - ETH_HLEN;
	__u32 gso_size = skb->gso_size;
	__u8 offset;

	s->packets = 1;
	s->bytes = length;
	s->longest = length;
	if (!gso_size)
		return;
	if (p->tuple.protocol == IPPROTO_TCP) {
		if (p->offset > 0xffff || bpf_skb_load_bytes(skb, p->offset + 12, &offset, 1))
			return;
		headers += (offset >> 4) * 4;
	} else if (p->tuple.protocol == IPPROTO_UDP) {
		headers += sizeof(struct udphdr);
	} else {
		s->packets = skb->gso_segs ?: 1;
		s->longest = 0;
		return;
	}
	s->longest = headers + gso_size;
	if (length > headers) {
		s->packets = (length - headers + gso_size - 1) / gso_size;
		s->bytes = length + (s->packets - 1) * headers;
	}
}

/* <linux/icmpv6.h> wants a C library. */
struct icmp6_too_big {
	__u8 type;
	__u8 code;
	__sum16 check;
	__be32 mtu;
};

/* How much of a packet the error quotes: as much as fits IPv6's least MTU (RFC 4443, 3.2). */
#define QUOTED6 (1280 - sizeof(struct ipv6hdr) - sizeof(struct icmp6_too_big))
#define CSUM_MOST 512 /* what bpf_csum_diff takes at once */

/*
 * refuse_length6 drops a packet of an ENI's guest that is longer than limit, and
 * answers with "packet too big" from the router of its subnet, as refuse_length
 * does. No router cuts IPv6.
 */
__noinline int refuse_length6(struct __sk_buff *skb, __u32 limit)
{
	struct pseudo6 pseudo = {.length = bpf_htonl(sizeof(struct icmp6_too_big) + QUOTED6),
				 .protocol = bpf_htonl(IPPROTO_ICMPV6)};
	__u32 ifindex = skb->ifindex, sum;
	struct icmp6_too_big *icmp;
	struct ipv6hdr ip, *head;
	struct eni *self;
	__u8 from[6];
	void *quoted;

	drop(ifindex, DROP_OVERSIZE);
	self = bpf_map_lookup_elem(&enis, &ifindex);
	if (!self || read_header6(skb, &ip))
		return TCX_DROP;
	/* No error about an ICMPv6 error (RFC 4443, 2.4), which extension headers do not hide. */
	if (ip.nexthdr != IPPROTO_TCP && ip.nexthdr != IPPROTO_UDP) {
		struct chain c = {.at = ETH_HLEN + sizeof(ip), .end = skb->len,
				  .protocol = ip.nexthdr};
		__u8 type;

		if (walk(skb, &c))
			return TCX_DROP;
		if (c.protocol == IPPROTO_ICMPV6 && !c.start &&
		    (c.at > 0xffff || bpf_skb_load_bytes(skb, c.at, &type, 1) || type < 128))
			return TCX_DROP;
	}
	copy6(pseudo.saddr, self->subnet6);
	pseudo.saddr[3] |= bpf_htonl(1);
	__builtin_memcpy(pseudo.daddr, &ip.saddr, 16);
	if (skb->len < ETH_HLEN + QUOTED6 || bpf_skb_change_tail(skb, ETH_HLEN + QUOTED6, 0) ||
	    checksum_done(skb, ETH_HLEN + sizeof(ip)) ||
	    bpf_skb_adjust_room(skb, sizeof(ip) + sizeof(*icmp), BPF_ADJ_ROOM_MAC, 0) ||
	    bpf_skb_pull_data(skb, ETH_HLEN + sizeof(ip) + sizeof(*icmp) + QUOTED6))
		return TCX_DROP;
	load_router_mac(from);
	if (address_frame(skb, self->mac, from))
		return TCX_DROP;
	head = (void *)(long)skb->data + ETH_HLEN;
	icmp = (void *)(head + 1);
	quoted = icmp + 1;
	if (quoted + QUOTED6 > (void *)(long)skb->data_end)
		return TCX_DROP;
	__builtin_memset(head, 0, sizeof(*head));
	head->version = 6;
	head->payload_len = bpf_htons(sizeof(*icmp) + QUOTED6);
	head->nexthdr = IPPROTO_ICMPV6;
	head->hop_limit = 64;
	__builtin_memcpy(&head->saddr, pseudo.saddr, 16);
	__builtin_memcpy(&head->daddr, pseudo.daddr, 16);
	icmp->type = 2; /* packet too big */
	icmp->code = 0;
	icmp->check = 0;
	icmp->mtu = bpf_htonl(limit);
	sum = bpf_csum_diff(0, 0, (__be32 *)&pseudo, sizeof(pseudo), 0);
	sum = bpf_csum_diff(0, 0, (__be32 *)icmp, sizeof(*icmp), sum);
	sum = bpf_csum_diff(0, 0, quoted, CSUM_MOST, sum);
	sum = bpf_csum_diff(0, 0, quoted + CSUM_MOST, CSUM_MOST, sum);
	sum = bpf_csum_diff(0, 0, quoted + 2 * CSUM_MOST, QUOTED6 - 2 * CSUM_MOST, sum);
	icmp->check = fold(sum);
	count_received(ifindex, 1, sizeof(ip) + sizeof(*icmp) + QUOTED6);
	count_exempt(ifindex, INGRESS, 1, sizeof(ip) + sizeof(*icmp) + QUOTED6);
	return hand_over(skb, ifindex);
}

/* resolve6 finds out where a packet of an ENI's guest goes: 0, or why nowhere. */
static __noinline enum drop_reason resolve6(const struct eni *self, const __u8 *dest,
						 const struct tuple6 *t, struct way *w)
{
	struct station station = {};
	struct target *holder;
	struct route *r;
	__u8 router[6];

	w->vni = self->vni;
	holder = mapping6(self->vni, t->daddr);
	w->named = holder ? holder->ifindex : 0;
	load_router_mac(router);
	if (same_mac(dest, router)) {
		__builtin_memcpy(w->source, router, 6);
		/* What is link-local ends at the router (RFC 4291, 2.5.6). */
		if (link_local6(t->daddr) || link_local6(t->saddr) || service_block6(t->daddr))
			return DROP_NO_ROUTE;
		r = route_to6(self->table, t->daddr);
		if (!r)
			return DROP_NO_ROUTE;
		w->kind = r->kind;
		if (in_subnet6(self, t->daddr))
			w->kind = ROUTE_LOCAL;
		if (w->kind == ROUTE_LOCAL) {
			if (!holder)
				return DROP_NO_TARGET;
			w->to = holder;
		} else if (w->kind == ROUTE_ENI) {
			w->to = &r->target;
		} else if (w->kind == ROUTE_PEER) {
			w->vni = r->vni;
			w->to = mapping6(r->vni, t->daddr);
			if (!w->to)
				return DROP_NO_TARGET;
			w->named = w->to->ifindex;
		} else if (w->kind == ROUTE_IGW) {
			return DROP_GATEWAY_IPV6;
		} else {
			return DROP_BLACKHOLE;
		}
	} else {
		station.vni = self->vni;
		station.subnet = self->subnet;
		__builtin_memcpy(station.mac, dest, 6);
		w->kind = ROUTE_LOCAL;
		w->to = bpf_map_lookup_elem(&stations, &station);
		if (!w->to)
			return DROP_UNKNOWN_MAC;
		__builtin_memcpy(w->source, self->mac, 6);
	}
	if (!(w->to->flags & ENI_IPV6))
		return DROP_IPV6;
	w->held = w->named == w->to->ifindex || own_link_local(w->to->mac, t->daddr);
	return 0;
}

/* may_leave6 as may_leave. */
static __always_inline enum drop_reason may_leave6(struct packet6 *p, __u32 ifindex,
						   const struct eni *self, const struct way *w,
						   int crosses)
{
	__u32 named = egress_groups_by_address || w->held ? w->named : 0;
	enum drop_reason reason = gate6(p, ifindex, EGRESS, named);

	if (!reason && crosses && !acl_allows6(p, self->vni, self->subnet, EGRESS))
		reason = DROP_ACL_EGRESS;
	log_packet6(p, ifindex, EGRESS, reason, path_of(w));
	return reason;
}

/* may_enter6 as may_enter. */
static __always_inline enum drop_reason may_enter6(struct packet6 *p, __u32 sender,
						   const struct way *w, int crosses)
{
	enum drop_reason reason;

	if (crosses && !acl_allows6(p, w->vni, w->to->subnet, INGRESS))
		reason = DROP_ACL_INGRESS;
	else if (!w->held && (w->to->flags & ENI_SOURCE_DEST_CHECK))
		return DROP_DEST_ADDRESS;
	else
		reason = gate6(p, w->to->ifindex, INGRESS, sender);
	log_packet6(p, w->to->ifindex, INGRESS, reason, PATH_NONE);
	return reason;
}

/* read_addresses6 reads a packet's addresses, and what is behind its header. */
static __noinline int read_addresses6(struct __sk_buff *skb, struct tuple6 *t)
{
	struct ipv6hdr ip;

	if (read_header6(skb, &ip))
		return -1;
	__builtin_memcpy(t->saddr, &ip.saddr, 16);
	__builtin_memcpy(t->daddr, &ip.daddr, 16);
	return ip.nexthdr;
}

/* from_guest_ipv6 is called by from_guest alone, on a frame of the ENI's own MAC. */
SEC("tcx/ingress")
int from_guest_ipv6(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct packet6 packet = {};
	enum drop_reason reason;
	struct target *owner;
	struct way way = {};
	struct size size;
	struct eni *self;
	__u8 dest[6], type;
	int crosses, next;

	self = bpf_map_lookup_elem(&enis, &ifindex);
	if (!self)
		return drop(0, DROP_NO_INTERFACE);
	if (!(self->flags & ENI_IPV6))
		return drop(ifindex, DROP_IPV6);
	next = read_addresses6(skb, &packet.tuple);
	if (next < 0 || bpf_skb_load_bytes(skb, 0, dest, sizeof(dest)))
		return drop(ifindex, DROP_MALFORMED);
	if (next == IPPROTO_ICMPV6) {
		if (bpf_skb_load_bytes(skb, ETH_HLEN + sizeof(struct ipv6hdr), &type, 1))
			return drop(ifindex, DROP_MALFORMED);
		if (neighbour_discovery(type))
			return from_guest_nd(skb);
	}
	if ((dest[0] & 1) || multicast6(packet.tuple.daddr))
		return drop(ifindex, DROP_MULTICAST);
	if (multicast6(packet.tuple.saddr) || not_of_wires6(packet.tuple.saddr) ||
	    not_of_wires6(packet.tuple.daddr) || unspecified6(packet.tuple.daddr))
		return drop(ifindex, DROP_MALFORMED);

	owner = mapping6(self->vni, packet.tuple.saddr);
	if (owner && owner->ifindex != ifindex)
		owner = 0;
	if (!owner && (unspecified6(packet.tuple.saddr) ||
		       ((self->flags & ENI_SOURCE_DEST_CHECK) &&
			!own_link_local(self->mac, packet.tuple.saddr))))
		return drop(ifindex, DROP_SOURCE_ADDRESS);

	reason = resolve6(self, dest, &packet.tuple, &way);
	if (reason)
		return drop(ifindex, reason);
	if (!way.to) /* never; in a form that the verifier follows */
		return drop(ifindex, DROP_NO_TARGET);
	reason = parse6(skb, &packet);
	if (reason)
		return drop(ifindex, reason);
	measure6(skb, &packet, &size);
	packet.packets = size.packets;
	packet.bytes = size.bytes;

	crosses = way.to->subnet != self->subnet || way.vni != self->vni;
	reason = may_leave6(&packet, ifindex, self, &way, crosses);
	if (reason)
		return drop(ifindex, reason);
	count_sent(ifindex, &size);
	if (size.longest > way.to->mtu)
		return refuse_length6(skb, way.to->mtu);
	reason = may_enter6(&packet, owner ? ifindex : 0, &way, crosses);
	if (reason)
		return drop(way.to->ifindex, reason);
	if (packet.first_fragment)
		remember_fragment6(ifindex, &packet);
	return deliver(skb, way.to, way.source, &size);
}
