/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The node's datapath: what stands between a pod and the node's network stack.
 *
 *	from_pod	ingress of the host veth: what the pod sends
 *	to_pod		egress of the host veth: what the pod is sent
 *
 * They stand on a clsact qdisc or on TCX links.
 *
 * Both fail closed: an interface that is not in the map `ifaces`, or whose
 * gate is shut, passes nothing in either direction.
 *
 * What passes returns TC_ACT_UNSPEC (TCX calls it TCX_NEXT), not TC_ACT_OK:
 * that would end the chain and with it every program that somebody else
 * attached behind ours. If nobody else decides, the packet goes on to the
 * stack as well. Drops return TC_ACT_SHOT and end it.
 *
 * Only the headers of the kernel's user API and libbpf's helper declarations
 * are used: no kernel type is relocated, so the object needs no BTF of the
 * running kernel.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <stdbool.h>
#include <stddef.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/* 15 ENIs of 50 addresses, 16 to each with prefixes, would be 11,760 pods; the
 * largest node in use runs 737. Tombstones of a whole node fit beside them. */
#define MAX_IFACES	4096
#define MAX_ENDPOINTS	16384

/* Constants that Go reads from the object's BTF, so that they stand once. */
enum node_const {
	/* Bits of skb->mark that are ours: 1, 2, 6, 12, 13. They carry the
	 * ENI's mark index, 1..31, and are never all zero after from_pod. */
	NODE_MARK_MASK = 0x3046,
	/* Version of the maps' layout, in map `meta`. */
	NODE_LAYOUT = 1,
	/* Size of map policy_tables; its number 0 is nobody's. Endpoints with equal
	 * policy share a table; while one is exchanged for another both are there. */
	NODE_POLICY_TABLES = 16384,
};

enum drop_reason {
	DROP_NONE = 0,
	DROP_UNKNOWN_INTERFACE,	/* no entry in ifaces */
	DROP_NOT_READY,		/* the endpoint's gate is shut */
	DROP_MALFORMED,		/* too short for the headers it claims */
	DROP_VLAN,		/* 802.1Q or 802.1ad tag */
	DROP_SOURCE_MAC,	/* Ethernet source is not the endpoint's */
	DROP_ARP_SENDER,	/* ARP sender MAC or IP is not the endpoint's */
	DROP_ARP_OTHER,		/* ARP that asks for anything but the gateway */
	DROP_IPV6,
	DROP_ETHERTYPE,		/* neither IPv4, IPv6 nor ARP */
	DROP_SOURCE_ADDRESS,	/* IPv4 source is not the endpoint's */
	DROP_IMDS,		/* instance metadata, and pods may not */
	DROP_REASONS,		/* how many there are */
};

/* Room in tables of drops, so that a new reason does not change a layout. */
#define DROP_SLOTS	32

enum iface_flags {
	IFACE_READY = 1,	/* the gate is open: policy is in place */
};

struct addr {
	__u8 b[16];		/* IPv6, or IPv4 as ::ffff:a.b.c.d */
};

/* One host veth, keyed by its ifindex. */
struct iface {
	struct addr addr;	/* the pod's address */
	__u8 pod_mac[6];
	__u8 host_mac[6];
	__u32 mark;		/* of the ENI, within NODE_MARK_MASK, never 0 */
	__u32 flags;		/* enum iface_flags */
};

/* Packets and bytes are counted with the Ethernet header, as the interface's
 * own counters do. */
struct iface_counters {
	__u64 from_packets;	/* passed by from_pod */
	__u64 from_bytes;
	__u64 to_packets;	/* passed by to_pod */
	__u64 to_bytes;
	__u64 drops[DROP_SLOTS];
	__u64 last_drop_ns;	/* CLOCK_BOOTTIME, 0: never */
	__u32 last_drop_reason;
	__u32 last_drop_proto;	/* EtherType, host order */
};

/* The commit record of an endpoint, keyed by its address. The programs do not
 * read it: it is the node's memory, written and read by the agent alone. Text
 * ends with a zero byte or with its field. */
struct endpoint {
	__u32 version;		/* of this struct */
	__u32 state;		/* 1 adding, 2 live, 3 tombstone */
	__u64 netns_cookie;
	__u64 created_ns;	/* CLOCK_BOOTTIME */
	__u64 released_ns;	/* CLOCK_BOOTTIME, 0: not released */
	__u32 eni_index;	/* mark index, 1..31 */
	__u32 host_ifindex;
	__u32 peer_ifindex;
	__u32 mtu;
	__u8 mac[6];
	__u8 pad[2];
	__u8 container_id[128];
	__u8 ifname[16];
	__u8 host_ifname[16];
	__u8 netns[256];
	__u8 eni[32];
	__u8 pod_namespace[64];
	__u8 pod_name[256];
	__u8 groups[344];	/* canonical: sorted, joined by commas; 16 take 335 */
	__u8 pod_uid[40];	/* a UUID's text is 36 */
};

