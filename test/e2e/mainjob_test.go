package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	mdpacket "github.com/mdlayher/packet"

	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/test/lab"
)

// The main job, end to end: a VPC, two nodes, pods with addresses of the VPC.
func TestMainJob(t *testing.T) {
	l := lab.Up(t, "--nodes", "2")
	a := l.Run("a", "--node", "node-1")
	b := l.Run("b", "--node", "node-2")
	if a.Node == b.Node || a.IP == b.IP {
		t.Fatalf("pods %+v and %+v", a, b)
	}

	t.Run("pods of two nodes ping each other", func(t *testing.T) {
		l.Underlay("exec", "a", "--", "ping", "-c", "2", "-W", "2", b.IP.String())
		l.Underlay("exec", "b", "--", "ping", "-c", "2", "-W", "2", a.IP.String())
	})

	t.Run("the server sees the pod's own address", func(t *testing.T) {
		at := netip.AddrPortFrom(b.IP, 8081)
		lab.ServeTCP(t, b.Netns, at)
		if got := lab.AskTCP(t, a.Netns, at); got != a.IP.String() {
			t.Errorf("pod b sees %q, pod a is %s", got, a.IP)
		}
		for _, o := range l.Outside {
			port := map[string]uint16{"db-1": 5432, "vm-1": 8080}[o.Name]
			if got := lab.AskTCP(t, a.Netns, netip.AddrPortFrom(o.IP, port)); !strings.Contains(got, a.IP.String()) {
				t.Errorf("%s says %q, pod a is %s", o.Name, got, a.IP)
			}
		}
	})

	t.Run("nothing is encapsulated on the wire", func(t *testing.T) {
		frames := capture(t, l.Nodes[1].Netns, "eth0")
		lab.ServeTCP(t, b.Netns, netip.AddrPortFrom(b.IP, 8082))
		lab.AskTCP(t, a.Netns, netip.AddrPortFrom(b.IP, 8082))
		seen := 0
		for _, p := range frames() {
			if !p.IP() || p.Tuple.DstPort != 8082 && p.Tuple.SrcPort != 8082 {
				continue
			}
			seen++
			pair := [2]netip.Addr{p.Tuple.Src, p.Tuple.Dst}
			if p.Tuple.Proto != packet.ProtoTCP || pair != [2]netip.Addr{a.IP, b.IP} && pair != [2]netip.Addr{b.IP, a.IP} {
				t.Errorf("on the wire: %v", p.Tuple)
			}
		}
		if seen < 6 {
			t.Errorf("%d frames of the connection on eth0 of %s, want its handshake and its end at least", seen, l.Nodes[1].Name)
		}
	})

	t.Run("EC2 lists the pods' addresses", func(t *testing.T) {
		var out struct {
			NetworkInterfaces []struct {
				NetworkInterfaceID string
				PrivateIPAddresses []struct{ PrivateIPAddress string }
				Ipv4Prefixes       []struct{ Ipv4Prefix netip.Prefix }
			}
		}
		l.AWS(&out, "ec2", "describe-network-interfaces")
		for _, p := range []lab.Pod{a, b} {
			found := false
			for _, eni := range out.NetworkInterfaces {
				if eni.NetworkInterfaceID != p.ENI {
					continue
				}
				for _, ip := range eni.PrivateIPAddresses {
					found = found || ip.PrivateIPAddress == p.IP.String()
				}
				for _, prefix := range eni.Ipv4Prefixes {
					found = found || prefix.Ipv4Prefix.Contains(p.IP)
				}
			}
			if !found {
				t.Errorf("EC2 does not list %s of pod %s on %s", p.IP, p.Name, p.ENI)
			}
		}
	})

	t.Run("one more than twenty pods at once", func(t *testing.T) {
		var pods []lab.Pod
		out := l.Underlay("run", "many", "--count", "21", "-o", "json")
		if err := json.Unmarshal([]byte(out), &pods); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		seen := map[netip.Addr]string{a.IP: "a", b.IP: "b"}
		for _, p := range pods {
			if p.Error != "" {
				t.Errorf("%s: %s", p.Name, p.Error)
			}
			if other, twice := seen[p.IP]; twice {
				t.Errorf("%s has the address of %s: %s", p.Name, other, p.IP)
			}
			seen[p.IP] = p.Name
		}
		if len(pods) != 21 {
			t.Errorf("%d pods", len(pods))
		}
		l.Underlay("exec", "many-21", "--", "ping", "-c", "1", "-W", "2", pods[0].IP.String())
	})

	t.Run("status names nodes and pods", func(t *testing.T) {
		out := l.Underlay("status")
		for _, want := range []string{"node-1", "node-2", a.IP.String(), "many-21"} {
			if !strings.Contains(out, want) {
				t.Errorf("status does not mention %s:\n%s", want, out)
			}
		}
		var v any
		if err := json.Unmarshal([]byte(l.Underlay("status", "-o", "json")), &v); err != nil {
			t.Errorf("status -o json: %v", err)
		}
	})

	t.Run("a removed pod leaves nothing", func(t *testing.T) {
		l.Underlay("rm", "b")
		if _, err := os.Stat(b.Netns); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", b.Netns, err)
		}
		out := l.Underlay("node", "exec", "node-2", "--", "ip", "route", "show", "table", "all")
		if strings.Contains(out, b.IP.String()+" ") {
			t.Errorf("a route to %s is left:\n%s", b.IP, out)
		}
		if _, _, code := l.Try("exec", "a", "--", "ping", "-c", "1", "-W", "1", b.IP.String()); code == 0 {
			t.Errorf("%s still answers", b.IP)
		}
	})

	t.Run("down leaves nothing", func(t *testing.T) {
		l.Underlay("down")
		if left := leftovers(t, l.Name); left != "" {
			t.Errorf("left after down:\n%s", left)
		}
		l.Underlay("down") // and again
	})
}

// leftovers names what a lab left on the machine.
func leftovers(t *testing.T, name string) string {
	t.Helper()
	var left []string
	for _, pattern := range []string{"/run/netns/ul-" + name + "-*", "/run/underlay/" + name, "/sys/fs/bpf/underlay/" + name} {
		found, _ := filepath.Glob(pattern)
		left = append(left, found...)
	}
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		t.Fatal(err)
	}
	word := regexp.MustCompile(`\b` + regexp.QuoteMeta(name) + `\b`)
	for line := range strings.Lines(string(mounts)) {
		if word.MatchString(line) {
			left = append(left, "mount "+line)
		}
	}
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range procs {
		b, _ := os.ReadFile(f)
		if word.Match(b) {
			left = append(left, "process "+strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	links, err := exec.Command("ip", "-o", "link").Output()
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(links), "ul-") {
		left = append(left, string(links))
	}
	return strings.Join(left, "\n")
}

// capture begins to read the frames of an interface; the returned function
// ends it and returns what came.
func capture(t *testing.T, netns, ifname string) func() []packet.Packet {
	t.Helper()
	conn := lab.In(t, netns, func() (*mdpacket.Conn, error) {
		ifi, err := net.InterfaceByName(ifname)
		if err != nil {
			return nil, fmt.Errorf("find %s: %w", ifname, err)
		}
		return mdpacket.Listen(ifi, mdpacket.Raw, 3 /* ETH_P_ALL */, nil)
	})
	t.Cleanup(func() { conn.Close() })
	var got []packet.Packet
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 65536)
		for {
			n, _, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			p, _ := packet.Parse(append([]byte(nil), b[:n]...))
			got = append(got, p)
		}
	}()
	return func() []packet.Packet {
		_ = conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		<-done
		return got
	}
}
