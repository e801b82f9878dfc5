package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/test/lab"
)

const nodePolicy = "../../docs/reference/iam-policy.json"

// policyWithout writes the node's policy less one action, and returns its path.
func policyWithout(t *testing.T, action string) string {
	t.Helper()
	b, err := os.ReadFile(nodePolicy)
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Version   string
		Statement []map[string]any
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		t.Fatal(err)
	}
	found := false
	doc.Statement = slices.DeleteFunc(doc.Statement, func(s map[string]any) bool {
		actions := s["Action"].([]any)
		s["Action"] = slices.DeleteFunc(actions, func(a any) bool { found = found || a == "ec2:"+action; return a == "ec2:"+action })
		return len(s["Action"].([]any)) == 0
	})
	if !found {
		t.Fatalf("the node's policy has no %s", action)
	}
	if b, err = json.Marshal(doc); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "policy.json")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// calls returns how often an action was called.
func calls(t *testing.T, l *lab.Lab, action string) int {
	t.Helper()
	r, err := http.Get(l.Endpoint + "/_vpcd/calls")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	var counts map[string]int
	if err := json.NewDecoder(r.Body).Decode(&counts); err != nil {
		t.Fatal(err)
	}
	return counts[action]
}

// The policy that is made of the agent's calls lets a node grow to its last
// interface, and nothing else.
func TestNodePolicySuffices(t *testing.T) {
	l := lab.Up(t, "--nodes", "1", "--iam-policy", nodePolicy, "--agent-arg=--sweep=1s")
	l.Underlay("run", "many", "--count", "27") // all three interfaces of an m5.large
	l.Underlay("vpcd", "restart")              // which keeps the policy
	l.Underlay("rm", "--all")
	if n := calls(t, l, "DescribeVpcs"); n != 0 {
		t.Errorf("%d calls of DescribeVpcs", n)
	}
	if log, err := os.ReadFile(filepath.Join(l.Dir(), "nodes", "node-1", "agent.log")); err != nil || strings.Contains(string(log), "Unauthorized") {
		t.Errorf("the policy lacks something: %v\n%s", err, log)
	}
}

// A permission that is missing is named to the pod and in the status, and the
// agent does not insist.
func TestMissingPermissionIsNamed(t *testing.T) {
	for _, action := range []string{"AssignPrivateIpAddresses", "CreateNetworkInterface", "CreateTags", "AttachNetworkInterface", "ModifyNetworkInterfaceAttribute"} {
		t.Run(action, func(t *testing.T) {
			t.Parallel()
			args := []string{"--nodes", "1", "--iam-policy", nodePolicy}
			if action == "AssignPrivateIpAddresses" {
				args = append(args, "--agent-env", "MAX_ENI=1") // a further interface would come with addresses
			}
			l := lab.Up(t, args...)
			policy, err := os.ReadFile(policyWithout(t, action))
			if err != nil {
				t.Fatal(err)
			}
			// With less from the beginning the agent of some cases would never serve.
			if err := os.WriteFile(filepath.Join(l.Dir(), "iam-policy.json"), policy, 0o600); err != nil {
				t.Fatal(err)
			}
			l.Underlay("vpcd", "restart")
			began := time.Now()
			out, _, code := l.Try("run", "many", "--count", "12", "-o", "json") // more than one interface holds
			var pods []lab.Pod
			if err := json.Unmarshal([]byte(out), &pods); err != nil || code == 0 {
				t.Fatalf("exit %d: %v\n%s", code, err, out)
			}
			says := "is not authorized to perform: ec2:" + action
			named := 0
			for _, p := range pods {
				if p.Error != "" && (!strings.Contains(p.Error, says) || !strings.Contains(p.Error, "attach the documented IAM policy")) {
					t.Errorf("%s: %s", p.Name, p.Error)
				} else if p.Error != "" {
					named++
				}
			}
			want := 3 // the interface at hand is filled
			if action == "AssignPrivateIpAddresses" {
				want = 11 // nothing beside the one address that was there
			}
			if named != want {
				t.Errorf("%d pods were told, want %d", named, want)
			}
			if status, _, _ := l.Try("status"); !strings.Contains(status, says) {
				t.Errorf("the status does not name the permission:\n%s", status)
			}
			call := action
			if call == "CreateTags" {
				call = "CreateNetworkInterface" // which carries the tags
			}
			if n, most := calls(t, l, call), 3+int(time.Since(began)/(5*time.Second)); n < 1 || n > most {
				t.Errorf("%d calls of %s within %s, want 1 to %d", n, call, time.Since(began).Round(time.Second), most)
			}
		})
	}
}

