package differential

import (
	"cmp"
	"encoding/binary"
	"net/netip"

	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/test/vpcmodel"
)

// mark stands before the number of a packet.
const mark = "model\x00\x00\x00"

// datagrams returns the IP packets, one or several fragments, that a model's
// packet is on the wire. number makes each unlike all others of a run.
func datagrams(p *vpcmodel.Packet, number uint32) [][]byte {
	payload := binary.BigEndian.AppendUint32([]byte(mark), number)
	body := transport(p, payload)
	if p.Fragments < 2 && !p.Orphan {
		if header := headerLength(p.Src); p.Length > header+len(body) {
			body = transport(p, append(payload, make([]byte, p.Length-header-len(body))...))
		}
		if p.Src.Is6() {
			return [][]byte{ip6(p.Src, p.Dst, p.Proto, body)}
		}
		flags := uint16(0x4000)
		if p.MayFragment {
			flags = 0
		}
		return [][]byte{ip(p.Src, p.Dst, p.Proto, uint16(number), flags, body)}
	}
	// Each fragment but the last carries 16 bytes, so that the first has the
	// whole UDP header.
	n := max(2, p.Fragments)
	body = transport(p, append(payload, make([]byte, 16*n-len(body)-4)...))
	var out [][]byte
	for i := range n {
		flags := uint16(16 * i / 8)
		part := body[16*i:]
		if i < n-1 {
			flags |= 0x2000
			part = part[:16]
		}
		if p.Src.Is6() {
			out = append(out, fragment6(p, number, uint16(i), i < n-1, part))
			continue
		}
		out = append(out, ip(p.Src, p.Dst, p.Proto, uint16(number), flags, part))
	}
	if p.Orphan {
		return out[n-1:]
	}
	return out
}

// transport returns what follows the IP header.
func transport(p *vpcmodel.Packet, payload []byte) []byte {
	var b []byte
	switch p.Proto {
	case packet.ProtoTCP:
		b = make([]byte, 20, 20+len(payload))
		binary.BigEndian.PutUint16(b[0:], p.SrcPort)
		binary.BigEndian.PutUint16(b[2:], p.DstPort)
		binary.BigEndian.PutUint32(b[4:], 1000)
		if p.Flags&vpcmodel.ACK != 0 {
			binary.BigEndian.PutUint32(b[8:], 1001)
		}
		b[12], b[13] = 5<<4, p.Flags
		binary.BigEndian.PutUint16(b[14:], 65535)
		b = append(b, payload...)
		binary.BigEndian.PutUint16(b[16:], packet.Checksum(pseudo(p, len(b)), b))
	case packet.ProtoUDP:
		b = make([]byte, 8, 8+len(payload))
		binary.BigEndian.PutUint16(b[0:], p.SrcPort)
		binary.BigEndian.PutUint16(b[2:], p.DstPort)
		binary.BigEndian.PutUint16(b[4:], uint16(8+len(payload)))
		b = append(b, payload...)
		binary.BigEndian.PutUint16(b[6:], cmp.Or(packet.Checksum(pseudo(p, len(b)), b), 0xffff)) // RFC 768: 0 is none
	case packet.ProtoICMP:
		b = []byte{p.Type, p.Code, 0, 0, 0, 0, 0, 0}
		if q := p.About; q != nil {
			if p.Code == 4 {
				binary.BigEndian.PutUint16(b[6:], 1400) // RFC 1191: the next hop's MTU
			}
			quoted := vpcmodel.Packet{Src: q.Src, Dst: q.Dst, Proto: q.Proto, SrcPort: q.SrcPort, DstPort: q.DstPort, Ident: q.Ident, Type: 8}
			inner := transport(&quoted, payload)
			b = append(b, ip(q.Src, q.Dst, q.Proto, 1, 0x4000, inner)...)
		} else {
			binary.BigEndian.PutUint16(b[4:], p.Ident)
			b = append(b, payload...)
		}
		binary.BigEndian.PutUint16(b[2:], packet.Checksum(0, b))
	case packet.ProtoICMPv6:
		b = icmp6(p, payload)
		binary.BigEndian.PutUint16(b[2:], packet.Checksum(pseudo(p, len(b)), b))
	default:
		b = append(make([]byte, 8), payload...)
	}
	return b
}

// ip returns an IPv4 packet with a TTL that no kernel begins with.
func ip(src, dst netip.Addr, proto uint8, ident, fragment uint16, body []byte) []byte {
	b := packet.IPv4(src, dst, proto, body)
	binary.BigEndian.PutUint16(b[4:], ident)
	binary.BigEndian.PutUint16(b[6:], fragment)
	b[8] = 61
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], packet.Checksum(0, b[:20]))
	return b
}

func pseudo(p *vpcmodel.Packet, length int) uint32 {
	sum := uint32(p.Proto) + uint32(length)
	for _, a := range []netip.Addr{p.Src, p.Dst} {
		for b := a.AsSlice(); len(b) > 0; b = b[2:] {
			sum += uint32(binary.BigEndian.Uint16(b))
		}
	}
	return sum
}

func addr(b []byte) netip.Addr { return netip.AddrFrom4([4]byte(b)) }
