package fabric

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/vpc"
)

func TestPing(t *testing.T) {
	l := newLab(t)
	a1 := l.add(subnetA, "10.0.0.4")
	a2 := l.add(subnetA, "10.0.0.5")
	b := l.add(subnetB, "10.0.1.4")
	l.set()
	for _, from := range []*host{a1, a2, b} {
		for _, to := range []*host{a1, a2, b} {
			from.reaches(to)
		}
	}
	a1.counts(NoTarget, func() { a1.reachesNot(a1.addr, netip.MustParseAddr("10.0.3.3")) })
	a1.counts(NoRoute, func() { a1.reachesNot(a1.addr, netip.MustParseAddr("192.0.2.1")) })
	a1.counts(ARPUnanswered, func() { a1.reachesNot(a1.addr, netip.MustParseAddr("10.0.0.77")) })
}

func TestOverlappingVPCs(t *testing.T) {
	l := newLab(t)
	a1 := l.add(subnetA, "10.0.0.4")
	a2 := l.add(subnetA, "10.0.0.5")
	o1 := l.add(subnetOther, "10.0.0.4")
	o2 := l.add(subnetOther, "10.0.0.5")
	alone := l.add(subnetOther, "10.0.0.9")
	// The same MACs too: they are apart by VPC as well.
	l.iface(o1.eni).MAC, l.iface(o2.eni).MAC = a1.mac, a2.mac
	l.set()
	for _, c := range []struct{ from, to, not *host }{{a1, a2, o2}, {o1, o2, a2}} {
		to, not := c.to.counters().RxPackets, c.not.counters().RxPackets
		c.from.reaches(c.to)
		if n := c.to.counters().RxPackets - to; n != 1 {
			t.Errorf("%s received %d packets, want 1", c.to.ns, n)
		}
		if n := c.not.counters().RxPackets - not; n != 0 {
			t.Errorf("%s of the other VPC received %d packets", c.not.ns, n)
		}
	}
	a1.reachesNot(a1.addr, alone.addr)
	o1.reaches(alone)
}

func TestSourceCheck(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetB, "10.0.1.4")
	l.set()
	a.ip("addr", "add", "192.168.1.1/32", "dev", "lo")
	// Linux asks for the router from the address that the packet has.
	a.counts(ARPSpoofed, func() { a.reachesNot(netip.MustParseAddr("192.168.1.1"), b.addr) })
	a.ip("neigh", "flush", "all")
	a.reaches(b)
	a.counts(SourceAddress, func() { a.reachesNot(netip.MustParseAddr("192.168.1.1"), b.addr) })
	a.ip("addr", "add", "10.0.0.99/32", "dev", "lo")
	a.counts(SourceAddress, func() { a.reachesNot(netip.MustParseAddr("10.0.0.99"), b.addr) })

	l.iface(a.eni).SourceDestCheck = false
	l.set()
	before := b.counters().RxPackets
	a.reachesNot(netip.MustParseAddr("192.168.1.1"), b.addr) // b's answer has no route
	if n := b.counters().RxPackets - before; n != 1 {
		t.Errorf("without source check, %d packets arrived, want 1", n)
	}
	l.iface(a.eni).SourceDestCheck = true
	l.set()
	a.counts(SourceAddress, func() { a.reachesNot(netip.MustParseAddr("192.168.1.1"), b.addr) })
}

// TestRouterInstance forwards through an instance without source/destination
// check, as a NAT instance or firewall does: towards it by its MAC.
func TestRouterInstance(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	router := l.add(subnetA, "10.0.0.5")
	b := l.add(subnetB, "10.0.1.4")
	l.set()
	a.ip("route", "add", "10.0.1.4/32", "via", "10.0.0.5")
	router.do(func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0) })
	router.do(func() error { return os.WriteFile("/proc/sys/net/ipv4/conf/all/send_redirects", []byte("0"), 0) })
	router.do(func() error { return os.WriteFile("/proc/sys/net/ipv4/conf/eth0/send_redirects", []byte("0"), 0) })
	router.counts(DestAddress, func() { a.reachesNot(a.addr, b.addr) })

	l.iface(router.eni).SourceDestCheck = false
	l.set()
	before := router.counters()
	if _, err := a.ping(a.addr, b.addr, 56, patience); err != nil {
		t.Errorf("ping through a router without check: %v", err)
	}
	if c := router.counters(); c.RxPackets != before.RxPackets+1 || c.TxPackets != before.TxPackets+1 {
		t.Errorf("router: %d → %d received, %d → %d sent, want one more each", before.RxPackets, c.RxPackets, before.TxPackets, c.TxPackets)
	}
}

