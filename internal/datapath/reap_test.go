package datapath

import (
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
)

// The device of a deleted endpoint goes after Delete has returned: whoever comes
// at once, the same container or another in the same namespace, does not meet
// it, and does not lose his own to what was put off.
func TestAddRightAfterDelete(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	ns := w.netns("pod")
	netns := openNetns(t, ns)
	n := 1
	for _, container := range []string{"a", "a", "b", "b"} {
		e := endpoint(n, ns)
		e.ContainerID = container
		n++
		got, err := d.Add(ctx, e, netns)
		if err != nil {
			t.Fatalf("add %d, of %s: %v", n, container, err)
		}
		assertNothingLeft(t, w, d, 1)
		if err := d.Check(ctx, got, netns); err != nil {
			t.Error(err)
		}
		if _, err := d.Delete(ctx, container, e.IfName); err != nil {
			t.Fatal(err)
		}
		if err := d.Check(ctx, got, netns); err == nil {
			t.Error("a deleted endpoint passes the check")
		}
		if _, err := d.Delete(ctx, container, e.IfName); err != nil {
			t.Errorf("delete again at once: %v", err)
		}
	}
	assertNothingLeft(t, w, d, 0)
}

// Between Delete and the reaper, the pod's namespace goes with the device, and
// somebody makes one of that name: it is his.
func TestReaperTakesNobodyElses(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	ns := w.netns("pod")
	e, err := d.Add(ctx, endpoint(1, ns), openNetns(t, ns))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Delete(ctx, e.ContainerID, e.IfName); err != nil {
		t.Fatal(err)
	}
	var b nl.Batch
	b.LinkDelete(e.HostIfName)
	b.Tolerate(unix.ENODEV) // the reaper was first
	if err := d.conn.Exec(&b); err != nil {
		t.Fatal(err)
	}
	w.ip(w.node, "link add "+e.HostIfName+" type veth peer name other0")
	if _, err := d.awaitReaped(ctx, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := d.conn.LinkByName(e.HostIfName); err != nil {
		t.Errorf("it was deleted with what was put off: %v", err)
	}
}

// Close leaves nothing half-deleted.
func TestCloseWaitsForTheReaper(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	ns := w.netns("pod")
	e, err := d.Add(ctx, endpoint(1, ns), openNetns(t, ns))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Delete(ctx, e.ContainerID, e.IfName); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if out := w.ip(w.node, "-o link"); strings.Contains(out, e.HostIfName) {
		t.Errorf("the device is there still:\n%s", out)
	}
	pins, err := pinNames(linkDir(w.bpffs))
	pins = slices.DeleteFunc(pins, func(name string) bool { return strings.HasSuffix(name, "_eni") })
	if err != nil || len(pins) > 0 {
		t.Errorf("pinned still: %v, %v", pins, err)
	}
}
