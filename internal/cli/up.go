package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/cli/cluster"
	"github.com/underlay-cni/underlay/internal/cli/kubebuild"
	"github.com/underlay-cni/underlay/internal/ec2"
	"github.com/underlay-cni/underlay/internal/vpc"
)

const (
	defaultListen = "127.0.0.1:7424"
	region        = "us-east-1"
)

// The plan of a lab's VPC: a private subnet in each zone, roomy enough for the
// largest instance types (737 pods). The region of a lab has three zones.
var (
	vpcCIDR     = netip.MustParsePrefix("10.0.0.0/16")
	subnetCIDRs = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/20"), netip.MustParsePrefix("10.0.16.0/20"), netip.MustParsePrefix("10.0.32.0/20")}
	publicCIDR  = netip.MustParsePrefix("10.0.48.0/24") // with --internet
)

type upOptions struct {
	nodes          int
	zones          int
	instanceType   string
	prefixes       bool
	agentArgs      []string
	agentEnv       []string
	iamPolicy      string
	internet       bool
	listen         string
	listenExplicit bool
	kube           kubernetesOptions
}

func (a *App) upCommand() *cobra.Command {
	var o upOptions
	c := &cobra.Command{
		Use:   "up",
		Short: "Make a lab: a VPC, nodes with an agent each, a VM and a database",
		Long: `Makes a lab: vpcd with a VPC 10.0.0.0/16 and private subnets in --zones zones; nodes,
spread over the zones, each with an agent and the CNI plugin; and outside the
cluster a VM (vm-1) and a managed database (db-1), each with a small TCP server.

With --internet there are an internet gateway and, in a public subnet, a NAT
gateway, to which the private subnets have a default route. The internet is the
network namespace ul-NAME-internet; 203.0.113.10 and .20 there answer HTTP with
the address that they see, and echo on port 7.

With --kubernetes the nodes are those of a Kubernetes: containerd, kubelet and
kube-proxy on each, in namespaces of their own, a control plane on an instance
beside them, and Underlay installed by its Helm chart.

A failed or interrupted up takes down again what it has made.`,
		Example: `  underlay up
  underlay up --nodes 3 --instance-type m5.4xlarge
  underlay up --prefixes        # an m5.large then holds 432 pod addresses
  underlay up --iam-policy docs/reference/iam-policy.json   # agents may do this much
  underlay up --internet        # a NAT gateway; then: underlay exec POD -- curl 203.0.113.10
  underlay up --name other -o json
  underlay up --kubernetes      # then: eval "$(underlay env)"; kubectl get nodes`,
		Args:        cobra.NoArgs,
		Annotations: rootBecause("makes network namespaces and loads BPF programs"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.listenExplicit = cmd.Flags().Changed("listen")
			for _, flag := range []string{"kube-proxy", "cni"} {
				if cmd.Flags().Changed(flag) && !o.kube.on {
					return fmt.Errorf("--%s is for a lab with --kubernetes", flag)
				}
			}
			if o.kube.on && len(o.agentArgs) > 0 {
				return errors.New("--agent-arg is for labs without --kubernetes, where the chart's values are what sets agents up; afterwards: helm upgrade underlay --reuse-values --set …")
			}
			f, err := a.up(cmd.Context(), o)
			if err != nil {
				return err
			}
			return a.print(f.Lab, func(w io.Writer) { a.printUp(w, f) })
		},
	}
	c.Flags().IntVar(&o.nodes, "nodes", 2, "how many nodes")
	c.Flags().IntVar(&o.zones, "zones", 2, fmt.Sprintf("availability zones with a subnet each, 1 to %d", len(subnetCIDRs)))
	c.Flags().StringVar(&o.instanceType, "instance-type", "m5.large", "EC2 instance type of the nodes; bounds ENIs and addresses")
	c.Flags().BoolVar(&o.prefixes, "prefixes", false, "the agents take addresses as /28 prefixes, sixteen at a time (Nitro types)")
	c.Flags().StringArrayVar(&o.agentArgs, "agent-arg", nil, "a further `flag` for the agents, e.g. --agent-arg=--imds=allow; may be repeated, see underlay-agent --help")
	c.Flags().StringArrayVar(&o.agentEnv, "agent-env", nil, "a `NAME=VALUE` for the agents, e.g. WARM_IP_TARGET=5; may be repeated")
	c.Flags().StringVar(&o.iamPolicy, "iam-policy", "", "a `file` with the IAM policy of the nodes: what it does not allow the agents, EC2 refuses them; without one they may do everything")
	c.Flags().BoolVar(&o.internet, "internet", false, "a way to the internet (a network namespace that answers) for nodes and pods")
	c.Flags().StringVar(&o.listen, "listen", defaultListen, "where vpcd listens; another port when this one is taken, unless the flag is given")
	c.Flags().BoolVar(&o.kube.on, "kubernetes", false, "a Kubernetes on the nodes, with Underlay as its CNI; the first time builds it")
	c.Flags().StringVar(&o.kube.proxy, "kube-proxy", cluster.ProxyModes[0], "with --kubernetes: the mode of kube-proxy, nftables or iptables")
	c.Flags().StringVar(&o.kube.cni, "cni", cluster.CNIs[0], "with --kubernetes: underlay, none, or ptp (the CNI project's, to compare with)")
	_ = c.Flags().MarkHidden("cni")
	_ = c.RegisterFlagCompletionFunc("kube-proxy", cobra.FixedCompletions(cluster.ProxyModes, noFiles))
	_ = c.RegisterFlagCompletionFunc("cni", cobra.FixedCompletions(cluster.CNIs, noFiles))
	_ = c.RegisterFlagCompletionFunc("instance-type", func(_ *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
		var types []string
		for _, t := range vpc.InstanceTypes() {
			if strings.HasPrefix(t, prefix) {
				types = append(types, t)
			}
		}
		return types, cobra.ShellCompDirectiveNoFileComp
	})
	return c
}

