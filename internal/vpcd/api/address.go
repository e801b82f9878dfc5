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

// wanted is what a request says about the addresses of an interface: addresses
// by name, or how many.
type wanted struct {
	primary     netip.Addr // zero: any
	secondary   []netip.Addr
	prefixes    []netip.Prefix
	addrCount   int // secondary addresses beside those named
	prefixCount int
}

// named reports whether any address is asked for by name.
func (w wanted) named() bool {
	return w.primary.IsValid() || len(w.secondary) > 0 || len(w.prefixes) > 0
}

// slots returns how many of an interface's addresses are asked for, without the
// primary.
func (w wanted) slots() int {
	return len(w.secondary) + len(w.prefixes) + w.addrCount + w.prefixCount
}

func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || !a.Is4() {
		return a, query.Errorf("InvalidParameterValue", "Value (%s) for parameter privateIpAddress is invalid. Invalid IPv4 address.", s)
	}
	return a, nil
}

func parseBlock(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || !p.Addr().Is4() || p.Bits() != vpc.PrefixBits || p != p.Masked() {
		return p, query.Errorf("InvalidParameterValue", "Value (%s) for parameter ipv4Prefix is invalid. It must be an aligned /%d.", s, vpc.PrefixBits)
	}
	return p, nil
}

// count reads a number of addresses or prefixes.
func count(n *int64, name string) (int, error) {
	if n == nil {
		return 0, nil
	}
	if *n < 0 || *n > 1<<16 {
		return 0, query.Errorf("InvalidParameterValue", "Value (%d) for parameter %s is invalid.", *n, name)
	}
	return int(*n), nil
}

// parseWanted reads the addresses that CreateNetworkInterface and RunInstances
// ask for. Secondary addresses come by name or by number, and beside prefixes,
// which come by name or by number, there are none (EC2 API Reference,
// CreateNetworkInterface, the four parameters; read 2026).
func parseWanted(primary *string, list []query.PrivateIpAddressSpecification, addrCount *int64, blocks []query.Ipv4Prefix, prefixCount *int64) (wanted, error) {
	var w wanted
	var err error
	if primary != nil {
		if w.primary, err = parseAddr(*primary); err != nil {
			return w, err
		}
	}
	for _, s := range list {
		if s.PrivateIpAddress == nil {
			return w, query.Errorf("MissingParameter", "The request must contain the parameter privateIpAddress")
		}
		addr, err := parseAddr(*s.PrivateIpAddress)
		if err != nil {
			return w, err
		}
		switch {
		case !deref(s.Primary):
			w.secondary = append(w.secondary, addr)
		case w.primary.IsValid():
			return w, query.Errorf("InvalidParameterCombination", "Only one primary private IP address can be specified")
		default:
			w.primary = addr
		}
	}
	return w, w.rest(addrCount, collect(blocks, func(b query.Ipv4Prefix) string { return deref(b.Ipv4Prefix) }), prefixCount)
}

// rest reads counts and prefixes, and checks what goes together.
func (w *wanted) rest(addrCount *int64, blocks []string, prefixCount *int64) error {
	var err error
	if w.addrCount, err = count(addrCount, "secondaryPrivateIpAddressCount"); err != nil {
		return err
	}
	if w.prefixCount, err = count(prefixCount, "ipv4PrefixCount"); err != nil {
		return err
	}
	for _, s := range blocks {
		p, err := parseBlock(s)
		if err != nil {
			return err
		}
		w.prefixes = append(w.prefixes, p)
	}
	ways := 0
	for _, n := range []int{len(w.secondary), len(w.prefixes), w.addrCount, w.prefixCount} {
		if n > 0 {
			ways++
		}
	}
	if ways > 1 {
		return query.Errorf("InvalidParameterCombination", "Private IP addresses, their count, IPv4 prefixes and their count exclude each other. Use one of them per request.")
	}
	seen := map[netip.Addr]bool{w.primary: w.primary.IsValid()}
	for _, a := range w.secondary {
		if seen[a] {
			return query.Errorf("InvalidParameterValue", "The address %s is given twice", a)
		}
		seen[a] = true
	}
	for i, p := range w.prefixes {
		if slices.Contains(w.prefixes[:i], p) || w.primary.IsValid() && p.Contains(w.primary) {
			return query.Errorf("InvalidParameterValue", "The prefix %s overlaps another address of the request", p)
		}
	}
	return nil
}

