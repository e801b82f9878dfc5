package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/cli/cluster"
	"github.com/underlay-cni/underlay/internal/cli/kubebuild"
	"github.com/underlay-cni/underlay/internal/ec2"
	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/plan"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// Kubernetes is what up --kubernetes made besides the rest of a lab.
type Kubernetes struct {
	Version      string  `json:"version"`       // "v1.37.2"
	Kubeconfig   string  `json:"kubeconfig"`    // by a port of loopback
	InVPC        string  `json:"kubeconfigVPC"` // for use on a machine of the VPC
	Bin          string  `json:"bin"`           // kubectl, helm and all other programs that were built
	Source       string  `json:"source"`        // the repository that they were built of
	CNI          string  `json:"cni"`
	Proxy        string  `json:"kubeProxy"`
	ControlPlane Machine `json:"controlPlane"`
}

// Machine is an instance that is no node: the control plane's.
type Machine struct {
	Name       string     `json:"name"`
	InstanceID string     `json:"instanceId"`
	Netns      string     `json:"netns"` // a path
	IP         netip.Addr `json:"ip"`
	Init       int        `json:"init"` // its first process; 0 is off
}

// kubernetesOptions are the flags of up that are about Kubernetes.
type kubernetesOptions struct {
	on    bool
	proxy string
	cni   string
}

func (o kubernetesOptions) check() error {
	if !o.on {
		return nil // what its flags say concerns nobody
	}
	if !slices.Contains(cluster.ProxyModes, o.proxy) {
		return fmt.Errorf("--kube-proxy %s is not known; use %s", o.proxy, strings.Join(cluster.ProxyModes, " or "))
	}
	if !slices.Contains(cluster.CNIs, o.cni) {
		return fmt.Errorf("--cni %s is not known; use one of %s", o.cni, strings.Join(cluster.CNIs, ", "))
	}
	return nil
}

// data is where a lab with Kubernetes keeps what is large: on a disk, which
// /run often is not.
func (h home) data() string {
	if h.run == runDir {
		return filepath.Join("/var/lib/underlay", h.name)
	}
	return filepath.Join(h.dir(), "data")
}

func (h home) initPID(machine string) string { return filepath.Join(h.node(machine), "init.pid") }
func (h home) forwardPID() string            { return filepath.Join(h.dir(), "kubernetes", "forward.pid") }
func (h home) forwardFile() string           { return filepath.Join(h.dir(), "kubernetes", "forward.json") }
func (h home) forwardLog() string            { return filepath.Join(h.dir(), "kubernetes", "forward.log") }

// forward is what the forwarder is told.
type forward struct {
	Listen string `json:"listen"`
	Netns  string `json:"netns"`
	To     string `json:"to"`
}

// findKubernetes finds, or builds, what the cluster will run, before anything
// of the lab is made: it may take long, and it may be missing.
func (a *App) findKubernetes(ctx context.Context, b *builder) error {
	var err error
	if b.programs, err = cluster.FindPrograms(); err != nil {
		return err
	}
	if b.source, err = kubebuild.FindSource(""); err != nil {
		return err
	}
	if c := chart(b.source); b.o.kube.cni == cluster.CNIUnderlay && !exists(c) {
		return fmt.Errorf("find Underlay's Helm chart: %s is not there; is the checkout whole?", c)
	}
	b.artifacts, err = a.ensureKubernetes(ctx, kubebuild.Options{Source: b.source, Want: kubernetesWants(b.o.kube.cni)})
	return err
}

// kubernetesWants names what a cluster takes of what can be built.
func kubernetesWants(cni string) []string {
	if cni == cluster.CNIUnderlay {
		return kubebuild.Default()
	}
	// To build Underlay's image would be for nothing.
	return slices.DeleteFunc(kubebuild.Default(), func(n string) bool { return n == kubebuild.Underlay })
}

