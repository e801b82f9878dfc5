package datapath

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// fleet is two nodes with a datapath each, two more machines, and a router that
// does between them what a VPC does:
//
//	node 0   eth0 10.0.0.10/24   eth1 10.0.1.10/24     pods near0, near1
//	node 1   eth0 10.0.10.10/24  eth1 10.0.11.10/24    pods far0, far1
//	client   10.0.2.10/24, in the VPC 10.0.0.0/16
//	inet     203.0.113.9/24, outside of it; it also has 100.64.7.7, 192.0.2.7 and 172.31.7.7
//
// Pods of an ENI have the upper half of its subnet; near0 is 10.0.0.129 on the
// primary ENI, near1 10.0.1.129 on the secondary one. What a node sends with a
// source that the ENI does not have is dropped and counted, as by the VPC's
// source check; what leaves for inet from anything but an ENI's primary address
// is dropped as by an internet gateway, unless it is for an address of a
// network that is joined to the VPC.
type fleet struct {
	*world  // of node 0
	far     *world
	d, farD *Datapath
	client  string
	inet    string

	near0, near1, far0, far1 pod
}

var (
	fleetVPC  = netip.MustParsePrefix("10.0.0.0/16")
	clientIP  = netip.MustParseAddr("10.0.2.10")
	inetIP    = netip.MustParseAddr("203.0.113.9")
	sharedIP  = netip.MustParseAddr("100.64.7.7") // RFC 6598
	privateIP = netip.MustParseAddr("172.31.7.7") // RFC 1918, of a peer
	laterIP   = netip.MustParseAddr("192.0.2.7")  // public by its number, of the VPC later on
	laterVPC  = netip.MustParsePrefix("192.0.2.0/24")
)

// fleetENIs are those of the node whose subnets begin with 10.0.<first>.
func fleetENIs(first int) []ENI {
	var out []ENI
	for i := range 2 {
		subnet := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(first + i), 0}), 24)
		out = append(out, ENI{
			ID: vpc.ENIID(fmt.Sprintf("eni-%017x", first+i+1)), Index: i + 1, MAC: net.HardwareAddr{2, 0, 0, 1, byte(first + i), 0x10},
			Primary: netip.AddrFrom4([4]byte{10, 0, byte(first + i), 10}), Subnet: subnet,
		})
	}
	return out
}

