package cli

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/underlay-cni/underlay/internal/ec2"
	"github.com/underlay-cni/underlay/internal/vpc"
)

var threeTier = demoPlan{
	name: "demo three-tier", short: "Security groups on three tiers: what is allowed works, all else is refused",
	long: `Makes a lab with a load balancer, an application and a database, each with a
security group of its own, and shows that what the groups allow works, that an
application host which somebody has taken over reaches nothing else, and where the
flow log says so. Then takes the lab down; --keep (or KEEP=1) leaves it up. Ends
with an error if a proof fails.`,
	example: "  underlay demo three-tier\n  underlay demo three-tier --keep",
	intro:   "A VPC in one process, two nodes with an agent each (of a type without trunk interfaces), a VM and a database:",
	tools:   []string{"awk", "bash"},

	instanceType: "t3.medium",
	prove:        (*demo).proveThreeTier,
}

// The ports of the tiers.
const (
	portBalancer = 80
	portApp      = 8080
	portDatabase = ec2.LabDatabasePort
)

// tier is who may speak to whom: a group, and what it is on.
type tier struct {
	name    string
	on      string // for people
	in, out []string
	id      vpc.SecurityGroupID
}

// tiers are the groups of a demo.
type tiers struct {
	api                       *ec2.Lab
	client, balancer, app, db *tier
	jobs                      *tier // of somebody else
}

// makeTiers makes the groups and gives vm-1 that of a client.
func (d *demo) makeTiers(ctx context.Context) (*tiers, error) {
	t := &tiers{
		api:      labAPI(d.lab),
		client:   &tier{name: "client", on: "vm-1, a VM", out: []string{"anything in the VPC"}},
		balancer: &tier{name: "lb", on: "the load balancer", in: []string{"80 from client"}, out: []string{"8080 to app"}},
		app:      &tier{name: "app", on: "the application", in: []string{"8080 from lb"}, out: []string{"5432 to db"}},
		db:       &tier{name: "db", on: "the database", in: []string{"5432 from app"}},
		jobs:     &tier{name: "jobs", on: "a pod of others", in: []string{"8080 from jobs"}},
	}
	for _, g := range t.all() {
		id, err := t.api.EmptyGroup(ctx, vpc.VPCID(d.lab.Lab.VPCID), g.name, "the tier "+g.name)
		if err != nil {
			return nil, err
		}
		g.id = id
	}
	return t, errors.Join(
		t.api.Allow(ctx, t.client.id, ec2.LabRule{Egress: true, Protocol: "-1", CIDR: vpcCIDR}),
		t.allow(ctx, t.client, t.balancer, portBalancer, false),
		t.allow(ctx, t.balancer, t.app, portApp, true),
		t.allow(ctx, t.app, t.db, portDatabase, true),
		t.allow(ctx, t.jobs, t.jobs, portApp, false),
		d.setGroups(ctx, t, "vm-1", t.client.id),
	)
}

func (t *tiers) all() []*tier { return []*tier{t.client, t.balancer, t.app, t.db, t.jobs} }

// labAPI is the lab's EC2.
func labAPI(f *labFile) *ec2.Lab { return ec2.NewLab(f.Lab.Endpoint, region) }

// allow lets one tier connect to another: into the latter, and out of the former
// if it says so.
func (t *tiers) allow(ctx context.Context, from, to *tier, port int, out bool) error {
	err := t.api.Allow(ctx, to.id, ec2.LabRule{Protocol: "tcp", Port: port, Group: from.id})
	if err == nil && out {
		err = t.api.Allow(ctx, from.id, ec2.LabRule{Egress: true, Protocol: "tcp", Port: port, Group: to.id})
	}
	return err
}

// printTiers shows groups and all that they allow.
func (d *demo) printTiers(groups ...*tier) {
	rows := table{head: []string{"GROUP", "ON", "LETS IN", "LETS OUT", "ID"}}
	words := func(w []string) cell {
		if len(w) == 0 {
			return cell{text: "nothing", tone: dim}
		}
		return text(strings.Join(w, ", "))
	}
	for _, g := range groups {
		rows.row(cell{text: g.name, tone: strong}, text(g.on), words(g.in), words(g.out), text(string(g.id)))
	}
	rows.write(d.out, "    ", d.color)
}

