package fabric

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// short tells whether the like of a packet of TCP or UDP that h sends takes the
// short way today.
func (h *host) short(packet []byte) bool {
	h.l.t.Helper()
	var generation uint32
	if err := h.l.objs.Generations.Lookup(uint32(0), &generation); err != nil {
		h.l.t.Fatal(err)
	}
	is := false
	if err := eachFlow(h.l.objs.Flows, func(k bpfgen.FabricFlowKey, f bpfgen.FabricFlow) error {
		if k.Local == be32(netip.AddrFrom4([4]byte(packet[12:16]))) && k.Remote == be32(netip.AddrFrom4([4]byte(packet[16:20]))) &&
			k.LocalPort == binary.BigEndian.Uint16(packet[20:]) && k.RemotePort == binary.BigEndian.Uint16(packet[22:]) &&
			f.Passed != 0 && uint32(f.Passed) == generation {
			is = true
		}
		return nil
	}); err != nil {
		h.l.t.Fatal(err)
	}
	return is
}

// TestShortWay: a packet whose like has passed passes, and what has changed
// since counts nevertheless.
func TestShortWay(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4", "10.0.0.40/32")
	b := l.add(subnetB, "10.0.1.4", "10.0.1.40/32")
	m := l.add(subnetB, "10.0.1.5")
	l.iface(m.eni).SourceDestCheck = false
	l.set()
	had := l.cfg
	had.Interfaces = slices.Clone(l.cfg.Interfaces)
	had.Subnets = slices.Clone(l.cfg.Subnets)
	second, third := netip.MustParseAddr("10.0.0.40"), netip.MustParseAddr("10.0.1.40")
	to := func(e *host, cidr string) {
		l.subnet(subnetA).Table = l.table(7, Route{CIDR: netip.MustParsePrefix(cidr), ENI: e.eni})
	}
	toB := dgram4(a.addr, b.addr, 1000, 53)
	for _, c := range []struct {
		name   string
		rules  []Rule // of both, each way
		before func()
		first  *host // who gets packet at first
		packet []byte
		change func()
		then   *host // who gets it then, or why nobody does
		want   DropReason
	}{
		{"nothing", allTracked, nil, b, toB, func() {}, b, ""},
		{"ingress of the ACL", allTracked, nil, b, toB, func() { l.subnet(subnetB).ACL = l.acl(7, nil, nil) }, b, ACLIngress},
		{"egress of the ACL", allTracked, nil, b, toB, func() { l.subnet(subnetA).ACL = l.acl(7, nil, nil) }, b, ACLEgress},
		{"a route to nowhere", allTracked, nil, b, toB, func() {
			l.subnet(subnetA).Table = l.table(7, Route{CIDR: netip.MustParsePrefix("10.0.1.0/24")})
		}, b, Blackhole},
		{"a route to a middlebox", allTracked, nil, b, toB, func() { to(m, "10.0.1.0/24") }, m, ""},
		{"the middlebox's check", allTracked, func() { to(m, "10.0.1.0/24") }, m, toB, func() { l.iface(m.eni).SourceDestCheck = true }, m, DestAddress},
		{"the address moves", allTracked, nil, b, dgram4(a.addr, third, 1000, 53), func() {
			l.iface(b.eni).Addresses = l.iface(b.eni).Addresses[:1]
			l.iface(m.eni).Addresses = append(slices.Clone(l.iface(m.eni).Addresses), netip.PrefixFrom(third, 32))
		}, m, ""},
		{"the address goes", allTracked, nil, b, dgram4(a.addr, third, 1000, 53), func() {
			l.iface(b.eni).Addresses = l.iface(b.eni).Addresses[:1]
		}, b, NoTarget},
		{"the source goes", allTracked, nil, b, dgram4(second, b.addr, 1000, 53), func() {
			l.iface(a.eni).Addresses = l.iface(a.eni).Addresses[:1]
		}, b, SourceAddress},
		{"rules go, tracked", allTracked, nil, b, toB, func() { l.group(9, nil, nil) }, b, ""},
		{"rules go, untracked", all, nil, b, toB, func() { l.group(9, nil, nil) }, b, SGEgress},
		{"rules of the receiver go, untracked", all, nil, b, toB, func() { b.groups() }, b, SGIngress},
		{"rules go, and time passes", allTracked, nil, b, toB, func() { l.group(9, nil, nil); l.after(200 * time.Second) }, b, SGEgress},
	} {
		t.Run(c.name, func(t *testing.T) {
			l.t = t
			l.cfg.Interfaces, l.cfg.Subnets = slices.Clone(had.Interfaces), slices.Clone(had.Subnets)
			for _, h := range []*host{a, b, m} {
				h.groups(l.group(9, c.rules, c.rules))
			}
			if c.before != nil {
				c.before()
			}
			l.set()
			l.forgetFlows()
			a.wants(c.first, "the first", c.packet, "")
			if !a.short(c.packet) {
				t.Error("what passed is not noted")
			}
			a.wants(c.first, "its like", c.packet, "")
			c.change()
			l.set()
			if a.short(c.packet) {
				t.Error("what passed before the change is still noted")
			}
			a.wants(c.then, "after the change", c.packet, c.want)
			a.wants(c.then, "and again", c.packet, c.want)
		})
	}
	l.t = t
}

// TestShortWayIsOfTheFrame: other Ethernet addresses are another matter.
func TestShortWayIsOfTheFrame(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetA, "10.0.0.5")
	c := l.add(subnetA, "10.0.0.6")
	l.iface(c.eni).SourceDestCheck = false
	l.set()
	packet := dgram4(a.addr, b.addr, 1000, 53)
	verdict := func(dst, src net.HardwareAddr) (*host, DropReason) {
		before := map[*host]Counters{a: a.counters(), b: b.counters(), c: c.counters()}
		if got, _ := a.run(l.objs.FromGuest, ethernet(dst, src, 0x0800, packet), 0); got == redirected {
			for h, was := range before {
				if h.counters().RxPackets > was.RxPackets {
					return h, ""
				}
			}
		}
		for reason, n := range a.counters().Drops {
			if n > before[a].Drops[reason] {
				return nil, reason
			}
		}
		return nil, "?"
	}
	for range 2 { // each of them after each
		for _, f := range []struct {
			name     string
			dst, src net.HardwareAddr
			to       *host
			want     DropReason
		}{
			{"to the router", RouterMAC, a.mac, b, ""},
			{"to the router again", RouterMAC, a.mac, b, ""},
			{"to the holder", b.mac, a.mac, b, ""},
			{"to the holder again", b.mac, a.mac, b, ""},
			{"to another", c.mac, a.mac, c, ""},
			{"to another again", c.mac, a.mac, c, ""},
			{"to the holder after that", b.mac, a.mac, b, ""},
			{"to nobody", net.HardwareAddr{2, 0xaa, 0, 0, 1, 1}, a.mac, nil, UnknownMAC},
			{"from another", b.mac, c.mac, nil, SourceMAC},
		} {
			if to, got := verdict(f.dst, f.src); to != f.to || got != f.want {
				t.Errorf("%s: %v, %q; want %v, %q", f.name, to, got, f.to, f.want)
			}
		}
	}
}
