package store

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/underlay-cni/underlay/internal/vpc"
)

var testIPv6 = netip.MustParsePrefix("2001:db8:0:100::/64")

func network6(tx *Tx) {
	network(tx)
	v := *tx.VPC(testVPC)
	v.IPv6CIDRs = []CIDRAssociation{{"vpc-cidr-assoc-2", netip.MustParsePrefix("2001:db8:0:100::/56")}}
	tx.PutVPC(&v)
	n := *tx.Subnet(testSubnet)
	n.IPv6 = CIDRAssociation{"subnet-cidr-assoc-1", testIPv6}
	tx.PutSubnet(&n)
}

func first[T any](seq func(func(T) bool)) (out T) {
	for x := range seq {
		return x
	}
	return out
}

func TestIPv6BlocksAreGivenInOrder(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"), Options{})
	update(t, s, network)
	if p, ok := s.View().FreeIPv6Block(); !ok || p != netip.MustParsePrefix("2001:db8:0:100::/56") {
		t.Errorf("first block %s, %v", p, ok)
	}
	update(t, s, network6)
	if p, ok := s.View().FreeIPv6Block(); !ok || p != netip.MustParsePrefix("2001:db8:0:200::/56") {
		t.Errorf("second block %s, %v", p, ok)
	}
}

// What is free is what a list of all that is taken says, after any changes, and
// after the file was read again.
func TestSpace6AgainstASlowOne(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	s := open(t, path, Options{})
	update(t, s, network6)
	r := rand.New(rand.NewPCG(3, 4))
	held := make([]*ENI, 8)
	taken := func(a netip.Addr) bool {
		return IPv6Reserved(a) || slices.ContainsFunc(held, func(e *ENI) bool {
			return e != nil && (slices.Contains(e.IPv6, a) || slices.ContainsFunc(e.IPv6Prefixes, func(p netip.Prefix) bool { return p.Contains(a) }))
		})
	}
	check := func(st *State) {
		t.Helper()
		lowest := testIPv6.Addr()
		for taken(lowest) {
			lowest = lowest.Next()
		}
		if got := first(st.FreeIPv6(testSubnet, 0)); got != lowest {
			t.Fatalf("lowest free %s, want %s", got, lowest)
		}
		for range 4 {
			start := r.Uint64N(12)
			if r.IntN(2) == 0 {
				start = block6Size*r.Uint64N(4) + r.Uint64N(3)
			}
			want := at6(testIPv6, max(start, firstAddr6))
			for taken(want) {
				// Within a prefix all is taken.
				if o, ok := st.owner6(testSubnet, want); ok && o.prefix {
					want = at6(testIPv6, offset6(blockOf6(want))+block6Size)
				} else {
					want = want.Next()
				}
			}
			if got := first(st.FreeIPv6(testSubnet, start)); got != want {
				t.Fatalf("free from %#x: %s, want %s", start, got, want)
			}
		}
		for b := range st.FreeIPv6Blocks(testSubnet, 0) {
			if taken(b.Addr()) || st.IPv6BlockInUse(testSubnet, b) {
				t.Fatalf("%s is not free", b)
			}
			for o := uint64(block6Size); o < offset6(b.Addr()); o += block6Size {
				below := netip.PrefixFrom(at6(testIPv6, o), vpc.IPv6PrefixBits)
				if !slices.ContainsFunc(held, func(e *ENI) bool {
					return e != nil && (slices.Contains(e.IPv6Prefixes, below) || slices.ContainsFunc(e.IPv6, below.Contains))
				}) {
					t.Fatalf("%s is free, but %s came first", below, b)
				}
			}
			break
		}
	}
	for range 400 {
		k := r.IntN(len(held))
		update(t, s, func(tx *Tx) {
			if held[k] != nil && r.IntN(4) == 0 {
				tx.DeleteENI(held[k].ID)
				held[k] = nil
				return
			}
			e := eni(10 + k)
			if held[k] != nil {
				*e = *held[k]
				e.IPv6, e.IPv6Prefixes = slices.Clone(e.IPv6), slices.Clone(e.IPv6Prefixes)
			}
			switch n := r.IntN(4); {
			case n == 0 && len(e.IPv6) > 0:
				e.IPv6 = e.IPv6[1:]
			case n == 1 && len(e.IPv6Prefixes) > 0:
				e.IPv6Prefixes = e.IPv6Prefixes[1:]
			case n < 3:
				e.IPv6 = append(e.IPv6, first(tx.FreeIPv6(testSubnet, block6Size*r.Uint64N(2))))
			default:
				e.IPv6Prefixes = append(e.IPv6Prefixes, first(tx.FreeIPv6Blocks(testSubnet, block6Size*r.Uint64N(3))))
			}
			tx.PutENI(e)
			held[k] = e
		})
		check(s.View())
	}
	before := objects(s.View())
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	again := open(t, path, Options{})
	if d := cmp.Diff(before, objects(again.View()), addrs, prefixes, cmpopts.EquateEmpty()); d != "" {
		t.Error(d)
	}
	check(again.View())
	for _, e := range held {
		if e == nil {
			continue
		}
		for _, p := range e.IPv6Prefixes {
			if o := again.View().ByAddress(testSubnet, p.Addr().Next()); o == nil || o.ID != e.ID {
				t.Errorf("%s: %v, want %s", p, o, e.ID)
			}
		}
	}
}

