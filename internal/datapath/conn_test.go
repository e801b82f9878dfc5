package datapath

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/testenv"
)

// tracker runs the programs on packets of a test's making, for one pod whose host
// veth is the loopback device of a network namespace made for it.
type tracker struct {
	t    testing.TB
	d    Datapath // its maps
	objs map[time.Duration]*bpfgen.NodePrograms
	max  uint32 // entries of the table of connections; 0: as on a node
	pins string // where the maps are
}

const (
	trackerIndex = 1 // lo
	passed       = ^uint32(0)
	dropped      = 2
)

var (
	podIP, peerIP   = netip.MustParseAddr("10.0.1.129"), netip.MustParseAddr("10.0.1.77")
	podIP6, peerIP6 = netip.MustParseAddr("2001:db8::129"), netip.MustParseAddr("2001:db8::77")
	trackerMAC      = packet.MAC{2, 0x75, 10, 0, 1, 129}
)

// track calls fn in the namespace.
func track(t *testing.T, own netip.Addr, max uint32, fn func(*tracker)) {
	t.Helper()
	testenv.Require(t, "root", "bpf")
	pins := filepath.Dir(mountBPFFS(t))
	if programs != nil {
		defer programs.Release(pins, nil)
	}
	err := nl.DoNew(func() error {
		tr := &tracker{t: t, objs: map[time.Duration]*bpfgen.NodePrograms{}, max: max, pins: pins}
		tr.d.mono = newMono()
		defer tr.close()
		tr.load(0)
		index, slot := uint32(trackerIndex), uint32(1)
		iface := bpfgen.NodeIface{Addr: addrKey(own), PodMac: trackerMAC, Mark: Mark(2), Flags: uint32(bpfgen.NodeIfaceFlagsIFACE_READY), Eni: 2, Slot: slot}
		cpus := make([]bpfgen.NodeIfaceCounters, ebpf.MustPossibleCPU())
		return errors.Join(tr.d.objs.Ifaces.Put(&index, &iface), tr.d.objs.Slots.Put(&slot, &bpfgen.NodeSlot{Iface: iface, Ifindex: index}), tr.d.objs.IfaceStats.Put(&index, cpus), func() error { fn(tr); return nil }())
	})
	if err != nil {
		t.Fatal(err)
	}
}

// load returns the programs with the clock moved on.
func (tr *tracker) load(later time.Duration) *bpfgen.NodePrograms {
	tr.t.Helper()
	if p, ok := tr.objs[later]; ok {
		return p
	}
	spec, err := bpfgen.LoadNode()
	if err != nil {
		tr.t.Fatal(err)
	}
	for name, m := range spec.Maps {
		m.Pinning = ebpf.PinByName // the same for all clocks
		if strings.HasPrefix(name, ".") {
			m.Pinning = ebpf.PinNone
		}
	}
	if tr.max != 0 {
		if err := resizeConns(spec, tr.max); err != nil {
			tr.t.Fatal(err)
		}
	}
	if err := sizeCPUs(spec); err != nil {
		tr.t.Fatal(err)
	}
	setConstants(tr.t, spec, map[string]any{bpfgen.NodeVarIpv6Allowed: uint32(1), bpfgen.NodeVarClockOffset: uint64(later)})
	loader := (*ebpf.CollectionSpec).LoadAndAssign
	if programs != nil {
		loader = programs.Load
	}
	opts := &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: tr.pins}}
	p := new(bpfgen.NodePrograms)
	if len(tr.objs) == 0 {
		if err := loader(spec, &tr.d.objs, opts); err != nil {
			tr.t.Fatal(err)
		}
		p = &tr.d.objs.NodePrograms
	} else if err := loader(spec, p, opts); err != nil {
		tr.t.Fatal(err)
	}
	tr.objs[later] = p
	return p
}

func (tr *tracker) close() {
	for _, p := range tr.objs {
		_ = p.Close()
	}
	_ = tr.d.objs.Close()
}

