package datapath

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/packet"
)

// rawSocket opens a packet socket on a device of a namespace.
func (w *world) rawSocket(netns, device string) int {
	w.t.Helper()
	var fd int
	err := nl.Do(nl.Path(netns), func() error {
		c, err := nl.Dial()
		if err != nil {
			return err
		}
		defer c.Close()
		l, err := c.LinkByName(device)
		if err != nil {
			return err
		}
		const all = uint16(unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8)
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(all))
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: l.Index})
	})
	if err != nil {
		w.t.Fatalf("open packet socket on %s of %s: %v", device, netns, err)
	}
	w.t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

func sendRaw(t testing.TB, fd int, frame []byte) {
	t.Helper()
	if _, err := unix.Write(fd, frame); err != nil {
		t.Fatalf("send frame of %d bytes: %v", len(frame), err)
	}
}

// received reads what a packet socket has, without what it sent itself.
func received(t testing.TB, fd int) (frames [][]byte) {
	t.Helper()
	buf := make([]byte, 65536)
	for {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) {
			return frames
		}
		if err != nil {
			t.Fatal(err)
		}
		if l, ok := from.(*unix.SockaddrLinklayer); ok && l.Pkttype != unix.PACKET_OUTGOING {
			frames = append(frames, append([]byte(nil), buf[:n]...))
		}
	}
}

// marker is in the payload of every frame that must not pass.
const marker = "must-not-pass"

func udpFrame(src, dst net.HardwareAddr, from, to netip.Addr, payload string) []byte {
	return packet.Frame(packet.MAC(src), packet.MAC(dst), packet.EtherTypeIPv4,
		packet.UDP4(netip.AddrPortFrom(from, 4000), netip.AddrPortFrom(to, echoPort), []byte(payload)))
}

// tagged puts an 802.1Q tag into a frame.
func tagged(frame []byte, tpid uint16) []byte {
	out := append([]byte(nil), frame[:12]...)
	out = binary.BigEndian.AppendUint16(out, tpid)
	out = binary.BigEndian.AppendUint16(out, 5)
	return append(out, frame[12:]...)
}

