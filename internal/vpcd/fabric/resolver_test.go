package fabric

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// answering answers what comes to the resolvers, by whom it hears: each datagram,
// and on the ENI's listener each connection.
func (l *lab) answering(hosts ...*host) {
	l.t.Helper()
	conn, err := l.ListenResolver()
	if err != nil {
		l.t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		buf := make([]byte, 2048)
		for {
			_, from, err := conn.Read(buf)
			if err != nil {
				done <- err
				return
			}
			_ = conn.Write([]byte(heard(from.ENI, from.Addr.Addr())), from) // its interface may be gone
		}
	}()
	l.t.Cleanup(func() {
		conn.Close()
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			l.t.Errorf("resolver: %v", err)
		}
	})
	for _, h := range hosts {
		listener, err := l.ListenTCP(h.eni, ResolverAt)
		if err != nil {
			l.t.Fatal(err)
		}
		l.t.Cleanup(func() { listener.Close() })
		go func() {
			for {
				c, err := listener.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(c, heard(h.eni, c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr()))
				c.Close()
			}
		}()
	}
}

func heard(eni vpc.ENIID, from netip.Addr) string { return fmt.Sprint(eni, " ", from.Unmap()) }

// resolver sends to port 53 and returns what is answered, "" for nothing.
func (h *host) resolver(network string, from, at netip.Addr, wait time.Duration) string {
	h.l.t.Helper()
	var answer string
	h.do(func() error {
		var local net.Addr = &net.UDPAddr{IP: from.AsSlice()}
		if network == "tcp4" {
			local = &net.TCPAddr{IP: from.AsSlice()}
		}
		d := net.Dialer{Timeout: wait, LocalAddr: local}
		d.SetMultipathTCP(false)
		c, err := d.Dial(network, netip.AddrPortFrom(at, 53).String())
		if err != nil {
			return nil // no answer
		}
		defer c.Close()
		if network == "udp4" {
			if _, err := c.Write([]byte("?")); err != nil {
				return nil
			}
		}
		if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
			return err
		}
		b := make([]byte, 2048)
		n, _ := c.Read(b)
		answer = string(b[:n])
		return nil
	})
	return answer
}

// Each VPC has its resolver at two addresses, whatever groups and ACLs say, and
// none at those of others.
func TestResolver(t *testing.T) {
	l := newLab(t)
	here, there := netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.8.2")
	l.cfg.Subnets[0].Resolver, l.cfg.Subnets[1].Resolver = here, here // VPC 1; VPC 2 has none
	l.cfg.Subnets = append(l.cfg.Subnets, Subnet{ID: "subnet-0000000000000000d", VNI: 3, CIDR: netip.MustParsePrefix("10.0.0.0/24"), Table: tableMain, ACL: aclOpen, Resolver: there})
	a := l.add(subnetA, "10.0.0.4", "10.0.0.7/32")
	b := l.add(subnetB, "10.0.1.4")
	off := l.add(subnetOther, "10.0.0.4")
	third := l.add("subnet-0000000000000000d", "10.0.0.4")
	for i := range l.cfg.Interfaces {
		l.cfg.Interfaces[i].Groups = nil // nothing passes
	}
	l.cfg.ACLs[0].Ingress, l.cfg.ACLs[0].Egress = nil, nil
	l.set()
	l.answering(a, b, off, third)
	a.ip("addr", "add", "10.0.0.7/32", "dev", "lo")

	for _, network := range []string{"udp4", "tcp4"} {
		for _, c := range []struct {
			from *host
			as   string
			at   netip.Addr
		}{
			{a, "10.0.0.4", here}, {a, "10.0.0.4", ResolverAddr}, {a, "10.0.0.7", here}, {a, "10.0.0.7", ResolverAddr},
			{b, "10.0.1.4", here}, {b, "10.0.1.4", ResolverAddr},
			{third, "10.0.0.4", there}, {third, "10.0.0.4", ResolverAddr},
		} {
			as := netip.MustParseAddr(c.as)
			if got := c.from.resolver(network, as, c.at, patience); got != heard(c.from.eni, as) {
				t.Errorf("%s %s → %s: %q", network, c.as, c.at, got)
			}
		}
		for _, c := range []struct {
			from *host
			at   netip.Addr
		}{
			{off, here}, {off, ResolverAddr}, // it has none
			{third, here}, {a, there}, // another VPC's
			{a, resolverAlias}, // how the fabric keeps them apart is its own affair
		} {
			if got := c.from.resolver(network, c.from.addr, c.at, refusal); got != "" {
				t.Errorf("%s → %s of another VPC or none: %q", network, c.at, got)
			}
		}
	}
	a.reachesNot(a.addr, here)
	a.reachesNot(a.addr, ResolverAddr)

	// It goes and comes with the setting, without the interface being made anew.
	before := a.counters()
	l.cfg.Subnets[0].Resolver, l.cfg.Subnets[1].Resolver = netip.Addr{}, netip.Addr{}
	l.set()
	a.counts(NoTarget, func() {
		if got := a.resolver("udp4", a.addr, here, refusal); got != "" {
			t.Errorf("a resolver that is off: %q", got)
		}
	})
	l.cfg.Subnets[0].Resolver = here
	l.set()
	if got := a.resolver("udp4", a.addr, here, patience); got != heard(a.eni, a.addr) {
		t.Errorf("a resolver that is on again: %q", got)
	}
	if after := a.counters(); after.TxPackets <= before.TxPackets || after.RxPackets <= before.RxPackets {
		t.Errorf("counters %+v, then %+v", before, after)
	}
}

