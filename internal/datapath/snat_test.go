package datapath

import (
	"bytes"
	"context"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestSNAT(t *testing.T) {
	node := []netip.Addr{fleetENIs(0)[0].Primary, fleetENIs(0)[1].Primary}
	excluded := netip.MustParsePrefix("192.0.2.0/25") // with laterIP
	for _, tc := range []struct {
		mode    SNAT
		exclude []netip.Prefix
		// Under which address pods on the primary and the secondary ENI are seen.
		internet, later [2]netip.Addr
	}{
		{SNATByENI, nil, [2]netip.Addr{node[0], node[1]}, [2]netip.Addr{node[0], node[1]}},
		{SNATByENI, []netip.Prefix{excluded}, [2]netip.Addr{node[0], node[1]}, [2]netip.Addr{}},
		{SNATByPrimary, nil, [2]netip.Addr{node[0], node[0]}, [2]netip.Addr{node[0], node[0]}},
		{SNATByPrimary, []netip.Prefix{excluded}, [2]netip.Addr{node[0], node[0]}, [2]netip.Addr{}},
		{SNATNone, nil, [2]netip.Addr{}, [2]netip.Addr{}},
	} {
		name := string(tc.mode)
		if tc.exclude != nil {
			name += " with an exclusion"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := &matrix{fleet: newFleet(t, Options{SNAT: tc.mode, SNATExclude: tc.exclude}), way: ways[0]}
			m.serve(m.inet, at(netip.IPv4Unspecified(), webPort))
			for i, p := range []pod{m.near0, m.near1} {
				m.serve(p.ns, at(p.Addr, webPort))
				seen := func(a netip.Addr) netip.Addr {
					if a.IsValid() {
						return a
					}
					return p.Addr
				}
				if tc.mode != SNATNone {
					m.check(t, reach{p.Addr.String() + " to the internet", p.ns, "", at(inetIP, webPort), seen(tc.internet[i])})
					if !m.ping(p.ns, p.Addr, inetIP) {
						t.Errorf("%s does not reach %s by ICMP", p.Addr, inetIP)
					}
				} else if _, err := m.talk(p.ns, "tcp4", netip.AddrPort{}, at(inetIP, webPort), impatience); err == nil || m.refused() == nil {
					t.Errorf("%s speaks to the internet with no public address: %v", p.Addr, err)
				}
				m.check(t,
					reach{p.Addr.String() + " to what may be excluded", p.ns, "", at(laterIP, webPort), seen(tc.later[i])},
					reach{p.Addr.String() + " to a private range", p.ns, "", at(privateIP, webPort), p.Addr},
				)
				// Who comes from outside is answered from where it came to.
				c, err := m.talk(m.inet, "tcp4", at(laterIP, uint16(41000+i)), at(p.Addr, webPort), patience)
				if err == nil {
					err = c.goOn(100_000)
					c.Close()
				}
				if refused := m.refused(); err != nil || refused != nil {
					t.Errorf("from outside to %s: %v; the router refused %q", p.Addr, err, refused)
				}
			}
			m.check(t, reach{"the node to the internet", m.node, "", at(inetIP, webPort), node[0]})
		})
	}
}