func newFleet(t testing.TB, opts Options) *fleet {
	t.Helper()
	f := &fleet{world: newBareWorld(t)}
	f.stackOnly = true
	f.far = &world{t: t, stackOnly: true, node: f.netns("node1"), wire: f.wire, bpffs: mountBPFFS(t)}
	f.client, f.inet = f.netns("client"), f.netns("inet")

	sysctl := func(netns, name, value string) { f.run("ip", "netns", "exec", netns, "sysctl", "-qw", name+"="+value) }
	for _, ns := range []string{f.wire, f.client, f.inet} {
		sysctl(ns, "net.ipv4.conf.all.rp_filter", "0")
		sysctl(ns, "net.ipv4.conf.default.rp_filter", "0")
	}
	// Or what was said once a second ago is not said again.
	for _, ns := range []string{f.wire, f.world.node, f.far.node} {
		sysctl(ns, "net.ipv4.icmp_ratelimit", "0")
	}
	sysctl(f.wire, "net.ipv4.ip_forward", "1")
	sysctl(f.wire, "net.ipv4.conf.all.send_redirects", "0")

	counters := []string{"counter internet_gateway { }"}
	var sources, publics []string
	for n, node := range []*world{f.world, f.far} {
		f.ip(node.node, "link set lo up")
		for i, e := range fleetENIs(10 * n) {
			dev, peer, gw := fmt.Sprintf("eth%d", i), fmt.Sprintf("r%d%d", n, i), vpc.Router(e.Subnet)
			pods := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, e.Subnet.Addr().As4()[2], 128}), 25)
			f.ip(node.node, fmt.Sprintf("link add %s address %s type veth peer name %s netns %s", dev, e.MAC, peer, f.wire))
			f.ip(f.wire, "link set "+peer+" mtu 9001 up")
			f.ip(f.wire, fmt.Sprintf("addr add %s/24 dev %s", gw, peer))
			if i == 0 {
				f.ip(node.node, fmt.Sprintf("addr add %s/24 dev %s", e.Primary, dev))
				f.ip(node.node, "link set "+dev+" up")
				f.ip(node.node, fmt.Sprintf("route add default via %s", gw))
			}
			f.ip(f.wire, fmt.Sprintf("route add %s via %s", pods, e.Primary))
			counters = append(counters, "counter source_check_"+peer+" { }")
			sources = append(sources, fmt.Sprintf("iifname %s ip saddr != { %s, %s } counter name source_check_%s drop", peer, e.Primary, pods, peer))
			publics = append(publics, e.Primary.String())
		}
	}
	for _, m := range []struct {
		ns, dev string
		addr    netip.Addr
	}{{f.client, "c0", clientIP}, {f.inet, "i0", inetIP}} {
		gw := vpc.Router(netip.PrefixFrom(m.addr, 24).Masked())
		f.ip(m.ns, fmt.Sprintf("link add eth0 mtu 9001 type veth peer name %s mtu 9001 netns %s", m.dev, f.wire))
		f.ip(m.ns, fmt.Sprintf("addr add %s/24 dev eth0", m.addr))
		f.ip(m.ns, "link set eth0 up")
		f.ip(m.ns, "link set lo up")
		f.ip(m.ns, fmt.Sprintf("route add default via %s", gw))
		f.ip(f.wire, fmt.Sprintf("addr add %s/24 dev %s", gw, m.dev))
		f.ip(f.wire, "link set "+m.dev+" up")
	}
	for _, a := range []netip.Addr{sharedIP, privateIP, laterIP} {
		f.ip(f.inet, fmt.Sprintf("addr add %s/32 dev lo", a))
		f.ip(f.wire, fmt.Sprintf("route add %s via %s", a, inetIP))
	}
	f.nft(f.wire, fmt.Sprintf(`table ip vpc {
		%s
		chain sources { type filter hook prerouting priority raw; %s; }
		chain gateway { type filter hook forward priority filter; oifname i0 ip daddr 203.0.113.0/24 ip saddr != { %s } counter name internet_gateway drop; }
	}`, strings.Join(counters, "\n"), strings.Join(sources, ";"), strings.Join(publics, ", ")))

	f.d, f.farD = f.world.openWith(opts, fleetENIs(0)), f.far.openWith(opts, fleetENIs(10))
	for _, d := range []*Datapath{f.d, f.farD} {
		if err := d.SetVPC(ctx, []netip.Prefix{fleetVPC}); err != nil {
			t.Fatal(err)
		}
	}
	f.near0, f.near1 = f.pod(f.d, 0, 129, 0), f.pod(f.d, 1, 129, 0)
	f.far0, f.far1 = f.pod(f.farD, 10, 129, 0), f.pod(f.farD, 11, 129, 0)
	return f
}

// newBareWorld is newWorld without devices.
func newBareWorld(t testing.TB) *world {
	w := &world{t: t}
	w.node, w.wire = w.netns("node"), w.netns("wire")
	w.bpffs = mountBPFFS(t)
	return w
}

func (w *world) openWith(opts Options, enis []ENI) *Datapath {
	w.t.Helper()
	d, err := w.tryOpen(opts)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = d.Close() })
	if err := d.SetENIs(context.Background(), enis); err != nil {
		w.t.Fatal(err)
	}
	if w.cached {
		if err := programs.Replaced(mapDir(w.bpffs)); err != nil {
			w.t.Fatal(err)
		}
	}
	return d
}

// pod adds a pod with address 10.0.<third>.<last>.
func (f *fleet) pod(d *Datapath, third, last, mtu int) pod {
	f.t.Helper()
	ns := f.netns(fmt.Sprintf("pod%d-%d", third, last))
	index := third%10 + 1
	e, err := d.Add(context.Background(), Endpoint{
		ContainerID: fmt.Sprintf("c%031d%032d", third, last), IfName: "eth0", Netns: nl.Path(ns), MTU: mtu,
		Addr: netip.AddrFrom4([4]byte{10, 0, byte(third), byte(last)}), ENI: vpc.ENIID(fmt.Sprintf("eni-%017x", third+1)), ENIIndex: index,
		PodNamespace: "default", PodName: fmt.Sprintf("pod-%d-%d", third, last),
	}, openNetns(f.t, ns))
	if err != nil {
		f.t.Fatal(err)
	}
	return pod{Endpoint: e, ns: ns}
}

