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
// removes everything else of it. The tombstone keeps the address from being
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
	if err := d.dismantle(&e, true); err != nil {
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

// dismantle removes all of an endpoint but its record; what is not there is no
// error. withLink says whether the device of its name is the endpoint's.
//
// The gate shuts first: from then on nothing passes in either direction, the
// program is still there to say so, and it goes after the device.
func (d *Datapath) dismantle(e *Endpoint, withLink bool) error {
	var errs []error
	index := uint32(e.HostIfIndex)
	// A tombstone's ifindex may be another endpoint's by now.
	var v bpfgen.NodeIface
	err := d.objs.Ifaces.Lookup(&index, &v)
	owns := err == nil && v.Addr == addrKey(e.Addr)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		errs = append(errs, fmt.Errorf("look up interface %d: %w", index, err))
	}
	if owns {
		if err := d.objs.Ifaces.Delete(&index); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("remove %s from the map of interfaces: %w", e.HostIfName, err))
		}
	}
	errs = append(errs, d.reach(context.Background(), "gone from maps"))
	if withLink {
		var route nl.Batch
		route.RouteDelete(podRoute(e))
		route.Tolerate(unix.ESRCH, unix.ENODEV)
		errs = append(errs, d.conn.Exec(&route))
		errs = append(errs, d.reach(context.Background(), "gone from routes"))
		errs = append(errs, d.deleteLink(e.HostIfName))
		errs = append(errs, d.reach(context.Background(), "gone from links"))
		errs = append(errs, d.unpin(e.HostIfName))
	}
	if owns {
		if err := d.objs.IfaceStats.Delete(&index); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("remove the counters of %s: %w", e.HostIfName, err))
		}
	}
	d.mu.Lock()
	if d.indexes[e.HostIfIndex] == e.key() {
		delete(d.indexes, e.HostIfIndex)
	}
	d.mu.Unlock()
	return errors.Join(errs...)
}

// deletion is one link that waits to be deleted.
type deletion struct {
	name string
	done chan error // of size 1
}

// deleteLink deletes a host veth; if there is none, that is no error. The
// kernel takes some 18 ms for one, and hardly more for fifty: those that come
// while others are being deleted go together, by whoever's turn is next.
func (d *Datapath) deleteLink(name string) error {
	own := deletion{name: name, done: make(chan error, 1)}
	d.mu.Lock()
	d.doomed = append(d.doomed, own)
	d.mu.Unlock()

	d.deleting.Lock()
	defer d.deleting.Unlock()
	d.mu.Lock()
	batch := d.doomed
	d.doomed = nil
	d.mu.Unlock()
	if len(batch) > 0 { // own may have gone with an earlier turn
		names := make([]string, len(batch))
		for i, b := range batch {
			names[i] = b.name
		}
		err := d.deleteLinks(names)
		for _, b := range batch {
			b.done <- err
		}
	}
	return <-own.done
}

// deleteLinks deletes host veths, several in one group.
func (d *Datapath) deleteLinks(names []string) error {
	var b nl.Batch
	if len(names) == 1 {
		b.LinkDelete(names[0])
		b.Tolerate(unix.ENODEV)
		return d.slow.Exec(&b)
	}
	for _, name := range names {
		b.LinkGroup(name, dyingGroup)
		b.Tolerate(unix.ENODEV)
	}
	if len(names) > 0 {
		b.LinkDeleteGroup(dyingGroup)
		b.Tolerate(unix.ENODEV)
	}
	return d.slow.Exec(&b)
}
