package kubernetes

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/testenv"
	"github.com/underlay-cni/underlay/test/lab"
)

// What a person finds after underlay up --kubernetes.
func TestFresh(t *testing.T) {
	c := shared(t)
	for _, n := range c.nodes() {
		if len(n.Spec.Taints) > 0 {
			t.Errorf("%s has taints: %v", n.Metadata.Name, n.Spec.Taints)
		}
		available := condition{}
		for _, cond := range n.Status.Conditions {
			if cond.Type == "NetworkUnavailable" {
				available = cond
			}
		}
		if available.Status != "False" || available.Reason != "UnderlayIsUp" {
			t.Errorf("%s: NetworkUnavailable is %+v", n.Metadata.Name, available)
		}
		if n.Status.Allocatable["pods"] != "29" { // an m5.large: 3 × 9 + 2
			t.Errorf("%s takes %s pods", n.Metadata.Name, n.Status.Allocatable["pods"])
		}
		if n.Status.Allocatable["underlay.dev/pod-addresses"] != "27" {
			t.Errorf("%s: allocatable pod addresses: %v", n.Metadata.Name, n.Status.Allocatable)
		}
	}
	for _, p := range c.pods("kube-system") {
		if !p.ready() {
			t.Errorf("%s is %s", p.Metadata.Name, p.Status.Phase)
		}
	}
	for _, n := range c.Lab.Nodes {
		if _, err := os.Stat(filepath.Join(n.CNIConfDir, conflist)); err != nil {
			t.Errorf("%s: %v", n.Name, err)
		}
	}
	var status struct {
		VPCD       struct{ Healthy bool }
		NodeStatus []struct {
			Name  string
			Agent struct{ Healthy bool }
		}
		Pods []struct{ Name, IP string }
	}
	if err := json.Unmarshal([]byte(c.Underlay("status", "-o", "json")), &status); err != nil {
		t.Fatal(err)
	}
	if !status.VPCD.Healthy || len(status.NodeStatus) != len(c.Lab.Nodes) || len(status.Pods) == 0 {
		t.Errorf("underlay status: %+v", status)
	}
	for _, n := range status.NodeStatus {
		if !n.Agent.Healthy {
			t.Errorf("underlay status: the agent of %s is not well", n.Name)
		}
	}
}

// What an agent's token may change in the cluster is package admission's to say.
func TestAgentIsHeldToItsOwnNode(t *testing.T) {
	c := shared(t)
	cmd := exec.CommandContext(t.Context(), "go", "test", "-count=1", "-v", "./admission")
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig, "PATH="+c.Bin+":"+os.Getenv("PATH"), "TEST_REQUIRE=kubernetes")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("go test ./admission: %v\n%s", err, out)
	}
}

const conflist = "10-underlay.conflist"

// absent returns an error while one of the paths is there.
func absent(paths ...string) error {
	for _, path := range paths {
		if _, err := os.Stat(path); err == nil {
			return fmt.Errorf("%s is there", path)
		}
	}
	return nil
}

// leftOn returns an error while a node has anything that Underlay made.
func (c *cluster) leftOn(n lab.Node) error {
	if err := absent(filepath.Join(n.CNIConfDir, conflist), filepath.Join(n.CNIBinDir, "underlay-cni")); err != nil {
		return err
	}
	for _, command := range []string{
		"ip -4 rule show | grep -v -e '^0:' -e '^32766:' -e '^32767:'", // all but the kernel's own
		"ip -4 route show table 30060",
		"ip -o link show type veth | grep -v ': eth0@'",
		"nft list tables | grep underlay",
		"ls -A /sys/fs/bpf/underlay",
	} {
		if left := c.Underlay("node", "exec", n.Name, "--", "sh", "-c", "{ "+command+"; } 2>/dev/null || true"); left != "" {
			return fmt.Errorf("%s: %s", command, left)
		}
	}
	if enis, addresses := c.Held(n); enis != 1 || addresses != 1 {
		return fmt.Errorf("EC2 has %d interfaces and %d addresses of it", enis, addresses)
	}
	k, err := get[node](c, "node", n.Name)
	if err != nil {
		return err
	}
	for name := range k.Metadata.Annotations {
		if strings.Contains(name, "underlay.dev/") {
			return fmt.Errorf("the Node has annotation %s", name)
		}
	}
	return nil
}

