package differential

import (
	"flag"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/test/vpcmodel"
)

var (
	flows  = flag.Int("flows", 6000, "packets of TestRandom, at least")
	seed   = flag.Uint64("seed", 1, "seed of the first world; 0 takes one by the clock, and prints it")
	replay = flag.String("replay", "", "script that TestReplay sends")
	tries  = flag.Int("tries", 200, "scripts that are tried to find a smaller one that differs")
)

// flowsPerWorld is how many packets share a world: to make one takes as long as
// to send thousands.
const flowsPerWorld = 400

// Model and fabric say the same of packets in worlds made up at random.
func TestRandom(t *testing.T) {
	s := newStand(t)
	first := *seed
	if first == 0 {
		first = uint64(time.Now().UnixNano())
	}
	if missing := Enforced.Missing(); missing != "" {
		t.Logf("left out, as the fabric does not enforce it: %s", missing)
	}
	counts, sent, worlds, noise, delivered := Counts{}, 0, 0, 0, 0
	for sent < *flows {
		var scripts []vpcmodel.Script
		for range min(atOnce, 1+(*flows-sent-1)/flowsPerWorld) {
			scripts = append(scripts, Generate(first+uint64(worlds+len(scripts)), Enforced, flowsPerWorld))
		}
		outcomes, errs := s.runAll(scripts)
		for i, o := range outcomes {
			world := first + uint64(worlds)
			if errs[i] != nil {
				t.Fatalf("world of -seed %d: %v", world, errs[i])
			}
			if bad := o.mismatches(); len(bad) > 0 {
				path := write(t, o)
				least := s.minimal(o, *tries)
				t.Fatalf("model and fabric differ in %d of %d packets of the world of -seed %d (whole: %s)\nsmallest script that shows it (-replay):\n%s",
					len(bad), len(o.verdicts), world, path, least.report())
			}
			for _, v := range o.verdicts {
				counts.Add(v)
				if v.Delivered() {
					delivered++
				}
			}
			sent, worlds, noise = sent+len(o.verdicts), worlds+1, noise+o.noise
		}
	}
	t.Logf("%d packets in %d worlds from -seed %d: %d delivered, %d dropped; %d frames of others\n%s", sent, worlds, first, delivered, sent-delivered, noise, counts)
	const least = 50
	if lacking := counts.Lacking(Enforced, least); len(lacking) > 0 && sent >= 38000 {
		t.Errorf("fewer than %d packets of these kinds: %q", least, lacking)
	} // a short run is not as even; TestGenerateTriesAll counts a long one
}

// write keeps the whole script of a world that differs.
func write(t *testing.T, o *outcome) string {
	path := filepath.Join(os.TempDir(), "underlay-differential.script")
	if err := os.WriteFile(path, []byte(o.report()), 0o600); err != nil {
		t.Log(err)
	}
	return path
}

// TestReplay sends a script that another run printed, and shows both verdicts.
func TestReplay(t *testing.T) {
	if *replay == "" {
		t.Skip("-replay names no script")
	}
	text, err := os.ReadFile(*replay)
	if err != nil {
		t.Fatal(err)
	}
	script, err := vpcmodel.Parse(string(text))
	if err != nil {
		t.Fatal(err)
	}
	s := newStand(t)
	o, err := s.run(script)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", o.report())
	if n := len(o.mismatches()); n > 0 {
		t.Errorf("%d packets differ; smallest script that shows it:\n%s", n, s.minimal(o, *tries).report())
	}
}

// all is more than Enforced, for tests of the generator.
var all = Features{Groups: true, Lists: true, ACLs: true, Tables: true, Peerings: true, Fragments: true, Exempt: true, Clock: true, Internet: true, NAT: true, IPv6: true}

// The same seed makes the same script, which the model has a place for.
func TestGenerate(t *testing.T) {
	for seed := range uint64(20) {
		a := Generate(seed, all, 200)
		if b := Generate(seed, all, 200); a.String() != b.String() {
			t.Fatalf("seed %d makes two scripts", seed)
		}
		if len(fit(a)) != len(a) {
			t.Errorf("seed %d: the model refuses %d statements", seed, len(a)-len(fit(a)))
		}
	}
}

// Over 38,000 packets of both families each kind of rule is tried often enough.
func TestGenerateTriesAll(t *testing.T) {
	counts, n := Counts{}, 0
	for seed := uint64(1); n < 38000; seed++ {
		verdicts, _, err := Generate(seed, all, flowsPerWorld).Run(vpcmodel.Defaults())
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range verdicts {
			counts.Add(v)
		}
		n += len(verdicts)
	}
	t.Logf("%d packets\n%s", n, counts)
	if lacking := counts.Lacking(all, 50); len(lacking) > 0 {
		t.Errorf("fewer than 50 packets of these kinds: %q", lacking)
	}
}

// Shrink finds the statements that matter.
func TestShrink(t *testing.T) {
	s := Generate(3, all, 200)
	// As if the fabric refused whatever e111 sends.
	differs := func(c vpcmodel.Script) bool {
		verdicts, _, err := c.Run(vpcmodel.Defaults())
		if err != nil {
			t.Fatal(err)
		}
		for i, v := range verdicts {
			if send := c[i].(vpcmodel.Send); send.From == "e111" && v.Delivered() {
				return true
			}
		}
		return false
	}
	if !differs(s) {
		t.Fatal("e111 sends nothing that arrives")
	}
	least := Shrink(s, 10000, differs)
	if len(least) > 20 || !differs(least) {
		t.Errorf("%d statements:\n%s", len(least), least)
	}
	sends := slices.DeleteFunc(slices.Clone(least), func(st vpcmodel.Statement) bool { _, ok := st.(vpcmodel.Send); return !ok })
	if len(sends) != 1 {
		t.Errorf("%d packets remain:\n%s", len(sends), least)
	}
}
