package e2e

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi/install"
	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/test/lab"
)

// An agent installs plugin and list, says over HTTP how it is, and `uninstall`
// takes the node back to what it was: in the kernel, the folders and EC2.
func TestInstallAndUninstall(t *testing.T) {
	conf, bin := filepath.Join(t.TempDir(), install.ConfList), t.TempDir()
	flags := []string{"--cni-conf=" + conf, "--cni-bin=" + bin}
	args := []string{"--nodes", "1", "--agent-arg=--metrics-listen=127.0.0.1:9464"}
	for _, f := range flags {
		args = append(args, "--agent-arg="+f)
	}
	l := lab.Up(t, args...)
	n := l.Nodes[0]
	await(t, "the list", func() bool { _, err := os.Stat(conf); return err == nil })
	if !bytes.Equal(file(t, filepath.Join(bin, "underlay-cni")), file(t, filepath.Join(lab.Bin, "underlay-cni"))) {
		t.Error("the plugin is another one")
	}
	if list := file(t, conf); !strings.Contains(string(list), n.AgentSocket) {
		t.Errorf("the list names another socket:\n%s", list)
	}
	await(t, "readiness", func() bool { code, _ := get(t, n, "/readyz"); return code == http.StatusOK })
	if code, body := get(t, n, "/livez"); code != http.StatusOK {
		t.Errorf("/livez: %d %s", code, body)
	}
	if code, body := get(t, n, "/metrics"); code != http.StatusOK || !strings.Contains(body, "underlay_ready 1") {
		t.Errorf("/metrics: %d %s", code, body)
	}

	// Twelve pods need a second interface.
	l.Underlay("run", "web", "--count", "12")
	if enis := interfaces(l, n); len(enis) < 2 {
		t.Errorf("interfaces %v", enis)
	}
	if out, code := uninstall(t, l, n, flags...); code != 1 || !strings.Contains(out, "an agent runs on this node") {
		t.Errorf("beside an agent: %d\n%s", code, out)
	}
	stopAgent(t, l, n)
	if out, code := uninstall(t, l, n, flags...); code != 1 || !strings.Contains(out, "12 endpoints are in use") || !strings.Contains(out, "run this again") {
		t.Errorf("with pods: %d\n%s", code, out)
	}
	if _, err := os.Stat(conf); err != nil {
		t.Errorf("the list went while pods need it: %v", err)
	}
	l.Underlay("rm", "--all") // the DELs find no agent, and the namespaces go
	for range 2 {
		if out, code := uninstall(t, l, n, flags...); code != 0 || !strings.Contains(out, "node is clean") {
			t.Fatalf("%d\n%s", code, out)
		}
		assertClean(t, l, n)
		for _, dir := range []string{filepath.Dir(conf), bin} {
			if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
				t.Errorf("%s holds %v, %v", dir, left, err)
			}
		}
	}
	// And an agent starts on it as on any other.
	l.Underlay("node", "restart-agent", n.Name)
	l.Run("again")
}

// With --force pods are cut off, and the node is clean all the same.
func TestUninstallByForce(t *testing.T) {
	l := lab.Up(t, "--nodes", "1")
	n := l.Nodes[0]
	l.Run("web")
	stopAgent(t, l, n)
	if out, code := uninstall(t, l, n, "--force"); code != 0 {
		t.Errorf("%d\n%s", code, out)
	}
	assertClean(t, l, n)
}

func uninstall(t *testing.T, l *lab.Lab, n lab.Node, flags ...string) (out string, code int) {
	t.Helper()
	args := append([]string{"--net=" + n.Netns, filepath.Join(lab.Bin, "underlay-agent"), "uninstall",
		"--socket", n.AgentSocket, "--bpffs", filepath.Join(l.Dir(), "bpf", "nodes", n.Name), "--cluster", l.Name}, flags...)
	cmd := exec.Command("nsenter", args...)
	cmd.Env = append(os.Environ(), "AWS_ENDPOINT_URL_EC2=http://169.254.171.24:7424", "AWS_REGION=us-east-1", "AWS_ACCESS_KEY_ID=AKIAUNDERLAYNODE0000", "AWS_SECRET_ACCESS_KEY=underlay",
		"AWS_CONFIG_FILE=/dev/null", "AWS_SHARED_CREDENTIALS_FILE=/dev/null")
	b, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(b), cmd.ProcessState.ExitCode()
}

// assertClean checks that nothing of the agent is on the node.
func assertClean(t *testing.T, l *lab.Lab, n lab.Node) {
	t.Helper()
	for _, tc := range []struct{ command, sign string }{
		{"ip rule", "30060"}, {"ip route show table all", "proto 117"}, {"ip -o link", ": ul"}, {"nft list tables", "underlay"},
	} {
		out, err := exec.Command("nsenter", append([]string{"--net=" + n.Netns}, strings.Fields(tc.command)...)...).CombinedOutput()
		if err != nil || strings.Contains(string(out), tc.sign) {
			t.Errorf("%s: %v\n%s", tc.command, err, out)
		}
	}
	for _, path := range []string{filepath.Join(l.Dir(), "bpf", "nodes", n.Name), n.AgentSocket, n.AgentSocket + ".lock", n.AgentSocket + ".spool"} {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", path, err)
		}
	}
	enis := interfaces(l, n)
	for id, addrs := range enis {
		if len(enis) != 1 || len(addrs) != 1 || addrs[0] != n.IP {
			t.Errorf("EC2 lists %s with %v", id, addrs)
		}
	}
}

// interfaces returns the addresses of a node's interfaces, as EC2 lists them.
func interfaces(l *lab.Lab, n lab.Node) map[string][]netip.Addr {
	var out struct {
		NetworkInterfaces []struct {
			NetworkInterfaceId string //nolint:revive // EC2's spelling
			PrivateIpAddresses []struct{ PrivateIpAddress netip.Addr }
		}
	}
	l.AWS(&out, "ec2", "describe-network-interfaces", "--filters", "Name=attachment.instance-id,Values="+n.InstanceID)
	enis := map[string][]netip.Addr{}
	for _, e := range out.NetworkInterfaces {
		for _, a := range e.PrivateIpAddresses {
			enis[e.NetworkInterfaceId] = append(enis[e.NetworkInterfaceId], a.PrivateIpAddress)
		}
	}
	return enis
}

func stopAgent(t *testing.T, l *lab.Lab, n lab.Node) {
	t.Helper()
	pid := l.Process("underlay-agent", n.AgentSocket)
	if pid == 0 {
		t.Fatal("no agent runs")
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	await(t, "the agent's end", func() bool { return l.Process("underlay-agent", n.AgentSocket) == 0 })
}

func await(t *testing.T, what string, fn func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !fn(); <-time.After(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func file(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// get asks the agent over HTTP, in its node's network namespace.
func get(t *testing.T, n lab.Node, path string) (code int, body string) {
	t.Helper()
	c := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(_ context.Context, network, addr string) (conn net.Conn, err error) {
		err = nl.Do(n.Netns, func() (err error) {
			conn, err = net.Dial(network, addr)
			return err
		})
		return conn, err
	}}}
	r, err := c.Get("http://127.0.0.1:9464" + path)
	if err != nil {
		return 0, err.Error()
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(b)
}
