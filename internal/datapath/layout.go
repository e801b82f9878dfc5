package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	"github.com/underlay-cni/underlay/internal/nl"
)

// eniIndexOf is the inverse of Mark; 0 for none.
func eniIndexOf(mark uint32) int {
	for i := 1; i <= MaxENIIndex; i++ {
		if Mark(i) == mark&MarkMask {
			return i
		}
	}
	return 0
}

// ifaceOfLayout1 is a value of that map.
type ifaceOfLayout1 struct {
	Addr            bpfgen.NodeAddr
	PodMac, HostMac [6]uint8
	Mark, Flags     uint32
}

// widenIfaces is the way from layout 1 to 2: an interface's entry says which ENI
// is its own, and its slot. The programs of the agent before go on with the map that
// they have.
func widenIfaces(dir string) error {
	return widen(dir, bpfgen.NodeMapIfaces, func(old, wide *ebpf.Map) error {
		var index, slot uint32
		var v ifaceOfLayout1
		it := old.Iterate()
		for it.Next(&index, &v) {
			slot++
			w := bpfgen.NodeIface{Addr: v.Addr, PodMac: v.PodMac, HostMac: v.HostMac, Mark: v.Mark, Flags: v.Flags, Eni: uint32(eniIndexOf(v.Mark)), Slot: slot}
			if err := nl.AwaitMemory(func() error { return wide.Update(&index, &w, ebpf.UpdateAny) }); err != nil {
				return fmt.Errorf("copy interface %d: %w", index, err)
			}
		}
		if err := it.Err(); err != nil {
			return fmt.Errorf("read the map of interfaces: %w", err)
		}
		return nil
	})
}

// widen has a pinned map's entries copied into one whose values are as they are now,
// which takes the other's place in one step.
func widen(dir, name string, entries func(old, wide *ebpf.Map) error) error {
	spec, err := bpfgen.LoadNode()
	if err != nil {
		return fmt.Errorf("read the embedded BPF object: %w", err)
	}
	old, err := ebpf.LoadPinnedMap(filepath.Join(dir, name), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // there never was one
	}
	if err != nil {
		return fmt.Errorf("open map %s: %w", name, err)
	}
	defer old.Close()
	want := spec.Maps[name].Copy()
	if old.ValueSize() == want.ValueSize {
		return nil // done before a crash
	}
	want.Pinning = ebpf.PinNone
	wide, err := ebpf.NewMap(want)
	if err != nil {
		return fmt.Errorf("make map %s: %w", name, err)
	}
	defer wide.Close()
	if err := entries(old, wide); err != nil {
		return err
	}
	return replacePin(dir, name, wide)
}

// toLayout3 is the way from layout 2: a slot says all of its interface, a
// connection which it is. Open fills the slots from the interfaces; the programs of
// the agent before go on with the maps that they have.
func toLayout3(dir string) error {
	if err := os.Remove(filepath.Join(dir, bpfgen.NodeMapSlots)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the map of slots: %w", err)
	}
	return widenConns(dir)
}

// connOfLayout2 is a value of that map.
type connOfLayout2 struct {
	CreatedNs, LastNs    uint64
	Packets, Bytes       [2]uint64
	Ifindex              [2]uint32
	Verdict              [2][2]struct{ Rule, Epoch uint32 }
	TimeoutS, EniIfindex uint32
	TcpFlags             [2]uint8
	Opener, Provenance   uint8
	State                uint8
	Judged, Allowed      [2]uint8
	Audit                [2]uint8
	Flags, Seen          uint8
	_                    [3]uint8
	Generation, _        uint32
}

// widenConns makes connections say which they are, as layout 3 has it. What the
// programs of the agent before count until they are exchanged, well within a second,
// is not carried over; what they begin meanwhile is taken up as begun before.
func widenConns(dir string) error {
	return widen(dir, bpfgen.NodeMapConns, func(old, wide *ebpf.Map) error {
		for batch, err := range connBatches[connOfLayout2](old) {
			if err != nil {
				return err
			}
			values := make([]bpfgen.NodeConn, len(batch.keys))
			for i := range values {
				values[i] = batch.values[i].widen(batch.keys[i])
			}
			if err := nl.AwaitMemory(func() error { _, err := wide.BatchUpdate(batch.keys, values, nil); return err }); err != nil {
				return fmt.Errorf("copy connections: %w", err)
			}
		}
		return nil
	})
}

func (v *connOfLayout2) widen(k bpfgen.NodeConnKey) bpfgen.NodeConn {
	w := bpfgen.NodeConn{
		Key: k, CreatedNs: v.CreatedNs, LastNs: v.LastNs, Packets: v.Packets, Bytes: v.Bytes, Ifindex: v.Ifindex,
		TimeoutS: v.TimeoutS, EniIfindex: v.EniIfindex, TcpFlags: v.TcpFlags, Audit: v.Audit, State: v.State, Seen: v.Seen,
		Generation: v.Generation,
	}
	w.Gates.Opener, w.Gates.Provenance, w.Gates.Flags = v.Opener, v.Provenance, v.Flags
	w.Gates.Judged, w.Gates.Allowed = v.Judged, v.Allowed
	for end := range v.Verdict {
		for g, verdict := range v.Verdict[end] {
			w.Verdict[end][g].Rule, w.Verdict[end][g].Epoch = verdict.Rule, verdict.Epoch
		}
	}
	return w
}
