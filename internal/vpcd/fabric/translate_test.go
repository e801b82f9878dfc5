package fabric

import (
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

	"github.com/underlay-cni/underlay/internal/nl"
)

// onesSum is the Internet checksum's sum (RFC 1071) over what it is begun with
// and p; of what carries its own checksum it is 0xffff.
func onesSum(sum uint32, p []byte) uint32 {
	for ; len(p) > 1; p = p[2:] {
		sum += uint32(binary.BigEndian.Uint16(p))
	}
	if len(p) == 1 {
		sum += uint32(p[0]) << 8
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return sum
}

// pseudo is the sum of the pseudo header that TCP and UDP count.
func pseudo(p []byte) uint32 {
	return onesSum(uint32(p[9])+uint32(len(p)-20), p[12:20])
}

// checksummed fills in the checksums of a packet without options.
func checksummed(p []byte) []byte {
	binary.BigEndian.PutUint16(p[10:], ^uint16(onesSum(0, p[:20])))
	switch p[9] {
	case protoUDP:
		binary.BigEndian.PutUint16(p[26:], ^uint16(onesSum(pseudo(p), p[20:])))
	case protoTCP:
		binary.BigEndian.PutUint16(p[36:], ^uint16(onesSum(pseudo(p), p[20:])))
	case protoICMP:
		binary.BigEndian.PutUint16(p[22:], ^uint16(onesSum(0, p[20:])))
	}
	return p
}

// verify checks all checksums of a packet, and of what an ICMP error quotes.
func verify(p []byte) error {
	if onesSum(0, p[:20]) != 0xffff {
		return errors.New("the IP header's checksum is wrong")
	}
	switch p[9] {
	case protoUDP:
		if binary.BigEndian.Uint16(p[26:]) == 0 {
			return nil
		}
		fallthrough
	case protoTCP:
		if onesSum(pseudo(p), p[20:]) != 0xffff {
			return errors.New("the checksum behind the IP header is wrong")
		}
	case protoICMP:
		if onesSum(0, p[20:]) != 0xffff {
			return errors.New("the ICMP checksum is wrong")
		}
		if p[20] == 3 {
			if err := verify(p[28:]); err != nil {
				return fmt.Errorf("quoted: %w", err)
			}
		}
	}
	return nil
}

// icmpError is an ICMP port unreachable about a packet, from whom it was for.
func icmpError(about []byte) []byte {
	p := append(make([]byte, 28), about...)
	p[0], p[8], p[9], p[20], p[21] = 0x45, 64, protoICMP, 3, 3
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	copy(p[12:], about[16:20])
	copy(p[16:], about[12:16])
	return checksummed(p)
}

// TestTranslation looks at frames bit by bit.
func TestTranslation(t *testing.T) {
	l := newLab(t)
	l.withInternet()
	a := l.add(subnetA, "10.0.0.4")
	l.elastic(public(1), a.addr)
	l.set()
	tcp := func(src, dst netip.Addr) []byte {
		return checksummed(with(udp4(src, dst, 40), func(p []byte) { p[9] = protoTCP; p[32] = 5 << 4; p[33] = 2 }))
	}
	udp := func(src, dst netip.Addr) []byte { return checksummed(udp4(src, dst, 41)) }
	bare := func(src, dst netip.Addr) []byte {
		return with(udp(src, dst), func(p []byte) { p[26], p[27] = 0, 0 }) // no checksum
	}
	for name, make := range map[string]func(src, dst netip.Addr) []byte{
		"TCP": tcp, "UDP": udp, "UDP without checksum": bare,
		"about UDP": func(src, dst netip.Addr) []byte { return icmpError(udp(dst, src)) },
		"about TCP": func(src, dst netip.Addr) []byte { return icmpError(tcp(dst, src)) },
	} {
		t.Run(name, func(t *testing.T) {
			verdict, out := a.run(l.objs.FromGuest, ethernet(RouterMAC, a.mac, 0x0800, make(a.addr, internetAddr)), 0)
			if want := ethernet(internetMAC, RouterMAC, 0x0800, make(public(1), internetAddr)); verdict != redirected || string(out) != string(want) {
				t.Errorf("out: verdict %d\n% x, want\n% x (%v)", verdict, out, want, verify(out[14:]))
			}
			verdict, out = a.run(l.objs.FromInternet, ethernet(RouterMAC, internetMAC, 0x0800, make(internetAddr, public(1))), 0)
			if want := ethernet(a.mac, RouterMAC, 0x0800, make(internetAddr, a.addr)); verdict != redirected || string(out) != string(want) {
				t.Errorf("in: verdict %d\n% x, want\n% x (%v)", verdict, out, want, verify(out[14:]))
			}
		})
	}
	if _, out := a.run(l.objs.FromInternet, ethernet(RouterMAC, internetMAC, 0x0800, udp(netip.MustParseAddr("10.9.9.9"), public(1))), 0); out[14+16] == 10 {
		t.Error("a source of RFC 1918 came in")
	}
}

// tooLong sends a datagram that must not be fragmented, and returns what is told
// of the path: the MTU, and by whom.
func (h *host) tooLong(from netip.Addr, to netip.AddrPort, size int) (mtu int, by netip.Addr, err error) {
	err = nl.Do(NetnsPath(h.ns), func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, o := range []struct{ name, value int }{{unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE}, {unix.IP_RECVERR, 1}} {
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, o.name, o.value); err != nil {
				return err
			}
		}
		if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: from.As4()}); err != nil {
			return err
		}
		if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}); err != nil {
			return err
		}
		if _, err := unix.Write(fd, make([]byte, size-28)); err != nil {
			return err
		}
		oob := make([]byte, 512)
		p := []unix.PollFd{{Fd: int32(fd)}}
		if _, err := unix.Poll(p, int(refusal/time.Millisecond)); err != nil {
			return err
		}
		_, n, _, _, err := unix.Recvmsg(fd, make([]byte, 1<<16), oob, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if err != nil {
			return err
		}
		all, err := unix.ParseSocketControlMessage(oob[:n])
		if err != nil || len(all) == 0 {
			return errors.Join(err, errors.New("no control message"))
		}
		// struct sock_extended_err of linux/errqueue.h, and the offender's address.
		e := all[0].Data
		if errno := binary.NativeEndian.Uint32(e); unix.Errno(errno) != unix.EMSGSIZE {
			return unix.Errno(errno)
		}
		mtu = int(binary.NativeEndian.Uint32(e[8:]))
		by = netip.AddrFrom4([4]byte(e[16+4 : 16+8]))
		return nil
	})
	return mtu, by, err
}