// Underlay goes and comes while pods live, who do not notice; taken off the
// nodes, it leaves them as they were; installed where EC2 does not answer, it
// gives no pod to the node; and once EC2 answers, all comes up.
func TestUninstallAndInstallAgain(t *testing.T) {
	testenv.Require(t, "cluster")
	c := newCluster(t, lab.Up(t, "--kubernetes", "--nodes", "2", "--kube-proxy", *proxy))
	c.awaitWhole()
	chart := filepath.Join(c.Kubernetes.Source, "deploy/helm/underlay")
	values := filepath.Join(c.Dir(), "kubernetes/values.json")
	gone := func() {
		c.helm("uninstall", "underlay", "-n", "kube-system", "--wait", "--timeout=90s")
		for _, n := range c.Lab.Nodes {
			lab.Eventually(t, time.Minute, "plugin and config list leave "+n.Name, func() error {
				return absent(filepath.Join(n.CNIConfDir, conflist), filepath.Join(n.CNIBinDir, "underlay-cni"))
			})
		}
	}

	ns := c.namespace("stays")
	tr := c.startTraffic(t, ns)
	gone()
	tr.goesOn()
	c.helm("install", "underlay", chart, "-n", "kube-system", "-f", values)
	c.awaitWhole()
	tr.goesOn()
	tr.stop()

	// No pod of Underlay's is left when it is taken off the nodes.
	c.kubectl("delete", "pods", "--all", "-n", ns, "--now")
	c.kubectl("scale", "deployment", "coredns", "-n", "kube-system", "--replicas=0")
	c.awaitPods("kube-system", 0, time.Minute, "-l", "k8s-app=kube-dns")
	c.helm("upgrade", "underlay", chart, "-n", "kube-system", "-f", values, "--set", "uninstall=true", "--set", "updateStrategy.rollingUpdate.maxUnavailable=100%")
	c.kubectl("rollout", "status", "daemonset/underlay", "-n", "kube-system", "--timeout=3m")
	for _, n := range c.Lab.Nodes {
		if err := c.leftOn(n); err != nil {
			t.Errorf("%s is not clean: %v", n.Name, err)
		}
	}
	gone()

	c.helm("install", "underlay", chart, "-n", "kube-system", "-f", values, "--set", "ec2.endpoint=http://169.254.171.24:9")
	c.kubectl("scale", "deployment", "coredns", "-n", "kube-system", "--replicas=1")
	lab.Eventually(t, time.Minute, "agents run that are not Ready", func() error {
		pods := c.pods("kube-system", "-l", "app.kubernetes.io/name=underlay")
		for _, p := range pods {
			if p.Status.Phase != "Running" || p.ready() {
				return fmt.Errorf("%s is %s", p.Metadata.Name, p.Status.Phase)
			}
		}
		if len(pods) != len(c.Lab.Nodes) {
			return fmt.Errorf("there are %d", len(pods))
		}
		return nil
	})
	for _, n := range c.Lab.Nodes {
		if err := absent(filepath.Join(n.CNIConfDir, conflist)); err != nil {
			t.Errorf("%s: %v, though the agent cannot serve", n.Name, err)
		}
	}
	c.helm("upgrade", "underlay", chart, "-n", "kube-system", "-f", values)
	c.awaitWhole()
}

// helm runs the helm that the lab was made with.
func (c *cluster) helm(args ...string) string {
	c.t.Helper()
	out, errOut, code := lab.Execute(c.t, filepath.Join(c.Bin, "helm"), append(args, "--kubeconfig", c.Kubeconfig)...)
	if code != 0 {
		c.t.Fatalf("helm %s: exit %d\n%s%s", strings.Join(args, " "), code, out, errOut)
	}
	return out
}

// A new image replaces the agents one by one, and no packet is lost.
func TestRollingUpgrade(t *testing.T) {
	c := shared(t)
	ns := c.namespace("upgrade")
	image := strings.TrimSpace(c.kubectl("get", "daemonset", "underlay", "-n", "kube-system", "-o", "jsonpath={.spec.template.spec.containers[0].image}"))
	name, tag, _ := strings.Cut(image, ":")
	other := tag + "-again"
	for _, n := range c.Lab.Nodes {
		c.Underlay("node", "exec", n.Name, "--", "ctr", "-n", "k8s.io", "images", "tag", "--force", image, name+":"+other)
	}
	tr := c.startTraffic(t, ns)
	writes := c.Writes()
	for _, to := range []string{other, tag} {
		c.helm("upgrade", "underlay", filepath.Join(c.Kubernetes.Source, "deploy/helm/underlay"), "-n", "kube-system", "--reuse-values", "--set", "image.tag="+to)
		c.kubectl("rollout", "status", "daemonset/underlay", "-n", "kube-system", "--timeout=3m")
		tr.goesOn()
	}
	tr.stop()
	if after := c.Writes(); after != writes {
		t.Errorf("the upgrades made %d EC2 writes", after-writes)
	}
	c.awaitWhole()
}