// nft loads a rule set in a namespace.
func (f *fleet) nft(netns, rules string) { f.load(netns, rules, "nft", "-f", "-") }

// load runs a program in a namespace with an input.
func (f *fleet) load(netns, input string, program ...string) {
	f.t.Helper()
	file := filepath.Join(f.t.TempDir(), "input")
	if err := os.WriteFile(file, []byte(input), 0o600); err != nil {
		f.t.Fatal(err)
	}
	f.run("sh", "-c", "exec ip netns exec "+netns+" "+strings.Join(program, " ")+" <"+file)
}

// refused returns the counters of the router's rules that dropped something, and
// sets them to zero.
func (f *fleet) refused() []string {
	f.t.Helper()
	var out []string
	name := ""
	for line := range strings.Lines(f.run("ip", "netns", "exec", f.wire, "nft", "reset", "counters", "table", "ip", "vpc")) {
		fields := strings.Fields(line)
		switch {
		case len(fields) > 1 && fields[0] == "counter":
			name = fields[1]
		case len(fields) > 1 && fields[0] == "packets" && fields[1] != "0":
			out = append(out, name+": "+strings.TrimSpace(line))
		}
	}
	return out
}

// serve starts a server in a namespace that says which address and port it sees,
// as one line, and sends back the lines it is sent.
func (f *fleet) serve(netns string, at netip.AddrPort) {
	f.t.Helper()
	f.accept(netns, at, func(c net.Conn) {
		_, _ = fmt.Fprintln(c, c.RemoteAddr())
		_, _ = io.Copy(c, c)
	})
}

// serveUDP answers each datagram with the address and port it came from, and
// spaces up to the datagram's own length.
func (f *fleet) serveUDP(netns string, at netip.AddrPort) {
	f.t.Helper()
	c := f.udp(netns, at.Addr(), at.Port())
	go func() {
		buf := make([]byte, 65536)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteToUDPAddrPort(fmt.Appendf(nil, "%-*s", n, from), from)
		}
	}()
}

// talk is one connection to a server of serve or serveUDP.
type talk struct {
	net.Conn
	lines *bufio.Reader
	seen  netip.AddrPort // who the server says is speaking
}

// shared lets several connections leave from one port.
func shared(_, _ string, c syscall.RawConn) (err error) {
	ctlErr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	return errors.Join(ctlErr, err)
}

// patience is for what is to work; a refusal is known after less.
const (
	patience   = 5 * time.Second
	impatience = 300 * time.Millisecond
)

// talk connects from a namespace; from may be zero or name the port.
func (f *fleet) talk(netns, network string, from, to netip.AddrPort, within time.Duration) (*talk, error) {
	dialer := net.Dialer{Timeout: within, Control: shared}
	if from.IsValid() {
		switch network {
		case "tcp4":
			dialer.LocalAddr = net.TCPAddrFromAddrPort(from)
		case "udp4":
			dialer.LocalAddr = net.UDPAddrFromAddrPort(from)
		}
	}
	t := &talk{}
	err := nl.Do(nl.Path(netns), func() (err error) { t.Conn, err = dialer.Dial(network, to.String()); return err })
	if err != nil {
		return nil, err
	}
	f.t.Cleanup(func() { _ = t.Close() })
	t.lines = bufio.NewReader(t.Conn)
	_ = t.SetDeadline(time.Now().Add(within))
	if network == "tcp4" {
		text, err := t.lines.ReadString('\n')
		if err != nil {
			_ = t.Close()
			return nil, err
		}
		t.seen, err = netip.ParseAddrPort(strings.TrimSpace(text))
		return t, err
	}
	var answer string
	for wait := 200 * time.Millisecond; ; wait *= 2 { // a datagram may be lost while neighbours are looked up
		if answer, err = t.datagram(1, min(wait, within)); err == nil || wait > within {
			break
		}
	}
	if err != nil {
		_ = t.Close()
		return nil, err
	}
	t.seen, err = netip.ParseAddrPort(answer)
	return t, err
}

// datagram sends one of size bytes and returns what the answer says.
func (t *talk) datagram(size int, within time.Duration) (string, error) {
	if _, err := t.Write(make([]byte, size)); err != nil {
		return "", err
	}
	_ = t.SetReadDeadline(time.Now().Add(within))
	buf := make([]byte, 65536)
	n, err := t.Read(buf)
	if err == nil && n < size {
		err = fmt.Errorf("%d bytes sent, %d came back", size, n)
	}
	return strings.TrimSpace(string(buf[:n])), err
}

