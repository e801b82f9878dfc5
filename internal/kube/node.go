package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// What is ours in a Node object.
const (
	// Taint keeps pods off a node that has no agent yet, whatever its effect;
	// kubelet registers the node with it (--register-with-taints).
	Taint = "underlay.dev/agent-not-ready"
	// PodAddresses is the extended resource: how many pods the node can give
	// addresses to.
	PodAddresses = "underlay.dev/pod-addresses"
	// ConditionReason is that of NetworkUnavailable=False.
	ConditionReason = "UnderlayIsUp"
	// annotations bear this prefix, all of them.
	annotationPrefix = "underlay.dev/"
)

// Status is what the node's object is to say.
type Status struct {
	Ready       bool              // the agent serves: taint off, NetworkUnavailable=False
	Addresses   int               // PodAddresses; 0: not known yet
	Annotations map[string]string // without prefix; those of ours that are not among them are left
}

func (s *Status) equal(o *Status) bool {
	return s.Ready == o.Ready && s.Addresses == o.Addresses && maps.Equal(s.Annotations, o.Annotations)
}

const (
	// patchEvery bounds how often what changes reaches the API server; the
	// first time, when the agent begins to serve, is not held back.
	patchEvery = 30 * time.Second
	// lookEvery is how often the node's object is looked at although nothing
	// changed, ±25 %: kubelet registers a node anew, taint and all, when
	// somebody deleted its object. 2,000 nodes: 17 reads/s, from the API
	// server's cache.
	lookEvery = 2 * time.Minute
)

// node is the desired state of the node's object.
type node struct {
	wake chan struct{} // size 1

	mu   sync.Mutex
	want *Status // nil: nothing was published
}

func (n *node) init() { n.wake = make(chan struct{}, 1) }

// Publish says how the node stands, whole. It keeps a copy and returns at once.
func (c *Client) Publish(s Status) {
	s.Annotations = maps.Clone(s.Annotations)
	c.node.mu.Lock()
	changed := c.node.want == nil || !c.node.want.equal(&s)
	c.node.want = &s
	c.node.mu.Unlock()
	if changed {
		signal(c.node.wake)
	}
}

func (n *node) wanted() *Status {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.want
}

// keepNode brings the node's object to what is wanted, again and again.
func (c *Client) keepNode(ctx context.Context) {
	var (
		retry backoff
		last  time.Time // of the last patch
		ready bool      // what it said
		told  string    // the error that was logged last
	)
	for wait(ctx, spread(lookEvery), c.node.wake) {
		for {
			want := c.node.wanted()
			if want == nil {
				break
			}
			// Readiness is not held back; all else comes together.
			if hold := patchEvery - time.Since(last); hold > 0 && want.Ready == ready {
				if !wait(ctx, hold, c.node.wake) {
					return
				}
				continue
			}
			changed, err := c.setNode(ctx, want)
			if err == nil {
				if changed {
					last = time.Now()
				}
				ready = want.Ready
				if told != "" {
					c.log.Info("node object written again", "node", c.opts.Node, "op", "node")
				}
				told = ""
				retry.reset()
				break
			}
			if ctx.Err() != nil {
				return
			}
			if text := err.Error(); text != told {
				c.log.Warn("node object not written, tried again; pods are served meanwhile", "node", c.opts.Node, "op", "node", "err", err)
				told = text
			}
			if !wait(ctx, retry.fail(err), nil) {
				return
			}
		}
	}
}

// setNode compares the node's object with what is wanted and writes what
// differs. It reports whether it wrote.
func (c *Client) setNode(ctx context.Context, want *Status) (changed bool, err error) {
	var have corev1.Node
	// Whatever the API server has in its cache will do: patches say what they
	// rest on.
	err = c.api.Get().Resource("nodes").Name(c.opts.Node).VersionedParams(&metav1.GetOptions{ResourceVersion: "0"}, metav1.ParameterCodec).Do(ctx).Into(&have)
	if absent(err) {
		return false, fmt.Errorf("the API server has no node %s: %w; --node-name must be the node's name there", c.opts.Node, err)
	}
	if err != nil {
		return false, fmt.Errorf("read node %s: %w", c.opts.Node, err)
	}
	type patch struct {
		what, subresource string
		kind              types.PatchType
		body              any
	}
	var patches []patch
	if body := statusPatch(&have, want, time.Now()); body != nil {
		patches = append(patches, patch{"capacity and condition", "status", types.StrategicMergePatchType, body})
	}
	if body := annotationPatch(&have, want); body != nil {
		patches = append(patches, patch{"annotations", "", types.MergePatchType, body})
	}
	// Last: with it off, pods come.
	if body := taintPatch(&have, want); body != nil {
		patches = append(patches, patch{"taint", "", types.JSONPatchType, body})
	}
	for _, p := range patches {
		b, err := json.Marshal(p.body)
		if err != nil {
			return changed, fmt.Errorf("encode the node's %s: %w", p.what, err)
		}
		req := c.api.Patch(p.kind).Resource("nodes").Name(c.opts.Node).Body(b)
		if p.subresource != "" {
			req = req.SubResource(p.subresource)
		}
		if err := req.Do(ctx).Error(); err != nil {
			return changed, fmt.Errorf("write the node's %s: %w", p.what, err)
		}
		changed = true
		c.log.Info("node object written", "node", c.opts.Node, "op", "node", "what", p.what)
	}
	return changed, nil
}

// statusPatch is a strategic merge of the node's status; nil: it is as it
// should be. A condition that says the network is there, whoever said so, is
// left alone.
func statusPatch(have *corev1.Node, want *Status, now time.Time) any {
	status := map[string]any{}
	if want.Addresses > 0 {
		if q, ok := have.Status.Capacity[PodAddresses]; !ok || q.Cmp(*resource.NewQuantity(int64(want.Addresses), resource.DecimalSI)) != 0 {
			status["capacity"] = map[string]string{PodAddresses: strconv.Itoa(want.Addresses)}
		}
	}
	up := slices.ContainsFunc(have.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeNetworkUnavailable && c.Status == corev1.ConditionFalse
	})
	if want.Ready && !up {
		at := metav1.NewTime(now)
		status["conditions"] = []corev1.NodeCondition{{Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionFalse, Reason: ConditionReason,
			Message: "Underlay's agent serves on this node", LastHeartbeatTime: at, LastTransitionTime: at}}
	}
	if len(status) == 0 {
		return nil
	}
	return map[string]any{"status": status}
}

// annotationPatch is a merge of those annotations that differ.
func annotationPatch(have *corev1.Node, want *Status) any {
	differ := map[string]string{}
	for k, v := range want.Annotations {
		if have.Annotations[annotationPrefix+k] != v {
			differ[annotationPrefix+k] = v
		}
	}
	if len(differ) == 0 {
		return nil
	}
	return map[string]any{"metadata": map[string]any{"annotations": differ}}
}

// operation is one of a JSON patch, RFC 6902.
type operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

// taintPatch removes our taint, of whatever effect. The list has no names to
// patch by, and others change it too: each removal rests on what stands at that
// place, and the API server refuses it if that is no longer so.
func taintPatch(have *corev1.Node, want *Status) any {
	if !want.Ready {
		return nil
	}
	var ops []operation
	for i, t := range slices.Backward(have.Spec.Taints) { // the last first: the others keep their places
		if t.Key == Taint {
			path := "/spec/taints/" + strconv.Itoa(i)
			ops = append(ops, operation{"test", path + "/key", Taint}, operation{"remove", path, nil})
		}
	}
	if len(ops) == 0 {
		return nil
	}
	return ops
}
