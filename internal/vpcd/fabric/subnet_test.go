package fabric

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// acl sets an ACL in the Config, not yet in the fabric.
func (l *lab) acl(n int, in, out []ACLEntry) vpc.NetworkACLID {
	a := ACL{ID: vpc.NetworkACLID(fmt.Sprintf("acl-%017x", n)), Ingress: in, Egress: out}
	for i := range l.cfg.ACLs {
		if l.cfg.ACLs[i].ID == a.ID {
			l.cfg.ACLs[i] = a
			return a.ID
		}
	}
	l.cfg.ACLs = append(l.cfg.ACLs, a)
	return a.ID
}

func (l *lab) subnet(id vpc.SubnetID) *Subnet {
	for i := range l.cfg.Subnets {
		if l.cfg.Subnets[i].ID == id {
			return &l.cfg.Subnets[i]
		}
	}
	l.t.Fatalf("no subnet %s", id)
	return nil
}

// table sets a route table in the Config: the local route and others.
func (l *lab) table(n int, more ...Route) vpc.RouteTableID {
	t := RouteTable{ID: vpc.RouteTableID(fmt.Sprintf("rtb-%017x", n)), Routes: append([]Route{{CIDR: netip.MustParsePrefix("10.0.0.0/16"), Local: true}}, more...)}
	for i := range l.cfg.Tables {
		if l.cfg.Tables[i].ID == t.ID {
			l.cfg.Tables[i] = t
			return t.ID
		}
	}
	l.cfg.Tables = append(l.cfg.Tables, t)
	return t.ID
}

func TestACLEntries(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4", "10.0.0.32/28")
	near := l.add(subnetA, "10.0.0.5")
	b := l.add(subnetB, "10.0.1.4")
	entry := func(allow bool, protocol, from, to int, cidr string) ACLEntry {
		return ACLEntry{Protocol: protocol, From: from, To: to, CIDR: netip.MustParsePrefix(cidr), Allow: allow}
	}
	pass := []ACLEntry{entry(true, AllProtocols, Any, Any, "0.0.0.0/0")}
	list := func(e ...ACLEntry) []ACLEntry { return e }
	l.subnet(subnetA).ACL, l.subnet(subnetB).ACL = l.acl(1, nil, nil), l.acl(2, nil, nil)
	inside := netip.MustParseAddr("10.0.0.40")
	for _, c := range []struct {
		name    string
		out, in []ACLEntry // egress of a's subnet, ingress of b's
		packet  []byte
		want    DropReason
	}{
		{"all", pass, pass, tcp4(a.addr, b.addr, 1, 80, syn), ""},
		{"no entry", nil, pass, tcp4(a.addr, b.addr, 1, 80, syn), ACLEgress},
		{"no entry where it enters", pass, nil, tcp4(a.addr, b.addr, 1, 80, syn), ACLIngress},
		{"the first wins, deny", pass, list(entry(false, 6, 80, 80, "0.0.0.0/0"), pass[0]), tcp4(a.addr, b.addr, 1, 80, syn), ACLIngress},
		{"the first wins, allow", pass, list(entry(true, 6, 80, 80, "10.0.0.0/24"), entry(false, 6, 0, 65535, "0.0.0.0/0")), tcp4(a.addr, b.addr, 1, 80, syn), ""},
		{"the first that matches wins", pass, list(entry(false, 6, 81, 81, "0.0.0.0/0"), entry(false, 17, 80, 80, "0.0.0.0/0"), entry(true, 6, 80, 80, "0.0.0.0/0"), entry(false, AllProtocols, Any, Any, "0.0.0.0/0")), tcp4(a.addr, b.addr, 1, 80, syn), ""},
		{"ports, the last", pass, list(entry(true, 6, 80, 90, "0.0.0.0/0")), tcp4(a.addr, b.addr, 1, 90, syn), ""},
		{"ports, beyond", pass, list(entry(true, 6, 80, 90, "0.0.0.0/0")), tcp4(a.addr, b.addr, 80, 91, syn), ACLIngress},
		{"egress by destination port", list(entry(true, 17, 53, 53, "0.0.0.0/0")), pass, dgram4(a.addr, b.addr, 1, 53), ""},
		{"egress by destination", list(entry(true, 17, 53, 53, "10.0.1.0/24")), pass, dgram4(a.addr, b.addr, 1, 53), ""},
		{"egress to another destination", list(entry(true, 17, 53, 53, "10.0.0.0/24")), pass, dgram4(a.addr, b.addr, 1, 53), ACLEgress},
		{"ingress by source", pass, list(entry(true, 17, 53, 53, "10.0.0.32/28")), dgram4(inside, b.addr, 1, 53), ""},
		{"ingress from another source", pass, list(entry(true, 17, 53, 53, "10.0.0.32/28")), dgram4(a.addr, b.addr, 1, 53), ACLIngress},
		{"a deny for one address", pass, list(entry(false, AllProtocols, Any, Any, "10.0.0.40/32"), pass[0]), dgram4(inside, b.addr, 1, 53), ACLIngress},
		{"a deny for another address", pass, list(entry(false, AllProtocols, Any, Any, "10.0.0.40/32"), pass[0]), dgram4(a.addr, b.addr, 1, 53), ""},
		{"ICMP type", pass, list(entry(true, 1, 8, Any, "0.0.0.0/0")), icmp4(a.addr, b.addr, 8, 0, 1), ""},
		{"another ICMP type", pass, list(entry(true, 1, 0, Any, "0.0.0.0/0")), icmp4(a.addr, b.addr, 8, 0, 1), ACLIngress},
		{"ICMP code", pass, list(entry(false, 1, 3, 4, "0.0.0.0/0"), pass[0]), icmp4(a.addr, b.addr, 3, 4, 0), ACLIngress},
		{"another ICMP code", pass, list(entry(false, 1, 3, 4, "0.0.0.0/0"), pass[0]), icmp4(a.addr, b.addr, 3, 3, 0), ""},
		{"protocol by number", pass, list(entry(true, 47, 0, 0, "0.0.0.0/0")), packet4(47, a.addr, b.addr, make([]byte, 4)), ""},
		{"IPv6 is another matter", pass, list(entry(false, AllProtocols, Any, Any, "::/0"), pass[0]), tcp4(a.addr, b.addr, 1, 80, syn), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			l.t = t
			// What the other directions say is of no matter.
			l.acl(1, nil, c.out)
			l.acl(2, c.in, nil)
			l.set()
			l.forgetFlows()
			a.wants(b, "across", c.packet, c.want)
			copy(c.packet[16:20], near.addr.AsSlice())
			a.wants(near, "within the subnet", c.packet, "")
		})
	}
	l.t = t
}

