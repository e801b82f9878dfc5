package fabric

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// IPv4 packets for BPF_PROG_TEST_RUN. Checksums are left out: nothing on the
// way reads them.

func packet4(proto byte, src, dst netip.Addr, payload []byte) []byte {
	p := make([]byte, 20, 20+len(payload))
	p[0], p[8], p[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(p[2:], uint16(20+len(payload)))
	copy(p[12:], src.AsSlice())
	copy(p[16:], dst.AsSlice())
	return append(p, payload...)
}

func ports(from, to uint16, rest ...byte) []byte {
	p := binary.BigEndian.AppendUint16(nil, from)
	return append(binary.BigEndian.AppendUint16(p, to), rest...)
}

const (
	fin = 1
	syn = 2
	rst = 4
	ack = 16
)

func tcp4(src, dst netip.Addr, from, to uint16, flags byte) []byte {
	return packet4(6, src, dst, ports(from, to, 0, 0, 0, 0, 0, 0, 0, 0, 5<<4, flags, 0, 0, 0, 0, 0, 0))
}

func dgram4(src, dst netip.Addr, from, to uint16) []byte {
	return packet4(17, src, dst, ports(from, to, 0, 12, 0, 0, 'd', 'a', 't', 'a'))
}

func icmp4(src, dst netip.Addr, kind, code byte, id uint16, data ...byte) []byte {
	return packet4(1, src, dst, append(append([]byte{kind, code, 0, 0}, ports(id, 1)...), data...))
}

// gated sends a packet through the router by BPF_PROG_TEST_RUN. It returns the
// reason for which it was dropped, "" if it was delivered to the ENI of to.
func (h *host) gated(to *host, packet []byte) DropReason {
	h.l.t.Helper()
	return h.gatedBy(to, RouterMAC, packet)
}

func (h *host) gatedBy(to *host, mac net.HardwareAddr, packet []byte) DropReason {
	h.l.t.Helper()
	before, sent := to.counters(), h.counters()
	verdict, _ := h.run(h.l.objs.FromGuest, ethernet(mac, h.mac, 0x0800, packet), 0)
	after, sentAfter := to.counters(), h.counters()
	if verdict == redirected && after.RxPackets > before.RxPackets {
		return ""
	}
	if verdict != dropped {
		h.l.t.Fatalf("verdict %d", verdict)
	}
	for reason, n := range after.Drops {
		if n > before.Drops[reason] && reason == SGIngress {
			return reason
		}
	}
	for reason, n := range sentAfter.Drops {
		if n > sent.Drops[reason] && reason != IPv6 {
			return reason
		}
	}
	for reason, n := range after.Drops {
		if n > before.Drops[reason] && reason != IPv6 {
			return reason
		}
	}
	h.l.t.Fatal("dropped, but not counted")
	return ""
}

// group sets the rules of a group in the Config, not yet in the fabric.
func (l *lab) group(n int, in, out []Rule) vpc.SecurityGroupID {
	g := Group{ID: testGroup(n), Ingress: in, Egress: out}
	for i := range l.cfg.Groups {
		if l.cfg.Groups[i].ID == g.ID {
			l.cfg.Groups[i] = g
			return g.ID
		}
	}
	l.cfg.Groups = append(l.cfg.Groups, g)
	return g.ID
}

func (h *host) groups(ids ...vpc.SecurityGroupID) { h.l.iface(h.eni).Groups = ids }

// forgetFlows empties the map of flows.
func (l *lab) forgetFlows() {
	l.t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.purgeFlows(nil); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) flowCount() (n int) {
	l.t.Helper()
	if err := eachFlow(l.objs.Flows, func(bpfgen.FabricFlowKey, bpfgen.FabricFlow) error { n++; return nil }); err != nil {
		l.t.Fatal(err)
	}
	return n
}

func (l *lab) after(d time.Duration) {
	l.t.Helper()
	if err := l.advance(d); err != nil {
		l.t.Fatal(err)
	}
}

var everywhere = prefixes("0.0.0.0/0")

// all is a rule for everything. For the whole of IPv4 in two halves it does the
// same, but flows are tracked.
var (
	all        = []Rule{{Protocol: AllProtocols, Peers: everywhere}}
	allTracked = []Rule{{Protocol: AllProtocols, Peers: prefixes("0.0.0.0/1", "128.0.0.0/1")}}
)

func TestGroupRules(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4", "10.0.0.10/32", "10.0.0.32/28")
	b := l.add(subnetA, "10.0.0.5", "10.0.0.20/32", "10.0.0.64/28")
	far := l.add(subnetB, "10.0.1.5")
	addr := netip.MustParseAddr
	one := func(protocol, from, to int, peers ...string) []Rule {
		return []Rule{{Protocol: protocol, From: from, To: to, Peers: prefixes(peers...)}}
	}
	by := func(protocol, from, to int, group vpc.SecurityGroupID) []Rule {
		return []Rule{{Protocol: protocol, From: from, To: to, Group: group}}
	}
	mine, theirs := testGroup(1), testGroup(2)
	for _, c := range []struct {
		name    string
		out, in []Rule // of the sender's group and of the receiver's
		packet  []byte
		to      *host // b
		by      net.HardwareAddr
		want    DropReason
	}{
		{name: "no rules at all", packet: tcp4(a.addr, b.addr, 1, 80, syn), want: SGEgress},
		{name: "egress alone", out: all, packet: tcp4(a.addr, b.addr, 1, 80, syn), want: SGIngress},
		{name: "ingress alone", in: all, packet: tcp4(a.addr, b.addr, 1, 80, syn), want: SGEgress},
		{name: "both", out: all, in: all, packet: tcp4(a.addr, b.addr, 1, 80, syn)},
		{name: "to a neighbour's MAC, ingress lacks", out: all, packet: tcp4(a.addr, b.addr, 1, 80, syn), by: b.mac, want: SGIngress},
		{name: "to a neighbour's MAC, egress lacks", in: all, packet: tcp4(a.addr, b.addr, 1, 80, syn), by: b.mac, want: SGEgress},
		{name: "to a neighbour's MAC", out: all, in: all, packet: tcp4(a.addr, b.addr, 1, 80, syn), by: b.mac},
		{name: "across subnets, ingress lacks", out: all, packet: tcp4(a.addr, far.addr, 1, 80, syn), to: far, want: SGIngress},
		{name: "across subnets", out: all, in: all, packet: tcp4(a.addr, far.addr, 1, 80, syn), to: far},
		{name: "to itself, egress lacks", in: all, packet: tcp4(a.addr, addr("10.0.0.10"), 1, 80, syn), to: a, want: SGEgress},

		{name: "TCP, the port", out: all, in: one(6, 80, 80, "0.0.0.0/0"), packet: tcp4(a.addr, b.addr, 1, 80, syn)},
		{name: "TCP, the port below", out: all, in: one(6, 80, 80, "0.0.0.0/0"), packet: tcp4(a.addr, b.addr, 80, 79, syn), want: SGIngress},
		{name: "TCP, the port above", out: all, in: one(6, 80, 80, "0.0.0.0/0"), packet: tcp4(a.addr, b.addr, 80, 81, syn), want: SGIngress},
		{name: "TCP, first of a range", out: all, in: one(6, 1000, 2000, "0.0.0.0/0"), packet: tcp4(a.addr, b.addr, 1, 1000, syn)},
		{name: "TCP, last of a range", out: all, in: one(6, 1000, 2000, "0.0.0.0/0"), packet: tcp4(a.addr, b.addr, 1, 2000, syn)},
		{name: "TCP, beyond a range", out: all, in: one(6, 1000, 2000, "0.0.0.0/0"), packet: tcp4(a.addr, b.addr, 1, 2001, syn), want: SGIngress},
		{name: "TCP, all ports", out: all, in: one(6, 0, 65535, "0.0.0.0/0"), packet: tcp4(a.addr, b.addr, 1, 65535, syn)},
		{name: "TCP, port 0", out: all, in: one(6, 0, 0, "0.0.0.0/0"), packet: tcp4(a.addr, b.addr, 1, 0, syn)},
		{name: "UDP where TCP is allowed", out: all, in: one(6, 80, 80, "0.0.0.0/0"), packet: dgram4(a.addr, b.addr, 1, 80), want: SGIngress},
		{name: "UDP", out: all, in: one(17, 80, 80, "0.0.0.0/0"), packet: dgram4(a.addr, b.addr, 1, 80)},
		{name: "egress by destination port", out: one(17, 80, 80, "0.0.0.0/0"), in: all, packet: dgram4(a.addr, b.addr, 1, 80)},
		{name: "egress to another port", out: one(17, 80, 80, "0.0.0.0/0"), in: all, packet: dgram4(a.addr, b.addr, 80, 1), want: SGEgress},
		{name: "ICMP, all", out: all, in: one(1, Any, Any, "0.0.0.0/0"), packet: icmp4(a.addr, b.addr, 8, 0, 7)},
		{name: "ICMP, the type", out: all, in: one(1, 8, Any, "0.0.0.0/0"), packet: icmp4(a.addr, b.addr, 8, 3, 7)},
		{name: "ICMP, type 0 is no wildcard", out: all, in: one(1, 0, Any, "0.0.0.0/0"), packet: icmp4(a.addr, b.addr, 8, 0, 7), want: SGIngress},
		{name: "ICMP, type and code", out: all, in: one(1, 3, 4, "0.0.0.0/0"), packet: icmp4(a.addr, b.addr, 3, 4, 0)},
		{name: "ICMP, another code", out: all, in: one(1, 3, 4, "0.0.0.0/0"), packet: icmp4(a.addr, b.addr, 3, 3, 0), want: SGIngress},
		{name: "ICMP where TCP is allowed", out: all, in: one(6, 0, 65535, "0.0.0.0/0"), packet: icmp4(a.addr, b.addr, 8, 0, 7), want: SGIngress},
		{name: "GRE", out: all, in: one(47, 0, 0, "0.0.0.0/0"), packet: packet4(47, a.addr, b.addr, make([]byte, 8))},
		{name: "GRE, any ports in the rule", out: all, in: one(47, 5, 6, "0.0.0.0/0"), packet: packet4(47, a.addr, b.addr, make([]byte, 8))},
		{name: "ESP where GRE is allowed", out: all, in: one(47, 0, 0, "0.0.0.0/0"), packet: packet4(50, a.addr, b.addr, make([]byte, 8)), want: SGIngress},
		{name: "protocol 0", out: all, in: one(0, 0, 0, "0.0.0.0/0"), packet: packet4(0, a.addr, b.addr, make([]byte, 8))},
		{name: "protocol 6 is not 0", out: all, in: one(0, 0, 0, "0.0.0.0/0"), packet: tcp4(a.addr, b.addr, 1, 80, syn), want: SGIngress},
		{name: "ICMPv6 in IPv4", out: all, in: one(1, Any, Any, "0.0.0.0/0"), packet: packet4(58, a.addr, b.addr, make([]byte, 8)), want: SGIngress},

		{name: "from the only address", out: all, in: one(6, 80, 80, "10.0.0.4/32"), packet: tcp4(a.addr, b.addr, 1, 80, syn)},
		{name: "from another than the only address", out: all, in: one(6, 80, 80, "10.0.0.4/32"), packet: tcp4(addr("10.0.0.10"), b.addr, 1, 80, syn), want: SGIngress},
		{name: "from the last of a block", out: all, in: one(6, 80, 80, "10.0.0.32/28"), packet: tcp4(addr("10.0.0.47"), b.addr, 1, 80, syn)},
		{name: "from beyond a block", out: all, in: one(6, 80, 80, "10.0.0.32/29"), packet: tcp4(addr("10.0.0.40"), b.addr, 1, 80, syn), want: SGIngress},
		{name: "to a block", out: one(6, 80, 80, "10.0.0.64/28"), in: all, packet: tcp4(a.addr, addr("10.0.0.70"), 1, 80, syn)},
		{name: "to beyond a block", out: one(6, 80, 80, "10.0.0.64/28"), in: all, packet: tcp4(a.addr, b.addr, 1, 80, syn), want: SGEgress},
		{name: "from a block of a list", out: all, in: one(6, 80, 80, "192.168.0.0/16", "2001:db8::/32", "10.0.0.0/24"), packet: tcp4(a.addr, b.addr, 1, 80, syn)},
		{name: "from no block of a list", out: all, in: one(6, 80, 80, "192.168.0.0/16", "10.0.1.0/24"), packet: tcp4(a.addr, b.addr, 1, 80, syn), want: SGIngress},
		{name: "from no block of an empty list", out: all, in: one(6, 80, 80), packet: tcp4(a.addr, b.addr, 1, 80, syn), want: SGIngress},
		{name: "from all of IPv6", out: all, in: one(AllProtocols, Any, Any, "::/0"), packet: tcp4(a.addr, b.addr, 1, 80, syn), want: SGIngress},

		{name: "from the group, primary address", out: all, in: by(6, 80, 80, mine), packet: tcp4(a.addr, b.addr, 1, 80, syn)},
		{name: "from the group, secondary address", out: all, in: by(6, 80, 80, mine), packet: tcp4(addr("10.0.0.10"), b.addr, 1, 80, syn)},
		{name: "from the group, address of a prefix", out: all, in: by(6, 80, 80, mine), packet: tcp4(addr("10.0.0.47"), b.addr, 1, 80, syn)},
		{name: "from the group, another port", out: all, in: by(6, 80, 80, mine), packet: tcp4(a.addr, b.addr, 1, 81, syn), want: SGIngress},
		{name: "from the group of the receiver only", out: all, in: by(6, 80, 80, theirs), packet: tcp4(a.addr, b.addr, 1, 80, syn), want: SGIngress},
		{name: "from a group that nobody has", out: all, in: by(AllProtocols, Any, Any, testGroup(9)), packet: tcp4(a.addr, b.addr, 1, 80, syn), want: SGIngress},
		{name: "to the group, primary address", out: by(6, 80, 80, theirs), in: all, packet: tcp4(a.addr, b.addr, 1, 80, syn)},
		{name: "to the group, secondary address", out: by(6, 80, 80, theirs), in: all, packet: tcp4(a.addr, addr("10.0.0.20"), 1, 80, syn)},
		{name: "to the group, address of a prefix", out: by(6, 80, 80, theirs), in: all, packet: tcp4(a.addr, addr("10.0.0.79"), 1, 80, syn)},
		{name: "to the group of the sender only", out: by(6, 80, 80, mine), in: all, packet: tcp4(a.addr, b.addr, 1, 80, syn), want: SGEgress},
		{name: "within the group, to itself", out: by(6, 80, 80, mine), in: all, packet: tcp4(a.addr, addr("10.0.0.10"), 1, 80, syn), to: a, want: SGIngress},
	} {
		t.Run(c.name, func(t *testing.T) {
			l.t = t
			a.groups(l.group(1, nil, c.out))
			b.groups(l.group(2, c.in, nil))
			far.groups(theirs)
			l.set()
			l.forgetFlows()
			to, mac := c.to, c.by
			if to == nil {
				to = b
			}
			if mac == nil {
				mac = RouterMAC
			}
			if got := a.gatedBy(to, mac, c.packet); got != c.want {
				t.Errorf("dropped for %q, want %q", got, c.want)
			}
		})
	}
	l.t = t
}

// TestGroupsAddUp gives interfaces several groups: each may allow.
func TestGroupsAddUp(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetB, "10.0.1.4")
	out := l.group(1, nil, all)
	web := l.group(2, []Rule{{Protocol: 6, From: 80, To: 80, Group: out}}, nil)
	dns := l.group(3, []Rule{{Protocol: 17, From: 53, To: 53, Group: testGroup(4)}}, nil)
	none := l.group(4, nil, nil)
	a.groups(none, out)
	b.groups(web, none, dns)
	l.set()
	for _, c := range []struct {
		packet []byte
		want   DropReason
	}{
		{tcp4(a.addr, b.addr, 1, 80, syn), ""},
		{dgram4(a.addr, b.addr, 1, 53), ""},
		{tcp4(a.addr, b.addr, 1, 53, syn), SGIngress},
	} {
		if got := a.gated(b, c.packet); got != c.want {
			t.Errorf("% x: %q, want %q", c.packet, got, c.want)
		}
	}
	b.groups(none, dns)
	l.set()
	if got := a.gated(b, tcp4(a.addr, b.addr, 2, 80, syn)); got != SGIngress {
		t.Errorf("without the group: %q", got)
	}
}

