/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The node's datapath: what stands between a pod and the node's network stack.
 *
 *	from_pod	ingress of the host veth: what the pod sends
 *	to_pod		egress of the host veth: what the stack sends the pod
 *	from_eni	ingress of an ENI: what the VPC sends the node
 *	to_eni		egress of an ENI: what the node sends the VPC
 *
 * They stand on a clsact qdisc or on TCX links.
 *
 * The first two fail closed: an interface that is not in the map `ifaces`, or
 * whose gate is shut, passes nothing in either direction. The other two see the
 * node's own packets as well, and leave them alone.
 *
 * What passes returns TC_ACT_UNSPEC (TCX calls it TCX_NEXT), not TC_ACT_OK:
 * that would end the chain and with it every program that somebody else
 * attached behind ours (but see IFACE_ALONE). If nobody else decides, the packet
 * goes on to the stack as well. Drops return TC_ACT_SHOT and end it.
 *
 * The headers are those of the kernel's user API and libbpf's helper
 * declarations. One field of one kernel type is relocated, for the kernel's
 * conntrack (node_direct.h), so the running kernel must have its BTF.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <stdbool.h>
#include <stddef.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "node_state.h"
#include "node_tuple.h"
#include "node_packet.h"
#include "node_conn.h"
#include "node_policy.h"
#include "node_event.h"
#include "node_share.h"
#include "node_table.h"

/* Keeps types in the object's BTF that no map or program names. */
enum node_const node_const_btf SEC(".bss.btf") = 0;
enum drop_reason drop_reason_btf SEC(".bss.btf") = 0;
enum iface_flags iface_flags_btf SEC(".bss.btf") = 0;
enum policy_flags policy_flags_btf SEC(".bss.btf") = 0;
enum provenance provenance_btf SEC(".bss.btf") = 0;
enum conn_state conn_state_btf SEC(".bss.btf") = 0;
enum conn_flag conn_flag_btf SEC(".bss.btf") = 0;
enum path_count path_count_btf SEC(".bss.btf") = 0;
enum gate gate_btf SEC(".bss.btf") = 0;
struct event *event_btf SEC(".bss.btf") = 0;

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

/* Counts a packet that is dropped, and tells who watches; p may be 0. */
__noinline __cold int drop_packet(struct __sk_buff *skb, __u32 ifindex, __u32 reason,
				  const struct packet *p)
{
	struct event e = { .reason = reason };
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
	if (event_listeners && p) {
		struct conn *c = conn_find(&p->key);
		__u32 egress;

		if (c) {
			egress = c->gates.judged[c->gates.opener & 1] & ~c->gates.allowed[c->gates.opener & 1];
			tell_of(&e, c, egress || !c->gates.judged[(1 - c->gates.opener) & 1] ? POLICY_EGRESS : POLICY_INGRESS);
		}
	}
	send_event(skb, p ? &p->tuple : 0, &e);
	return TC_ACT_SHOT;
}

static __always_inline int drop(struct __sk_buff *skb, __u32 ifindex, __u32 reason)
{
	return drop_packet(skb, ifindex, reason, 0);
}

static __always_inline bool same_mac(const __u8 *a, const __u8 *b)
{
	const quarter_word *x = (const void *)a, *y = (const void *)b;

	return ((x[0] ^ y[0]) | (x[1] ^ y[1]) | (x[2] ^ y[2])) == 0;
}