// An ENI's packets to link-local services share one budget, which is its own.
func TestLinkLocalAllowance(t *testing.T) {
	l := newLab(t)
	l.shut()
	o := labOptions(l.name)
	o.LinkLocalPPS = 20
	f, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	l.Fabric = f
	here := netip.MustParseAddr("10.0.0.2")
	l.cfg.Subnets[0].Resolver = here
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetA, "10.0.0.5")
	l.set()
	l.answering()
	burst := func(h *host, n int, at ...netip.Addr) {
		t.Helper()
		h.do(func() error {
			c, err := net.ListenUDP("udp4", nil)
			if err != nil {
				return err
			}
			defer c.Close()
			for i := range n {
				if _, err := c.WriteToUDPAddrPort([]byte("?"), netip.AddrPortFrom(at[i%len(at)], 53)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	ntp := netip.MustParseAddr("169.254.169.123")
	began := time.Now()
	burst(a, 200, here, ResolverAddr, IMDSAddr, ntp)
	most := 200 - 20 - uint64(20*(time.Since(began)+20*time.Millisecond)/time.Second) - 1 // what time has added since
	// The guest's own answers that nobody listens for what it was told (ICMP port
	// unreachable, to the resolver) come out of the budget, too.
	if n := a.drops(LinkLocalAllowance); n < most {
		t.Errorf("%d of 200 packets dropped, want %d at least", n, most)
	}
	if n := b.drops(LinkLocalAllowance); n != 0 {
		t.Errorf("%d of another interface dropped", n)
	}
	if got := b.resolver("udp4", b.addr, here, patience); got == "" {
		t.Error("another interface has no budget")
	}
	// What is not link-local has none, and is not held up by it.
	before := a.drops(LinkLocalAllowance)
	a.reaches(b)
	if n := a.drops(LinkLocalAllowance) - before; n != 0 {
		t.Errorf("%d packets to another interface dropped", n)
	}
	l.after(time.Second)
	before = a.drops(LinkLocalAllowance)
	burst(a, 10, here) // and the guest answers by ICMP what comes when nobody listens any more
	if n := a.drops(LinkLocalAllowance) - before; n != 0 {
		t.Errorf("a second later %d packets of 10 dropped", n)
	}
	// The interface's end is the bucket's.
	l.cfg.Interfaces = l.cfg.Interfaces[1:]
	l.set()
	var index uint32
	var bucket [24]byte
	n := 0
	for it := l.objs.Buckets.Iterate(); it.Next(&index, &bucket); {
		n++
	}
	if n != 1 {
		t.Errorf("%d buckets, want that of the one interface that is left", n)
	}
}
