/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The table of flows. Most are in sets of eight ways. A hash of the key says which set;
 * one word has the tags of its ways, seven bits of the hash each, so that a look-up
 * reads that word and the entry, and calls nothing. A flow that finds no way in its set
 * is in the hash table `conns`, which grows by need. A flow stays where it began.
 *
 * The way of a connection that is closed keeps its entry, for what comes late, until
 * another flow wants the way: who makes short connections without end takes room for
 * none of them, and neither does it cost their beginning and end.
 *
 * Who writes a way has made its `written` odd, alone. The entry's key goes before all
 * else is written and comes after it, so that gates_of holds here as well.
 *
 * Needs node_event.h and node_share.h.
 */

#define SET_WAYS	8
#define WAY_TAGS	0x7f7f7f7f7f7f7f7fULL
#define WAYS_LEFT	0x8080808080808080ULL	/* closed: the way is another's who wants it */
#define EACH_WAY	0x0101010101010101ULL

/* Three cache lines: an array begins 8 bytes before one (struct bpf_array), and what
 * packets of both directions read is not where they count. */
struct conn_way {
	__u64 written;		/* how often, twice; odd: somebody is at it */
	struct conn conn;
	__u64 room[2];		/* to whole lines */
	__u64 written_end;	/* written before the entry as `written` is after it */
};

_Static_assert(sizeof(struct conn_way) == 192, "whole cache lines");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_SETS * SET_WAYS);
	__type(key, __u32);
	__type(value, struct conn_way);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} conn_ways SEC(".maps");

struct conn_set {
	__u64 tags;		/* a byte for each way; 0: it is free */
	__u64 spilled;		/* how many of its flows are in `conns` */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_SETS);
	__type(key, __u32);
	__type(value, struct conn_set);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} conn_sets SEC(".maps");

/* What the next agent's programs hash by: seed. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct conn_seed);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} conn_seeds SEC(".maps");

/* Where a key is looked for. */
struct place {
	struct conn_set *set;
	__u32 number;		/* of the set */
	__u32 tag;
};

static __always_inline bool place_of(const struct conn_key *k, struct place *at)
{
	const word *w = (const void *)k;
	__u64 h = w[0] * seed.by[0] + w[1] * seed.by[1] + w[2] * seed.by[2] + w[3] * seed.by[3] + w[4] * seed.by[4];

	h = (h ^ h >> 32) * 0x9e3779b97f4a7c15ULL;
	at->number = h >> 40 & set_mask;
	at->tag = h >> 33 & 0x7f;
	if (!at->tag)
		at->tag = 1;
	at->set = bpf_map_lookup_elem(&conn_sets, &at->number);
	return at->set;
}

/* The high bit of each byte whose other bits are 0. */
static __always_inline __u64 zero_ways(__u64 tags)
{
	return ~((tags & WAY_TAGS) + WAY_TAGS) & WAYS_LEFT;
}

/* The ways whose tag is the key's. */
static __always_inline __u64 tagged_ways(const struct place *at)
{
	return zero_ways(*(volatile __u64 *)&at->set->tags ^ at->tag * EACH_WAY);
}

/* The first of some ways, of which there is one: 1 to 8. */
static __always_inline __u32 first_way(__u64 ways)
{
	return (((ways & -ways) - 1) & EACH_WAY) * EACH_WAY >> 56;
}

/* Where a way's byte of the tags begins. */
static __always_inline __u32 way_shift(__u32 way)
{
	return 8 * ((way - 1) & (SET_WAYS - 1));
}

/* A way's bit of WAYS_LEFT. */
static __always_inline __u64 way_left(__u32 way)
{
	return 0x80ULL << way_shift(way);
}

static __always_inline struct conn_way *way_at(__u32 set, __u32 way)
{
	__u32 index = set * SET_WAYS + ((way - 1) & (SET_WAYS - 1));

	return bpf_map_lookup_elem(&conn_ways, &index);
}

/* The way of a flow; *way is which. */
static __always_inline struct conn_way *way_of(const struct conn_key *k, const struct place *at, __u32 *way)
{
	__u64 ways = tagged_ways(at);
	struct conn_way *w;

	for (int i = 0; i < SET_WAYS; i++) {
		if (!ways)
			return 0;
		*way = first_way(ways);
		w = way_at(at->number, *way);
		if (w && same_key(&w->conn.key, k))
			return w;
		ways &= ways - 1;
	}
	return 0;
}

