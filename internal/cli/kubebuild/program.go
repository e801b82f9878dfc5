package kubebuild

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// program is a program that is compiled.
type program struct {
	name     string
	module   string // folder of its module, in the source
	pkg      string
	source   []string // files and folders of ours that it is compiled from, in the source
	test     bool     // it is a test binary
	optional bool     // no cluster needs it
	version  func(versions) []string
}

// programs is all that can be built, in the order of building: kubectl first,
// since a fault in the module shows in it soonest.
var programs = []program{
	{name: "pause", module: ".", pkg: "./" + pauseSource, source: []string{pauseSource}},
	{name: "kubectl", module: kubernetesModule, pkg: "k8s.io/kubernetes/cmd/kubectl", version: kubernetesVersion},
	{name: "kube-apiserver", module: kubernetesModule, pkg: "k8s.io/kubernetes/cmd/kube-apiserver", version: kubernetesVersion},
	{name: "kube-controller-manager", module: kubernetesModule, pkg: "k8s.io/kubernetes/cmd/kube-controller-manager", version: kubernetesVersion},
	{name: "kube-scheduler", module: kubernetesModule, pkg: "k8s.io/kubernetes/cmd/kube-scheduler", version: kubernetesVersion},
	{name: "kubelet", module: kubernetesModule, pkg: "k8s.io/kubernetes/cmd/kubelet", version: kubernetesVersion},
	{name: "kube-proxy", module: kubernetesModule, pkg: "k8s.io/kubernetes/cmd/kube-proxy", version: kubernetesVersion},
	{name: "agnhost", module: kubernetesModule, pkg: "k8s.io/kubernetes/test/images/agnhost", version: kubernetesVersion},
	{name: "coredns", module: corednsModule, pkg: ".", source: []string{corednsModule + "/main.go"}, version: corednsVersion},
	{name: "helm", module: helmModule, pkg: "helm.sh/helm/v4/cmd/helm", version: helmVersion},
	{name: "ginkgo", module: kubernetesModule, pkg: "github.com/onsi/ginkgo/v2/ginkgo", optional: true},
	{name: "e2e.test", module: kubernetesModule, pkg: "./e2e", source: []string{e2eSource}, test: true, optional: true, version: kubernetesVersion},
}

const (
	kubernetesModule = "hack/kubernetes"
	corednsModule    = "hack/coredns"
	helmModule       = "hack/helm"
	e2eSource        = "hack/kubernetes/e2e"
	pauseSource      = "internal/cli/kubebuild/pause"
)

// versions are those of the modules' go.mod.
type versions struct {
	kubernetes string // "v1.37.2"
	coredns    string // "v1.14.7"
	helm       string // "v4.3.1"
}

func readVersions(source string) (v versions, err error) {
	for _, of := range []struct {
		module, path string
		to           *string
	}{
		{kubernetesModule, "k8s.io/kubernetes", &v.kubernetes},
		{corednsModule, "github.com/coredns/coredns", &v.coredns},
		{helmModule, "helm.sh/helm/v4", &v.helm},
	} {
		file := filepath.Join(source, of.module, "go.mod")
		b, err := os.ReadFile(file)
		if err != nil {
			return v, fmt.Errorf("read the version of %s: %w", of.path, err)
		}
		m := regexp.MustCompile(`(?m)^(?:require )?\s*` + regexp.QuoteMeta(of.path) + `\s+(v[0-9][^\s/]*)`).FindSubmatch(b)
		if m == nil {
			return v, fmt.Errorf("read the version of %s: %s does not require it; restore that file", of.path, file)
		}
		*of.to = string(m[1])
	}
	return v, nil
}

// kubernetesVersion sets what the programs say that they are; without it they
// are v0.0.0-master, which kubectl and kubelet refuse to talk to one another
// about. No commit and date are known to a build from modules.
func kubernetesVersion(v versions) []string {
	parts := strings.SplitN(strings.TrimPrefix(v.kubernetes, "v"), ".", 3)
	if len(parts) < 3 {
		parts = []string{"0", "0", "0"}
	}
	var flags []string
	for _, pkg := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		flags = append(flags,
			"-X", pkg+".gitVersion="+v.kubernetes,
			"-X", pkg+".gitMajor="+parts[0],
			"-X", pkg+".gitMinor="+parts[1],
			"-X", pkg+".gitTreeState=clean",
			"-X", pkg+".gitCommit="+strings.Repeat("0", 40),
			"-X", pkg+".buildDate=1970-01-01T00:00:00Z")
	}
	return flags
}

