package datapath

import (
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
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
