package datapath

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
)

// reasonNames are the drop reasons of bpf/node.c as counters name them.
var reasonNames = map[bpfgen.NodeDropReason]string{
	bpfgen.NodeDropReasonDROP_UNKNOWN_INTERFACE: "unknown_interface",
	bpfgen.NodeDropReasonDROP_NOT_READY:         "not_ready",
	bpfgen.NodeDropReasonDROP_MALFORMED:         "malformed",
	bpfgen.NodeDropReasonDROP_VLAN:              "vlan",
	bpfgen.NodeDropReasonDROP_SOURCE_MAC:        "source_mac",
	bpfgen.NodeDropReasonDROP_ARP_SENDER:        "arp_sender",
	bpfgen.NodeDropReasonDROP_ARP_OTHER:         "arp_other",
	bpfgen.NodeDropReasonDROP_IPV6:              "ipv6",
	bpfgen.NodeDropReasonDROP_ETHERTYPE:         "ethertype",
	bpfgen.NodeDropReasonDROP_SOURCE_ADDRESS:    "source_address",
	bpfgen.NodeDropReasonDROP_IMDS:              "imds",
	bpfgen.NodeDropReasonDROP_FRAGMENT:          "fragment",
	bpfgen.NodeDropReasonDROP_CONNTRACK_FULL:    "conntrack_full",
	bpfgen.NodeDropReasonDROP_CONNTRACK_SHARE:   "conntrack_share",
	bpfgen.NodeDropReasonDROP_TUPLE_COLLISION:   "tuple_collision",
	bpfgen.NodeDropReasonDROP_POLICY_GROUPS:     "policy_groups",
	bpfgen.NodeDropReasonDROP_POLICY_NETPOL:     "policy_netpol",
}

// Counters returns the packets dropped since the node started, by reason, and
// as "no_mark" those that the guard in nftables dropped because no program had
// looked at them. Every reason is there, also with 0.
func (d *Datapath) Counters() (map[string]uint64, error) {
	out := make(map[string]uint64, len(reasonNames)+1)
	var perCPU []uint64
	for reason, name := range reasonNames {
		slot := uint32(reason)
		if err := d.objs.Drops.Lookup(&slot, &perCPU); err != nil {
			return nil, fmt.Errorf("read the drop counter %s: %w", name, err)
		}
		for _, n := range perCPU {
			out[name] += n
		}
	}
	var err error
	out[noMark], err = guardCount(d.netns)
	if err != nil {
		return nil, err
	}
	return out, nil
}

// Traffic is what passed and what was dropped at one endpoint since it was
// made: packets on the wire, and bytes of IP.
type Traffic struct {
	FromPackets, FromBytes uint64            // sent by the pod and passed
	ToPackets, ToBytes     uint64            // handed to the pod
	Drops                  map[string]uint64 // by reason, those that are not 0
	LastDrop               LastDrop
}

// LastDrop says what became of the latest packet that was dropped.
type LastDrop struct {
	Reason    string    // "" if none was
	EtherType uint16    // as the frame had it
	At        time.Time // zero if none was
}

// Traffic returns the counters of all endpoints, by address.
func (d *Datapath) Traffic() (map[netip.Addr]Traffic, error) {
	out := map[netip.Addr]Traffic{}
	var index uint32
	var v bpfgen.NodeIface
	it := d.objs.Ifaces.Iterate()
	for it.Next(&index, &v) {
		var perCPU []bpfgen.NodeIfaceCounters
		if err := d.objs.IfaceStats.Lookup(&index, &perCPU); err != nil {
			continue // the endpoint is just being deleted
		}
		var traffic []bpfgen.NodeIfaceTraffic
		if err := d.objs.Traffic.Lookup(&v.Slot, &traffic); err != nil {
			return nil, fmt.Errorf("read the counters of interface %d: %w", index, err)
		}
		t := d.sum(perCPU)
		for i := range traffic {
			t.add(&traffic[i])
		}
		out[netip.AddrFrom16(v.Addr.B).Unmap()] = t
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read the map of interfaces: %w", err)
	}
	return out, nil
}

