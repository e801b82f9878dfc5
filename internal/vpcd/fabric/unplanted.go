//go:build !planted

package fabric

import (
	"github.com/cilium/ebpf"

	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// loadSpec reads the programs. See planted.go.
func loadSpec(string) (*ebpf.CollectionSpec, error) { return bpfgen.LoadFabric() }

// faulty is what the Config of a lab is for the kernel. See planted.go.
func faulty(_ string, c Config) Config { return c }
