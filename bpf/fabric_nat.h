/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The internet gateway: one public address for one private one, in both
 * directions. It stands outside of groups and ACLs, which see private addresses
 * on the VPC's side, and keeps no state.
 */

/* RFC 1918 and RFC 6598, which no internet gateway carries. */
static __always_inline int private_address(__be32 ip)
{
	return (ip & bpf_htonl(0xff000000)) == bpf_htonl(0x0a000000) ||
	       (ip & bpf_htonl(0xfff00000)) == bpf_htonl(0xac100000) ||
	       (ip & bpf_htonl(0xffff0000)) == bpf_htonl(0xc0a80000) ||
	       (ip & bpf_htonl(0xffc00000)) == bpf_htonl(0x64400000);
}

/* Where an IPv4 header has its addresses. */
#define SADDR 12
#define DADDR 16

/*
 * replace_address exchanges the address at offset at of the IPv4 header that
 * stands at offset ip of the frame; protocol's checksum, if it covers addresses,
 * stands behind it at l4 (0: it is in another fragment).
 */
static __always_inline int replace_address(struct __sk_buff *skb, __u32 ip, __u32 at, __u32 l4,
					   __u8 protocol, __be32 from, __be32 to)
{
	if (l4 && protocol == IPPROTO_TCP &&
	    bpf_l4_csum_replace(skb, l4 + 16, from, to, BPF_F_PSEUDO_HDR | 4))
		return -1;
	/* A checksum of 0 is none. */
	if (l4 && protocol == IPPROTO_UDP &&
	    bpf_l4_csum_replace(skb, l4 + 6, from, to,
				BPF_F_PSEUDO_HDR | BPF_F_MARK_MANGLED_0 | 4))
		return -1;
	if (bpf_l3_csum_replace(skb, ip + 10, from, to, 4) ||
	    bpf_skb_store_bytes(skb, ip + at, &to, 4, 0))
		return -1;
	return 0;
}

/*
 * replace_quoted does the same in the packet that an ICMP error, whose header
 * stands at l4, is about (RFC 5508, 4.2). The error's own checksum does not
 * change by it: the quoted header's makes up for the address. It does by the
 * checksum of what that header carries, if so much is quoted.
 */
static __always_inline int replace_quoted(struct __sk_buff *skb, __u32 l4, __u32 at, __be32 from,
					  __be32 to)
{
	__u32 ip = l4 + 8, check;
	struct iphdr quoted;
	__be16 old, new;
	__be32 have;

	if (bpf_skb_load_bytes(skb, ip, &quoted, sizeof(quoted)) || quoted.version != 4 ||
	    quoted.ihl < 5)
		return 0;
	have = at == SADDR ? quoted.saddr : quoted.daddr;
	if (have != from)
		return 0;
	check = ip + quoted.ihl * 4 + (quoted.protocol == IPPROTO_TCP ? 16 : 6);
	if ((quoted.protocol == IPPROTO_TCP || quoted.protocol == IPPROTO_UDP) &&
	    !(quoted.frag_off & bpf_htons(IP_OFFSET)) &&
	    !bpf_skb_load_bytes(skb, check, &old, sizeof(old)) &&
	    (old || quoted.protocol == IPPROTO_TCP)) {
		if (bpf_l4_csum_replace(skb, check, from, to, 4) ||
		    bpf_skb_load_bytes(skb, check, &new, sizeof(new)) ||
		    bpf_l4_csum_replace(skb, l4 + 2, old, new, 2))
			return -1;
	}
	return bpf_l3_csum_replace(skb, ip + 10, from, to, 4) ||
	       bpf_skb_store_bytes(skb, ip + at, &to, 4, 0);
}

/* translate puts to in the place of from, the frame's source or destination (at). */
__noinline int translate(struct __sk_buff *skb, __u32 at, __be32 from, __be32 to)
{
	struct iphdr *iph = (void *)(long)skb->data + ETH_HLEN;
	__u32 l4 = 0, behind;
	__u8 protocol, type;

	if ((void *)(iph + 1) > (void *)(long)skb->data_end)
		return -1;
	behind = ETH_HLEN + iph->ihl * 4;
	protocol = iph->protocol;
	if (!(iph->frag_off & bpf_htons(IP_OFFSET)))
		l4 = behind;
	if (replace_address(skb, ETH_HLEN, at, l4, protocol, from, to))
		return -1;
	if (!l4 || protocol != IPPROTO_ICMP)
		return 0;
	if (bpf_skb_load_bytes(skb, l4, &type, 1))
		return -1;
	/* As in parse; the packet went the other way. */
	if (type == 3 || type == 4 || type == 5 || type == 11 || type == 12)
		return replace_quoted(skb, l4, at == SADDR ? DADDR : SADDR, from, to);
	return 0;
}

/*
 * The two ways through a gateway, and that of IPv6, are programs, not functions:
 * they have a stack of their own. The array is pinned, or it would lose them with vpcd.
 */
