/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Connection tracking of the node: one entry for each flow of a pod, as a hook
 * sees its addresses. A connection that netfilter translates is two flows, one
 * on either side of the translation.
 *
 * The key has no direction, so that one look-up finds the flow whoever sends. Of
 * all that the entry keeps by end, index 0 is the key's end 0.
 *
 * Needs node_packet.h.
 */

#define MAX_CONNS	262144
#define MAX_ENIS	32

/* Who forwards a flow, for life (D6). */
enum provenance {
	PROVENANCE_STACK = 1,	/* the kernel's stack, with all that netfilter does */
	PROVENANCE_DIRECT,	/* our programs, from its first packet on */
};

enum conn_state {
	CONN_OPENING = 1,	/* not answered yet, or not acknowledged */
	CONN_ESTABLISHED,	/* UDP: more than one request and response */
	CONN_CLOSED,		/* RST, or a FIN from both ends */
};

/* Bits that packets set as they come, shifted left by the end. Two CPUs may lose
 * one to each other until the next packet, so no verdict is among them. */
enum conn_seen {
	CONN_SEEN = 1,		/* something that this end sent */
	CONN_SENDER = 4,	/* the end is a pod here, and from_pod counts what it sends */
};

enum conn_flag {
	CONN_LOCAL = 16,	/* direct, and both ends are pods here of one subnet */
	CONN_MIDFLOW = 32,	/* its beginning was not seen */
	CONN_DENIED = 64,	/* a gate refuses it: the entry counts, and admits nothing */
	CONN_UNTRACKED = 128,	/* AWS does not track it: it ends with its groups' rules */
};

struct conn_verdict {
	__u32 rule;		/* that decided; 0: the default, or not judged */
	__u32 epoch;		/* of the table that it is in */
};

/*
 * What decides about a flow's packets. It is read at once, and exchanged at once:
 * while a program holds a pointer to an entry, another CPU may judge the flow, or
 * put another entry in its place, and the memory of one that was deleted is the
 * next one's at once (kernel/bpf/memalloc.c), this or another flow's.
 */
struct gates {
	__u8 opener;		/* end */
	__u8 provenance;	/* enum provenance */
	__u8 flags;		/* enum conn_flag */
	__u8 pad;
	__u8 judged[2];		/* by end whose pod was judged: bit g: by gate g */
	__u8 allowed[2];	/* bit g: gate g lets it pass */
} __attribute__((aligned(8)));

/* A flow. Times are CLOCK_MONOTONIC, precise to a tick of the kernel. Packets
 * are those on the wire (a segmentation offload's apart), bytes IP lengths. */
struct conn {
	struct conn_key key;	/* the first that the kernel writes of an entry */
	struct gates gates;
	__u64 created_ns;
	__u64 last_ns;
	__u64 packets[2];	/* by end that sent them */
	__u64 bytes[2];
	__u32 ifindex[2];	/* host veth of the pod that is this end; 0: none here */
	struct conn_verdict verdict[2][GATES]; /* by end whose pod was judged */
	__u32 timeout_s;	/* idle time after which it is over */
	__u32 eni_ifindex;	/* by which it leaves the node; 0: not known */
	__u8 tcp_flags[2];	/* all seen, by end that sent them */
	__u8 audit[2];		/* bit g: only because gate g enforces nothing */
	__u8 state;		/* enum conn_state */
	__u8 seen;		/* enum conn_seen */
	__u16 share;		/* slot of the pod in whose share of the table it is; 0: nobody's */
	__u32 generation;	/* policy_now() when the verdicts were last compared */
	__u16 slot[2];		/* of that pod, as last seen: good while slots agrees */
};

/* Of flows that find no way in their set (node_table.h). Grown by need: 256 bytes of
 * kernel memory an entry. When it is full no flow begins; those that are there go on. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_CONNS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct conn_key);
	__type(value, struct conn);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} conns SEC(".maps");

/* What the datapath counts of itself, by packet. */
enum path_count {
	PATH_DIRECT = 0,	/* forwarded by our programs */
	PATH_STACK,		/* of pods, left to the stack */
	PATH_EXCEPTION,		/* of direct flows, left to the stack: too long, TTL, IP options */
	PATH_BEGUN_DIRECT,	/* flows */
	PATH_BEGUN_STACK,	/* flows */
	PATH_MIDFLOW,		/* flows whose beginning was not seen */
	PATH_EVICTED,		/* flows that were over, removed to make room */
	PATH_NO_ROOM,		/* flows that found none, or none in their pod's share */
	PATH_COUNTS,		/* how many there are */
};

/* Room in the table, so that a new count does not change the layout. */
#define PATH_SLOTS	16

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, PATH_SLOTS);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} paths SEC(".maps");

/* Idle times in seconds. The first three are EC2's ConnectionTrackingSpecification
 * (EC2 user guide, idle connection tracking timeout); AWS publishes the last, and
 * not those between. */
