package store

import (
	"encoding/binary"
	"iter"
	"net/netip"
	"slices"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// IPv6Pool is where the IPv6 blocks of VPCs are from: the prefix for
// documentation (RFC 3849), which nobody on the real internet has. Its first
// /56 is no VPC's: what stands for the internet may have addresses there.
var IPv6Pool = netip.MustParsePrefix("2001:db8::/32")

// VPCIPv6Bits and SubnetIPv6Bits are the lengths of the IPv6 blocks of VPCs and
// subnets (EC2 API Reference, AssociateVpcCidrBlock and CreateSubnet, 2026).
const (
	VPCIPv6Bits    = 56
	SubnetIPv6Bits = 64
)

// FreeIPv6Block returns the lowest block of IPv6Pool that no VPC has, or false.
func (s *State) FreeIPv6Block() (netip.Prefix, bool) {
	used := map[netip.Addr]bool{IPv6Pool.Addr(): true}
	for _, v := range s.VPCs.All() {
		for _, c := range v.IPv6CIDRs {
			used[c.CIDR.Addr()] = true
		}
	}
	a := IPv6Pool.Addr()
	for used[a] {
		b := a.As16()
		binary.BigEndian.PutUint64(b[:8], binary.BigEndian.Uint64(b[:8])+1<<(64-VPCIPv6Bits))
		a = netip.AddrFrom16(b)
	}
	return netip.PrefixFrom(a, VPCIPv6Bits), IPv6Pool.Contains(a)
}

// gapKey is the last address of a range of free addresses of a subnet's IPv6
// block: as offset within its /64.
//
// A /64 is too large for the bits of a Space. What is free is a table of ranges,
// no two of which touch; what is not in it and not reserved is in owners6.
type gapKey struct {
	subnet vpc.SubnetID
	last   uint64
}

// owner6 is who has an address, or the /80 that begins there.
type owner6 struct {
	eni    vpc.ENIID
	prefix bool
}

// Offsets within a /64. As of IPv4, nobody has the first four addresses nor the
// last (VPC User Guide, "Subnet sizing for IPv6", 2026).
const (
	firstAddr6 = 4
	lastAddr6  = 1<<64 - 2
	block6Size = 1 << (128 - vpc.IPv6PrefixBits)
	lastBlock6 = 1<<64 - 2*block6Size
)

func offset6(a netip.Addr) uint64 {
	b := a.As16()
	return binary.BigEndian.Uint64(b[8:])
}

// at6 returns the address at an offset of a block.
func at6(block netip.Prefix, offset uint64) netip.Addr {
	b := block.Addr().As16()
	binary.BigEndian.PutUint64(b[8:], offset)
	return netip.AddrFrom16(b)
}

func blockOf6(a netip.Addr) netip.Addr {
	return netip.PrefixFrom(a, vpc.IPv6PrefixBits).Masked().Addr()
}

// owner6 returns who has an address, alone or within a prefix.
func (s *State) owner6(id vpc.SubnetID, a netip.Addr) (owner6, bool) {
	if o, ok := s.owners6.Get(addrKey{id, a}); ok {
		return o, true
	}
	o, ok := s.owners6.Get(addrKey{id, blockOf6(a)})
	return o, ok && o.prefix
}

// gap6 returns the first range of free addresses that ends at the offset or
// above, or false.
func (s *State) gap6(id vpc.SubnetID, offset uint64) (first, last uint64, ok bool) {
	for k, first := range s.gaps6.From(gapKey{id, offset}) {
		return first, k.last, k.subnet == id
	}
	return 0, 0, false
}

// free6 reports whether all addresses between two offsets are free.
func (s *State) free6(id vpc.SubnetID, first, last uint64) bool {
	from, to, ok := s.gap6(id, first)
	return ok && from <= first && last <= to
}

// IPv6Reserved reports whether a is one of the five addresses of a subnet's IPv6
// block that no interface may have.
func IPv6Reserved(a netip.Addr) bool {
	o := offset6(a)
	return o < firstAddr6 || o > lastAddr6
}

// IPv6InUse reports whether an IPv6 address is taken, reserved, or none of the
// subnet.
func (s *State) IPv6InUse(id vpc.SubnetID, a netip.Addr) bool {
	n := s.Subnet(id)
	return n == nil || !n.IPv6.CIDR.Contains(a) || !s.free6(id, offset6(a), offset6(a))
}

// IPv6BlockInUse reports whether any address of a /80 is taken, reserved, or none
// of the subnet.
func (s *State) IPv6BlockInUse(id vpc.SubnetID, p netip.Prefix) bool {
	n := s.Subnet(id)
	return n == nil || !n.IPv6.CIDR.Contains(p.Addr()) || !s.free6(id, offset6(p.Addr()), offset6(p.Addr())+block6Size-1)
}

// FreeIPv6 iterates over the free addresses of a subnet's IPv6 block: upwards
// from offset start to the last, and then from the first on.
func (s *State) FreeIPv6(id vpc.SubnetID, start uint64) iter.Seq[netip.Addr] {
	return func(yield func(netip.Addr) bool) {
		n := s.Subnet(id)
		if n == nil {
			return
		}
		for first, last := range s.ranges6(id, start) {
			for at := first; at <= last; at++ { // the last address of all is in no range
				if !yield(at6(n.IPv6.CIDR, at)) {
					return
				}
			}
		}
	}
}

// FreeIPv6Blocks iterates over the /80s of a subnet's IPv6 block that are free
// altogether, in the order of FreeIPv6.
func (s *State) FreeIPv6Blocks(id vpc.SubnetID, start uint64) iter.Seq[netip.Prefix] {
	return func(yield func(netip.Prefix) bool) {
		n := s.Subnet(id)
		if n == nil {
			return
		}
		for first, last := range s.ranges6(id, start&^(block6Size-1)) {
			if first > lastBlock6 {
				continue
			}
			for at := (first + block6Size - 1) &^ (block6Size - 1); at <= lastBlock6 && at+block6Size-1 <= last; at += block6Size {
				if !yield(netip.PrefixFrom(at6(n.IPv6.CIDR, at), vpc.IPv6PrefixBits)) {
					return
				}
			}
		}
	}
}

// ranges6 iterates over the ranges of free addresses: upwards from offset start,
// and then from the first to it.
func (s *State) ranges6(id vpc.SubnetID, start uint64) iter.Seq2[uint64, uint64] {
	return func(yield func(first, last uint64) bool) {
		for k, first := range s.gaps6.From(gapKey{id, start}) {
			if k.subnet != id {
				break
			}
			if !yield(max(first, start), k.last) {
				return
			}
		}
		for k, first := range s.gaps6.From(gapKey{subnet: id}) {
			if k.subnet != id || first >= start || !yield(first, min(k.last, start-1)) {
				return
			}
		}
	}
}

// setSpace6 gives a subnet its IPv6 block, another, or none, of which all is free.
func (t *Tx) setSpace6(id vpc.SubnetID, cidr netip.Prefix) {
	if old := t.Subnet(id); old != nil && old.IPv6.CIDR == cidr || old == nil && !cidr.IsValid() {
		return
	}
	t.dropSpace6(id)
	if cidr.IsValid() {
		t.gaps6 = t.gaps6.with(gapKey{id, lastAddr6}, firstAddr6)
	}
}

func (t *Tx) dropSpace6(id vpc.SubnetID) {
	for k := range t.gaps6.From(gapKey{subnet: id}) {
		if k.subnet != id {
			return
		}
		t.gaps6 = t.gaps6.without(k)
	}
}

// each6 calls fn for each IPv6 address and /80 of e.
func each6(e *ENI, fn func(first netip.Addr, prefix bool)) {
	if e == nil {
		return
	}
	for _, a := range e.IPv6 {
		fn(a, false)
	}
	for _, p := range e.IPv6Prefixes {
		fn(p.Addr(), true)
	}
}

func has6(e *ENI, first netip.Addr, prefix bool) bool {
	if e == nil {
		return false
	}
	if prefix {
		return slices.Contains(e.IPv6Prefixes, netip.PrefixFrom(first, vpc.IPv6PrefixBits))
	}
	return slices.Contains(e.IPv6, first)
}

// releaseAddrs6 frees what of IPv6 old has and next does not.
func (t *Tx) releaseAddrs6(old, next *ENI) {
	each6(old, func(a netip.Addr, prefix bool) {
		if has6(next, a, prefix) {
			return
		}
		t.owners6 = t.owners6.without(addrKey{old.Subnet, a})
		first, last := span6(a, prefix)
		if from, ok := t.gaps6.Get(gapKey{old.Subnet, first - 1}); ok { // what ends before it
			t.gaps6 = t.gaps6.without(gapKey{old.Subnet, first - 1})
			first = from
		}
		if from, to, ok := t.gap6(old.Subnet, last+1); ok && from == last+1 { // what begins behind it
			last = to
		}
		t.gaps6 = t.gaps6.with(gapKey{old.Subnet, last}, first)
	})
}

// claimAddrs6 takes what of IPv6 e has and old had not.
func (t *Tx) claimAddrs6(e, old *ENI) {
	each6(e, func(a netip.Addr, prefix bool) {
		if has6(old, a, prefix) {
			return
		}
		if prefix && t.IPv6BlockInUse(e.Subnet, netip.PrefixFrom(a, vpc.IPv6PrefixBits)) || !prefix && t.IPv6InUse(e.Subnet, a) {
			t.conflict("address %s of %s", a, e.ID)
			return
		}
		t.owners6 = t.owners6.with(addrKey{e.Subnet, a}, owner6{e.ID, prefix})
		first, last := span6(a, prefix)
		from, to, _ := t.gap6(e.Subnet, first)
		if last < to {
			t.gaps6 = t.gaps6.with(gapKey{e.Subnet, to}, last+1)
		} else {
			t.gaps6 = t.gaps6.without(gapKey{e.Subnet, to})
		}
		if from < first {
			t.gaps6 = t.gaps6.with(gapKey{e.Subnet, first - 1}, from)
		}
	})
}

// span6 returns the first and the last offset of an address or the /80 there.
func span6(a netip.Addr, prefix bool) (first, last uint64) {
	first = offset6(a)
	if prefix {
		return first, first + block6Size - 1
	}
	return first, first
}
