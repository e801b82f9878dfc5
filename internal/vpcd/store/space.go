package store

import (
	"encoding/binary"
	"iter"
	"math/bits"
	"net/netip"
	"slices"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// Space says which addresses of one subnet are in use, one bit per address, and
// which ranges reservations set aside. EC2's five, the first four and the last,
// are in use from the beginning. A Space that has been published is not
// changed.
type Space struct {
	base   uint32
	size   int
	free   int      // not in use, set aside or not
	chunks []*chunk // copied one by one, so that an update of a /16 copies 512 bytes
	aside  []span   // in order; no two overlap
}

// span is a range that a reservation sets aside.
type span struct {
	first, n int
	prefixes bool // for delegated prefixes
}

const (
	chunkBits = 4096
	blockSize = 1 << (32 - vpc.PrefixBits) // addresses in a delegated prefix
	blockMask = 1<<blockSize - 1
)

type chunk [chunkBits / 64]uint64

func newSpace(cidr netip.Prefix) *Space {
	s := &Space{base: number(cidr.Masked().Addr()), size: 1 << (32 - cidr.Bits())}
	s.chunks = make([]*chunk, (s.size+chunkBits-1)/chunkBits)
	for i := range s.chunks {
		s.chunks[i] = new(chunk)
	}
	// What lies beyond a small subnet is in use for ever.
	for i := s.size; i < len(s.chunks)*chunkBits; i++ {
		s.chunks[i/chunkBits][i%chunkBits/64] |= 1 << (i % 64)
	}
	s.free = s.size
	for _, i := range []int{0, 1, 2, 3, s.size - 1} {
		s.flip(i, 1)
	}
	return s
}

func number(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

func (s *Space) addr(i int) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], s.base+uint32(i))
	return netip.AddrFrom4(b)
}

// clone returns a copy that shares all chunks.
func (s *Space) clone() *Space {
	c := *s
	c.chunks = append([]*chunk(nil), s.chunks...)
	return &c
}

// used reports whether any of n addresses from i on is in use.
func (s *Space) used(i, n int) bool {
	for ; n > 0; i, n = i+1, n-1 {
		if i < 0 || i >= s.size || s.chunks[i/chunkBits][i%chunkBits/64]&(1<<(i%64)) != 0 {
			return true
		}
	}
	return false
}

// flip inverts n bits from i on, all of which are equal. The chunk is copied.
func (s *Space) flip(i, n int) {
	c := *s.chunks[i/chunkBits]
	was := c[i%chunkBits/64] & (1 << (i % 64))
	for j := i; j < i+n; j++ {
		c[j%chunkBits/64] ^= 1 << (j % 64)
	}
	s.chunks[i/chunkBits] = &c
	if was == 0 {
		s.free -= n
	} else {
		s.free += n
	}
}

// setAside keeps a range of the subnet back, in use or not. It returns false
// when the range is not in the subnet or overlaps one that is kept back.
func (s *Space) setAside(cidr netip.Prefix, prefixes bool) bool {
	n := span{int(number(cidr.Addr())) - int(s.base), 1 << (32 - cidr.Bits()), prefixes}
	if n.first < 0 || n.first+n.n > s.size {
		return false
	}
	at, _ := slices.BinarySearchFunc(s.aside, n.first, func(o span, first int) int { return o.first - first })
	if at > 0 && s.aside[at-1].first+s.aside[at-1].n > n.first || at < len(s.aside) && s.aside[at].first < n.first+n.n {
		return false
	}
	s.aside = slices.Insert(slices.Clone(s.aside), at, n)
	return true
}

// bringBack ends what setAside began.
func (s *Space) bringBack(cidr netip.Prefix) {
	first := int(number(cidr.Addr())) - int(s.base)
	s.aside = slices.DeleteFunc(slices.Clone(s.aside), func(o span) bool { return o.first == first })
}

// freeIn counts the free addresses of a span.
func (s *Space) freeIn(p span) int {
	n := 0
	for i := p.first; i < p.first+p.n; {
		w := ^s.chunks[i/chunkBits][i%chunkBits/64] >> (i % 64)
		step := min(64-i%64, p.first+p.n-i)
		if step < 64 {
			w &= 1<<step - 1
		}
		n += bits.OnesCount64(w)
		i += step
	}
	return n
}