// setGroups gives the first interface of a machine other groups.
func (d *demo) setGroups(ctx context.Context, t *tiers, machine string, groups ...vpc.SecurityGroupID) error {
	all, err := d.interfaces(ctx, t)
	if err != nil {
		return err
	}
	if all[machine] == "" {
		return fmt.Errorf("the lab has no interface of a machine %s", machine)
	}
	return t.api.SetGroups(ctx, vpc.ENIID(all[machine]), groups...)
}

// machine returns the address of a node or of an outside machine, as the lab is
// now.
func (d *demo) machine(name string) (netip.Addr, bool) {
	f, err := d.a.home().load()
	if err != nil {
		return netip.Addr{}, false
	}
	for _, n := range f.Lab.Nodes {
		if n.Name == name {
			return n.IP, true
		}
	}
	for _, o := range f.Lab.Outside {
		if o.Name == name {
			return o.IP, true
		}
	}
	return netip.Addr{}, false
}

// run is the command that starts a pod of a tier on a node, with a server if it
// has a port.
func (d *demo) run(pod string, on Node, g *tier, port int) string {
	s := fmt.Sprintf("underlay run %s --node %s --security-groups %s%s", pod, on.Name, g.name, d.a.labFlag())
	if port > 0 {
		s += fmt.Sprintf(" -- underlay serve-tcp --server-name %s --listen :%d", pod, port)
	}
	return s
}

// call connects from inside a machine and shows what is said.
func call(exec string, to netip.Addr, port int) string {
	return fmt.Sprintf("%s bash -c 'cat < /dev/tcp/%s/%d'", exec, to, port)
}

// knock tries doors from inside a machine, all at once, and shows which open. A
// refusal by the VPC is silence; a port where nobody listens says no.
func knock(exec string, doors ...netip.AddrPort) string {
	var all []string
	for _, x := range doors {
		all = append(all, fmt.Sprintf("%s/%d", x.Addr(), x.Port()))
	}
	return fmt.Sprintf("%s bash -c 'for to in %s; do\n  { timeout 1 bash -c \"< /dev/tcp/$to\" 2> /dev/null\n    case $? in 0) echo \"$to answers\";; 124) echo \"$to is silent\";; *) echo \"$to says no\";; esac; } & done; wait' | sort -V",
		exec, strings.Join(all, " "))
}

// silent wants that none of the doors opened.
func silent(doors ...netip.AddrPort) func(string) string {
	return func(out string) string {
		for _, x := range doors {
			if !strings.Contains(out, fmt.Sprintf("%s/%d is silent", x.Addr(), x.Port())) {
				return fmt.Sprintf("%s was to be refused", x)
			}
		}
		return ""
	}
}

// hears wants each of the lines.
func hears(lines ...string) func(string) string {
	return func(out string) string {
		for _, l := range lines {
			if !strings.Contains(out, l) {
				return fmt.Sprintf("expected %q", l)
			}
		}
		return ""
	}
}

