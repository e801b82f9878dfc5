package cli

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/cli/cluster"
)

// aKubernetes is aLab with a Kubernetes on its nodes.
func aKubernetes(t *testing.T) (home, *labFile) {
	t.Helper()
	h, f := aLab(t)
	f.Lab.Kubernetes = &Kubernetes{
		Version: "v1.37.2", Kubeconfig: cluster.Kubeconfig(h.dir()), InVPC: cluster.VPCKubeconfig(h.dir()), Bin: "/cache/bin", Source: "/src", CNI: "underlay", Proxy: "nftables",
		ControlPlane: Machine{Name: cluster.ControlPlane, InstanceID: "i-0000000000000000c", Netns: "/run/netns/ul-demo-i-0000000000000000c", IP: netip.MustParseAddr("10.0.0.12")},
	}
	if err := h.save(f); err != nil {
		t.Fatal(err)
	}
	return h, f
}

func TestEnvOfKubernetes(t *testing.T) {
	h, _ := aKubernetes(t)
	a, out, errOut := testApp(h.run)
	for _, args := range [][]string{{"env", "--shell", "sh"}, {"env", "--shell", "fish"}} {
		out.Reset()
		if code := a.Run(t.Context(), args); code != 0 {
			t.Fatalf("%v: exit code %d: %s", args, code, errOut)
		}
		golden(t, "kubernetes-env-"+args[len(args)-1]+".txt", strings.ReplaceAll(out.String(), h.run, "/run/underlay"))
	}
}

// The pods of such a lab are not ours to make.
func TestPodsAreKubernetes(t *testing.T) {
	h, _ := aKubernetes(t)
	for _, args := range []string{"run web", "rm web-2", "exec web-2 -- true", "pods"} {
		a, _, errOut := testApp(h.run)
		a.euid = 0
		if code := a.Run(t.Context(), strings.Fields(args)); code != 1 || !strings.Contains(errOut.String(), "kubectl") {
			t.Errorf("underlay %s: exit code %d: %s", args, code, errOut)
		}
	}
	for args, says := range map[string]string{
		"node kill vm-1":                  "node-1, node-2, control-plane",
		"node restart-agent node-1":       "pkill",
		"node exec node-1 -- true":        "underlay node boot node-1",
		"node exec control-plane -- true": "underlay node boot control-plane",
		"logs node-1/frob":                "node-1/kubelet",
	} {
		a, _, errOut := testApp(h.run)
		a.euid = 0
		if code := a.Run(t.Context(), strings.Fields(args)); code != 1 || !strings.Contains(errOut.String(), says) {
			t.Errorf("underlay %s: exit code %d, want %q in: %s", args, code, says, errOut)
		}
	}
}

func TestWithoutKubernetesThereIsNoPowerSwitch(t *testing.T) {
	h, _ := aLab(t)
	for args, says := range map[string]string{
		"node kill node-1":                      "--kubernetes",
		"up --cni none":                         "--kubernetes",
		"up --kube-proxy x":                     "--kubernetes",
		"up --kubernetes --kube-proxy ipvs":     "nftables or iptables",
		"up --kubernetes --cni flannel":         "underlay, ptp, none",
		"up --kubernetes --agent-arg --imds=on": "chart's values",
	} {
		a, _, errOut := testApp(h.run)
		a.euid = 0
		if code := a.Run(t.Context(), strings.Fields(args)); code != 1 || !strings.Contains(errOut.String(), says) {
			t.Errorf("underlay %s: exit code %d, want %q in: %s", args, code, says, errOut)
		}
	}
}

func TestCompletionOfKubernetes(t *testing.T) {
	h, _ := aKubernetes(t)
	for args, want := range map[string]string{
		"node kill ":               "node-1 node-2 control-plane",
		"node exec c":              "control-plane",
		"logs control-plane/":      "control-plane/etcd control-plane/kube-apiserver control-plane/kube-controller-manager control-plane/kube-scheduler",
		"logs node-1/":             "node-1/containerd node-1/kubelet node-1/kube-proxy node-1/agent",
		"up --kube-proxy ":         "nftables iptables",
		"logs node-1 node-1/kube-": "node-1/kube-proxy",
	} {
		a, out, _ := testApp(h.run)
		a.Run(t.Context(), append([]string{"__complete"}, strings.Split(args, " ")...))
		var got []string
		for _, l := range strings.Fields(out.String()) {
			last := args[strings.LastIndexByte(args, ' ')+1:]
			if strings.HasPrefix(l, last) && !strings.HasPrefix(l, ":") {
				got = append(got, l)
			}
		}
		if d := cmp.Diff(want, strings.Join(got, " ")); d != "" {
			t.Errorf("complete %q (-want +got):\n%s", args, d)
		}
	}
}

