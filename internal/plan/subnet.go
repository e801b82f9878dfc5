package plan

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

const (
	// reserved are the addresses of a subnet that EC2 keeps: the first four
	// and the last.
	reserved = 5
	// smallest and largest are the bounds of a subnet's prefix length.
	smallest, largest = 28, 16
)

// Subnet is a subnet and what is taken of it already.
type Subnet struct {
	Name string       `json:"name"` // its ID, or the CIDR again
	CIDR netip.Prefix `json:"cidr"`
	Zone string       `json:"zone,omitempty"`
	Used int          `json:"used"` // addresses, beside the five that EC2 keeps; those in CIDR reservations too
	// Blocks is how many aligned /28s are wholly free, if BlocksKnown. If not,
	// the used addresses count as packed: the best case for prefixes.
	Blocks      int  `json:"blocks"`
	BlocksKnown bool `json:"blocksKnown"`
	// Kept is how many of the /28s that CIDR reservations keep for prefixes are
	// wholly free. They are no part of Blocks, nor of what is free otherwise.
	Kept int `json:"kept28s"`
	ENIs int `json:"enis"` // network interfaces in it
}

// NewSubnet returns a subnet of which used addresses are taken, none knows
// where.
func NewSubnet(cidr netip.Prefix, used int) (Subnet, error) {
	s := Subnet{Name: cidr.String(), CIDR: cidr, Used: used}
	switch {
	case !cidr.IsValid() || !cidr.Addr().Is4():
		return s, fmt.Errorf("%s is no IPv4 subnet; use one such as 10.0.0.0/20", cidr)
	case cidr != cidr.Masked():
		return s, fmt.Errorf("%s starts within a subnet; use %s", cidr, cidr.Masked())
	case cidr.Bits() < largest || cidr.Bits() > smallest:
		return s, fmt.Errorf("%s cannot be a subnet of a VPC; use a size from /%d to /%d", cidr, largest, smallest)
	case used < 0 || used > s.size():
		return s, fmt.Errorf("%s cannot have %d addresses in use; it has %d beside the %d that EC2 keeps", cidr, used, s.size(), reserved)
	}
	s.Blocks = max(0, s.wholeBlocks()-ceil(max(0, used-s.edge()), ipam.PrefixAddresses))
	return s, nil
}

// size is how many addresses can be used at all.
func (s Subnet) size() int { return 1<<(32-s.CIDR.Bits()) - reserved }

// wholeBlocks is how many aligned /28s hold none of EC2's own addresses: all
// but the first and the last.
func (s Subnet) wholeBlocks() int { return max(0, 1<<(smallest-s.CIDR.Bits())-2) }

// edge is how many usable addresses are in no whole block.
func (s Subnet) edge() int { return s.size() - s.wholeBlocks()*ipam.PrefixAddresses }

// Free is how many addresses are left.
func (s Subnet) Free() int { return s.size() - s.Used }

// FreeBlocks counts the aligned /28s in which no address is taken. used lists
// all that is: EC2 says which, interface by interface. Those within CIDR
// reservations count as kept if they are for prefixes, and else not at all.
func (s *Subnet) FreeBlocks(used []netip.Addr, prefixes []netip.Prefix, reserved []vpc.Reservation) {
	taken := map[netip.Prefix]bool{}
	block := func(a netip.Addr) {
		if s.CIDR.Contains(a) {
			p, _ := a.Prefix(smallest)
			taken[p] = true
		}
	}
	first := s.CIDR.Addr().As4()
	last := first
	for i, n := 3, 1<<(32-s.CIDR.Bits())-1; n > 0; i, n = i-1, n>>8 {
		last[i] |= byte(n)
	}
	block(netip.AddrFrom4(first))
	block(netip.AddrFrom4(last))
	for _, a := range used {
		block(a)
	}
	for _, p := range prefixes {
		block(p.Addr())
	}
	s.Blocks, s.Kept, s.BlocksKnown = 0, 0, true
	b := netip.PrefixFrom(s.CIDR.Addr(), smallest)
	for range 1 << (smallest - s.CIDR.Bits()) {
		if !taken[b] {
			switch i := slices.IndexFunc(reserved, func(r vpc.Reservation) bool { return r.CIDR.Overlaps(b) }); {
			case i < 0:
				s.Blocks++
			case reserved[i].Prefixes && reserved[i].CIDR.Bits() <= smallest:
				s.Kept++
			}
		}
		b = netip.PrefixFrom(after(b), smallest)
	}
}

// after returns the first address after a /28.
func after(b netip.Prefix) netip.Addr {
	a := b.Addr().As4()
	n := binary.BigEndian.Uint32(a[:]) + ipam.PrefixAddresses
	binary.BigEndian.PutUint32(a[:], n)
	return netip.AddrFrom4(a)
}

// Share is what one CNI would take of a subnet.
type Share struct {
	Holding
	Addresses int  `json:"addresses"`
	Left      int  `json:"left"`       // addresses; negative: so many are lacking
	BlocksGap int  `json:"lacking28s"` // aligned /28s that are lacking although addresses may be left
	Fits      bool `json:"fits"`
}

// take works out what is left of s after h and reserve. Single addresses count
// as placed outside the whole free /28s as long as there is room: the best case.
func (s Subnet) take(h Holding, reserve int) Share {
	n := Share{Holding: h, Addresses: h.Addresses()}
	kept := min(h.Prefixes, s.Kept) // EC2 gives these first
	n.Left = s.Free() - (n.Addresses - kept*ipam.PrefixAddresses) - reserve
	if h.Prefixes > kept {
		outside := max(0, s.Free()-s.Blocks*ipam.PrefixAddresses)
		eaten := ceil(max(0, h.ENIs+h.Singles+reserve-outside), ipam.PrefixAddresses)
		n.BlocksGap = max(0, h.Prefixes-kept-max(0, s.Blocks-eaten))
	}
	n.Fits = n.Left >= 0 && n.BlocksGap == 0
	return n
}
