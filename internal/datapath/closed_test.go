package datapath

import (
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
)

// A direct connection leaves conntrack as it is closed, by whichever end, and who
// counts is told of it. What comes late finds what was known of it, for a while and
// under the same policy, and nothing else does.
func TestClosedLeaves(t *testing.T) {
	const finAck = 0x11
	w := newWorld(t)
	var mu sync.Mutex
	var told []Connection
	d := w.open(Options{Timeouts: Timeouts{TCPClosed: 2 * time.Second}, Ended: func(c Connection) {
		mu.Lock()
		defer mu.Unlock()
		told = append(told, c)
	}})
	a, b := w.addPod(d, 1), w.addPod(d, 2)
	far, near := netip.AddrPortFrom(farIP, 80), netip.AddrPortFrom(b.Addr, 80)
	w.serve(w.wire, far)
	w.serve(b.ns, near)
	hasty := netip.AddrPortFrom(farIP, 81)
	w.accept(w.wire, hasty, func(net.Conn) {}) // closes at once

	closed := func(to netip.AddrPort, port uint16) {
		t.Helper()
		c, err := w.dialFrom(a.ns, netip.AddrPortFrom(a.Addr, port), to)
		if err != nil {
			t.Fatal(err)
		}
		if to != hasty {
			if err := exchange(c, 3000); err != nil {
				t.Fatal(err)
			}
			_ = c.CloseWrite()
		}
		if _, err := io.Copy(io.Discard, c); err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
		eventually(t, "the connection leaves", func() bool {
			return !slices.ContainsFunc(connections(t, d, a.Addr, to.Addr()), func(c Connection) bool { return c.Opener.Port == port })
		})
	}
	for i, to := range []netip.AddrPort{far, hasty, near} {
		closed(to, 40001+uint16(i))
	}
	eventually(t, "they are told of", func() bool { mu.Lock(); defer mu.Unlock(); return len(told) == 3 })
	for i, c := range told {
		if c.Opener.Port != 40001+uint16(i) || c.State != ConnClosed || c.Provenance != Direct || c.Opener.Packets < 3 || c.Responder.Packets < 2 || c.Opener.Addr != a.Addr {
			t.Errorf("told: %+v", c)
		}
	}

	// FINs that were lost are sent again, from outside and from inside.
	fromPod, fromWire := w.rawSocket(a.ns, "eth0"), w.rawSocket(w.wire, "r1")
	at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(a.Addr, port) }
	late := func(in bool, port uint16) (Connection, bool) {
		t.Helper()
		from, to, f := fromPod, fromWire, ackFrame(podMAC(a.Addr), hostMAC, at(port), far)
		if in {
			from, to, f = fromWire, fromPod, ackFrame(mac("02:00:00:00:01:01"), enis[1].MAC, far, at(port))
		}
		const tcpFlags = 14 + 20 + 13
		f[tcpFlags] = finAck
		if err := unix.Send(from, f, 0); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it arrives", func() bool { return marked(t, to) > 0 })
		for _, c := range connections(t, d, a.Addr, farIP) {
			if c.Opener.Port == port || c.Responder.Port == port {
				return c, c.Provenance == Direct && !c.Midflow && c.State == ConnClosed && c.Opener.Port == port
			}
		}
		t.Fatalf("what came late at port %d is no connection", port)
		return Connection{}, false
	}
	closed(far, 40004)
	if c, back := late(true, 40004); !back {
		t.Errorf("a FIN from outside comes back as %+v", c)
	}
	closed(far, 40005)
	if c, back := late(false, 40005); !back {
		t.Errorf("a FIN from inside comes back as %+v", c)
	}
	// Also where another's is in its place.
	var place uint32
	var one bpfgen.NodeClosed
	for it := d.objs.Closed.Iterate(); one.AtNs == 0 && it.Next(&place, &one); {
	}
	if one.AtNs == 0 {
		t.Fatal("no connection is kept")
	}
	for place := range d.objs.Closed.MaxEntries() {
		if err := d.objs.Closed.Put(place, &one); err != nil {
			t.Fatal(err)
		}
	}
	if c, back := late(true, 40009); back || !c.Midflow {
		t.Errorf("a FIN of no connection comes back as %+v", c)
	}
	closed(far, 40011)
	if err := d.forbid(b.Endpoint); err != nil { // another generation of policy
		t.Fatal(err)
	}
	if c, back := late(true, 40011); back || !c.Midflow {
		t.Errorf("after another policy, a FIN comes back as %+v", c)
	}
	closed(far, 40013)
	over := time.Now().Add(2100 * time.Millisecond)
	eventually(t, "its time is over", func() bool { return time.Now().After(over) })
	if c, back := late(true, 40013); back || !c.Midflow {
		t.Errorf("after its time, a FIN comes back as %+v", c)
	}
}

// Who makes short connections without end has room for the next: what is closed takes
// none.
func TestShortConnectionsWithoutEnd(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{maxConns: 1024, maxShared: 1024})
	a := w.addPod(d, 1)
	far := netip.AddrPortFrom(farIP, 80)
	w.serve(w.wire, far)
	for i := range 3000 {
		c, err := w.dialFrom(a.ns, netip.AddrPortFrom(a.Addr, 0), far)
		if err == nil {
			err = exchange(c, 1)
		}
		if err != nil {
			t.Fatalf("connection %d: %v; drops %v", i+1, err, counters(t, d))
		}
		_ = c.Close()
	}
	if c := counters(t, d); c["conntrack_share"] != 0 || c["conntrack_full"] != 0 {
		t.Errorf("drops: %v", c)
	}
}