// Free returns how many addresses are free and not set aside.
func (s *Space) Free() int {
	n := s.free
	for _, p := range s.aside {
		n -= s.freeIn(p)
	}
	return n
}

// FreeForPrefixes returns how many addresses are free and not set aside for
// something else than prefixes.
func (s *Space) FreeForPrefixes() int {
	n := s.free
	for _, p := range s.aside {
		if !p.prefixes {
			n -= s.freeIn(p)
		}
	}
	return n
}

// Reserved reports whether a is one of the five addresses that no interface
// may have.
func (s *Space) Reserved(a netip.Addr) bool {
	i := int(number(a)) - int(s.base)
	return i >= 0 && i < 4 || i == s.size-1
}

// InUse reports whether a is taken, reserved, or no address of the subnet.
func (s *Space) InUse(a netip.Addr) bool { return s.used(int(number(a))-int(s.base), 1) }

// BlockInUse reports whether any address of the /28 is taken or reserved.
func (s *Space) BlockInUse(p netip.Prefix) bool {
	return s.used(int(number(p.Masked().Addr()))-int(s.base), blockSize)
}

// gaps iterates over the ranges that nothing sets aside, in order.
func (s *Space) gaps() iter.Seq[span] {
	return func(yield func(span) bool) {
		at := 0
		for _, p := range s.aside {
			if p.first > at && !yield(span{first: at, n: p.first - at}) {
				return
			}
			at = p.first + p.n
		}
		if at < s.size {
			yield(span{first: at, n: s.size - at})
		}
	}
}

// addrs iterates over the free addresses of a range, from the one at offset
// start of the subnet on.
func (s *Space) addrs(p span, start int, yield func(netip.Addr) bool) bool {
	for i := max(p.first, start); i < p.first+p.n; {
		w := ^s.chunks[i/chunkBits][i%chunkBits/64] >> (i % 64)
		step := min(64-i%64, p.first+p.n-i)
		if step < 64 {
			w &= 1<<step - 1
		}
		for ; w != 0; w &= w - 1 {
			if !yield(s.addr(i + bits.TrailingZeros64(w))) {
				return false
			}
		}
		i += step
	}
	return true
}

// blocks iterates over the aligned /28s of a range that are free altogether,
// likewise.
func (s *Space) blocks(p span, start int, yield func(netip.Prefix) bool) bool {
	for i := (max(p.first, start) + blockSize - 1) &^ (blockSize - 1); i+blockSize <= p.first+p.n; i += blockSize {
		if s.chunks[i/chunkBits][i%chunkBits/64]>>(i%64)&blockMask == 0 && !yield(netip.PrefixFrom(s.addr(i), vpc.PrefixBits)) {
			return false
		}
	}
	return true
}

// FreeAddrs iterates over the free addresses that are not set aside: upwards
// from the one at offset start of the subnet to the last, and then from the
// first on. Offsets are those of Size.
func (s *Space) FreeAddrs(start int) iter.Seq[netip.Addr] {
	return func(yield func(netip.Addr) bool) {
		for p := range s.gaps() {
			if !s.addrs(p, start, yield) {
				return
			}
		}
		for p := range s.gaps() {
			if p.first >= start {
				return
			}
			p.n = min(p.n, start-p.first)
			if !s.addrs(p, 0, yield) {
				return
			}
		}
	}
}

// FreeBlocks iterates over the aligned /28s that are free altogether, in the
// order of FreeAddrs: first those within ranges that are set aside for
// prefixes, then those that are in no range at all.
func (s *Space) FreeBlocks(start int) iter.Seq[netip.Prefix] {
	start &^= blockSize - 1
	return func(yield func(netip.Prefix) bool) {
		for _, kept := range []bool{true, false} {
			ranges := slices.Values(s.aside)
			if !kept {
				ranges = s.gaps()
			}
			for p := range ranges {
				if p.prefixes == kept && !s.blocks(p, start, yield) {
					return
				}
			}
			for p := range ranges {
				p.n = min(p.n, start-p.first)
				if p.prefixes == kept && !s.blocks(p, 0, yield) {
					return
				}
			}
		}
	}
}

// Size returns how many addresses the subnet has.
func (s *Space) Size() int { return s.size }
