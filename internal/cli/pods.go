package cli

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/spf13/cobra"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/nl"
)

func (a *App) runCommand() *cobra.Command {
	var o runOptions
	c := &cobra.Command{
		Use:   "run NAME [-- COMMAND…]",
		Short: "Make a pod: a network namespace, CNI ADD, and a process in it",
		Long: `Makes a pod as a container runtime does: a network namespace, then CNI ADD by
libcni with the node's own config and plugin, then the command as a background
process in it (see underlay logs NAME). Without a command the namespace is the
pod; underlay exec runs what you like in it.

With --count K there are NAME-1 … NAME-K, all added at once. Without --node a pod
goes where the fewest are. A pod whose ADD fails is taken away again.

With --security-groups the pod gets an address on an interface that carries
exactly these groups, at most five; without, it has the node's. A node has as
many sets of groups as further interfaces: underlay status.

With --subnet its address is of that subnet, of the node's zone, on an interface
there; without, of the node's own.`,
		Example: `  underlay run web
  underlay run web --count 20 --node node-2 -o json
  underlay run app --security-groups app,sg-0123456789abcdef0
  underlay run inside --node node-1 --subnet subnet-0123456789abcdef0
  underlay run server -- python3 -m http.server 8000`,
		Args: func(cmd *cobra.Command, args []string) error {
			dash := cmd.ArgsLenAtDash()
			if len(args) == 0 || dash == 0 {
				return fmt.Errorf("give the pod a name, as in:\n%s", firstLine(cmd.Example))
			}
			if dash > 1 || (dash < 0 && len(args) > 1) {
				return fmt.Errorf("one name, then -- and a command; what is %q?", args[1])
			}
			return nil
		},
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return nil, noFiles
			}
			return nil, cobra.ShellCompDirectiveDefault
		},
		Annotations: rootBecause("makes network namespaces"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.numbered = cmd.Flags().Changed("count")
			pods, err := a.runPods(cmd.Context(), args[0], o, args[1:])
			if err != nil {
				return err
			}
			failed := 0
			for _, p := range pods {
				if p.Error != "" {
					failed++
				}
			}
			var v any = pods
			if !o.numbered {
				v = pods[0]
			}
			if err := a.print(v, func(w io.Writer) {
				if len(pods) > 1 || failed == 0 { // else the error says it all
					printRun(w, pods, colored(w))
				}
			}); err != nil {
				return err
			}
			switch {
			case failed == 1 && len(pods) == 1:
				return fmt.Errorf("pod %s was not made: %s", pods[0].Name, pods[0].Error)
			case failed > 0:
				return fmt.Errorf("%d of %d pods were not made; the table says why, and so does: underlay logs%s", failed, len(pods), a.labFlag())
			}
			return nil
		},
	}
	c.Flags().StringVar(&o.groups, "security-groups", "", "security groups by ID or name, with commas (default: the node's)")
	c.Flags().StringVar(&o.mode, "security-groups-mode", "", "who judges by them: vpc, or the host alone (default: as the agents are set up)")
	c.Flags().StringVar(&o.subnet, "subnet", "", "ID of the subnet that the address is of (default: the node's)")
	c.Flags().StringVar(&o.node, "node", "", "the node (default: where the fewest pods are)")
	c.Flags().IntVar(&o.count, "count", 1, "how many, at once: NAME-1 … NAME-K")
	_ = c.RegisterFlagCompletionFunc("node", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return a.machineNames(false), noFiles
	})
	return c
}

// runOptions say what pods to make.
type runOptions struct {
	node     string // "": where the fewest are
	count    int
	numbered bool   // NAME-1 … NAME-count, and not NAME
	groups   string // security groups by ID or name, with commas; "": the node's
	mode     string // "vpc", "host"; "": as the agents are set up
	subnet   string // ID; "": the node's
}