// kubernetesNodes notes where the machines of the cluster are.
func (b *builder) kubernetesNodes(cp ec2.LabInstance, netns map[string]string) {
	h := b.home
	b.f.Lab.Kubernetes = &Kubernetes{
		Version: b.artifacts.Version, Kubeconfig: cluster.Kubeconfig(h.dir()), InVPC: cluster.VPCKubeconfig(h.dir()),
		Bin: b.artifacts.Bin, Source: b.source, CNI: b.o.kube.cni, Proxy: b.o.kube.proxy,
		ControlPlane: Machine{Name: cp.Name, InstanceID: string(cp.ID), Netns: netns[string(cp.ID)], IP: cp.IP},
	}
	for i := range b.f.Lab.Nodes {
		n := &b.f.Lab.Nodes[i]
		data := cluster.NodeData(h.data(), n.Name)
		n.AgentSocket = filepath.Join(cluster.AgentDir(h.dir(), n.Name), "agent.sock")
		n.CNIConfDir = filepath.Join(data["/etc/cni"], "net.d")
		n.CNIBinDir = filepath.Join(data["/opt/cni"], "bin")
	}
}

// kubeBuilder makes the Kubernetes of a lab whose instances run.
type kubeBuilder struct {
	*builder
	w *machineWatch
	l net.Listener // of the forwarder
	c cluster.Config
	k *Kubernetes
}

// kubernetes starts the cluster and waits until it can be used.
func (b *builder) kubernetes(ctx context.Context) error {
	k := &kubeBuilder{builder: b, w: &machineWatch{home: b.home, machines: []string{cluster.ControlPlane}}, k: b.f.Lab.Kubernetes}
	for _, n := range b.f.Lab.Nodes {
		k.w.machines = append(k.w.machines, n.Name)
	}
	done := b.p.step("Kubernetes control plane")
	if err := k.prepare(ctx); err != nil {
		return err
	}
	defer k.l.Close() // the forwarder has it then
	if err := k.start(); err != nil {
		return k.explain(err)
	}
	if err := k.awaitAPI(ctx); err != nil {
		return k.explain(err)
	}
	done(fmt.Sprintf("Kubernetes %s: the control plane serves", k.k.Version))

	done = b.p.step("cluster DNS")
	if err := k.install(ctx); err != nil {
		return k.explain(err)
	}
	done("CoreDNS and " + k.cniName() + " installed")

	done = b.p.step("nodes: containerd, kubelet, kube-proxy")
	if err := k.awaitNodes(ctx); err != nil {
		return k.explain(err)
	}
	if k.o.kube.cni == cluster.CNINone {
		done(fmt.Sprintf("%d nodes registered; they become Ready with a CNI", len(k.c.Nodes)))
		return nil
	}
	done(fmt.Sprintf("%d nodes Ready", len(k.c.Nodes)))

	done = b.p.step("cluster DNS")
	if err := k.awaitDNS(ctx); err != nil {
		return k.explain(err)
	}
	done("cluster DNS answers")
	return nil
}

func (k *kubeBuilder) cniName() string {
	switch k.o.kube.cni {
	case cluster.CNIUnderlay:
		return "Underlay"
	case cluster.CNINone:
		return "no CNI"
	}
	return k.o.kube.cni
}

