package flowlog

import (
	"net/netip"
	"time"
)

// Object is a record as JSON, for files and for tools.
type Object struct {
	Start     time.Time  `json:"start,omitzero"`
	End       time.Time  `json:"end"`
	Status    string     `json:"status"`
	Direction string     `json:"direction,omitempty"`
	Src       netip.Addr `json:"src,omitzero"` // the packets' own addresses
	SrcPort   uint16     `json:"srcPort,omitempty"`
	Dst       netip.Addr `json:"dst,omitzero"`
	DstPort   uint16     `json:"dstPort,omitempty"`
	Protocol  uint8      `json:"protocol,omitempty"`
	Packets   uint64     `json:"packets,omitempty"`
	Bytes     uint64     `json:"bytes,omitempty"`
	TCPFlags  uint8      `json:"tcpFlags,omitempty"`
	Action    string     `json:"action,omitempty"`
	Verdict   string     `json:"verdict,omitempty"`
	Rule      string     `json:"rule,omitempty"`
	Namespace string     `json:"namespace,omitempty"`
	Pod       string     `json:"pod,omitempty"`
	Node      string     `json:"node,omitempty"`
	Instance  string     `json:"instanceId,omitempty"`
	ENI       string     `json:"eni,omitempty"`
	Address   netip.Addr `json:"address,omitzero"` // of the pod
	Primary   netip.Addr `json:"primary,omitzero"` // of the ENI
	Subnet    string     `json:"subnet,omitempty"`
}

// Object returns a record as JSON has it.
func (r *Record) Object(n Node) Object {
	o := Object{
		Start: r.Start, End: r.End, Status: r.Status.String(), Packets: r.Packets, Bytes: r.Bytes,
		Namespace: r.Namespace, Pod: r.Pod, Node: n.Name, Instance: n.Instance, ENI: r.ENI, Address: r.Addr, Primary: r.Primary, Subnet: r.Subnet,
	}
	if r.Status == OK {
		o.Direction, o.Protocol, o.TCPFlags, o.Verdict, o.Rule = r.Direction.String(), r.Tuple.Proto, r.TCPFlags, r.Verdict.Text, r.Verdict.Rule
		o.Src, o.Dst = r.Tuple.Src, r.Tuple.Dst
		if !icmp(r.Tuple.Proto) { // VPC flow logs: ICMP has no ports
			o.SrcPort, o.DstPort = r.Tuple.SrcPort, r.Tuple.DstPort
		}
		o.Action = "REJECT"
		if r.Accepted {
			o.Action = "ACCEPT"
		}
	}
	return o
}
