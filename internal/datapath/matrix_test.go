package datapath

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/policy"
	"github.com/underlay-cni/underlay/internal/testenv"
)

// way is how pods' packets may go through a node. What netfilter does for
// others must come out the same.
type way struct {
	name    string
	direct  bool // packets within the VPC pass by the stack
	options func(*Options)
}

var ways = []way{{name: "stack", options: func(*Options) {}}, {name: "direct", direct: true, options: func(o *Options) { o.Direct = true }}}

// Of the matrix: what listens where.
const (
	webPort  = 8080 // TCP, on pods, client and inet
	nodePort = 9090 // TCP, of the nodes themselves
	dnsPort  = 5353 // UDP, on pods
)

func vip(last int) netip.Addr { return netip.AddrFrom4([4]byte{172, 20, 0, byte(last)}) }

// matrix is a fleet with Services.
type matrix struct {
	*fleet
	way      way
	services map[string]service
}

func newMatrix(t *testing.T, w way, p proxy) *matrix {
	t.Helper()
	opts := Options{SNAT: SNATByENI}
	w.options(&opts)
	m := &matrix{fleet: newFleet(t, opts), way: w, services: map[string]service{}}
	var all []service
	for i, backend := range []struct {
		name string
		pod  pod
	}{{"NEAR0", m.near0}, {"NEAR1", m.near1}, {"FAR0", m.far0}, {"FAR1", m.far1}} {
		for _, s := range []service{
			{backend.name, "tcp", netip.AddrPortFrom(vip(i+1), 80), 30001 + i, netip.AddrPortFrom(backend.pod.Addr, webPort)},
			{backend.name + "-DNS", "udp", netip.AddrPortFrom(vip(i+11), 53), 30011 + i, netip.AddrPortFrom(backend.pod.Addr, dnsPort)},
		} {
			all = append(all, s)
			m.services[s.name] = s
		}
		m.serve(backend.pod.ns, netip.AddrPortFrom(backend.pod.Addr, webPort))
		m.serveUDP(backend.pod.ns, netip.AddrPortFrom(backend.pod.Addr, dnsPort))
	}
	for i, node := range []*world{m.world, m.far} {
		enis := fleetENIs(10 * i)
		p.set(m.fleet, node.node, []netip.Addr{enis[0].Primary, enis[1].Primary}, all)
		m.serve(node.node, netip.AddrPortFrom(netip.IPv4Unspecified(), nodePort))
	}
	m.serve(m.client, netip.AddrPortFrom(clientIP, webPort))
	m.serve(m.inet, netip.AddrPortFrom(netip.IPv4Unspecified(), webPort))
	// As kube-proxy's chains came after us.
	m.setENIs()
	return m
}

// setENIs is what the agent does when it has heard of a change, and every 30 s.
func (m *matrix) setENIs() {
	m.t.Helper()
	for i, d := range []*Datapath{m.d, m.farD} {
		if err := d.SetENIs(context.Background(), fleetENIs(10*i)); err != nil {
			m.t.Fatal(err)
		}
	}
}

// reach is one conversation and what its server is to see.
type reach struct {
	what    string
	from    string // namespace
	network string // "": tcp4
	to      netip.AddrPort
	seen    netip.Addr
}

