package cli

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/ec2"
	"github.com/underlay-cni/underlay/internal/vpc"
)

var overlay = demoPlan{
	name: "demo overlay", short: "What an overlay hides from the VPC, side by side with none",
	long: `Makes a lab with a load balancer and an application in pods on two nodes, and a
managed database; first with pods in the VPC, then with the same tiers on a VXLAN
overlay between the same nodes. Shows what the flow log, the database and the
security groups see of each, side by side. Then takes the lab down; --keep (or
KEEP=1) leaves it up. Ends with an error if a proof fails.`,
	example: "  underlay demo overlay\n  underlay demo overlay --keep",
	intro:   "A VPC in one process, two nodes with an agent each, a VM and a database:",
	tools:   []string{"bash", "ip", "bridge", "nft"},
	prove:   (*demo).proveOverlay,
}

// The overlay, as flannel makes one: VXLAN over UDP 8472 between the nodes.
var (
	overlayCIDR = netip.MustParsePrefix("10.244.0.0/24")
	vxlanPort   = 8472
)

// overlayPod is a pod of the overlay.
type overlayPod struct {
	name string
	node Node
	ip   netip.Addr
}

func (p overlayPod) netns(h home) string { return h.podNetns(p.name) }

// overlayNode are the commands that put a node's part of an overlay into place.
func (d *demo) overlayNode(node, peer Node, gateway netip.Addr, pods []overlayPod) string {
	var b strings.Builder
	h := d.a.home()
	for _, p := range pods {
		fmt.Fprintf(&b, "ip netns add %s\n", p.netns(h))
	}
	fmt.Fprintf(&b, `underlay node exec %[1]s%[2]s -- bash -ec '
  ip link add vx0 type vxlan id 1 dstport %[3]d dev eth0 local %[4]s
  bridge fdb append 00:00:00:00:00:00 dev vx0 dst %[5]s
  ip link add br0 type bridge; ip link set vx0 master br0 up
  ip addr add %[6]s dev br0; ip link set br0 up
  nft add table ip overlay
  nft "add chain ip overlay out { type nat hook postrouting priority srcnat; }"
  nft add rule ip overlay out ip saddr %[7]s ip daddr != %[7]s masquerade
`, node.Name, d.a.labFlag(), vxlanPort, node.IP, peer.IP, netip.PrefixFrom(gateway, overlayCIDR.Bits()), overlayCIDR)
	for _, p := range pods {
		fmt.Fprintf(&b, `  ip link add o-%[1]s master br0 up mtu 8951 type veth peer name eth0 mtu 8951 netns %[2]s
  ip -n %[2]s addr add %[3]s dev eth0; ip -n %[2]s link set eth0 up
  ip -n %[2]s route add default via %[4]s
`, p.ip.String()[strings.LastIndexByte(p.ip.String(), '.')+1:], p.netns(h), netip.PrefixFrom(p.ip, overlayCIDR.Bits()), gateway)
	}
	return b.String() + "'"
}

// sides is what the comparison is made of: a line for each question.
type sides struct {
	rows [][3]cell
}

func (s *sides) add(question, native, tunnel string) {
	s.rows = append(s.rows, [3]cell{text(question), {text: native, tone: good}, {text: tunnel, tone: bad}})
}

// print shows both networks in one screen.
func (s *sides) print(d *demo) {
	t := table{head: []string{"", "PODS IN THE VPC", "PODS ON AN OVERLAY"}}
	for _, r := range s.rows {
		t.row(r[:]...)
	}
	fmt.Fprintln(d.out)
	d.say("Side by side, the same tiers on the same two nodes:")
	fmt.Fprintln(d.out)
	t.write(d.out, "  ", d.color)
}

