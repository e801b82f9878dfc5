package cli

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/cli/cluster"
	"github.com/underlay-cni/underlay/internal/ec2"
	"github.com/underlay-cni/underlay/internal/vpc"
)

func (a *App) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show nodes, ENIs, addresses, pods and last errors",
		Long: `Shows the lab as its agents, EC2 and Kubernetes see it now. What this command itself remembers
counts only for which machines there are, and for the pods of a node whose agent
is silent. Ends with an error when vpcd, an agent, the API
server or a node is not well.`,
		Example:     "  underlay status\n  underlay status -o json | jq '.nodes[].agent'",
		Args:        cobra.NoArgs,
		Annotations: rootBecause("asks the agents, whose sockets are root's"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			h := a.home()
			f, err := h.loadUp()
			if err != nil {
				return err
			}
			s := a.collect(cmd.Context(), h, f)
			if err := a.print(s, func(w io.Writer) { s.write(w, colored(w), a.now()) }); err != nil {
				return err
			}
			if ill := s.ill(); len(ill) > 0 {
				return fmt.Errorf("not well: %s; see: underlay logs%s", strings.Join(ill, ", "), a.labFlag())
			}
			return nil
		},
	}
}

// status is what "underlay status -o json" prints.
type status struct {
	Lab
	Created      time.Time         `json:"created"`
	InstanceType string            `json:"instanceType"`
	Prefixes     bool              `json:"prefixes,omitempty"`
	VPCD         serviceStatus     `json:"vpcd"`
	Poller       *serviceStatus    `json:"poller,omitempty"` // of security groups
	NodeStatus   []nodeStatus      `json:"nodeStatus"`
	Interfaces   []interfaceStatus `json:"interfaces"` // all of the VPC, as EC2 describes them
	Pods         []podStatus       `json:"pods"`

	KubernetesStatus *kubernetesStatus `json:"kubernetesStatus,omitempty"`
}

type serviceStatus struct {
	Healthy bool   `json:"healthy"`
	Error   string `json:"error,omitempty"`
	PID     int    `json:"pid,omitempty"`
}

type nodeStatus struct {
	Name      string               `json:"name"`
	Zone      string               `json:"zone"`
	Agent     serviceStatus        `json:"agent"`
	Addresses addressCounts        `json:"addresses"`
	Inspect   *agentapi.Inspection `json:"inspect,omitempty"`
}

// addressCounts are a node's addresses by state, primary ones left out.
type addressCounts struct {
	InUse   int `json:"inUse"`
	Free    int `json:"free"`
	Cooling int `json:"cooling"`
	Waiting int `json:"waiting"` // ADDs that wait for one
}

type interfaceStatus struct {
	ID        string   `json:"id"`
	Machine   string   `json:"machine"` // node, VM or service; "" when attached to none of ours
	Device    int      `json:"device"`
	IfName    string   `json:"ifname,omitempty"`
	MAC       string   `json:"mac"`
	Primary   string   `json:"primary"`
	Secondary []string `json:"secondary"`
	Prefixes  []string `json:"prefixes"`
	Groups    []string `json:"groups"`
	Attached  bool     `json:"attached"`
}

type podStatus struct {
	Name    string    `json:"name"`
	Node    string    `json:"node"`
	IP      string    `json:"ip"`
	ENI     string    `json:"eni"`
	MAC     string    `json:"mac"`
	Groups  []string  `json:"securityGroups,omitempty"` // unless they are the node's
	State   string    `json:"state"`
	Since   time.Time `json:"since"`
	Problem string    `json:"problem,omitempty"`
}

