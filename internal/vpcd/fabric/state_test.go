package fabric

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// snapshot is what the kernel has of a lab, line by line and sorted: without
// the numbers that the kernel gives (ifindex, inode), or with them.
func (l *lab) snapshot(numbers bool) []string {
	l.t.Helper()
	var out []string
	line := func(format string, args ...any) {
		out = append(out, strings.ReplaceAll(fmt.Sprintf(format, args...), "ul-"+l.name+"-", "ul-LAB-"))
	}
	c, err := l.read()
	if err != nil {
		l.t.Fatal(err)
	}
	guests, err := l.names.existing()
	if err != nil {
		l.t.Fatal(err)
	}
	inode := map[uint64]string{}
	for _, g := range guests {
		var st unix.Stat_t
		if err := unix.Stat(NetnsPath(g), &st); err != nil {
			l.t.Fatal(err)
		}
		inode[st.Ino] = g
		line("guest %s", g)
	}
	name := map[uint32]string{}
	for i, r := range c.enis {
		name[i] = string(eniID(r))
		guest := inode[r.Guest]
		if !numbers {
			r.Guest, r.Id = 0, [32]int8{}
		} else {
			name[i] += fmt.Sprint(" ", i)
		}
		line("eni %s in %s: %+v", name[i], guest, r)
	}
	for k, v := range c.mappings {
		i := v.Ifindex
		v.Ifindex = 0
		line("mapping %d %s: %s %+v", k.Vni, netip.AddrFrom16(k.Addr).Unmap(), name[i], v)
	}
	for k, v := range c.stations {
		i := v.Ifindex
		v.Ifindex = 0
		line("station %+v: %s %+v", k, name[i], v)
	}
	for k, v := range c.routes {
		i := v.Target.Ifindex
		v.Target.Ifindex = 0
		if i > 0 {
			line("route %+v to %s", k, name[i])
		}
		line("route %+v %+v", k, v)
	}
	var ids map[uint32]uint32
	if err := readMap(l.objs.Policies, &ids); err != nil {
		l.t.Fatal(err)
	}
	for i, version := range l.policies.seen {
		id := ids[i]
		if !numbers {
			id = 0
		}
		line("policy of %s: %x %d", name[i], version, id)
	}
	for k, version := range l.acls.seen {
		line("ACL of %+v: %x", k, version)
	}
	var index uint32
	var perCPU []byte
	for it := l.objs.Counts.Iterate(); it.Next(&index, &perCPU); {
		line("counters of %q", name[index])
	}
	devices, err := l.route.devices(false)
	if err != nil {
		l.t.Fatal(err)
	}
	for _, d := range devices {
		i := d.index
		if !numbers {
			i = 0
		}
		line("device %d %s %s mtu %d flags %x", i, d.name, d.alias, d.mtu, d.flags&(unix.IFF_UP|unix.IFF_NOARP))
	}
	pins, err := os.ReadDir(linkPin(l, ""))
	if err != nil {
		l.t.Fatal(err)
	}
	for _, p := range pins {
		line("pin %s", p.Name())
	}
	for id, t := range l.taps {
		for _, one := range t.links() {
			info, err := one.Info()
			if err != nil {
				l.t.Fatal(err)
			}
			n := fmt.Sprint(info.ID)
			if !numbers {
				n = ""
			}
			line("link %s of %s on %s", n, id, name[info.TCX().Ifindex])
		}
	}
	type answer struct {
		raw []byte
		err error
	}
	asked := map[string][2]chan answer{} // by guest: of each link, with its addresses, and the routes
	for _, g := range guests {
		answers := [2]chan answer{make(chan answer, 1), make(chan answer, 1)}
		asked[g] = answers
		for i, args := range [][]string{{"-n", g, "-j", "addr"}, {"-n", g, "-d", "-4", "-j", "route"}} {
			go func() {
				raw, err := exec.Command("ip", args...).Output()
				answers[i] <- answer{raw, err}
			}()
		}
	}
	for _, g := range guests {
		for i, what := range []string{"addr", "route"} {
			a := <-asked[g][i]
			raw, err := a.raw, a.err
			if err != nil {
				l.t.Fatal(err)
			}
			var list []map[string]any
			if err := json.Unmarshal(raw, &list); err != nil && len(raw) > 0 {
				l.t.Fatalf("ip -j %s: %v", what, err)
			}
			for _, e := range list {
				if !numbers {
					for _, k := range []string{"ifindex", "link_index", "link_netnsid"} {
						delete(e, k)
					}
				}
				// Carrier comes a moment later, IPv6 addresses by themselves.
				delete(e, "operstate")
				if flags, ok := e["flags"].([]any); ok {
					e["flags"] = slices.Contains(flags, any("UP"))
				}
				if addrs, ok := e["addr_info"].([]any); ok {
					e["addr_info"] = slices.DeleteFunc(addrs, func(a any) bool { return a.(map[string]any)["family"] == "inet6" })
				}
				line("in %s: %s %v", g, what, e)
			}
		}
	}
	slices.Sort(out)
	return out
}

