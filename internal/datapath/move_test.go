package datapath

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	"github.com/underlay-cni/underlay/internal/nl"
)

// whereOf tells where each program of a pod stands: "clsact", "tcx", both or none.
func (w *world) whereOf(d *Datapath, dev device) []string {
	w.t.Helper()
	var out []string
	for _, p := range dev.programs {
		var at []string
		one := device{dev.name, dev.index, []program{p}}
		filters, err := d.conn.Filters(dev.index, p.direction)
		if err != nil {
			w.t.Fatal(err)
		}
		if slices.ContainsFunc(filters, func(f nl.Filter) bool { return f.Handle == filterHandle }) {
			at = append(at, string(Clsact))
		}
		if (*tcx)(d).check(one) == nil {
			at = append(at, string(TCX))
		}
		out = append(out, strings.Join(at, "+"))
	}
	return out
}

// exactly has a pod ask n times, each of which must be answered and counted once.
func (w *world) exactly(d *Datapath, a pod, when string, n uint64) {
	w.t.Helper()
	count := func() (Traffic, Paths) {
		all, err := d.Traffic()
		if err != nil {
			w.t.Fatal(err)
		}
		return all[a.Addr], paths(w.t, d)
	}
	before, pathsBefore := count()
	for range n {
		if w.ask(a.ns, a.Addr, farIP, 1) == "" {
			w.t.Errorf("%s: not answered", when)
		}
	}
	after, pathsAfter := count()
	if from, to := after.FromPackets-before.FromPackets, after.ToPackets-before.ToPackets; from != n || to != n {
		w.t.Errorf("%s: %d packets counted from the pod and %d to it, want %d each", when, from, to, n)
	}
	if got := pathsAfter.Direct + pathsAfter.Stack - pathsBefore.Direct - pathsBefore.Stack; got != 2*n {
		w.t.Errorf("%s: %d packets had a way, want %d", when, got, 2*n)
	}
}

