/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Direct forwarding (D6): which flows may bypass the kernel's stack, and how
 * their packets go on.
 *
 * A flow may if its first packet would leave the stack as it came, by the same
 * device: the stack's own tables and its conntrack are asked, once per flow.
 *
 * Needs node_route.h.
 */

#define MAX_NETS	1024

enum eni_flag {
	ENI_DIRECT = 1,		/* from_eni and to_eni stand on it */
};

/* An ENI by its index; 0 is none's. */
struct eni {
	__u32 ifindex;		/* 0: there is no such ENI */
	__be32 gateway;
	__be32 subnet;
	__be32 mask;		/* of the subnet */
	__u32 flags;		/* enum eni_flag */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_ENIS);
	__type(key, __u32);
	__type(value, struct eni);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} enis SEC(".maps");

struct net_key {
	__u32 bits;		/* of the prefix, of 128 */
	struct addr addr;
};

enum net_flag {
	NET_DIRECT = 1,		/* the VPC's own: flows to and from it may bypass the stack */
};

/* Networks by prefix: the VPC's, and within them those which only the stack knows
 * what to do with, as addresses of services. The longest prefix counts. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, MAX_NETS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct net_key);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} nets SEC(".maps");

/* Of a packet that our programs send out by an ENI, for to_eni: it was looked at
 * already. A packet without it is looked up, and finds the same. */
#define TC_DIRECT	0x756c

/* The kernel's conntrack (net/netfilter/nf_conntrack_bpf.c, Linux 6.0). */
struct bpf_ct_opts {
	__s32 netns_id;
	__s32 error;
	__u8 l4proto;
	__u8 dir;
	__u16 zone_id;
	__u8 zone_dir;
	__u8 reserved[3];
};

struct nf_conn {
	unsigned long status;
} __attribute__((preserve_access_index));

extern struct nf_conn *bpf_skb_ct_lookup(struct __sk_buff *, struct bpf_sock_tuple *, __u32,
					 struct bpf_ct_opts *, __u32) __ksym __weak;
extern void bpf_ct_release(struct nf_conn *) __ksym __weak;

/* Of include/uapi/linux/netfilter/nf_conntrack_common.h. */
#define CT_CONFIRMED	(1 << 3)
#define CT_NAT		(1 << 4 | 1 << 5)

#define PACKET_HOST	0	/* linux/if_packet.h: sent to this device's MAC */

enum ct_answer {
	CT_UNKNOWN = 0,		/* the kernel knows of no such connection */
	CT_KNOWN,		/* it does, and translates nothing */
	CT_TRANSLATED,
	CT_NO_ANSWER,		/* it cannot be asked for this protocol */
};

enum ct_ask {
	CT_BACK = 1,		/* for the tuple of the packet in reply */
	CT_BEGAN = 2,		/* only if the connection began in that direction */
};

/* Asks the kernel's conntrack for a packet's tuple; how is of enum ct_ask. */
__noinline int ask_ct(struct __sk_buff *skb, const struct tuple *t, int how)
{
	int back = how & CT_BACK;
	struct bpf_sock_tuple tuple = {};
	struct bpf_ct_opts opts = { .netns_id = -1 };
	struct nf_conn *ct;
	unsigned long status;
	__be32 src, dst;

	if (!t)
		return CT_NO_ANSWER;
	opts.l4proto = t->protocol;
	if (!bpf_ct_release || !bpf_skb_ct_lookup ||
	    (t->protocol != IPPROTO_TCP && t->protocol != IPPROTO_UDP))
		return CT_NO_ANSWER;
	src = v4_of(&t->src);
	dst = v4_of(&t->dst);
	tuple.ipv4.saddr = back ? dst : src;
	tuple.ipv4.daddr = back ? src : dst;
	tuple.ipv4.sport = bpf_htons(back ? t->dport : t->sport);
	tuple.ipv4.dport = bpf_htons(back ? t->sport : t->dport);
	ct = bpf_skb_ct_lookup(skb, &tuple, sizeof(tuple.ipv4), &opts, sizeof(opts));
	if (!ct)
		return CT_UNKNOWN;
	status = ct->status;
	bpf_ct_release(ct);
	if ((how & CT_BEGAN) && opts.dir) /* 0: IP_CT_DIR_ORIGINAL */
		return CT_UNKNOWN;
	return status & CT_NAT ? CT_TRANSLATED : CT_KNOWN;
}

/* The host veth of the pod here that has the address; 0 if none has. */
static __always_inline __u32 local_pod(const struct addr *a)
{
	struct endpoint *e = bpf_map_lookup_elem(&endpoints, a);

	return e && e->state != ENDPOINT_TOMBSTONE ? e->host_ifindex : 0;
}

static __always_inline bool in_vpc(const struct addr *a)
{
	const half_word *words = (const void *)a;
	struct {
		__u32 bits;
		__u32 addr[4];
	} k = { 128, { words[0], words[1], words[2], words[3] } }; /* struct net_key by words */
	__u32 *flags = bpf_map_lookup_elem(&nets, &k);

	return flags && (*flags & NET_DIRECT);
}

/* Whether a packet can be the first of a flow that bypasses the stack: it is one
 * which the stack would only route. */
