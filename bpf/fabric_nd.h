/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Neighbour discovery (RFC 4861), which the fabric answers as it answers ARP:
 * for the router, and for addresses that other ENIs of the subnet hold. No
 * message of it reaches another guest, and no group, ACL, flow record or counter
 * but those of drops sees it. So a duplicate address probe (RFC 4862) is answered
 * if another ENI has the address, and by silence otherwise.
 */

#define ROUTER_SOLICITATION 133
#define ROUTER_ADVERTISEMENT 134
#define NEIGHBOUR_SOLICITATION 135
#define NEIGHBOUR_ADVERTISEMENT 136
#define REDIRECT 137

#define VPC_MTU 9001 /* IP length, which a router advertisement tells */

static __always_inline int neighbour_discovery(__u8 type)
{
	return type >= ROUTER_SOLICITATION && type <= REDIRECT;
}

/* The fabric's two messages have the same length. */
struct nd_message {
	__u8 type;
	__u8 code;
	__sum16 check;
	__be32 body[7];
};

/* set_lladdr writes an option: 1, the sender's MAC; 2, the target's. */
static __always_inline void set_lladdr(__be32 *option, __u8 kind, const __u8 *mac)
{
	option[0] = bpf_htonl((__u32)kind << 24 | 1 << 16 | (__u32)mac[0] << 8 | mac[1]);
	option[1] = bpf_htonl((__u32)mac[2] << 24 | (__u32)mac[3] << 16 | (__u32)mac[4] << 8 |
			      mac[5]);
}

/* fe80:ec2::1, every subnet's router */
static __always_inline void set_router6(__be32 *ip)
{
	ip[0] = bpf_htonl(0xfe800ec2);
	ip[1] = 0;
	ip[2] = 0;
	ip[3] = bpf_htonl(1);
}

static __always_inline int is_router6(const struct eni *self, const __be32 *ip)
{
	__be32 router[4], first[4];

	set_router6(router);
	copy6(first, self->subnet6);
	first[3] |= bpf_htonl(1);
	return same6(ip, router) || same6(ip, first);
}

/*
 * neighbour finds the MAC of another ENI of the subnet that has an address: one
 * that it holds, or the link-local one of its MAC.
 */
static __always_inline int neighbour(const struct eni *self, __u32 ifindex, const __be32 *ip,
				     __u8 *mac)
{
	struct station station = {.vni = self->vni, .subnet = self->subnet};
	struct target *owner;

	if (link_local6(ip)) {
		__u32 high = bpf_ntohl(ip[2]), low = bpf_ntohl(ip[3]);

		station.mac[0] = (high >> 24) ^ 2;
		station.mac[1] = high >> 16;
		station.mac[2] = high >> 8;
		station.mac[3] = low >> 16;
		station.mac[4] = low >> 8;
		station.mac[5] = low;
		if (!own_link_local(station.mac, ip))
			return -1;
		owner = bpf_map_lookup_elem(&stations, &station);
	} else {
		if (!in_subnet6(self, ip))
			return -1;
		owner = mapping6(self->vni, ip);
	}
	/* Its own address: it asks whether somebody else has it. */
	if (!owner || owner->ifindex == ifindex || !(owner->flags & ENI_IPV6))
		return -1;
	__builtin_memcpy(mac, owner->mac, 6);
	return 0;
}

/* answer_nd makes a frame the answer to itself. ip has its source as the destination. */
static __always_inline int answer_nd(struct __sk_buff *skb, const struct eni *self,
				     struct ipv6hdr *ip, struct nd_message *m, const __u8 *from)
{
	struct pseudo6 pseudo = {.length = bpf_htonl(sizeof(*m)),
				 .protocol = bpf_htonl(IPPROTO_ICMPV6)};
	__u32 ifindex = skb->ifindex, sum;

