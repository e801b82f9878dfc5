package fabric

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

var (
	anywhereCIDR = netip.MustParsePrefix("0.0.0.0/0")
	internetAddr = InternetAddrs[0].Addr()
)

func public(n byte) netip.Addr { return netip.AddrFrom4([4]byte{198, 51, 100, n}) }

// withInternet gives VPC 1 of a lab an attached internet gateway with a default
// route.
func (l *lab) withInternet() {
	l.cfg.Internet = true
	l.cfg.Tables[0].Routes = append(l.cfg.Tables[0].Routes, Route{CIDR: anywhereCIDR, Internet: true})
}

// elastic gives a private address a public one.
func (l *lab) elastic(public, private netip.Addr) {
	l.cfg.Publics = append(l.cfg.Publics, Public{Addr: public, VNI: 1, Private: private})
}

// outside is the internet as a host, for what tests do in a guest.
func (l *lab) outside() *host {
	return &host{l: l, ns: l.names.internet(), addr: internetAddr}
}

// echo answers UDP datagrams with their sender's address, as text.
func (h *host) echo(at netip.Addr, port uint16) {
	h.l.t.Helper()
	var c *net.UDPConn
	h.do(func() (err error) {
		c, err = net.ListenUDP("udp4", &net.UDPAddr{IP: at.AsSlice(), Port: int(port)})
		return err
	})
	h.l.t.Cleanup(func() { c.Close() })
	go func() {
		buf := make([]byte, 1<<16)
		for {
			_, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteToUDPAddrPort([]byte(from.Addr().Unmap().String()), from)
		}
	}()
}

// seenAs asks an echo who it is.
func (h *host) seenAs(from netip.Addr, to netip.AddrPort, size int, wait time.Duration) string {
	h.l.t.Helper()
	var c *net.UDPConn
	h.do(func() (err error) {
		c, err = net.DialUDP("udp4", &net.UDPAddr{IP: from.AsSlice()}, net.UDPAddrFromAddrPort(to))
		return err
	})
	defer c.Close()
	if _, err := c.Write(make([]byte, size)); err != nil {
		return err.Error()
	}
	_ = c.SetReadDeadline(time.Now().Add(wait))
	buf := make([]byte, 1<<16)
	n, err := c.Read(buf)
	if err != nil {
		return ""
	}
	return string(buf[:n])
}

func TestInternetGateway(t *testing.T) {
	l := newLab(t)
	l.withInternet()
	a := l.add(subnetA, "10.0.0.4", "10.0.0.10/32", "10.0.0.32/28")
	b := l.add(subnetB, "10.0.1.4")
	pod, inPrefix := netip.MustParseAddr("10.0.0.10"), netip.MustParseAddr("10.0.0.40")
	l.elastic(public(1), a.addr)
	l.elastic(public(2), pod)
	l.elastic(public(3), inPrefix)
	l.set()
	a.ip("addr", "add", pod.String()+"/32", "dev", "lo")
	a.ip("addr", "add", inPrefix.String()+"/32", "dev", "lo")
	out := l.outside()
	out.echo(internetAddr, 7)
	for _, at := range []netip.Addr{a.addr, pod, inPrefix} {
		a.echo(at, 7)
	}
	server := netip.AddrPortFrom(internetAddr, 7)

	for private, want := range map[netip.Addr]netip.Addr{a.addr: public(1), pod: public(2), inPrefix: public(3)} {
		a.reachesAt(private, internetAddr)
		out.reachesAt(internetAddr, want)
		if got := a.seenAs(private, server, 10, patience); got != want.String() {
			t.Errorf("the internet sees %s as %q, want %s", private, got, want)
		}
		if got := out.seenAs(internetAddr, netip.AddrPortFrom(want, 7), 10, patience); got != internetAddr.String() {
			t.Errorf("%s sees the internet as %q, want %s", private, got, internetAddr)
		}
		// In fragments, of which the guest makes some by its MTU of 9001 and the
		// gateway the others.
		if got := a.seenAs(private, server, 20000, patience); got != want.String() {
			t.Errorf("the internet sees a large datagram of %s from %q, want %s", private, got, want)
		}
		if got := out.seenAs(internetAddr, netip.AddrPortFrom(want, 7), 20000, patience); got != internetAddr.String() {
			t.Errorf("%s sees a large datagram of the internet from %q, want %s", private, got, internetAddr)
		}
	}
	// No public address, no way.
	b.counts(IGWSource, func() { b.reachesNot(b.addr, internetAddr) })
	a.counts(IGWPrivate, func() { a.reachesNot(a.addr, netip.MustParseAddr("192.168.7.7")) })
	a.counts(IGWPrivate, func() { a.reachesNot(a.addr, netip.MustParseAddr("100.64.0.1")) })
	out.reachesNot(internetAddr, public(9))

	// The public address of another of the VPC leads through the gateway and back.
	l.elastic(public(4), b.addr)
	l.set()
	b.reachesAt(b.addr, public(1))
	if got := b.seenAs(b.addr, netip.AddrPortFrom(public(1), 7), 10, patience); got != public(4).String() {
		t.Errorf("reflected, a sees b as %q, want %s", got, public(4))
	}

	// Nothing in, nothing out, as soon as Set returns.
	l.cfg.Publics = l.cfg.Publics[1:]
	l.set()
	a.counts(IGWSource, func() { a.reachesNot(a.addr, internetAddr) })
	out.reachesNot(internetAddr, public(1))
	a.reachesAt(pod, internetAddr)
	// A restart of the process changes nothing.
	l.shut()
	a.reachesAt(pod, internetAddr)
	l.open()
	l.set()
	a.reachesAt(pod, internetAddr)
	l.cfg.Tables[0].Routes = l.cfg.Tables[0].Routes[:1]
	l.set()
	a.counts(NoRoute, func() { a.reachesNot(pod, internetAddr) })
}

