package datapath

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/underlay-cni/underlay/internal/testenv"
)

// policyFaults are changes of bpf/node_policy.h that the comparison with the
// reference must find. old occurs exactly once.
var policyFaults = []struct{ name, old, new string }{
	{"the last key of an interval is beyond it", "return (x - y) >> 63;", "return (x - y - 1) >> 63;"},
	{"half an IPv6 address", "less64(c->d[2 * i], hi) | (equal64(c->d[2 * i], hi) & less64(c->d[2 * i + 1], lo))", "less64(c->d[2 * i], hi)"},
	{"the sender's address for what is sent", "remote = direction ? &t->src : &t->dst;", "remote = &t->src;"},
	{"the sender's port of TCP", "open = OPEN_POLICY_TCP;\n\t\twant |= t->dport;", "open = OPEN_POLICY_TCP;\n\t\twant |= t->sport;"},
	{"UDP has no ports", "open = OPEN_POLICY_UDP;\n\t\twant |= t->dport;", "open = OPEN_POLICY_UDP;"},
	{"SCTP has no ports", "case IPPROTO_SCTP:\n\t\twant |= t->dport;", "case IPPROTO_SCTP:"},
	{"the code of ICMP is ignored", "<< 8 | t->icmp_code", "<< 8"},
	{"what no rule allows passes", "v->allow[gate] = v->audit[gate] = d->mode == MODE_AUDIT;", "v->audit[gate] = d->mode == MODE_AUDIT;\n\t\tv->allow[gate] = 1;"},
	{"audit enforces", "v->allow[gate] = v->audit[gate] = d->mode == MODE_AUDIT;", "v->audit[gate] = d->mode == MODE_AUDIT;"},
	{"rules beyond 512 are lost", "#define POLICY_MAX_EACH	4", "#define POLICY_MAX_EACH	1"},
	{"the last word of rules wins", "for (int k = 7; k >= 0; k--)", "for (int k = 0; k < 8; k++)"},
	{"two levels of a tree", "#define POLICY_MAX_LEVELS	5", "#define POLICY_MAX_LEVELS	2"},
	{"the node does not reach its pods", "own = RULE_HOST;", "own = 0;"},
	{"the node's pods reach everything", "if ((ask & POLICY_FROM_HOST) && (ask & POLICY_DIRECTION) == POLICY_INGRESS)", "if (ask & POLICY_FROM_HOST)"},
	{"a pod does not reach itself", "own = RULE_SELF;", "own = 0;"},
	{"IPv6 is open when IPv4 is", "(is_v4(remote) ? open : open << 1)", "open"},
	{"untracked by one direction alone", "other = (void *)policy_cell(table, direction ? 1 : 2);", "other = d;"},
	{"one gate for both", "policy_gate(t, e.table[GATE_NETPOL],", "policy_gate(t, e.table[GATE_GROUPS],"},
	{"ingress rules for what is sent", "policy_cell(table, direction ? 2 : 1);", "policy_cell(table, 2);"},
	{"IPv4 is looked up as IPv6", "if (is_v4(remote)) {", "if (!remote) {"},
	{"kept on the stack or not, nobody knows", "v->stack = !!(e.flags & POLICY_STACK);", "v->stack = 0;"},
}

// Faults that are built into the programs are caught by the comparison.
func TestPlantedPolicyFaultsAreCaught(t *testing.T) {
	testenv.Require(t, "root", "bpf", "clang")
	onceForAllHooks(t)
	w := newWorld(t)
	w.quiet = true
	d := w.open(Options{})
	header, err := os.ReadFile("../../bpf/node_policy.h")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range policyFaults {
		t.Run(f.name, func(t *testing.T) {
			if n := strings.Count(string(header), f.old); n != 1 {
				t.Fatalf("node_policy.h has %q %d times: the fault must be planted elsewhere by now", f.old, n)
			}
			dir := t.TempDir()
			if err := os.CopyFS(dir, os.DirFS("../../bpf")); err != nil {
				t.Fatal(err)
			}
			planted := strings.Replace(string(header), f.old, f.new, 1)
			// CopyFS left the one without the fault there.
			if err := os.WriteFile(filepath.Join(dir, "node_policy.h"), []byte(planted), 0o600); err != nil {
				t.Fatal(err)
			}
			out := filepath.Join(dir, "probe.o")
			cmd := exec.Command("clang-14", "-target", "bpfel", "-O2", "-g", "-Wno-everything", "-I/usr/include/x86_64-linux-gnu", "-c", filepath.Join(dir, "policy_probe.c"), "-o", out)
			if said, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("compile: %v\n%s", err, said)
			}
			object, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			found := difference(t, d, newProbe(t, d, object), 1<<32, 50_000)
			if found == "" {
				t.Fatal("the comparison finds nothing")
			}
			t.Log("caught: " + found)
		})
	}
}
