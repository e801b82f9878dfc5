package fabric

import (
	"errors"
	"fmt"
	"math"

	"github.com/cilium/ebpf"

	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// setConntrack writes the allowance into programs that are not loaded yet.
func (o Options) setConntrack(spec *ebpf.CollectionSpec) error {
	if o.ConntrackAllowance < 0 || o.ConntrackAllowance > math.MaxInt32 {
		return fmt.Errorf("an instance cannot track %d flows at most; give a number above 0, or 0 for any", o.ConntrackAllowance)
	}
	if err := spec.Variables[bpfgen.FabricVarConntrackAllowance].Set(int64(o.ConntrackAllowance)); err != nil {
		return fmt.Errorf("set %s: %w", bpfgen.FabricVarConntrackAllowance, err)
	}
	return nil
}

// RefillAllowances counts what instances track, and so gives back what has
// ended. It is to be called after ExpireFlows, as what is expired counts until it
// is removed. Without an allowance it does nothing.
func (f *Fabric) RefillAllowances() error {
	f.life.RLock()
	defer f.life.RUnlock()
	if f.objs.Flows == nil {
		return errors.New("refill allowances: the fabric is closed")
	}
	if f.allowance == 0 {
		return nil
	}
	var enis map[uint32]bpfgen.FabricEni
	if err := readMap(f.objs.Enis, &enis); err != nil {
		return err
	}
	left := map[uint64]int64{}
	for _, e := range enis {
		left[e.Guest] = int64(f.allowance)
	}
	if err := eachFlow(f.objs.Flows, func(k bpfgen.FabricFlowKey, v bpfgen.FabricFlow) error {
		if e, ok := enis[k.Ifindex]; ok && v.Version == 0 {
			left[e.Guest]--
		}
		return nil
	}); err != nil {
		return err
	}
	var before map[uint64]int64
	if err := readMap(f.objs.Allowances, &before); err != nil {
		return err
	}
	for guest := range before {
		if _, there := left[guest]; there {
			continue
		}
		if err := f.objs.Allowances.Delete(guest); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("forget the allowance of an instance that is gone: %w", err)
		}
	}
	for guest, n := range left {
		if err := f.objs.Allowances.Put(guest, n); err != nil {
			return fmt.Errorf("refill an allowance: %w", err)
		}
	}
	return nil
}

// available returns how many more flows a guest may track, nil if any number.
func (f *Fabric) available(guest uint64) *int64 {
	if f.allowance == 0 {
		return nil
	}
	n := int64(f.allowance)
	var left int64
	if f.objs.Allowances.Lookup(guest, &left) == nil {
		n = max(0, left)
	}
	return &n
}
