package e2e

import (
	"encoding/json"
	"fmt"
	"testing"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/test/lab"
)

// A pod's life in each version of CNI, on one node: runtimes of every age are
// answered in their own.
func TestCNIVersions(t *testing.T) {
	l := lab.Up(t, "--nodes", "1")
	for i, tc := range []struct {
		version, family string // family: what 0.x says of each address
		check           bool
	}{
		{"0.3.1", "4", false},
		{"0.4.0", "4", true},
		{"1.0.0", "", true},
		{"1.1.0", "", true},
	} {
		id := fmt.Sprintf("version-%d", i)
		name := "ul-" + l.Name + "-pod-" + id
		if err := nl.NewNamed(name); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = nl.DeleteNamed(name) })
		config := func(more string) string {
			return fmt.Sprintf(`{"cniVersion":%q,"name":"underlay","type":"underlay-cni","socket":%q%s}`, tc.version, l.Nodes[0].AgentSocket, more)
		}
		call := func(command, config string) (string, *lab.CNIError) {
			return plugin(t, command, nl.Path(name), config, "CNI_CONTAINERID="+id)
		}
		added, e := call("ADD", config(""))
		if e != nil {
			t.Fatalf("ADD in %s: %+v", tc.version, e)
		}
		var res struct {
			CNIVersion string
			Interfaces []struct{ Name, Mac, Sandbox string }
			IPs        []struct{ Version, Address, Gateway string }
		}
		if err := json.Unmarshal([]byte(added), &res); err != nil {
			t.Fatal(err)
		}
		if res.CNIVersion != tc.version || len(res.IPs) != 1 || res.IPs[0].Version != tc.family || len(res.Interfaces) != 2 {
			t.Errorf("ADD in %s: %s", tc.version, added)
		}
		// Both ends have the MAC that the result says.
		for _, i := range res.Interfaces {
			netns := l.Nodes[0].Netns
			if i.Sandbox != "" {
				netns = i.Sandbox
			}
			if mac := macOf(t, netns, i.Name); mac != i.Mac {
				t.Errorf("ADD in %s: %s has %s, the result says %q", tc.version, i.Name, mac, i.Mac)
			}
		}
		_, e = call("CHECK", config(`,"prevResult":`+added))
		if tc.check && e != nil || !tc.check && (e == nil || e.Code != 1) {
			t.Errorf("CHECK in %s: %+v", tc.version, e)
		}
		for _, command := range []string{"GC", "STATUS"} {
			if _, e := call(command, config(fmt.Sprintf(`,"cni.dev/valid-attachments":[{"containerID":%q,"ifname":"eth0"}]`, id))); tc.version == "1.1.0" && e != nil || tc.version != "1.1.0" && (e == nil || e.Code != 1) {
				t.Errorf("%s in %s: %+v", command, tc.version, e)
			}
		}
		if out, e := call("DEL", config(`,"prevResult":`+added)); e != nil || out != "" {
			t.Errorf("DEL in %s: %q, %+v", tc.version, out, e)
		}
	}
	for _, e := range l.Inspect(l.Nodes[0]).Endpoints {
		if e.State != "tombstone" {
			t.Errorf("left: %+v", e)
		}
	}
}

// macOf returns the MAC of an interface in a namespace.
func macOf(t *testing.T, netns, ifname string) string {
	t.Helper()
	var links []struct{ Address string }
	out, _, code := lab.Execute(t, "nsenter", "--net="+netns, "ip", "-j", "link", "show", "dev", ifname)
	if err := json.Unmarshal([]byte(out), &links); code != 0 || err != nil || len(links) != 1 {
		t.Fatalf("ip link show dev %s in %s: %d, %v, %s", ifname, netns, code, err, out)
	}
	return links[0].Address
}
