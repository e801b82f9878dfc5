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

/* Why a frame was dropped. Append only: counters are pinned by these numbers. */
enum drop_reason {
	DROP_NO_INTERFACE, /* a device that is no ENI's */
	DROP_MALFORMED, /* headers cut short, or that contradict the frame */
	DROP_SOURCE_MAC, /* Ethernet source is not the ENI's MAC */
	DROP_SOURCE_ADDRESS, /* source check: not one of the ENI's addresses */
	DROP_DEST_ADDRESS, /* destination check of the receiving ENI */
	DROP_NO_ROUTE, /* outside all routes of the subnet */
	DROP_NO_TARGET, /* inside the VPC, but no ENI holds the address */
	DROP_UNKNOWN_MAC, /* to a MAC that is neither router's nor an ENI's of the subnet */
	DROP_MULTICAST, /* broadcast and multicast, other than an ARP request */
	DROP_IPV6, /* IPv6 of or to an ENI whose subnet has no IPv6 block */
	DROP_ETHERTYPE, /* neither IPv4, IPv6 nor ARP, or with a VLAN tag */
	DROP_OVERSIZE, /* IP length above the MTU */
	DROP_ARP_SPOOFED, /* ARP whose sender fields are not the ENI's */
	DROP_ARP_UNANSWERED, /* ARP to which no answer is due */
	DROP_NOT_SERVICE, /* the fabric's stack sent something that is no service's answer */
	DROP_SG_EGRESS, /* the sender's security groups */
	DROP_SG_INGRESS, /* the receiver's security groups */
	DROP_FRAGMENT, /* a later fragment whose first did not pass before it */
	DROP_FLOWS_FULL, /* no room to track one more flow */
	DROP_ACL_EGRESS, /* the network ACL of the sender's subnet */
	DROP_ACL_INGRESS, /* the network ACL of the receiver's subnet */
	DROP_BLACKHOLE, /* a route whose target is gone, or is not of these wires */
	DROP_IGW_SOURCE, /* to the internet, from an address without a public one */
	DROP_IGW_PRIVATE, /* between the internet and an address of RFC 1918 or RFC 6598 */
	DROP_NO_PUBLIC, /* from the internet, to a public address that leads nowhere */
	DROP_LINKLOCAL_ALLOWANCE, /* more packets to link-local services than an ENI may send */
	DROP_EXTENSION, /* IPv6 extension headers that no gate can judge */
	DROP_ND_SPOOFED, /* neighbour discovery from an address that is not the ENI's */
	DROP_ND_UNANSWERED, /* neighbour discovery to which no answer is due */
	DROP_GATEWAY_IPV6, /* IPv6 to an internet gateway, which carries none here */
	DROP_REASONS, /* how many there are */
};

enum eni_flag {
	ENI_SOURCE_DEST_CHECK = 1,
	ENI_READY = 2, /* made whole: what Set looks for, nothing to the programs */
	ENI_UNGATED = 4, /* a NAT gateway's: no security group judges what it sends and receives */
	ENI_IPV6 = 8, /* its subnet has an IPv6 block */
};

enum route_kind {
	ROUTE_LOCAL = 1, /* to whatever ENI holds the address */
	ROUTE_ENI, /* to target, whose address that of the packet is not */
	ROUTE_BLACKHOLE, /* to what is not there */
	ROUTE_IGW, /* to the VPC's internet gateway */
	ROUTE_PEER, /* to whatever ENI of VPC vni holds the address */
};

struct address {
	__u32 vni;
	__u8 addr[16];
};

/* An ENI as a destination. */
struct target {
	__u32 ifindex; /* fabric end */
	enum eni_flag flags;
	__be32 subnet; /* network address of its subnet; with the VNI, the subnet's name */
	__u8 mac[6];
	__u16 mtu; /* IP length of what it takes */
};