/* The flow in the first way with the key's tag, and its gates; 0 if it is not there: most
 * that are in a set are. */
static __always_inline struct conn *conn_first(const struct conn_key *k, __u64 *g)
{
	struct place at;
	struct conn_way *w;
	__u64 ways;

	if (!place_of(k, &at))
		return 0;
	ways = tagged_ways(&at);
	if (!ways)
		return 0;
	w = way_at(at.number, first_way(ways));
	return w && gates_of(&w->conn, k, g) ? &w->conn : 0;
}

/* Finds a flow, wherever it is. */
static __noinline __cold struct conn *conn_find(const struct conn_key *k)
{
	struct place at;
	struct conn_way *w;
	__u32 way;

	if (!place_of(k, &at))
		return 0;
	w = way_of(k, &at, &way);
	if (w)
		return &w->conn;
	return at.set->spilled ? bpf_map_lookup_elem(&conns, k) : 0;
}

/* The same, and reads its gates. */
static __always_inline struct conn *conn_find_gates(const struct conn_key *k, __u64 *g)
{
	struct conn *c = conn_find(k);

	return c && gates_of(c, k, g) ? c : 0;
}

/* Takes a way to write it; *next is what `written` will be. */
static __always_inline bool way_lock(struct conn_way *w, __u64 *next)
{
	__u64 was = *(volatile __u64 *)&w->written;

	*next = was + 2;
	return !(was & 1) && __sync_val_compare_and_swap(&w->written, was, was + 1) == was;
}

/* Gives a way back as it was. */
static __always_inline void way_unlock(struct conn_way *w, __u64 next)
{
	*(volatile __u64 *)&w->written = next - 2;
}

#define NO_KEY (~0ULL) /* of a key's last word: all of its padding */

/* Writes a way that was taken, and gives it back. Who reads it from without finds
 * `written` and `written_end` equal only if it was not written meanwhile. */
static __always_inline void way_write(struct conn_way *w, const struct conn *n, __u64 next)
{
	volatile __u64 *to = (void *)&w->conn;
	const __u64 *from = (const void *)n;

	(void)__sync_lock_test_and_set((__u64 *)&to[4], NO_KEY);
	*(volatile __u64 *)&w->written_end = next;
#pragma unroll
	for (int i = 5; i < (int)(sizeof(*n) / 8); i++)
		to[i] = from[i];
#pragma unroll
	for (int i = 0; i < 4; i++)
		to[i] = from[i];
	(void)__sync_lock_test_and_set((__u64 *)&to[4], from[4]);
	*(volatile __u64 *)&w->written = next;
}

_Static_assert(offsetof(struct conn, key) == 0 && sizeof(struct conn_key) == 40, "words 0 to 4");

/* A way of a set whose flow is over and was not swept up, as without an agent; 0: none. */
static __noinline __u32 way_over(__u32 number, __u64 now)
{
	struct conn_way *w;

	for (__u32 way = 1; way <= SET_WAYS; way++) {
		w = way_at(number, way);
		if (w && conn_over(&w->conn, now))
			return way;
	}
	return 0;
}

/* What became of a flow that was entered. */
enum conn_put {
	CONN_SAME = 0,		/* it has the place of another that counted in a share */
	CONN_MORE,		/* it is one more */
};

/* Enters a flow, in the place of the one that has its key if there is one: old. It
 * returns an enum conn_put, or an error if there is no room. */
