package datapath

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
)

// Hook is the kind of place where the programs stand on a device.
type Hook string

const (
	// Auto is Clsact on host veths at first, whose programs must be in place at
	// once, and TCX once a pod is busy (move.go); and TCX on ENIs. Clsact alone if
	// the kernel has no TCX.
	Auto Hook = "auto"
	// Clsact is the classic qdisc of tc: a program is in place in some 50 µs.
	Clsact Hook = "clsact"
	// TCX is the BPF link of Linux 6.6. The kernel waits for an RCU grace
	// period at each, 5 to 30 ms under the lock that all network configuration
	// takes; it leaves the place of an ingress qdisc to others (the CNI
	// project's bandwidth plugin wants it).
	TCX Hook = "tcx"
)

// Hooks are the kinds, the default first.
var Hooks = []Hook{Auto, Clsact, TCX}

// device is one on whose hooks programs of ours stand.
type device struct {
	name     string
	index    int
	programs []program
}

// device is the endpoint's host veth.
func (e *Endpoint) device() device { return device{e.HostIfName, e.HostIfIndex, podPrograms} }

// hooks puts the programs on devices, in one of the kernel's ways.
type hooks interface {
	// probe finds out whether the kernel can do it.
	probe() error
	// attach puts the programs on the device, or in the place of an earlier
	// agent's: then no packet misses them.
	attach(device) error
	// check returns an error that names what attach would have to do.
	check(device) error
	// detach takes them off a device that stays; what is not there is no error.
	detach(device) error
	// forget removes what outlives a device that is gone.
	forget(device) error
}

// hooking is a kind of hooks, and the other, which an agent before may have used;
// nil: what it left is taken over as it is.
type hooking struct {
	hooks
	kind Hook // Clsact or TCX; of Auto's host veths, that of a new one
	old  hooks
}

// replace attaches the programs, and takes those on hooks of the other kind off.
func (h hooking) replace(dev device) error {
	if err := h.attach(dev); err != nil {
		return err
	}
	if h.old == nil {
		return nil
	}
	return h.old.detach(dev)
}

// setHooks chooses the hooks of host veths and of ENIs, and finds out whether the
// kernel can do it.
func (d *Datapath) setHooks() error {
	onClsact := hooking{(*clsact)(d), Clsact, (*tcx)(d)}
	onTCX := hooking{(*tcx)(d), TCX, (*clsact)(d)}
	switch d.opts.Hook {
	case Clsact:
		d.hooks, d.eniHooks = onClsact, onClsact
	case TCX:
		d.hooks, d.eniHooks = onTCX, onTCX
	case Auto, "":
		d.hooks, d.eniHooks = hooking{(*either)(d), Clsact, nil}, onTCX
		if err := onTCX.probe(); errors.Is(err, ebpf.ErrNotSupported) {
			d.hooks, d.eniHooks = onClsact, onClsact
		} else if err != nil {
			return err
		}
	default:
		return fmt.Errorf("unknown kind of hook %q: want one of %v", d.opts.Hook, Hooks)
	}
	return d.hooks.probe()
}

// repairPrograms puts back the programs that somebody took off the devices of
// live endpoints.
func (d *Datapath) repairPrograms(ctx context.Context) error {
	all, err := d.Endpoints()
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range all {
		if e.State == Live && d.hooks.check(e.device()) != nil {
			errs = append(errs, d.repairProgram(ctx, e.key()))
		}
	}
	return errors.Join(errs...)
}

// repairProgram is repairPrograms for one, which may have been deleted
// meanwhile, or have lost its device with its network namespace.
func (d *Datapath) repairProgram(ctx context.Context, k key) error {
	release, err := d.claim(ctx, k)
	if err != nil {
		return err
	}
	defer release()
	d.mu.Lock()
	addr, ok := d.byKey[k]
	d.mu.Unlock()
	if !ok {
		return nil
	}
	e, err := d.record(addr)
	if err != nil || e.State != Live {
		return err
	}
	if l, err := d.conn.LinkByIndex(e.HostIfIndex); errors.Is(err, unix.ENODEV) || err == nil && l.Name != e.HostIfName {
		return nil
	}
	damage := d.hooks.check(e.device())
	if damage == nil {
		return nil
	}
	d.log.Warn("programs were taken off a pod's device, put back", "link", e.HostIfName, "err", damage)
	return d.reattach(&e)
}

// program is one that stands on a device's hook.
type program struct {
	name      string
	direction nl.Direction
	tcx       ebpf.AttachType
	of        func(*Datapath) *ebpf.Program
}

