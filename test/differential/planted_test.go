//go:build !planted

package differential

import (
	"os"
	"os/exec"
	"regexp"
	"testing"

	"github.com/underlay-cni/underlay/internal/testenv"
)

// Faults that are built into the fabric's programs and the compiler of its rules
// are all caught. They need the tag planted, with which no command is built.
func TestPlantedFaultsAreCaught(t *testing.T) {
	testenv.Require(t, "root", "bpf", "clang")
	cmd := exec.Command("go", "test", "-count=1", "-vet=off", "-tags", "planted", "-parallel", "4", "-run", "^TestFaults$", "-v", ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, tail(string(out), 8000))
	}
	caught := regexp.MustCompile(`(?m)^.*caught by packet .*$`).FindAllString(string(out), -1)
	for _, line := range caught {
		t.Log(line)
	}
	if len(caught) < 20 {
		t.Errorf("%d faults were caught, of at least 20", len(caught))
	}
}
