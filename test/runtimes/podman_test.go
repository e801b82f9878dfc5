package runtimes

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/test/lab"
)

// podmanList and podmanConf are the guide's; podmanHere is what a machine needs
// that has no journal and no controllers of cgroups.
const (
	podmanList = `{"cniVersion":"1.0.0","name":"underlay","plugins":[
		{"type":"underlay-cni"},
		{"type":"portmap","capabilities":{"portMappings":true}}]}`
	podmanConf = `[network]
network_backend = "cni"
default_network = "underlay"
`
	podmanHere = `[containers]
log_driver = "k8s-file"
pids_limit = 0
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
`
)

// Debian's podman, with a port of the node that leads to the container.
func TestPodman(t *testing.T) {
	w := newWorld(t, podmanList, "podman")
	h := w.h
	h.write("/etc/containers/containers.conf", podmanConf+podmanHere)
	h.run("podman", "load", "--quiet", "--input", "/run/bin/peer.tar")
	port := netip.AddrPortFrom(w.node.IP, 18080)
	seen := func(name string) container {
		t.Helper()
		var c []struct {
			ID    string
			State struct{ Pid int }
		}
		out := h.run("podman", "container", "inspect", name)
		if err := json.Unmarshal([]byte(out), &c); err != nil || len(c) != 1 {
			t.Fatalf("inspect %s: %v\n%s", name, err, out)
		}
		return container{id: c[0].ID, name: name, netns: fmt.Sprintf("/proc/%d/ns/net", c[0].State.Pid), exec: func(args ...string) string {
			return h.run(append([]string{"podman", "exec", name}, args...)...)
		}}
	}
	// published checks that the port leads to the container, whose clients
	// keep their addresses, and that podman says what is.
	published := func(c container, addr netip.Addr) {
		t.Helper()
		for who, from := range map[string]struct {
			netns string
			ip    netip.Addr
		}{"a pod of another node": {w.pod.Netns, w.pod.IP}, "another node": {w.far.Netns, w.far.IP}, "the node itself": {w.node.Netns, w.node.IP}} {
			if got := lab.AskTCP(t, from.netns, port); got != from.ip.String() {
				t.Errorf("behind %s the container sees %s come as %q, want %s", port, who, got, from.ip)
			}
		}
		if got := h.run("podman", "container", "inspect", "--format", "{{.NetworkSettings.IPAddress}} {{.NetworkSettings.Gateway}}", c.name); got != addr.String()+" 169.254.1.1" {
			t.Errorf("podman inspect says %q, the agent %s", got, addr)
		}
	}
	closed := func() {
		t.Helper()
		err := nl.Do(w.far.Netns, func() error {
			c, err := net.DialTimeout("tcp4", port.String(), time.Second)
			if err == nil {
				c.Close()
				return fmt.Errorf("%s still answers", port)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		if rules := h.run("iptables", "-t", "nat", "-S"); strings.Contains(rules, "18080") {
			t.Errorf("rules are left:\n%s", rules)
		}
	}

	h.run("podman", "run", "--detach", "--publish", "18080:80", "--name", "web", imageName)
	web := seen("web")
	first := w.holds(web)
	published(web, first.IP)

	// A restart is DEL and ADD under the same ID: a new address, since the old
	// one rests.
	h.run("podman", "restart", "--time", "0", "web")
	web = seen("web")
	second := w.holds(web)
	published(web, second.IP)
	if second.IP == first.IP {
		t.Errorf("%s was given again at once", first.IP)
	}
	w.returned(web.id, first.IP)

	// Stopped, a container has no address.
	h.run("podman", "stop", "--time", "0", "web")
	w.returned(web.id, second.IP)
	closed()

	// The agent is gone when the container is removed.
	h.run("podman", "start", "web")
	web = seen("web")
	third := w.holds(web)
	w.Kill("underlay-agent", w.node.Name)
	h.run("podman", "rm", "--force", "--time", "0", "web")
	if left := h.run("podman", "ps", "--all", "--quiet"); left != "" {
		t.Errorf("left without an agent: %s", left)
	}
	closed()
	// Nor does one start without it, which leaves nothing either.
	if _, stderr, err := h.try("podman", "run", "--detach", "--publish", "18080:80", "--name", "none", imageName); err == nil || !strings.Contains(stderr, "no agent answers") {
		t.Errorf("without an agent, podman run: %v\n%s", err, stderr)
	}
	w.restartAgent()
	w.returned(web.id, third.IP)
	none := h.run("podman", "container", "inspect", "--format", "{{.ID}}", "none")
	if live := w.live(none); len(live) != 0 {
		t.Errorf("the container that did not start has %+v", live)
	}
	// The same container starts when the agent is there.
	h.run("podman", "start", "none")
	e := w.holds(seen("none"))
	published(seen("none"), e.IP)
	h.run("podman", "rm", "--force", "--time", "0", "none")
	w.returned(none, e.IP)
	closed()
}
