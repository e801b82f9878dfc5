// Package layout holds the rules of the house as a test: which package may
// import which, and why. docs/ARCHITECTURE.md has the picture.
package layout

import (
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/underlay-cni/underlay/"

// floors lists the packages of each floor under internal/. A directory stands
// for itself and all below it. Imports point down only; what may reach a
// package of its own floor stands in siblings.
var floors = [][]string{
	{"vpc", "packet"},
	{"ipam", "policy", "flowlog", "reach", "plan"},
	{"ec2", "imds", "groups", "nl", "datapath", "kube", "agentapi", "oci"},
	{"agent", "controller", "vpcd", "sim", "cli", "ui"},
}

// siblings are the only imports between packages of one floor.
var siblings = map[string][]string{
	"reach":    {"policy"}, // reachability asks the policy compiler for verdicts
	"plan":     {"ipam"},   // capacity is what the real allocator would hold
	"datapath": {"nl"},     // programs are attached to links that nl makes
	// What a refusal means, ec2 alone says; each of its requests counts. Both kinds of
	// server accept alike.
	"groups": {"ec2", "agentapi"},
}

// pure are the packages that do no I/O, start no goroutine and read no clock,
// so that a simulator and a model checker can run them as they are.
var pure = []string{"ipam", "policy", "flowlog", "reach", "plan"}

// fences says who alone may import a vendor's packages.
var fences = []struct {
	vendor  string
	allowed []string // under the module
	reason  string
}{
	{"github.com/aws/", []string{"internal/ec2", "internal/imds"}, "the cloud contract has one door, and its SDK takes minutes to compile"},
	{"github.com/cilium/ebpf", []string{"internal/datapath", "internal/nl", "internal/vpcd/fabric", "internal/testenv/bpfcache"}, "kernel objects have an owner"},
	{"github.com/vishvananda/", []string{"internal/datapath", "internal/nl", "internal/vpcd/fabric"}, "kernel objects have an owner"},
	{"github.com/google/nftables", []string{"internal/datapath", "internal/vpcd/fabric"}, "each table has one owner: the node's, and those of NAT gateways"},
	{"k8s.io/", []string{"api", "internal/kube", "internal/controller"}, "everything else works without Kubernetes"},
	{"github.com/google/go-containerregistry", []string{"internal/oci"}, "images have one maker"},
	{"github.com/miekg/dns", []string{"internal/vpcd/dns"}, "names have one resolver"},
	{"github.com/parquet-go/", []string{"internal/vpcd"}, "flow logs are vpcd's to write"},
	{"go.etcd.io/bbolt", []string{"internal/vpcd/store"}, "a node keeps no database; only vpcd does"},
}

type pkg struct {
	ImportPath                         string
	Dir                                string
	GoFiles                            []string
	Imports, TestImports, XTestImports []string
	Deps                               []string
}

func list(t *testing.T, args ...string) []pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Dir,GoFiles,Imports,TestImports,XTestImports,Deps"}, args...)...)
	cmd.Dir = "../.."
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var pkgs []pkg
	for d := json.NewDecoder(strings.NewReader(string(out))); d.More(); {
		var p pkg
		if err := d.Decode(&p); err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
	if len(pkgs) == 0 {
		t.Fatal("go list named no package")
	}
	return pkgs
}

// below reports whether path is dir or lies under it.
func below(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// place returns the floor and the room (the entry of floors) of an import path,
// or -1 when it is not of a floor.
func place(path string) (floor int, room string) {
	rest, ok := strings.CutPrefix(path, module+"internal/")
	if !ok {
		return -1, ""
	}
	for f, rooms := range floors {
		for _, r := range rooms {
			if below(rest, r) {
				return f, r
			}
		}
	}
	return -1, ""
}

func TestImportsPointDown(t *testing.T) {
	for _, p := range list(t, "./internal/...") {
		rel := strings.TrimPrefix(p.ImportPath, module)
		if below(rel, "internal/testenv") {
			continue
		}
		floor, room := place(p.ImportPath)
		if floor < 0 {
			t.Errorf("%s stands on no floor: add it to floors, with its place in docs/ARCHITECTURE.md", rel)
			continue
		}
		for _, imp := range p.Imports {
			if below(imp, module+"internal/testenv") {
				t.Errorf("%s imports %s outside a test", rel, imp)
			}
			f, r := place(imp)
			switch {
			case f < 0 || r == room:
			case f > floor:
				t.Errorf("%s (floor %d) imports %s (floor %d): imports point down only", rel, floor, imp, f)
			case f == floor && !slices.Contains(siblings[room], r):
				t.Errorf("%s imports its sibling %s: they meet in a wire contract or not at all", rel, imp)
			}
		}
		if floor == 0 {
			for _, imp := range p.Imports {
				if strings.Contains(strings.Split(imp, "/")[0], ".") && !strings.HasPrefix(imp, module) {
					t.Errorf("%s imports %s: the ground floor is standard library only", rel, imp)
				}
			}
		}
	}
}

func TestVendorsAreFenced(t *testing.T) {
	for _, p := range list(t, "./...") {
		rel := strings.TrimPrefix(p.ImportPath, module)
		imports := slices.Clone(p.Imports)
		if !below(rel, "test") {
			// What lives under test/ drives the whole from outside.
			imports = slices.Concat(imports, p.TestImports, p.XTestImports)
		}
		for _, fence := range fences {
			if slices.ContainsFunc(fence.allowed, func(a string) bool { return below(rel, a) }) || below(rel, "test") {
				continue
			}
			for _, imp := range imports {
				if strings.HasPrefix(imp, fence.vendor) {
					t.Errorf("%s imports %s: only %v may (%s)", rel, imp, fence.allowed, fence.reason)
				}
			}
		}
	}
}

// The plugin is started once per pod and operation; what it links, it pays for
// each time: package net and encoding/json alone would cost it as much as all
// that it does (docs/bench/README.md).
func TestPluginIsThin(t *testing.T) {
	own := []string{module + "cmd/underlay-cni", module + "internal/agentapi/pipe"}
	heavy := []string{"os", "net", "fmt", "reflect", "time", "context", "encoding/json", "regexp"}
	for _, p := range list(t, "./cmd/underlay-cni") {
		for _, dep := range p.Deps {
			if slices.Contains(heavy, dep) {
				t.Errorf("underlay-cni links %s: it makes each start slower", dep)
			}
			if strings.Contains(strings.Split(dep, "/")[0], ".") && !slices.Contains(own, dep) {
				t.Errorf("underlay-cni links %s: it is a pipe to the agent, where CNI is judged (agentapi/cni)", dep)
			}
		}
	}
}

// D4: the emulator and the product share no judgement.
func TestEmulatorAndProductShareNoJudgement(t *testing.T) {
	product := []string{"ipam", "policy", "flowlog", "reach", "plan", "ec2", "imds", "groups", "datapath", "agent", "controller", "agentapi"}
	for _, p := range list(t, "./internal/vpcd/...", "./cmd/vpcd") {
		for _, dep := range p.Deps {
			if _, room := place(dep); slices.Contains(product, room) {
				t.Errorf("%s depends on %s: one misunderstanding could make both agree", p.ImportPath, dep)
			}
		}
	}
}

// D4, once more: the model that the fabric is compared with is written from the
// facts alone.
func TestModelKnowsNoFabric(t *testing.T) {
	for _, p := range list(t, "./test/vpcmodel") {
		for _, dep := range p.Deps {
			if strings.HasPrefix(dep, module) && dep != p.ImportPath && dep != module+"internal/vpc" && dep != module+"internal/packet" {
				t.Errorf("%s depends on %s: the model would agree with what it is to judge", p.ImportPath, dep)
			}
		}
	}
}

func TestPurePackagesArePure(t *testing.T) {
	banned := []string{"os", "net", "net/http", "io/fs", "os/exec", "syscall", "sync", "context", "math/rand", "log/slog"}
	clock := []string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker"}
	for _, p := range list(t, "./internal/...") {
		if _, room := place(p.ImportPath); !slices.Contains(pure, room) {
			continue
		}
		for _, imp := range p.Imports {
			if slices.Contains(banned, imp) {
				t.Errorf("%s imports %s: it is pure", p.ImportPath, imp)
			}
		}
		for _, name := range p.GoFiles {
			fset := token.NewFileSet()
			file, err := parser.ParseFile(fset, filepath.Join(p.Dir, name), nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			ast.Inspect(file, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.GoStmt:
					t.Errorf("%s: a goroutine in a pure package", fset.Position(n.Pos()))
				case *ast.SelectorExpr:
					if x, ok := n.X.(*ast.Ident); ok && x.Name == "time" && slices.Contains(clock, n.Sel.Name) {
						t.Errorf("%s: time.%s in a pure package; time arrives with events", fset.Position(n.Pos()), n.Sel.Name)
					}
				}
				return true
			})
		}
	}
}

// The reference evaluator of policy and what it judges share the input's types
// and no code: one misunderstanding cannot make both agree.
func TestReferenceSharesNoCode(t *testing.T) {
	const dir = "../../internal/policy"
	parse := func(name string) *ast.File {
		t.Helper()
		file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(dir, name), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		return file
	}
	declared := func(file *ast.File) map[string]bool {
		names := map[string]bool{}
		for _, d := range file.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				names[d.Name.Name] = true
			case *ast.GenDecl:
				for _, s := range d.Specs {
					switch s := s.(type) {
					case *ast.TypeSpec:
						names[s.Name.Name] = true
					case *ast.ValueSpec:
						for _, n := range s.Names {
							names[n.Name] = true
						}
					}
				}
			}
		}
		delete(names, "String") // everything may have one
		return names
	}
	uses := func(file *ast.File, names map[string]bool, why string) {
		own := declared(file)
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CallExpr:
				if f, ok := n.Fun.(*ast.Ident); ok && names[f.Name] && !own[f.Name] {
					t.Errorf("a call of %s: %s", f.Name, why)
				}
				if f, ok := n.Fun.(*ast.SelectorExpr); ok && names[f.Sel.Name] && !own[f.Sel.Name] {
					t.Errorf("a call of method %s: %s", f.Sel.Name, why)
				}
			}
			return true
		})
	}
	reference := parse("evaluate.go")
	for _, name := range []string{"compile.go", "index.go", "cells.go", "lookup.go"} {
		judged := parse(name)
		uses(reference, declared(judged), "evaluate.go is to judge "+name)
		uses(judged, declared(reference), name+" is to be judged by evaluate.go")
	}
}

func TestEveryPackageSaysWhatItOwns(t *testing.T) {
	for _, p := range list(t, "./internal/...") {
		rel := strings.TrimPrefix(p.ImportPath, module)
		if strings.HasSuffix(rel, "/bpfgen") || rel == "internal/testenv" || strings.HasSuffix(rel, "/gen") {
			continue
		}
		if _, err := os.Stat(filepath.Join(p.Dir, "doc.go")); err != nil {
			t.Errorf("%s has no doc.go", rel)
		}
	}
}