// The chains are repaired, and change with options and ENIs alone.
func TestSNATChains(t *testing.T) {
	w := newWorld(t)
	var log bytes.Buffer
	open := func(mode SNAT) *Datapath {
		t.Helper()
		d := w.openWith(Options{SNAT: mode, Logger: slog.New(slog.NewTextHandler(&log, nil))}, enis)
		return d
	}
	in := func(command string) string {
		t.Helper()
		return w.run("ip", append([]string{"netns", "exec", w.node}, strings.Fields(command)...)...)
	}
	list := func() string { t.Helper(); return in("nft list table inet underlay") }
	set := func(d *Datapath, enis []ENI) string {
		t.Helper()
		if err := d.SetENIs(ctx, enis); err != nil {
			t.Fatal(err)
		}
		return list()
	}
	others := "table ip other { chain out { type nat hook postrouting priority 300; ip daddr 192.0.2.1 masquerade; }; }"
	in("nft " + others)

	d := open(SNATByENI)
	bare := list()
	if strings.Contains(bare, "sources") {
		t.Errorf("before the VPC's ranges are known:\n%s", bare)
	}
	vpcs := []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("10.0.0.0/16")}
	if err := d.SetVPC(ctx, vpcs); err != nil {
		t.Fatal(err)
	}
	on := list()
	for _, want := range []string{
		"type nat hook postrouting priority srcnat + 10; policy accept;",
		`ip daddr 10.0.0.0/8 return comment "not to 10.0.0.0/8"`,
		`ip daddr 198.51.100.0/24 return comment "not to 198.51.100.0/24"`,
		`snat ip to 10.0.0.10 fully-random comment "ENI 1 as 10.0.0.10"`,
		`snat ip to 10.0.1.10 fully-random comment "ENI 2 as 10.0.1.10"`,
	} {
		if !strings.Contains(on, want) {
			t.Errorf("lacks %q:\n%s", want, on)
		}
	}
	before := log.Len()
	if err := d.SetVPC(ctx, []netip.Prefix{vpcs[1], vpcs[0]}); err != nil {
		t.Error(err)
	}
	if got := set(d, enis); got != on || log.Len() != before {
		t.Errorf("a second time: %s\n%s", cmp.Diff(on, got), log.String()[before:])
	}
	peer := netip.MustParsePrefix("203.0.113.0/24")
	for _, peers := range [][]netip.Prefix{{peer}, nil} {
		if err := d.SetPeers(ctx, peers); err != nil {
			t.Error(err)
		}
		if got := list(); strings.Contains(got, "not to "+peer.String()) != (peers != nil) {
			t.Errorf("with peers %v:\n%s", peers, got)
		}
	}
	if err := d.SetPeers(ctx, []netip.Prefix{{}}); err == nil {
		t.Error("nothing is taken for a peer")
	}
	in("nft flush chain inet underlay sources")
	if got := set(d, enis); got != on {
		t.Errorf("after the chain was flushed: %s", cmp.Diff(on, got))
	}
	in("nft delete chain inet underlay sources")
	if got := set(d, enis); got != on {
		t.Errorf("after the chain was deleted: %s", cmp.Diff(on, got))
	}
	if got := set(d, enis[:1]); strings.Contains(got, "10.0.1.10") || !strings.Contains(got, "ENI 1 as") {
		t.Errorf("with one ENI:\n%s", got)
	}
	if got := set(d, enis); got != on {
		t.Errorf("with both again: %s", cmp.Diff(on, got))
	}

	// A flushed rule set is heard of.
	watched, cancel := context.WithCancel(ctx)
	heard, ended := make(chan struct{}, 1), make(chan error)
	go func() {
		ended <- d.Watch(watched, func() {
			select {
			case heard <- struct{}{}:
			default:
			}
		})
	}()
	deadline := time.After(10 * time.Second)
	for begun := false; !begun; {
		in("nft delete table inet underlay")
		select {
		case <-heard:
			begun = true
		case <-time.After(50 * time.Millisecond): // it does not listen yet
			set(d, enis)
		case <-deadline:
			t.Fatal("that the table was deleted is not heard")
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if got := set(d, enis); got != on {
		t.Errorf("after the table was deleted: %s", cmp.Diff(on, got))
	}

	// The next agent does not know the VPC yet, and leaves what is there.
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(SNATByENI)
	if got := list(); got != on {
		t.Errorf("after a restart: %s", cmp.Diff(on, got))
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(SNATByPrimary)
	if err := d.SetVPC(ctx, vpcs); err != nil {
		t.Fatal(err)
	}
	if got := list(); !strings.Contains(got, "type filter hook prerouting priority dstnat + 1; policy accept;") || !strings.Contains(got, "ct direction != original return") {
		t.Errorf("by the primary ENI:\n%s", got)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(SNATNone)
	if got := list(); got != bare {
		t.Errorf("switched off: %s", cmp.Diff(bare, got))
	}
	if got := in("nft list table ip other"); !strings.Contains(got, "masquerade") {
		t.Errorf("somebody else's table:\n%s", got)
	}
	for _, bad := range []Options{{SNAT: "always"}, {SNAT: SNATByENI, SNATExclude: []netip.Prefix{netip.MustParsePrefix("2001:db8::/32")}}} {
		if _, err := Open(bad); err == nil {
			t.Errorf("%+v is taken", bad)
		}
	}
	if err := d.SetVPC(ctx, []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}); err == nil {
		t.Error("everything is taken for a VPC")
	}
}

func TestWidest(t *testing.T) {
	var in, want []netip.Prefix
	for _, s := range []string{"10.1.0.0/16", "192.0.2.128/25", "10.0.0.0/8", "192.0.2.0/25", "10.0.0.0/8", "10.255.0.1/32", "11.0.0.0/8"} {
		in = append(in, netip.MustParsePrefix(s))
	}
	for _, s := range []string{"10.0.0.0/8", "11.0.0.0/8", "192.0.2.0/25", "192.0.2.128/25"} {
		want = append(want, netip.MustParsePrefix(s))
	}
	if got := widest(in); cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })) != "" {
		t.Errorf("%v", got)
	}
}
