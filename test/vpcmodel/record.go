package vpcmodel

import (
	"fmt"
	"net/netip"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// Record is what one packet adds to an interface's flow log: facts, section 4,
// "unidirectional 5-tuple per ENI per aggregation interval; accepted and rejected
// packets of one tuple are separate records".
type Record struct {
	ENI              vpc.ENIID
	Dir              Direction
	SrcAddr, DstAddr netip.Addr // as the default format shows them
	PktSrc, PktDst   netip.Addr // as the packet has them
	SrcPort, DstPort uint16     // "ICMP: ports 0 0"
	Proto            uint8
	Accepted         bool
	Flags            uint8 // tcp-flags, to be or-ed
	Path             int   // traffic-path, 0 is "-"
	IPv6             bool  // type: "IPv4/IPv6/EFA"
}

// Key is a record without what adds up.
func (r Record) Key() Record {
	r.Flags = 0
	return r
}

func (r Record) String() string {
	action, path := "REJECT", "-"
	if r.Accepted {
		action = "ACCEPT"
	}
	if r.Path != 0 {
		path = fmt.Sprint(r.Path)
	}
	way := "ingress"
	if r.Dir == Out {
		way = "egress"
	}
	text := fmt.Sprintf("%s %s %s %s %d %d %d %s pkt %s %s path %s flags %d",
		r.ENI, way, r.SrcAddr, r.DstAddr, r.SrcPort, r.DstPort, r.Proto, action, r.PktSrc, r.PktDst, path, r.Flags)
	if r.IPv6 {
		text += " type IPv6"
	}
	return text
}

// note adds to the records of an interface what it says of a packet. e is nil for
// a NAT gateway's own, which the model leaves out.
func (w *World) note(e *ENI, d Direction, p *Packet, accepted bool, path int) {
	if e == nil {
		return
	}
	r := Record{ENI: e.ID, Dir: d, SrcAddr: p.Src, DstAddr: p.Dst, PktSrc: p.Src, PktDst: p.Dst, Proto: p.Proto, Accepted: accepted, IPv6: p.Src.Is6()}
	// "the ENI side always shows the ENI's PRIMARY private IPv4 if the packet's
	// address is a secondary IP or not the ENI's at all (dstaddr for ingress,
	// srcaddr for egress)". "Remote side is never rewritten." That is said of IPv4
	// alone: of IPv6 no address is primary, and both sides are the packet's [inf].
	switch {
	case r.IPv6:
	case d == Out:
		r.SrcAddr = e.Primary
	default:
		r.DstAddr = e.Primary
	}
	if p.ports() {
		r.SrcPort, r.DstPort = p.SrcPort, p.DstPort
	}
	r.Flags = logged(p)
	// "traffic-path (egress only)". What a rejected packet's path would have been
	// the facts do not say.
	if d == Out && accepted {
		r.Path = path
	}
	w.noted = append(w.noted, r)
}

// logged: "FIN 1, SYN 2, RST 4, SYN-ACK 18; ACK/PSH-only = 0".
func logged(p *Packet) uint8 {
	if p.Flags&(SYN|ACK) == SYN|ACK {
		return p.Flags & (FIN | SYN | RST | ACK)
	}
	return p.Flags & (FIN | SYN | RST)
}