// run runs a program on an IP packet and returns its verdict.
func (tr *tracker) run(prog *ebpf.Program, ip []byte) uint32 {
	tr.t.Helper()
	etherType := uint16(packet.EtherTypeIPv4)
	if len(ip) > 0 && ip[0]>>4 == 6 {
		etherType = packet.EtherTypeIPv6
	}
	verdict, err := prog.Run(&ebpf.RunOptions{Data: packet.Frame(trackerMAC, packet.MAC{}, etherType, ip)})
	if err != nil {
		tr.t.Fatalf("run %s on %x: %v", prog, ip, err)
	}
	return verdict
}

// out has the pod send, in has the stack send to the pod, some time later than now.
func (tr *tracker) out(later time.Duration, ip []byte) uint32 {
	tr.t.Helper()
	return tr.run(tr.load(later).FromPod, ip)
}
func (tr *tracker) in(later time.Duration, ip []byte) uint32 {
	tr.t.Helper()
	return tr.run(tr.load(later).ToPod, ip)
}

// pass demands that packets pass.
func (tr *tracker) pass(verdicts ...uint32) {
	tr.t.Helper()
	for i, v := range verdicts {
		if v != passed {
			tr.t.Errorf("packet %d: verdict %d, want it passed; drops %v", i, int32(v), tr.drops())
		}
	}
}

func (tr *tracker) drops() map[string]uint64 {
	out := map[string]uint64{}
	for reason, name := range reasonNames {
		var perCPU []uint64
		if err := tr.d.objs.Drops.Lookup(uint32(reason), &perCPU); err != nil {
			tr.t.Fatal(err)
		}
		for _, n := range perCPU {
			if n != 0 {
				out[name] += n
			}
		}
	}
	return out
}

// all returns the table.
func (tr *tracker) all() (out []Connection) {
	tr.t.Helper()
	for c, err := range tr.d.Connections() {
		if err != nil {
			tr.t.Fatal(err)
		}
		out = append(out, c)
	}
	return out
}

// one returns the only entry.
func (tr *tracker) one() Connection {
	tr.t.Helper()
	all := tr.all()
	if len(all) != 1 {
		tr.t.Fatalf("%d connections, want 1: %+v", len(all), all)
	}
	return all[0]
}

const (
	fin, syn, rst, ack = 1, 2, 4, 16
)

// tcp is a segment without payload.
func tcp(src, dst netip.AddrPort, flags uint8) []byte {
	b := make([]byte, 20)
	binary.BigEndian.PutUint16(b, src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	b[12], b[13] = 5<<4, flags
	return ip(src.Addr(), dst.Addr(), unix.IPPROTO_TCP, b)
}

func udp(src, dst netip.AddrPort, payload string) []byte {
	b := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(b, src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(payload)))
	return ip(src.Addr(), dst.Addr(), unix.IPPROTO_UDP, append(b, payload...))
}

func ip(src, dst netip.Addr, proto uint8, payload []byte) []byte {
	if src.Is4() {
		return packet.IPv4(src, dst, proto, payload)
	}
	b := make([]byte, 40, 40+len(payload))
	b[0], b[6], b[7] = 6<<4, proto, 64
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	copy(b[8:], src.AsSlice())
	copy(b[24:], dst.AsSlice())
	return append(b, payload...)
}

var (
	podPort, peerPort   = netip.AddrPortFrom(podIP, 40000), netip.AddrPortFrom(peerIP, 80)
	podPort6, peerPort6 = netip.AddrPortFrom(podIP6, 40000), netip.AddrPortFrom(peerIP6, 80)
)

