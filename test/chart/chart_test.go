package chart

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

func TestLint(t *testing.T) {
	for _, file := range append(valueFiles(t), "") {
		args := []string{"lint", "--strict", "--quiet", chart}
		if file != "" {
			args = append(args, "--values", file)
		}
		if out, err := helm(t, args...); err != nil {
			t.Errorf("%s: %v%s", file, err, out)
		}
	}
}

// What the agent may do on a node is what docs/reference/chart.md says, and no
// more.
func TestAgentHasTheLeastPrivilege(t *testing.T) {
	for _, file := range append(valueFiles(t), "/dev/null") {
		t.Run(file, func(t *testing.T) {
			r := render(t, "--values", file)
			pod := r.DaemonSet.Spec.Template.Spec
			if !pod.HostNetwork || pod.HostPID || pod.HostIPC {
				t.Errorf("host network, PIDs, IPC: %v %v %v, want the network alone", pod.HostNetwork, pod.HostPID, pod.HostIPC)
			}
			for _, c := range append(pod.InitContainers, pod.Containers...) {
				s := c.SecurityContext
				want := &corev1.SecurityContext{
					RunAsUser: new(int64), RunAsGroup: new(int64), Privileged: new(bool), AllowPrivilegeEscalation: new(bool), ReadOnlyRootFilesystem: ptr(true),
					SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
					Capabilities:   &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: []corev1.Capability{"NET_ADMIN", "SYS_ADMIN"}},
				}
				if diff := cmp.Diff(want, s); diff != "" {
					t.Errorf("security context of %s:\n%s", c.Name, diff)
				}
			}
		})
	}
}

func ptr[T any](v T) *T { return &v }

// Each path of the host is there for a reason, mounted where the agent's flags
// say, and none is there unused.
func TestHostPaths(t *testing.T) {
	r := render(t)
	type path struct {
		host      string
		kind      corev1.HostPathType
		container string
		readOnly  bool
	}
	var got []path
	mounts := r.agent(t).VolumeMounts
	for _, v := range r.DaemonSet.Spec.Template.Spec.Volumes {
		if v.HostPath == nil {
			t.Errorf("volume %s is no path of the host", v.Name)
			continue
		}
		i := slices.IndexFunc(mounts, func(m corev1.VolumeMount) bool { return m.Name == v.Name })
		if i < 0 {
			t.Errorf("volume %s is mounted nowhere", v.Name)
			continue
		}
		got = append(got, path{v.HostPath.Path, *v.HostPath.Type, mounts[i].MountPath, mounts[i].ReadOnly})
		if v.Name == "bpffs" && (mounts[i].MountPropagation == nil || *mounts[i].MountPropagation != corev1.MountPropagationHostToContainer) {
			t.Error("a bpffs that the node mounts after the agent's start would not be seen")
		}
	}
	want := []path{
		{"/run/underlay", corev1.HostPathDirectoryOrCreate, "/run/underlay", false},
		{"/sys/fs/bpf", corev1.HostPathDirectory, "/host/sys/fs/bpf", false},
		{"/etc/cni/net.d", corev1.HostPathDirectoryOrCreate, "/host/etc/cni/net.d", false},
		{"/opt/cni/bin", corev1.HostPathDirectoryOrCreate, "/host/opt/cni/bin", false},
		{"/proc/sys/net", corev1.HostPathDirectory, "/host/proc/sys/net", false},
		{"/var/run/aws-node", corev1.HostPathDirectoryOrCreate, "/var/run/aws-node", true},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(path{})); diff != "" {
		t.Error(diff)
	}
	if len(mounts) != len(want) {
		t.Errorf("%d mounts, want %d", len(mounts), len(want))
	}
	for _, arg := range []string{
		"--socket=/run/underlay/agent.sock", "--bpffs=/host/sys/fs/bpf/underlay", "--proc-sys-net=/host/proc/sys/net",
		"--cni-conf=/host/etc/cni/net.d/10-underlay.conflist", "--cni-bin=/host/opt/cni/bin",
	} {
		if !slices.Contains(r.agent(t).Args, arg) {
			t.Errorf("args lack %s: %q", arg, r.agent(t).Args)
		}
	}
}

