package kubebuild

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestOutput(t *testing.T) {
	var told []string
	var log strings.Builder
	o := &output{pkg: "k8s.io/kubernetes/cmd/kubelet", log: &log, tell: func(s string) { told = append(told, s) }}
	text := "go: downloading k8s.io/api v0.37.2\ninternal/cpu\nk8s.io/kubernetes/pkg/kubelet\n" +
		"# k8s.io/kubernetes/pkg/kubelet\npkg/kubelet/kubelet.go:12:2: undefined: x\nk8s.io/kubernetes/cmd/kubelet\nfatal: no end"
	for _, piece := range strings.SplitAfter(text, "k") { // lines arrive in pieces
		if n, err := o.Write([]byte(piece)); n != len(piece) || err != nil {
			t.Fatalf("Write: %d, %v", n, err)
		}
	}
	o.flush()
	if log.String() != text {
		t.Errorf("log: %q", log.String())
	}
	if d := cmp.Diff([]string{
		"downloading k8s.io/api",
		"0 packages compiled, now internal/cpu",
		"1 packages compiled, now k8s.io/kubernetes/pkg/kubelet",
		"linking",
	}, told); d != "" {
		t.Errorf("told (-want +got):\n%s", d)
	}
	if d := cmp.Diff([]string{"# k8s.io/kubernetes/pkg/kubelet", "pkg/kubelet/kubelet.go:12:2: undefined: x", "fatal: no end"}, o.said()); d != "" {
		t.Errorf("said (-want +got):\n%s", d)
	}
}

func TestReporter(t *testing.T) {
	for _, c := range []struct {
		name string
		tty  bool
		want []string
	}{
		{"file", false, []string{
			"  [1/2] kubectl: the first takes long",
			"  [1/2] kubectl: 7 packages compiled, now a/b (10s, 10s in all)",
			"  [1/2] kubectl: done (12s)",
			"  [2/2] image pause",
		}},
		{"terminal", true, []string{
			"\r\x1b[K  [1/2] kubectl: the first takes long",
			"\r\x1b[K  [1/2] kubectl: the first takes long (1s, 1s in all)",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var out strings.Builder
				r := NewReporter(&out, c.tty)
				r.Progress("kubectl: the first takes long", 0, 2)
				time.Sleep(1500 * time.Millisecond)
				r.Progress("kubectl: 7 packages compiled, now a/b", 0, 2)
				time.Sleep(10 * time.Second)
				r.Progress("image pause", 1, 2)
				time.Sleep(500 * time.Millisecond)
				r.Progress("finished", 2, 2)
				r.End()
				r.End()
				if !strings.HasPrefix(out.String(), strings.Join(c.want, "\n")) {
					t.Errorf("got %q", out.String())
				}
				if c.tty && !strings.HasSuffix(out.String(), "\r\x1b[K  [2/2] image pause: done (500ms)\n\r\x1b[K") {
					t.Errorf("got %q", out.String())
				}
			})
		})
	}
}
