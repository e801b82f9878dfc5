package e2e

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
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

// A subnet with addresses to spare and no whole /28 left: the node takes single
// addresses, no ADD fails, and it takes prefixes again when there are some.
func TestPrefixesInAFragmentedSubnet(t *testing.T) {
	l := lab.Up(t, "--nodes", "1", "--prefixes")
	subnet, instance := l.Nodes[0].SubnetID, l.Nodes[0].InstanceID
	var reserved []string
	reserve := func(cidr string) {
		t.Helper()
		var made struct {
			SubnetCidrReservation struct{ SubnetCidrReservationID string }
		}
		l.AWS(&made, "ec2", "create-subnet-cidr-reservation", "--subnet-id", subnet, "--reservation-type", "explicit", "--cidr", cidr)
		reserved = append(reserved, made.SubnetCidrReservation.SubnetCidrReservationID)
	}
	held := func() (prefixes, singles int) {
		t.Helper()
		var counts []struct{ Prefixes, Singles int }
		l.AWS(&counts, "ec2", "describe-network-interfaces", "--filters", "Name=attachment.instance-id,Values="+instance,
			"--query", "NetworkInterfaces[].{Prefixes: length(Ipv4Prefixes || `[]`), Singles: length(PrivateIpAddresses[?!Primary])}")
		for _, c := range counts {
			prefixes, singles = prefixes+c.Prefixes, singles+c.Singles
		}
		return prefixes, singles
	}
	var pods int
	run := func(name string, count int) {
		t.Helper()
		pods += count
		l.Underlay("run", name, "--count", strconv.Itoa(count))
	}
	run("whole", 10) // the first /28
	// All that is left of 10.0.0.0/20 but its last /27, and of that one of the
	// two /28s has an address in use: the other holds EC2's own last one.
	for bits := 21; bits <= 27; bits++ {
		reserve(netip.PrefixFrom(netip.AddrFrom4(lower(bits)), bits).String())
	}
	l.AWS(new(any), "ec2", "create-network-interface", "--subnet-id", subnet, "--private-ip-address", "10.0.15.230")
	had, _ := held()
	run("pieces", 12)
	prefixes, singles := held()
	if prefixes != had || singles < 12-(16*had-10) || singles == 0 {
		t.Errorf("fragmented: %d prefixes and %d single addresses for %d pods, before %d and 0", prefixes, singles, pods, had)
	}
	if log, err := os.ReadFile(filepath.Join(l.Dir(), "nodes", "node-1", "agent.log")); err != nil || !strings.Contains(string(log), "InsufficientCidrBlocks") {
		t.Errorf("the agent does not tell that the subnet is fragmented: %v\n%s", err, log)
	}
	for _, id := range reserved {
		l.AWS(new(any), "ec2", "delete-subnet-cidr-reservation", "--subnet-cidr-reservation-id", id)
	}
	l.Underlay("node", "restart-agent", "node-1") // or minutes later by itself: internal/ipam
	run("healed", 16)
	if after, _ := held(); after <= prefixes {
		t.Errorf("healed: %d prefixes for %d pods, before %d", after, pods, prefixes)
	}
}

// lower returns the lower half of what of 10.0.0.0/20 begins with ones below
// the bits before: 10.0.0.0 of /21, 10.0.8.0 of /22, 10.0.12.0 of /23.
func lower(bits int) [4]byte {
	n := 1<<12 - 1<<(33-bits)
	return [4]byte{10, 0, byte(n >> 8), byte(n)}
}
