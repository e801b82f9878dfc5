/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What is too long for where it goes: refused, and the sender told so, if it
 * must not be fragmented; else cut into fragments.
 *
 * A program cannot make a second packet of one, but it can clone it: each
 * fragment is a clone of the whole that leaves by the stack's side of the
 * receiver's device, where to_guest cuts it. Which one it is stands in the mark.
 */

#define IP_DONT_FRAGMENT 0x4000

/* The mark of a clone to be cut: the MTU in bits 16 to 29, the fragment's number below. */
#define CUT 0x80000000u
#define CUT_MTU_SHIFT 16
#define CUT_MTU_MASK 0x3fff

/* 64 KiB in fragments of 1480 bytes, and some. */
#define MOST_FRAGMENTS 48

/*
 * How much of a packet an ICMP error quotes. With its own header it is what
 * bpf_csum_diff takes at once; RFC 1812 asks for as much as fits 576 bytes. Who
 * is too long is longer.
 */
#define QUOTED 504

/* <linux/icmp.h> wants a C library. */
struct icmp_too_big {
	__u8 type;
	__u8 code;
	__sum16 check;
	__be16 unused;
	__be16 mtu;
};

static __always_inline __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/*
 * must_tell says whether a packet that is too long cannot be cut: it must not
 * be (DF), its length is not settled before it leaves the machine (GSO), or it
 * has options, which fragments would have to share out.
 */
static __always_inline int must_tell(struct __sk_buff *skb)
{
	struct iphdr *iph = (void *)(long)skb->data + ETH_HLEN;

	if ((void *)(iph + 1) > (void *)(long)skb->data_end)
		return 1;
	return skb->gso_size || iph->ihl != 5 || (iph->frag_off & bpf_htons(IP_DONT_FRAGMENT));
}

/*
 * checksum_done makes the kernel take the checksum behind the IP header for the
 * sender's own, where it was left to the device (CHECKSUM_PARTIAL): it does when
 * what the checksum begins with is taken away. It is put back then. The frame
 * has no GSO, and IP_FRONT bytes behind at, where the IP header without options
 * ends.
 */
#define IP_FRONT 40

static __noinline int checksum_done(struct __sk_buff *skb, __u32 at)
{
	__u8 front[IP_FRONT];

	return bpf_skb_load_bytes(skb, at, front, sizeof(front)) ||
	       bpf_skb_adjust_room(skb, -IP_FRONT, BPF_ADJ_ROOM_NET, 0) ||
	       bpf_skb_adjust_room(skb, IP_FRONT, BPF_ADJ_ROOM_NET, 0) ||
	       bpf_skb_store_bytes(skb, at, front, sizeof(front), 0);
}

/* What bpf_csum_diff takes at once. */
struct piece {
	__u8 bytes[512];
};

/* Where pieces are read to: more than the stack holds. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct piece);
} pieces SEC(".maps");

struct summing {
	struct __sk_buff *skb;
	__u32 sum;
	__u32 length; /* of the frame */
};

static long add_piece(__u64 i, struct summing *s)
{
	__u32 zero = 0, at = ETH_HLEN + sizeof(struct iphdr) + i * sizeof(struct piece);
	struct piece *p = bpf_map_lookup_elem(&pieces, &zero);
	__u64 n;

	if (!p || at >= s->length)
		return 1;
	n = s->length - at;
	if (n >= sizeof(*p)) {
		n = sizeof(*p);
	} else {
		__builtin_memset(p, 0, sizeof(*p));
	}
	asm volatile("" : "+r"(n)); /* the verifier must see the check that clang knows to hold */
	if (!n || n > sizeof(*p) || bpf_skb_load_bytes(s->skb, at, p, n))
		return 1;
	s->sum = bpf_csum_diff(0, 0, (__be32 *)p, sizeof(*p), s->sum);
	return 0;
}

/*
 * complete_checksum does what a device would before it cut a datagram: a
 * checksum that was left to it is that of the pseudo header alone. iph has no
 * options.
 */