// up makes the lab, whole or not at all.
func (a *App) up(ctx context.Context, o upOptions) (*labFile, error) {
	if o.nodes < 1 || o.nodes > 200 {
		return nil, fmt.Errorf("--nodes %d: give a number from 1 to 200", o.nodes)
	}
	if o.zones < 1 || o.zones > len(subnetCIDRs) {
		return nil, fmt.Errorf("--zones %d: give a number from 1 to %d", o.zones, len(subnetCIDRs))
	}
	if _, ok := vpc.LimitsOf(o.instanceType); !ok {
		return nil, fmt.Errorf("--instance-type %s: EC2 has no such type; m5.large is one", o.instanceType)
	}
	if err := o.kube.check(); err != nil {
		return nil, err
	}
	var policy []byte
	if o.iamPolicy != "" {
		var err error
		if policy, err = os.ReadFile(o.iamPolicy); err != nil {
			return nil, fmt.Errorf("--iam-policy: %w; docs/reference/iam-policy.json is what the agents need", err)
		}
	}
	if err := checkListen(o.listen); err != nil {
		return nil, err
	}
	for _, e := range o.agentEnv {
		if name, _, ok := strings.Cut(e, "="); !ok || name == "" {
			return nil, fmt.Errorf("--agent-env %s: give NAME=VALUE", e)
		}
	}
	b := &builder{home: a.home(), o: o, policy: policy, p: newProgress(a.Err, a.now), now: a.now}
	var err error
	for name, dst := range map[string]*string{"vpcd": &b.vpcd, "underlay-agent": &b.agent, "underlay-cni": &b.cni} {
		if *dst, err = program(name); err != nil {
			return nil, err
		}
	}
	if b.self, err = os.Executable(); err != nil {
		return nil, fmt.Errorf("find our own program: %w", err)
	}

	if o.kube.on {
		if err := a.findKubernetes(ctx, b); err != nil {
			return nil, err
		}
	}

	lctx, cancel := context.WithTimeoutCause(ctx, time.Second, errors.New("it did not end within a second"))
	defer cancel()
	l, err := b.home.lockLab(lctx, true)
	if err != nil {
		return nil, err
	}
	remove := ""
	defer func() { l.release(remove) }()
	if err := b.home.checkAbsent(); err != nil {
		return nil, err
	}

	if err := b.build(ctx); err != nil {
		b.p.broken()
		if ctx.Err() != nil {
			err = fmt.Errorf("interrupted (%w)", err)
		}
		fmt.Fprintf(a.Err, "  taking down what was made of lab %s\n", a.lab)
		if b.log != "" {
			fmt.Fprintf(a.Err, "  %s\n", lastLines(b.log, 15))
		}
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		left := b.home.takeDown(clean)
		if left == nil {
			remove = b.home.lockFile()
		}
		return nil, errors.Join(fmt.Errorf("make lab %s: %w", a.lab, err), left)
	}
	return &b.f, nil
}