// Nobody speaks for another: every frame that is not the endpoint's own is
// dropped at its own veth, and counted by why.
func TestNobodySpeaksForAnother(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	a, b := w.addPod(d, 1), w.addPod(d, 2)
	w.echo(w.wire, farIP)
	w.echo(b.ns, b.Addr)

	send := w.rawSocket(a.ns, "eth0")
	ears := map[string]int{"the wire": w.rawSocket(w.wire, "r1"), "the primary's wire": w.rawSocket(w.wire, "r0"), "the neighbour": w.rawSocket(b.ns, "eth0")}

	own := func(to netip.Addr) []byte { return udpFrame(a.MAC, hostMAC, a.Addr, to, marker) }
	arp := func(op uint16, srcMAC net.HardwareAddr, senderMAC net.HardwareAddr, senderIP, target netip.Addr) []byte {
		return packet.Frame(packet.MAC(srcMAC), packet.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, packet.EtherTypeARP,
			packet.BuildARP(packet.ARP{Op: op, SenderMAC: packet.MAC(senderMAC), SenderIP: senderIP, TargetIP: target}))
	}
	short := func(frame []byte, n int) []byte { return frame[:n] }
	ipv6 := make([]byte, 40+len(marker))
	ipv6[0] = 0x60
	copy(ipv6[40:], marker)
	bad := own(farIP)
	bad[14] = 0x55 // IP version 5

	tests := []struct {
		name, reason string
		frame        []byte
	}{
		{"neighbour's address", "source_address", udpFrame(a.MAC, hostMAC, b.Addr, farIP, marker)},
		{"neighbour's address, to the neighbour", "source_address", udpFrame(a.MAC, hostMAC, b.Addr, b.Addr, marker)},
		{"node's address", "source_address", udpFrame(a.MAC, hostMAC, enis[0].Primary, farIP, marker)},
		{"no address", "source_address", udpFrame(a.MAC, hostMAC, netip.IPv4Unspecified(), netip.MustParseAddr("255.255.255.255"), marker)},
		{"loopback address", "source_address", udpFrame(a.MAC, hostMAC, netip.MustParseAddr("127.0.0.1"), enis[0].Primary, marker)},
		{"neighbour's MAC", "source_mac", udpFrame(b.MAC, hostMAC, a.Addr, farIP, marker)},
		{"host's MAC", "source_mac", udpFrame(hostMAC, hostMAC, a.Addr, farIP, marker)},
		{"ARP with neighbour's address", "arp_sender", arp(1, a.MAC, a.MAC, b.Addr, podGateway)},
		{"ARP with neighbour's MAC inside", "arp_sender", arp(1, a.MAC, b.MAC, a.Addr, podGateway)},
		{"ARP frame from neighbour's MAC", "source_mac", arp(1, b.MAC, b.MAC, b.Addr, podGateway)},
		{"gratuitous ARP for the neighbour", "arp_sender", arp(2, a.MAC, a.MAC, b.Addr, b.Addr)},
		{"ARP for the neighbour", "arp_other", arp(1, a.MAC, a.MAC, a.Addr, b.Addr)},
		{"ARP for the node", "arp_other", arp(1, a.MAC, a.MAC, a.Addr, enis[0].Primary)},
		{"ARP reply", "arp_other", arp(2, a.MAC, a.MAC, a.Addr, podGateway)},
		{"ARP cut short", "malformed", short(arp(1, a.MAC, a.MAC, a.Addr, podGateway), 30)},
		{"IPv6", "ipv6", packet.Frame(packet.MAC(a.MAC), packet.MAC(hostMAC), packet.EtherTypeIPv6, ipv6)},
		{"LLDP", "ethertype", packet.Frame(packet.MAC(a.MAC), packet.MAC(hostMAC), 0x88cc, []byte(marker))},
		{"802.3 length", "ethertype", packet.Frame(packet.MAC(a.MAC), packet.MAC(hostMAC), 40, []byte(marker))},
		{"802.1Q tag", "vlan", tagged(own(farIP), unix.ETH_P_8021Q)},
		{"802.1ad tag", "vlan", tagged(own(farIP), unix.ETH_P_8021AD)},
		{"two tags", "vlan", tagged(tagged(own(farIP), unix.ETH_P_8021Q), unix.ETH_P_8021AD)},
		{"IPv4 cut short", "malformed", short(own(farIP), 30)},
		{"IP version 5", "malformed", bad},
		{"instance metadata", "imds", own(netip.MustParseAddr("169.254.169.254"))},
	}
	const times = 3
	want := counters(t, d)
	refused := func(when string, before func()) {
		t.Helper()
		for _, tt := range tests {
			before()
			for range times {
				sendRaw(t, send, tt.frame)
			}
			want[tt.reason] += times
			eventually(t, tt.name+when+" is counted as "+tt.reason, func() bool { return counters(t, d)[tt.reason] >= want[tt.reason] })
			if diff := cmp.Diff(want, counters(t, d)); diff != "" {
				t.Errorf("%s%s: counters (-want +got):\n%s", tt.name, when, diff)
			}
		}
	}
	refused("", func() {})
	refused(", in a flow that is there,", func() {
		for _, to := range []netip.Addr{farIP, b.Addr} {
			sendRaw(t, send, udpFrame(a.MAC, hostMAC, a.Addr, to, "x"))
		}
	})
	if got := paths(t, d); got.Direct == 0 || got.Stack != 0 {
		t.Errorf("paths: %+v", got)
	}

	// What the endpoint may send goes the same ways after all that.
	for _, to := range []netip.Addr{farIP, b.Addr} {
		if got := w.ask(a.ns, a.Addr, to, 20); got != a.Addr.String() {
			t.Errorf("asking %s: seen as %q", to, got)
		}
	}
	for where, fd := range ears {
		for _, frame := range received(t, fd) {
			p, err := packet.Parse(frame)
			if err == nil && p.EtherType == packet.EtherTypeIPv6 {
				continue // the wire's own chatter; the marker is looked for below
			}
			if containsMarker(frame) {
				t.Errorf("%s heard %x", where, frame)
			}
		}
	}
	traffic, err := d.Traffic()
	if err != nil {
		t.Fatal(err)
	}
	var total uint64
	for _, n := range traffic[a.Addr].Drops {
		total += n
	}
	if total != uint64(2*times*len(tests)) || len(traffic[b.Addr].Drops) != 0 {
		t.Errorf("drops of the sender %v (want %d in all), of its neighbour %v", traffic[a.Addr].Drops, 2*times*len(tests), traffic[b.Addr].Drops)
	}
	if last := traffic[a.Addr].LastDrop; last.Reason != "imds" || last.EtherType != unix.ETH_P_IP || time.Since(last.At) > time.Minute {
		t.Errorf("last drop: %+v", last)
	}
}

