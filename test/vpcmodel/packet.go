package vpcmodel

import (
	"fmt"
	"net/netip"

	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// TCP flags, as in the header.
const (
	FIN = 1
	SYN = 2
	RST = 4
	PSH = 8
	ACK = 16
)

// Packet is a packet on its way out of an interface.
type Packet struct {
	ID   int // names the packet in a script
	From vpc.ENIID

	Src, Dst         netip.Addr
	Proto            uint8
	SrcPort, DstPort uint16 // TCP and UDP
	Flags            uint8  // TCP
	Type, Code       uint8  // ICMP and ICMPv6
	Ident            uint16 // ICMP queries: the identifier
	About            *Quote // ICMP errors: the packet that they are about

	Direct    vpc.ENIID // the Ethernet destination is that ENI's MAC, not the router's
	Fragments int       // ≥ 2: the datagram is sent as that many fragments, in order
	Orphan    bool      // only its last fragment is sent
	Length    int       // of the IP packet in bytes; 0 is "small"

	MayFragment bool // DF is clear
}

// Quote is the head of a packet that an ICMP error quotes.
type Quote struct {
	Src, Dst         netip.Addr
	Proto            uint8
	SrcPort, DstPort uint16
	Ident            uint16 // of an echo request
}

func (q *Quote) packet() *Packet {
	p := &Packet{Src: q.Src, Dst: q.Dst, Proto: q.Proto, SrcPort: q.SrcPort, DstPort: q.DstPort, Ident: q.Ident}
	switch q.Proto {
	case packet.ProtoICMP:
		p.Type = 8
	case packet.ProtoICMPv6:
		p.Type = 128
	}
	return p
}

// answers are the ICMP queries with the type of their answer (RFC 792, RFC 4443).
var answers = map[uint8]map[uint8]uint8{
	packet.ProtoICMP:   {8: 0, 13: 14},
	packet.ProtoICMPv6: {128: 129},
}

// reverse returns the packet that would answer p.
func (p *Packet) reverse() *Packet {
	r := &Packet{Src: p.Dst, Dst: p.Src, Proto: p.Proto, SrcPort: p.DstPort, DstPort: p.SrcPort, Ident: p.Ident}
	r.Type = answers[p.Proto][p.Type]
	return r
}

func (p *Packet) icmp() bool {
	return p.Proto == packet.ProtoICMP || p.Proto == packet.ProtoICMPv6
}

// Discovery reports whether p is neighbour discovery: a router or neighbour
// solicitation or advertisement, or a redirect (RFC 4861, section 4).
func (p *Packet) Discovery() bool {
	return p.Proto == packet.ProtoICMPv6 && 133 <= p.Type && p.Type <= 137
}

// ports reports whether p's protocol has port numbers for a VPC.
func (p *Packet) ports() bool {
	return p.Proto == packet.ProtoTCP || p.Proto == packet.ProtoUDP
}

// Where a packet is dropped.
type Where string

// The places of a packet's way, in their order.
const (
	AtSender      Where = "sender" // the interface is not attached
	AtMTU         Where = "mtu"
	AtFragment    Where = "fragment" // reassembly that never ends
	AtSource      Where = "source"   // source check
	AtEgress      Where = "egress"   // the sender's gate
	AtRoute       Where = "route"
	AtACLOut      Where = "aclout"
	AtACLIn       Where = "aclin"
	AtGateway     Where = "igw"         // the internet gateway
	AtNAT         Where = "nat"         // the NAT gateway
	AtDestination Where = "destination" // destination check
	AtIngress     Where = "ingress"     // the receiver's gate
)

// Tracking of a packet by one gate.
type Tracking string

// What a gate does with the flow of a packet that it lets pass.
const (
	Tracked   Tracking = "tracked"
	Untracked Tracking = "untracked"
	Related   Tracking = "related" // an ICMP error of a flow
	Exempt    Tracking = "exempt"  // not filtered at all
)

// Verdict on a packet.
type Verdict struct {
	To      vpc.ENIID  // who receives it, "" if dropped or Service
	Service netip.Addr // the VPC's own service that receives it
	Where   Where      // of the drop
	Why     string     // of the drop, for people

	Sender, Receiver Tracking // at each gate that it passed
	Rule             string   // the kind of rule that decided: the drop's, or the receiver's
	Rules            []string // the kinds of all that let it pass

	IPv6    bool    // the packet is of IPv6
	Seen    *Packet // as the receiver sees it, nil if nothing translated it
	NAT     NATID   // that translated it
	Told    int     // MTU that the sender is told by ICMP, 0 if it is not
	Records []Record
}

// Delivered reports whether an interface receives the packet.
func (v Verdict) Delivered() bool { return v.To != "" }

func (v Verdict) String() string {
	switch {
	case v.To != "" && v.Seen != nil:
		text := fields(string(v.To), v.Sender, v.Receiver, "as", v.Seen.Src, ">", v.Seen.Dst)
		if v.NAT != "" {
			text += " by " + string(v.NAT)
		}
		return text
	case v.To != "":
		return fields(string(v.To), v.Sender, v.Receiver)
	case v.Service.IsValid():
		return "service " + v.Service.String()
	default:
		text := "drop " + string(v.Where)
		if v.Told > 0 {
			text += fmt.Sprintf(" told %d", v.Told)
		}
		return text + " (" + v.Why + ")"
	}
}