func TestSecondaryAddresses(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4", "10.0.0.10/32", "10.0.0.32/28")
	b := l.add(subnetB, "10.0.1.4")
	neighbour := l.add(subnetA, "10.0.0.5")
	l.set()
	for _, s := range []string{"10.0.0.10", "10.0.0.32", "10.0.0.40", "10.0.0.47"} {
		addr := netip.MustParseAddr(s)
		a.ip("addr", "add", s+"/32", "dev", "lo")
		a.reachesAt(addr, b.addr)
		b.reachesAt(b.addr, addr)
		neighbour.reachesAt(neighbour.addr, addr)
	}
	// The prefix goes to another ENI.
	l.iface(a.eni).Addresses = l.iface(a.eni).Addresses[:2]
	l.iface(neighbour.eni).Addresses = append(l.iface(neighbour.eni).Addresses, netip.MustParsePrefix("10.0.0.32/28"))
	l.set()
	a.counts(SourceAddress, func() { a.reachesNot(netip.MustParseAddr("10.0.0.40"), b.addr) })
	neighbour.ip("addr", "add", "10.0.0.40/32", "dev", "lo")
	neighbour.reachesAt(netip.MustParseAddr("10.0.0.40"), b.addr)
	a.reachesAt(netip.MustParseAddr("10.0.0.10"), b.addr)
}

func TestMTU(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetB, "10.0.1.4")
	l.set()
	const headers = 28
	if _, err := a.ping(a.addr, b.addr, MTU-headers, patience); err != nil {
		t.Errorf("ping of the MTU: %v", err)
	}
	if c := b.counters(); c.RxBytes != MTU || c.RxPackets != 1 {
		t.Errorf("%d packets and %d bytes received, want one of %d", c.RxPackets, c.RxBytes, MTU)
	}
	// One byte more goes in two fragments.
	before := b.counters().RxPackets
	if _, err := a.ping(a.addr, b.addr, MTU-headers+1, patience); err != nil {
		t.Errorf("ping in fragments: %v", err)
	}
	if n := b.counters().RxPackets - before; n != 2 {
		t.Errorf("%d packets received, want 2 fragments", n)
	}
	// A guest that gives itself a larger MTU is told by the router; then it cuts.
	a.ip("link", "set", "eth0", "mtu", "20000")
	for _, more := range []int{1, 4, 5, 5000} {
		a.counts(Oversize, func() {
			if _, err := a.ping(a.addr, b.addr, MTU-headers+more, refusal); err == nil {
				t.Errorf("a packet %d bytes above the MTU was delivered", more)
			}
		})
		if _, err := a.ping(a.addr, b.addr, MTU-headers+more, patience); err != nil {
			t.Errorf("ping, once the path's MTU is known: %v", err)
		}
		a.ip("route", "flush", "cache")
	}
}

// listen makes a TCP listener in the guest.
func (h *host) listen(at netip.AddrPort) net.Listener {
	h.l.t.Helper()
	var l net.Listener
	h.do(func() (err error) {
		l, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(at))
		return err
	})
	h.l.t.Cleanup(func() { l.Close() })
	return l
}

// dial makes a TCP connection from an address and port (0: any) in the guest.
func (h *host) dial(from, to netip.AddrPort) net.Conn {
	h.l.t.Helper()
	var c net.Conn
	h.do(func() (err error) {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(from), Timeout: patience}
		c, err = d.Dial("tcp4", to.String())
		return err
	})
	h.l.t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(2 * patience)); err != nil {
		h.l.t.Fatal(err)
	}
	return c
}