func TestConntrackTCP(t *testing.T) {
	for _, pair := range [][2]netip.AddrPort{{podPort, peerPort}, {podPort6, peerPort6}} {
		pod, peer := pair[0], pair[1]
		track(t, pod.Addr(), 0, func(tr *tracker) {
			want := func(s ConnState, timeout time.Duration) {
				t.Helper()
				if c := tr.one(); c.State != s || c.Timeout != timeout || c.Opener.Addr != pod.Addr() || c.Opener.Port != pod.Port() || c.Responder.Addr != peer.Addr() || c.Responder.Port != peer.Port() || c.Midflow {
					t.Errorf("%+v, want %s for %s", c, s, timeout)
				}
			}
			tr.pass(tr.out(0, tcp(pod, peer, syn)))
			want(ConnOpening, time.Minute)
			tr.pass(tr.in(0, tcp(peer, pod, syn|ack)))
			want(ConnOpening, time.Minute)
			tr.pass(tr.out(0, tcp(pod, peer, ack)))
			want(ConnEstablished, 432000*time.Second)
			tr.pass(tr.out(0, tcp(pod, peer, syn))) // a stray one
			want(ConnEstablished, 432000*time.Second)
			tr.pass(tr.out(0, tcp(pod, peer, fin|ack)))
			want(ConnEstablished, 432000*time.Second) // half of it goes on
			tr.pass(tr.in(0, tcp(peer, pod, fin|ack)))
			want(ConnClosed, 10*time.Second)
			c := tr.one()
			if c.Opener.Packets != 4 || c.Responder.Packets != 2 || c.Opener.Bytes != 4*uint64(len(tcp(pod, peer, 0))) || c.Opener.HostIfIndex != trackerIndex || c.Responder.HostIfIndex != 0 || c.Provenance != Stack {
				t.Errorf("%+v", c)
			}
			// The ports are used again: another connection, and the agent is
			// told how the first one ended.
			tr.pass(tr.in(time.Second, tcp(peer, pod, syn)))
			c = tr.one()
			if c.State != ConnOpening || c.Opener.Addr != peer.Addr() || c.Responder.Packets != 0 || c.Opener.Packets != 1 {
				t.Errorf("opened again from the other side: %+v", c)
			}
			tr.pass(tr.out(time.Second, tcp(pod, peer, rst)))
			if c := tr.one(); c.State != ConnClosed {
				t.Errorf("reset: %+v", c)
			}
		})
	}
}

func TestConntrackMidflow(t *testing.T) {
	track(t, podIP, 0, func(tr *tracker) {
		tr.pass(tr.out(0, tcp(podPort, peerPort, ack)))
		if c := tr.one(); !c.Midflow || c.State != ConnOpening || c.Timeout != time.Minute || c.Provenance != Stack {
			t.Errorf("%+v", c)
		}
		tr.pass(tr.in(0, tcp(peerPort, podPort, ack)))
		if c := tr.one(); c.State != ConnEstablished {
			t.Errorf("heard from both ends: %+v", c)
		}
	})
}

// Idle connections are over after AWS's times; a packet that comes then begins
// another.
func TestConntrackTimeouts(t *testing.T) {
	track(t, podIP, 0, func(tr *tracker) {
		ask, answer := udp(podPort, peerPort, "?"), udp(peerPort, podPort, "!")
		for _, later := range []time.Duration{20 * time.Second, 150 * time.Second, 400 * time.Second} {
			tr.load(later) // takes its time
		}
		want := func(later time.Duration, timeout time.Duration, packets uint64) {
			t.Helper()
			c := tr.one()
			if c.Timeout != timeout || c.Opener.Packets != packets {
				t.Errorf("after %s: %+v, want %s and %d packets", later, c, timeout, packets)
			}
		}
		tr.pass(tr.out(0, ask), tr.in(0, answer))
		want(0, 30*time.Second, 1)
		tr.pass(tr.out(20*time.Second, ask))
		want(20*time.Second, 30*time.Second, 2)
		tr.pass(tr.in(20*time.Second, answer))
		want(20*time.Second, 180*time.Second, 2) // more than one request and response
		tr.pass(tr.out(150*time.Second, ask))
		want(150*time.Second, 180*time.Second, 3)
		tr.pass(tr.out(400*time.Second, ask))
		want(400*time.Second, 30*time.Second, 1)

		for _, c := range []struct {
			packet  []byte
			timeout time.Duration
		}{
			{packet.Echo4(podIP, peerIP, 7, 1, nil), 30 * time.Second},
			{packet.IPv4(podIP, peerIP, unix.IPPROTO_GRE, make([]byte, 8)), 600 * time.Second},
		} {
			tr.pass(tr.out(400*time.Second, c.packet))
			var found bool
			for _, e := range tr.all() {
				found = found || e.Protocol == c.packet[9] && e.Timeout == c.timeout
			}
			if !found {
				t.Errorf("protocol %d: none with %s: %+v", c.packet[9], c.timeout, tr.all())
			}
		}
		// The sweep takes what is over, and nothing else: at 440 s after the
		// beginning the UDP and ICMP flows are.
		removed, err := tr.d.sweepConns(monoNow() + uint64(440*time.Second))
		if err != nil || removed != 2 {
			t.Errorf("swept %d (%v), want 2", removed, err)
		}
		if c := tr.one(); c.Protocol != unix.IPPROTO_GRE {
			t.Errorf("left: %+v", c)
		}
	})
}

