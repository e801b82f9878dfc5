package upstream

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const small = `# what is done
floor nftables 2

run
  [sig-network] DNS should answer [Conformance]
  [sig-network] Services should serve

run with iptables: route_localnet is iptables mode's
  [sig-network] LocalhostNodePorts should work

skip: there is no cloud
  [sig-network] LoadBalancers should balance
`

func parse(t *testing.T, text string) *Ledger {
	t.Helper()
	l, err := ParseLedger(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestLedger(t *testing.T) {
	l := parse(t, small)
	want := &Ledger{
		Floor: map[string]int{"nftables": 2},
		Specs: []Spec{
			{Name: "[sig-network] DNS should answer [Conformance]"},
			{Name: "[sig-network] Services should serve"},
			{Name: "[sig-network] LocalhostNodePorts should work", Only: "iptables", Reason: "route_localnet is iptables mode's"},
			{Name: "[sig-network] LoadBalancers should balance", Skip: "there is no cloud"},
		},
	}
	if diff := cmp.Diff(want, l); diff != "" {
		t.Error(diff)
	}
	if got := l.ToRun("nftables"); len(got) != 2 {
		t.Errorf("nftables runs %q", got)
	}
	if got := l.ToRun("iptables"); len(got) != 3 {
		t.Errorf("iptables runs %q", got)
	}
}

func TestLedgerRefuses(t *testing.T) {
	for name, tc := range map[string]struct{ text, want string }{
		"nothing":          {"# empty\n", "lists no spec"},
		"a spec first":     {"  [sig-network] a\n", "line 1: a spec before the first heading"},
		"twice":            {"run\n  a\nskip: why\n  a\n", "line 4: a stands in line 2 already"},
		"no reason":        {"skip:\n  a\n", `line 1: "skip:" is no heading`},
		"no reason either": {"run with iptables\n  a\n", "is no heading"},
		"an unknown word":  {"runs\n  a\n", "is no heading"},
		"a floor of zero":  {"floor nftables 0\nrun\n  a\n", "give a number of specs"},
		"a floor of words": {"floor nftables many\nrun\n  a\n", "give a number of specs"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseLedger(strings.NewReader(tc.text))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

func TestCheckNamesWhatIsOnOneSideAlone(t *testing.T) {
	l := parse(t, small)
	names := []string{"[sig-network] DNS should answer [Conformance]", "[sig-network] Services should serve", "[sig-network] LocalhostNodePorts should work", "[sig-network] LoadBalancers should balance"}
	if err := l.Check(names); err != nil {
		t.Errorf("the same on both sides: %v", err)
	}
	names[1] = "[sig-network] Services should serve quickly"
	err := l.Check(names)
	for _, want := range []string{"neither run nor skipped: [sig-network] Services should serve quickly;", "listed and not there: [sig-network] Services should serve;"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q in it", err, want)
		}
	}
}

func TestSummary(t *testing.T) {
	l := parse(t, small)
	names := l.ToRun("nftables")
	passed := func(name string) Result { return Result{Name: name, State: "passed"} }
	for name, tc := range map[string]struct {
		names   []string
		results []Result
		want    []string // in the error; none: there is none
	}{
		"all pass":     {names, []Result{passed(names[0]), passed(names[1])}, nil},
		"one fails":    {names, []Result{passed(names[0]), {Name: names[1], State: "failed", Message: "no answer"}}, []string{"failed: " + names[1] + ": no answer"}},
		"skips itself": {names, []Result{passed(names[0]), {Name: names[1], State: "skipped", Message: "one node"}}, []string{"skipped itself: " + names[1], "1 specs were executed, the ledger's floor is 2"}},
		"is cut short": {names, []Result{passed(names[0])}, []string{"never finished: " + names[1], "the ledger's floor is 2"}},
		"a part":       {names[:1], []Result{passed(names[0])}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			s := l.Summarize("nftables", tc.names, tc.results)
			err := s.Err()
			if len(tc.want) == 0 && err != nil {
				t.Errorf("got %v", err)
			}
			for _, want := range tc.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("got %v, want %q in it", err, want)
				}
			}
			var out strings.Builder
			s.Write(&out)
			for _, want := range []string{"LoadBalancers", "there is no cloud", "with iptables only: route_localnet"} {
				if !strings.Contains(out.String(), want) {
					t.Errorf("no %q in\n%s", want, out.String())
				}
			}
		})
	}
}

func TestArea(t *testing.T) {
	for name, want := range map[string]string{
		"[sig-network] DNS should provide DNS for services [Conformance]":                                                   "DNS",
		"[sig-network] Networking Granular Checks: Pods should function for intra-pod communication: http [Conformance]":    "Networking Granular",
		"[sig-network] LoadBalancers ExternalTrafficPolicy: Local [Feature:LoadBalancer] should work from pods [Slow]":      "LoadBalancers",
		"[sig-network] [Feature:IPv6DualStack] should have at least one dual-stack node":                                    "IPv6DualStack",
		"[sig-network] Netpol [LinuxOnly] NetworkPolicy between server and client using UDP should enforce policy on Ports": "Netpol NetworkPolicy",
	} {
		if got := area(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}
