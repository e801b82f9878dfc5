package vpcmodel

import (
	"slices"
	"time"

	"github.com/underlay-cni/underlay/internal/packet"
)

// flow is a flow of one ENI, as its first packet began it. Of untracked ones it is
// remembered that they are, and nothing that would let a packet pass.
type flow struct {
	first     Packet    // tuple of the first packet
	dir       Direction // of the first packet
	untracked bool

	last      time.Duration // when its last packet passed
	began     time.Duration // when its initiator's last packet passed
	exchanges int           // requests that were answered
	asked     bool          // a request waits for its answer
	flags     [2]uint8      // TCP: all flags of the initiator, of the other side
}

// closed reports whether a TCP flow has ended.
func (f *flow) closed() bool {
	return (f.flags[0]|f.flags[1])&RST != 0 || f.flags[0]&f.flags[1]&FIN != 0
}

// established reports whether a TCP flow was answered, and the answer acknowledged.
func (f *flow) established() bool { return f.flags[1] != 0 && f.flags[0]&ACK != 0 }

// find returns the flow of e that p continues (forward) or answers, or nil.
func (w *World) find(e *ENI, d Direction, p *Packet) *flow {
	w.keep(e)
	e.flows = slices.DeleteFunc(e.flows, func(f *flow) bool { return w.idle(e, f) })
	for _, f := range e.flows {
		if f.dir == d && f.continuedBy(p) || f.dir != d && f.answeredBy(p) {
			if f.closed() && p.Flags&(SYN|ACK) == SYN {
				return nil
			}
			return f
		}
	}
	return nil
}

// keep has Peek remember the flows of e before they change.
func (w *World) keep(e *ENI) {
	if w.peeked == nil {
		return
	}
	if _, done := w.peeked[e]; !done {
		w.peeked[e], e.flows = e.flows, clone(e.flows)
	}
}

func (f *flow) continuedBy(p *Packet) bool {
	q := &f.first
	if p.Proto != q.Proto || p.Src != q.Src || p.Dst != q.Dst || p.About != nil {
		return false
	}
	switch {
	case p.ports():
		return p.SrcPort == q.SrcPort && p.DstPort == q.DstPort
	case p.icmp():
		return p.Type == q.Type && p.Ident == q.Ident
	default:
		return true // "Other protocols: only (IP, proto) tracked"
	}
}

func (f *flow) answeredBy(p *Packet) bool {
	q := &f.first
	if p.Proto != q.Proto || p.Src != q.Dst || p.Dst != q.Src || p.About != nil {
		return false
	}
	switch {
	case p.ports():
		return p.SrcPort == q.DstPort && p.DstPort == q.SrcPort
	case p.icmp():
		answer, query := answers[q.Proto][q.Type]
		return query && p.Type == answer && p.Ident == q.Ident
	default:
		return true
	}
}

// idle: "Idle timeouts per ENI (ConnectionTrackingSpecification)".
func (w *World) idle(e *ENI, f *flow) bool {
	switch f.first.Proto {
	case packet.ProtoTCP:
		switch {
		case f.closed():
			return w.Now-f.last >= w.Settings.TCPClosed
		case !f.established():
			return w.Now-f.last >= w.Settings.TCPHandshake
		}
		return w.Now-f.last >= e.Timeouts.TCPEstablished
	case packet.ProtoUDP:
		if f.exchanges > 1 { // "more than one request/response"
			return w.Now-f.last >= e.Timeouts.UDPStream
		}
		return w.Now-f.last >= e.Timeouts.UDP
	case packet.ProtoICMP, packet.ProtoICMPv6:
		return w.Now-f.last >= w.Settings.ICMPTimeout
	default:
		return w.Now-f.began >= w.Settings.OtherTimeout // "reply accepted within 600 s"
	}
}

// touch tells a flow of a packet.
func (w *World) touch(f *flow, d Direction, p *Packet) {
	f.last = w.Now
	side := 0
	if f.dir == d {
		f.began, f.asked = w.Now, true
	} else {
		side = 1
		if f.asked {
			f.exchanges, f.asked = f.exchanges+1, false
		}
	}
	if p.Proto == packet.ProtoTCP {
		f.flags[side] |= p.Flags
	}
}

// track begins a flow. It returns false when the instance may track no more.
func (w *World) track(e *ENI, d Direction, p *Packet) bool {
	if _, query := answers[p.Proto][p.Type]; p.icmp() && !query {
		return true // nothing answers it
	}
	if w.Settings.MaxTracked > 0 {
		// "per-instance conntrack maximum …; over it new packets dropped".
		n := 0
		for _, other := range w.ENIs {
			if other.Instance == e.Instance {
				w.keep(other)
				other.flows = slices.DeleteFunc(other.flows, func(f *flow) bool { return w.idle(other, f) })
				for _, f := range other.flows {
					if !f.untracked {
						n++
					}
				}
			}
		}
		if n >= w.Settings.MaxTracked {
			return false
		}
	}
	w.begin(e, d, p)
	return true
}

// begin remembers a flow. What it follows on is over.
func (w *World) begin(e *ENI, d Direction, p *Packet) *flow {
	e.flows = slices.DeleteFunc(e.flows, func(f *flow) bool { return f.dir == d && f.continuedBy(p) || f.dir != d && f.answeredBy(p) })
	f := &flow{first: *p, dir: d}
	w.touch(f, d, p)
	e.flows = append(e.flows, f)
	return f
}

func (e *ENI) forget(f *flow) {
	e.flows = slices.DeleteFunc(e.flows, func(g *flow) bool { return g == f })
}

// related: "ICMP frag-needed is delivered for tracked flows / untracked / if ICMP
// allowed; i.e. treat related ICMP errors as part of a tracked flow". The packet
// that it quotes went the other way, to the error's destination or from it.
func (w *World) related(e *ENI, d Direction, p *Packet) bool {
	quoted := p.About.packet()
	if quoted.Src != p.Dst {
		return false
	}
	f := w.find(e, !d, quoted)
	return f != nil && (!f.untracked || w.untracked(e, !d, quoted, true))
}