// runPods makes pods. The error is about all of them; what concerns one stands
// in its Error.
func (a *App) runPods(ctx context.Context, name string, o runOptions, argv []string) ([]Pod, error) {
	if o.count < 1 || o.count > 5000 {
		return nil, fmt.Errorf("--count %d: give a number from 1 to 5000", o.count)
	}
	if strings.Contains(o.groups, ";") { // what parts CNI_ARGS
		return nil, fmt.Errorf("--security-groups %q: give a group whose name has a semicolon by its ID", o.groups)
	}
	if o.mode != "" && (o.groups == "" || o.mode != agentapi.GroupsVPC && o.mode != agentapi.GroupsHost) {
		return nil, fmt.Errorf("--security-groups-mode %s: give vpc or host, with --security-groups", o.mode)
	}
	if o.subnet != "" && (!strings.HasPrefix(o.subnet, "subnet-") || strings.ContainsAny(o.subnet, ";=,")) {
		return nil, fmt.Errorf("--subnet %q: give a subnet by its ID, subnet-…", o.subnet)
	}
	names := []string{name}
	if o.numbered {
		names = names[:0]
		for i := range o.count {
			names = append(names, fmt.Sprintf("%s-%d", name, i+1))
		}
	}
	for _, n := range names {
		if err := CheckPod(n); err != nil {
			return nil, err
		}
	}
	if len(argv) > 0 {
		if _, err := exec.LookPath(argv[0]); err != nil {
			return nil, fmt.Errorf("run %s in a pod: %w; inside a pod are the machine's own files", argv[0], err)
		}
	}
	h := a.home()
	f, err := h.loadUp()
	if err != nil {
		return nil, err
	}
	if err := a.useKubectl(f, "kubectl run "+name+" --image=registry.k8s.io/e2e-test-images/agnhost:2.66.1"); err != nil {
		return nil, err
	}
	l, err := h.lockLab(ctx, false)
	if err != nil {
		return nil, err
	}
	defer l.release("")
	if !exists(h.file()) { // a down came first
		_, err := h.loadUp()
		return nil, err
	}
	for _, n := range names {
		if exists(nl.Path(h.podNetns(n))) {
			return nil, fmt.Errorf("pod %s is there already; remove it with: underlay rm %s%s", n, n, a.labFlag())
		}
	}
	nodes, err := a.place(h, f, o.node, len(names))
	if err != nil {
		return nil, err
	}

	// Namespaces first, so that all ADDs are there at once and what is
	// measured is ADD. The kernel makes one namespace at a time anyway.
	pods := make([]*podFile, len(names))
	cniOf := map[string]*runtime{}
	for i, n := range names {
		pods[i] = &podFile{
			Pod:         Pod{Name: n, Node: nodes[i].Name, Netns: nl.Path(h.podNetns(n))},
			ContainerID: h.name + "-" + n + "-" + randomHex(4), Created: a.now(), Command: argv, Groups: o.groups, GroupsMode: o.mode, Subnet: o.subnet,
		}
		if cniOf[nodes[i].Name] == nil {
			if cniOf[nodes[i].Name], err = newRuntime(h, nodes[i]); err != nil {
				return nil, err
			}
		}
		if err := nl.NewNamed(h.podNetns(n)); err != nil {
			pods[i].Pod.Error = err.Error()
		}
	}
	var wg sync.WaitGroup
	for i, p := range pods {
		if p.Pod.Error != "" {
			continue
		}
		wg.Go(func() { a.makePod(ctx, h, cniOf[nodes[i].Name], p) })
	}
	wg.Wait()
	if err := a.fillENIs(ctx, h, f, pods); err != nil {
		return nil, err
	}
	out := make([]Pod, len(pods))
	for i, p := range pods {
		out[i] = p.Pod
	}
	return out, nil
}