static __noinline long conn_put(const struct conn_key *k, const struct conn *n, bool old)
{
	struct place at;
	struct conn_way *w;
	__u64 tags, free, left, turn, pick, bit, next;
	__u32 way;
	long err;

	if (!k || !n || !place_of(k, &at))
		return -EINVAL;
	w = way_of(k, &at, &way);
	if (w) {
		if (!way_lock(w, &next))
			return -EEXIST;
		if (!same_key(&w->conn.key, k)) {
			way_unlock(w, next);
			return -EEXIST;
		}
		bit = way_left(way);
		tags = __sync_fetch_and_and(&at.set->tags, ~bit);
		way_write(w, n, next);
		return tags & bit ? CONN_MORE : CONN_SAME;
	}
	if (old && at.set->spilled && !bpf_map_update_elem(&conns, k, n, BPF_EXIST))
		return CONN_SAME;
#pragma unroll
	for (int i = 0; i < 3; i++) {
		tags = *(volatile __u64 *)&at.set->tags;
		free = zero_ways(tags);
		left = tags & WAYS_LEFT;
		/* Of those that are closed by turns, so that none stays for good. */
		turn = left & ~0ULL << (8 * (n->last_ns >> 22 & 7));
		pick = free ? free : turn ? turn : left;
		way = pick ? first_way(pick) : way_over(at.number, n->last_ns);
		if (!way)
			break;
		w = way_at(at.number, way);
		if (!w || !way_lock(w, &next))
			continue;
		if (!pick && !conn_over(&w->conn, n->last_ns)) {
			way_unlock(w, next);
			continue;
		}
		if (__sync_val_compare_and_swap(&at.set->tags, tags,
						(tags & ~(0xffULL << way_shift(way))) |
							(__u64)at.tag << way_shift(way)) != tags) {
			way_unlock(w, next);
			continue;
		}
		if (!free)
			send_ended(&w->conn);
		if (!pick) {
			count(PATH_EVICTED);
			share_freed(w->conn.share);
		}
		way_write(w, n, next);
		return CONN_MORE;
	}
	__sync_fetch_and_add(&at.set->spilled, 1);
	err = bpf_map_update_elem(&conns, k, n, BPF_NOEXIST);
	if (!err)
		return CONN_MORE;
	__sync_fetch_and_add(&at.set->spilled, -1);
	return err;
}

/* Removes a flow from `conns`; false: it went just now. */
static __always_inline bool conn_unspill(const struct conn_key *k)
{
	struct place at;

	if (!place_of(k, &at) || bpf_map_delete_elem(&conns, k))
		return false;
	__sync_fetch_and_add(&at.set->spilled, -1);
	return true;
}

/* A connection is closed: its way is another's who wants it, and it is in no share any
 * more. One in `conns` goes at once, or stays for the sweep if the ring of ends is full. */
static __noinline __cold int conn_left(const struct conn_key *k, struct conn *c)
{
	struct place at;
	__u64 tags, bit;
	__u32 way, share;

	if (!k || !c || !place_of(k, &at))
		return 0;
	share = c->share;
	if (way_of(k, &at, &way)) {
		bit = way_left(way);
		tags = *(volatile __u64 *)&at.set->tags;
		if (tags & bit || __sync_val_compare_and_swap(&at.set->tags, tags, tags | bit) != tags)
			return 0;
	} else if (!at.set->spilled || !told_ended(c) || !conn_unspill(k)) {
		return 0;
	}
	share_freed(share);
	return 1;
}

/* Whether a connection that is closed has had its last packet, as far as one can know:
 * both ends have sent their FIN before, and this acknowledges, and does nothing else. */
static __always_inline bool conn_leaves(const struct conn *c, const struct packet *p)
{
	return c->state == CONN_CLOSED && p->tcp_flags == TCP_ACK && (c->tcp_flags[0] & c->tcp_flags[1] & TCP_FIN);
}

/* conn_see, but for a connection that has had its last packet: then it is true, and the
 * caller calls conn_left. */
static __always_inline bool conn_step(struct conn *c, const struct packet *p, bool counts)
{
	__u32 end = p->end & 1;
	__u8 flags;

	if (counts) {
		__sync_fetch_and_add(&c->packets[end], p->packets);
		__sync_fetch_and_add(&c->bytes[end], p->bytes);
	}
	/* What is said about a flow does not keep it alive. */
	if (p->flags & PACKET_ERROR)
		return false;
	if ((__s64)(p->now - c->last_ns) > 0)
		c->last_ns = p->now;
	if (!(c->seen & (CONN_SEEN << end)))
		c->seen |= CONN_SEEN << end;

	if (p->tuple.protocol == IPPROTO_TCP) {
		if (!(p->tcp_flags & ~c->tcp_flags[end]) && c->state != CONN_OPENING)
			return conn_leaves(c, p);
		flags = c->tcp_flags[end] | p->tcp_flags;
		c->tcp_flags[end] = flags;
		if ((flags & TCP_RST) || (c->tcp_flags[0] & c->tcp_flags[1] & TCP_FIN)) {
			c->state = CONN_CLOSED;
			c->timeout_s = tcp_closed_timeout;
			return flags & TCP_RST;
		} else if (c->state == CONN_OPENING && end == c->gates.opener && (flags & TCP_ACK) &&
			   c->tcp_flags[1 - end]) {
			/* Answered, and the answer acknowledged. */
			c->state = CONN_ESTABLISHED;
			c->timeout_s = idle_timeout(c, IPPROTO_TCP);
		} else if (c->state == CONN_OPENING && (c->gates.flags & CONN_MIDFLOW) && c->tcp_flags[0] &&
			   c->tcp_flags[1]) {
			c->state = CONN_ESTABLISHED;
			c->timeout_s = idle_timeout(c, IPPROTO_TCP);
		}
		return false;
	}
	if (p->tuple.protocol == IPPROTO_UDP && c->state == CONN_OPENING && c->packets[0] > 1 &&
	    c->packets[1] > 1) {
		/* More than one request and response (EC2 user guide). */
		c->state = CONN_ESTABLISHED;
		c->timeout_s = idle_timeout(c, IPPROTO_UDP);
	}
	return false;
}

