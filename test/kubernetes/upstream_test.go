package kubernetes

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/testenv"
	"github.com/underlay-cni/underlay/test/kubernetes/upstream"
)

// Upstream's specs are the judge that knows nothing of us.
func TestUpstream(t *testing.T) {
	testenv.Require(t, "cluster")
	t.Parallel()
	ledger, err := upstream.ReadLedger("../../hack/kubernetes/e2e/specs.txt")
	if err != nil {
		t.Fatal(err)
	}
	bin := suiteBin(t)
	s := &upstream.Suite{
		Binary: filepath.Join(bin, "e2e.test"), Ginkgo: filepath.Join(bin, "ginkgo"), Kubectl: filepath.Join(bin, "kubectl"),
		Kubeconfig: *kubeconfig, Procs: *procs, Timeout: time.Hour, Dir: out(t, "upstream-"+*proxy),
	}
	linked, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := ledger.Check(linked); err != nil {
		t.Fatalf("the ledger and the binary differ:\n%v", err)
	}
	names := ledger.ToRun(*proxy)
	if *focus != "" {
		re, err := regexp.Compile(*focus)
		if err != nil {
			t.Fatalf("-focus: %v", err)
		}
		names = slices.DeleteFunc(names, func(name string) bool { return !re.MatchString(name) })
	}
	if len(names) == 0 {
		t.Fatalf("-focus %s leaves no spec", *focus)
	}
	if s.Kubeconfig == "" {
		c := shared(t)
		s.Kubeconfig = c.Kubeconfig
		if *secondary {
			held := c.crowd(t)
			defer func() {
				if diff := cmp.Diff(held, c.firstENIs()); diff != "" {
					t.Errorf("addresses of the nodes' first interfaces have changed hands while the specs ran (-before +after):\n%s", diff)
				}
			}()
		}
	} else if *secondary {
		t.Fatal("-secondary wants a lab")
	}

	failed := 0
	s.Done = func(r upstream.Result, done, of int) {
		if !r.Passed() {
			failed++
		}
		t.Logf("%3d of %d, %d not passed  %-7s %6.1f s  %s", done, of, failed, r.State, r.Seconds, strings.TrimPrefix(r.Name, "[sig-network] "))
	}
	start := time.Now()
	results, err := s.Run(context.WithoutCancel(t.Context()), names)
	if err != nil {
		t.Error(err)
	}
	sum := ledger.Summarize(*proxy, names, results)
	var table strings.Builder
	sum.Write(&table)
	t.Logf("%d specs in %v, reports in %s\n%s", len(results), time.Since(start).Round(time.Second), s.Dir, table.String())
	if err := os.WriteFile(filepath.Join(s.Dir, "summary.txt"), []byte(table.String()), 0o644); err != nil {
		t.Error(err)
	}
	if err := sum.Err(); err != nil {
		t.Errorf("%v\nthe failed specs' own logs are in %s", err, filepath.Join(s.Dir, upstream.LogName))
	}
}

// out returns a folder of that name for what a test leaves.
func out(t *testing.T, name string) string {
	t.Helper()
	dir := *outDir
	if dir == "" {
		return t.TempDir()
	}
	dir, err := filepath.Abs(filepath.Join(dir, name))
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}