static __noinline int complete_checksum(struct __sk_buff *skb)
{
	struct iphdr *iph = (void *)(long)skb->data + ETH_HLEN;
	__u32 pseudo[3], at, l4 = ETH_HLEN + sizeof(*iph);
	struct summing s = {.skb = skb, .length = skb->len};
	__u16 have, sum;

	if ((void *)(iph + 1) > (void *)(long)skb->data_end)
		return -1;
	if (iph->frag_off & bpf_htons(IP_OFFSET | IP_MORE_FRAGMENTS))
		return 0; /* those have it */
	if (iph->protocol != IPPROTO_TCP && iph->protocol != IPPROTO_UDP)
		return 0;
	at = l4 + (iph->protocol == IPPROTO_TCP ? 16 : 6);
	pseudo[0] = iph->saddr;
	pseudo[1] = iph->daddr;
	pseudo[2] = bpf_htonl((__u32)iph->protocol << 16 | (s.length - l4));
	if (bpf_skb_load_bytes(skb, at, &have, sizeof(have)))
		return -1;
	s.sum = bpf_csum_diff(0, 0, pseudo, sizeof(pseudo), 0);
	sum = ~fold(s.sum);
	if (!have || have != sum)
		return 0;
	/* The field holds the pseudo header's sum, which so counts with the rest. */
	s.sum = 0;
	bpf_loop(65536 / sizeof(struct piece), add_piece, &s, 0);
	sum = fold(s.sum);
	if (!sum)
		sum = 0xffff;
	return bpf_skb_store_bytes(skb, at, &sum, sizeof(sum), 0) || checksum_done(skb, l4);
}

/*
 * refuse_length drops a packet of an ENI's guest that is longer than limit, and
 * answers with ICMP "fragmentation needed" from the router of its subnet. It
 * goes to the ENI that sent the frame, which forwards it if it had forwarded the
 * packet. No group and no ACL judges it: the packet has passed both on its way
 * out, so the error belongs to a flow, and it comes from within the subnet.
 */
__noinline int refuse_length(struct __sk_buff *skb, __u32 limit)
{
	__u32 ifindex = skb->ifindex;
	struct icmp_too_big *icmp;
	__be32 sender, router;
	struct iphdr *iph;
	struct eni *self;
	__u8 from[6];

	drop(ifindex, DROP_OVERSIZE);
	self = bpf_map_lookup_elem(&enis, &ifindex);
	if (!self)
		return TCX_DROP;
	iph = (void *)(long)skb->data + ETH_HLEN;
	if ((void *)(iph + 1) > (void *)(long)skb->data_end)
		return TCX_DROP;
	/* No error about an ICMP error, nor about a later fragment (RFC 1122, 3.2.2). */
	if (iph->frag_off & bpf_htons(IP_OFFSET))
		return TCX_DROP;
	if (iph->protocol == IPPROTO_ICMP) {
		__u8 type;

		if (bpf_skb_load_bytes(skb, ETH_HLEN + iph->ihl * 4, &type, 1) ||
		    (type != 8 && type != 0 && type < 13))
			return TCX_DROP;
	}
	sender = iph->saddr;
	router = self->subnet + bpf_htonl(1);
	if (skb->len < ETH_HLEN + QUOTED || bpf_skb_change_tail(skb, ETH_HLEN + QUOTED, 0) ||
	    checksum_done(skb, ETH_HLEN + sizeof(*iph)) ||
	    bpf_skb_adjust_room(skb, sizeof(*iph) + sizeof(*icmp), BPF_ADJ_ROOM_MAC, 0) ||
	    bpf_skb_pull_data(skb, ETH_HLEN + sizeof(*iph) + sizeof(*icmp) + QUOTED))
		return TCX_DROP;
	load_router_mac(from);
	if (address_frame(skb, self->mac, from))
		return TCX_DROP;
	iph = (void *)(long)skb->data + ETH_HLEN;
	icmp = (void *)(iph + 1);
	if ((void *)icmp + sizeof(*icmp) + QUOTED > (void *)(long)skb->data_end)
		return TCX_DROP;
	__builtin_memset(iph, 0, sizeof(*iph));
	iph->version = 4;
	iph->ihl = 5;
	iph->tos = 0xc0; /* internetwork control, as RFC 1812 (4.3.2.5) would have it */
	iph->tot_len = bpf_htons(sizeof(*iph) + sizeof(*icmp) + QUOTED);
	iph->ttl = 64;
	iph->protocol = IPPROTO_ICMP;
	iph->saddr = router;
	iph->daddr = sender;
	iph->check = fold(bpf_csum_diff(0, 0, (__be32 *)iph, sizeof(*iph), 0));
	icmp->type = 3; /* destination unreachable */
	icmp->code = 4; /* fragmentation needed and DF set */
	icmp->check = 0;
	icmp->unused = 0;
	icmp->mtu = bpf_htons(limit); /* RFC 1191 */
	icmp->check = fold(bpf_csum_diff(0, 0, (__be32 *)icmp, sizeof(*icmp) + QUOTED, 0));
	count_received(ifindex, 1, sizeof(*iph) + sizeof(*icmp) + QUOTED);
	count_exempt(ifindex, INGRESS, 1, sizeof(*iph) + sizeof(*icmp) + QUOTED);
	return hand_over(skb, ifindex);
}

