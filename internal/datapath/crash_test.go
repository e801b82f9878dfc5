package datapath

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/testenv/bpfcache"
)

// roleEnv makes the test binary play an agent that dies: its value is a
// JSON-encoded role.
const roleEnv = "UNDERLAY_DATAPATH_TEST_ROLE"

type role struct {
	Node, BPFFS, Pod string
	Hook             Hook
	Op, DieAt        string // "add", "delete" or "live"; the step before which it dies
	N                int
	ProcSysNet       string // of "live"
	Policy           bool   // of "add": what onlyDiscard says
	Programs         string // where they are kept; "": nowhere
}

func runRole(text string) int {
	var r role
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	if r.Op == "live" {
		if err := live(r); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return 0
	}
	armed := r.Op == "add"
	die := func(step string) error {
		if armed && step == r.DieAt {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
		return nil
	}
	err := func() error {
		var d *Datapath
		err := nl.Do(nl.Path(r.Node), func() (err error) {
			opts := Options{BPFFS: r.BPFFS, Hook: r.Hook, reached: die, Logger: slog.New(slog.DiscardHandler)}
			if r.Programs != "" {
				opts.loader = bpfcache.Join(r.Programs).Load
			}
			if r.Policy {
				opts.BeforeReady = func(_ context.Context, e Endpoint) error { return d.forbid(e) }
			}
			d, err = Open(opts)
			return err
		})
		if err != nil {
			return err
		}
		netns, err := os.Open(nl.Path(r.Pod))
		if err != nil {
			return err
		}
		e := endpoint(r.N, r.Pod)
		if r.Op == "add" {
			_, err = d.Add(context.Background(), e, netns)
			return err
		}
		armed = true
		_, err = d.Delete(context.Background(), e.ContainerID, e.IfName)
		return errors.Join(err, d.Close()) // the last of it goes in the background
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// dies runs an agent that must die by SIGKILL at the role's step.
func (w *world) dies(r role) {
	w.t.Helper()
	r.Node, r.BPFFS, r.Hook = w.node, w.bpffs, testHook
	if w.cached {
		r.Programs = programs.Dir()
	}
	text, err := json.Marshal(r)
	if err != nil {
		w.t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"="+string(text))
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != -1 {
		w.t.Fatalf("the agent did not die at %q: %v\n%s", r.DieAt, err, out)
	}
}

// assertNothingLeft checks that nothing but live endpoints' things bear our signs.
func assertNothingLeft(t *testing.T, w *world, d *Datapath, live int) {
	t.Helper()
	if _, err := d.awaitReaped(ctx, ""); err != nil {
		t.Fatal(err)
	}
	all, err := d.Endpoints()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range all {
		switch e.State {
		case Live:
			n++
		case Adding:
			t.Errorf("half-made endpoint: %+v", e)
		}
	}
	if n != live {
		t.Errorf("%d live endpoints, want %d", n, live)
	}
	links, err := d.conn.Links()
	if err != nil {
		t.Fatal(err)
	}
	n = 0
	for _, l := range links {
		if ourGroup(l.Group) {
			n++
		}
	}
	if n != live {
		t.Errorf("%d links of our group, want %d", n, live)
	}
	routes, err := d.conn.Routes(PodTable)
	if err != nil || len(routes) != live {
		t.Errorf("routes %v, want %d (%v)", routes, live, err)
	}
	pins, err := pinNames(linkDir(w.bpffs))
	wantPins := 0
	if d.opts.Hook == TCX {
		wantPins = len(podPrograms)*live + len(eniPrograms)*len(enis)
	}
	if err != nil || len(pins) != wantPins {
		t.Errorf("pins %v, want %d (%v)", pins, wantPins, err)
	}
	for _, m := range []string{"ifaces", "iface_stats"} {
		count := 0
		table := d.objs.Ifaces
		if m == "iface_stats" {
			table = d.objs.IfaceStats
		}
		var k uint32
		for err := table.NextKey(nil, &k); err == nil; err = table.NextKey(k, &k) {
			count++
		}
		if count != live {
			t.Errorf("%d entries in %s, want %d", count, m, live)
		}
	}
	if len(d.indexes) != live {
		t.Errorf("%d ifindexes reserved, want %d", len(d.indexes), live)
	}
}

var addSteps = []string{"maps", "veth", "programs", "pod", "host", "carrier", "policy", "gate", "live"}
var deleteSteps = []string{"tombstone", "gone from maps", "gone from routes", "gone from links"}

// Wherever an agent is killed, the next one finds a node that is whole: an
// endpoint that was being added is gone, one that was being deleted is a
// tombstone, and another pod of the node never loses a packet.
func TestKilledAnywhere(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	bystander := w.addPod(d, 9)
	w.echo(w.wire, farIP)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}

	ns := w.netns("pod")
	ear := w.rawSocket(w.wire, "r1")
	for _, step := range addSteps {
		t.Run("add, before "+step, func(t *testing.T) {
			addr := endpoint(1, ns).Addr
			stop := spin(t, ns, udpFrame(podMAC(addr), hostMAC, addr, farIP, marker))
			defer func() {
				stop()
				// Before the last step, policy is there and the gate is open.
				if n := marked(t, ear); n != 0 && step != "live" {
					t.Errorf("%d frames passed of a sender whose endpoint was never whole", n)
				}
			}()
			w.dies(role{Op: "add", Pod: ns, N: 1, DieAt: step})
			if w.ask(bystander.ns, bystander.Addr, farIP, 20) == "" {
				t.Error("another pod is cut off while no agent runs")
			}
			d := w.open(Options{})
			defer d.Close()
			assertNothingLeft(t, w, d, 1)
			if out := w.ip(ns, "link"); strings.Contains(out, "eth0") {
				t.Errorf("the pod has an interface:\n%s", out)
			}
		})
	}
	for _, step := range deleteSteps {
		t.Run("delete, before "+step, func(t *testing.T) {
			d := w.open(Options{})
			e, err := d.Add(context.Background(), endpoint(1, ns), openNetns(t, ns))
			if err != nil {
				t.Fatal(err)
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			w.dies(role{Op: "delete", Pod: ns, N: 1, DieAt: step})
			d = w.open(Options{})
			defer d.Close()
			assertNothingLeft(t, w, d, 1)
			rec, err := d.record(e.Addr)
			if err != nil || rec.State != Tombstone || rec.Released.IsZero() {
				t.Errorf("record %+v, %v", rec, err)
			}
			if err := d.Forget(e.Addr); err != nil {
				t.Error(err)
			}
		})
	}
}

// An error at any step of Add leaves nothing, and the same Add works after it.
func TestAddUndoneWhole(t *testing.T) {
	w := newWorld(t)
	var failAt atomic.Value
	failAt.Store("")
	broken := errors.New("broken")
	d := w.open(Options{reached: func(step string) error {
		if step == failAt.Load() {
			return broken
		}
		return nil
	}})
	ns := w.netns("pod")
	netns := openNetns(t, ns)
	for _, step := range addSteps {
		failAt.Store(step)
		if _, err := d.Add(context.Background(), endpoint(1, ns), netns); !errors.Is(err, broken) {
			t.Errorf("%s: Add: %v", step, err)
		}
		assertNothingLeft(t, w, d, 0)
		if out := w.ip(ns, "link"); strings.Contains(out, "eth0") {
			t.Errorf("%s: the pod has an interface:\n%s", step, out)
		}
	}
	failAt.Store("")
	if _, err := d.Add(context.Background(), endpoint(1, ns), netns); err != nil {
		t.Error(err)
	}
	assertNothingLeft(t, w, d, 1)
}

// Open replaces the programs under a flood, and not one packet is lost.
func TestOpenLosesNothing(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	a := w.addPod(d, 1)
	before, err := d.Traffic()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}

	// No packet may wait for ARP, where the queue is short, nor overflow the
	// receiver's queue, which holds some 190 packets by default.
	w.ip(w.node, "neigh replace 10.0.1.1 lladdr 02:00:00:00:01:01 dev eth1 nud permanent")
	const window = 50
	sink := w.udp(w.wire, farIP, echoPort)
	got := make(chan int, 1)
	var count atomic.Int64
	go func() {
		buf := make([]byte, 64)
		n := 0
		for {
			if _, err := sink.Read(buf); err != nil {
				got <- n
				return
			}
			n++
			count.Store(int64(n))
		}
	}()
	var stop atomic.Bool
	sent := make(chan int, 1)
	c := w.udp(a.ns, a.Addr, 0)
	go func() {
		n := 0
		to := netip.AddrPortFrom(farIP, echoPort)
		for !stop.Load() {
			if int64(n)-count.Load() >= window {
				runtime.Gosched()
				continue
			}
			if _, err := c.WriteToUDPAddrPort([]byte("flood"), to); err == nil {
				n++
			}
		}
		sent <- n
	}()
	eventually(t, "the flood flows", func() bool { return count.Load() > 1000 })
	for range 5 {
		start := count.Load()
		d = w.open(Options{Logger: slog.New(slog.DiscardHandler)})
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the flood goes on", func() bool { return count.Load() > start+1000 })
	}
	stop.Store(true)
	n := <-sent
	eventually(t, "all that was sent arrives", func() bool { return count.Load() == int64(n) })
	_ = sink.Close()
	<-got
	t.Logf("%d packets through five restarts", n)

	// The counters, too, went on.
	d = w.open(Options{})
	after, err := d.Traffic()
	if err != nil {
		t.Fatal(err)
	}
	if sum := after[a.Addr].FromPackets - before[a.Addr].FromPackets; sum != uint64(n) {
		t.Errorf("%d packets counted, %d sent", sum, n)
	}
	if drops := after[a.Addr].Drops; len(drops) != 0 {
		t.Errorf("drops: %v", drops)
	}
}

// Things that vanish while no agent runs.
func TestOpenSweeps(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	a, b, c := w.addPod(d, 1), w.addPod(d, 2), w.addPod(d, 3)
	if err := d.hooks.detach(c.device()); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	w.ip(w.node, "link del "+a.HostIfName)                               // a pod's end went
	w.ip(w.node, "link add ulffffffffffff group 30060 type veth peer x") // a link of nobody
	w.ip(w.node, "link add uldddddddddddd group 30061 type veth peer y") // one that was about to go
	w.ip(w.node, "route add 10.0.1.200/32 dev eth1 table 30060 proto 117")
	w.ip(w.node, "route add 10.0.1.201/32 dev eth1 table 30060 proto static") // somebody else's
	w.ip(w.node, "route del "+b.Addr.String()+" table 30060")
	if testHook == TCX { // a pin of nobody
		from, to := b.HostIfName+"_from_pod", "uleeeeeeeeeeee_from_pod"
		if err := os.Rename(filepath.Join(linkDir(w.bpffs), from), filepath.Join(linkDir(w.bpffs), to)); err != nil {
			t.Fatal(err)
		}
	}

	d = w.open(Options{})
	if got := w.ip(w.node, "route show table 30060"); !strings.Contains(got, "10.0.1.201") {
		t.Errorf("somebody else's route went:\n%s", got)
	}
	w.ip(w.node, "route del 10.0.1.201/32 table 30060")
	w.echo(w.wire, farIP)
	for _, p := range []pod{b, c} {
		if err := d.Check(context.Background(), p.Endpoint, openNetns(t, p.ns)); err != nil {
			t.Error(err)
		}
		if w.ask(p.ns, p.Addr, farIP, 20) == "" {
			t.Errorf("%s is cut off", p.Addr)
		}
	}
	// The record of the one that went waits for its DEL.
	if err := d.Check(context.Background(), a.Endpoint, openNetns(t, a.ns)); err == nil || !strings.Contains(err.Error(), a.HostIfName) {
		t.Errorf("Check of an endpoint without its link: %v", err)
	}
	if _, err := d.Delete(context.Background(), a.ContainerID, a.IfName); err != nil {
		t.Error(err)
	}
	assertNothingLeft(t, w, d, 2)

	// The same state, whatever came before: Open again changes nothing.
	before := w.ip(w.node, "-d link") + w.ip(w.node, "-4 -d route show table all") + w.ip(w.node, "-d rule")
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = w.open(Options{})
	after := w.ip(w.node, "-d link") + w.ip(w.node, "-4 -d route show table all") + w.ip(w.node, "-d rule")
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("a second Open changed (-before +after):\n%s", diff)
	}
	assertNothingLeft(t, w, d, 2)
}
