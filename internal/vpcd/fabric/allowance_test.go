package fabric

import (
	"testing"
	"time"
)

// TestConntrackAllowance: an instance tracks so many flows, those of all its
// interfaces together; what there is goes on, and what ends makes room.
func TestConntrackAllowance(t *testing.T) {
	const most = 3
	l := newLab(t)
	l.shut()
	o := labOptions(l.name)
	o.ConntrackAllowance = most
	f, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	l.Fabric = f
	a, second, b, c := l.add(subnetA, "10.0.0.4"), l.add(subnetA, "10.0.0.5"), l.add(subnetB, "10.0.1.4"), l.add(subnetB, "10.0.1.5")
	out, in := l.group(1, nil, []Rule{anyUDP}), l.group(2, []Rule{anyUDP}, []Rule{anyUDP})
	a.groups(out)
	second.groups(out)
	b.groups(in)
	c.groups(in)
	l.iface(second.eni).Guest, l.iface(second.eni).DeviceIndex = a.ns, 1
	l.iface(second.eni).Configure = false
	l.set()
	available := func(h *host, want int64) {
		t.Helper()
		if got := h.counters().ConntrackAvailable; got == nil || *got != want {
			t.Errorf("%s may track %v more, want %d", h.eni, got, want)
		}
	}
	available(a, most)
	for n := range uint16(most) {
		a.wants(b, "flow", dgram4(a.addr, b.addr, 1000+n, 53), "")
	}
	available(a, 0)
	available(second, 0)
	available(b, 0)
	available(c, most)
	a.wants(c, "one flow more", dgram4(a.addr, c.addr, 1, 53), ConntrackAllowance)
	second.wants(c, "one flow more of the other interface", dgram4(second.addr, c.addr, 1, 53), ConntrackAllowance)
	c.wants(b, "one flow more of the receiver", dgram4(c.addr, b.addr, 1, 53), ConntrackAllowance)
	a.wants(b, "a flow that there is", dgram4(a.addr, b.addr, 1000, 53), "")
	b.wants(a, "its answer", dgram4(b.addr, a.addr, 53, 1000), "")
	// Untracked, it needs none.
	second.groups(groupOpen)
	l.set()
	second.wants(c, "an untracked flow", dgram4(second.addr, c.addr, 2, 53), "")
	if err := l.RefillAllowances(); err != nil {
		t.Fatal(err)
	}
	available(a, 0)

	if err := l.advance(defaultUDPStream + time.Second); err != nil {
		t.Fatal(err)
	}
	if _, err := l.ExpireFlows(); err != nil {
		t.Fatal(err)
	}
	if err := l.RefillAllowances(); err != nil {
		t.Fatal(err)
	}
	available(a, most)
	a.wants(c, "a flow after others have ended", dgram4(a.addr, c.addr, 1, 53), "")
	available(a, most-1)
}
