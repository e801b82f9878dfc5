package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/agent"
)

// api is as much of an API server as one node needs: it notes what is written.
type api struct {
	mu      sync.Mutex
	written []string // "PATCH path body"
	daemon  int      // status of GET of the DaemonSet
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	a.mu.Lock()
	defer a.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	switch {
	case strings.Contains(r.URL.Path, "/daemonsets/"):
		if r.Header.Get("Authorization") != "Bearer secret" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.WriteHeader(a.daemon)
		fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","code":%d,"reason":"NotFound","metadata":{}}`, a.daemon)
	case r.Method == "GET":
		fmt.Fprint(w, `{"kind":"Node","apiVersion":"v1","metadata":{"name":"node-1"},"spec":{"taints":[{"key":"underlay.dev/agent-not-ready","effect":"NoExecute"}]}}`)
	default:
		a.written = append(a.written, r.Method+" "+r.URL.Path+" "+string(body))
		fmt.Fprint(w, `{"kind":"Node","apiVersion":"v1"}`)
	}
}

func (a *api) wrote(part string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.ContainsFunc(a.written, func(s string) bool { return strings.Contains(s, part) })
}

// newTestNode returns a node with folders of the test and an API server.
func newTestNode(t *testing.T) (*node, *api) {
	t.Helper()
	a := &api{daemon: 200}
	server := httptest.NewTLSServer(a) // clientcmd gives a token to no other
	t.Cleanup(server.Close)
	dir := t.TempDir()
	config, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "Config", "current-context": "x",
		"clusters": []any{map[string]any{"name": "c", "cluster": map[string]any{"server": server.URL, "insecure-skip-tls-verify": true}}},
		"users":    []any{map[string]any{"name": "u", "user": map[string]any{"token": "secret"}}},
		"contexts": []any{map[string]any{"name": "x", "context": map[string]any{"cluster": "c", "user": "u"}}}})
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"kubeconfig": config, "underlay-cni": []byte("program")} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, sub := range []string{"net.d", "bin"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("POD_NAMESPACE", "kube-system")
	t.Setenv("DAEMONSET_NAME", "underlay")
	n, err := newNode(options{nodeName: "node-1", kubeconfig: filepath.Join(dir, "kubeconfig"), socket: "/run/underlay/agent.sock",
		cniConf: filepath.Join(dir, "net.d", "10-underlay.conflist"), cniBin: filepath.Join(dir, "bin"), plugin: filepath.Join(dir, "underlay-cni")}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return n, a
}

func eventually(t *testing.T, what string, fn func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !fn(); <-time.After(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// beside runs fn beside the test, until its end.
func beside(t *testing.T, fn func(context.Context)) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); fn(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
}

// The taint goes when the agent serves and the runtime has the plugin, not
// before.
func TestTaintGoesWhenInstalled(t *testing.T) {
	n, a := newTestNode(t)
	beside(t, func(ctx context.Context) { _ = n.run(ctx) })
	o := n.orchestrator()
	o.Publish(agent.NodeStatus{Ready: true, Addresses: 27, ENIs: 2, MaxENIs: 3, FreeAtLeast: 8})
	eventually(t, "the annotations", func() bool {
		return a.wrote(`"underlay.dev/enis":"2/3"`) && a.wrote(`"underlay.dev/free-pod-addresses":"8+"`)
	})
	if err := n.installed(); err == nil || a.wrote("/spec/taints/0") {
		t.Errorf("before the installation: %v; written %q", err, a.written)
	}
	beside(t, n.install)
	eventually(t, "the taint's end", func() bool { return a.wrote("/spec/taints/0") })
	if err := n.installed(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(n.target.ConfList); err != nil {
		t.Error(err)
	}
}

func TestInstallationThatFails(t *testing.T) {
	n, _ := newTestNode(t)
	if err := os.RemoveAll(n.target.Bin); err != nil {
		t.Fatal(err)
	}
	beside(t, n.install)
	eventually(t, "the error", func() bool {
		err := n.installed()
		return err != nil && strings.Contains(err.Error(), "check that the agent can write")
	})
	if _, err := os.Stat(n.target.ConfList); err == nil {
		t.Error("a list without a plugin")
	}
}

// What the AWS VPC CNI left comes before ours in the order of names: the runtime
// would ask an agent that is gone.
func TestListOfAnother(t *testing.T) {
	n, a := newTestNode(t)
	aws := filepath.Join(filepath.Dir(n.target.ConfList), "10-aws.conflist")
	if err := os.WriteFile(aws, []byte(`{"plugins":[{"type":"aws-cni"}]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	n.orchestrator().Publish(agent.NodeStatus{Ready: true, Addresses: 27})
	beside(t, func(ctx context.Context) { _ = n.run(ctx) })
	beside(t, n.install)
	eventually(t, "the reason", func() bool {
		err := n.installed()
		return err != nil && strings.Contains(err.Error(), "10-aws.conflist") && strings.Contains(err.Error(), "; remove it")
	})
	eventually(t, "the annotations", func() bool { return a.wrote("underlay.dev/enis") })
	if a.wrote("/spec/taints/0") {
		t.Error("pods may come, and would get their network from another")
	}
}

func TestLeave(t *testing.T) {
	for _, tc := range []struct {
		name  string
		code  int
		stays bool
	}{
		{"an update", 200, true},
		{"the API server is away", 500, true},
		{"the DaemonSet is gone", 404, false},
	} {
		n, a := newTestNode(t)
		if _, err := n.target.Install(); err != nil {
			t.Fatal(err)
		}
		a.mu.Lock()
		a.daemon = tc.code
		a.mu.Unlock()
		n.leave()
		for _, path := range []string{n.target.ConfList, filepath.Join(n.target.Bin, "underlay-cni")} {
			if _, err := os.Stat(path); (err == nil) != tc.stays {
				t.Errorf("%s: %s: %v", tc.name, path, err)
			}
		}
	}
}

func TestHealthHandler(t *testing.T) {
	for _, tc := range []struct {
		err  error
		code int
		body string
	}{{nil, 200, "ok\n"}, {fmt.Errorf("waiting for EC2; check the route"), 503, "waiting for EC2; check the route\n"}} {
		rec := httptest.NewRecorder()
		check(func(context.Context) error { return tc.err }).ServeHTTP(rec, httptest.NewRequest("GET", "/readyz", nil))
		if rec.Code != tc.code || rec.Body.String() != tc.body {
			t.Errorf("%v: %d %q", tc.err, rec.Code, rec.Body)
		}
	}
	// Nobody runs the agent: it is not alive, and the answer comes all the same.
	a := agent.New(agent.Options{Logger: slog.New(slog.DiscardHandler)})
	rec := httptest.NewRecorder()
	handler(a, &node{}).ServeHTTP(rec, httptest.NewRequest("GET", "/livez", nil))
	if rec.Code != 503 || !strings.Contains(rec.Body.String(), ";") {
		t.Errorf("/livez of an agent that does not run: %d %q", rec.Code, rec.Body)
	}
}
