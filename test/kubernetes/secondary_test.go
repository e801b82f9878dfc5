package kubernetes

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/test/lab"
)

// eniOf returns the interface that each live endpoint of a node is on, by the
// pod's address, and which of them are not the node's first.
func (c *cluster) eniOf(n lab.Node) (eni map[netip.Addr]string, secondary map[netip.Addr]bool) {
	c.t.Helper()
	in := c.Inspect(n)
	primary := ""
	for _, e := range in.ENIs {
		if e.Device == 0 {
			primary = string(e.ID)
		}
	}
	eni, secondary = map[netip.Addr]string{}, map[netip.Addr]bool{}
	for _, e := range in.Endpoints {
		if e.State == "live" {
			eni[e.IP] = string(e.ENI)
			secondary[e.IP] = string(e.ENI) != primary
		}
	}
	return eni, secondary
}

// firstENI returns who holds the addresses of a node's first interface, the pod's
// container by its address, and how many of them cool down.
func (c *cluster) firstENI(n lab.Node) (held map[netip.Addr]string, cooling int) {
	c.t.Helper()
	held = map[netip.Addr]string{}
	in := c.Inspect(n)
	for _, e := range in.Endpoints {
		i := slices.IndexFunc(in.ENIs, func(eni agentapi.ENI) bool { return eni.ID == e.ENI })
		switch {
		case i < 0 || in.ENIs[i].Device != 0:
		case e.State == "live":
			held[e.IP] = e.ContainerID
		case e.State == "tombstone":
			cooling++
		}
	}
	return held, cooling
}

// firstENIs returns who holds the addresses of the nodes' first interfaces.
func (c *cluster) firstENIs() map[netip.Addr]string {
	c.t.Helper()
	all := map[netip.Addr]string{}
	for _, n := range c.Lab.Nodes {
		held, _ := c.firstENI(n)
		maps.Copy(all, held)
	}
	return all
}

// crowd fills the nodes' first interfaces with pods that stay until the test is
// over, and returns what firstENIs does then: the pods that come after them are
// on secondary interfaces.
func (c *cluster) crowd(t *testing.T) map[netip.Addr]string {
	t.Helper()
	ns := c.namespace("crowd")
	pods, limit := 0, 0
	// An address that cooled down as the first pods came is left for the next round.
	for round := range 3 {
		var manifest strings.Builder
		for _, n := range c.Lab.Nodes {
			limit = c.Inspect(n).Limits.IPv4PerENI - 1
			var held map[netip.Addr]string
			lab.Eventually(t, 2*time.Minute, "no address of the first interface of "+n.Name+" cools down", func() error {
				var cooling int
				if held, cooling = c.firstENI(n); cooling > 0 {
					return fmt.Errorf("%d do", cooling)
				}
				return nil
			})
			for i := range limit - len(held) {
				manifest.WriteString(idle(fmt.Sprintf("%s-%d-%d", n.Name, round, i), n.Name, ""))
				pods++
			}
		}
		if manifest.Len() > 0 {
			c.apply(ns, manifest.String())
			c.awaitPods(ns, pods, 3*time.Minute)
		}
		if held := c.firstENIs(); len(held) == limit*len(c.Lab.Nodes) {
			t.Logf("all %d addresses of the nodes' first interfaces are held", len(held))
			return held
		}
	}
	t.Fatalf("%d nodes with %d addresses of a first interface each, and some are left for the specs", len(c.Lab.Nodes), limit)
	return nil
}

