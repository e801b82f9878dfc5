package store

import (
	"encoding/binary"
	"math/bits"
	"net/netip"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// Space says which addresses of one subnet are in use: one bit per address.
// EC2's five, the first four and the last, are in use from the beginning. A
// Space that has been published is not changed.
type Space struct {
	base   uint32
	size   int
	free   int
	chunks []*chunk // copied one by one, so that an update of a /16 copies 512 bytes
}

const (
	chunkBits  = 4096
	blockSize  = 1 << (32 - vpc.PrefixBits) // addresses in a delegated prefix
	blockMask  = 1<<blockSize - 1
	blocksWord = 64 / blockSize
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

// Free returns how many addresses are free.
func (s *Space) Free() int { return s.free }

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

// FreeAddrs returns the n lowest free addresses, or as many as there are. None
// of except is among them.
func (s *Space) FreeAddrs(n int, except func(netip.Addr) bool) []netip.Addr {
	var out []netip.Addr
	for ci, c := range s.chunks {
		for wi, w := range c {
			for w = ^w; w != 0 && len(out) < n; w &= w - 1 {
				a := s.addr(ci*chunkBits + wi*64 + bits.TrailingZeros64(w))
				if except == nil || !except(a) {
					out = append(out, a)
				}
			}
			if len(out) >= n {
				return out
			}
		}
	}
	return out
}

// FreeBlocks returns the n lowest aligned /28s that are free altogether, or as
// many as there are. None of except is among them.
func (s *Space) FreeBlocks(n int, except func(netip.Prefix) bool) []netip.Prefix {
	var out []netip.Prefix
	for ci, c := range s.chunks {
		for wi, w := range c {
			if w == ^uint64(0) {
				continue
			}
			for b := 0; b < blocksWord && len(out) < n; b++ {
				if w>>(b*blockSize)&blockMask != 0 {
					continue
				}
				p := netip.PrefixFrom(s.addr(ci*chunkBits+wi*64+b*blockSize), vpc.PrefixBits)
				if except == nil || !except(p) {
					out = append(out, p)
				}
			}
			if len(out) >= n {
				return out
			}
		}
	}
	return out
}
