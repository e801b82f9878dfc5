package nl

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/testenv"
)

// namespaces makes two, and opens a socket in each.
func namespaces(t *testing.T) (names [2]string, files [2]*os.File, conns [2]*Conn) {
	t.Helper()
	testenv.Require(t, "root")
	for i := range names {
		names[i] = fmt.Sprintf("ul-tnl%d-rt%d", os.Getpid(), i)
		_ = DeleteNamed(names[i])
		if err := NewNamed(names[i]); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = DeleteNamed(names[i]) })
		var err error
		if files[i], err = os.Open(Path(names[i])); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = files[i].Close() })
		if conns[i], err = DialIn(files[i]); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conns[i].Close() })
	}
	return names, files, conns
}

// ip asks the ip command, which reads the kernel by its own code.
func ip(t *testing.T, netns string, args ...string) []map[string]any {
	t.Helper()
	out, err := exec.Command("ip", append([]string{"-j", "-d", "-n", netns}, args...)...).Output()
	if err != nil {
		t.Fatalf("ip %v: %v", args, err)
	}
	var rows []map[string]any
	if len(strings.TrimSpace(string(out))) == 0 {
		return nil
	}
	if err := json.Unmarshal(out, &rows); err != nil {
		t.Fatalf("ip %v: %v\n%s", args, err, out)
	}
	return slices.DeleteFunc(rows, func(r map[string]any) bool { return len(r) == 0 })
}

var (
	hostMAC = net.HardwareAddr{2, 0, 0, 0, 0, 1}
	peerMAC = net.HardwareAddr{2, 0, 0, 0, 0, 2}
	addr    = netip.MustParseAddr("10.1.2.3")
)