// A pod on an interface that is not the node's first is reached and reaches
// others as any: what its node translates comes back by the interface that it
// was sent to, or the VPC drops it.
func TestPodsOnSecondaryENIs(t *testing.T) {
	c := shared(t)
	ns := c.namespace("secondary")
	n1, n2 := c.Lab.Nodes[0], c.Lab.Nodes[1]

	// More pods than the first interface of an m5.large has addresses: 9.
	var manifest strings.Builder
	for i := range 12 {
		manifest.WriteString(idle(fmt.Sprintf("filler-%d", i), n1.Name, fmt.Sprintf(", ports: [{containerPort: %d, hostPort: %d}]", heldPort, 18000+i)))
	}
	manifest.WriteString(idle("client", n2.Name, ""))
	c.apply(ns, manifest.String())
	pods := c.awaitPods(ns, 13, 3*time.Minute)

	_, secondary := c.eniOf(n1)
	var target, client pod
	for _, p := range pods {
		switch {
		case p.Metadata.Name == "client":
			client = p
		case secondary[p.ip()]:
			target = p
		}
	}
	if target.Metadata.Name == "" {
		t.Fatalf("of 12 pods on %s none is on a secondary interface: %v", n1.Name, secondary)
	}
	var hostPort uint16
	if _, err := fmt.Sscanf(target.Metadata.Name, "filler-%d", &hostPort); err != nil {
		t.Fatal(err)
	}
	hostPort += 18000
	c.apply(ns, fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: cluster}
spec: {type: NodePort, selector: {app: %[1]s}, ports: [{port: 80, targetPort: %[2]d}]}
---
apiVersion: v1
kind: Service
metadata: {name: local}
spec: {type: NodePort, externalTrafficPolicy: Local, selector: {app: %[1]s}, ports: [{port: 80, targetPort: %[2]d}]}
`, target.Metadata.Name, heldPort))
	service, nodePort := c.service(ns, "cluster")
	_, localPort := c.service(ns, "local")
	// A node's port leads somewhere once kube-proxy knows the endpoint.
	vm, vmIP := c.outsideNetns("vm-1"), c.OutsideIP("vm-1")
	targetNS, clientNS := c.netns(target), c.netns(client)
	l := lab.Listen(t, targetNS, netip.AddrPortFrom(target.ip(), heldPort))
	port := func(n lab.Node, p uint16) netip.AddrPort { return netip.AddrPortFrom(n.IP, p) }
	for _, to := range []netip.AddrPort{port(n1, nodePort), port(n2, nodePort), port(n1, localPort), port(n1, hostPort)} {
		c.awaitOpen(vm, to, l)
	}
	c.awaitOpen(clientNS, netip.AddrPortFrom(service, 80), l)

	// sees is whom the pod sees; an invalid address: anyone, it is masqueraded.
	for _, tc := range []struct {
		name, from string
		to         netip.AddrPort
		sees       netip.Addr
	}{
		{"directly, from a VM", vm, netip.AddrPortFrom(target.ip(), heldPort), vmIP},
		{"directly, from a pod of another node", clientNS, netip.AddrPortFrom(target.ip(), heldPort), client.ip()},
		{"directly, from its node", n1.Netns, netip.AddrPortFrom(target.ip(), heldPort), n1.IP},
		{"by a Service, from a pod of another node", clientNS, netip.AddrPortFrom(service, 80), client.ip()},
		{"by a Service, from itself", targetNS, netip.AddrPortFrom(service, 80), netip.Addr{}},
		{"by its node's NodePort", vm, port(n1, nodePort), netip.Addr{}},
		{"by another node's NodePort", vm, port(n2, nodePort), netip.Addr{}},
		{"by a NodePort that keeps the source", vm, port(n1, localPort), vmIP},
		{"by hostPort, from a VM", vm, port(n1, hostPort), vmIP},
		{"by hostPort, from a pod of another node", clientNS, port(n1, hostPort), client.ip()},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := lab.Hold(t, tc.name, tc.from, tc.to, l)
			if tc.sees.IsValid() && h.ServerSees() != tc.sees {
				t.Errorf("the pod sees %s, want %s", h.ServerSees(), tc.sees)
			}
			h.More(20)
		})
	}
	t.Run("DNS", func(t *testing.T) {
		c := c.with(t)
		for _, transport := range []string{"+notcp", "+tcp"} {
			out := c.kubectl("exec", "-n", ns, target.Metadata.Name, "--", "dig", transport, "+short", "+tries=1", "+time=5", "kubernetes.default.svc.cluster.local")
			if strings.TrimSpace(out) != "10.96.0.1" {
				t.Errorf("dig %s: %q", transport, out)
			}
		}
	})
	t.Run("the internet", func(t *testing.T) { internet(t, c.with(t), n1, target) })
	t.Run("link-local listener", func(t *testing.T) { linkLocal(t, n1, targetNS, target.ip()) })
}

// internet asks a server of the internet, which says whom it sees: the NAT
// gateway. On the VPC's wires the pod's node speaks by the pod's interface, as
// that interface's primary address.
func internet(t *testing.T, c *cluster, n lab.Node, p pod) {
	const server = "203.0.113.10"
	out := c.kubectl("exec", "-n", p.Metadata.Namespace, p.Metadata.Name, "--", "curl", "-sS", "--max-time", "10", "http://"+server+"/")
	type elastic struct{ PublicIp netip.Addr }
	var addresses struct{ Addresses []elastic }
	c.AWS(&addresses, "ec2", "describe-addresses")
	seen, err := netip.ParseAddr(strings.TrimSpace(out))
	if err != nil {
		t.Fatalf("the server says %q", out)
	}
	if !slices.Contains(addresses.Addresses, elastic{seen}) {
		t.Errorf("the server sees %s, which is no Elastic IP: %v", seen, addresses.Addresses)
	}
	in := c.Inspect(n)
	of := slices.IndexFunc(in.Endpoints, func(e agentapi.Endpoint) bool { return e.IP == p.ip() && e.State == "live" })
	eni := slices.IndexFunc(in.ENIs, func(e agentapi.ENI) bool { return of >= 0 && e.ID == in.Endpoints[of].ENI })
	if eni < 0 {
		t.Fatalf("no interface has %s", p.ip())
	}
	want := in.ENIs[eni].Primary.String()
	lab.Eventually(t, 10*time.Second, "the flow log has the packets", func() error {
		out := c.Underlay("flows", "--by", "vpc", "--eni", in.ENIs[eni].ID, "--address", server, "-o", "json")
		sources := map[string]bool{}
		for line := range strings.Lines(out) {
			var r map[string]any
			if err := json.Unmarshal([]byte(line), &r); err != nil {
				return err
			}
			if r["flow-direction"] == "egress" {
				sources[fmt.Sprint(r["pkt-srcaddr"])] = true
			}
		}
		if len(sources) != 1 || !sources[want] {
			return fmt.Errorf("sources on %s are %v, want %s alone", in.ENIs[eni].ID, sources, want)
		}
		return nil
	})
}

// linkLocal is NodeLocal DNSCache's way: an address of the node alone, which its
// pods ask, by UDP and TCP, and whose answers come from that address.
func linkLocal(t *testing.T, n lab.Node, podNS string, podIP netip.Addr) {
	at := netip.MustParseAddrPort("169.254.20.10:7053")
	n.Exec(t, "ip", "address", "add", at.Addr().String()+"/32", "dev", "lo")
	t.Cleanup(func() { n.Exec(t, "ip", "address", "del", at.Addr().String()+"/32", "dev", "lo") })

	h := lab.Hold(t, "link-local TCP", podNS, at, lab.Listen(t, n.Netns, at))
	if h.ServerSees() != podIP {
		t.Errorf("the listener sees %s, want the pod's %s", h.ServerSees(), podIP)
	}
	server := lab.In(t, n.Netns, func() (net.PacketConn, error) { return net.ListenPacket("udp4", at.String()) })
	defer server.Close()
	client := lab.In(t, podNS, func() (net.Conn, error) { return net.Dial("udp4", at.String()) })
	defer client.Close()
	deadline := time.Now().Add(10 * time.Second)
	_ = server.SetDeadline(deadline)
	_ = client.SetDeadline(deadline)
	if _, err := client.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 64)
	_, peer, err := server.ReadFrom(b)
	if err != nil {
		t.Fatalf("the question did not arrive: %v", err)
	}
	if got := peer.(*net.UDPAddr).AddrPort().Addr().Unmap(); got != podIP {
		t.Errorf("the listener sees %s, want the pod's %s", got, podIP)
	}
	if _, err := server.WriteTo([]byte("answer"), peer); err != nil {
		t.Fatal(err)
	}
	if k, err := client.Read(b); err != nil || string(b[:k]) != "answer" {
		t.Errorf("the answer: %q, %v", b[:k], err)
	}
}

// awaitOpen waits until a connection to an address reaches a listener.
func (c *cluster) awaitOpen(netns string, to netip.AddrPort, l net.Listener) {
	c.t.Helper()
	lab.Eventually(c.t, time.Minute, fmt.Sprintf("%s answers", to), func() error {
		var conn net.Conn
		err := lab.Try(netns, func() (err error) {
			conn, err = net.DialTimeout("tcp4", to.String(), time.Second)
			return err
		})
		if err != nil {
			return err
		}
		conn.Close()
		accepted, err := l.Accept() // it has been connected to: this does not wait long
		if err == nil {
			accepted.Close()
		}
		return err
	})
}