// A busy pod's programs move from clsact to TCX. Each packet passes one of them,
// once, whenever it comes, and whatever state an agent that is killed leaves; the
// next agent makes it whole, with whichever kind of hook.
func TestMove(t *testing.T) {
	onceForAllHooks(t)
	for _, stackOnly := range []bool{true, false} {
		w := newWorld(t)
		w.stackOnly = stackOnly
		dieAt, left := "", 0
		died := errors.New("killed")
		opts := func(hook Hook) Options {
			return Options{Hook: hook, reached: func(step string) error {
				if step != dieAt {
					return nil
				}
				if left--; left < 0 {
					return died
				}
				return nil
			}}
		}
		d := w.open(opts(Auto))
		a := w.addPod(d, 1)
		w.echo(w.wire, farIP)
		if w.ask(a.ns, a.Addr, farIP, 20) == "" {
			t.Fatal("not answered at first")
		}
		for _, tt := range []struct {
			dieAt   string
			program int // that is being moved
			where   string
		}{
			{"move: tcx", 0, "clsact clsact"},
			{"move: filter", 0, "clsact+tcx clsact"},
			{"move: together", 0, "tcx clsact"},
			{"move: alone", 1, "tcx clsact"},
			{"move: tcx", 1, "tcx clsact"},
			{"move: filter", 1, "tcx clsact+tcx"},
			{"move: together", 1, "tcx tcx"},
		} {
			for _, next := range Hooks {
				if !stackOnly && next != Auto {
					continue // what is direct meets no second program
				}
				dieAt, left = "", 0
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
				d = w.open(opts(Clsact))
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
				d = w.open(opts(Auto))
				if got := strings.Join(w.whereOf(d, a.device()), " "); got != "clsact clsact" {
					t.Fatalf("at first: %s", got)
				}
				dieAt, left = tt.dieAt, tt.program
				if err := d.Move(ctx, a.Addr); !errors.Is(err, died) {
					t.Fatalf("%s: %v", tt.dieAt, err)
				}
				dieAt = ""
				if got := strings.Join(w.whereOf(d, a.device()), " "); got != tt.where {
					t.Errorf("killed at %q: %s, want %s", tt.dieAt, got, tt.where)
				}
				if err := d.Check(ctx, a.Endpoint, openNetns(t, a.ns)); err != nil {
					t.Errorf("killed at %q: %v", tt.dieAt, err)
				}
				w.exactly(d, a, "killed at "+tt.dieAt, 3)
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
				d = w.open(opts(next))
				want := map[Hook]string{Clsact: "clsact clsact", TCX: "tcx tcx", Auto: strings.ReplaceAll(tt.where, "clsact+tcx", "tcx")}[next]
				if got := strings.Join(w.whereOf(d, a.device()), " "); got != want {
					t.Errorf("killed at %q, then %s: %s, want %s", tt.dieAt, next, got, want)
				}
				var v bpfgen.NodeIface
				index := uint32(a.HostIfIndex)
				if err := d.objs.Ifaces.Lookup(&index, &v); err != nil || v.Flags&uint32(bpfgen.NodeIfaceFlagsIFACE_ALONE) != 0 {
					t.Errorf("killed at %q, then %s: flags %#x, %v", tt.dieAt, next, v.Flags, err)
				}
				w.exactly(d, a, "killed at "+tt.dieAt+", then "+string(next), 3)
			}
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// Under a flow nothing is lost or counted twice. What is taken off TCX is put back on
// clsact; and a device with a program of others stays as it is.
func TestMoveUnderTraffic(t *testing.T) {
	onceForAllHooks(t)
	w := newWorld(t)
	w.stackOnly = true
	d := w.open(Options{Hook: Auto})
	a, other := w.addPod(d, 1), w.addPod(d, 2)
	w.echo(w.wire, farIP)
	if w.ask(a.ns, a.Addr, farIP, 20) == "" {
		t.Fatal("not answered at first")
	}
	before, err := d.Traffic()
	if err != nil {
		t.Fatal(err)
	}
	stop := w.keepAsking(200*time.Millisecond, a, farIP)
	if err := d.Move(ctx, a.Addr); err != nil {
		t.Error(err)
	}
	asked, lost := stop()
	after, err := d.Traffic()
	if err != nil {
		t.Fatal(err)
	}
	if from, to := after[a.Addr].FromPackets-before[a.Addr].FromPackets, after[a.Addr].ToPackets-before[a.Addr].ToPackets; lost != 0 || from != asked || to != from {
		t.Errorf("%d asked, %d without an answer: %d packets counted from the pod and %d to it", asked, lost, from, to)
	}
	if got := strings.Join(w.whereOf(d, a.device()), " "); got != "tcx tcx" {
		t.Errorf("moved: %s", got)
	}
	if st, err := d.Status(); err != nil || st.Moved != 1 || st.Hook != Clsact {
		t.Errorf("%+v, %v", st, err)
	}

	for _, p := range podPrograms {
		if err := os.Remove((*tcx)(d).pin(a.device(), p)); err != nil {
			t.Error(err)
		}
	}
	// The kernel lets a link without a pin go a moment later.
	eventually(t, "put back on clsact", func() bool {
		if err := d.repairPrograms(ctx); err != nil {
			t.Error(err)
		}
		return strings.Join(w.whereOf(d, a.device()), " ") == "clsact clsact" && d.othersOn(a.device()) == nil
	})
	w.exactly(d, a, "put back", 3)
	if st, err := d.Status(); err != nil || st.Moved != 0 {
		t.Errorf("%+v, %v", st, err)
	}

	var b nl.Batch
	b.FilterSet(nl.Filter{Index: other.HostIfIndex, Direction: nl.Egress, Priority: filterPriority + 1, Handle: 1, Name: "other", FD: d.objs.ToPod.FD()})
	if err := d.conn.Exec(&b); err != nil {
		t.Fatal(err)
	}
	if err := d.Move(ctx, other.Addr); !errors.Is(err, errOthersPrograms) {
		t.Errorf("with a filter of others behind: %v", err)
	}
	if got := w.whereOf(d, other.device()); got[1] != string(Clsact) {
		t.Errorf("with a filter of others behind to_pod: %v", got)
	}
}

// Pods are moved that send much, once nobody adds or deletes any.
func TestBusyPodsAreMoved(t *testing.T) {
	onceForAllHooks(t)
	w := newWorld(t)
	d := w.open(Options{Hook: Auto})
	a, idle, next := w.addPod(d, 1), w.addPod(d, 2), w.addPod(d, 3)
	const enough = moveRate * uint64(moveEvery/time.Second)
	before := map[netip.Addr]Traffic{a.Addr: {}, idle.Addr: {FromPackets: 7}, next.Addr: {FromPackets: 2 * enough}}
	now := map[netip.Addr]Traffic{a.Addr: {FromPackets: enough}, idle.Addr: {FromPackets: enough}, next.Addr: {FromPackets: enough}, farIP: {FromPackets: enough}}
	d.moveThose(ctx, before, now)
	if d.isMoved(a.HostIfIndex) {
		t.Error("moved right after an ADD")
	}
	d.opts.settled = 1
	d.moveThose(ctx, before, now)
	if !d.isMoved(a.HostIfIndex) || d.isMoved(idle.HostIfIndex) || d.isMoved(next.HostIfIndex) {
		t.Errorf("moved: the busy pod %t, one below the rate %t, one whose address was a busier pod's %t", d.isMoved(a.HostIfIndex), d.isMoved(idle.HostIfIndex), d.isMoved(next.HostIfIndex))
	}
	if _, err := d.Delete(ctx, a.ContainerID, a.IfName); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Delete(ctx, idle.ContainerID, idle.IfName); err != nil {
		t.Fatal(err)
	}
	if _, err := d.awaitReaped(ctx, ""); err != nil {
		t.Fatal(err)
	}
	if d.isMoved(a.HostIfIndex) {
		t.Error("a device that is gone counts as moved")
	}
	if pins, err := pinNames(linkDir(w.bpffs)); err != nil || slices.ContainsFunc(pins, func(p string) bool { return strings.HasSuffix(p, "_pod") }) {
		t.Errorf("pins %v, %v", pins, err)
	}
}
