package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/testenv"
	"github.com/underlay-cni/underlay/test/lab"
)

// A port of the node leads to a pod, as portmap arranges behind us.
func TestPortmapChained(t *testing.T) {
	testenv.Require(t, "portmap")
	l := lab.Up(t, "--nodes", "2")
	n, far := l.Nodes[0], l.Nodes[1]
	near, remote := l.Run("near", "--node", n.Name), l.Run("remote", "--node", far.Name)
	for _, tc := range []struct{ version, bit string }{{"0.4.0", ""}, {"1.0.0", `,"markMasqBit":16`}} {
		version := tc.version
		r := l.Runtime(n, version, []string{`{"type":"portmap","capabilities":{"portMappings":true}` + tc.bit + `}`}, testenv.PluginDir)
		before := natRules(t, n)
		netns := "ul-" + l.Name + "-mapped"
		if err := nl.NewNamed(netns); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = nl.DeleteNamed(netns) })
		conf := &libcni.RuntimeConf{ContainerID: "mapped-" + version, NetNS: nl.Path(netns), IfName: "eth0",
			CapabilityArgs: map[string]any{"portMappings": []map[string]any{{"hostPort": 18080, "containerPort": 80, "protocol": "tcp"}}}}
		res, err := r.Add(t.Context(), conf)
		if err != nil {
			t.Fatal(err)
		}
		pod, port := addrOf(t, res), netip.AddrPortFrom(n.IP, 18080)
		lab.ServeTCP(t, nl.Path(netns), netip.AddrPortFrom(pod, 80))
		// Ours comes first. portmap 1.1, Debian's, then misses chains for IPv6
		// that its ADD had no address to make for.
		if err := r.Check(t.Context(), conf); err != nil && !strings.Contains(err.Error(), "could not check ipv6 dnat") {
			t.Errorf("%s: CHECK: %v", version, err)
		}
		for _, from := range []struct {
			who, netns string
			seen       netip.Addr
		}{
			{"another node", far.Netns, far.IP},
			{"a pod of another node", remote.Netns, remote.IP},
			{"a pod of the same node", near.Netns, near.IP},
			{"the node itself", n.Netns, n.IP},
			{"the pod itself", nl.Path(netns), n.IP}, // masqueraded: a mark of portmap's
		} {
			if got := lab.AskTCP(t, from.netns, port); got != from.seen.String() {
				t.Errorf("%s: the pod behind %s sees %s come as %q, want %s", version, port, from.who, got, from.seen)
			}
		}
		for range 2 {
			if err := r.Del(t.Context(), conf); err != nil {
				t.Errorf("%s: DEL: %v", version, err)
			}
		}
		if rules := natRules(t, n); strings.Contains(rules, pod.String()) || strings.Contains(rules, "18080") || strings.Contains(rules, "CNI-DN") {
			t.Errorf("%s: rules are left; before:\n%safter:\n%s", version, before, rules)
		}
		err = nl.Do(far.Netns, func() error {
			c, err := net.DialTimeout("tcp4", port.String(), time.Second)
			if err == nil {
				c.Close()
				return fmt.Errorf("%s still answers", port)
			}
			return nil
		})
		if err != nil {
			t.Errorf("%s: after DEL: %v", version, err)
		}
		if err := nl.DeleteNamed(netns); err != nil {
			t.Error(err)
		}
	}
}