// TestBigTCP sends much at once in both directions; segmentation is left to
// whoever comes last, which on these wires is nobody.
func TestBigTCP(t *testing.T) {
	const size = 32 << 20
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetB, "10.0.1.4")
	l.set()
	data := make([]byte, size)
	for i := 0; i < size; i += 8 {
		binary.LittleEndian.PutUint64(data[i:], uint64(i)*0x9e3779b97f4a7c15)
	}
	want := sha256.Sum256(data)
	exchange := func(c net.Conn) error {
		sent := make(chan error, 1)
		go func() {
			_, err := c.Write(data)
			sent <- errors.Join(err, c.(*net.TCPConn).CloseWrite())
		}()
		sum := sha256.New()
		_, err := io.Copy(sum, c)
		if err == nil && !bytes.Equal(sum.Sum(nil), want[:]) {
			err = errors.New("other bytes arrived than were sent")
		}
		return errors.Join(err, <-sent)
	}
	ln := b.listen(netip.AddrPortFrom(b.addr, 7000))
	served := make(chan error, 1)
	go func() {
		c, err := ln.Accept()
		if err == nil {
			err = errors.Join(c.SetDeadline(time.Now().Add(2*patience)), exchange(c), c.Close())
		}
		served <- err
	}()
	c := a.dial(netip.AddrPortFrom(a.addr, 0), netip.AddrPortFrom(b.addr, 7000))
	if err := exchange(c); err != nil {
		t.Errorf("client: %v", err)
	}
	if err := <-served; err != nil {
		t.Errorf("server: %v", err)
	}
	ca, cb := a.counters(), b.counters()
	if ca.TxPackets != cb.RxPackets || ca.TxBytes != cb.RxBytes || cb.TxPackets != ca.RxPackets || cb.TxBytes != ca.RxBytes {
		t.Errorf("sent and received do not match: %+v, %+v", ca, cb)
	}
	// Each byte once, in packets of at most the MTU.
	if ca.TxBytes < size || ca.TxBytes > ca.TxPackets*MTU {
		t.Errorf("%d bytes in %d packets for %d bytes of data", ca.TxBytes, ca.TxPackets, size)
	}
}

// wire opens a packet socket on the guest's eth0.
func (h *host) wire() int {
	h.l.t.Helper()
	var fd int
	h.do(func() error {
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		all := int(binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL)))
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: uint16(all), Ifindex: eth0.Index})
	})
	h.l.t.Cleanup(func() { unix.Close(fd) })
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}); err != nil {
		h.l.t.Fatal(err)
	}
	return fd
}

// TestRawFrames sends what no well-behaved stack does, on the wire.
func TestRawFrames(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	victim := l.add(subnetA, "10.0.0.5")
	l.set()
	out, in := a.wire(), victim.wire()
	mark := []byte("no such frame may arrive")
	for _, c := range []struct {
		name   string
		frame  []byte
		reason DropReason
	}{
		{"a neighbour's MAC", ethernet(RouterMAC, victim.mac, 0x0800, append(udp4(a.addr, victim.addr, 0), mark...)), SourceMAC},
		{"a neighbour's address", ethernet(victim.mac, a.mac, 0x0800, append(udp4(victim.addr, victim.addr, 0), mark...)), SourceAddress},
		{"ARP that claims the router", ethernet(broadcast, a.mac, 0x0806, append(arp4(2, a.mac, netip.MustParseAddr("10.0.0.1"), victim.addr), mark...)), ARPSpoofed},
		{"ARP of its own", ethernet(victim.mac, a.mac, 0x0806, append(arp4(1, a.mac, a.addr, a.addr), mark...)), ARPUnanswered},
		{"broadcast", ethernet(broadcast, a.mac, 0x0800, append(udp4(a.addr, netip.MustParseAddr("10.0.0.255"), 0), mark...)), Multicast},
		{"another EtherType", ethernet(victim.mac, a.mac, 0x88b5, mark), EtherType},
		{"VLAN", ethernet(victim.mac, a.mac, 0x8100, append(append([]byte{0, 1, 0x08, 0}, udp4(a.addr, victim.addr, 0)...), mark...)), EtherType},
		{"IPv6", ethernet(victim.mac, a.mac, 0x86dd, append(make([]byte, 40), mark...)), IPv6},
		{"IPv4 cut short", ethernet(victim.mac, a.mac, 0x0800, []byte{0x45, 0, 0, 19}), Malformed},
		{"ARP cut short", ethernet(broadcast, a.mac, 0x0806, []byte{0, 1, 8, 0, 6, 4, 0, 1}), Malformed},
	} {
		a.counts(c.reason, func() {
			if _, err := unix.Write(out, c.frame); err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
		})
	}
	buf := make([]byte, 1<<16)
	for {
		n, from, err := unix.Recvfrom(in, buf, 0)
		if errors.Is(err, unix.EAGAIN) {
			break // nothing for as long as the receive timeout
		}
		if err != nil {
			t.Fatal(err)
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype != unix.PACKET_OUTGOING && bytes.Contains(buf[:n], mark) {
			t.Errorf("the victim received % x", buf[:n])
		}
	}
}

// serve answers each connection with the ENI's ID and the client's address.
func serve(ln net.Listener, eni vpc.ENIID, ttl int) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		if ttl > 0 {
			raw, err := c.(*net.TCPConn).SyscallConn()
			if err == nil {
				_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, ttl) })
			}
		}
		fmt.Fprintf(c, "%s %s", eni, c.RemoteAddr())
		c.Close()
	}
}

