package differential

import (
	"testing"

	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/test/vpcmodel"
)

// Whatever a packet's number, its checksums are right: a NAT gateway's kernel looks
// at them, the fabric does not.
func TestChecksums(t *testing.T) {
	for _, proto := range []uint8{packet.ProtoTCP, packet.ProtoUDP, packet.ProtoICMP} {
		p := &vpcmodel.Packet{Src: addr([]byte{10, 1, 1, 10}), Dst: addr([]byte{203, 0, 113, 9}), Proto: proto, SrcPort: 10767, DstPort: 22, Type: 8}
		for number := range uint32(1 << 16) {
			d := datagrams(p, number)[0]
			if packet.Checksum(0, d[:20]) != 0 {
				t.Fatalf("packet %d: the header's checksum is wrong: %x", number, d)
			}
			sum := pseudo(p, len(d)-20)
			if proto == packet.ProtoICMP {
				sum = 0
			}
			if packet.Checksum(sum, d[20:]) != 0 {
				t.Fatalf("packet %d: the checksum of %s is wrong: %x", number, p, d)
			}
			if proto == packet.ProtoUDP && d[26] == 0 && d[27] == 0 {
				t.Fatalf("packet %d has no checksum: %x", number, d)
			}
		}
	}
}
