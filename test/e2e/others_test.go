package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/test/lab"
)

// An address that the node takes for itself is no pod's, and one that another
// CNI routes to its own pod neither.
func TestAddressesThatOthersUse(t *testing.T) {
	l := lab.Up(t, "--nodes", "1", "--agent-env", "WARM_IP_TARGET=4")
	n := l.Nodes[0]
	free := func(state string) (out []netip.Addr) {
		for _, a := range l.Inspect(n).Addresses {
			if a.State == state {
				out = append(out, a.IP)
			}
		}
		return out
	}
	lab.Eventually(t, 10*time.Second, "four addresses are free", func() error {
		if got := free("free"); len(got) < 4 {
			return fmt.Errorf("free are %v", got)
		}
		return nil
	})
	taken := free("free")[:2]
	l.Underlay("node", "exec", n.Name, "--", "ip", "addr", "add", taken[0].String()+"/32", "dev", "eth0")
	l.Underlay("node", "exec", n.Name, "--", "ip", "route", "add", taken[1].String()+"/32", "dev", "eth0", "table", "100")
	lab.Eventually(t, 10*time.Second, "the agent sees who uses what", func() error {
		if got := free("foreign"); !slices.Equal(got, taken) {
			return fmt.Errorf("foreign are %v, want %v", got, taken)
		}
		return nil
	})
	l.Underlay("run", "web", "--count", "6")
	for pod, ip := range l.Pods() {
		if slices.Contains(taken, netip.MustParseAddr(ip)) {
			t.Errorf("%s has %s, which others use", pod, ip)
		}
	}
	l.Underlay("node", "exec", n.Name, "--", "ip", "addr", "del", taken[0].String()+"/32", "dev", "eth0")
	lab.Eventually(t, 10*time.Second, "an address that is free again rests", func() error {
		if got := free("cooling"); !slices.Contains(got, taken[0]) {
			return fmt.Errorf("cooling are %v", got)
		}
		return nil
	})
}

// Beside the AWS VPC CNI's agent ours serves nothing and changes nothing, and
// says what to do; when that one is gone it serves by itself.
func TestBesideTheAWSVPCCNI(t *testing.T) {
	l := lab.Up(t, "--nodes", "1")
	n := l.Nodes[0]
	before := l.Run("before")
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(sleep)
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), "aws-k8s-agent")
	if err := os.WriteFile(program, b, 0o755); err != nil {
		t.Fatal(err)
	}
	rival := exec.CommandContext(t.Context(), "nsenter", "--net=/run/netns/"+filepath.Base(n.Netns), program, "600")
	if err := rival.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	end := func() {
		if !ended {
			ended = true
			_ = rival.Process.Kill()
			_ = rival.Wait()
		}
	}
	t.Cleanup(end)

	writes := l.Writes()
	l.Kill("underlay-agent", n.AgentSocket)
	started := make(chan string, 1)
	go func() {
		_, stderr, _ := l.Try("node", "restart-agent", n.Name)
		started <- stderr
	}()
	lab.Eventually(t, 20*time.Second, "the agent says why it does not serve", func() error {
		out, _, _ := l.Try("status")
		if !strings.Contains(out, "AWS VPC CNI") || !strings.Contains(out, "Cordon and drain") || !strings.Contains(out, fmt.Sprint(rival.Process.Pid)) {
			return fmt.Errorf("status says:\n%s", out)
		}
		return nil
	})
	if _, stderr, code := l.Try("run", "during"); code == 0 || !strings.Contains(stderr, "AWS VPC CNI") {
		t.Errorf("a pod beside the AWS VPC CNI: exit code %d, %s", code, stderr)
	}
	if got := l.Writes(); got != writes {
		t.Errorf("%d changes in EC2 beside the AWS VPC CNI", got-writes)
	}
	end()
	select {
	case <-started:
	case <-time.After(30 * time.Second):
		t.Fatal("the agent does not serve after the other's end")
	}
	l.Run("after")
	l.Underlay("exec", "after", "--", "ping", "-c", "1", "-W", "2", before.IP.String())
}

// What a dead node left is deleted by the agent that has the cluster's sweep;
// what a living one has made is not.
func TestSweepOfDeadNodes(t *testing.T) {
	l := lab.Up(t, "--nodes", "1", "--agent-arg=--sweep=1s")
	n := l.Nodes[0]
	subnet := l.Inspect(n).Node.Subnet
	left := func(instance string) string {
		var made struct {
			NetworkInterface struct{ NetworkInterfaceId string }
		}
		l.AWS(&made, "ec2", "create-network-interface", "--subnet-id", subnet, "--tag-specifications",
			fmt.Sprintf("ResourceType=network-interface,Tags=[{Key=cluster.k8s.amazonaws.com/name,Value=%s},{Key=node.k8s.amazonaws.com/instance_id,Value=%s},{Key=node.k8s.amazonaws.com/createdAt,Value=2026-01-01T00:00:00Z}]", l.Name, instance))
		return made.NetworkInterface.NetworkInterfaceId
	}
	dead := left("i-0123456789abcdef0")
	var vms struct {
		Reservations []struct {
			Instances []struct{ InstanceId string }
		}
	}
	l.AWS(&vms, "ec2", "describe-instances", "--filters", "Name=instance-state-name,Values=running")
	alive := ""
	for _, r := range vms.Reservations {
		for _, i := range r.Instances {
			if i.InstanceId != n.InstanceID {
				alive = i.InstanceId
			}
		}
	}
	if alive == "" {
		t.Fatal("no other instance runs")
	}
	kept := left(alive)
	exists := func(id string) bool {
		var out struct{ NetworkInterfaces []struct{} }
		l.AWS(&out, "ec2", "describe-network-interfaces", "--filters", "Name=network-interface-id,Values="+id)
		return len(out.NetworkInterfaces) > 0
	}
	lab.Eventually(t, 20*time.Second, "what the dead node left is deleted", func() error {
		if exists(dead) {
			return fmt.Errorf("%s is there", dead)
		}
		return nil
	})
	if !exists(kept) {
		t.Error("an interface of a living instance was deleted")
	}
}