// The agent must run where nothing else does yet, and be exchanged without the
// old and the new one waiting for each other.
func TestSchedulingAndUpdate(t *testing.T) {
	r := render(t)
	spec := r.DaemonSet.Spec
	pod := spec.Template.Spec
	if diff := cmp.Diff([]corev1.Toleration{{Operator: corev1.TolerationOpExists}}, pod.Tolerations); diff != "" {
		t.Errorf("tolerations:\n%s", diff)
	}
	if pod.PriorityClassName != "system-node-critical" || pod.DNSPolicy != corev1.DNSDefault || pod.ServiceAccountName != r.Account.Name {
		t.Errorf("priority %q, DNS %q, account %q", pod.PriorityClassName, pod.DNSPolicy, pod.ServiceAccountName)
	}
	// With hostNetwork two agents cannot have the same port on a node, and the
	// new one waits for the old one's end: a surge would never end.
	u := spec.UpdateStrategy.RollingUpdate
	if u == nil || u.MaxSurge != nil || *u.MaxUnavailable != intstr.FromString("10%") {
		t.Errorf("update strategy %+v", u)
	}
	for key, value := range spec.Selector.MatchLabels {
		if spec.Template.Labels[key] != value {
			t.Errorf("the selector wants %s=%s, the pods have %q", key, value, spec.Template.Labels[key])
		}
	}
	c := r.agent(t)
	for name, p := range map[string]*corev1.Probe{"/livez": c.LivenessProbe, "/readyz": c.ReadinessProbe} {
		if p == nil || p.HTTPGet.Host != "127.0.0.1" || p.HTTPGet.Path != name || p.HTTPGet.Port.IntValue() != 9464 {
			t.Errorf("probe %s: %+v", name, p)
		}
	}
	if diff := cmp.Diff(corev1.ResourceList(nil), c.Resources.Limits); diff != "" {
		t.Errorf("limits:\n%s", diff)
	}
}

func TestRightsAreTheLeast(t *testing.T) {
	r := render(t)
	want := []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"nodes"}, Verbs: []string{"get", "patch"}},
		{APIGroups: []string{""}, Resources: []string{"nodes/status"}, Verbs: []string{"patch"}},
		{APIGroups: []string{""}, Resources: []string{"events"}, Verbs: []string{"create", "patch"}},
	}
	if diff := cmp.Diff(want, r.ClusterRole.Rules); diff != "" {
		t.Errorf("cluster role:\n%s", diff)
	}
	want = []rbacv1.PolicyRule{{APIGroups: []string{"apps"}, Resources: []string{"daemonsets"}, ResourceNames: []string{r.DaemonSet.Name}, Verbs: []string{"get"}}}
	if diff := cmp.Diff(want, r.Role.Rules); diff != "" {
		t.Errorf("role:\n%s", diff)
	}
	refs := []rbacv1.RoleRef{{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "underlay"}, {APIGroup: rbacv1.GroupName, Kind: "Role", Name: "underlay"}}
	if diff := cmp.Diff(refs, r.Bindings); diff != "" {
		t.Errorf("bindings:\n%s", diff)
	}
	for _, s := range r.Subjects {
		if s != (rbacv1.Subject{Kind: "ServiceAccount", Name: "underlay", Namespace: "kube-system"}) {
			t.Errorf("bound to %+v", s)
		}
	}
	// The policies are for this account, and deny when they cannot be evaluated.
	if len(r.Policies) != 2 || len(r.PoliciesUsed) != 2 {
		t.Fatalf("%d policies, %d bindings", len(r.Policies), len(r.PoliciesUsed))
	}
	for i, p := range r.Policies {
		if used := r.PoliciesUsed[i].Spec; used.PolicyName != p.Name || !slices.Equal(used.ValidationActions, []admissionv1.ValidationAction{admissionv1.Deny}) || *p.Spec.FailurePolicy != admissionv1.Fail {
			t.Errorf("policy %+v, binding %+v", p, used)
		}
		if got := p.Spec.MatchConditions[0].Expression; got != "request.userInfo.username == 'system:serviceaccount:kube-system:underlay'" {
			t.Errorf("policy %s is for %s", p.Name, got)
		}
	}
}

// A second release, with other settings on other nodes, shares no name with the
// first.
func TestTwoReleasesShareNothing(t *testing.T) {
	out, err := helm(t, "template", "underlay-big", chart, "--namespace", "net")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"name: underlay-big\n", "name: underlay-big-own-node", "system:serviceaccount:net:underlay-big'", "resourceNames: [underlay-big]"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if strings.Contains(out, "\n  name: underlay\n") {
		t.Errorf("an object is named underlay:\n%s", out)
	}
}

func env(c *corev1.Container) map[string]string {
	m := map[string]string{}
	for _, e := range c.Env {
		m[e.Name] = e.Value
		if f := e.ValueFrom; f != nil && f.FieldRef != nil {
			m[e.Name] = "field " + f.FieldRef.FieldPath
		} else if f != nil && f.SecretKeyRef != nil {
			m[e.Name] = "secret " + f.SecretKeyRef.Name + " " + f.SecretKeyRef.Key
		}
	}
	return m
}

