package kube

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// run runs a client in a bubble of virtual time, against an API server that before
// has prepared.
func run(t *testing.T, o Options, fn func(*fakeAPI, *Client), before ...func(*fakeAPI)) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		for _, fn := range before {
			fn(f)
		}
		c := f.client(o)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- c.Run(ctx) }()
		defer func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}()
		fn(f, c)
	})
}

func settle(d time.Duration) {
	<-time.After(d) // virtual
	synctest.Wait()
}

func taints(n *corev1.Node) (out []string) {
	for _, t := range n.Spec.Taints {
		out = append(out, t.Key)
	}
	return out
}

func TestReadyNode(t *testing.T) {
	run(t, Options{}, func(f *fakeAPI, c *Client) {
		settle(time.Second)
		if w := f.writes(); w != nil {
			t.Errorf("nothing was published, and there are writes: %v", w)
		}
		// The capacity is known before the agent serves: no pod comes yet.
		c.Publish(Status{Addresses: 27})
		settle(time.Second)
		if diff := cmp.Diff([]string{"PATCH nodes/node-1/status"}, f.writes()); diff != "" {
			t.Errorf("not ready: %s", diff)
		}
		if got := taints(f.node); !slices.Contains(got, Taint) {
			t.Errorf("taints %v of a node that is not ready", got)
		}
		// Ready, at once; the taint last.
		c.Publish(Status{Ready: true, Addresses: 27, Annotations: map[string]string{"enis": "1/3"}})
		settle(time.Second)
		if diff := cmp.Diff([]string{"PATCH nodes/node-1/status", "PATCH nodes/node-1", "PATCH nodes/node-1"}, f.writes()); diff != "" {
			t.Errorf("ready: %s", diff)
		}
		n := f.node
		if diff := cmp.Diff([]string{"other", "last"}, taints(n)); diff != "" {
			t.Errorf("taints: %s", diff)
		}
		if q := n.Status.Capacity[PodAddresses]; q.Value() != 27 {
			t.Errorf("capacity %v", n.Status.Capacity)
		}
		if n.Annotations["underlay.dev/enis"] != "1/3" {
			t.Errorf("annotations %v", n.Annotations)
		}
		if len(n.Status.Conditions) != 2 || n.Status.Conditions[0].Reason != "KubeletReady" && n.Status.Conditions[1].Reason != "KubeletReady" {
			t.Errorf("conditions %v", n.Status.Conditions)
		}
		i := slices.IndexFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool { return c.Type == corev1.NodeNetworkUnavailable })
		if i < 0 || n.Status.Conditions[i].Status != corev1.ConditionFalse || n.Status.Conditions[i].Reason != ConditionReason {
			t.Errorf("conditions %v", n.Status.Conditions)
		}
		// All is as it should be: no write, however long.
		settle(time.Hour)
		if w := f.writes(); w != nil {
			t.Errorf("nothing changed, and there are writes: %v", w)
		}
	})
}

func TestChangesAreCoalesced(t *testing.T) {
	run(t, Options{}, func(f *fakeAPI, c *Client) {
		c.Publish(Status{Ready: true, Addresses: 27})
		settle(time.Second)
		f.writes()
		for i := range 300 { // a change per second, for five minutes
			c.Publish(Status{Ready: true, Addresses: 27, Annotations: map[string]string{"free-addresses": []string{"8+", "4+", "2+"}[i%3]}})
			settle(time.Second)
		}
		if w := f.writes(); len(w) < 5 || len(w) > 11 {
			t.Errorf("%d writes in five minutes, want at most one per 30 s", len(w))
		}
		settle(time.Minute)
		if got := f.node.Annotations["underlay.dev/free-addresses"]; got != "2+" {
			t.Errorf("the last one was %q", got)
		}
	})
}

// Another takes a taint off between our read and our patch, and kubelet makes
// the node anew.
func TestNodeChangedByOthers(t *testing.T) {
	run(t, Options{}, func(f *fakeAPI, c *Client) {
		f.set(func() {
			f.stale = f.node.DeepCopy()
			f.node.Spec.Taints = f.node.Spec.Taints[1:] // "other" went
		})
		c.Publish(Status{Ready: true, Addresses: 27})
		settle(time.Minute)
		if diff := cmp.Diff([]string{"last"}, taints(f.node)); diff != "" {
			t.Errorf("taints: %s", diff)
		}
		f.set(func() { f.node = newFake(t).node })
		settle(3 * time.Minute)
		if diff := cmp.Diff([]string{"other", "last"}, taints(f.node)); diff != "" {
			t.Errorf("taints of the new object: %s", diff)
		}
		if q := f.node.Status.Capacity[PodAddresses]; q.Value() != 27 {
			t.Errorf("capacity of the new object: %v", f.node.Status.Capacity)
		}
	})
}

func TestConditionOfOthersIsLeft(t *testing.T) {
	run(t, Options{}, func(f *fakeAPI, c *Client) {
		f.set(func() {
			f.node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionFalse, Reason: "RouteCreated"}}
			f.node.Status.Capacity[PodAddresses] = resource.MustParse("27")
			f.node.Spec.Taints = nil
		})
		c.Publish(Status{Ready: true, Addresses: 27})
		settle(time.Minute)
		if w := f.writes(); w != nil {
			t.Errorf("writes %v", w)
		}
	})
}

func TestAPIServerAway(t *testing.T) {
	for _, status := range []int{500, 503, 429, 401, 403, 404} {
		run(t, Options{}, func(f *fakeAPI, c *Client) {
			f.set(func() { f.status = status })
			began := time.Now()
			c.Publish(Status{Ready: true, Addresses: 27})
			if d := time.Since(began); d != 0 {
				t.Errorf("%d: Publish took %s", status, d)
			}
			settle(10 * time.Minute)
			f.mu.Lock()
			requests := len(f.log)
			f.mu.Unlock()
			if requests < 5 || requests > 400 {
				t.Errorf("%d: %d requests in ten minutes", status, requests)
			}
			f.set(func() { f.status = 0 })
			settle(2 * time.Minute)
			if got := taints(f.node); slices.Contains(got, Taint) {
				t.Errorf("%d: taints %v after the API server came back", status, got)
			}
		})
	}
}
