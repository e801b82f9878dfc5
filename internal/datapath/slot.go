package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/cilium/ebpf"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	"github.com/underlay-cni/underlay/internal/nl"
)

// Slots number the host veths within 16 bits, 1 up: a packet's tc_index, which
// the kernel's stack leaves alone, tells whose a packet was when its source
// address is no longer the pod's. A slot belongs to an ifindex as long as that is
// reserved.

// slotOf returns the slot of a reserved ifindex, which is given one at first.
func (d *Datapath) slotOf(index int) (uint32, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if s, ok := d.slots[index]; ok {
		return s, nil
	}
	taken := make(map[uint32]bool, len(d.slots))
	for _, s := range d.slots {
		taken[s] = true
	}
	size := d.objs.Slots.MaxEntries()
	for range size {
		d.nextSlot = d.nextSlot%(size-1) + 1 // one that was left a moment ago comes late
		if !taken[d.nextSlot] {
			d.slots[index] = d.nextSlot
			return d.nextSlot, nil
		}
	}
	return 0, fmt.Errorf("the node has %d endpoints, more fit into no map", size-1)
}

// keepSlot is for an ifindex that had its slot before this process began.
func (d *Datapath) keepSlot(index int, slot uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if slot != 0 {
		d.slots[index] = slot
	}
}

// fillSlot makes the programs find the ifindex by its slot.
func (d *Datapath) fillSlot(slot, index uint32) error {
	if err := d.objs.Slots.Update(&slot, &index, ebpf.UpdateAny); err != nil {
		return fmt.Errorf("enter interface %d into the map of slots: %w", index, err)
	}
	return nil
}

// leaveSlot gives an ifindex's slot back; d.mu is held.
func (d *Datapath) leaveSlot(index int) {
	if slot, ok := d.slots[index]; ok {
		var none uint32
		_ = d.objs.Slots.Update(&slot, &none, ebpf.UpdateAny) // an array's element is always there
		delete(d.slots, index)
	}
}

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
// is its own, and its slot. The map with the wider values takes the place of the
// other in one step; the programs of the agent before go on with the one that
// they have.
func widenIfaces(dir string) error {
	spec, err := bpfgen.LoadNode()
	if err != nil {
		return fmt.Errorf("read the embedded BPF object: %w", err)
	}
	old, err := ebpf.LoadPinnedMap(filepath.Join(dir, bpfgen.NodeMapIfaces), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // there never was one
	}
	if err != nil {
		return fmt.Errorf("open the map of interfaces: %w", err)
	}
	defer old.Close()
	want := spec.Maps[bpfgen.NodeMapIfaces].Copy()
	if old.ValueSize() == want.ValueSize {
		return nil // done before a crash
	}
	want.Pinning = ebpf.PinNone
	wide, err := ebpf.NewMap(want)
	if err != nil {
		return fmt.Errorf("make the map of interfaces: %w", err)
	}
	defer wide.Close()
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
	return replacePin(dir, bpfgen.NodeMapIfaces, wide)
}