func TestSettingsReachTheAgent(t *testing.T) {
	policies := []string{"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding", "ValidatingAdmissionPolicyBinding"}
	base := map[string]string{"NODE_NAME": "field spec.nodeName", "POD_NAMESPACE": "field metadata.namespace", "DAEMONSET_NAME": "underlay"}
	for _, tc := range []struct {
		values string
		image  string
		args   []string
		env    map[string]string
		kinds  []string // beside what is always there
	}{
		{"/dev/null", "ghcr.io/underlay-cni/underlay:" + appVersion(t),
			[]string{"--node-name=$(NODE_NAME)", "--cluster=default", "--imds=deny", "--snat=eni", "--hook=auto", "--prefixes=false", "--log-level=info", "--metrics-listen=127.0.0.1:9464"},
			nil, policies},
		{"testdata/eks-irsa.yaml", "ghcr.io/underlay-cni/underlay:" + appVersion(t),
			[]string{"--cluster=prod", "--prefixes=true"},
			map[string]string{"WARM_PREFIX_TARGET": "1", "MAX_ENI": "4"}, policies},
		{"testdata/lab.yaml", "ghcr.io/underlay-cni/underlay:lab-0123456789ab",
			[]string{"--cluster=demo"},
			map[string]string{"AWS_ENDPOINT_URL_EC2": "http://169.254.171.24:7424", "AWS_REGION": "us-east-1",
				"AWS_ACCESS_KEY_ID": "secret underlay-ec2 AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY": "secret underlay-ec2 AWS_SECRET_ACCESS_KEY"},
			append([]string{"Secret"}, policies...)},
		{"testdata/monitored.yaml", "registry.example.com:5000/net/underlay@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
			[]string{"--imds=allow", "--snat=primary", "--snat-exclude=198.51.100.0/24,203.0.113.0/24", "--direct=false", "--direct-except=10.0.96.0/20", "--hook=tcx", "--log-level=debug", "--sweep=1h30m", "--metrics-listen=0.0.0.0:9999"},
			map[string]string{"WARM_IP_TARGET": "0", "MINIMUM_IP_TARGET": "10", "WARM_ENI_TARGET": "1", "MAX_ENI": "2", "IP_COOLDOWN_PERIOD": "60", "GODEBUG": "gctrace=1"},
			[]string{"PodMonitor", "Service", "ServiceMonitor"}},
	} {
		t.Run(tc.values, func(t *testing.T) {
			r := render(t, "--values", tc.values)
			c := r.agent(t)
			if c.Image != tc.image {
				t.Errorf("image %s, want %s", c.Image, tc.image)
			}
			for _, arg := range tc.args {
				if !slices.Contains(c.Args, arg) {
					t.Errorf("args lack %s: %q", arg, c.Args)
				}
			}
			want := map[string]string{}
			for k, v := range base {
				want[k] = v
			}
			for k, v := range tc.env {
				want[k] = v
			}
			if diff := cmp.Diff(want, env(c)); diff != "" {
				t.Errorf("environment:\n%s", diff)
			}
			kinds := append([]string{"ClusterRole", "ClusterRoleBinding", "DaemonSet", "Role", "RoleBinding", "ServiceAccount"}, tc.kinds...)
			slices.Sort(kinds)
			slices.Sort(r.kinds)
			if diff := cmp.Diff(kinds, r.kinds); diff != "" {
				t.Errorf("objects:\n%s", diff)
			}
		})
	}
}

// A value is a value, whatever YAML or the shell make of its signs.
func TestOddValuesArriveWhole(t *testing.T) {
	file := t.TempDir() + "/values.json"
	odd := `{"cluster":{"name":"a: \"b\" # {c}"},"cni":{"confDir":"/etc/cni, {net}.d"},"ec2":{"accessKeyId":"yes","secretAccessKey":"a+b/c=: #"},"serviceAccount":{"annotations":{"eks.amazonaws.com/role-arn":"arn:aws:iam::1:role/x"}},"podAnnotations":{"n":"1"}}`
	if err := os.WriteFile(file, []byte(odd), 0o600); err != nil {
		t.Fatal(err)
	}
	r := render(t, "--values", file)
	if args := r.agent(t).Args; !slices.Contains(args, `--cluster=a: "b" # {c}`) {
		t.Errorf("args %q", args)
	}
	volumes := r.DaemonSet.Spec.Template.Spec.Volumes
	if !slices.ContainsFunc(volumes, func(v corev1.Volume) bool { return v.HostPath.Path == "/etc/cni, {net}.d" }) {
		t.Errorf("volumes %+v", volumes)
	}
	if r.Secret.StringData["AWS_ACCESS_KEY_ID"] != "yes" || r.Secret.StringData["AWS_SECRET_ACCESS_KEY"] != "a+b/c=: #" {
		t.Errorf("secret %q", r.Secret.StringData)
	}
	if r.Account.Annotations["eks.amazonaws.com/role-arn"] != "arn:aws:iam::1:role/x" || r.DaemonSet.Spec.Template.Annotations["n"] != "1" {
		t.Errorf("annotations %q, %q", r.Account.Annotations, r.DaemonSet.Spec.Template.Annotations)
	}
}

