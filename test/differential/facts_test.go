package differential

import (
	"cmp"
	"slices"
	"strings"
	"testing"

	"github.com/underlay-cni/underlay/test/vpcmodel"
)

// Each fact's script gives the verdicts that it names on the fabric as well.
func TestFacts(t *testing.T) {
	_, facts, err := vpcmodel.Facts()
	if err != nil {
		t.Fatal(err)
	}
	var scripts []vpcmodel.Script
	var run []vpcmodel.Fact
	for _, f := range facts {
		if f.Script == nil {
			continue
		}
		script := slices.Concat(f.Base, f.Script)
		if lacks := Enforced.Lacks(script); lacks != "" {
			// No skip, of which nobody would hear: the ledger says what else
			// holds it, and something must.
			t.Logf("%s is not on packets, for want of %s: %s", f.Name, lacks, cmp.Or(strings.Join(f.Tests, ", "), f.Unheld, f.NotYet))
			if lacks != "IPv6" && f.Tests == nil && f.Unheld == "" && f.NotYet == "" {
				t.Errorf("nothing but the model holds %s; name a test in facts.txt, or say why there is none", f.Name)
			}
			continue
		}
		scripts, run = append(scripts, script), append(run, f)
	}
	outcomes, errs := newStand(t).runAll(scripts)
	for i, f := range run {
		t.Run(f.Name, func(t *testing.T) {
			if errs[i] != nil {
				t.Fatal(errs[i])
			}
			o := outcomes[i]
			for i, st := range o.script {
				if send, ok := st.(vpcmodel.Send); ok && !o.verdicts[i].Fits(send.Want) {
					t.Errorf("%q: the model says %s", st, o.verdicts[i])
				}
			}
			if len(o.mismatches()) > 0 {
				t.Errorf("%s\n%s", f.Sentence, o.report())
			}
		})
	}
}
