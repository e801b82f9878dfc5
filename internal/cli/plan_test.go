package cli

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/underlay-cni/underlay/internal/plan"
)

func TestPlan(t *testing.T) {
	for _, c := range []struct {
		golden string
		args   string
		code   int
	}{
		{"plan-type.txt", "type m5.large p5.48xlarge dl1.24xlarge", 0},
		{"plan-fit.txt", "fit --nodes 20 --pods 300 --type m5.large --subnet 10.0.0.0/24,10.0.1.0/24", 0},
		{"plan-nofit.txt", "fit --nodes 20 --pods 500 --type m5.large --subnet 10.0.0.0/24 --subnet 10.0.1.0/24=20 --reserve 8", 1},
		{"plan-prefixes.txt", "fit --nodes 3 --pods 45 --prefixes --subnet 10.0.0.0/26", 1},
	} {
		a, out, errOut := testApp(t.TempDir())
		if code := a.Run(t.Context(), append([]string{"plan"}, strings.Fields(c.args)...)); code != c.code || errOut.Len() > 0 {
			t.Errorf("%s: exit code %d, want %d: %s", c.args, code, c.code, errOut)
		}
		golden(t, c.golden, out.String())
	}
}

func TestPlanJSON(t *testing.T) {
	a, out, _ := testApp(t.TempDir())
	code := a.Run(t.Context(), strings.Fields("plan fit --nodes 20 --pods 500 --subnet 10.0.0.0/24,10.0.1.0/24 -o json"))
	var f plan.Fit
	if err := json.Unmarshal(out.Bytes(), &f); err != nil || code != 1 || f.Fits || f.Underlay.Addresses != 580 || len(f.Remedies) == 0 {
		t.Errorf("exit code %d, %v: %s", code, err, out)
	}
}

func TestPlanSaysWhatIsWrong(t *testing.T) {
	for args, want := range map[string]string{
		"type":                                      "underlay plan type m5.large",
		"type m5.lrge":                              "did you mean m5.large",
		"type t2.medium --prefixes":                 "need a Nitro type",
		"fit --subnet 10.0.0.0/24":                  "--nodes 1 to",
		"fit --nodes 1":                             "--subnet 10.0.0.0/20",
		"fit --nodes 1 --subnet 10.0.0.5/24":        "use 10.0.0.0/24",
		"fit --nodes 1 --subnet here":               "is no CIDR",
		"fit --nodes 1 --subnet 10.0.0.0/24=many":   "no count of addresses",
		"fit --nodes 1 --subnet 10.0.0.0/24=252":    "it has 251",
		"fit --nodes 1 --subnet 10.0.0.0/24 extra":  "unknown command",
		"fit --nodes 1 --subnet 10.0.0.0/24 --pots": "see: underlay plan fit --help",
	} {
		a, out, errOut := testApp(t.TempDir())
		if code := a.Run(t.Context(), append([]string{"plan"}, strings.Fields(args)...)); code != 1 || out.Len() > 0 || !strings.Contains(errOut.String(), want) {
			t.Errorf("plan %s: exit code %d, %q is not in %q (stdout %q)", args, code, want, errOut, out)
		}
	}
}
