package cli

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"

	"github.com/underlay-cni/underlay/internal/cli/cluster"
)

// useKubectl returns an error for commands that are about pods of run, in a
// lab whose pods are Kubernetes'.
func (a *App) useKubectl(f *labFile, instead string) error {
	if f.Lab.Kubernetes == nil {
		return nil
	}
	return fmt.Errorf("the pods of lab %s are Kubernetes'; use kubectl: eval \"$(underlay env%s)\"; %s", f.Lab.Name, a.labFlag(), instead)
}

// kubernetesStatus is the Kubernetes of a lab as it is now.
type kubernetesStatus struct {
	Version   string              `json:"version"`
	APIServer serviceStatus       `json:"apiServer"`
	Machines  []kubernetesMachine `json:"machines"` // the control plane first
}

// kubernetesMachine is a machine as its first process, and for a node
// Kubernetes, see it.
type kubernetesMachine struct {
	Name     string                 `json:"name"`
	On       bool                   `json:"on"`
	Ready    bool                   `json:"ready"`
	Why      string                 `json:"why,omitempty"` // it is not ready
	Programs []cluster.ProgramState `json:"programs"`
}

// collectKubernetes asks the first processes and the API server.
func collectKubernetes(ctx context.Context, h home, f *labFile) *kubernetesStatus {
	k := f.Lab.Kubernetes
	s := &kubernetesStatus{Version: k.Version}
	var nodes []cluster.NodeCondition
	api, err := cluster.NewAPI(k.Kubeconfig)
	if err == nil {
		if err = api.Ready(ctx); err == nil {
			nodes, err = api.Nodes(ctx)
		}
	}
	if s.APIServer.Healthy = err == nil; err != nil {
		s.APIServer.Error = err.Error()
	}
	if p, perr := readProc(h.forwardPID()); perr != nil || !p.alive() {
		s.APIServer.Error = "the forwarder to it has ended; start it anew with: underlay node boot " + k.ControlPlane.Name + " --name " + f.Lab.Name
	}
	names := []string{k.ControlPlane.Name}
	for _, n := range f.Lab.Nodes {
		names = append(names, n.Name)
	}
	for _, name := range names {
		m := kubernetesMachine{Name: name, Programs: []cluster.ProgramState{}}
		if p, err := readProc(h.initPID(name)); err == nil && p.alive() {
			m.On = true
		}
		starting := ""
		if st, err := cluster.ReadState(h.dir(), name); err == nil && m.On {
			m.Programs, starting = st.Programs, st.Step
			if st.Error != "" {
				starting += " (" + st.Error + ")"
			}
		}
		down := []string{}
		for _, p := range m.Programs {
			if p.PID == 0 && p.LastEnd != "" {
				down = append(down, fmt.Sprintf("%s does not run (%s)", p.Name, p.LastEnd))
			}
		}
		i := slices.IndexFunc(nodes, func(n cluster.NodeCondition) bool { return n.Name == name })
		switch {
		case !m.On:
			m.Why = "its power is off"
		case len(down) > 0:
			m.Why = strings.Join(down, "; ")
		case starting != "":
			m.Why = starting
		case name == k.ControlPlane.Name:
			m.Ready, m.Why = s.APIServer.Healthy, s.APIServer.Error
		case i >= 0:
			m.Ready, m.Why = nodes[i].Ready, nodes[i].Why
		case s.APIServer.Healthy:
			m.Why = "it has not registered"
		default:
			m.Why = "nobody knows: the API server does not answer"
		}
		s.Machines = append(s.Machines, m)
	}
	return s
}

// ill names what is not well.
func (s *kubernetesStatus) ill() []string {
	var ill []string
	if !s.APIServer.Healthy {
		ill = append(ill, "the API server")
	}
	for i, m := range s.Machines {
		if !m.Ready && (i > 0 || s.APIServer.Healthy) { // the control plane's illness has been named
			ill = append(ill, "node "+m.Name)
		}
	}
	return ill
}

func (s *kubernetesStatus) write(w io.Writer, k *Kubernetes, color bool) {
	api := paint("API server well", good, color)
	if !s.APIServer.Healthy {
		api = paint("API server: "+s.APIServer.Error, bad, color)
	}
	fmt.Fprintf(w, "Kubernetes %s · %s · kube-proxy %s · CNI %s\n\n", s.Version, api, k.Proxy, k.CNI)
	t := table{head: []string{"MACHINE", "STATE", "PROGRAM", "RESTARTS", "LAST END"}}
	for _, m := range s.Machines {
		state := cell{text: "Ready", tone: good}
		switch {
		case !m.On:
			state = cell{text: "off", tone: bad}
		case !m.Ready:
			state = cell{text: "NotReady", tone: bad}
		}
		name := cell{text: m.Name, tone: strong}
		if len(m.Programs) == 0 {
			t.row(name, state)
		}
		for _, p := range m.Programs {
			program := text(p.Name)
			if p.PID == 0 {
				program.tone = bad
			}
			t.row(name, state, program, number(p.Restarts), text(p.LastEnd))
			name, state = cell{}, cell{}
		}
	}
	t.write(w, "", color)
	for i, m := range s.Machines {
		if m.Why != "" && (i > 0 || m.Why != s.APIServer.Error) {
			fmt.Fprintf(w, "  %s: %s\n", m.Name, paint(m.Why, bad, color))
		}
	}
	fmt.Fprintln(w)
}

// namedLog is a log that underlay logs knows by a name.
type namedLog struct{ name, path string }

// kubernetesLogs are the logs of a lab's Kubernetes: of each machine what its
// first process tells, and each program's.
func (h home) kubernetesLogs(f *labFile) []namedLog {
	k := f.Lab.Kubernetes
	if k == nil {
		return nil
	}
	logs := []namedLog{{"forward", h.forwardLog()}}
	machine := func(name string, programs ...string) {
		logs = append(logs, namedLog{name, cluster.InitLog(h.dir(), name)})
		for _, p := range programs {
			logs = append(logs, namedLog{name + "/" + p, filepath.Join(cluster.LogDir(h.dir(), h.data(), name), p+".log")})
		}
	}
	machine(k.ControlPlane.Name, "etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
	for _, n := range f.Lab.Nodes {
		machine(n.Name, "containerd", "kubelet", "kube-proxy")
		if k.CNI == cluster.CNIUnderlay {
			logs = append(logs, namedLog{n.Name + "/agent", h.containerLog(n.Name, "kube-system_underlay-*", "agent")})
		}
	}
	return logs
}
