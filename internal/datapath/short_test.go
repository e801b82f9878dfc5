package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/policy"
)

// A packet that takes the short way fares as it would by the long one: twins of flows
// are sent the same packets, valid and not, one by programs that have both ways, the
// other by programs without the short one.
func TestShortWay(t *testing.T) {
	const flows, packets, mtu = 28, 4000, 1500
	onceForAllHooks(t)
	w := newWorld(t)
	d := w.open(Options{MTU: mtu})
	r := &shooting{t: t, d: d, enis: map[netip.Addr]uint32{}}
	pods := [3]pod{w.addPod(d, 1), w.addPod(d, 2)}
	ns := w.netns("pod3")
	e := endpoint(3, ns)
	e.Addr, e.ENI, e.ENIIndex = netip.MustParseAddr("10.0.0.129"), enis[0].ID, 1
	e, err := d.Add(ctx, e, openNetns(t, ns))
	if err != nil {
		t.Fatal(err)
	}
	pods[2] = pod{e, ns}
	r.pods = pods
	w.ip(w.wire, "route add 10.0.0.128/25 via 10.0.0.10")
	w.echo(w.wire, farIP)
	for i, dev := range []string{"eth1", "eth1", "eth0"} {
		if w.ask(pods[i].ns, pods[i].Addr, farIP, 20) == "" {
			t.Fatal("no answer from behind the router")
		}
		link, err := d.conn.LinkByName(dev)
		if err != nil {
			t.Fatal(err)
		}
		r.enis[pods[i].Addr] = uint32(link.Index)
	}
	r.enis[farIP] = r.enis[pods[0].Addr]

	both, long := &d.objs.NodePrograms, d.loadAs(t, map[string]any{bpfgen.NodeVarShortWay: uint32(0)})
	later := uint64(time.Hour)
	bothLater := d.loadAs(t, map[string]any{bpfgen.NodeVarClockOffset: later})
	longLater := d.loadAs(t, map[string]any{bpfgen.NodeVarClockOffset: later, bpfgen.NodeVarShortWay: uint32(0)})
	d.stopSweeper() // it may come between twins
	d.stopSweeper = nil

	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	a, b, c := pods[0].Addr, pods[1].Addr, pods[2].Addr
	ends := [][2]netip.Addr{{a, farIP}, {a, b}, {b, a}, {farIP, a}, {farIP, b}, {a, c}, {c, a}}
	var here, there []*twin
	for i := range flows {
		f := twin{unix.IPPROTO_TCP, ends[i%len(ends)][0], ends[i%len(ends)][1], uint16(20000 + 2*i)}
		if i%3 == 1 {
			f.proto = unix.IPPROTO_UDP
		}
		g := f
		g.port++
		here, there = append(here, &f), append(there, &g)
	}
	policies := policiesOf(t, pods)
	r.counts()
	direct, before := uint64(0), r.short()
	for n := range packets {
		switch n % 400 {
		case 0:
			r.setGates(true, true)
		case 100, 200, 250, 300, 325:
			if err := d.SetPolicy(r.pods[1].Endpoint, policies[rnd.IntN(len(policies))]); err != nil {
				t.Fatal(err)
			}
		case 370:
			r.setGates(rnd.IntN(2) == 0, rnd.IntN(2) == 0)
		}
		if n == packets/2 {
			r.replace(w, 1)
		}
		if n == packets*9/10 {
			both, long = bothLater, longLater // what was idle is over
		}
		k := rnd.IntN(flows)
		s := newShot(rnd, n < packets/4, ends[k%len(ends)])
		got, want := r.shoot(both, here[k], s), r.shoot(long, there[k], s)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("packet %d, %+v of flow %d, %+v: the short way differs from the long one:\n%s", n, s, k, *here[k], diff)
		}
		direct += got.Paths.Direct
		if n%200 == 0 || n == packets-1 {
			if diff := cmp.Diff(r.flows(there), r.flows(here)); diff != "" {
				t.Fatalf("after packet %d flows by the short way differ from the others:\n%s", n, diff)
			}
		}
	}
	if short := r.short() - before; short < direct/4 || short < packets/10 {
		t.Errorf("%d of %d direct packets took the short way", short, direct)
	}
}

