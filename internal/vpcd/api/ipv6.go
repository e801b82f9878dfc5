package api

import (
	"context"
	"iter"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func (a *API) ipv6Handlers(h map[string]query.Handler) {
	h["AssociateSubnetCidrBlock"] = handle("AssociateSubnetCidrBlock", "SubnetId Ipv6CidrBlock", a.associateSubnetCidrBlock)
	h["DisassociateSubnetCidrBlock"] = handle("DisassociateSubnetCidrBlock", "AssociationId", a.disassociateSubnetCidrBlock)
	h["AssignIpv6Addresses"] = handle("AssignIpv6Addresses", "NetworkInterfaceId Ipv6Addresses Ipv6AddressCount Ipv6Prefix Ipv6PrefixCount", a.assignIPv6Addresses)
	h["UnassignIpv6Addresses"] = handle("UnassignIpv6Addresses", "NetworkInterfaceId Ipv6Addresses Ipv6Prefix", a.unassignIPv6Addresses)
}

// wantedIPv6 is what a request says about the IPv6 addresses of an interface:
// addresses or /80s by name, or how many.
type wantedIPv6 struct {
	addrs       []netip.Addr
	prefixes    []netip.Prefix
	addrCount   int
	prefixCount int
	unsaid      bool // nothing: as the subnet says
}

// named reports whether any address is asked for by name.
func (w wantedIPv6) named() bool { return len(w.addrs)+len(w.prefixes) > 0 }

// slots returns how many of an interface's IPv6 addresses are asked for.
func (w wantedIPv6) slots() int {
	return len(w.addrs) + len(w.prefixes) + w.addrCount + w.prefixCount
}

func parseIPv6Addr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || !a.Is6() || a.Is4In6() || a.Zone() != "" {
		return a, query.Errorf("InvalidParameterValue", "Value (%s) for parameter ipv6Address is invalid. Invalid IPv6 address.", s)
	}
	return a, nil
}

func parseIPv6Prefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || !p.Addr().Is6() || p.Addr().Is4In6() || p.Bits() != vpc.IPv6PrefixBits || p != p.Masked() {
		return p, query.Errorf("InvalidParameterValue", "Value (%s) for parameter ipv6Prefix is invalid. It must be an aligned /%d.", s, vpc.IPv6PrefixBits)
	}
	return p, nil
}

// parseWantedIPv6 reads the IPv6 addresses that CreateNetworkInterface and
// RunInstances ask for. A count of 0 is an answer too: none, whatever the subnet
// says (EC2 API Reference, CreateNetworkInterface, "Ipv6AddressCount", 2026).
func parseWantedIPv6(addrs []query.Ipv6Address, addrCount *int64, blocks []query.Ipv6Prefix, prefixCount *int64) (wantedIPv6, error) {
	if len(addrs) == 0 && addrCount == nil && len(blocks) == 0 && prefixCount == nil {
		return wantedIPv6{unsaid: true}, nil
	}
	return readIPv6(collect(addrs, func(x query.Ipv6Address) string { return deref(x.Ipv6Address) }), addrCount,
		collect(blocks, func(x query.Ipv6Prefix) string { return deref(x.Ipv6Prefix) }), prefixCount)
}

// readIPv6 reads addresses, prefixes and their counts, of which one may be given.
// The words are those seen in the field (ansible pull request 40334 and
// karpenter-provider-aws issue 2187).
func readIPv6(addrs []string, addrCount *int64, blocks []string, prefixCount *int64) (wantedIPv6, error) {
	var w wantedIPv6
	var err error
	if w.addrCount, err = count(addrCount, "ipv6AddressCount"); err != nil {
		return w, err
	}
	if w.prefixCount, err = count(prefixCount, "ipv6PrefixCount"); err != nil {
		return w, err
	}
	for _, s := range addrs {
		x, err := parseIPv6Addr(s)
		if err != nil {
			return w, err
		}
		if slices.Contains(w.addrs, x) {
			return w, query.Errorf("InvalidParameterValue", "The address %s is given twice", x)
		}
		w.addrs = append(w.addrs, x)
	}
	for _, s := range blocks {
		p, err := parseIPv6Prefix(s)
		if err != nil {
			return w, err
		}
		if slices.Contains(w.prefixes, p) {
			return w, query.Errorf("InvalidParameterValue", "The prefix %s is given twice", p)
		}
		w.prefixes = append(w.prefixes, p)
	}
	ways := 0
	for _, n := range []int{len(w.addrs), len(w.prefixes), w.addrCount, w.prefixCount} {
		if n > 0 {
			ways++
		}
	}
	switch {
	case ways > 1 && len(w.prefixes)+w.prefixCount > 0:
		return w, query.Errorf("InvalidParameterValue", "You can and can only specify one of ipv6-addresses or ipv6-addresses-count ipv6-prefix and ipv6-prefix-count.")
	case ways > 1:
		return w, query.Errorf("InvalidParameterCombination", "IPv6 addresses and IPv6 address count may not be specified on the same request")
	}
	return w, nil
}