func TestListenTCP(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4", "10.0.0.32/28")
	o := l.add(subnetOther, "10.0.0.4")
	l.set()
	imds := netip.AddrPortFrom(IMDSAddr, 80)
	api := netip.AddrPortFrom(EndpointAddr, 7424)
	for _, h := range []*host{a, o} {
		for _, at := range []netip.AddrPort{imds, api} {
			ln, err := l.ListenTCP(h.eni, at)
			if err != nil {
				t.Fatal(err)
			}
			go serve(ln, h.eni, 0)
		}
	}
	a.ip("addr", "add", "10.0.0.40/32", "dev", "lo")
	same := netip.AddrPortFrom(a.addr, 33333)
	// All at once: the same client address and port in two VPCs.
	conns := []struct {
		h    *host
		from netip.AddrPort
		net.Conn
	}{
		{a, same, a.dial(same, imds)},
		{o, same, o.dial(same, imds)},
		{a, netip.AddrPortFrom(a.addr, 33334), a.dial(netip.AddrPortFrom(a.addr, 33334), api)},
		{a, netip.MustParseAddrPort("10.0.0.40:33335"), a.dial(netip.MustParseAddrPort("10.0.0.40:33335"), imds)},
	}
	for _, c := range conns {
		got, err := io.ReadAll(c)
		if want := fmt.Sprintf("%s %s", c.h.eni, c.from); err != nil || string(got) != want {
			t.Errorf("answer %q, %v; want %q", got, err, want)
		}
	}

	for _, c := range []struct {
		eni vpc.ENIID
		at  netip.AddrPort
	}{
		{"eni-0123456789abcdef0", imds}, // not attached
		{"eni-x", imds},
		{a.eni, netip.MustParseAddrPort("10.0.0.1:80")},
		{a.eni, imds}, // taken
	} {
		if ln, err := l.ListenTCP(c.eni, c.at); err == nil {
			ln.Close()
			t.Errorf("ListenTCP(%s, %s): no error", c.eni, c.at)
		}
	}
}

// TestListenerEndsWithInterface removes an interface below its listener.
func TestListenerEndsWithInterface(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	l.set()
	imds := netip.AddrPortFrom(IMDSAddr, 80)
	ln, err := l.ListenTCP(a.eni, imds)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := ln.Accept()
		ended <- err
	}()
	full := l.cfg
	l.cfg.Interfaces = nil
	l.set()
	select {
	case err := <-ended:
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept after removal: %v", err)
		}
	case <-time.After(patience):
		t.Fatal("Accept did not return")
	}
	l.cfg = full
	l.set()
	if ln, err = l.ListenTCP(a.eni, imds); err != nil {
		t.Fatalf("listen again: %v", err)
	}
	go serve(ln, a.eni, 0)
	if _, err := io.ReadAll(a.dial(netip.AddrPortFrom(a.addr, 0), imds)); err != nil {
		t.Error(err)
	}
}

