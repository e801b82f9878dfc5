package datapath

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/policy"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// isolates is a policy of b that isolates it in one direction, and allows the
// peer's network TCP to port 80 in the other, if that is valid.
func isolates(direction policy.Direction, other netip.Prefix) policy.NetworkPolicy {
	p := policy.NetworkPolicy{
		Namespace: "default", Name: "isolates", PodSelector: policy.Selector{MatchLabels: map[string]string{"app": "b"}},
		Types: []policy.Direction{direction},
	}
	if other.IsValid() {
		rule := policy.PolicyRule{Peers: []policy.Peer{{Block: &policy.Block{CIDR: other}}}, Ports: []policy.Port{{Protocol: policy.TCP, Port: 80}}}
		p.Types = []policy.Direction{policy.Egress, policy.Ingress}
		if direction == policy.Egress {
			p.Ingress = []policy.PolicyRule{rule}
		} else {
			p.Egress = []policy.PolicyRule{rule}
		}
	}
	return p
}

// ackFrame is a bare acknowledgement that carries the marker.
func ackFrame(src, dst net.HardwareAddr, from, to netip.AddrPort) []byte {
	header := make([]byte, 20, 20+len(marker))
	binary.BigEndian.PutUint16(header, from.Port())
	binary.BigEndian.PutUint16(header[2:], to.Port())
	header[12], header[13] = 5<<4, 0x10
	return packet.Frame(packet.MAC(src), packet.MAC(dst), packet.EtherTypeIPv4,
		packet.IPv4(from.Addr(), to.Addr(), unix.IPPROTO_TCP, append(header, marker...)))
}

// answerFrame is the answer to an echo that nobody asked for.
func answerFrame(src, dst net.HardwareAddr, from, to netip.Addr) []byte {
	ip := packet.Echo4(from, to, 7, 1, []byte(marker))
	ip[20] = 0
	return packet.Frame(packet.MAC(src), packet.MAC(dst), packet.EtherTypeIPv4, ip)
}

// track has the kernel's conntrack see what the node's stack forwards, as it does
// wherever somebody translates: a chain without a rule does not do it.
func (w *world) track() {
	w.run("ip", "netns", "exec", w.node, "nft", "table ip others { chain c { type nat hook postrouting priority 100; ip daddr 192.0.2.1 masquerade; }; }")
}

