package kubernetes

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/testenv"
	"github.com/underlay-cni/underlay/test/bench"
	"github.com/underlay-cni/underlay/test/lab"
)

// BenchmarkPodReady measures the time from a pod's creation to its readiness,
// against the same machines with the CNI project's ptp and host-local in
// Underlay's place.
func BenchmarkPodReady(b *testing.B) {
	testenv.Require(b, "cluster")
	// Both hold the addresses beforehand: what is measured is no wait for EC2.
	subject := newCluster(b, lab.Up(b, "--kubernetes", "--nodes", "1", "--kube-proxy", *proxy))
	base := newCluster(b, lab.Up(b, "--kubernetes", "--nodes", "1", "--kube-proxy", *proxy, "--cni", "ptp"))
	subject.AwaitFree(subject.Lab.Nodes[0], 1, time.Minute)
	a, p := newAPI(b, subject.Kubeconfig), newAPI(b, base.Kubeconfig)
	n := 0
	// Mean of three pods, one after another.
	figure := func(c *cluster, api *api) func() float64 {
		return func() float64 {
			const pods = 3
			sum := 0.0
			for range pods {
				n++
				name := fmt.Sprintf("ready-%d", n)
				sum += api.podReady(b, name, c.Lab.Nodes[0].Name).Seconds()
				c.kubectl("delete", "pod", name, "--now")
			}
			return sum / pods
		}
	}
	row := bench.Compare(b, "pod-ready/ptp-host-local", "pod created to Ready, with the CNI project's ptp and host-local; lower is better", figure(subject, a), figure(base, p))
	if err := bench.Write("../../docs/bench/kubernetes.json", []bench.Row{row}); err != nil {
		b.Fatal(err)
	}
}

// api speaks to an API server without a process in between.
type api struct {
	server string
	client http.Client
}

func newAPI(t testing.TB, kubeconfig string) *api {
	t.Helper()
	raw, err := os.ReadFile(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	var k struct {
		Clusters []struct {
			Cluster struct {
				Server string
				CA     []byte `json:"certificate-authority-data"`
			}
		}
		Users []struct {
			User struct {
				Cert []byte `json:"client-certificate-data"`
				Key  []byte `json:"client-key-data"`
			}
		}
	}
	if err := json.Unmarshal(raw, &k); err != nil || len(k.Clusters) != 1 || len(k.Users) != 1 {
		t.Fatalf("%s is not as underlay up writes it: %v", kubeconfig, err)
	}
	cert, err := tls.X509KeyPair(k.Users[0].User.Cert, k.Users[0].User.Key)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(k.Clusters[0].Cluster.CA)
	return &api{server: k.Clusters[0].Cluster.Server, client: http.Client{
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}}},
	}}
}

// podReady creates a pod on a node and returns the time from the request to the
// event of a watch that shows it Ready.
func (a *api) podReady(t testing.TB, name, node string) time.Duration {
	t.Helper()
	const pods = "/api/v1/namespaces/default/pods"
	watch, err := a.client.Get(a.server + pods + "?watch=true&resourceVersion=0&timeoutSeconds=60&fieldSelector=metadata.name%3D" + name)
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Body.Close()
	if watch.StatusCode != http.StatusOK {
		t.Fatalf("watch pod %s: %s", name, watch.Status)
	}
	manifest, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": name},
		"spec": map[string]any{
			"nodeName": node, "terminationGracePeriodSeconds": 0,
			"containers": []any{map[string]any{"name": "c", "image": agnhost, "args": []string{"pause"}}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	resp, err := a.client.Post(a.server+pods, "application/json", bytes.NewReader(manifest))
	if err != nil {
		t.Fatal(err)
	}
	answer, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		t.Fatalf("create pod %s: %s: %s", name, resp.Status, answer)
	}
	events := json.NewDecoder(watch.Body)
	for {
		var e struct {
			Type   string
			Object json.RawMessage
		}
		if err := events.Decode(&e); err != nil {
			t.Fatalf("pod %s was not Ready within a minute: %v", name, err)
		}
		if e.Type == "ERROR" {
			t.Fatalf("watch pod %s: %s", name, e.Object)
		}
		var p pod
		if err := json.Unmarshal(e.Object, &p); err != nil {
			t.Fatal(err)
		}
		if p.ready() {
			return time.Since(start)
		}
	}
}
