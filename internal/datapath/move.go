package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	"github.com/underlay-cni/underlay/internal/nl"
)

// With Auto, a host veth's programs begin on clsact, where they are in place at
// once. TCX spares a packet 60 ns and more, and costs an RCU grace period under
// rtnetlink's lock, 5 to 30 ms, for each program: when it is attached, and once
// more when the device goes (kernel/bpf/tcx.c, tcx_uninstall; twenty devices that
// are deleted together keep the lock for 0.6 s instead of 20 ms). So it is for
// pods that send enough to be worth that, and when nobody adds or deletes pods.
//
// A program moves while packets pass, and each passes one of ours, once:
//
//  1. IFACE_ALONE: what the program passes is seen by no program behind it.
//  2. It is attached to TCX as well, which comes before clsact: from then on the
//     one on clsact sees nothing.
//  3. The one on clsact is deleted.
//  4. IFACE_ALONE is taken back: programs of others run behind it again.
//
// A device with programs of others stays as it is, since 1 to 4 would have them
// passed over. Whatever a crash leaves, attach makes whole: a program that is on
// TCX goes from clsact, one that is not is put there.
const (
	// moveEvery is the time between two looks at what pods send.
	moveEvery = 5 * time.Second
	// moveRate is from how many packets a second on, on the wire, a pod is busy.
	moveRate = 10_000
	// moveSettled is how long there must have been no Add and no Delete.
	moveSettled = 2 * time.Second
)

// errOthersPrograms says that a device has programs of others.
var errOthersPrograms = errors.New("programs of others are on the device")

// either is clsact, or for programs that were moved there, TCX.
type either Datapath

func (x *either) probe() error { return (*clsact)(x).probe() } // setHooks has asked for TCX

func (x *either) attach(dev device) error {
	moved, rest := x.split(dev)
	if len(moved.programs) > 0 {
		if err := errors.Join((*tcx)(x).attach(moved), (*clsact)(x).detach(moved)); err != nil {
			return err
		}
	}
	if len(rest.programs) == 0 {
		return nil
	}
	return (*clsact)(x).attach(rest)
}

func (x *either) check(dev device) error {
	_, rest := x.split(dev)
	return (*clsact)(x).check(rest)
}

func (x *either) detach(dev device) error {
	return errors.Join((*clsact)(x).detach(dev), (*tcx)(x).detach(dev))
}

func (x *either) forget(dev device) error { return (*tcx)(x).forget(dev) }

// split tells a device's programs that are on TCX from the others.
func (x *either) split(dev device) (moved, rest device) {
	moved, rest = device{name: dev.name, index: dev.index}, device{name: dev.name, index: dev.index}
	for _, p := range dev.programs {
		to := &rest
		if l, err := (*tcx)(x).attached(dev, p); err == nil {
			_ = l.Close()
			to = &moved
		}
		to.programs = append(to.programs, p)
	}
	return moved, rest
}

// reattach makes an endpoint's programs stand where they should, and ends a move that
// somebody was killed in. What stands on hooks of the other kind is passed over until
// it is gone.
func (d *Datapath) reattach(e *Endpoint) error {
	dev := e.device()
	if d.hooks.old != nil && d.hooks.old.check(dev) == nil {
		if err := d.setAlone(e, true); err != nil {
			return err
		}
	}
	if err := d.hooks.replace(dev); err != nil {
		return err
	}
	d.noteMoved(dev)
	return d.setAlone(e, false)
}

// noteMoved remembers whether a device's programs are all on TCX.
func (d *Datapath) noteMoved(dev device) {
	x, ok := d.hooks.hooks.(*either)
	if !ok {
		return
	}
	_, rest := x.split(dev)
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(rest.programs) == 0 {
		d.moved[dev.index] = true
	} else {
		delete(d.moved, dev.index)
	}
}

func (d *Datapath) isMoved(index int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.moved[index]
}

// isMovedAddr is isMoved for the pod with that address.
func (d *Datapath) isMovedAddr(addr netip.Addr) bool {
	e, err := d.record(addr)
	return err == nil && d.isMoved(e.HostIfIndex)
}

// change notes that an Add or Delete begins, and by what it returns, that it ends.
func (d *Datapath) change() func() {
	now := func() { d.changed.Store(int64(monoNow())) }
	now()
	return now
}

// isSettled tells whether nobody adds or deletes pods, nor has a moment ago.
func (d *Datapath) isSettled() bool {
	settled := moveSettled
	if d.opts.settled != 0 {
		settled = d.opts.settled
	}
	return len(d.work) == 0 && int64(monoNow())-d.changed.Load() >= int64(settled)
}

// startMover starts the goroutine that moves the programs of busy pods. It ends
// with Close.
func (d *Datapath) startMover() {
	if _, ok := d.hooks.hooks.(*either); !ok {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		d.moveBusy(ctx)
	}()
	d.stopMover = sync.OnceFunc(func() { cancel(); <-ended })
}

func (d *Datapath) moveBusy(ctx context.Context) {
	tick := time.NewTicker(moveEvery)
	defer tick.Stop()
	var before map[netip.Addr]Traffic
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		now, err := d.Traffic()
		if err != nil {
			d.log.Warn("cannot tell which pods are busy", "err", err)
			continue
		}
		d.moveThose(ctx, before, now)
		before = now
	}
}

