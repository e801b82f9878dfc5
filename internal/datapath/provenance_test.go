package datapath

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
)

// forget empties the table of connections, as when an agent without one was there
// before, or what is idle was forgotten sooner than the kernel does.
func (d *Datapath) forgetConns(t *testing.T) {
	t.Helper()
	var keys []bpfgen.NodeConnKey
	for batch, err := range connBatches[bpfgen.NodeConn](d.objs.Conns) {
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, batch.keys...)
	}
	for i := range keys {
		_ = d.objs.Conns.Delete(&keys[i])
	}
	for set := range d.objs.ConnSets.MaxEntries() {
		if err := d.objs.ConnSets.Put(set, bpfgen.NodeConnSet{}); err != nil {
			t.Fatal(err)
		}
	}
}

// What the stack has begun it goes on with, also if our table has lost it: the
// kernel's conntrack knows.
func TestProvenanceOutlivesTheTable(t *testing.T) {
	m := newMatrix(t, way{name: "direct", direct: true, options: func(o *Options) { o.Direct = true }}, proxies[0])
	for _, network := range []string{"tcp4", "udp4"} {
		for _, name := range []string{"NEAR0", "FAR1"} {
			if network == "udp4" {
				name += "-DNS"
			}
			c, err := m.talk(m.near1.ns, network, netip.AddrPort{}, m.services[name].vip, patience)
			if err != nil {
				t.Fatal(err)
			}
			m.d.forgetConns(t)
			m.farD.forgetConns(t)
			if err := c.goOn(1000); err != nil {
				t.Errorf("%s to %s: %v", network, name, err)
			}
			c.Close()
		}
	}
}

// A connection that was direct when the table lost it goes on by the stack.
func TestMidflowGoesByTheStack(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	a := w.addPod(d, 1)
	w.serve(w.wire, netip.AddrPortFrom(farIP, 80))
	c, err := w.dial(a.ns, a.Addr, netip.AddrPortFrom(farIP, 80))
	if err != nil {
		t.Fatal(err)
	}
	if err := exchange(c, 100); err != nil {
		t.Fatal(err)
	}
	d.forgetConns(t)
	if err := exchange(c, 1<<20); err != nil {
		t.Errorf("after the table was lost: %v", err)
	}
	got := connections(t, d, a.Addr, farIP)
	if len(got) != 1 || got[0].Provenance != Stack || !got[0].Midflow || got[0].State != ConnEstablished {
		t.Errorf("%+v", got)
	}
}

// Pods of one node in two subnets speak by the wire, where the VPC's ACLs are.
func TestAcrossSubnetsByTheWire(t *testing.T) {
	f := newFleet(t, Options{Direct: true})
	f.world.serve(f.near1.ns, netip.AddrPortFrom(f.near1.Addr, 80))
	f.nft(f.wire, "table ip seen { counter near { }; chain c { type filter hook forward priority 0; ip saddr 10.0.0.129 ip daddr 10.0.1.129 counter name near; }; }")
	c, err := f.dial(f.near0.ns, f.near0.Addr, netip.AddrPortFrom(f.near1.Addr, 80))
	if err != nil {
		t.Fatal(err)
	}
	if err := exchange(c, 1000); err != nil {
		t.Fatal(err)
	}
	got := connections(t, f.d, f.near0.Addr, f.near1.Addr)
	if len(got) != 1 || got[0].Provenance != Direct || got[0].Local || got[0].Opener.HostIfIndex != f.near0.HostIfIndex || got[0].Responder.HostIfIndex != f.near1.HostIfIndex {
		t.Errorf("%+v", got)
	}
	if out := f.run("ip", "netns", "exec", f.wire, "nft", "list", "counter", "ip", "seen", "near"); !containsAny(out, "packets") || containsAny(out, "packets 0") {
		t.Errorf("the router has not seen it: %s", out)
	}
}