// collect asks everybody at once; who does not answer is reported, not waited
// for.
func (a *App) collect(ctx context.Context, h home, f *labFile) *status {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	s := &status{
		Lab: f.Lab, Created: f.Created, InstanceType: f.InstanceType, Prefixes: f.Prefixes,
		NodeStatus: make([]nodeStatus, len(f.Lab.Nodes)), Interfaces: []interfaceStatus{}, Pods: []podStatus{},
	}
	var (
		wg        sync.WaitGroup
		enis      []vpc.ENI
		instances []ec2.LabInstance
	)
	wg.Go(func() {
		if p, err := readProc(h.vpcdPID()); err == nil && p.alive() {
			s.VPCD.PID = p.PID
		}
		err := newAdmin(f.Lab.Endpoint).health(ctx, f.Lab.Name)
		api := ec2.NewLab(f.Lab.Endpoint, f.Region)
		if err == nil {
			enis, err = api.Interfaces(ctx, vpc.VPCID(f.Lab.VPCID))
		}
		if err == nil {
			instances, err = api.Instances(ctx, nil)
		}
		if s.VPCD.Healthy = err == nil; err != nil {
			s.VPCD.Error = err.Error()
		}
	})
	if h.hasPoller() {
		s.Poller = &serviceStatus{}
		if p, err := readProc(h.pollerPID()); err == nil && p.alive() {
			s.Poller.PID, s.Poller.Healthy = p.PID, true
		} else {
			s.Poller.Error = "it does not run, and agents read security groups themselves; start it with: underlay poller restart" + a.labFlag()
		}
	}
	for i, n := range f.Lab.Nodes {
		wg.Go(func() { s.NodeStatus[i] = nodeStatusOf(ctx, h, n) })
	}
	if f.Lab.Kubernetes != nil {
		wg.Go(func() { s.KubernetesStatus = collectKubernetes(ctx, h, f) })
	}
	wg.Wait()

	machine := map[vpc.InstanceID]string{}
	for _, n := range f.Lab.Nodes {
		machine[vpc.InstanceID(n.InstanceID)] = n.Name
	}
	for _, o := range f.Lab.Outside {
		machine[vpc.InstanceID(o.InstanceID)] = o.Name
	}
	if k := f.Lab.Kubernetes; k != nil {
		machine[vpc.InstanceID(k.ControlPlane.InstanceID)] = k.ControlPlane.Name
	}
	ifname := map[string]string{}
	for i := range s.NodeStatus {
		n := &s.NodeStatus[i]
		for _, in := range instances {
			if string(in.ID) == f.Lab.Nodes[i].InstanceID {
				n.Zone = in.Zone
			}
		}
		if n.Inspect == nil {
			s.Pods = append(s.Pods, rememberedPods(h, n.Name)...)
			continue
		}
		for _, e := range n.Inspect.ENIs {
			ifname[e.ID] = e.IfName
		}
		for _, e := range n.Inspect.Endpoints {
			if e.State == tombstone {
				continue
			}
			name := e.Pod.Name
			if name == "" { // not every runtime tells one
				name = e.ContainerID
			}
			if f.Lab.Kubernetes != nil && e.Pod.Namespace != "" {
				name = e.Pod.Namespace + "/" + e.Pod.Name
			}
			s.Pods = append(s.Pods, podStatus{
				Name: name, Node: n.Name, IP: e.IP.String(), ENI: e.ENI, MAC: e.MAC, Groups: ownGroups(n.Inspect, e), State: e.State, Since: e.Since, Problem: e.Problem,
			})
		}
	}
	slices.SortFunc(s.Pods, func(a, b podStatus) int { return natural(a.Name, b.Name) })
	for _, e := range enis {
		is := interfaceStatus{
			ID: string(e.ID), Device: e.DeviceIndex, MAC: e.MAC, Primary: e.Primary.String(), IfName: ifname[string(e.ID)],
			Secondary: []string{}, Prefixes: []string{}, Groups: []string{}, Attached: e.Attached,
		}
		if e.Instance != "" {
			is.Machine = machine[e.Instance]
		}
		for _, o := range f.Lab.Outside {
			if is.Machine == "" && o.IP == e.Primary {
				is.Machine = o.Name
			}
		}
		for _, ip := range e.Secondary {
			is.Secondary = append(is.Secondary, ip.String())
		}
		for _, p := range e.Prefixes {
			is.Prefixes = append(is.Prefixes, p.String())
		}
		for _, g := range e.Groups {
			is.Groups = append(is.Groups, string(g))
		}
		s.Interfaces = append(s.Interfaces, is)
	}
	slices.SortFunc(s.Interfaces, func(a, b interfaceStatus) int {
		if c := natural(a.Machine, b.Machine); c != 0 {
			return c
		}
		return a.Device - b.Device
	})
	return s
}

// rememberedPods are the pods that run has made on a node whose agent does not
// answer. They are not gone with it.
func rememberedPods(h home, node string) []podStatus {
	files, err := h.loadPods()
	if err != nil {
		return nil
	}
	var pods []podStatus
	for _, p := range files {
		if p.Pod.Node == node {
			pods = append(pods, podStatus{Name: p.Pod.Name, Node: node, IP: p.Pod.IP, ENI: p.Pod.ENI, MAC: p.Pod.MAC, State: "unknown", Since: p.Created, Problem: "the agent is silent"})
		}
	}
	return pods
}