func TestPathMTU(t *testing.T) {
	l := newLab(t)
	l.withInternet()
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetB, "10.0.1.4")
	l.elastic(public(1), a.addr)
	l.elastic(public(2), b.addr)
	// No group lets ICMP in: the error belongs to the flow.
	l.cfg.Groups[0].Ingress = []Rule{{Protocol: protoUDP, From: Any, To: Any, Peers: []netip.Prefix{anywhereCIDR}}, {Protocol: protoTCP, From: Any, To: Any, Peers: []netip.Prefix{anywhereCIDR}}}
	l.set()
	a.ip("link", "set", "eth0", "mtu", "12000")
	router := netip.MustParseAddr("10.0.0.1")
	for _, c := range []struct {
		to   netip.Addr
		size int
		want int
	}{{internetAddr, 1501, InternetMTU}, {internetAddr, 9001, InternetMTU}, {public(2), 3000, InternetMTU}, {b.addr, 9002, MTU}, {b.addr, 11999, MTU}} {
		a.counts(Oversize, func() {
			if mtu, by, err := a.tooLong(a.addr, netip.AddrPortFrom(c.to, 9), c.size); err != nil || mtu != c.want || by != router {
				t.Errorf("%d bytes to %s: told %d by %s, %v, want %d by %s", c.size, c.to, mtu, by, err, c.want, router)
			}
		})
	}
	for to, size := range map[netip.Addr]int{internetAddr: 1500, b.addr: 9001} {
		if mtu, _, err := a.tooLong(a.addr, netip.AddrPortFrom(to, 9), size); !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%d bytes to %s: told %d, %v, want nothing", size, to, mtu, err)
		}
	}
	a.ip("route", "flush", "cache")
	// What may be cut is: by the guest's own MTU of 12000 it is one packet.
	l.outside().echo(internetAddr, 7)
	b.echo(b.addr, 7)
	a.do(func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_no_pmtu_disc", []byte("1"), 0) })
	for to, want := range map[netip.Addr]netip.Addr{internetAddr: public(1), b.addr: a.addr, public(2): public(1)} {
		if got := a.seenAs(a.addr, netip.AddrPortFrom(to, 7), 11000, patience); got != want.String() {
			t.Errorf("a long datagram to %s came from %q, want %s", to, got, want)
		}
	}
	a.do(func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_no_pmtu_disc", []byte("0"), 0) })

	// A stream in both directions.
	o := l.outside()
	ln := o.listen(netip.AddrPortFrom(internetAddr, 9000))
	const size = 4 << 20
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = io.Copy(c, c)
	}()
	c := a.dial(netip.AddrPortFrom(a.addr, 0), netip.AddrPortFrom(internetAddr, 9000))
	go func() {
		_, _ = c.Write(make([]byte, size))
		_ = c.(*net.TCPConn).CloseWrite()
	}()
	if n, err := io.Copy(io.Discard, c); n != size || err != nil {
		t.Errorf("%d bytes of %d came back, %v", n, size, err)
	}
}

