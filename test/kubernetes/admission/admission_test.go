package admission

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/testenv"
)

// An agent's token is on its node's disk. Whoever takes it there may change
// that one Node, in what the agent needs there, and no other: RBAC says the
// verbs, the chart's ValidatingAdmissionPolicy the rest. The test needs
// KUBECONFIG of an administrator, kubectl in the PATH, and Underlay installed
// with agents on two nodes. It changes nothing (dryRun=All).
func TestAgentIsHeldToItsOwnNode(t *testing.T) {
	testenv.Require(t, "kubernetes")
	own, other := twoAgents(t)
	bound := own.client(t, "--bound-object-kind=Pod", "--bound-object-name="+own.Pod, "--bound-object-uid="+own.UID)
	unbound := own.client(t)

	const (
		dry        = "?dryRun=All"
		notOwn     = "may change its own Node alone"
		notItsPart = "may change no label, no cordon and no taint but underlay.dev/agent-not-ready"
		rbac       = "cannot"
	)
	node := func(a agentPod) string { return "/api/v1/nodes/" + a.Node }
	status := func(a agentPod) string { return node(a) + "/status" + dry }
	annotate := `{"metadata":{"annotations":{"underlay.dev/free-addresses":"7"}}}`
	label := `{"metadata":{"labels":{"node-restriction.kubernetes.io/tier":"secret"}}}`
	up := `{"status":{"conditions":[{"type":"NetworkUnavailable","status":"False","reason":"UnderlayIsUp"}],"capacity":{"underlay.dev/pod-addresses":"27"}}}`
	events := "/api/v1/namespaces/" + own.Namespace + "/events" + dry
	notItsEvent := "posts Events in the name of its own node alone"
	apps := "/apis/apps/v1/namespaces/" + own.Namespace + "/daemonsets/"

	type try struct {
		name               string
		as                 *apiClient
		method, path, body string
		refused            string // part of the message; "" when it is allowed
	}
	tries := []try{
		{"own annotation", bound, "PATCH", node(own) + dry, annotate, ""},
		{"own startup taint", bound, "PATCH", node(own) + dry, taints(t, bound, node(own), "underlay.dev/agent-not-ready"), ""},
		{"own status", bound, "PATCH", status(own), up, ""},
		{"other's annotation", bound, "PATCH", node(other) + dry, annotate, notOwn + ": this token is bound to node " + own.Node + ", the request is for " + other.Node},
		{"other's startup taint", bound, "PATCH", node(other) + dry, taints(t, bound, node(other), "underlay.dev/agent-not-ready"), notOwn},
		{"other's status", bound, "PATCH", status(other), up, notOwn},
		{"token of no pod", unbound, "PATCH", node(own) + dry, annotate, notOwn + ": this token is bound to no node"},
		{"own label", bound, "PATCH", node(own) + dry, label, notItsPart},
		{"own label by status", bound, "PATCH", status(own), label, notItsPart},
		{"own cordon", bound, "PATCH", node(own) + dry, `{"spec":{"unschedulable":true}}`, notItsPart},
		{"foreign taint", bound, "PATCH", node(own) + dry, taints(t, bound, node(own), "example.com/dedicated"), notItsPart},
		{"foreign annotation", bound, "PATCH", node(own) + dry, `{"metadata":{"annotations":{"example.com/owner":"nobody"}}}`, "may change no annotation but underlay.dev/…"},
		{"event", bound, "POST", events, event(own, own.Node, "Pod", own.Pod), ""},
		{"event on its node", bound, "POST", events, event(own, own.Node, "Node", own.Node), ""},
		{"event in other's name", bound, "POST", events, event(own, other.Node, "Pod", other.Pod), notItsEvent},
		{"event on other node", bound, "POST", events, event(own, own.Node, "Node", other.Node), notItsEvent},
		{"event on a Secret", bound, "POST", events, event(own, own.Node, "Secret", "token"), notItsEvent},
		{"event, token of no pod", unbound, "POST", events, event(own, own.Node, "Pod", own.Pod), notItsEvent},
		{"list events", bound, "GET", events, "", rbac},
		{"read its node", bound, "GET", node(own), "", ""},
		{"read its DaemonSet", bound, "GET", apps + own.DaemonSet, "", ""},
		{"read another DaemonSet", bound, "GET", apps + "kube-proxy", "", rbac},
		{"list nodes", bound, "GET", "/api/v1/nodes", "", rbac},
		{"list pods", bound, "GET", "/api/v1/pods", "", rbac},
		{"list secrets", bound, "GET", "/api/v1/namespaces/" + own.Namespace + "/secrets", "", rbac},
		{"delete its node", bound, "DELETE", node(own) + dry, "", rbac},
	}
	if path := foreignEvent(t); path != "" {
		tries = append(tries, try{"event of somebody else", bound, "PATCH", path + dry, `{"reportingComponent":"underlay-agent","reportingInstance":"` + own.Node +
			`","source":{"component":"underlay-agent","host":"` + own.Node + `"},"message":"taken over"}`, "may change its own Events alone"})
	}
	for _, c := range tries {
		t.Run(c.name, func(t *testing.T) {
			code, answer := c.as.do(t, c.method, c.path, c.body)
			switch {
			case c.refused == "" && code != http.StatusOK && code != http.StatusCreated:
				t.Errorf("refused with %d: %s", code, answer)
			case c.refused != "" && code != http.StatusForbidden:
				t.Errorf("answered with %d, want 403: %.300s", code, answer)
			case c.refused != "" && !strings.Contains(answer, c.refused):
				t.Errorf("refused for another reason than %q: %s", c.refused, answer)
			}
		})
	}

	// Others are none of the policy's business.
	if out, err := kubectl("patch", "node", other.Node, "--dry-run=server", "-p", `{"metadata":{"labels":{"example.com/rack":"7"}}}`); err != nil {
		t.Errorf("an administrator is refused: %s", out)
	}
}