// inSubnet returns an error unless an interface in the subnet may have the
// addresses from first to last.
func inSubnet(n *store.Subnet, sp *store.Space, first, last netip.Addr) error {
	if !n.CIDR.Contains(first) || !n.CIDR.Contains(last) {
		return query.Errorf("InvalidParameterValue", "Address %s does not fall within the subnet's address range", first)
	}
	for a := first; a.Compare(last) <= 0; a = a.Next() {
		if sp.Reserved(a) {
			return query.Errorf("InvalidParameterValue", "Address %s is in subnet's reserved address range", a)
		}
	}
	return nil
}

func lastOf(p netip.Prefix) netip.Addr {
	a := p.Addr().As4()
	a[3] |= 1<<(32-vpc.PrefixBits) - 1
	return netip.AddrFrom4(a)
}

func taken(what any) error {
	return query.Errorf("InvalidIPAddress.InUse", "Address %v is in use.", what)
}

// pick returns how addresses of a subnet are chosen: lowest first, so that a run
// can be repeated, or scattered.
func (a *API) pick(sp *store.Space) picker {
	if a.chaos.Get().Addresses == chaos.AddressesScattered {
		return picker{start: func() int { return rand.IntN(sp.Size()) }, run: 1}
	}
	return picker{start: func() int { return 0 }, run: math.MaxInt}
}

// picker chooses among what is free: runs of so many, from so many starts.
type picker struct {
	start func() int
	run   int
}

// picked returns n of what is free, or as many as there are. None of except is
// among them.
func picked[T comparable](p picker, n int, free func(start int) iter.Seq[T], except func(T) bool) []T {
	var out []T
	for len(out) < n {
		before := len(out)
		for x := range free(p.start()) {
			if len(out) == n || len(out)-before == p.run {
				break
			}
			if !except(x) && !slices.Contains(out, x) {
				out = append(out, x)
			}
		}
		if len(out) == before {
			break
		}
	}
	return out
}

