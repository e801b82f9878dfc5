package fabric

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
)

// ping6 runs the ping command in the guest.
func (h *host) ping6(to netip.Addr, more ...string) (string, error) {
	args := append([]string{"netns", "exec", h.ns, "ping", "-6", "-n", "-c", "1", "-W", "3"}, more...)
	out, err := exec.Command("ip", append(args, to.String())...).CombinedOutput()
	return string(out), err
}

func (h *host) reaches6(to netip.Addr) {
	h.l.t.Helper()
	if out, err := h.ping6(to); err != nil {
		h.l.t.Errorf("ping %s → %s: %v: %s", h.ns, to, err, out)
	} else if !strings.Contains(out, "ttl=64") {
		h.l.t.Errorf("ping %s → %s: %s; want the hop limit untouched (64)", h.ns, to, out)
	}
}

// eventually waits until ip's output in the guest contains what.
func (h *host) eventually(what string, args ...string) {
	h.l.t.Helper()
	for deadline := time.Now().Add(3 * patience); ; <-time.After(20 * time.Millisecond) {
		out, err := exec.Command("ip", append([]string{"-n", h.ns}, args...)...).CombinedOutput()
		if err == nil && strings.Contains(string(out), what) {
			return
		}
		if time.Now().After(deadline) {
			h.l.t.Fatalf("ip %v in %s: %v: %s; want %q", args, h.ns, err, out, what)
		}
	}
}

// TestTraffic6: guests that were configured as DHCPv6 would, and one that is not,
// find the router and each other by the kernel's own means.
func TestTraffic6(t *testing.T) {
	l := newLab6(t)
	a := l.add6(subnetA, "10.0.0.4", "2001:db8:0:100::4", "2001:db8:0:100:1::/80")
	near := l.add6(subnetA, "10.0.0.5", "2001:db8:0:100::5")
	b := l.add6(subnetB, "10.0.1.4", "2001:db8:0:101::4")
	b.groups(l.group(1, []Rule{{Protocol: 58, From: 128, To: Any, Peers: everywhere6}, {Protocol: 6, From: 80, To: 80, Group: groupOpen}}, nil))
	late := l.add(subnetB, "10.0.1.5") // its address comes later
	l.set()

	a.reaches6(near.six)
	a.reaches6(b.six)
	// From an address of its prefix, as a pod's.
	a.ip("addr", "add", "2001:db8:0:100:1::7/128", "dev", "lo", "nodad")
	if out, err := a.ping6(b.six, "-I", "2001:db8:0:100:1::7"); err != nil {
		t.Errorf("ping from a prefix: %v: %s", err, out)
	}
	// From one that is not its own.
	a.ip("addr", "add", "2001:db8:0:100::99/128", "dev", "lo", "nodad")
	a.counts(SourceAddress, func() {
		if out, err := a.ping6(b.six, "-I", "2001:db8:0:100::99", "-W", "0.15"); err == nil {
			t.Errorf("ping from a stranger's address: %s", out)
		}
	})

	// More than one segment at once, and both ways.
	l.transfers6(a, b)
	b.counts(SGIngress, func() {
		a.do(func() error {
			c, err := net.DialTimeout("tcp", fmt.Sprintf("[%s]:81", b.six), refusal)
			if err == nil {
				c.Close()
				t.Error("port 81 is reached")
			}
			return nil
		})
	})

	// Duplicate address detection: another's address fails, its own does not.
	a.ip("addr", "add", "2001:db8:0:100::5/64", "dev", "eth0")
	a.eventually("dadfailed", "-6", "addr", "show", "dev", "eth0")
	a.ip("addr", "del", "2001:db8:0:100::5/64", "dev", "eth0")
	i := l.iface(late.eni)
	late.six = netip.MustParseAddr("2001:db8:0:101::5")
	i.Addresses = append(i.Addresses, netip.PrefixFrom(late.six, 128))
	l.set()
	late.ip("addr", "add", "2001:db8:0:101::5/64", "dev", "eth0")
	late.eventually("via fe80:ec2::1 dev eth0 proto ra", "-6", "route", "show", "default")
	for _, h := range []*host{a, late} {
		out, err := exec.Command("ip", "-n", h.ns, "-6", "addr", "show", "dadfailed").CombinedOutput()
		if err != nil || len(bytes.TrimSpace(out)) > 0 {
			t.Errorf("failed addresses of %s: %s, %v", h.ns, out, err)
		}
	}
	for deadline := time.Now().Add(3 * patience); ; <-time.After(20 * time.Millisecond) { // until the probe is over
		out, _ := exec.Command("ip", "-n", late.ns, "-6", "addr", "show", "tentative").CombinedOutput()
		if len(bytes.TrimSpace(out)) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("tentative: %s", out)
		}
	}
	late.reaches6(a.six)
	// On the link, by its MAC: also without a route to it.
	late.reaches6(b.six)
}