// goOn checks that the connection still works, both ways and with many bytes.
func (t *talk) goOn(size int) error {
	_ = t.SetDeadline(time.Now().Add(patience))
	if t.RemoteAddr().Network() == "udp" {
		// Beyond a path's MTU they go as fragments.
		for _, n := range []int{1, min(size, 20_000), 1} {
			if answer, err := t.datagram(n, patience); err != nil || answer != t.seen.String() {
				return fmt.Errorf("%d bytes: was %s, is %q: %w", n, t.seen, answer, err)
			}
		}
		return nil
	}
	line := strings.Repeat(t.LocalAddr().String()+" to "+t.RemoteAddr().String()+"; ", 1+size/40) + "\n"
	sent := make(chan error, 1)
	go func() { _, err := io.WriteString(t, line); sent <- err }()
	got := make([]byte, len(line))
	if _, err := io.ReadFull(t.lines, got); err != nil {
		return fmt.Errorf("read back %d bytes: %w", len(line), err)
	}
	if string(got) != line {
		return errors.New("what came back is another's")
	}
	return <-sent
}

// dgram is a UDP socket with its descriptor's options.
type dgram struct {
	*net.UDPConn
	t testing.TB
}

func (f *fleet) dgram(netns string, to netip.AddrPort) dgram {
	f.t.Helper()
	var c net.Conn
	err := nl.Do(nl.Path(netns), func() (err error) { c, err = net.Dial("udp4", to.String()); return err })
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { _ = c.Close() })
	return dgram{c.(*net.UDPConn), f.t}
}

func (d dgram) control(fn func(fd int) error) error {
	raw, err := d.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = raw.Control(func(fd uintptr) { inner = fn(int(fd)) })
	return errors.Join(err, inner)
}

func (d dgram) set(option, value int) {
	d.t.Helper()
	if err := d.control(func(fd int) error { return unix.SetsockoptInt(fd, unix.IPPROTO_IP, option, value) }); err != nil {
		d.t.Fatal(err)
	}
}

// pathMTU sends datagrams of size bytes that may not be fragmented until the
// kernel has learned the path's MTU, and returns it.
func (d dgram) pathMTU(size int) int {
	d.t.Helper()
	d.set(unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	mtu := 0
	eventually(d.t, "a path MTU below the datagram's size", func() bool {
		_, err := d.Write(make([]byte, size))
		if err != nil && !errors.Is(err, unix.EMSGSIZE) && !errors.Is(err, unix.ECONNREFUSED) {
			d.t.Fatal(err)
		}
		err = d.control(func(fd int) (err error) { mtu, err = unix.GetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU); return err })
		if err != nil {
			d.t.Fatal(err)
		}
		return mtu < size
	})
	return mtu
}

const icmpTimeExceeded = 11 // RFC 792

// expires sends a datagram with this TTL and returns who says that it expired.
func (d dgram) expires(ttl int) netip.Addr {
	d.t.Helper()
	d.set(unix.IP_TTL, ttl)
	d.set(unix.IP_RECVERR, 1)
	var offender netip.Addr
	eventually(d.t, fmt.Sprintf("somebody says that TTL %d has expired", ttl), func() bool {
		if _, err := d.Write([]byte("short")); err != nil && !errors.Is(err, unix.EHOSTUNREACH) {
			d.t.Fatal(err)
		}
		oob := make([]byte, 512)
		n := 0
		err := d.control(func(fd int) (err error) {
			_, n, _, _, err = unix.Recvmsg(fd, make([]byte, 64), oob, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
			return err
		})
		if errors.Is(err, unix.EAGAIN) {
			return false
		}
		if err != nil {
			d.t.Fatal(err)
		}
		messages, err := unix.ParseSocketControlMessage(oob[:n])
		if err != nil {
			d.t.Fatal(err)
		}
		for _, m := range messages {
			// struct sock_extended_err (16 bytes; the ICMP type is the sixth),
			// then the offender's sockaddr_in.
			if m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_RECVERR && len(m.Data) >= 24 && m.Data[5] == icmpTimeExceeded {
				offender, _ = netip.AddrFromSlice(m.Data[20:24])
				return true
			}
		}
		return false
	})
	return offender
}