// makePod adds one pod to the network and starts its process; when either
// fails, nothing of the pod is left.
func (a *App) makePod(ctx context.Context, h home, rt *runtime, p *podFile) {
	err := func() error {
		began := a.now()
		res, err := rt.add(ctx, p)
		p.Pod.AddMillis = millis(a.now().Sub(began))
		if err != nil {
			return err
		}
		p.Pod.IP, p.Pod.MAC = res.ip, res.mac
		if len(p.Command) > 0 {
			cmd := newCommand(p.Command[0], p.Command[1:]...)
			cmd.Env = append(os.Environ(), "UNDERLAY_LAB="+h.name, "UNDERLAY_POD="+p.Pod.Name)
			if p.Proc, _, err = background(cmd, p.Pod.Netns, h.podLog(p.Pod.Name)); err != nil {
				return err
			}
		}
		return writeJSON(h.podFile(p.Pod.Name), p)
	}()
	if err == nil {
		return
	}
	p.Pod.Error = err.Error()
	var ce *types.Error
	if errors.As(err, &ce) && ce.Code == uint(agentapi.CodeAgentUnreachable) {
		p.Pod.Error += fmt.Sprintf("; in a lab: underlay node restart-agent %s%s", rt.node.Name, a.labFlag())
	}
	clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	if derr := a.removePod(clean, h, rt, p, true); derr != nil {
		p.Pod.Error += "; and clearing it away: " + derr.Error()
	}
}

// fillENIs asks each agent once which ENI its pods are on: CNI's result has no
// place for it. A pod of which no agent tells works all the same.
func (a *App) fillENIs(ctx context.Context, h home, f *labFile, pods []*podFile) error {
	for _, n := range f.Lab.Nodes {
		mine := map[string]*podFile{}
		for _, p := range pods {
			if p.Pod.Node == n.Name && p.Pod.Error == "" {
				mine[p.ContainerID] = p
			}
		}
		if len(mine) == 0 {
			continue
		}
		ictx, cancel := context.WithTimeout(ctx, 10*time.Second)
		in, err := (&agentapi.Client{Socket: n.AgentSocket}).Inspect(ictx)
		cancel()
		if err != nil {
			continue
		}
		for _, e := range in.Endpoints {
			p := mine[e.ContainerID]
			if p == nil || e.State == tombstone {
				continue
			}
			p.Pod.ENI = e.ENI
			if p.Groups != "" {
				p.Pod.Groups = e.Groups
			}
			if err := writeJSON(h.podFile(p.Pod.Name), p); err != nil {
				return err
			}
		}
	}
	return nil
}

// tombstone is the state of an endpoint whose address cools down.
const tombstone = "tombstone"

// place chooses a node for each of count pods.
func (a *App) place(h home, f *labFile, node string, count int) ([]Node, error) {
	nodes := f.Lab.Nodes
	if node != "" {
		n, err := f.node(node)
		if err != nil {
			return nil, err
		}
		nodes = []Node{n}
	}
	pods, err := h.loadPods()
	if err != nil {
		return nil, err
	}
	load := make([]int, len(nodes))
	for _, p := range pods {
		if i := slices.IndexFunc(nodes, func(n Node) bool { return n.Name == p.Pod.Node }); i >= 0 {
			load[i]++
		}
	}
	out := make([]Node, count)
	for i := range out {
		least := 0
		for k := range nodes {
			if load[k] < load[least] {
				least = k
			}
		}
		load[least]++
		out[i] = nodes[least]
	}
	return out, nil
}

func printRun(w io.Writer, pods []Pod, color bool) {
	t := table{head: []string{"POD", "NODE", "ADDRESS", "ENI", "SECURITY GROUPS", "ADD", "ERROR"}}
	for _, p := range pods {
		t.row(cell{text: p.Name, tone: strong}, text(p.Node), text(p.IP), text(p.ENI), text(strings.Join(p.Groups, ",")), cell{text: fmt.Sprintf("%.1f ms", p.AddMillis), right: true}, cell{text: p.Error, tone: bad})
	}
	t.write(w, "", color)
}