func (m *matrix) check(t *testing.T, cases ...reach) {
	t.Helper()
	for _, c := range cases {
		t.Run(c.what, func(t *testing.T) {
			if c.network == "" {
				c.network = "tcp4"
			}
			conv, err := m.talk(c.from, c.network, netip.AddrPort{}, c.to, patience)
			if err == nil {
				defer conv.Close()
				err = conv.goOn(100_000)
			}
			if err != nil {
				t.Errorf("%v; the router refused %q", err, m.refused())
				return
			}
			if conv.seen.Addr() != c.seen {
				t.Errorf("seen as %s, want %s", conv.seen.Addr(), c.seen)
			}
			if refused := m.refused(); refused != nil {
				t.Errorf("works, and yet the router refused %q", refused)
			}
		})
	}
}

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// TestMatrix has real netfilter rules and real packets side by side: who may
// reach whom by which address, and under which address it is seen.
func TestMatrix(t *testing.T) {
	testenv.Require(t, "portmap") // for it and for iptables
	eachWay(t, func(t *testing.T, w way, p proxy) {
		m := newMatrix(t, w, p)
		node := []netip.Addr{fleetENIs(0)[0].Primary, fleetENIs(0)[1].Primary}
		far := fleetENIs(10)[0].Primary
		svc := func(name string) netip.AddrPort { return m.services[name].vip }

		t.Run("direct", func(t *testing.T) {
			m.check(t,
				reach{"pod to pod of the node, other ENI", m.near0.ns, "", at(m.near1.Addr, webPort), m.near0.Addr},
				reach{"pod to pod of another node", m.near0.ns, "", at(m.far0.Addr, webPort), m.near0.Addr},
				reach{"pod to pod of another node, secondary ENIs", m.near1.ns, "", at(m.far1.Addr, webPort), m.near1.Addr},
				reach{"the same over UDP", m.near1.ns, "udp4", at(m.far1.Addr, dnsPort), m.near1.Addr},
				reach{"pod to itself", m.near0.ns, "", at(m.near0.Addr, webPort), m.near0.Addr},
				reach{"pod to own node", m.near0.ns, "", at(node[0], nodePort), m.near0.Addr},
				reach{"pod of a secondary ENI to own node", m.near1.ns, "", at(node[0], nodePort), m.near1.Addr},
				reach{"pod to own node by the secondary ENI's address", m.near0.ns, "", at(node[1], nodePort), m.near0.Addr},
				reach{"pod to another node", m.near1.ns, "", at(far, nodePort), m.near1.Addr},
				reach{"node to own pod", m.node, "", at(m.near0.Addr, webPort), node[0]},
				reach{"node to own pod of a secondary ENI", m.node, "", at(m.near1.Addr, webPort), node[0]},
				reach{"node to pod of another node", m.node, "", at(m.far1.Addr, webPort), node[0]},
				reach{"client to pod", m.client, "", at(m.near0.Addr, webPort), clientIP},
				reach{"client to pod of a secondary ENI", m.client, "", at(m.near1.Addr, webPort), clientIP},
				reach{"pod of a secondary ENI to client", m.near1.ns, "", at(clientIP, webPort), m.near1.Addr},
			)
			for _, p := range []pod{m.near0, m.near1} {
				if !m.ping(p.ns, p.Addr, m.far1.Addr) {
					t.Errorf("%s does not reach %s by ICMP", p.Addr, m.far1.Addr)
				}
			}
		})
		t.Run("ClusterIP", func(t *testing.T) {
			m.check(t,
				reach{"local backend", m.near0.ns, "", svc("NEAR1"), m.near0.Addr},
				reach{"local backend on the primary ENI", m.near1.ns, "", svc("NEAR0"), m.near1.Addr},
				reach{"remote backend", m.near0.ns, "", svc("FAR1"), m.near0.Addr},
				reach{"remote backend from a secondary ENI", m.near1.ns, "", svc("FAR0"), m.near1.Addr},
				reach{"hairpin", m.near0.ns, "", svc("NEAR0"), node[0]},
				reach{"hairpin on a secondary ENI", m.near1.ns, "", svc("NEAR1"), node[0]},
				reach{"from the node to a local backend", m.node, "", svc("NEAR1"), node[0]},
				reach{"from the node to a remote backend", m.node, "", svc("FAR1"), node[0]},
			)
		})
		t.Run("DNS", func(t *testing.T) {
			m.check(t,
				reach{"local backend", m.near0.ns, "udp4", svc("NEAR1-DNS"), m.near0.Addr},
				reach{"remote backend", m.near0.ns, "udp4", svc("FAR1-DNS"), m.near0.Addr},
				reach{"remote backend from a secondary ENI", m.near1.ns, "udp4", svc("FAR0-DNS"), m.near1.Addr},
				reach{"hairpin", m.near1.ns, "udp4", svc("NEAR1-DNS"), node[0]},
				reach{"from the node", m.node, "udp4", svc("FAR1-DNS"), node[0]},
			)
			// One socket asks two servers by two addresses, as a resolver does
			// with its list: each answer has the address that was asked.
			c := m.udp(m.near1.ns, m.near1.Addr, 0)
			for _, to := range []netip.AddrPort{svc("NEAR0-DNS"), svc("FAR0-DNS"), at(m.far1.Addr, dnsPort), svc("NEAR0-DNS"), svc("FAR0-DNS")} {
				buf := make([]byte, 64)
				_, _ = c.WriteToUDPAddrPort([]byte("who am I?"), to)
				_ = c.SetReadDeadline(time.Now().Add(patience))
				if _, from, err := c.ReadFromUDPAddrPort(buf); err != nil || from != to {
					t.Errorf("asked %s: answer from %s, %v", to, from, err)
				}
			}
		})
		t.Run("NodePort", func(t *testing.T) {
			var cases []reach
			for i, ip := range node {
				by := []string{"primary", "secondary"}[i]
				cases = append(cases,
					reach{by + " address, backend on the primary ENI", m.client, "", at(ip, 30001), node[0]},
					reach{by + " address, backend on the secondary ENI", m.client, "", at(ip, 30002), node[0]},
					reach{by + " address, remote backend", m.client, "", at(ip, 30003), node[0]},
					reach{by + " address, remote backend on its secondary ENI", m.client, "", at(ip, 30004), node[0]},
					reach{by + " address, over UDP", m.client, "udp4", at(ip, 30012), node[0]},
					reach{by + " address, over UDP, remote backend", m.client, "udp4", at(ip, 30014), node[0]},
					reach{by + " address, from a pod of the node", m.near0.ns, "", at(ip, 30002), node[0]},
					reach{by + " address, from a pod of the node, remote backend", m.near0.ns, "", at(ip, 30003), node[0]},
					reach{by + " address, from a pod of a secondary ENI, remote backend", m.near1.ns, "", at(ip, 30003), node[1]},
					reach{by + " address, from the backend itself", m.near1.ns, "", at(ip, 30002), node[0]},
					reach{by + " address, from a pod of another node", m.far1.ns, "", at(ip, 30002), node[0]},
					reach{by + " address, from a pod of another node that is the backend", m.far1.ns, "", at(ip, 30004), node[0]},
				)
			}
			m.check(t, cases...)
		})
		t.Run("portmap", func(t *testing.T) {
			m.portmap(t, m.near0, 18080)
			m.portmap(t, m.near1, 18081)
			m.setENIs()
			m.check(t,
				reach{"client, pod on the primary ENI", m.client, "", at(node[0], 18080), clientIP},
				reach{"client, pod on the secondary ENI", m.client, "", at(node[0], 18081), clientIP},
				reach{"client by the secondary address", m.client, "", at(node[1], 18081), clientIP},
				reach{"client by the secondary address, pod on the primary ENI", m.client, "", at(node[1], 18080), clientIP},
				reach{"pod of the node", m.near0.ns, "", at(node[0], 18081), m.near0.Addr},
				reach{"pod of another node", m.far1.ns, "", at(node[0], 18081), m.far1.Addr},
				reach{"the pod itself", m.near1.ns, "", at(node[0], 18081), node[0]},
				reach{"the node", m.node, "", at(node[0], 18080), node[0]},
			)
		})
		t.Run("outside", func(t *testing.T) {
			m.check(t,
				reach{"pod to the internet", m.near0.ns, "", at(inetIP, webPort), node[0]},
				reach{"pod of a secondary ENI to the internet", m.near1.ns, "", at(inetIP, webPort), node[1]},
				reach{"node to the internet", m.node, "", at(inetIP, webPort), node[0]},
				reach{"pod to a private range", m.near1.ns, "", at(privateIP, webPort), m.near1.Addr},
				reach{"pod to a shared range", m.near1.ns, "", at(sharedIP, webPort), m.near1.Addr},
			)
			m.liveCIDR(t)
		})
		t.Run("one tuple twice", func(t *testing.T) { m.collide(t) })
		t.Run("path MTU", func(t *testing.T) { m.pathMTUs(t) })
		t.Run("TTL", func(t *testing.T) { m.ttls(t) })
		t.Run("rp_filter", func(t *testing.T) {
			for _, v := range []string{"1", "2", "0"} {
				for _, n := range []string{m.node, m.far.node} {
					for _, conf := range []string{"all", "default"} {
						m.run("ip", "netns", "exec", n, "sysctl", "-qw", "net.ipv4.conf."+conf+".rp_filter="+v)
					}
				}
				later := m.pod(m.d, 1, 140+int(v[0]-'0'), 0) // with the default as it is now
				m.serve(later.ns, at(later.Addr, webPort))
				m.check(t,
					reach{v + ", pod to pod on secondary ENIs", m.near1.ns, "", at(m.far1.Addr, webPort), m.near1.Addr},
					reach{v + ", of a later pod", later.ns, "", at(m.far1.Addr, webPort), later.Addr},
					reach{v + ", to a later pod", m.client, "", at(later.Addr, webPort), clientIP},
					reach{v + ", ClusterIP from a secondary ENI", m.near1.ns, "", svc("FAR1"), m.near1.Addr},
					reach{v + ", hairpin", m.near1.ns, "", svc("NEAR1"), node[0]},
					reach{v + ", NodePort by the secondary address", m.client, "", at(node[1], 30002), node[0]},
				)
			}
		})
		t.Run("NetworkPolicy", func(t *testing.T) { m.policies(t) })
		t.Run("forward policy drop", func(t *testing.T) { m.forwardDrop(t) })
	})
}

