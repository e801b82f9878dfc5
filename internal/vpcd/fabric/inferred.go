package fabric

import (
	"fmt"
	"math"
	"time"

	"github.com/cilium/ebpf"

	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// Inferred is what AWS does not publish. The zero value of each stands for its
// default, which is our choice, not a fact.
type Inferred struct {
	TCPHandshake time.Duration // idle, until the answer to a SYN is acknowledged; default 60 s
	TCPClosed    time.Duration // idle, after a RST or a FIN of each side; default 10 s
	ICMP         time.Duration // idle, of a query; default 30 s
	Fragments    time.Duration // from the first of a datagram to the last; default 30 s, as Linux's own
	// ReceiverGroups makes a group in an egress rule mean the interface that
	// receives the packet. By default it means the one that has the destination,
	// also if the packet goes through a middlebox first.
	ReceiverGroups bool
}

// DefaultInferred are the defaults, as the programs have them.
var DefaultInferred = Inferred{TCPHandshake: time.Minute, TCPClosed: 10 * time.Second, ICMP: 30 * time.Second, Fragments: 30 * time.Second}

// Check tells whether Open will take the settings.
func (i Inferred) Check() error {
	for _, d := range []time.Duration{i.TCPHandshake, i.TCPClosed, i.ICMP, i.Fragments} {
		if d < 0 || d%time.Second != 0 || d/time.Second > math.MaxUint32 {
			return fmt.Errorf("the timeout %v is not a number of whole seconds above 0", d)
		}
	}
	return nil
}

// apply writes the settings into programs that are not loaded yet.
func (i Inferred) apply(spec *ebpf.CollectionSpec) error {
	if err := i.Check(); err != nil {
		return err
	}
	for _, s := range []struct {
		variable string
		value    time.Duration
	}{
		{bpfgen.FabricVarTcpHandshakeTimeout, i.TCPHandshake},
		{bpfgen.FabricVarTcpClosedTimeout, i.TCPClosed},
		{bpfgen.FabricVarIcmpTimeout, i.ICMP},
		{bpfgen.FabricVarFragmentTimeout, i.Fragments},
	} {
		if s.value == 0 {
			continue
		}
		if err := spec.Variables[s.variable].Set(uint32(s.value / time.Second)); err != nil {
			return fmt.Errorf("set %s: %w", s.variable, err)
		}
	}
	if i.ReceiverGroups {
		if err := spec.Variables[bpfgen.FabricVarEgressGroupsByAddress].Set(uint8(0)); err != nil {
			return fmt.Errorf("set %s: %w", bpfgen.FabricVarEgressGroupsByAddress, err)
		}
	}
	return nil
}
