package cluster

import (
	"encoding/json"
	"encoding/pem"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func listenUnix(t *testing.T, path string) net.Listener {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// anAPI is an API that gets answers from a map, by path.
func anAPI(t *testing.T, answers map[string]string) *API {
	t.Helper()
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a, ok := answers[r.URL.Path]
		if !ok {
			w.WriteHeader(http.StatusNotFound)
			_, _ = io.WriteString(w, `{"kind":"Status","message":"there is no `+r.URL.Path+`"}`)
			return
		}
		if strings.HasPrefix(a, "[") {
			w.WriteHeader(http.StatusInternalServerError)
		}
		_, _ = io.WriteString(w, a)
	}))
	t.Cleanup(srv.Close)
	_, p, err := newAuthority("test", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	b, err := json.Marshal(newKubeconfig("demo", "admin", srv.URL, ca, p))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "admin.conf")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	api, err := NewAPI(path)
	if err != nil {
		t.Fatal(err)
	}
	return api
}

func TestNodes(t *testing.T) {
	api := anAPI(t, map[string]string{"/api/v1/nodes": `{"items":[
		{"metadata":{"name":"node-1"},"status":{"conditions":[
			{"type":"MemoryPressure","status":"False"},
			{"type":"Ready","status":"True","message":"kubelet is posting"}],"nodeInfo":{"bootID":"b-1"}}},
		{"metadata":{"name":"node-2"},"spec":{"taints":[{"key":"underlay.dev/agent-not-ready"}]},"status":{"conditions":[
			{"type":"Ready","status":"True"}]}},
		{"metadata":{"name":"node-3"},"status":{"conditions":[
			{"type":"Ready","status":"False","reason":"KubeletNotReady","message":"cni plugin not initialized"}]}},
		{"metadata":{"name":"node-4"}}]}`})
	got, err := api.Nodes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []NodeCondition{
		{Name: "node-1", Ready: true, BootID: "b-1"},
		{Name: "node-2", Why: "the agent does not serve there yet (taint underlay.dev/agent-not-ready)"},
		{Name: "node-3", Why: "KubeletNotReady: cni plugin not initialized"},
		{Name: "node-4", Why: "the kubelet has not said anything about it"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestTroubles(t *testing.T) {
	api := anAPI(t, map[string]string{"/api/v1/namespaces/kube-system/pods": `{"items":[
		{"metadata":{"name":"well"},"spec":{"nodeName":"node-1"},"status":{"containerStatuses":[{"name":"a","state":{"running":{}}}]}},
		{"metadata":{"name":"soon"},"spec":{"nodeName":"node-1"},"status":{"containerStatuses":[{"name":"a","state":{"waiting":{"reason":"ContainerCreating"}}}]}},
		{"metadata":{"name":"ends"},"spec":{"nodeName":"node-1"},"status":{"containerStatuses":[{"name":"agent","restartCount":4,"state":{"waiting":{"reason":"CrashLoopBackOff","message":"back-off 40s"}}}]}},
		{"metadata":{"name":"lacks"},"spec":{"nodeName":"node-2"},"status":{"initContainerStatuses":[{"name":"i","state":{"waiting":{"reason":"ErrImagePull","message":"not found"}}}]}}]}`})
	got, err := api.Troubles(t.Context(), "kube-system")
	if err != nil {
		t.Fatal(err)
	}
	want := []Trouble{
		{Pod: "ends", Node: "node-1", Container: "agent", Why: "CrashLoopBackOff: back-off 40s", Restarts: 4},
		{Pod: "lacks", Node: "node-2", Container: "i", Why: "ErrImagePull: not found", NoImage: true},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestWhatTheAPIServerSaysFitsALine(t *testing.T) {
	api := anAPI(t, map[string]string{
		"/readyz": "[+]ping ok\n[-]etcd-readiness failed: reason withheld\n[-]informer-sync failed: reason withheld\nreadyz check failed\n",
		"/apis/apps/v1/namespaces/kube-system/deployments/coredns": `{"spec":{"replicas":2},"status":{"availableReplicas":1}}`,
	})
	for want, err := range map[string]error{
		"not ready: etcd-readiness, informer-sync": api.Ready(t.Context()),
		"1 of 2 pods of coredns are ready":         api.DeploymentReady(t.Context(), "kube-system", "coredns"),
		"there is no /apis/apps/v1/":               api.DeploymentReady(t.Context(), "kube-system", "other"),
		ErrNoAccount.Error():                       api.AccountReady(t.Context()),
	} {
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("got %v, want %q in one line", err, want)
		}
	}
}
