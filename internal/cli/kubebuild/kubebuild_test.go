package kubebuild

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// fakeSource is a repository whose Kubernetes consists of a few empty programs:
// the same modules, packages and flags, compiled in a second.
func fakeSource(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	const nothing = "package main\n\nfunc main() {}\n"
	files := map[string]string{
		"go.mod":                                               "module github.com/underlay-cni/underlay\n\ngo 1.26.0\n",
		pauseSource + "/main.go":                               nothing,
		"hack/kubernetes/go.sum":                               "",
		"hack/coredns/go.sum":                                  "",
		"hack/helm/go.sum":                                     "",
		"hack/coredns/main.go":                                 nothing,
		"hack/coredns/go.mod":                                  "module coredns\n\ngo 1.26.0\n\nrequire github.com/coredns/coredns v1.14.7\n",
		"hack/helm/go.mod":                                     "module helm\n\ngo 1.26.0\n\nrequire helm.sh/helm/v4 v4.3.1\n",
		"hack/kubernetes/go.mod":                               "module kubernetes\n\ngo 1.26.0\n\nrequire (\n\tk8s.io/component-base v0.37.2\n\tk8s.io/kubernetes v1.37.2\n)\n\nreplace (\n\tk8s.io/component-base => ./upstream/base\n\tk8s.io/kubernetes => ./upstream\n)\n",
		"hack/kubernetes/keep.go":                              "package kubernetes\n",
		e2eSource + "/e2e_test.go":                             "package e2e\n\nimport (\n\t\"testing\"\n\n\t_ \"k8s.io/component-base/version\"\n)\n\nfunc TestIt(*testing.T) {}\n",
		"hack/kubernetes/upstream/base/go.mod":                 "module k8s.io/component-base\n\ngo 1.26.0\n",
		"hack/kubernetes/upstream/base/version/v.go":           "package version\n\nvar gitVersion, gitMajor, gitMinor string\n\nfunc Get() string { return gitVersion + \" \" + gitMajor + \" \" + gitMinor }\n",
		"hack/kubernetes/upstream/go.mod":                      "module k8s.io/kubernetes\n\ngo 1.26.0\n\nrequire k8s.io/component-base v0.37.2\n",
		"hack/kubernetes/upstream/cmd/kubectl/main.go":         "package main\n\nimport \"k8s.io/component-base/version\"\n\nfunc main() { println(version.Get()) }\n",
		"hack/kubernetes/upstream/cmd/kubelet/main.go":         nothing,
		"hack/kubernetes/upstream/test/images/agnhost/main.go": nothing,
		"hack/kubernetes/upstream/test/images/agnhost/porter/localhost.crt": "crt",
		"hack/kubernetes/upstream/test/images/agnhost/porter/localhost.key": "key",
		"programs/underlay-agent": "agent",
		"programs/underlay-cni":   "cni",
	}
	for name, content := range files {
		write(t, filepath.Join(dir, name), content)
	}
	return dir
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// steps records what was made, by the label of each step.
type steps struct {
	mu   sync.Mutex
	list []string
}

func (s *steps) progress(what string, done, of int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	step, _, _ := strings.Cut(what, ": ")
	if len(s.list) == 0 || s.list[len(s.list)-1] != step {
		s.list = append(s.list, step)
	}
}

// ensure runs Ensure and returns what it made, step by step.
func ensure(t *testing.T, source, cache string, want ...string) (*Artifacts, []string) {
	t.Helper()
	var s steps
	a, err := Ensure(t.Context(), Options{Source: source, Cache: cache, Programs: filepath.Join(source, "programs"), Want: want, Progress: s.progress})
	if err != nil {
		t.Fatal(err)
	}
	return a, s.list
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func TestEnsure(t *testing.T) {
	source, cache := fakeSource(t), t.TempDir()
	a, made := ensure(t, source, cache, "kubectl", "pause", Underlay)
	if d := cmp.Diff([]string{"pause", "kubectl", "image pause", "image underlay", "finished"}, made); d != "" {
		t.Errorf("steps (-want +got):\n%s", d)
	}
	if a.Version != "v1.37.2" || !strings.HasPrefix(a.Bin, filepath.Join(cache, "kubernetes", "v1.37.2-")) {
		t.Errorf("artifacts: %+v", a)
	}
	out, err := exec.Command(filepath.Join(a.Bin, "kubectl")).CombinedOutput()
	if err != nil || string(out) != "v1.37.2 1 37\n" {
		t.Errorf("kubectl says %q (%v): the version is not set", out, err)
	}
	pause, ok := a.Image("pause")
	if !ok || pause.Ref != pauseRef {
		t.Errorf("image pause: %+v", pause)
	}
	own, ok := a.Image(Underlay)
	if !ok || !regexp.MustCompile(`^ghcr\.io/underlay-cni/underlay:lab-[0-9a-f]{12}$`).MatchString(own.Ref) {
		t.Errorf("image underlay: %+v", own)
	}
	for _, i := range a.Images {
		if st, err := os.Stat(i.Tar); err != nil || st.Size() == 0 {
			t.Errorf("%s: %v", i.Tar, err)
		}
	}

	before := inode(t, filepath.Join(a.Bin, "kubectl"))
	again, made := ensure(t, source, cache, "kubectl", "pause", Underlay)
	if len(made) != 0 || inode(t, filepath.Join(a.Bin, "kubectl")) != before {
		t.Errorf("a second Ensure made %v", made)
	}
	if d := cmp.Diff(a, again); d != "" {
		t.Errorf("a second Ensure answers otherwise:\n%s", d)
	}

	// A changed agent is a changed image, and nothing else.
	write(t, filepath.Join(source, "programs/underlay-agent"), "another agent")
	changed, made := ensure(t, source, cache, "kubectl", "pause", Underlay)
	if d := cmp.Diff([]string{"image underlay", "finished"}, made); d != "" {
		t.Errorf("steps after the agent changed (-want +got):\n%s", d)
	}
	if i, _ := changed.Image(Underlay); i.Ref == own.Ref || i.Tar == own.Tar {
		t.Errorf("another agent, the same image %s", i.Ref)
	}
}

func TestE2E(t *testing.T) {
	source, cache := fakeSource(t), t.TempDir()
	a, _ := ensure(t, source, cache, "e2e.test")
	if out, err := exec.Command(filepath.Join(a.Bin, "e2e.test"), "-test.run", "TestIt", "-test.v").CombinedOutput(); err != nil || !strings.Contains(string(out), "PASS: TestIt") {
		t.Errorf("e2e.test: %v\n%s", err, out)
	}
	// Its source does not name the folder: everything else would be linked anew
	// at each change.
	write(t, filepath.Join(source, e2eSource, "specs.txt"), "one\n")
	b, made := ensure(t, source, cache, "e2e.test")
	if d := cmp.Diff([]string{"e2e.test", "finished"}, made); d != "" || a.Bin != b.Bin {
		t.Errorf("after a change in e2e: %s, %s; steps (-want +got):\n%s", a.Bin, b.Bin, d)
	}
}

func TestHalfMadeIsNotTaken(t *testing.T) {
	source, cache := fakeSource(t), t.TempDir()
	a, _ := ensure(t, source, cache, "pause")
	pause, manifest := filepath.Join(a.Bin, "pause"), filepath.Join(filepath.Dir(a.Bin), "manifest.json")
	for what, spoil := range map[string]func(){
		"a file that no manifest has":  func() { write(t, filepath.Join(a.Bin, "kubectl"), "half") },
		"a truncated file":             func() { write(t, pause, "half") },
		"a file that is gone":          func() { _ = os.Remove(pause) },
		"a manifest that is gone":      func() { _ = os.Remove(manifest) },
		"a manifest that is half":      func() { write(t, manifest, `{"entries": {"bin/pause": {"key"`) },
		"a manifest of something else": func() { write(t, manifest, `[]`) },
	} {
		spoil()
		b, _ := ensure(t, source, cache, "pause", "kubectl")
		for _, name := range []string{"pause", "kubectl"} {
			if err := exec.Command(filepath.Join(b.Bin, name)).Run(); err != nil {
				t.Errorf("after %s: %s: %v", what, name, err)
			}
		}
		_ = os.Remove(filepath.Join(b.Bin, "kubectl"))
	}
}

func TestInterruptedBuildGoesOn(t *testing.T) {
	source, cache := fakeSource(t), t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, err := Ensure(ctx, Options{Source: source, Cache: cache, Want: []string{"pause", "kubectl", "kubelet"}, Progress: func(what string, _, _ int) {
		if strings.HasPrefix(what, "kubelet") {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "make kubelet: interrupted") {
		t.Fatalf("an interrupted build: %v", err)
	}
	all, err := folders(filepath.Join(cache, "kubernetes"))
	if err != nil || len(all) != 1 {
		t.Fatalf("folders: %v, %v", all, err)
	}
	// What a builder leaves that was killed in the middle.
	left := filepath.Join(all[0].dir, scratchPrefix+"left")
	write(t, filepath.Join(left, "kubelet"), "half")

	a, made := ensure(t, source, cache, "pause", "kubectl", "kubelet")
	if d := cmp.Diff([]string{"kubelet", "image pause", "finished"}, made); d != "" {
		t.Errorf("steps of the next build (-want +got):\n%s", d)
	}
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the scratch folder of a killed builder stays: %v", err)
	}
	if out, err := exec.Command(filepath.Join(a.Bin, "kubelet")).CombinedOutput(); err != nil {
		t.Errorf("kubelet: %v %s", err, out)
	}
}

func TestCompilerComplains(t *testing.T) {
	source, cache := fakeSource(t), t.TempDir()
	write(t, filepath.Join(source, "hack/kubernetes/upstream/cmd/kubelet/main.go"), "package main\n\nfunc main() { undefined() }\n")
	var log bytes.Buffer
	_, err := Ensure(t.Context(), Options{Source: source, Cache: cache, Want: []string{"kubectl", "kubelet"}, Log: &log})
	if err == nil || !strings.Contains(err.Error(), "build kubelet") || !strings.Contains(err.Error(), "undefined: undefined") || !strings.Contains(err.Error(), "build.log") {
		t.Fatalf("error: %v", err)
	}
	if !strings.Contains(log.String(), "undefined: undefined") || !strings.Contains(log.String(), "CGO_ENABLED=0") {
		t.Errorf("log:\n%s", log.String())
	}
	all, _ := folders(filepath.Join(cache, "kubernetes"))
	m, err := all[0].manifest()
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"bin/kubectl"}, slices.Sorted(maps.Keys(m.Entries))); d != "" {
		t.Errorf("what is kept (-want +got):\n%s", d)
	}
}

func TestUnknown(t *testing.T) {
	source := fakeSource(t)
	for _, c := range []struct {
		o    Options
		want string
	}{
		{Options{Source: source, Want: []string{"kubetcl"}}, `"kubetcl"`},
		{Options{Source: t.TempDir(), Want: []string{"pause"}}, "checkout of the repository"},
		{Options{Source: source, Want: []string{Underlay}, Programs: t.TempDir()}, "make build"},
	} {
		c.o.Cache = t.TempDir()
		if _, err := Ensure(t.Context(), c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: error %v, want %q in it", c.o, err, c.want)
		}
	}
}

func TestOneBuilderAtATime(t *testing.T) {
	source, cache := fakeSource(t), t.TempDir()
	const callers = 4
	var wg sync.WaitGroup
	errs := make(chan error, callers)
	var all steps
	for range callers {
		wg.Go(func() {
			_, err := Ensure(t.Context(), Options{Source: source, Cache: cache, Want: []string{"kubectl"}, Progress: all.progress})
			errs <- err
		})
	}
	wg.Wait()
	for range callers {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	builds := 0
	for _, s := range all.list {
		if s == "finished" {
			builds++
		}
	}
	if builds != 1 {
		t.Errorf("%d of %d callers built, want 1; steps: %v", builds, callers, all.list)
	}
}

func TestWaitingIsTold(t *testing.T) {
	source, cache := fakeSource(t), t.TempDir()
	l, err := lockBuild(t.Context(), filepath.Join(cache, "kubernetes"), func(string) { t.Error("waits for nobody") })
	if err != nil {
		t.Fatal(err)
	}
	l.tell("kubelet, 3 of 15")
	told := make(chan string, 100)
	ended := make(chan error, 1)
	start := func(ctx context.Context) {
		go func() {
			_, err := Ensure(ctx, Options{Source: source, Cache: cache, Want: []string{"kubectl"}, Progress: func(what string, _, _ int) {
				select {
				case told <- what:
				default:
				}
			}})
			ended <- err
		}()
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, errors.New("the test's own end"))
	defer cancel()
	waiting := regexp.MustCompile(`^waiting: for process [0-9]+ \(kubelet, 3 of 15, since [0-9:]+\)$`)

	start(ctx)
	if what := <-told; !waiting.MatchString(what) {
		t.Errorf("who waits is told %q", what)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "kubelet, 3 of 15") {
		t.Errorf("interrupted while waiting: %v", err)
	}
	start(t.Context())
	if what := <-told; !waiting.MatchString(what) {
		t.Errorf("who waits is told %q", what)
	}
	l.release()
	if err := <-ended; err != nil {
		t.Errorf("after the other builder: %v", err)
	}
}

func TestOtherFolderLinksWhatIsTheSame(t *testing.T) {
	source, cache := fakeSource(t), t.TempDir()
	a, _ := ensure(t, source, cache, "kubectl", "pause")
	write(t, filepath.Join(source, pauseSource, "main.go"), "package main\n\nfunc main() { println() }\n")
	b, _ := ensure(t, source, cache, "kubectl", "pause")
	if a.Bin == b.Bin {
		t.Fatal("another pause, the same folder")
	}
	if inode(t, filepath.Join(a.Bin, "kubectl")) != inode(t, filepath.Join(b.Bin, "kubectl")) {
		t.Error("kubectl was compiled again")
	}
	if inode(t, filepath.Join(a.Bin, "pause")) == inode(t, filepath.Join(b.Bin, "pause")) {
		t.Error("pause was not compiled again")
	}
}

func TestImagesAreReproducible(t *testing.T) {
	var tars [2][]byte
	for i := range tars {
		a, _ := ensure(t, fakeSource(t), t.TempDir(), "pause", Underlay)
		for _, image := range a.Images {
			b, err := os.ReadFile(image.Tar)
			if err != nil {
				t.Fatal(err)
			}
			tars[i] = append(tars[i], b...)
		}
	}
	if !bytes.Equal(tars[0], tars[1]) {
		t.Error("images of equal sources differ")
	}
}

func TestImagesArePruned(t *testing.T) {
	source, cache := fakeSource(t), t.TempDir()
	o := Options{Source: source, Cache: cache, Programs: filepath.Join(source, "programs"), Want: []string{Underlay}}
	var last *Artifacts
	kept := func() []string {
		paths, err := filepath.Glob(filepath.Join(filepath.Dir(last.Bin), "images", "underlay-*"))
		if err != nil {
			t.Fatal(err)
		}
		return paths
	}
	for i := range keptImages + 3 {
		write(t, filepath.Join(source, "programs/underlay-agent"), strings.Repeat("x", i+1))
		last, _ = ensure(t, source, cache, Underlay)
	}
	// A lab that runs may need any of today's.
	if got := kept(); len(got) != keptImages+3 {
		t.Errorf("%d of Underlay's images of today are kept, want all: %v", len(got), got)
	}
	for i, path := range kept() {
		if image, _ := last.Image(Underlay); path != image.Tar {
			then := time.Now().Add(-keptAge - time.Duration(i+1)*time.Hour)
			if err := os.Chtimes(path, then, then); err != nil {
				t.Fatal(err)
			}
		}
	}
	write(t, filepath.Join(source, "programs/underlay-agent"), "new")
	last, _ = ensure(t, source, cache, Underlay)
	if got := kept(); len(got) != keptImages {
		t.Errorf("%d of Underlay's images of yesterday are kept, want %d: %v", len(got), keptImages, got)
	}
	if i, _ := last.Image(Underlay); !slices.Contains(kept(), i.Tar) {
		t.Errorf("the newest image %s is gone", i.Tar)
	}
	write(t, filepath.Join(source, "programs/underlay-agent"), "newer")
	last, _ = ensure(t, source, cache, Underlay)
	if _, err := Clean(t.Context(), o, false, nil, nil); err != nil {
		t.Fatal(err)
	}
	if i, _ := last.Image(Underlay); !slices.Equal(kept(), []string{i.Tar}) {
		t.Errorf("after Clean there are %v of Underlay's images, want %s", kept(), i.Tar)
	}
}

func TestClean(t *testing.T) {
	source, cache := fakeSource(t), t.TempDir()
	o := Options{Source: source, Cache: cache}
	nobody := func(string) bool { return false }
	quiet := func(string) {}
	if got, err := Clean(t.Context(), o, false, nobody, quiet); err != nil || got != nil {
		t.Fatalf("an empty cache: %v, %v", got, err)
	}
	var bins []string
	for i := range 3 {
		write(t, filepath.Join(source, pauseSource, "main.go"), "package main\n\nfunc main() { println("+strings.Repeat("1", i+1)+") }\n")
		a, _ := ensure(t, source, cache, "pause", "kubectl")
		bins = append(bins, filepath.Dir(a.Bin))
	}
	got, err := Clean(t.Context(), o, false, func(dir string) bool { return dir == bins[1] }, quiet)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range got {
		want := c.Dir == bins[0]
		if c.Removed != want || c.Current != (c.Dir == bins[2]) || c.Used != (c.Dir == bins[1]) {
			t.Errorf("%+v: which of %v is it?", c, bins)
		}
		if _, err := os.Stat(c.Dir); errors.Is(err, os.ErrNotExist) != want {
			t.Errorf("%s: removed %t, but: %v", c.Name, want, err)
		}
		// kubectl, a megabyte, is shared with the others.
		if c.Removed && (c.Freed <= 0 || c.Freed >= c.Bytes) {
			t.Errorf("%s: freed %d of %d bytes", c.Name, c.Freed, c.Bytes)
		}
	}
	if len(got) != 3 {
		t.Errorf("%d folders, want 3", len(got))
	}
	if _, err := Clean(t.Context(), o, true, nobody, quiet); err != nil {
		t.Fatal(err)
	}
	if left, err := folders(filepath.Join(cache, "kubernetes")); err != nil || len(left) != 0 {
		t.Errorf("--all left %v (%v)", left, err)
	}
}
