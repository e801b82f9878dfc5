/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the programs know of pods and host veths, and what they count of them: the
 * agent writes the former and reads the latter.
 */

/* 15 ENIs of 50 addresses, 16 to each with prefixes, would be 11,760 pods; the
 * largest node in use runs 737. Tombstones of a whole node fit beside them. */
#define MAX_IFACES	4096
#define MAX_ENDPOINTS	16384

/* Constants that Go reads from the object's BTF, so that they stand once. */
enum node_const {
	/* Bits of skb->mark that are ours: 1, 2, 6, 12, 13. They carry the
	 * ENI's mark index, 1..31, and are never all zero after from_pod. */
	NODE_MARK_MASK = 0x3046,
	/* Version of the maps' layout, in map `meta`. */
	NODE_LAYOUT = 4,
	/* Size of map policy_tables; its number 0 is nobody's. Endpoints with equal
	 * policy share a table; while one is exchanged for another both are there. */
	NODE_POLICY_TABLES = 16384,
};

enum drop_reason {
	DROP_NONE = 0,
	DROP_UNKNOWN_INTERFACE,	/* no entry in ifaces */
	DROP_NOT_READY,		/* the endpoint's gate is shut */
	DROP_MALFORMED,		/* too short for the headers it claims */
	DROP_VLAN,		/* 802.1Q or 802.1ad tag */
	DROP_SOURCE_MAC,	/* Ethernet source is not the endpoint's */
	DROP_ARP_SENDER,	/* ARP sender MAC or IP is not the endpoint's */
	DROP_ARP_OTHER,		/* ARP that asks for anything but the gateway */
	DROP_IPV6,
	DROP_ETHERTYPE,		/* neither IPv4, IPv6 nor ARP */
	DROP_SOURCE_ADDRESS,	/* IPv4 source is not the endpoint's */
	DROP_IMDS,		/* instance metadata, and pods may not */
	DROP_FRAGMENT,		/* its datagram's first fragment was not seen */
	DROP_CONNTRACK_FULL,	/* no room for another flow */
	DROP_TUPLE_COLLISION,	/* translated onto the addresses of a direct flow */
	DROP_POLICY_GROUPS,	/* refused by the security groups */
	DROP_POLICY_NETPOL,	/* refused by NetworkPolicy */
	DROP_CONNTRACK_SHARE,	/* no room for another flow in the pod's share */
	DROP_REASONS,		/* how many there are */
};

/* Room in tables of drops, so that a new reason does not change a layout. */
#define DROP_SLOTS	32

enum iface_flags {
	IFACE_READY = 1,	/* the gate is open: policy is in place */
	IFACE_STACK = 2,	/* no flow of it bypasses the stack */
	IFACE_GROUPS = 4,	/* its groups are judged here for all that it sends and receives */
	IFACE_ALONE = 8,	/* what passes goes to the stack at once: see pass */
};

/* endpoint.state */
#define ENDPOINT_TOMBSTONE	3

struct addr {
	__u8 b[16];		/* IPv6, or IPv4 as ::ffff:a.b.c.d */
};

/* One host veth, keyed by its ifindex. */
struct iface {
	struct addr addr;	/* the pod's address */
	__u8 pod_mac[6];
	__u8 host_mac[6];
	__u32 mark;		/* of the ENI, within NODE_MARK_MASK, never 0 */
	__u32 flags;		/* enum iface_flags */
	__u32 eni;		/* index of the ENI, in map `enis` */
	__u32 slot;		/* in map `slots`, from 1 */
};

/* A host veth by its slot, which is read faster than by a hash. */
struct slot {
	struct iface iface;
	__u32 ifindex;		/* 0: nobody's */
};

/* What passed an interface. Packets are those on the wire (a segmentation
 * offload's apart), bytes IP lengths, as conns has them: so flow records can be
 * held against them. */
struct iface_traffic {
	__u64 from_packets;	/* passed by from_pod */
	__u64 from_bytes;
	__u64 to_packets;	/* passed by to_pod */
	__u64 to_bytes;
};

struct iface_counters {
	struct iface_traffic before; /* what programs of layout 2 counted here */
	__u64 drops[DROP_SLOTS];
	__u64 last_drop_ns;	/* CLOCK_BOOTTIME, 0: never */
	__u32 last_drop_reason;
	__u32 last_drop_proto;	/* EtherType, host order */
};

/* The commit record of an endpoint, keyed by its address: the node's memory,
 * written by the agent alone. The programs read from it which host veth has an
 * address. Text ends with a zero byte or with its field. */
struct endpoint {
	__u32 version;		/* of this struct */
	__u32 state;		/* 1 adding, 2 live, 3 tombstone */
	__u64 netns_cookie;
	__u64 created_ns;	/* CLOCK_BOOTTIME */
	__u64 released_ns;	/* CLOCK_BOOTTIME, 0: not released */
	__u32 eni_index;	/* mark index, 1..31 */
	__u32 host_ifindex;
	__u32 peer_ifindex;
	__u32 mtu;
	__u8 mac[6];
	__u8 stack_only;	/* 1: none of its flows bypasses the stack */
	__u8 pad;
	__u8 container_id[128];
	__u8 ifname[16];
	__u8 host_ifname[16];
	__u8 netns[256];
	__u8 eni[32];
	__u8 pod_namespace[64];
	__u8 pod_name[256];
	__u8 groups[344];	/* canonical: sorted, joined by commas; 16 take 335 */
	__u8 pod_uid[40];	/* a UUID's text is 36 */
};

struct layout_meta {
	__u32 layout;		/* 0: not yet initialised */
	__u32 reserved;
};

#define NSEC_PER_SEC 1000000000ULL

#define MAX_SETS	16384

/* Odd numbers by chance, so that nobody can choose flows of one set (node_table.h). */
struct conn_seed {
	__u64 by[5];
};

/* Configuration, set before the program is loaded. What each packet's way reads of it is
 * in one cache line. */
const volatile struct conn_seed seed __attribute__((aligned(64))) = { { 1, 3, 5, 7, 9 } };
/* Tests move the clock on by this, in ns. */
const volatile __u64 clock_offset = 0;
/* How many sets there are, a power of two, less one: by the node's memory. */
const volatile __u32 set_mask = MAX_SETS - 1;
/* Whether flows may begin that bypass the stack; those that do go on doing so
 * only while this is set. */
const volatile __u32 direct_enabled = 0;
/* Whether packets may take the short way (node_short.h): tests hold it against the other. */
const volatile __u32 short_way = 1;

const volatile __u32 imds_allowed = 0;
/* No pod has an IPv6 address yet: tests alone set this, to run the parsers. */
const volatile __u32 ipv6_allowed = 0;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct layout_meta);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} meta SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_ENDPOINTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct addr);
	__type(value, struct endpoint);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} endpoints SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_IFACES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct iface);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} ifaces SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, MAX_IFACES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct iface_counters);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} iface_stats SEC(".maps");

/* By slot. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_IFACES + 1);
	__type(key, __u32);
	__type(value, struct iface_traffic);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} traffic SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, DROP_SLOTS);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} drops SEC(".maps");

/* Host veths by slot: a packet's way through the stack leaves 16 bits of the
 * packet, its tc_index, which keep whose it was; and flows keep it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_IFACES + 1);
	__type(key, __u32);
	__type(value, struct slot);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} slots SEC(".maps");
