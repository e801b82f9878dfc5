package policy

import (
	"cmp"
	"encoding/binary"
	"math/bits"
	"net/netip"
	"slices"
)

// point is a place in the space that an index divides: an IPv6 address, an IPv4
// address, or protocol<<16 | port. The smaller ones stand in lo.
type point struct{ hi, lo uint64 }

func (p point) compare(q point) int {
	return cmp.Or(cmp.Compare(p.hi, q.hi), cmp.Compare(p.lo, q.lo))
}

// next returns the point after p; it wraps round at the end of the space of
// IPv6, where nobody looks.
func (p point) next() point {
	lo, carry := bits.Add64(p.lo, 1, 0)
	return point{p.hi + carry, lo}
}

func (p point) prev() point {
	lo, borrow := bits.Sub64(p.lo, 1, 0)
	return point{p.hi - borrow, lo}
}

func pointOf(a netip.Addr) point {
	if a.Is4() {
		b := a.As4()
		return point{0, uint64(binary.BigEndian.Uint32(b[:]))}
	}
	b := a.As16()
	return point{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}
}

// span is from first to last, both included.
type span struct{ first, last point }

// spanOf returns the addresses of a prefix.
func spanOf(p netip.Prefix) span {
	p = p.Masked()
	first := pointOf(p.Addr())
	last := first
	switch host := p.Addr().BitLen() - p.Bits(); {
	case host >= 64:
		last.lo = ^uint64(0)
		last.hi |= ones(host - 64)
	default:
		last.lo |= ones(host)
	}
	return span{first, last}
}

// ones returns a number whose lowest n bits, 0..64, are set.
func ones(n int) uint64 {
	if n == 64 {
		return ^uint64(0)
	}
	return 1<<n - 1
}

// union sorts spans and joins those that touch.
func union(spans []span) []span {
	slices.SortFunc(spans, func(a, b span) int { return a.first.compare(b.first) })
	out := spans[:0]
	for _, s := range spans {
		if n := len(out); n > 0 {
			last := &out[n-1].last
			// Beyond the space's end nothing begins.
			if s.first.compare(*last) <= 0 || s.first == last.next() {
				if s.last.compare(*last) > 0 {
					*last = s.last
				}
				continue
			}
		}
		out = append(out, s)
	}
	return out
}

// without returns a without b; both are unions.
func without(a, b []span) []span {
	var out []span
	for _, s := range a {
		for _, hole := range b {
			if hole.last.compare(s.first) < 0 || hole.first.compare(s.last) > 0 {
				continue
			}
			if hole.first.compare(s.first) > 0 {
				out = append(out, span{s.first, hole.first.prev()})
			}
			if hole.last.compare(s.last) >= 0 {
				s.first, s.last = point{1, 1}, point{} // nothing is left
				break
			}
			s.first = hole.last.next()
		}
		if s.first.compare(s.last) <= 0 {
			out = append(out, s)
		}
	}
	return out
}

// bitmap has a bit per rule.
type bitmap []uint64

func (b bitmap) flip(i int) { b[i/64] ^= 1 << (i % 64) }

// pool numbers bitmaps; equal ones have one number, the empty one has 0.
type pool struct {
	words   int
	numbers map[string]uint32
	all     []bitmap
	key     []byte
}

func newPool(rules int) *pool {
	p := &pool{words: max(1, (rules+63)/64), numbers: map[string]uint32{}}
	p.number(make(bitmap, p.words))
	return p
}

func (p *pool) number(b bitmap) uint32 {
	p.key = p.key[:0]
	for _, w := range b {
		p.key = binary.LittleEndian.AppendUint64(p.key, w)
	}
	if n, ok := p.numbers[string(p.key)]; ok {
		return n
	}
	n := uint32(len(p.all))
	p.numbers[string(p.key)] = n
	p.all = append(p.all, slices.Clone(b))
	return n
}

// index divides a space into intervals: ends[i] is the last point of the i-th,
// bitmaps[i] the number of the bitmap of the rules that it belongs to.
type index struct {
	ends    []point
	bitmaps []uint32
}

// newIndex divides the space from 0 to last by the spans of each rule, which are
// unions. Neighbours with one bitmap are one interval.
//
// Many rules have the same peers, such as a group of ten thousand: their ends are
// sorted once, and change all those rules' bits together.
func newIndex(p *pool, last point, rules [][]span) index {
	var sets [][]span
	var masks []bitmap // by set: its rules
	for i, spans := range rules {
		if len(spans) == 0 {
			continue
		}
		k := slices.IndexFunc(sets, func(s []span) bool { return sameSpans(s, spans) })
		if k < 0 {
			k = len(sets)
			sets, masks = append(sets, spans), append(masks, make(bitmap, p.words))
		}
		masks[k].flip(i)
	}

	type edge struct {
		at  point
		set int
	}
	var edges []edge // at each, a set begins or has ended
	for i, spans := range sets {
		for _, s := range spans {
			edges = append(edges, edge{s.first, i})
			if s.last != last {
				edges = append(edges, edge{s.last.next(), i})
			}
		}
	}
	slices.SortFunc(edges, func(a, b edge) int { return a.at.compare(b.at) })
	var x index
	now := make(bitmap, p.words)
	put := func(end point) {
		n := p.number(now)
		if k := len(x.ends); k > 0 && x.bitmaps[k-1] == n {
			x.ends[k-1] = end
			return
		}
		x.ends = append(x.ends, end)
		x.bitmaps = append(x.bitmaps, n)
	}
	for i := 0; i < len(edges); {
		at := edges[i].at
		if at != (point{}) {
			put(at.prev())
		}
		for ; i < len(edges) && edges[i].at == at; i++ {
			for w, m := range masks[edges[i].set] {
				now[w] ^= m
			}
		}
	}
	put(last)
	return x
}

// sameSpans compares unions, of which most differ in their ends or are one.
func sameSpans(a, b []span) bool {
	if len(a) != len(b) || a[0] != b[0] || a[len(a)-1] != b[len(b)-1] {
		return false
	}
	return &a[0] == &b[0] || slices.Equal(a, b)
}