func TestStatusOfKubernetes(t *testing.T) {
	_, f := aKubernetes(t)
	s := &status{
		Lab: f.Lab, Created: aDay, VPCD: serviceStatus{Healthy: true}, NodeStatus: []nodeStatus{{Name: "node-1", Agent: serviceStatus{Healthy: true}}, {Name: "node-2", Agent: serviceStatus{Error: "it does not answer"}}},
		KubernetesStatus: &kubernetesStatus{
			Version: "v1.37.2", APIServer: serviceStatus{Healthy: true},
			Machines: []kubernetesMachine{
				{Name: "control-plane", On: true, Ready: true, Programs: []cluster.ProgramState{{Name: "etcd", PID: 7}, {Name: "kube-apiserver", PID: 9, Restarts: 1, LastEnd: "killed by SIGKILL"}}},
				{Name: "node-1", On: true, Why: "kubelet does not run (exit status 1)", Programs: []cluster.ProgramState{{Name: "containerd", PID: 8}, {Name: "kubelet", Restarts: 2, LastEnd: "exit status 1"}}},
				{Name: "node-2", Why: "its power is off"},
			},
		},
	}
	var b strings.Builder
	s.write(&b, false, aDay.Add(time.Minute))
	golden(t, "kubernetes-status.txt", b.String())
	if d := cmp.Diff([]string{"the agent of node-2", "node node-1", "node node-2"}, s.ill()); d != "" {
		t.Errorf("ill (-want +got):\n%s", d)
	}
	s.Kubernetes.CNI = cluster.CNIPtp
	if got := s.ill(); len(got) != 2 {
		t.Errorf("with another CNI an agent is missed: %q", got)
	}
}

func TestMachineThatDoesNotStayUp(t *testing.T) {
	h, _ := aKubernetes(t)
	w := &machineWatch{home: h}
	self, err := procOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if err := writeJSON(h.initPID("node-1"), self); err != nil {
		t.Fatal(err)
	}
	state := filepath.Join(h.node("node-1"), "state.json")
	for _, c := range []struct {
		restarts, pid int
		says          string
	}{{0, 0, ""}, {2, 0, ""}, {3, 12, ""}, {3, 0, "kubelet on node-1 does not stay up: exit status 1, 3 times"}} {
		st := cluster.State{Programs: []cluster.ProgramState{{Name: "kubelet", PID: c.pid, Restarts: c.restarts, LastEnd: "exit status 1"}}}
		if err := writeJSON(state, st); err != nil {
			t.Fatal(err)
		}
		err := w.ill("node-1")
		if (err == nil) != (c.says == "") || (err != nil && err.Error() != c.says) {
			t.Errorf("%d restarts: %v", c.restarts, err)
		}
	}
	self.Start++
	if err := writeJSON(h.initPID("node-1"), self); err != nil {
		t.Fatal(err)
	}
	if err := w.ill("node-1"); err == nil || !strings.Contains(err.Error(), "first process of node-1 ended") {
		t.Errorf("a machine that is off: %v", err)
	}
}

func TestNewestContainerLog(t *testing.T) {
	h, _ := aKubernetes(t)
	if got := h.containerLog("node-1", "kube-system_underlay-*", "agent"); got != "" {
		t.Errorf("without any: %q", got)
	}
	pods := filepath.Join(cluster.LogDir(h.dir(), h.data(), "node-1"), "pods")
	for i, name := range []string{"kube-system_underlay-b_2/agent/0.log", "kube-system_underlay-a_1/agent/3.log", "kube-system_other_1/agent/0.log"} {
		path := filepath.Join(pods, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, aDay, aDay.Add(time.Duration(i)*time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	if got := h.containerLog("node-1", "kube-system_underlay-*", "agent"); !strings.HasSuffix(got, "underlay-a_1/agent/3.log") {
		t.Errorf("newest: %q", got)
	}
}

func TestValuesOfALab(t *testing.T) {
	v := underlayValues("demo", "ghcr.io/underlay-cni/underlay:lab-0123", upOptions{prefixes: true, agentEnv: []string{"WARM_IP_TARGET=5"}})
	want := map[string]any{
		"extraEnv":  []map[string]string{{"name": "WARM_IP_TARGET", "value": "5"}},
		"extraArgs": []string{"--security-groups-poller=/run/underlay/poller.sock"},
		"cluster":   map[string]any{"name": "demo"},
		"image":     map[string]any{"tag": "lab-0123", "pullPolicy": "IfNotPresent"},
		"prefixes":  true,
		"ec2": map[string]any{
			"endpoint": "http://169.254.171.24:7424", "region": "us-east-1",
			"accessKeyId": nodeKey, "secretAccessKey": "underlay",
		},
	}
	if d := cmp.Diff(want, v); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}
