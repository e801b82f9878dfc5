package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/agentapi/cni"
)

// What the plugin says by itself is what the agent would say.
func TestVersionIsTheAgents(t *testing.T) {
	var want bytes.Buffer
	if err := cni.Versions.Encode(&want); err != nil {
		t.Fatal(err)
	}
	if exit, out := run([]string{"CNI_COMMAND=VERSION"}); exit != 0 || string(out) != want.String() {
		t.Errorf("%d %s, want %s", exit, out, want.String())
	}
	if all := strings.Join(cni.Versions.SupportedVersions(), ", "); !strings.Contains(about, ": "+all+"\n") {
		t.Errorf("%q does not name %s", about, all)
	}
}

func TestCodesAreCNIs(t *testing.T) {
	for ours, want := range map[uint]uint{
		codeIO: types.ErrIOFailure, codeDecoding: types.ErrDecodingFailure, codeInvalidConfig: types.ErrInvalidNetworkConfig,
		codeInvalidNetns: types.ErrInvalidNetNS, codeTryAgain: types.ErrTryAgainLater, codeNotAvailable: uint(agentapi.CodeNotAvailable),
		codeAgentUnreachable: uint(agentapi.CodeAgentUnreachable), codeInternal: uint(agentapi.CodeInternal),
	} {
		if ours != want {
			t.Errorf("%d is %d", ours, want)
		}
	}
}

func TestFailureIsCNIsError(t *testing.T) {
	exit, out := failure(7, "say \"what\"\n; do", "d")
	var e types.Error
	if err := json.Unmarshal(out, &e); err != nil || exit != 1 || e != (types.Error{Code: 7, Msg: "say \"what\"\n; do", Details: "d"}) {
		t.Errorf("%d %s: %+v, %v", exit, out, e, err)
	}
}