// prepare writes all that the machines read.
func (k *kubeBuilder) prepare(ctx context.Context) error {
	limits, ok := vpc.LimitsOf(k.o.instanceType)
	if !ok {
		return fmt.Errorf("--instance-type %s: EC2 has no such type", k.o.instanceType)
	}
	pods, err := plan.PodsOf(limits, k.o.prefixes)
	if err != nil {
		return err
	}
	// It is listened on from now on, so that no one else gets the port.
	if k.l, err = nl.Listen("127.0.0.1:0"); err != nil {
		return fmt.Errorf("listen for kubectl: %w", err)
	}
	cp := k.k.ControlPlane
	k.c = cluster.Config{
		Lab: k.home.name, Dir: k.home.dir(), Data: k.home.data(), Artifacts: k.artifacts, Programs: k.programs,
		Proxy: k.o.kube.proxy, CNI: k.o.kube.cni, MaxPods: pods.EKS, LocalPort: k.l.Addr().(*net.TCPAddr).Port,
		Resolver: vpc.Resolver(vpcCIDR), Domain: vpc.PrivateDomain(region),
		ControlPlane: cluster.Machine{Name: cp.Name, InstanceID: cp.InstanceID, IP: cp.IP, Region: region},
	}
	api := ec2.NewLab(k.f.Lab.Endpoint, region)
	for _, n := range k.f.Lab.Nodes {
		m := cluster.Machine{Name: n.Name, InstanceID: n.InstanceID, Type: k.o.instanceType, Zone: k.zones[n.InstanceID], Region: region, IP: n.IP}
		if k.o.kube.cni == cluster.CNIPtp {
			if m.Prefixes, err = api.DelegatePrefixes(ctx, vpc.InstanceID(n.InstanceID), (pods.EKS+cluster.PtpPodsPerPrefix-1)/cluster.PtpPodsPerPrefix); err != nil {
				return err
			}
		}
		k.c.Nodes = append(k.c.Nodes, m)
		for _, dir := range cluster.NodeData(k.c.Data, n.Name) {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return fmt.Errorf("make %s: %w", dir, err)
			}
		}
		if err := os.MkdirAll(cluster.AgentDir(k.c.Dir, n.Name), 0o755); err != nil {
			return fmt.Errorf("make the agent's directory: %w", err)
		}
		if err := cluster.InstallPlugins(n.CNIBinDir); err != nil {
			return err
		}
	}
	if err := k.c.Write(k.now()); err != nil {
		return err
	}
	return writeJSON(k.home.forwardFile(), forward{
		Listen: k.l.Addr().String(), Netns: cp.Netns, To: netip.AddrPortFrom(cp.IP, cluster.APIPort).String(),
	})
}

// start starts the first process of every machine, and the forwarder.
func (k *kubeBuilder) start() error {
	for i := range k.f.Lab.Nodes {
		n := &k.f.Lab.Nodes[i]
		var err error
		if n.Init, err = startMachine(k.home, k.self, n.Name, n.Netns); err != nil {
			return err
		}
	}
	cp := &k.k.ControlPlane
	var err error
	if cp.Init, err = startMachine(k.home, k.self, cp.Name, cp.Netns); err != nil {
		return err
	}
	if err := startForward(k.home, k.self, k.l); err != nil {
		return err
	}
	if k.w.api, err = cluster.NewAPI(k.k.Kubeconfig); err != nil {
		return err
	}
	return k.home.save(&k.f)
}

// startForward starts the forwarder, on a listener that is open already or,
// when l is nil, where it was before.
func startForward(h home, self string, l net.Listener) error {
	cmd := newCommand(self, "forward", "--config", h.forwardFile())
	cmd.Env = cleanEnv()
	if t, ok := l.(*net.TCPListener); ok {
		f, err := t.File()
		if err != nil {
			return fmt.Errorf("hand the listener to the forwarder: %w", err)
		}
		defer f.Close()
		cmd.Args = append(cmd.Args, "--inherit")
		cmd.ExtraFiles = []*os.File{f}
	}
	p, _, err := background(cmd, "", h.forwardLog())
	if err != nil {
		return err
	}
	return writeJSON(h.forwardPID(), p)
}

// startMachine starts the first process of a machine and returns its pid.
func startMachine(h home, self, name, netns string) (int, error) {
	if err := cluster.MakeCgroups(h.name, name); err != nil {
		return 0, err
	}
	// What the last life of the machine said of itself is over.
	if err := os.Remove(filepath.Join(h.node(name), "state.json")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, fmt.Errorf("start %s: %w", name, err)
	}
	cmd := newCommand(self, "node-init", "--home", h.node(name))
	cmd.Env = append(cleanEnv(), "HOME=/root")
	for i, e := range cmd.Env {
		if strings.HasPrefix(e, "PATH=") {
			cmd.Env[i] = "PATH=" + cluster.Path
		}
	}
	cmd.Dir = "/"
	cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: cluster.Cloneflags}
	p, _, err := background(cmd, netns, cluster.InitLog(h.dir(), name))
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", name, err)
	}
	return p.PID, writeJSON(h.initPID(name), p)
}

// awaitAPI waits for the API server, and for the controller manager behind it.
func (k *kubeBuilder) awaitAPI(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 3*time.Minute, errors.New("the API server was not ready within three minutes"))
	defer cancel()
	return k.w.await(ctx, func() error {
		if err := k.w.api.Ready(ctx); err != nil {
			return err
		}
		return k.w.api.AccountReady(ctx)
	})
}