// What is sent is what the ip command sees, and what the readers read.
func TestBatch(t *testing.T) {
	names, files, conns := namespaces(t)
	const index, table = 1 << 21, 30060
	var b Batch
	b.VethAdd(Veth{
		Name: "ulhost", Index: index, MAC: hostMAC, MTU: 1400, Group: 77, NoARP: true,
		PeerNetns: files[1], PeerName: "eth0", PeerIndex: index, PeerMAC: peerMAC, PeerMTU: 1300,
	})
	b.LinkQuiet(index, "for people")
	b.LinkMTU(index, 1401)
	b.LinkUp(index)
	b.AddrAdd(index, netip.MustParsePrefix("192.0.2.1/24"))
	b.NeighSet(index, addr, peerMAC)
	onLink := Route{Dst: netip.PrefixFrom(addr, 32), Index: index, Table: table, Protocol: 0x75}
	via := Route{Dst: netip.MustParsePrefix("10.2.0.0/16"), Gateway: addr, Index: index, Table: table, Protocol: 0x75, OnLink: true}
	b.RouteSet(onLink)
	b.RouteSet(via)
	b.RouteSet(via) // again: replaces itself
	plain := Rule{Priority: 20, Table: table, Protocol: 0x75}
	marked := Rule{Priority: 31, Table: table + 1, Mark: 2, Mask: 0x3046, Protocol: 0x75}
	b.RuleAdd(plain)
	b.RuleAdd(marked)
	if err := conns[0].Exec(&b); err != nil {
		t.Fatal(err)
	}

	l, err := conns[0].LinkByName("ulhost")
	if err != nil {
		t.Fatal(err)
	}
	want := Link{Index: index, Name: "ulhost", MAC: hostMAC, MTU: 1401, Group: 77, Alias: "for people", Kind: "veth", Up: true, NoARP: true}
	if diff := cmp.Diff(want, l); diff != "" {
		t.Errorf("LinkByName (-want +got):\n%s", diff)
	}
	byIndex, err := conns[0].LinkByIndex(index)
	if diff := cmp.Diff(want, byIndex); diff != "" || err != nil {
		t.Errorf("LinkByIndex (-want +got): %v\n%s", err, diff)
	}
	all, err := conns[0].Links()
	if err != nil || len(all) < 2 || !slices.ContainsFunc(all, func(l Link) bool { return l.Name == "ulhost" }) {
		t.Errorf("Links: %+v, %v", all, err)
	}
	peer, err := conns[1].LinkByName("eth0")
	if err != nil || peer.Index != index || peer.MTU != 1300 || peer.MAC.String() != peerMAC.String() || peer.Up {
		t.Errorf("the peer: %+v, %v", peer, err)
	}
	for _, c := range []*Conn{conns[0], conns[1]} {
		if _, err := c.LinkByName("nobody"); !errors.Is(err, unix.ENODEV) {
			t.Errorf("LinkByName of none: %v", err)
		}
		if _, err := c.LinkByIndex(1 << 22); !errors.Is(err, unix.ENODEV) {
			t.Errorf("LinkByIndex of none: %v", err)
		}
	}
	seen := ip(t, names[0], "link", "show", "ulhost")[0]
	for key, want := range map[string]any{"ifalias": "for people", "mtu": 1401.0, "group": "77", "address": hostMAC.String(), "inet6_addr_gen_mode": "none", "ifindex": float64(index)} {
		if seen[key] != want {
			t.Errorf("ip link: %s is %v, want %v", key, seen[key], want)
		}
	}

	routes, err := conns[0].Routes(table)
	byDst := func(a, b Route) int { return strings.Compare(a.Dst.String(), b.Dst.String()) }
	slices.SortFunc(routes, byDst)
	if diff := cmp.Diff([]Route{onLink, via}, routes, cmp.Comparer(func(a, b Route) bool { return a == b })); diff != "" || err != nil {
		t.Errorf("Routes (-want +got): %v\n%s", err, diff)
	}
	if rows := ip(t, names[0], "route", "show", "table", "30060"); len(rows) != 2 || rows[0]["protocol"] != "117" || rows[0]["scope"] != "link" {
		t.Errorf("ip route: %v", rows)
	}
	if none, err := conns[0].Routes(12345); err != nil || len(none) != 0 {
		t.Errorf("Routes of no table: %v, %v", none, err)
	}
	rules, err := conns[0].Rules()
	if err != nil || !slices.Contains(rules, plain) || !slices.Contains(rules, marked) {
		t.Errorf("Rules: %v, %v", rules, err)
	}
	if rows := ip(t, names[0], "rule", "show", "pref", "31"); len(rows) != 1 || rows[0]["fwmark"] != "0x2" || rows[0]["fwmask"] != "0x3046" || rows[0]["protocol"] != "117" {
		t.Errorf("ip rule: %v", rows)
	}
	addrs, err := conns[0].Addrs()
	if err != nil || !slices.Contains(addrs, Addr{Index: index, Prefix: netip.MustParsePrefix("192.0.2.1/24")}) {
		t.Errorf("Addrs: %v, %v", addrs, err)
	}
	neighs, err := conns[0].Neighs()
	if err != nil || !slices.ContainsFunc(neighs, func(n Neigh) bool {
		return n.Index == index && n.Addr == addr && n.MAC.String() == peerMAC.String() && n.State == unix.NUD_PERMANENT
	}) {
		t.Errorf("Neighs: %+v, %v", neighs, err)
	}

	// With the peer up it has its carrier.
	var up Batch
	up.LinkUp(index)
	if err := conns[1].Exec(&up); err != nil {
		t.Fatal(err)
	}
	ready := false
	for range 1000 {
		if l, err := conns[0].LinkByIndex(index); err != nil || l.Ready {
			ready = err == nil
			break
		}
		runtime.Gosched()
	}
	if !ready {
		t.Error("no carrier with both ends up")
	}

	// All of it goes again, twice.
	for range 2 {
		var b Batch
		b.RuleDelete(plain)
		b.Tolerate(unix.ENOENT)
		b.RuleDelete(marked)
		b.Tolerate(unix.ENOENT)
		for _, r := range []Route{onLink, via} {
			b.RouteDelete(r)
			b.Tolerate(unix.ESRCH, unix.ENODEV)
		}
		b.LinkDelete("ulhost")
		b.Tolerate(unix.ENODEV)
		if err := conns[0].Exec(&b); err != nil {
			t.Error(err)
		}
	}
	if _, err := conns[1].LinkByName("eth0"); !errors.Is(err, unix.ENODEV) {
		t.Errorf("the peer outlives its other end: %v", err)
	}
}

// The kernel goes on after a refusal; the error names each refused request.
func TestBatchErrors(t *testing.T) {
	_, _, conns := namespaces(t)
	var b Batch
	b.LinkUp(4711)
	b.RuleAdd(Rule{Priority: 20, Table: 1234})
	b.AddrAdd(4711, netip.PrefixFrom(addr, 32))
	b.AddrAdd(4711, netip.PrefixFrom(addr, 32))
	b.Tolerate(unix.ENODEV)
	err := conns[0].Exec(&b)
	var refused *OpError
	if !errors.Is(err, unix.ENODEV) || !errors.As(err, &refused) || refused.Op != "set link 4711 up" {
		t.Errorf("Exec: %v", err)
	}
	var joined interface{ Unwrap() []error }
	if !errors.As(err, &joined) || len(joined.Unwrap()) != 2 {
		t.Errorf("Exec reports %v, want two refusals", err)
	}
	if rules, err := conns[0].Rules(); err != nil || !slices.Contains(rules, Rule{Priority: 20, Table: 1234}) {
		t.Errorf("the request between two refused ones was not carried out: %v, %v", rules, err)
	}
	// With the kernel's words, where it has some.
	var bad Batch
	bad.RouteSet(Route{Dst: netip.MustParsePrefix("10.0.0.0/8"), Gateway: addr, Index: 1, Table: 5})
	if err := conns[0].Exec(&bad); !errors.As(err, &refused) || refused.Text == "" {
		t.Errorf("a gateway out of reach: %v", err)
	}
	var empty Batch
	if err := conns[0].Exec(&empty); err != nil {
		t.Error(err)
	}
}

