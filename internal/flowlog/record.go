package flowlog

import (
	"net/netip"
	"time"

	"github.com/underlay-cni/underlay/internal/packet"
)

// Direction is that of a packet as the pod sees it.
type Direction uint8

// What a pod sends is egress.
const (
	Egress Direction = iota
	Ingress
)

func (d Direction) String() string {
	if d == Ingress {
		return "ingress"
	}
	return "egress"
}

// Status is a record's log-status.
type Status uint8

// NoData: the interface had no traffic in the interval. SkipData: it had some
// that could not be recorded; Packets and Bytes say how much.
const (
	OK Status = iota
	NoData
	SkipData
)

func (s Status) String() string { return [...]string{"OK", "NODATA", "SKIPDATA"}[s] }

// Interface is a pod's interface, and where in the VPC it is.
type Interface struct {
	Addr           netip.Addr // the pod's
	Namespace, Pod string     // empty where there is no orchestrator
	ENI            string
	Primary        netip.Addr // of the ENI
	Subnet         string
}

// Verdict says who decided on a connection or a packet.
type Verdict struct {
	Text string // "allow", "deny", "audit" or the reason of a drop; "" when nobody judged
	Rule string // the rule's id; "" when no rule did
}

// Record is what one interface sent or received on one connection within an
// interval, or with a Status other than OK a remark on the interval.
type Record struct {
	Interface
	Status     Status
	Start, End time.Time // first and last packet; the interval's when Status is not OK
	Direction  Direction
	Tuple      packet.FiveTuple // of these packets, not of the connection's first
	Packets    uint64
	Bytes      uint64 // IP lengths
	TCPFlags   uint8  // as VPC flow logs write them, see [Flags]
	Accepted   bool
	Verdict    Verdict
}

// TCP's flags (RFC 9293, section 3.1).
const (
	fin = 0x01
	syn = 0x02
	rst = 0x04
	ack = 0x10
)

// Flags turns the TCP flags that one side of a connection has sent into the
// number that VPC flow logs have: FIN 1, SYN 2, RST 4, SYN-ACK 18, each added
// once; ACK and PSH alone are 0 (VPC User Guide, "Flow log records"). first says
// that this side began the connection, so that its SYN was without an ACK.
func Flags(seen uint8, first bool) uint8 {
	out := seen & (fin | syn | rst)
	if out&syn != 0 && seen&ack != 0 && !first {
		out |= ack
	}
	return out
}