// fresh returns the snapshot of a lab that is built at once, which is removed then.
func (l *lab) fresh(t *testing.T, c Config) (out []string) {
	t.Helper()
	t.Run("built at once", func(t *testing.T) { out = l.build(t, c) })
	if out == nil {
		t.FailNow()
	}
	return out
}

func (l *lab) build(t *testing.T, c Config) []string {
	t.Helper()
	f := newLab(t)
	raw, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	raw = []byte(strings.ReplaceAll(string(raw), "ul-"+l.name+"-", "ul-"+f.name+"-"))
	f.cfg = Config{}
	if err := json.Unmarshal(raw, &f.cfg); err != nil {
		t.Fatal(err)
	}
	f.set()
	return f.snapshot(false)
}

func testGroup(n int) vpc.SecurityGroupID {
	return vpc.SecurityGroupID(fmt.Sprintf("sg-%017x", n+1))
}

// TestPathIndependence goes from state to state at random, with accidents and
// restarts in between, and compares each with one built at once.
func TestPathIndependence(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	subnets := l.cfg.Subnets
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	config := func() Config {
		c := Config{Subnets: slices.Clone(subnets)}
		for g := range 3 {
			c.Groups = append(c.Groups, Group{ID: testGroup(g), Ingress: []Rule{{Protocol: 6, From: r.IntN(2), To: 80, Group: testGroup(r.IntN(3))}}})
		}
		if r.IntN(4) == 0 {
			c.Subnets[1].Table = "rtb-0000000000000000c"
		}
		for _, id := range []vpc.RouteTableID{tableMain, tableOther, "rtb-0000000000000000c"} {
			t := RouteTable{ID: id, Routes: []Route{{CIDR: netip.MustParsePrefix("10.0.0.0/16"), Local: true}}}
			for n := range r.IntN(3) {
				t.Routes = append(t.Routes, Route{CIDR: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(r.IntN(4)), byte(n + 1), 0}), 24), ENI: vpc.ENIID(fmt.Sprintf("eni-%017x", r.IntN(6)))})
			}
			c.Tables = append(c.Tables, t)
		}
		c.ACLs = []ACL{{ID: aclOpen}}
		for n := range r.IntN(3) {
			c.ACLs[0].Egress = append(c.ACLs[0].Egress, ACLEntry{Protocol: 6, From: n, To: 80, CIDR: netip.MustParsePrefix("10.0.0.0/8"), Allow: r.IntN(2) == 0})
		}
		for g := range 3 {
			if r.IntN(4) > 0 {
				c.Guests = append(c.Guests, Guest{Netns: fmt.Sprintf("ul-%s-svc-g%d", l.name, g)})
			}
		}
		if len(c.Guests) == 0 {
			return c
		}
		taken := map[string]bool{}
		for e := range 6 {
			s := c.Subnets[e%3]
			g := c.Guests[r.IntN(len(c.Guests))].Netns
			index := r.IntN(3)
			if k := fmt.Sprint(g, index); taken[k] || r.IntN(4) == 0 {
				continue
			} else {
				taken[k] = true
			}
			base := s.CIDR.Addr().As4()
			base[3] = byte(4 + e)
			i := Interface{
				ID: vpc.ENIID(fmt.Sprintf("eni-%017x", e)), VNI: s.VNI, Subnet: s.ID, MAC: net.HardwareAddr{2, 0xcc, 0, 0, byte(r.IntN(2)), byte(e)},
				Guest: g, DeviceIndex: index, Primary: netip.AddrFrom4(base), SourceDestCheck: r.IntN(2) == 0, Configure: index == 0,
				Addresses: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4(base), 32)},
			}
			for range r.IntN(3) {
				i.Groups = append(i.Groups, testGroup(r.IntN(3)))
			}
			for range r.IntN(3) {
				base[3] = byte(16 + 16*(r.IntN(12)))
				p := netip.PrefixFrom(netip.AddrFrom4(base), 28+4*r.IntN(2))
				if k := fmt.Sprint(s.ID, base); !taken[k] {
					taken[k] = true
					i.Addresses = append(i.Addresses, p)
				}
			}
			c.Interfaces = append(c.Interfaces, i)
		}
		return c
	}
	accidents := []func(){
		func() { l.shut(); l.open() },
		func() { // a fabric end vanishes
			if d, err := l.route.devices(false); err == nil && len(d) > 0 {
				if err := l.route.remove(d[0].index); err != nil {
					t.Fatal(err)
				}
			}
		},
		func() { // a guest loses its name and its namespace
			if len(l.cfg.Guests) > 0 {
				if err := nl.DeleteNamed(l.cfg.Guests[0].Netns); err != nil {
					t.Fatal(err)
				}
			}
		},
		func() { // somebody detaches a program
			for _, tap := range l.taps {
				_ = tap.in.Unpin()
				if err := tap.close(); err != nil {
					t.Fatal(err)
				}
				break
			}
			l.shut()
			l.open()
		},
		func() { // a process is killed when a pair stands and its record does not
			c, err := l.read()
			if err != nil {
				t.Fatal(err)
			}
			for i, r := range c.enis {
				r.Flags &^= flagReady
				if err := l.objs.Enis.Put(i, r); err != nil {
					t.Fatal(err)
				}
				break
			}
			l.shut()
			l.open()
		},
		func() { // maps that say something else
			c, err := l.read()
			if err != nil {
				t.Fatal(err)
			}
			for k, v := range c.mappings {
				k.Vni = 77
				if err := l.objs.Mappings.Put(k, v); err != nil {
					t.Fatal(err)
				}
			}
			for k := range c.routes {
				if err := l.objs.Routes.Delete(k); err != nil {
					t.Fatal(err)
				}
			}
			l.shut()
			l.open()
		},
		func() { // a fabric end is changed by hand
			for _, c := range []string{"down", "mtu 1500", "arp on", "alias nobody"} {
				d, err := l.route.devices(false)
				if err != nil {
					t.Fatal(err)
				}
				if len(d) == 0 {
					return
				}
				args := append([]string{"-n", l.names.fabric(), "link", "set", d[r.IntN(len(d))].name}, strings.Fields(c)...)
				if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
					t.Fatalf("ip %v: %s", args, out)
				}
			}
		},
	}
	for step := range 40 {
		if a := r.IntN(2 * len(accidents)); a < len(accidents) {
			accidents[a]()
		}
		if r.IntN(5) > 0 {
			l.cfg = config()
		}
		var want []string
		var both sync.WaitGroup
		both.Go(func() { want = l.fresh(t, l.cfg) })
		l.set()
		reached := l.snapshot(false)
		both.Wait()
		if diff := cmp.Diff(want, reached); diff != "" {
			t.Fatalf("step %d: (-built at once +reached)\n%s", step, diff)
		}
	}
}