// More requests than the kernel queues answers to at once.
func TestLargeBatch(t *testing.T) {
	_, _, conns := namespaces(t)
	var b Batch
	const n = 1000
	for i := range n {
		b.RuleAdd(Rule{Priority: uint32(100 + i), Table: 1234})
	}
	b.LinkUp(4711)
	var refused *OpError
	if err := conns[0].Exec(&b); !errors.As(err, &refused) || refused.Op != "set link 4711 up" {
		t.Errorf("Exec: %v", err)
	}
	rules, err := conns[0].Rules()
	if err != nil || len(rules) < n {
		t.Errorf("%d rules, want %d and the kernel's own: %v", len(rules), n, err)
	}
}

// Dumps that run into changes are whole nevertheless.
func TestDumpUnderChange(t *testing.T) {
	_, files, conns := namespaces(t)
	const keep = 40
	var b Batch
	for i := range keep {
		b.VethAdd(Veth{Name: fmt.Sprintf("k%d", i), MAC: hostMAC, MTU: 1500, PeerNetns: files[1], PeerName: fmt.Sprintf("k%d", i), PeerMAC: peerMAC, PeerMTU: 1500})
	}
	if err := conns[0].Exec(&b); err != nil {
		t.Fatal(err)
	}
	changer, err := DialIn(files[0])
	if err != nil {
		t.Fatal(err)
	}
	defer changer.Close()
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range 20 {
			var b Batch
			b.VethAdd(Veth{Name: "change", MAC: hostMAC, MTU: 1500, PeerNetns: files[1], PeerName: "change", PeerMAC: peerMAC, PeerMTU: 1500})
			b.LinkDelete("change")
			if err := changer.Exec(&b); err != nil {
				t.Errorf("change %d: %v", i, err)
			}
		}
	})
	for range 200 {
		links, err := conns[0].Links()
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, l := range links {
			if strings.HasPrefix(l.Name, "k") {
				n++
			}
		}
		if n != keep {
			t.Fatalf("a dump has %d of %d links", n, keep)
		}
	}
	wg.Wait()
}

func TestLinkDeleteGroup(t *testing.T) {
	_, files, conns := namespaces(t)
	var b Batch
	for i := range 3 {
		name := fmt.Sprintf("g%d", i)
		b.VethAdd(Veth{Name: name, MAC: hostMAC, MTU: 1500, Group: 5, PeerNetns: files[1], PeerName: name, PeerMAC: peerMAC, PeerMTU: 1500})
	}
	b.LinkGroup("g0", 6)
	b.LinkGroup("g1", 6)
	b.LinkGroup("nobody", 6)
	b.Tolerate(unix.ENODEV)
	b.LinkDeleteGroup(6)
	b.LinkDeleteGroup(6)
	b.Tolerate(unix.ENODEV)
	if err := conns[0].Exec(&b); err != nil {
		t.Fatal(err)
	}
	for _, c := range conns {
		for name, want := range map[string]error{"g0": unix.ENODEV, "g1": unix.ENODEV, "g2": nil} {
			if _, err := c.LinkByName(name); !errors.Is(err, want) {
				t.Errorf("%s: %v, want %v", name, err, want)
			}
		}
	}
}

func TestNetnsCookie(t *testing.T) {
	_, files, conns := namespaces(t)
	var cookies []uint64
	again, err := DialIn(files[0])
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	for _, c := range []*Conn{conns[0], conns[1], again} {
		cookie, err := c.NetnsCookie()
		if err != nil {
			t.Fatal(err)
		}
		cookies = append(cookies, cookie)
	}
	if cookies[0] == 0 || cookies[0] == cookies[1] || cookies[0] != cookies[2] {
		t.Errorf("cookies of two namespaces and the first again: %v", cookies)
	}
}

func FuzzMessages(f *testing.F) {
	var b Batch
	b.LinkQuiet(7, "alias")
	b.RouteSet(Route{Dst: netip.PrefixFrom(addr, 32), Index: 7, Table: 1})
	b.RuleAdd(Rule{Priority: 20, Table: 3, Mark: 1, Mask: 1})
	f.Add(b.buf)
	f.Add([]byte{20, 0, 0, 0, 2, 0, 0, 3, 1, 0, 0, 0, 0, 0, 0, 0, 0xf5, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, data []byte) {
		_ = eachMessage(data, func(m message) error {
			_, _ = m.failure()
			_, _, _ = parseLink(m.body)
			_, _, _ = parseRoute(m.body)
			_, _, _ = parseRule(m.body)
			_, _, _ = parseAddr(m.body)
			_, _, _ = parseNeigh(m.body)
			_, _, _ = parseFilter(m.body)
			return nil
		})
	})
}