func containsMarker(frame []byte) bool {
	for i := 0; i+len(marker) <= len(frame); i++ {
		if string(frame[i:i+len(marker)]) == marker {
			return true
		}
	}
	return false
}

func TestGatewayARPIsAnswered(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	a := w.addPod(d, 1)
	fd := w.rawSocket(a.ns, "eth0")
	sendRaw(t, fd, packet.Frame(packet.MAC(a.MAC), packet.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, packet.EtherTypeARP,
		packet.BuildARP(packet.ARP{Op: 1, SenderMAC: packet.MAC(a.MAC), SenderIP: a.Addr, TargetIP: podGateway})))
	var got packet.Packet
	eventually(t, "an answer to ARP", func() bool {
		for _, frame := range received(t, fd) {
			if p, err := packet.Parse(frame); err == nil && p.EtherType == packet.EtherTypeARP {
				got = p
				return true
			}
		}
		return false
	})
	want := packet.ARP{Op: 2, SenderMAC: packet.MAC(hostMAC), SenderIP: podGateway, TargetMAC: packet.MAC(a.MAC), TargetIP: a.Addr}
	if diff := cmp.Diff(&want, got.ARP, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("ARP answer (-want +got):\n%s", diff)
	}
	// And a pod that lost its permanent entry finds its way again.
	w.ip(a.ns, "neigh del 169.254.1.1 dev eth0")
	w.echo(w.wire, farIP)
	if seen := w.ask(a.ns, a.Addr, farIP, 20); seen != a.Addr.String() {
		t.Errorf("without its neighbour entry: seen as %q", seen)
	}
}

func TestIMDS(t *testing.T) {
	w := newWorld(t)
	imds := netip.MustParseAddr("169.254.169.254")
	w.ip(w.wire, "addr add 169.254.169.254/32 dev lo")
	w.echo(w.wire, imds)
	d := w.open(Options{AllowIMDS: true})
	a := w.addPod(d, 1)
	if seen := w.ask(a.ns, a.Addr, imds, 20); seen != a.Addr.String() {
		t.Errorf("allowed: seen as %q", seen)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = w.open(Options{})
	if seen := w.ask(a.ns, a.Addr, imds, 2); seen != "" {
		t.Errorf("denied: seen as %q", seen)
	}
	if n := counters(t, d)["imds"]; n != 2 {
		t.Errorf("%d packets counted as imds, want 2", n)
	}
}

// A sender that spins in the namespace before Add, by packet socket and UDP,
// gets nothing past the gate before policy is there, and all after.
func TestNothingPassesBeforePolicy(t *testing.T) {
	for _, fail := range []bool{false, true} {
		name := "policy comes late"
		if fail {
			name = "policy is refused"
		}
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			var d *Datapath
			refused := errors.New("refused")
			ear := w.rawSocket(w.wire, "r1")
			d = w.open(Options{BeforeReady: func(ctx context.Context, e Endpoint) error {
				before := counters(t, d)["not_ready"]
				eventually(t, "the sender runs into the gate", func() bool { return counters(t, d)["not_ready"] > before+100 })
				if n := marked(t, ear); n != 0 {
					t.Errorf("%d frames passed before policy", n)
				}
				// Nor does anything reach the pod.
				w.echo(nsOf(e), e.Addr)
				podEar := w.rawSocket(nsOf(e), e.IfName)
				if w.ask(w.wire, farIP, e.Addr, 2) != "" || len(received(t, podEar)) != 0 {
					t.Error("the pod was reached before policy")
				}
				if fail {
					return refused
				}
				return nil
			}})
			ns := w.netns("pod")
			e := endpoint(1, ns)
			stop := spin(t, ns, udpFrame(podMAC(e.Addr), hostMAC, e.Addr, farIP, marker))
			defer stop()
			_, err := d.Add(context.Background(), e, openNetns(t, ns))
			if fail {
				if !errors.Is(err, refused) {
					t.Errorf("Add: %v", err)
				}
				stop()
				if n := marked(t, ear); n != 0 {
					t.Errorf("%d frames passed although policy was refused", n)
				}
				assertNothingLeft(t, w, d, 0)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			eventually(t, "frames pass after policy", func() bool { return marked(t, ear) > 0 })
			if w.ask(w.wire, farIP, e.Addr, 20) == "" {
				t.Error("the pod is not reached after policy")
			}
		})
	}
}

