package cni

import (
	"errors"
	"strings"
	"testing"

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
	for in, want := range map[string]agentapi.Pod{
		"": {},
		"IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u":  {Namespace: "shop", Name: "web-0", UID: "u"},
		"NOMAD_JOB_ID=api;NOMAD_GROUP_NAME=web;NOMAD_ALLOC_ID=a;NOMAD_NAMESPACE=d": {Namespace: "d", Name: "api/web", UID: "a"},
		"NOMAD_GROUP_NAME=web;NOMAD_JOB_ID=api":                                    {Name: "api/web"},
		"K8S_POD_NAME;=;;x":                                                        {},
	} {
		if got := podOf(in); got != want {
			t.Errorf("podOf(%q) = %+v, want %+v", in, got, want)
		}
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
		_ = podOf(args)
	})
}