__noinline int plain_opening(struct __sk_buff *skb, const struct packet *p)
{
	const struct tuple *t;
	int known;

	if (!p)
		return 0;
	t = &p->tuple;
	if (!direct_enabled || !(p->flags & PACKET_OPENS) || p->ttl <= 1 ||
	    (p->flags & (PACKET_FRAGMENT | PACKET_OPTIONS | PACKET_ERROR | PACKET_SHORT | PACKET_IPV6)) ||
	    skb->pkt_type != PACKET_HOST)
		return 0;
	if (t->protocol != IPPROTO_TCP && t->protocol != IPPROTO_UDP && t->query != QUERY_REQUEST)
		return 0;
	known = ask_ct(skb, t, 0);
	if (known == CT_NO_ANSWER)
		return t->query == QUERY_REQUEST;
	return known == CT_UNKNOWN;
}

/* Whether a packet is longer than a device takes. */
static __always_inline bool too_long(struct __sk_buff *skb, __u32 ifindex)
{
	__u32 mtu = 0;

	/* No MTU is below 68 (RFC 791), and hardly one below 576. */
	if (skb->len <= 576 + ETH_HLEN && !skb->gso_size)
		return false;
	return bpf_check_mtu(skb, ifindex, &mtu, 0, skb->gso_size ? BPF_MTU_CHK_SEGS : 0) != 0;
}

/* Whether a packet is one that the stack must answer or drop. */
static __always_inline bool for_stack(struct __sk_buff *skb, const struct packet *p)
{
	return p->ttl <= 1 || (p->flags & (PACKET_OPTIONS | PACKET_SHORT)) || skb->pkt_type != PACKET_HOST;
}

/* Whether a packet of a direct flow must go to the stack all the same, which
 * answers it or cuts it up. */
static __always_inline bool must_take_stack(struct __sk_buff *skb, const struct packet *p, __u32 ifindex)
{
	return for_stack(skb, p) || too_long(skb, ifindex);
}

/* Lowers the TTL, as the stack does, of a packet whose header lies where programs write. */
static __always_inline bool lower_ttl_here(struct __sk_buff *skb)
{
	struct iphdr *ip = (void *)(long)skb->data + sizeof(struct ethhdr);
	__u32 sum;

	if ((void *)(ip + 1) > (void *)(long)skb->data_end)
		return false;
	sum = (__u32)ip->check + bpf_htons(0x0100); /* RFC 1141 */
	ip->check = sum + (sum >= 0xffff);
	ip->ttl--;
	return true;
}

static __always_inline bool lower_ttl(struct __sk_buff *skb)
{
	return readable(skb, sizeof(struct ethhdr) + sizeof(struct iphdr)) && lower_ttl_here(skb);
}

/* How long an answer is good. */
#define ROUTER_NS	100000000ULL

/* Asks the kernel how it would frame a packet that leaves by an ENI. */
__noinline __cold int ask_router(struct __sk_buff *skb, const struct tuple *t, __u32 mark, const struct eni *eni,
			  struct router *r)
{
	struct bpf_fib_lookup fib;
	__u32 mtu = 0;

	if (!t || !eni || !r)
		return 0;
	r->ifindex = eni->ifindex;
	r->mtu = bpf_check_mtu(skb, eni->ifindex, &mtu, 0, 0) < 0 ? 0 : mtu;
	r->known = !lookup_fib(skb, &fib, t, mark, 0) && fib.ifindex == eni->ifindex &&
		   fib.ipv4_dst == eni->gateway && (eni->flags & ENI_DIRECT);
	copy_mac(r->mac, fib.dmac);
	copy_mac(r->own, fib.smac);
	return 0;
}

/* Sends a packet to a router that is known. */
static __always_inline int leave_by_router(struct __sk_buff *skb, const struct router *r)
{
	struct ethhdr *eth = (void *)(long)skb->data;

	if ((void *)(eth + 1) > (void *)(long)skb->data_end)
		return TC_ACT_SHOT;
	copy_mac(eth->h_dest, r->mac);
	copy_mac(eth->h_source, r->own);
	skb->tc_index = TC_DIRECT;
	return bpf_redirect(r->ifindex, 0);
}

/*
 * Sends a packet out by an ENI, to its router. The packet that asks for the router's
 * MAC goes by the kernel's neighbour all the same: so that stays in use, is probed,
 * and is looked for when it is gone. The others are spared it, some 80 ns.
 */
static __always_inline int leave_by_eni(struct __sk_buff *skb, const struct packet *p, const struct iface *pod,
					const struct eni *eni)
{
	struct bpf_redir_neigh to = { .nh_family = 2 /* AF_INET */, .ipv4_nh = eni->gateway };
	struct cpu *cpu = this_cpu();
	struct router *r;

	if (!cpu)
		return TC_ACT_SHOT;
	r = router_of(cpu, pod->eni);
	if (r->ifindex != eni->ifindex || p->now - r->asked_ns >= ROUTER_NS) {
		r->asked_ns = p->now;
		ask_router(skb, &p->tuple, pod->mark, eni, r);
	} else if (r->known) {
		return leave_by_router(skb, r);
	}
	skb->tc_index = TC_DIRECT;
	return bpf_redirect_neigh(eni->ifindex, &to, sizeof(to), 0);
}

/* Puts a packet into a pod here, without a detour by its host veth. */
static __always_inline int enter_pod(struct __sk_buff *skb, const struct packet *p, __u32 ifindex,
					  const struct iface *pod)
{
	struct ethhdr *eth = (void *)(long)skb->data;

	if ((void *)(eth + 1) > (void *)(long)skb->data_end)
		return TC_ACT_SHOT;
	copy_mac(eth->h_dest, pod->pod_mac);
	copy_mac(eth->h_source, pod->host_mac);
	skb->mark = 0;
	skb->tc_index = 0;
	count_traffic(pod, p, false);
	return bpf_redirect_peer(ifindex, 0);
}
