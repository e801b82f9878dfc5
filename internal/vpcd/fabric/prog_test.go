package fabric

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// skbuff is struct __sk_buff of <linux/bpf.h>, in which BPF_PROG_TEST_RUN takes
// what a frame has beside its bytes.
type skbuff struct {
	_       [40]byte
	Ifindex uint32
	_       [120]byte
	GSOSegs uint32
	_       [8]byte
	GSOSize uint32
	_       [12]byte
}

const (
	passed     = 0 // TCX_PASS
	dropped    = 2 // TCX_DROP
	redirected = 7 // TCX_REDIRECT
)

// run gives a frame to a program as if it came over the ENI's device.
func (h *host) run(p *ebpf.Program, frame []byte, gsoSize int) (verdict uint32, out []byte) {
	h.l.t.Helper()
	h.l.mu.Lock()
	defer h.l.mu.Unlock()
	var ifindex uint32
	for i, r := range h.l.seen.enis {
		if eniID(r) == h.eni {
			ifindex = i
		}
	}
	o := ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+256), Context: skbuff{Ifindex: ifindex, GSOSize: uint32(gsoSize)}}
	err := nl.Do(NetnsPath(h.l.names.fabric()), func() (err error) {
		verdict, err = p.Run(&o)
		return err
	})
	if err != nil {
		h.l.t.Fatalf("run program: %v", err)
	}
	return verdict, o.DataOut
}

func ethernet(dst, src net.HardwareAddr, etherType uint16, payload []byte) []byte {
	f := append(append([]byte{}, dst...), src...)
	f = binary.BigEndian.AppendUint16(f, etherType)
	return append(f, payload...)
}

// udp4 is an IPv4 packet of UDP (or of the bytes of one) with n bytes of data.
func udp4(src, dst netip.Addr, n int) []byte {
	p := make([]byte, 28+n)
	p[0], p[8], p[9] = 0x45, 37, 17 // no options, TTL 37, UDP
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	copy(p[12:], src.AsSlice())
	copy(p[16:], dst.AsSlice())
	binary.BigEndian.PutUint16(p[20:], 4000)
	binary.BigEndian.PutUint16(p[22:], 5000)
	binary.BigEndian.PutUint16(p[24:], uint16(8+n))
	return p
}

func arp4(op uint16, senderMAC net.HardwareAddr, sender netip.Addr, target netip.Addr) []byte {
	p := []byte{0, 1, 8, 0, 6, 4}
	p = binary.BigEndian.AppendUint16(p, op)
	p = append(append(p, senderMAC...), sender.AsSlice()...)
	return append(append(p, make([]byte, 6)...), target.AsSlice()...)
}

func with(p []byte, edit func([]byte)) []byte {
	p = bytes.Clone(p)
	edit(p)
	return p
}