func (t *Traffic) add(c *bpfgen.NodeIfaceTraffic) {
	t.FromPackets += c.FromPackets
	t.FromBytes += c.FromBytes
	t.ToPackets += c.ToPackets
	t.ToBytes += c.ToBytes
}

// sum adds the CPUs' counters up; the latest of their last drops counts.
func (d *Datapath) sum(perCPU []bpfgen.NodeIfaceCounters) Traffic {
	t := Traffic{Drops: map[string]uint64{}}
	var last uint64
	for i := range perCPU {
		c := &perCPU[i]
		t.add(&c.Before)
		for reason, name := range reasonNames {
			if n := c.Drops[reason]; n != 0 {
				t.Drops[name] += n
			}
		}
		if c.LastDropNs > last {
			last = c.LastDropNs
			t.LastDrop = LastDrop{
				Reason:    reasonNames[bpfgen.NodeDropReason(c.LastDropReason)],
				EtherType: uint16(c.LastDropProto),
				At:        d.clock.at(c.LastDropNs),
			}
		}
	}
	return t
}

// Paths says which way pods' packets took since the node started. A packet
// between two pods of the node counts once.
type Paths struct {
	Direct     uint64 // forwarded by our programs
	Stack      uint64 // left to the kernel's stack
	Exceptions uint64 // of direct connections, left to the stack: too long, a TTL of 1, IP options
	// Connections that began.
	BegunDirect, BegunStack uint64
	Midflow                 uint64 // of these, the beginning was not seen
	Evicted                 uint64 // removed while they were over, to make room
	NoRoom                  uint64 // found no room in the table, or in their pod's share: the packet was dropped
}

// sizeCPUs has the programs' memory of each CPU be there for as many as there may be.
func sizeCPUs(spec *ebpf.CollectionSpec) error {
	n, err := ebpf.PossibleCPU()
	if err != nil {
		return fmt.Errorf("ask how many CPUs there may be: %w", err)
	}
	spec.Maps[bpfgen.NodeMapCpus].MaxEntries = uint32(n)
	return nil
}

// Paths returns the counts of ways.
func (d *Datapath) Paths() (Paths, error) {
	var p Paths
	for slot, to := range map[bpfgen.NodePathCount]*uint64{
		bpfgen.NodePathCountPATH_DIRECT: &p.Direct, bpfgen.NodePathCountPATH_STACK: &p.Stack, bpfgen.NodePathCountPATH_EXCEPTION: &p.Exceptions,
		bpfgen.NodePathCountPATH_BEGUN_DIRECT: &p.BegunDirect, bpfgen.NodePathCountPATH_BEGUN_STACK: &p.BegunStack,
		bpfgen.NodePathCountPATH_MIDFLOW: &p.Midflow, bpfgen.NodePathCountPATH_EVICTED: &p.Evicted, bpfgen.NodePathCountPATH_NO_ROOM: &p.NoRoom,
	} {
		var perCPU []uint64
		if err := d.objs.Paths.Lookup(uint32(slot), &perCPU); err != nil {
			return Paths{}, fmt.Errorf("read the counts of ways: %w", err)
		}
		for _, n := range perCPU {
			*to += n
		}
	}
	short, err := d.shortPackets()
	p.Direct += short
	return p, err
}

// shortPackets is how many packets took the short way (bpf/node_short.h).
func (d *Datapath) shortPackets() (n uint64, err error) {
	for cpu := range d.objs.Cpus.MaxEntries() {
		var c bpfgen.NodeCpu
		if err := d.objs.Cpus.Lookup(cpu, &c); err != nil {
			return 0, fmt.Errorf("read what CPU %d counts: %w", cpu, err)
		}
		n += c.Direct
	}
	return n, nil
}