func (d *demo) proveThreeTier(ctx context.Context) {
	f := d.a.labFlag()
	node1, node2 := d.lab.Lab.Nodes[0], d.lab.Lab.Nodes[1]
	var t *tiers
	if !d.step(ctx, "make the groups", func() (err error) { t, err = d.makeTiers(ctx); return err }) {
		return
	}
	fmt.Fprintln(d.out)
	d.say("Five groups, and all that they allow:")
	d.printTiers(t.all()...)

	d.fact(ctx, "The application runs in pods on both nodes, on interfaces that carry its group. Somebody else's pod is on the first node too.",
		strings.Join([]string{d.run("app-1", node1, t.app, portApp), d.run("app-2", node2, t.app, portApp), d.run("jobs", node1, t.jobs, portApp)}, "\n"),
		hears("app-1", "app-2", "jobs"))
	d.fact(ctx, "Its database is managed: no agent can run on it.",
		fmt.Sprintf("underlay service add orders --group %s%s", t.db.id, f), hears("database orders answers"))
	app1, app1ENI := d.pod("app-1")
	app2, _ := d.pod("app-2")
	jobs, _ := d.pod("jobs")
	orders, ok := d.machine("orders")
	if !app1.IsValid() || !app2.IsValid() || !jobs.IsValid() || !ok {
		return // said above
	}
	d.fact(ctx, "The load balancer is managed too, and forwards to the pods by their addresses.",
		fmt.Sprintf("underlay service add lb --kind load-balancer --group %s --target %s:%d --target %s:%d%s", t.balancer.id, app1, portApp, app2, portApp, f),
		hears("load-balancer lb answers"))
	balancer, ok := d.machine("lb")
	if !ok {
		return // said above
	}
	vm, _ := d.machine("vm-1")
	other, _ := d.machine("db-1")

	onVM := fmt.Sprintf("underlay node exec vm-1%s --", f)
	inApp := fmt.Sprintf("underlay exec app-1%s --", f)
	inBalancer := fmt.Sprintf("underlay node exec lb%s --", f)
	d.fact(ctx, "Client to load balancer to application: both pods take turns, and see the load balancer.",
		fmt.Sprintf("for i in 1 2; do %s; done", call(onVM, balancer, portBalancer)),
		hears(fmt.Sprintf("app-1: hello %s", balancer), fmt.Sprintf("app-2: hello %s", balancer)))
	d.fact(ctx, "Application to database: it sees the pod, and lets it in by its group.",
		call(inApp, orders, portDatabase), hears(fmt.Sprintf("orders: hello %s", app1)))

	at := netip.AddrPortFrom
	short := []netip.AddrPort{at(app1, portApp), at(orders, portDatabase)}
	d.fact(ctx, "Nobody takes a short cut: the client reaches neither application nor database, the load balancer not the database.",
		knock(onVM, short...)+"\n"+knock(inBalancer, short[1]), func(out string) string {
			if why := silent(short...)(out); why != "" {
				return why
			}
			if strings.Count(out, fmt.Sprintf("%s/%d is silent", orders, portDatabase)) != 2 {
				return "the load balancer was to be refused by the database"
			}
			return ""
		})
	aims := []netip.AddrPort{at(app2, portApp), at(balancer, portBalancer), at(orders, 22), at(other, portDatabase), at(vm, ec2.LabVMPort), at(node2.IP, 22)}
	d.fact(ctx, "Somebody has taken over app-1. It tries the other pod of its tier, the load balancer, another port of its database, the database of others, the client, a node:",
		knock(inApp, aims...), silent(aims...))

	beside := at(jobs, portApp)
	d.fact(ctx, "Nor the pod beside it. The VPC does not see what pods of one node say to each other: the node refuses it, by the same groups.",
		knock(inApp, beside), silent(beside))

	var refused []attempt
	if !d.step(ctx, "learn who has which interface", func() error {
		enis, err := d.interfaces(ctx, t)
		if err != nil {
			return err
		}
		for _, x := range short {
			eni := app1ENI
			if x.Addr() == orders {
				eni = enis["orders"]
			}
			refused = append(refused, attempt{src: vm, dst: x, eni: eni, direction: ingress, action: "REJECT"})
		}
		refused = append(refused, attempt{src: balancer, dst: at(orders, portDatabase), eni: enis["lb"], direction: egress, action: "REJECT"})
		for _, x := range aims {
			refused = append(refused, attempt{src: app1, dst: x, eni: app1ENI, direction: egress, action: "REJECT"})
		}
		return nil
	}) {
		return
	}
	d.flowFact(ctx, "The flow log has each attempt, at the ENI that refused it: the client's at those that it called, the others at the caller's own, whose group lets nothing of the kind out.",
		"--action REJECT", recorded(refused...))
	d.fact(ctx, "What both saw, both count alike: packets and bytes of each connection between app-1 and its database, by the VPC at the interface, by the node at the pod.",
		bothLogs(f, app1ENI, orders), sameCounts(at(orders, portDatabase), at(orders, 22)))

	if !d.step(ctx, "let the application into the pod beside it", func() error {
		return t.allow(ctx, t.app, t.jobs, portApp, true)
	}) {
		return
	}
	d.fact(ctx, "A rule comes while all goes on: the pod beside it now lets the application in, and so does the node.",
		fmt.Sprintf("until timeout 1 %s; do :; done", call(inApp, jobs, portApp)), hears(fmt.Sprintf("jobs: hello %s", app1)))
}

// interfaces are the IDs of the first interfaces of machines, by name.
func (d *demo) interfaces(ctx context.Context, t *tiers) (map[string]string, error) {
	f, err := d.a.home().loadUp()
	if err != nil {
		return nil, err
	}
	names := map[netip.Addr]string{}
	for _, n := range f.Lab.Nodes {
		names[n.IP] = n.Name
	}
	for _, o := range f.Lab.Outside {
		names[o.IP] = o.Name
	}
	all, err := t.api.Interfaces(ctx, vpc.VPCID(d.lab.Lab.VPCID))
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, e := range all {
		if name, ok := names[e.Primary]; ok {
			out[name] = string(e.ID)
		}
	}
	return out, nil
}