// TestOneInstanceTwoInterfaces: what goes from one interface of an instance to
// another passes both gates.
func TestOneInstanceTwoInterfaces(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetA, "10.0.0.5")
	i := l.iface(b.eni)
	i.Guest, i.DeviceIndex, i.Configure = a.ns, 1, false
	a.groups(l.group(1, nil, all))
	b.groups(l.group(2, nil, all))
	l.set()
	if got := a.gated(b, dgram4(a.addr, b.addr, 1, 2)); got != SGIngress {
		t.Errorf("dropped for %q", got)
	}
	l.group(2, []Rule{{Protocol: 17, From: 2, To: 2, Group: testGroup(1)}}, nil)
	l.set()
	if got := a.gated(b, dgram4(a.addr, b.addr, 1, 2)); got != "" {
		t.Errorf("dropped for %q", got)
	}
}

// TestGroupsThroughMiddlebox: a reference to a group means the ENI at the other
// end of the wire; what an instance forwards for another is matched by CIDR
// block alone.
func TestGroupsThroughMiddlebox(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	m := l.add(subnetA, "10.0.0.5")
	b := l.add(subnetA, "10.0.0.6")
	l.iface(m.eni).SourceDestCheck = false
	clients := l.group(1, nil, all)
	servers := l.group(2, []Rule{{Protocol: 6, From: 80, To: 80, Group: clients}}, nil)
	a.groups(clients)
	m.groups(l.group(3, all, all))
	b.groups(servers)
	l.set()
	request := tcp4(a.addr, b.addr, 1, 80, syn)
	if got := a.gatedBy(m, m.mac, request); got != "" {
		t.Errorf("to the middlebox: %q", got)
	}
	if got := m.gated(b, request); got != SGIngress {
		t.Errorf("from the middlebox, by group: %q", got)
	}
	// The middlebox having the group itself does not help: the address is not its own.
	m.groups(testGroup(3), clients)
	l.set()
	if got := m.gated(b, request); got != SGIngress {
		t.Errorf("from a middlebox of the group: %q", got)
	}
	l.group(2, []Rule{{Protocol: 6, From: 80, To: 80, Peers: prefixes("10.0.0.4/32")}}, nil)
	l.set()
	if got := m.gated(b, request); got != "" {
		t.Errorf("from the middlebox, by address: %q", got)
	}
	// Where a packet goes is known, whoever receives it first.
	l.group(1, nil, []Rule{{Protocol: 6, From: 80, To: 80, Group: servers}})
	l.set()
	l.forgetFlows()
	if got := a.gatedBy(m, m.mac, request); got != "" {
		t.Errorf("to the middlebox, by the server's group: %q", got)
	}
	if got := a.gatedBy(m, m.mac, tcp4(a.addr, netip.MustParseAddr("10.0.9.9"), 1, 80, syn)); got != SGEgress {
		t.Errorf("to the middlebox, for nobody: %q", got)
	}
	l.forgetFlows()
	if got := a.gated(b, request); got != "" && got != SGIngress {
		t.Errorf("to the server itself: %q", got)
	}
	l.group(2, []Rule{{Protocol: 6, From: 80, To: 80, Group: clients}}, nil)
	l.set()
	if got := a.gated(b, request); got != "" {
		t.Errorf("to the server itself: %q", got)
	}
}

// TestGroupsOfTwoVPCs: the same number of a group means nothing across VPCs, as
// nothing passes between them at all; equal addresses have flows of their own.
func TestGroupsOfTwoVPCs(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetA, "10.0.0.5")
	otherA := l.add(subnetOther, "10.0.0.4")
	otherB := l.add(subnetOther, "10.0.0.5")
	for _, h := range []*host{a, b} {
		h.groups(l.group(1, allTracked, allTracked))
	}
	otherA.groups(l.group(2, nil, nil))
	otherB.groups(l.group(2, nil, nil))
	l.set()
	if got := a.gated(b, dgram4(a.addr, b.addr, 1, 2)); got != "" {
		t.Errorf("dropped for %q", got)
	}
	if got := otherA.gated(otherB, dgram4(a.addr, b.addr, 1, 2)); got != SGEgress {
		t.Errorf("in the other VPC: %q", got)
	}
	if got := otherB.gated(otherA, dgram4(b.addr, a.addr, 2, 1)); got != SGEgress {
		t.Errorf("back in the other VPC: %q", got)
	}
}
