package chaos

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/vpcd/query"
)

// Control holds the settings of a running vpcd.
type Control struct {
	now    func() time.Time
	random func() float64

	mu       sync.Mutex
	settings Settings
	buckets  map[bucketKey]*bucket
}

// New returns a Control with the Defaults. now is the clock of the token
// buckets; nil is time.Now.
func New(now func() time.Time) *Control {
	if now == nil {
		now = time.Now
	}
	return &Control{now: now, random: rand.Float64, settings: Defaults(), buckets: map[bucketKey]*bucket{}}
}

// Get returns the settings. Failures that have happened as often as they were
// to are gone from them, the others say how often they still will.
func (c *Control) Get() Settings {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.settings
	s.Fail, s.Quotas = slices.Clone(s.Fail), maps.Clone(s.Quotas)
	return s
}

// Set replaces the settings, or returns what is wrong with them. Token buckets
// are full again when throttling was off before.
func (c *Control) Set(s Settings) error {
	if err := s.Validate(); err != nil {
		return err
	}
	s.Fail, s.Quotas = slices.Clone(s.Fail), maps.Clone(s.Quotas)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.settings.Throttle != ThrottleAWS {
		clear(c.buckets)
	}
	c.settings = s
	return nil
}

// Reset returns to the Defaults.
func (c *Control) Reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.settings = Defaults()
	clear(c.buckets)
}

// Gate is a query.Gate: it throttles, then waits, then fails the call, as the
// settings of the moment ask.
func (c *Control) Gate(ctx context.Context, call query.Call) error {
	latency, throttled, failure := c.judge(call)
	if throttled {
		return query.Errorf("RequestLimitExceeded", "Request limit exceeded.")
	}
	if latency > 0 {
		t := time.NewTimer(latency)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	switch failure {
	case "":
		return nil
	case "RequestLimitExceeded":
		return query.Errorf(failure, "Request limit exceeded.")
	}
	return query.Errorf(failure, "This error was asked for: see vpcd chaos show.")
}

// judge takes the tokens and counts the failures of one call.
func (c *Control) judge(call query.Call) (latency time.Duration, throttled bool, failure string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	latency = c.settings.Latency
	if c.settings.Throttle == ThrottleAWS && !c.take(call) {
		return latency, true, ""
	}
	for i := range c.settings.Fail {
		f := &c.settings.Fail[i]
		if f.Action != "*" && f.Action != call.Action.Name {
			continue
		}
		if f.Probability > 0 {
			if c.random() < f.Probability {
				return latency, false, f.Code
			}
			continue
		}
		failure = f.Code
		if f.Count--; f.Count == 0 {
			c.settings.Fail = slices.Delete(c.settings.Fail, i, i+1)
		}
		return latency, false, failure
	}
	return latency, false, ""
}