var broadcast = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// TestVerdicts gives frames to from_guest as it is loaded in a standing fabric.
// (BPF_PROG_TEST_RUN takes neither frames of a page and more nor IPv4 cut short:
// TestMTU and TestRawFrames send those.)
func TestVerdicts(t *testing.T) {
	l := newLab(t)
	a1 := l.add(subnetA, "10.0.0.4", "10.0.0.10/32", "10.0.0.32/28")
	a2 := l.add(subnetA, "10.0.0.5")
	b := l.add(subnetB, "10.0.1.4")
	free := l.add(subnetA, "10.0.0.6")
	l.iface(free.eni).SourceDestCheck = false
	other := l.add(subnetOther, "10.0.0.7")
	l.set()
	addr := netip.MustParseAddr
	stranger := net.HardwareAddr{0x02, 1, 2, 3, 4, 5}
	const ip, arp, ip6 = 0x0800, 0x0806, 0x86dd
	packet := udp4(a1.addr, a2.addr, 10)
	tcp := with(udp4(a1.addr, a2.addr, 24+2500), func(p []byte) { p[9] = 6; p[20+12] = 8 << 4 }) // 20 + 32 + 2500 bytes

	for _, c := range []struct {
		name    string
		from    *host
		frame   []byte
		gso     int
		to      *host // nil: dropped or passed
		source  net.HardwareAddr
		pass    bool
		drop    DropReason
		counted *host // where the drop is counted, if not at from
		told    bool  // dropped, and the sender told so by ICMP
		packets uint64
	}{
		{name: "to another ENI by its MAC", from: a1, frame: ethernet(a2.mac, a1.mac, ip, packet), to: a2, source: a1.mac},
		{name: "to another ENI through the router", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, packet), to: a2, source: RouterMAC},
		{name: "to another subnet", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, udp4(a1.addr, b.addr, 10)), to: b, source: RouterMAC},
		{name: "from a secondary address", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, udp4(addr("10.0.0.10"), b.addr, 10)), to: b, source: RouterMAC},
		{name: "from the first of a prefix", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, udp4(addr("10.0.0.32"), b.addr, 10)), to: b, source: RouterMAC},
		{name: "from the last of a prefix", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, udp4(addr("10.0.0.47"), b.addr, 10)), to: b, source: RouterMAC},
		{name: "to an address of a prefix", from: b, frame: ethernet(RouterMAC, b.mac, ip, udp4(b.addr, addr("10.0.0.40"), 10)), to: a1, source: RouterMAC},
		{name: "to itself through the router", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, udp4(a1.addr, addr("10.0.0.10"), 10)), to: a1, source: RouterMAC},
		{name: "without check, from a stranger's address", from: free, frame: ethernet(RouterMAC, free.mac, ip, udp4(addr("192.168.7.7"), a1.addr, 10)), to: a1, source: RouterMAC},
		{name: "to the MAC of one without check", from: a1, frame: ethernet(free.mac, a1.mac, ip, udp4(a1.addr, addr("203.0.113.5"), 10)), to: free, source: a1.mac},
		{name: "with IP options", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, with(packet, func(p []byte) { p[0] = 0x46 })), to: a2, source: RouterMAC},
		{name: "segmented by size", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, tcp), gso: 1000, to: a2, source: RouterMAC, packets: 3},

		{name: "to IMDS", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, udp4(a1.addr, IMDSAddr, 10)), pass: true},
		{name: "to the EC2 endpoint from a prefix", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, udp4(addr("10.0.0.33"), EndpointAddr, 10)), pass: true},

		{name: "to IMDS from a stranger's address", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, udp4(a2.addr, IMDSAddr, 10)), drop: SourceAddress},
		{name: "from a neighbour's address", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, udp4(a2.addr, b.addr, 10)), drop: SourceAddress},
		{name: "from beyond a prefix", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, udp4(addr("10.0.0.48"), b.addr, 10)), drop: SourceAddress},
		{name: "from a neighbour's MAC", from: a1, frame: ethernet(RouterMAC, a2.mac, ip, packet), drop: SourceMAC},
		{name: "without check, from another MAC", from: free, frame: ethernet(RouterMAC, stranger, ip, udp4(free.addr, a1.addr, 10)), drop: SourceMAC},
		{name: "to a neighbour's MAC, not its address", from: a1, frame: ethernet(a2.mac, a1.mac, ip, udp4(a1.addr, b.addr, 10)), drop: DestAddress, counted: a2},
		{name: "to a MAC of another subnet", from: a1, frame: ethernet(b.mac, a1.mac, ip, udp4(a1.addr, b.addr, 10)), drop: UnknownMAC},
		{name: "to a MAC of another VPC", from: a1, frame: ethernet(other.mac, a1.mac, ip, udp4(a1.addr, other.addr, 10)), drop: UnknownMAC},
		{name: "to an address of another VPC", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, udp4(a1.addr, other.addr, 10)), drop: NoTarget},
		{name: "to an address nobody holds", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, udp4(a1.addr, addr("10.0.9.9"), 10)), drop: NoTarget},
		{name: "to the internet", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, udp4(a1.addr, addr("203.0.113.5"), 10)), drop: NoRoute},
		{name: "to another link-local address", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, udp4(a1.addr, addr("169.254.1.1"), 10)), drop: NoRoute},
		{name: "to multicast", from: a1, frame: ethernet(net.HardwareAddr{1, 0, 0x5e, 0, 0, 5}, a1.mac, ip, udp4(a1.addr, addr("224.0.0.5"), 10)), drop: Multicast},
		{name: "to multicast by the router", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, udp4(a1.addr, addr("239.0.0.5"), 10)), drop: Multicast},
		{name: "to broadcast", from: a1, frame: ethernet(broadcast, a1.mac, ip, udp4(addr("0.0.0.0"), addr("255.255.255.255"), 10)), drop: Multicast},
		{name: "segments of the MTU", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, tcp), gso: 8949, to: a2, source: RouterMAC},
		{name: "segments above the MTU", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, tcp), gso: 8950, drop: Oversize, told: true},
		{name: "IPv6", from: a1, frame: ethernet(RouterMAC, a1.mac, ip6, make([]byte, 40)), drop: IPv6},
		{name: "another EtherType", from: a1, frame: ethernet(a2.mac, a1.mac, 0x88b5, make([]byte, 40)), drop: EtherType},
		{name: "another EtherType to all", from: a1, frame: ethernet(broadcast, a1.mac, 0x88b5, make([]byte, 40)), drop: Multicast},
		{name: "version 6 in IPv4", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, with(packet, func(p []byte) { p[0] = 0x65 })), drop: Malformed},
		{name: "header of 16 bytes", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, with(packet, func(p []byte) { p[0] = 0x44 })), drop: Malformed},
		{name: "header beyond the frame", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, with(packet, func(p []byte) { p[0] = 0x4f })), drop: Malformed},
		{name: "length beyond the frame", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, with(packet, func(p []byte) { p[2] = 1 })), drop: Malformed},
		{name: "length within the header", from: a1, frame: ethernet(RouterMAC, a1.mac, ip, with(packet, func(p []byte) { p[3] = 19 })), drop: Malformed},

		{name: "ARP cut short", from: a1, frame: ethernet(broadcast, a1.mac, arp, arp4(1, a1.mac, a1.addr, a2.addr)[:27]), drop: Malformed},
		{name: "ARP of another kind", from: a1, frame: ethernet(broadcast, a1.mac, arp, with(arp4(1, a1.mac, a1.addr, a2.addr), func(p []byte) { p[4] = 8 })), drop: Malformed},
		{name: "ARP with a neighbour's MAC inside", from: a1, frame: ethernet(broadcast, a1.mac, arp, arp4(1, a2.mac, a1.addr, b.addr)), drop: ARPSpoofed},
		{name: "ARP with a neighbour's address", from: a1, frame: ethernet(broadcast, a1.mac, arp, arp4(1, a1.mac, a2.addr, addr("10.0.0.1"))), drop: ARPSpoofed},
		{name: "ARP for an address nobody holds", from: a1, frame: ethernet(broadcast, a1.mac, arp, arp4(1, a1.mac, a1.addr, addr("10.0.0.99"))), drop: ARPUnanswered},
		{name: "ARP for one of another VPC", from: a1, frame: ethernet(broadcast, a1.mac, arp, arp4(1, a1.mac, a1.addr, other.addr)), drop: ARPUnanswered},
		{name: "ARP for one of another subnet", from: a1, frame: ethernet(broadcast, a1.mac, arp, arp4(1, a1.mac, a1.addr, b.addr)), drop: ARPUnanswered},
		{name: "gratuitous ARP", from: a1, frame: ethernet(broadcast, a1.mac, arp, arp4(1, a1.mac, a1.addr, a1.addr)), drop: ARPUnanswered},
		{name: "probe for an own address", from: a1, frame: ethernet(broadcast, a1.mac, arp, arp4(1, a1.mac, addr("0.0.0.0"), addr("10.0.0.10"))), drop: ARPUnanswered},
		{name: "ARP reply", from: a1, frame: ethernet(a2.mac, a1.mac, arp, arp4(2, a1.mac, a1.addr, a2.addr)), drop: ARPUnanswered},
	} {
		t.Run(c.name, func(t *testing.T) {
			before, err := l.Counters()
			if err != nil {
				t.Fatal(err)
			}
			verdict, out := c.from.run(l.objs.FromGuest, c.frame, c.gso)
			after, err := l.Counters()
			if err != nil {
				t.Fatal(err)
			}
			packets := max(c.packets, 1)
			sent := after[c.from.eni].TxPackets - before[c.from.eni].TxPackets
			switch {
			case c.to != nil:
				want := ethernet(c.to.mac, c.source, 0x0800, c.frame[14:])
				if verdict != redirected || !bytes.Equal(out, want) {
					t.Errorf("verdict %d, frame % x…, want %d, % x…", verdict, out[:14], redirected, want[:14])
				}
				got := after[c.to.eni].RxPackets - before[c.to.eni].RxPackets
				if sent != packets || got != packets {
					t.Errorf("%d packets counted as sent and %d as received, want %d", sent, got, packets)
				}
				bytes := uint64(len(c.frame)-14) + (packets-1)*52 // segments repeat IP and TCP headers
				if n := after[c.to.eni].RxBytes - before[c.to.eni].RxBytes; n != bytes {
					t.Errorf("%d bytes counted, want %d", n, bytes)
				}
			case c.pass:
				if verdict != passed || !bytes.Equal(out, c.frame) || sent != 1 {
					t.Errorf("verdict %d, %d packets counted, want %d, 1", verdict, sent, passed)
				}
			default:
				at := c.counted
				if at == nil {
					at = c.from
				}
				if c.told {
					// Destination unreachable, fragmentation needed.
					if verdict != redirected || len(out) < 36 || out[34] != 3 || out[35] != 4 {
						t.Errorf("verdict %d, frame % x, want %d and an ICMP error", verdict, out[:min(36, len(out))], redirected)
					}
				} else if verdict != dropped || !bytes.Equal(out, c.frame) {
					t.Errorf("verdict %d, want %d and the frame untouched", verdict, dropped)
				}
				for _, h := range []*host{a1, a2, b, free, other} {
					for reason := range after[h.eni].Drops {
						n := after[h.eni].Drops[reason] - before[h.eni].Drops[reason]
						want := h == at && reason == c.drop
						// Guests send IPv6 of their own now and then.
						if want && n == 0 || n > 1 && reason != IPv6 || !want && n > 0 && reason != IPv6 {
							t.Errorf("%s: %d drops for %s", h.eni, n, reason)
						}
					}
				}
			}
		})
	}
}

