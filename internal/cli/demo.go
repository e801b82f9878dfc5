package cli

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/underlay-cni/underlay/internal/ec2"
)

func (a *App) demoCommand() *cobra.Command {
	c := a.demoOf(demoPlan{
		name: "demo", short: "Make a lab, prove each fact with a command, take it down",
		long: `Makes a lab with pods on two nodes and shows what Underlay is for: each fact with
the command that proves it and that command's real output. Then takes the lab
down; --keep (or KEEP=1) leaves it up. Ends with an error if a proof fails.`,
		example: "  underlay demo\n  KEEP=1 underlay demo\n  underlay demo three-tier    # security groups on tiers\n  underlay demo overlay       # what an overlay hides, side by side",
		intro:   "A VPC in one process, two nodes with an agent each, a VM and a database:",
		tools:   []string{"ping", "tcpdump", "aws", "bash"},
		prove:   (*demo).prove,
	})
	c.AddCommand(a.demoOf(threeTier), a.demoOf(overlay))
	return c
}

// demoPlan is one of the demos.
type demoPlan struct {
	name, short, long, example string

	intro        string // said before the lab is made
	instanceType string // of its nodes; "" is m5.large
	tools        []string
	prove        func(d *demo, ctx context.Context)
}

// packages are what the tools of demos come with on Debian.
var packages = map[string]string{
	"ping": "iputils-ping", "tcpdump": "tcpdump", "aws": "awscli", "bash": "bash", "ip": "iproute2", "bridge": "iproute2", "nft": "nftables", "awk": "mawk",
}

func (a *App) demoOf(p demoPlan) *cobra.Command {
	var keep bool
	words := strings.Fields(p.name)
	c := &cobra.Command{
		Use: words[len(words)-1], Short: p.short, Long: p.long, Example: p.example,
		Args:        cobra.NoArgs,
		Annotations: rootBecause("makes network namespaces and loads BPF programs"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if v := os.Getenv("KEEP"); v != "" && v != "0" && !cmd.Flags().Changed("keep") {
				keep = true
			}
			return a.demo(cmd.Context(), p, keep)
		},
	}
	c.Flags().BoolVar(&keep, "keep", false, "leave the lab up")
	return c
}

// demo is one run of a demo. Everything it shows is the output of a command
// that a person can type again.
type demo struct {
	a       *App
	lab     *labFile
	env     []string
	color   bool
	results []proof
	out     io.Writer
	// comment is what to say behind a line of output, if anything.
	comment func(line string) string
}

type proof struct {
	Fact    string `json:"fact"`
	Command string `json:"command"`
	Output  string `json:"output"`
	OK      bool   `json:"ok"`
	Why     string `json:"why,omitempty"` // why it is not ok
}

func (a *App) demo(ctx context.Context, plan demoPlan, keep bool) (err error) {
	began := a.now()
	d := &demo{a: a, out: a.Out}
	if a.json() {
		d.out = a.Err // stdout is for the JSON
	}
	d.color = colored(d.out)
	for _, tool := range plan.tools {
		if _, err := exec.LookPath(tool); err != nil {
			var all []string
			for _, t := range plan.tools {
				all = append(all, packages[t])
			}
			slices.Sort(all)
			return fmt.Errorf("the demo shows its facts with %s, which is not installed; on Debian: apt-get install %s", tool, strings.Join(slices.Compact(all), " "))
		}
	}
	d.say(plan.intro)
	command := "underlay up" + a.labFlag()
	if plan.instanceType != "" {
		command += " --instance-type " + plan.instanceType
	}
	d.shell(command)
	if d.lab, err = a.up(ctx, upOptions{nodes: 2, zones: 2, instanceType: cmp.Or(plan.instanceType, "m5.large"), listen: defaultListen}); err != nil {
		return err
	}
	made := a.now()
	if !keep {
		defer func() {
			clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
			defer cancel()
			d.say("")
			_, derr := a.down(clean, a.home())
			err = errors.Join(err, derr)
		}()
	}
	if err := d.environment(); err != nil {
		return err
	}
	plan.prove(d, ctx)
	if ctx.Err() != nil {
		return fmt.Errorf("interrupted: %w", context.Cause(ctx))
	}

	failed := 0
	for _, p := range d.results {
		if !p.OK {
			failed++
		}
	}
	fmt.Fprintf(d.out, "\n%d facts shown, %d failed; lab made in %s, facts shown in %s\n", len(d.results), failed, seconds(made.Sub(began)), seconds(a.now().Sub(made)))
	if keep {
		fmt.Fprintf(d.out, "the lab is still up: underlay status%[1]s; underlay down%[1]s takes it down\n", a.labFlag())
	}
	if a.json() {
		if err := a.print(d.results, nil); err != nil {
			return err
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d proofs failed; look around with: KEEP=1 underlay %s%s, then underlay status and underlay logs", failed, len(d.results), plan.name, a.labFlag())
	}
	return nil
}

// environment puts our own programs first in the PATH of what is run.
func (d *demo) environment() error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find our own program: %w", err)
	}
	d.env = append(os.Environ(), "PATH="+filepath.Dir(self)+":"+os.Getenv("PATH"))
	return nil
}

