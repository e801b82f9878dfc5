/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the programs tell the agent: verdicts, for who watches, and the last
 * count of flows whose entry they removed.
 */

enum event_kind {
	EVENT_VERDICT = 1,	/* a flow was judged or a packet dropped: struct event */
};

/* A verdict. Sent while somebody listens, and not more often than allowed. */
struct event {
	__u64 at_ns;		/* CLOCK_MONOTONIC */
	struct tuple tuple;	/* all zero: the packet has no addresses that were read */
	__u32 kind;		/* enum event_kind */
	__u32 ifindex;		/* of the device at whose hook it was */
	__u32 reason;		/* enum drop_reason; 0: allowed */
	__u32 rule[2];		/* by gate, that decided */
	__u32 bytes;		/* of the packet, IP length */
	__u8 direction;		/* enum policy_direction, of the pod */
	__u8 audit;		/* bit g: only because gate g enforces nothing */
	__u8 provenance;	/* of the flow; 0: it has none */
	__u8 pad[5];
};

#define ENDS_SIZE	(1024 * 1024)

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 256 * 1024);
} events SEC(".maps");

/* Of flows that are over, their entries: removed, or taken over by the next flow. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, ENDS_SIZE);
	__uint(pinning, LIBBPF_PIN_BY_NAME);	/* the next agent reads what this one has not */
} ends SEC(".maps");

/* Whether somebody listens, and how many events may be sent until the agent
 * raises it again. */
__u32 event_listeners = 0;
__s64 event_budget = 0;
/* Events and ends that were not sent, because there was no budget or no room. */
__u64 events_lost = 0;
__u64 ends_lost = 0;

__noinline int send_event(struct __sk_buff *skb, const struct tuple *t, struct event *e)
{
	if (!e || !event_listeners)
		return 0;
	if (event_budget <= 0 || __sync_fetch_and_add(&event_budget, -1) <= 0) {
		__sync_fetch_and_add(&events_lost, 1);
		return 0;
	}
	e->at_ns = bpf_ktime_get_ns();
	e->kind = EVENT_VERDICT;
	e->ifindex = skb->ifindex;
	e->bytes = skb->len > ETH_HLEN ? skb->len - ETH_HLEN : 0;
	if (t)
		e->tuple = *t;
	if (bpf_ringbuf_output(&events, e, sizeof(*e), 0))
		__sync_fetch_and_add(&events_lost, 1);
	return 0;
}

/* What the flow's entry says of a verdict about it: of the pod at its beginning, or
 * of the one that it is sent to. */
static __always_inline void tell_of(struct event *e, const struct conn *c, __u32 direction)
{
	__u32 end = (direction ? 1 - c->gates.opener : c->gates.opener) & 1;

	e->direction = direction;
	e->rule[GATE_GROUPS] = c->verdict[end][GATE_GROUPS].rule;
	e->rule[GATE_NETPOL] = c->verdict[end][GATE_NETPOL].rule;
	e->audit = c->audit[end];
	e->provenance = c->gates.provenance;
}

/* Tells of a flow that begins and is let through. */
__noinline int tell_allowed(struct __sk_buff *skb, const struct packet *p, const struct conn *c, __u32 direction)
{
	struct event e = {};

	if (!event_listeners || !p || !c || (c->gates.flags & CONN_DENIED))
		return 0;
	tell_of(&e, c, direction);
	return send_event(skb, &p->tuple, &e);
}

/* Whether somebody wants to know of flows that are over. */
const volatile __u32 ends_wanted = 0;

/* Tells of a flow that is over; false: the ring has no room. Ends are read every few
 * seconds, or when a quarter of the ring is full: to wake who reads for each would cost
 * more than all else. */
static __always_inline bool told_ended(struct conn *c)
{
	__u64 how;

	if (!ends_wanted)
		return true;
	how = bpf_ringbuf_query(&ends, BPF_RB_AVAIL_DATA) < ENDS_SIZE / 4 ? BPF_RB_NO_WAKEUP : BPF_RB_FORCE_WAKEUP;
	return !bpf_ringbuf_output(&ends, c, sizeof(*c), how);
}

static __noinline int send_ended(struct conn *c)
{
	if (c && !told_ended(c))
		__sync_fetch_and_add(&ends_lost, 1);
	return 0;
}