func TestARPAnswers(t *testing.T) {
	l := newLab(t)
	a1 := l.add(subnetA, "10.0.0.4")
	a2 := l.add(subnetA, "10.0.0.5", "10.0.0.64/28")
	free := l.add(subnetA, "10.0.0.6")
	l.iface(free.eni).SourceDestCheck = false
	l.set()
	addr := netip.MustParseAddr
	for _, c := range []struct {
		from           *host
		sender, target string
		want           net.HardwareAddr
	}{
		{a1, "10.0.0.4", "10.0.0.1", RouterMAC},
		{a1, "10.0.0.4", "169.254.169.254", RouterMAC},
		{a1, "10.0.0.4", "169.254.1.1", RouterMAC},
		{a1, "10.0.0.4", "10.0.0.5", a2.mac},
		{a1, "10.0.0.4", "10.0.0.79", a2.mac},
		{a1, "0.0.0.0", "10.0.0.5", a2.mac}, // a probe: the address is taken
		{free, "192.168.9.9", "10.0.0.4", a1.mac},
	} {
		request := ethernet(broadcast, c.from.mac, 0x0806, arp4(1, c.from.mac, addr(c.sender), addr(c.target)))
		verdict, out := c.from.run(l.objs.FromGuest, request, 0)
		answer := arp4(2, c.want, addr(c.target), addr(c.sender))
		copy(answer[18:], c.from.mac)
		if want := ethernet(c.from.mac, c.want, 0x0806, answer); verdict != redirected || !bytes.Equal(out, want) {
			t.Errorf("%s asks for %s: verdict %d\n% x, want\n% x", c.sender, c.target, verdict, out, want)
		}
	}
}