static __always_inline void copy_mac(__u8 *to, const __u8 *from)
{
	const quarter_word *y = (const void *)from;
	quarter_word *x = (void *)to;

#pragma unroll
	for (int i = 0; i < 3; i++)
		x[i] = y[i];
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

/* Counts a packet that passes: the pod sent it, or it is handed to the pod. */
static __always_inline void count_traffic(const struct iface *pod, const struct packet *p, bool sent)
{
	__u32 slot = pod->slot;
	struct iface_traffic *t = bpf_map_lookup_elem(&traffic, &slot);

	if (!t)
		return;
	if (sent) {
		t->from_packets += p->packets;
		t->from_bytes += p->bytes;
	} else {
		t->to_packets += p->packets;
		t->to_bytes += p->bytes;
	}
}

/*
 * Leaves a packet to the stack, with its tc_index. While a program is moved from
 * clsact to TCX it stands on both: then the first ends the chain, so that the second
 * does not see the packet. The kernel takes its tc_index from tc_classid there.
 */
static __always_inline int pass(struct __sk_buff *skb, const struct iface *pod, __u32 tc_index)
{
	skb->tc_index = tc_index;
	if (!(pod->flags & IFACE_ALONE))
		return TC_ACT_UNSPEC;
	skb->tc_classid = tc_index;
	return TC_ACT_OK;
}

#include "node_route.h"
#include "node_direct.h"

enum eni_flag eni_flag_btf SEC(".bss.btf") = 0;
enum net_flag net_flag_btf SEC(".bss.btf") = 0;

#include "node_judge.h"

/* Enters a flow that a pod begins. It returns 0 or the reason to drop. */
__noinline __cold int begin_from_pod(struct __sk_buff *skb, struct packet *p, const struct iface *pod,
			      struct conn *old)
{
	struct conn *n;
	struct iface *other;
	__u32 end, peer, way;
	struct eni *eni;
	int reason;

	if (!p || !pod)
		return DROP_MALFORMED;
	n = conn_new(p, PROVENANCE_STACK);
	if (!n)
		return DROP_CONNTRACK_FULL;
	keep_opener(n, old);
	eni = eni_of(pod);
	end = p->end & 1;
	n->ifindex[end] = skb->ifindex;
	n->slot[end] = n->share = pod->slot;
	n->seen |= CONN_SENDER << end;
	if (eni && (eni->flags & ENI_DIRECT) && !(pod->flags & IFACE_STACK) &&
	    plain_opening(skb, p) && in_vpc(&p->tuple.dst)) {
		way = ask_fib(skb, &p->tuple, pod->mark);
		peer = local_pod(&p->tuple.dst);
		if (!peer) {
			if (way && way == eni->ifindex)
				n->gates.provenance = PROVENANCE_DIRECT;
		} else if (way == peer) {
			other = bpf_map_lookup_elem(&ifaces, &peer);
			/* Ready: no flow is judged by a pod whose policy is not there. */
			if (other && (other->flags & IFACE_READY) && !(other->flags & IFACE_STACK))
				n->gates.provenance = PROVENANCE_DIRECT;
			/* Across subnets by the wire, where the ACLs are (D9). */
			if (in_subnet(eni, &p->tuple.dst)) {
				n->gates.flags |= CONN_LOCAL;
				n->ifindex[1 - end] = peer;
				if (other)
					n->slot[1 - end] = other->slot;
			}
		}
		if (n->gates.provenance == PROVENANCE_DIRECT)
			n->eni_ifindex = n->gates.flags & CONN_LOCAL ? 0 : eni->ifindex;
		else
			n->gates.flags &= ~CONN_LOCAL;
	}
	if (n->gates.provenance == PROVENANCE_DIRECT) {
		/* What takes the stack is judged where it leaves it. */
		reason = judge(n, &p->tuple, end, POLICY_EGRESS,
			       n->gates.flags & CONN_LOCAL || pod->flags & IFACE_GROUPS ? BOTH_GATES : NETPOL);
		if (!reason && (n->gates.flags & CONN_LOCAL))
			reason = judge(n, &p->tuple, 1 - end, POLICY_INGRESS, BOTH_GATES);
		if (n->gates.provenance != PROVENANCE_DIRECT)
			n->gates.flags &= ~CONN_LOCAL; /* the policy wants it so */
		if (reason)
			n->gates.flags |= CONN_DENIED;
	} else {
		n->ifindex[1 - end] = 0;
	}
	return put(p, n, old);
}

/* from_pod for what the short way does not take. */
static __noinline __cold int long_from_pod(struct __sk_buff *skb)
{
	const __u32 need = sizeof(struct ethhdr) + sizeof(struct iphdr);
	__u32 ifindex = skb->ifindex, reason, peer;
	struct iface *ep = 0, *other;
	struct packet *p = packet_new();
	struct conn *c = 0, *made;
	__u64 g = 0;
	bool plain = false;
	struct addr src ADDR_ALIGNED;
	struct ethhdr *eth;
	struct iphdr *ip;
	struct eni *eni;
	__be16 proto;
	int v6 = 0;

	if (!p)
		return drop(skb, ifindex, DROP_UNKNOWN_INTERFACE);
	/* Of a flow that is there its entry tells whose the packet is. */
	if (skb->protocol == bpf_htons(ETH_P_IP) && read_plain(skb, p)) {
		plain = true;
		c = conn_find_gates(&p->key, &g);
		if (c)
			ep = pod_at(c, p->end, ifindex);
	}
	if (!c)
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
	if (proto == bpf_htons(ETH_P_IPV6)) {
		if (!ipv6_allowed)
			return drop(skb, ifindex, DROP_IPV6);
		v6 = 1;
	} else if (proto != bpf_htons(ETH_P_IP)) {
		return drop(skb, ifindex, DROP_ETHERTYPE);
	}

	if (!v6) {
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
	}
	if (v6) {
		/* Not the tuple's: an ICMP error's is that of the flow it is about. */
		if (bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, saddr), &src, sizeof(src)))
			return drop(skb, ifindex, DROP_MALFORMED);
		if (!same_addr(&src, &ep->addr))
			return drop(skb, ifindex, DROP_SOURCE_ADDRESS);
	}
	if (!plain) {
		reason = read_other(skb, p, v6, 1);
		if (reason)
			return drop(skb, ifindex, reason);
		c = find(skb, p, v6);
		if (c && !gates_of(c, &p->key, &g))
			c = 0;
	}
	if (!c || stale(c, g, p, p->end, ifindex)) {
		reason = begin_from_pod(skb, p, ep, c);
		c = conn_find(&p->key);
		made = conn_made();
		if (reason || !c || !made)
			return drop_packet(skb, ifindex, reason ? reason : DROP_CONNTRACK_FULL, p);
		g = read_gates(made);
		if (GATES_PROVENANCE(g) == PROVENANCE_DIRECT)
			tell_allowed(skb, p, made, POLICY_EGRESS);
	}
	if (!c->ifindex[p->end & 1])
		c->ifindex[p->end & 1] = ifindex;
	if (!(c->seen & (CONN_SENDER << (p->end & 1))))
		c->seen |= CONN_SENDER << (p->end & 1);
	conn_see(c, p, true);
	if (c->generation && c->generation != policy_now())
		renew(c, p, &g);
	if (GATES_FLAGS(g) & CONN_DENIED)
		return drop_packet(skb, ifindex, refused_by(g), p);

	count_traffic(ep, p, true);
	if (direct_enabled && GATES_PROVENANCE(g) == PROVENANCE_DIRECT) {
		if (GATES_FLAGS(g) & CONN_LOCAL) {
			peer = c->ifindex[1 - (p->end & 1)];
			other = pod_at(c, 1 - p->end, peer);
			if (other && (other->flags & IFACE_READY) && same_addr(&other->addr, &p->tuple.dst) &&
			    !must_take_stack(skb, p, peer) &&
			    lower_ttl(skb)) {
				count(PATH_DIRECT);
				return enter_pod(skb, p, peer, other);
			}
		} else {
			eni = eni_of(ep);
			if (eni && (eni->flags & ENI_DIRECT) && !must_take_stack(skb, p, eni->ifindex) &&
			    lower_ttl(skb)) {
				count(PATH_DIRECT);
				return leave_by_eni(skb, p, ep, eni);
			}
		}
		count(PATH_EXCEPTION);
	} else {
		count(PATH_STACK);
	}
	skb->mark = (skb->mark & ~NODE_MARK_MASK) | (ep->mark & NODE_MARK_MASK);
	return pass(skb, ep, ep->slot);
}

