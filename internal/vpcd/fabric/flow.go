package fabric

import (
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// flowBatch is how many flows one system call reads. It must hold the longest
// chain of the hash table.
const flowBatch = 4096

// eachFlow calls fn with every flow that is in the map, and some that come or
// go meanwhile.
func eachFlow[K any](m *ebpf.Map, fn func(k K, v bpfgen.FabricFlow) error) error {
	keys := make([]K, flowBatch)
	values := make([]bpfgen.FabricFlow, flowBatch)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		last := errors.Is(err, ebpf.ErrKeyNotExist)
		if err != nil && !last {
			return fmt.Errorf("read flows: %w", err)
		}
		for i := range n {
			if err := fn(keys[i], values[i]); err != nil {
				return err
			}
		}
		if last {
			return nil
		}
	}
}

// ExpireFlows removes the tracked flows that have been idle for too long, to
// make room for others, and returns how many. Nothing else depends on it: the
// programs take no expired flow for a live one.
func (f *Fabric) ExpireFlows() (int, error) {
	f.life.RLock()
	defer f.life.RUnlock()
	if f.objs.Flows == nil {
		return 0, errors.New("expire flows: the fabric is closed")
	}
	now, err := f.now()
	if err != nil {
		return 0, err
	}
	removed, err := expireFlows[bpfgen.FabricFlowKey](f.objs.Flows, now)
	if err != nil {
		return removed, err
	}
	removed6, err := expireFlows[bpfgen.FabricFlowKey6](f.objs.Flows6, now)
	return removed + removed6, err
}

func expireFlows[K any](m *ebpf.Map, now uint64) (removed int, err error) {
	var expired []K
	err = eachFlow(m, func(k K, v bpfgen.FabricFlow) error {
		if v.Expires <= now {
			expired = append(expired, k)
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	for _, k := range expired {
		var v bpfgen.FabricFlow
		err := m.LookupAndDelete(k, &v)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			continue
		}
		if err != nil {
			return removed, fmt.Errorf("expire flow: %w", err)
		}
		if v.Expires <= now {
			removed++
			continue
		}
		// The same tuple has begun anew in between: put it back, unless it has
		// done that once more.
		if err := m.Update(k, v, ebpf.UpdateNoExist); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			return removed, fmt.Errorf("expire flow: %w", err)
		}
	}
	return removed, nil
}

// purgeFlows removes the flows of interfaces that are gone, so that whoever
// gets their ifindex does not get them too.
func (f *Fabric) purgeFlows(live map[uint32]bool) error {
	return errors.Join(
		purgeFlows(f.objs.Flows, func(k bpfgen.FabricFlowKey) bool { return !live[k.Ifindex] }),
		purgeFlows(f.objs.Flows6, func(k bpfgen.FabricFlowKey6) bool { return !live[k.Ifindex] }),
	)
}

func purgeFlows[K any](m *ebpf.Map, dead func(K) bool) error {
	var gone []K
	err := eachFlow(m, func(k K, _ bpfgen.FabricFlow) error {
		if dead(k) {
			gone = append(gone, k)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, k := range gone {
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove flow of an interface that is gone: %w", err)
		}
	}
	return nil
}

// now is the programs' clock, in ns.
func (f *Fabric) now() (uint64, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &t); err != nil {
		return 0, fmt.Errorf("read clock: %w", err)
	}
	var offset uint64
	if err := f.objs.ClockOffset.Get(&offset); err != nil {
		return 0, fmt.Errorf("read clock: %w", err)
	}
	return uint64(t.Nano()) + offset, nil
}

// advance moves the programs' clock on. Only tests do.
func (f *Fabric) advance(d time.Duration) error {
	var offset uint64
	if err := f.objs.ClockOffset.Get(&offset); err != nil {
		return err
	}
	return f.objs.ClockOffset.Set(offset + uint64(d))
}