// checkAbsent returns an error that says what to do when anything of the lab
// is there.
func (h home) checkAbsent() error {
	flag := ""
	if h.name != defaultLab {
		flag = " --name " + h.name
	}
	f, err := h.load()
	switch {
	case err == nil && f.State == stateUp:
		return fmt.Errorf("lab %s is already up (at %s); take it down first with: underlay down%s", h.name, f.Lab.Endpoint, flag)
	case err == nil || !errors.Is(err, errNoLab) || h.found():
		return fmt.Errorf("lab %s is half there, from an up that was cut off; clear it away with: underlay down%s", h.name, flag)
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// builder makes one lab.
type builder struct {
	home   home
	o      upOptions
	policy []byte // of the nodes; nil: none
	p      *progress
	now    func() time.Time

	vpcd, agent, cni, self string // paths of programs

	artifacts *kubebuild.Artifacts // with Kubernetes
	source    string
	programs  cluster.Programs
	zones     map[string]string // of instances, by ID

	f   labFile
	log string // the log that explains a failure of the present step
}

func (b *builder) build(ctx context.Context) error {
	h := b.home
	listen, err := b.o.listen, error(nil)
	fixed := b.o.listenExplicit && !strings.HasSuffix(listen, ":0")
	if fixed {
		err = checkFree(listen)
	} else {
		listen, err = freeListen(listen)
	}
	if err != nil {
		return err
	}
	b.f = labFile{
		Version: labFileVersion, State: stateMaking, Created: b.now(), Region: region, InstanceType: b.o.instanceType, Prefixes: b.o.prefixes, AgentArgs: b.o.agentArgs, AgentEnv: b.o.agentEnv,
		Lab: Lab{Name: h.name, Endpoint: "http://" + listen, Nodes: []Node{}, Outside: []Outside{}},
	}
	for _, dir := range []string{h.dir(), h.bpf(), h.vpcd(), h.pods(), filepath.Join(h.dir(), "nodes"), filepath.Join(h.dir(), "outside")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("make %s: %w", dir, err)
		}
	}
	if err := h.save(&b.f); err != nil {
		return err
	}
	// As DHCP would say, for what is run inside.
	resolv := fmt.Sprintf("nameserver %s\nsearch %s\n", vpc.Resolver(vpcCIDR), vpc.PrivateDomain(region))
	if err := writeFile(h.resolvConf(), []byte(resolv), 0o644); err != nil {
		return err
	}
	if b.policy != nil {
		// A copy: what is changed later does not change a lab that runs.
		if err := writeFile(h.iamPolicy(), b.policy, 0o644); err != nil {
			return err
		}
	}
	if err := unix.Mount("bpffs", h.bpf(), "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mount a bpffs on %s: %w; the kernel must have BPF, and a container must be privileged", h.bpf(), err)
	}

	b.log = h.vpcdLog()
	done := b.p.step("vpcd: EC2 API, IMDS and fabric")
	err = startVPCD(ctx, h, b.vpcd, listen)
	for range 3 { // somebody was quicker: another lab that starts now
		if err == nil || fixed || ctx.Err() != nil || !strings.Contains(lastLines(b.log, 3), "address already in use") {
			break
		}
		if listen, err = freeListen("127.0.0.1:0"); err == nil {
			b.f.Lab.Endpoint = "http://" + listen
			err = startVPCD(ctx, h, b.vpcd, listen)
		}
	}
	if err != nil {
		return err
	}
	done("vpcd on " + b.f.Lab.Endpoint)

	done = b.p.step("VPC, subnets, security groups, instances")
	if err := b.machines(ctx); err != nil {
		return err
	}
	b.log = ""
	done(fmt.Sprintf("%s: %s, %d nodes (%s), vm-1, db-1", b.f.Lab.VPCID, vpcCIDR, len(b.f.Lab.Nodes), b.o.instanceType))

	if !b.o.kube.on || b.o.kube.cni == cluster.CNIUnderlay {
		b.log = h.pollerLog()
		if err := startPoller(ctx, h, &b.f, b.agent); err != nil {
			return err
		}
		b.log = ""
	}
	if b.o.kube.on {
		if err := b.kubernetes(ctx); err != nil {
			return err
		}
	} else {
		done = b.p.step("node agents")
		if err := b.agents(ctx); err != nil {
			return err
		}
		done("node agents serve")
	}

	if err := b.servers(ctx); err != nil {
		return err
	}
	if err := writeAWSConfig(h, &b.f); err != nil {
		return err
	}
	b.f.State = stateUp
	return h.save(&b.f)
}

