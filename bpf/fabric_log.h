/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Flow records: what passed an ENI or was refused there, by the interval. The
 * sender's ENI has a record of what it sends (egress), the receiver's of what
 * it gets (ingress), each with its own verdict.
 *
 * An interval's records are one inner map. User space puts an empty one in its
 * place; when that system call returns, no program writes to the old one.
 */

/* Who refused. */
enum verdict {
	VERDICT_ACCEPT,
	VERDICT_GROUPS, /* a security group */
	VERDICT_ACL, /* a network ACL */
};

/* The way of what is sent, by AWS's numbers (VPC user guide, field traffic-path). */
enum traffic_path {
	PATH_NONE, /* ingress, or refused */
	PATH_VPC = 1, /* another resource in the VPC */
	PATH_PEERING = 4, /* within the region */
	PATH_IGW = 8, /* of a Nitro instance */
};

struct record_key {
	__u32 ifindex; /* fabric end; 0: the entry that is about the interval */
	__be32 saddr;
	__be32 daddr;
	__u16 sport; /* 0 unless TCP or UDP */
	__u16 dport;
	__u8 protocol;
	__u8 direction;
	__u8 verdict;
	__u8 path;
};

/* Of the entry about the interval: packets is its number, bytes how many records it has. */
struct record {
	__u64 packets; /* as on the wire */
	__u64 bytes; /* IP lengths */
	__u64 first; /* ns of the monotonic clock */
	__u64 last;
	__u8 fin; /* TCP flags seen; of their own each, so that no CPU undoes another's */
	__u8 syn;
	__u8 rst;
	__u8 syn_ack;
	__u32 pad;
};

struct record_map {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__uint(key_size, sizeof(struct record_key));
	__uint(value_size, sizeof(struct record));
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__array(values, struct record_map);
} records SEC(".maps");

/* What could not be recorded: the interval's map is full, or memory is short. */
struct skip_key {
	__u64 interval;
	__u32 ifindex;
	__u8 direction;
	__u8 refused;
	__u8 pad[2];
};

struct skip {
	__u64 packets;
	__u64 bytes;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, struct skip_key);
	__type(value, struct skip);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} skips SEC(".maps");

/* What records say of an ENI, also when it is gone. The programs do not read it. */
struct logged {
	char eni[32]; /* "eni-…" */
	char subnet[32];
	char vpc[32];
	char instance[32]; /* "": of a managed service */
	char zone[32];
	__be32 primary;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32); /* ifindex of a fabric end, never used a second time */
	__type(value, struct logged);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} logged_enis SEC(".maps");

/* These show the types to bpf2go. */
struct record_key *shown_record_key __attribute__((unused));
struct record *shown_record __attribute__((unused));
volatile const enum verdict verdicts = VERDICT_ACL;
volatile const enum traffic_path traffic_paths = PATH_IGW;

/* not_recorded counts a packet that is in no record: with the interval, and for good. */
static __noinline int not_recorded(void *interval, const struct record_key *of, const struct packet *p)
{
	struct record_key about = {};
	struct skip_key key = {};
	struct skip none = {};
	struct counters *c;
	struct record *r;
	struct skip *s;

	r = interval ? bpf_map_lookup_elem(interval, &about) : 0;
	key.interval = r ? r->packets : 0;
	key.ifindex = of->ifindex;
	key.direction = of->direction;
	key.refused = of->verdict != VERDICT_ACCEPT;
	s = bpf_map_lookup_elem(&skips, &key);
	if (!s) {
		bpf_map_update_elem(&skips, &key, &none, BPF_NOEXIST);
		s = bpf_map_lookup_elem(&skips, &key);
	}
	if (s) {
		__sync_fetch_and_add(&s->packets, p->packets);
		__sync_fetch_and_add(&s->bytes, p->bytes);
	}
	c = bpf_map_lookup_elem(&counts, &key.ifindex);
	if (!c || key.refused)
		return 0;
	if (key.direction == EGRESS) {
		c->skipped_tx_packets += p->packets;
		c->skipped_tx_bytes += p->bytes;
	} else {
		c->skipped_rx_packets += p->packets;
		c->skipped_rx_bytes += p->bytes;
	}
	return 0;
}

/* see_flags notes what AWS's field tcp-flags tells: ACK counts with SYN alone. */
static __always_inline void see_flags(struct record *r, __u8 flags)
{
	if ((flags & TCP_FIN) && !r->fin)
		r->fin = 1;
	if ((flags & TCP_RST) && !r->rst)
		r->rst = 1;
	if (!(flags & TCP_SYN))
		return;
	if (!(flags & TCP_ACK))
		r->syn = 1;
	else
		r->syn_ack = 1;
}

/*
 * log_packet records a packet at an ENI, which passes (reason 0) or is refused
 * by a group or an ACL; of what is dropped for another reason there is no
 * record. Not static: so it is verified by itself and once.
 */
__noinline int log_packet(const struct packet *p, __u32 ifindex, __u32 direction, __u32 reason,
			  __u32 path)
{
	struct record_key key = {};
	struct record begun = {};
	struct record *r;
	__u32 zero = 0;
	void *interval;

	if (!p)
		return 0;
	switch (reason) {
	case 0:
		break;
	case DROP_SG_EGRESS:
	case DROP_SG_INGRESS:
		key.verdict = VERDICT_GROUPS;
		break;
	case DROP_ACL_EGRESS:
	case DROP_ACL_INGRESS:
		key.verdict = VERDICT_ACL;
		break;
	default:
		return 0;
	}
	key.ifindex = ifindex;
	key.saddr = p->tuple.saddr;
	key.daddr = p->tuple.daddr;
	key.protocol = p->tuple.protocol;
	if (key.protocol == IPPROTO_TCP || key.protocol == IPPROTO_UDP) {
		key.sport = p->tuple.sport;
		key.dport = p->tuple.dport;
	}
	key.direction = direction;
	if (!reason)
		key.path = path; /* what is refused takes none */
	interval = bpf_map_lookup_elem(&records, &zero);
	if (!interval)
		return not_recorded(0, &key, p);
	r = bpf_map_lookup_elem(interval, &key);
	if (!r) {
		begun.packets = p->packets;
		begun.bytes = p->bytes;
		begun.first = p->now;
		begun.last = p->now;
		see_flags(&begun, p->tcp_flags);
		if (!bpf_map_update_elem(interval, &key, &begun, BPF_NOEXIST)) {
			__builtin_memset(&key, 0, sizeof(key));
			r = bpf_map_lookup_elem(interval, &key);
			if (r)
				__sync_fetch_and_add(&r->bytes, 1);
			return 0;
		}
		/* Another CPU may have been first. */
		r = bpf_map_lookup_elem(interval, &key);
		if (!r)
			return not_recorded(interval, &key, p);
	}
	__sync_fetch_and_add(&r->packets, p->packets);
	__sync_fetch_and_add(&r->bytes, p->bytes);
	if (r->last < p->now)
		r->last = p->now;
	if (p->tcp_flags & (TCP_FIN | TCP_SYN | TCP_RST))
		see_flags(r, p->tcp_flags);
	return 0;
}