#include "node_stack.h"

SEC("tc")
int to_pod(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex, reason, slot = skb->tc_index, from;
	struct packet *p = packet_new();
	struct iface *ep;
	int v6 = 0;

	ep = bpf_map_lookup_elem(&ifaces, &ifindex);
	if (!ep || !p)
		return drop(skb, ifindex, DROP_UNKNOWN_INTERFACE);
	if (!(ep->flags & IFACE_READY))
		return drop(skb, ifindex, DROP_NOT_READY);

	/* The pod must not see which ENI a packet came by, nor find the bits
	 * taken by somebody inside it who uses marks. */
	skb->mark &= ~NODE_MARK_MASK;
	skb->tc_index = 0;

	if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		if (!ipv6_allowed)
			return drop(skb, ifindex, DROP_IPV6);
		v6 = 1;
	}
	if (v6 || skb->protocol == bpf_htons(ETH_P_IP)) {
		reason = read_packet(skb, p, v6);
		if (reason)
			return drop(skb, ifindex, reason);
		from = origin_of(slot, &p->tuple.src);
		if (slot && from)
			p->flags |= PACKET_HERE;
		if (p->flags & PACKET_ERROR)
			find(skb, p, v6);
		reason = out_of_stack(skb, p, from, ifindex);
		if (reason)
			return drop_packet(skb, ifindex, reason, p);
		if (!from)
			count(PATH_STACK);
	} else {
		p->packets = 1;
		p->bytes = skb->len - ETH_HLEN;
	}

	count_traffic(ep, p, false);
	return pass(skb, ep, 0);
}

SEC("tc")
int to_eni(struct __sk_buff *skb)
{
	__u32 slot = skb->tc_index, reason, from;
	struct packet *p;
	struct addr src ADDR_ALIGNED;
	__be32 saddr;

	skb->tc_index = 0;
	if (slot == TC_DIRECT)
		return TC_ACT_UNSPEC;
	p = packet_new();
	if (!p)
		return TC_ACT_UNSPEC;
	if (skb->protocol != bpf_htons(ETH_P_IP) ||
	    bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct iphdr, saddr), &saddr, sizeof(saddr)))
		return TC_ACT_UNSPEC;
	map_v4(&src, saddr);
	from = origin_of(slot, &src);
	if (!from)
		return TC_ACT_UNSPEC; /* the node's own */

	reason = read_packet(skb, p, 0);
	if (!reason && (p->flags & PACKET_ERROR))
		find(skb, p, 0);
	if (!reason)
		reason = out_of_stack(skb, p, from, 0);
	if (reason)
		return drop_packet(skb, from, reason, p);
	return TC_ACT_UNSPEC;
}