func (d *demo) say(s string) {
	for _, line := range wrap(s, 100) {
		fmt.Fprintf(d.out, "%s\n", paint(line, strong, d.color))
	}
}

// wrap breaks a text between words into lines of width characters at most.
func wrap(s string, width int) []string {
	var lines []string
	line := ""
	for _, w := range strings.Fields(s) {
		if line != "" && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(w) > width {
			lines = append(lines, line)
			line = ""
		}
		if line != "" {
			line += " "
		}
		line += w
	}
	return append(lines, line)
}

func (d *demo) shell(cmd string) {
	for i, line := range strings.Split(cmd, "\n") {
		prompt := "$ "
		if i > 0 {
			prompt = "> "
		}
		fmt.Fprintf(d.out, "  %s%s\n", paint(prompt, dim, d.color), line)
	}
}

// sh runs a shell command and returns its output, both streams in one.
func (d *demo) sh(ctx context.Context, command string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, "bash", "-c", command)
	cmd.Env, cmd.Stdout, cmd.Stderr = d.env, &out, &out
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	return strings.TrimRight(out.String(), "\n"), err
}

// step does what is no proof but must be done; when it fails, that is a proof
// that failed, and it returns false.
func (d *demo) step(ctx context.Context, what string, do func() error) bool {
	if ctx.Err() != nil {
		return false
	}
	if err := do(); err != nil {
		d.results = append(d.results, proof{Fact: what, Why: err.Error()})
		fmt.Fprintf(d.out, "\n  %s\n", paint("✗ "+what+": "+err.Error(), bad, d.color))
		return false
	}
	return true
}

// fact runs command, shows it with its output, and holds the output against
// check, which returns why it proves nothing, or "". It returns the output.
func (d *demo) fact(ctx context.Context, fact, command string, check func(out string) string) string {
	if ctx.Err() != nil {
		return ""
	}
	fmt.Fprintf(d.out, "\n")
	d.say(fact)
	d.shell(command)
	out, err := d.sh(ctx, command)
	p := proof{Fact: fact, Command: command, Output: out}
	switch {
	case err != nil:
		p.Why = err.Error()
	default:
		p.Why = check(out)
	}
	p.OK = p.Why == ""
	for line := range strings.Lines(out) {
		line = strings.TrimRight(line, "\n")
		if d.comment != nil {
			line += "  " + paint(d.comment(line), dim, d.color)
		}
		fmt.Fprintf(d.out, "    %s\n", line)
	}
	if p.OK {
		fmt.Fprintf(d.out, "  %s\n", paint("✓ shown", good, d.color))
	} else {
		fmt.Fprintf(d.out, "  %s\n", paint("✗ "+p.Why, bad, d.color))
	}
	d.results = append(d.results, p)
	return out
}