struct layout_meta {
	__u32 layout;		/* 0: not yet initialised */
	__u32 reserved;
};

/* Configuration, set before the program is loaded. */
const volatile __u32 imds_allowed = 0;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct layout_meta);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} meta SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_ENDPOINTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct addr);
	__type(value, struct endpoint);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} endpoints SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_IFACES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct iface);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} ifaces SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, MAX_IFACES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct iface_counters);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} iface_stats SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, DROP_SLOTS);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} drops SEC(".maps");

#include "node_conn.h"
#include "node_policy.h"

/* Keeps types in the object's BTF that no map or program names. */
enum node_const node_const_btf SEC(".bss.btf") = 0;
enum drop_reason drop_reason_btf SEC(".bss.btf") = 0;
enum iface_flags iface_flags_btf SEC(".bss.btf") = 0;
enum policy_flags policy_flags_btf SEC(".bss.btf") = 0;

/* ARP for IPv4 over Ethernet (RFC 826). linux/if_arp.h hides the addresses, and
 * its includes do not compile for the BPF target. */
struct arp_ether {
	__be16 hardware;	/* 1 */
	__be16 protocol;	/* ETH_P_IP */
	__u8 hardware_len;	/* 6 */
	__u8 protocol_len;	/* 4 */
	__be16 op;		/* 1 request, 2 reply */
	__u8 sender_mac[6];
	__u8 sender_ip[4];
	__u8 target_mac[6];
	__u8 target_ip[4];
} __attribute__((packed));

#define ARP_HARDWARE_ETHERNET	1
#define ARP_REQUEST		1
#define ARP_REPLY		2

#define POD_GATEWAY	bpf_htonl(0xa9fe0101)	/* 169.254.1.1 */
#define IMDS_IPV4	bpf_htonl(0xa9fea9fe)	/* 169.254.169.254 */

static __always_inline int drop(struct __sk_buff *skb, __u32 ifindex, __u32 reason)
{
	struct iface_counters *stats;
	__u64 *count;

	count = bpf_map_lookup_elem(&drops, &reason);
	if (count)
		(*count)++;
	stats = bpf_map_lookup_elem(&iface_stats, &ifindex);
	if (stats && reason < DROP_SLOTS) {
		stats->drops[reason]++;
		stats->last_drop_ns = bpf_ktime_get_boot_ns();
		stats->last_drop_reason = reason;
		stats->last_drop_proto = bpf_ntohs(skb->protocol);
	}
	return TC_ACT_SHOT;
}

static __always_inline bool same_mac(const __u8 *a, const __u8 *b)
{
	return ((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) |
		(a[3] ^ b[3]) | (a[4] ^ b[4]) | (a[5] ^ b[5])) == 0;
}

static __always_inline void copy_mac(__u8 *to, const __u8 *from)
{
#pragma unroll
	for (int i = 0; i < 6; i++)
		to[i] = from[i];
}

/* The last four bytes of a v4-mapped address, network order. */
static __always_inline __be32 v4_of(const struct addr *a)
{
	return *(const __be32 *)(const void *)&a->b[12];
}

/* Makes the first len bytes directly readable: a frame sent through a packet
 * ring has nothing but its Ethernet header in the linear part. */
static __always_inline bool readable(struct __sk_buff *skb, __u32 len)
{
	if ((void *)(long)skb->data + len <= (void *)(long)skb->data_end)
		return true;
	return bpf_skb_pull_data(skb, len) == 0;
}