const volatile __u32 tcp_established_timeout = 432000;
const volatile __u32 udp_timeout = 30;
const volatile __u32 udp_stream_timeout = 180;
const volatile __u32 tcp_opening_timeout = 60;
const volatile __u32 tcp_closed_timeout = 10;
const volatile __u32 icmp_timeout = 30;
const volatile __u32 other_timeout = 600;

#define EINVAL	22
#define EEXIST	17

static __always_inline void count(__u32 what)
{
	__u64 *n = bpf_map_lookup_elem(&paths, &what);

	if (n)
		(*n)++;
}

static __always_inline bool same_key(const struct conn_key *a, const struct conn_key *b)
{
	const volatile __u64 *x = (const void *)a;
	const word *y = (const void *)b;

	return !((x[0] ^ y[0]) | (x[1] ^ y[1]) | (x[2] ^ y[2]) | (x[3] ^ y[3]) | (x[4] ^ y[4]));
}

_Static_assert(sizeof(struct conn_key) == 40, "five words");

/* A flow's gates in one word. */
static __always_inline __u64 read_gates(const struct conn *c)
{
	return *(const volatile __u64 *)&c->gates;
}

/* What is in such a word. */
#define GATES_OPENER(g)		((__u8)(g))
#define GATES_PROVENANCE(g)	((__u8)((g) >> 8))
#define GATES_FLAGS(g)		((__u8)((g) >> 16))
#define GATES_JUDGED(g, end)	((__u8)((g) >> (32 + 8 * (end))))
#define GATES_ALLOWED(g, end)	((__u8)((g) >> (48 + 8 * (end))))

_Static_assert(offsetof(struct gates, provenance) == 1 && offsetof(struct gates, flags) == 2 &&
	       offsetof(struct gates, judged) == 4 && offsetof(struct gates, allowed) == 6 &&
	       __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "as the macros have it");

/* Reads the gates of a flow's entry; false if it has become another flow's
 * meanwhile. A value is written from its beginning on: who finds the key there
 * afterwards has read what belongs to it. */
static __always_inline bool gates_of(const struct conn *c, const struct conn_key *k, __u64 *g)
{
	*g = read_gates(c);
	return same_key(&c->key, k);
}

/* Whether the flow is over: the entry waits to be swept up. */
static __always_inline bool conn_over(const struct conn *c, __u64 now)
{
	return c->last_ns + c->timeout_s * NSEC_PER_SEC < now;
}

/* Whether the packet begins the flow anew: a connection that was closed is
 * opened again by a SYN. */
static __always_inline bool conn_again(const struct conn *c, const struct packet *p)
{
	return c->state == CONN_CLOSED && p->tuple.protocol == IPPROTO_TCP && (p->flags & PACKET_OPENS);
}

static __always_inline __u32 opening_timeout(__u8 protocol)
{
	switch (protocol) {
	case IPPROTO_TCP:
		return tcp_opening_timeout;
	case IPPROTO_UDP:
		return udp_timeout;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return icmp_timeout;
	}
	return other_timeout;
}

/* Idle times of one ENI's flows, in seconds; 0: those of every ENI. */
struct idle {
	__u32 tcp_established;
	__u32 udp;
	__u32 udp_stream;
	__u32 reserved;
};

/* By index of the ENI. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_ENIS);
	__type(key, __u32);
	__type(value, struct idle);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} eni_idle SEC(".maps");

/* The pod here that is an end of a flow; ifindex is its host veth. */
static __always_inline struct iface *pod_at(struct conn *c, __u32 end, __u32 ifindex)
{
	__u32 number = c->slot[end & 1];
	struct slot *s = bpf_map_lookup_elem(&slots, &number);
	struct iface *pod;

	if (s && s->ifindex == ifindex)
		return &s->iface;
	pod = bpf_map_lookup_elem(&ifaces, &ifindex);
	if (pod && c->ifindex[end & 1] == ifindex)
		c->slot[end & 1] = pod->slot;
	return pod;
}

/* How long a flow may be idle in its state: as the ENI has it of the pod that
 * began it, or of the one that it goes to. Asked where the state changes. */
__noinline __cold __u32 idle_timeout(struct conn *c, __u32 protocol)
{
	bool stream = c && c->state == CONN_ESTABLISHED;
	__u32 end, set = 0, usual;
	struct iface *pod;
	struct idle *i;

	if (!c)
		return 0;
	end = c->gates.opener & 1;
	if (!c->ifindex[end])
		end = 1 - end;
	pod = pod_at(c, end, c->ifindex[end & 1]);
	i = pod ? bpf_map_lookup_elem(&eni_idle, &pod->eni) : 0;
	if (protocol == IPPROTO_TCP) {
		set = i ? i->tcp_established : 0;
		usual = tcp_established_timeout;
	} else if (stream) {
		set = i ? i->udp_stream : 0;
		usual = udp_stream_timeout;
	} else {
		set = i ? i->udp : 0;
		usual = udp_timeout;
	}
	return set ? set : usual;
}