// TestToGuest gives frames to the program on what the fabric's stack sends.
func TestToGuest(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	l.set()
	packet := udp4(IMDSAddr, netip.MustParseAddr("10.0.0.99"), 10)
	verdict, out := a.run(l.objs.ToGuest, ethernet(RouterMAC, RouterMAC, 0x0800, packet), 0)
	if want := ethernet(a.mac, RouterMAC, 0x0800, packet); verdict != passed || !bytes.Equal(out, want) {
		t.Errorf("verdict %d, frame % x, want % x (TTL untouched)", verdict, out, want)
	}
	for name, frame := range map[string][]byte{
		"from another address": ethernet(RouterMAC, RouterMAC, 0x0800, udp4(netip.MustParseAddr("10.0.0.1"), a.addr, 10)),
		"ARP":                  ethernet(broadcast, RouterMAC, 0x0806, arp4(1, RouterMAC, IMDSAddr, a.addr)),
		"IPv6":                 ethernet(RouterMAC, RouterMAC, 0x86dd, make([]byte, 40)),
	} {
		a.counts(NotService, func() {
			if verdict, _ := a.run(l.objs.ToGuest, frame, 0); verdict != dropped {
				t.Errorf("%s: verdict %d", name, verdict)
			}
		})
	}
	if c := a.counters(); c.RxPackets != 1 || c.RxBytes != uint64(len(packet)) {
		t.Errorf("%d packets, %d bytes received, want 1, %d", c.RxPackets, c.RxBytes, len(packet))
	}
}

