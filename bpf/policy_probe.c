/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * A program for tests and benchmarks that asks policy_judge many questions in a
 * run. It is no part of the node's datapath.
 */
#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/pkt_cls.h>
#include <stdbool.h>
#include <stddef.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

struct addr {
	__u8 b[16];		/* IPv6, or IPv4 as ::ffff:a.b.c.d */
};

/* As in node.c. */
#define NODE_POLICY_TABLES	16384

#include "node_tuple.h"
#include "node_policy.h"

#define QUESTIONS	4096

struct question {
	struct tuple tuple;
	__u32 ifindex;
	__u32 ask;		/* enum policy_ask */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, QUESTIONS);
	__type(key, __u32);
	__type(value, struct question);
} questions SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, QUESTIONS);
	__type(key, __u32);
	__type(value, struct verdict);
} answers SEC(".maps");

/* How many questions there are. */
volatile __u32 asked;
/* A question that is asked asked times instead, from 1 on; 0: all in a row. */
volatile __u32 only;

static long ask(__u64 i, void *unused)
{
	struct question *q;
	struct verdict *v;
	struct tuple t;
	__u32 n = i;

	(void)unused;
	if (only)
		n = only - 1;
	q = bpf_map_lookup_elem(&questions, &n);
	v = bpf_map_lookup_elem(&answers, &n);
	if (!q || !v)
		return 1;
	t = q->tuple;
	policy_judge(&t, q->ifindex, q->ask, v);
	return 0;
}

SEC("tc")
int policy_probe(struct __sk_buff *skb)
{
	(void)skb;
	bpf_loop(asked, ask, 0, 0);
	return TC_ACT_OK;
}

char _license[] SEC("license") = "Dual BSD/GPL";
