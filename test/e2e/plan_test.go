package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/plan"
	"github.com/underlay-cni/underlay/test/lab"
)

// What plan says of an account is what EC2 says of it, and what it says that
// Underlay would hold is what Underlay holds.
func TestPlanOfAnAccount(t *testing.T) {
	l := lab.Up(t, "--nodes", "1")
	for k, v := range map[string]string{
		"AWS_ENDPOINT_URL_EC2": l.Endpoint, "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "AKIAX", "AWS_SECRET_ACCESS_KEY": "x",
		"AWS_CONFIG_FILE": os.DevNull, "AWS_SHARED_CREDENTIALS_FILE": os.DevNull,
	} {
		t.Setenv(k, v)
	}
	look := func(args ...string) (acc plan.Account) {
		t.Helper()
		if err := json.Unmarshal([]byte(l.Underlay(append([]string{"plan", "account", "-o", "json"}, args...)...)), &acc); err != nil {
			t.Fatal(err)
		}
		return acc
	}
	// The agent takes its floor only once it is ready.
	lab.Eventually(t, 10*time.Second, "the node holds its floor", func() error {
		if a := look(); len(a.Nodes) != 1 || a.Nodes[0].Holds != 2 {
			return fmt.Errorf("nodes: %+v", a.Nodes)
		}
		return nil
	})
	writes := l.Writes()
	dir := t.TempDir()
	monday := filepath.Join(dir, "monday.json")
	before := look("--save", monday)
	if len(before.Nodes) != 1 || before.Nodes[0].Used != nil || before.Nodes[0].Underlay != nil {
		t.Fatalf("without --pods the use of the one node is not known: %+v", before.Nodes)
	}
	if w := l.Writes(); w != writes {
		t.Errorf("plan made %d writing calls", w-writes)
	}
	if _, stderr, code := l.Try("plan", "account", "--save", monday); code != 1 || !strings.Contains(stderr, "choose another name") {
		t.Errorf("a snapshot was overwritten: exit %d, %s", code, stderr)
	}

	of := func(acc plan.Account) plan.SubnetUse {
		t.Helper()
		for _, s := range acc.Subnets {
			if string(s.ID) == l.Nodes[0].SubnetID {
				return s
			}
		}
		t.Fatalf("the node's subnet is not in %+v", acc.Subnets)
		return plan.SubnetUse{}
	}
	var made struct {
		SubnetCidrReservation struct{ SubnetCidrReservationID string }
	}
	l.AWS(&made, "ec2", "create-subnet-cidr-reservation", "--subnet-id", l.Nodes[0].SubnetID, "--reservation-type", "prefix", "--cidr", "10.0.8.0/24")
	if was, is := of(before), of(look()); is.Kept28s != 16 || was.Free28s-is.Free28s != 16 || was.Free-is.Free != 256 {
		t.Errorf("with a /24 kept for prefixes %+v, before %+v", is, was)
	}
	l.AWS(new(any), "ec2", "delete-subnet-cidr-reservation", "--subnet-cidr-reservation-id", made.SubnetCidrReservation.SubnetCidrReservationID)

	var pods []lab.Pod
	if err := json.Unmarshal([]byte(l.Underlay("run", "web", "--count", "12", "-o", "json")), &pods); err != nil {
		t.Fatal(err)
	}
	lines := l.Nodes[0].IP.String() + "\n203.0.113.7\n" // in the node's network, and nobody's
	for _, p := range pods {
		lines += p.IP.String() + "\n"
	}
	list := filepath.Join(dir, "pods")
	if err := os.WriteFile(list, []byte(lines), 0o644); err != nil {
		t.Fatal(err)
	}
	after := look("--pods", list, "--since", monday)

	var listed struct {
		NetworkInterfaces []struct {
			PrivateIPAddresses []struct{ PrivateIPAddress string }
		}
	}
	l.AWS(&listed, "ec2", "describe-network-interfaces", "--filters", "Name=attachment.instance-id,Values="+l.Nodes[0].InstanceID)
	holds := 0
	for _, e := range listed.NetworkInterfaces {
		holds += len(e.PrivateIPAddresses)
	}
	n := after.Nodes[0]
	// 12 pods and the floor take two ENIs: 13 addresses and two primaries.
	if n.Holds != holds || n.Used == nil || *n.Used != 12 || *n.Idle != holds-len(listed.NetworkInterfaces)-12 || *n.Underlay != 15 {
		b, _ := json.Marshal(n)
		t.Errorf("EC2 lists %d addresses for 12 pods; plan says %s", holds, b)
	}
	if after.HostPods != 1 || len(after.Stray) != 1 {
		t.Errorf("%d pods in the node's network, stray %v; want one each", after.HostPods, after.Stray)
	}
	taken := 0
	for i, s := range after.Subnets {
		taken += before.Subnets[i].Free - s.Free
		if s.Trend == nil || (s.Trend.Days != nil) != (s.Free < before.Subnets[i].Free) {
			t.Errorf("%s went from %d to %d free: trend %+v", s.ID, before.Subnets[i].Free, s.Free, s.Trend)
		}
	}
	if grown := holds - before.Nodes[0].Holds; taken != grown || grown < 12 {
		t.Errorf("the node holds %d more, the subnets have %d fewer", grown, taken)
	}

	var fit plan.Fit
	out, _, code := l.Try("plan", "fit", "--from-aws", "--nodes", "1", "--pods", "12", "-o", "json", "--subnet", string(after.Subnets[0].ID))
	if err := json.Unmarshal([]byte(out), &fit); err != nil || code != 0 || fit.Subnets[0].Free != after.Subnets[0].Free || fit.Underlay.Addresses != 15 {
		t.Errorf("fit --from-aws: exit %d, %v\n%s", code, err, out)
	}
	t.Log("\n" + l.Underlay("plan", "account", "--pods", list, "--since", monday))
}