// about returns an ICMP error by from to the sender of a packet.
func about(from netip.Addr, typ, code uint8, quoted []byte) []byte {
	p, body := uint8(unix.IPPROTO_ICMP), append([]byte{typ, code, 0, 0, 0, 0, 0, 0}, quoted...)
	to := netip.AddrFrom4([4]byte(quoted[12:16]))
	if quoted[0]>>4 == 6 {
		p, to = unix.IPPROTO_ICMPV6, netip.AddrFrom16([16]byte(quoted[8:24]))
		return ip(from, to, p, body)
	}
	return packet.IPv4(from, to, p, body)
}

func TestConntrackICMP(t *testing.T) {
	router, router6 := netip.MustParseAddr("10.0.1.1"), netip.MustParseAddr("2001:db8::1")
	track(t, podIP, 0, func(tr *tracker) {
		sent := udp(podPort, peerPort, "too long")
		tr.pass(tr.out(0, sent))
		before := tr.one()
		// The router answers for the peer; so does the peer.
		tr.pass(tr.in(10*time.Second, about(router, 3, 4, sent)), tr.in(10*time.Second, about(peerIP, 3, 3, sent)))
		c := tr.one()
		if c.Responder.Packets != 2 || !c.Last.Equal(before.Last) {
			t.Errorf("%+v: want both errors counted, and the flow not kept alive", c)
		}
		// The pod's own error about what it was sent.
		got := udp(peerPort, podPort, "?")
		tr.pass(tr.in(0, got), tr.out(0, about(podIP, 3, 3, got)))
		if c := tr.one(); c.Opener.Packets != 2 || c.Responder.Packets != 3 {
			t.Errorf("%+v", c)
		}
		// About nothing that is known, and a forged one: packets of their own.
		tr.pass(tr.in(0, about(router, 3, 4, udp(podPort, netip.AddrPortFrom(peerIP, 81), ""))))
		forged := about(router, 3, 4, udp(netip.AddrPortFrom(peerIP, 9), netip.AddrPortFrom(podIP, 9), ""))
		copy(forged[16:20], podIP.AsSlice())
		tr.pass(tr.in(0, forged))
		var own int
		for _, c := range tr.all() {
			if c.Protocol == unix.IPPROTO_ICMP && c.ICMPType == 3 && c.ICMPCode == 4 && c.Midflow {
				own++
			}
		}
		if own != 1 { // one flow: the same router, type and code
			t.Errorf("%+v", tr.all())
		}
	})
	track(t, podIP, 0, func(tr *tracker) {
		request := packet.Echo4(podIP, peerIP, 7, 1, nil)
		reply := packet.Echo4(peerIP, podIP, 7, 1, nil)
		reply[20] = 0
		tr.pass(tr.out(0, request), tr.in(0, reply), tr.in(0, about(router, 11, 0, request)))
		if c := tr.one(); c.ICMPID != 7 || c.ICMPType != 8 || c.Opener.Addr != podIP || c.Opener.Packets != 1 || c.Responder.Packets != 2 {
			t.Errorf("%+v", c)
		}
		tr.pass(tr.in(0, packet.Echo4(peerIP, podIP, 7, 1, nil))) // asked the other way: another
		if n := len(tr.all()); n != 2 {
			t.Errorf("%d flows", n)
		}
	})
	track(t, podIP6, 0, func(tr *tracker) {
		sent := tcp(podPort6, peerPort6, syn)
		tr.pass(tr.out(0, sent), tr.in(0, about(router6, 2, 0, sent)))
		if c := tr.one(); c.Responder.Packets != 1 {
			t.Errorf("%+v", c)
		}
	})
}

