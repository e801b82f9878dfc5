package cli

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
)

var update = flag.Bool("update", false, "write golden files")

// golden compares got with testdata/name.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s (-want +got; -update writes it):\n%s", name, d)
	}
}

func TestPods(t *testing.T) {
	h, _ := aLab(t)
	a, out, errOut := testApp(h.run)
	if code := a.Run(t.Context(), []string{"pods"}); code != 0 {
		t.Fatalf("exit code %d: %s", code, errOut)
	}
	golden(t, "pods.txt", out.String())

	out.Reset()
	if code := a.Run(t.Context(), []string{"pods", "-o", "json"}); code != 0 {
		t.Fatalf("exit code %d: %s", code, errOut)
	}
	var pods []Pod
	if err := json.Unmarshal(out.Bytes(), &pods); err != nil || len(pods) != 2 || pods[0].Name != "web-2" {
		t.Errorf("pods -o json: %v: %s", err, out)
	}
}

func TestEnv(t *testing.T) {
	h, _ := aLab(t)
	a, out, errOut := testApp(h.run)
	for _, args := range [][]string{{"env"}, {"env", "--shell", "fish"}, {"env", "--unset"}, {"env", "-o", "json"}} {
		out.Reset()
		if code := a.Run(t.Context(), args); code != 0 {
			t.Fatalf("%v: exit code %d: %s", args, code, errOut)
		}
		name := strings.NewReplacer(" -o ", "-", " --", "-", " ", "-").Replace(strings.Join(args, " "))
		golden(t, name+".txt", strings.ReplaceAll(out.String(), h.run, "/run/underlay"))
	}
	if code := a.Run(t.Context(), []string{"env", "--shell", "csh"}); code == 0 {
		t.Error("an unknown shell: exit code 0")
	}
}

func TestQuote(t *testing.T) {
	if got := quote("it's $HOME"); got != `'it'\''s $HOME'` {
		t.Errorf("quote = %s", got)
	}
}

func TestWrongUse(t *testing.T) {
	h, _ := aLab(t)
	for _, c := range []struct {
		args []string
		root bool
		says string
	}{
		{args: []string{"up"}, says: "run it with sudo"},
		{args: []string{"status"}, says: "run it with sudo"},
		{args: []string{"pods", "-o", "yaml"}, says: "use -o text or -o json"},
		{args: []string{"pods", "--name", "No"}, says: "cannot name a lab"},
		{args: []string{"pods", "--frob"}, says: "underlay pods --help"},
		{args: []string{"frobnicate"}, says: "underlay --help"},
		{args: []string{"pods", "--name", "other"}, says: "underlay up --name other"},
		{args: []string{"run"}, root: true, says: "give the pod a name"},
		{args: []string{"run", "a", "b"}, root: true, says: `what is "b"`},
		{args: []string{"run", "A"}, root: true, says: "cannot name a pod"},
		{args: []string{"run", "a", "--count", "0"}, root: true, says: "--count 0"},
		{args: []string{"run", "a", "--", "no-such-command-here"}, root: true, says: "no-such-command-here"},
		{args: []string{"exec", "web-2"}, root: true, says: "after --"},
		{args: []string{"exec", "none", "--", "true"}, root: true, says: "underlay pods"},
		{args: []string{"node", "exec", "none", "--", "true"}, root: true, says: "node-1, node-2, db-1, vm-1"},
		{args: []string{"node", "restart-agent", "none"}, root: true, says: "node-1, node-2"},
		{args: []string{"rm"}, root: true, says: "--all"},
		{args: []string{"rm", "web-2", "--all"}, root: true, says: "--all"},
		{args: []string{"rm", "none"}, root: true, says: "underlay pods"},
		{args: []string{"up", "--nodes", "0"}, root: true, says: "--nodes 0"},
		{args: []string{"up", "--instance-type", "m5.enormous"}, root: true, says: "m5.large"},
		{args: []string{"up", "--listen", "7424"}, root: true, says: "HOST:PORT"},
		{args: []string{"down", "--all", "--name", "x"}, root: true, says: "not both"},
		{args: []string{"logs", "none"}, says: "vpcd, node-1"},
		{args: []string{"logs", "web-2"}, says: "runs no process"},
	} {
		a, _, errOut := testApp(h.run)
		a.euid = 1000
		if c.root {
			a.euid = 0
		}
		code := a.Run(t.Context(), c.args)
		if code == 0 || !strings.Contains(errOut.String(), c.says) || strings.Count(errOut.String(), "\n") > 4 {
			t.Errorf("underlay %s: exit code %d, want %q in:\n%s", strings.Join(c.args, " "), code, c.says, errOut)
		}
	}
}

