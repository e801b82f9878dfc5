package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	mdpacket "github.com/mdlayher/packet"

	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/test/lab"
)

// hostMAC returns the MAC that a pod's neighbour table has for its gateway.
func hostMAC(t *testing.T, netns string) packet.MAC {
	t.Helper()
	out, err := exec.Command("nsenter", "--net="+netns, "ip", "neigh", "show", "169.254.1.1", "dev", "eth0").Output()
	if err != nil {
		t.Fatalf("ip neigh: %v", err)
	}
	fields := strings.Fields(string(out))
	for i, f := range fields {
		if f == "lladdr" {
			hw, err := net.ParseMAC(fields[i+1])
			if err != nil {
				t.Fatal(err)
			}
			return packet.MAC(hw)
		}
	}
	t.Fatalf("no neighbour 169.254.1.1 in %q", out)
	return packet.MAC{}
}

// sendFrames writes raw frames out of a pod's interface.
func sendFrames(t *testing.T, netns string, frames ...[]byte) {
	t.Helper()
	conn := lab.In(t, netns, func() (*mdpacket.Conn, error) {
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return nil, fmt.Errorf("find eth0: %w", err)
		}
		return mdpacket.Listen(ifi, mdpacket.Raw, 3 /* ETH_P_ALL */, nil)
	})
	defer conn.Close()
	for _, f := range frames {
		if _, err := conn.WriteTo(f, &mdpacket.Addr{HardwareAddr: net.HardwareAddr(f[:6])}); err != nil {
			t.Fatalf("send a frame: %v", err)
		}
	}
}

func parseMAC(t *testing.T, s string) packet.MAC {
	t.Helper()
	hw, err := net.ParseMAC(s)
	if err != nil {
		t.Fatal(err)
	}
	return packet.MAC(hw)
}

// Nobody speaks for another: what a pod sends under a foreign name does not
// leave its interface, and is counted.
func TestSpoofedFramesGoNowhere(t *testing.T) {
	l := lab.Up(t, "--nodes", "1")
	liar := l.Run("liar", "--node", "node-1")
	neighbour := l.Run("neighbour", "--node", "node-1")
	victim := l.Run("victim", "--node", "node-1")
	gw := hostMAC(t, liar.Netns)
	own, foreign := parseMAC(t, liar.MAC), parseMAC(t, neighbour.MAC)
	to := netip.AddrPortFrom(victim.IP, 9)
	from := func(a netip.Addr) netip.AddrPort { return netip.AddrPortFrom(a, 4242) }
	broadcast := packet.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

	dropped := func() uint64 {
		var n uint64
		for _, c := range l.Inspect(l.Nodes[0]).Counters.Drops {
			n += c
		}
		return n
	}
	atVictim := capture(t, victim.Netns, "eth0")
	onWire := capture(t, l.Nodes[0].Netns, "eth0")

	// First the control: an honest frame built the same way arrives.
	sendFrames(t, liar.Netns, packet.Frame(own, gw, packet.EtherTypeIPv4, packet.UDP4(from(liar.IP), to, []byte("honest"))))

	for name, frame := range map[string][]byte{
		"neighbour's address":      packet.Frame(own, gw, packet.EtherTypeIPv4, packet.UDP4(from(neighbour.IP), to, []byte("forged"))),
		"neighbour's MAC":          packet.Frame(foreign, gw, packet.EtherTypeIPv4, packet.UDP4(from(liar.IP), to, []byte("forged"))),
		"both":                     packet.Frame(foreign, gw, packet.EtherTypeIPv4, packet.UDP4(from(neighbour.IP), to, []byte("forged"))),
		"the node's address":       packet.Frame(own, gw, packet.EtherTypeIPv4, packet.UDP4(from(l.Nodes[0].IP), to, []byte("forged"))),
		"nobody's address":         packet.Frame(own, gw, packet.EtherTypeIPv4, packet.UDP4(from(netip.MustParseAddr("198.51.100.7")), to, []byte("forged"))),
		"neighbour's ARP":          packet.Frame(own, broadcast, packet.EtherTypeARP, packet.BuildARP(packet.ARP{Op: 2, SenderMAC: own, SenderIP: neighbour.IP, TargetIP: victim.IP})),
		"an ARP with a forged MAC": packet.Frame(own, broadcast, packet.EtherTypeARP, packet.BuildARP(packet.ARP{Op: 1, SenderMAC: foreign, SenderIP: liar.IP, TargetIP: netip.MustParseAddr("169.254.1.1")})),
		"IPv6":                     packet.Frame(own, gw, packet.EtherTypeIPv6, append([]byte{0x60, 0, 0, 0, 0, 0, 59, 64}, make([]byte, 32)...)),
		"a VLAN tag":               packet.Frame(own, gw, packet.EtherTypeVLAN, append([]byte{0, 5, 8, 0}, packet.UDP4(from(liar.IP), to, []byte("forged"))...)),
		"no IP at all":             packet.Frame(own, broadcast, 0x88b5, []byte("local experimental ethertype, padded to a decent length")),
		"a cut IPv4 header":        packet.Frame(own, gw, packet.EtherTypeIPv4, []byte{0x45, 0, 0}),
	} {
		before := dropped()
		sendFrames(t, liar.Netns, frame)
		lab.Eventually(t, 5*time.Second, name+" is counted", func() error {
			if dropped() <= before {
				return errors.New("no drop was counted")
			}
			return nil
		})
	}

	honest, forged := 0, 0
	look := func(where string, frames []packet.Packet) {
		for _, p := range frames {
			switch {
			case strings.Contains(string(p.Payload), "honest"):
				honest++
			case strings.Contains(string(p.Payload), "forged"), p.EtherType == 0x88b5,
				p.EtherType == packet.EtherTypeIPv6 && p.SrcMAC == own, // the node's own link speaks IPv6
				p.ARP != nil && p.ARP.SenderIP == neighbour.IP:
				forged++
				t.Errorf("%s: %+v", where, p)
			}
		}
	}
	look("at the victim", atVictim())
	look("on the wire", onWire())
	if honest == 0 {
		t.Error("the honest frame did not arrive either, so that the rest proves nothing")
	}
}

