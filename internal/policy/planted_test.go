package policy_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// faults are changes of the compiler's source that the comparison with the
// reference must find. old occurs exactly once in file.
var faults = []struct{ name, file, old, new string }{
	{"exceptions of a block are let in", "compile.go", "without(block[f], holes[f])", "without(block[f], nil)"},
	{"a named port means its number at every peer", "compile.go", "named[s].addAddr(n.addr)", "named[s] = &r.peers"},
	{"egress never isolates by default", "compile.go", "return dir == Ingress || len(p.Egress) > 0", "return dir == Ingress"},
	{"audited policies are enforced", "compile.go", "audited.policies = append(audited.policies, p)", "enforced.policies = append(enforced.policies, p)"},
	{"the end of a port range is forgotten", "compile.go", "int(cmp.Or(port.End, port.Port))", "int(port.Port)"},
	{"a pod selector reaches into all namespaces", "compile.go", "!in[pod.Namespace] || ", ""},
	{"NotIn wants the label", "compile.go", "among: among, negate: true, absent: true", "among: among, negate: true"},
	{"a type of ICMP with its first code only", "compile.go", "r.FromPort<<8|0xff", "r.FromPort<<8"},
	{"pods with the node's addresses are selected", "compile.go", "pod.HostNetwork || !in", "!in"},
	{"any open port of TCP makes untracked", "compile.go", "s.first.compare(whole.first) <= 0 && ", ""},
	{"rules of a group in EC2's order", "compile.go", "strings.Compare(a.ID, b.ID)", "0"},
	{"a span within another cuts it short", "index.go", "if s.last.compare(*last) > 0 {", "if true {"},
	{"what is left of a block begins within the exception", "index.go", "s.first = hole.last.next()", "s.first = hole.last"},
	{"the last interval below a node of a tree is elsewhere", "cells.go", "k := (i+1)*below - 1;", "k := (i+1)*below - 2;"},
}

// TestPlantedFaultsAreCaught builds each fault into the compiler and has the
// comparison find it.
func TestPlantedFaultsAreCaught(t *testing.T) {
	if os.Getenv("POLICY_PLANTED") != "" {
		t.Skip("a fault is planted already")
	}
	goTool, err := exec.LookPath("go")
	if err != nil {
		t.Fatalf("the faults are built with Go: %v", err)
	}
	finding := regexp.MustCompile(`(?m)^.*differential_test\.go:\d+: (world \d+.*)$`)
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			source, err := os.ReadFile(f.file)
			if err != nil {
				t.Fatal(err)
			}
			if n := strings.Count(string(source), f.old); n != 1 {
				t.Fatalf("%s has %q %d times: the fault must be planted elsewhere by now", f.file, f.old, n)
			}
			dir := t.TempDir()
			planted := filepath.Join(dir, f.file)
			if err := os.WriteFile(planted, []byte(strings.Replace(string(source), f.old, f.new, 1)), 0o600); err != nil {
				t.Fatal(err)
			}
			path, err := filepath.Abs(f.file)
			if err != nil {
				t.Fatal(err)
			}
			overlay, err := json.Marshal(map[string]map[string]string{"Replace": {path: planted}})
			if err != nil {
				t.Fatal(err)
			}
			list := filepath.Join(dir, "overlay.json")
			if err := os.WriteFile(list, overlay, 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(goTool, "test", "-count=1", "-vet=off", "-overlay", list, "-run", "^TestTablesAgreeWithEvaluate$", ".")
			cmd.Env = append(os.Environ(), "POLICY_PLANTED=1", "CGO_ENABLED=0", "GOFLAGS=")
			out, err := cmd.CombinedOutput()
			if err == nil {
				t.Fatalf("the comparison finds nothing:\n%s", out)
			}
			found := finding.FindStringSubmatch(string(out))
			if found == nil {
				t.Fatalf("no finding: %v\n%.2000s", err, out)
			}
			t.Log("caught: " + found[1])
		})
	}
}
