package fabric

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// newLab6 is newLab with IPv6: a /64 for each subnet, of 2001:db8:0:100::/56 in
// VPC 1 and of 2001:db8:0:200::/56 in VPC 2, that groupOpen, aclOpen and the route
// tables cover.
func newLab6(t testing.TB) *lab {
	t.Helper()
	l := newLab(t)
	for i, cidr := range []string{"2001:db8:0:100::/64", "2001:db8:0:101::/64", "2001:db8:0:200::/64"} {
		l.cfg.Subnets[i].CIDR6 = netip.MustParsePrefix(cidr)
	}
	for i, cidr := range []string{"2001:db8:0:100::/56", "2001:db8:0:200::/56"} {
		l.cfg.Tables[i].Routes = append(slices.Clone(l.cfg.Tables[i].Routes), Route{CIDR: netip.MustParsePrefix(cidr), Local: true})
	}
	pass := append(slices.Clone(l.cfg.ACLs[0].Ingress), ACLEntry{Protocol: AllProtocols, CIDR: netip.MustParsePrefix("::/0"), Allow: true})
	l.cfg.ACLs[0].Ingress, l.cfg.ACLs[0].Egress = pass, pass
	open := append(slices.Clone(all), all6...)
	l.cfg.Groups[0].Ingress, l.cfg.Groups[0].Egress = open, open
	return l
}

var (
	everywhere6 = prefixes("::/0")
	all6        = []Rule{{Protocol: AllProtocols, Peers: everywhere6}}
)

// add6 adds a guest with IPv6, the first address of which is six.
func (l *lab) add6(subnet vpc.SubnetID, primary, six string, more ...string) *host {
	l.t.Helper()
	h := l.add(subnet, primary)
	h.six = netip.MustParseAddr(six)
	i := l.iface(h.eni)
	i.Addresses = append(i.Addresses, netip.PrefixFrom(h.six, 128))
	for _, m := range more {
		i.Addresses = append(i.Addresses, netip.MustParsePrefix(m))
	}
	return h
}

// set6 is set, and guests that send nothing of IPv6 by themselves.
func (l *lab) set6() {
	l.t.Helper()
	l.set()
	for _, g := range l.cfg.Guests {
		if err := nl.Do(NetnsPath(g.Netns), func() error { return writeSysctl("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1") }); err != nil {
			l.t.Fatal(err)
		}
	}
}

// linkLocal is the link-local address of a MAC.
func linkLocal(m net.HardwareAddr) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: m[0] ^ 2, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]})
}

// IPv6 packets for BPF_PROG_TEST_RUN, most without a checksum.

func packet6(next byte, src, dst netip.Addr, payload []byte) []byte {
	p := make([]byte, 40, 40+len(payload))
	p[0], p[6], p[7] = 0x60, next, 61
	binary.BigEndian.PutUint16(p[4:], uint16(len(payload)))
	copy(p[8:], src.AsSlice())
	copy(p[24:], dst.AsSlice())
	return append(p, payload...)
}

func tcp6(src, dst netip.Addr, from, to uint16, flags byte) []byte {
	return packet6(6, src, dst, tcp4(netip.IPv4Unspecified(), netip.IPv4Unspecified(), from, to, flags)[20:])
}

func dgram6(src, dst netip.Addr, from, to uint16) []byte {
	return packet6(17, src, dst, ports(from, to, 0, 12, 0, 0, 'd', 'a', 't', 'a'))
}

func icmp6(src, dst netip.Addr, kind, code byte, id uint16, data ...byte) []byte {
	return packet6(58, src, dst, append(append([]byte{kind, code, 0, 0}, ports(id, 1)...), data...))
}

// extended puts extension headers (with the kind of the first, and each with the
// kind of the next in its first byte but the last) before what a packet carries.
func extended(p []byte, kind byte, headers ...[]byte) []byte {
	last := p[6]
	out := with(p[:40], func(b []byte) { b[6] = kind })
	for i, h := range headers {
		h = bytes.Clone(h)
		if i == len(headers)-1 {
			h[0] = last
		}
		out = append(out, h...)
	}
	out = append(out, p[40:]...)
	binary.BigEndian.PutUint16(out[4:], uint16(len(out)-40))
	return out
}

// options is a header of hop-by-hop or destination options, of PadN.
func options(next byte) []byte { return []byte{next, 0, 1, 4, 0, 0, 0, 0} }

// fragment is a fragment header.
func fragment(next byte, offset uint16, more bool, id uint32) []byte {
	b := binary.BigEndian.AppendUint16([]byte{next, 0}, offset|uint16(b2u(more)))
	return binary.BigEndian.AppendUint32(b, id)
}

// checked writes an ICMPv6 packet's checksum.
func checked(p []byte) []byte {
	return with(p, func(b []byte) { binary.BigEndian.PutUint16(b[42:], sum6(b)) })
}