func (a *App) rmCommand() *cobra.Command {
	var all, force bool
	c := &cobra.Command{
		Use:   "rm POD…",
		Short: "Remove pods: their processes, CNI DEL, the network namespace",
		Example: `  underlay rm web-1 web-2
  underlay rm --all`,
		Args: func(_ *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return errors.New("name the pods, or give --all")
			}
			return nil
		},
		ValidArgsFunction: a.completeMorePods,
		Annotations:       rootBecause("removes network namespaces"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.rm(cmd.Context(), args, all, force)
		},
	}
	c.Flags().BoolVar(&all, "all", false, "all pods of the lab")
	c.Flags().BoolVar(&force, "force", false, "remove the namespace even if DEL fails")
	return c
}

func (a *App) rm(ctx context.Context, names []string, all, force bool) error {
	h := a.home()
	f, err := h.loadUp()
	if err != nil {
		return err
	}
	if err := a.useKubectl(f, "kubectl delete pod"); err != nil {
		return err
	}
	l, err := h.lockLab(ctx, false)
	if err != nil {
		return err
	}
	defer l.release("")

	known := h.podsThere()
	if all {
		names = known
	}
	for _, n := range names {
		if !slices.Contains(known, n) {
			return fmt.Errorf("lab %s has no pod %q; see: underlay pods%s", h.name, n, a.labFlag())
		}
	}
	type removed struct {
		Name      string  `json:"name"`
		DelMillis float64 `json:"delMillis"` // DEL alone, of a pod whose process has ended
		Error     string  `json:"error"`
	}
	out := make([]removed, len(names))
	var wg sync.WaitGroup
	limit := make(chan struct{}, 8) // each of them starts a process
	for i, name := range names {
		limit <- struct{}{}
		wg.Go(func() {
			defer func() { <-limit }()
			out[i].Name = name
			p, rt, err := a.findPod(ctx, h, f, name)
			began := a.now()
			if err == nil {
				err = a.removePod(ctx, h, rt, p, force)
			}
			out[i].DelMillis = millis(a.now().Sub(began))
			if err != nil {
				out[i].Error = err.Error()
			}
		})
	}
	wg.Wait()
	var errs []error
	for _, r := range out {
		if r.Error != "" {
			errs = append(errs, fmt.Errorf("remove pod %s: %s", r.Name, r.Error))
		}
	}
	err = a.print(out, func(w io.Writer) {
		for _, r := range out {
			if r.Error == "" {
				fmt.Fprintf(w, "removed %s\n", r.Name)
			}
		}
	})
	return errors.Join(append(errs, err)...)
}

// podsThere returns the pods that have a file or a namespace.
func (h home) podsThere() []string {
	var names []string
	entries, err := os.ReadDir(h.pods())
	if err == nil {
		for _, e := range entries {
			if n, ok := strings.CutSuffix(e.Name(), ".json"); ok && CheckPod(n) == nil {
				names = append(names, n)
			}
		}
	}
	for _, ns := range h.namespaces() {
		if _, kind, n, ok := labOfNetns(ns); ok && kind == "pod" {
			names = append(names, n)
		}
	}
	slices.SortFunc(names, natural)
	return slices.Compact(names)
}

// findPod returns what is known of a pod. Without its file, the agents are
// asked whose endpoint has its namespace.
func (a *App) findPod(ctx context.Context, h home, f *labFile, name string) (*podFile, *runtime, error) {
	p, err := h.loadPod(name)
	if err == nil {
		n, err := f.node(p.Pod.Node)
		if err != nil {
			return nil, nil, err
		}
		rt, err := newRuntime(h, n)
		return p, rt, err
	}
	if !errors.Is(err, fs.ErrNotExist) {
		var syntax *json.SyntaxError
		if !errors.As(err, &syntax) {
			return nil, nil, err
		}
	}
	p = &podFile{Pod: Pod{Name: name, Netns: nl.Path(h.podNetns(name))}}
	for _, n := range f.Lab.Nodes {
		in, err := (&agentapi.Client{Socket: n.AgentSocket}).Inspect(ctx)
		if err != nil {
			return nil, nil, fmt.Errorf("ask the agent of %s whether the pod is there: %w; start it with: underlay node restart-agent %s%s", n.Name, err, n.Name, a.labFlag())
		}
		for _, e := range in.Endpoints {
			if e.Netns == p.Pod.Netns && e.State != tombstone {
				p.ContainerID, p.Pod.Node = e.ContainerID, n.Name
				rt, err := newRuntime(h, n)
				return p, rt, err
			}
		}
	}
	return p, nil, nil // a namespace, and no endpoint
}

