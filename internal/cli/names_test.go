package cli

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestCheckLab(t *testing.T) {
	for name, ok := range map[string]bool{
		"demo": true, "a": true, "a1": true, "ci-run-7": true, "pod": true, "fabric": true, "abcdefghij0123456789": true,
		"": false, "1a": false, "Demo": false, "a_b": false, "a-": false, "-a": false, "a--b": false, "a/b": false, "..": false,
		"abcdefghij01234567890": false, "a-pod": false, "a-svc-b": false, "a-i": false, "x-fabric": false, "a b": false, "a\n": false,
	} {
		if err := CheckLab(name); (err == nil) != ok {
			t.Errorf("CheckLab(%q) = %v, want ok %v", name, err, ok)
		}
	}
}

func TestCheckPod(t *testing.T) {
	for name, ok := range map[string]bool{
		"web": true, "web-1": true, "1": true, "a--b": true, strings.Repeat("a", 63): true,
		"": false, "-a": false, "a-": false, "Web": false, "a.b": false, "a/b": false, "..": false, strings.Repeat("a", 64): false,
	} {
		if err := CheckPod(name); (err == nil) != ok {
			t.Errorf("CheckPod(%q) = %v, want ok %v", name, err, ok)
		}
	}
}

func TestLabOfNetns(t *testing.T) {
	type answer struct {
		Lab, Kind, Name string
		OK              bool
	}
	for netns, want := range map[string]answer{
		"ul-demo-fabric":              {"demo", "fabric", "", true},
		"ul-demo-i-0123456789abcdef0": {"demo", "i", "0123456789abcdef0", true},
		"ul-demo-svc-db-1":            {"demo", "svc", "db-1", true},
		"ul-demo-pod-web-1":           {"demo", "pod", "web-1", true},
		"ul-ci-7-pod-fabric":          {"ci-7", "pod", "fabric", true}, // not the fabric of a lab ci-7-pod
		"ul-pod-pod-pod":              {"pod", "pod", "pod", true},
		"ul-demo":                     {},
		"ul-demo-pod":                 {},
		"ul-demo-fabric-x":            {},
		"ul-demo-other-x":             {},
		"cni-1234":                    {},
		"ul--pod-x":                   {},
	} {
		var got answer
		got.Lab, got.Kind, got.Name, got.OK = labOfNetns(netns)
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("labOfNetns(%q) (-want +got):\n%s", netns, d)
		}
	}
}

// Every name that run and up give leads back to its lab, whatever the names.
func FuzzLabOfNetns(f *testing.F) {
	f.Add("demo", "web")
	f.Add("a", "pod-fabric")
	f.Add("pod-x", "i-1")
	f.Fuzz(func(t *testing.T, lab, pod string) {
		_, _, _, _ = labOfNetns(lab)
		if CheckLab(lab) != nil || CheckPod(pod) != nil {
			return
		}
		gotLab, kind, name, ok := labOfNetns(home{name: lab}.podNetns(pod))
		if !ok || gotLab != lab || kind != "pod" || name != pod {
			t.Errorf("pod %q of lab %q is taken for %s %q of lab %q (%v)", pod, lab, kind, name, gotLab, ok)
		}
	})
}
