package datapath

import (
	"errors"
	"fmt"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	"github.com/underlay-cni/underlay/internal/testenv"
)

// Every variant of the programs passes the verifier: what constants switch off
// is not even looked at in the others.
func TestVerifierTakesEveryVariant(t *testing.T) {
	testenv.Require(t, "root", "bpf")
	for v := range 8 {
		constants := map[string]any{
			bpfgen.NodeVarImdsAllowed: uint32(v & 1), bpfgen.NodeVarDirectEnabled: uint32(v >> 1 & 1), bpfgen.NodeVarIpv6Allowed: uint32(v >> 2),
		}
		t.Run(fmt.Sprint(constants), func(t *testing.T) {
			spec, err := bpfgen.LoadNode()
			if err != nil {
				t.Fatal(err)
			}
			setConstants(t, spec, constants)
			for _, m := range spec.Maps {
				m.Pinning = ebpf.PinNone
			}
			c, err := ebpf.NewCollection(spec)
			var refused *ebpf.VerifierError
			if errors.As(err, &refused) {
				t.Fatalf("%+v", refused)
			}
			if err != nil {
				t.Fatal(err)
			}
			for name, p := range c.Programs {
				info, err := p.Info()
				if err != nil {
					t.Fatal(err)
				}
				n, _ := info.VerifiedInstructions()
				t.Logf("%s: %d instructions looked at", name, n)
			}
			c.Close()
		})
	}
}
