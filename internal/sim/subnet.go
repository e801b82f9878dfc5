package sim

import (
	"encoding/binary"
	"math/bits"
	"math/rand/v2"
	"net/netip"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// reserved is the number of addresses that EC2 keeps of each subnet: the first
// four and the last.
const reserved = 5

// prefixSize is the number of addresses in a delegated prefix.
const prefixSize = 1 << (32 - vpc.PrefixBits)

// subnet is the address space of one subnet: a bit per address, set when it is
// taken.
type subnet struct {
	id   vpc.SubnetID
	zone int
	base uint32
	size int
	free int
	used []uint64
	rng  *rand.Rand
}

func newSubnet(id vpc.SubnetID, zone int, cidr netip.Prefix, rng *rand.Rand) *subnet {
	b := cidr.Masked().Addr().As4()
	s := &subnet{id: id, zone: zone, base: binary.BigEndian.Uint32(b[:]), size: 1 << (32 - cidr.Bits()), rng: rng}
	s.free = s.size
	s.used = make([]uint64, (s.size+63)/64)
	if s.size < 64 {
		s.used[0] = ^uint64(0) << s.size // beyond the subnet
	}
	for _, i := range []int{0, 1, 2, 3, s.size - 1} {
		s.mark(i)
	}
	return s
}

func (s *subnet) mark(i int) {
	s.used[i/64] |= 1 << (i % 64)
	s.free--
}

func (s *subnet) addr(i int) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], s.base+uint32(i))
	return netip.AddrFrom4(b)
}

func (s *subnet) index(a netip.Addr) int {
	b := a.As4()
	return int(binary.BigEndian.Uint32(b[:]) - s.base)
}

// take takes one address: the first free one from a random place on, since
// EC2 does not give them in order either.
func (s *subnet) take() (netip.Addr, bool) {
	if s.free == 0 {
		return netip.Addr{}, false
	}
	from := s.rng.IntN(s.size)
	w, mask := from/64, ^uint64(0)<<(from%64)
	for {
		if free := ^s.used[w] & mask; free != 0 {
			i := w*64 + bits.TrailingZeros64(free)
			s.mark(i)
			return s.addr(i), true
		}
		w, mask = (w+1)%len(s.used), ^uint64(0)
	}
}

// takePrefix takes an aligned /28 of which no address is taken.
func (s *subnet) takePrefix() (netip.Prefix, bool) {
	if s.free < prefixSize {
		return netip.Prefix{}, false
	}
	from := s.rng.IntN(len(s.used))
	for i := range s.used {
		w := (from + i) % len(s.used)
		for b := 0; b < 64; b += prefixSize {
			if block := uint64(1<<prefixSize-1) << b; s.used[w]&block == 0 {
				s.used[w] |= block
				s.free -= prefixSize
				return netip.PrefixFrom(s.addr(w*64+b), vpc.PrefixBits), true
			}
		}
	}
	return netip.Prefix{}, false
}

func (s *subnet) release(a netip.Addr) {
	i := s.index(a)
	if s.used[i/64]>>(i%64)&1 == 0 {
		panic("an address is given back twice: " + a.String())
	}
	s.used[i/64] &^= 1 << (i % 64)
	s.free++
}

func (s *subnet) releasePrefix(p netip.Prefix) {
	for a := p.Addr(); p.Contains(a); a = a.Next() {
		s.release(a)
	}
}