func TestIPv6ConflictChangesNothing(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"), Options{})
	block := netip.MustParsePrefix("2001:db8:0:100:1::/80")
	update(t, s, func(tx *Tx) {
		network6(tx)
		e := eni(9)
		e.IPv6, e.IPv6Prefixes = []netip.Addr{testIPv6.Addr().Next().Next().Next().Next()}, []netip.Prefix{block}
		tx.PutENI(e)
	})
	before := objects(s.View())
	for name, e := range map[string]ENI{
		"taken":           {IPv6: []netip.Addr{netip.MustParseAddr("2001:db8:0:100::4")}},
		"in a prefix":     {IPv6: []netip.Addr{netip.MustParseAddr("2001:db8:0:100:1::7")}},
		"first of one":    {IPv6: []netip.Addr{block.Addr()}},
		"prefix taken":    {IPv6Prefixes: []netip.Prefix{block}},
		"prefix of taken": {IPv6Prefixes: []netip.Prefix{netip.MustParsePrefix("2001:db8:0:100::/80")}},
		"reserved":        {IPv6: []netip.Addr{netip.MustParseAddr("2001:db8:0:100::3")}},
		"last":            {IPv6: []netip.Addr{netip.MustParseAddr("2001:db8:0:100:ffff:ffff:ffff:ffff")}},
		"elsewhere":       {IPv6: []netip.Addr{netip.MustParseAddr("2001:db8:0:101::5")}},
		"with itself":     {IPv6: []netip.Addr{netip.MustParseAddr("2001:db8:0:100:2::5")}, IPv6Prefixes: []netip.Prefix{netip.MustParsePrefix("2001:db8:0:100:2::/80")}},
	} {
		n := eni(11)
		n.IPv6, n.IPv6Prefixes = e.IPv6, e.IPv6Prefixes
		if err := s.Update(func(tx *Tx) error { tx.PutENI(n); return nil }); !errors.Is(err, ErrConflict) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if d := cmp.Diff(before, objects(s.View()), addrs, prefixes); d != "" {
		t.Error(d)
	}
}

func TestRoutesOfIPv6(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"), Options{})
	update(t, s, func(tx *Tx) {
		network6(tx)
		tx.PutEgressOnly(&EgressOnlyGateway{ID: "eigw-1", VPC: testVPC})
		r := *tx.MainTable(testVPC)
		r.Routes = []Route{{CIDR: netip.MustParsePrefix("::/0"), Target: Target{EgressOnly: "eigw-1"}, Made: true}}
		tx.PutRouteTable(&r)
	})
	v := s.View()
	routes := v.RoutesOf(v.MainTable(testVPC))
	if len(routes) != 3 || routes[1].CIDR.String() != "2001:db8:0:100::/56" || !routes[1].Target.Local {
		t.Fatalf("routes %+v", routes)
	}
	if got := v.RouteState(v.MainTable(testVPC), routes[2]); got != RouteActive {
		t.Errorf("state %s", got)
	}
	update(t, s, func(tx *Tx) { tx.DeleteEgressOnly("eigw-1") })
	v = s.View()
	if got := v.RouteState(v.MainTable(testVPC), routes[2]); got != RouteBlackhole {
		t.Errorf("state without its gateway %s", got)
	}
}
