package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var aDay = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// aLab is a lab that is up, on disk, with two pods.
func aLab(t *testing.T) (home, *labFile) {
	t.Helper()
	h := home{run: t.TempDir(), name: "demo"}
	f := &labFile{
		Version: labFileVersion, State: stateUp, Created: aDay, Region: region, InstanceType: "m5.large",
		Lab: Lab{
			Name: "demo", Endpoint: "http://127.0.0.1:7424", VPCID: "vpc-0123456789abcdef0",
			Nodes: []Node{{
				Name: "node-1", InstanceID: "i-00000000000000001", Netns: "/run/netns/ul-demo-i-00000000000000001", IP: netip.MustParseAddr("10.0.0.10"), SubnetID: "subnet-00000000000000001",
				AgentSocket: filepath.Join(h.node("node-1"), "agent.sock"), CNIConfDir: filepath.Join(h.node("node-1"), "cni/net.d"), CNIBinDir: filepath.Join(h.node("node-1"), "cni/bin"),
			}, {
				Name: "node-2", InstanceID: "i-00000000000000002", Netns: "/run/netns/ul-demo-i-00000000000000002", IP: netip.MustParseAddr("10.0.16.10"), SubnetID: "subnet-00000000000000002",
				AgentSocket: filepath.Join(h.node("node-2"), "agent.sock"), CNIConfDir: filepath.Join(h.node("node-2"), "cni/net.d"), CNIBinDir: filepath.Join(h.node("node-2"), "cni/bin"),
			}},
			Outside: []Outside{
				{Name: "db-1", Netns: "/run/netns/ul-demo-svc-db-1", IP: netip.MustParseAddr("10.0.16.11")},
				{Name: "vm-1", InstanceID: "i-00000000000000003", Netns: "/run/netns/ul-demo-i-00000000000000003", IP: netip.MustParseAddr("10.0.0.11")},
			},
		},
		Servers: []server{},
	}
	for _, dir := range []string{h.pods(), h.node("node-1"), h.node("node-2")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.save(f); err != nil {
		t.Fatal(err)
	}
	for _, p := range []Pod{
		{Name: "web-10", Node: "node-1", IP: "10.0.0.30", Netns: "/run/netns/ul-demo-pod-web-10", ENI: "eni-1", MAC: "02:00:00:00:00:30", AddMillis: 7.25},
		{Name: "web-2", Node: "node-1", IP: "10.0.0.22", Netns: "/run/netns/ul-demo-pod-web-2", ENI: "eni-1", MAC: "02:00:00:00:00:22", AddMillis: 12.5},
	} {
		if err := writeJSON(h.podFile(p.Name), &podFile{Pod: p, ContainerID: "demo-" + p.Name, Created: aDay}); err != nil {
			t.Fatal(err)
		}
	}
	return h, f
}

func testApp(run string) (*App, *bytes.Buffer, *bytes.Buffer) {
	var out, errOut bytes.Buffer
	return &App{In: strings.NewReader(""), Out: &out, Err: &errOut, run: run, now: func() time.Time { return aDay.Add(90 * time.Second) }}, &out, &errOut
}

func TestLabIsReadAsItWasWritten(t *testing.T) {
	h, want := aLab(t)
	got, err := h.loadUp()
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	left, err := filepath.Glob(filepath.Join(h.dir(), ".new-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestLabErrorsSayTheNextStep(t *testing.T) {
	h, f := aLab(t)
	other := home{run: h.run, name: "other"}
	_, err := other.load()
	if !errors.Is(err, errNoLab) || !strings.Contains(err.Error(), "underlay up --name other") || !strings.Contains(err.Error(), "demo") {
		t.Errorf("no such lab: %v", err)
	}

	if err := h.checkAbsent(); err == nil || !strings.Contains(err.Error(), "already up") || !strings.Contains(err.Error(), "underlay down") {
		t.Errorf("up twice: %v", err)
	}
	f.State = stateMaking
	if err := h.save(f); err != nil {
		t.Fatal(err)
	}
	if _, err := h.loadUp(); err == nil || !strings.Contains(err.Error(), "underlay down --name demo") {
		t.Errorf("half made: %v", err)
	}
	if err := h.checkAbsent(); err == nil || !strings.Contains(err.Error(), "half there") {
		t.Errorf("up over a half-made lab: %v", err)
	}
	if err := os.WriteFile(h.file(), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := h.load(); err == nil || !strings.Contains(err.Error(), "underlay down") {
		t.Errorf("garbage: %v", err)
	}
	f.Version = labFileVersion + 1
	if err := h.save(f); err != nil {
		t.Fatal(err)
	}
	if _, err := h.load(); err == nil || !strings.Contains(err.Error(), "version") {
		t.Errorf("another version: %v", err)
	}
	if _, err := f.node("node-9"); err == nil || !strings.Contains(err.Error(), "node-1, node-2") {
		t.Errorf("no such node: %v", err)
	}
	if _, err := f.machineNetns("db-9"); err == nil || !strings.Contains(err.Error(), "db-1, vm-1") {
		t.Errorf("no such machine: %v", err)
	}
}

func TestMachineNetns(t *testing.T) {
	_, f := aLab(t)
	for name, want := range map[string]string{
		"node-2": "/run/netns/ul-demo-i-00000000000000002", "i-00000000000000001": "/run/netns/ul-demo-i-00000000000000001",
		"vm-1": "/run/netns/ul-demo-i-00000000000000003", "db-1": "/run/netns/ul-demo-svc-db-1",
	} {
		if got, err := f.machineNetns(name); got != want || err != nil {
			t.Errorf("machineNetns(%q) = %q, %v", name, got, err)
		}
	}
	if got, err := f.machineNetns(""); err == nil {
		t.Errorf("machineNetns of nothing = %q", got)
	}
}

func TestLock(t *testing.T) {
	h := home{run: t.TempDir(), name: "demo"}
	soon := func() context.Context {
		ctx, cancel := context.WithTimeoutCause(t.Context(), 30*time.Millisecond, errors.New("not within the test's patience"))
		t.Cleanup(cancel)
		return ctx
	}
	a, err := h.lockLab(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	b, err := h.lockLab(soon(), false)
	if err != nil {
		t.Fatalf("second shared lock: %v", err)
	}
	b.release("")
	if _, err := h.lockLab(soon(), true); err == nil || !strings.Contains(err.Error(), "in use by process") {
		t.Fatalf("exclusive beside shared: %v", err)
	}
	if pids := h.holderPIDs(); !slices.Contains(pids, os.Getpid()) {
		t.Errorf("holders %v lack ourselves (%d)", pids, os.Getpid())
	}

	// Who waits while the file is taken away ends up with a lock on the new one.
	got := make(chan *lock, 1)
	go func() {
		l, err := h.lockLab(t.Context(), true)
		if err != nil {
			t.Error(err)
		}
		got <- l
	}()
	a.release(h.lockFile())
	l := <-got
	if l == nil || !h.sameLock(l.f) {
		t.Error("the lock is on a file that nobody else sees")
	}
	l.release(h.lockFile())
}

func TestParseLocks(t *testing.T) {
	const locks = `1: FLOCK  ADVISORY  WRITE 4711 00:1a:1234 0 EOF
1: -> FLOCK  ADVISORY  WRITE 4712 00:1a:1234 0 EOF
2: FLOCK  ADVISORY  READ  4713 00:1a:1234 0 EOF
3: POSIX  ADVISORY  WRITE 4714 00:1a:1234 0 EOF
4: FLOCK  ADVISORY  WRITE 4715 00:1b:1234 0 EOF
5: FLOCK  ADVISORY  WRITE -1 00:1a:1234 0 EOF
6: FLOCK
`
	if d := cmp.Diff([]int{4711, 4713}, parseLocks(locks, 0, 0x1a, 1234)); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestNaturalOrder(t *testing.T) {
	names := []string{"web-10", "web", "web-2", "web-2a", "api-1", "web-002b", "10", "9"}
	slices.SortFunc(names, natural)
	want := []string{"9", "10", "api-1", "web", "web-2", "web-2a", "web-002b", "web-10"}
	if d := cmp.Diff(want, names); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

// What "up -o json" and "run -o json" print is a contract.
func TestJSONShapes(t *testing.T) {
	keys := func(v any) []string {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		var m map[string]any
		if err := json.Unmarshal(b, &m); err != nil {
			t.Fatal(err)
		}
		var k []string
		for name := range m {
			k = append(k, name)
		}
		slices.Sort(k)
		return k
	}
	_, f := aLab(t)
	for _, c := range []struct {
		v    any
		want []string
	}{
		{f.Lab, []string{"endpoint", "name", "nodes", "outside", "vpcId"}},
		{f.Lab.Nodes[0], []string{"agentSocket", "cniBinDir", "cniConfDir", "instanceId", "ip", "name", "netns", "subnetId"}},
		{f.Lab.Outside[0], []string{"instanceId", "ip", "name", "netns"}},
		{Pod{}, []string{"addMillis", "eni", "error", "ip", "mac", "name", "netns", "node"}},
	} {
		if d := cmp.Diff(c.want, keys(c.v)); d != "" {
			t.Errorf("%T (-want +got):\n%s", c.v, d)
		}
	}
}

func TestPlace(t *testing.T) {
	h, f := aLab(t) // two pods on node-1
	a, _, _ := testApp(h.run)
	names := func(nodes []Node) (out []string) {
		for _, n := range nodes {
			out = append(out, n.Name)
		}
		return out
	}
	got, err := a.place(h, f, "", 4)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"node-2", "node-2", "node-1", "node-2"}, names(got)); d != "" {
		t.Errorf("fewest first (-want +got):\n%s", d)
	}
	if got, err = a.place(h, f, "node-1", 2); err != nil || !slices.Equal(names(got), []string{"node-1", "node-1"}) {
		t.Errorf("on node-1: %v, %v", names(got), err)
	}
	if _, err = a.place(h, f, "node-3", 1); err == nil {
		t.Error("on a node that is not there: no error")
	}
}
