package fabric

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// prefixBits6 is the length of a delegated IPv6 prefix (EC2 knows no other).
const prefixBits6 = 80

// minMTU6 is the IP length that every link carries (RFC 8200, 5).
const minMTU6 = 1280

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

// words is an IPv6 address as the C side has it in a __be32[4].
func words(a netip.Addr) (w [4]uint32) {
	b := a.As16()
	for i := range w {
		w[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return w
}

// address6 is the address that the C side has in a __be32[4].
func address6(w [4]uint32) netip.Addr {
	var b [16]byte
	for i := range w {
		binary.NativeEndian.PutUint32(b[4*i:], w[i])
	}
	return netip.AddrFrom16(b)
}

func netmask6(p netip.Prefix) [4]uint32 {
	var ones [16]byte
	for i := range ones {
		ones[i] = 0xff
	}
	return words(netip.PrefixFrom(netip.AddrFrom16(ones), p.Bits()).Masked().Addr())
}

// mapping6 is where an address or a prefix stands in map mappings6.
func mapping6(vni uint32, a netip.Prefix) bpfgen.FabricAddress6 {
	return bpfgen.FabricAddress6{Vni: vni, Bits: uint32(a.Bits()), Addr: words(a.Addr())}
}

// rule6 is a rule of IPv4 without its block as one of IPv6.
func rule6(r bpfgen.FabricRule) bpfgen.FabricRule6 {
	return bpfgen.FabricRule6{Group: r.Group, From: r.From, To: r.To, Protocol: r.Protocol, AllProtocols: r.AllProtocols}
}

// compareRules6 is compareRules for IPv6.
func compareRules6(a, b bpfgen.FabricRule6) int {
	return cmp.Or(cmp.Compare(b.Everybody, a.Everybody), cmp.Compare(a.Group, b.Group), slices.Compare(a.Net[:], b.Net[:]), slices.Compare(a.Mask[:], b.Mask[:]),
		cmp.Compare(a.AllProtocols, b.AllProtocols), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.From, b.From), cmp.Compare(a.To, b.To))
}

// policy6Of puts the rules of groups for IPv6 together, as policyOf does those
// for IPv4, which tells of groups that are not there, and what numbers the others
// have.
func policy6Of(groups []vpc.SecurityGroupID, numbers [maxGroups]uint64, timeouts IdleTimeouts, all map[vpc.SecurityGroupID]*ruleset) (*bpfgen.FabricPolicy6, error) {
	var errs []error
	p := &bpfgen.FabricPolicy6{
		Groups:        numbers,
		TcpTimeout:    seconds(timeouts.TCPEstablished, defaultTCPEstablished),
		UdpTimeout:    seconds(timeouts.UDP, defaultUDP),
		StreamTimeout: seconds(timeouts.UDPStream, defaultUDPStream),
	}
	for d := range p.Rules {
		var rules []bpfgen.FabricRule6
		for _, id := range groups {
			if s := all[id]; s != nil {
				rules = append(rules, s.rules6[d]...)
			}
		}
		slices.SortFunc(rules, compareRules6)
		rules = slices.Compact(rules)
		if len(rules) > maxRules {
			errs = append(errs, fmt.Errorf("has %d rules for IPv6 in one direction, of which %d count", len(rules), maxRules))
			rules = rules[:maxRules]
		}
		p.Count[d] = uint32(copy(p.Rules[d][:], rules))
		p.Open[d] = uint32(openTo6(rules))
	}
	p.Version = version(p.Groups, p.TcpTimeout, p.UdpTimeout, p.StreamTimeout, p.Count, p.Rules[egress][:p.Count[egress]], p.Rules[ingress][:p.Count[ingress]])
	return p, errors.Join(errs...)
}

// openTo6 tells of which protocols rules open all ports to ::/0.
func openTo6(rules []bpfgen.FabricRule6) (open bpfgen.FabricOpenFlag) {
	for _, r := range rules {
		switch {
		case r.Everybody == 0:
		case r.AllProtocols == 1:
			open |= bpfgen.FabricOpenFlagOPEN_TCP | bpfgen.FabricOpenFlagOPEN_UDP
		case r.From != 0 || r.To != 65535:
		case r.Protocol == protoTCP:
			open |= bpfgen.FabricOpenFlagOPEN_TCP
		case r.Protocol == protoUDP:
			open |= bpfgen.FabricOpenFlagOPEN_UDP
		}
	}
	return open
}