// Programs detached by hand: nothing from a pod passes, neither to another pod
// nor out nor to the node.
func TestLostProgramsDoNotOpenTheNode(t *testing.T) {
	l := lab.Up(t, "--nodes", "2")
	l.Run("a", "--node", "node-1")
	b := l.Run("b", "--node", "node-1")
	c := l.Run("c", "--node", "node-2")
	targets := map[string]netip.Addr{"a pod of the node": b.IP, "a pod elsewhere": c.IP, "the node": l.Nodes[0].IP, "another node": l.Nodes[1].IP}
	for name, ip := range targets {
		if _, _, code := l.Try("exec", "a", "--", "ping", "-c", "1", "-W", "2", ip.String()); code != 0 {
			t.Fatalf("before: %s (%s) does not answer", name, ip)
		}
	}
	takeAway := func() (links int) {
		for line := range strings.Lines(l.Underlay("node", "exec", "node-1", "--", "ip", "-o", "link", "show", "group", "30060")) {
			name, _, _ := strings.Cut(strings.Fields(line)[1], "@")
			l.Underlay("node", "exec", "node-1", "--", "tc", "qdisc", "del", "dev", name, "clsact")
			links++
		}
		return links
	}
	// A living agent hears of it and puts them back.
	if n := takeAway(); n != 2 {
		t.Fatalf("%d devices of pods on the node, want 2", n)
	}
	for name, ip := range targets {
		// -c ends at the first answer, -w after five seconds.
		if _, _, code := l.Try("exec", "a", "--", "ping", "-c", "1", "-i", "0.2", "-w", "5", ip.String()); code != 0 {
			t.Errorf("with the agent there, %s (%s) does not answer any more", name, ip)
		}
	}
	l.Kill("underlay-agent", "node-1")
	takeAway()
	for name, ip := range targets {
		if _, _, code := l.Try("exec", "a", "--", "ping", "-c", "2", "-i", "0.2", "-W", "1", ip.String()); code == 0 {
			t.Errorf("without programs, %s (%s) still answers", name, ip)
		}
	}
	out := l.Underlay("node", "exec", "node-1", "--", "nft", "list", "table", "inet", "underlay")
	if !strings.Contains(out, "packets ") || strings.Contains(out, "packets 0 ") {
		t.Errorf("the fail-closed rule counted nothing:\n%s", out)
	}
}