// What one direction's policy forbids does not pass as the middle of what the
// other direction might have begun: not while no rule says that it may, and
// neither with nor without the kernel's conntrack, which takes up connections in
// their middle itself.
func TestMidflowIsNoWayRoundPolicy(t *testing.T) {
	for _, tracked := range []bool{false, true} {
		c := newCluster(t)
		if tracked {
			c.track()
		}
		a, b := c.pods["a"], c.pods["b"]
		fromB, fromA, wire := c.rawSocket(b.ns, "eth0"), c.rawSocket(a.ns, "eth0"), c.rawSocket(c.wire, "r1")
		eni := enis[1].MAC
		router := mac("02:00:00:00:01:01")
		at := func(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }
		all := []policy.GroupRule{{ID: "sgr-all", Protocol: policy.AnyProtocol, CIDR: netip.MustParsePrefix("0.0.0.0/0")}}
		groups := map[vpc.SecurityGroupID]policy.SecurityGroup{webGroup: {Ingress: all, Egress: all}, peerGroup: {}}
		for _, tt := range []struct {
			name     string
			policies []policy.NetworkPolicy
			groups   vpc.GroupSet
			reason   string
			from     int
			to       map[string]int
			frames   [][]byte
		}{
			{"egress", []policy.NetworkPolicy{isolates(policy.Egress, netip.Prefix{})}, "", "policy_netpol", fromB, map[string]int{"the wire": wire, "a neighbour": fromA}, [][]byte{
				ackFrame(b.MAC, hostMAC, at(b.Addr, 5000), at(farIP, 81)), ackFrame(b.MAC, hostMAC, at(b.Addr, 5000), at(a.Addr, 81)),
				answerFrame(b.MAC, hostMAC, b.Addr, farIP), answerFrame(b.MAC, hostMAC, b.Addr, a.Addr),
			}},
			{"ingress", []policy.NetworkPolicy{isolates(policy.Ingress, netip.Prefix{})}, "", "policy_netpol", wire, map[string]int{"the pod": fromB}, [][]byte{
				ackFrame(router, eni, at(farIP, 5001), at(b.Addr, 81)), answerFrame(router, eni, farIP, b.Addr),
			}},
			{"ingress, from a neighbour", []policy.NetworkPolicy{isolates(policy.Ingress, netip.Prefix{})}, "", "policy_netpol", fromA, map[string]int{"the pod": fromB}, [][]byte{
				ackFrame(a.MAC, hostMAC, at(a.Addr, 5002), at(b.Addr, 81)),
			}},
			{"ingress, although a rule allows other ports out", []policy.NetworkPolicy{isolates(policy.Ingress, netip.MustParsePrefix("0.0.0.0/0"))}, "", "policy_netpol", wire, map[string]int{"the pod": fromB}, [][]byte{
				ackFrame(router, eni, at(farIP, 5003), at(b.Addr, 81)),
			}},
			{"a gate is not vouched for by the other", []policy.NetworkPolicy{isolates(policy.Ingress, netip.Prefix{})}, vpc.GroupSet(webGroup), "policy_netpol", fromA, map[string]int{"the pod": fromB}, [][]byte{
				ackFrame(a.MAC, hostMAC, at(a.Addr, 5004), at(b.Addr, 81)),
			}},
			{"groups", nil, vpc.GroupSet(peerGroup), "policy_groups", fromA, map[string]int{"the pod": fromB}, [][]byte{
				ackFrame(a.MAC, hostMAC, at(a.Addr, 5005), at(b.Addr, 81)),
			}},
		} {
			c.input.Policies, c.input.Groups = tt.policies, groups
			c.apply(tt.groups)
			c.d.forgetConns(t)
			for _, fd := range tt.to {
				received(t, fd)
			}
			before := counters(t, c.d)[tt.reason]
			const rounds = 3
			for range rounds {
				for _, f := range tt.frames {
					sendRaw(t, tt.from, f)
				}
			}
			eventually(t, tt.name+": all are counted as refused", func() bool {
				return counters(t, c.d)[tt.reason] >= before+uint64(rounds*len(tt.frames))
			})
			for name, fd := range tt.to {
				for _, f := range received(t, fd) {
					if containsAny(string(f), marker) {
						t.Errorf("tracked %v, %s: passed to %s: % x", tracked, tt.name, name, f)
					}
				}
			}
		}
	}
}

