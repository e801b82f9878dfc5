package bench

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/datapath"
	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/policy"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// site is two nodes, a and b, joined by one veth pair: the same wire for
// everybody who is compared.
//
//	a  eth0 10.<n>.0.10/24 ──────────── eth0 10.<n>.0.20/24  b
//
// Each takes the other for the router at 10.<n>.0.1, by a permanent neighbour:
// whoever routes by a gateway, as to a VPC, reaches the other node without a
// third machine's work in the figures.
type site struct {
	b     testing.TB
	name  string
	n     int
	a, z  string // namespaces of the two nodes
	nodes [2]string
}

// Of every site.
const (
	wireMTU  = 9001
	vpcRange = "10.0.0.0/8"
)

func (s *site) addr(host byte) netip.Addr { return netip.AddrFrom4([4]byte{10, byte(s.n), 0, host}) }

// nodeAddr is the address of node i.
func (s *site) nodeAddr(i int) netip.Addr { return s.addr(byte(10 + 10*i)) }

var sites int

func newSite(b testing.TB, name string) *site {
	b.Helper()
	sites++
	s := &site{b: b, name: name, n: sites}
	for i := range s.nodes {
		s.nodes[i] = s.netns(fmt.Sprintf("node%d", i))
	}
	s.a, s.z = s.nodes[0], s.nodes[1]
	s.ip(s.a, fmt.Sprintf("link add eth0 address %s mtu %d type veth peer name eth0 address %s mtu %d netns %s", s.mac(0), wireMTU, s.mac(1), wireMTU, s.z))
	for i, node := range s.nodes {
		s.ip(node, fmt.Sprintf("addr add %s/24 dev eth0", s.nodeAddr(i)))
		s.ip(node, "link set lo up")
		s.ip(node, "link set eth0 up")
		s.ip(node, fmt.Sprintf("neigh replace %s lladdr %s nud permanent dev eth0", s.addr(1), s.mac(1-i)))
		s.ip(node, fmt.Sprintf("route add default via %s", s.addr(1)))
		s.sysctl(node, "net.ipv4.ip_forward=1", "net.ipv4.conf.all.send_redirects=0", "net.ipv4.conf.eth0.send_redirects=0", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.eth0.rp_filter=0")
	}
	return s
}

func (s *site) mac(i int) net.HardwareAddr {
	return net.HardwareAddr{0x02, 0xbe, 0, 0, byte(s.n), byte(10 + i)}
}

// netns makes a namespace that goes with the benchmark.
func (s *site) netns(what string) string {
	s.b.Helper()
	name := fmt.Sprintf("ul-bench%d-%s-%s", os.Getpid(), s.name, what)
	if err := nl.NewNamed(name); err != nil {
		s.b.Fatal(err)
	}
	s.b.Cleanup(func() { _ = nl.DeleteNamed(name) })
	return name
}

func (s *site) ip(netns, args string) { run(s.b, "ip -n "+netns+" "+args) }

func (s *site) sysctl(netns string, settings ...string) {
	run(s.b, "ip netns exec "+netns+" sysctl -qw "+strings.Join(settings, " "))
}

// load gives a program in a namespace an input.
func (s *site) load(netns, input string, program ...string) {
	s.b.Helper()
	cmd := exec.Command("ip", append([]string{"netns", "exec", netns}, program...)...)
	cmd.Stdin = strings.NewReader(input)
	if out, err := cmd.CombinedOutput(); err != nil {
		s.b.Fatalf("%v: %v\n%s\n%s", program, err, out, input)
	}
}

func run(b testing.TB, command string) {
	b.Helper()
	output(b, command)
}

func output(b testing.TB, command string) string {
	b.Helper()
	fields := strings.Fields(command)
	out, err := exec.Command(fields[0], fields[1:]...).CombinedOutput()
	if err != nil {
		b.Fatalf("%s: %v\n%s", command, err, out)
	}
	return string(out)
}

// pairTo is from a namespace to an address in another one.
func pairTo(from, to string, addr netip.Addr) pair {
	return pair{from: nl.Path(from), to: nl.Path(to), addr: addr}
}

// between is node to node, with nothing but the wire.
func (s *site) between() pair { return pairTo(s.a, s.z, s.nodeAddr(1)) }

// underlay is our datapath on both nodes of a site, with direct forwarding,
// connection tracking, counters, and a policy on each pod.
type underlay struct {
	*site
	d    [2]*datapath.Datapath
	pods int
	law  policy.Tables // of the pods that are added
}

// benchPod is an endpoint in a namespace of its own.
type benchPod struct {
	ns       string
	addr     netip.Addr
	endpoint datapath.Endpoint // of ours
}

// newUnderlay opens the datapath as an agent does.
func newUnderlay(b testing.TB, name string) *underlay {
	b.Helper()
	u := &underlay{site: newSite(b, name), law: law(b, usualRules, usualPeers, 0)}
	for i, node := range u.nodes {
		dir := filepath.Join("/run", fmt.Sprintf("ul-bench%d-%s-%d", os.Getpid(), name, i))
		if err := os.Mkdir(dir, 0o700); err != nil {
			b.Fatal(err)
		}
		if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH); _ = os.Remove(dir) })
		opts := datapath.Options{Direct: true, BPFFS: filepath.Join(dir, "agent"), MTU: wireMTU, Logger: slog.New(slog.DiscardHandler), Ended: func(datapath.Connection) {}}
		err := nl.Do(nl.Path(node), func() (err error) { u.d[i], err = datapath.Open(opts); return err })
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = u.d[i].Close() })
		ctx := context.Background()
		if err := u.d[i].SetVPC(ctx, []netip.Prefix{netip.MustParsePrefix(vpcRange)}); err != nil {
			b.Fatal(err)
		}
		eni := datapath.ENI{ID: vpc.ENIID(fmt.Sprintf("eni-%017x", u.n*2+i)), Index: 1, MAC: u.mac(i), Primary: u.nodeAddr(i), Subnet: netip.PrefixFrom(u.addr(0), 16)}
		if err := u.d[i].SetENIs(ctx, []datapath.ENI{eni}); err != nil {
			b.Fatal(err)
		}
	}
	return u
}