/* How packets leave by an ENI, as the kernel said when this CPU last asked. */
struct router {
	__u64 asked_ns;
	__u32 ifindex;		/* of the ENI */
	__u32 mtu;		/* of the ENI; 0: the kernel did not say */
	__u8 mac[6];		/* the router's */
	__u8 own[6];		/* the ENI's */
	__u8 known;		/* 0: the kernel did not say, or the ENI is not for direct packets */
	__u8 pad[3];
};

/* What a CPU remembers. An array begins 8 bytes before a cache line (struct bpf_array),
 * so one line is the clock, the count, and the router of the first ENI. */
struct cpu {
	__u64 before[7];
	__u64 tick;		/* of the kernel, at which its clock was read */
	__u64 clock;
	__u64 direct;		/* packets that took the short way: of PATH_DIRECT */
	__u64 reserved;
	struct router routers[MAX_ENIS]; /* by index of the ENI, less one */
	__u64 after[5];
};

_Static_assert(offsetof(struct cpu, tick) == 56 && sizeof(struct cpu) % 64 == 0 && sizeof(struct router) == 32,
	       "whole cache lines");

/* By CPU. Not a map of values per CPU: the pointers to them are in one more line, which is
 * seldom in the cache. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);	/* as many as there may be CPUs */
	__type(key, __u32);
	__type(value, struct cpu);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} cpus SEC(".maps");

/* Where a packet is read, and an entry prepared: not on the stack, which is short.
 * Programs do not interrupt each other on a CPU. */
struct scratch {
	struct packet packet;
	struct conn conn;
	struct tuple asked;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratch SEC(".maps");

static __always_inline struct cpu *this_cpu(void)
{
	__u32 number = bpf_get_smp_processor_id();

	return bpf_map_lookup_elem(&cpus, &number);
}

/* The time. The kernel's coarse clock moves with its ticks: while there was none since
 * this CPU's last packet, that one's time is good still. */
static __always_inline __u64 time_of(struct cpu *cpu)
{
	__u64 tick = bpf_jiffies64();

	if (cpu->tick != tick) {
		cpu->tick = tick;
		cpu->clock = bpf_ktime_get_coarse_ns();
	}
	return cpu->clock + clock_offset;
}

/* Room to read a packet, which comes now. */
static __always_inline struct packet *packet_new(void)
{
	__u32 zero = 0;
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);
	struct cpu *cpu = this_cpu();

	if (!s || !cpu)
		return 0;
	s->packet.now = time_of(cpu);
	return &s->packet;
}

/* A CPU's router of an ENI. The last is nobody's: ENIs have the indexes 1 to 31. */
static __always_inline struct router *router_of(struct cpu *cpu, __u32 eni)
{
	return &cpu->routers[(eni - 1) & (MAX_ENIS - 1)];
}

/* A packet's tuple, to be changed and asked about. */
static __always_inline struct tuple *asked_of(const struct packet *p)
{
	__u32 zero = 0;
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);

	if (!s)
		return 0;
	s->asked = p->tuple;
	return &s->asked;
}

/* The entry that conn_new or conn_copy made last on this CPU. */
static __always_inline struct conn *conn_made(void)
{
	__u32 zero = 0;
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);

	return s ? &s->conn : 0;
}

/* A copy of an entry, to be judged; 0 if it has become another flow's meanwhile. */
static __always_inline struct conn *conn_copy(const struct conn *c, const struct packet *p)
{
	struct conn *made = conn_made();

	if (!made)
		return 0;
	*made = *c;
	return same_key(&c->key, &p->key) ? made : 0;
}

/*
 * Enters what the gates said of a copy into the entry, unless it has changed since
 * it had the gates `from`: what this packet may does not depend on it. What the
 * next comparison of verdicts goes by comes last.
 */
static __always_inline void conn_judged(struct conn *c, __u64 from, const struct conn *made)
{
	if (!same_key(&c->key, &made->key) ||
	    __sync_val_compare_and_swap((__u64 *)(void *)&c->gates, from, read_gates(made)) != from)
		return;
	__builtin_memcpy(c->audit, made->audit, sizeof(c->audit));
	__builtin_memcpy(c->verdict, made->verdict, sizeof(c->verdict));
	c->generation = made->generation;
}

/* An entry, not yet in the table, for a packet that begins a flow. */
static __always_inline struct conn *conn_new(const struct packet *p, __u8 provenance)
{
	__u32 zero = 0;
	struct scratch *s = bpf_map_lookup_elem(&scratch, &zero);
	struct conn *c;

	if (!s)
		return 0;
	c = &s->conn;
	__builtin_memset(c, 0, sizeof(*c));
	c->key = p->key;
	c->created_ns = p->now;
	c->last_ns = p->now;
	c->gates.opener = p->end & 1;
	c->gates.provenance = provenance;
	c->state = CONN_OPENING;
	c->timeout_s = opening_timeout(p->tuple.protocol);
	if (!(p->flags & PACKET_OPENS))
		c->gates.flags = CONN_MIDFLOW;
	return c;
}
