package cni

import (
	"errors"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/underlay-cni/underlay/internal/agentapi"
)

func TestParseConfig(t *testing.T) {
	for _, tc := range []struct {
		name, in, version string
		code              uint
	}{
		{"whole", `{"cniVersion":"1.1.0","name":"n","type":"underlay-cni","socket":"/run/x.sock"}`, "1.1.0", 0},
		{"without a version", `{"name":"n"}`, "0.1.0", 0},
		{"no name", `{"cniVersion":"1.1.0"}`, "", types.ErrInvalidNetworkConfig},
		{"bad name", `{"name":"a/b"}`, "", types.ErrInvalidNetworkConfig},
		{"no JSON", `{`, "", types.ErrDecodingFailure},
		{"wrong type", `{"name":7}`, "", types.ErrDecodingFailure},
	} {
		c, err := parseConfig([]byte(tc.in))
		var e *types.Error
		switch {
		case tc.code == 0 && (err != nil || c.CNIVersion != tc.version):
			t.Errorf("%s: %+v, %v", tc.name, c, err)
		case tc.code != 0 && (!errors.As(err, &e) || e.Code != tc.code):
			t.Errorf("%s: %v, want code %d", tc.name, err, tc.code)
		}
	}
}

func TestPodOf(t *testing.T) {
	const uid = "7f7b8c9e-1d2a-4c53-9f6e-0a1b2c3d4e5f"
	for in, want := range map[string]agentapi.Pod{
		"": {},
		"IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID=" + uid:                                       {Namespace: "shop", Name: "web-0", UID: uid},
		"IgnoreUnknown=true;NOMAD_REGION=global;NOMAD_JOB_ID=api;NOMAD_GROUP_NAME=web;NOMAD_ALLOC_ID=" + uid + ";NOMAD_NAMESPACE=default;K8S_POD_NAME=db": {Namespace: "default", Name: "api/web", UID: uid},
		"NOMAD_GROUP_NAME=web;NOMAD_JOB_ID=api":      {Name: "api/web"},
		"NOMAD_JOB_ID=batch/dispatch-17-a=b":         {Name: "batch/dispatch-17-a=b"},
		"NOMAD_GROUP_NAME=web;NOMAD_ALLOC_ID=" + uid: {Name: "web", UID: uid}, // the job's ID had a semicolon
		"NOMAD_REGION=global;K8S_POD_NAME=web":       {Name: "web"},
		"SomebodyElses=1;K8S_POD_NAME=web;more":      {Name: "web"},
		"K8S_POD_NAME;=;;x":                          {},
		"K8S_POD_NAME=a\x1b[2J\nb\xff":               {Name: "a\ufffd[2J\ufffdb\ufffd"},
	} {
		if got := podOf(in); got != want {
			t.Errorf("podOf(%q) = %+v, want %+v", in, got, want)
		}
	}
}

func TestNamesFitTheRecord(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{strings.Repeat("n", 64), strings.Repeat("n", 64)},
		{strings.Repeat("n", 65), strings.Repeat("n", 55) + "~1e3fb6d5"},
		{strings.Repeat("n", 54) + "éxxxxxxxxx", strings.Repeat("n", 54) + "~5b759f15"}, // not within a rune
	} {
		if got := fit(tc.in, 64); got != tc.want {
			t.Errorf("fit(%q) = %q, want %q", tc.in, got, tc.want)
		}
	}
	if a, b := fit(strings.Repeat("n", 100)+"a", 64), fit(strings.Repeat("n", 100)+"b", 64); a == b {
		t.Errorf("two became %s", a)
	}
}

func TestLibraryErrorsSayWhatToDo(t *testing.T) {
	for _, code := range []uint{types.ErrIncompatibleCNIVersion, types.ErrDecodingFailure, types.ErrInvalidNetworkConfig, types.ErrInvalidEnvironmentVariables} {
		e := types.NewError(code, "what went wrong", "")
		e = asError(e)
		if !strings.HasPrefix(e.Msg, "what went wrong; ") {
			t.Errorf("code %d: %q", code, e.Msg)
		}
	}
	e := types.NewError(types.ErrDecodingFailure, "wrong; do this", "")
	if e = asError(e); e.Msg != "wrong; do this" {
		t.Errorf("advised twice: %q", e.Msg)
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.1.0","name":"n","socket":"/x","prevResult":{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":"/n"}],"ips":[{"address":"10.0.0.9/32","interface":0}]}}`), "K8S_POD_NAME=a")
	f.Add([]byte(`{"ips":null,"prevResult":{}}`), "a;b=c")
	f.Fuzz(func(t *testing.T, stdin []byte, args string) {
		c, err := parseConfig(stdin)
		if err != nil {
			return
		}
		_, _ = previousAddr(c, "eth0")
		if p := podOf(args); len(p.Namespace) > agentapi.MaxPodNamespace || len(p.Name) > agentapi.MaxPodName || len(p.UID) > agentapi.MaxPodUID || !utf8.ValidString(p.Namespace+p.Name+p.UID) {
			t.Errorf("podOf(%q) = %+v", args, p)
		}
	})
}