// fragments cuts an IPv4 packet in two, at a multiple of 8 of its payload.
func fragments(ip []byte, at int, id uint16) (first, second []byte) {
	first = append([]byte(nil), ip[:20+at]...)
	second = append(append([]byte(nil), ip[:20]...), ip[20+at:]...)
	for _, f := range [][]byte{first, second} {
		binary.BigEndian.PutUint16(f[2:], uint16(len(f)))
		binary.BigEndian.PutUint16(f[4:], id)
	}
	binary.BigEndian.PutUint16(first[6:], 0x2000)
	binary.BigEndian.PutUint16(second[6:], uint16(at/8))
	return first, second
}

func TestConntrackFragments(t *testing.T) {
	track(t, podIP, 0, func(tr *tracker) {
		first, second := fragments(udp(podPort, peerPort, "0123456789abcdef"), 16, 77)
		if tr.out(0, second) != dropped || tr.drops()["fragment"] != 1 {
			t.Errorf("without the first: %v", tr.drops())
		}
		tr.pass(tr.out(0, first), tr.out(0, second))
		if c := tr.one(); c.Opener.Packets != 2 || c.Opener.Port != podPort.Port() || c.Responder.Port != peerPort.Port() {
			t.Errorf("%+v", c)
		}
		_, other := fragments(udp(podPort, peerPort, "0123456789abcdef"), 16, 78)
		if tr.out(0, other) != dropped || tr.out(31*time.Second, second) != dropped {
			t.Error("passed: another datagram's, or one that came too late")
		}
	})
	// IPv6, behind other extension headers.
	track(t, podIP6, 0, func(tr *tracker) {
		body := make([]byte, 24)
		copy(body, udp(podPort6, peerPort6, "0123456789abcdef")[40:])
		piece := func(offset uint16, more bool, payload []byte) []byte {
			flags := offset &^ 7
			if more {
				flags |= 1
			}
			h := []byte{44, 0, 1, 4, 0, 0, 0, 0} // destination options: padding
			h = append(h, unix.IPPROTO_UDP, 0, byte(flags>>8), byte(flags), 0, 0, 1, 2)
			return ip(podIP6, peerIP6, 60, append(h, payload...))
		}
		if tr.out(0, piece(16, false, body[16:])) != dropped {
			t.Error("passed without the first")
		}
		tr.pass(tr.out(0, piece(0, true, body[:16])), tr.out(0, piece(16, false, body[16:])))
		if c := tr.one(); c.Opener.Packets != 2 || c.Opener.Port != podPort6.Port() || c.Protocol != unix.IPPROTO_UDP {
			t.Errorf("%+v", c)
		}
	})
}

// Extension headers are gone through, and a packet that hides its upper layer
// behind more of them than anybody needs is dropped.
func TestConntrackExtensionHeaders(t *testing.T) {
	track(t, podIP6, 0, func(tr *tracker) {
		seg := tcp(podPort6, peerPort6, syn)[40:]
		chain := func(n int) []byte {
			var b []byte
			for i := range n {
				next := byte(60)
				if i == n-1 {
					next = unix.IPPROTO_TCP
				}
				b = append(b, next, 0, 1, 4, 0, 0, 0, 0)
			}
			return ip(podIP6, peerIP6, 60, append(b, seg...))
		}
		tr.pass(tr.out(0, chain(1)), tr.out(0, chain(4)), tr.out(0, chain(7)))
		if c := tr.one(); c.Opener.Packets != 3 || c.Responder.Port != 80 {
			t.Errorf("%+v", c)
		}
		if tr.out(0, chain(8)) != dropped || tr.out(0, ip(podIP6, peerIP6, 60, []byte{60, 255, 0, 0})) != dropped {
			t.Error("passed: a chain without an end")
		}
		// Hop-by-hop, routing, and an authentication header, whose length is
		// counted otherwise.
		h := []byte{43, 0, 1, 4, 0, 0, 0, 0, 51, 0, 0, 0, 0, 0, 0, 0, unix.IPPROTO_TCP, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9}
		tr.pass(tr.out(0, ip(podIP6, peerIP6, 0, append(h, seg...))))
		if c := tr.one(); c.Opener.Packets != 4 {
			t.Errorf("%+v", c)
		}
	})
}

