package vpcmodel

import (
	"net/netip"
	"slices"

	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// gate judges a packet at one ENI, in one direction: facts 3.1, "Evaluated at the
// ENI for every packet, also between two ENIs of the same subnet or the same
// host". far is the ENI that sent the packet, for the receiver's gate.
//
// why is "" when the packet passes.
func (w *World) gate(e *ENI, d Direction, p *Packet, far *ENI) (t Tracking, rule, why string) {
	f := w.find(e, d, p)
	cut := false
	switch {
	case f == nil:
	case !f.untracked:
		// "tracked flow continues until it times out or ends", whatever the rules
		// say by now; the reply of a tracked flow passes the same way.
		w.touch(f, d, p)
		return Tracked, "flow", ""
	case w.untracked(e, d, p, true):
		w.touch(f, d, p)
		return Untracked, "untracked", ""
	default:
		cut = true
		e.forget(f) // "untracked flow is cut at once": what follows is judged as anything else
	}
	if p.About != nil {
		if w.related(e, d, p) {
			return Related, "related", ""
		}
	}
	// "Allow only; union of all groups on the ENI".
	r := w.allowed(e, d, p, far)
	if r == nil && cut {
		return "", "cut", "the rules no longer allow this untracked flow"
	}
	if r == nil {
		return "", w.denial(e, d, p, far), "no rule of " + join(e.Groups) + " allows it"
	}
	rule = "group " + r.kind()
	if w.untracked(e, d, p, false) {
		w.begin(e, d, p).untracked = true
		return Untracked, rule, ""
	}
	if p.Proto == packet.ProtoTCP && p.Flags&(SYN|ACK|RST|FIN) != SYN && !w.Settings.MidStream {
		return "", rule, "no flow claims a segment in mid-stream"
	}
	if !w.track(e, d, p) {
		return "", "allowance", "the instance tracks as many flows as it may"
	}
	return Tracked, rule, ""
}

// allowed returns a rule that allows p, or nil: "No egress rules = no egress",
// and the same for ingress.
func (w *World) allowed(e *ENI, d Direction, p *Packet, far *ENI) *Rule {
	for _, id := range e.Groups {
		g := w.Groups[id]
		if g == nil {
			continue
		}
		for i := range g.Rules[d] {
			r := &g.Rules[d][i]
			if r.Match.matches(p) && w.peerMatches(e, d, r, p, far) {
				return r
			}
		}
	}
	return nil
}

// denial names what kept p out, for counts: the kind of a rule that is there and
// almost matches, or "none".
func (w *World) denial(e *ENI, d Direction, p *Packet, far *ENI) string {
	kind := "group none"
	for _, id := range e.Groups {
		g := w.Groups[id]
		if g == nil {
			continue
		}
		for i := range g.Rules[d] {
			r := &g.Rules[d][i]
			if r.Match.matches(p) && d == In && w.peerMatches(e, Out, r, p.reverse(), nil) {
				return "group forwarded" // the address is right, the sender is not its holder
			}
			if r.Match.matches(p) || w.peerMatches(e, d, r, p, far) {
				kind = "group " + r.kind()
			}
		}
	}
	return kind
}

// kind is what a rule goes by, and what it is about.
func (r *Rule) kind() string {
	by := "cidr"
	switch {
	case r.Group != "":
		by = "reference"
	case r.List != "":
		by = "list"
	}
	return by + " " + r.Match.kind()
}

func (m Match) kind() string {
	switch m.Proto {
	case -1:
		return "all"
	case int(packet.ProtoTCP):
		return "tcp"
	case int(packet.ProtoUDP):
		return "udp"
	case int(packet.ProtoICMP), int(packet.ProtoICMPv6):
		return "icmp"
	default:
		return "protocol"
	}
}

// matches: protocols by number, destination ports, ICMP type and code.
func (m Match) matches(p *Packet) bool {
	switch {
	case m.Proto == -1:
		return true
	case m.Proto != int(p.Proto):
		return false
	case p.ports():
		return m.From <= int(p.DstPort) && int(p.DstPort) <= m.To
	case p.icmp():
		return (m.From == -1 || m.From == int(p.Type)) && (m.To == -1 || m.To == int(p.Code))
	default:
		return true
	}
}

// peerMatches compares the rule's source (ingress) or destination (egress) with
// the packet: "CIDR v4/v6, prefix list …, SG reference".
func (w *World) peerMatches(e *ENI, d Direction, r *Rule, p *Packet, far *ENI) bool {
	a := p.Src
	if d == Out {
		a = p.Dst
	}
	switch {
	case r.CIDR.IsValid():
		return r.CIDR.Contains(a)
	case r.List != "":
		return slices.ContainsFunc(w.Lists[r.List], func(c netip.Prefix) bool { return c.Contains(a) })
	default:
		return w.referenced(e, d, r.Group, a, p.Direct, far)
	}
}

// referenced: a reference "matches the PRIVATE IPs of ENIs carrying that SG -
// primary, secondary, IPv6; addresses in delegated prefixes [inf …]".
func (w *World) referenced(e *ENI, d Direction, id vpc.SecurityGroupID, a netip.Addr, mac vpc.ENIID, far *ENI) bool {
	if w.Groups[id] == nil {
		return false // "Peered SG deleted … => rule stays, stale, matches nothing"
	}
	// "Same VPC or active same-region peering (ingress and egress)": of the
	// interfaces, as a group may be used in several VPCs.
	own := w.vpcOf(e)
	for _, other := range w.ENIs {
		if its := w.vpcOf(other); its != own && !w.peered(its, own) || !slices.Contains(other.Groups, id) || !other.holds(a, w.Settings.ReferencesCoverPrefixes) {
			continue
		}
		// "Not preserved through a middlebox/appliance ENI …: match by CIDR
		// only": it counts when the holder of the source sent the packet itself.
		if far == nil {
			// Beyond the VPC an address alone names nobody: other peers may
			// have the same. There it counts when the route leads to the holder.
			return d == Out && w.Settings.EgressReferencesByAddress && w.vpcOf(other) == own || w.direct(e, d, a, mac, other)
		}
		return far == other
	}
	return false
}

// direct reports whether the next hop of a packet from e to a is other itself.
func (w *World) direct(e *ENI, d Direction, a netip.Addr, mac vpc.ENIID, other *ENI) bool {
	return d == Out && w.route(w.Subnets[e.Subnet], &Packet{From: e.ID, Dst: a, Direct: mac}).eni == other
}

// untracked: "tracked unless a TCP/UDP rule allows 0.0.0.0/0 (or ::/0) AND the
// other direction allows 0.0.0.0/0 all ports 0-65535 -> untracked. ICMP always
// tracked."
//
// A packet belongs to an untracked flow when that holds for the flow that it
// begins, or for the flow that it answers: otherwise an answer could begin a tracked
// flow, and an untracked one could not be "cut at once". A SYN that is known to
// belong to no flow answers none.
func (w *World) untracked(e *ENI, d Direction, p *Packet, known bool) bool {
	if !p.ports() || w.tracksAll || d == Out && w.route(w.Subnets[e.Subnet], p).nat != nil {
		return false // "Always tracked: via … NAT GW"
	}
	begins := w.anybody(e, d, p) && w.anyPort(e, !d, p)
	if p.Proto == packet.ProtoTCP && p.Flags&(SYN|ACK) == SYN && !known {
		return begins
	}
	return begins || w.anybody(e, !d, p.reverse()) && w.anyPort(e, d, p)
}

// anybody reports whether a rule for everybody allows p.
func (w *World) anybody(e *ENI, d Direction, p *Packet) bool {
	return w.someRule(e, d, func(r *Rule) bool { return r.everybody(p) && r.Match.matches(p) })
}

// anyPort reports whether a rule for everybody allows each port of p's protocol.
func (w *World) anyPort(e *ENI, d Direction, p *Packet) bool {
	return w.someRule(e, d, func(r *Rule) bool {
		return r.everybody(p) && (r.Proto == -1 || r.Proto == int(p.Proto) && r.From == 0 && r.To == 65535)
	})
}

func (w *World) someRule(e *ENI, d Direction, ok func(*Rule) bool) bool {
	for _, id := range e.Groups {
		if g := w.Groups[id]; g != nil && slices.ContainsFunc(g.Rules[d], func(r Rule) bool { return ok(&r) }) {
			return true
		}
	}
	return false
}

// everybody reports whether the rule is for 0.0.0.0/0, or ::/0 for an IPv6 packet.
func (r *Rule) everybody(p *Packet) bool {
	return r.CIDR.IsValid() && r.CIDR.Bits() == 0 && r.CIDR.Addr().Is4() == p.Src.Is4()
}