func corednsVersion(v versions) []string {
	return []string{"-X", "github.com/coredns/coredns/coremain.GitCommit=" + v.coredns}
}

func helmVersion(v versions) []string {
	return []string{"-X", "helm.sh/helm/v4/internal/version.version=" + v.helm}
}

// arguments are those of the go command that decide about what it makes.
func (p program) arguments(v versions) []string {
	ldflags := []string{"-s", "-w"}
	if p.version != nil {
		ldflags = append(ldflags, p.version(v)...)
	}
	args := []string{"build"}
	if p.test {
		// go test vets all that a test binary imports first: ten minutes here.
		args = []string{"test", "-c", "-vet=off"}
	}
	return append(args, "-trimpath", "-ldflags", strings.Join(ldflags, " "))
}

// build compiles the program to the path to.
func (p program) build(ctx context.Context, b *builder, to string) ([]string, error) {
	args := p.arguments(b.versions)
	if p.test {
		// "go test -c" says nothing while it compiles for minutes; a build of
		// what the tests import, which it then finds in Go's cache, does.
		imports, err := b.testImports(ctx, p)
		if err != nil {
			return nil, err
		}
		if err := b.compile(ctx, p, append([]string{"build", "-v", "-trimpath"}, imports...)); err != nil {
			return nil, err
		}
		b.progress(p.name+": linking", b.done, b.of)
	} else {
		args = append(args, "-v")
	}
	return nil, b.compile(ctx, p, append(args, "-o", to, p.pkg))
}

// testImports returns the packages that the tests of p import.
func (b *builder) testImports(ctx context.Context, p program) ([]string, error) {
	cmd := exec.CommandContext(ctx, b.goTool, "list", "-f", `{{range .TestImports}}{{.}}{{"\n"}}{{end}}{{range .XTestImports}}{{.}}{{"\n"}}{{end}}`, p.pkg)
	cmd.Dir = filepath.Join(b.source, p.module)
	cmd.Env = append(os.Environ(), buildEnv(arch)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("build %s: go list %s in %s: %w: %s", p.name, p.pkg, cmd.Dir, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return strings.Fields(string(out)), nil
}

// keys returns the key of each program and the hash of a folder: of the keys of
// all programs that are not made from sources which change by the day.
func (b *builder) keys(want []string) (map[string]string, string, error) {
	modules := map[string]string{}
	for _, module := range []string{kubernetesModule, corednsModule, helmModule} {
		h := sha256.New()
		for _, name := range []string{"go.mod", "go.sum"} {
			if err := hashFile(h, filepath.Join(b.source, module, name), module+"/"+name); err != nil {
				return nil, "", err
			}
		}
		modules[module] = hex.EncodeToString(h.Sum(nil))
	}
	keys := map[string]string{}
	for _, p := range programs {
		if p.test && !slices.Contains(want, p.name) {
			continue
		}
		h := sha256.New()
		fmt.Fprintf(h, "%s\n%s %s\n%q\n%q\n%s\n", p.name, b.compiler, arch, buildEnv(arch), p.arguments(b.versions), modules[p.module])
		for _, source := range p.source {
			if err := hashTree(h, b.source, source); err != nil {
				return nil, "", err
			}
		}
		keys[p.name] = hex.EncodeToString(h.Sum(nil))
	}
	h := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(keys)) {
		if name != "e2e.test" {
			fmt.Fprintln(h, name, keys[name])
		}
	}
	return keys, hex.EncodeToString(h.Sum(nil))[:12], nil
}

// hashTree adds a file, or all files of a folder, to h, under their names in
// the source.
func hashTree(h io.Writer, source, name string) error {
	root := filepath.Join(source, name)
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("look for what is built: %w", err)
		}
		if !d.Type().IsRegular() {
			return nil
		}
		rel, err := filepath.Rel(source, path)
		if err != nil {
			return err
		}
		return hashFile(h, path, rel)
	})
}

func hashFile(h io.Writer, path, name string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("look for what is built: %w", err)
	}
	fmt.Fprintf(h, "%s %d %x\n", filepath.ToSlash(name), len(b), sha256.Sum256(b))
	return nil
}
