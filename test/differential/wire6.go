package differential

import (
	"encoding/binary"
	"net/netip"

	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/test/vpcmodel"
)

// IPv6's headers: RFC 8200, sections 3 and 4.5.
const (
	headerLength6   = 40
	fragmentHeader  = 44 // next header
	fragmentLength6 = 8
)

// headerLength is the length of the IP header of packets from an address.
func headerLength(src netip.Addr) int {
	if src.Is6() {
		return headerLength6
	}
	return 20
}

// ip6 returns an IPv6 packet with a hop limit that no kernel begins with, or 255
// where only that is valid (RFC 4861, section 6.1).
func ip6(src, dst netip.Addr, next uint8, body []byte) []byte {
	b := make([]byte, headerLength6, headerLength6+len(body))
	b[0] = 6 << 4
	binary.BigEndian.PutUint16(b[4:], uint16(len(body)))
	b[6], b[7] = next, 61
	if next == packet.ProtoICMPv6 && 133 <= body[0] && body[0] <= 137 {
		b[7] = 255
	}
	copy(b[8:24], src.AsSlice())
	copy(b[24:40], dst.AsSlice())
	return append(b, body...)
}

// fragment6 is the i-th fragment of 16 bytes.
func fragment6(p *vpcmodel.Packet, number uint32, i uint16, more bool, part []byte) []byte {
	h := []byte{p.Proto, 0, 0, 0, 0, 0, 0, 0}
	offset := i * 16 // in bytes, which are units of 8 shifted by 3
	if more {
		offset |= 1
	}
	binary.BigEndian.PutUint16(h[2:], offset)
	binary.BigEndian.PutUint32(h[4:], number)
	return ip6(p.Src, p.Dst, fragmentHeader, append(h, part...))
}

// reassembled6 is the datagram that fragments make.
func reassembled6(parts [][]byte) []byte {
	var body []byte
	for _, p := range parts {
		body = append(body, p[headerLength6+fragmentLength6:]...)
	}
	first := parts[0]
	return ip6(addr6(first[8:24]), addr6(first[24:40]), first[headerLength6], body)
}

// icmp6 returns an ICMPv6 message without its checksum (RFC 4443, RFC 4861).
func icmp6(p *vpcmodel.Packet, payload []byte) []byte {
	b := []byte{p.Type, p.Code, 0, 0, 0, 0, 0, 0}
	// Options of discovery: a link-layer address, and a nonce that is the mark.
	source := []byte{1, 1, 2, 0, 0, 0, 0, 9}
	nonce := append([]byte{14, 2}, append(payload, 0, 0)...)
	switch {
	case p.About != nil:
		q := p.About
		if p.Type == 2 {
			binary.BigEndian.PutUint32(b[4:], 1400) // the next hop's MTU
		}
		quoted := vpcmodel.Packet{Src: q.Src, Dst: q.Dst, Proto: q.Proto, SrcPort: q.SrcPort, DstPort: q.DstPort, Ident: q.Ident, Type: 128}
		return append(b, ip6(q.Src, q.Dst, q.Proto, transport(&quoted, payload))...)
	case p.Type == 133: // router solicitation
		return append(append(b, source...), nonce...)
	case p.Type == 134: // router advertisement: a lifetime of 1,800 s, two timers
		b[4], b[6], b[7] = 64, 1800>>8, 1800&0xff
		return append(append(append(b, make([]byte, 8)...), source...), nonce...)
	case p.Type == 135: // neighbour solicitation
		return append(append(append(b, solicited(p).AsSlice()...), source...), nonce...)
	case p.Type == 136: // neighbour advertisement: solicited, override
		b[4] = 0x60
		source[0] = 2
		return append(append(append(b, p.Src.AsSlice()...), source...), nonce...)
	case p.Type == 137: // redirect: a target, and what it is the way to
		return append(append(append(b, p.Src.AsSlice()...), p.Dst.AsSlice()...), nonce...)
	}
	binary.BigEndian.PutUint16(b[4:], p.Ident)
	return append(b, payload...)
}

// solicited is the address that a neighbour solicitation asks for: its
// destination, or one of the sender's network whose solicited-node multicast
// address (RFC 4291, section 2.7.1) that is.
func solicited(p *vpcmodel.Packet) netip.Addr {
	if !p.Dst.IsMulticast() {
		return p.Dst
	}
	a, group := p.Src.As16(), p.Dst.As16()
	clear(a[8:])
	copy(a[13:], group[13:])
	return netip.AddrFrom16(a)
}

// multicastMAC is where frames for an IPv6 multicast address go (RFC 2464, section 7).
func multicastMAC(a netip.Addr) packet.MAC {
	b := a.As16()
	return packet.MAC{0x33, 0x33, b[12], b[13], b[14], b[15]}
}

func addr6(b []byte) netip.Addr { return netip.AddrFrom16([16]byte(b)) }

// frame puts a datagram into a frame of its EtherType.
func frame(src, dst packet.MAC, datagram []byte) []byte {
	if datagram[0]>>4 == 6 {
		return packet.Frame(src, dst, packet.EtherTypeIPv6, datagram)
	}
	return packet.Frame(src, dst, packet.EtherTypeIPv4, datagram)
}