// TestSetAgainChangesNothing compares the numbers too: nothing was made anew.
func TestSetAgainChangesNothing(t *testing.T) {
	l := newLab(t)
	l.add(subnetA, "10.0.0.4", "10.0.0.32/28")
	l.add(subnetB, "10.0.1.4")
	l.add(subnetOther, "10.0.0.4")
	l.set()
	before := l.snapshot(true)
	l.set()
	if diff := cmp.Diff(before, l.snapshot(true)); diff != "" {
		t.Errorf("second Set (-before +after)\n%s", diff)
	}
	l.shut()
	l.open()
	if diff := cmp.Diff(before, l.snapshot(true)); diff != "" {
		t.Errorf("Open again (-before +after)\n%s", diff)
	}
	l.set()
	if diff := cmp.Diff(before, l.snapshot(true)); diff != "" {
		t.Errorf("Set after Open (-before +after)\n%s", diff)
	}
}

// TestAdoptAfterKill kills the process that made the fabric, twice, while a
// stream of datagrams flows: none is lost, and the counters go on.
func TestAdoptAfterKill(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetB, "10.0.1.4")
	l.set() // in this process, so that the guests can be prepared
	before := l.snapshot(true)
	l.shut()

	to := netip.AddrPortFrom(b.addr, 9000)
	var in, out *net.UDPConn
	b.do(func() (err error) { in, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(to)); return err })
	defer in.Close()
	if raw, err := in.SyscallConn(); err != nil {
		t.Fatal(err)
	} else {
		_ = raw.Control(func(fd uintptr) {
			if err := unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20); err != nil {
				t.Errorf("enlarge receive buffer: %v", err)
			}
		})
	}
	a.do(func() (err error) { out, err = net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(to)); return err })
	defer out.Close()

	stop := make(chan struct{})
	sent := make(chan uint64, 1)
	go func() {
		var n uint64
		tick := time.NewTicker(100 * time.Microsecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				sent <- n
				return
			case <-tick.C:
			}
			for range 8 { // whatever the timer's grain is
				if _, err := out.Write(binary.BigEndian.AppendUint64(nil, n)); err != nil {
					t.Errorf("send: %v", err)
					sent <- n
					return
				}
				n++
			}
		}
	}()
	received := make(chan uint64, 1024)
	go func() {
		defer close(received)
		buf := make([]byte, 64)
		for {
			n, err := in.Read(buf)
			if err != nil {
				return
			}
			if n == 8 {
				received <- binary.BigEndian.Uint64(buf)
			}
		}
	}()
	var got uint64
	seen := map[uint64]bool{}
	flows := func(n int) { // n more datagrams arrive
		t.Helper()
		deadline := time.After(2 * patience)
		for range n {
			select {
			case s := <-received:
				if !seen[s] {
					seen[s] = true
					got++
				}
			case <-deadline:
				t.Fatalf("the stream stopped after %d datagrams", got)
			}
		}
	}
	flows(500)
	for range 3 {
		p := l.spawn()
		p.set(t, l.cfg)
		flows(1000)
		p.set(t, l.cfg)
		p.kill()
		flows(1000)
	}
	l.open()
	l.set()
	flows(500)
	close(stop)
	total := <-sent
	flows(int(total - got))
	if got != total {
		t.Errorf("%d of %d datagrams arrived", got, total)
	}
	t.Logf("%d datagrams sent and received over three kills", total)
	if c := b.counters(); c.RxPackets < total {
		t.Errorf("%d packets counted, %d sent: the counters did not go on", c.RxPackets, total)
	}
	if diff := cmp.Diff(before, l.snapshot(true)); diff != "" {
		t.Errorf("after kills (-before +after)\n%s", diff)
	}
}

