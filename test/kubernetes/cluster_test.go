package kubernetes

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/cli/kubebuild"
	"github.com/underlay-cni/underlay/internal/testenv"
	"github.com/underlay-cni/underlay/test/lab"
)

// cluster is a lab with a Kubernetes.
type cluster struct {
	*lab.Lab
	t          testing.TB
	Kubeconfig string
	Bin        string // where the lab's Kubernetes programs are
}

var kept *cluster

// shared returns the cluster that most tests have in common, whole: who breaks
// something on it waits until it is mended.
func shared(t *testing.T) *cluster {
	t.Helper()
	testenv.Require(t, "root", "bpf", "cluster")
	if kept == nil && *labName != "" {
		kept = newCluster(t, lab.Attach(t, *labName))
	}
	if kept == nil {
		start := time.Now()
		kept = newCluster(t, lab.Keep(t, upArgs()...))
		t.Logf("cluster up in %v", time.Since(start).Round(100*time.Millisecond))
	}
	c := kept.with(t)
	c.awaitWhole()
	return c
}

func upArgs(more ...string) []string {
	return append([]string{"--kubernetes", "--nodes", "3", "--zones", "3", "--internet", "--kube-proxy", *proxy}, more...)
}

func newCluster(t testing.TB, l *lab.Lab) *cluster {
	return &cluster{Lab: l, t: t, Kubeconfig: l.Kubernetes.Kubeconfig, Bin: l.Kubernetes.Bin}
}

func (c *cluster) with(t testing.TB) *cluster {
	other := *c
	other.t, other.Lab = t, c.Lab.With(t)
	return &other
}

