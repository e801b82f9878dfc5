package fabric

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// natGateway adds a NAT gateway in subnet A with the public addresses, and
// leads subnet B to it.
func (l *lab) natGateway(primary string, elastics ...netip.Addr) *host {
	g := l.add(subnetA, primary)
	g.ns = "ul-" + l.name + "-svc-nat-00000000000000001"
	i := l.iface(g.eni)
	i.Guest, i.SourceDestCheck, i.Groups, i.Ungated, i.MTU = g.ns, false, nil, true, NATMTU
	nat := &NAT{CIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16")}}
	for n, public := range elastics {
		private := g.addr
		for range n {
			private = private.Next()
		}
		if n > 0 {
			i.Addresses = append(i.Addresses, netip.PrefixFrom(private, 32))
		}
		nat.Addresses = append(nat.Addresses, private)
		l.elastic(public, private)
	}
	l.cfg.Guests[len(l.cfg.Guests)-1] = Guest{Netns: g.ns, NAT: nat}
	const behind = "rtb-0000000000000000d"
	l.cfg.Tables = append(l.cfg.Tables, RouteTable{ID: behind, Routes: []Route{{CIDR: netip.MustParsePrefix("10.0.0.0/16"), Local: true}, {CIDR: anywhereCIDR, ENI: g.eni}}})
	l.cfg.Subnets[1].Table = behind
	return g
}

// raw sends an IPv4 packet as it is.
func (h *host) raw(p []byte, to netip.Addr) {
	h.l.t.Helper()
	h.do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, p, 0, &unix.SockaddrInet4{Addr: to.As4()})
	})
}

func TestNATGateway(t *testing.T) {
	l := newLab(t)
	l.withInternet()
	g := l.natGateway("10.0.0.100", public(1), public(2), public(3))
	a := l.add(subnetB, "10.0.1.4")
	neighbour := l.add(subnetA, "10.0.0.5")
	l.set()
	o := l.outside()

	// A server that tells address and port.
	var c *net.UDPConn
	o.do(func() (err error) {
		c, err = net.ListenUDP("udp4", &net.UDPAddr{IP: internetAddr.AsSlice(), Port: 7})
		return err
	})
	t.Cleanup(func() { c.Close() })
	go func() {
		buf := make([]byte, 1<<16)
		for {
			_, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteToUDPAddrPort([]byte(from.String()), from)
		}
	}()
	server := netip.AddrPortFrom(internetAddr, 7)
	seen := map[netip.Addr]bool{}
	for range 40 {
		at, err := netip.ParseAddrPort(a.seenAs(a.addr, server, 10, patience))
		if err != nil {
			t.Fatal(err)
		}
		seen[at.Addr()] = true
		if at.Port() < natFirstPort {
			t.Errorf("source port %d", at.Port())
		}
	}
	// Each address in its turn: that one of three is not among forty has odds of
	// three in ten million.
	if len(seen) != 3 || !seen[public(1)] || !seen[public(2)] || !seen[public(3)] {
		t.Errorf("seen as %v, want the three of the gateway", seen)
	}
	// A source port below 1024 is replaced, too.
	a.do(func() error {
		d := net.Dialer{LocalAddr: &net.UDPAddr{IP: a.addr.AsSlice(), Port: 500}}
		c, err := d.Dial("udp4", server.String())
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		_ = c.SetReadDeadline(time.Now().Add(patience))
		buf := make([]byte, 64)
		n, err := c.Read(buf)
		if at, perr := netip.ParseAddrPort(string(buf[:n])); perr != nil || at.Port() < natFirstPort {
			err = errors.Join(err, perr, errors.New("port "+strconv.Itoa(int(at.Port()))))
		}
		return err
	})
	if _, err := a.ping(a.addr, internetAddr, 56, patience); err != nil {
		t.Errorf("ping: %v", err)
	}
	// Fragments of UDP pass, those of ICMP do not.
	if got := a.seenAs(a.addr, server, 20000, patience); got == "" {
		t.Error("no answer to a datagram in fragments")
	}
	if _, err := a.ping(a.addr, internetAddr, 20000, refusal); err == nil {
		t.Error("an echo request in fragments was answered")
	}
	// Neither another protocol, nor who is not of the VPC, nor the gateway as a
	// host: nothing of it leaves.
	before := g.counters()
	gre := with(udp4(a.addr, internetAddr, 40), func(p []byte) { p[9] = 47 })
	a.raw(gre, internetAddr)
	l.iface(neighbour.eni).SourceDestCheck = false
	l.set()
	stranger := netip.MustParseAddr("192.0.2.1")
	neighbour.ip("route", "add", internetAddr.String()+"/32", "via", g.addr.String())
	neighbour.raw(checksummed(udp4(stranger, internetAddr, 10)), internetAddr)
	a.reachesNot(a.addr, g.addr)
	if c := g.counters(); c.TxPackets != before.TxPackets || c.RxPackets < before.RxPackets+3 {
		t.Errorf("gateway: %d → %d received, %d → %d sent, want three more received, none sent", before.RxPackets, c.RxPackets, before.TxPackets, c.TxPackets)
	}
	// Nobody gets in.
	for n := byte(1); n <= 3; n++ {
		o.reachesNot(internetAddr, public(n))
	}

	// Its MTU, told by the sender's router; beyond it the internet gateway's, told
	// by the gateway's.
	a.ip("link", "set", "eth0", "mtu", "9001")
	if mtu, by, err := a.tooLong(a.addr, server, 8501); err != nil || mtu != NATMTU || by != netip.MustParseAddr("10.0.1.1") {
		t.Errorf("8501 bytes: told %d by %s, %v", mtu, by, err)
	}
	if mtu, by, err := a.tooLong(a.addr, server, 3000); err != nil || mtu != InternetMTU || by != netip.MustParseAddr("10.0.0.1") {
		t.Errorf("3000 bytes: told %d by %s, %v", mtu, by, err)
	}

	// ACLs judge it; security groups do not.
	deny := ACLEntry{Protocol: protoUDP, From: Any, To: Any, CIDR: netip.PrefixFrom(internetAddr, 32)}
	const strict vpc.NetworkACLID = "acl-0000000000000000e"
	l.cfg.ACLs = append(l.cfg.ACLs, ACL{ID: strict, Ingress: l.cfg.ACLs[0].Ingress, Egress: append([]ACLEntry{deny}, l.cfg.ACLs[0].Egress...)})
	l.cfg.Subnets[0].ACL = strict
	l.set()
	g.counts(ACLEgress, func() { a.seenAs(a.addr, server, 10, refusal) })
	l.cfg.Subnets[0].ACL = aclOpen

	// Without public addresses, as a private gateway, the internet gateway has
	// nothing for it.
	l.cfg.Publics = nil
	l.set()
	g.counts(IGWSource, func() { a.seenAs(a.addr, server, 10, refusal) })
}

