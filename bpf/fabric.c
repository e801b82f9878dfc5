/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The VPC's wires. Each ENI is a veth pair: one end in its guest's network
 * namespace, the other in the fabric's. from_guest runs on what the guest
 * sends (TCX ingress of the fabric end), to_guest on what the fabric's own
 * stack answers (TCX egress of the fabric end): the service addresses. One more
 * pair leads to the internet's namespace; from_internet and cut_for_internet run on it.
 *
 * Every frame that is not delivered is dropped under a reason and counted. The
 * fabric's routing tables and neighbours have no part in delivery.
 *
 * Addresses are keys of 16 bytes, IPv4 mapped (::ffff:a.b.c.d); what a key
 * means depends on its VNI, the number of the VPC. IPv6 (fabric_ipv6.h) has maps
 * and a program of its own.
 */
#include <stddef.h>

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

char __license[] SEC("license") = "Dual BSD/GPL";

#include "fabric_state.h"

/* enum tcx_action_base of Linux 6.6, newer than some distributions' headers. */
#define TCX_PASS 0
#define TCX_DROP 2

static __always_inline int drop(__u32 ifindex, enum drop_reason reason)
{
	struct counters *c = bpf_map_lookup_elem(&counts, &ifindex);
	__u64 i = (__u32)reason;

	asm volatile("" : "+r"(i)); /* one register for the check and the access */
	if (c && i < DROP_REASONS)
		c->drops[i]++; /* per CPU, and programs do not nest on one */
	return TCX_DROP;
}

#include "fabric_allowance.h"
#include "fabric_gate.h"
#include "fabric_acl.h"
#include "fabric_log.h"
#include "fabric_ipv6_gate.h"

static __always_inline void set_address(struct address *a, __u32 vni, __be32 ip)
{
	__builtin_memset(a, 0, sizeof(*a));
	a->vni = vni;
	a->addr[10] = 0xff;
	a->addr[11] = 0xff;
	__builtin_memcpy(&a->addr[12], &ip, 4);
}

static __always_inline struct target *mapping(__u32 vni, __be32 ip)
{
	struct address key;

	set_address(&key, vni, ip);
	return bpf_map_lookup_elem(&mappings, &key);
}

static __always_inline struct route *route_to(__u64 table, __be32 ip)
{
	struct route_key key = {.prefixlen = 64 + 128, .table = {table, table >> 32}};

	key.addr[10] = 0xff;
	key.addr[11] = 0xff;
	__builtin_memcpy(&key.addr[12], &ip, 4);
	return bpf_map_lookup_elem(&routes, &key);
}

static __always_inline int same_mac(const __u8 *a, const __u8 *b)
{
	__u8 differ = 0;

#pragma unroll
	for (int i = 0; i < 6; i++)
		differ |= a[i] ^ b[i];
	return !differ;
}

static __always_inline void load_router_mac(__u8 *mac)
{
#pragma unroll
	for (int i = 0; i < 6; i++)
		mac[i] = router_mac[i];
}

/* 169.254.0.0/16 */
static __always_inline int link_local(__be32 ip)
{
	return (ip & bpf_htonl(0xffff0000)) == bpf_htonl(0xa9fe0000);
}

/* What a frame is on the wire: its packets, their IP bytes, the longest one. */
struct size {
	__u32 packets;
	__u32 bytes;
	__u32 longest;
};

/*
 * measure fills s; iph is the frame's IPv4 header. Only GSO frames of TCP and
 * UDP are cut by size here; others (SCTP, tunnels) count as cut by the stack
 * (gso_segs) without the headers that repeat.
 */
