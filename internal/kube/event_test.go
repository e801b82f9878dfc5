package kube

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func pod(i int) Pod { return Pod{"shop", fmt.Sprintf("web-%d", i), fmt.Sprintf("uid-%d", i)} }

func TestEvent(t *testing.T) {
	run(t, Options{}, func(f *fakeAPI, c *Client) {
		full := Notice{Reason: "SubnetFull", Message: "subnet s has no free address; free some", Warning: true}
		c.Tell(pod(1), full)
		settle(time.Second)
		if diff := cmp.Diff(map[string]string{"web-1": "Warning SubnetFull 1 " + full.Message + "\n"}, f.posted()); diff != "" {
			t.Error(diff)
		}
		for _, e := range f.events {
			if e.InvolvedObject.UID != "uid-1" || e.InvolvedObject.Kind != "Pod" || e.InvolvedObject.APIVersion != "v1" || e.Source.Host != "node-1" || e.ReportingInstance != "node-1" || e.FirstTimestamp.IsZero() {
				t.Errorf("%+v", e)
			}
		}
		// The same again: one event, counted, at most twice a minute.
		for range 60 {
			c.Tell(pod(1), full)
			settle(time.Second)
		}
		settle(time.Minute)
		if w := f.writes(); len(w) < 2 || len(w) > 5 {
			t.Errorf("writes %v", w)
		}
		if diff := cmp.Diff(map[string]string{"web-1": "Warning SubnetFull 61 " + full.Message + "\n"}, f.posted()); diff != "" {
			t.Error(diff)
		}
		// Another reason is another event; so is a pod of the same name.
		c.Tell(pod(1), Notice{Reason: "WaitingForENI", Message: "wait; nothing to do"})
		c.Tell(Pod{"shop", "web-1", "uid-new"}, full)
		settle(time.Minute)
		if got := strings.Count(f.posted()["web-1"], "\n"); got != 3 {
			t.Errorf("%d events on web-1: %s", got, f.posted()["web-1"])
		}
		// Gone after an hour: posted anew.
		f.set(func() { clear(f.events) })
		c.Tell(pod(1), full)
		settle(time.Minute)
		if diff := cmp.Diff(map[string]string{"web-1": "Warning SubnetFull 62 " + full.Message + "\n"}, f.posted()); diff != "" {
			t.Error(diff)
		}
	})
}

// 230 pods wait together; most are served before their turn comes.
func TestManyEventsAreSpread(t *testing.T) {
	run(t, Options{}, func(f *fakeAPI, c *Client) {
		for i := range 400 {
			c.Tell(pod(i), Notice{Reason: "WaitingForENI", Message: "wait; nothing to do"})
		}
		settle(20 * time.Second)
		if n := len(f.posted()); n < eventBurst || n > eventBurst+4 {
			t.Errorf("%d events in 20 s", n)
		}
		if d := c.Dropped(); d != 400-maxNotices {
			t.Errorf("%d dropped", d)
		}
		for i := range 400 {
			c.Served(pod(i))
		}
		before := len(f.posted())
		settle(10 * time.Minute)
		if n := len(f.posted()); n > before {
			t.Errorf("%d events, %d before the pods were served", n, before)
		}
		if n := len(c.events.order); n > before || n != len(c.events.notices) {
			t.Errorf("%d notices kept, %d by key", n, len(c.events.notices))
		}
		// What is old makes room.
		settle(forgetAfter)
		for i := range maxNotices {
			c.Tell(pod(1000+i), Notice{Reason: "NodeFull", Message: "full; use a larger one"})
		}
		if d := c.Dropped(); d != 400-maxNotices {
			t.Errorf("%d dropped after the old ones were forgotten", d)
		}
	})
}

