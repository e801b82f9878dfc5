package upstream

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// program writes a shell script.
func program(t *testing.T, name, script string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// ginkgo stands for Ginkgo's command: it reports each selected spec as passed
// but for those that failing matches, as e2e.test does.
const ginkgo = `
for a in "$@"; do
	case $a in -specs=*) specs=${a#-specs=};; -progress=*) progress=${a#-progress=};; esac
done
while read -r name; do
	state=passed; case $name in *broken*) state=failed;; esac
	printf '{"name":"%s","state":"%s","seconds":1.5,"process":1}\n' "$name" "$state" >>"$progress"
done <"$specs"
`

func TestRun(t *testing.T) {
	s := &Suite{
		Binary: "unused", Ginkgo: program(t, "ginkgo", ginkgo+"exit 1\n"), Procs: 2, Timeout: time.Minute,
		Dir: filepath.Join(t.TempDir(), "reports"),
	}
	var told []string
	s.Done = func(r Result, done, of int) {
		told = append(told, r.Name)
		if done != len(told) || of != 2 {
			t.Errorf("%d of %d after %d", done, of, len(told))
		}
	}
	got, err := s.Run(t.Context(), []string{"[a] works", "[a] is broken"})
	if err != nil {
		t.Fatal(err)
	}
	want := []Result{{Name: "[a] works", State: "passed", Seconds: 1.5}, {Name: "[a] is broken", State: "failed", Seconds: 1.5}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"[a] works", "[a] is broken"}, told); diff != "" {
		t.Error(diff)
	}
}

// That no spec ever ran is not the specs' failure.
func TestRunThatCannotBegin(t *testing.T) {
	s := &Suite{Binary: "unused", Ginkgo: program(t, "ginkgo", "echo no such cluster; exit 1\n"), Procs: 1, Timeout: time.Minute, Dir: t.TempDir()}
	if _, err := s.Run(t.Context(), []string{"[a] works"}); err == nil || !strings.Contains(err.Error(), "no such cluster") {
		t.Errorf("got %v", err)
	}
}

func TestList(t *testing.T) {
	s := &Suite{Binary: program(t, "e2e.test", "printf '[a] one\\n[a] two\\n'\n")}
	got, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"[a] one", "[a] two"}, got); diff != "" {
		t.Error(diff)
	}
	s.Binary = program(t, "e2e.test", "echo broken >&2; exit 3\n")
	if _, err := s.List(t.Context()); err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("got %v", err)
	}
}
