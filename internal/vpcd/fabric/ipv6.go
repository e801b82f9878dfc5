package fabric

import (
	"fmt"
	"net/netip"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// prefixBits6 is the length of a delegated IPv6 prefix (EC2 knows no other).
const prefixBits6 = 80

// RouterAddr6 is the router of every subnet that has an IPv6 block, beside the
// block's own first address (VPC user guide, "Subnet CIDR reservations"; AWS's
// router answers at it too).
var RouterAddr6 = netip.MustParseAddr("fe80:ec2::1")

// isBlock6 tells whether a subnet can have the block.
func isBlock6(p netip.Prefix) bool {
	return p.Addr().Is6() && !p.Addr().Is4In6() && p.Bits() >= 44 && p.Bits() <= 64 && p.Bits()%4 == 0
}

// checkAddress6 checks an interface's IPv6 address or prefix.
func checkAddress6(a netip.Prefix, s Subnet) error {
	if a.Bits() != 128 && a.Bits() != prefixBits6 || a != a.Masked() {
		return fmt.Errorf("address %s is neither a /128 nor an aligned /%d", a, prefixBits6)
	}
	if !s.CIDR6.IsValid() || !s.CIDR6.Contains(a.Addr()) {
		return fmt.Errorf("address %s is not in its subnet's IPv6 block %s", a, s.CIDR6)
	}
	return nil
}

// holders6 knows which interfaces hold which IPv6 addresses. A prefix has too
// many to list them.
type holders6 struct {
	whole map[block6]vpc.ENIID
	part  map[block6]map[netip.Addr]vpc.ENIID // single addresses, by the prefix that they are in
}

// block6 is a prefix of prefixBits6 of a VPC.
type block6 struct {
	vni uint32
	netip.Prefix
}

func newHolders6() *holders6 {
	return &holders6{map[block6]vpc.ENIID{}, map[block6]map[netip.Addr]vpc.ENIID{}}
}

func blockOf(vni uint32, a netip.Addr) block6 {
	return block6{vni, netip.PrefixFrom(a, prefixBits6).Masked()}
}

// check says whether another interface holds what i is to hold.
func (h *holders6) check(i Interface) error {
	for _, a := range i.Addresses {
		if !a.Addr().Is6() {
			continue
		}
		b := blockOf(i.VNI, a.Addr())
		if other, ok := h.whole[b]; ok {
			return fmt.Errorf("address %s is held by %s", a, other)
		}
		if other, ok := h.part[b][a.Addr()]; ok && a.IsSingleIP() {
			return fmt.Errorf("address %s is held by %s", a, other)
		}
		if a.IsSingleIP() {
			continue
		}
		for single, other := range h.part[b] {
			return fmt.Errorf("address %s is held by %s", single, other)
		}
	}
	return nil
}

func (h *holders6) add(i Interface) {
	for _, a := range i.Addresses {
		if !a.Addr().Is6() {
			continue
		}
		b := blockOf(i.VNI, a.Addr())
		if a.Bits() == prefixBits6 {
			h.whole[b] = i.ID
			continue
		}
		if h.part[b] == nil {
			h.part[b] = map[netip.Addr]vpc.ENIID{}
		}
		h.part[b][a.Addr()] = i.ID
	}
}