// pickIPv6 returns how IPv6 addresses are chosen, as pick does.
func (a *API) pickIPv6() picker {
	if a.chaos.Get().Addresses == chaos.AddressesScattered {
		return picker{start: rand.Int, run: 1}
	}
	return picker{start: func() int { return 0 }, run: math.MaxInt}
}

// offsets makes of what iterates from an offset within a /64 what picked takes:
// its starts are of half the range.
func offsets[T any](free func(id vpc.SubnetID, start uint64) iter.Seq[T], id vpc.SubnetID) func(start int) iter.Seq[T] {
	return func(start int) iter.Seq[T] { return free(id, uint64(start)<<1) }
}

// allocateIPv6 finds what is wanted in the subnet, as allocate does.
func (a *API) allocateIPv6(tx *store.Tx, n *store.Subnet, w wantedIPv6) (wantedIPv6, error) {
	if w.slots() == 0 {
		return w, nil
	}
	block := n.IPv6.CIDR
	if !block.IsValid() {
		return w, query.Errorf("InvalidParameterValue", "The subnet '%s' has no IPv6 CIDR block. Associate one with it first.", n.ID)
	}
	for _, x := range w.addrs {
		switch {
		case !block.Contains(x):
			return w, query.Errorf("InvalidParameterValue", "Address %s does not fall within the subnet's address range", x)
		case store.IPv6Reserved(x):
			return w, query.Errorf("InvalidParameterValue", "Address %s is in subnet's reserved address range", x)
		case tx.IPv6InUse(n.ID, x):
			return w, taken(x)
		}
	}
	for _, p := range w.prefixes {
		switch {
		case !block.Contains(p.Addr()):
			return w, query.Errorf("InvalidParameterValue", "Prefix %s does not fall within the subnet's address range", p)
		case store.IPv6Reserved(p.Addr()) || store.IPv6Reserved(lastOfIPv6(p)):
			return w, query.Errorf("InvalidParameterValue", "Prefix %s is in subnet's reserved address range", p)
		case tx.IPv6BlockInUse(n.ID, p):
			return w, taken(p)
		}
	}
	choice := a.pickIPv6()
	addrs := picked(choice, w.addrCount, offsets(tx.FreeIPv6, n.ID), func(netip.Addr) bool { return false })
	prefixes := picked(choice, w.prefixCount, offsets(tx.FreeIPv6Blocks, n.ID), func(netip.Prefix) bool { return false })
	switch {
	case len(addrs) < w.addrCount:
		return w, query.Errorf("InsufficientFreeAddressesInSubnet", "The specified subnet does not have enough free addresses to satisfy the request.")
	case len(prefixes) < w.prefixCount:
		return w, query.Errorf("InsufficientCidrBlocks", "The specified subnet does not have enough free cidr blocks to satisfy the request.")
	}
	return wantedIPv6{addrs: append(w.addrs, addrs...), prefixes: append(w.prefixes, prefixes...)}, nil
}

func lastOfIPv6(p netip.Prefix) netip.Addr {
	a := p.Addr().As16()
	for i := vpc.IPv6PrefixBits / 8; i < len(a); i++ {
		a[i] = 0xff
	}
	return netip.AddrFrom16(a)
}

// maxIPv6Slots is maxSlots of IPv6.
var maxIPv6Slots = func() int {
	n := 0
	for _, t := range vpc.InstanceTypes() {
		if l, ok := vpc.LimitsOf(t); ok {
			n = max(n, l.IPv6PerENI)
		}
	}
	return n
}()

// fitsIPv6 returns an error unless an interface of the instance type may have so
// many IPv6 addresses and prefixes, each of which counts as an address. code is
// that of too many; those of types that cannot have any are inferred.
func fitsIPv6(l vpc.InstanceLimits, addrs, prefixes int, code string) error {
	switch {
	case addrs+prefixes == 0:
		return nil
	case l.IPv6PerENI == 0:
		return query.Errorf("UnsupportedOperation", "The instance type '%s' does not support IPv6.", l.Type)
	case prefixes > 0 && !l.Nitro():
		return query.Errorf("UnsupportedOperation", "The instance type '%s' does not support IPv6 prefixes. Only Nitro instances do.", l.Type)
	case addrs+prefixes > l.IPv6PerENI:
		return query.Errorf(code, "Number of IPv6 addresses will exceed limit.")
	}
	return nil
}