// removePod ends the pod's processes, has CNI take it from the network, and
// removes its namespace and files.
func (a *App) removePod(ctx context.Context, h home, rt *runtime, p *podFile, force bool) error {
	procs := []proc{p.Proc}
	if id, ok := netnsID(p.Pod.Netns); ok {
		procs = append(procs, processesIn([]nsID{id}, ourselves())...)
	}
	procs = slices.DeleteFunc(procs, func(p proc) bool { return !p.alive() })
	if left := end(ctx, procs, 2*time.Second); len(left) > 0 {
		return fmt.Errorf("%s does not end", describeProcess(left[0].PID))
	}
	var derr error
	if rt != nil {
		if derr = rt.del(ctx, p); derr != nil && !force {
			return fmt.Errorf("%w; is the agent up? underlay status%s; --force removes the namespace all the same", derr, a.labFlag())
		}
	}
	if err := nl.DeleteNamed(h.podNetns(p.Pod.Name)); err != nil {
		return err
	}
	for _, path := range []string{h.podLog(p.Pod.Name), h.podFile(p.Pod.Name)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove pod %s: %w", p.Pod.Name, err)
		}
	}
	return derr
}

func (a *App) podsCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "pods",
		Short:   "List the pods",
		Example: "  underlay pods\n  underlay pods -o json | jq -r '.[].ip'",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			h := a.home()
			f, err := h.loadUp()
			if err != nil {
				return err
			}
			if err := a.useKubectl(f, "kubectl get pods -A -o wide; what the agents know of them: underlay status"+a.labFlag()); err != nil {
				return err
			}
			files, err := h.loadPods()
			if err != nil {
				return err
			}
			pods := []Pod{}
			for _, p := range files {
				pods = append(pods, p.Pod)
			}
			return a.print(pods, func(w io.Writer) {
				if len(files) == 0 {
					fmt.Fprintf(w, "no pods; make some: underlay run web --count 3%s\n", a.labFlag())
					return
				}
				t := table{head: []string{"POD", "NODE", "ADDRESS", "MAC", "ENI", "ADD", "AGE", "PROCESS"}}
				for _, p := range files {
					t.row(cell{text: p.Pod.Name, tone: strong}, text(p.Pod.Node), text(p.Pod.IP), text(p.Pod.MAC), text(p.Pod.ENI),
						cell{text: fmt.Sprintf("%.1f ms", p.Pod.AddMillis), right: true}, text(age(a.now().Sub(p.Created))), processCell(p))
				}
				t.write(w, "", colored(w))
			})
		},
	}
}

func processCell(p *podFile) cell {
	switch {
	case len(p.Command) == 0:
		return cell{}
	case p.Proc.alive():
		return text(shorten(strings.Join(p.Command, " "), 40))
	}
	return cell{text: "ended: " + shorten(strings.Join(p.Command, " "), 32), tone: bad}
}

// age is a duration as people tell it.
func age(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd", int(d.Hours())/24)
}

// millis is a duration in milliseconds, to the microsecond.
func millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func randomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails since Go 1.24
	return hex.EncodeToString(b)
}

func writeJSONLine(w io.Writer, name, line string) error {
	return json.NewEncoder(w).Encode(struct {
		From string `json:"from"`
		Line string `json:"line"`
	}{name, line})
}
