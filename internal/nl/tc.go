package nl

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// Direction is that of the packets that a clsact qdisc hands to its filters.
type Direction uint32

// Values of linux/pkt_sched.h: TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_…).
const (
	Ingress Direction = 0xfffffff2 // what the link receives
	Egress  Direction = 0xfffffff3 // what it is to send
)

func (d Direction) String() string {
	switch d {
	case Ingress:
		return "ingress"
	case Egress:
		return "egress"
	}
	return fmt.Sprintf("parent %#x", uint32(d))
}

// Values of linux/pkt_sched.h and linux/pkt_cls.h.
const (
	clsactHandle = 0xffff0000 // TC_H_MAJ(TC_H_CLSACT)
	clsactParent = 0xfffffff1 // TC_H_CLSACT

	bpfFD           = 6  // TCA_BPF_FD
	bpfName         = 7  // TCA_BPF_NAME
	bpfFlags        = 8  // TCA_BPF_FLAGS
	bpfID           = 11 // TCA_BPF_ID
	bpfDirectAction = 1  // TCA_BPF_FLAG_ACT_DIRECT

	sizeofTcmsg = 20
)

// tcmsg appends a struct tcmsg.
func (b *Batch) tcmsg(index int, handle, parent, info uint32) {
	b.raw(unix.AF_UNSPEC, 0, 0, 0)
	b.u32(uint32(index))
	b.u32(handle)
	b.u32(parent)
	b.u32(info)
}

// ClsactSet gives the link a clsact qdisc, on which filters can stand, unless
// it has one. A link that is up loses what it is to send meanwhile, for some
// 0.2 ms: the kernel deactivates it (net/sched/sch_api.c, qdisc_graft).
// EINVAL: an ingress qdisc is in its place. Filters of either direction would
// stand on that, so that what sets them has to wait for the answer.
func (b *Batch) ClsactSet(index int) {
	b.add(fmt.Sprintf("set clsact of link %d", index), unix.RTM_NEWQDISC, unix.NLM_F_ACK|unix.NLM_F_CREATE, func() {
		b.tcmsg(index, clsactHandle, clsactParent, 0)
		b.attrText(unix.TCA_KIND, "clsact")
	})
}

// Filter is a BPF program on a clsact qdisc, which says by its return value
// what becomes of a packet ("direct action").
type Filter struct {
	Index     int // of the link
	Direction Direction
	Priority  uint16 // packets see the lowest first
	Handle    uint32 // tells filters of one priority apart
	Name      string // for people
	FD        int    // of the program to set; not read
	ProgID    uint32 // of the program that is there; not set
}

func (f Filter) String() string {
	return fmt.Sprintf("filter %s of link %d %s", f.Name, f.Index, f.Direction)
}

// FilterSet puts the filter in its place, instead of the one that has its
// priority and handle if there is one: no packet misses both.
func (b *Batch) FilterSet(f Filter) {
	b.add("set "+f.String(), unix.RTM_NEWTFILTER, unix.NLM_F_ACK|unix.NLM_F_CREATE, func() {
		b.tcmsg(f.Index, f.Handle, uint32(f.Direction), filterInfo(f.Priority))
		b.attrText(unix.TCA_KIND, "bpf")
		b.nest(unix.TCA_OPTIONS, func() {
			b.attrU32(bpfFD, uint32(f.FD))
			b.attrText(bpfName, f.Name)
			b.attrU32(bpfFlags, bpfDirectAction)
		})
	})
}

// FilterDelete removes the filter of that place. ENOENT: there is none.
func (b *Batch) FilterDelete(f Filter) {
	b.add("delete "+f.String(), unix.RTM_DELTFILTER, ackOnly, func() {
		b.tcmsg(f.Index, f.Handle, uint32(f.Direction), filterInfo(f.Priority))
		b.attrText(unix.TCA_KIND, "bpf")
	})
}

// filterInfo is tcm_info of a filter for all protocols.
func filterInfo(priority uint16) uint32 {
	var proto [2]byte
	binary.BigEndian.PutUint16(proto[:], unix.ETH_P_ALL)
	return uint32(priority)<<16 | uint32(binary.NativeEndian.Uint16(proto[:]))
}

// Filters returns the filters of one direction of a link's clsact qdisc, of
// which only those that are BPF programs have a ProgID; none if it has no such
// qdisc.
func (c *Conn) Filters(index int, d Direction) ([]Filter, error) {
	var b Batch
	b.add(fmt.Sprintf("list filters of link %d %s", index, d), unix.RTM_GETTFILTER, unix.NLM_F_DUMP, func() {
		b.tcmsg(index, 0, uint32(d), 0)
	})
	return dumpAll(c, &b, parseFilter)
}

func parseFilter(b []byte) (Filter, bool, error) {
	if len(b) < sizeofTcmsg {
		return Filter{}, false, errMalformed
	}
	f := Filter{
		Index:     int(int32(binary.NativeEndian.Uint32(b[4:]))),
		Handle:    binary.NativeEndian.Uint32(b[8:]),
		Direction: Direction(binary.NativeEndian.Uint32(b[12:])),
		Priority:  uint16(binary.NativeEndian.Uint32(b[16:]) >> 16),
	}
	err := eachAttr(b[sizeofTcmsg:], func(typ uint16, v []byte) {
		if typ != unix.TCA_OPTIONS {
			return
		}
		_ = eachAttr(v, func(typ uint16, v []byte) {
			switch typ {
			case bpfName:
				f.Name = cstring(v)
			case bpfID:
				f.ProgID = u32(v)
			}
		})
	})
	// A classifier is listed with handle 0 before the filters that it holds.
	return f, f.Handle != 0, err
}
