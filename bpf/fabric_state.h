/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the programs know of interfaces, routes and public addresses, which Set
 * writes, and what they count.
 */

/* Why a frame was dropped. Append only: counters are pinned by these numbers. */
enum drop_reason {
	DROP_NO_INTERFACE, /* a device that is no ENI's */
	DROP_MALFORMED, /* headers cut short, or that contradict the frame */
	DROP_SOURCE_MAC, /* Ethernet source is not the ENI's MAC */
	DROP_SOURCE_ADDRESS, /* source check: not one of the ENI's addresses */
	DROP_DEST_ADDRESS, /* destination check of the receiving ENI */
	DROP_NO_ROUTE, /* outside all routes of the subnet */
	DROP_NO_TARGET, /* inside the VPC, but no ENI holds the address */
	DROP_UNKNOWN_MAC, /* to a MAC that is neither router's nor an ENI's of the subnet */
	DROP_MULTICAST, /* broadcast and multicast, other than an ARP request */
	DROP_IPV6, /* IPv6 of or to an ENI whose subnet has no IPv6 block */
	DROP_ETHERTYPE, /* neither IPv4, IPv6 nor ARP, or with a VLAN tag */
	DROP_OVERSIZE, /* IP length above the MTU */
	DROP_ARP_SPOOFED, /* ARP whose sender fields are not the ENI's */
	DROP_ARP_UNANSWERED, /* ARP to which no answer is due */
	DROP_NOT_SERVICE, /* the fabric's stack sent something that is no service's answer */
	DROP_SG_EGRESS, /* the sender's security groups */
	DROP_SG_INGRESS, /* the receiver's security groups */
	DROP_FRAGMENT, /* a later fragment whose first did not pass before it */
	DROP_FLOWS_FULL, /* no room to track one more flow */
	DROP_CONNTRACK_ALLOWANCE, /* the instance tracks as many flows as it may */
	DROP_ACL_EGRESS, /* the network ACL of the sender's subnet */
	DROP_ACL_INGRESS, /* the network ACL of the receiver's subnet */
	DROP_BLACKHOLE, /* a route whose target is gone, or is not of these wires */
	DROP_IGW_SOURCE, /* to the internet, from an address without a public one */
	DROP_IGW_PRIVATE, /* between the internet and an address of RFC 1918 or RFC 6598 */
	DROP_NO_PUBLIC, /* from the internet, to a public address that leads nowhere */
	DROP_LINKLOCAL_ALLOWANCE, /* more packets to link-local services than an ENI may send */
	DROP_EXTENSION, /* IPv6 extension headers that no gate can judge */
	DROP_ND_SPOOFED, /* neighbour discovery from an address that is not the ENI's */
	DROP_ND_UNANSWERED, /* neighbour discovery to which no answer is due */
	DROP_GATEWAY_IPV6, /* IPv6 to an internet gateway, which carries none here */
	DROP_REASONS, /* how many there are */
};

enum eni_flag {
	ENI_SOURCE_DEST_CHECK = 1,
	ENI_READY = 2, /* made whole: what Set looks for, nothing to the programs */
	ENI_UNGATED = 4, /* a NAT gateway's: no security group judges what it sends and receives */
	ENI_IPV6 = 8, /* its subnet has an IPv6 block */
};

enum route_kind {
	ROUTE_LOCAL = 1, /* to whatever ENI holds the address */
	ROUTE_ENI, /* to target, whose address that of the packet is not */
	ROUTE_BLACKHOLE, /* to what is not there */
	ROUTE_IGW, /* to the VPC's internet gateway */
	ROUTE_PEER, /* to whatever ENI of VPC vni holds the address */
};

struct address {
	__u32 vni;
	__u8 addr[16];
};

/* An ENI as a destination. */
struct target {
	__u32 ifindex; /* fabric end */
	enum eni_flag flags;
	__be32 subnet; /* network address of its subnet; with the VNI, the subnet's name */
	__u8 mac[6];
	__u16 mtu; /* IP length of what it takes */
};

/* An ENI as a source: what a fabric end belongs to. */
struct eni {
	__u32 vni;
	enum eni_flag flags;
	__be32 subnet;
	__be32 netmask;
	__be32 configured; /* the address that Set gave the guest end, 0: none */
	__u8 mac[6];
	__u16 device_index; /* the guest end is called eth%u */
	__be32 resolver; /* the VPC's own address of its resolver, 0: it has none */
	__u64 table; /* number of its subnet's route table */
	__u64 guest; /* inode of the guest's namespace when the pair was made */
	char id[32]; /* "eni-…", for who reads the map */
	__be32 subnet6[4]; /* its subnet's IPv6 block; ENI_IPV6 */
	__be32 netmask6[4];
	__u16 mtu; /* IP length of what it takes */
	__u8 pad[6];
};

/* A MAC is looked up within its subnet. */
struct station {
	__u32 vni;
	__be32 subnet;
	__u8 mac[6];
	__u8 pad[2];
};

/* An LPM key is packed: its bits begin behind prefixlen. */
struct route_key {
	__u32 prefixlen; /* 64 bits of table included */
	__u32 table[2]; /* number of the table, low half first */
	__u8 addr[16];
};

struct route {
	enum route_kind kind;
	struct target target; /* ROUTE_ENI */
	__u32 vni; /* ROUTE_PEER */
};

/* What a public address leads to, through an internet gateway that is attached. */
struct public {
	__u64 table; /* number of the gateway's route table, 0: it has none */
	__u32 vni;
	__be32 private;
};

/*
 * From the guest's point of view: tx is what the fabric accepted from it, rx
 * what the fabric handed to it; neither ARP nor neighbour discovery. A packet is one on the wire, so a
 * GSO frame counts its segments; bytes are IP lengths, without Ethernet header.
 * Of these, exempt is what flow logs leave out by definition, and skipped what
 * they had no room for; the rest is in flow records that say ACCEPT.
 */
struct counters {
	__u64 tx_packets;
	__u64 tx_bytes;
	__u64 rx_packets;
	__u64 rx_bytes;
	__u64 exempt_tx_packets;
	__u64 exempt_tx_bytes;
	__u64 exempt_rx_packets;
	__u64 exempt_rx_bytes;
	__u64 skipped_tx_packets;
	__u64 skipped_tx_bytes;
	__u64 skipped_rx_packets;
	__u64 skipped_rx_bytes;
	__u64 drops[DROP_REASONS]; /* frames */
};

/* The router of every subnet; locally administered, never an ENI's. */
volatile const __u8 router_mac[6] = {0x02, 0x00, 0x5e, 0x00, 0x00, 0x01};
volatile const __u32 internet_mtu = 1500; /* IP length, through an internet gateway */
volatile const enum drop_reason drop_reasons = DROP_REASONS; /* shows the type to bpf2go */

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, __u32); /* ifindex of a fabric end */
	__type(value, struct eni);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} enis SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144); /* each address of a /28 is an entry */
	__type(key, struct address);
	__type(value, struct target);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} mappings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, struct station);
	__type(value, struct target);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} stations SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct route_key);
	__type(value, struct route);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} routes SEC(".maps");

/* By public address, in network byte order. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __be32);
	__type(value, struct public);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} publics SEC(".maps");

/* The public address of a private one, the other way round. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct address);
	__type(value, __be32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} elastics SEC(".maps");

/* The one end towards the internet; ifindex 0: there is no internet yet. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct target);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} internet SEC(".maps");

/*
 * Key 0 counts what came from a device that is no ENI's, and what came from the
 * internet and reached no ENI.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, __u32); /* ifindex of a fabric end */
	__type(value, struct counters);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} counts SEC(".maps");