static __always_inline void measure(struct __sk_buff *skb, const struct iphdr *iph, struct size *s)
{
	__u32 length = skb->len - ETH_HLEN;
	__u32 headers = iph->ihl * 4;
	__u32 gso_size = skb->gso_size;
	__u8 offset;

	s->packets = 1;
	s->bytes = length;
	s->longest = length;
	if (!gso_size)
		return;
	if (iph->protocol == IPPROTO_TCP) {
		/* Byte 12 of the TCP header: data offset in its upper half. */
		if (bpf_skb_load_bytes(skb, ETH_HLEN + headers + 12, &offset, 1))
			return;
		headers += (offset >> 4) * 4;
	} else if (iph->protocol == IPPROTO_UDP) {
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

#include "fabric_service.h"

static __always_inline void count_received(__u32 ifindex, __u64 packets, __u64 bytes)
{
	struct counters *c = bpf_map_lookup_elem(&counts, &ifindex);

	if (c) {
		c->rx_packets += packets;
		c->rx_bytes += bytes;
	}
}

/* address_frame writes a frame's Ethernet addresses. */
static __always_inline int address_frame(struct __sk_buff *skb, const __u8 *to, const __u8 *source)
{
	struct ethhdr *eth = (void *)(long)skb->data;

	if ((void *)(eth + 1) > (void *)(long)skb->data_end)
		return -1;
	__builtin_memcpy(eth->h_dest, to, 6);
	__builtin_memcpy(eth->h_source, source, 6);
	return 0;
}

/*
 * hand_over redirects a frame, addressed to the guest, into its namespace. The
 * packet's type was set on arrival, by the MAC of the fabric end. The peer does
 * not look again, and IP drops what is for another host.
 */
static __always_inline int hand_over(struct __sk_buff *skb, __u32 ifindex)
{
	bpf_skb_change_type(skb, PACKET_HOST);
	return bpf_redirect_peer(ifindex, 0);
}

/*
 * deliver hands the frame to the guest behind t. Its Ethernet addresses are
 * rewritten, the TTL is not: the VPC does not lower it.
 */
static __always_inline int deliver(struct __sk_buff *skb, const struct target *t,
				   const __u8 *source, const struct size *s)
{
	if (address_frame(skb, t->mac, source))
		return drop(skb->ifindex, DROP_MALFORMED);
	count_received(t->ifindex, s->packets, s->bytes);
	return hand_over(skb, t->ifindex);
}

#include "fabric_arp.h"

/* ipv4_header returns a frame's IPv4 header, or 0 if it is none or contradicts the frame. */
static __always_inline struct iphdr *ipv4_header(struct __sk_buff *skb)
{
	struct iphdr *iph;

	if ((void *)(long)skb->data + ETH_HLEN + sizeof(*iph) > (void *)(long)skb->data_end &&
	    bpf_skb_pull_data(skb, ETH_HLEN + sizeof(*iph)))
		return 0;
	iph = (void *)(long)skb->data + ETH_HLEN;
	if ((void *)(iph + 1) > (void *)(long)skb->data_end)
		return 0;
	if (iph->version != 4 || iph->ihl < 5 || skb->len < (__u32)ETH_HLEN + iph->ihl * 4)
		return 0;
	/* The total length of a GSO frame of 64 KiB and more is 0. */
	if (!skb->gso_size && (bpf_ntohs(iph->tot_len) < iph->ihl * 4 ||
			       bpf_ntohs(iph->tot_len) > skb->len - ETH_HLEN))
		return 0;
	return iph;
}

/* Where a packet goes. */
struct way {
	enum route_kind kind; /* of its route; to an ENI's MAC and within a subnet ROUTE_LOCAL */
	struct target *to; /* who receives it, 0: the internet gateway */
	__u32 vni; /* of who receives it */
	__u32 named; /* fabric end of the ENI that has its destination, 0: none has */
	__u8 held; /* that ENI receives it */
	__u8 source[6]; /* Ethernet source that the receiver sees */
};

/* resolve finds out where a packet of an ENI's guest goes: 0, or why nowhere. */
static __always_inline enum drop_reason resolve(const struct eni *self, const struct ethhdr *eth,
						const struct iphdr *iph, struct way *w)
{
	struct station station = {};
	struct target *holder;
	struct route *r;
	__u8 router[6];

	w->vni = self->vni;
	holder = mapping(self->vni, iph->daddr);
	w->named = holder ? holder->ifindex : 0;
	load_router_mac(router);
	if (same_mac(eth->h_dest, router)) {
		__builtin_memcpy(w->source, router, 6);
		/* No route is followed to link-local addresses (VPC user guide). */
		if (link_local(iph->daddr))
			return DROP_NO_ROUTE;
		r = route_to(self->table, iph->daddr);
		if (!r)
			return DROP_NO_ROUTE;
		w->kind = r->kind;
		/* Within a subnet the route is always local (VPC user guide). */
		if ((iph->daddr & self->netmask) == self->subnet)
			w->kind = ROUTE_LOCAL;
		if (w->kind == ROUTE_LOCAL) {
			if (!holder)
				return DROP_NO_TARGET;
			w->to = holder;
		} else if (w->kind == ROUTE_ENI) {
			w->to = &r->target;
		} else if (w->kind == ROUTE_PEER) {
			/* The peer's ENIs alone: no gateway, no third VPC behind it. */
			w->vni = r->vni;
			w->to = mapping(r->vni, iph->daddr);
			if (!w->to)
				return DROP_NO_TARGET;
			w->named = w->to->ifindex;
		} else if (w->kind == ROUTE_IGW) {
			return 0;
		} else {
			return DROP_BLACKHOLE;
		}
	} else {
		station.vni = self->vni;
		station.subnet = self->subnet;
		__builtin_memcpy(station.mac, eth->h_dest, 6);
		w->kind = ROUTE_LOCAL;
		w->to = bpf_map_lookup_elem(&stations, &station);
		if (!w->to)
			return DROP_UNKNOWN_MAC;
		__builtin_memcpy(w->source, self->mac, 6);
	}
	w->held = w->named == w->to->ifindex;
	return 0;
}

/* path_of is the traffic path of what is sent along a way. */
static __always_inline enum traffic_path path_of(const struct way *w)
{
	switch (w->kind) {
	case ROUTE_LOCAL:
	case ROUTE_ENI:
		return PATH_VPC;
	case ROUTE_IGW:
		return PATH_IGW;
	case ROUTE_PEER:
		return PATH_PEERING;
	default:
		return PATH_NONE;
	}
}

/*
 * may_leave says whether a packet may leave its sender: 0, or why not.
 * crosses: it leaves the subnet, too.
 */
static __always_inline enum drop_reason may_leave(struct packet *p, __u32 ifindex,
						  const struct eni *self, const struct way *w,
						  int crosses)
{
	__u32 named = egress_groups_by_address || w->held ? w->named : 0;
	enum drop_reason reason;

	reason = self->flags & ENI_UNGATED ? 0 : gate(p, ifindex, EGRESS, named);
	if (!reason && crosses && !acl_allows(p, self->vni, self->subnet, EGRESS))
		reason = DROP_ACL_EGRESS;
	log_packet(p, ifindex, EGRESS, reason, path_of(w));
	return reason;
}

/*
 * may_enter says whether a packet may reach its receiver: 0, or why not. sender
 * is the ENI that sends it from an address of its own, 0 if none is known to;
 * crosses: it enters the subnet, too.
 */
static __always_inline enum drop_reason may_enter(struct packet *p, __u32 sender,
						  const struct way *w, int crosses)
{
	enum drop_reason reason;

	/* The subnet's boundary comes before the ENI, whose check is not logged. */
	if (crosses && !acl_allows(p, w->vni, w->to->subnet, INGRESS))
		reason = DROP_ACL_INGRESS;
	else if (!w->held && (w->to->flags & ENI_SOURCE_DEST_CHECK))
		return DROP_DEST_ADDRESS;
	else if (w->to->flags & ENI_UNGATED)
		reason = 0;
	else
		reason = gate(p, w->to->ifindex, INGRESS, sender);
	log_packet(p, w->to->ifindex, INGRESS, reason, PATH_NONE);
	return reason;
}

static __always_inline void count_sent(__u32 ifindex, const struct size *s)
{
	struct counters *c = bpf_map_lookup_elem(&counts, &ifindex);

	if (c) {
		c->tx_packets += s->packets;
		c->tx_bytes += s->bytes;
	}
}

/* count_exempt counts what is sent or received without a flow record, by definition. */
static __always_inline void count_exempt(__u32 ifindex, enum direction direction,
					 __u64 packets, __u64 bytes)
{
	struct counters *c = bpf_map_lookup_elem(&counts, &ifindex);

	if (!c)
		return;
	if (direction == EGRESS) {
		c->exempt_tx_packets += packets;
		c->exempt_tx_bytes += bytes;
	} else {
		c->exempt_rx_packets += packets;
		c->exempt_rx_bytes += bytes;
	}
}

#include "fabric_mtu.h"
#include "fabric_nat.h"
#include "fabric_ipv6.h"
#include "fabric_again.h"

static __always_inline int from_guest_ipv4(struct __sk_buff *skb, const struct eni *self)
{
	__u32 ifindex = skb->ifindex;
	struct packet packet = {};
	enum drop_reason reason;
	struct target *owner;
	struct ethhdr *eth;
	struct iphdr *iph;
	struct way way = {};
	struct size size;
	__u32 limit = 0;
	__u8 router[6];
	int crosses;

	iph = ipv4_header(skb);
	if (!iph)
		return drop(ifindex, DROP_MALFORMED);
	eth = (void *)(long)skb->data;
	if ((eth->h_dest[0] & 1) || (iph->daddr & bpf_htonl(0xf0000000)) == bpf_htonl(0xe0000000) ||
	    iph->daddr == bpf_htonl(0xffffffff))
		return drop(ifindex, DROP_MULTICAST);

	owner = mapping(self->vni, iph->saddr);
	if (owner && owner->ifindex != ifindex)
		owner = 0;
	if (!owner && (self->flags & ENI_SOURCE_DEST_CHECK))
		return drop(ifindex, DROP_SOURCE_ADDRESS);

	measure(skb, iph, &size);
	load_router_mac(router);
	if (same_mac(eth->h_dest, router)) {
		if (!within_allowance(ifindex, self, iph->daddr, size.packets))
			return drop(ifindex, DROP_LINKLOCAL_ALLOWANCE);
		if (is_service(self, iph->daddr, iph->protocol)) {
			count_sent(ifindex, &size);
			count_exempt(ifindex, EGRESS, size.packets, size.bytes);
			return from_guest_service(skb, self, iph);
		}
	}
	reason = resolve(self, eth, iph, &way);
	if (reason)
		return drop(ifindex, reason);
	reason = parse(skb, &packet);
	if (reason)
		return drop(ifindex, reason);
	packet.packets = size.packets;
	packet.bytes = size.bytes;

	if (!way.to) { /* ROUTE_IGW, in a form that the verifier follows */
		crosses = 1;
	} else {
		crosses = way.to->subnet != self->subnet || way.vni != self->vni;
		packet.always_tracked = !!((self->flags | way.to->flags) & ENI_UNGATED);
	}
	reason = may_leave(&packet, ifindex, self, &way, crosses);
	if (reason)
		return drop(ifindex, reason);
	count_sent(ifindex, &size);
	if (!way.to) {
		if (packet.first_fragment)
			remember_fragment(ifindex, &packet);
		bpf_tail_call(skb, &gateways, TO_INTERNET);
		return drop(ifindex, DROP_BLACKHOLE);
	}
	if (size.longest > way.to->mtu) {
		limit = way.to->mtu;
		if (must_tell(skb))
			return refuse_length(skb, limit);
		count_cut(&packet, limit);
	}
	reason = may_enter(&packet, owner ? ifindex : 0, &way, crosses);
	if (reason)
		return drop(way.to->ifindex, reason);
	note_passed(&packet, self, ifindex, &way, skb->cb[0]);
	if (packet.first_fragment)
		remember_fragment(ifindex, &packet);
	if (limit)
		return deliver_cut(skb, way.to, way.source, limit);
	return deliver(skb, way.to, way.source, &size);
}

/* judge_guest judges a frame from the start. from_guest alone calls it. */
SEC("tcx/ingress")
int judge_guest(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct ethhdr *eth;
	struct eni *self;

	skb->cb[0] = generation(); /* before all that Set writes is read */
	self = bpf_map_lookup_elem(&enis, &ifindex);
	if (!self)
		return drop(0, DROP_NO_INTERFACE);
	if ((void *)(long)skb->data + ETH_HLEN > (void *)(long)skb->data_end &&
	    bpf_skb_pull_data(skb, ETH_HLEN))
		return drop(ifindex, DROP_MALFORMED);
	eth = (void *)(long)skb->data;
	if ((void *)(eth + 1) > (void *)(long)skb->data_end)
		return drop(ifindex, DROP_MALFORMED);
	if (!same_mac(eth->h_source, self->mac))
		return drop(ifindex, DROP_SOURCE_MAC);
	/* The stack has moved a VLAN tag out of the frame by now. */
	if (skb->vlan_present)
		return drop(ifindex, DROP_ETHERTYPE);

	switch (eth->h_proto) {
	case bpf_htons(ETH_P_IP):
		return from_guest_ipv4(skb, self);
	case bpf_htons(ETH_P_ARP):
		return from_guest_arp(skb, self);
	case bpf_htons(ETH_P_IPV6):
		bpf_tail_call(skb, &gateways, FROM_GUEST_IPV6);
		return drop(ifindex, DROP_IPV6);
	}
	if (eth->h_dest[0] & 1)
		return drop(ifindex, DROP_MULTICAST);
	return drop(ifindex, DROP_ETHERTYPE);
}

SEC("tcx/ingress")
int from_guest(struct __sk_buff *skb)
{
	int action = pass_again(skb);

	if (action)
		return action;
	bpf_tail_call(skb, &judges, 0);
	return drop(skb->ifindex, DROP_BLACKHOLE);
}

/*
 * A service's answer leaves by the device that its socket is bound to. The
 * device has no neighbours (NOARP), so the stack wrote the device's own MAC as
 * the destination; whichever address behind the ENI the client has, the frame
 * belongs to the ENI. The TTL is the socket's.
 */
SEC("tcx/egress")
int to_guest(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct counters *c;
	struct ethhdr *eth;
	struct iphdr *iph;
	struct size size;
	struct eni *self;
	int resolver;

	if (skb->mark & CUT)
		return cut(skb);
	self = bpf_map_lookup_elem(&enis, &ifindex);
	if (!self)
		return drop(0, DROP_NO_INTERFACE);
	if (skb->protocol != bpf_htons(ETH_P_IP))
		return drop(ifindex, DROP_NOT_SERVICE);
	if ((void *)(long)skb->data + ETH_HLEN + sizeof(*iph) > (void *)(long)skb->data_end &&
	    bpf_skb_pull_data(skb, ETH_HLEN + sizeof(*iph)))
		return drop(ifindex, DROP_MALFORMED);
	eth = (void *)(long)skb->data;
	iph = (void *)(eth + 1);
	if ((void *)(iph + 1) > (void *)(long)skb->data_end)
		return drop(ifindex, DROP_MALFORMED);
	resolver = self->resolver && iph->saddr == RESOLVER_ALIAS;
	if (!resolver && !is_service(self, iph->saddr, iph->protocol))
		return drop(ifindex, DROP_NOT_SERVICE);
	measure(skb, iph, &size);
	__builtin_memcpy(eth->h_dest, self->mac, 6);
	load_router_mac(eth->h_source);
	c = bpf_map_lookup_elem(&counts, &ifindex);
	if (c) {
		c->rx_packets += size.packets;
		c->rx_bytes += size.bytes;
	}
	count_exempt(ifindex, INGRESS, size.packets, size.bytes);
	if (resolver &&
	    readdress(skb, iph, offsetof(struct iphdr, saddr), RESOLVER_ALIAS, self->resolver))
		return drop(ifindex, DROP_MALFORMED);
	return TCX_PASS;
}

/*
 * Fragments alone leave for the internet by the stack; all else is redirected to
 * the other end.
 */
SEC("tcx/egress")
int cut_for_internet(struct __sk_buff *skb)
{
	if (skb->mark & CUT)
		return cut(skb);
	return drop(0, DROP_NOT_SERVICE);
}
