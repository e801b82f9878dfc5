package vpcmodel

import (
	"net/netip"
	"strings"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// services are the addresses that every VPC answers by itself: "Amazon DNS (.2,
// 169.254.169.253), DHCP, IMDS, ECS task metadata 169.254.170.2, Windows KMS,
// Time Sync 169.254.169.123, reserved VPC-router IPs". Of IPv6 the facts name the
// DNS, "fd00:ec2::253", IMDS, "[fd00:ec2::254]", and the router's link-local
// address, "router also answers fe80:ec2::1".
var services = []netip.Addr{
	netip.AddrFrom4([4]byte{169, 254, 169, 253}), netip.AddrFrom4([4]byte{169, 254, 169, 254}),
	netip.AddrFrom4([4]byte{169, 254, 170, 2}), netip.AddrFrom4([4]byte{169, 254, 169, 123}),
	netip.AddrFrom4([4]byte{169, 254, 169, 250}), netip.AddrFrom4([4]byte{169, 254, 169, 251}),
	netip.MustParseAddr("fd00:ec2::253"), netip.MustParseAddr("fd00:ec2::254"), netip.MustParseAddr("fe80:ec2::1"),
}

// service reports whether a is an address that the VPC itself answers, for an
// interface of the subnet: the above, the VPC's DNS ("VPC base+2"), the router.
func (w *World) service(s *Subnet, a netip.Addr) bool {
	for _, known := range services {
		if a == known {
			return true
		}
	}
	dns := w.VPCs[s.VPC].CIDRs[0].Masked().Addr().Next().Next()
	return a == dns || a == vpc.Router(s.CIDR) || s.CIDR6.IsValid() && a == s.CIDR6.Masked().Addr().Next()
}

// Send judges a packet, and remembers the flow that it begins or continues.
func (w *World) Send(p *Packet) Verdict {
	w.noted = nil
	v := w.judge(p)
	v.Records, v.IPv6 = w.noted, p.Src.Is6()
	return v
}

func (w *World) judge(p *Packet) Verdict {
	if p.From == Internet {
		return w.arrive(p)
	}
	e := w.ENIs[p.From]
	if e == nil || !e.Attached {
		return Verdict{Where: AtSender, Rule: "detached", Why: "the interface is not attached"}
	}
	s := w.Subnets[e.Subnet]
	// As "the VPC answers ARP … from the mapping, no broadcast/multicast", so it
	// does neighbour discovery: nobody else gets it, whatever the groups say [inf].
	if p.Discovery() {
		return Verdict{Service: p.Dst, Rule: "neighbour discovery", Sender: Exempt}
	}
	// "Over-MTU packet: DF set -> dropped"; all packets here have it set unless
	// they are fragments.
	if p.Length > MTU {
		return Verdict{Where: AtMTU, Rule: "mtu", Why: "longer than the MTU"}
	}
	// "Source/dest check (default on): … egress dropped unless src is one of them
	// [the ENI's IPs (prefixes included)]".
	// A multicast address is nobody's, whatever the check.
	if !e.NoCheck && !e.holds(p.Src, true) || p.Src.IsMulticast() {
		return Verdict{Where: AtSource, Rule: "source check", Why: "the source address is not the interface's"}
	}
	// "Not filtered by SG …. NACLs equally cannot block DNS .2 or IMDS".
	if p.Direct == "" && w.service(s, p.Dst) {
		return Verdict{Service: p.Dst, Rule: "service", Sender: Exempt}
	}
	// "port-less fragments need reassembly": a datagram is judged whole, by the
	// ports of its first fragment; what cannot be made whole is not delivered.
	if p.Orphan {
		return Verdict{Where: AtFragment, Rule: "fragment", Why: "the first fragment never came"}
	}

	// "Egress gate of the sender AND ingress gate of the receiver, independent".
	sent, kept := Verdict{}, clone(e.flows)
	var why string
	if sent.Sender, sent.Rule, why = w.gate(e, Out, p, nil); why != "" {
		if w.Settings.LogUnrouted || w.route(s, p).why == "" {
			w.note(e, Out, p, false, 0)
		}
		return Verdict{Where: AtEgress, Rule: "out " + sent.Rule, Why: string(e.ID) + ": " + why}
	}
	v := w.carry(e, s, p)
	if v.Where == AtRoute && !w.Settings.TrackUnrouted || !v.Delivered() && !w.Settings.TrackUndelivered {
		e.flows = kept
	}
	v.Sender = sent.Sender
	v.Rules = append(passed(Out, sent.Rule, sent.Sender), v.Rules...)
	return v
}

// Peek is what Send would answer, without remembering anything.
func (w *World) Peek(p *Packet) Verdict {
	w.peeked = map[*ENI][]*flow{}
	nats := map[*NAT]NAT{}
	for _, n := range w.NATs {
		nats[n] = *n
		n.flows = n.cloned()
	}
	v := w.Send(p)
	for e, flows := range w.peeked {
		e.flows = flows
	}
	w.peeked = nil
	for n, was := range nats {
		n.flows, n.port = was.flows, was.port
	}
	return v
}

// clone copies flows, each by itself.
func clone(flows []*flow) []*flow {
	copies, out := make([]flow, len(flows)), make([]*flow, len(flows))
	for i, f := range flows {
		copies[i], out[i] = *f, &copies[i]
	}
	return out
}

// carry takes a packet from the sender's gate to the receiver.
func (w *World) carry(e *ENI, s *Subnet, p *Packet) Verdict {
	h := w.route(s, p)
	switch {
	case h.why != "":
		if w.Settings.LogUnrouted {
			w.note(e, Out, p, true, 0)
		}
		return Verdict{Where: AtRoute, Rule: "route " + h.rule, Why: h.why}
	case h.gateway != nil:
		return w.leave(e, s, p, h.gateway)
	case h.natAnswer:
		return w.answered(h.nat, e, s, p)
	case h.nat != nil:
		return w.translate(e, s, p, h.nat)
	}
	path := 1 // "same VPC resource"
	if strings.HasPrefix(h.rule, "peering") {
		path = 4 // "intra-region peering"
	}
	rules := []string{"route " + h.rule}
	// ACLs are "Applied only when traffic enters/leaves the SUBNET, not inside it".
	if h.eni.Subnet != e.Subnet {
		rule, why := w.acl(s, Out, p)
		if why != "" {
			w.note(e, Out, p, false, 0)
			return Verdict{Where: AtACLOut, Rule: "out " + rule, Rules: rules, Why: why}
		}
		rules = append(rules, "out "+rule)
	}
	w.note(e, Out, p, true, path)
	v := w.receive(s, h.eni, p, e)
	v.Rules = append(rules, v.Rules...)
	return v
}

// enter takes a packet that no interface sent, out of a subnet or (nil) from the
// internet, to an interface.
func (w *World) enter(from *Subnet, to *ENI, p *Packet, far *ENI) Verdict {
	var rules []string
	if from != nil && to.Subnet != from.ID {
		rule, why := w.acl(from, Out, p)
		if why != "" {
			return Verdict{Where: AtACLOut, Rule: "out " + rule, Why: why}
		}
		rules = append(rules, "out "+rule)
	}
	v := w.receive(from, to, p, far)
	v.Rules = append(rules, v.Rules...)
	return v
}

// receive judges a packet at the receiver's side: the ACL of its subnet, if the
// packet comes from without, the destination check, the gate.
func (w *World) receive(from *Subnet, to *ENI, p *Packet, far *ENI) Verdict {
	var rules []string
	if from == nil || to.Subnet != from.ID {
		rule, why := w.acl(w.Subnets[to.Subnet], In, p)
		if why != "" {
			w.note(to, In, p, false, 0)
			return Verdict{Where: AtACLIn, Rule: "in " + rule, Why: why}
		}
		rules = append(rules, "in "+rule)
	}
	// "ingress dropped unless dst is one of the ENI's IPs (prefixes included)".
	if !to.NoCheck && !to.holds(p.Dst, true) {
		return Verdict{Where: AtDestination, Rule: "destination check", Rules: rules, Why: string(to.ID) + " does not have the address"}
	}
	t, rule, why := w.gate(to, In, p, far)
	w.note(to, In, p, why == "", 0)
	if why != "" {
		return Verdict{Where: AtIngress, Rule: "in " + rule, Rules: rules, Why: string(to.ID) + ": " + why}
	}
	return Verdict{To: to.ID, Receiver: t, Rule: "in " + rule, Rules: append(rules, passed(In, rule, t)...)}
}

// passed names, for counts, what let a packet through a gate.
func passed(d Direction, rule string, t Tracking) []string {
	if t == Untracked {
		return []string{d.String() + " " + rule, d.String() + " untracked"}
	}
	return []string{d.String() + " " + rule}
}

func join[T ~string](ids []T) string {
	names := make([]string, len(ids))
	for i, id := range ids {
		names[i] = string(id)
	}
	return strings.Join(names, ",")
}