/* An ENI as a source: what a fabric end belongs to. */
struct eni {
	__u32 vni;
	enum eni_flag flags;
	__be32 subnet;
	__be32 netmask;
	__be32 configured; /* the address that Set gave the guest end, 0: none */
	__u8 mac[6];
	__u16 device_index; /* the guest end is called eth%u */
	__be32 resolver; /* the VPC's own address of its resolver, 0: it has none */
	__u64 table; /* number of its subnet's route table */
	__u64 guest; /* inode of the guest's namespace when the pair was made */
	char id[32]; /* "eni-…", for who reads the map */
	__be32 subnet6[4]; /* its subnet's IPv6 block; ENI_IPV6 */
	__be32 netmask6[4];
	__u16 mtu; /* IP length of what it takes */
	__u8 pad[6];
};

/* A MAC is looked up within its subnet. */
struct station {
	__u32 vni;
	__be32 subnet;
	__u8 mac[6];
	__u8 pad[2];
};

/* An LPM key is packed: its bits begin behind prefixlen. */
struct route_key {
	__u32 prefixlen; /* 64 bits of table included */
	__u32 table[2]; /* number of the table, low half first */
	__u8 addr[16];
};

struct route {
	enum route_kind kind;
	struct target target; /* ROUTE_ENI */
	__u32 vni; /* ROUTE_PEER */
};

/* What a public address leads to, through an internet gateway that is attached. */
struct public {
	__u64 table; /* number of the gateway's route table, 0: it has none */
	__u32 vni;
	__be32 private;
};

/*
 * From the guest's point of view: tx is what the fabric accepted from it, rx
 * what the fabric handed to it; neither ARP nor neighbour discovery. A packet is one on the wire, so a
 * GSO frame counts its segments; bytes are IP lengths, without Ethernet header.
 * Of these, exempt is what flow logs leave out by definition, and skipped what
 * they had no room for; the rest is in flow records that say ACCEPT.
 */
struct counters {
	__u64 tx_packets;
	__u64 tx_bytes;
	__u64 rx_packets;
	__u64 rx_bytes;
	__u64 exempt_tx_packets;
	__u64 exempt_tx_bytes;
	__u64 exempt_rx_packets;
	__u64 exempt_rx_bytes;
	__u64 skipped_tx_packets;
	__u64 skipped_tx_bytes;
	__u64 skipped_rx_packets;
	__u64 skipped_rx_bytes;
	__u64 drops[DROP_REASONS]; /* frames */
};

/* The router of every subnet; locally administered, never an ENI's. */
volatile const __u8 router_mac[6] = {0x02, 0x00, 0x5e, 0x00, 0x00, 0x01};
volatile const __u32 internet_mtu = 1500; /* IP length, through an internet gateway */
volatile const enum drop_reason drop_reasons = DROP_REASONS; /* shows the type to bpf2go */

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, __u32); /* ifindex of a fabric end */
	__type(value, struct eni);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} enis SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144); /* each address of a /28 is an entry */
	__type(key, struct address);
	__type(value, struct target);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} mappings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, struct station);
	__type(value, struct target);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} stations SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct route_key);
	__type(value, struct route);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} routes SEC(".maps");

/* By public address, in network byte order. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __be32);
	__type(value, struct public);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} publics SEC(".maps");

/* The public address of a private one, the other way round. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct address);
	__type(value, __be32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} elastics SEC(".maps");

/* The one end towards the internet; ifindex 0: there is no internet yet. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct target);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} internet SEC(".maps");

/*
 * Key 0 counts what came from a device that is no ENI's, and what came from the
 * internet and reached no ENI.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, __u32); /* ifindex of a fabric end */
	__type(value, struct counters);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} counts SEC(".maps");

/* enum tcx_action_base of Linux 6.6, newer than some distributions' headers. */
#define TCX_PASS 0
#define TCX_DROP 2

#define ARP_ETHERNET 1 /* hardware type */
#define ARP_REQUEST 1
#define ARP_REPLY 2

