package fabric

import (
	"io"
	"net"
	"net/netip"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// BenchmarkTCP sends one TCP stream between two namespaces: over the fabric,
// within a subnet and between two, and over a bare veth pair to compare with.
func BenchmarkTCP(b *testing.B) {
	for _, c := range []struct{ name, subnet, addr string }{
		{"veth", "", "172.31.0.2"},
		{"fabric/subnet", string(subnetA), "10.0.0.5"},
		{"fabric/subnets", string(subnetB), "10.0.1.5"},
	} {
		b.Run(c.name, func(b *testing.B) {
			from, to := pairOf(b, c.subnet, c.addr)
			stream(b, from, to, 64<<10)
		})
	}
}

// BenchmarkRoundTrip sends one byte there and back.
func BenchmarkRoundTrip(b *testing.B) {
	for _, c := range []struct{ name, subnet, addr string }{
		{"veth", "", "172.31.0.2"},
		{"fabric/subnets", "subnet-0000000000000000b", "10.0.1.5"},
	} {
		b.Run(c.name, func(b *testing.B) {
			from, to := pairOf(b, c.subnet, c.addr)
			at := netip.AddrPortFrom(to.addr, 7000)
			ln := to.listen(at)
			go func() {
				c, err := ln.Accept()
				if err == nil {
					_, _ = io.Copy(onlyWriter{c}, onlyReader{c})
				}
			}()
			conn := from.dial(netip.AddrPortFrom(from.addr, 0), at)
			buf := make([]byte, 1)
			for b.Loop() {
				if _, err := conn.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(conn, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// onlyReader and onlyWriter keep io.Copy from splicing.
type onlyReader struct{ io.Reader }
type onlyWriter struct{ io.Writer }

// pairOf makes two guests; without a subnet they are joined by a veth pair.
func pairOf(b *testing.B, subnet, addr string) (from, to *host) {
	l := newLab(b)
	from = l.add(subnetA, "10.0.0.4")
	if subnet != "" {
		for _, s := range l.cfg.Subnets {
			if string(s.ID) == subnet {
				to = l.add(s.ID, addr)
			}
		}
		l.set()
	} else {
		to = l.add(subnetA, "10.0.0.5")
		l.cfg.Interfaces = nil
		l.set()
		from.addr, to.addr = netip.MustParseAddr("172.31.0.1"), netip.MustParseAddr("172.31.0.2")
		if out, err := exec.Command("ip", "-n", from.ns, "link", "add", "eth0", "mtu", "9001", "type", "veth", "peer", "name", "eth0", "mtu", "9001", "netns", to.ns).CombinedOutput(); err != nil {
			b.Fatalf("make veth: %s", out)
		}
		for _, h := range []*host{from, to} {
			h.ip("addr", "add", h.addr.String()+"/24", "dev", "eth0")
			h.ip("link", "set", "eth0", "up")
		}
	}
	return from, to
}

// cubic keeps bbr's pacing from hiding what the wires cost. Per socket: in a
// namespace of its own, the sysctl refuses what is not already allowed to all.
func cubic(b *testing.B, c net.Conn) {
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		b.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		if err := unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "cubic"); err != nil {
			b.Errorf("choose cubic: %v", err)
		}
	}); err != nil {
		b.Fatal(err)
	}
}

func stream(b *testing.B, from, to *host, chunk int) {
	at := netip.AddrPortFrom(to.addr, 7000)
	ln := to.listen(at)
	received := make(chan int64, 1)
	go func() {
		var n int64
		if c, err := ln.Accept(); err == nil {
			n, _ = io.CopyBuffer(onlyWriter{io.Discard}, onlyReader{c}, make([]byte, 256<<10))
		}
		received <- n
	}()
	c := from.dial(netip.AddrPortFrom(from.addr, 0), at)
	cubic(b, c)
	buf := make([]byte, chunk)
	b.SetBytes(int64(chunk))
	var sent int64
	for b.Loop() {
		n, err := c.Write(buf)
		if err != nil {
			b.Fatal(err)
		}
		sent += int64(n)
	}
	_ = c.(*net.TCPConn).CloseWrite()
	if n := <-received; n != sent {
		b.Errorf("%d of %d bytes arrived", n, sent)
	}
}

// BenchmarkSet changes one interface of many, and nothing.
func BenchmarkSet(b *testing.B) {
	l := newLab(b)
	for i := range 200 {
		l.add(subnetA, netip.AddrFrom4([4]byte{10, 0, 0, byte(4 + i)}).String())
	}
	l.set()
	full := l.cfg
	b.Run("nothing", func(b *testing.B) {
		for b.Loop() {
			l.set()
		}
	})
	b.Run("detach and attach", func(b *testing.B) {
		for b.Loop() {
			l.cfg.Interfaces = full.Interfaces[:199]
			l.set()
			l.cfg = full
			l.set()
		}
	})
}