// moveThose moves the programs of pods that sent enough between two looks.
func (d *Datapath) moveThose(ctx context.Context, before, now map[netip.Addr]Traffic) {
	for addr, t := range now {
		was, ok := before[addr]
		if !ok || t.FromPackets < was.FromPackets { // it is another pod's address by now
			continue
		}
		if t.FromPackets-was.FromPackets < moveRate*uint64(moveEvery/time.Second) || d.isMovedAddr(addr) || !d.isSettled() {
			continue
		}
		if err := d.Move(ctx, addr); err != nil && ctx.Err() == nil {
			d.log.Debug("a busy pod's programs stay on clsact", "ip", addr, "err", err)
		}
	}
}

// Move moves the programs of the live endpoint with that address from clsact to
// TCX, with Auto, as it is done by itself for pods that send 10,000 packets a
// second. Programs that are there already stay; a device that has programs of others
// is left alone, with an error.
func (d *Datapath) Move(ctx context.Context, addr netip.Addr) error {
	x, ok := d.hooks.hooks.(*either)
	if !ok {
		return nil
	}
	e, err := d.record(addr)
	if err != nil {
		return err
	}
	release, err := d.claim(ctx, e.key())
	if err != nil {
		return err
	}
	defer release()
	if e, err = d.record(addr); err != nil {
		return err
	}
	if e.State != Live {
		return fmt.Errorf("move the programs of %s: its state is %s", addr, e.State)
	}
	if l, err := d.conn.LinkByIndex(e.HostIfIndex); err != nil || l.Name != e.HostIfName {
		return errors.Join(fmt.Errorf("move the programs of %s: it has lost its device %s", addr, e.HostIfName), err)
	}
	_, rest := x.split(e.device())
	for i := range rest.programs {
		if err := ctx.Err(); err != nil {
			return err
		}
		one := rest
		one.programs = rest.programs[i : i+1]
		if err := d.moveOne(ctx, &e, one, i == len(rest.programs)-1); err != nil {
			return fmt.Errorf("move %s of %s to TCX: %w", one.programs[0].name, e.HostIfName, err)
		}
	}
	return nil
}

// moveOne moves one program, the device's last or not.
func (d *Datapath) moveOne(ctx context.Context, e *Endpoint, dev device, last bool) error {
	if err := d.othersOn(dev); err != nil {
		return err
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"alone", func() error { return d.setAlone(e, true) }},
		{"tcx", func() error {
			err := (*tcx)(d).attach(dev)
			if err != nil {
				err = errors.Join(err, d.setAlone(e, false))
			}
			return err
		}},
		{"filter", func() error {
			if last {
				d.noteMoved(e.device()) // before its deletion is heard
			}
			return (*clsact)(d).detach(dev)
		}},
		{"together", func() error { return d.setAlone(e, false) }},
	} {
		if err := d.reach(ctx, "move: "+step.name); err != nil {
			return err
		}
		if err := step.do(); err != nil {
			return err
		}
	}
	return nil
}

// setAlone says whether programs behind ours are passed over, on a host veth.
func (d *Datapath) setAlone(e *Endpoint, alone bool) error {
	const flag = uint32(bpfgen.NodeIfaceFlagsIFACE_ALONE)
	index := uint32(e.HostIfIndex)
	var v bpfgen.NodeIface
	if err := d.objs.Ifaces.Lookup(&index, &v); err != nil {
		return fmt.Errorf("look up interface %d: %w", index, err)
	}
	if (v.Flags&flag != 0) == alone {
		return nil
	}
	v.Flags ^= flag
	if err := d.fillSlot(index, &v); err != nil {
		return err
	}
	if err := nl.AwaitMemory(func() error { return d.objs.Ifaces.Update(&index, &v, ebpf.UpdateExist) }); err != nil {
		return fmt.Errorf("enter %s into the map of interfaces: %w", e.HostIfName, err)
	}
	return nil
}

// othersOn returns errOthersPrograms if somebody else's program is on one of the
// hooks where the device's programs stand.
func (d *Datapath) othersOn(dev device) error {
	for _, p := range dev.programs {
		filters, err := d.conn.Filters(dev.index, p.direction)
		if err != nil {
			return err
		}
		for _, f := range filters {
			if f.Handle != filterHandle || f.Priority != filterPriority {
				return fmt.Errorf("%w: filter %#x of priority %d, %s", errOthersPrograms, f.Handle, f.Priority, p.direction)
			}
		}
		var have *link.QueryResult
		err = d.in(func() (err error) {
			have, err = link.QueryPrograms(link.QueryOptions{Target: dev.index, Attach: p.tcx})
			return err
		})
		if err != nil && !errors.Is(err, unix.ENOENT) { // the device has never had one
			return fmt.Errorf("list TCX programs of %s: %w", dev.name, err)
		}
		if have != nil && len(have.Programs) > 0 {
			return fmt.Errorf("%w: %d by TCX, %s", errOthersPrograms, len(have.Programs), p.direction)
		}
	}
	return nil
}