/* Follows the flow's state with a packet, and counts it if counts. */
static __always_inline void conn_see(struct conn *c, const struct packet *p, bool counts)
{
	if (conn_step(c, p, counts))
		conn_left(&p->key, c);
}

/* What the agent asks of a sweep, and gets. */
struct sweep {
	__u64 now;		/* CLOCK_MONOTONIC */
	struct conn_key key;	/* of one flow in `conns`; or instead */
	__u32 set;		/* the first to look at */
	__u32 sets;		/* how many; less those that were */
	__u32 removed;
	__u32 full;		/* the ring of ends had no room for one */
	__u32 stayed;		/* of those that are in a share */
	__u32 direct;		/* of these */
};

/* Entries that the sweep left in sets, by slot of the pod in whose share they are. One
 * value, which the agent reads at once. */
struct stayed {
	__u64 entries[MAX_IFACES + 1];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct stayed);
} shares_stayed SEC(".maps");

static __always_inline void conn_stays(struct sweep *s, const struct conn *c)
{
	__u32 slot = c->share, zero = 0;
	struct stayed *n = bpf_map_lookup_elem(&shares_stayed, &zero);

	s->stayed++;
	if (c->gates.provenance == PROVENANCE_DIRECT)
		s->direct++;
	if (n && slot <= MAX_IFACES)
		n->entries[slot]++;
}

static __always_inline bool pod_gone(__u32 ifindex)
{
	return ifindex && !bpf_map_lookup_elem(&ifaces, &ifindex);
}

/* Whether a flow is over, or that of a pod which is. */
static __always_inline bool conn_gone(const struct conn *c, __u64 now)
{
	return conn_over(c, now) || pod_gone(c->ifindex[0]) || pod_gone(c->ifindex[1]);
}

/* Frees the ways of a set whose flow is over. It returns 1 to end the sweep. */
static long sweep_set(__u32 i, struct sweep *s)
{
	__u32 set = s->set + i;
	struct conn_set *at = bpf_map_lookup_elem(&conn_sets, &set);
	__u64 bits, next;
	struct conn_way *w;

	if (!at || !at->tags)
		goto done;
	for (__u32 way = 1; way <= SET_WAYS; way++) {
		bits = 0xffULL << way_shift(way);
		if (!(at->tags & bits))
			continue;
		w = way_at(set, way);
		if (!w)
			continue;
		if (!conn_gone(&w->conn, s->now)) {
			if (!(at->tags & bits & WAYS_LEFT))
				conn_stays(s, &w->conn);
			continue;
		}
		if (!way_lock(w, &next))
			continue;
		if (!(at->tags & bits) || !conn_gone(&w->conn, s->now)) {
			way_unlock(w, next);
			continue;
		}
		if (!told_ended(&w->conn)) {
			way_unlock(w, next);
			s->full = 1;
			return 1;
		}
		(void)__sync_lock_test_and_set((__u64 *)(void *)w->conn.key.port, NO_KEY);
		__sync_fetch_and_and(&at->tags, ~bits);
		way_unlock(w, next);
		s->removed++;
	}
done:
	s->sets--;
	return 0;
}

SEC("syscall")
int sweep_ways(struct sweep *s)
{
	struct sweep here = *s;

	bpf_loop(here.sets, sweep_set, &here, 0);
	*s = here;
	return 0;
}

SEC("syscall")
int sweep_conn(struct sweep *s)
{
	struct conn_key key = s->key;
	struct conn *c = bpf_map_lookup_elem(&conns, &key);

	if (!c || !conn_gone(c, s->now))
		return 0;
	if (!told_ended(c))
		s->full = 1;
	else if (conn_unspill(&key))
		s->removed = 1;
	return 0;
}
