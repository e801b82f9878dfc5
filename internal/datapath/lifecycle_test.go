package datapath

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	"github.com/underlay-cni/underlay/internal/vpc"
)

var ctx = context.Background()

var sameAddr = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func TestLifeOfAnEndpoint(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	ns := w.netns("pod")
	netns := openNetns(t, ns)
	in := endpoint(1, ns)
	e, err := d.Add(ctx, in, netns)
	if err != nil {
		t.Fatal(err)
	}
	if e.State != Live || e.NetnsCookie == 0 || e.HostIfIndex < firstIndex || e.PeerIfIndex == 0 || e.MTU != DefaultMTU ||
		e.HostIfName != hostIfName(in.key()) || e.MAC.String() != "02:75:0a:00:01:81" || time.Since(e.Created) > time.Minute || !e.Released.IsZero() {
		t.Errorf("Add filled in %+v", e)
	}

	// The same again, and the same address for another.
	var exists *ExistsError
	if _, err := d.Add(ctx, in, netns); !errors.As(err, &exists) || !errors.Is(err, ErrExists) {
		t.Errorf("the same Add again: %v", err)
	} else if diff := cmp.Diff(e, exists.Endpoint, sameAddr); diff != "" {
		t.Errorf("ExistsError (-want +got):\n%s", diff)
	}
	other := endpoint(1, ns)
	other.ContainerID, other.IfName = "other", "eth1"
	var inUse *AddressInUseError
	if _, err := d.Add(ctx, other, netns); !errors.As(err, &inUse) || inUse.Endpoint.ContainerID != in.ContainerID {
		t.Errorf("another endpoint with the same address: %v", err)
	}
	assertNothingLeft(t, w, d, 1)

	// A restart knows it as it was.
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = w.open(Options{})
	all, err := d.Endpoints()
	if err != nil {
		t.Fatal(err)
	}
	// The clock's offset is measured anew by each process.
	nearly := cmp.Comparer(func(a, b time.Time) bool { return a.Sub(b).Abs() < 5*time.Millisecond })
	if diff := cmp.Diff([]Endpoint{e}, all, sameAddr, nearly); diff != "" {
		t.Errorf("Endpoints after a restart (-want +got):\n%s", diff)
	}
	if _, err := d.Add(ctx, in, netns); !errors.Is(err, ErrExists) {
		t.Errorf("the same Add after a restart: %v", err)
	}

	// Released: a tombstone holds the address, over a restart too.
	if err := d.Forget(e.Addr); !errors.Is(err, ErrAddressInUse) {
		t.Errorf("Forget of a live endpoint: %v", err)
	}
	gone, err := d.Delete(ctx, in.ContainerID, in.IfName)
	if err != nil || gone.State != Tombstone || time.Since(gone.Released) > time.Minute {
		t.Fatalf("Delete: %+v, %v", gone, err)
	}
	assertNothingLeft(t, w, d, 0)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = w.open(Options{})
	again, err := d.Delete(ctx, in.ContainerID, in.IfName)
	if err != nil {
		t.Errorf("Delete of a tombstone: %v", err)
	}
	if diff := cmp.Diff(gone, again, sameAddr, nearly); diff != "" {
		t.Errorf("the tombstone changed (-want +got):\n%s", diff)
	}
	if _, err := d.Add(ctx, in, netns); !errors.Is(err, ErrAddressInUse) {
		t.Errorf("Add with a tombstone's address: %v", err)
	}
	if err := d.Check(ctx, in, netns); !errors.Is(err, ErrNotFound) {
		t.Errorf("Check of a tombstone: %v", err)
	}
	// The container may have another address meanwhile.
	next := endpoint(2, ns)
	next.ContainerID = in.ContainerID
	if _, err := d.Add(ctx, next, netns); err != nil {
		t.Error(err)
	}
	if gone, err := d.Delete(ctx, in.ContainerID, in.IfName); err != nil || gone.Addr != next.Addr {
		t.Errorf("Delete of the second: %+v, %v", gone, err)
	}
	for range 2 {
		for _, a := range []netip.Addr{in.Addr, next.Addr} {
			if err := d.Forget(a); err != nil {
				t.Error(err)
			}
		}
	}
	if _, err := d.Delete(ctx, in.ContainerID, in.IfName); !errors.Is(err, ErrNotFound) {
		t.Errorf("Delete of what is forgotten: %v", err)
	}
	if _, err := d.Add(ctx, in, netns); err != nil {
		t.Errorf("Add after Forget: %v", err)
	}
}