// TestUnknownDevice sends what comes from a device without a record.
func TestUnknownDevice(t *testing.T) {
	l := newLab(t)
	stray := &host{l: l, eni: "eni-00000000000000000"}
	l.set()
	for _, p := range []*ebpf.Program{l.objs.FromGuest, l.objs.ToGuest} {
		before, err := l.Counters()
		if err != nil {
			t.Fatal(err)
		}
		verdict, _ := stray.run(p, ethernet(broadcast, RouterMAC, 0x0800, make([]byte, 40)), 0)
		after, err := l.Counters()
		if err != nil {
			t.Fatal(err)
		}
		if n := after[""].Drops[NoInterface] - before[""].Drops[NoInterface]; verdict != dropped || n != 1 {
			t.Errorf("verdict %d, %d drops counted, want %d, 1", verdict, n, dropped)
		}
	}
}

// TestSharedWithC checks that Go and C mean the same.
func TestSharedWithC(t *testing.T) {
	for i, reason := range dropReasons {
		if reason == "" {
			t.Errorf("drop reason %d has no name", i)
		}
	}
	for name, sizes := range map[string][2]int{
		"address":    {binary.Size(bpfgen.FabricAddress{}), 20},
		"target":     {binary.Size(bpfgen.FabricTarget{}), 20},
		"eni":        {binary.Size(bpfgen.FabricEni{}), 120},
		"station":    {binary.Size(bpfgen.FabricStation{}), 16},
		"route_key":  {binary.Size(bpfgen.FabricRouteKey{}), 28},
		"route":      {binary.Size(bpfgen.FabricRoute{}), 28},
		"public":     {binary.Size(bpfgen.FabricPublic{}), 16},
		"counters":   {binary.Size(bpfgen.FabricCounters{}), 96 + 8*len(dropReasons)},
		"rule":       {binary.Size(bpfgen.FabricRule{}), 24},
		"policy":     {binary.Size(bpfgen.FabricPolicy{}), 168 + 2*1000*24},
		"flow_key":   {binary.Size(bpfgen.FabricFlowKey{}), 20},
		"flow":       {binary.Size(bpfgen.FabricFlow{}), 80},
		"acl_entry":  {binary.Size(bpfgen.FabricAclEntry{}), 16},
		"acl":        {binary.Size(bpfgen.FabricAcl{}), 16 + 2*40*16},
		"record_key": {binary.Size(bpfgen.FabricRecordKey{}), 20},
		"record":     {binary.Size(bpfgen.FabricRecord{}), 40},
		"skip_key":   {binary.Size(bpfgen.FabricSkipKey{}), 16},
		"skip":       {binary.Size(bpfgen.FabricSkip{}), 16},
		"logged":     {binary.Size(bpfgen.FabricLogged{}), 168},
		"fragment":   {binary.Size(bpfgen.FabricFragment{}), 16},

		"address6":      {binary.Size(bpfgen.FabricAddress6{}), 24},
		"rule6":         {binary.Size(bpfgen.FabricRule6{}), 48},
		"policy6":       {binary.Size(bpfgen.FabricPolicy6{}), 40 + 16*8 + 2*1000*48},
		"flow_key6":     {binary.Size(bpfgen.FabricFlowKey6{}), 44},
		"acl_entry6":    {binary.Size(bpfgen.FabricAclEntry6{}), 40},
		"acl6":          {binary.Size(bpfgen.FabricAcl6{}), 16 + 2*40*40},
		"record_key6":   {binary.Size(bpfgen.FabricRecordKey6{}), 44},
		"fragment_key6": {binary.Size(bpfgen.FabricFragmentKey6{}), 40},
		"fragment6":     {binary.Size(bpfgen.FabricFragment6{}), 16},
	} {
		if sizes[0] != sizes[1] {
			t.Errorf("struct %s has %d bytes, layout %s has %d: give it a new version", name, sizes[0], layout, sizes[1])
		}
	}
	spec, err := bpfgen.LoadFabric()
	if err != nil {
		t.Fatal(err)
	}
	mac := make([]byte, 6)
	if err := spec.Variables[bpfgen.FabricVarRouterMac].Get(&mac); err != nil {
		t.Fatal(err)
	}
	var mtu, reasons uint32
	if err := spec.Variables[bpfgen.FabricVarInternetMtu].Get(&mtu); err != nil {
		t.Fatal(err)
	}
	if err := spec.Variables[bpfgen.FabricVarDropReasons].Get(&reasons); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(mac, RouterMAC) || mtu != InternetMTU || int(reasons) != len(dropReasons) {
		t.Errorf("C has router %v, the internet's MTU %d, %d reasons; Go %v, %d, %d", net.HardwareAddr(mac), mtu, reasons, RouterMAC, InternetMTU, len(dropReasons))
	}
}
