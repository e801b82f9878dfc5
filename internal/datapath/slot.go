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

// Slots number the host veths within 16 bits, 1 up: a packet's tc_index, which
// the kernel's stack leaves alone, tells whose a packet was when its source
// address is no longer the pod's; and flows keep them, since an array is read
// faster than a hash table. A slot belongs to an ifindex as long as that is
// reserved.

// slotOf returns the slot of a reserved ifindex, which is given one at first.
func (d *Datapath) slotOf(index int) (slot uint32, fresh bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if s, ok := d.slots[index]; ok {
		return s, false, nil
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
			return d.nextSlot, true, nil
		}
	}
	return 0, false, fmt.Errorf("the node has %d endpoints, more fit into no map", size-1)
}

// keepSlot is for an ifindex that had its slot before this process began.
func (d *Datapath) keepSlot(index int, slot uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if slot != 0 {
		d.slots[index] = slot
	}
}

// fillSlot makes the programs find the interface by its slot.
func (d *Datapath) fillSlot(index uint32, v *bpfgen.NodeIface) error {
	if err := d.objs.Slots.Update(&v.Slot, &bpfgen.NodeSlot{Iface: *v, Ifindex: index}, ebpf.UpdateAny); err != nil {
		return fmt.Errorf("enter interface %d into the map of slots: %w", index, err)
	}
	return nil
}

// leaveSlot gives an ifindex's slot back; d.mu is held.
func (d *Datapath) leaveSlot(index int) {
	if slot, ok := d.slots[index]; ok {
		var none bpfgen.NodeSlot
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

// widenSlots is the way from layout 2 to 3: a slot says all of its interface.
// Open fills them from the interfaces; the programs of the agent before go on with
// the map that they have.
func widenSlots(dir string) error {
	if err := os.Remove(filepath.Join(dir, bpfgen.NodeMapSlots)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the map of slots: %w", err)
	}
	return nil
}
