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
		{"--hook xdp", "want one of [auto clsact tcx]"},
		{"--snat always", "want one of [eni primary none]"},
		{"--snat-exclude 198.51.100.0", "such as 198.51.100.0/24"},
		{"--snat-exclude 198.51.100.0/24,2001:db8::/32", "no IPv4 range"},
		{"--socket agent.sock", "absolute path"},
		{"--bpffs x", "absolute path"},
		{"--cluster=", "1 to 256"},
		{"serve", "unexpected argument"},
		{"--log-level loud", "loud"},
		{"--nonsense", "not defined"},
		{"--cni-conf /etc/cni/net.d/10-underlay.conflist", "go together"},
		{"--cni-bin /opt/cni/bin", "go together"},
		{"--cni-conf net.d/x.conflist --cni-bin /opt/cni/bin", "absolute paths"},
		{"--cni-conf /etc/cni/net.d/x.conf --cni-bin /opt/cni/bin", "ends with .conflist"},
		{"--kubeconfig /x", "wants --node-name"},
		{"--proc-sys-net sys", "absolute path"},
		{"--force", "not defined"},
		{"uninstall now", "unexpected argument"},
		{"--security-groups-poller poller.sock", "absolute path"},
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

func TestPollerFlags(t *testing.T) {
	for _, tc := range []struct{ args, says string }{
		{"", "--listen is missing"},
		{"--listen poller.sock", "absolute path"},
		{"--listen /a --listen /a", "twice"},
		{"--listen /a --rate 0", "want 0.1 to 20"},
		{"--listen /a --rate NaN", "want 0.1 to 20"},
		{"--listen /a --rate 21", "want 0.1 to 20"},
		{"--listen /a now", "unexpected argument"},
		{"--listen /a --imds allow", "not defined"},
	} {
		var out bytes.Buffer
		if _, err := parsePollerFlags(strings.Fields(tc.args), &out); !errors.Is(err, errUsage) || !strings.Contains(out.String(), tc.says) {
			t.Errorf("%s: %v, printed %q", tc.args, err, out.String())
		}
	}
	var out bytes.Buffer
	if err := run(t.Context(), []string{"poller", "--help"}, &out); !errors.Is(err, flag.ErrHelp) || !strings.Contains(out.String(), "Example") {
		t.Errorf("--help: %v, printed %q", err, out.String())
	}
	o, err := parsePollerFlags([]string{"--listen", "/a", "--listen", "/b", "--rate", "2.5"}, &out)
	if err != nil || len(o.listen) != 2 || o.rate != 2.5 {
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
		{[]string{"uninstall", "--socket", filepath.Join(dir, "agent.sock"), "--bpffs", dir}, "mount -t bpf"},
		{[]string{"--socket", filepath.Join(dir, "agent.sock"), "--cni-conf", dir + "/none/x.conflist", "--cni-bin", dir, "--plugin", "/proc/self/exe"}, "mkdir -p " + dir + "/none"},
		{[]string{"--socket", filepath.Join(dir, "agent.sock"), "--cni-conf", dir + "/x.conflist", "--cni-bin", dir, "--plugin", dir + "/none"}, "name it with --plugin"},
		{[]string{"--socket", filepath.Join(dir, "agent.sock"), "--bpffs", filepath.Join(dir, "a", "b")}, "mount -t bpf"},
	} {
		var out bytes.Buffer
		if err := run(context.Background(), tc.args, &out); err == nil || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%v: %v, want %q", tc.args, err, tc.says)
		}
	}
}
