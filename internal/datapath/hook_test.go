package datapath

import (
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
)

// What we let pass goes on to the programs that others attached behind ours;
// what we drop they never see.
func TestOthersProgramsRun(t *testing.T) {
	w := newWorld(t)
	w.stackOnly = true // what our programs forward ends with them
	d := w.open(Options{})
	a := w.addPod(d, 1)
	w.echo(w.wire, farIP)
	dropAll, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2 /* TC_ACT_SHOT */), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer dropAll.Close()
	var detach func() error
	switch testHook {
	case TCX:
		var l link.Link
		err = d.in(func() (err error) {
			l, err = link.AttachTCX(link.TCXOptions{Interface: a.HostIfIndex, Program: dropAll, Attach: ebpf.AttachTCXIngress})
			return err
		})
		detach = func() error { return l.Close() }
	case Clsact:
		// The place that others take: the first priority, the first handle.
		f := nl.Filter{Index: a.HostIfIndex, Direction: nl.Ingress, Priority: filterPriority + 1, Handle: 1, Name: "other", FD: dropAll.FD()}
		var b nl.Batch
		b.FilterSet(f)
		err = d.conn.Exec(&b)
		detach = func() error {
			var b nl.Batch
			b.FilterDelete(f)
			return d.conn.Exec(&b)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	if w.ask(a.ns, a.Addr, farIP, 2) != "" {
		t.Error("a program behind ours was passed over")
	}
	traffic, err := d.Traffic()
	if err != nil || traffic[a.Addr].FromPackets != 2 {
		t.Errorf("%+v, %v", traffic, err)
	}
	if err := d.hooks.detach(a.device()); err != nil {
		t.Fatal(err)
	}
	if w.ask(a.ns, a.Addr, farIP, 2) != "" {
		t.Error("the other program went with ours")
	}
	if err := d.hooks.attach(a.device()); err != nil {
		t.Fatal(err)
	}
	if err := detach(); err != nil {
		t.Fatal(err)
	}
	if w.ask(a.ns, a.Addr, farIP, 20) == "" {
		t.Error("not answered after the other program went")
	}
}

// An agent that is told to use the other kind of hook exchanges what stands on
// the pods' devices, back and forth, under a flow. A device that is up loses
// packets for a moment when it is given a clsact qdisc; nothing else does.
func TestHooksAreExchanged(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	a := w.addPod(d, 1)
	w.echo(w.wire, farIP)
	if w.ask(a.ns, a.Addr, farIP, 20) == "" {
		t.Fatal("not answered before any change")
	}
	stop := w.keepAsking(2*time.Second, a, farIP)
	had := map[Hook]bool{testHook: true}
	mayLose := uint64(0)
	for _, hook := range []Hook{TCX, Clsact, Clsact, TCX, TCX, testHook} {
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		d = w.open(Options{Hook: hook})
		if hook == Clsact && !had[Clsact] {
			mayLose = 1 // one request at a time
		}
		had[hook] = true
		if err := d.Check(ctx, a.Endpoint, openNetns(t, a.ns)); err != nil {
			t.Errorf("after the change to %s: %v", hook, err)
		}
		if d.hooks.old.check(a.device()) == nil {
			t.Errorf("after the change to %s the other kind is there still", hook)
		}
		pins, err := pinNames(linkDir(w.bpffs))
		if err != nil || (len(pins) > 0) != (hook == TCX) {
			t.Errorf("after the change to %s: pins %v, %v", hook, pins, err)
		}
	}
	if _, lost := stop(); lost > mayLose {
		t.Errorf("%d requests were not answered, want at most %d", lost, mayLose)
	}
	if w.ask(a.ns, a.Addr, farIP, 20) == "" {
		t.Error("not answered afterwards")
	}
}

// What tc takes off a pod's device, whole or one filter, is put back.
func TestProgramsAreRepaired(t *testing.T) {
	if testHook != Clsact {
		return // a pinned link cannot be taken away with tc
	}
	w := newWorld(t)
	d := w.open(Options{})
	a, gone := w.addPod(d, 1), w.addPod(d, 2)
	w.echo(w.wire, farIP)
	w.ip(gone.ns, "link del eth0") // its record waits for DEL, and is no error
	for _, args := range []string{
		"qdisc del dev " + a.HostIfName + " clsact",
		"filter del dev " + a.HostIfName + " ingress",
		"filter del dev " + a.HostIfName + " egress",
	} {
		w.run("tc", append([]string{"-n", w.node}, strings.Fields(args)...)...)
		if !strings.Contains(args, "egress") && w.ask(a.ns, a.Addr, farIP, 2) != "" {
			t.Errorf("answered after tc %s", args)
		}
		if err := d.SetENIs(ctx, enis); err != nil {
			t.Error(err)
		}
		if err := d.Check(ctx, a.Endpoint, openNetns(t, a.ns)); err != nil {
			t.Errorf("after tc %s: %v", args, err)
		}
		if w.ask(a.ns, a.Addr, farIP, 20) == "" {
			t.Errorf("not answered after tc %s and the repair", args)
		}
	}
	// An ingress qdisc of another's is in the way: that is said.
	w.run("tc", "-n", w.node, "qdisc", "del", "dev", a.HostIfName, "clsact")
	w.run("tc", "-n", w.node, "qdisc", "add", "dev", a.HostIfName, "ingress")
	if err := d.SetENIs(ctx, enis); err == nil || !strings.Contains(err.Error(), "--hook tcx") {
		t.Errorf("with an ingress qdisc there: %v", err)
	}
}

// Programs that go with their device are nothing to repair.
func TestDeleteIsNoDamage(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	p := w.addPod(d, 1)
	watcher, err := nl.WatchIn(d.netns)
	if err != nil {
		t.Fatal(err)
	}
	heard := make(chan int, 100)
	go func() {
		_ = watcher.Run(t.Context(), func(nl.Route, bool) bool { return false }, func(index int) bool { heard <- index; return false }, func() {})
	}()
	if _, err := d.Delete(ctx, p.ContainerID, p.IfName); err != nil {
		t.Fatal(err)
	}
	if _, err := d.awaitReaped(ctx, ""); err != nil {
		t.Fatal(err)
	}
	q := w.addPod(d, 2)
	if testHook == Clsact {
		w.run("tc", "-n", w.node, "qdisc", "del", "dev", q.HostIfName, "clsact")
		select {
		case index := <-heard:
			if index != q.HostIfIndex {
				t.Errorf("heard of link %d, want %d first", index, q.HostIfIndex)
			}
		case <-time.After(5 * time.Second):
			t.Error("not heard of the clsact that was deleted")
		}
	}
	if _, err := d.conn.LinkByIndex(p.HostIfIndex); err == nil || !strings.Contains(err.Error(), unix.ENODEV.Error()) {
		t.Errorf("the deleted device: %v", err)
	}
}
