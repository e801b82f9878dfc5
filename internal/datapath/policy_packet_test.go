package datapath

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/policy"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// cluster are pods a, b and c of one node and subnet, with labels of their names.
type cluster struct {
	*world
	d     *Datapath
	pods  map[string]pod
	input policy.Input
}

func newCluster(t testing.TB) *cluster {
	w := newWorld(t)
	c := &cluster{world: w, d: w.open(Options{}), pods: map[string]pod{}}
	for i, name := range []string{"a", "b", "c"} {
		p := w.addPod(c.d, 1+i)
		c.pods[name] = p
		c.input.Pods = append(c.input.Pods, policy.Pod{Namespace: "default", Name: name, Labels: map[string]string{"app": name}, Addrs: []netip.Addr{p.Addr}})
	}
	c.input.Namespaces = map[string]map[string]string{"default": {}}
	return c
}

// apply puts what the input says of b in force.
func (c *cluster) apply(groups vpc.GroupSet) {
	c.t.Helper()
	tables, err := policy.NewCompiler(&c.input).Compile(&policy.Endpoint{Pod: c.input.Pods[1], Groups: groups})
	if err != nil {
		c.t.Fatal(err)
	}
	if err := c.d.SetPolicy(c.pods["b"].Endpoint, tables); err != nil {
		c.t.Fatal(err)
	}
}

// from is a policy of b that lets in what has the label, on the ports.
func from(app string, ports ...policy.Port) policy.NetworkPolicy {
	only := func(app string) policy.Selector {
		return policy.Selector{MatchLabels: map[string]string{"app": app}}
	}
	peer := only(app)
	return policy.NetworkPolicy{
		Namespace: "default", Name: "from-" + app, PodSelector: only("b"),
		Ingress: []policy.PolicyRule{{Peers: []policy.Peer{{PodSelector: &peer}}, Ports: ports}},
	}
}

// answers says whether the echo at the other end answers, for as long as want
// is worth to wait.
func answers(c net.Conn, want bool) bool {
	tries := 2
	if want {
		tries = 50
	}
	buf := make([]byte, 64)
	for range tries {
		_, _ = c.Write([]byte("hello"))
		_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if _, err := c.Read(buf); err == nil {
			return true
		}
	}
	return false
}

func (w *world) connected(netns string, to netip.Addr) net.Conn {
	w.t.Helper()
	var c net.Conn
	err := nl.Do(nl.Path(netns), func() (err error) {
		c, err = net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, echoPort)))
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = c.Close() })
	return c
}

// NetworkPolicy on a pod's packets: who is let in, and that it holds for flows that
// are under way as well. The node reaches its pods whatever it says.
func TestNetworkPolicyOnPackets(t *testing.T) {
	c := newCluster(t)
	b := c.pods["b"]
	c.echo(b.ns, b.Addr)
	fromA, fromC, fromNode := c.connected(c.pods["a"].ns, b.Addr), c.connected(c.pods["c"].ns, b.Addr), c.connected(c.node, b.Addr)

	c.input.Policies = []policy.NetworkPolicy{from("a", policy.Port{Protocol: policy.UDP, Port: echoPort})}
	c.apply("")
	if !answers(fromA, true) || !answers(fromNode, true) {
		t.Error("who may does not reach the pod")
	}
	before := counters(t, c.d)["policy_netpol"]
	if answers(fromC, false) {
		t.Error("who may not reaches the pod")
	}
	if after := counters(t, c.d)["policy_netpol"]; after == before {
		t.Error("nothing was counted as refused by NetworkPolicy")
	}

	c.input.Policies = []policy.NetworkPolicy{from("c")}
	c.apply("")
	if answers(fromA, false) {
		t.Error("a flow under way outlives the policy that allowed it")
	}
	if !answers(fromC, true) {
		t.Error("a flow that was refused is not judged again")
	}
	if !answers(fromNode, true) {
		t.Error("a flow of the node's own under way ends with a change of policy")
	}

	c.input.Policies[0].Audit = true
	c.apply("")
	if !answers(fromA, true) {
		t.Error("a policy in audit mode denies")
	}
	c.input.Policies = nil
	c.apply("")
	if !answers(fromA, true) || !answers(fromC, true) {
		t.Error("without a policy the pod is isolated")
	}
}

// The first policy that there ever is on a node ends flows as any other does.
func TestTheFirstPolicyEndsFlows(t *testing.T) {
	c := newCluster(t)
	b := c.pods["b"]
	c.echo(b.ns, b.Addr)
	fromA := c.connected(c.pods["a"].ns, b.Addr)
	if !answers(fromA, true) {
		t.Fatal("without a policy the pod is not reached")
	}
	c.input.Policies = []policy.NetworkPolicy{from("c")}
	c.apply("")
	if answers(fromA, false) {
		t.Error("a flow under way outlives the first policy")
	}
}