// TestACLKnowsNoFlows: an answer needs an entry, and a change cuts what a
// security group would let go on.
func TestACLKnowsNoFlows(t *testing.T) {
	l, a, b := clientServer(t, anyUDP)
	p := netip.MustParsePrefix("0.0.0.0/0")
	pass := []ACLEntry{{Protocol: AllProtocols, CIDR: p, Allow: true}}
	request, answer := dgram4(a.addr, b.addr, 1000, 53), dgram4(b.addr, a.addr, 53, 1000)
	l.subnet(subnetB).ACL = l.acl(1, pass, []ACLEntry{{Protocol: 17, From: 2000, To: 65535, CIDR: p, Allow: true}})
	l.set()
	a.wants(b, "request", request, "")
	b.wants(a, "answer", answer, ACLEgress)
	l.acl(1, pass, []ACLEntry{{Protocol: 17, From: 1000, To: 65535, CIDR: p, Allow: true}})
	l.set()
	b.wants(a, "answer with an entry", answer, "")
	l.acl(1, nil, pass)
	l.set()
	a.wants(b, "request after the entry is gone", request, ACLIngress)
	l.subnet(subnetB).ACL = aclOpen
	l.set()
	a.wants(b, "request with another ACL", request, "")
}

// TestSubnetWithoutACL: a subnet without an ACL is shut, and says so.
func TestSubnetWithoutACL(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetB, "10.0.1.4")
	l.set()
	a.wants(b, "with an ACL", dgram4(a.addr, b.addr, 1, 2), "")
	l.subnet(subnetB).ACL = ""
	if err := l.Set(t.Context(), l.cfg); err == nil {
		t.Error("a subnet without an ACL is no error")
	}
	a.wants(b, "without an ACL", dgram4(a.addr, b.addr, 1, 2), ACLIngress)
}