// policiesOf are policies for the second pod: none, what its neighbour sends, nothing.
func policiesOf(t *testing.T, pods [3]pod) (out []policy.Tables) {
	t.Helper()
	in := policy.Input{Namespaces: map[string]map[string]string{"default": {}}}
	for i, p := range pods {
		name := string(rune('a' + i))
		in.Pods = append(in.Pods, policy.Pod{Namespace: "default", Name: name, Labels: map[string]string{"app": name}, Addrs: []netip.Addr{p.Addr}})
	}
	for _, policies := range [][]policy.NetworkPolicy{nil, {from("a")}, {from("nobody")}} {
		in.Policies = policies
		tables, err := policy.NewCompiler(&in).Compile(&policy.Endpoint{Pod: in.Pods[1]})
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, tables)
	}
	return out
}

// loadAs loads the programs with other constants, beside those that are there.
func (d *Datapath) loadAs(t *testing.T, constants map[string]any) *bpfgen.NodePrograms {
	t.Helper()
	spec, err := d.spec()
	if err != nil {
		t.Fatal(err)
	}
	setConstants(t, spec, constants)
	var p bpfgen.NodePrograms
	if err := spec.LoadAndAssign(&p, &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: mapDir(d.opts.BPFFS)}}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return &p
}

// twin is one of two flows that are alike but for the client's port.
type twin struct {
	proto          uint8
	client, server netip.Addr
	port           uint16
}

// shot is a packet of a flow.
type shot struct {
	Answer    bool // the server sends it
	ByWire    bool // and it comes by an ENI, though a pod of the node did
	Flags     uint8
	TTL       uint8
	Size      int    // of the payload
	GSO       uint32 // of each segment
	Longer    bool   // its header says more than there is
	Options   bool
	Fragment  uint16
	EtherType uint16
	Cut       int // bytes that are missing at the end
	// Not the flow's:
	ForeignMAC, ForeignIP, FromOtherPod bool
	OtherHost                           bool // to another's MAC
}

// newShot makes a packet: usual, or anything.
func newShot(rnd *rand.Rand, usual bool, ends [2]netip.Addr) shot {
	flags := []uint8{syn, syn | ack, ack, ack, ack, ack, ack | 8 /* PSH */, ack | 8, fin | ack, rst, rst | ack, 0, syn | fin}
	s := shot{Answer: rnd.IntN(2) == 0, Flags: flags[rnd.IntN(len(flags))], TTL: 64, Size: rnd.IntN(300), EtherType: packet.EtherTypeIPv4}
	if usual && s.Flags != syn && rnd.IntN(2) == 0 {
		s.Flags = ack
	}
	odd := func() bool { return !usual && rnd.IntN(24) == 0 }
	across := ends[0].As4()[2] != ends[1].As4()[2] && ends[0] != farIP && ends[1] != farIP
	s.ByWire = odd() || across && rnd.IntN(2) == 0
	if odd() {
		s.TTL = uint8(rnd.IntN(3))
	}
	if odd() {
		s.Size = 1400 + rnd.IntN(200)
	}
	if odd() { // too long: of others the kernel wants to know where the header of TCP is
		s.Size, s.GSO = 1000+rnd.IntN(1000), 3000
	}
	s.Longer, s.Options, s.ForeignMAC, s.ForeignIP, s.OtherHost, s.FromOtherPod = odd(), odd(), odd(), odd(), odd(), odd()
	if odd() {
		s.Fragment = []uint16{0x2000, 0x2001, 5}[rnd.IntN(3)]
	}
	if odd() {
		s.EtherType = []uint16{packet.EtherTypeIPv6, packet.EtherTypeARP, 0x8100, 0x88b5}[rnd.IntN(4)]
	}
	if odd() {
		s.Cut = rnd.IntN(40)
	}
	return s
}

// shooting sends packets from pods and by ENIs.
type shooting struct {
	t    *testing.T
	d    *Datapath
	pods [3]pod                // the first two in one subnet
	enis map[netip.Addr]uint32 // by whom packets are for

	// What was counted up to now.
	paths   Paths
	traffic map[netip.Addr]Traffic
	drops   map[string]uint64
}