func nsOf(e Endpoint) string { return filepath.Base(e.Netns) }

func marked(t testing.TB, fd int) (n int) {
	t.Helper()
	for _, f := range received(t, fd) {
		if containsMarker(f) {
			n++
		}
	}
	return n
}

// spin sends frame from whatever device called eth0 is in the namespace, and
// the marker by UDP, without a pause, until stop.
func spin(t testing.TB, netns string, frame []byte) (stop func()) {
	t.Helper()
	var stopped atomic.Bool
	done := make(chan error, 1)
	go func() {
		done <- nl.Do(nl.Path(netns), func() error {
			raw, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				return err
			}
			defer unix.Close(raw)
			udp, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				return err
			}
			defer unix.Close(udp)
			to := &unix.SockaddrInet4{Port: echoPort, Addr: farIP.As4()}
			ifindex := 0
			for !stopped.Load() {
				if ifindex == 0 {
					if ifr, err := unix.NewIfreq("eth0"); err == nil && unix.IoctlIfreq(udp, unix.SIOCGIFINDEX, ifr) == nil {
						ifindex = int(ifr.Uint32())
					}
				} else if err := unix.Sendto(raw, frame, 0, &unix.SockaddrLinklayer{Ifindex: ifindex, Halen: 6}); errors.Is(err, unix.ENXIO) {
					ifindex = 0
				}
				_ = unix.Sendto(udp, []byte(marker), 0, to)
			}
			return nil
		})
	}()
	return func() {
		if !stopped.Swap(true) {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
}

// A lost program does not open the node: neither what a pod sends through it
// nor what it sends to it passes, and it is counted.
func TestLostProgramsCloseTheNode(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	a, b := w.addPod(d, 1), w.addPod(d, 2)
	w.echo(w.wire, farIP)
	w.echo(w.node, enis[0].Primary)
	w.echo(b.ns, b.Addr)
	targets := []netip.Addr{farIP, enis[0].Primary, b.Addr}
	for _, to := range targets {
		if w.ask(a.ns, a.Addr, to, 20) == "" {
			t.Fatalf("%s does not answer", to)
		}
	}

	for _, e := range []Endpoint{a.Endpoint, b.Endpoint} {
		if err := d.hooks.detach(e.device()); err != nil {
			t.Fatal(err)
		}
	}
	if out := w.run("ip", "netns", "exec", w.node, "bpftool", "net"); containsAny(out, "from_pod", "to_pod") {
		t.Fatalf("programs are attached still:\n%s", out)
	}
	before := counters(t, d)
	for _, to := range targets {
		if seen := w.ask(a.ns, a.Addr, to, 2); seen != "" {
			t.Errorf("%s answers without programs: seen as %s", to, seen)
		}
	}
	// By ARP, and by IPv6 too, it gets nothing from the node itself.
	fd := w.rawSocket(a.ns, "eth0")
	sendRaw(t, fd, packet.Frame(packet.MAC(a.MAC), packet.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, packet.EtherTypeARP,
		packet.BuildARP(packet.ARP{Op: 1, SenderMAC: packet.MAC(a.MAC), SenderIP: a.Addr, TargetIP: enis[0].Primary})))
	after := counters(t, d)
	if n := after[noMark] - before[noMark]; n < uint64(2*len(targets)) {
		t.Errorf("%d packets counted as %s, want at least %d", n, noMark, 2*len(targets))
	}
	if frames := received(t, fd); len(frames) != 0 {
		t.Errorf("the pod was answered: %x", frames)
	}

	// The next start heals it.
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	w.open(Options{})
	for _, to := range targets {
		if w.ask(a.ns, a.Addr, to, 20) == "" {
			t.Errorf("%s does not answer after the datapath was opened again", to)
		}
	}
}

// A device of our group that the maps do not know passes nothing either way.
func TestUnknownInterface(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	a := w.addPod(d, 1)
	w.echo(w.wire, farIP)
	index := uint32(a.HostIfIndex)
	if err := d.objs.Ifaces.Delete(&index); err != nil {
		t.Fatal(err)
	}
	if w.ask(a.ns, a.Addr, farIP, 2) != "" || w.ask(w.wire, farIP, a.Addr, 2) != "" {
		t.Error("answered")
	}
	eventually(t, "all four are counted", func() bool { return counters(t, d)["unknown_interface"] == 4 })
}

// When an endpoint goes, what is under way stops with it, either way: packets of a
// flow that is tracked are sent on without a look at the map of interfaces.
func TestShutStopsWhatIsUnderWay(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	a, b := w.addPod(d, 1), w.addPod(d, 2)
	const port = 4000
	type end struct {
		*net.UDPConn
		at netip.AddrPort
	}
	socket := func(ns string, at netip.Addr) end {
		return end{w.udp(ns, at, port), netip.AddrPortFrom(at, port)}
	}
	inA, inB, far := socket(a.ns, a.Addr), socket(b.ns, b.Addr), socket(w.wire, farIP)
	arrives := func(from, to end) bool {
		buf := make([]byte, 16)
		for range 5 {
			if _, err := from.WriteToUDPAddrPort([]byte("x"), to.at); err != nil {
				t.Fatal(err)
			}
			_ = to.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
			if _, err := to.Read(buf); err == nil {
				return true
			}
		}
		return false
	}
	ways := []struct{ from, to end }{{inA, far}, {far, inA}, {inA, inB}, {inB, inA}, {inB, far}}
	for range 3 {
		for _, way := range ways {
			if !arrives(way.from, way.to) {
				t.Fatalf("before: nothing arrives from %s at %s", way.from.at, way.to.at)
			}
		}
	}
	if owns, err := d.shut(&a.Endpoint); err != nil || !owns {
		t.Fatal(owns, err)
	}
	for _, way := range ways[:4] {
		if arrives(way.from, way.to) {
			t.Errorf("afterwards something arrives from %s at %s", way.from.at, way.to.at)
		}
	}
	if !arrives(inB, far) {
		t.Error("the other pod's flow stopped too")
	}
}

// A frame from a packet ring has its Ethernet header alone in the linear part
// of the buffer; the programs judge it all the same.
func TestFramesFromARing(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	a, b := w.addPod(d, 1), w.addPod(d, 2)
	ear := w.rawSocket(w.wire, "r1")
	fd := w.rawSocket(a.ns, "eth0")
	const block, slot = 4096, 2048
	if err := unix.SetsockoptTpacketReq(fd, unix.SOL_PACKET, unix.PACKET_TX_RING, &unix.TpacketReq{Block_size: block, Block_nr: 1, Frame_size: slot, Frame_nr: block / slot}); err != nil {
		t.Fatal(err)
	}
	ring, err := unix.Mmap(fd, 0, block, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(ring) }()
	next := 0
	send := func(frame []byte) {
		t.Helper()
		at := ring[next*slot:]
		next = (next + 1) % (block / slot)
		// struct tpacket_hdr: status, length, …; data follows it aligned, less
		// the address (TPACKET_HDRLEN - sizeof(struct sockaddr_ll)).
		const data = 32
		copy(at[data:], frame)
		binary.NativeEndian.PutUint32(at[8:], uint32(len(frame)))
		binary.NativeEndian.PutUint64(at[0:], unix.TP_STATUS_SEND_REQUEST)
		if err := unix.Sendto(fd, nil, 0, nil); err != nil {
			t.Fatal(err)
		}
	}
	send(udpFrame(a.MAC, hostMAC, b.Addr, farIP, marker))
	eventually(t, "a spoofed frame is counted", func() bool { return counters(t, d)["source_address"] == 1 })
	send(udpFrame(a.MAC, hostMAC, a.Addr, farIP, marker))
	eventually(t, "an honest frame arrives", func() bool { return marked(t, ear) == 1 })
}