// pod adds a pod to node i; a site has room for 250 in all.
func (u *underlay) pod(i int) benchPod {
	u.b.Helper()
	u.pods++
	// Beyond the nodes' own addresses, and of the same subnet to the datapath.
	p := benchPod{ns: u.netns(fmt.Sprintf("pod%d", u.pods)), addr: netip.AddrFrom4([4]byte{10, byte(u.n), 1, byte(u.pods)})}
	netns, err := os.Open(nl.Path(p.ns))
	if err != nil {
		u.b.Fatal(err)
	}
	defer netns.Close()
	e, err := u.d[i].Add(context.Background(), datapath.Endpoint{
		ContainerID: p.ns, IfName: "eth0", Netns: nl.Path(p.ns), Addr: p.addr, ENI: vpc.ENIID(fmt.Sprintf("eni-%017x", u.n*2+i)), ENIIndex: 1,
		PodNamespace: "default", PodName: p.ns, MTU: wireMTU,
	}, netns)
	if err == nil {
		err = u.d[i].SetPolicy(e, u.law)
	}
	if err != nil {
		u.b.Fatal(err)
	}
	p.endpoint = e
	return p
}

// busy is pod for one that is measured: its programs are moved to where an agent has
// those of a pod that sends much, a few seconds after it began.
func (u *underlay) busy(i int) benchPod {
	u.b.Helper()
	p := u.pod(i)
	if err := u.d[i].Move(context.Background(), p.addr); err != nil {
		u.b.Fatal(err)
	}
	return p
}

// What a pod's policy is where nothing else is said.
const usualRules, usualPeers = 10, 10

// law is a policy by both gates, each way, of so many rules and with so many
// peers, of which the last rule's last peer is everybody in the benchmark. The
// others of one variant are other ones than those of another.
func law(b testing.TB, rules, peers, variant int) policy.Tables {
	b.Helper()
	const group, members = vpc.SecurityGroupID("sg-00000000000000001"), vpc.SecurityGroupID("sg-00000000000000002")
	all := netip.MustParsePrefix(vpcRange)
	in := &policy.Input{Members: map[vpc.SecurityGroupID][]netip.Prefix{members: {all}}}
	last := policy.PolicyRule{Peers: []policy.Peer{{Block: &policy.Block{CIDR: all}}}}
	for n := range peers - 1 {
		// Every second address, so that no two become a range.
		other := netip.PrefixFrom(netip.AddrFrom4([4]byte{198, byte(18 + variant), byte(n >> 7), byte(n << 1)}), 32)
		in.Members[members] = append(in.Members[members], other)
		last.Peers = append(last.Peers, policy.Peer{Block: &policy.Block{CIDR: other}})
	}
	var groupRules []policy.GroupRule
	var policyRules []policy.PolicyRule
	for n := range rules - 1 {
		strangers := netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(n)}), 32)
		groupRules = append(groupRules, policy.GroupRule{ID: fmt.Sprintf("sgr-%017x", n), Protocol: int(policy.TCP), FromPort: n + 1, ToPort: n + 1, CIDR: strangers})
		policyRules = append(policyRules, policy.PolicyRule{Peers: []policy.Peer{{Block: &policy.Block{CIDR: strangers}}}, Ports: []policy.Port{{Protocol: policy.TCP, Port: uint16(n + 1)}}})
	}
	groupRules = append(groupRules, policy.GroupRule{ID: "sgr-0ffffffffffffffff", Protocol: policy.AnyProtocol, FromPort: policy.AnyPort, Group: members})
	policyRules = append(policyRules, last)
	in.Groups = map[vpc.SecurityGroupID]policy.SecurityGroup{group: {Ingress: groupRules, Egress: groupRules}}
	in.Policies = []policy.NetworkPolicy{{Namespace: "default", Name: "bench", Types: []policy.Direction{policy.Egress, policy.Ingress}, Ingress: policyRules, Egress: policyRules}}
	t, err := policy.NewCompiler(in).Compile(&policy.Endpoint{Pod: policy.Pod{Namespace: "default", Name: "pod"}, Groups: vpc.GroupSet(group)})
	if err != nil {
		b.Fatal(err)
	}
	return t
}