// What comes from the internet meets the ACL and the groups of who has the
// address, and who answers needs a route of its own.
func TestInternetMeetsTheGates(t *testing.T) {
	l := newLab(t)
	l.withInternet()
	a := l.add(subnetA, "10.0.0.4")
	l.elastic(public(1), a.addr)
	const web vpc.SecurityGroupID = "sg-0000000000000000e"
	out := []Rule{{Protocol: AllProtocols, Peers: []netip.Prefix{anywhereCIDR}}}
	l.cfg.Groups = append(l.cfg.Groups, Group{ID: web, Egress: out, Ingress: []Rule{{Protocol: protoUDP, From: 7, To: 7, Peers: []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}}}})
	l.iface(a.eni).Groups = []vpc.SecurityGroupID{web}
	l.set()
	o := l.outside()
	a.echo(a.addr, 7)
	a.echo(a.addr, 8)
	o.echo(internetAddr, 7)
	ask := func(port uint16, wait time.Duration) string {
		return o.seenAs(internetAddr, netip.AddrPortFrom(public(1), port), 10, wait)
	}
	if got := ask(7, patience); got == "" {
		t.Error("an allowed port does not answer the internet")
	}
	a.counts(SGIngress, func() {
		if got := ask(8, refusal); got != "" {
			t.Errorf("a port that no group opens answered: %q", got)
		}
	})
	// What belongs to a flow comes back.
	if got := a.seenAs(a.addr, netip.AddrPortFrom(internetAddr, 7), 10, patience); got != public(1).String() {
		t.Errorf("seen as %q", got)
	}
	deny := ACLEntry{Protocol: protoUDP, From: Any, To: Any, CIDR: netip.MustParsePrefix("203.0.113.0/24")}
	open := l.cfg.ACLs[0].Ingress
	l.cfg.ACLs[0].Ingress = append([]ACLEntry{deny}, open...)
	l.set()
	a.counts(ACLIngress, func() { ask(7, refusal) })
	l.cfg.ACLs[0].Ingress = open
	l.cfg.ACLs[0].Egress = append([]ACLEntry{deny}, open...)
	l.set()
	a.counts(ACLEgress, func() { ask(7, refusal) })
	l.cfg.ACLs[0].Egress = open
	l.cfg.Tables[0].Routes = l.cfg.Tables[0].Routes[:1]
	l.set()
	a.counts(NoRoute, func() { ask(7, refusal) })
}

// TestInternetLost takes parts of the internet away: the next Set makes it anew.
func TestInternetLost(t *testing.T) {
	l := newLab(t)
	l.withInternet()
	a := l.add(subnetA, "10.0.0.4")
	l.elastic(public(1), a.addr)
	l.set()
	a.reachesAt(a.addr, internetAddr)
	for name, lose := range map[string]func() error{
		"device":    func() error { return exec.Command("ip", "-n", l.names.fabric(), "link", "del", internetName).Run() },
		"namespace": func() error { return nl.DeleteNamed(l.names.internet()) },
		"program":   func() error { return os.Remove(linkPin(l, internetName+"-in")) },
		"mark of being whole": func() error {
			return l.objs.Internet.Put(uint32(0), bpfgen.FabricTarget{})
		},
	} {
		if err := lose(); err != nil {
			t.Fatal(err)
		}
		l.shut()
		l.open()
		l.set()
		if _, err := a.ping(a.addr, internetAddr, 56, patience); err != nil {
			t.Errorf("%s lost: %v", name, err)
		}
		l.outside().reachesAt(internetAddr, public(1))
	}
}
