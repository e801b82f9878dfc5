package flow

import (
	"strings"
	"testing"
)

func TestParseFormat(t *testing.T) {
	f, err := ParseFormat(Default)
	if err != nil || len(f) != 14 || f.Version() != 2 {
		t.Fatalf("default: %v %v", f, err)
	}
	for format, want := range map[string]int{
		"${pkt-srcaddr} ${version}":         3,
		"${az-id}":                          4,
		"${flow-direction} ${traffic-path}": 5,
		"${ecs-task-id}":                    7,
		"${reject-reason} ${srcaddr}":       8,
	} {
		f, err := ParseFormat(format)
		if err != nil || f.Version() != want {
			t.Errorf("%s: version %d, %v; want %d", format, f.Version(), err, want)
		}
	}
	for _, bad := range []string{"", "version", "${version}  ${srcaddr}", "${version},${srcaddr}", "${version} ${version}", "${tgw-id}", "${encryption-status}", "${", "${version} "} {
		if f, err := ParseFormat(bad); err == nil {
			t.Errorf("%q is taken for %v", bad, f)
		}
	}
}

func FuzzParseFormat(f *testing.F) {
	f.Add(Default)
	f.Add("${version} x")
	f.Fuzz(func(t *testing.T, s string) {
		parsed, err := ParseFormat(s)
		if err != nil {
			return
		}
		words := make([]string, len(parsed))
		for i, x := range parsed {
			words[i] = "${" + x.Name + "}"
		}
		if back := strings.Join(words, " "); back != s {
			t.Errorf("%q reads as %q", s, back)
		}
	})
}