// What the pod sends in a flow that the node began passes after a change of
// policy, also if the pod is the first to send.
func TestTheNodesFlowsOutliveAChange(t *testing.T) {
	c := newCluster(t)
	b := c.pods["b"]
	c.input.Policies = []policy.NetworkPolicy{from("a")}
	c.apply("")
	server, client := c.udp(b.ns, b.Addr, echoPort), c.connected(c.node, b.Addr)
	buf := make([]byte, 64)
	if _, err := client.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	_ = server.SetReadDeadline(time.Now().Add(5 * time.Second))
	_, node, err := server.ReadFromUDPAddrPort(buf)
	if err != nil {
		t.Fatal(err)
	}
	c.input.Policies = []policy.NetworkPolicy{from("c")}
	c.apply("")
	if _, err := server.WriteToUDPAddrPort([]byte("news"), node); err != nil {
		t.Fatal(err)
	}
	_ = client.SetReadDeadline(time.Now().Add(2 * time.Second))
	if _, err := client.Read(buf); err != nil {
		t.Errorf("the pod's packet does not reach the node: %v; dropped: %v", err, counters(t, c.d))
	}
}

// Security groups between pods of one node and subnet, which the VPC never sees.
func TestSecurityGroupsOnPackets(t *testing.T) {
	c := newCluster(t)
	b := c.pods["b"]
	c.echo(b.ns, b.Addr)
	c.input.Groups = map[vpc.SecurityGroupID]policy.SecurityGroup{webGroup: {
		Ingress: []policy.GroupRule{
			{ID: "sgr-1", Protocol: int(policy.UDP), FromPort: echoPort, ToPort: echoPort, Group: peerGroup},
			{ID: "sgr-2", Protocol: int(policy.ICMP), FromPort: 8, ToPort: policy.AnyPort, Group: peerGroup},
		},
	}}
	c.input.Members = map[vpc.SecurityGroupID][]netip.Prefix{peerGroup: {netip.PrefixFrom(c.pods["a"].Addr, 32)}}
	c.apply(vpc.GroupSet(webGroup))
	fromA, fromC := c.connected(c.pods["a"].ns, b.Addr), c.connected(c.pods["c"].ns, b.Addr)
	if !answers(fromA, true) || !c.ping(c.pods["a"].ns, c.pods["a"].Addr, b.Addr) {
		t.Error("a member does not reach the pod")
	}
	if answers(fromC, false) {
		t.Error("who is no member reaches the pod")
	}
	if counters(t, c.d)["policy_groups"] == 0 {
		t.Error("nothing was counted as refused by security groups")
	}
	// No rule lets b begin anything.
	c.echo(c.pods["a"].ns, c.pods["a"].Addr)
	if answers(c.connected(b.ns, c.pods["a"].Addr), false) {
		t.Error("the pod reaches what no rule for egress names")
	}
	// A tracked flow goes on when its rule goes; a new one does not begin.
	c.input.Members = nil
	c.apply(vpc.GroupSet(webGroup))
	if !answers(fromA, true) {
		t.Error("a tracked flow ends with its rule")
	}
	if answers(c.connected(c.pods["a"].ns, b.Addr), false) {
		t.Error("a flow begins after its rule is gone")
	}
}

// SCTP, which this kernel need not have: its packets are made here.
func TestPolicyOnSCTP(t *testing.T) {
	c := newCluster(t)
	a, b := c.pods["a"], c.pods["b"]
	c.input.Policies = []policy.NetworkPolicy{from("a", policy.Port{Protocol: policy.SCTP, Port: 7, End: 9})}
	c.apply("")
	open := func(p pod) *net.IPConn {
		t.Helper()
		var conn *net.IPConn
		err := nl.Do(nl.Path(p.ns), func() (err error) {
			conn, err = net.ListenIP(fmt.Sprintf("ip4:%d", policy.SCTP), &net.IPAddr{IP: p.Addr.AsSlice()})
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	sender, receiver := open(a), open(b)
	// init is the common header and an INIT chunk (RFC 9260, sections 3.1 and 3.3.2);
	// nobody checks its checksum on the way.
	init := func(port uint16) []byte {
		m := make([]byte, 32)
		binary.BigEndian.PutUint16(m, 5000)
		binary.BigEndian.PutUint16(m[2:], port)
		m[12] = 1
		binary.BigEndian.PutUint16(m[14:], 20)
		return m
	}
	arrives := func(port uint16, want bool) bool {
		t.Helper()
		tries := 2
		if want {
			tries = 50
		}
		buf := make([]byte, 1500)
		for range tries {
			if _, err := sender.WriteToIP(init(port), &net.IPAddr{IP: b.Addr.AsSlice()}); err != nil {
				t.Fatal(err)
			}
			for {
				_ = receiver.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
				n, _, err := receiver.ReadFromIP(buf)
				if err != nil {
					break
				}
				if n >= 4 && binary.BigEndian.Uint16(buf[2:]) == port {
					return true
				}
			}
		}
		return false
	}
	for port, want := range map[uint16]bool{6: false, 7: true, 9: true, 10: false} {
		if got := arrives(port, want); got != want {
			t.Errorf("SCTP to port %d arrives: %v, want %v", port, got, want)
		}
	}
}