// The secret key is in the Secret and nowhere else.
func TestSecretStaysInItsSecret(t *testing.T) {
	r := render(t, "--values", "testdata/lab.yaml")
	if r.Secret == nil || r.Secret.StringData["AWS_SECRET_ACCESS_KEY"] != "not-to-be-seen" {
		t.Fatalf("secret %+v", r.Secret)
	}
	if strings.Contains(r.withoutUsers, "not-to-be-seen") {
		t.Error("the secret key stands in another object")
	}
}

// Scraped is the agent's own port, by name.
func TestMonitors(t *testing.T) {
	r := render(t, "--values", "testdata/monitored.yaml")
	c := r.agent(t)
	if len(c.Ports) != 1 || c.Ports[0].Name != "metrics" || c.Ports[0].ContainerPort != 9999 || c.ReadinessProbe.HTTPGet.Port.IntValue() != 9999 {
		t.Errorf("ports %+v, probe %+v", c.Ports, c.ReadinessProbe.HTTPGet)
	}
	if r.Service.Spec.ClusterIP != "None" || r.Service.Spec.Ports[0].TargetPort.String() != "metrics" {
		t.Errorf("service %+v", r.Service.Spec)
	}
	for key, value := range r.Service.Spec.Selector {
		if r.DaemonSet.Spec.Template.Labels[key] != value {
			t.Errorf("the service selects %s=%s, the pods have %q", key, value, r.DaemonSet.Spec.Template.Labels[key])
		}
	}
	for kind, list := range map[string]string{"PodMonitor": "podMetricsEndpoints", "ServiceMonitor": "endpoints"} {
		m := r.Others[kind]
		if m["metadata"].(map[string]any)["labels"].(map[string]any)["release"] != "prometheus" {
			t.Errorf("%s lacks the label by which Prometheus selects it", kind)
		}
		if e := m["spec"].(map[string]any)[list].([]any)[0].(map[string]any); e["port"] != "metrics" {
			t.Errorf("%s scrapes %v", kind, e)
		}
	}
}

// To clean a node the agent's place is taken by what cleans: an init container
// that fails until the node is clean, and one that stays.
func TestUninstall(t *testing.T) {
	r := render(t, "--values", "testdata/uninstall.yaml")
	pod := r.DaemonSet.Spec.Template.Spec
	if len(pod.InitContainers) != 1 || !slices.Equal(pod.InitContainers[0].Command, []string{"/underlay-agent", "uninstall"}) {
		t.Errorf("init containers %+v", pod.InitContainers)
	}
	c := r.agent(t)
	if !slices.Equal(c.Command, []string{"/underlay-agent", "uninstall", "--stay"}) || c.LivenessProbe != nil || len(c.Ports) > 0 {
		t.Errorf("container %+v", c)
	}
	if diff := cmp.Diff(c.Args, pod.InitContainers[0].Args); diff != "" {
		t.Errorf("they clean different nodes:\n%s", diff)
	}
}

// The knobs have the names that the agent reads.
func TestKnobsHaveTheAgentsNames(t *testing.T) {
	source, err := os.ReadFile(root + "/cmd/underlay-agent/knobs.go")
	if err != nil {
		t.Fatal(err)
	}
	r := render(t, "--set", "prefixes=true,pool.warmIPTarget=1,pool.minimumIPTarget=2,pool.warmPrefixTarget=3,pool.warmENITarget=4,pool.maxENI=5,pool.ipCooldownPeriod=6")
	got := env(r.agent(t))
	for name, value := range map[string]string{"WARM_IP_TARGET": "1", "MINIMUM_IP_TARGET": "2", "WARM_PREFIX_TARGET": "3", "WARM_ENI_TARGET": "4", "MAX_ENI": "5", "IP_COOLDOWN_PERIOD": "6"} {
		if got[name] != value {
			t.Errorf("%s is %q, want %s", name, got[name], value)
		}
		if !strings.Contains(string(source), `"`+name+`"`) {
			t.Errorf("the agent does not read %s", name)
		}
	}
}