// liveCIDR adds a range to the VPC while pods speak to it.
func (m *matrix) liveCIDR(t *testing.T) {
	set := func(cidrs ...netip.Prefix) {
		t.Helper()
		for _, d := range []*Datapath{m.d, m.farD} {
			if err := d.SetVPC(ctx, cidrs); err != nil {
				t.Fatal(err)
			}
		}
	}
	begun := reach{"before it is of the VPC", m.near1.ns, "", at(laterIP, webPort), fleetENIs(0)[1].Primary}
	m.check(t, begun)
	c, err := m.talk(m.near1.ns, "tcp4", netip.AddrPort{}, begun.to, patience)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	set(fleetVPC, laterVPC)
	m.check(t, reach{"when it is", m.near1.ns, "", begun.to, m.near1.Addr})
	if err := c.goOn(100_000); err != nil {
		t.Errorf("a connection from before: %v", err)
	}
	kept, err := m.talk(m.near1.ns, "tcp4", netip.AddrPort{}, begun.to, patience)
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	set(fleetVPC)
	begun.what = "when it no longer is"
	m.check(t, begun)
	for _, conv := range []*talk{c, kept} {
		if err := conv.goOn(100_000); err != nil {
			t.Errorf("a connection of %s from before: %v", conv.seen, err)
		}
	}
}