// tryKubectl runs kubectl and returns what it printed.
func (c *cluster) tryKubectl(stdin string, args ...string) (string, error) {
	cmd := exec.Command(filepath.Join(c.Bin, "kubectl"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig)
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

func (c *cluster) kubectl(args ...string) string {
	c.t.Helper()
	out, err := c.tryKubectl("", args...)
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

// apply applies a manifest in a namespace.
func (c *cluster) apply(namespace, manifest string) {
	c.t.Helper()
	if _, err := c.tryKubectl(manifest, "apply", "-n", namespace, "-f", "-"); err != nil {
		c.t.Fatal(err)
	}
}

// get decodes what kubectl get -o json prints.
func get[T any](c *cluster, args ...string) (T, error) {
	var v T
	out, err := c.tryKubectl("", append([]string{"get", "-o", "json"}, args...)...)
	if err == nil {
		err = json.Unmarshal([]byte(out), &v)
	}
	return v, err
}

// namespace makes a namespace that goes with the test.
func (c *cluster) namespace(name string) string {
	c.t.Helper()
	c.kubectl("create", "namespace", name)
	c.t.Cleanup(func() {
		if c.t.Failed() {
			c.logSick(name)
		}
		if _, err := c.tryKubectl("", "delete", "namespace", name, "--timeout=90s"); err != nil {
			c.t.Error(err)
		}
	})
	// Pods are refused until their service account is there.
	lab.Eventually(c.t, 30*time.Second, "the default service account of "+name, func() error {
		_, err := c.tryKubectl("", "get", "serviceaccount", "default", "-n", name)
		return err
	})
	return name
}

// The little of Kubernetes' objects that the checks look at.
type (
	meta struct {
		Name, Namespace, UID string
		Annotations, Labels  map[string]string
		DeletionTimestamp    *time.Time
	}
	condition struct{ Type, Status, Reason, Message string }
	pod       struct {
		Metadata meta
		Spec     struct {
			NodeName    string
			HostNetwork bool
		}
		Status struct {
			Phase      string
			PodIP      string
			Conditions []condition
		}
	}
	node struct {
		Metadata meta
		Spec     struct {
			Taints []struct{ Key, Effect string }
		}
		Status struct {
			Conditions            []condition
			Capacity, Allocatable map[string]string
		}
	}
	list[T any] struct{ Items []T }
)

func (p pod) ready() bool {
	return is(p.Status.Conditions, "Ready") && p.Metadata.DeletionTimestamp == nil
}

func (p pod) ip() netip.Addr {
	a, _ := netip.ParseAddr(p.Status.PodIP)
	return a
}

func is(conditions []condition, name string) bool {
	return slices.ContainsFunc(conditions, func(c condition) bool { return c.Type == name && c.Status == "True" })
}

func (c *cluster) pods(namespace string, more ...string) []pod {
	c.t.Helper()
	l, err := get[list[pod]](c, append([]string{"pods", "-n", namespace}, more...)...)
	if err != nil {
		c.t.Fatal(err)
	}
	return l.Items
}

func (c *cluster) nodes() []node {
	c.t.Helper()
	l, err := get[list[node]](c, "nodes")
	if err != nil {
		c.t.Fatal(err)
	}
	return l.Items
}

// awaitPods waits until exactly n pods of a namespace are there, all Ready.
func (c *cluster) awaitPods(namespace string, n int, limit time.Duration, more ...string) []pod {
	c.t.Helper()
	var pods []pod
	lab.Eventually(c.t, limit, fmt.Sprintf("%d pods Ready in %s", n, namespace), func() error {
		l, err := get[list[pod]](c, append([]string{"pods", "-n", namespace}, more...)...)
		if err != nil {
			return err
		}
		pods = l.Items
		var waits []string
		for _, p := range pods {
			if !p.ready() {
				waits = append(waits, p.Metadata.Name+" on "+p.Spec.NodeName+" is "+p.Status.Phase)
			}
		}
		if len(waits) > 0 || len(pods) != n {
			return fmt.Errorf("%d are there; not Ready: %s", len(pods), strings.Join(waits, ", "))
		}
		return nil
	})
	return pods
}

// awaitWhole waits until all nodes are Ready and untainted, the agents serve and
// the cluster's DNS answers. If they do not, the test's log has what is known of
// the pods that are not Ready.
func (c *cluster) awaitWhole() {
	c.t.Helper()
	defer func() {
		if c.t.Failed() {
			c.logSick("kube-system")
		}
	}()
	lab.Eventually(c.t, 3*time.Minute, "the cluster is whole", func() error {
		nodes, err := get[list[node]](c, "nodes")
		if err != nil {
			return err
		}
		if len(nodes.Items) != len(c.Lab.Nodes) {
			return fmt.Errorf("%d nodes of %d are there", len(nodes.Items), len(c.Lab.Nodes))
		}
		for _, n := range nodes.Items {
			if !is(n.Status.Conditions, "Ready") || len(n.Spec.Taints) > 0 {
				return fmt.Errorf("node %s: conditions %v, taints %v", n.Metadata.Name, n.Status.Conditions, n.Spec.Taints)
			}
		}
		pods, err := get[list[pod]](c, "pods", "-n", "kube-system")
		if err != nil {
			return err
		}
		dns, agents := 0, 0
		for _, p := range pods.Items {
			if !p.ready() {
				return fmt.Errorf("pod %s on %s is %s: conditions %v", p.Metadata.Name, p.Spec.NodeName, p.Status.Phase, p.Status.Conditions)
			}
			switch {
			case p.Metadata.Labels["k8s-app"] == "kube-dns":
				dns++
			case strings.HasPrefix(p.Metadata.Name, "underlay-"):
				agents++
			}
		}
		if dns == 0 || agents != len(c.Lab.Nodes) {
			return fmt.Errorf("%d pods of DNS and %d agents are Ready", dns, agents)
		}
		return nil
	})
}

// logSick logs a namespace's pods and events, and of pods that are not Ready what
// their containers have said.
func (c *cluster) logSick(namespace string) {
	out, _ := c.tryKubectl("", "get", "pods,events", "-n", namespace, "-o", "wide")
	c.t.Logf("in namespace %s:\n%s", namespace, out)
	l, _ := get[list[pod]](c, "pods", "-n", namespace)
	for _, p := range l.Items {
		if p.ready() {
			continue
		}
		described, _ := c.tryKubectl("", "describe", "pod", "-n", namespace, p.Metadata.Name)
		said, _ := c.tryKubectl("", "logs", "-n", namespace, p.Metadata.Name, "--all-containers", "--tail=100")
		before, _ := c.tryKubectl("", "logs", "-n", namespace, p.Metadata.Name, "--all-containers", "--tail=100", "--previous")
		c.t.Logf("%s\nsaid:\n%s\nsaid before it was started again:\n%s", described, said, before)
	}
}

// netns returns a path of the network namespace of a pod: that of its first
// process, which lives as long as the pod. Processes of a pod are found by its
// UID in the name of their cgroup.
func (c *cluster) netns(p pod) string {
	c.t.Helper()
	path := ""
	lab.Eventually(c.t, 10*time.Second, "a process of pod "+p.Metadata.Name, func() error {
		entries, err := os.ReadDir("/proc")
		if err != nil {
			return err
		}
		for _, e := range entries {
			if _, err := strconv.Atoi(e.Name()); err != nil {
				continue
			}
			cgroup, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cgroup"))
			comm, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "comm"))
			if bytes.Contains(cgroup, []byte("/pod"+p.Metadata.UID)) && string(comm) == "pause\n" {
				path = filepath.Join("/proc", e.Name(), "ns/net")
				return nil
			}
		}
		return errors.New("no pause process has its UID in a cgroup's name")
	})
	return path
}

// idle is a manifest of a pod that does nothing, and is Ready at once.
func idle(name, node string, more string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, labels: {app: %[1]s}}
spec:
  nodeName: %[2]s
  terminationGracePeriodSeconds: 0
  containers:
  - {name: c, image: %[3]s, args: [pause]%[4]s}
---`, name, node, agnhost, more)
}

// agnhost is upstream's image of test servers; every node has it.
const agnhost = "registry.k8s.io/e2e-test-images/agnhost:2.66.1"

// suiteBin returns a folder with e2e.test, ginkgo and kubectl.
func suiteBin(t *testing.T) string {
	t.Helper()
	if *binDir != "" {
		dir, err := filepath.Abs(*binDir)
		if err != nil {
			t.Fatal(err)
		}
		return dir
	}
	last := time.Now()
	made, err := kubebuild.Ensure(t.Context(), kubebuild.Options{
		Source: "../..", Programs: lab.Bin, Want: []string{"kubectl", "ginkgo", "e2e.test"},
		Progress: func(what string, done, of int) {
			if time.Since(last) > 10*time.Second {
				last = time.Now()
				t.Logf("building: %d of %d, %s", done, of, what)
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return made.Bin
}