// barePod joins a new namespace to a node by a veth pair, as CNI plugins do.
func (s *site) barePod(i int, what string, addr netip.Prefix, mtu int) (ns, host string) {
	s.b.Helper()
	ns, host = s.netns(what), "v"+what
	s.ip(s.nodes[i], fmt.Sprintf("link add %s mtu %d type veth peer name eth0 mtu %d netns %s", host, mtu, mtu, ns))
	s.ip(s.nodes[i], "link set "+host+" up")
	s.ip(ns, fmt.Sprintf("addr add %s dev eth0", addr))
	s.ip(ns, "link set eth0 up")
	s.ip(ns, "link set lo up")
	return ns, host
}

// newAWS is a pod on each node in the manner of the AWS VPC CNI, with public
// tools: veth and /32 route, a rule to the pod and one from it by the table of
// its interface, source NAT and connection marks in iptables. Rules and chains
// follow its documentation (facts of version 1.23); they are written anew.
func newAWS(b testing.TB, name string) (*site, [2]benchPod) {
	b.Helper()
	s := newSite(b, name)
	var pods [2]benchPod
	for i, node := range s.nodes {
		p := benchPod{addr: netip.AddrFrom4([4]byte{10, byte(s.n), 1, byte(1 + i)})}
		var host string
		p.ns, host = s.barePod(i, fmt.Sprintf("pod%d", i), netip.PrefixFrom(p.addr, 32), wireMTU)
		s.link(node, host, p.ns)
		s.ip(node, fmt.Sprintf("route add %s dev %s", p.addr, host))
		s.ip(node, "rule add pref 512 to "+p.addr.String()+" lookup main")
		s.ip(node, "rule add pref 1024 fwmark 0x80/0x80 lookup main")
		s.ip(node, "rule add pref 1536 from "+p.addr.String()+" lookup 2")
		s.ip(node, fmt.Sprintf("route add %s dev eth0 table 2 scope link", s.addr(1)))
		s.ip(node, fmt.Sprintf("route add default via %s dev eth0 table 2", s.addr(1)))
		s.sysctl(node, "net.ipv4.conf.eth0.rp_filter=2")
		s.load(node, fmt.Sprintf(`*mangle
-A PREROUTING -i eth0 -m addrtype --dst-type LOCAL --limit-iface-in -j CONNMARK --set-xmark 0x80/0x80
-A PREROUTING -i vpod+ -j CONNMARK --restore-mark --nfmask 0x80 --ctmask 0x80
COMMIT
*nat
:AWS-SNAT-CHAIN-0 - [0:0]
:AWS-CONNMARK-CHAIN-0 - [0:0]
-A PREROUTING -i vpod+ -m comment --comment "outbound connections" -j AWS-CONNMARK-CHAIN-0
-A PREROUTING -m comment --comment "CONNMARK" -j CONNMARK --restore-mark --nfmask 0x80 --ctmask 0x80
-A AWS-CONNMARK-CHAIN-0 -d %[1]s -j RETURN
-A AWS-CONNMARK-CHAIN-0 -j CONNMARK --set-xmark 0x80/0x80
-A POSTROUTING -j AWS-SNAT-CHAIN-0
-A AWS-SNAT-CHAIN-0 -d %[1]s -j RETURN
-A AWS-SNAT-CHAIN-0 ! -o vlan+ -m addrtype ! --dst-type LOCAL -j SNAT --to-source %[2]s --random-fully
COMMIT
`, vpcRange, s.nodeAddr(i)), "iptables-restore")
		pods[i] = p
	}
	return s, pods
}

