package kube

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	"k8s.io/client-go/rest"
)

// fakeAPI is an API server without a network: it holds one node, events and a
// DaemonSet, and knows the three kinds of patches.
type fakeAPI struct {
	t  testing.TB
	mu sync.Mutex

	node      *corev1.Node
	stale     *corev1.Node // what reads from the cache see; nil: node
	events    map[string]corev1.Event
	daemonSet *appsv1.DaemonSet
	deaf      bool     // what it does is not heard of
	status    int      // every request is answered so; 0: as it should be
	log       []string // "PATCH nodes/n/status", …
}

func newFake(t testing.TB) *fakeAPI {
	return &fakeAPI{t: t, events: map[string]corev1.Event{}, node: &corev1.Node{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: "node-1"},
		Spec: corev1.NodeSpec{Taints: []corev1.Taint{{Key: "other", Effect: "NoSchedule"}, {Key: Taint, Value: "true", Effect: "NoExecute"}, {Key: Taint, Effect: "NoSchedule"}, {Key: "last", Effect: "NoSchedule"}}},
		Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady"}},
			Capacity: corev1.ResourceList{}},
	}}
}

func (f *fakeAPI) client(o Options) *Client {
	o.Node, o.Logger = "node-1", slog.New(slog.DiscardHandler)
	c, err := newClient(&rest.Config{Host: "http://api.test", Transport: f}, o)
	if err != nil {
		f.t.Fatal(err)
	}
	return c
}

// RoundTrip answers a request at once.
func (f *fakeAPI) RoundTrip(r *http.Request) (*http.Response, error) {
	var body []byte
	if r.Body != nil {
		body, _ = io.ReadAll(r.Body)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	code, answer := f.answer(r, body)
	if f.deaf {
		return nil, io.ErrUnexpectedEOF
	}
	rec := httptest.NewRecorder()
	rec.Header().Set("Content-Type", "application/json")
	rec.WriteHeader(code)
	if code >= 300 {
		reasons := map[int]metav1.StatusReason{404: metav1.StatusReasonNotFound, 403: metav1.StatusReasonForbidden, 401: metav1.StatusReasonUnauthorized, 409: metav1.StatusReasonAlreadyExists, 422: metav1.StatusReasonInvalid}
		answer = metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: "Failure", Code: int32(code), Reason: reasons[code], Message: fmt.Sprint(answer)}
	}
	if err := json.NewEncoder(rec).Encode(answer); err != nil {
		f.t.Error(err)
	}
	return rec.Result(), nil
}

func (f *fakeAPI) answer(r *http.Request, body []byte) (int, any) {
	path := strings.TrimPrefix(strings.TrimPrefix(r.URL.Path, "/apis/apps/v1/"), "/api/v1/")
	f.log = append(f.log, r.Method+" "+path)
	if f.status != 0 {
		return f.status, "told to"
	}
	parts := strings.Split(path, "/")
	switch {
	case parts[0] == "nodes" && (f.node == nil || parts[1] != f.node.Name):
		return 404, "no such node"
	case parts[0] == "nodes" && r.Method == "GET":
		if f.stale != nil && r.URL.Query().Get("resourceVersion") == "0" {
			return 200, f.stale
		}
		return 200, f.node
	case parts[0] == "nodes" && r.Method == "PATCH":
		if strings.Contains(string(body), `"status"`) != (len(parts) == 3) {
			return 422, "status goes to the subresource, and nothing else does"
		}
		var n corev1.Node
		if err := patched(f.node, &n, types.PatchType(r.Header.Get("Content-Type")), body); err != nil {
			return 422, err
		}
		f.node, f.stale = &n, nil
		return 200, f.node
	case parts[2] == "events" && r.Method == "POST":
		var e corev1.Event
		if err := json.Unmarshal(body, &e); err != nil {
			return 400, err
		}
		if e.Namespace != parts[1] || e.InvolvedObject.Namespace != e.Namespace {
			return 422, "namespaces differ"
		}
		if _, ok := f.events[e.Name]; ok {
			return 409, "there is one"
		}
		f.events[e.Name] = e
		return 201, e
	case parts[2] == "events" && r.Method == "PATCH":
		have, ok := f.events[parts[3]]
		if !ok {
			return 404, "no such event"
		}
		var e corev1.Event
		if err := patched(&have, &e, types.PatchType(r.Header.Get("Content-Type")), body); err != nil {
			return 422, err
		}
		f.events[e.Name] = e
		return 200, e
	case parts[2] == "daemonsets" && r.Method == "GET":
		if f.daemonSet == nil {
			return 404, "no such DaemonSet"
		}
		return 200, f.daemonSet
	}
	return 405, "not known: " + r.Method + " " + path
}

func patched[T any](have, out *T, kind types.PatchType, body []byte) error {
	old, err := json.Marshal(have)
	if err != nil {
		return err
	}
	var b []byte
	switch kind {
	case types.JSONPatchType:
		p, err := jsonpatch.DecodePatch(body)
		if err != nil {
			return err
		}
		b, err = p.Apply(old)
		if err != nil {
			return err
		}
	case types.MergePatchType:
		b, err = jsonpatch.MergePatch(old, body)
	case types.StrategicMergePatchType:
		b, err = strategicpatch.StrategicMergePatch(old, body, *out)
	default:
		err = fmt.Errorf("patch of type %q", kind)
	}
	if err != nil {
		return err
	}
	return json.Unmarshal(b, out)
}

func (f *fakeAPI) set(fn func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fn()
}

// writes returns and forgets the writes so far.
func (f *fakeAPI) writes() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []string
	for _, l := range f.log {
		if !strings.HasPrefix(l, "GET") {
			out = append(out, l)
		}
	}
	f.log = nil
	return out
}

// posted returns the events in the API, "reason count message" by pod.
func (f *fakeAPI) posted() map[string]string {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := map[string]string{}
	for _, e := range f.events {
		out[e.InvolvedObject.Name] += fmt.Sprintf("%s %s %d %s\n", e.Type, e.Reason, e.Count, e.Message)
	}
	return out
}