/* count_cut makes a packet's size that of the fragments that send_cut makes of it. */
static __always_inline void count_cut(struct packet *p, __u32 limit)
{
	__u32 length = p->bytes - sizeof(struct iphdr);
	__u32 chunk = (limit - sizeof(struct iphdr)) & ~7u;

	p->packets = (length + chunk - 1) / chunk;
	p->bytes = length + p->packets * sizeof(struct iphdr);
}

/*
 * send_cut sends a frame that must_tell allows to cut, addressed already, in
 * fragments of at most limit bytes. Each begins at a multiple of 8 (RFC 791).
 */
__noinline int send_cut(struct __sk_buff *skb, __u32 ifindex, __u32 limit)
{
	__u32 length = skb->len - ETH_HLEN - sizeof(struct iphdr);
	__u32 chunk = (limit - sizeof(struct iphdr)) & ~7u;
	__u32 packets = 0;

	if (complete_checksum(skb))
		return drop(skb->ifindex, DROP_MALFORMED);
	for (__u32 i = 0; i < MOST_FRAGMENTS; i++) {
		if (i * chunk >= length)
			break;
		skb->mark = CUT | (limit & CUT_MTU_MASK) << CUT_MTU_SHIFT | i;
		if (!bpf_clone_redirect(skb, ifindex, 0))
			packets++;
	}
	count_received(ifindex, packets, length + packets * sizeof(struct iphdr));
	return TCX_DROP; /* the whole; its clones are on their way */
}

/* deliver_cut hands a frame to the guest behind t in fragments. */
static __always_inline int deliver_cut(struct __sk_buff *skb, const struct target *t,
				       const __u8 *source, __u32 limit)
{
	if (address_frame(skb, t->mac, source))
		return drop(skb->ifindex, DROP_MALFORMED);
	return send_cut(skb, t->ifindex, limit);
}

/* cut makes a clone the fragment that its mark says. */
__noinline int cut(struct __sk_buff *skb)
{
	__u32 limit = (skb->mark >> CUT_MTU_SHIFT) & CUT_MTU_MASK;
	__u32 start, length, chunk, gone;
	__be16 old_off, old_len, off, len;
	struct iphdr *iph;
	int more;

	if (bpf_skb_pull_data(skb, ETH_HLEN + sizeof(*iph)))
		return TCX_DROP;
	iph = (void *)(long)skb->data + ETH_HLEN;
	if ((void *)(iph + 1) > (void *)(long)skb->data_end)
		return TCX_DROP;
	chunk = (limit - sizeof(*iph)) & ~7u;
	start = (skb->mark & 0xffff) * chunk;
	length = skb->len - ETH_HLEN - sizeof(*iph);
	if (limit < 68 || start >= length)
		return TCX_DROP;
	more = length - start > chunk;
	if (more)
		length = start + chunk;
	old_off = iph->frag_off;
	old_len = iph->tot_len;
	off = bpf_ntohs(old_off);
	off = (off & ~IP_OFFSET) | ((off & IP_OFFSET) + start / 8);
	if (more)
		off |= IP_MORE_FRAGMENTS;
	off = bpf_htons(off);
	len = bpf_htons(sizeof(*iph) + length - start);
	iph->frag_off = off;
	iph->tot_len = len;
	if (bpf_l3_csum_replace(skb, ETH_HLEN + 10, old_off, off, 2) ||
	    bpf_l3_csum_replace(skb, ETH_HLEN + 10, old_len, len, 2) ||
	    bpf_skb_change_tail(skb, ETH_HLEN + sizeof(*iph) + length, 0))
		return TCX_DROP;
	/* The kernel takes away less than 4 KiB at once (bpf_skb_adjust_room). */
	for (int i = 0; i < 20 && start; i++) {
		gone = start > 4000 ? 4000 : start;
		if (bpf_skb_adjust_room(skb, -(__s32)gone, BPF_ADJ_ROOM_NET, 0))
			return TCX_DROP;
		start -= gone;
	}
	skb->mark = 0;
	return TCX_PASS;
}
