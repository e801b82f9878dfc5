package datapath

import (
	"fmt"
	"net/netip"
	"testing"
)

// What the kernel said of a way holds until its routing changes, and not a packet
// longer; where ports have a say, it is asked each time.
func TestWaysOfTheKernel(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	p := w.addPod(d, 1)
	w.ip(w.node, "route add 10.9.9.9 via 10.0.0.1 dev eth0 table 99")
	begins := func(port uint16) Provenance {
		t.Helper()
		c := w.udp(p.ns, p.Addr, 0)
		defer c.Close()
		if _, err := c.WriteToUDPAddrPort([]byte("?"), netip.AddrPortFrom(farIP, port)); err != nil {
			t.Fatal(err)
		}
		from := netip.MustParseAddrPort(c.LocalAddr().String())
		var got Provenance
		eventually(t, "the flow is there", func() bool {
			for _, c := range connections(t, d, p.Addr, farIP) {
				if c.Opener.Port == from.Port() {
					got = c.Provenance
				}
			}
			return got != 0
		})
		return got
	}
	want := func(when string, port uint16, want Provenance) {
		t.Helper()
		if got := begins(port); got != want {
			t.Errorf("%s, a flow to port %d is forwarded by %s, want %s", when, port, got, want)
		}
	}
	for _, to := range []string{"to 10.9.9.9", "from " + p.Addr.String()} {
		want("at first", 9, Direct)
		want("again", 9, Direct)
		w.ip(w.node, "rule add pref 10 "+to+" lookup 99")
		want("with a rule "+to, 9, Stack)
		want("and again", 9, Stack)
		w.ip(w.node, "rule del pref 10")
		want("without it", 9, Direct)
	}
	table := fmt.Sprint(ENITable + 2)
	w.ip(w.node, "route add 10.9.9.9 via 10.0.0.1 dev eth0 table "+table)
	want("with a route in the ENI's table", 9, Stack)
	w.ip(w.node, "route del 10.9.9.9 table "+table)
	want("without it", 9, Direct)

	w.ip(w.node, "rule add pref 10 ipproto udp dport 7777 lookup 99")
	for range 3 {
		want("with a rule by port", 9, Direct)
		want("with a rule by port", 7777, Stack)
	}
	w.ip(w.node, "rule del pref 10")
	want("without it", 7777, Direct)

	// Of several ways, a flow's ports choose one.
	w.run("ip", "netns", "exec", w.node, "sysctl", "-qw", "net.ipv4.fib_multipath_hash_policy=1")
	w.ip(w.node, "route add 10.9.9.9 table "+table+" nexthop via 10.0.0.1 dev eth0 nexthop via 10.0.1.1 dev eth1 onlink")
	by := map[Provenance]int{}
	for i := range 40 {
		by[begins(uint16(1000+i))]++
	}
	if by[Direct] == 0 || by[Stack] == 0 {
		t.Errorf("of 40 flows with two ways, %v", by)
	}
}