/* Enters a flow that begins with a packet from the VPC to a pod here. It returns 0,
 * the reason to drop, or -1 if the stack must say what becomes of the packet. */
__noinline __cold int begin_from_eni(struct __sk_buff *skb, struct packet *p, struct conn *old)
{
	__u32 me, to;
	struct iface *pod;
	struct eni *eni;
	struct conn *n;
	int reason;

	if (!p)
		return -1;
	me = 1 - (p->end & 1);
	to = local_pod(&p->tuple.dst);
	if (!to)
		return -1;
	pod = bpf_map_lookup_elem(&ifaces, &to);
	if (!pod || !(pod->flags & IFACE_READY) || (pod->flags & IFACE_STACK))
		return -1;
	eni = eni_of(pod);
	if (!eni || !(eni->flags & ENI_DIRECT) || eni->ifindex != skb->ifindex ||
	    !plain_opening(skb, p) || !in_vpc(&p->tuple.src) || ask_fib(skb, &p->tuple, 0) != to)
		return -1;
	n = conn_new(p, PROVENANCE_DIRECT);
	if (!n)
		return -1;
	n->ifindex[me] = to;
	n->slot[me] = n->share = pod->slot;
	n->eni_ifindex = eni->ifindex;
	reason = judge(n, &p->tuple, me, POLICY_INGRESS, pod->flags & IFACE_GROUPS ? BOTH_GATES : NETPOL);
	if (reason)
		n->gates.flags |= CONN_DENIED;
	return put(p, n, old);
}

/* from_eni for what the short way does not take. */
static __noinline __cold int long_from_eni(struct __sk_buff *skb)
{
	__u32 to, me;
	struct packet *p = packet_new();
	struct conn *c, *made;
	__u64 g = 0;
	struct iface *pod;
	int reason;

	/* What another node, or another namespace of this machine, left there. */
	skb->tc_index = 0;
	if (skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present || !p)
		return TC_ACT_UNSPEC;
	/* What cannot be read, the stack drops, or to_pod. */
	if (!read_plain(skb, p) && read_other(skb, p, 0, 1))
		return TC_ACT_UNSPEC;
	c = conn_find_gates(&p->key, &g);
	me = 1 - (p->end & 1);
	if (!c || stale(c, g, p, 0, 0)) {
		if (p->flags & PACKET_ERROR)
			return TC_ACT_UNSPEC;
		reason = begin_from_eni(skb, p, c);
		if (reason < 0)
			return TC_ACT_UNSPEC;
		c = conn_find(&p->key);
		made = conn_made();
		if (reason || !c || !made)
			return drop_packet(skb, local_pod(&p->tuple.dst), reason ? reason : DROP_CONNTRACK_FULL, p);
		g = read_gates(made);
		tell_allowed(skb, p, made, POLICY_INGRESS);
	}
	if (GATES_PROVENANCE(g) != PROVENANCE_DIRECT || !direct_enabled || (GATES_FLAGS(g) & CONN_LOCAL)) {
		conn_see(c, p, false);
		return TC_ACT_UNSPEC;
	}
	to = c->ifindex[me & 1];
	if (!to || !(pod = pod_at(c, me, to)))
		/* Of a pod here, by way of the wire, or of a pod that is gone: the
		 * stack finds whose the address is now. */
		return TC_ACT_UNSPEC;
	if (!(pod->flags & IFACE_READY) || !same_addr(&pod->addr, &p->tuple.dst) || must_take_stack(skb, p, to)) {
		count(PATH_EXCEPTION);
		return TC_ACT_UNSPEC;
	}
	conn_see(c, p, !(c->seen & (CONN_SENDER << (p->end & 1))));
	if (c->generation && c->generation != policy_now())
		renew(c, p, &g);
	if (GATES_FLAGS(g) & CONN_DENIED)
		return drop_packet(skb, to, refused_by(g), p);
	if (!lower_ttl(skb))
		return TC_ACT_UNSPEC;
	count(PATH_DIRECT);
	return enter_pod(skb, p, to, pod);
}

#include "node_short.h"

SEC("tc")
int from_pod(struct __sk_buff *skb)
{
	int done = short_from_pod(skb);

	return done == LONG_WAY ? long_from_pod(skb) : done;
}

SEC("tc")
int from_eni(struct __sk_buff *skb)
{
	int done = short_from_eni(skb);

	return done == LONG_WAY ? long_from_eni(skb) : done;
}

char _license[] SEC("license") = "Dual BSD/GPL";