func (d *demo) proveOverlay(ctx context.Context) {
	f := d.a.labFlag()
	node1, node2 := d.lab.Lab.Nodes[0], d.lab.Lab.Nodes[1]
	var t *tiers
	if !d.step(ctx, "make the groups", func() (err error) {
		if t, err = d.makeTiers(ctx); err != nil {
			return err
		}
		t.balancer.on, t.app.on = "pods on "+node1.Name, "pods on "+node2.Name
		// It may call whom it likes: it is the database that must refuse.
		t.balancer.out = t.client.out
		if err := t.api.Allow(ctx, t.balancer.id, ec2.LabRule{Egress: true, Protocol: "-1", CIDR: vpcCIDR}); err != nil {
			return err
		}
		return firstError(d.place(ctx, t, t.balancer, node1.Name), d.place(ctx, t, t.app, node2.Name))
	}) {
		return
	}
	fmt.Fprintln(d.out)
	d.say("Native first. Each tier has a group, and its pods have addresses of an ENI that carries it:")
	t.print(d)
	d.fact(ctx, "A load balancer and an application in pods, a managed database behind them.",
		fmt.Sprintf("underlay run lb --node %[2]s%[1]s\nunderlay run app --node %[3]s%[1]s -- underlay serve-tcp --server-name app --listen :%[4]d\nunderlay service add orders --group %[5]s%[1]s",
			f, node1.Name, node2.Name, portApp, t.db.id),
		hears("lb", "app", "database orders answers"))
	lb, _ := d.pod("lb")
	app, _ := d.pod("app")
	orders, ok := d.machine("orders")
	if !lb.IsValid() || !app.IsValid() || !ok {
		return // said above
	}
	exec := func(pod string) string { return fmt.Sprintf("underlay exec %s%s --", pod, f) }
	door := netip.AddrPortFrom(orders, portDatabase)
	began := d.a.now()
	d.fact(ctx, "What is allowed works, and everybody sees the pod's own address.",
		call(exec("lb"), app, portApp)+"\n"+call(exec("app"), orders, portDatabase),
		hears(fmt.Sprintf("app: hello %s", lb), fmt.Sprintf("orders: hello %s", app)))
	d.fact(ctx, "The database's group lets in the application and nobody else: not the load balancer.",
		knock(exec("lb"), door), silent(door))
	_, lbENI := d.pod("lb")
	_, appENI := d.pod("app")
	enis, err := d.interfaces(ctx, t)
	if !d.step(ctx, "learn who has which interface", func() error { return err }) {
		return
	}
	d.flowFact(ctx, "The flow log names the pods, the ports, and the refusal.", since(began)+" --address "+lb.String(), recorded(
		attempt{src: lb, dst: netip.AddrPortFrom(app, portApp), eni: lbENI, direction: egress, action: "ACCEPT"},
		attempt{src: lb, dst: netip.AddrPortFrom(app, portApp), eni: appENI, direction: ingress, action: "ACCEPT"},
		attempt{src: lb, dst: door, eni: enis["orders"], direction: ingress, action: "REJECT"},
	))

	d.overlaid(ctx, t, lb, app, orders)
}