// install applies what runs in the cluster and belongs to it.
func (k *kubeBuilder) install(ctx context.Context) error {
	dns, err := k.c.CoreDNS()
	if err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return k.tool(gctx, dns, "kubectl", "apply", "--server-side", "-f", "-")
	})
	if k.o.kube.cni == cluster.CNIUnderlay {
		g.Go(func() error { return k.helm(gctx) })
	}
	return g.Wait()
}

// chart is Underlay's Helm chart in a repository.
func chart(source string) string { return filepath.Join(source, "deploy", "helm", "underlay") }

// helm installs Underlay as its users do.
func (k *kubeBuilder) helm(ctx context.Context) error {
	image, ok := k.artifacts.Image(kubebuild.Underlay)
	if !ok {
		return errors.New("install Underlay: its image was not built")
	}
	values := filepath.Join(k.home.dir(), "kubernetes", "values.json")
	if err := writeJSON(values, underlayValues(k.home.name, image.Ref, k.o)); err != nil {
		return err
	}
	return k.tool(ctx, nil, "helm", "upgrade", "--install", "underlay", chart(k.k.Source), "--namespace", "kube-system", "-f", values)
}

// underlayValues are the values of the chart in a lab.
func underlayValues(lab, image string, o upOptions) map[string]any {
	_, tag, _ := strings.Cut(image[strings.LastIndexByte(image, '/')+1:], ":")
	env := []map[string]string{}
	for _, e := range o.agentEnv {
		name, value, _ := strings.Cut(e, "=")
		env = append(env, map[string]string{"name": name, "value": value})
	}
	return map[string]any{
		"extraEnv":  env,
		"extraArgs": []string{"--security-groups-poller=/run/underlay/" + pollerName},
		"cluster":   map[string]any{"name": lab},
		"image":     map[string]any{"tag": tag, "pullPolicy": "IfNotPresent"},
		"prefixes":  o.prefixes,
		"ec2": map[string]any{
			"endpoint": nodeEndpoint, "region": region,
			"accessKeyId": nodeKey, "secretAccessKey": "underlay",
		},
	}
}

// tool runs one of the programs that were built against the lab's cluster.
func (k *kubeBuilder) tool(ctx context.Context, in []byte, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(k.artifacts.Bin, name), args...)
	tmp := filepath.Join(k.home.dir(), "kubernetes")
	cmd.Env = append(cleanEnv(), "KUBECONFIG="+k.k.Kubeconfig, "HOME="+tmp)
	cmd.Stdin = bytes.NewReader(in)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, args[0], err, shorten(strings.TrimSpace(string(out)), 1000))
	}
	return nil
}

// awaitNodes waits until every node is Ready; without a CNI, until every
// kubelet has registered.
func (k *kubeBuilder) awaitNodes(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 4*time.Minute, errors.New("the nodes were not Ready within four minutes"))
	defer cancel()
	return k.w.await(ctx, func() error {
		nodes, err := k.w.api.Nodes(ctx)
		if err != nil {
			return err
		}
		registered := map[string]cluster.NodeCondition{}
		for _, n := range nodes {
			registered[n.Name] = n
		}
		for _, m := range k.c.Nodes {
			name := m.Name
			n, ok := registered[name]
			if !ok {
				return &nodeError{log: k.w.programLog(name, "kubelet"), err: fmt.Errorf("%s has not registered", name)}
			}
			if !n.Ready && k.o.kube.cni != cluster.CNINone {
				return &nodeError{log: k.w.programLog(name, "kubelet"), err: fmt.Errorf("%s is not Ready: %s", name, n.Why)}
			}
		}
		return nil
	})
}

func (k *kubeBuilder) awaitDNS(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, errors.New("CoreDNS was not ready within two minutes"))
	defer cancel()
	return k.w.await(ctx, func() error { return k.w.api.DeploymentReady(ctx, "kube-system", "coredns") })
}

// explain makes the log that an error names the one that is shown.
func (k *kubeBuilder) explain(err error) error {
	var ne *nodeError
	if errors.As(err, &ne) {
		k.log = ne.log
	}
	return err
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}
