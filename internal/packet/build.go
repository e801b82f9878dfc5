package packet

import (
	"encoding/binary"
	"net/netip"
)

// Frame returns an Ethernet frame. Frames below 60 bytes are left as they are:
// padding is the wire's business.
func Frame(src, dst MAC, etherType uint16, payload []byte) []byte {
	b := make([]byte, 0, 14+len(payload))
	b = append(b, dst[:]...)
	b = append(b, src[:]...)
	b = binary.BigEndian.AppendUint16(b, etherType)
	return append(b, payload...)
}

// BuildARP returns the 28 bytes of an ARP packet, the payload of a frame.
func BuildARP(a ARP) []byte {
	b := make([]byte, 0, 28)
	b = binary.BigEndian.AppendUint16(b, 1)
	b = binary.BigEndian.AppendUint16(b, EtherTypeIPv4)
	b = append(b, 6, 4)
	b = binary.BigEndian.AppendUint16(b, a.Op)
	b = append(b, a.SenderMAC[:]...)
	b = append(b, a.SenderIP.AsSlice()...)
	b = append(b, a.TargetMAC[:]...)
	return append(b, a.TargetIP.AsSlice()...)
}

// UDP4 returns an IPv4 packet (no Ethernet header) that carries a UDP datagram,
// TTL 64, don't-fragment, with both checksums. Both addresses must be IPv4.
func UDP4(src, dst netip.AddrPort, payload []byte) []byte {
	udp := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(udp[0:2], src.Port())
	binary.BigEndian.PutUint16(udp[2:4], dst.Port())
	binary.BigEndian.PutUint16(udp[4:6], uint16(8+len(payload)))
	udp = append(udp, payload...)
	sum := Checksum(pseudoHeader(src.Addr(), dst.Addr(), ProtoUDP, len(udp)), udp)
	if sum == 0 {
		sum = 0xffff // RFC 768: 0 means no checksum
	}
	binary.BigEndian.PutUint16(udp[6:8], sum)
	return IPv4(src.Addr(), dst.Addr(), ProtoUDP, udp)
}

// Echo4 returns an IPv4 packet that carries an ICMP echo request.
func Echo4(src, dst netip.Addr, id, seq uint16, payload []byte) []byte {
	icmp := make([]byte, 8, 8+len(payload))
	icmp[0] = 8
	binary.BigEndian.PutUint16(icmp[4:6], id)
	binary.BigEndian.PutUint16(icmp[6:8], seq)
	icmp = append(icmp, payload...)
	binary.BigEndian.PutUint16(icmp[2:4], Checksum(0, icmp))
	return IPv4(src, dst, ProtoICMP, icmp)
}

// IPv4 returns an IPv4 packet around payload: TTL 64, don't-fragment.
func IPv4(src, dst netip.Addr, proto uint8, payload []byte) []byte {
	b := make([]byte, 20, 20+len(payload))
	b[0] = 0x45
	binary.BigEndian.PutUint16(b[2:4], uint16(20+len(payload)))
	b[6] = 0x40
	b[8] = 64
	b[9] = proto
	copy(b[12:16], src.AsSlice())
	copy(b[16:20], dst.AsSlice())
	binary.BigEndian.PutUint16(b[10:12], Checksum(0, b[:20]))
	return append(b, payload...)
}

// pseudoHeader returns the partial sum of the pseudo-header (RFC 768, 9293).
func pseudoHeader(src, dst netip.Addr, proto uint8, length int) uint32 {
	s, d := src.As4(), dst.As4()
	return uint32(binary.BigEndian.Uint16(s[0:2])) + uint32(binary.BigEndian.Uint16(s[2:4])) +
		uint32(binary.BigEndian.Uint16(d[0:2])) + uint32(binary.BigEndian.Uint16(d[2:4])) +
		uint32(proto) + uint32(length)
}

// Checksum returns the Internet checksum (RFC 1071) of b, begun with sum.
func Checksum(sum uint32, b []byte) uint16 {
	for ; len(b) >= 2; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