// allocate finds what is wanted in the subnet, as the transaction sees it:
// what is named if it is free, the rest by the setting Addresses, prefixes
// aligned. What it returns is all of w by name. It changes nothing.
//
// What a reservation sets aside is had by name alone; but prefixes by number
// come first of all from the reservations made for them, and from elsewhere
// when these are full (amazon-vpc-cni-k8s issue 2749, comment of 2024-01-11).
func (a *API) allocate(tx *store.Tx, n *store.Subnet, w wanted, withPrimary bool) (wanted, error) {
	sp := tx.Space(n.ID)
	var singles []netip.Addr
	if w.primary.IsValid() {
		singles = append(singles, w.primary)
	}
	for _, a := range append(singles, w.secondary...) {
		if err := inSubnet(n, sp, a, a); err != nil {
			return w, err
		}
		if sp.InUse(a) {
			return w, taken(a)
		}
	}
	singles = append(singles, w.secondary...)
	for _, p := range w.prefixes {
		if err := inSubnet(n, sp, p.Addr(), lastOf(p)); err != nil {
			return w, err
		}
		if sp.BlockInUse(p) {
			return w, taken(p)
		}
	}
	need := w.addrCount
	if withPrimary && !w.primary.IsValid() {
		need++
	}
	choice := a.pick(sp)
	free := picked(choice, need, sp.FreeAddrs, func(a netip.Addr) bool {
		return slices.Contains(singles, a) || slices.ContainsFunc(w.prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
	})
	if len(free) < need {
		return w, query.Errorf("InsufficientFreeAddressesInSubnet", "The specified subnet does not have enough free addresses to satisfy the request.")
	}
	blocks := picked(choice, w.prefixCount, sp.FreeBlocks, func(p netip.Prefix) bool {
		return slices.ContainsFunc(singles, p.Contains) || slices.ContainsFunc(free, p.Contains) || slices.Contains(w.prefixes, p)
	})
	if len(blocks) < w.prefixCount {
		// A subnet without even the number of addresses says so; one that has
		// them in pieces speaks of blocks. Clients must know both.
		if sp.FreeForPrefixes() < w.prefixCount<<(32-vpc.PrefixBits) {
			return w, query.Errorf("InvalidParameterValue", "There aren't sufficient free Ipv4 addresses or prefixes")
		}
		return w, query.Errorf("InsufficientCidrBlocks", "The specified subnet does not have enough free cidr blocks to satisfy the request.")
	}
	if withPrimary && !w.primary.IsValid() {
		w.primary, free = free[0], free[1:]
	}
	w.secondary = slices.Concat(w.secondary, free)
	w.prefixes = slices.Concat(w.prefixes, blocks)
	w.addrCount, w.prefixCount = 0, 0
	return w, nil
}

// maxSlots is the largest number of addresses per interface of any instance
// type: the limit of an interface that is not attached.
var maxSlots = func() int {
	n := 0
	for _, t := range vpc.InstanceTypes() {
		if l, ok := vpc.LimitsOf(t); ok {
			n = max(n, l.IPv4PerENI)
		}
	}
	return n
}()

// slotLimit returns how many addresses the interface may have where it is, and
// whether it may have prefixes.
func slotLimit(s *store.State, e *store.ENI) (limit int, prefixes bool) {
	if e.Attachment != nil {
		if i := s.Instance(e.Attachment.Instance); i != nil {
			if l, ok := vpc.LimitsOf(i.Type); ok {
				return l.IPv4PerENI, l.Nitro()
			}
		}
	}
	return maxSlots, true
}

// The codes of an interface with more addresses than it may have: of one that is
// there, and of one that is launched.
const (
	limitExceeded       = "PrivateIpAddressLimitExceeded"
	launchLimitExceeded = "InvalidInterface.IpAddressLimitExceeded"
)

func tooManyAddresses() error {
	return query.Errorf(limitExceeded, "Number of private addresses will exceed limit.")
}

// noPrefixes answers a request for prefixes on a type that cannot have them.
// The code is inferred: EC2's own for this case is not published.
func noPrefixes(instanceType string) error {
	return query.Errorf("UnsupportedOperation", "The instance type '%s' does not support IPv4 prefixes. Only Nitro instances do.", instanceType)
}

func (a *API) assignPrivateIPAddresses(_ context.Context, req *query.AssignPrivateIpAddressesRequest) (*query.AssignPrivateIpAddressesResponse, error) {
	var w wanted
	for _, s := range req.PrivateIpAddress {
		addr, err := parseAddr(s)
		if err != nil {
			return nil, err
		}
		w.secondary = append(w.secondary, addr)
	}
	if err := w.rest(req.SecondaryPrivateIpAddressCount, req.Ipv4Prefix, req.Ipv4PrefixCount); err != nil {
		return nil, err
	}
	if w.slots() == 0 {
		return nil, query.Errorf("MissingParameter", "The request must contain one of the parameters privateIpAddress, secondaryPrivateIpAddressCount, ipv4Prefix, ipv4PrefixCount")
	}
	var got wanted
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findENI(&tx.State, *req.NetworkInterfaceId)
		if err != nil {
			return err
		}
		if err := mine(old); err != nil {
			return err
		}
		here, move, err := reassigned(tx, old, w.secondary, deref(req.AllowReassignment))
		if err != nil {
			return err
		}
		for _, p := range w.prefixes {
			if tx.Space(old.Subnet).BlockInUse(p) && !tx.Space(old.Subnet).Reserved(p.Addr()) {
				if o := tx.ByAddress(old.Subnet, p.Addr()); o != nil && slices.Contains(o.Prefixes, p) {
					return query.Errorf("Resource.AlreadyAssigned", "The prefix %s is already assigned", p)
				}
			}
		}
		limit, prefixes := slotLimit(&tx.State, old)
		if old.Slots()+w.slots()-len(here) > limit {
			return tooManyAddresses()
		}
		if !prefixes && w.prefixCount+len(w.prefixes) > 0 {
			return noPrefixes(tx.Instance(old.Attachment.Instance).Type)
		}
		for _, o := range move {
			tx.PutENI(o) // without the addresses that move
		}
		rest := w
		rest.secondary = slices.DeleteFunc(slices.Clone(w.secondary), func(x netip.Addr) bool { return slices.Contains(here, x) })
		all, err := a.allocate(tx, tx.Subnet(old.Subnet), rest, false)
		if err != nil {
			return err
		}
		e := *old
		e.Secondary = slices.Concat(old.Secondary, all.secondary)
		e.Prefixes = slices.Concat(old.Prefixes, all.prefixes)
		tx.PutENI(&e)
		got = all
		got.secondary = slices.Concat(here, all.secondary)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.AssignPrivateIpAddressesResponse{
		NetworkInterfaceId: req.NetworkInterfaceId,
		AssignedPrivateIpAddressesSet: collect(got.secondary, func(x netip.Addr) query.AssignedPrivateIpAddress {
			return query.AssignedPrivateIpAddress{PrivateIpAddress: new(x.String())}
		}),
		AssignedIpv4PrefixSet: collect(got.prefixes, func(p netip.Prefix) query.Ipv4Prefix { return query.Ipv4Prefix{Ipv4Prefix: new(p.String())} }),
	}, nil
}

// reassigned sorts out those of addrs that an interface has already: here are
// those that are e's own, move the other interfaces as they are without them.
func reassigned(tx *store.Tx, e *store.ENI, addrs []netip.Addr, allowed bool) (here []netip.Addr, move map[vpc.ENIID]*store.ENI, err error) {
	move = map[vpc.ENIID]*store.ENI{}
	for _, x := range addrs {
		o := tx.ByAddress(e.Subnet, x)
		if o == nil {
			continue
		}
		if !slices.Contains(o.Secondary, x) {
			return nil, nil, taken(x) // a primary address, or one of a prefix, stays
		}
		if !allowed {
			return nil, nil, query.Errorf("Resource.AlreadyAssigned", "The address %s is already assigned. Use AllowReassignment to move it.", x)
		}
		if o.ID == e.ID {
			here = append(here, x)
			continue
		}
		if err := mine(o); err != nil {
			return nil, nil, err
		}
		c := move[o.ID]
		if c == nil {
			c = new(*o)
			move[o.ID] = c
		}
		c.Secondary = slices.DeleteFunc(slices.Clone(c.Secondary), func(y netip.Addr) bool { return y == x })
	}
	return here, move, nil
}

func (a *API) unassignPrivateIPAddresses(_ context.Context, req *query.UnassignPrivateIpAddressesRequest) (*query.UnassignPrivateIpAddressesResponse, error) {
	if len(req.PrivateIpAddress)+len(req.Ipv4Prefix) == 0 {
		return nil, query.Errorf("MissingParameter", "The request must contain one of the parameters privateIpAddress, ipv4Prefix")
	}
	if len(req.PrivateIpAddress) > 0 && len(req.Ipv4Prefix) > 0 {
		return nil, query.Errorf("InvalidParameterCombination", "Private IP addresses and IPv4 prefixes exclude each other. Use one of them per request.")
	}
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findENI(&tx.State, *req.NetworkInterfaceId)
		if err != nil {
			return err
		}
		if err := mine(old); err != nil {
			return err
		}
		e := *old
		e.Secondary, e.Prefixes = slices.Clone(old.Secondary), slices.Clone(old.Prefixes)
		for _, s := range req.PrivateIpAddress {
			addr, err := parseAddr(s)
			if err != nil {
				return err
			}
			if addr == e.Primary {
				return query.Errorf("InvalidParameterValue", "The primary private IP address %s of %s cannot be unassigned", addr, e.ID)
			}
			i := slices.Index(e.Secondary, addr)
			if i < 0 {
				return query.Errorf("InvalidParameterValue", "Some of the specified addresses are not assigned to interface %s: %s", e.ID, addr)
			}
			e.Secondary = slices.Delete(e.Secondary, i, i+1)
		}
		for _, s := range req.Ipv4Prefix {
			p, err := parseBlock(s)
			if err != nil {
				return err
			}
			i := slices.Index(e.Prefixes, p)
			if i < 0 {
				return query.Errorf("InvalidParameterValue", "Some of the specified prefixes are not assigned to interface %s: %s", e.ID, p)
			}
			e.Prefixes = slices.Delete(e.Prefixes, i, i+1)
		}
		tx.PutENI(&e)
		return nil
	})
	return nil, err
}