// outcome is what becomes of a packet.
type outcome struct {
	Verdict, Mark uint32
	Ethernet      string // as it leaves, where no router's address is asked for
	IP            []byte // without the client's port, identification and checksum
	Valid         bool   // the checksum
	// More by this packet.
	Paths   Paths
	Traffic [3]Traffic
	Drops   map[string]uint64
}

// skBuff is struct __sk_buff of linux/bpf.h.
type skBuff struct {
	Len, PktType, Mark, QueueMapping, Protocol, VlanPresent, VlanTci, VlanProto, Priority, IngressIfindex, Ifindex uint32
	_                                                                                                              [30]uint32
	GSOSegs                                                                                                        uint32
	_                                                                                                              [2]uint32
	GSOSize                                                                                                        uint32
	_                                                                                                              [3]uint32
}

// shoot sends a packet through the program that it meets.
func (r *shooting) shoot(progs *bpfgen.NodePrograms, f *twin, s shot) outcome {
	r.t.Helper()
	src, dst := netip.AddrPortFrom(f.client, f.port), netip.AddrPortFrom(f.server, 80)
	if s.Answer {
		src, dst = dst, src
	}
	prog, in := progs.FromEni, skBuff{Ifindex: r.enis[dst.Addr()]}
	fromMAC, toMAC := mac("02:00:00:00:01:01"), mac("02:00:00:00:01:10")
	if in.Ifindex == r.enis[r.pods[2].Addr] {
		toMAC = mac("02:00:00:00:00:10")
	}
	if src.Addr() != farIP && !s.ByWire {
		i := 0
		for r.pods[i].Addr != src.Addr() {
			i++
		}
		if s.FromOtherPod {
			i = (i + 1) % len(r.pods)
		}
		prog, in.Ifindex = progs.FromPod, uint32(r.pods[i].HostIfIndex)
		fromMAC, toMAC = r.pods[i].MAC, hostMAC
	}
	if s.ForeignMAC {
		fromMAC = mac("02:00:00:00:00:77")
	}
	if s.OtherHost {
		toMAC = mac("02:00:00:00:00:78")
	}
	if s.ForeignIP {
		src = netip.AddrPortFrom(netip.MustParseAddr("10.0.1.222"), src.Port())
	}
	frame := frameOf(f, s, src, dst)
	copy(frame, packet.Frame(packet.MAC(fromMAC), packet.MAC(toMAC), s.EtherType, nil))
	if s.GSO != 0 {
		in.GSOSize, in.GSOSegs = s.GSO, 2
	}

	var got outcome
	var out skBuff
	opts := &ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+64), Context: in, ContextOut: &out}
	err := r.d.in(func() (err error) {
		got.Verdict, err = prog.Run(opts)
		return err
	})
	if errors.Is(err, unix.EINVAL) {
		return outcome{} // the kernel takes no such packet for a trial
	}
	if err != nil {
		r.t.Fatalf("run %+v: %v", s, err)
	}
	got.Mark = out.Mark
	if ip := opts.DataOut[14:]; len(ip) > 24 {
		got.Valid = packet.Checksum(0, ip[:20]) == 0
		ip[4], ip[5], ip[10], ip[11] = 0, 0, 0, 0
		at := 20 // where the client's port is
		if s.Options {
			at += 4
		}
		if src.Port() != f.port {
			at += 2
		}
		if at+2 <= len(ip) {
			ip[at], ip[at+1] = 0, 0
		}
		got.IP = ip
	}
	if dst.Addr() != farIP && (prog != progs.FromPod || src.Addr().As4()[2] == dst.Addr().As4()[2]) {
		got.Ethernet = fmt.Sprintf("%x", opts.DataOut[:14])
	}
	got.Paths, got.Traffic, got.Drops = r.counts()
	return got
}

