package datapath

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/packet"
)

// floodFrames are packets that each begin a flow: UDP and SYN by turns, from one
// address to another, over ports that do not repeat before 2³² of them.
func floodFrames(src, dst net.HardwareAddr, from, to netip.Addr) func(i uint32) []byte {
	ports := func(i uint32) (a, b netip.AddrPort) {
		return netip.AddrPortFrom(from, uint16(1024+i%60000)), netip.AddrPortFrom(to, uint16(100+i/60000))
	}
	return func(i uint32) []byte {
		a, b := ports(i)
		if i%2 == 0 {
			return packet.Frame(packet.MAC(src), packet.MAC(dst), packet.EtherTypeIPv4, packet.UDP4(a, b, []byte("flood")))
		}
		header := make([]byte, 20)
		binary.BigEndian.PutUint16(header, a.Port())
		binary.BigEndian.PutUint16(header[2:], b.Port())
		header[12], header[13] = 5<<4, 0x02
		return packet.Frame(packet.MAC(src), packet.MAC(dst), packet.EtherTypeIPv4, packet.IPv4(from, to, unix.IPPROTO_TCP, header))
	}
}

// flood sends frames without a pause until it is stopped.
func flood(t testing.TB, fd int, frame func(i uint32) []byte) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := uint32(0); ctx.Err() == nil; i++ {
			if _, err := unix.Write(fd, frame(i)); err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EAGAIN) {
				t.Errorf("send frame %d of the flood: %v", i, err)
				return
			}
		}
	})
	stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(stop)
	return stop
}

// Of a pod that floods the table, or is flooded, nobody else knows: what others
// have begun goes on whole, and what they begin finds room. When there is none
// for anybody, what is there goes on.
func TestConntrackFlood(t *testing.T) {
	const entries = 4096
	for _, tt := range []struct {
		name   string
		shares uint32 // what there is to share
		inward bool   // the flood comes from the wire
		reason string
	}{
		{"by a pod", entries, false, "conntrack_share"},
		{"to a pod", entries, true, "conntrack_share"},
		{"beyond the table", 1 << 30, false, "conntrack_full"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			d := w.open(Options{maxConns: entries, maxShared: tt.shares})
			a, b := w.addPod(d, 1), w.addPod(d, 2)
			web := netip.AddrPortFrom(farIP, 80)
			w.serve(w.wire, web)
			w.echo(w.wire, farIP)
			stream, err := w.dial(a.ns, a.Addr, web)
			if err != nil {
				t.Fatal(err)
			}
			own, err := w.dial(b.ns, b.Addr, web)
			if err != nil {
				t.Fatal(err)
			}
			datagrams := w.connected(a.ns, farIP)
			if err := errors.Join(exchange(stream, 1000), exchange(own, 1000)); err != nil {
				t.Fatal(err)
			}
			for range 2 { // a stream: more than one request and response
				if !answers(datagrams, true) {
					t.Fatal("not answered before the flood")
				}
			}
			type life struct { // two of one tuple differ in id
				protocol uint8
				id       uint64
			}
			lives := func(p pod) map[life]Connection {
				out := map[life]Connection{}
				for _, c := range connections(t, d, p.Addr, farIP) {
					if c.State == ConnEstablished {
						out[life{c.Protocol, c.ID}] = c
					}
				}
				return out
			}
			before := lives(a)
			if len(before) != 2 {
				t.Fatalf("before the flood: %+v", before)
			}

			fd, frames := w.rawSocket(b.ns, "eth0"), floodFrames(b.MAC, hostMAC, b.Addr, farIP)
			if tt.inward {
				fd, frames = w.rawSocket(w.wire, "r1"), floodFrames(mac("02:00:00:00:01:01"), enis[1].MAC, netip.MustParseAddr("10.9.9.8"), b.Addr)
			}
			stop := flood(t, fd, frames)
			dropped := func() uint64 { return counters(t, d)[tt.reason] }
			eventually(t, "the flood has met the limit", func() bool { return dropped() > entries })
			for range 4 {
				for _, c := range []net.Conn{stream, own} {
					if err := exchange(c, 1<<18); err != nil {
						t.Errorf("a stream under the flood: %v", err)
					}
				}
				for range 50 {
					if !answers(datagrams, true) {
						t.Error("a datagram of a flow that was there is not answered")
					}
				}
				at := dropped()
				eventually(t, "the flood goes on", func() bool { return dropped() > at+1000 })
			}
			// A flow that begins.
			seen := w.ask(a.ns, a.Addr, farIP, 5)
			if tt.reason == "conntrack_share" && seen == "" {
				t.Errorf("a flow of another pod finds no room; dropped: %v", counters(t, d))
			} else if tt.reason == "conntrack_full" && seen != "" {
				t.Error("a flow began although the table is full: the flood is none")
			}
			stop()

			after := lives(a)
			for key, c := range before {
				if now, ok := after[key]; !ok || now.Opener.Packets <= c.Opener.Packets || now.Responder.Packets <= c.Responder.Packets {
					t.Errorf("%+v became %+v", c, now)
				}
			}
			traffic, err := d.Traffic()
			if err != nil {
				t.Fatal(err)
			}
			if drops := traffic[a.Addr].Drops; tt.reason == "conntrack_share" && len(drops) != 0 {
				t.Errorf("of the pod that does not flood was dropped: %v", drops)
			}
			if traffic[b.Addr].Drops[tt.reason] < entries {
				t.Errorf("of the pod that floods was dropped: %v", traffic[b.Addr].Drops)
			}
			if tt.reason != "conntrack_share" {
				return
			}
			// Not above half, which is what is free beside it.
			held := func() (n int) {
				for c, err := range d.Connections() {
					if err != nil {
						t.Fatal(err)
					}
					if c.Opener.Addr == b.Addr || c.Responder.Addr == b.Addr {
						n++
					}
				}
				return n
			}
			if n := held(); n > entries/2 || n < entries/4 {
				t.Errorf("the flood holds %d of %d entries", n, entries)
			}
			// The sweep finds the same, and when all is over the pod has its share again.
			if _, err := d.sweepConns(monoNow()); err != nil {
				t.Fatal(err)
			}
			if seen := w.ask(b.ns, b.Addr, farIP, 2); seen != "" {
				t.Error("a sweep that finds nothing over has given the flood more room")
			}
			if _, err := d.sweepConns(monoNow() + uint64(2*time.Minute)); err != nil {
				t.Fatal(err)
			}
			if seen := w.ask(b.ns, b.Addr, farIP, 5); seen == "" {
				t.Errorf("after the flood the pod finds no room: %v", counters(t, d))
			}
		})
	}
}
