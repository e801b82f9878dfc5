/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Each pod's share of conntrack's table: so many entries as are free. One pod that
 * begins flows without end takes half of the table, n of them n/(n+1) of it, and
 * what begins the next pod still finds room: the dynamic threshold of switches that
 * share a memory between ports (Choudhury and Hahne, IEEE/ACM Transactions on
 * Networking 6(2), 1998). It costs a new flow two numbers, however many pods.
 */

/* Entries that were entered, and removed by a packet; each only grows. */
struct share {
	__u64 begun;
	__u64 evicted;
};

/* By slot of the pod that began the flow, or if that is none of this node, of the
 * one that it goes to; 0: all together. Not pinned: each sweep counts anew. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_IFACES + 1);
	__type(key, __u32);
	__type(value, struct share);
} shares SEC(".maps");

/* Written by the agent's sweep: what is to be taken off begun - evicted for the
 * number of entries. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_IFACES + 1);
	__type(key, __u32);
	__type(value, __u64);
} shares_swept SEC(".maps");

/* What there is to share: as many entries as the table has. */
const volatile __u32 share_of = MAX_CONNS;

static __always_inline __s64 share_entries(__u32 slot)
{
	struct share *s = bpf_map_lookup_elem(&shares, &slot);
	__u64 *swept = bpf_map_lookup_elem(&shares_swept, &slot);

	return s && swept ? (__s64)(s->begun - s->evicted - *swept) : 0;
}

/* Whether one more entry is within a pod's share. */
static __always_inline bool in_share(__u32 slot)
{
	return !slot || share_entries(slot) < (__s64)share_of - share_entries(0);
}

static __always_inline void share_begun(__u32 slot)
{
	struct share *s = bpf_map_lookup_elem(&shares, &slot);

	if (s)
		__sync_fetch_and_add(&s->begun, 1);
}

static __always_inline void share_evicted(__u32 slot)
{
	struct share *s = bpf_map_lookup_elem(&shares, &slot);

	if (s)
		__sync_fetch_and_add(&s->evicted, 1);
}

/* An entry is in no share any more, and takes no room. */
static __always_inline void share_freed(__u32 slot)
{
	share_evicted(0);
	if (slot)
		share_evicted(slot);
}
