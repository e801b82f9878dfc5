package e2e

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/test/lab"
)

// The six verbs of CNI 1.1, each doing what the specification says.
func TestCNIVerbs(t *testing.T) {
	l := lab.Up(t, "--nodes", "1")
	socket := l.Nodes[0].AgentSocket
	config := func(more string) string {
		return fmt.Sprintf(`{"cniVersion":"1.1.0","name":"underlay","type":"underlay-cni","socket":%q%s}`, socket, more)
	}
	netns := map[string]string{}
	for _, id := range []string{"one", "two"} {
		name := "ul-" + l.Name + "-pod-" + id
		if err := nl.NewNamed(name); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = nl.DeleteNamed(name) })
		netns[id] = nl.Path(name)
	}
	call := func(command, id, config string) (string, *lab.CNIError) {
		return plugin(t, command, netns[id], config, "CNI_CONTAINERID="+id)
	}
	must := func(command, id, config string) string {
		t.Helper()
		out, e := call(command, id, config)
		if e != nil {
			t.Fatalf("%s %s: %+v", command, id, e)
		}
		return out
	}

	if out := must("VERSION", "one", config("")); !strings.Contains(out, "1.1.0") {
		t.Errorf("VERSION: %s", out)
	}
	must("STATUS", "one", config(""))

	added := must("ADD", "one", config(""))
	var result struct {
		IPs        []struct{ Address string }
		Interfaces []struct{ Name, Sandbox string }
	}
	if err := json.Unmarshal([]byte(added), &result); err != nil {
		t.Fatal(err)
	}
	if len(result.IPs) != 1 || len(result.Interfaces) != 2 || result.Interfaces[1].Sandbox != netns["one"] {
		t.Fatalf("ADD: %s", added)
	}
	if diff := cmp.Diff(added, must("ADD", "one", config(""))); diff != "" {
		t.Errorf("ADD again answers something else:\n%s", diff)
	}
	two := must("ADD", "two", config(""))

	prev := config(`,"prevResult":` + added)
	must("CHECK", "one", prev)
	if out, err := exec.Command("nsenter", "--net="+netns["one"], "ip", "route", "del", "default").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if _, e := call("CHECK", "one", prev); e == nil || e.Code != 106 || !strings.Contains(e.Msg, "route") {
		t.Errorf("CHECK of a pod without its default route: %+v", e)
	}

	// The runtime knows "two" alone: "one" is taken back.
	must("GC", "one", config(`,"cni.dev/valid-attachments":[{"containerID":"two","ifname":"eth0"}]`))
	if _, e := call("CHECK", "one", prev); e == nil || e.Code != 3 {
		t.Errorf("CHECK of what GC took: %+v", e)
	}
	must("CHECK", "two", config(`,"prevResult":`+two))
	// A list that is not there is no empty list.
	if _, e := call("GC", "one", config("")); e == nil || e.Code != 7 {
		t.Errorf("GC without a list: %+v", e)
	}
	must("CHECK", "two", config(`,"prevResult":`+two))

	for range 2 {
		must("DEL", "two", config(""))
	}
	for _, e := range l.Inspect(l.Nodes[0]).Endpoints {
		if e.State == "live" {
			t.Errorf("still live: %+v", e)
		}
	}
	lab.Eventually(t, 5*time.Second, "the interface is gone", func() error {
		out, err := exec.Command("nsenter", "--net="+netns["two"], "ip", "-o", "link").Output()
		if err == nil && strings.Contains(string(out), "eth0") {
			err = fmt.Errorf("after DEL, in the namespace: %s", out)
		}
		return err
	})
}

// The plugin killed at any moment of an ADD: what it leaves is whole or not
// there, GC takes it back, and no address is lost or given twice.
func TestPluginKilledInTheMiddle(t *testing.T) {
	l := lab.Up(t, "--nodes", "1")
	n := l.Nodes[0]
	l.Chaos("--latency", "20ms")
	config := fmt.Sprintf(`{"cniVersion":"1.1.0","name":"underlay","type":"underlay-cni","socket":%q}`, n.AgentSocket)
	name := "ul-" + l.Name + "-pod-killed"
	const kills = 20
	for i := range kills {
		// A namespace of its own: what a killed ADD left is in its way else.
		if err := nl.NewNamed(fmt.Sprintf("%s-%d", name, i)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = nl.DeleteNamed(fmt.Sprintf("%s-%d", name, i)) })
		cmd := exec.Command(filepath.Join(lab.Bin, "underlay-cni"))
		cmd.Env = []string{"CNI_COMMAND=ADD", fmt.Sprintf("CNI_CONTAINERID=killed-%d", i), "CNI_IFNAME=eth0", "CNI_PATH=" + lab.Bin, "CNI_NETNS=" + nl.Path(fmt.Sprintf("%s-%d", name, i))}
		cmd.Stdin = strings.NewReader(config)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		<-time.After(time.Duration(i) * 3 * time.Millisecond) // the moment is the test's variable
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	// Requests that the kills withdrew end on their own.
	lab.Eventually(t, 20*time.Second, "nothing waits and nothing is half made", func() error {
		in := l.Inspect(n)
		if in.Waiting != 0 {
			return fmt.Errorf("%d ADDs wait", in.Waiting)
		}
		for _, e := range in.Endpoints {
			if e.State == "adding" {
				return fmt.Errorf("half made: %+v", e)
			}
		}
		return nil
	})
	owner := map[string]string{}
	for _, e := range l.Inspect(n).Endpoints {
		if other, twice := owner[e.IP.String()]; twice {
			t.Errorf("%s belongs to %s and %s", e.IP, other, e.ContainerID)
		}
		owner[e.IP.String()] = e.ContainerID
	}
	if _, e := plugin(t, "GC", "", strings.TrimSuffix(config, "}")+`,"cni.dev/valid-attachments":[]}`); e != nil {
		t.Fatalf("GC: %+v", e)
	}
	in := l.Inspect(n)
	for _, e := range in.Endpoints {
		if e.State != "tombstone" {
			t.Errorf("after GC: %+v", e)
		}
	}
	bound := 0
	for _, a := range in.Addresses {
		if a.State == "bound" {
			bound++
		}
	}
	if bound != 0 {
		t.Errorf("%d addresses are bound to nobody", bound)
	}
	if routes := l.Underlay("node", "exec", n.Name, "--", "ip", "route", "show", "table", "30060"); strings.TrimSpace(routes) != "" {
		t.Errorf("routes left:\n%s", routes)
	}
}