// What a closed port answers is an error that quotes the packet: it must name
// the addresses that its receiver knows.
func TestErrorsThroughTheGateway(t *testing.T) {
	l := newLab(t)
	l.withInternet()
	a := l.add(subnetA, "10.0.0.4")
	l.elastic(public(1), a.addr)
	l.set()
	refusedBy := func(h *host, from netip.Addr, to netip.Addr) {
		t.Helper()
		var c *net.UDPConn
		h.do(func() (err error) {
			c, err = net.DialUDP("udp4", &net.UDPAddr{IP: from.AsSlice()}, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 999)))
			return err
		})
		defer c.Close()
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(patience))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("a closed port of %s: %v, want %v", to, err, unix.ECONNREFUSED)
		}
	}
	refusedBy(a, a.addr, internetAddr)
	refusedBy(l.outside(), internetAddr, public(1))
}

// The gateway's own route table leads what comes in through a middlebox.
func TestEdgeAssociatedTable(t *testing.T) {
	l := newLab(t)
	l.withInternet()
	box := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetB, "10.0.1.4")
	l.iface(box.eni).SourceDestCheck = false
	const edge, behind = "rtb-0000000000000000e", "rtb-0000000000000000d"
	local := Route{CIDR: netip.MustParsePrefix("10.0.0.0/16"), Local: true}
	l.cfg.Tables = append(l.cfg.Tables,
		RouteTable{ID: edge, Routes: []Route{local, {CIDR: netip.MustParsePrefix("10.0.1.0/24"), ENI: box.eni}}},
		RouteTable{ID: behind, Routes: []Route{local, {CIDR: anywhereCIDR, ENI: box.eni}}})
	l.cfg.Subnets[1].Table = behind
	l.cfg.Publics = []Public{{Addr: public(1), VNI: 1, Private: b.addr, Table: edge}}
	l.set()
	for file, v := range map[string]string{"ip_forward": "1", "conf/all/send_redirects": "0", "conf/eth0/send_redirects": "0"} {
		box.do(func() error { return os.WriteFile("/proc/sys/net/ipv4/"+file, []byte(v), 0) })
	}
	before := box.counters()
	ttl, err := l.outside().ping(internetAddr, public(1), 56, patience)
	if err != nil || ttl != 63 {
		t.Errorf("through the middlebox: TTL %d, %v, want 63", ttl, err)
	}
	if c := box.counters(); c.RxPackets != before.RxPackets+2 || c.TxPackets != before.TxPackets+2 {
		t.Errorf("middlebox: %d → %d received, %d → %d sent, want two more each", before.RxPackets, c.RxPackets, before.TxPackets, c.TxPackets)
	}
	// Its target gone, what follows the route is dropped.
	l.cfg.Tables[2].Routes[1].ENI = ""
	l.set()
	l.outside().reachesNot(internetAddr, public(1))
}