func TestEveryCommandHasHelp(t *testing.T) {
	a, _, _ := testApp(t.TempDir())
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Short == "" {
			t.Errorf("%s has no help", c.CommandPath())
		}
		if c.Runnable() && !c.HasSubCommands() && c.Example == "" && c.Name() != "version" && c.Name() != "help" {
			t.Errorf("%s has no example", c.CommandPath())
		}
		for _, s := range c.Commands() {
			walk(s)
		}
	}
	walk(a.command())
}

func TestCompletion(t *testing.T) {
	h, _ := aLab(t)
	for args, want := range map[string][]string{
		"exec ":                     {"web-2", "web-10"},
		"rm web-2 ":                 {"web-10"},
		"node exec ":                {"node-1", "node-2", "db-1", "vm-1"},
		"node restart-agent ":       {"node-1", "node-2"},
		"run x --node ":             {"node-1", "node-2"},
		"pods --name ":              {"demo"},
		"logs ":                     {"vpcd", "node-1", "node-2", "db-1", "vm-1", "web-2", "web-10"},
		"env -o ":                   {"text", "json"},
		"up --instance-type m5.met": {"m5.metal"},
	} {
		a, out, _ := testApp(h.run)
		a.Run(t.Context(), append([]string{cobra.ShellCompNoDescRequestCmd}, strings.Split(args, " ")...))
		var got []string
		for _, line := range strings.Split(strings.TrimSpace(out.String()), "\n") {
			if !strings.HasPrefix(line, ":") {
				got = append(got, line)
			}
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("underlay %s<TAB> (-want +got):\n%s", args, d)
		}
	}
}

func TestLogs(t *testing.T) {
	h, _ := aLab(t)
	if err := os.MkdirAll(h.vpcd(), 0o755); err != nil {
		t.Fatal(err)
	}
	for path, s := range map[string]string{h.vpcd("vpcd.log"): "one\ntwo\nthree\n", h.agentLog("node-1"): "first\nwithout an end"} {
		if err := os.WriteFile(path, []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	a, out, errOut := testApp(h.run)
	if code := a.Run(t.Context(), []string{"logs", "-n", "2"}); code != 0 {
		t.Fatalf("exit code %d: %s", code, errOut)
	}
	if d := cmp.Diff("vpcd   │ two\nvpcd   │ three\nnode-1 │ first\n", out.String()); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}

	// Followed: what is added later, and a line once it is whole.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	r, w := io.Pipe()
	b, _, _ := testApp(h.run)
	b.Out = w
	ended := make(chan int, 1)
	go func() { ended <- b.Run(ctx, []string{"logs", "node-1", "-f"}); w.Close() }()
	var got strings.Builder
	buf := make([]byte, 100)
	for added := false; !strings.Contains(got.String(), "at last\n"); {
		n, err := r.Read(buf)
		if err != nil {
			t.Fatalf("%v after %q", err, got.String())
		}
		got.Write(buf[:n])
		if !added {
			added = true
			f, err := os.OpenFile(h.agentLog("node-1"), os.O_APPEND|os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteString(" at last\n"); err != nil {
				t.Fatal(err)
			}
			f.Close()
		}
	}
	cancel()
	if code := <-ended; code != 0 {
		t.Errorf("Ctrl-C: exit code %d", code)
	}
	if d := cmp.Diff("first\nwithout an end at last\n", got.String()); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestServeHello(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- serveHello(ctx, l, "db-1", time.Now, func(string) {}) }()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(c)
	if err != nil || string(b) != "db-1: hello 127.0.0.1\n" {
		t.Errorf("%q, %v", b, err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestFreeListen(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got, err := freeListen(l.Addr().String())
	if err != nil || got == l.Addr().String() || !strings.HasPrefix(got, "127.0.0.1:") {
		t.Errorf("beside one that listens: %q, %v", got, err)
	}
}

func TestExitCodes(t *testing.T) {
	var e exitError
	if !errors.As(error(exitError{127}), &e) || e.code != 127 {
		t.Error("exit code is lost")
	}
}
