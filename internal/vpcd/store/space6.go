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

// space6 says where to begin to look for what is free in a subnet's IPv6 block:
// below are none. Which addresses are in use is in owners6: a /64 is too large
// for the bits of a Space.
type space6 struct {
	cidr  netip.Prefix
	addr  uint64 // offset of an address
	block uint64 // offset of a /80
}

// owner6 is who has an address, or the /80 that begins there.
type owner6 struct {
	eni    vpc.ENIID
	prefix bool
}

// Offsets within a /64. As of IPv4, nobody has the first four addresses nor the
// last (VPC User Guide, "Subnet sizing for IPv6", 2026).
const (
	firstAddr6  = 4
	lastAddr6   = 1<<64 - 2
	block6Size  = 1 << (128 - vpc.IPv6PrefixBits)
	firstBlock6 = block6Size
	lastBlock6  = 1<<64 - 2*block6Size
)

func offset6(a netip.Addr) uint64 {
	b := a.As16()
	return binary.BigEndian.Uint64(b[8:])
}

func (s space6) at(offset uint64) netip.Addr {
	b := s.cidr.Addr().As16()
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

// nextOwned6 returns the first address or prefix at a or above that somebody of
// the subnet has, or false.
func (s *State) nextOwned6(id vpc.SubnetID, a netip.Addr) (netip.Addr, owner6, bool) {
	for k, o := range s.owners6.From(addrKey{id, a}) {
		return k.addr, o, k.subnet == id
	}
	return netip.Addr{}, owner6{}, false
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
	p, ok := s.space6.Get(id)
	if !ok || !p.cidr.Contains(a) || IPv6Reserved(a) {
		return true
	}
	_, taken := s.owner6(id, a)
	return taken
}

// IPv6BlockInUse reports whether any address of a /80 is taken, reserved, or none
// of the subnet.
func (s *State) IPv6BlockInUse(id vpc.SubnetID, p netip.Prefix) bool {
	sp, ok := s.space6.Get(id)
	if !ok || !sp.cidr.Contains(p.Addr()) {
		return true
	}
	if o := offset6(p.Addr()); o < firstBlock6 || o > lastBlock6 {
		return true
	}
	next, _, ok := s.nextOwned6(id, p.Addr())
	return ok && p.Contains(next)
}

// FreeIPv6 iterates over the free addresses of a subnet's IPv6 block: upwards
// from offset start to the last, and then from the first on.
func (s *State) FreeIPv6(id vpc.SubnetID, start uint64) iter.Seq[netip.Addr] {
	return func(yield func(netip.Addr) bool) {
		p, ok := s.space6.Get(id)
		if !ok {
			return
		}
		start = min(max(start, p.addr), lastAddr6)
		if s.freeAddrs6(id, p, start, lastAddr6, yield) && start > p.addr {
			s.freeAddrs6(id, p, p.addr, start-1, yield)
		}
	}
}

// freeAddrs6 iterates over the free addresses from first to last, which is not
// the end of the block, until yield says false.
func (s *State) freeAddrs6(id vpc.SubnetID, p space6, first, last uint64, yield func(netip.Addr) bool) bool {
	for at := first; at <= last; {
		if o, ok := s.owners6.Get(addrKey{id, blockOf6(p.at(at))}); ok && o.prefix {
			at = at&^(block6Size-1) + block6Size // not 0: nobody has the last /80
			continue
		}
		until := last
		next, _, ok := s.nextOwned6(id, p.at(at))
		if ok && offset6(next) <= last {
			until = offset6(next) - 1 // of offset 0 there is no owner
		}
		for ; at <= until; at++ {
			if !yield(p.at(at)) {
				return false
			}
		}
		if until < last {
			at = until + 1
			if o, _ := s.owners6.Get(addrKey{id, next}); !o.prefix {
				at++
			}
		}
	}
	return true
}

// FreeIPv6Blocks iterates over the /80s of a subnet's IPv6 block that are free
// altogether, in the order of FreeIPv6.
func (s *State) FreeIPv6Blocks(id vpc.SubnetID, start uint64) iter.Seq[netip.Prefix] {
	return func(yield func(netip.Prefix) bool) {
		p, ok := s.space6.Get(id)
		if !ok {
			return
		}
		start = min(max(start&^(block6Size-1), p.block), lastBlock6)
		if s.freeBlocks6(id, p, start, lastBlock6, yield) && start > p.block {
			s.freeBlocks6(id, p, p.block, start-block6Size, yield)
		}
	}
}

func (s *State) freeBlocks6(id vpc.SubnetID, p space6, first, last uint64, yield func(netip.Prefix) bool) bool {
	for at := first; at <= last; at += block6Size {
		block := netip.PrefixFrom(p.at(at), vpc.IPv6PrefixBits)
		if !s.IPv6BlockInUse(id, block) && !yield(block) {
			return false
		}
	}
	return true
}

// setSpace6 gives a subnet its IPv6 block, another, or none.
func (t *Tx) setSpace6(id vpc.SubnetID, cidr netip.Prefix) {
	old, ok := t.space6.Get(id)
	switch {
	case !cidr.IsValid() && ok:
		t.space6 = t.space6.without(id)
	case cidr.IsValid() && old.cidr != cidr:
		t.space6 = t.space6.with(id, space6{cidr: cidr, addr: firstAddr6, block: firstBlock6})
	}
}

// ranges6 calls fn for each IPv6 address and /80 of e.
func ranges6(e *ENI, fn func(first netip.Addr, prefix bool)) {
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
	ranges6(old, func(first netip.Addr, prefix bool) {
		if has6(next, first, prefix) {
			return
		}
		t.owners6 = t.owners6.without(addrKey{old.Subnet, first})
		p, ok := t.space6.Get(old.Subnet)
		if !ok {
			return
		}
		p.addr = min(p.addr, max(offset6(first), firstAddr6))
		p.block = min(p.block, max(offset6(blockOf6(first)), firstBlock6))
		t.space6 = t.space6.with(old.Subnet, p)
	})
}

// claimAddrs6 takes what of IPv6 e has and old had not.
func (t *Tx) claimAddrs6(e, old *ENI) {
	ranges6(e, func(first netip.Addr, prefix bool) {
		if has6(old, first, prefix) {
			return
		}
		if prefix && t.IPv6BlockInUse(e.Subnet, netip.PrefixFrom(first, vpc.IPv6PrefixBits)) || !prefix && t.IPv6InUse(e.Subnet, first) {
			t.conflict("address %s of %s", first, e.ID)
			return
		}
		t.owners6 = t.owners6.with(addrKey{e.Subnet, first}, owner6{e.ID, prefix})
		p, _ := t.space6.Get(e.Subnet)
		was := p
		for a := range t.FreeIPv6(e.Subnet, p.addr) {
			p.addr = offset6(a)
			break
		}
		for b := range t.FreeIPv6Blocks(e.Subnet, p.block) {
			p.block = offset6(b.Addr())
			break
		}
		if p != was {
			t.space6 = t.space6.with(e.Subnet, p)
		}
	})
}