// assignIPv6Addresses gives an interface IPv6 addresses. One that any interface
// has already is refused: unlike IPv4's it cannot be reassigned.
func (a *API) assignIPv6Addresses(_ context.Context, req *query.AssignIpv6AddressesRequest) (*query.AssignIpv6AddressesResponse, error) {
	w, err := readIPv6(req.Ipv6Addresses, req.Ipv6AddressCount, req.Ipv6Prefix, req.Ipv6PrefixCount)
	if err != nil {
		return nil, err
	}
	if w.slots() == 0 {
		return nil, query.Errorf("MissingParameter", "The request must contain one of the parameters ipv6Addresses, ipv6AddressCount, ipv6Prefix, ipv6PrefixCount")
	}
	var got wantedIPv6
	_, err = a.update(func(tx *store.Tx) error {
		old, err := findENI(&tx.State, *req.NetworkInterfaceId)
		if err != nil {
			return err
		}
		if err := mine(old); err != nil {
			return err
		}
		addrs, prefixes := len(old.IPv6)+len(w.addrs)+w.addrCount, len(old.IPv6Prefixes)+len(w.prefixes)+w.prefixCount
		limits := vpc.InstanceLimits{IPv6PerENI: maxIPv6Slots, BareMetal: true} // of one that is not attached
		if old.Attachment != nil {
			if i := tx.Instance(old.Attachment.Instance); i != nil {
				if l, ok := vpc.LimitsOf(i.Type); ok {
					limits = l
				}
			}
		}
		if err := fitsIPv6(limits, addrs, prefixes, limitExceeded); err != nil {
			return err
		}
		if got, err = a.allocateIPv6(tx, tx.Subnet(old.Subnet), w); err != nil {
			return err
		}
		e := *old
		e.IPv6 = slices.Concat(old.IPv6, got.addrs)
		e.IPv6Prefixes = slices.Concat(old.IPv6Prefixes, got.prefixes)
		tx.PutENI(&e)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.AssignIpv6AddressesResponse{
		NetworkInterfaceId:    req.NetworkInterfaceId,
		AssignedIpv6Addresses: collect(got.addrs, netip.Addr.String),
		AssignedIpv6PrefixSet: collect(got.prefixes, netip.Prefix.String),
	}, nil
}

func (a *API) unassignIPv6Addresses(_ context.Context, req *query.UnassignIpv6AddressesRequest) (*query.UnassignIpv6AddressesResponse, error) {
	w, err := readIPv6(req.Ipv6Addresses, nil, req.Ipv6Prefix, nil)
	if err != nil {
		return nil, err
	}
	if w.slots() == 0 {
		return nil, query.Errorf("MissingParameter", "The request must contain one of the parameters ipv6Addresses, ipv6Prefix")
	}
	_, err = a.update(func(tx *store.Tx) error {
		old, err := findENI(&tx.State, *req.NetworkInterfaceId)
		if err != nil {
			return err
		}
		if err := mine(old); err != nil {
			return err
		}
		e := *old
		for _, x := range w.addrs {
			if !slices.Contains(e.IPv6, x) {
				return query.Errorf("InvalidParameterValue", "Some of the specified addresses are not assigned to interface %s: %s", e.ID, x)
			}
		}
		for _, p := range w.prefixes {
			if !slices.Contains(e.IPv6Prefixes, p) {
				return query.Errorf("InvalidParameterValue", "Some of the specified prefixes are not assigned to interface %s: %s", e.ID, p)
			}
		}
		e.IPv6 = slices.DeleteFunc(slices.Clone(old.IPv6), func(x netip.Addr) bool { return slices.Contains(w.addrs, x) })
		e.IPv6Prefixes = slices.DeleteFunc(slices.Clone(old.IPv6Prefixes), func(p netip.Prefix) bool { return slices.Contains(w.prefixes, p) })
		tx.PutENI(&e)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.UnassignIpv6AddressesResponse{
		NetworkInterfaceId:      req.NetworkInterfaceId,
		UnassignedIpv6Addresses: collect(w.addrs, netip.Addr.String),
		UnassignedIpv6PrefixSet: collect(w.prefixes, netip.Prefix.String),
	}, nil
}

// firstIPv6 is the IPv6 address that stands for an interface, or nil.
func firstIPv6(e *store.ENI) *string {
	if len(e.IPv6) == 0 {
		return nil
	}
	return new(e.IPv6[0].String())
}

func ipv6Addresses(e *store.ENI) []query.NetworkInterfaceIpv6Address {
	return collect(e.IPv6, func(x netip.Addr) query.NetworkInterfaceIpv6Address {
		return query.NetworkInterfaceIpv6Address{Ipv6Address: new(x.String()), IsPrimaryIpv6: new(false)}
	})
}

func instanceIPv6Addresses(e *store.ENI) []query.Ipv6Address {
	return collect(e.IPv6, func(x netip.Addr) query.Ipv6Address {
		return query.Ipv6Address{Ipv6Address: new(x.String()), IsPrimaryIpv6: new(false)}
	})
}

func ipv6Prefixes(e *store.ENI) []query.Ipv6Prefix {
	if len(e.IPv6Prefixes) == 0 {
		return nil
	}
	return collect(e.IPv6Prefixes, func(p netip.Prefix) query.Ipv6Prefix { return query.Ipv6Prefix{Ipv6Prefix: new(p.String())} })
}