func nodeStatusOf(ctx context.Context, h home, n Node) nodeStatus {
	ns := nodeStatus{Name: n.Name}
	if p, err := readProc(h.agentPID(n.Name)); err == nil && p.alive() {
		ns.Agent.PID = p.PID
	}
	in, err := (&agentapi.Client{Socket: n.AgentSocket}).Inspect(ctx)
	if err != nil {
		ns.Agent.Error = err.Error()
		return ns
	}
	ns.Inspect = in
	ns.Agent.Healthy, ns.Agent.Error = in.Healthy, in.Reason
	ns.Addresses.Waiting = in.Waiting
	for _, e := range in.ENIs {
		ns.Addresses.InUse += e.Addresses.Bound + e.Addresses.Foreign
		ns.Addresses.Free += e.Addresses.Free + e.Addresses.Assigned
		ns.Addresses.Cooling += e.Addresses.Cooling
	}
	return ns
}

// ill names what is not healthy.
func (s *status) ill() []string {
	var ill []string
	if !s.VPCD.Healthy {
		ill = append(ill, "vpcd")
	}
	if s.Poller != nil && !s.Poller.Healthy {
		ill = append(ill, "the poller")
	}
	for _, n := range s.NodeStatus {
		if !n.Agent.Healthy && s.hasAgents() {
			ill = append(ill, "the agent of "+n.Name)
		}
	}
	if s.KubernetesStatus != nil {
		ill = append(ill, s.KubernetesStatus.ill()...)
	}
	return ill
}

// hasAgents reports whether Underlay is the CNI here: a Kubernetes can be made
// with another, to compare with.
func (s *status) hasAgents() bool {
	return s.Kubernetes == nil || s.Kubernetes.CNI == cluster.CNIUnderlay
}

func (s *status) write(w io.Writer, color bool, now time.Time) {
	vpcd := paint("vpcd well", good, color)
	if !s.VPCD.Healthy {
		vpcd = paint("vpcd: "+s.VPCD.Error, bad, color)
	}
	fmt.Fprintf(w, "lab %s · %s · %s · up %s · %s\n\n", paint(s.Name, strong, color), s.VPCID, s.Endpoint, age(now.Sub(s.Created)), vpcd)
	if s.Poller != nil && !s.Poller.Healthy {
		fmt.Fprintf(w, "%s\n\n", paint("poller: "+s.Poller.Error, bad, color))
	}
	if s.KubernetesStatus != nil {
		s.KubernetesStatus.write(w, s.Kubernetes, color)
	}
	if s.hasAgents() {
		s.nodeTable(w, color)
	}
	s.interfaceTable(w, color)
	s.podTable(w, color, now)
	s.setTable(w, color, now)
	s.pathTable(w, color)
	s.dropTable(w, color)
	s.errorTable(w, color, now)
}

func (s *status) nodeTable(w io.Writer, color bool) {
	t := table{head: []string{"NODE", "AGENT", "ADDRESS", "ZONE", "PODS", "MAX", "IN USE", "FREE", "COOLING", "WAITING", "ENIS"}}
	for i, n := range s.NodeStatus {
		agent := cell{text: "well", tone: good}
		if !n.Agent.Healthy {
			agent = cell{text: "ill", tone: bad}
		}
		c := []cell{{text: n.Name, tone: strong}, agent, text(s.Nodes[i].IP.String()), text(n.Zone)}
		if in := n.Inspect; in != nil {
			pods := 0
			for _, e := range in.Endpoints {
				if e.State != tombstone {
					pods++
				}
			}
			waiting := cell{}
			if n.Addresses.Waiting > 0 {
				waiting = cell{text: fmt.Sprint(n.Addresses.Waiting), tone: bad, right: true}
			}
			c = append(c, number(pods), number(in.Limits.Addresses), number(n.Addresses.InUse), number(n.Addresses.Free), number(n.Addresses.Cooling), waiting,
				textf("%d of %d", len(in.ENIs), in.Limits.ENIs))
		}
		t.row(c...)
	}
	t.write(w, "", color)
	for _, n := range s.NodeStatus {
		if n.Agent.Error != "" {
			fmt.Fprintf(w, "  %s: %s\n", n.Name, paint(n.Agent.Error, bad, color))
		}
	}
}

