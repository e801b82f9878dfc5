package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"path/filepath"
	"strings"
	"testing"

	"github.com/underlay-cni/underlay/internal/datapath"

	"github.com/underlay-cni/underlay/internal/testenv"
)

func TestFlags(t *testing.T) {
	for _, tc := range []struct{ args, says string }{
		{"--imds maybe", "want allow or deny"},
		{"--hook xdp", "want one of [clsact tcx]"},
		{"--socket agent.sock", "absolute path"},
		{"--bpffs x", "absolute path"},
		{"--cluster=", "1 to 256"},
		{"serve", "unexpected argument"},
		{"--log-level loud", "loud"},
		{"--nonsense", "not defined"},
	} {
		var out bytes.Buffer
		if _, err := parseFlags(strings.Fields(tc.args), &out); !errors.Is(err, errUsage) || !strings.Contains(out.String(), tc.says) {
			t.Errorf("%s: %v, printed %q", tc.args, err, out.String())
		}
	}
	var out bytes.Buffer
	if _, err := parseFlags([]string{"--help"}, &out); !errors.Is(err, flag.ErrHelp) || !strings.Contains(out.String(), "Example") {
		t.Errorf("--help: %v, printed %q", err, out.String())
	}
	o, err := parseFlags([]string{"--imds", "allow", "--hook", "tcx", "--log-level", "debug", "--cluster", "c"}, &out)
	if err != nil || o.imds != "allow" || o.hook != datapath.TCX || o.cluster != "c" || o.level >= 0 {
		t.Errorf("%+v, %v", o, err)
	}
}

func TestRunSaysWhatIsMissing(t *testing.T) {
	testenv.Require(t, "root")
	dir := t.TempDir()
	for _, tc := range []struct {
		args []string
		says string
	}{
		{[]string{"--socket", filepath.Join(dir, "none", "agent.sock")}, "mkdir -p"},
		{[]string{"--socket", filepath.Join(dir, "agent.sock"), "--bpffs", dir}, "mount -t bpf"},
		{[]string{"--socket", filepath.Join(dir, "agent.sock"), "--bpffs", filepath.Join(dir, "a", "b")}, "mount -t bpf"},
	} {
		var out bytes.Buffer
		if err := run(context.Background(), tc.args, &out); err == nil || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%v: %v, want %q", tc.args, err, tc.says)
		}
	}
}