// sum6 is the checksum of what is behind a header of IPv6, 0 if the right one is
// there.
func sum6(p []byte) uint16 {
	sum := uint32(len(p)-40) + uint32(p[6])
	for i := 8; i < len(p); i += 2 {
		if i+1 == len(p) {
			sum += uint32(p[i]) << 8
		} else {
			sum += uint32(binary.BigEndian.Uint16(p[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// wants6 sends a packet through the router, and wants it dropped for the reason,
// "": delivered to the ENI of to. Drops are counted at the ENI that drops.
func (h *host) wants6(to *host, what string, packet []byte, want DropReason) {
	h.l.t.Helper()
	h.wants6By(to, what, RouterMAC, packet, want)
}

func (h *host) wants6By(to *host, what string, mac net.HardwareAddr, packet []byte, want DropReason) {
	h.l.t.Helper()
	before, err := h.l.Counters()
	if err != nil {
		h.l.t.Fatal(err)
	}
	verdict, out := h.run(h.l.objs.FromGuest, ethernet(mac, h.mac, 0x86dd, packet), 0)
	after, err := h.l.Counters()
	if err != nil {
		h.l.t.Fatal(err)
	}
	var got []string
	for eni, c := range after {
		for reason, n := range c.Drops {
			if n > before[eni].Drops[reason] {
				got = append(got, fmt.Sprintf("%s at %s", reason, eni))
			}
		}
		if n := c.RxPackets - before[eni].RxPackets; n > 0 {
			got = append(got, fmt.Sprintf("%d received by %s", n, eni))
		}
	}
	at := h.eni
	if want == SGIngress || want == ACLIngress || want == DestAddress {
		at = to.eni
	}
	wanted := fmt.Sprintf("%s at %s", want, at)
	if want == "" {
		wanted = fmt.Sprintf("1 received by %s", to.eni)
		if source := h.mac; verdict == redirected {
			if !bytes.Equal(mac, to.mac) {
				source = RouterMAC
			}
			if frame := ethernet(to.mac, source, 0x86dd, packet); !bytes.Equal(out, frame) {
				h.l.t.Errorf("%s: frame\n% x, want\n% x", what, out, frame)
			}
		}
	}
	if len(got) != 1 || got[0] != wanted || (verdict == redirected) != (want == "") {
		h.l.t.Errorf("%s: verdict %d, %v; want %s", what, verdict, got, wanted)
	}
}

// TestVerdicts6 gives packets of IPv6 to from_guest: what is delivered to whom,
// and what is dropped why.
func TestVerdicts6(t *testing.T) {
	l := newLab6(t)
	a := l.add6(subnetA, "10.0.0.4", "2001:db8:0:100::4", "2001:db8:0:100::10/128", "2001:db8:0:100:1::/80")
	near := l.add6(subnetA, "10.0.0.5", "2001:db8:0:100::5")
	b := l.add6(subnetB, "10.0.1.4", "2001:db8:0:101::4", "2001:db8:0:101:ffff::/80")
	free := l.add6(subnetA, "10.0.0.6", "2001:db8:0:100::6")
	l.iface(free.eni).SourceDestCheck = false
	other := l.add6(subnetOther, "10.0.0.7", "2001:db8:0:200::7")
	l.set6()
	addr := netip.MustParseAddr
	to := func(s string) []byte { return dgram6(a.six, addr(s), 1, 2) }
	from := func(s string) []byte { return dgram6(addr(s), b.six, 1, 2) }
	udp := dgram6(a.six, b.six, 1, 2)
	hop, dst := options(60), options(60)
	routing := []byte{0, 0, 4, 0, 0, 0, 0, 0} // no segments left
	for _, c := range []struct {
		name   string
		from   *host
		by     net.HardwareAddr // nil: the router's
		to     *host
		packet []byte
		want   DropReason
	}{
		{"to another subnet", a, nil, b, udp, ""},
		{"TCP", a, nil, b, tcp6(a.six, b.six, 1, 2, syn), ""},
		{"echo", a, nil, b, icmp6(a.six, b.six, 128, 0, 1), ""},
		{"within the subnet, by the router", a, nil, near, to("2001:db8:0:100::5"), ""},
		{"within the subnet, by MAC", a, near.mac, near, to("2001:db8:0:100::5"), ""},
		{"to the first of a prefix", a, nil, b, to("2001:db8:0:101:ffff::"), ""},
		{"to the last of a prefix", a, nil, b, to("2001:db8:0:101:ffff:ffff:ffff:ffff"), ""},
		{"beyond a prefix", a, nil, nil, to("2001:db8:0:101:fffe:ffff:ffff:ffff"), NoTarget},
		{"from a secondary address", a, nil, b, from("2001:db8:0:100::10"), ""},
		{"from a prefix", a, nil, b, from("2001:db8:0:100:1:2:3:4"), ""},
		{"from beyond a prefix", a, nil, b, from("2001:db8:0:100:2::"), SourceAddress},
		{"from a neighbour's address", a, nil, b, from("2001:db8:0:100::5"), SourceAddress},
		{"from nowhere", a, nil, b, from("::"), SourceAddress},
		{"from a neighbour's address, unchecked", free, nil, b, from("2001:db8:0:100::5"), ""},
		{"from nowhere, unchecked", free, nil, b, from("::"), SourceAddress},
		{"from multicast, unchecked", free, nil, b, from("ff02::1"), Malformed},
		{"from loopback, unchecked", free, nil, b, from("::1"), Malformed},
		{"from an IPv4 address, unchecked", free, nil, b, from("::ffff:10.0.0.6"), Malformed},
		{"to an IPv4 address", a, nil, nil, to("::ffff:10.0.1.4"), Malformed},
		{"to nowhere", a, nil, nil, to("::"), Malformed},
		{"to multicast", a, nil, nil, to("ff02::1"), Multicast},
		{"to a multicast MAC", a, net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}, nil, udp, Multicast},
		{"to an address nobody holds", a, nil, nil, to("2001:db8:0:101::99"), NoTarget},
		{"to the router's own address", a, nil, nil, to("2001:db8:0:100::1"), NoTarget},
		{"to another VPC", a, nil, nil, to("2001:db8:0:200::7"), NoRoute},
		{"to services", a, nil, nil, to("fd00:ec2::254"), NoRoute},
		{"to a link-local address by the router", a, nil, nil, to(linkLocal(near.mac).String()), NoRoute},
		{"from a link-local address by the router", a, nil, b, from(linkLocal(a.mac).String()), NoRoute},
		{"between link-local addresses", a, near.mac, near, dgram6(linkLocal(a.mac), linkLocal(near.mac), 1, 2), ""},
		{"from a neighbour's link-local address", a, near.mac, near, dgram6(linkLocal(near.mac), linkLocal(near.mac), 1, 2), SourceAddress},
		{"to another's link-local address", a, near.mac, near, dgram6(linkLocal(a.mac), linkLocal(b.mac), 1, 2), DestAddress},
		{"to a neighbour's MAC, not its address", a, near.mac, near, udp, DestAddress},
		{"to an unchecked neighbour's MAC", a, free.mac, free, udp, ""},
		{"to a MAC of another subnet", a, b.mac, nil, udp, UnknownMAC},
		{"to a MAC of another VPC", a, other.mac, nil, udp, UnknownMAC},

		{"header cut short", a, nil, nil, udp[:40], Malformed},
		{"UDP header cut short", a, nil, nil, with(udp[:47], func(p []byte) { p[5] = 7 }), Malformed},
		{"TCP without its flags", a, nil, nil, packet6(6, a.six, b.six, make([]byte, 13)), Malformed},
		{"UDP header behind the packet's end", a, nil, nil, with(udp, func(p []byte) { p[5] = 7 }), Malformed},
		{"length beyond the frame", a, nil, nil, with(udp, func(p []byte) { p[5]++ }), Malformed},
		{"version 4", a, nil, nil, with(udp, func(p []byte) { p[0] = 0x45 }), Malformed},
		{"no next header", a, nil, b, packet6(59, a.six, b.six, nil), ""},

		{"hop-by-hop options", a, nil, b, extended(udp, 0, options(0)), ""},
		{"hop-by-hop, destination, routing, destination", a, nil, b, extended(udp, 0, hop, options(43), with(routing, func(h []byte) { h[0] = 60 }), dst), ""},
		{"authentication", a, nil, b, extended(udp, 51, append([]byte{0, 4}, make([]byte, 22)...)), ""},
		{"eight headers", a, nil, b, extended(udp, 60, dst, dst, dst, dst, dst, dst, dst, dst), ""},
		{"nine headers", a, nil, nil, extended(udp, 60, dst, dst, dst, dst, dst, dst, dst, dst, dst), Extension},
		{"twenty headers", a, nil, nil, extended(udp, 60, slices.Repeat([][]byte{dst}, 20)...), Extension},
		{"hop-by-hop options behind others", a, nil, nil, extended(udp, 60, options(0), options(0)), Extension},
		{"hop-by-hop options twice", a, nil, nil, extended(udp, 0, options(0), options(0)), Extension},
		{"segments left", a, nil, nil, extended(udp, 43, with(routing, func(h []byte) { h[3] = 1 })), Extension},
		{"fragments of a fragment", a, nil, nil, extended(udp, 44, fragment(44, 0, true, 1), fragment(0, 0, true, 2)), Extension},
		{"options beyond the packet", a, nil, nil, extended(udp, 60, with(dst, func(h []byte) { h[1] = 3 })), Malformed},
		{"options of 2,048 bytes that are not there", a, nil, nil, extended(udp, 60, with(dst, func(h []byte) { h[1] = 255 })), Malformed},
		{"options without an end", a, nil, nil, packet6(60, a.six, b.six, []byte{17, 0, 0}), Malformed},
		{"options and nothing", a, nil, nil, packet6(60, a.six, b.six, options(17)), Malformed},
		{"neighbour solicitation behind options", a, nil, nil, extended(icmp6(a.six, b.six, 135, 0, 0, make([]byte, 16)...), 60, dst), Extension},
		{"router advertisement in a fragment", a, nil, nil, extended(icmp6(a.six, b.six, 134, 0, 0, make([]byte, 16)...), 44, fragment(0, 0, true, 1)), Extension},
		{"an atomic fragment", a, nil, b, extended(udp, 44, fragment(0, 0, false, 1)), ""},
		{"a first fragment", a, nil, b, extended(udp, 44, fragment(0, 0, true, 2)), ""},
		{"its last", a, nil, b, extended(packet6(17, a.six, b.six, make([]byte, 8)), 44, fragment(0, 16, false, 2)), ""},
		{"a later fragment without a first", a, nil, nil, extended(packet6(17, a.six, b.six, make([]byte, 8)), 44, fragment(0, 16, false, 4)), Fragment},
		{"a first fragment without its headers", a, nil, nil, extended(packet6(6, a.six, b.six, make([]byte, 8)), 44, fragment(0, 0, true, 5)), Malformed},
		{"a first fragment of options", a, nil, b, extended(udp, 44, fragment(60, 0, true, 6), dst), ""},
		{"a later one over its ports", a, nil, nil, extended(packet6(17, a.six, b.six, make([]byte, 16)), 44, fragment(60, 8, false, 6)), Fragment},
		{"a later one behind them", a, nil, b, extended(packet6(17, a.six, b.six, make([]byte, 16)), 44, fragment(60, 16, false, 6)), ""},
	} {
		if c.by == nil {
			c.by = RouterMAC
		}
		c.from.wants6By(c.to, c.name, c.by, c.packet, c.want)
	}
}

// TestVerdicts6Without: without an IPv6 block, what is of IPv6 is dropped.
func TestVerdicts6Without(t *testing.T) {
	l := newLab6(t)
	l.subnet(subnetB).CIDR6 = netip.Prefix{}
	a := l.add6(subnetA, "10.0.0.4", "2001:db8:0:100::4")
	b := l.add(subnetB, "10.0.1.4")
	l.cfg.Tables[0].Routes = append(l.cfg.Tables[0].Routes, Route{CIDR: netip.MustParsePrefix("2001:db8:1::/48"), ENI: b.eni})
	l.set6()
	a.wants6(b, "to a middlebox without IPv6", dgram6(a.six, netip.MustParseAddr("2001:db8:1::1"), 1, 2), IPv6)
	b.wants6(a, "from there", dgram6(linkLocal(b.mac), a.six, 1, 2), IPv6)
	b.wants6(a, "router solicitation", icmp6(linkLocal(b.mac), netip.MustParseAddr("ff02::2"), 133, 0, 0), IPv6)
}

// TestNeighbourDiscovery: who is answered with what.
func TestNeighbourDiscovery(t *testing.T) {
	l := newLab6(t)
	a := l.add6(subnetA, "10.0.0.4", "2001:db8:0:100::4", "2001:db8:0:100::10/128")
	near := l.add6(subnetA, "10.0.0.5", "2001:db8:0:100::5", "2001:db8:0:100:5::/80")
	b := l.add6(subnetB, "10.0.1.4", "2001:db8:0:101::4")
	l.set6()
	addr := netip.MustParseAddr
	nodes, nobody := addr("ff02::1"), addr("::")
	solicit := func(src, dst, target netip.Addr, option ...byte) []byte {
		p := icmp6(src, dst, 135, 0, 0, append(target.AsSlice(), option...)...)
		p[7], p[46], p[47] = 255, 0, 0 // icmp6 has a number there
		return checked(p)
	}
	answer := func(src, dst netip.Addr, flags byte, mac net.HardwareAddr) []byte {
		p := icmp6(src, dst, 136, 0, 0, append(append(src.AsSlice(), 2, 1), mac...)...)
		p[7], p[44], p[46], p[47] = 255, flags, 0, 0
		return checked(p)
	}
	for _, c := range []struct {
		name   string
		packet []byte
		mac    net.HardwareAddr
		want   []byte
	}{
		{"the router", solicit(a.six, addr("ff02::1:ff00:1"), RouterAddr6, 1, 1, 2, 0xaa, 0, 0, 0, 1), RouterMAC, answer(RouterAddr6, a.six, 0xe0, RouterMAC)},
		{"the router, by the subnet's first address", solicit(a.six, addr("ff02::1:ff00:1"), addr("2001:db8:0:100::1")), RouterMAC, answer(addr("2001:db8:0:100::1"), a.six, 0xe0, RouterMAC)},
		{"from a link-local address", solicit(linkLocal(a.mac), addr("ff02::1:ff00:1"), RouterAddr6), RouterMAC, answer(RouterAddr6, linkLocal(a.mac), 0xe0, RouterMAC)},
		{"another ENI", solicit(a.six, addr("ff02::1:ff00:5"), near.six), near.mac, answer(near.six, a.six, 0x60, near.mac)},
		{"another ENI, again", solicit(a.six, near.six, near.six), near.mac, answer(near.six, a.six, 0x60, near.mac)},
		{"another's prefix", solicit(a.six, addr("ff02::1:ff00:9"), addr("2001:db8:0:100:5::9")), near.mac, answer(addr("2001:db8:0:100:5::9"), a.six, 0x60, near.mac)},
		{"another's link-local address", solicit(a.six, addr("ff02::1:ff00:5"), linkLocal(near.mac)), near.mac, answer(linkLocal(near.mac), a.six, 0x60, near.mac)},
		{"a probe for another's address", solicit(nobody, addr("ff02::1:ff00:5"), near.six, 14, 1, 1, 2, 3, 4, 5, 6), near.mac, answer(near.six, nodes, 0x20, near.mac)},
	} {
		verdict, out := a.run(l.objs.FromGuest, ethernet(RouterMAC, a.mac, 0x86dd, c.packet), 0)
		if want := ethernet(a.mac, c.mac, 0x86dd, c.want); verdict != redirected || !bytes.Equal(out, want) {
			t.Errorf("%s: verdict %d\n% x, want\n% x", c.name, verdict, out, want)
		}
	}
	for _, c := range []struct {
		name   string
		packet []byte
		want   DropReason
	}{
		{"a probe for its own address", solicit(nobody, addr("ff02::1:ff00:10"), addr("2001:db8:0:100::10")), NDUnanswered},
		{"a probe for its own link-local address", solicit(nobody, addr("ff02::1:ff00:10"), linkLocal(a.mac)), NDUnanswered},
		{"an address that nobody holds", solicit(a.six, addr("ff02::1:ff00:99"), addr("2001:db8:0:100::99")), NDUnanswered},
		{"a link-local address that nobody has", solicit(a.six, addr("ff02::1:ff00:99"), addr("fe80::99")), NDUnanswered},
		{"another subnet's", solicit(a.six, addr("ff02::1:ff00:4"), b.six), NDUnanswered},
		{"from a neighbour's address", solicit(near.six, addr("ff02::1:ff00:1"), RouterAddr6), NDSpoofed},
		{"multicast", solicit(a.six, nodes, nodes), Malformed},
		{"from far away", with(solicit(a.six, nodes, RouterAddr6), func(p []byte) { p[7] = 254 }), Malformed},
		{"with a code", with(solicit(a.six, nodes, RouterAddr6), func(p []byte) { p[41] = 1 }), Malformed},
		{"cut short", with(solicit(a.six, nodes, RouterAddr6)[:63], func(p []byte) { p[5] = 23 }), Malformed},
		{"an advertisement", answer(a.six, nodes, 0x20, a.mac), NDUnanswered},
		{"a router advertisement", with(icmp6(linkLocal(a.mac), nodes, 134, 0, 0, make([]byte, 8)...), func(p []byte) { p[7] = 255 }), NDUnanswered},
		{"a redirect to a neighbour", with(icmp6(a.six, near.six, 137, 0, 0, make([]byte, 32)...), func(p []byte) { p[7] = 255 }), NDUnanswered},
	} {
		a.wants6(near, c.name, c.packet, c.want)
	}

	// A router solicitation.
	for _, source := range []netip.Addr{nobody, linkLocal(a.mac)} {
		request := with(icmp6(source, addr("ff02::2"), 133, 0, 0), func(p []byte) { p[7], p[47] = 255, 0 })
		verdict, out := a.run(l.objs.FromGuest, ethernet(net.HardwareAddr{0x33, 0x33, 0, 0, 0, 2}, a.mac, 0x86dd, checked(request)), 0)
		to := source
		if source == nobody {
			to = nodes
		}
		want := icmp6(RouterAddr6, to, 134, 0, 0, make([]byte, 24)...)
		copy(want[40:], []byte{134, 0, 0, 0, 64, 0x80, 1800 >> 8, 1800 & 0xff})
		copy(want[56:], append([]byte{1, 1}, RouterMAC...))
		copy(want[64:], []byte{5, 1, 0, 0, 0, 0, MTU >> 8, MTU & 0xff})
		want[7] = 255
		if frame := ethernet(a.mac, RouterMAC, 0x86dd, checked(want)); verdict != redirected || !bytes.Equal(out, frame) {
			t.Errorf("router solicitation from %s: verdict %d\n% x, want\n% x", source, verdict, out, frame)
		}
	}
	if c := a.counters(); c.TxPackets+c.RxPackets != 0 {
		t.Errorf("%d packets sent and %d received are counted, want none", c.TxPackets, c.RxPackets)
	}
}

// TestGroups6: rules of IPv6 and their tracking.
func TestGroups6(t *testing.T) {
	l := newLab6(t)
	a := l.add6(subnetA, "10.0.0.4", "2001:db8:0:100::4", "2001:db8:0:100:1::/80")
	b := l.add6(subnetB, "10.0.1.4", "2001:db8:0:101::4", "2001:db8:0:101:1::/80")
	far := netip.MustParseAddr("2001:db8:0:100:1::9") // a's
	rule := func(protocol, from, to int, peers ...string) Rule {
		return Rule{Protocol: protocol, From: from, To: to, Peers: prefixes(peers...)}
	}
	list := func(r ...Rule) []Rule { return r }
	echo := func(src, dst netip.Addr) []byte { return icmp6(src, dst, 128, 0, 7) }
	for _, c := range []struct {
		name   string
		in     []Rule // of b
		packet []byte
		want   DropReason
	}{
		{"no rule", nil, dgram6(a.six, b.six, 1, 53), SGIngress},
		{"everything of IPv4", all, dgram6(a.six, b.six, 1, 53), SGIngress},
		{"everything", all6, dgram6(a.six, b.six, 1, 53), ""},
		{"the address", list(rule(17, 53, 53, "2001:db8:0:100::4/128")), dgram6(a.six, b.six, 1, 53), ""},
		{"another address", list(rule(17, 53, 53, "2001:db8:0:100::5/128")), dgram6(a.six, b.six, 1, 53), SGIngress},
		{"a block, to its last bit", list(rule(17, 53, 53, "2001:db8:0:100::4/127")), dgram6(a.six, b.six, 1, 53), ""},
		{"a block beside", list(rule(17, 53, 53, "2001:db8:0:100::6/127")), dgram6(a.six, b.six, 1, 53), SGIngress},
		{"a block whose bits end in a word", list(rule(17, 53, 53, "2001:db8:0:100:1::/79")), dgram6(far, b.six, 1, 53), ""},
		{"another of that length", list(rule(17, 53, 53, "2001:db8:0:100:2::/79")), dgram6(far, b.six, 1, 53), SGIngress},
		{"the first port", list(rule(6, 80, 90, "::/0")), tcp6(a.six, b.six, 1, 80, syn), ""},
		{"the last port", list(rule(6, 80, 90, "::/0")), tcp6(a.six, b.six, 1, 90, syn), ""},
		{"a port beyond", list(rule(6, 80, 90, "::/0")), tcp6(a.six, b.six, 1, 91, syn), SGIngress},
		{"another protocol", list(rule(6, 0, 65535, "::/0")), dgram6(a.six, b.six, 1, 80), SGIngress},
		{"a list of both kinds", list(rule(17, 53, 53, "10.0.0.0/8", "2001:db8::/32")), dgram6(a.six, b.six, 1, 53), ""},
		{"type and code", list(rule(58, 128, 0, "::/0")), echo(a.six, b.six), ""},
		{"type, any code", list(rule(58, 128, Any, "::/0")), echo(a.six, b.six), ""},
		{"any type", list(rule(58, Any, Any, "::/0")), echo(a.six, b.six), ""},
		{"another type", list(rule(58, 1, Any, "::/0")), echo(a.six, b.six), SGIngress},
		{"another code", list(rule(58, 128, 1, "::/0")), echo(a.six, b.six), SGIngress},
		{"ICMP of IPv4", list(rule(1, Any, Any, "::/0")), echo(a.six, b.six), SGIngress},
		{"its group", list(Rule{Protocol: AllProtocols, Group: testGroup(1)}), dgram6(a.six, b.six, 1, 53), ""},
		{"its group, from a prefix", list(Rule{Protocol: 17, From: 53, To: 53, Group: testGroup(1)}), dgram6(far, b.six, 1, 53), ""},
		{"another group", list(Rule{Protocol: AllProtocols, Group: testGroup(2)}), dgram6(a.six, b.six, 1, 53), SGIngress},
		{"through extension headers", list(rule(17, 53, 53, "::/0")), extended(dgram6(a.six, b.six, 1, 53), 60, options(0)), ""},
		{"through extension headers, another port", list(rule(17, 53, 53, "::/0")), extended(dgram6(a.six, b.six, 1, 54), 60, options(0)), SGIngress},
		{"ESP by its number", list(rule(50, Any, Any, "::/0")), packet6(50, a.six, b.six, make([]byte, 16)), ""},
	} {
		a.groups(l.group(1, nil, all6))
		b.groups(l.group(3, c.in, nil))
		l.set6()
		l.forgetFlows()
		a.wants6(b, c.name, c.packet, c.want)
		a.groups(l.group(1, nil, c.in))
		b.groups(l.group(3, all6, nil))
	}

	// The same on the sender's side.
	a.groups(l.group(1, nil, list(rule(17, 53, 53, "2001:db8:0:101:1::/80"))))
	b.groups(l.group(3, all6, nil))
	l.set6()
	a.wants6(b, "egress to a block", dgram6(a.six, netip.MustParseAddr("2001:db8:0:101:1::7"), 1, 53), "")
	a.wants6(b, "egress beside it", dgram6(a.six, b.six, 1, 53), SGEgress)
	a.groups(l.group(1, nil, list(Rule{Protocol: 17, From: 53, To: 53, Group: testGroup(3)})))
	l.set6()
	a.wants6(b, "egress to a group", dgram6(a.six, b.six, 2, 53), "")
}

// TestTracking6: answers, errors, and what a change of rules does.
func TestTracking6(t *testing.T) {
	for _, tracked := range []bool{true, false} {
		l := newLab6(t)
		a := l.add6(subnetA, "10.0.0.4", "2001:db8:0:100::4")
		b := l.add6(subnetB, "10.0.1.4", "2001:db8:0:101::4")
		web := Rule{Protocol: 6, From: 80, To: 80, Peers: everywhere6}
		dns := Rule{Protocol: 17, From: 53, To: 53, Peers: everywhere6}
		ping := Rule{Protocol: 58, From: 128, To: Any, Peers: everywhere6}
		in, back := []Rule{web, dns, ping}, []Rule(nil)
		if !tracked {
			back = all6
		}
		a.groups(l.group(1, back, in))
		b.groups(l.group(2, in, back))
		l.set6()
		request, answer := tcp6(a.six, b.six, 1000, 80, syn), tcp6(b.six, a.six, 80, 1000, syn|ack)
		query := dgram6(a.six, b.six, 1000, 53)
		if tracked {
			b.wants6(a, "an answer that nobody asked for", answer, SGEgress)
			b.wants6(a, "an echo's answer that nobody asked for", icmp6(b.six, a.six, 129, 0, 7), SGEgress)
			b.wants6(a, "an error of nothing", icmp6(b.six, a.six, 1, 4, 0, query...), SGEgress)
		}
		a.wants6(b, "request", request, "")
		b.wants6(a, "answer", answer, "")
		a.wants6(b, "query", query, "")
		b.wants6(a, "its answer", dgram6(b.six, a.six, 53, 1000), "")
		a.wants6(b, "echo", icmp6(a.six, b.six, 128, 0, 7), "")
		b.wants6(a, "its answer", icmp6(b.six, a.six, 129, 0, 7), "")
		b.wants6(a, "an error", icmp6(b.six, a.six, 1, 4, 0, query...), "")
		b.wants6(a, "packet too big", icmp6(b.six, a.six, 2, 0, 0, request...), "")
		b.wants6(a, "an error through extension headers", icmp6(b.six, a.six, 3, 0, 0, extended(query, 60, options(0))...), "")
		if tracked {
			b.wants6(a, "an error of another flow", icmp6(b.six, a.six, 1, 4, 0, dgram6(a.six, b.six, 1001, 53)...), SGEgress)
			b.wants6(a, "an error of a packet to another", icmp6(b.six, a.six, 1, 4, 0, dgram6(b.six, a.six, 53, 1000)...), SGEgress)
			b.wants6(a, "an echo the other way", icmp6(b.six, a.six, 128, 0, 7), SGEgress)
			b.wants6(a, "an error that quotes a header alone", icmp6(b.six, a.six, 1, 4, 0, query[:40]...), SGEgress)
		}
		l.group(1, nil, nil)
		l.group(2, nil, nil)
		l.set6()
		want := SGEgress
		if tracked {
			want = ""
		}
		a.wants6(b, "request, when the rule is gone", tcp6(a.six, b.six, 1000, 80, ack), want)
		a.wants6(b, "query, when the rule is gone", query, want)
		a.wants6(b, "echo, when the rule is gone", icmp6(a.six, b.six, 128, 0, 7), "") // always tracked
		n := 0
		if err := eachFlow(l.objs.Flows6, func(k bpfgen.FabricFlowKey6, v bpfgen.FabricFlow) error {
			if k.Protocol != protoICMPv6 && (v.Version == 0) != tracked {
				t.Errorf("flow of protocol %d has version %x, want tracked %v", k.Protocol, v.Version, tracked)
			}
			n++
			return nil
		}); err != nil || n != 6 {
			t.Errorf("%d flows, %v; want 6", n, err)
		}
		l.after(defaultTCPEstablished)
		if n, err := l.ExpireFlows(); err != nil || n != 6 {
			t.Errorf("%d flows expired, %v; want 6", n, err)
		}
		a.wants6(b, "request, much later", tcp6(a.six, b.six, 1000, 80, ack), SGEgress)
	}
}

// TestACL6: entries of IPv6, at the boundary of a subnet alone, in their order.
func TestACL6(t *testing.T) {
	l := newLab6(t)
	a := l.add6(subnetA, "10.0.0.4", "2001:db8:0:100::4")
	near := l.add6(subnetA, "10.0.0.5", "2001:db8:0:100::5")
	b := l.add6(subnetB, "10.0.1.4", "2001:db8:0:101::4")
	entry := func(allow bool, protocol, from, to int, cidr string) ACLEntry {
		return ACLEntry{Protocol: protocol, From: from, To: to, CIDR: netip.MustParsePrefix(cidr), Allow: allow}
	}
	list := func(e ...ACLEntry) []ACLEntry { return e }
	pass, pass4 := entry(true, AllProtocols, Any, Any, "::/0"), entry(true, AllProtocols, Any, Any, "0.0.0.0/0")
	udp := dgram6(a.six, b.six, 1, 53)
	for _, c := range []struct {
		name    string
		in, out []ACLEntry // of b's subnet
		packet  []byte
		want    DropReason
	}{
		{"no entry", nil, nil, udp, ACLIngress},
		{"everything of IPv4", list(pass4), nil, udp, ACLIngress},
		{"everything", list(pass), nil, udp, ""},
		{"the port", list(entry(true, 17, 53, 53, "2001:db8:0:100::/64")), nil, udp, ""},
		{"another port", list(entry(true, 17, 54, 60, "::/0")), nil, udp, ACLIngress},
		{"denied before it is allowed", list(entry(false, 17, 53, 53, "2001:db8:0:100::4/128"), pass), nil, udp, ACLIngress},
		{"allowed before it is denied", list(entry(true, 17, 53, 53, "2001:db8:0:100::4/128"), entry(false, AllProtocols, 0, 0, "::/0")), nil, udp, ""},
		{"denied behind one of IPv4", list(pass4, entry(false, 17, 53, 53, "::/0"), pass), nil, udp, ACLIngress},
		{"echo by its type", list(entry(true, 58, 128, Any, "::/0")), nil, icmp6(a.six, b.six, 128, 0, 1), ""},
		{"another type", list(entry(true, 58, 129, Any, "::/0")), nil, icmp6(a.six, b.six, 128, 0, 1), ACLIngress},
		{"within the subnet", nil, nil, dgram6(a.six, near.six, 1, 53), ""},
	} {
		l.subnet(subnetB).ACL = l.acl(1, c.in, c.out)
		l.set6()
		to := b
		if c.name == "within the subnet" {
			to = near
		}
		a.wants6(to, c.name, c.packet, c.want)
	}
	l.subnet(subnetB).ACL = l.acl(1, list(pass), nil)
	l.set6()
	b.wants6(a, "an answer that egress does not allow", dgram6(b.six, a.six, 53, 1), ACLEgress)
	l.acl(1, list(pass), list(entry(true, 17, 1, 1, "2001:db8:0:100::4/128")))
	l.set6()
	b.wants6(a, "an answer that it does", dgram6(b.six, a.six, 53, 1), "")
}

// TestRoutes6: longest prefix, middlebox, blackhole, peering, gateway, and that
// routes of IPv4 are none of IPv6.
func TestRoutes6(t *testing.T) {
	l := newLab6(t)
	a := l.add6(subnetA, "10.0.0.4", "2001:db8:0:100::4")
	near := l.add6(subnetA, "10.0.0.5", "2001:db8:0:100::5")
	b := l.add6(subnetB, "10.0.1.4", "2001:db8:0:101::4")
	box := l.add6(subnetA, "10.0.0.6", "2001:db8:0:100::6")
	other := l.add6(subnetOther, "10.0.0.7", "2001:db8:0:200::7")
	addr, p := netip.MustParseAddr, netip.MustParsePrefix
	local := Route{CIDR: p("2001:db8:0:100::/56"), Local: true}
	route := func(cidr string, r Route) Route { r.CIDR = p(cidr); return r }
	far := dgram6(a.six, addr("2001:db9::1"), 1, 2)
	for _, c := range []struct {
		name   string
		routes []Route
		check  bool // of the middlebox
		to     *host
		packet []byte
		want   DropReason
	}{
		{"no route", []Route{local}, false, nil, far, NoRoute},
		{"the default of IPv4", []Route{local, route("0.0.0.0/0", Route{ENI: box.eni})}, false, nil, far, NoRoute},
		{"by a middlebox", []Route{local, route("::/0", Route{ENI: box.eni})}, false, box, far, ""},
		{"by one that checks", []Route{local, route("::/0", Route{ENI: box.eni})}, true, box, far, DestAddress},
		{"more specific than local", []Route{local, route("2001:db8:0:101::/64", Route{ENI: box.eni})}, false, box, dgram6(a.six, b.six, 1, 2), ""},
		{"local replaced, within the subnet", []Route{route("2001:db8:0:100::/56", Route{ENI: box.eni})}, false, near, dgram6(a.six, near.six, 1, 2), ""},
		{"local replaced", []Route{route("2001:db8:0:100::/56", Route{ENI: box.eni})}, false, box, dgram6(a.six, b.six, 1, 2), ""},
		{"the longest", []Route{local, route("::/0", Route{}), route("2001:db9::/32", Route{ENI: box.eni}), route("2001:db9::1/128", Route{})}, false, nil, far, Blackhole},
		{"to nothing", []Route{local, route("::/0", Route{})}, false, nil, far, Blackhole},
		{"to one that is not attached", []Route{local, route("::/0", Route{ENI: "eni-0000000000000dead"})}, false, nil, far, Blackhole},
		{"to the internet", []Route{local, route("::/0", Route{Internet: true})}, false, nil, far, GatewayIPv6},
		{"to a peer", []Route{local, route("2001:db8:0:200::/56", Route{Peer: 2})}, false, other, dgram6(a.six, other.six, 1, 2), ""},
		{"to a peer, where nobody is", []Route{local, route("2001:db8:0:200::/56", Route{Peer: 2})}, false, nil, dgram6(a.six, addr("2001:db8:0:200::9"), 1, 2), NoTarget},
	} {
		l.subnet(subnetA).Table = l.table(7, c.routes...)
		l.iface(box.eni).SourceDestCheck = c.check
		l.set6()
		a.wants6(c.to, c.name, c.packet, c.want)
	}
	// No IPv4 packet follows a route of IPv6.
	l.subnet(subnetA).Table = l.table(7, route("::/0", Route{ENI: box.eni}))
	l.set6()
	if reason := a.gated(box, dgram4(a.addr, addr("192.0.2.1"), 1, 2)); reason != NoRoute {
		t.Errorf("IPv4 with a default route of IPv6: %q, want %q", reason, NoRoute)
	}
	// Behind a middlebox a group is not known.
	l.subnet(subnetA).Table = tableMain
	box.groups(l.group(1, all6, all6))
	b.groups(l.group(2, []Rule{{Protocol: AllProtocols, Group: testGroup(1)}}, nil))
	a.groups(testGroup(1))
	l.iface(box.eni).SourceDestCheck = false
	l.set6()
	a.wants6(b, "directly", dgram6(a.six, b.six, 1, 2), "")
	box.wants6(b, "by the middlebox", dgram6(a.six, b.six, 3, 2), SGIngress)
}

// TestRecords6: what flow records say of IPv6.
func TestRecords6(t *testing.T) {
	l := newLab6(t)
	a := l.add6(subnetA, "10.0.0.4", "2001:db8:0:100::4", "2001:db8:0:100:1::/80")
	b := l.add6(subnetB, "10.0.1.4", "2001:db8:0:101::4")
	pod := netip.MustParseAddr("2001:db8:0:100:1::7")
	web := []Rule{{Protocol: 6, From: 80, To: 80, Peers: everywhere6}, {Protocol: 17, From: 53, To: 53, Peers: everywhere6}, {Protocol: 58, From: -1, To: -1, Peers: everywhere6}}
	b.groups(l.group(1, web, nil))
	l.set6()
	for _, f := range []byte{syn, ack, fin | ack} {
		a.wants6(b, "TCP", tcp6(pod, b.six, 4000, 80, f), "")
	}
	b.wants6(a, "TCP", tcp6(b.six, pod, 80, 4000, syn|ack), "")
	a.wants6(b, "another port", tcp6(a.six, b.six, 4001, 22, syn), SGIngress)
	b.wants6(a, "no egress", dgram6(b.six, a.six, 1, 2), SGEgress)
	a.wants6(b, "echo", icmp6(a.six, b.six, 128, 0, 7), "")
	a.wants6(b, "first fragment", extended(dgram6(a.six, b.six, 7, 53), 44, fragment(0, 0, true, 9)), "")
	a.wants6(b, "last fragment", extended(packet6(17, a.six, b.six, make([]byte, 8)), 44, fragment(0, 16, false, 9)), "")
	a.wants6(b, "no route", dgram6(a.six, netip.MustParseAddr("2001:db9::1"), 1, 2), NoRoute)
	a.run(l.objs.FromGuest, ethernet(RouterMAC, a.mac, 0x86dd, with(icmp6(linkLocal(a.mac), netip.MustParseAddr("ff02::2"), 133, 0, 0), func(p []byte) { p[7] = 255 })), 0)
	l.subnet(subnetB).ACL = l.acl(9, nil, nil)
	l.set6()
	a.wants6(b, "closed", dgram6(a.six, b.six, 7, 53), ACLIngress)
	if wrong := l.difference(); wrong != "" {
		t.Error(wrong)
	}
	want := []string{
		"a egress path 1 ACCEPT: 17 2001:db8:0:100::4:7 > 2001:db8:0:101::4:53, 3 packets 168 bytes",
		"a egress path 1 ACCEPT: 58 2001:db8:0:100::4:0 > 2001:db8:0:101::4:0, 1 packets 48 bytes",
		"a egress path 1 ACCEPT: 6 2001:db8:0:100:1::7:4000 > 2001:db8:0:101::4:80, 3 packets 180 bytes, flags 3",
		"a egress path 1 ACCEPT: 6 2001:db8:0:100::4:4001 > 2001:db8:0:101::4:22, 1 packets 60 bytes, flags 2",
		"a ingress ACCEPT: 6 2001:db8:0:101::4:80 > 2001:db8:0:100:1::7:4000, 1 packets 60 bytes, flags 18",
		"b egress path 0 REJECT by security-group: 17 2001:db8:0:101::4:1 > 2001:db8:0:100::4:2, 1 packets 52 bytes",
		"b egress path 1 ACCEPT: 6 2001:db8:0:101::4:80 > 2001:db8:0:100:1::7:4000, 1 packets 60 bytes, flags 18",
		"b ingress ACCEPT: 17 2001:db8:0:100::4:7 > 2001:db8:0:101::4:53, 2 packets 116 bytes",
		"b ingress ACCEPT: 58 2001:db8:0:100::4:0 > 2001:db8:0:101::4:0, 1 packets 48 bytes",
		"b ingress ACCEPT: 6 2001:db8:0:100:1::7:4000 > 2001:db8:0:101::4:80, 3 packets 180 bytes, flags 3",
		"b ingress REJECT by network-acl: 17 2001:db8:0:100::4:7 > 2001:db8:0:101::4:53, 1 packets 52 bytes",
		"b ingress REJECT by security-group: 6 2001:db8:0:100::4:4001 > 2001:db8:0:101::4:22, 1 packets 60 bytes, flags 2",
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, lines(l.interval(), map[vpc.ENIID]string{a.eni: "a", b.eni: "b"})); diff != "" {
		t.Errorf("records (-want +got):\n%s", diff)
	}
}

// TestSegments6: GSO frames count as what they are on the wire, and what is too
// long is answered.
func TestSegments6(t *testing.T) {
	l := newLab6(t)
	a := l.add6(subnetA, "10.0.0.4", "2001:db8:0:100::4")
	b := l.add6(subnetB, "10.0.1.4", "2001:db8:0:101::4")
	l.set6()
	segments := packet6(6, a.six, b.six, append(ports(1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 8<<4, ack), make([]byte, 18+2500)...)) // 40 + 32 + 2500 bytes
	frame := ethernet(RouterMAC, a.mac, 0x86dd, segments)
	if verdict, _ := a.run(l.objs.FromGuest, frame, 1000); verdict != redirected {
		t.Errorf("verdict %d", verdict)
	}
	if c := b.counters(); c.RxPackets != 3 || c.RxBytes != uint64(len(segments)+2*72) {
		t.Errorf("%d packets of %d bytes received, want 3 of %d", c.RxPackets, c.RxBytes, len(segments)+2*72)
	}
	// 40 bytes of IPv6 and 32 of TCP leave 8929.
	if verdict, _ := a.run(l.objs.FromGuest, frame, 8929); verdict != redirected {
		t.Errorf("segments of the MTU: verdict %d", verdict)
	}
	var out []byte
	a.counts(Oversize, func() {
		var verdict uint32
		if verdict, out = a.run(l.objs.FromGuest, frame, 8930); verdict != redirected {
			t.Errorf("segments above the MTU: verdict %d", verdict)
		}
	})
	want := packet6(58, netip.MustParseAddr("2001:db8:0:100::1"), a.six, append([]byte{2, 0, 0, 0, 0, 0, MTU >> 8, MTU & 0xff}, segments[:1232]...))
	want[7] = 64
	if answer := ethernet(a.mac, RouterMAC, 0x86dd, checked(want)); !bytes.Equal(out, answer) {
		t.Errorf("answer\n% x, want\n% x", out[:min(len(out), 80)], answer[:80])
	}
}
