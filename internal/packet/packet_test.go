package packet

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var (
	macA = MAC{2, 0, 0, 0, 0, 0xa}
	macB = MAC{2, 0, 0, 0, 0, 0xb}
	ipA  = netip.MustParseAddr("10.0.0.4")
	ipB  = netip.MustParseAddr("10.0.1.9")
)

func TestBuildThenParse(t *testing.T) {
	for _, tc := range []struct {
		name  string
		frame []byte
		want  FiveTuple
		data  string
	}{
		{"udp", Frame(macA, macB, EtherTypeIPv4, UDP4(netip.AddrPortFrom(ipA, 4000), netip.AddrPortFrom(ipB, 53), []byte("hello"))),
			FiveTuple{ipA, ipB, 4000, 53, ProtoUDP}, "hello"},
		{"echo", Frame(macA, macB, EtherTypeIPv4, Echo4(ipA, ipB, 77, 1, []byte("x"))),
			FiveTuple{ipA, ipB, 77, 8 << 8, ProtoICMP}, "x"},
		{"gre", Frame(macA, macB, EtherTypeIPv4, IPv4(ipA, ipB, ProtoGRE, []byte("abc"))),
			FiveTuple{ipA, ipB, 0, 0, ProtoGRE}, "abc"},
	} {
		p, err := Parse(tc.frame)
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		if p.Tuple != tc.want || string(p.Payload) != tc.data || p.SrcMAC != macA || p.DstMAC != macB || p.TTL != 64 {
			t.Errorf("%s: %+v, payload %q", tc.name, p, p.Payload)
		}
		if Checksum(0, tc.frame[14:34]) != 0 {
			t.Errorf("%s: the IPv4 header does not sum to zero", tc.name)
		}
	}
}

func TestUDPChecksumVerifies(t *testing.T) {
	ip := UDP4(netip.AddrPortFrom(ipA, 1), netip.AddrPortFrom(ipB, 2), []byte("odd"))
	if got := Checksum(pseudoHeader(ipA, ipB, ProtoUDP, len(ip)-20), ip[20:]); got != 0 {
		t.Errorf("sum over the datagram = %#x, want 0", got)
	}
}

func TestARP(t *testing.T) {
	want := ARP{Op: 1, SenderMAC: macA, SenderIP: ipA, TargetIP: ipB}
	p, err := Parse(Frame(macA, MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, EtherTypeARP, BuildARP(want)))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&want, p.ARP, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestFragmentsHaveNoPorts(t *testing.T) {
	ip := UDP4(netip.AddrPortFrom(ipA, 4000), netip.AddrPortFrom(ipB, 53), make([]byte, 32))
	ip[6], ip[7] = 0x20, 0 // first fragment
	p, err := Parse(Frame(macA, macB, EtherTypeIPv4, ip))
	if err != nil || !p.Fragment || p.Tuple.DstPort != 53 {
		t.Errorf("first fragment: %+v, %v", p, err)
	}
	ip[6], ip[7] = 0, 3 // offset 24
	p, err = Parse(Frame(macA, macB, EtherTypeIPv4, ip))
	if err != nil || !p.Fragment || p.Tuple.DstPort != 0 || p.Tuple.Proto != ProtoUDP {
		t.Errorf("later fragment: %+v, %v", p, err)
	}
}

func TestIPv6ExtensionHeaders(t *testing.T) {
	b := make([]byte, 40)
	b[0], b[6], b[7] = 0x60, 0, 9 // hop-by-hop follows
	b[8+15], b[24+15] = 1, 2
	b = append(b, 60, 0, 0, 0, 0, 0, 0, 0)          // hop-by-hop → destination options
	b = append(b, ProtoUDP, 1)                      // destination options, 16 bytes → UDP
	b = append(b, make([]byte, 14)...)              //
	b = append(b, 0x0f, 0xa0, 0, 53, 0, 9, 0, 0, 1) // 4000 → 53, one byte
	p, err := Parse(Frame(macA, macB, EtherTypeIPv6, b))
	if err != nil || p.Tuple.Proto != ProtoUDP || p.Tuple.SrcPort != 4000 || p.Tuple.DstPort != 53 || p.TTL != 9 {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestTruncated(t *testing.T) {
	frame := Frame(macA, macB, EtherTypeIPv4, UDP4(netip.AddrPortFrom(ipA, 1), netip.AddrPortFrom(ipB, 2), nil))
	for n := range len(frame) {
		if _, err := Parse(frame[:n]); !errors.Is(err, ErrTruncated) {
			t.Errorf("%d of %d bytes: %v", n, len(frame), err)
		}
	}
}

func TestVLAN(t *testing.T) {
	inner := append([]byte{0x30, 0x05, 0x08, 0x00}, Echo4(ipA, ipB, 1, 1, nil)...)
	p, err := Parse(Frame(macA, macB, EtherTypeVLAN, inner))
	if err != nil || !p.Tagged || p.VLAN != 5 || p.Tuple.Dst != ipB {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestReverse(t *testing.T) {
	f := FiveTuple{ipA, ipB, 4000, 53, ProtoUDP}
	if r := f.Reverse(); r != (FiveTuple{ipB, ipA, 53, 4000, ProtoUDP}) || r.Reverse() != f {
		t.Errorf("%v", r)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(Frame(macA, macB, EtherTypeIPv4, UDP4(netip.AddrPortFrom(ipA, 1), netip.AddrPortFrom(ipB, 2), []byte("x"))))
	f.Add(Frame(macA, macB, EtherTypeARP, BuildARP(ARP{Op: 1, SenderIP: ipA, TargetIP: ipB})))
	f.Add(Frame(macA, macB, EtherTypeIPv6, make([]byte, 60)))
	f.Fuzz(func(t *testing.T, frame []byte) {
		p, err := Parse(frame)
		if err == nil && p.IP() && (!p.Tuple.Src.IsValid() || !p.Tuple.Dst.IsValid()) {
			t.Errorf("no error and no addresses: %+v", p)
		}
		if len(p.Payload) > len(frame) {
			t.Errorf("payload longer than the frame")
		}
	})
}