func TestAddRefuses(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	ns := w.netns("pod")
	w.ip(ns, "link add eth0 type veth peer name eth9")
	netns := openNetns(t, ns)
	for _, tt := range []struct {
		name, want string
		change     func(*Endpoint) *os.File
	}{
		{"taken name", "interface eth0 already", func(*Endpoint) *os.File { return netns }},
		{"node's own namespace", "node's own", func(*Endpoint) *os.File { return openNetns(t, w.node) }},
		{"no container", "must be set", func(e *Endpoint) *os.File { e.ContainerID = ""; return netns }},
		{"long name", "longer than", func(e *Endpoint) *os.File { e.IfName = "interface-zero-0"; return netns }},
		{"IPv6", "not an IPv4", func(e *Endpoint) *os.File { e.Addr = netip.MustParseAddr("fd00::1"); return netns }},
		{"no ENI index", "within 1..31", func(e *Endpoint) *os.File { e.ENIIndex = 0; return netns }},
		{"large ENI index", "within 1..31", func(e *Endpoint) *os.File { e.ENIIndex = 32; return netns }},
		{"long container ID", "container ID is 129 bytes", func(e *Endpoint) *os.File { e.ContainerID = strings.Repeat("c", 129); return netns }},
		{"not a namespace", "enter network namespace", func(*Endpoint) *os.File {
			f, err := os.Open("/dev/null")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = f.Close() })
			return f
		}},
	} {
		e := endpoint(1, ns)
		f := tt.change(&e)
		_, err := d.Add(ctx, e, f)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want an error with %q", tt.name, err, tt.want)
		}
		if tt.name == "taken name" && !errors.Is(err, ErrInterfaceTaken) {
			t.Errorf("%s: not ErrInterfaceTaken", tt.name)
		}
		assertNothingLeft(t, w, d, 0)
	}
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	e := endpoint(1, ns)
	e.IfName = "eth1"
	if _, err := d.Add(canceled, e, netns); !errors.Is(err, context.Canceled) {
		t.Errorf("Add with a canceled context: %v", err)
	}
	assertNothingLeft(t, w, d, 0)
}

// Somebody has the very ifindex that Add takes, on the node or in the pod.
func TestAddTakesAnotherIndex(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	ns := w.netns("pod")
	d.mu.Lock()
	d.next = lastIndex - 1
	d.mu.Unlock()
	w.ip(ns, fmt.Sprintf("link add p0 index %d type veth peer name p1 index %d netns %s", lastIndex-1, lastIndex, w.node))
	e, err := d.Add(ctx, endpoint(1, ns), openNetns(t, ns))
	if err != nil || e.HostIfIndex != firstIndex {
		t.Errorf("Add took %d, want %d: %v", e.HostIfIndex, firstIndex, err)
	}
}

// When Add returns, the pod's very first packet passes, and its answer too.
func TestFirstPacketPasses(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	w.echo(w.wire, farIP)
	first := w.addPod(d, 100)
	if w.ask(first.ns, first.Addr, farIP, 20) == "" { // the wire is warm
		t.Fatal("no answer")
	}
	lost := 0
	const pods = 30
	for n := range pods {
		ns := w.netns("pod")
		netns := openNetns(t, ns)
		c := w.udp(ns, netip.IPv4Unspecified(), 0)
		if _, err := d.Add(ctx, endpoint(n, ns), netns); err != nil {
			t.Fatal(err)
		}
		if _, err := c.WriteToUDPAddrPort([]byte("first"), netip.AddrPortFrom(farIP, echoPort)); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(time.Second))
		if _, err := c.Read(make([]byte, 64)); err != nil {
			lost++
		}
	}
	if lost != 0 {
		t.Errorf("%d of %d pods lost their first packet or its answer", lost, pods)
	}
}

// A device of ours that no record owns gives way; one of somebody else's does not.
func TestAddAndLeftovers(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	ns := w.netns("pod")
	e := endpoint(1, ns)
	name := hostIfName(e.key())
	w.ip(w.node, "link add "+name+" type veth peer name other")
	if _, err := d.Add(ctx, e, openNetns(t, ns)); !errors.Is(err, ErrInterfaceTaken) || !strings.Contains(err.Error(), "not a pod's") {
		t.Errorf("Add onto another's device: %v", err)
	}
	w.ip(w.node, "link set "+name+" group 30060")
	if _, err := d.Add(ctx, e, openNetns(t, ns)); err != nil {
		t.Errorf("Add onto a leftover: %v", err)
	}
}