func TestRoutes(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	near := l.add(subnetA, "10.0.0.5")
	b := l.add(subnetB, "10.0.1.4")
	m := l.add(subnetB, "10.0.1.5")
	checked := l.add(subnetB, "10.0.1.6")
	l.iface(m.eni).SourceDestCheck = false
	p := netip.MustParsePrefix
	table := func(more ...Route) { l.subnet(subnetA).Table = l.table(1, more...) }
	out := netip.MustParseAddr("203.0.113.7")
	for _, c := range []struct {
		name   string
		routes []Route
		dst    netip.Addr
		to     *host
		want   DropReason
	}{
		{"local", nil, b.addr, b, ""},
		{"local, nobody has the address", nil, netip.MustParseAddr("10.0.2.2"), b, NoTarget},
		{"no route", nil, out, b, NoRoute},
		{"default to an interface", []Route{{CIDR: p("0.0.0.0/0"), ENI: m.eni}}, out, m, ""},
		{"default does not beat local", []Route{{CIDR: p("0.0.0.0/0"), ENI: m.eni}}, b.addr, b, ""},
		{"longer than local", []Route{{CIDR: p("10.0.1.0/24"), ENI: m.eni}}, b.addr, m, ""},
		{"the longest wins", []Route{{CIDR: p("203.0.113.0/24")}, {CIDR: p("203.0.113.0/29"), ENI: m.eni}}, out, m, ""},
		{"the longest wins, blackhole", []Route{{CIDR: p("203.0.113.0/24"), ENI: m.eni}, {CIDR: p("203.0.113.0/29")}}, out, m, Blackhole},
		{"beyond the longest", []Route{{CIDR: p("203.0.113.0/24"), ENI: m.eni}, {CIDR: p("203.0.113.8/29")}}, out, m, ""},
		{"to an interface that is not attached", []Route{{CIDR: p("0.0.0.0/0"), ENI: "eni-0000000000000dead"}}, out, m, Blackhole},
		{"to an interface with the check", []Route{{CIDR: p("0.0.0.0/0"), ENI: checked.eni}}, out, checked, DestAddress},
		{"to the interface's own address", []Route{{CIDR: p("10.0.1.0/24"), ENI: checked.eni}}, checked.addr, checked, ""},
		{"within the subnet no route counts", []Route{{CIDR: p("10.0.0.0/24"), ENI: m.eni}}, near.addr, near, ""},
		{"link-local is never routed", []Route{{CIDR: p("0.0.0.0/0"), ENI: m.eni}}, netip.MustParseAddr("169.254.1.1"), m, NoRoute},
	} {
		table(c.routes...)
		l.set()
		a.wants(c.to, c.name, dgram4(a.addr, c.dst, 1, 2), c.want)
	}
	// Another subnet has a table of its own; one that is not there routes nothing.
	table(Route{CIDR: p("0.0.0.0/0"), ENI: m.eni})
	l.set()
	b.wants(m, "by the other table", dgram4(b.addr, out, 1, 2), NoRoute)
	l.subnet(subnetA).Table = tableMain
	l.set()
	a.wants(m, "by the main table", dgram4(a.addr, out, 1, 2), NoRoute)
	l.subnet(subnetA).Table = ""
	if err := l.Set(t.Context(), l.cfg); err == nil {
		t.Error("a subnet without a route table is no error")
	}
	a.wants(b, "without a table", dgram4(a.addr, b.addr, 1, 2), NoRoute)
}

