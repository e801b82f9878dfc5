//go:build planted

package fabric

import (
	"bytes"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// Fault is one that a test plants in a lab's fabric, to see it caught. The tag
// "planted" builds it in, which no command is built with.
type Fault struct {
	Object []byte        // programs instead of the fabric's own, nil: those
	Config func(*Config) // what befalls each Config on its way to the kernel, may be nil
}

var planted sync.Map // Fault by name of the lab

// Plant builds a fault into the fabric of a lab, before it is opened.
func Plant(lab string, f Fault) { planted.Store(lab, f) }

func faultOf(lab string) Fault {
	f, _ := planted.Load(lab)
	fault, _ := f.(Fault)
	return fault
}

func loadSpec(lab string) (*ebpf.CollectionSpec, error) {
	if object := faultOf(lab).Object; object != nil {
		return ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	}
	return bpfgen.LoadFabric()
}

func faulty(lab string, c Config) Config {
	if change := faultOf(lab).Config; change != nil {
		change(&c)
	}
	return c
}
