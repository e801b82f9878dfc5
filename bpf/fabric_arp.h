/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * ARP is answered as the VPC does: for the router, for addresses that other
 * ENIs of the subnet hold, and for link-local ones (by the router). It never
 * reaches another guest.
 */

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