// An endpoint that asks for it takes the stack with all that it sends and gets,
// also after a restart.
func TestStackOnly(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	b := w.addPod(d, 2)
	ns := w.netns("pod1")
	e := endpoint(1, ns)
	e.StackOnly = true
	e, err := d.Add(ctx, e, openNetns(t, ns))
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = w.open(Options{})
	w.echo(w.wire, farIP)
	w.echo(ns, e.Addr)
	for _, from := range []struct {
		ns string
		ip netip.Addr
		to netip.Addr
	}{{ns, e.Addr, farIP}, {w.wire, farIP, e.Addr}, {b.ns, b.Addr, e.Addr}} {
		if w.ask(from.ns, from.ip, from.to, 20) == "" {
			t.Errorf("%s does not answer %s", from.to, from.ip)
		}
	}
	n := 0
	for c, err := range d.Connections() {
		if err != nil {
			t.Fatal(err)
		}
		if c.Protocol == unix.IPPROTO_UDP {
			n++
			if c.Provenance != Stack {
				t.Errorf("%+v", c)
			}
		}
	}
	if n == 0 {
		t.Error("nothing was tracked")
	}
}

// A pod's connections go with it.
func TestSweepForgetsPods(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	d.stopSweeper() // or it may be there first
	a, b := w.addPod(d, 1), w.addPod(d, 2)
	w.serve(w.wire, netip.AddrPortFrom(farIP, 80))
	for _, p := range []pod{a, b} {
		if _, err := w.dial(p.ns, p.Addr, netip.AddrPortFrom(farIP, 80)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := d.Delete(context.Background(), a.ContainerID, a.IfName); err != nil {
		t.Fatal(err)
	}
	if n, err := d.sweepConns(monoNow()); err != nil || n == 0 {
		t.Errorf("swept %d, %v", n, err)
	}
	if got := connections(t, d, a.Addr, farIP); len(got) != 0 {
		t.Errorf("left: %+v", got)
	}
	if got := connections(t, d, b.Addr, farIP); len(got) != 1 {
		t.Errorf("the other pod's: %+v", got)
	}
}

// The maps of layout 1 are read through: endpoints live on, their entries say what
// layout 2 adds, their slots and connections what layout 3 does, and counters go on.
func TestLayout1IsReadThrough(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	a := w.addPod(d, 1)
	w.echo(w.wire, farIP)
	index := uint32(a.HostIfIndex)
	counted := make([]bpfgen.NodeIfaceCounters, ebpf.MustPossibleCPU())
	counted[0].Before.FromPackets = 1000
	if err := d.objs.IfaceStats.Update(&index, counted, ebpf.UpdateExist); err != nil {
		t.Fatal(err)
	}
	if w.ask(a.ns, a.Addr, farIP, 20) == "" {
		t.Fatal("not answered before")
	}
	datagrams := w.connected(a.ns, farIP)
	if !answers(datagrams, true) {
		t.Fatal("not answered before")
	}
	untimed := func() []Connection { // each Open converts times for itself, to the microsecond
		all := connections(t, d, a.Addr, farIP)
		for i := range all {
			all[i].Created, all[i].Last = time.Time{}, time.Time{}
		}
		slices.SortFunc(all, func(a, b Connection) int { return cmp.Compare(a.Opener.Port, b.Opener.Port) })
		return all
	}
	before := untimed()
	conns, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "conns", Type: ebpf.Hash, KeySize: uint32(unsafe.Sizeof(bpfgen.NodeConnKey{})), ValueSize: uint32(unsafe.Sizeof(connOfLayout2{})),
		MaxEntries: d.objs.Conns.MaxEntries(), Flags: unix.BPF_F_NO_PREALLOC,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer conns.Close()
	for some, err := range d.conns() {
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range some {
			v := connOfLayout2{
				CreatedNs: c.CreatedNs, LastNs: c.LastNs, Packets: c.Packets, Bytes: c.Bytes, Ifindex: c.Ifindex, TimeoutS: c.TimeoutS,
				EniIfindex: c.EniIfindex, TcpFlags: c.TcpFlags, Opener: c.Gates.Opener, Provenance: c.Gates.Provenance, State: c.State,
				Judged: c.Gates.Judged, Allowed: c.Gates.Allowed, Audit: c.Audit, Flags: c.Gates.Flags, Seen: c.Seen, Generation: c.Generation,
			}
			for end := range v.Verdict {
				for g := range v.Verdict[end] {
					v.Verdict[end][g].Rule, v.Verdict[end][g].Epoch = c.Verdict[end][g].Rule, c.Verdict[end][g].Epoch
				}
			}
			if err := conns.Put(&c.Key, &v); err != nil {
				t.Fatal(err)
			}
		}
	}
	var now bpfgen.NodeIface
	if err := d.objs.Ifaces.Lookup(&index, &now); err != nil {
		t.Fatal(err)
	}
	spec := &ebpf.MapSpec{Name: "ifaces", Type: ebpf.Hash, KeySize: 4, ValueSize: 36, MaxEntries: d.objs.Ifaces.MaxEntries(), Flags: unix.BPF_F_NO_PREALLOC}
	old, err := ebpf.NewMap(spec)
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	v := ifaceOfLayout1{Addr: now.Addr, PodMac: now.PodMac, HostMac: now.HostMac, Mark: now.Mark, Flags: now.Flags}
	if err := old.Put(&index, &v); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	dir := mapDir(w.bpffs)
	if err := replacePin(dir, bpfgen.NodeMapIfaces, old); err != nil {
		t.Fatal(err)
	}
	slots, err := ebpf.NewMap(&ebpf.MapSpec{Name: "slots", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: d.objs.Slots.MaxEntries()})
	if err != nil {
		t.Fatal(err)
	}
	defer slots.Close()
	if err := replacePin(dir, bpfgen.NodeMapSlots, slots); err != nil {
		t.Fatal(err)
	}
	if err := replacePin(dir, bpfgen.NodeMapConns, conns); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{bpfgen.NodeMapConnSets, bpfgen.NodeMapConnWays, bpfgen.NodeMapConnSeeds} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := conns.Pin(filepath.Join(dir, "closed")); err != nil { // whatever it was
		t.Fatal(err)
	}
	meta, err := ebpf.LoadPinnedMap(filepath.Join(dir, bpfgen.NodeMapMeta), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer meta.Close()
	if err := setLayout(meta, 1); err != nil {
		t.Fatal(err)
	}
	d = w.open(Options{})
	if after := untimed(); len(before) != 2 || !slices.Equal(after, before) {
		t.Errorf("connections %+v, before %+v", after, before)
	}
	if !answers(datagrams, true) {
		t.Error("what was there is not answered afterwards")
	}
	// By from_pod: that of the ENI is the agent's before, until this one has set its ENIs.
	goneOn := func(c Connection) bool { return c.Opener.Packets > 1 && !c.Midflow }
	if after := untimed(); len(after) != 2 || !slices.ContainsFunc(after, goneOn) {
		t.Errorf("what was there is another: %+v", after)
	}
	if _, err := os.Stat(filepath.Join(dir, "closed")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the map of closed connections is there: %v", err)
	}
	var then bpfgen.NodeIface
	if err := d.objs.Ifaces.Lookup(&index, &then); err != nil || then.Eni != 2 || then.Slot == 0 || then.Addr != now.Addr || then.Mark != now.Mark {
		t.Errorf("%+v, %v", then, err)
	}
	if w.ask(a.ns, a.Addr, farIP, 20) == "" {
		t.Error("not answered afterwards")
	}
	var slot bpfgen.NodeSlot
	if err := d.objs.Slots.Lookup(&then.Slot, &slot); err != nil || slot.Ifindex != index || slot.Iface != then {
		t.Errorf("slot %+v, %v", slot, err)
	}
	traffic, err := d.Traffic()
	if err != nil || traffic[a.Addr].FromPackets <= 1000 {
		t.Errorf("%+v, %v", traffic[a.Addr], err)
	}
}

// A flow to a pod whose policy is not in place yet is not judged by it, and not
// forwarded past its gate.
func TestDirectWaitsForTheGate(t *testing.T) {
	w := newWorld(t)
	reached, open := make(chan Endpoint), make(chan struct{})
	first := true
	d := w.open(Options{BeforeReady: func(_ context.Context, e Endpoint) error {
		if first {
			first = false
			return nil
		}
		reached <- e
		<-open
		return nil
	}})
	a := w.addPod(d, 1)
	ns := w.netns("pod2")
	added := make(chan error, 1)
	go func() {
		_, err := d.Add(ctx, endpoint(2, ns), openNetns(t, ns))
		added <- err
	}()
	b := <-reached
	w.echo(ns, b.Addr)
	if seen := w.ask(a.ns, a.Addr, b.Addr, 2); seen != "" {
		t.Errorf("answered before the gate is open: %s", seen)
	}
	for _, c := range connections(t, d, a.Addr, b.Addr) {
		if c.Provenance != Stack || c.Responder.Gates[GateNetpol].Judged {
			t.Errorf("%+v", c)
		}
	}
	close(open)
	if err := <-added; err != nil {
		t.Fatal(err)
	}
	if w.ask(a.ns, a.Addr, b.Addr, 20) == "" {
		t.Error("not answered afterwards")
	}
}
