package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"
)

// API asks the API server of a lab the little that the command itself wants to
// know. Everything else is kubectl's.
type API struct {
	server string
	client http.Client
}

// NewAPI returns an API that speaks as the administrator of kubeconfig, a file
// that Write has made.
func NewAPI(path string) (*API, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the kubeconfig: %w", err)
	}
	var k kubeconfig
	if err := json.Unmarshal(b, &k); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if len(k.Clusters) != 1 || len(k.Users) != 1 {
		return nil, fmt.Errorf("read %s: it is not as underlay up wrote it", path)
	}
	cert, err := tls.X509KeyPair(k.Users[0].User.Cert, k.Users[0].User.Key)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(k.Clusters[0].Cluster.CA) {
		return nil, fmt.Errorf("read %s: it holds no certificate authority", path)
	}
	return &API{
		server: k.Clusters[0].Cluster.Server,
		// No proxy of the person's environment.
		client: http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
			TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}},
		}},
	}, nil
}

// get asks for path and decodes the answer into out, if it is not nil.
func (a *API) get(ctx context.Context, path string, out any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.server+path, nil)
	if err != nil {
		return fmt.Errorf("ask the API server: %w", err)
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return fmt.Errorf("ask the API server: %w", err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return fmt.Errorf("ask the API server for %s: %w", path, err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the API server answers %s with %s: %s", path, resp.Status, failure(b))
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("read the API server's answer to %s: %w", path, err)
	}
	return nil
}

// failure is what an answer that is none says, in one line: the checks that
// fail, or the message of a Status, or its beginning.
func failure(b []byte) string {
	var failed []string
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutPrefix(line, "[-]"); ok {
			name, _, _ = strings.Cut(name, " ")
			failed = append(failed, name)
		}
	}
	if len(failed) > 0 {
		return "not ready: " + strings.Join(failed, ", ")
	}
	var status struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(b, &status) == nil && status.Message != "" {
		return status.Message
	}
	s := strings.Join(strings.Fields(string(b)), " ")
	return s[:min(len(s), 300)]
}

// Ready returns nil when the API server is ready.
func (a *API) Ready(ctx context.Context) error { return a.get(ctx, "/readyz", nil) }

// Version is the API server's own, such as "v1.37.2".
func (a *API) Version(ctx context.Context) (string, error) {
	var v struct {
		GitVersion string `json:"gitVersion"`
	}
	return v.GitVersion, a.get(ctx, "/version", &v)
}

// NodeCondition is what Kubernetes says of a node.
type NodeCondition struct {
	Name   string
	Ready  bool
	Why    string // it is not ready
	BootID string // of the life that its kubelet has told this in
}

// Nodes returns the nodes that have registered.
func (a *API) Nodes(ctx context.Context) ([]NodeCondition, error) {
	var list struct {
		Items []struct {
			Metadata struct {
				Name string `json:"name"`
			} `json:"metadata"`
			Spec struct {
				Taints []struct {
					Key string `json:"key"`
				} `json:"taints"`
			} `json:"spec"`
			Status struct {
				Conditions []struct {
					Type    string `json:"type"`
					Status  string `json:"status"`
					Reason  string `json:"reason"`
					Message string `json:"message"`
				} `json:"conditions"`
				NodeInfo struct {
					BootID string `json:"bootID"`
				} `json:"nodeInfo"`
			} `json:"status"`
		} `json:"items"`
	}
	if err := a.get(ctx, "/api/v1/nodes", &list); err != nil {
		return nil, err
	}
	var nodes []NodeCondition
	for _, i := range list.Items {
		n := NodeCondition{Name: i.Metadata.Name, BootID: i.Status.NodeInfo.BootID, Why: "the kubelet has not said anything about it"}
		for _, c := range i.Status.Conditions {
			if c.Type != "Ready" {
				continue
			}
			n.Ready, n.Why = c.Status == "True", ""
			if !n.Ready {
				n.Why = c.Reason + ": " + c.Message
			}
		}
		for _, t := range i.Spec.Taints {
			if t.Key == Taint {
				n.Ready, n.Why = false, strings.TrimPrefix(n.Why+"; the agent does not serve there yet (taint "+Taint+")", "; ")
			}
		}
		nodes = append(nodes, n)
	}
	return nodes, nil
}

// Trouble is a container that does not run as it should.
type Trouble struct {
	Pod, Node, Container string
	Why                  string
	Restarts             int
	NoImage              bool // its image is not there; it will not come
}

// Troubles returns the containers of a namespace that wait for something other
// than their turn.
func (a *API) Troubles(ctx context.Context, namespace string) ([]Trouble, error) {
	type container struct {
		Name         string `json:"name"`
		RestartCount int    `json:"restartCount"`
		State        struct {
			Waiting *struct {
				Reason  string `json:"reason"`
				Message string `json:"message"`
			} `json:"waiting"`
		} `json:"state"`
	}
	var list struct {
		Items []struct {
			Metadata struct {
				Name string `json:"name"`
			} `json:"metadata"`
			Spec struct {
				NodeName string `json:"nodeName"`
			} `json:"spec"`
			Status struct {
				Init       []container `json:"initContainerStatuses"`
				Containers []container `json:"containerStatuses"`
			} `json:"status"`
		} `json:"items"`
	}
	if err := a.get(ctx, "/api/v1/namespaces/"+namespace+"/pods", &list); err != nil {
		return nil, err
	}
	var troubles []Trouble
	for _, p := range list.Items {
		for _, c := range append(p.Status.Init, p.Status.Containers...) {
			w := c.State.Waiting
			if w == nil || w.Reason == "ContainerCreating" || w.Reason == "PodInitializing" {
				continue
			}
			troubles = append(troubles, Trouble{
				Pod: p.Metadata.Name, Node: p.Spec.NodeName, Container: c.Name, Why: w.Reason + ": " + w.Message, Restarts: c.RestartCount,
				NoImage: w.Reason == "ErrImagePull" || w.Reason == "ImagePullBackOff" || w.Reason == "ErrImageNeverPull" || w.Reason == "InvalidImageName",
			})
		}
	}
	return troubles, nil
}

// DeploymentReady returns nil when all replicas of a Deployment are available.
func (a *API) DeploymentReady(ctx context.Context, namespace, name string) error {
	var d struct {
		Spec struct {
			Replicas int `json:"replicas"`
		} `json:"spec"`
		Status struct {
			AvailableReplicas int `json:"availableReplicas"`
		} `json:"status"`
	}
	if err := a.get(ctx, "/apis/apps/v1/namespaces/"+namespace+"/deployments/"+name, &d); err != nil {
		return err
	}
	if d.Status.AvailableReplicas < d.Spec.Replicas {
		return fmt.Errorf("%d of %d pods of %s are ready", d.Status.AvailableReplicas, d.Spec.Replicas, name)
	}
	return nil
}

// ErrNoAccount is returned by AccountReady while it is not there.
var ErrNoAccount = errors.New("the default service account is not there yet")

// AccountReady returns nil when the controller manager has made the default
// service account, which pods need.
func (a *API) AccountReady(ctx context.Context) error {
	if a.get(ctx, "/api/v1/namespaces/default/serviceaccounts/default", nil) != nil {
		return ErrNoAccount
	}
	return nil
}