// event is an Event as the agent posts it, in the name of a node.
func event(a agentPod, node, kind, name string) string {
	b, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Event", "metadata": map[string]any{"name": "underlay-admission-test", "namespace": a.Namespace},
		"involvedObject": map[string]any{"apiVersion": "v1", "kind": kind, "name": name, "namespace": a.Namespace},
		"reason":         "SubnetFull", "message": "a dry run", "type": "Warning",
		"source": map[string]any{"component": "underlay-agent", "host": node}, "reportingComponent": "underlay-agent", "reportingInstance": node,
	})
	if err != nil { // strings
		panic(err)
	}
	return string(b)
}

// foreignEvent returns the path of an Event on a pod that no agent posted, "" if
// there is none.
func foreignEvent(t *testing.T) string {
	t.Helper()
	out, err := kubectl("get", "events", "-A", "-o", "json", "--field-selector", "involvedObject.kind=Pod")
	if err != nil {
		t.Fatal(out)
	}
	var list struct {
		Items []struct {
			Metadata           struct{ Namespace, Name string }
			ReportingComponent string
		}
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatal(err)
	}
	for _, e := range list.Items {
		if e.ReportingComponent != "underlay-agent" {
			return "/api/v1/namespaces/" + e.Metadata.Namespace + "/events/" + e.Metadata.Name
		}
	}
	return ""
}

// taints is a patch that takes a taint from the node if it is there, and adds
// it if it is not; the others stay.
func taints(t *testing.T, as *apiClient, path, key string) string {
	t.Helper()
	code, answer := as.do(t, "GET", path, "")
	var node struct {
		Spec struct{ Taints []map[string]any }
	}
	if err := json.Unmarshal([]byte(answer), &node); err != nil || code != http.StatusOK {
		t.Fatalf("%d: %s", code, answer)
	}
	all := node.Spec.Taints
	kept := slices.DeleteFunc(slices.Clone(all), func(taint map[string]any) bool { return taint["key"] == key })
	if len(kept) == len(all) {
		kept = append(kept, map[string]any{"key": key, "value": "true", "effect": "NoSchedule"})
	}
	b, err := json.Marshal(map[string]any{"spec": map[string]any{"taints": kept}})
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// agentPod is an agent of the cluster.
type agentPod struct{ Namespace, Pod, UID, Node, Account, DaemonSet string }

// twoAgents returns agents of two nodes.
func twoAgents(t *testing.T) (a, b agentPod) {
	t.Helper()
	out, err := kubectl("get", "pods", "-A", "-l", "app.kubernetes.io/name=underlay", "-o", "json")
	if err != nil {
		t.Fatal(out)
	}
	var list struct {
		Items []struct {
			Metadata struct {
				Namespace, Name, UID string
				Labels               map[string]string
			}
			Spec struct{ NodeName, ServiceAccountName string }
		}
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatal(err)
	}
	var found []agentPod
	for _, p := range list.Items {
		if p.Spec.NodeName == "" || len(found) == 1 && found[0].Node == p.Spec.NodeName {
			continue
		}
		found = append(found, agentPod{p.Metadata.Namespace, p.Metadata.Name, p.Metadata.UID, p.Spec.NodeName, p.Spec.ServiceAccountName, p.Metadata.Labels["app.kubernetes.io/instance"]})
		if len(found) == 2 {
			return found[0], found[1]
		}
	}
	t.Fatalf("the cluster has %d nodes with an agent, the test needs two", len(found))
	return
}

// apiClient speaks to the API server with one token. kubectl would read an
// object before it patches it, for which the agent needs no right.
type apiClient struct {
	http          *http.Client
	server, token string
}

// client speaks with a token of the agent's service account, bound as how says.
func (a agentPod) client(t *testing.T, how ...string) *apiClient {
	t.Helper()
	token, err := kubectl(append([]string{"create", "token", a.Account, "-n", a.Namespace, "--duration=10m"}, how...)...)
	if err != nil {
		t.Fatal(token)
	}
	out, err := kubectl("config", "view", "--minify", "--flatten", "--raw", "-o", "json")
	if err != nil {
		t.Fatal(out)
	}
	var config struct {
		Clusters []struct {
			Cluster struct {
				Server string
				CA     []byte `json:"certificate-authority-data"`
				Name   string `json:"tls-server-name"`
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &config); err != nil || len(config.Clusters) != 1 {
		t.Fatalf("kubectl config view: %v: %s", err, out)
	}
	cluster := config.Clusters[0].Cluster
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(cluster.CA) {
		t.Fatal("the kubeconfig has no certificate-authority-data")
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: cluster.Name}}
	t.Cleanup(transport.CloseIdleConnections)
	return &apiClient{http: &http.Client{Transport: transport, Timeout: time.Minute}, server: cluster.Server, token: strings.TrimSpace(token)}
}

func (c *apiClient) do(t *testing.T, method, path, body string) (code int, answer string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, c.server+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	kind := "application/json"
	if method == http.MethodPatch {
		kind = "application/strategic-merge-patch+json"
	}
	req.Header.Set("Content-Type", kind)
	resp, err := c.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// kubectl returns what kubectl printed; of one that failed, its error with that.
func kubectl(args ...string) (string, error) {
	cmd := exec.Command("kubectl", args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Sprintf("kubectl %s: %v: %s%s", strings.Join(args, " "), err, out, stderr.String()), err
	}
	return string(out), nil
}
