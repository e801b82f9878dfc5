package planted

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// caught says how the model puts each fault.
var caught = map[string]string{
	"short_cooldown":   `tombstone of .* forgotten .* before the cooldown is over`,
	"blind_repeat":     `after one whose end is unknown, without a read between`,
	"shared_device":    `device index`,
	"new_token":        `is repeated with another token`,
	"no_tombstones":    `after its release, with its tombstone`,
	"no_records":       `in two hands|with its tombstone|unassign of .*, which pod`,
	"return_cooling":   `unassign of .* before its cooldown is over`,
	"partial_whole":    `handed out, which EC2 does not have`,
	"no_deadline":      `waits past its deadline|nothing wakes the plan`,
	"keep_ignored":     `before delete-on-termination`,
	"link_ignored":     `whose link is not ready`,
	"not_live":         `not yet live`,
	"forget_early":     `forgotten .* before the cooldown is over`,
	"orphan_leaked":    `is an orphan`,
	"two_mutations":    `in flight`,
	"floor_forgotten":  `the floor is`,
	"nothing_returned": `the floor is|it has no floor`,
	"stale_return":     `handed out, which EC2 does not have|handed out as on|not yet live`,
	"stale_evicts":     `in two hands|with its tombstone|tombstones are left|unassign of .* before its cooldown is over`,
	"imds_believed":    `handed out, which EC2 does not have|the type holds`,
	"pool_ignored":     `which carries .* to a pod of`,
	"linger_forgotten": `of the set .* is deleted .* after its last pod`,
	"sets_refused":     `is refused for want of an interface`,
	"drift_ignored":    `which carries .* to a pod of`,
	"delete_used":      `delete of .*, which pod\d+ uses|delete of .* before its cooldown is over`,
}

// TestPlantedBugsAreCaught builds each fault into ipam and has the model find
// it, in its own words.
func TestPlantedBugsAreCaught(t *testing.T) {
	if Bug != None {
		t.Fatal("a fault is planted already: run this without a planted_ tag")
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		tag := strings.TrimSuffix(f, ".go")
		if tag == "doc" || tag == "none" || tag == "planted_test" {
			continue
		}
		if caught[tag] == "" {
			t.Errorf("nobody says how %s is caught", tag)
		}
	}
	for tag, want := range caught {
		t.Run(tag, func(t *testing.T) {
			t.Parallel()
			// Coverage and the race detector have nothing to add here.
			cmd := exec.Command("go", "test", "-count=1", "-vet=off", "-failfast", "-tags", "planted_"+tag, "-run", "^TestModel", "..")
			cmd.Env = append(os.Environ(), "MODEL_DEPTH=5", "MODEL_WALKS=400", "CGO_ENABLED=0", "GOFLAGS=")
			out, err := cmd.CombinedOutput()
			if err == nil {
				t.Fatalf("the model finds nothing:\n%s", out)
			}
			said := regexp.MustCompile(`(?m)^.*explore_test\.go:\d+: model: (.*)$`).FindAllStringSubmatch(string(out), -1)
			if len(said) == 0 {
				t.Fatalf("no finding of the model: %v\n%.2000s", err, out)
			}
			for _, s := range said {
				if regexp.MustCompile(want).MatchString(s[1]) {
					t.Log(s[1])
					return
				}
			}
			t.Errorf("found something else than %q: %q", want, said)
		})
	}
}
