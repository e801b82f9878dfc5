package ipam

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// For minutes EC2 does not answer, or denies everything. Pods that run keep what
// they have; those that come get what is free, whether it was free before or is
// so again after a pod; the others an error that says why, at the latest by
// their deadline. EC2 hears little meanwhile, and soon after it is back whoever
// waits is served.
func TestOutageOfMinutes(t *testing.T) {
	for _, tc := range []struct {
		name    string
		outcome Outcome
		class   Class
		kind    Kind
		says    string
		fails   time.Duration // an ADD with nothing free, at the latest
		back    time.Duration // an ADD after the end, at the latest
	}{
		// The last call may have been made just before the end: then a back-off has
		// to pass (a quarter longer than its limit by the spread), and after calls
		// of unknown end a read's too.
		{"no answer", Unknown, ClassUnavailable, KindUnavailable, "EC2 does not answer", 50 * time.Second, 20 * time.Second},
		{"server error", Refused, ClassUnavailable, KindUnavailable, "EC2 does not answer", 50 * time.Second, 20 * time.Second},
		{"denied", Refused, ClassDenied, KindDenied, "IAM policy", time.Second, 76 * time.Second},
	} {
		for seed := range uint64(8) {
			for _, prefixes := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, seed %d, prefixes %t", tc.name, seed, prefixes), func(t *testing.T) {
					w := newWorld(t, "m5.xlarge", seed)
					w.s.Config.Seed, w.s.Config.Prefixes, w.s.Config.Floor = seed*77, prefixes, 4
					w.start()
					w.pass(10 * time.Second)
					const pods = 6
					has := map[RequestID]netip.Addr{}
					for id := range RequestID(pods) {
						w.add(id+1, Pool{})
						w.pass(5 * time.Second)
						has[id+1] = w.got(id + 1)
					}
					w.pass(20 * time.Second)

					w.fail = func(Action) (Outcome, Class) { return tc.outcome, tc.class }
					w.noReads = tc.class
					began, calls := w.now, w.calls
					free := w.s.ENIs[0].count(Free)
					if free < w.s.Config.Floor {
						t.Fatalf("%d addresses are free before", free)
					}
					id := RequestID(pods)
					next := func() { id++; w.add(id, Pool{}) }
					for range free {
						next()
						has[id] = w.got(id) // at once
					}
					w.send(Released{At: w.now, Addr: has[1], When: w.now})
					delete(has, 1)
					next() // waits for the cooldown of what was released
					w.pass(w.s.Config.Cooldown + time.Second)
					has[id] = w.got(id)

					for w.now.Sub(began) < 6*time.Minute {
						next()
						w.pass(tc.fails + time.Second)
						r, ok := w.replies[id]
						if !ok || r.Err == nil || r.Err.Kind != tc.kind || !strings.Contains(r.Err.Error(), tc.says) {
							t.Fatalf("%s into the outage an ADD ends with %+v", w.now.Sub(began), r)
						}
					}
					if n := w.calls - calls; n > 120 {
						t.Errorf("%d calls while EC2 is away for %s", n, w.now.Sub(began))
					}
					if len(w.reports) > 0 {
						t.Errorf("addresses of pods are reported as lost: %+v", w.reports)
					}
					for id, a := range has {
						if at, _ := w.s.Lookup(a); at == nil || at.State != Bound || at.Owner != fmt.Sprintf("c%d/eth0", id) {
							t.Errorf("pod %d had %s, which is now %+v", id, a, at)
						}
					}

					w.fail, w.noReads = nil, ClassOther
					back := w.now
					for {
						next()
						for w.now.Sub(back) < tc.back {
							if _, ended := w.replies[id]; ended {
								break
							}
							w.pass(100 * time.Millisecond)
						}
						r := w.replies[id]
						if r.Err == nil && r.Addr.IsValid() {
							break
						}
						if w.now.Sub(back) >= tc.back {
							t.Fatalf("%s after EC2 is back an ADD ends with %+v", w.now.Sub(back), r)
						}
						w.pass(time.Second) // the runtime tries again
					}
					t.Logf("%d calls in %s; served %s after the end", w.calls-calls, back.Sub(began), w.now.Sub(back))
				})
			}
		}
	}
}