	ip->payload_len = bpf_htons(sizeof(*m));
	__builtin_memcpy(pseudo.saddr, &ip->saddr, 16);
	__builtin_memcpy(pseudo.daddr, &ip->daddr, 16);
	sum = bpf_csum_diff(0, 0, (__be32 *)&pseudo, sizeof(pseudo), 0);
	sum = bpf_csum_diff(0, 0, (__be32 *)m, sizeof(*m), sum);
	m->check = fold(sum);
	if (bpf_skb_change_tail(skb, ETH_HLEN + sizeof(*ip) + sizeof(*m), 0) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN, ip, sizeof(*ip), 0) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN + sizeof(*ip), m, sizeof(*m), 0) ||
	    address_frame(skb, self->mac, from))
		return drop(ifindex, DROP_MALFORMED);
	return hand_over(skb, ifindex);
}

/*
 * from_guest_nd answers a message of neighbour discovery. A router solicitation
 * is answered with an advertisement of the router alone: without a prefix, so
 * that a guest sends everything to the router, and with the flag that addresses
 * are told by DHCPv6, as AWS does (that it sends no prefix is a choice).
 */
__noinline int from_guest_nd(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex, flags = 0x20000000; /* override */
	__be32 source[4], target[4];
	struct nd_message m = {};
	struct ipv6hdr ip;
	struct target *owner;
	struct eni *self;
	__u8 mac[6];
	__u32 length;

	self = bpf_map_lookup_elem(&enis, &ifindex);
	if (!self || read_header6(skb, &ip) ||
	    bpf_skb_load_bytes(skb, ETH_HLEN + sizeof(ip), &m, 4))
		return drop(ifindex, DROP_MALFORMED);
	length = bpf_ntohs(ip.payload_len);
	/* Nobody beyond the link has sent it (RFC 4861, 6.1.1 and 7.1.1). */
	if (ip.hop_limit != 255 || m.code || length < 8)
		return drop(ifindex, DROP_MALFORMED);
	__builtin_memcpy(source, &ip.saddr, 16);
	if (multicast6(source))
		return drop(ifindex, DROP_MALFORMED);
	if (!unspecified6(source) && (self->flags & ENI_SOURCE_DEST_CHECK) &&
	    !own_link_local(self->mac, source)) {
		owner = mapping6(self->vni, source);
		if (!owner || owner->ifindex != ifindex)
			return drop(ifindex, DROP_ND_SPOOFED);
	}
	if (m.type == ROUTER_SOLICITATION) {
		load_router_mac(mac);
		m.type = ROUTER_ADVERTISEMENT;
		m.body[0] = bpf_htonl(64 << 24 | 0x80 << 16 | 1800); /* hop limit, managed, s */
		set_lladdr(&m.body[3], 1, mac);
		m.body[5] = bpf_htonl(5 << 24 | 1 << 16);
		m.body[6] = bpf_htonl(VPC_MTU);
		set_router6(target);
	} else if (m.type == NEIGHBOUR_SOLICITATION) {
		if (length < 24 ||
		    bpf_skb_load_bytes(skb, ETH_HLEN + sizeof(ip) + 8, target, sizeof(target)) ||
		    multicast6(target))
			return drop(ifindex, DROP_MALFORMED);
		if (is_router6(self, target)) {
			load_router_mac(mac);
			flags |= 0x80000000; /* router */
		} else if (neighbour(self, ifindex, target, mac)) {
			return drop(ifindex, DROP_ND_UNANSWERED);
		}
		if (!unspecified6(source))
			flags |= 0x40000000; /* solicited */
		m.type = NEIGHBOUR_ADVERTISEMENT;
		m.body[0] = bpf_htonl(flags);
		copy6(&m.body[1], target);
		set_lladdr(&m.body[5], 2, mac);
	} else {
		return drop(ifindex, DROP_ND_UNANSWERED);
	}
	m.check = 0;
	__builtin_memcpy(&ip.saddr, target, 16);
	if (unspecified6(source)) { /* to ff02::1, all nodes */
		source[0] = bpf_htonl(0xff020000);
		source[3] = bpf_htonl(1);
	}
	__builtin_memcpy(&ip.daddr, source, 16);
	return answer_nd(skb, self, &ip, &m, mac);
}
