package datapath

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/testenv"
)

// capabilities are those of docs/reference/agent.md, no more.
var capabilities = []string{"net_admin", "sys_admin"}

// live is a datapath's life, of all that needs a privilege: in a container's
// network namespace, which is the node's.
func live(r role) error {
	if err := os.WriteFile(ProcSysNet+"/ipv4/ip_forward", []byte("1"), 0o644); err == nil {
		return errors.New("/proc/sys is writable: the test shows nothing")
	}
	d, err := Open(Options{BPFFS: r.BPFFS, Hook: r.Hook, ProcSysNet: r.ProcSysNet})
	if err != nil {
		return err
	}
	defer d.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	watched := make(chan error, 1)
	go func() { watched <- d.Watch(ctx, func() {}) }()
	err = d.SetENIs(ctx, enis)
	if err != nil {
		return err
	}
	netns, err := os.Open(nl.Path(r.Pod))
	if err != nil {
		return err
	}
	e, err := d.Add(ctx, endpoint(r.N, r.Pod), netns)
	if err != nil {
		return err
	}
	_, foreignErr := d.Foreign()
	counters, countersErr := d.Counters()
	if counters == nil {
		countersErr = errors.Join(countersErr, errors.New("no counters"))
	}
	err = errors.Join(d.Check(ctx, e, netns), foreignErr, countersErr, d.SetENIs(ctx, enis))
	if err != nil {
		return err
	}
	if _, err := d.Delete(ctx, e.ContainerID, e.IfName); err != nil {
		return err
	}
	cancel()
	if err := <-watched; err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	if err := d.Close(); err != nil {
		return err
	}
	removed, err := Remove(r.BPFFS, nil, false)
	if err == nil && (removed.Rules != 3 || !removed.Table || removed.Pins == 0) {
		err = fmt.Errorf("removed %+v", removed)
	}
	return err
}

// The datapath's whole life as in a container: /proc/sys read-only but for one
// mount, no further privileges, and two capabilities. Neither can be missed.
func TestLeastPrivilege(t *testing.T) {
	testenv.Require(t, "root", "bpf")
	for _, tc := range []struct {
		name    string
		without string
		want    string // of the error; "": none
	}{
		{"exactly those", "", ""},
		{"without net_admin", "net_admin", "not permitted"},
		{"without sys_admin", "sys_admin", "not permitted"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			pod := w.netns("pod")
			r := role{Op: "live", Node: w.node, BPFFS: w.bpffs, Pod: pod, Hook: testHook, ProcSysNet: filepath.Join(t.TempDir(), "net"), N: 1}
			text, err := json.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			caps := slices.DeleteFunc(slices.Clone(capabilities), func(c string) bool { return c == tc.without })
			set := "-all,+" + strings.Join(caps, ",+")
			script := `set -e; mount --make-rprivate /; mkdir -p "$1"; mount --bind /proc/sys/net "$1"; mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys
				exec setpriv --no-new-privs --bounding-set="$2" --inh-caps="$2" "$3"`
			cmd := exec.Command("nsenter", "--net="+nl.Path(w.node), "unshare", "--mount", "sh", "-c", script, "sh", r.ProcSysNet, set, self(t))
			cmd.Env = append(os.Environ(), roleEnv+"="+string(text))
			out, err := cmd.CombinedOutput()
			switch {
			case tc.want == "" && err != nil:
				t.Errorf("with %v: %v\n%s", caps, err, out)
			case tc.want != "" && (err == nil || !strings.Contains(string(out), tc.want)):
				t.Errorf("with %v alone: %v\n%s", caps, err, out)
			}
		})
	}
}

func self(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}