// frameOf makes a packet behind room for an Ethernet header.
func frameOf(f *twin, s shot, src, dst netip.AddrPort) []byte {
	l4 := make([]byte, 20+s.Size)
	if f.proto == unix.IPPROTO_UDP {
		l4 = l4[:8+s.Size]
		binary.BigEndian.PutUint16(l4[4:], uint16(len(l4)))
	} else {
		l4[12], l4[13] = 5<<4, s.Flags
	}
	binary.BigEndian.PutUint16(l4, src.Port())
	binary.BigEndian.PutUint16(l4[2:], dst.Port())
	p := packet.IPv4(src.Addr(), dst.Addr(), f.proto, l4)
	if s.Options {
		p = append(append(append([]byte(nil), p[:20]...), 1, 1, 1, 0), p[20:]...)
		p[0] = 0x46
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	}
	if s.Longer {
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)+1))
	}
	binary.BigEndian.PutUint16(p[4:], f.port) // fragments of twins are not of one datagram
	binary.BigEndian.PutUint16(p[6:], s.Fragment)
	p[8], p[10], p[11] = s.TTL, 0, 0
	binary.BigEndian.PutUint16(p[10:], packet.Checksum(0, p[:20]))
	return append(make([]byte, 14), p...)[:14+len(p)-s.Cut]
}

// short is how many packets took the short way.
func (r *shooting) short() uint64 {
	r.t.Helper()
	n, err := r.d.shortPackets()
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}

// counts returns what the programs have counted since it was called before.
func (r *shooting) counts() (p Paths, more [3]Traffic, drops map[string]uint64) {
	r.t.Helper()
	traffic, err := r.d.Traffic()
	if err != nil {
		r.t.Fatal(err)
	}
	all, err := r.d.Counters()
	if err != nil {
		r.t.Fatal(err)
	}
	now := paths(r.t, r.d)
	was := r.paths
	p = Paths{now.Direct - was.Direct, now.Stack - was.Stack, now.Exceptions - was.Exceptions, now.BegunDirect - was.BegunDirect,
		now.BegunStack - was.BegunStack, now.Midflow - was.Midflow, now.Evicted - was.Evicted, now.NoRoom - was.NoRoom}
	for i := range more {
		x, y := traffic[r.pods[i].Addr], r.traffic[r.pods[i].Addr]
		more[i] = Traffic{FromPackets: x.FromPackets - y.FromPackets, FromBytes: x.FromBytes - y.FromBytes,
			ToPackets: x.ToPackets - y.ToPackets, ToBytes: x.ToBytes - y.ToBytes}
	}
	drops = map[string]uint64{}
	for reason, n := range all {
		if n != r.drops[reason] {
			drops[reason] = n - r.drops[reason]
		}
	}
	r.paths, r.traffic, r.drops = now, traffic, all
	return p, more, drops
}

// flows is what the table says of twins, but for ports and times.
func (r *shooting) flows(twins []*twin) map[string]bpfgen.NodeConn {
	r.t.Helper()
	number := map[uint16]int{}
	for i, f := range twins {
		number[f.port] = i
	}
	out := map[string]bpfgen.NodeConn{}
	for batch, err := range r.d.conns() {
		if err != nil {
			r.t.Fatal(err)
		}
		for _, c := range batch {
			for end := range c.Key.Port {
				i, ok := number[c.Key.Port[end]]
				if !ok {
					continue
				}
				c.Key.Port[end], c.CreatedNs, c.LastNs = 0, 0, 0
				out[fmt.Sprint(i, c.Key)] = c
			}
		}
	}
	return out
}

// setGates opens or shuts the gates of the first two pods.
func (r *shooting) setGates(open ...bool) {
	r.t.Helper()
	for i, open := range open {
		var flags uint32
		if open {
			flags = uint32(bpfgen.NodeIfaceFlagsIFACE_READY)
		}
		if err := r.d.putIface(&r.pods[i].Endpoint, flags); err != nil {
			r.t.Fatal(err)
		}
	}
}

// replace puts another pod in the place of one, with its address and its slot.
func (r *shooting) replace(w *world, i int) {
	r.t.Helper()
	p := r.pods[i]
	slot, _, err := r.d.slotOf(p.HostIfIndex)
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := r.d.Delete(ctx, p.ContainerID, p.IfName); err != nil {
		r.t.Fatal(err)
	}
	if err := r.d.Forget(p.Addr); err != nil {
		r.t.Fatal(err)
	}
	eventually(r.t, "the pod before has left its slot", func() bool {
		r.d.mu.Lock()
		defer r.d.mu.Unlock()
		_, has := r.d.slots[p.HostIfIndex]
		return !has
	})
	r.pods[i] = w.addPod(r.d, 1+i)
	r.d.keepSlot(r.pods[i].HostIfIndex, slot)
	r.setGates(true, true)
}
