/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the policy of an endpoint says of a flow. No endpoint has tables yet:
 * none is judged, and everything is allowed.
 */

/* From whose side a flow is judged. */
enum policy_direction {
	POLICY_EGRESS = 0,	/* what the pod sends */
	POLICY_INGRESS,		/* what it receives */
};

struct verdict {
	__u32 rule[GATES];	/* that decided; 0: the default, or not judged */
	__u32 epoch[GATES];	/* of the table; 0: none */
	__u8 allow[GATES];
	__u8 audit[GATES];	/* allowed only because the gate enforces nothing */
};

static __always_inline int policy_judge(const struct tuple *t, __u32 ifindex, __u32 direction,
					struct verdict *v)
{
	(void)t;
	(void)ifindex;
	(void)direction;
	__builtin_memset(v, 0, sizeof(*v));
	v->allow[GATE_GROUPS] = 1;
	v->allow[GATE_NETPOL] = 1;
	return 0;
}
