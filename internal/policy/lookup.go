package policy

import (
	"encoding/binary"
	"math/bits"
)

// Judge says what the tables make of the first packet of a flow, as the kernel's
// programs do.
func (t *Tables) Judge(dir Direction, f Flow) (out [Gates]Verdict) {
	f.Src, f.Dst = f.Src.Unmap(), f.Dst.Unmap()
	for g := range out {
		switch {
		case f.FromHost && dir == Ingress:
			out[g] = Verdict{Allow: true, Rule: RuleHost}
		case f.Src == f.Dst:
			out[g] = Verdict{Allow: true, Rule: RuleSelf}
		case t.Gates[g] == nil:
			out[g] = Verdict{Allow: true}
		default:
			out[g] = t.Gates[g].judge(dir, f)
		}
	}
	return out
}

func (t *Table) word(cell uint32, i uint32) uint32 {
	return binary.LittleEndian.Uint32(t.Cells[cell*CellSize+4*i:])
}

func (t *Table) wide(cell uint32, i uint32) uint64 {
	return binary.LittleEndian.Uint64(t.Cells[cell*CellSize+8*i:])
}

// rank returns the number of the interval that has the key: less says whether
// the end in a cell's slot is before it.
func rank(first uint32, levels, fan uint32, less func(cell, slot uint32) bool) uint32 {
	node, inner, width := uint32(0), uint32(0), uint32(1)
	for {
		n := uint32(0)
		for n < fan && less(first+node, n) {
			n++
		}
		if levels--; levels == 0 {
			return (node-inner)*fan + n
		}
		node = node*fan + 1 + n
		inner += width
		width *= fan
	}
}

func (t *Table) judge(dir Direction, f Flow) Verdict {
	head := 1 + uint32(dir)
	mode := t.word(head, wordMode)
	if mode == modeNone {
		return Verdict{Allow: true}
	}
	levels := t.word(head, wordLevels)
	remote := f.Src
	if dir == Egress {
		remote = f.Dst
	}
	var address uint32
	var all uint32
	key := pointOf(remote)
	if remote.Is4() {
		first := t.word(head, wordIPv4)
		r := rank(first, levels&0xff, words, func(cell, slot uint32) bool { return t.word(cell, slot) < uint32(key.lo) })
		address = t.word(t.word(head, wordIPv4Bitmaps)+r/words, r%words)
		all = t.word(head, wordEverybody4)
	} else {
		first := t.word(head, wordIPv6)
		r := rank(first, levels>>8&0xff, keys6, func(cell, slot uint32) bool {
			return point{t.wide(cell, 2*slot), t.wide(cell, 2*slot+1)}.compare(key) < 0
		})
		address = t.word(t.word(head, wordIPv6Bitmaps)+r/words, r%words)
		all = t.word(head, wordEverybody6)
	}
	want := uint32(f.Protocol) << 16
	switch f.Protocol {
	case TCP, UDP, SCTP:
		want |= uint32(f.DstPort)
	case ICMP, ICMPv6:
		want |= uint32(f.ICMPType)<<8 | uint32(f.ICMPCode)
	}
	r := rank(t.word(head, wordPorts), levels>>16&0xff, words, func(cell, slot uint32) bool { return t.word(cell, slot) < want })
	port := t.word(t.word(head, wordPortBitmaps)+r/words, r%words)

	each := levels >> 24
	base := t.word(head, wordBitmaps)
	for i := range each * bitsInCell / 64 {
		both := t.wide(base+address*each, i) & t.wide(base+port*each, i)
		if both == 0 {
			continue
		}
		bit := i*64 + uint32(bits.TrailingZeros64(both))
		v := Verdict{Allow: true, Rule: RuleID(t.word(t.word(head, wordRules)+bit/words, bit%words))}
		v.Untracked = t.untracked(dir, f, base, port, all, each)
		return v
	}
	return Verdict{Allow: mode == modeAudit, Audit: mode == modeAudit, Rule: RuleID(t.word(head, wordFallback))}
}

// untracked says whether a rule for everybody allows the flow, and rules let
// everybody's packets of the protocol go the other way.
func (t *Table) untracked(dir Direction, f Flow, base, port, all, each uint32) bool {
	var open uint32
	switch f.Protocol {
	case TCP:
		open = openTCP
	case UDP:
		open = openUDP
	default:
		return false
	}
	if !f.Src.Is4() {
		open <<= ipv6
	}
	if t.word(1+uint32(1-dir), wordOpen)&open == 0 {
		return false
	}
	for i := range each * bitsInCell / 64 {
		if t.wide(base+all*each, i)&t.wide(base+port*each, i) != 0 {
			return true
		}
	}
	return false
}