// What the policy leaves out is denied to who signs as a node, and to nobody
// else.
func TestPolicyIsTheNodes(t *testing.T) {
	l := lab.Up(t, "--nodes", "1", "--iam-policy", nodePolicy)
	eni := "--network-interface-id=" + primaryOf(t, l)
	for _, c := range []struct{ key, args, want string }{
		{"AKIAUNDERLAYNODE0000", "unassign-private-ip-addresses --private-ip-addresses 10.0.0.99 " + eni, "InvalidParameterValue"},
		{"AKIAUNDERLAYNODE0000", "delete-network-interface --dry-run " + eni, "DryRunOperation"},
		{"AKIAUNDERLAYNODE0000", "create-tags --dry-run --tags Key=a --resources " + l.Nodes[0].InstanceID, "UnauthorizedOperation"},
		{"AKIAUNDERLAYNODE0000", "create-vpc --dry-run --cidr-block 10.9.0.0/16", "UnauthorizedOperation"},
		{"AKIAUNDERLAYNODE0000", "create-vpc --cidr-block 10.9.0.0/16", "UnauthorizedOperation"},
		{"AKIAUNDERLAYUSER0000", "create-vpc --dry-run --cidr-block 10.9.0.0/16", "DryRunOperation"},
	} {
		_, errs, _ := cli{t, l.Endpoint}.runAs(c.key, c.args)
		if !strings.Contains(errs, fmt.Sprintf("(%s)", c.want)) {
			t.Errorf("aws ec2 %s: %s, want %s", c.args, errs, c.want)
		}
	}
}

// primaryOf returns the first interface of the lab's first node.
func primaryOf(t *testing.T, l *lab.Lab) string {
	t.Helper()
	var ids []string
	l.AWS(&ids, "ec2", "describe-network-interfaces", "--filters", "Name=attachment.instance-id,Values="+l.Nodes[0].InstanceID, "--query", "NetworkInterfaces[].NetworkInterfaceId")
	if len(ids) == 0 {
		t.Fatal("the node has no interface")
	}
	return ids[0]
}

// At the account's quota of interfaces a node fills those that it has, and who
// goes without is told of the quota, not that the node is full.
func TestQuotaOfInterfacesIsNamed(t *testing.T) {
	t.Parallel()
	l := lab.Up(t, "--nodes", "1")
	l.Underlay("vpcd", "chaos", "set", "--", "--quota", "interfaces-per-zone=2") // the node's and the VM's
	out, _, code := l.Try("run", "many", "--count", "12", "-o", "json")
	var pods []lab.Pod
	if err := json.Unmarshal([]byte(out), &pods); err != nil || code == 0 {
		t.Fatalf("exit %d: %v\n%s", code, err, out)
	}
	served := 0
	for _, p := range pods {
		if p.Error == "" {
			served++
		} else if !strings.Contains(p.Error, "the account's quota of network interfaces is reached (NetworkInterfaceLimitExceeded") {
			t.Errorf("%s: %s", p.Name, p.Error)
		}
	}
	if served != 9 {
		t.Errorf("%d of 12 pods have an address, want the 9 that one interface holds", served)
	}
	if status, _, _ := l.Try("status"); !strings.Contains(status, "quota of network interfaces") {
		t.Errorf("the status does not name the quota:\n%s", status)
	}
}