// machines makes the VPC and all that has an address in it before there are
// pods.
func (b *builder) machines(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, errors.New("the instances were not running within two minutes"))
	defer cancel()
	api := ec2.NewLab(b.f.Lab.Endpoint, region)
	net, err := api.Network(ctx, "underlay-"+b.home.name, vpcCIDR, subnetCIDRs[:b.o.zones])
	if err != nil {
		return err
	}
	b.f.Lab.VPCID = string(net.VPC)
	if b.o.internet {
		if _, err := api.Internet(ctx, "underlay-"+b.home.name, net, publicCIDR); err != nil {
			return err
		}
	}

	var ids []vpc.InstanceID
	for i := range b.o.nodes {
		li, err := api.Launch(ctx, fmt.Sprintf("node-%d", i+1), b.o.instanceType, net.Subnets[i%len(net.Subnets)].ID, net.Nodes)
		if err != nil {
			return err
		}
		ids = append(ids, li.ID)
	}
	vm, err := api.Launch(ctx, "vm-1", "t3.medium", net.Subnets[0].ID, net.VMs)
	if err != nil {
		return err
	}
	all := append(slices.Clone(ids), vm.ID)
	if b.o.kube.on {
		cp, err := api.Launch(ctx, cluster.ControlPlane, "t3.medium", net.Subnets[0].ID, net.Nodes)
		if err != nil {
			return err
		}
		all = append(all, cp.ID)
	}
	running, err := api.AwaitRunning(ctx, all)
	if err != nil {
		return err
	}
	// vpcd says that an instance runs when its namespace stands; where that
	// is, only the admin endpoint tells.
	netns := map[string]string{}
	if err := poll(ctx, 20*time.Millisecond, func() (bool, error) {
		all, err := newAdmin(b.f.Lab.Endpoint).instances(ctx)
		for _, i := range all {
			if _, ok := netnsID(i.Netns); ok {
				netns[i.InstanceID] = i.Netns
			}
		}
		return len(netns) >= len(running), err
	}); err != nil {
		return fmt.Errorf("wait for the instances' network namespaces: %w", err)
	}
	b.zones = map[string]string{}
	for _, i := range running[:len(ids)] {
		b.zones[string(i.ID)] = i.Zone
		dir := b.home.node(i.Name)
		b.f.Lab.Nodes = append(b.f.Lab.Nodes, Node{
			Name: i.Name, InstanceID: string(i.ID), Netns: netns[string(i.ID)], IP: i.IP, SubnetID: string(i.Subnet),
			AgentSocket: filepath.Join(dir, "agent.sock"),
			CNIConfDir:  filepath.Join(dir, "cni", "net.d"), CNIBinDir: filepath.Join(dir, "cni", "bin"),
		})
	}
	if b.o.kube.on {
		b.kubernetesNodes(running[len(ids)+1], netns)
	}
	vm = running[len(ids)]
	db, err := newAdmin(b.f.Lab.Endpoint).createManagedService(ctx, serviceSpec{
		name: "db-1", kind: kindDatabase, subnet: string(net.Subnets[len(net.Subnets)-1].ID), groups: []string{string(net.Database)},
	})
	if err != nil {
		return err
	}
	b.f.Lab.Outside = []Outside{
		{Name: "db-1", Netns: db.Netns, IP: db.PrivateIPAddress},
		{Name: "vm-1", InstanceID: string(vm.ID), Netns: netns[string(vm.ID)], IP: vm.IP},
	}
	return b.home.save(&b.f)
}

