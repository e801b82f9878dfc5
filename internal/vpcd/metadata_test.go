package vpcd

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/vpcd/imds"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func TestMetadataOfIPv6(t *testing.T) {
	w := newWorld(t)
	m := &metadata{store: w.Store, lag: func() time.Duration { return 0 }, now: func() time.Time { return w.now }}
	mapped := w.View()
	m.mapped = func() *store.State { return mapped }
	w.change(func(tx *store.Tx) {
		v := *tx.VPC(testVPC)
		v.IPv6CIDRs = []store.CIDRAssociation{{CIDR: prefix("2001:db8:0:100::/56")}, {CIDR: prefix("2001:db8:0:200::/56")}}
		tx.PutVPC(&v)
		n := *tx.Subnet(testSubnet)
		n.IPv6.CIDR = prefix("2001:db8:0:101::/64")
		tx.PutSubnet(&n)
		e := *tx.ENI("eni-00000000000000001")
		e.IPv6 = []netip.Addr{addr("2001:db8:0:101::9"), addr("2001:db8:0:101::4")}
		e.IPv6Prefixes = []netip.Prefix{prefix("2001:db8:0:101:1::/80")}
		tx.PutENI(&e)
	})
	iface := func() imds.Interface {
		t.Helper()
		got, ok := m.Metadata(testNode)
		if !ok || len(got.Interfaces) != 1 {
			t.Fatalf("metadata: %v, %v", got, ok)
		}
		i := got.Interfaces[0]
		return imds.Interface{IPv6: i.IPv6, IPv6Prefixes: i.IPv6Prefixes, SubnetIPv6: i.SubnetIPv6, VPCIPv6: i.VPCIPv6}
	}
	// What is not on the wire is not told.
	if d := cmp.Diff(imds.Interface{}, iface(), compareNetip); d != "" {
		t.Errorf("unmapped (-want +got):\n%s", d)
	}
	mapped = w.View()
	want := imds.Interface{
		IPv6: []netip.Addr{addr("2001:db8:0:101::9"), addr("2001:db8:0:101::4")}, IPv6Prefixes: []netip.Prefix{prefix("2001:db8:0:101:1::/80")},
		SubnetIPv6: []netip.Prefix{prefix("2001:db8:0:101::/64")}, VPCIPv6: []netip.Prefix{prefix("2001:db8:0:100::/56"), prefix("2001:db8:0:200::/56")},
	}
	if d := cmp.Diff(want, iface(), compareNetip); d != "" {
		t.Errorf("mapped (-want +got):\n%s", d)
	}
}
