package packet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// EtherTypes (IEEE 802) and IP protocol numbers (IANA) that are told apart.
const (
	EtherTypeIPv4 uint16 = 0x0800
	EtherTypeARP  uint16 = 0x0806
	EtherTypeVLAN uint16 = 0x8100
	EtherTypeIPv6 uint16 = 0x86dd

	ProtoICMP   uint8 = 1
	ProtoIPIP   uint8 = 4
	ProtoTCP    uint8 = 6
	ProtoUDP    uint8 = 17
	ProtoIPv6   uint8 = 41
	ProtoGRE    uint8 = 47
	ProtoICMPv6 uint8 = 58
)

// ErrTruncated is returned when a frame ends before a header that it announces.
var ErrTruncated = errors.New("truncated")

// MAC is an Ethernet address.
type MAC [6]byte

func (m MAC) String() string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// FiveTuple names a flow in one direction. For ICMP and ICMPv6, SrcPort holds
// the identifier of an echo and DstPort type<<8|code; for other protocols
// without ports, and for fragments after the first, both are 0.
type FiveTuple struct {
	Src, Dst         netip.Addr
	SrcPort, DstPort uint16
	Proto            uint8
}

func (t FiveTuple) String() string {
	return fmt.Sprintf("%s > %s proto %d", netip.AddrPortFrom(t.Src, t.SrcPort), netip.AddrPortFrom(t.Dst, t.DstPort), t.Proto)
}

// Reverse returns the tuple of the answers.
func (t FiveTuple) Reverse() FiveTuple {
	t.Src, t.Dst = t.Dst, t.Src
	if t.Proto != ProtoICMP && t.Proto != ProtoICMPv6 {
		t.SrcPort, t.DstPort = t.DstPort, t.SrcPort
	}
	return t
}

// ARP is an IPv4-over-Ethernet ARP packet (RFC 826).
type ARP struct {
	Op                   uint16 // 1 request, 2 reply
	SenderMAC, TargetMAC MAC
	SenderIP, TargetIP   netip.Addr
}

// Packet is what Parse found in a frame.
type Packet struct {
	SrcMAC, DstMAC MAC
	EtherType      uint16 // of the payload, after at most one 802.1Q tag
	VLAN           uint16 // 802.1Q VLAN ID, valid when Tagged
	Tagged         bool

	ARP *ARP // when EtherType is ARP

	Tuple    FiveTuple // valid when EtherType is IPv4 or IPv6
	TTL      uint8     // hop limit for IPv6
	Fragment bool      // part of a fragmented datagram
	Payload  []byte    // after the transport header, as far as the frame holds it; aliases the frame
}

// IP reports whether the frame holds an IPv4 or IPv6 packet.
func (p *Packet) IP() bool { return p.EtherType == EtherTypeIPv4 || p.EtherType == EtherTypeIPv6 }

// Parse reads an Ethernet frame. On an error what was read so far is returned
// with it: a frame with a forged transport header still names its MACs.
func Parse(frame []byte) (Packet, error) {
	var p Packet
	if len(frame) < 14 {
		return p, fmt.Errorf("ethernet header: %w", ErrTruncated)
	}
	copy(p.DstMAC[:], frame[0:6])
	copy(p.SrcMAC[:], frame[6:12])
	p.EtherType = binary.BigEndian.Uint16(frame[12:14])
	rest := frame[14:]
	if p.EtherType == EtherTypeVLAN {
		if len(rest) < 4 {
			return p, fmt.Errorf("802.1Q tag: %w", ErrTruncated)
		}
		p.Tagged = true
		p.VLAN = binary.BigEndian.Uint16(rest[0:2]) & 0x0fff
		p.EtherType = binary.BigEndian.Uint16(rest[2:4])
		rest = rest[4:]
	}
	switch p.EtherType {
	case EtherTypeARP:
		return p, p.parseARP(rest)
	case EtherTypeIPv4:
		return p, p.parseIPv4(rest)
	case EtherTypeIPv6:
		return p, p.parseIPv6(rest)
	}
	p.Payload = rest
	return p, nil
}

func (p *Packet) parseARP(b []byte) error {
	if len(b) < 28 {
		return fmt.Errorf("ARP: %w", ErrTruncated)
	}
	if binary.BigEndian.Uint16(b[0:2]) != 1 || binary.BigEndian.Uint16(b[2:4]) != EtherTypeIPv4 || b[4] != 6 || b[5] != 4 {
		return errors.New("ARP: not IPv4 over Ethernet")
	}
	a := &ARP{Op: binary.BigEndian.Uint16(b[6:8])}
	copy(a.SenderMAC[:], b[8:14])
	a.SenderIP = netip.AddrFrom4([4]byte(b[14:18]))
	copy(a.TargetMAC[:], b[18:24])
	a.TargetIP = netip.AddrFrom4([4]byte(b[24:28]))
	p.ARP = a
	return nil
}