// agents writes what a runtime finds on each node, and starts the agents.
func (b *builder) agents(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	for _, n := range b.f.Lab.Nodes {
		if err := writeCNI(n, b.cni); err != nil {
			return err
		}
		g.Go(func() error {
			if err := startAgent(gctx, b.home, &b.f, n, b.agent); err != nil {
				return &nodeError{log: b.home.agentLog(n.Name), err: fmt.Errorf("agent of %s: %w", n.Name, err)}
			}
			return nil
		})
	}
	err := g.Wait()
	var ne *nodeError
	if errors.As(err, &ne) {
		b.log = ne.log
	}
	return err
}

// nodeError is an error that a node's log explains.
type nodeError struct {
	log string
	err error
}

func (e *nodeError) Error() string { return e.err.Error() }
func (e *nodeError) Unwrap() error { return e.err }

// servers starts what answers on the outside machines.
func (b *builder) servers(ctx context.Context) error {
	ports := map[string]int{"db-1": ec2.LabDatabasePort, "vm-1": ec2.LabVMPort}
	for _, o := range b.f.Lab.Outside {
		b.log = b.home.outsideLog(o.Name)
		s, err := b.home.startServer(ctx, o, serviceSpec{port: ports[o.Name]})
		if s.Proc.PID > 0 {
			b.f.Servers = append(b.f.Servers, s)
		}
		if err != nil {
			return err
		}
		b.log = ""
	}
	return nil
}

func (a *App) printUp(w io.Writer, f *labFile) {
	color := colored(w)
	fmt.Fprintf(w, "lab %s is up in %s, EC2 API at %s\n\n", paint(f.Lab.Name, strong, color), f.Lab.VPCID, f.Lab.Endpoint)
	t := table{head: []string{"MACHINE", "ADDRESS", "INSTANCE", "WHAT"}}
	for _, n := range f.Lab.Nodes {
		t.row(text(n.Name), text(n.IP.String()), text(n.InstanceID), text("node, "+f.InstanceType))
	}
	if k := f.Lab.Kubernetes; k != nil {
		t.row(text(k.ControlPlane.Name), text(k.ControlPlane.IP.String()), text(k.ControlPlane.InstanceID), text("Kubernetes "+k.Version))
	}
	for _, o := range f.Lab.Outside {
		what := "VM outside the cluster"
		if o.InstanceID == "" {
			what = "managed database"
		}
		for _, s := range f.Servers {
			if s.On == o.Name {
				what += fmt.Sprintf(", answers on port %d", s.Port)
			}
		}
		t.row(text(o.Name), text(o.IP.String()), text(o.InstanceID), text(what))
	}
	t.write(w, "  ", color)
	flag := a.labFlag()
	if f.Lab.Kubernetes != nil {
		fmt.Fprintf(w, `
next:
  eval "$(underlay env%[1]s)"          then: kubectl get pods -A -o wide; aws ec2 describe-network-interfaces
  kubectl create deployment web --replicas 3 --image registry.k8s.io/e2e-test-images/agnhost:2.66.1 -- /agnhost netexec
  underlay status%[1]s                 what there is
  underlay node exec node-1%[1]s -- ip rule
  underlay node kill node-1%[1]s       a power failure; then: underlay node boot node-1%[1]s
  underlay down%[1]s                   leaves nothing
`, flag)
		return
	}
	fmt.Fprintf(w, `
next:
  underlay run web --count 3%[1]s      pods, by CNI
  underlay exec web-1%[1]s -- ip addr  inside a pod
  eval "$(underlay env%[1]s)"          then: aws ec2 describe-network-interfaces
  underlay status%[1]s                 what there is
  underlay down%[1]s                   leaves nothing
`, flag)
}

// cleanEnv is the environment of a background process: nothing of the person's
// shell, whose AWS profile or proxy must not reach a lab.
func cleanEnv(more ...string) []string {
	env := []string{"PATH=" + os.Getenv("PATH"), "LANG=C.UTF-8"}
	for _, k := range []string{"GOTRACEBACK", "GODEBUG", "GOCOVERDIR"} {
		if v, ok := os.LookupEnv(k); ok {
			env = append(env, k+"="+v)
		}
	}
	return append(env, more...)
}

// checkListen reports why address cannot be what vpcd listens on.
func checkListen(address string) error {
	if _, _, err := net.SplitHostPort(address); err != nil {
		return fmt.Errorf("--listen %s: %w; give HOST:PORT, such as %s", address, err, defaultListen)
	}
	return nil
}
