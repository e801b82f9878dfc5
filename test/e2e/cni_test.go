package e2e

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"testing"

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
	call := func(command, id, config string) (string, *cniError) {
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
	if out, err := exec.Command("nsenter", "--net="+netns["two"], "ip", "-o", "link").Output(); err != nil || strings.Contains(string(out), "eth0") {
		t.Errorf("after DEL, in the namespace: %s %v", out, err)
	}
}
