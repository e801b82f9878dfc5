package ipam

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// account is the token buckets that all nodes share: EC2's 5 per second for
// each mutating action, empty at the start.
type account struct {
	tokens  [callKinds]float64
	last    [callKinds]time.Time
	allowed [callKinds]int
	refused int
}

const (
	refill = 5 // tokens per second
	burst  = 50
)

func (a *account) take(k CallKind, now time.Time) bool {
	if a.last[k].IsZero() {
		a.last[k] = epoch
	}
	a.tokens[k] = min(burst, a.tokens[k]+now.Sub(a.last[k]).Seconds()*refill)
	a.last[k] = now
	if a.tokens[k] < 1 {
		a.refused++
		return false
	}
	a.tokens[k]--
	a.allowed[k]++
	return true
}

func kindOfAction(a Action) CallKind {
	switch a.(type) {
	case AssignAddresses, AssignPrefixes:
		return CallAssign
	case Unassign:
		return CallUnassign
	case CreateENI:
		return CallCreate
	case AttachENI:
		return CallAttach
	case SetDeleteOnTermination:
		return CallKeep
	}
	return CallDelete
}

// runTogether lets the worlds' time pass, in one order of events, until all
// have answered every request; it returns when that was.
func runTogether(t *testing.T, worlds []*world, requests int) time.Duration {
	t.Helper()
	now := epoch
	for {
		var first *world
		var at time.Time
		waits := false
		for _, w := range worlds {
			waits = waits || len(w.replies) < requests
			if n, ok := w.next(); ok && (first == nil || n.Before(at)) {
				first, at = w, n
			}
		}
		if !waits {
			return now.Sub(epoch)
		}
		if at.Sub(epoch) > 10*time.Minute {
			t.Fatal("requests wait for ever")
		}
		now = at
		first.step(at)
	}
}

// The minimum is the tokens that the busiest action needs, and after the last
// of them what one node alone waits for: the call itself, attachment, IMDS.
func TestTwentyNodesShareEmptyBuckets(t *testing.T) {
	const nodes, pods = 20, 230
	for seed := range uint64(3) {
		for _, prefixes := range []bool{false, true} {
			t.Run(fmt.Sprintf("seed %d prefixes %t", seed, prefixes), func(t *testing.T) {
				acct := &account{}
				node := func(i uint64) *world {
					w := newWorld(t, "m6i.4xlarge", seed*nodes+i)
					w.s.Config.Seed = rand.New(rand.NewPCG(seed, i)).Uint64()
					w.s.Config.Prefixes = prefixes
					w.free = 100_000
					w.fail = func(a Action) (Outcome, Class) {
						if acct.take(kindOfAction(a), w.now) {
							return Done, ClassOther
						}
						return Refused, ClassThrottled
					}
					w.start()
					for id := range RequestID(pods) {
						w.add(id+1, Pool{})
					}
					return w
				}
				one := node(nodes)
				one.fail = nil
				alone := runTogether(t, []*world{one}, pods)
				var worlds []*world
				for i := range uint64(nodes) {
					worlds = append(worlds, node(i))
				}
				took := runTogether(t, worlds, pods)
				most := 0
				for k := range acct.allowed {
					most = max(most, acct.allowed[k])
				}
				for _, w := range worlds {
					for id := range RequestID(pods) {
						w.got(id + 1)
					}
				}
				least := time.Duration(float64(most)/refill*float64(time.Second)) + alone
				t.Logf("took %s, buckets and latencies allow %s, ratio %.2f; calls %v, %d refused", took, least, took.Seconds()/least.Seconds(), acct.allowed, acct.refused)
				if took > least*6/5 {
					t.Errorf("took %s, 1.2 times what buckets and latencies allow is %s", took, least*6/5)
				}
			})
		}
	}
}