// TestKilledInSet kills a process at some moment of a Set; the next one repairs
// what it left.
func TestKilledInSet(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	empty := l.cfg
	for i := range 8 {
		l.add(subnetA, fmt.Sprintf("10.0.0.%d", 4+i))
	}
	full := l.cfg
	want := l.fresh(t, full)
	l.shut()
	for _, delay := range []time.Duration{0, 1, 2, 3, 5, 8, 12, 20} {
		p := l.spawn()
		p.set(t, empty)
		if err := p.config.Encode(full); err != nil {
			t.Fatal(err)
		}
		<-time.After(delay * time.Millisecond) // the moment, not a wait for something
		p.kill()
		l.open()
		l.cfg = full
		l.set()
		if diff := cmp.Diff(want, l.snapshot(false)); diff != "" {
			t.Fatalf("killed after %d ms (-built at once +repaired)\n%s", delay, diff)
		}
		l.shut()
	}
	l.open()
}

func TestDestroyLeavesNothing(t *testing.T) {
	l := newLab(t)
	h := l.add(subnetA, "10.0.0.4")
	l.add(subnetB, "10.0.1.4")
	l.set()
	// A process that lives on in the guest holds its namespace.
	sleeper := exec.Command("ip", "netns", "exec", h.ns, "sleep", "60")
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sleeper.Process.Kill(); _ = sleeper.Wait() }()
	l.shut()
	o := labOptions(l.name)
	for range 2 { // again: there is nothing left to remove
		if err := Destroy(o); err != nil {
			t.Fatal(err)
		}
		names, err := os.ReadDir(nl.NetnsDir)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			if strings.HasPrefix(n.Name(), "ul-"+l.name+"-") {
				t.Errorf("%s is left", n.Name())
			}
		}
		pins, err := os.ReadDir(o.BPFFS)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range pins {
			t.Errorf("pin %s is left", p.Name())
		}
	}
}

