package cli

import (
	"os"
	"path/filepath"
	"testing"
)

func TestWhichBuildsLabsUse(t *testing.T) {
	run := t.TempDir()
	write := func(lab, content string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(run, lab), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(run, lab, "lab.json"), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	a, _, _ := testApp(run)
	check := func(when string, want map[string]bool) {
		t.Helper()
		used := a.kubernetesUsers()
		for dir, want := range want {
			if got := used(dir); got != want {
				t.Errorf("%s: %s used: %t, want %t", when, dir, got, want)
			}
		}
	}
	check("no lab", map[string]bool{"/c/kubernetes/v1-a": false})

	write("plain", `{"version":1,"lab":{"name":"plain"}}`)
	write("one", `{"version":1,"lab":{"name":"one","kubernetes":{"bin":"/c/kubernetes/v1-a/bin"}}}`)
	if err := os.MkdirAll(filepath.Join(run, "being-made"), 0o755); err != nil {
		t.Fatal(err)
	}
	check("a lab with Kubernetes", map[string]bool{"/c/kubernetes/v1-a": true, "/c/kubernetes/v1-b": false, "/c/kubernetes/v1": false})

	write("broken", `{"version":`)
	check("a lab that cannot be read", map[string]bool{"/c/kubernetes/v1-b": true})
}