func BenchmarkAdd(b *testing.B) {
	w := newWorld(b)
	w.quiet = true
	d := w.open(Options{})
	ns := w.netns("pod")
	netns := openNetns(b, ns)
	e := endpoint(1, ns)
	for b.Loop() {
		if _, err := d.Add(ctx, e, netns); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if _, err := d.Delete(ctx, e.ContainerID, e.IfName); err != nil {
			b.Fatal(err)
		}
		if err := d.Forget(e.Addr); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

func BenchmarkDelete(b *testing.B) {
	w := newWorld(b)
	w.quiet = true
	d := w.open(Options{})
	ns := w.netns("pod")
	netns := openNetns(b, ns)
	e := endpoint(1, ns)
	for b.Loop() {
		b.StopTimer()
		if _, err := d.Add(ctx, e, netns); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		if _, err := d.Delete(ctx, e.ContainerID, e.IfName); err != nil {
			b.Fatal(err)
		}
		if err := d.Forget(e.Addr); err != nil {
			b.Fatal(err)
		}
	}
}

func TestDeleteTolerates(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	a, b := w.addPod(d, 1), w.addPod(d, 2)
	w.ip(w.node, "link del "+a.HostIfName)
	w.ip(b.ns, "link del eth0")
	if err := d.hooks.detach(b.device()); err != nil {
		t.Fatal(err)
	}
	for _, p := range []pod{a, b} {
		if _, err := d.Delete(ctx, p.ContainerID, p.IfName); err != nil {
			t.Error(err)
		}
	}
	assertNothingLeft(t, w, d, 0)
}

func TestCheckSays(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	for i, tt := range []struct {
		want   string
		damage func(p pod)
	}{
		{"lacks address", func(p pod) { w.ip(p.ns, "addr flush dev eth0") }},
		{"the pod's eth0 is down", func(p pod) { w.ip(p.ns, "link set eth0 down") }},
		{"has MAC", func(p pod) { w.ip(p.ns, "link set eth0 address 02:00:00:00:00:99") }},
		{"the pod lacks route 0.0.0.0/0", func(p pod) { w.ip(p.ns, "route del default") }},
		{"neighbour 169.254.1.1", func(p pod) { w.ip(p.ns, "neigh del 169.254.1.1 dev eth0") }},
		{"in the pod: get link eth0", func(p pod) { w.ip(p.ns, "link set eth0 down"); w.ip(p.ns, "link set eth0 name eth7") }},
		{"is down", func(p pod) { w.ip(w.node, "link set "+p.HostIfName+" down") }},
		{"the node lacks route", func(p pod) { w.ip(w.node, "route flush table 30060") }},
		{"from_pod", func(p pod) { _ = d.hooks.detach(p.device()) }},
		{"the gate", func(p pod) { _ = d.putIface(&p.Endpoint, 0) }},
		{"get link ul", func(p pod) { w.ip(w.node, "link del "+p.HostIfName) }},
	} {
		p := w.addPod(d, i+1)
		netns := openNetns(t, p.ns)
		if err := d.Check(ctx, p.Endpoint, netns); err != nil {
			t.Errorf("before any damage: %v", err)
		}
		tt.damage(p)
		if err := d.Check(ctx, p.Endpoint, netns); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Check says %v, want %q", err, tt.want)
		}
	}
	p := w.addPod(d, 50)
	if err := d.Check(ctx, p.Endpoint, openNetns(t, w.netns("other"))); err == nil || !strings.Contains(err.Error(), "another network namespace") {
		t.Errorf("Check in another namespace: %v", err)
	}
	p.Addr = farIP
	if err := d.Check(ctx, p.Endpoint, openNetns(t, p.ns)); err == nil || !strings.Contains(err.Error(), "has address") {
		t.Errorf("Check of another address: %v", err)
	}
}

func TestManyAtOnce(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	const pods = 24
	w.echo(w.wire, farIP)
	each := func(fn func(n int)) {
		var wg sync.WaitGroup
		for n := range pods {
			wg.Go(func() { fn(n) })
		}
		wg.Wait()
	}
	namespaces, files := make([]string, pods), make([]*os.File, pods)
	for n := range pods {
		namespaces[n] = w.netns("pod")
		files[n] = openNetns(t, namespaces[n])
	}
	for range 2 {
		start := time.Now()
		each(func(n int) {
			// Twice at once: one of them makes it.
			var wg sync.WaitGroup
			errs := make([]error, 2)
			for i := range errs {
				wg.Go(func() { _, errs[i] = d.Add(ctx, endpoint(n, namespaces[n]), files[n]) })
			}
			wg.Wait()
			if (errs[0] == nil) == (errs[1] == nil) || !errors.Is(errors.Join(errs...), ErrExists) {
				t.Errorf("two Adds of one: %v", errs)
			}
		})
		t.Logf("%d Adds in %v", pods, time.Since(start))
		assertNothingLeft(t, w, d, pods)
		for n := range pods {
			if e := endpoint(n, ""); w.ask(namespaces[n], e.Addr, farIP, 20) != e.Addr.String() {
				t.Errorf("%s is cut off", e.Addr)
			}
		}
		start = time.Now()
		each(func(n int) {
			e := endpoint(n, "")
			if _, err := d.Delete(ctx, e.ContainerID, e.IfName); err != nil {
				t.Error(err)
			}
			if err := d.Forget(e.Addr); err != nil {
				t.Error(err)
			}
		})
		t.Logf("%d Deletes in %v", pods, time.Since(start))
		assertNothingLeft(t, w, d, 0)
	}
}

// Of the mark, only our bits change; another's program behind ours is asked.
func TestMarkBits(t *testing.T) {
	w := newWorld(t)
	w.stackOnly = true
	d := w.open(Options{})
	a := w.addPod(d, 1)
	run := func(prog *ebpf.Program, mark uint32) (uint32, uint32) {
		t.Helper()
		in := skBuff{Mark: mark, Ifindex: uint32(a.HostIfIndex)}
		var out skBuff
		var verdict uint32
		err := d.in(func() (err error) {
			verdict, err = prog.Run(&ebpf.RunOptions{Data: udpFrame(a.MAC, hostMAC, a.Addr, farIP, "x"), Context: in, ContextOut: &out})
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return verdict, out.Mark
	}
	const next = ^uint32(0) // TC_ACT_UNSPEC
	if verdict, mark := run(d.objs.FromPod, 0xffffffff); verdict != next || mark != ^MarkMask|Mark(2) {
		t.Errorf("from_pod: verdict %d, mark %#x, want %#x", int32(verdict), mark, ^MarkMask|Mark(2))
	}
	if verdict, mark := run(d.objs.ToPod, 0xffffffff); verdict != next || mark != ^MarkMask {
		t.Errorf("to_pod: verdict %d, mark %#x, want %#x", int32(verdict), mark, ^MarkMask)
	}
}

func TestMark(t *testing.T) {
	if MarkMask != 0x3046 {
		t.Errorf("the mask is %#x: others on the node were told 0x3046", MarkMask)
	}
	seen := map[uint32]int{0: 0}
	for i := 1; i <= MaxENIIndex; i++ {
		m := Mark(i)
		if other, ok := seen[m]; ok || m&^MarkMask != 0 {
			t.Errorf("Mark(%d) = %#x: outside the mask, or that of %d", i, m, other)
		}
		seen[m] = i
	}
	if Mark(1) != 0x2 || Mark(2) != 0x4 || Mark(3) != 0x6 || Mark(4) != 0x40 || Mark(31) != MarkMask {
		t.Errorf("marks of 1, 2, 3, 4, 31: %#x %#x %#x %#x %#x", Mark(1), Mark(2), Mark(3), Mark(4), Mark(31))
	}
}

func TestRecordRoundTrip(t *testing.T) {
	c := newClock()
	e := Endpoint{
		ContainerID: strings.Repeat("c", 128), IfName: "eth0", Netns: "/run/netns/x", NetnsCookie: 1 << 40,
		Addr: netip.MustParseAddr("10.1.2.3"), ENI: "eni-0123456789abcdef0", ENIIndex: 31, MAC: podMAC(netip.MustParseAddr("10.1.2.3")),
		HostIfName: "ul0123456789ab", HostIfIndex: lastIndex, PeerIfIndex: 7, PodNamespace: strings.Repeat("n", 63), PodName: strings.Repeat("p", 253), PodUID: "7f7b8c9e-1d2a-4c53-9f6e-0a1b2c3d4e5f",
		Groups: vpc.NewGroupSet([]vpc.SecurityGroupID{"sg-2", "sg-1"}), GroupsHere: true, MTU: 1500, State: Tombstone, Created: c.at(5), Released: c.at(1 << 50),
	}
	r, err := c.encode(&e)
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.decode(addrKey(e.Addr), r)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(e, got, sameAddr); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func FuzzRecordDecode(f *testing.F) {
	f.Add(bytes.Repeat([]byte{0}, 1200))
	f.Add(bytes.Repeat([]byte{'a'}, 1200))
	f.Fuzz(func(t *testing.T, b []byte) {
		var r bpfgen.NodeEndpoint
		copyInto(&r, b)
		r.Version = recordVersion
		c := clock{}
		e, err := c.decode(addrKey(farIP), &r)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.encode(&e); err != nil {
			t.Errorf("what was decoded cannot be encoded: %v", err)
		}
	})
}

// Nothing may hold the node's thread: what runs in a namespace comes back.
func TestThreadsComeHome(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	w.addPod(d, 1)
	home, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		if at, err := os.Readlink(task); err == nil && at != home {
			t.Errorf("%s is in %s, not %s", task, at, home)
		}
	}
}