// TestMiddlebox sends echo requests through an instance that forwards, there
// and back, and sees them stop when it goes.
func TestMiddlebox(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetB, "10.0.1.4")
	l.cfg.Subnets = append(l.cfg.Subnets, Subnet{ID: "subnet-0000000000000000d", VNI: 1, CIDR: netip.MustParsePrefix("10.0.2.0/24"), Table: tableMain, ACL: aclOpen})
	m := l.add("subnet-0000000000000000d", "10.0.2.4")
	l.iface(m.eni).SourceDestCheck = false
	l.subnet(subnetA).Table = l.table(1, Route{CIDR: netip.MustParsePrefix("10.0.1.0/24"), ENI: m.eni})
	l.subnet(subnetB).Table = l.table(2, Route{CIDR: netip.MustParsePrefix("10.0.0.0/24"), ENI: m.eni})
	l.set()
	m.do(func() error { return writeSysctl("/proc/sys/net/ipv4/ip_forward", "1") })
	m.do(func() error { return writeSysctl("/proc/sys/net/ipv4/conf/all/send_redirects", "0") })
	m.do(func() error { return writeSysctl("/proc/sys/net/ipv4/conf/eth0/send_redirects", "0") })
	before := m.counters()
	ttl, err := a.ping(a.addr, b.addr, 56, patience)
	if err != nil || ttl != 63 {
		t.Fatalf("through the middlebox: TTL %d, %v, want one hop less", ttl, err)
	}
	if n := m.counters().RxPackets - before.RxPackets; n != 2 {
		t.Errorf("%d packets came to the middlebox, want request and answer", n)
	}
	// The middlebox's own groups count.
	m.groups(l.group(1, nil, nil))
	l.set()
	l.forgetFlows()
	m.counts(SGIngress, func() { a.reachesNot(a.addr, b.addr) })
	m.groups(groupOpen)
	// Detached, it is a blackhole; the route stays.
	l.cfg.Interfaces = l.cfg.Interfaces[:2]
	l.set()
	a.counts(Blackhole, func() { a.reachesNot(a.addr, b.addr) })
	l.subnet(subnetA).Table, l.subnet(subnetB).Table = tableMain, tableMain
	l.set()
	a.reaches(b)
}

// TestTableChangesUnderTraffic changes what leads where while datagrams flow:
// none takes a route that is in neither of two tables.
func TestTableChangesUnderTraffic(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	one := l.add(subnetB, "10.0.1.4")
	two := l.add(subnetB, "10.0.1.5")
	wrong := l.add(subnetB, "10.0.1.6")
	for _, h := range []*host{one, two, wrong} {
		l.iface(h.eni).SourceDestCheck = false
	}
	p := netip.MustParsePrefix
	tables := []vpc.RouteTableID{
		l.table(1, Route{CIDR: p("0.0.0.0/0"), ENI: wrong.eni}, Route{CIDR: p("203.0.113.0/24"), ENI: one.eni}),
		l.table(2, Route{CIDR: p("0.0.0.0/0"), ENI: wrong.eni}, Route{CIDR: p("203.0.113.0/25"), ENI: two.eni}),
	}
	all := l.cfg.Tables
	l.subnet(subnetA).Table = tables[0]
	l.set()
	a.do(func() error {
		return exec.Command("ip", "neigh", "replace", "10.0.0.1", "lladdr", RouterMAC.String(), "dev", "eth0", "nud", "permanent").Run()
	})
	stop, done := make(chan struct{}), make(chan int, 1)
	go func() {
		sent := 0
		defer func() { done <- sent }()
		_ = nl.Do(NetnsPath(a.ns), func() error {
			c, err := net.Dial("udp4", "203.0.113.7:9")
			if err != nil {
				return err
			}
			defer c.Close()
			for {
				select {
				case <-stop:
					return nil
				default:
				}
				if _, err := c.Write([]byte("x")); err == nil {
					sent++
				}
			}
		})
	}()
	for n := range 40 {
		l.subnet(subnetA).Table = tables[n%2]
		// The table that nobody uses goes and comes back, in the same Set.
		l.cfg.Tables = append([]RouteTable{}, all[:2]...)
		for _, table := range all[2:] {
			if table.ID == tables[n%2] || n%4 < 2 {
				l.cfg.Tables = append(l.cfg.Tables, table)
			}
		}
		l.set()
	}
	deadline := time.Now().Add(patience)
	for one.counters().RxPackets == 0 || two.counters().RxPackets == 0 {
		if time.Now().After(deadline) {
			t.Error("no datagram came by one of the tables")
			break
		}
		l.subnet(subnetA).Table = tables[int(time.Now().UnixMilli()/50)%2]
		l.cfg.Tables = all
		l.set()
	}
	close(stop)
	sent := <-done
	if n := wrong.counters().RxPackets; n > 0 {
		t.Errorf("%d of %d datagrams took the shorter route", n, sent)
	}
	t.Logf("%d datagrams", sent)
}
