package datapath

import (
	"encoding/binary"
	"io"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	"github.com/underlay-cni/underlay/internal/packet"
)

// spilled returns how many connections are in the hash table, and how many of the sets
// say that theirs are.
func (d *Datapath) spilled(t *testing.T) (entries, counted int) {
	t.Helper()
	for batch, err := range connBatches[bpfgen.NodeConn](d.objs.Conns) {
		if err != nil {
			t.Fatal(err)
		}
		entries += len(batch.keys)
	}
	var number uint32
	var set bpfgen.NodeConnSet
	it := d.objs.ConnSets.Iterate()
	for it.Next(&number, &set) {
		counted += int(set.Spilled)
	}
	if err := it.Err(); err != nil {
		t.Fatal(err)
	}
	return entries, counted
}

// A flow has a way of its set: one that is free, or of a connection that is closed, or
// of a flow that is over. If there is none it is in the hash table.
func TestSets(t *testing.T) {
	const finAck = 0x11
	track(t, podIP, 1024, func(tr *tracker) { // one set
		from := func(i int) netip.AddrPort { return netip.AddrPortFrom(podIP, uint16(1000+i)) }
		begin := func(later time.Duration, i int) { t.Helper(); tr.pass(tr.out(later, tcp(from(i), peerPort, syn))) }
		want := func(what string, all, spilled, evicted int) {
			t.Helper()
			entries, counted := tr.d.spilled(t)
			p, err := tr.d.Paths()
			if n := len(tr.all()); err != nil || n != all || entries != spilled || counted != spilled || p.Evicted != uint64(evicted) {
				t.Errorf("%s: %d connections, %d of them in the hash table (said to be %d), %d evicted: want %d, %d, %d; %v", what, n, entries, counted, p.Evicted, all, spilled, evicted, err)
			}
		}
		for i := range 2 * setWays {
			begin(0, i)
		}
		want("twice as many as ways", 2*setWays, setWays, 0)
		for i := range 2 * setWays { // each is found
			tr.pass(tr.in(0, tcp(peerPort, from(i), syn|ack)), tr.out(0, tcp(from(i), peerPort, ack)))
		}
		for _, c := range tr.all() {
			if c.State != ConnEstablished || c.Opener.Packets != 2 || c.Responder.Packets != 1 {
				t.Errorf("%+v", c)
			}
		}
		closing := func(i int) {
			t.Helper()
			tr.pass(tr.out(0, tcp(from(i), peerPort, finAck)), tr.in(0, tcp(peerPort, from(i), finAck)), tr.out(0, tcp(from(i), peerPort, ack)))
		}
		closing(setWays + 3)
		want("one of the hash table is closed", 2*setWays-1, setWays-1, 0)
		begin(0, setWays+3)
		closing(3)
		want("one is closed", 2*setWays, setWays, 0)
		begin(0, 100)
		want("another has its way", 2*setWays, setWays, 0)
		closing(5)
		tr.pass(tr.in(0, tcp(peerPort, from(5), finAck)), tr.out(0, tcp(from(5), peerPort, ack))) // sent again
		for _, c := range tr.all() {
			if c.Opener.Port == from(5).Port() && (c.Midflow || c.Opener.Packets != 5 || c.Responder.Packets != 3) {
				t.Errorf("what comes late: %+v", c)
			}
		}
		begin(0, 5)
		want("it is opened again", 2*setWays, setWays, 0)
		begin(0, 101)
		want("and has its way again", 2*setWays+1, setWays+1, 0)
		tr.pass(tr.in(0, tcp(peerPort, from(100), 0x14))) // a RST
		begin(0, 102)
		want("one is reset, another has its way", 2*setWays+1, setWays+1, 0)

		// Those that were not answered are over after a minute, whoever sweeps: 5 and
		// 102 in ways, and two in the hash table.
		const later = 70 * time.Second
		begin(later, 103)
		begin(later, 104)
		want("two are over", 2*setWays+1, setWays+1, 2)
		begin(later, 105)
		want("and no more of the set", 2*setWays+2, setWays+2, 2)
		if n, err := tr.d.sweepConns(monoNow() + uint64(later)); n != 2 || err != nil {
			t.Errorf("swept: %d, %v", n, err)
		}
		want("swept", 2*setWays, setWays, 2)
		if n, err := tr.d.sweepConns(monoNow() + uint64(500000*time.Second)); n != 2*setWays || err != nil {
			t.Errorf("swept: %d, %v", n, err)
		}
		want("all are over", 0, 0, 2)
	})
}

// theOne returns the connection to farIP from a port.
func theOne(t *testing.T, d *Datapath, from netip.Addr, port uint16) Connection {
	t.Helper()
	for _, c := range connections(t, d, from, farIP) {
		if c.Opener.Port == port || c.Responder.Port == port {
			return c
		}
	}
	t.Fatalf("no connection from port %d", port)
	return Connection{}
}

// A table takes no more than a 256th of the memory.
func TestSetsFor(t *testing.T) {
	for memory, want := range map[uint64]uint32{1 << 29: 1024, 1 << 30: 2048, 4<<30 - 1<<20: 8192, 64 << 30: 16384, 0: 1} {
		if got := setsFor(memory); got != want {
			t.Errorf("%d MiB of memory: %d sets, want %d", memory>>20, got, want)
		}
	}
}