// When the table is full, no flow begins; those that are there go on; and flows
// that are over make room, also if nobody sweeps.
func TestConntrackFull(t *testing.T) {
	const size = 64
	track(t, podIP, size, func(tr *tracker) {
		flow := func(i int) (out, in []byte) {
			a := netip.AddrPortFrom(podIP, uint16(1000+i))
			return tcp(a, peerPort, syn), tcp(peerPort, a, syn|ack)
		}
		begun := 0
		for i := range size + 10 {
			out, _ := flow(i)
			if tr.out(0, out) == passed {
				begun++
			}
		}
		// The kernel keeps a few elements per CPU on the side.
		if n := len(tr.all()); n > size+setWays || n != begun || begun < size+setWays-8*ebpf.MustPossibleCPU() {
			t.Errorf("%d begun, %d there, of at most %d", begun, n, size+setWays)
		}
		if tr.drops()["conntrack_full"] != uint64(size+10-begun) {
			t.Errorf("drops: %v", tr.drops())
		}
		for i := range begun {
			out, in := flow(i)
			tr.pass(tr.in(0, in), tr.out(0, out))
		}
		evicted := func(want int) {
			t.Helper()
			if p, err := tr.d.Paths(); err != nil || p.Evicted != uint64(want) || p.NoRoom != uint64(size+10-begun) {
				t.Errorf("%+v, %v, want %d removed", p, err, want)
			}
			if n := len(tr.all()); n != begun+1-want {
				t.Errorf("%d connections: %+v", n, tr.all())
			}
		}
		// All are over but those of the set.
		for i := range setWays {
			tr.pass(tr.out(50*time.Second, tcp(netip.AddrPortFrom(podIP, uint16(1000+i)), peerPort, ack)))
		}
		out, _ := flow(size + 20)
		tr.pass(tr.out(70*time.Second, out))
		evicted(begun - setWays)
	})
}

// Whatever a pod sends, cut short anywhere or made of noise, has a verdict, and
// nothing of it enters the table that is not whole.
func TestConntrackHostile(t *testing.T) {
	for _, own := range []netip.Addr{podIP, podIP6} {
		track(t, own, 0, func(tr *tracker) {
			pod, peer := netip.AddrPortFrom(own, 40000), peerPort
			if own.Is6() {
				peer = peerPort6
			}
			whole := [][]byte{tcp(pod, peer, syn), udp(pod, peer, "x"), about(own, 3, 4, udp(peer, pod, ""))}
			for _, p := range whole {
				shortest := 20
				if own.Is6() {
					shortest = 40
				}
				// The kernel runs no program on less than an IP header; packets
				// that short are in TestFramesFromARing.
				for n := shortest; n < len(p); n++ {
					v := tr.out(0, p[:n])
					if n < shortest+8 && v != dropped {
						t.Errorf("%d of %d bytes: verdict %d", n, len(p), int32(v))
					}
				}
			}
			r := rand.New(rand.NewPCG(1, 2))
			for range 4000 {
				p := append([]byte(nil), whole[r.IntN(len(whole))]...)
				for range 1 + r.IntN(6) {
					p[r.IntN(len(p))] = byte(r.Uint32())
				}
				p[0] = p[0]&0x0f | whole[0][0]&0xf0 // the version that the frame says
				if v := tr.out(0, p); v != passed && v != dropped {
					t.Fatalf("verdict %d for %x", int32(v), p)
				}
				_ = tr.in(0, p[:min(40+r.IntN(len(p)), len(p))])
			}
			for _, c := range tr.all() {
				if c.Opener.Addr != own && c.Responder.Addr != own && c.Opener.HostIfIndex != 0 && c.Opener.Packets > 0 && c.Responder.HostIfIndex == 0 {
					t.Errorf("sent with another's address: %+v", c)
				}
			}
		})
	}
}