// TestServiceFrames looks at a service's answers on the guest's wire: from the
// router's MAC, to the ENI's, with the TTL that the server set.
func TestServiceFrames(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4", "10.0.0.10/32")
	l.set()
	imds := netip.AddrPortFrom(IMDSAddr, 80)
	ln, err := l.ListenTCP(a.eni, imds)
	if err != nil {
		t.Fatal(err)
	}
	go serve(ln, a.eni, 1)
	wire := a.wire()
	a.ip("addr", "add", "10.0.0.10/32", "dev", "lo")
	if _, err := io.ReadAll(a.dial(netip.MustParseAddrPort("10.0.0.10:40000"), imds)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<16)
	var frames, hopLimited int
	for {
		n, _, err := unix.Recvfrom(wire, buf, 0)
		if err != nil {
			break
		}
		f := buf[:n]
		if n < 34 || !bytes.Equal(f[12:14], []byte{8, 0}) || !bytes.Equal(f[26:30], IMDSAddr.AsSlice()) {
			continue
		}
		frames++
		if !bytes.Equal(f[:6], a.mac) || !bytes.Equal(f[6:12], RouterMAC) {
			t.Errorf("answer from %v to %v", net.HardwareAddr(f[6:12]), net.HardwareAddr(f[:6]))
		}
		if f[14+8] == 1 {
			hopLimited++
		}
	}
	if frames == 0 || hopLimited == 0 {
		t.Errorf("%d frames of the answer seen, %d with the server's TTL", frames, hopLimited)
	}
}

func TestConfigure(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	l.set()
	l.next++
	second := Interface{
		ID: "eni-0123456789abcdef0", VNI: 1, Subnet: subnetB, MAC: net.HardwareAddr{2, 0xbb, 0, 0, 0, 1}, Guest: a.ns, DeviceIndex: 1,
		Primary: netip.MustParseAddr("10.0.1.7"), Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.1.7/32")}, SourceDestCheck: true,
	}
	l.cfg.Interfaces = append(l.cfg.Interfaces, second)
	l.set()
	a.do(func() error {
		for _, want := range []struct {
			name  string
			mac   net.HardwareAddr
			up    bool
			addrs int
		}{{"eth0", a.mac, true, 1}, {"eth1", second.MAC, false, 0}} {
			i, err := net.InterfaceByName(want.name)
			if err != nil {
				return err
			}
			if !bytes.Equal(i.HardwareAddr, want.mac) || i.MTU != MTU || (i.Flags&net.FlagUp != 0) != want.up {
				t.Errorf("%s: %v, MTU %d, %v", i.Name, i.HardwareAddr, i.MTU, i.Flags)
			}
			addrs, err := i.Addrs()
			if err != nil {
				return err
			}
			var v4 []string
			for _, addr := range addrs {
				if p := addr.(*net.IPNet); p.IP.To4() != nil {
					v4 = append(v4, p.String())
				}
			}
			if len(v4) != want.addrs || want.addrs == 1 && v4[0] != "10.0.0.4/24" {
				t.Errorf("%s has %v", i.Name, v4)
			}
		}
		return nil
	})
	// What the guest does to its end is the guest's business.
	a.ip("addr", "add", "10.0.0.77/24", "dev", "eth0")
	a.ip("route", "del", "default")
	a.ip("link", "set", "eth1", "name", "ens6")
	a.ip("link", "set", "ens6", "up")
	l.set()
	l.shut()
	l.open()
	l.set()
	a.do(func() error {
		if _, err := net.InterfaceByName("ens6"); err != nil {
			t.Errorf("the guest's name for its second interface: %v", err)
		}
		routes, err := os.ReadFile("/proc/thread-self/net/route")
		if err != nil {
			return err
		}
		if bytes.Contains(routes, []byte("\t00000000\t0100000A\t")) {
			t.Errorf("the default route came back:\n%s", routes)
		}
		return nil
	})
}