// TestOtherLabsAreLeftAlone destroys a lab beside another.
func TestOtherLabsAreLeftAlone(t *testing.T) {
	l, other := newLab(t), newLab(t)
	a := other.add(subnetA, "10.0.0.4")
	b := other.add(subnetA, "10.0.0.5")
	other.set()
	l.add(subnetA, "10.0.0.4")
	l.set()
	l.shut()
	if err := Destroy(labOptions(l.name)); err != nil {
		t.Fatal(err)
	}
	a.reaches(b)
}

// TestOtherLayout opens a lab that another version of the package left.
func TestOtherLayout(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetB, "10.0.1.4")
	l.set()
	l.shut()
	dir := labOptions(l.name).BPFFS
	if err := os.Rename(dir+"/"+layout, dir+"/v0"); err != nil {
		t.Fatal(err)
	}
	l.open()
	l.set()
	a.reaches(b)
	if _, err := os.Stat(dir + "/v0"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the other layout's pins: %v", err)
	}
}

func TestCancelledSet(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetA, "10.0.0.5")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := l.Set(ctx, l.cfg); !errors.Is(err, context.Canceled) {
		t.Errorf("Set = %v", err)
	}
	l.set()
	a.reaches(b)
}

// TestNamespaceLost takes the fabric's namespace away from under its pins.
func TestNamespaceLost(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetB, "10.0.1.4")
	l.set()
	l.shut()
	if err := nl.DeleteNamed(namespaces{l.name}.fabric()); err != nil {
		t.Fatal(err)
	}
	l.open()
	// The kernel takes a namespace's devices down in its own time, and until
	// then the guests' ends are there.
	l.setWithin(patience)
	a.reaches(b)
	if diff := cmp.Diff(l.fresh(t, l.cfg), l.snapshot(false)); diff != "" {
		t.Errorf("(-built at once +repaired)\n%s", diff)
	}
}

// TestPinsLost takes the pins away from a standing fabric.
func TestPinsLost(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetB, "10.0.1.4")
	l.set()
	l.shut()
	if err := os.RemoveAll(labOptions(l.name).BPFFS); err != nil {
		t.Fatal(err)
	}
	l.open()
	l.set()
	a.reaches(b)
}

// setWithin repeats Set until it succeeds.
func (l *lab) setWithin(limit time.Duration) {
	l.t.Helper()
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for deadline := time.Now().Add(limit); ; <-again.C {
		err := l.Set(context.Background(), l.cfg)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			l.t.Fatal(err)
		}
	}
}