// link gives a pod its way out by 169.254.1.1 at the host's end.
func (s *site) link(node, host, ns string) {
	s.b.Helper()
	s.ip(ns, "route add 169.254.1.1 dev eth0 scope link")
	s.ip(ns, "route add default via 169.254.1.1")
	mac := output(s.b, "ip netns exec "+node+" cat /sys/class/net/"+host+"/address")
	s.ip(ns, "neigh replace 169.254.1.1 lladdr "+strings.TrimSpace(mac)+" nud permanent dev eth0")
}

// newVXLAN is a pod on each node in the manner of flannel's VXLAN backend: a
// bridge, a device without learning, routes by the other's own address, and
// masquerading in iptables.
func newVXLAN(b testing.TB, name string) (*site, [2]benchPod) {
	b.Helper()
	const overhead = 50 // IPv4, UDP, VXLAN and the inner Ethernet header
	s := newSite(b, name)
	subnet := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{172, 30, byte(i), 0}) }
	vtep := func(i int) string { return fmt.Sprintf("02:be:f1:00:%02x:%02x", s.n, i) }
	var pods [2]benchPod
	for i, node := range s.nodes {
		s.ip(node, fmt.Sprintf("link add flannel.1 address %s mtu %d type vxlan id 1 local %s dev eth0 dstport 8472 nolearning", vtep(i), wireMTU-overhead, s.nodeAddr(i)))
		s.ip(node, fmt.Sprintf("addr add %s/32 dev flannel.1", subnet(i)))
		s.ip(node, "link set flannel.1 up")
		s.ip(node, fmt.Sprintf("route add %s/24 via %s dev flannel.1 onlink", subnet(1-i), subnet(1-i)))
		s.ip(node, fmt.Sprintf("neigh replace %s lladdr %s nud permanent dev flannel.1", subnet(1-i), vtep(1-i)))
		run(b, fmt.Sprintf("ip netns exec %s bridge fdb append %s dev flannel.1 dst %s", node, vtep(1-i), s.nodeAddr(1-i)))
		s.ip(node, fmt.Sprintf("link add cni0 mtu %d type bridge", wireMTU-overhead))
		s.ip(node, fmt.Sprintf("addr add %s/24 dev cni0", subnet(i).Next()))
		s.ip(node, "link set cni0 up")
		p := benchPod{addr: subnet(i).Next().Next()}
		var host string
		p.ns, host = s.barePod(i, fmt.Sprintf("pod%d", i), netip.PrefixFrom(p.addr, 24), wireMTU-overhead)
		s.ip(node, "link set "+host+" master cni0")
		run(b, "ip netns exec "+node+" bridge link set dev "+host+" hairpin on")
		s.ip(p.ns, fmt.Sprintf("route add default via %s", subnet(i).Next()))
		s.load(node, `*nat
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -j RETURN
-A FLANNEL-POSTRTG -s 172.30.0.0/16 -d 172.30.0.0/16 -j RETURN
-A FLANNEL-POSTRTG -s 172.30.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully
COMMIT
*filter
:FLANNEL-FWD - [0:0]
-A FORWARD -j FLANNEL-FWD
-A FLANNEL-FWD -s 172.30.0.0/16 -j ACCEPT
-A FLANNEL-FWD -d 172.30.0.0/16 -j ACCEPT
COMMIT
`, "iptables-restore")
		pods[i] = p
	}
	return s, pods
}

// newBare is two namespaces at the ends of one veth pair.
func newBare(b testing.TB, name string) pair {
	b.Helper()
	s := newSite(b, name)
	return s.between()
}

// serviceIP is the ClusterIP of service.
var serviceIP = netip.MustParseAddr("172.20.0.80")

// service gives a pod a ClusterIP on node 0, as kube-proxy does in its iptables
// mode; ports stay what they are. It returns the way there.
func (s *site) service(from, backend benchPod) pair {
	s.b.Helper()
	s.load(s.nodes[0], fmt.Sprintf(`*nat
:KUBE-SERVICES - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SVC-BENCH - [0:0]
:KUBE-SEP-BENCH - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-SERVICES -d %[1]s/32 -p tcp -j KUBE-SVC-BENCH
-A KUBE-SVC-BENCH ! -s %[3]s -d %[1]s/32 -p tcp -j KUBE-MARK-MASQ
-A KUBE-SVC-BENCH -j KUBE-SEP-BENCH
-A KUBE-SEP-BENCH -s %[2]s/32 -j KUBE-MARK-MASQ
-A KUBE-SEP-BENCH -p tcp -j DNAT --to-destination %[2]s
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
COMMIT
*filter
:KUBE-FORWARD - [0:0]
-A FORWARD -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
`, serviceIP, backend.addr, vpcRange), "iptables-restore", "-n")
	p := pairTo(from.ns, backend.ns, backend.addr)
	p.via = serviceIP
	return p
}