// prove shows the facts.
func (d *demo) prove(ctx context.Context) {
	f := d.a.labFlag()
	var vm, db Outside
	for _, o := range d.lab.Lab.Outside {
		switch o.Name {
		case "vm-1":
			vm = o
		case "db-1":
			db = o
		}
	}
	node1, node2 := d.lab.Lab.Nodes[0].Name, d.lab.Lab.Nodes[1].Name

	d.fact(ctx, "A pod is set up in milliseconds, with an address of the VPC.",
		fmt.Sprintf("underlay run client --node %s%s\nunderlay run server --node %s%s -- underlay serve-tcp --server-name server --listen :8080\nunderlay run web --count 4%s", node1, f, node2, f, f),
		func(string) string {
			for _, name := range []string{"client", "server", "web-1", "web-4"} {
				ip, _ := d.pod(name)
				if !vpcCIDR.Contains(ip) {
					return fmt.Sprintf("pod %s has address %s, not of %s", name, ip, vpcCIDR)
				}
			}
			return ""
		})
	client, eni := d.pod("client")
	server, _ := d.pod("server")
	if !client.IsValid() || !server.IsValid() {
		return // said above
	}
	hello := func(name string, port int, ip netip.Addr) string {
		return fmt.Sprintf("underlay exec client%s -- bash -c 'cat < /dev/tcp/%s/%d'", f, ip, port)
	}
	saw := func(name string) func(string) string {
		want := fmt.Sprintf("%s: hello %s", name, client)
		return func(out string) string {
			if !strings.Contains(out, want) {
				return fmt.Sprintf("expected %q", want)
			}
			return ""
		}
	}

	d.fact(ctx, fmt.Sprintf("Pod to pod, from %s to %s, over the VPC.", node1, node2),
		fmt.Sprintf("underlay exec client%s -- ping -c 3 -i 0.2 %s", f, server), pinged(3))
	d.fact(ctx, "No NAT: the server sees the pod's own address, the one the pod sees itself.",
		hello("server", 8080, server)+fmt.Sprintf("\nunderlay exec client%s -- ip -4 -brief addr show eth0", f),
		func(out string) string {
			if why := saw("server")(out); why != "" {
				return why
			}
			if !strings.Contains(out, client.String()+"/32") {
				return "the pod itself does not have " + client.String()
			}
			return ""
		})
	d.fact(ctx, "Pod to a VM outside the cluster, and the VM to the pod.",
		hello("vm-1", ec2.LabVMPort, vm.IP)+fmt.Sprintf("\nunderlay node exec vm-1%s -- ping -c 2 -i 0.2 %s", f, client),
		func(out string) string {
			if why := saw("vm-1")(out); why != "" {
				return why
			}
			return pinged(2)(out)
		})
	d.fact(ctx, "Pod to a managed database, which no agent runs on: it sees the pod too.",
		hello("db-1", ec2.LabDatabasePort, db.IP), saw("db-1"))
	d.fact(ctx, "Nothing is encapsulated: a capture of all that leaves and enters the node's ENI.",
		d.capture(ctx, node1, eni, server), notEncapsulated(client, server))
	d.fact(ctx, "EC2 knows the pods' addresses: they are the ENIs' own.",
		fmt.Sprintf("eval \"$(underlay env%s)\"\naws ec2 describe-network-interfaces --output table --query \\\n 'NetworkInterfaces[].{eni:NetworkInterfaceId, of:Attachment.InstanceId||Description, addresses:join(`, `, PrivateIpAddresses[].PrivateIpAddress), prefixes:join(`, `, Ipv4Prefixes[].Ipv4Prefix||`[]`)}'", f),
		func(out string) string { return d.listed(out) })
	d.fact(ctx, "The network is the kernel's: kill the agent, no packet is lost; the next one knows every pod.",
		fmt.Sprintf("underlay exec client%[1]s -- ping -q -i 0.02 -c 60 %[2]s &\nunderlay node restart-agent %[3]s%[1]s; wait\nunderlay status%[1]s | head -n 5", f, server, node1),
		pinged(60))
	d.fact(ctx, "Set-up time per pod: CNI ADD, the plugin's process start included.",
		fmt.Sprintf("underlay run late --node %s%s > /dev/null; underlay pods%s", node1, f, f),
		func(out string) string {
			if strings.Count(out, " ms") != 7 {
				return "not every pod has its set-up time"
			}
			return ""
		})
}

