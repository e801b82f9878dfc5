package datapath

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	"github.com/underlay-cni/underlay/internal/nl"
)

// recover makes the kernel agree with the records: live endpoints are whole
// and run this process's programs, what was being added is undone, and
// whatever else bears our signs is removed. The records decide, not the
// history: it does not matter where the process before was stopped.
func (d *Datapath) recover() error {
	records, err := d.readRecords()
	if err != nil {
		return err
	}
	links, err := d.conn.Links()
	if err != nil {
		return err
	}
	byName := map[string]nl.Link{}
	for _, l := range links {
		if ourGroup(l.Group) && strings.HasPrefix(l.Name, "ul") {
			byName[l.Name] = l
		}
	}

	// Ifindexes are taken from a random place on, so that one that was
	// released a moment ago is not taken again at once.
	d.next = firstIndex + rand.IntN(lastIndex-firstIndex)
	keep := map[string]*Endpoint{} // by host interface
	var errs []error
	for _, e := range records {
		switch e.State {
		case Live:
			d.byKey[e.key()] = e.Addr
			d.indexes[e.HostIfIndex] = e.key()
			l, ok := byName[e.HostIfName]
			if !ok || l.Index != e.HostIfIndex {
				d.log.Warn("endpoint has lost its link, as when its network namespace went: it waits for DEL", "ip", e.Addr, "pod", e.PodNamespace+"/"+e.PodName, "link", e.HostIfName)
				continue
			}
			keep[e.HostIfName] = &e
			if err := d.restore(&e, l); err != nil {
				errs = append(errs, fmt.Errorf("restore %s: %w", e.String(), err))
			}
		case Tombstone:
			if old, ok := d.tombs[e.key()]; !ok || records[old].Released.Before(e.Released) {
				d.tombs[e.key()] = e.Addr
			}
		case Adding:
			// An endpoint that is live under the same name is another
			// attempt's, and has the device.
			_, ours := byName[e.HostIfName]
			if addr, ok := liveOf(records, e.key()); ok {
				d.log.Warn("half-made endpoint of a container that has another", "ip", e.Addr, "other", addr)
				ours = false
			}
			err := d.dismantle(&e, ours)
			if err == nil {
				err = d.erase(&e)
			}
			if err != nil {
				d.byKey[e.key()] = e.Addr // for Delete to find
				errs = append(errs, fmt.Errorf("undo the half-made %s: %w", e.String(), err))
				continue
			}
			d.log.Info("half-made endpoint undone", "ip", e.Addr, "pod", e.PodNamespace+"/"+e.PodName)
		default:
			errs = append(errs, fmt.Errorf("the record of %s has %s, which this agent does not know", e.Addr, e.State))
		}
	}
	errs = append(errs, d.sweep(keep, byName))
	return errors.Join(errs...)
}

func liveOf[K comparable](records map[K]Endpoint, k key) (addr K, ok bool) {
	for a, e := range records {
		if e.State == Live && e.key() == k {
			return a, true
		}
	}
	return addr, false
}

// restore makes a live endpoint whole. This process's programs take the place
// of an earlier one's, so that no packet misses them; of another kind of hook,
// they are taken off last.
func (d *Datapath) restore(e *Endpoint, l nl.Link) error {
	var v bpfgen.NodeIface
	index := uint32(e.HostIfIndex)
	err := d.objs.Ifaces.Lookup(&index, &v)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("look up interface %d: %w", index, err)
	}
	if err == nil {
		d.keepSlot(e.HostIfIndex, v.Slot)
		if err := d.fillSlot(index, &v); err != nil {
			return err
		}
	}
	if err != nil || v.Flags&uint32(bpfgen.NodeIfaceFlagsIFACE_READY) == 0 || v.Addr != addrKey(e.Addr) {
		d.log.Warn("interface was not in the map, restored", "ip", e.Addr, "link", e.HostIfName)
		if err := d.putIface(e, uint32(bpfgen.NodeIfaceFlagsIFACE_READY)); err != nil {
			return err
		}
	}
	if err := d.reattach(e); err != nil {
		return err
	}
	var b nl.Batch
	if !l.Up {
		b.LinkUp(e.HostIfIndex)
	}
	b.NeighSet(e.HostIfIndex, e.Addr, e.MAC)
	b.RouteSet(podRoute(e))
	return d.conn.Exec(&b)
}

// sweep removes devices, map entries, routes and pins that no live endpoint
// stands behind.
func (d *Datapath) sweep(keep map[string]*Endpoint, links map[string]nl.Link) error {
	var errs []error
	wanted := map[uint32]bool{}
	for _, e := range keep {
		wanted[uint32(e.HostIfIndex)] = true
	}

	var index uint32
	var v bpfgen.NodeIface
	unwanted := map[uint32]bpfgen.NodeIface{}
	it := d.objs.Ifaces.Iterate()
	for it.Next(&index, &v) {
		if !wanted[index] {
			unwanted[index] = v
		}
	}
	errs = append(errs, it.Err())
	for index, v := range unwanted {
		errs = append(errs, d.removeIface(index, v))
	}

	errs = append(errs, d.recoverPolicies(wanted))

	routes, err := d.conn.Routes(PodTable)
	errs = append(errs, err)
	var b nl.Batch
	for _, r := range routes {
		if r.Protocol == Protocol && !wanted[uint32(r.Index)] {
			b.RouteDelete(r)
			b.Tolerate(unix.ESRCH, unix.ENODEV)
		}
	}
	errs = append(errs, d.conn.Exec(&b))

	var gone []string
	for name := range links {
		if keep[name] == nil {
			gone = append(gone, name)
			d.log.Info("link without an endpoint deleted", "link", name)
		}
	}
	errs = append(errs, d.deleteLinks(gone))

	pins, err := pinNames(linkDir(d.opts.BPFFS))
	errs = append(errs, err)
	for _, pin := range pins {
		name, _, ok := strings.Cut(pin, "_")
		if ok && keep[name] != nil || strings.HasSuffix(pin, "_eni") {
			continue // an ENI's: SetENIs knows
		}
		if err := os.Remove(filepath.Join(linkDir(d.opts.BPFFS), pin)); err != nil {
			errs = append(errs, fmt.Errorf("remove pin: %w", err))
		}
	}

	var stale []uint32
	var perCPU []bpfgen.NodeIfaceCounters
	stats := d.objs.IfaceStats.Iterate()
	for stats.Next(&index, &perCPU) {
		if !wanted[index] {
			stale = append(stale, index)
		}
	}
	errs = append(errs, stats.Err())
	for _, index := range stale {
		if err := d.objs.IfaceStats.Delete(&index); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("remove the counters of interface %d: %w", index, err))
		}
	}
	return errors.Join(errs...)
}
