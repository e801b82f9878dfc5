package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Pod names a pod as the API does.
type Pod struct{ Namespace, Name, UID string }

// Notice is what a pod's users are to know.
type Notice struct {
	Reason  string // one word, such as SubnetFull
	Message string // ends with the next step
	Warning bool   // or it is on its way
}

const (
	component = "underlay-agent"
	// maxNotices bounds what is remembered: more pods than that do not wait on
	// one node.
	maxNotices = 256
	// eventBurst events go out at once, then one per eventEvery: 2,000 nodes
	// that EC2 refuses together cost the API server 400 writes/s.
	eventBurst = 25
	eventEvery = 5 * time.Second
	// repeatEvery is how often one pod's event of one reason is written again;
	// what happens in between is counted.
	repeatEvery = 30 * time.Second
	// forgetAfter is how long a notice is remembered, for the next of its kind
	// to count on.
	forgetAfter = 10 * time.Minute
	// maxMessage is the API's limit, in bytes (core/v1 validation: 1024).
	maxMessage = 1024
)

// notice is one pod's of one reason.
type notice struct {
	pod         Pod
	now         Notice // as last told
	first, last time.Time
	count       int32
	pending     bool      // something was told that is not written
	name        string    // of the event in the API, "" before it was written
	written     time.Time // zero: never
}

type noticeKey struct {
	pod    Pod
	reason string
}

// recorder holds the notices.
type recorder struct {
	wake chan struct{} // size 1

	mu      sync.Mutex
	notices map[noticeKey]*notice
	order   []*notice // by their first time
	dropped uint64
}

func (r *recorder) init() {
	r.wake = make(chan struct{}, 1)
	r.notices = map[noticeKey]*notice{}
}

// Tell has an event posted on a pod, some time: equal ones are counted, many at
// once are spread, and more than can be remembered are dropped and counted.
// What has no name in the API is nobody's pod.
func (c *Client) Tell(pod Pod, n Notice) {
	if pod.Namespace == "" || pod.Name == "" {
		return
	}
	if len(n.Message) > maxMessage {
		n.Message = strings.ToValidUTF8(n.Message[:maxMessage-3], "") + "..."
	}
	r := &c.events
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	k := noticeKey{pod, n.Reason}
	e := r.notices[k]
	if e == nil {
		r.forget(now)
		if len(r.order) >= maxNotices {
			r.dropped++
			return
		}
		e = &notice{pod: pod, first: now}
		r.notices[k] = e
		r.order = append(r.order, e)
	}
	e.now, e.last, e.pending = n, now, true
	e.count++
	signal(r.wake)
}

// Served takes back what was told about a pod that waited, as far as it was not
// posted yet: it is no longer true.
func (c *Client) Served(pod Pod) {
	r := &c.events
	r.mu.Lock()
	defer r.mu.Unlock()
	r.drop(func(n *notice) bool {
		if n.pod == pod {
			n.pending = false
		}
		return n.pod == pod && n.name == ""
	})
}

// Dropped returns how many notices there was no room for.
func (c *Client) Dropped() uint64 {
	c.events.mu.Lock()
	defer c.events.mu.Unlock()
	return c.events.dropped
}

// forget makes room. The lock is held.
func (r *recorder) forget(now time.Time) {
	r.drop(func(n *notice) bool { return !n.pending && now.Sub(n.last) > forgetAfter })
}

func (r *recorder) drop(gone func(*notice) bool) {
	kept := r.order[:0]
	for _, n := range r.order {
		if gone(n) {
			delete(r.notices, noticeKey{n.pod, n.now.Reason})
			continue
		}
		kept = append(kept, n)
	}
	clear(r.order[len(kept):])
	r.order = kept
}

// next returns a copy of the first notice that may be written now, or how long
// until there is one.
func (r *recorder) next(now time.Time) (n notice, ok bool, in time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	in = forgetAfter
	for _, e := range r.order {
		if !e.pending {
			continue
		}
		due := time.Duration(0)
		if !e.written.IsZero() {
			due = repeatEvery - now.Sub(e.written)
		}
		if due <= 0 {
			return *e, true, 0
		}
		in = min(in, due)
	}
	return notice{}, false, in
}

// wrote remembers that sent is in the API under name; "": it is not to be.
func (r *recorder) wrote(sent *notice, name string, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.notices[noticeKey{sent.pod, sent.now.Reason}]
	if e == nil || !e.first.Equal(sent.first) {
		return
	}
	e.name, e.written = name, now
	e.pending = e.count != sent.count
}