// A connection whose entry was lost goes on if a rule allows it the other way
// round, if the kernel saw who began it, or when who began it sends.
func TestMidflowIsTakenUp(t *testing.T) {
	everybody := netip.MustParsePrefix("0.0.0.0/0")
	for _, tt := range []struct {
		name     string
		direct   bool
		policy   policy.NetworkPolicy
		podBegan bool
		podFirst bool // who sends first when the entry is lost
		heals    bool // only after the other end has sent
	}{
		{"the kernel knows what came in", false, isolates(policy.Egress, netip.Prefix{}), false, true, false},
		{"the kernel knows what went out", false, isolates(policy.Ingress, netip.Prefix{}), true, false, false},
		{"a rule lets in", true, isolates(policy.Egress, everybody), false, true, false},
		{"a rule lets out", true, isolates(policy.Ingress, everybody), true, false, false},
		{"who began it sends, from the pod", true, isolates(policy.Ingress, netip.Prefix{}), true, true, false},
		{"who began it sends, to the pod", true, isolates(policy.Egress, netip.Prefix{}), false, false, false},
		{"refused until who began it sends, from the pod", true, isolates(policy.Ingress, netip.Prefix{}), true, false, true},
		{"refused until who began it sends, to the pod", true, isolates(policy.Egress, netip.Prefix{}), false, true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newCluster(t)
			b := c.pods["b"]
			if !tt.direct {
				c.track()
				c.d.eniMu.Lock()
				err := c.d.setNets(nil, nil)
				c.d.eniMu.Unlock()
				if err != nil {
					t.Fatal(err)
				}
			}
			c.input.Policies = []policy.NetworkPolicy{tt.policy}
			c.apply("")
			accepted := make(chan net.Conn, 1)
			held := func(conn net.Conn) { accepted <- conn; <-t.Context().Done() }
			var pod, far net.Conn
			var err error
			if tt.podBegan {
				c.accept(c.wire, netip.AddrPortFrom(farIP, 80), held)
				pod, err = c.dial(b.ns, b.Addr, netip.AddrPortFrom(farIP, 80))
			} else {
				c.accept(b.ns, netip.AddrPortFrom(b.Addr, 80), held)
				far, err = c.dial(c.wire, farIP, netip.AddrPortFrom(b.Addr, 80))
			}
			if err != nil {
				t.Fatal(err)
			}
			if tt.podBegan {
				far = <-accepted
			} else {
				pod = <-accepted
			}
			carry := func(from, to net.Conn, patience time.Duration) error {
				if _, err := from.Write([]byte("hello")); err != nil {
					return err
				}
				_ = to.SetReadDeadline(time.Now().Add(patience))
				_, err := to.Read(make([]byte, 64))
				return err
			}
			if err := carry(pod, far, 5*time.Second); err != nil {
				t.Fatal(err)
			}
			c.d.forgetConns(t)
			first, second := pod, far
			if !tt.podFirst {
				first, second = far, pod
			}
			if tt.heals {
				before := counters(t, c.d)["policy_netpol"]
				if _, err := first.Write([]byte("news")); err != nil {
					t.Fatal(err)
				}
				eventually(t, "refused", func() bool { return counters(t, c.d)["policy_netpol"] > before })
				first, second = second, first
			}
			if err := carry(first, second, 10*time.Second); err != nil {
				t.Errorf("the connection is cut: %v; dropped %v", err, counters(t, c.d))
			}
			if err := carry(second, first, 10*time.Second); err != nil {
				t.Errorf("its answer is lost: %v; dropped %v", err, counters(t, c.d))
			}
			got := connections(t, c.d, b.Addr, farIP)
			if len(got) != 1 || got[0].Denied || got[0].Opener.Addr != map[bool]netip.Addr{true: b.Addr, false: farIP}[tt.podBegan] {
				t.Errorf("%+v", got)
			}
		})
	}
}

// A connection that policy ends is not taken up again as what the other end,
// which goes on sending, might have begun.
func TestMidflowDoesNotOutliveRevocation(t *testing.T) {
	c := newCluster(t)
	b := c.pods["b"]
	accepted := make(chan net.Conn, 1)
	c.accept(c.wire, netip.AddrPortFrom(farIP, 80), func(conn net.Conn) { accepted <- conn; <-t.Context().Done() })
	pod, err := c.dial(b.ns, b.Addr, netip.AddrPortFrom(farIP, 80))
	if err != nil {
		t.Fatal(err)
	}
	far := <-accepted
	c.input.Policies = []policy.NetworkPolicy{isolates(policy.Egress, netip.Prefix{})}
	c.apply("")
	for i, from := range []net.Conn{pod, far, pod, far} {
		before := counters(t, c.d)["policy_netpol"]
		if _, err := from.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		eventually(t, "refused", func() bool { return counters(t, c.d)["policy_netpol"] > before })
		if got := connections(t, c.d, b.Addr, farIP); len(got) != 1 || !got[0].Denied || got[0].Opener.Addr != b.Addr {
			t.Errorf("%d: %+v", i, got)
		}
	}
}