func (p *Packet) parseIPv4(b []byte) error {
	if len(b) < 20 {
		return fmt.Errorf("IPv4 header: %w", ErrTruncated)
	}
	header := int(b[0]&0x0f) * 4
	if b[0]>>4 != 4 || header < 20 {
		return errors.New("IPv4 header: bad version or length")
	}
	p.Tuple.Src = netip.AddrFrom4([4]byte(b[12:16]))
	p.Tuple.Dst = netip.AddrFrom4([4]byte(b[16:20]))
	p.Tuple.Proto = b[9]
	p.TTL = b[8]
	if len(b) < header {
		return fmt.Errorf("IPv4 options: %w", ErrTruncated)
	}
	frag := binary.BigEndian.Uint16(b[6:8])
	p.Fragment = frag&0x3fff != 0 // more fragments, or an offset
	end := int(binary.BigEndian.Uint16(b[2:4]))
	if end < header || end > len(b) {
		// A capture may be cut short, and a segment that was not yet split
		// by offload can exceed 16 bits (length 0).
		end = len(b)
	}
	if frag&0x1fff != 0 {
		p.Payload = b[header:end]
		return nil
	}
	return p.parseTransport(b[header:end])
}

func (p *Packet) parseIPv6(b []byte) error {
	if len(b) < 40 {
		return fmt.Errorf("IPv6 header: %w", ErrTruncated)
	}
	if b[0]>>4 != 6 {
		return errors.New("IPv6 header: bad version")
	}
	p.Tuple.Src = netip.AddrFrom16([16]byte(b[8:24]))
	p.Tuple.Dst = netip.AddrFrom16([16]byte(b[24:40]))
	p.TTL = b[7]
	next, rest := b[6], b[40:]
	// RFC 8200 section 4: hop-by-hop, routing, fragment, destination options.
	// Each header takes at least 8 bytes, so the walk ends with the frame.
	for {
		switch next {
		case 0, 43, 60:
			if len(rest) < 8 || len(rest) < 8+int(rest[1])*8 {
				p.Tuple.Proto = next
				return fmt.Errorf("IPv6 extension header %d: %w", next, ErrTruncated)
			}
			next, rest = rest[0], rest[8+int(rest[1])*8:]
		case 44:
			if len(rest) < 8 {
				p.Tuple.Proto = next
				return fmt.Errorf("IPv6 fragment header: %w", ErrTruncated)
			}
			offset := binary.BigEndian.Uint16(rest[2:4])
			p.Fragment = offset&0xfff9 != 0 // an offset, or more fragments
			next, rest = rest[0], rest[8:]
			if offset&0xfff8 != 0 {
				p.Tuple.Proto, p.Payload = next, rest
				return nil
			}
		default:
			p.Tuple.Proto = next
			return p.parseTransport(rest)
		}
	}
}

func (p *Packet) parseTransport(b []byte) error {
	need := map[uint8]int{ProtoTCP: 20, ProtoUDP: 8, ProtoICMP: 8, ProtoICMPv6: 8}[p.Tuple.Proto]
	if len(b) < need {
		return fmt.Errorf("header of protocol %d: %w", p.Tuple.Proto, ErrTruncated)
	}
	switch p.Tuple.Proto {
	case ProtoTCP:
		need = int(b[12]>>4) * 4
		if need < 20 {
			return errors.New("TCP header: bad length")
		}
		p.Tuple.SrcPort, p.Tuple.DstPort = binary.BigEndian.Uint16(b[0:2]), binary.BigEndian.Uint16(b[2:4])
		if len(b) < need {
			return fmt.Errorf("TCP options: %w", ErrTruncated)
		}
	case ProtoUDP:
		p.Tuple.SrcPort, p.Tuple.DstPort = binary.BigEndian.Uint16(b[0:2]), binary.BigEndian.Uint16(b[2:4])
	case ProtoICMP, ProtoICMPv6:
		p.Tuple.DstPort = binary.BigEndian.Uint16(b[0:2]) // type, code
		if isEcho(p.Tuple.Proto, b[0]) {
			p.Tuple.SrcPort = binary.BigEndian.Uint16(b[4:6])
		}
	}
	p.Payload = b[need:]
	return nil
}

func isEcho(proto, icmpType uint8) bool {
	if proto == ProtoICMPv6 {
		return icmpType == 128 || icmpType == 129
	}
	return icmpType == 0 || icmpType == 8
}