// pod returns the address and the ENI of a pod.
func (d *demo) pod(name string) (netip.Addr, string) {
	p, err := d.a.home().loadPod(name)
	if err != nil {
		return netip.Addr{}, ""
	}
	ip, err := netip.ParseAddr(p.Pod.IP)
	if err != nil {
		return netip.Addr{}, p.Pod.ENI
	}
	return ip, p.Pod.ENI
}

// capture is a command that captures on the link of an ENI while a pod pings
// through it. Nothing is filtered out but ARP and the node's own talk with EC2
// and IMDS, which would only lengthen what is shown.
func (d *demo) capture(ctx context.Context, node, eni string, to netip.Addr) string {
	link := "eth0"
	s := d.a.collect(ctx, d.a.home(), d.lab)
	for _, e := range s.Interfaces {
		if e.ID == eni && e.IfName != "" {
			link = e.IfName
		}
	}
	f := d.a.labFlag()
	return fmt.Sprintf("underlay exec client%[1]s -- ping -q -i 0.2 -c 30 %[2]s > /dev/null &\nunderlay node exec %[3]s%[1]s -- timeout 10 tcpdump -l -nn -e -i %[4]s -c 4 'ip and not net 169.254.0.0/16'; kill $!", f, to, node, link)
}

var captured = regexp.MustCompile(`ethertype IPv4 \(0x0800\), length \d+: (\d+(?:\.\d+){3}) > (\d+(?:\.\d+){3}): ICMP echo (request|reply)`)

// notEncapsulated wants, in a capture, echo requests and replies between the
// two addresses directly in Ethernet frames, and no tunnel.
func notEncapsulated(a, b netip.Addr) func(string) string {
	return func(out string) string {
		requests, replies := 0, 0
		for line := range strings.Lines(out) {
			for _, tunnel := range []string{"VXLAN", "Geneve", "GRE", "IPIP", "IP-IP", ".8472", ".4789", ".6081", "ESP(", "MPLS", "802.1Q"} {
				if strings.Contains(line, tunnel) {
					return "a tunnel: " + strings.TrimSpace(line)
				}
			}
			m := captured.FindStringSubmatch(line)
			switch {
			case m == nil:
			case m[1] == a.String() && m[2] == b.String() && m[3] == "request":
				requests++
			case m[1] == b.String() && m[2] == a.String() && m[3] == "reply":
				replies++
			}
		}
		if requests == 0 || replies == 0 {
			return fmt.Sprintf("%d echo requests and %d replies between %s and %s in the capture", requests, replies, a, b)
		}
		return ""
	}
}

func pinged(n int) func(string) string {
	return func(out string) string {
		if !strings.Contains(out, fmt.Sprintf("%d received, 0%% packet loss", n)) {
			return "a packet was lost"
		}
		return ""
	}
}

// listed wants every pod's address in what the AWS CLI printed: as an address
// of an ENI, or within a prefix of one.
func (d *demo) listed(out string) string {
	var addrs []netip.Addr
	var prefixes []netip.Prefix
	for _, word := range strings.FieldsFunc(out, func(r rune) bool { return strings.ContainsRune(" ,|\n\t\"", r) }) {
		if a, err := netip.ParseAddr(word); err == nil {
			addrs = append(addrs, a)
		} else if p, err := netip.ParsePrefix(word); err == nil {
			prefixes = append(prefixes, p)
		}
	}
	pods, err := d.a.home().loadPods()
	if err != nil {
		return err.Error()
	}
	for _, p := range pods {
		ip, err := netip.ParseAddr(p.Pod.IP)
		if err != nil {
			return err.Error()
		}
		found := false
		for _, a := range addrs {
			found = found || a == ip
		}
		for _, x := range prefixes {
			found = found || x.Contains(ip)
		}
		if !found {
			return fmt.Sprintf("the address of pod %s, %s, is not listed", p.Pod.Name, ip)
		}
	}
	if len(pods) == 0 {
		return "there are no pods"
	}
	return ""
}