/* RFC 826, for Ethernet and IPv4. (<linux/if_arp.h> wants a C library.) */
struct arp_packet {
	__be16 hardware_type;
	__be16 protocol_type;
	__u8 hardware_len;
	__u8 protocol_len;
	__be16 op;
	__u8 sender_mac[6];
	__u8 sender_ip[4];
	__u8 target_mac[6];
	__u8 target_ip[4];
} __attribute__((packed));

static __always_inline int drop(__u32 ifindex, enum drop_reason reason)
{
	struct counters *c = bpf_map_lookup_elem(&counts, &ifindex);
	__u64 i = (__u32)reason;

	asm volatile("" : "+r"(i)); /* one register for the check and the access */
	if (c && i < DROP_REASONS)
		c->drops[i]++; /* per CPU, and programs do not nest on one */
	return TCX_DROP;
}

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

/*
 * ARP is answered as the VPC does: for the router, for addresses that other
 * ENIs of the subnet hold, and for link-local ones (by the router). It never
 * reaches another guest.
 */
static __always_inline int from_guest_arp(struct __sk_buff *skb, const struct eni *self)
{
	__u32 ifindex = skb->ifindex;
	__be32 sender, target, router;
	struct arp_packet *arp;
	struct target *owner;
	struct ethhdr *eth;
	__u8 answer[6];

	if (bpf_skb_pull_data(skb, ETH_HLEN + sizeof(*arp)))
		return drop(ifindex, DROP_MALFORMED);
	eth = (void *)(long)skb->data;
	arp = (void *)(eth + 1);
	if ((void *)(arp + 1) > (void *)(long)skb->data_end)
		return drop(ifindex, DROP_MALFORMED);
	if (arp->hardware_type != bpf_htons(ARP_ETHERNET) ||
	    arp->protocol_type != bpf_htons(ETH_P_IP) || arp->hardware_len != 6 ||
	    arp->protocol_len != 4)
		return drop(ifindex, DROP_MALFORMED);
	__builtin_memcpy(&sender, arp->sender_ip, 4);
	__builtin_memcpy(&target, arp->target_ip, 4);

	if (!same_mac(arp->sender_mac, self->mac))
		return drop(ifindex, DROP_ARP_SPOOFED);
	/* A sender of 0.0.0.0 is a probe (RFC 5227): it claims nothing. */
	if (sender && (self->flags & ENI_SOURCE_DEST_CHECK)) {
		owner = mapping(self->vni, sender);
		if (!owner || owner->ifindex != ifindex)
			return drop(ifindex, DROP_ARP_SPOOFED);
	}
	if (arp->op != bpf_htons(ARP_REQUEST))
		return drop(ifindex, DROP_ARP_UNANSWERED);

	router = self->subnet + bpf_htonl(1); /* no carry: a subnet is even */
	if (target == router || link_local(target) || is_resolver(self, target)) {
		load_router_mac(answer);
	} else {
		if ((target & self->netmask) != self->subnet)
			return drop(ifindex, DROP_ARP_UNANSWERED);
		owner = mapping(self->vni, target);
		/* Its own address: it asks whether somebody else has it. */
		if (!owner || owner->ifindex == ifindex)
			return drop(ifindex, DROP_ARP_UNANSWERED);
		__builtin_memcpy(answer, owner->mac, 6);
	}

	__builtin_memcpy(eth->h_dest, self->mac, 6);
	__builtin_memcpy(eth->h_source, answer, 6);
	arp->op = bpf_htons(ARP_REPLY);
	__builtin_memcpy(arp->target_mac, self->mac, 6);
	__builtin_memcpy(arp->target_ip, &sender, 4);
	__builtin_memcpy(arp->sender_mac, answer, 6);
	__builtin_memcpy(arp->sender_ip, &target, 4);
	bpf_skb_change_type(skb, PACKET_HOST);
	return bpf_redirect_peer(ifindex, 0);
}

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
