package policy_test

import (
	"os"
	"strconv"
	"testing"

	"github.com/underlay-cni/underlay/internal/policy"
	"github.com/underlay-cni/underlay/internal/policy/policytest"
)

// The tables that the compiler makes say what the reference evaluator says, rule
// for rule, in worlds made at random. POLICY_WORLDS says how many.
func TestTablesAgreeWithEvaluate(t *testing.T) {
	worlds := 80
	if s := os.Getenv("POLICY_WORLDS"); s != "" {
		worlds, _ = strconv.Atoi(s)
	}
	var allowed, denied, audited, untracked, named int
	for seed := range uint64(worlds) {
		w := policytest.New(seed)
		c := policy.NewCompiler(&w.Input)
		for i := range w.Endpoints {
			ep := &w.Endpoints[i]
			tables, err := c.Compile(ep)
			if err != nil {
				t.Fatalf("world %d: %v", seed, err)
			}
			rules := c.Rules()
			for n := range 60 {
				dir := policy.Direction(n % 2)
				f := w.Flow(ep, dir)
				want := policy.Evaluate(&w.Input, ep, dir, f)
				for g, got := range tables.Judge(dir, f) {
					j := policy.Judgement{Allow: got.Allow, Audit: got.Audit, Untracked: got.Untracked, Rule: rules.Name(got.Rule)}
					if j != want[g] {
						t.Fatalf("world %d, %s of %s/%s by %s:\n%+v\ntables:    %+v\nreference: %+v",
							seed, dir, ep.Namespace, ep.Name, policy.GateID(g), f, j, want[g])
					}
					switch {
					case got.Audit:
						audited++
					case got.Untracked:
						untracked++
					case !got.Allow:
						denied++
					case got.Rule > policy.RuleSelf:
						allowed++
					}
					if got.Rule > policy.RuleSelf {
						named++
					}
				}
			}
		}
	}
	t.Logf("%d verdicts by rules: %d allow (%d more untracked), %d deny, %d would deny", named, allowed, untracked, denied, audited)
	for _, n := range []int{allowed, denied, audited, untracked} {
		if n < named/200 {
			t.Error("a kind of verdict is too rare for the comparison to mean something")
		}
	}
}
