/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The allowance of an instance: how many flows the groups of all its ENIs may
 * track at once. A flow that begins takes one here; what has ended is counted by
 * user space, which sets what is left (RefillAllowances). So the number may be
 * off by what began in the moment of the count, until the next.
 */

/* AWS publishes no number. 0: as many as there is room for. */
volatile const __s64 conntrack_allowance = 0;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, __u64); /* inode of the guest's namespace, as in struct eni */
	__type(value, __s64); /* how many more */
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} allowances SEC(".maps");

/*
 * may_track takes a flow out of the allowance of the ENI's instance, if it is not
 * used up. It has nothing on the stack, of which gate leaves too little.
 */
static __always_inline int may_track(__u32 ifindex)
{
	struct eni *self;
	__s64 *left;

	if (!conntrack_allowance)
		return 1;
	self = bpf_map_lookup_elem(&enis, &ifindex);
	if (!self)
		return 1;
	left = bpf_map_lookup_elem(&allowances, &self->guest);
	if (!left) { /* its first flow */
		bpf_map_update_elem(&allowances, &self->guest, (void *)&conntrack_allowance,
				    BPF_NOEXIST);
		left = bpf_map_lookup_elem(&allowances, &self->guest);
		if (!left)
			return 1;
	}
	if (*left <= 0)
		return 0;
	__sync_fetch_and_add(left, -1);
	return 1;
}
