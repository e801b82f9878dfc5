/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Services that the fabric's own stack answers for the VPC: IMDS, the EC2
 * endpoint, and the VPC's resolver. What goes there passes no route, group or
 * ACL, but has a budget: AWS carries 1,024 packets per second and interface to
 * its link-local services, all of them together (VPC user guide, "Amazon DNS
 * server", DNS quotas).
 */

/* Packets per second of an ENI to link-local services; 0: no bound. */
volatile const __u32 linklocal_pps = 1024;

#define IMDS_ADDR bpf_htonl(0xa9fea9fe) /* 169.254.169.254 */
#define RESOLVER_ADDR bpf_htonl(0xa9fea9fd) /* 169.254.169.253 */
#define NTP_ADDR bpf_htonl(0xa9fea97b) /* 169.254.169.123 */
#define ENDPOINT_ADDR bpf_htonl(0xa9feab18) /* 169.254.171.24, no service of AWS's */
/*
 * 169.254.169.252 stands in the fabric's stack for every VPC's own resolver
 * address, which would be another host's in the next VPC. No guest reaches it
 * by this one.
 */
#define RESOLVER_ALIAS bpf_htonl(0xa9fea9fc)

/*
 * What an ENI may still send, in ns of its budget: a packet costs
 * 1 s / linklocal_pps, and a second's worth can be saved. That a budget is a
 * bucket of a second's size is inference.
 */
struct bucket {
	struct bpf_spin_lock lock;
	__u32 pad;
	__u64 filled; /* when, ns of the monotonic clock */
	__u64 credit;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, __u32); /* ifindex of a fabric end */
	__type(value, struct bucket);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} buckets SEC(".maps");

/* Whether a packet to ip is one to the ENI's resolver. */
static __always_inline int is_resolver(const struct eni *self, __be32 ip)
{
	return self->resolver && (ip == self->resolver || ip == RESOLVER_ADDR);
}

/* What the fabric's stack answers. The resolver is silent to a ping, as AWS's is. */
static __always_inline int is_service(const struct eni *self, __be32 ip, __u8 protocol)
{
	return ip == IMDS_ADDR || ip == ENDPOINT_ADDR ||
	       (is_resolver(self, ip) && (protocol == IPPROTO_UDP || protocol == IPPROTO_TCP));
}

/* within_allowance takes the cost of packets to ip out of the ENI's budget. */
static __always_inline int within_allowance(__u32 ifindex, const struct eni *self, __be32 ip,
					    __u64 packets)
{
	struct bucket full = {};
	__u64 now, cost;
	struct bucket *b;
	int ok = 0;

	if (!linklocal_pps || !(ip == IMDS_ADDR || ip == NTP_ADDR || ip == RESOLVER_ADDR ||
				(self->resolver && ip == self->resolver)))
		return 1;
	b = bpf_map_lookup_elem(&buckets, &ifindex);
	if (!b) { /* as one that was filled when the machine started */
		bpf_map_update_elem(&buckets, &ifindex, &full, BPF_NOEXIST);
		b = bpf_map_lookup_elem(&buckets, &ifindex);
		if (!b)
			return 1;
	}
	now = now_ns();
	cost = packets * (NSEC_PER_SEC / linklocal_pps);
	bpf_spin_lock(&b->lock);
	if (now > b->filled) {
		b->credit += now - b->filled;
		b->filled = now;
	}
	if (b->credit > NSEC_PER_SEC)
		b->credit = NSEC_PER_SEC;
	if (b->credit >= cost) {
		b->credit -= cost;
		ok = 1;
	}
	bpf_spin_unlock(&b->lock);
	return ok;
}

/*
 * readdress writes another address to the IPv4 header, at offset field of it,
 * and mends the checksums. Pointers into the frame are void afterwards.
 */
static __always_inline int readdress(struct __sk_buff *skb, const struct iphdr *iph, __u32 field,
				     __be32 from, __be32 to)
{
	__u32 transport = ETH_HLEN + iph->ihl * 4;
	__u8 protocol = iph->protocol;
	int first = !(iph->frag_off & bpf_htons(0x1fff));

	if (bpf_l3_csum_replace(skb, ETH_HLEN + offsetof(struct iphdr, check), from, to, 4) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN + field, &to, 4, 0))
		return -1;
	if (!first)
		return 0;
	if (protocol == IPPROTO_TCP)
		return bpf_l4_csum_replace(skb, transport + 16, from, to, BPF_F_PSEUDO_HDR | 4);
	return bpf_l4_csum_replace(skb, transport + 6, from, to,
				   BPF_F_PSEUDO_HDR | BPF_F_MARK_MANGLED_0 | 4);
}

/* from_guest_service hands the fabric's stack what a guest sends to a service. */
static __always_inline int from_guest_service(struct __sk_buff *skb, const struct eni *self,
					      const struct iphdr *iph)
{
	__u32 ifindex = skb->ifindex;

	bpf_skb_change_type(skb, PACKET_HOST);
	if (self->resolver && iph->daddr == self->resolver &&
	    readdress(skb, iph, offsetof(struct iphdr, daddr), self->resolver, RESOLVER_ALIAS))
		return drop(ifindex, DROP_MALFORMED);
	return TCX_PASS;
}
