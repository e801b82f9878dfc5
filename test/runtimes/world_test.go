package runtimes

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/testenv"
	"github.com/underlay-cni/underlay/test/lab"
)

// world is a lab in which a runtime runs on the first node, and a pod on the
// second.
type world struct {
	*lab.Lab
	t    *testing.T
	h    *host
	pod  lab.Pod
	node lab.Node // the runtime's
	far  lab.Node
}

func newWorld(t *testing.T, list string, needs ...string) *world {
	t.Helper()
	testenv.Require(t, append([]string{"root", "bpf", "portmap"}, needs...)...)
	if err := buildImage(); err != nil {
		t.Fatal(err)
	}
	l := lab.Up(t, "--nodes", "2", "--agent-env", "IP_COOLDOWN_PERIOD=1")
	w := &world{Lab: l, t: t, node: l.Nodes[0], far: l.Nodes[1]}
	w.h = newHost(t, l, w.node, list)
	w.pod = l.Run("pod", "--node", w.far.Name)
	lab.ServeTCP(t, w.pod.Netns, netip.AddrPortFrom(w.pod.IP, 80))
	return w
}

// live returns the endpoints that a container has now, as the agent knows them.
func (w *world) live(id string) (live []agentapi.Endpoint) {
	w.t.Helper()
	for _, e := range w.Inspect(w.node).Endpoints {
		if e.ContainerID == id && e.State != "tombstone" {
			live = append(live, e)
		}
	}
	return live
}

// up returns the one endpoint of a container once it is there.
func (w *world) up(id string) agentapi.Endpoint {
	w.t.Helper()
	var live []agentapi.Endpoint
	lab.Eventually(w.t, 30*time.Second, "container "+id+" is up", func() error {
		if live = w.live(id); len(live) != 1 || live[0].State != "live" {
			return fmt.Errorf("its endpoints are %+v", live)
		}
		return nil
	})
	return live[0]
}

// returned checks that an address is a container's no longer, and free again
// after the cooldown, if it is not given back to EC2 altogether.
func (w *world) returned(id string, addr netip.Addr) {
	w.t.Helper()
	lab.Eventually(w.t, 30*time.Second, addr.String()+" is free", func() error {
		for _, e := range w.live(id) {
			if e.IP == addr {
				return fmt.Errorf("it is that of %+v", e)
			}
		}
		for _, a := range w.Inspect(w.node).Addresses {
			if a.IP == addr && a.State != "free" {
				return fmt.Errorf("%s is %s", addr, a.State)
			}
		}
		return nil
	})
}

// container is one as its runtime sees it.
type container struct {
	id, name string // as CNI was told
	netns    string // a path on the machine
	exec     func(args ...string) string
}

// holds checks all that a container was promised: an address of the VPC as its
// only one, seen by others as it sees itself, both ways.
func (w *world) holds(c container) agentapi.Endpoint {
	t := w.t
	t.Helper()
	e := w.up(c.id)
	if e.Pod.Name != c.name || e.IfName != "eth0" {
		t.Errorf("the agent knows the container as %+v, want the name %q", e, c.name)
	}
	shown := c.name
	if shown == "" {
		shown = c.id
	}
	if out := w.Underlay("status"); !strings.Contains(out, shown+" ") || !strings.Contains(out, e.IP.String()) {
		t.Errorf("underlay status shows no %s with %s:\n%s", shown, e.IP, out)
	}

	// EC2 has the address on an interface of the node.
	var ec2 struct {
		IDs []string `xml:"networkInterfaceSet>item>networkInterfaceId"`
	}
	if err := w.Call("DescribeNetworkInterfaces", map[string]string{"Filter.1.Name": "addresses.private-ip-address", "Filter.1.Value.1": e.IP.String(),
		"Filter.2.Name": "attachment.instance-id", "Filter.2.Value.1": w.node.InstanceID}, &ec2); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{e.ENI}, ec2.IDs); diff != "" {
		t.Errorf("the interface with %s in EC2 (-agent +EC2): %s", e.IP, diff)
	}

	// What is in the container.
	inside := func(v any, args ...string) {
		t.Helper()
		out := w.h.run(append([]string{"nsenter", "--net=" + c.netns, "ip", "-j", "-4"}, args...)...)
		if err := json.Unmarshal([]byte(out), v); err != nil {
			t.Fatalf("ip %v: %v\n%s", args, err, out)
		}
	}
	type addr struct {
		Local     string
		PrefixLen int
	}
	var links []struct {
		IfName   string
		MTU      int
		AddrInfo []addr `json:"addr_info"`
	}
	inside(&links, "addr", "show", "scope", "global")
	if len(links) != 1 || links[0].IfName != "eth0" || links[0].MTU != 9001 || !cmp.Equal(links[0].AddrInfo, []addr{{e.IP.String(), 32}}) {
		t.Errorf("addresses in the container: %+v, want %s/32 on eth0", links, e.IP)
	}
	type route struct{ Dst, Gateway, Dev string }
	var routes []route
	inside(&routes, "route")
	if diff := cmp.Diff([]route{{"default", "169.254.1.1", "eth0"}, {"169.254.1.1", "", "eth0"}}, routes); diff != "" {
		t.Errorf("routes in the container (-want +got):\n%s", diff)
	}

	w.talks(c, e.IP)
	return e
}

// talks checks that a container reaches others and is reached under its own
// address.
func (w *world) talks(c container, addr netip.Addr) {
	w.t.Helper()
	serves := netip.AddrPortFrom(addr, 80)
	lab.Eventually(w.t, 30*time.Second, "the container serves", func() error {
		return nl.Do(w.node.Netns, func() error {
			conn, err := net.DialTimeout("tcp4", serves.String(), time.Second)
			if err == nil {
				conn.Close()
			}
			return err
		})
	})
	if got := c.exec("/peer", "ask", netip.AddrPortFrom(w.pod.IP, 80).String()); got != addr.String() {
		w.t.Errorf("a pod of another node sees %s come as %q", addr, got)
	}
	for who, from := range map[string]struct {
		netns string
		ip    netip.Addr
	}{
		"a pod of another node": {w.pod.Netns, w.pod.IP},
		"another node":          {w.far.Netns, w.far.IP},
		"the node itself":       {w.node.Netns, w.node.IP},
	} {
		if got := lab.AskTCP(w.t, from.netns, serves); got != from.ip.String() {
			w.t.Errorf("the container sees %s come as %q, want %s", who, got, from.ip)
		}
	}
}

// restartAgent brings the node's agent back.
func (w *world) restartAgent() {
	w.t.Helper()
	w.Underlay("node", "restart-agent", w.node.Name)
}