// A direct connection that is closed takes no room, and keeps its entry while nobody
// else wants it: for what comes late, and for who counts, who is told once it goes.
func TestClosedKeepsItsWay(t *testing.T) {
	const finAck = 0x11
	w := newWorld(t)
	var mu sync.Mutex
	var told []Connection
	d := w.open(Options{maxConns: 1024, Timeouts: Timeouts{TCPClosed: 3600 * time.Second}, Ended: func(c Connection) {
		mu.Lock()
		defer mu.Unlock()
		told = append(told, c)
	}})
	a := w.addPod(d, 1)
	far := netip.AddrPortFrom(farIP, 80)
	w.serve(w.wire, far)
	at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(a.Addr, port) }
	closed := func(port uint16) Connection {
		t.Helper()
		c, err := w.dialFrom(a.ns, at(port), far)
		if err != nil {
			t.Fatal(err)
		}
		if err := exchange(c, 3000); err != nil {
			t.Fatal(err)
		}
		_ = c.CloseWrite()
		if _, err := io.Copy(io.Discard, c); err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
		return theOne(t, d, a.Addr, port)
	}
	before := closed(40001)
	if before.State != ConnClosed || before.Provenance != Direct {
		t.Fatalf("closed: %+v", before)
	}
	if _, err := d.sweepConns(monoNow()); err != nil {
		t.Fatal(err)
	}
	if s, err := d.Status(); err != nil || s.Connections != 0 {
		t.Errorf("%d connections take room, %v", s.Connections, err)
	}

	// FINs that were lost are sent again, from outside and from inside.
	fromPod, fromWire := w.rawSocket(a.ns, "eth0"), w.rawSocket(w.wire, "r1")
	for _, late := range []struct {
		from, to int
		frame    []byte
	}{
		{fromWire, fromPod, ackFrame(mac("02:00:00:00:01:01"), enis[1].MAC, far, at(40001))},
		{fromPod, fromWire, ackFrame(podMAC(a.Addr), hostMAC, at(40001), far)},
	} {
		const tcpFlags = 14 + 20 + 13
		late.frame[tcpFlags] = finAck
		if err := unix.Send(late.from, late.frame, 0); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it arrives", func() bool { return marked(t, late.to) > 0 })
	}
	after := theOne(t, d, a.Addr, 40001)
	if after.ID != before.ID || after.Opener.Packets <= before.Opener.Packets || after.Responder.Packets <= before.Responder.Packets {
		t.Errorf("what came late is another's: %+v, before %+v", after, before)
	}

	for i := range uint16(setWays) {
		closed(40002 + i)
	}
	eventually(t, "who counts is told", func() bool {
		d.ends.drain()
		mu.Lock()
		defer mu.Unlock()
		return len(told) == 1
	})
	if c := told[0]; c.Opener.Packets < before.Opener.Packets || c.State != ConnClosed {
		t.Errorf("told: %+v", c)
	}
}

// Two CPUs begin and reset connections of one set, so that each way is soon another's,
// and look up what the other writes: nothing forbidden passes.
func TestOneSetOnTwoCPUs(t *testing.T) {
	w := newWorld(t)
	w.quiet = true
	d := w.open(Options{maxConns: 16, maxShared: 1 << 20})
	a := w.addPod(d, 1)
	if err := d.forbid(a.Endpoint); err != nil {
		t.Fatal(err)
	}
	heard := w.listen(t, map[string]string{w.wire: "r1"})
	const rst, ports = 0x04, 3 * setWays
	var frames [4 * ports][]byte
	for i := range frames {
		to, flags, payload := netip.AddrPortFrom(farIP, allowedPort), uint8(syn), mayPass
		if i%4 == 1 || i%4 == 2 {
			to, payload = netip.AddrPortFrom(farIP, echoPort), marker
		}
		if i%4 > 1 {
			flags = rst
		}
		segment := append(tcp(netip.AddrPortFrom(a.Addr, uint16(2000+i/4)), to, flags), payload...)
		binary.BigEndian.PutUint16(segment[2:], uint16(len(segment)))
		segment[10], segment[11] = 0, 0
		binary.BigEndian.PutUint16(segment[10:], packet.Checksum(0, segment[:20]))
		frames[i] = packet.Frame(packet.MAC(a.MAC), packet.MAC(hostMAC), packet.EtherTypeIPv4, segment)
	}
	var sent [2]atomic.Int64
	for cpu := range sent {
		flood(t, w.rawSocket(a.ns, "eth0"), func(i uint32) []byte {
			sent[cpu].Store(int64(i))
			return frames[(int(i)+cpu*ports/2)%len(frames)]
		})
	}
	eventually(t, "both are at work", func() bool { return min(sent[0].Load(), sent[1].Load()) > 100000 })
	if p, err := d.Paths(); err != nil || p.BegunDirect < 10000 {
		t.Errorf("%+v, %v", p, err)
	}
	if heard.allowed.Load() == 0 {
		t.Error("nothing passes")
	}
	if n := heard.forbidden.Load(); n != 0 {
		t.Errorf("%d forbidden frames passed", n)
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