enum gateway_program {
	TO_INTERNET,
	FROM_INTERNET,
	FROM_GUEST_IPV6,
	GATEWAY_PROGRAMS, /* how many there are */
};

volatile const enum gateway_program gateway_programs = GATEWAY_PROGRAMS; /* shows the type to bpf2go */

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, GATEWAY_PROGRAMS);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} gateways SEC(".maps");

/*
 * from_internet takes a frame for a public address to the ENI that has the
 * private one, or where the gateway's route table says. It comes from the
 * internet's namespace, or from an instance that knows another by its public
 * address: to who receives it that is the same, the sender is a stranger.
 */
SEC("tcx/ingress")
int from_internet(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct packet packet = {};
	enum drop_reason reason;
	struct target *holder;
	struct way way = {};
	__be32 to, private;
	struct public *public;
	struct iphdr *iph;
	struct route *r;
	struct size size;

	/* The internet's end asks for nobody (NOARP), and its MACs mean nothing. */
	if (skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present)
		return drop(0, DROP_ETHERTYPE);
	iph = ipv4_header(skb);
	if (!iph)
		return drop(0, DROP_MALFORMED);
	if (private_address(iph->saddr))
		return drop(0, DROP_IGW_PRIVATE);
	to = iph->daddr;
	public = bpf_map_lookup_elem(&publics, &to);
	if (!public)
		return drop(0, DROP_NO_PUBLIC);
	private = public->private;
	way.vni = public->vni;
	way.kind = ROUTE_LOCAL;
	load_router_mac(way.source);
	holder = mapping(way.vni, private);
	way.to = holder;
	if (public->table) {
		r = route_to(public->table, private);
		if (!r)
			return drop(0, DROP_NO_ROUTE);
		way.kind = r->kind;
		if (r->kind == ROUTE_ENI)
			way.to = &r->target;
		else if (r->kind != ROUTE_LOCAL)
			return drop(0, DROP_BLACKHOLE);
	}
	if (!way.to)
		return drop(0, DROP_NO_TARGET);
	way.held = holder && holder->ifindex == way.to->ifindex;

	if (translate(skb, DADDR, to, private))
		return drop(0, DROP_MALFORMED);
	iph = ipv4_header(skb);
	if (!iph)
		return drop(0, DROP_MALFORMED);
	measure(skb, iph, &size);
	reason = parse(skb, &packet);
	if (reason)
		return drop(way.to->ifindex, reason);
	packet.packets = size.packets;
	packet.bytes = size.bytes;
	packet.always_tracked = !!(way.to->flags & ENI_UNGATED);
	if (size.longest > internet_mtu)
		count_cut(&packet, internet_mtu);
	reason = may_enter(&packet, 0, &way, 1);
	if (reason)
		return drop(way.to->ifindex, reason);
	if (packet.first_fragment)
		remember_fragment(ifindex, &packet);
	/* An instance's; to_internet has told those whom it must. */
	if (size.longest > internet_mtu)
		return deliver_cut(skb, way.to, way.source, internet_mtu);
	return deliver(skb, way.to, way.source, &size);
}

/*
 * to_internet takes a frame that the route table of its sender's subnet leads to
 * the internet gateway, and that may leave, to the internet, or back to whoever
 * has the public address that it is for. It is called by from_guest alone.
 */
SEC("tcx/ingress")
int to_internet(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex, zero = 0;
	struct target *there;
	struct address key;
	__be32 from, to, *public;
	struct iphdr *iph;
	struct eni *self;
	struct size size;
	__u8 router[6];

	self = bpf_map_lookup_elem(&enis, &ifindex);
	iph = ipv4_header(skb);
	if (!self || !iph)
		return drop(ifindex, DROP_MALFORMED);
	if (private_address(iph->daddr))
		return drop(ifindex, DROP_IGW_PRIVATE);
	from = iph->saddr;
	to = iph->daddr;
	set_address(&key, self->vni, from);
	public = bpf_map_lookup_elem(&elastics, &key);
	if (!public)
		return drop(ifindex, DROP_IGW_SOURCE);
	measure(skb, iph, &size);
	if (size.longest > internet_mtu && must_tell(skb))
		return refuse_length(skb, internet_mtu);
	if (translate(skb, SADDR, from, *public))
		return drop(ifindex, DROP_MALFORMED);
	/* To another's public address: through the gateway and back. */
	if (bpf_map_lookup_elem(&publics, &to)) {
		bpf_tail_call(skb, &gateways, FROM_INTERNET);
		return drop(ifindex, DROP_BLACKHOLE);
	}
	there = bpf_map_lookup_elem(&internet, &zero);
	if (!there || !there->ifindex)
		return drop(ifindex, DROP_BLACKHOLE);
	load_router_mac(router);
	if (size.longest > internet_mtu)
		return deliver_cut(skb, there, router, internet_mtu);
	return deliver(skb, there, router, &size);
}
