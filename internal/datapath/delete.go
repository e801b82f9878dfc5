package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	"github.com/underlay-cni/underlay/internal/nl"
)

// Delete turns an endpoint into a tombstone, with the time of its release, and
// sees to it that everything else of it goes. When it returns, nothing passes
// the endpoint and no route leads to it; its device, of which the kernel takes
// its time to let go, follows within some 150 ms (see reapDelay), or at the
// next Open. The tombstone keeps the address from being
// used until Forget. It returns the tombstone, also if it was one before, and
// also with an error: then the address is released but something is left,
// which Delete again, or Open, removes. ErrNotFound: nothing is known of that
// container and interface.
//
// A network namespace or device that has vanished by itself is no error.
func (d *Datapath) Delete(ctx context.Context, containerID, ifName string) (Endpoint, error) {
	k := key{containerID, ifName}
	release, err := d.claim(ctx, k)
	if err != nil {
		return Endpoint{}, err
	}
	defer release()
	defer d.change()()
	d.mu.Lock()
	addr, live := d.byKey[k]
	if !live {
		addr = d.tombs[k]
	}
	d.mu.Unlock()
	if !addr.IsValid() {
		return Endpoint{}, fmt.Errorf("delete %s of container %s: %w", ifName, containerID, ErrNotFound)
	}
	e, err := d.record(addr)
	if err != nil {
		return Endpoint{}, err
	}
	if live {
		e.State = Tombstone
		e.Released = d.clock.at(bootNow())
		if err := d.commit(&e, ebpf.UpdateExist); err != nil {
			return Endpoint{}, err
		}
		d.mu.Lock()
		delete(d.byKey, k)
		d.tombs[k] = addr
		d.mu.Unlock()
	}
	if err := d.reach(context.WithoutCancel(ctx), "tombstone"); err != nil {
		return e, fmt.Errorf("delete %s: %w", e.String(), err)
	}
	if !live && d.isDoomed(e.HostIfName) {
		return e, nil // said twice
	}
	owns, err := d.shut(&e)
	err = errors.Join(err, d.unroute(&e))
	// The device of that name is the endpoint's when it was live; a tombstone's
	// is a leftover of whatever number.
	r := &remains{name: e.HostIfName}
	if live {
		r.index = e.HostIfIndex
	}
	if owns {
		r.counters = e.HostIfIndex
	}
	d.doom(r)
	if !live {
		_, late := d.awaitReaped(context.WithoutCancel(ctx), e.HostIfName)
		err = errors.Join(err, late, r.err)
	}
	if err != nil {
		return e, fmt.Errorf("delete %s: %w", e.String(), err)
	}
	if live {
		d.log.Debug("endpoint deleted", "pod", e.PodNamespace+"/"+e.PodName, "ip", e.Addr, "eni", e.ENI, "link", e.HostIfName)
	}
	return e, nil
}

// Forget removes the tombstone of an address, which may be used again from
// then on. It is no error if there is none; a live endpoint is refused.
func (d *Datapath) Forget(addr netip.Addr) error {
	e, err := d.record(addr)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if e.State != Tombstone {
		return fmt.Errorf("forget %s: it belongs to %s (%s): delete that first: %w", addr, e.String(), e.State, ErrAddressInUse)
	}
	return d.erase(&e)
}

// erase removes the record.
func (d *Datapath) erase(e *Endpoint) error {
	k := addrKey(e.Addr)
	if err := d.objs.Endpoints.Delete(&k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("remove the record of %s: %w", e.Addr, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range []map[key]netip.Addr{d.byKey, d.tombs} {
		if m[e.key()] == e.Addr {
			delete(m, e.key())
		}
	}
	return nil
}

// dismantle removes all of an endpoint but its record, and waits until it is
// gone; what is not there is no error. withLink says whether the device of its
// name is the endpoint's.
func (d *Datapath) dismantle(e *Endpoint, withLink bool) error {
	owns, err := d.shut(e)
	errs := []error{err}
	if withLink {
		errs = append(errs, d.unroute(e), d.deleteLink(e.HostIfName))
	}
	if owns {
		errs = append(errs, d.deleteCounters(e.HostIfIndex))
	}
	d.mu.Lock()
	if d.indexes[e.HostIfIndex] == e.key() {
		delete(d.indexes, e.HostIfIndex)
		delete(d.moved, e.HostIfIndex)
		d.leaveSlot(e.HostIfIndex)
	}
	d.mu.Unlock()
	return errors.Join(errs...)
}

// shut takes the endpoint out of the map of interfaces: from then on nothing
// passes in either direction, the program is still there to say so, and it goes
// after the device. It reports whether the entry was the endpoint's: a
// tombstone's ifindex may be another endpoint's by now.
func (d *Datapath) shut(e *Endpoint) (owns bool, err error) {
	index := uint32(e.HostIfIndex)
	var v bpfgen.NodeIface
	err = d.objs.Ifaces.Lookup(&index, &v)
	if owns = err == nil && v.Addr == addrKey(e.Addr); owns {
		err = d.removeIface(index, v)
	} else if errors.Is(err, ebpf.ErrKeyNotExist) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("remove %s: %w", e.HostIfName, err)
	}
	if owns && err == nil {
		err = d.dropPolicy(index)
	}
	return owns, errors.Join(err, d.reach(context.Background(), "gone from maps"))
}

// removeIface shuts an interface's gate for good. The slot goes on saying whose it
// is: what is under way in the stack must not be taken for the node's own.
func (d *Datapath) removeIface(index uint32, v bpfgen.NodeIface) error {
	v.Flags &^= uint32(bpfgen.NodeIfaceFlagsIFACE_READY)
	if err := d.fillSlot(index, &v); err != nil {
		return err
	}
	if err := d.objs.Ifaces.Delete(&index); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("remove interface %d from the map of interfaces: %w", index, err)
	}
	return nil
}

// unroute removes the route to the endpoint.
func (d *Datapath) unroute(e *Endpoint) error {
	var b nl.Batch
	b.RouteDelete(podRoute(e))
	b.Tolerate(unix.ESRCH, unix.ENODEV)
	return errors.Join(d.conn.Exec(&b), d.reach(context.Background(), "gone from routes"))
}

// deleteCounters removes the counters of a host interface.
func (d *Datapath) deleteCounters(hostIfIndex int) error {
	index := uint32(hostIfIndex)
	if err := d.objs.IfaceStats.Delete(&index); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("remove the counters of interface %d: %w", index, err)
	}
	return nil
}