// sendEvents delivers notices as they come.
func (c *Client) sendEvents(ctx context.Context) {
	var retry backoff
	turns := rate.NewLimiter(rate.Every(eventEvery), eventBurst)
	told := ""
	for {
		if _, ok, in := c.events.next(time.Now()); !ok {
			if !wait(ctx, in, c.events.wake) {
				return
			}
			continue
		}
		if turns.Wait(ctx) != nil {
			return // ctx has ended
		}
		n, ok, _ := c.events.next(time.Now())
		if !ok {
			continue // the pod was served meanwhile
		}
		name, err := c.send(ctx, &n)
		switch {
		case err == nil:
			retry.reset()
			told = ""
		case ctx.Err() != nil:
			return
		default:
			if text := err.Error(); text != told {
				c.log.Warn("event not posted", "pod", n.pod.Namespace+"/"+n.pod.Name, "op", "event", "reason", n.now.Reason, "err", err)
				told = text
			}
			if !wait(ctx, retry.fail(err), nil) {
				return
			}
			if !final(err) {
				continue
			}
		}
		c.events.wrote(&n, name, time.Now())
	}
}

// final reports whether the API server has judged: the pod's namespace is going,
// the event does not please it, we have no right to. To send the same again
// would not help; what is told later may.
func final(err error) bool {
	return apierrors.IsForbidden(err) || apierrors.IsNotFound(err) || apierrors.IsInvalid(err) || apierrors.IsBadRequest(err)
}

// send writes one event: its count onto the one that is there, or anew. Its name
// is its own for good, so that one whose posting was not heard of is found.
func (c *Client) send(ctx context.Context, n *notice) (name string, err error) {
	name = eventName(n)
	if n.name != "" {
		err := c.repeat(ctx, n, name)
		if err == nil || !absent(err) { // absent: it was there for an hour, or somebody deleted it
			return name, err
		}
	}
	kind := corev1.EventTypeNormal
	if n.now.Warning {
		kind = corev1.EventTypeWarning
	}
	e := corev1.Event{
		TypeMeta:       metav1.TypeMeta{APIVersion: "v1", Kind: "Event"},
		ObjectMeta:     metav1.ObjectMeta{Namespace: n.pod.Namespace, Name: name},
		InvolvedObject: corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: n.pod.Namespace, Name: n.pod.Name, UID: types.UID(n.pod.UID)},
		Reason:         n.now.Reason, Message: n.now.Message, Type: kind, Count: n.count,
		FirstTimestamp: metav1.NewTime(n.first), LastTimestamp: metav1.NewTime(n.last),
		Source:              corev1.EventSource{Component: component, Host: c.opts.Node},
		ReportingController: component, ReportingInstance: c.opts.Node,
	}
	err = c.api.Post().Namespace(n.pod.Namespace).Resource("events").Body(&e).Do(ctx).Error()
	if apierrors.IsAlreadyExists(err) {
		return name, c.repeat(ctx, n, name)
	}
	if err != nil {
		return name, fmt.Errorf("post event: %w", err)
	}
	return name, nil
}

// repeat writes what was told since onto an event that is there.
func (c *Client) repeat(ctx context.Context, n *notice, name string) error {
	b, err := json.Marshal(map[string]any{"count": n.count, "lastTimestamp": metav1.NewTime(n.last), "message": n.now.Message})
	if err != nil {
		return fmt.Errorf("encode an event: %w", err)
	}
	if err := c.api.Patch(types.StrategicMergePatchType).Namespace(n.pod.Namespace).Resource("events").Name(name).Body(b).Do(ctx).Error(); err != nil {
		return fmt.Errorf("repeat event: %w", err)
	}
	return nil
}

// eventName is the pod's with a number, as others name events. A pod's name may
// have 253 bytes, and so may this.
func eventName(n *notice) string {
	h := fnv.New64a()
	fmt.Fprint(h, n.pod.UID, "\x00", n.now.Reason, "\x00", n.first.UnixNano())
	pod, end := n.pod.Name, fmt.Sprintf(".%016x", h.Sum64())
	if len(pod)+len(end) > 253 {
		pod = strings.TrimRight(pod[:253-len(end)], "-.")
	}
	return pod + end
}
