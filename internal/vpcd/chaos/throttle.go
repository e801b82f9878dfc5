package chaos

import (
	_ "embed"
	"encoding/json"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/vpcd/query"
)

// throttle.json holds the token buckets of the EC2 API Developer Guide,
// "Request throttling for the Amazon EC2 API" (2026).
//
//go:embed throttle.json
var throttleJSON []byte

// limit is a token bucket's size and its refill per second.
type limit [2]float64

type limits struct {
	Categories struct {
		NonMutating limit `json:"non_mutating"` // Describe, Get, List, Search
		Unfiltered  struct {
			Bucket  limit    `json:"bucket"`
			Actions []string `json:"actions"`
		} `json:"unfiltered_and_unpaginated"`
		Mutating  limit `json:"mutating_default"`
		Intensive struct {
			Bucket  limit    `json:"bucket"`
			Actions []string `json:"actions"`
		} `json:"resource_intensive"`
	} `json:"categories"`
	Own       map[string]limit `json:"own_bucket"`
	Resources map[string]limit `json:"resource_buckets"`
}

var table = sync.OnceValue(func() *limits {
	var l limits
	if err := json.Unmarshal(throttleJSON, &l); err != nil {
		panic("chaos: throttle.json: " + err.Error()) // embedded, and read by a test
	}
	return &l
})

// bucketKey names a bucket. Limits apply to single actions, per account and
// region.
type bucketKey struct {
	account, region, action string
	class                   string // "requests", "unfiltered" or "resources"
}

type bucket struct {
	tokens float64
	last   time.Time
}

// requestLimit is the bucket that requests of the action draw on.
func requestLimit(call query.Call) (class string, l limit) {
	t, name := table(), call.Action.Name
	if slices.Contains(t.Categories.Unfiltered.Actions, name) && isUnfiltered(call.Request) {
		return "unfiltered", t.Categories.Unfiltered.Bucket
	}
	if own, ok := t.Own[name]; ok {
		return "requests", own
	}
	if slices.Contains(t.Categories.Intensive.Actions, name) {
		return "requests", t.Categories.Intensive.Bucket
	}
	for _, p := range []string{"Describe", "Get", "List", "Search"} {
		if strings.HasPrefix(name, p) {
			return "requests", t.Categories.NonMutating
		}
	}
	return "requests", t.Categories.Mutating
}

// isUnfiltered reports whether a Describe request has neither a filter nor
// pagination. Identifiers count as a filter, which the guide does not say.
func isUnfiltered(req any) bool {
	v := reflect.ValueOf(req).Elem()
	for i := range v.NumField() {
		switch v.Type().Field(i).Name {
		case "DryRun", "IncludeManagedResources", "IncludeAllInstances":
			continue
		}
		if !v.Field(i).IsZero() {
			return false
		}
	}
	return true
}

// resources is how many resource tokens the request takes.
func resources(call query.Call) float64 {
	if call.DryRun {
		return 0
	}
	switch r := call.Request.(type) {
	case *query.RunInstancesRequest:
		return float64(*r.MaxCount) // required, so never nil here
	case *query.TerminateInstancesRequest:
		return float64(len(r.InstanceId))
	case *query.StartInstancesRequest:
		return float64(len(r.InstanceId))
	case *query.StopInstancesRequest:
		return float64(len(r.InstanceId))
	}
	return 0
}

// take draws the tokens of one call, or none at all. c.mu is held.
func (c *Control) take(call query.Call) bool {
	now := c.now()
	class, l := requestLimit(call)
	key := bucketKey{call.Identity.Account, call.Identity.Region, call.Action.Name, class}
	requests := c.bucket(key, l, now)
	if requests.tokens < 1 {
		return false
	}
	if n := resources(call); n > 0 {
		l := table().Resources[call.Action.Name]
		key.class = "resources"
		// Who asks for more than a bucket holds waits for a full one.
		n = min(n, l[0])
		b := c.bucket(key, l, now)
		if b.tokens < n {
			return false
		}
		b.tokens -= n
	}
	requests.tokens--
	return true
}

// bucket returns a bucket, refilled up to now. c.mu is held.
func (c *Control) bucket(key bucketKey, l limit, now time.Time) *bucket {
	b := c.buckets[key]
	if b == nil {
		b = &bucket{tokens: l[0], last: now}
		c.buckets[key] = b
	}
	if gone := now.Sub(b.last); gone > 0 {
		b.tokens = min(l[0], b.tokens+gone.Seconds()*l[1])
		b.last = now
	}
	return b
}