/* Answers who-has 169.254.1.1 in place: the frame goes back where it came from. */
static __always_inline int arp(struct __sk_buff *skb, __u32 ifindex, const struct iface *ep)
{
	const __u32 len = sizeof(struct ethhdr) + sizeof(struct arp_ether);
	struct arp_ether *body;
	struct ethhdr *eth;
	__be32 gateway = POD_GATEWAY, sender, target;
	__be32 own = v4_of(&ep->addr);

	if (!readable(skb, len))
		return drop(skb, ifindex, DROP_MALFORMED);
	eth = (void *)(long)skb->data;
	if ((void *)eth + len > (void *)(long)skb->data_end)
		return drop(skb, ifindex, DROP_MALFORMED);
	body = (void *)(eth + 1);
	if (body->hardware != bpf_htons(ARP_HARDWARE_ETHERNET) ||
	    body->protocol != bpf_htons(ETH_P_IP) ||
	    body->hardware_len != 6 || body->protocol_len != 4)
		return drop(skb, ifindex, DROP_MALFORMED);

	__builtin_memcpy(&sender, body->sender_ip, 4);
	__builtin_memcpy(&target, body->target_ip, 4);
	if (!same_mac(body->sender_mac, ep->pod_mac) || sender != own)
		return drop(skb, ifindex, DROP_ARP_SENDER);
	if (body->op != bpf_htons(ARP_REQUEST) || target != gateway)
		return drop(skb, ifindex, DROP_ARP_OTHER);

	copy_mac(eth->h_dest, ep->pod_mac);
	copy_mac(eth->h_source, ep->host_mac);
	body->op = bpf_htons(ARP_REPLY);
	copy_mac(body->sender_mac, ep->host_mac);
	__builtin_memcpy(body->sender_ip, &gateway, 4);
	copy_mac(body->target_mac, ep->pod_mac);
	__builtin_memcpy(body->target_ip, &own, 4);
	return bpf_redirect(ifindex, 0);
}

SEC("tc")
int from_pod(struct __sk_buff *skb)
{
	const __u32 need = sizeof(struct ethhdr) + sizeof(struct iphdr);
	__u32 ifindex = skb->ifindex;
	struct iface_counters *stats;
	struct iface *ep;
	struct ethhdr *eth;
	struct iphdr *ip;
	__be16 proto;

	ep = bpf_map_lookup_elem(&ifaces, &ifindex);
	if (!ep)
		return drop(skb, ifindex, DROP_UNKNOWN_INTERFACE);
	if (!(ep->flags & IFACE_READY) || !(ep->mark & NODE_MARK_MASK))
		return drop(skb, ifindex, DROP_NOT_READY);

	if (!readable(skb, sizeof(*eth)))
		return drop(skb, ifindex, DROP_MALFORMED);
	eth = (void *)(long)skb->data;
	if ((void *)(eth + 1) > (void *)(long)skb->data_end)
		return drop(skb, ifindex, DROP_MALFORMED);
	if (!same_mac(eth->h_source, ep->pod_mac))
		return drop(skb, ifindex, DROP_SOURCE_MAC);

	/* The stack has moved an outer tag into the skb before we run; a tag
	 * inside a tag would still be in the frame. */
	proto = eth->h_proto;
	if (skb->vlan_present || proto == bpf_htons(ETH_P_8021Q) || proto == bpf_htons(ETH_P_8021AD))
		return drop(skb, ifindex, DROP_VLAN);
	if (proto == bpf_htons(ETH_P_ARP))
		return arp(skb, ifindex, ep);
	if (proto == bpf_htons(ETH_P_IPV6))
		return drop(skb, ifindex, DROP_IPV6);
	if (proto != bpf_htons(ETH_P_IP))
		return drop(skb, ifindex, DROP_ETHERTYPE);

	if (!readable(skb, need))
		return drop(skb, ifindex, DROP_MALFORMED);
	eth = (void *)(long)skb->data;
	if ((void *)eth + need > (void *)(long)skb->data_end)
		return drop(skb, ifindex, DROP_MALFORMED);
	ip = (void *)(eth + 1);
	if (ip->version != 4 || ip->ihl < 5)
		return drop(skb, ifindex, DROP_MALFORMED);
	if (ip->saddr != v4_of(&ep->addr))
		return drop(skb, ifindex, DROP_SOURCE_ADDRESS);
	if (ip->daddr == IMDS_IPV4 && !imds_allowed)
		return drop(skb, ifindex, DROP_IMDS);

	skb->mark = (skb->mark & ~NODE_MARK_MASK) | (ep->mark & NODE_MARK_MASK);

	stats = bpf_map_lookup_elem(&iface_stats, &ifindex);
	if (stats) {
		stats->from_packets++;
		stats->from_bytes += skb->len;
	}
	return TC_ACT_UNSPEC;
}

SEC("tc")
int to_pod(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct iface_counters *stats;
	struct iface *ep;

	ep = bpf_map_lookup_elem(&ifaces, &ifindex);
	if (!ep)
		return drop(skb, ifindex, DROP_UNKNOWN_INTERFACE);
	if (!(ep->flags & IFACE_READY))
		return drop(skb, ifindex, DROP_NOT_READY);

	/* The pod must not see which ENI a packet came by, nor find the bits
	 * taken by somebody inside it who uses marks. */
	skb->mark &= ~NODE_MARK_MASK;

	stats = bpf_map_lookup_elem(&iface_stats, &ifindex);
	if (stats) {
		stats->to_packets++;
		stats->to_bytes += skb->len;
	}
	return TC_ACT_UNSPEC;
}

char _license[] SEC("license") = "Dual BSD/GPL";