// An address of a gateway has so many connections to one destination, and as
// many to another; who finds no port is dropped and counted.
func TestNATGatewayPorts(t *testing.T) {
	if natFirstPort+natConnections-1 > 65535 {
		t.Fatal("there are not so many ports")
	}
	l := newLab(t)
	l.withInternet()
	g := l.natGateway("10.0.0.100", public(1))
	const most = 10
	for i := range l.cfg.Guests {
		if l.cfg.Guests[i].NAT != nil {
			l.cfg.Guests[i].NAT.Connections = most
		}
	}
	a := l.add(subnetB, "10.0.1.4")
	l.set()
	o := l.outside()
	o.echo(internetAddr, 7)
	o.echo(internetAddr, 8)
	next := 20000 // each from a source port of its own
	answered := func(port uint16, wait time.Duration) bool {
		next++
		var c *net.UDPConn
		a.do(func() (err error) {
			c, err = net.DialUDP("udp4", &net.UDPAddr{IP: a.addr.AsSlice(), Port: next}, &net.UDPAddr{IP: internetAddr.AsSlice(), Port: int(port)})
			return err
		})
		defer c.Close()
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(wait))
		_, err := c.Read(make([]byte, 64))
		return err == nil
	}
	for n := range most {
		if !answered(7, patience) {
			t.Errorf("connection %d to one port has no answer", n+1)
		}
	}
	for range 3 {
		if answered(7, refusal) {
			t.Errorf("more than %d connections to one port", most)
		}
	}
	if got := g.counters().Drops[PortAllocation]; got != 3 {
		t.Errorf("%d connections without a port are counted, want 3", got)
	}
	if !answered(8, patience) {
		t.Error("no connection to another port")
	}
}

// Flows through a NAT gateway are tracked, whatever the rules.
func TestNATGatewayIsAlwaysTracked(t *testing.T) {
	l := newLab(t)
	l.withInternet()
	l.natGateway("10.0.0.100", public(1))
	a := l.add(subnetB, "10.0.1.4")
	l.set()
	l.outside().echo(internetAddr, 7)
	if got := a.seenAs(a.addr, netip.AddrPortFrom(internetAddr, 7), 10, patience); got != public(1).String() {
		t.Fatalf("seen as %q", got)
	}
	tracked := 0
	if err := eachFlowOf(l, func(local, remote netip.Addr, version uint64) {
		if local == a.addr && remote == internetAddr && version == 0 {
			tracked++
		}
	}); err != nil {
		t.Fatal(err)
	}
	if tracked != 1 {
		t.Errorf("%d tracked flows, want 1", tracked)
	}
}