var (
	// podPrograms stand on host veths.
	podPrograms = []program{
		{"from_pod", nl.Ingress, ebpf.AttachTCXIngress, func(d *Datapath) *ebpf.Program { return d.objs.FromPod }},
		{"to_pod", nl.Egress, ebpf.AttachTCXEgress, func(d *Datapath) *ebpf.Program { return d.objs.ToPod }},
	}
	// eniPrograms stand on the devices of ENIs.
	eniPrograms = []program{
		{"from_eni", nl.Ingress, ebpf.AttachTCXIngress, func(d *Datapath) *ebpf.Program { return d.objs.FromEni }},
		{"to_eni", nl.Egress, ebpf.AttachTCXEgress, func(d *Datapath) *ebpf.Program { return d.objs.ToEni }},
	}
)

// clsact puts the programs on the qdisc of that name, before all other filters
// there. They need no pin: a filter holds its program.
type clsact Datapath

// filterPriority is the first; filterHandle is ours (0x756c is "ul"), so that
// whoever puts a filter of the same priority there does not take our place.
const (
	filterPriority = 1
	filterHandle   = 0x756c
)

func (p program) filter(dev device) nl.Filter {
	return nl.Filter{Index: dev.index, Direction: p.direction, Priority: filterPriority, Handle: filterHandle, Name: "underlay_" + p.name}
}

func (c *clsact) probe() error {
	d := (*Datapath)(c)
	const loopback = 1
	err := nl.DoNew(func() error {
		conn, err := nl.Dial()
		if err != nil {
			return err
		}
		defer conn.Close()
		return d.setFilters(conn, device{"lo", loopback, podPrograms})
	})
	if err != nil {
		return fmt.Errorf("put the programs on a clsact qdisc in a network namespace made for it: %w (Linux needs CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF, or --hook tcx)", err)
	}
	return nil
}

func (c *clsact) attach(dev device) error {
	d := (*Datapath)(c)
	if err := d.setFilters(d.conn, dev); err != nil {
		return fmt.Errorf("attach the programs to %s: %w", dev.name, err)
	}
	return nil
}

func (d *Datapath) setFilters(conn *nl.Conn, dev device) error {
	var qdisc, filters nl.Batch
	qdisc.ClsactSet(dev.index)
	if err := conn.Exec(&qdisc); errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%w: somebody's ingress qdisc is in its place (tc qdisc show dev %s): with that goes --hook tcx alone", err, dev.name)
	} else if err != nil {
		return err
	}
	for _, p := range dev.programs {
		f := p.filter(dev)
		f.FD = p.of(d).FD()
		filters.FilterSet(f)
	}
	return conn.Exec(&filters)
}

func (c *clsact) check(dev device) error {
	d := (*Datapath)(c)
	var errs []error
	for _, p := range dev.programs {
		id, err := d.programID(p.of(d))
		if err != nil {
			return err
		}
		want := p.filter(dev)
		want.ProgID = id
		have, err := d.conn.Filters(dev.index, p.direction)
		errs = append(errs, err)
		if !slices.Contains(have, want) {
			errs = append(errs, fmt.Errorf("%s is not attached to %s", p.name, dev.name))
		}
	}
	return errors.Join(errs...)
}

// detach leaves the qdisc: to remove it would cost packets, and it is in the
// way of an ingress qdisc at most, which is asked for in a pod's first second.
func (c *clsact) detach(dev device) error {
	d := (*Datapath)(c)
	var b nl.Batch
	for _, p := range dev.programs {
		have, err := d.conn.Filters(dev.index, p.direction)
		if err != nil {
			return err
		}
		for _, f := range have {
			if f.Handle == filterHandle && f.Priority == filterPriority {
				b.FilterDelete(p.filter(dev))
				b.Tolerate(unix.ENOENT)
			}
		}
	}
	return d.conn.Exec(&b)
}

func (c *clsact) forget(device) error { return nil }

// programID returns the kernel's number of a loaded program. It never changes,
// and to ask takes some 20 KB of garbage, with 230 pods for 460 programs at each
// look after a change.
func (d *Datapath) programID(p *ebpf.Program) (uint32, error) {
	if id, ok := d.programIDs.Load(p); ok {
		return id.(uint32), nil
	}
	info, err := p.Info()
	if err != nil {
		return 0, fmt.Errorf("read the program's ID: %w", err)
	}
	id, _ := info.ID()
	d.programIDs.Store(p, uint32(id))
	return uint32(id), nil
}
