package kubernetes

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/test/lab"
)

// traffic is a pod's connections of every kind, each in use all the time.
type traffic struct {
	t       *testing.T
	held    []*lab.Held
	streams map[string]*lab.Stream
}

const heldPort = 7100

// startTraffic makes pods a and c on the first node and b on the second, b
// behind a Service, and connects them and vm-1 with one another.
func (c *cluster) startTraffic(t *testing.T, ns string) *traffic {
	t.Helper()
	c = c.with(t)
	n1, n2 := c.Lab.Nodes[0], c.Lab.Nodes[1]
	c.apply(ns, idle("a", n1.Name, "")+idle("b", n2.Name, "")+idle("c", n1.Name, "")+fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: b}
spec:
  type: NodePort
  selector: {app: b}
  ports: [{port: 80, targetPort: %d}]
`, heldPort))
	pods := map[string]pod{}
	for _, p := range c.awaitPods(ns, 3, 2*time.Minute) {
		pods[p.Metadata.Name] = p
	}
	service, nodePort := c.service(ns, "b")
	netns := map[string]string{"vm-1": c.outsideNetns("vm-1")}
	for name, p := range pods {
		netns[name] = c.netns(p)
	}
	at := func(p pod) netip.AddrPort { return netip.AddrPortFrom(p.ip(), heldPort) }
	c.openVM()

	tr := &traffic{t: t, streams: map[string]*lab.Stream{}}
	inB := lab.Listen(t, netns["b"], at(pods["b"]))
	inC := lab.Listen(t, netns["c"], at(pods["c"]))
	onVM := lab.Listen(t, netns["vm-1"], netip.AddrPortFrom(c.OutsideIP("vm-1"), heldPort))
	c.awaitOpen(netns["a"], netip.AddrPortFrom(service, 80), inB)
	c.awaitOpen(netns["vm-1"], netip.AddrPortFrom(n1.IP, nodePort), inB)
	c.awaitOpen(netns["vm-1"], netip.AddrPortFrom(n2.IP, nodePort), inB)
	tr.held = append(tr.held,
		lab.Hold(t, "pod to pod of another node", netns["a"], at(pods["b"]), inB),
		lab.Hold(t, "pod to pod of the node", netns["a"], at(pods["c"]), inC),
		lab.Hold(t, "pod to a Service", netns["a"], netip.AddrPortFrom(service, 80), inB),
		lab.Hold(t, "pod to VM", netns["a"], netip.AddrPortFrom(c.OutsideIP("vm-1"), heldPort), onVM),
		lab.Hold(t, "VM to pod", netns["vm-1"], at(pods["a"]), lab.Listen(t, netns["a"], at(pods["a"]))),
		lab.Hold(t, "VM to a NodePort of the pod's node", netns["vm-1"], netip.AddrPortFrom(n2.IP, nodePort), inB),
		lab.Hold(t, "VM to a NodePort of another node", netns["vm-1"], netip.AddrPortFrom(n1.IP, nodePort), inB),
	)
	tr.streams["across"] = lab.StartStream(t, netns["a"], netns["b"], pods["b"].ip())
	tr.streams["within"] = lab.StartStream(t, netns["a"], netns["c"], pods["c"].ip())
	return tr
}

// openVM lets the VPC in to heldPort of vm-1, whose security group knows nothing
// of it.
func (c *cluster) openVM() {
	c.t.Helper()
	var interfaces struct {
		NetworkInterfaces []struct{ Groups []struct{ GroupId string } } //nolint:revive // EC2's spelling
	}
	c.AWS(&interfaces, "ec2", "describe-network-interfaces", "--filters", "Name=private-ip-address,Values="+c.OutsideIP("vm-1").String())
	if len(interfaces.NetworkInterfaces) != 1 || len(interfaces.NetworkInterfaces[0].Groups) != 1 {
		c.t.Fatalf("vm-1: %+v", interfaces)
	}
	group, port := interfaces.NetworkInterfaces[0].Groups[0].GroupId, strconv.Itoa(heldPort)
	var open struct{ SecurityGroups []struct{} }
	c.AWS(&open, "ec2", "describe-security-groups", "--filters", "Name=group-id,Values="+group, "Name=ip-permission.from-port,Values="+port)
	if len(open.SecurityGroups) > 0 {
		return
	}
	c.AWS(&struct{}{}, "ec2", "authorize-security-group-ingress", "--group-id", group, "--protocol", "tcp", "--port", port, "--cidr", "10.0.0.0/16")
}

// goesOn fails the test unless every connection is whole and carries more.
func (tr *traffic) goesOn() {
	tr.t.Helper()
	for _, h := range tr.held {
		h.More(20)
	}
	for _, s := range tr.streams {
		s.More(100)
	}
}

// stop ends the streams of datagrams; none may have been lost.
func (tr *traffic) stop() {
	tr.t.Helper()
	for name, s := range tr.streams {
		if sent, lost := s.Stop(); lost != 0 {
			tr.t.Errorf("%s: %d of %d datagrams lost", name, lost, sent)
		}
	}
	for _, h := range tr.held {
		if err := h.Check(); err != nil {
			tr.t.Errorf("%s: %v", h.Name, err)
		}
	}
}

// service returns the cluster's address of a Service, and its first port on nodes.
func (c *cluster) service(ns, name string) (netip.Addr, uint16) {
	c.t.Helper()
	svc, err := get[struct {
		Spec struct {
			ClusterIP string
			Ports     []struct{ NodePort uint16 }
		}
	}](c, "service", name, "-n", ns)
	if err != nil {
		c.t.Fatal(err)
	}
	return netip.MustParseAddr(svc.Spec.ClusterIP), svc.Spec.Ports[0].NodePort
}

func (c *cluster) outsideNetns(name string) string {
	c.t.Helper()
	for _, o := range c.Outside {
		if o.Name == name {
			return o.Netns
		}
	}
	c.t.Fatalf("no %s outside the cluster", name)
	return ""
}

// process returns the pid of a program in a machine's network namespace, or 0.
// A lab's machines have process namespaces of their own; from here all are seen.
func (c *cluster) process(netns, program string) int {
	c.t.Helper()
	want, err := os.Stat(netns)
	if err != nil {
		c.t.Fatal(err)
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		c.t.Fatal(err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		argv0, _, _ := strings.Cut(string(cmdline), "\x00")
		ns, err := os.Stat(filepath.Join("/proc", e.Name(), "ns/net"))
		if err == nil && filepath.Base(argv0) == program && os.SameFile(ns, want) {
			return pid
		}
	}
	return 0
}

// kill ends a program on a machine by SIGKILL and waits until another runs in
// its place, put there by who watches over it.
func (c *cluster) kill(netns, program string) {
	c.t.Helper()
	pid := c.process(netns, program)
	if pid == 0 {
		c.t.Fatalf("no %s runs in %s", program, netns)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		c.t.Fatalf("kill %s: %v", program, err)
	}
	lab.Eventually(c.t, 90*time.Second, program+" is back", func() error {
		if now := c.process(netns, program); now == 0 || now == pid {
			return fmt.Errorf("pid %d", now)
		}
		return nil
	})
}

// Whatever dies, connections between pods that live on lose nothing, and after a
// while new pods come up as before.
func TestKilledUnderTraffic(t *testing.T) {
	c := shared(t)
	n1, n3 := c.Lab.Nodes[0], c.Lab.Nodes[2]
	for i, tc := range []struct {
		name string
		kill func(c *cluster)
	}{
		{"agent", func(c *cluster) { c.kill(n1.Netns, "underlay-agent") }},
		{"kubelet", func(c *cluster) { c.kill(n1.Netns, "kubelet") }},
		{"containerd", func(c *cluster) { c.kill(n1.Netns, "containerd") }},
		{"kube-proxy", func(c *cluster) { c.kill(n1.Netns, "kube-proxy") }},
		{"kube-apiserver", func(c *cluster) { c.kill(c.Kubernetes.ControlPlane.Netns, "kube-apiserver") }},
		{"vpcd", func(c *cluster) {
			c.Kill("vpcd", "serve")
			c.Underlay("vpcd", "restart")
		}},
		{"power of a node", func(c *cluster) {
			c.Underlay("node", "kill", n3.Name)
			lab.Eventually(c.t, 2*time.Minute, n3.Name+" is seen to be away", func() error {
				n, err := get[node](c, "node", n3.Name)
				if err == nil && is(n.Status.Conditions, "Ready") {
					err = fmt.Errorf("it is Ready")
				}
				return err
			})
			c.Underlay("node", "boot", n3.Name)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := c.with(t)
			ns := c.namespace(fmt.Sprintf("killed-%d", i))
			tr := c.startTraffic(t, ns)
			before := c.Pods()
			tc.kill(c)
			tr.goesOn()
			c.awaitWhole()
			tr.goesOn()

			// Who lived on is known as before, and what is new can be reached.
			after := c.Pods()
			for name := range before {
				if strings.HasPrefix(name, n3.Name+"/") {
					delete(before, name) // a node that lost its power has other pods now
				}
			}
			for name := range after {
				if _, ok := before[name]; !ok {
					delete(after, name)
				}
			}
			if diff := cmp.Diff(before, after); diff != "" {
				t.Errorf("endpoints before and after (-before +after):\n%s", diff)
			}
			var fresh strings.Builder
			for _, n := range c.Lab.Nodes {
				fresh.WriteString(idle("new-"+n.Name, n.Name, ""))
			}
			c.apply(ns, fresh.String())
			pods := c.awaitPods(ns, 3+len(c.Lab.Nodes), 2*time.Minute)
			for _, p := range pods {
				if strings.HasPrefix(p.Metadata.Name, "new-") {
					at := netip.AddrPortFrom(p.ip(), heldPort)
					lab.Hold(t, "VM to "+p.Metadata.Name, c.outsideNetns("vm-1"), at, lab.Listen(t, c.netns(p), at))
				}
			}
			tr.stop()
		})
	}
}