// Peers meet by both sides' routes, groups and ACLs.
func TestPeering(t *testing.T) {
	const far, farTable = "subnet-0000000000000000d", "rtb-0000000000000000c"
	l := newLab(t)
	remote := netip.MustParsePrefix("10.9.0.0/16")
	l.cfg.Subnets = append(l.cfg.Subnets, Subnet{ID: far, VNI: 3, CIDR: netip.MustParsePrefix("10.9.0.0/24"), Table: farTable, ACL: aclOpen})
	l.cfg.Tables = append(l.cfg.Tables, RouteTable{ID: farTable, Routes: []Route{{CIDR: remote, Local: true}, {CIDR: netip.MustParsePrefix("10.0.0.0/16"), Peer: 1}}})
	l.cfg.Tables[0].Routes = append(l.cfg.Tables[0].Routes, Route{CIDR: remote, Peer: 3})
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(far, "10.9.0.4", "10.9.0.16/28")
	other := l.add(subnetOther, "10.0.0.4")
	l.set()
	b.ip("addr", "add", "10.9.0.20/32", "dev", "lo")
	a.reaches(b)
	b.reaches(a)
	a.reachesAt(a.addr, netip.MustParseAddr("10.9.0.20"))
	if _, err := a.ping(a.addr, b.addr, MTU-28, patience); err != nil {
		t.Errorf("ping of the MTU: %v", err)
	}
	a.counts(NoTarget, func() { a.reachesNot(a.addr, netip.MustParseAddr("10.9.0.99")) })
	other.counts(NoRoute, func() { other.reachesNot(other.addr, b.addr) })
	// The receiver's group names the sender's.
	const clients, servers vpc.SecurityGroupID = "sg-0000000000000000c", "sg-0000000000000000d"
	everything := l.cfg.Groups[0].Egress
	l.cfg.Groups = append(l.cfg.Groups, Group{ID: clients, Egress: everything}, Group{ID: servers, Ingress: []Rule{{Protocol: AllProtocols, Group: clients}}})
	l.iface(b.eni).Groups = []vpc.SecurityGroupID{servers}
	l.set()
	if err := l.advance(time.Hour); err != nil { // past what is tracked
		t.Fatal(err)
	}
	b.counts(SGIngress, func() { a.reachesNot(a.addr, b.addr) })
	l.iface(a.eni).Groups = []vpc.SecurityGroupID{clients}
	l.set()
	a.reaches(b)
	const closed vpc.NetworkACLID = "acl-0000000000000000e"
	l.cfg.ACLs = append(l.cfg.ACLs, ACL{ID: closed})
	for _, c := range []struct {
		at     *host
		subnet int
		reason DropReason
	}{{a, 0, ACLEgress}, {b, 3, ACLIngress}} {
		l.cfg.Subnets[c.subnet].ACL = closed
		l.set()
		c.at.counts(c.reason, func() { a.reachesNot(a.addr, b.addr) })
		l.cfg.Subnets[c.subnet].ACL = aclOpen
	}
	l.cfg.Tables[0].Routes[1].Peer = 0
	l.set()
	a.counts(Blackhole, func() { a.reachesNot(a.addr, b.addr) })
}

// eachFlowOf calls fn with every flow of the lab's interfaces.
func eachFlowOf(l *lab, fn func(local, remote netip.Addr, version uint64)) error {
	address := func(v uint32) netip.Addr {
		var b [4]byte
		binary.NativeEndian.PutUint32(b[:], v)
		return netip.AddrFrom4(b)
	}
	return eachFlow(l.objs.Flows, func(k bpfgen.FabricFlowKey, v bpfgen.FabricFlow) error {
		fn(address(k.Local), address(k.Remote), v.Version)
		return nil
	})
}

// Both ends of a connection learn from the gateway what its MTU lets them send.
func TestNATGatewayClampsMSS(t *testing.T) {
	const beyond = "subnet-0000000000000000d"
	l := newLab(t)
	l.withInternet()
	l.natGateway("10.0.0.100", public(1))
	cidr := netip.MustParsePrefix("10.0.2.0/24")
	l.cfg.Subnets = append(l.cfg.Subnets, Subnet{ID: beyond, VNI: 1, CIDR: cidr, Table: tableMain, ACL: aclOpen})
	behind := &l.cfg.Tables[len(l.cfg.Tables)-1]
	behind.Routes = append(behind.Routes, Route{CIDR: cidr, ENI: behind.Routes[1].ENI})
	a := l.add(subnetB, "10.0.1.4")
	b := l.add(beyond, "10.0.2.4")
	l.set()
	ln := b.listen(netip.AddrPortFrom(b.addr, 9000))
	dialed := a.dial(netip.AddrPortFrom(a.addr, 0), netip.AddrPortFrom(b.addr, 9000))
	accepted, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	if from := accepted.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); from != netip.MustParseAddr("10.0.0.100") {
		t.Errorf("accepted from %s, want the gateway", from)
	}
	const headers = 40 + 12 // IP, TCP, and its timestamps
	for end, c := range map[string]net.Conn{"dialed": dialed, "accepted": accepted} {
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var info *unix.TCPInfo
		if cerr := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }); cerr != nil || err != nil {
			t.Fatal(cerr, err)
		}
		if info.Snd_mss != NATMTU-headers {
			t.Errorf("%s: segments of %d bytes, want %d", end, info.Snd_mss, NATMTU-headers)
		}
	}
}