// portmap gives a port of node 0 to a pod, as the plugin does behind us.
func (m *matrix) portmap(t *testing.T, p pod, port int) {
	t.Helper()
	config, err := json.Marshal(map[string]any{
		"cniVersion": "1.0.0", "name": "matrix", "type": "portmap", "markMasqBit": 16,
		"capabilities":  map[string]bool{"portMappings": true},
		"runtimeConfig": map[string]any{"portMappings": []map[string]any{{"hostPort": port, "containerPort": webPort, "protocol": "tcp"}}},
		"prevResult": map[string]any{"cniVersion": "1.0.0", "interfaces": []map[string]any{{"name": p.IfName, "sandbox": p.Netns}},
			"ips": []map[string]any{{"interface": 0, "address": p.Addr.String() + "/32"}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(testenv.PluginDir, "portmap"))
	cmd.Env = []string{"CNI_COMMAND=ADD", "CNI_CONTAINERID=" + p.ContainerID, "CNI_NETNS=" + p.Netns, "CNI_IFNAME=" + p.IfName,
		"CNI_PATH=" + testenv.PluginDir, "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Stdin = bytes.NewReader(config)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := nl.Do(nl.Path(m.node), cmd.Start); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("portmap: %v\n%s", err, out.String())
	}
}

// collide has one port of a pod speak to one server twice, directly and through
// a Service: for both, the packets on the wire have the same addresses and
// ports. Who came first is never disturbed; the newcomer gets its own answers
// or none.
func (m *matrix) collide(t *testing.T) {
	port := uint16(40000)
	for _, network := range []string{"tcp4", "udp4"} {
		server, name := at(m.far1.Addr, webPort), "FAR1"
		if network == "udp4" {
			server, name = at(m.far1.Addr, dnsPort), "FAR1-DNS"
		}
		for _, order := range []struct {
			what          string
			first, second netip.AddrPort
		}{
			{"direct first", server, m.services[name].vip},
			{"Service first", m.services[name].vip, server},
		} {
			port++
			t.Run(network+", "+order.what, func(t *testing.T) {
				from := at(m.near1.Addr, port)
				first, err := m.talk(m.near1.ns, network, from, order.first, patience)
				if err != nil {
					t.Fatal(err)
				}
				defer first.Close()
				second, err := m.talk(m.near1.ns, network, from, order.second, impatience)
				switch {
				case err == nil:
					defer second.Close()
					if second.seen == first.seen {
						t.Errorf("the server sees both as %s", first.seen)
					}
					if err := second.goOn(1000); err != nil {
						t.Errorf("the newcomer: %v", err)
					}
				case !m.way.direct:
					t.Errorf("the newcomer: %v", err) // netfilter finds it another port
				}
				if err := first.goOn(1000); err != nil {
					t.Errorf("who came first: %v", err)
				}
			})
		}
	}
}

// pathMTUs has narrow places on the way: in the VPC, at the node's own ENI, and
// at a pod. Senders learn of them, and connections get through.
func (m *matrix) pathMTUs(t *testing.T) {
	bulk := func(t *testing.T, from string, to netip.AddrPort) {
		t.Helper()
		c, err := m.talk(from, "tcp4", netip.AddrPort{}, to, patience)
		if err == nil {
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(patience))
			for range 20 {
				if err = c.goOn(50_000); err != nil {
					break
				}
			}
		}
		if err != nil {
			t.Errorf("a megabyte to %s: %v", to, err)
		}
	}
	t.Run("in the VPC", func(t *testing.T) {
		// One way alone is narrow: what comes back fits.
		m.ip(m.wire, "link set c0 mtu 1400")
		m.ip(m.client, "link set eth0 mtu 1400")
		defer m.ip(m.wire, "link set c0 mtu 9001")
		defer m.ip(m.client, "link set eth0 mtu 9001")
		for _, p := range []pod{m.near0, m.near1} {
			if got := m.dgram(p.ns, at(clientIP, 7)).pathMTU(3000); got != 1400 {
				t.Errorf("%s learns a path MTU of %d", p.Addr, got)
			}
			bulk(t, p.ns, at(clientIP, webPort))
		}
		bulk(t, m.client, at(m.near1.Addr, webPort))
		bulk(t, m.client, at(fleetENIs(0)[0].Primary, 30002))
		bulk(t, m.client, at(fleetENIs(0)[0].Primary, 30003))
		bulk(t, m.client, at(fleetENIs(0)[1].Primary, 30003))
	})
	t.Run("at the ENI", func(t *testing.T) {
		m.ip(m.node, "link set eth1 mtu 1500")
		m.ip(m.wire, "link set r01 mtu 1500")
		defer m.ip(m.node, "link set eth1 mtu 9001")
		defer m.ip(m.wire, "link set r01 mtu 9001")
		if got := m.dgram(m.near1.ns, at(m.far1.Addr, dnsPort)).pathMTU(3000); got != 1500 {
			t.Errorf("%s learns a path MTU of %d", m.near1.Addr, got)
		}
		bulk(t, m.near1.ns, at(m.far1.Addr, webPort))
		bulk(t, m.near1.ns, m.services["FAR0"].vip)
	})
	t.Run("at the pod", func(t *testing.T) {
		small := m.pod(m.farD, 11, 150, 1500)
		m.serve(small.ns, at(small.Addr, webPort))
		for _, p := range []pod{m.near1, m.far1} { // over the wire, and on its node
			if got := m.dgram(p.ns, at(small.Addr, dnsPort)).pathMTU(3000); got != 1500 {
				t.Errorf("%s learns a path MTU of %d", p.Addr, got)
			}
			bulk(t, p.ns, at(small.Addr, webPort))
		}
	})
}

// ttls counts the routers: each node and the VPC's are one.
func (m *matrix) ttls(t *testing.T) {
	node, far := fleetENIs(0), fleetENIs(10)
	router := netip.AddrFrom4([4]byte{10, 0, 1, 1})
	d := m.dgram(m.near1.ns, at(m.far1.Addr, dnsPort))
	for ttl, want := range map[int][]netip.Addr{1: {node[0].Primary, node[1].Primary}, 2: {router}, 3: {far[0].Primary, far[1].Primary}} {
		got := d.expires(ttl)
		ok := false
		for _, w := range want {
			ok = ok || got == w
		}
		if !ok {
			t.Errorf("TTL %d expires at %s, want one of %s", ttl, got, want)
		}
	}
	neighbour := m.pod(m.farD, 11, 160, 0) // in far1's subnet
	for _, p := range []struct {
		from pod
		hops int
	}{{m.near1, 3}, {neighbour, 1}} {
		c := m.udp(m.far1.ns, m.far1.Addr, 0)
		pc := ipv4.NewPacketConn(c)
		if err := pc.SetControlMessage(ipv4.FlagTTL, true); err != nil {
			t.Fatal(err)
		}
		to, err := netip.ParseAddrPort(c.LocalAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		s := m.dgram(p.from.ns, to)
		s.set(unix.IP_TTL, 64)
		if _, err := s.Write([]byte("how far?")); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(patience))
		_, cm, _, err := pc.ReadFrom(make([]byte, 64))
		if err != nil || cm == nil || cm.TTL != 64-p.hops {
			t.Errorf("from %s: %+v, %v; want a TTL of %d", p.from.Addr, cm, err, 64-p.hops)
		}
	}
}

// policies has one pod that may only ask for names, and one that only that pod
// may reach: both are judged by who speaks and who is meant in the end, whatever
// address was asked.
func (m *matrix) policies(t *testing.T) {
	set := func(d *Datapath, p pod, policies ...policy.NetworkPolicy) {
		t.Helper()
		pod := policy.Pod{Namespace: "default", Name: p.PodName, Addrs: []netip.Addr{p.Addr}}
		tables, err := policy.NewCompiler(&policy.Input{Policies: policies, Pods: []policy.Pod{pod}}).Compile(&policy.Endpoint{Pod: pod})
		if err == nil {
			err = d.SetPolicy(p.Endpoint, tables)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	set(m.d, m.near1, policy.NetworkPolicy{Namespace: "default", Name: "names-only", Types: []policy.Direction{policy.Egress},
		Egress: []policy.PolicyRule{{Ports: []policy.Port{{Protocol: policy.UDP, Port: dnsPort}}}}})
	set(m.farD, m.far1, policy.NetworkPolicy{Namespace: "default", Name: "one-client", Types: []policy.Direction{policy.Ingress},
		Ingress: []policy.PolicyRule{{Peers: []policy.Peer{{Block: &policy.Block{CIDR: netip.PrefixFrom(m.near1.Addr, 32)}}}}}})
	defer func() {
		set(m.d, m.near1)
		set(m.farD, m.far1)
	}()
	node, far := fleetENIs(0), fleetENIs(10)
	m.check(t,
		reach{"DNS by ClusterIP, local backend", m.near1.ns, "udp4", m.services["NEAR0-DNS"].vip, m.near1.Addr},
		reach{"DNS by ClusterIP, remote backend", m.near1.ns, "udp4", m.services["FAR1-DNS"].vip, m.near1.Addr},
		reach{"DNS without a Service", m.near1.ns, "udp4", at(m.far1.Addr, dnsPort), m.near1.Addr},
		reach{"answers of who may not speak", m.client, "", at(m.near1.Addr, webPort), clientIP},
		reach{"answers through a NodePort", m.client, "", at(node[0].Primary, 30002), node[0].Primary},
		// "Traffic to and from the node where a Pod is running is always allowed"
		// (Kubernetes' documentation, Network Policies).
		reach{"a pod to its own node", m.near1.ns, "", at(node[0].Primary, nodePort), m.near1.Addr},
		reach{"the node to its own pod", m.far.node, "", at(m.far1.Addr, webPort), far[0].Primary},
	)
	type attempt struct {
		what, from, network string
		to                  netip.AddrPort
	}
	var all sync.WaitGroup
	for _, a := range []attempt{
		{"TCP of who may only ask for names", m.near1.ns, "tcp4", at(m.far1.Addr, webPort)},
		{"the same by ClusterIP", m.near1.ns, "tcp4", m.services["FAR1"].vip},
		{"the same by ClusterIP, local backend", m.near1.ns, "tcp4", m.services["NEAR0"].vip},
		{"the same to the internet", m.near1.ns, "tcp4", at(inetIP, webPort)},
		{"another pod", m.near0.ns, "tcp4", at(m.far1.Addr, webPort)},
		{"another pod by ClusterIP", m.near0.ns, "tcp4", m.services["FAR1"].vip},
		{"another pod's DNS by ClusterIP", m.near0.ns, "udp4", m.services["FAR1-DNS"].vip},
		{"a pod of its node", m.far0.ns, "tcp4", at(m.far1.Addr, webPort)},
		{"a client", m.client, "tcp4", at(m.far1.Addr, webPort)},
		{"a client behind another node's address", m.client, "tcp4", at(node[0].Primary, 30004)},
		{"a client behind its own node's address", m.client, "tcp4", at(far[0].Primary, 30004)},
	} {
		all.Go(func() {
			if c, err := m.talk(a.from, a.network, netip.AddrPort{}, a.to, impatience); err == nil {
				t.Errorf("%s: gets through to %s, seen as %s", a.what, a.to, c.seen)
			}
		})
	}
	all.Wait()
	m.refused()
}

// forwardDrop has somebody forbid forwarding, as Docker does. The datapath says
// so, with what to do about it, and touches nothing.
func (m *matrix) forwardDrop(t *testing.T) {
	iptables := func(args string) {
		t.Helper()
		m.run("ip", append([]string{"netns", "exec", m.node, "iptables"}, strings.Fields(args)...)...)
	}
	obstacle := func() string {
		t.Helper()
		o, err := m.d.Obstacle()
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	if o := obstacle(); o != "" {
		t.Errorf("nothing is in the way, and yet: %s", o)
	}
	iptables("-P FORWARD DROP")
	rules := m.run("ip", "netns", "exec", m.node, "iptables-save", "-t", "filter")
	if o := obstacle(); !strings.Contains(o, "FORWARD") || !strings.Contains(o, "iptables -I FORWARD") {
		t.Errorf("what is in the way is told as %q", o)
	}
	if after := m.run("ip", "netns", "exec", m.node, "iptables-save", "-t", "filter"); uncommented(after) != uncommented(rules) {
		t.Errorf("somebody else's table was\n%sand is\n%s", rules, after)
	}
	var both sync.WaitGroup
	both.Go(func() {
		_, err := m.talk(m.near1.ns, "tcp4", netip.AddrPort{}, at(m.far1.Addr, webPort), impatience)
		if m.way.direct != (err == nil) {
			t.Errorf("pod to pod of another node: %v", err)
		}
	})
	both.Go(func() {
		if _, err := m.talk(m.near1.ns, "tcp4", netip.AddrPort{}, m.services["FAR1"].vip, impatience); err == nil {
			t.Error("a Service works past a policy that forbids it")
		}
	})
	both.Wait()
	for _, step := range forwardAccept {
		iptables(strings.TrimPrefix(step, "iptables "))
	}
	if o := obstacle(); o != "" {
		t.Errorf("after what it said was done: %s", o)
	}
	m.check(t,
		reach{"then pod to pod", m.near1.ns, "", at(m.far1.Addr, webPort), m.near1.Addr},
		reach{"then pod to Service", m.near1.ns, "", m.services["FAR1"].vip, m.near1.Addr},
		reach{"then client to pod", m.client, "", at(m.near1.Addr, webPort), clientIP},
	)
	for _, step := range forwardAccept {
		iptables(strings.Replace(strings.TrimPrefix(step, "iptables "), "-I", "-D", 1))
	}
	iptables("-P FORWARD ACCEPT")
	if o := obstacle(); o != "" {
		t.Errorf("nothing is in the way any more, and yet: %s", o)
	}
}

// uncommented is what iptables-save printed without times and counters.
func uncommented(s string) string {
	var out strings.Builder
	for line := range strings.Lines(s) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		line, _, _ = strings.Cut(line, " [")
		fmt.Fprintln(&out, strings.TrimSpace(line))
	}
	return out.String()
}