// A pod on a secondary interface answers by the interface that has the address
// which its client knows.
func TestPortmapOnSecondaryENI(t *testing.T) {
	testenv.Require(t, "portmap")
	l := lab.Up(t, "--nodes", "2", "--instance-type", "t3.nano", "--agent-arg=--snat=none") // two addresses on each of two interfaces
	n, far := l.Nodes[0], l.Nodes[1]
	near, remote := l.Run("near", "--node", n.Name), l.Run("remote", "--node", far.Name)
	l.Underlay("exec", "near", "--", "ping", "-c", "1", "-W", "2", remote.IP.String())
	if got := l.Underlay("node", "exec", n.Name, "--", "cat", "/proc/sys/net/netfilter/nf_conntrack_count"); got != "0\n" {
		t.Errorf("a node on which nobody translates tracks %s connections", got)
	}

	netns := "ul-" + l.Name + "-mapped"
	if err := nl.NewNamed(netns); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nl.DeleteNamed(netns) })
	r := l.Runtime(n, "1.0.0", []string{`{"type":"portmap","capabilities":{"portMappings":true}}`}, testenv.PluginDir)
	conf := &libcni.RuntimeConf{ContainerID: "mapped", NetNS: nl.Path(netns), IfName: "eth0",
		CapabilityArgs: map[string]any{"portMappings": []map[string]any{{"hostPort": 18080, "containerPort": 80, "protocol": "tcp"}}}}
	res, err := r.Add(t.Context(), conf)
	if err != nil {
		t.Fatal(err)
	}
	pod := addrOf(t, res)
	lab.ServeTCP(t, nl.Path(netns), netip.AddrPortFrom(pod, 80))
	second := l.Inspect(n).ENIs[1]
	if e := podENI(t, l, n, "mapped"); e != second.ID || second.Device != 1 {
		t.Fatalf("the pod is on %s, the second interface is %+v", e, second)
	}
	first := netip.AddrPortFrom(n.IP, 18080)
	for _, tc := range []struct {
		who, netns string
		to         netip.AddrPort
		seen       netip.Addr
	}{
		{"another node", far.Netns, first, far.IP},
		{"a pod of another node", remote.Netns, first, remote.IP},
		{"a pod of the same node", near.Netns, first, near.IP},
		{"the node itself", n.Netns, first, n.IP},
		{"the pod itself", nl.Path(netns), first, n.IP},
		{"another node", far.Netns, netip.AddrPortFrom(second.Primary, 18080), far.IP},
		{"another node", far.Netns, netip.AddrPortFrom(pod, 80), far.IP},
		{"a pod of another node", remote.Netns, netip.AddrPortFrom(pod, 80), remote.IP},
	} {
		if got := lab.AskTCP(t, tc.netns, tc.to); got != tc.seen.String() {
			t.Errorf("at %s the pod sees %s come as %q, want %s", tc.to, tc.who, got, tc.seen)
		}
	}
	// A NodePort is the same, its client behind the node's address as well.
	for _, rule := range []string{
		"PREROUTING -p tcp -d " + n.IP.String() + " --dport 30080 -j DNAT --to-destination " + pod.String() + ":80",
		"POSTROUTING -p tcp -d " + pod.String() + " --dport 80 -m conntrack --ctstate DNAT --ctorigdstport 30080 -j MASQUERADE",
	} {
		l.Underlay(append([]string{"node", "exec", n.Name, "--", "iptables", "-t", "nat", "-A"}, strings.Fields(rule)...)...)
	}
	if got := lab.AskTCP(t, far.Netns, netip.AddrPortFrom(n.IP, 30080)); got != n.IP.String() {
		t.Errorf("behind a NodePort the pod sees another node come as %q, want %s", got, n.IP)
	}
	// What it begins itself goes as ever.
	lab.ServeTCP(t, remote.Netns, netip.AddrPortFrom(remote.IP, 80))
	if got := lab.AskTCP(t, nl.Path(netns), netip.AddrPortFrom(remote.IP, 80)); got != pod.String() {
		t.Errorf("a pod of another node sees the pod come as %q, want %s", got, pod)
	}
	if err := r.Del(t.Context(), conf); err != nil {
		t.Errorf("DEL: %v", err)
	}
}

// podENI returns the interface that has the address of a container.
func podENI(t *testing.T, l *lab.Lab, n lab.Node, id string) string {
	t.Helper()
	for _, e := range l.Inspect(n).Endpoints {
		if e.ContainerID == id && e.State == "live" {
			return e.ENI
		}
	}
	t.Fatalf("the agent knows no %s", id)
	return ""
}

func natRules(t *testing.T, n lab.Node) string {
	t.Helper()
	out, stderr, code := lab.Execute(t, "nsenter", "--net="+n.Netns, "iptables", "-t", "nat", "-S")
	if code != 0 {
		t.Fatalf("iptables -t nat -S: %s", stderr)
	}
	return out
}