// overlaid does the same once more on an overlay.
func (d *demo) overlaid(ctx context.Context, t *tiers, lb, app, orders netip.Addr) {
	node1, node2 := d.lab.Lab.Nodes[0], d.lab.Lab.Nodes[1]
	h, f := d.a.home(), d.a.labFlag()
	nodes := &tier{name: "nodes", on: "both nodes, all their pods", in: []string{fmt.Sprintf("udp %d from nodes", vxlanPort)}, out: []string{fmt.Sprintf("udp %d to nodes, 5432 to db", vxlanPort)}}
	if !d.step(ctx, "make the overlay's groups", func() (err error) {
		if nodes.id, err = t.api.EmptyGroup(ctx, vpc.VPCID(d.lab.Lab.VPCID), nodes.name, "nodes with an overlay between them"); err != nil {
			return err
		}
		return firstError(
			t.api.Allow(ctx, nodes.id, ec2.LabRule{Protocol: "udp", Port: vxlanPort, Group: nodes.id}, ec2.LabRule{Egress: true, Protocol: "udp", Port: vxlanPort, Group: nodes.id}),
			t.allow(ctx, nodes, t.db, portDatabase, true),
			d.place(ctx, t, nodes, node1.Name, node2.Name),
		)
	}) {
		return
	}
	pods := []overlayPod{{"overlay-lb", node1, addressOf(overlayCIDR, 11)}, {"overlay-app-1", node1, addressOf(overlayCIDR, 12)}, {"overlay-app-2", node2, addressOf(overlayCIDR, 21)}}
	fmt.Fprintln(d.out)
	d.say("Now an overlay between the same nodes. The VPC sees nodes alone, so there can be one group for all that runs on them; the database must let that in:")
	rows := table{head: []string{"GROUP", "ON", "LETS IN", "LETS OUT"}}
	rows.row(cell{text: nodes.name, tone: strong}, text(nodes.on), text(nodes.in[0]), text(nodes.out[0]))
	rows.row(cell{text: t.db.name, tone: strong}, text(t.db.on), text("5432 from nodes"), cell{text: "nothing", tone: dim})
	rows.write(d.out, "    ", d.color)
	d.fact(ctx, "The overlay: VXLAN between the nodes, pods on a bridge, and the node's own address towards what is outside.",
		d.overlayNode(node1, node2, addressOf(overlayCIDR, 1), pods[:2])+"\n"+d.overlayNode(node2, node1, addressOf(overlayCIDR, 2), pods[2:]),
		func(string) string { return "" })
	for _, p := range pods[1:] {
		d.step(ctx, "start "+p.name, func() error {
			cmd := newCommand("/proc/self/exe", "serve-tcp", "--name", h.name, "--server-name", p.name, "--listen", fmt.Sprintf(":%d", portApp))
			cmd.Env = cleanEnv()
			_, _, err := background(cmd, "/run/netns/"+p.netns(h), h.podLog(p.name))
			if err != nil {
				return err
			}
			wait, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			return poll(wait, 10*time.Millisecond, func() (bool, error) { lines, err := tail(h.podLog(p.name), 1); return len(lines) > 0, err })
		})
	}
	exec := func(pod string) string { return fmt.Sprintf("underlay exec %s%s --", pod, f) }
	began := d.a.now()
	d.fact(ctx, "It works: load balancer to application, from node to node.",
		call(exec(pods[0].name), pods[2].ip, portApp), hears(fmt.Sprintf("%s: hello %s", pods[2].name, pods[0].ip)))
	d.flowFact(ctx, "The flow log sees nodes talk UDP, and nothing more.", since(began), tunnelOnly(node1.IP, node2.IP))
	d.fact(ctx, "The database sees one and the same node, whoever asks: application or load balancer.",
		call(exec(pods[1].name), orders, portDatabase)+"\n"+call(exec(pods[0].name), orders, portDatabase),
		func(out string) string {
			if strings.Count(out, fmt.Sprintf("orders: hello %s", node1.IP)) != 2 {
				return fmt.Sprintf("both were to be seen as %s", node1.IP)
			}
			return ""
		})
	mtus := d.fact(ctx, "And each packet has 50 bytes less to say.",
		fmt.Sprintf("for pod in lb %s; do underlay exec $pod%s -- cat /sys/class/net/eth0/mtu; done", pods[0].name, f),
		hears("9001\n8951"))
	left, right, _ := strings.Cut(mtus, "\n")
	if all := d.results; ctx.Err() == nil && !slices.ContainsFunc(all, func(p proof) bool { return !p.OK }) {
		compared(lb, app, node1.IP, node2.IP, left, right).print(d)
	}
}

// compared is what has been proven of both networks.
func compared(lb, app, node1, node2 netip.Addr, mtu, overlayMTU string) *sides {
	var s sides
	s.add("lb to app, in the flow log", fmt.Sprintf("%s > %s tcp %d", lb, app, portApp), fmt.Sprintf("%s > %s udp %d", node1, node2, vxlanPort))
	s.add("app to database: it sees", fmt.Sprintf("%s, the pod", app), fmt.Sprintf("%s, the node", node1))
	s.add("lb to database: it sees", "nothing: refused, REJECT in the log", fmt.Sprintf("%s, the node: let in", node1))
	s.add("its group can let in", "app, and nobody else", "all that runs on the nodes")
	s.add("MTU of a pod", mtu, overlayMTU)
	return &s
}

// addressOf is the n-th address of a block.
func addressOf(p netip.Prefix, n int) netip.Addr {
	a := p.Masked().Addr()
	for range n {
		a = a.Next()
	}
	return a
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
