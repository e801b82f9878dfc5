package e2e

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/underlay-cni/underlay/test/lab"
)

// With prefixes an m5.large runs more pods than it can hold single addresses,
// and each address lies in a /28 that EC2 delegated.
func TestPrefixes(t *testing.T) {
	l := lab.Up(t, "--nodes", "1", "--prefixes")
	var pods []lab.Pod
	out := l.Underlay("run", "many", "--count", "40", "-o", "json")
	if err := json.Unmarshal([]byte(out), &pods); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var listed struct {
		NetworkInterfaces []struct {
			PrivateIPAddresses []struct{ PrivateIPAddress string }
			Ipv4Prefixes       []struct{ Ipv4Prefix netip.Prefix }
		}
	}
	l.AWS(&listed, "ec2", "describe-network-interfaces", "--filters", "Name=attachment.instance-id,Values="+l.Nodes[0].InstanceID)
	var prefixes []netip.Prefix
	singles := 0
	for _, eni := range listed.NetworkInterfaces {
		singles += len(eni.PrivateIPAddresses) - 1
		for _, p := range eni.Ipv4Prefixes {
			prefixes = append(prefixes, p.Ipv4Prefix)
		}
	}
	if singles != 0 || len(prefixes) < 3 || len(prefixes) > 4 {
		t.Errorf("40 pods hold %d prefixes and %d single addresses, want 3 or 4 and none", len(prefixes), singles)
	}
	for _, p := range pods {
		inside := false
		for _, prefix := range prefixes {
			inside = inside || prefix.Contains(p.IP)
		}
		if p.Error != "" || !inside {
			t.Errorf("%s: %s in none of %v %s", p.Name, p.IP, prefixes, p.Error)
		}
	}
	l.Underlay("exec", "many-1", "--", "ping", "-c", "1", "-W", "2", pods[39].IP.String())
	l.Underlay("exec", "many-40", "--", "ping", "-c", "1", "-W", "2", l.OutsideIP("vm-1").String())
	l.Underlay("node", "restart-agent", "node-1")
	if out := l.Underlay("status"); !strings.Contains(out, "432") {
		t.Errorf("status does not tell of 3 × 9 × 16 addresses:\n%s", out)
	}
}