// transfers6 sends a megabyte from one guest to port 80 of another, and back.
func (l *lab) transfers6(from, to *host) {
	l.t.Helper()
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	var listener net.Listener
	to.do(func() (err error) {
		listener, err = net.Listen("tcp", fmt.Sprintf("[%s]:80", to.six))
		return err
	})
	defer listener.Close()
	go func() {
		c, err := listener.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = io.Copy(c, io.LimitReader(c, int64(len(data))))
	}()
	from.do(func() error {
		c, err := net.DialTimeout("tcp", fmt.Sprintf("[%s]:80", to.six), patience)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(3 * patience)); err != nil {
			return err
		}
		go func() { _, _ = c.Write(data) }()
		got, err := io.ReadAll(io.LimitReader(c, int64(len(data))))
		if err != nil || !bytes.Equal(got, data) {
			l.t.Errorf("%d bytes came back, %v; want %d", len(got), err, len(data))
		}
		return nil
	})
}

// TestPathMTU6: a guest whose MTU is above the VPC's learns the path's from the
// router; UDP goes in fragments then, and TCP arrives.
func TestPathMTU6(t *testing.T) {
	l := newLab6(t)
	a := l.add6(subnetA, "10.0.0.4", "2001:db8:0:100::4")
	b := l.add6(subnetB, "10.0.1.4", "2001:db8:0:101::4")
	l.set()
	for _, h := range []*host{a, b} {
		h.ip("link", "set", "eth0", "mtu", "20000")
	}
	a.counts(Oversize, func() {
		if out, err := a.ping6(b.six, "-M", "do", "-s", "12000"); err == nil {
			t.Errorf("12,048 bytes pass: %s", out)
		}
	})
	a.eventually("mtu 9001", "-6", "route", "get", b.six.String())
	if out, err := a.ping6(b.six, "-M", "dont", "-s", "12000", "-c", "2", "-i", "0.01"); err != nil { // the first answer tells b the MTU
		t.Errorf("12,048 bytes in fragments: %v: %s", err, out)
	}
	l.transfers6(a, b)
}

// TestIPv6ComesAndGoes: a subnet gets a block and loses it, under interfaces that
// stay as they are.
func TestIPv6ComesAndGoes(t *testing.T) {
	l := newLab6(t)
	a := l.add6(subnetA, "10.0.0.4", "2001:db8:0:100::4")
	b := l.add6(subnetB, "10.0.1.4", "2001:db8:0:101::4")
	with := l.cfg
	without := with
	without.Subnets = append([]Subnet{}, with.Subnets...)
	without.Interfaces = append([]Interface{}, with.Interfaces...)
	for i := range without.Subnets {
		without.Subnets[i].CIDR6 = netip.Prefix{}
	}
	for i := range without.Interfaces {
		without.Interfaces[i].Addresses = without.Interfaces[i].Addresses[:1]
	}
	l.set6() // with
	index := func() (out string) {
		a.do(func() error {
			i, err := net.InterfaceByName("eth0")
			if err == nil {
				out = fmt.Sprint(i.Index)
			}
			return err
		})
		return out
	}
	had := index()
	packet := dgram6(a.six, b.six, 1, 2)
	a.wants6(b, "with a block", packet, "")
	l.cfg = without
	l.set()
	a.wants6(b, "without a block", packet, IPv6)
	a.reaches(b)
	l.cfg = with
	l.set()
	a.wants6(b, "with a block again", packet, "")
	// And by the next process.
	l.shut()
	l.open()
	a.wants6Adopted(b, packet)
	l.set()
	a.wants6(b, "after vpcd came back", packet, "")
	if now := index(); now != had {
		t.Errorf("eth0 was made anew: index %s, was %s", now, had)
	}
}