func TestEventsThatCannotBePosted(t *testing.T) {
	run(t, Options{}, func(f *fakeAPI, c *Client) {
		c.Tell(Pod{Name: "nomad-job"}, Notice{Reason: "NodeFull"}) // no pod of a cluster's
		settle(time.Minute)
		if w := f.writes(); w != nil {
			t.Errorf("writes %v", w)
		}
		for _, status := range []int{403, 404, 422} { // not by asking again
			f.set(func() { f.status = status })
			c.Tell(pod(status), Notice{Reason: "NodeFull", Message: strings.Repeat("é", 2000)})
			settle(5 * time.Minute)
			if w := f.writes(); len(w) != 1 {
				t.Errorf("%d: writes %v", status, w)
			}
		}
		f.set(func() { f.status = 503 }) // by asking again
		c.Tell(pod(503), Notice{Reason: "NodeFull", Message: "full; use a larger one"})
		settle(5 * time.Minute)
		f.set(func() { f.status = 0 })
		settle(2 * time.Minute)
		if got := f.posted()["web-503"]; got == "" {
			t.Errorf("posted %v", f.posted())
		}
	})
}

func TestEventName(t *testing.T) {
	at := time.Unix(1, 2)
	a := notice{pod: pod(1), now: Notice{Reason: "A"}, first: at}
	b, c := a, a
	b.now.Reason, c.first = "B", at.Add(1)
	if x, y, z := eventName(&a), eventName(&b), eventName(&c); x == y || y == z || x == z || x != eventName(&a) || !strings.HasPrefix(x, "web-1.") {
		t.Errorf("%q %q %q", x, y, z)
	}
	a.pod.Name = strings.Repeat("a", 234) + "-.bcdefghijklmnopq"
	if got := eventName(&a); len(got) > 253 || !strings.HasPrefix(got, strings.Repeat("a", 234)+".") {
		t.Errorf("%q, %d bytes", got, len(got))
	}
}

// The API server took an event and did not get to say so.
func TestEventPostedUnheard(t *testing.T) {
	run(t, Options{}, func(f *fakeAPI, c *Client) {
		f.set(func() { f.deaf = true })
		c.Tell(pod(1), Notice{Reason: "NodeFull", Message: "full; use a larger one"})
		settle(10 * time.Second)
		f.set(func() { f.deaf = false })
		settle(2 * time.Minute)
		if diff := cmp.Diff(map[string]string{"web-1": "Normal NodeFull 1 full; use a larger one\n"}, f.posted()); diff != "" {
			t.Error(diff)
		}
	})
}

func TestLeaving(t *testing.T) {
	now := metav1.Now()
	o := Options{Namespace: "kube-system", DaemonSet: "underlay"}
	for _, tc := range []struct {
		name string
		is   *appsv1.DaemonSet // at the end; it was there at the start
		code int               // at the end
		want string            // "": stays
		err  bool
	}{
		{"an update", &appsv1.DaemonSet{}, 0, "", false},
		{"deleted, its pods first", &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{DeletionTimestamp: &now}}, 0, "being deleted", false},
		{"deleted", nil, 0, "is gone", false},
		{"deleted with its rights", nil, 403, "right", false},
		{"deleted with its service account", nil, 401, "right", false},
		{"the API server is away", nil, 503, "", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			run(t, o, func(f *fakeAPI, c *Client) {
				settle(time.Second)
				if !c.known {
					t.Fatal("the DaemonSet was not found at the start")
				}
				f.set(func() { f.daemonSet, f.status = tc.is, tc.code })
				why, err := c.Leaving(context.Background())
				if (why != "") != (tc.want != "") || !strings.Contains(why, tc.want) || (err != nil) != tc.err {
					t.Errorf("%q, %v; want %q", why, err, tc.want)
				}
			}, func(f *fakeAPI) { f.daemonSet = &appsv1.DaemonSet{} })
		})
	}
	// Who never had the right does not take its absence for a removal.
	run(t, o, func(f *fakeAPI, c *Client) {
		f.set(func() { f.status = 403 })
		settle(time.Minute)
		if why, err := c.Leaving(context.Background()); why != "" || err == nil {
			t.Errorf("%q, %v", why, err)
		}
	})
	run(t, Options{}, func(_ *fakeAPI, c *Client) {
		if why, err := c.Leaving(context.Background()); why != "" || err != nil {
			t.Errorf("%q, %v", why, err)
		}
	})
}