func (s *status) interfaceTable(w io.Writer, color bool) {
	if len(s.Interfaces) == 0 {
		return
	}
	t := table{head: []string{"ENI", "OF", "DEV", "LINK", "ADDRESS", "SECONDARY", "PREFIXES", "MAC", ""}}
	for _, e := range s.Interfaces {
		note := cell{}
		if !e.Attached {
			note = cell{text: "not attached", tone: bad}
		}
		t.row(text(e.ID), text(e.Machine), number(e.Device), text(e.IfName), text(e.Primary), text(few(e.Secondary, 2)), text(few(e.Prefixes, 2)), cell{text: e.MAC, tone: dim}, note)
	}
	fmt.Fprintln(w)
	t.write(w, "", color)
}

func (s *status) podTable(w io.Writer, color bool, now time.Time) {
	fmt.Fprintln(w)
	if len(s.Pods) == 0 {
		if s.Kubernetes != nil {
			fmt.Fprintln(w, "no agent knows of a pod; see: kubectl get pods -A -o wide")
			return
		}
		flag := ""
		if s.Name != defaultLab {
			flag = " --name " + s.Name
		}
		fmt.Fprintf(w, "no pods; make some: underlay run web --count 3%s\n", flag)
		return
	}
	t := table{head: []string{"POD", "NODE", "ADDRESS", "ENI", "MAC", "SECURITY GROUPS", "AGE", "STATE", ""}}
	for _, p := range s.Pods {
		state := text(p.State)
		if p.State != "live" {
			state.tone = bad
		}
		t.row(cell{text: p.Name, tone: strong}, text(p.Node), text(p.IP), text(p.ENI), cell{text: p.MAC, tone: dim}, text(strings.Join(p.Groups, " ")), text(age(now.Sub(p.Since))), state, cell{text: p.Problem, tone: bad})
	}
	t.write(w, "", color)
}

// pathTable shows which way pods' packets take.
func (s *status) pathTable(w io.Writer, color bool) {
	t := table{head: []string{"DATAPATH OF", "HOOKS", "DIRECT", "CONNECTIONS", "OF AT MOST", "PACKETS", "BY THE STACK"}}
	for _, n := range s.NodeStatus {
		if n.Inspect == nil || n.Inspect.Datapath.Hook == "" {
			continue // an agent of before
		}
		d := n.Inspect.Datapath
		direct := text("off")
		if d.Direct {
			direct = text("on")
		}
		hooks := d.Hook
		if d.Moved > 0 {
			hooks += fmt.Sprintf(", %d busy on tcx", d.Moved)
		}
		if d.ENIHook != "" && d.ENIHook != d.Hook {
			hooks += ", ENIs " + d.ENIHook
		}
		t.row(text(n.Name), text(hooks), direct, number(d.Connections), number(d.MaxConnections),
			cell{text: fmt.Sprint(d.DirectPackets + d.StackPackets), right: true}, cell{text: fmt.Sprintf("%.1f %%", 100*d.SlowShare), right: true})
	}
	if len(t.rows) > 0 {
		fmt.Fprintln(w)
		t.write(w, "", color)
	}
}

func (s *status) dropTable(w io.Writer, color bool) {
	t := table{head: []string{"DROPPED ON", "PACKETS", "WHY"}}
	for _, n := range s.NodeStatus {
		if n.Inspect == nil {
			continue
		}
		for _, reason := range slices.Sorted(maps.Keys(n.Inspect.Counters.Drops)) {
			if c := n.Inspect.Counters.Drops[reason]; c > 0 {
				t.row(text(n.Name), cell{text: fmt.Sprint(c), right: true}, text(reason))
			}
		}
	}
	if len(t.rows) > 0 {
		fmt.Fprintln(w)
		t.write(w, "", color)
	}
}

func (s *status) errorTable(w io.Writer, color bool, now time.Time) {
	t := table{head: []string{"LAST ERRORS", "AGO", "TIMES", "IN", "WHAT"}}
	for _, n := range s.NodeStatus {
		if n.Inspect == nil {
			continue
		}
		for _, e := range n.Inspect.LastErrors {
			t.row(text(n.Name), text(age(now.Sub(e.Time))), number(e.Count), text(e.Op), cell{text: e.Message, tone: bad})
		}
	}
	if len(t.rows) > 0 {
		fmt.Fprintln(w)
		t.write(w, "", color)
	}
}

// few joins the first n of list and counts the rest.
func few(list []string, n int) string {
	if len(list) <= n+1 { // "and 1 more" is no shorter than the one
		return strings.Join(list, " ")
	}
	return fmt.Sprintf("%s +%d", strings.Join(list[:n], " "), len(list)-n)
}