// wants6Adopted sends a packet before the first Set of this process.
func (h *host) wants6Adopted(to *host, packet []byte) {
	h.l.t.Helper()
	before := to.counters().RxPackets
	err := nl.Do(NetnsPath(h.ns), func() error {
		s, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		i, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		return unix.Sendto(s, ethernet(RouterMAC, h.mac, 0x86dd, packet), 0, &unix.SockaddrLinklayer{Ifindex: i.Index})
	})
	if err != nil {
		h.l.t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); to.counters().RxPackets == before; <-time.After(time.Millisecond) {
		if time.Now().After(deadline) {
			h.l.t.Error("nothing arrives before the first Set")
			return
		}
	}
}

// TestGroupsExchanged: the receiver has the group that the sender may send to, and
// takes nothing, or another that takes everything. At no time does anything pass,
// also not while one group takes the other's place.
func TestGroupsExchanged(t *testing.T) {
	l := newLab6(t)
	a := l.add6(subnetA, "10.0.0.4", "2001:db8:0:100::4")
	b := l.add6(subnetB, "10.0.1.4", "2001:db8:0:101::4")
	named := l.group(2, nil, nil)
	open := l.group(3, []Rule{{Protocol: 17, From: 53, To: 53, Peers: everywhere}, {Protocol: 17, From: 53, To: 53, Peers: everywhere6}}, nil)
	a.groups(l.group(1, nil, []Rule{{Protocol: 17, From: 53, To: 53, Group: named}}))
	b.groups(named)
	l.set()
	a.ip("neigh", "replace", "10.0.0.1", "lladdr", RouterMAC.String(), "dev", "eth0", "nud", "permanent")
	a.ip("neigh", "replace", "fe80:ec2::1", "lladdr", RouterMAC.String(), "dev", "eth0", "nud", "permanent")
	before := b.counters().RxPackets

	sent := make(chan int, 1)
	go func() {
		n := 0
		defer func() { sent <- n }()
		_ = nl.Do(NetnsPath(a.ns), func() error {
			// From each port once: what was refused must not have begun a flow.
			for port := 10000; port < 60000; port++ {
				for _, domain := range []int{unix.AF_INET, unix.AF_INET6} {
					var from, to unix.Sockaddr = &unix.SockaddrInet4{Port: port}, &unix.SockaddrInet4{Port: 53, Addr: b.addr.As4()}
					if domain == unix.AF_INET6 {
						from, to = &unix.SockaddrInet6{Port: port}, &unix.SockaddrInet6{Port: 53, Addr: b.six.As16()}
					}
					fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
					if err != nil {
						return err
					}
					if unix.Bind(fd, from) == nil && unix.Sendto(fd, []byte("x"), 0, to) == nil {
						n++
					}
					unix.Close(fd)
				}
			}
			return nil
		})
	}()
	changes, n := 0, 0
	for n == 0 {
		changes++
		if b.groups(named); changes%2 == 1 {
			b.groups(open)
		}
		l.set()
		select {
		case n = <-sent:
		default:
		}
	}
	if n < 90000 || changes < 4 {
		t.Errorf("%d datagrams, %d changes", n, changes)
	}
	if got := b.counters().RxPackets - before; got > 0 {
		t.Errorf("%d of %d datagrams passed, in %d changes", got, n, changes)
	}
}
