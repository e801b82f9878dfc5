package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	"github.com/underlay-cni/underlay/internal/nl"
)

// indexTries bounds how often Add takes another ifindex because somebody else
// has one in our range, on the node or in the pod.
const indexTries = 8

// Add makes an endpoint and returns it as recorded, Live: the pod's namespace
// has the interface with address, routes and MAC, and packets pass. netns is
// an open file of that namespace. On an error nothing is left.
//
// Errors: *ExistsError if the container has an interface of that name from us
// already, *AddressInUseError, ErrInterfaceTaken if the namespace has a device
// of that name.
func (d *Datapath) Add(ctx context.Context, e Endpoint, netns *os.File) (Endpoint, error) {
	if err := d.complete(&e); err != nil {
		return Endpoint{}, fmt.Errorf("add %s: %w", e.String(), err)
	}
	release, err := d.claim(ctx, e.key())
	if err != nil {
		return Endpoint{}, err
	}
	defer release()
	defer d.change()()
	d.mu.Lock()
	addr, exists := d.byKey[e.key()]
	d.mu.Unlock()
	if exists {
		old, err := d.record(addr)
		if err != nil {
			return Endpoint{}, err
		}
		return Endpoint{}, &ExistsError{Endpoint: old}
	}

	// A device of this name that was deleted a moment ago, with its pins.
	if _, err := d.awaitReaped(ctx, e.HostIfName); err != nil {
		return Endpoint{}, fmt.Errorf("add %s: %w", e.String(), err)
	}
	pod, err := nl.DialIn(netns)
	if err != nil {
		return Endpoint{}, fmt.Errorf("add %s: open a socket in the pod's network namespace %s: %w", e.String(), e.Netns, err)
	}
	defer pod.Close()
	if e.NetnsCookie, err = pod.NetnsCookie(); err != nil {
		return Endpoint{}, err
	}
	if e.NetnsCookie == d.netnsCookie {
		return Endpoint{}, fmt.Errorf("add %s: network namespace %s is the node's own: a pod on the host's network needs no interface", e.String(), e.Netns)
	}

	for range indexTries {
		e.HostIfIndex = d.reserveIndex(e.key())
		e.PeerIfIndex = e.HostIfIndex
		if err = d.make(ctx, &e, pod, netns); !errors.Is(err, unix.EBUSY) {
			break
		}
	}
	if err != nil {
		return Endpoint{}, fmt.Errorf("add %s: %w", e.String(), err)
	}
	d.log.Debug("endpoint added", "pod", e.PodNamespace+"/"+e.PodName, "ip", e.Addr, "eni", e.ENI, "link", e.HostIfName)
	return e, nil
}

// complete checks what Add was given and fills in what follows from it.
func (d *Datapath) complete(e *Endpoint) error {
	switch {
	case e.ContainerID == "" || e.IfName == "":
		return errors.New("container ID and interface name must be set")
	case len(e.IfName) >= unix.IFNAMSIZ:
		return fmt.Errorf("interface name %q is longer than the %d bytes that Linux allows", e.IfName, unix.IFNAMSIZ-1)
	case !e.Addr.Is4():
		return fmt.Errorf("%s is not an IPv4 address", e.Addr)
	case e.ENIIndex < 1 || e.ENIIndex > MaxENIIndex:
		return fmt.Errorf("ENI index %d is not within 1..%d", e.ENIIndex, MaxENIIndex)
	}
	if e.MTU == 0 {
		e.MTU = d.opts.MTU
	}
	e.HostIfName = hostIfName(e.key())
	e.MAC = podMAC(e.Addr)
	e.State, e.Created, e.Released = Adding, d.clock.at(bootNow()), time.Time{}
	_, err := d.clock.encode(e)
	return err
}

// make is Add's work, in the order that doc.go gives reasons for. On an error
// it has undone what it did.
func (d *Datapath) make(ctx context.Context, e *Endpoint, pod *nl.Conn, netns *os.File) (err error) {
	if err := d.enter(ctx); err != nil {
		d.releaseIndex(e.HostIfIndex)
		return err
	}
	working := true
	defer func() {
		if working {
			<-d.work
		}
	}()

	// The record: from here on, a crash leaves something to be undone.
	if err := d.commit(e, ebpf.UpdateNoExist); err != nil {
		d.releaseIndex(e.HostIfIndex)
		if errors.Is(err, ebpf.ErrKeyExist) {
			if owner, err := d.record(e.Addr); err == nil {
				return &AddressInUseError{Endpoint: owner}
			}
		}
		return err
	}
	d.mu.Lock()
	d.byKey[e.key()] = e.Addr
	d.mu.Unlock()
	madeLink := false
	defer func() {
		if err == nil {
			return
		}
		undo := d.dismantle(e, madeLink)
		if undo == nil {
			undo = d.erase(e)
		}
		if undo != nil {
			// The record stays, Adding: Delete and Open finish it.
			err = errors.Join(err, fmt.Errorf("undo: %w", undo))
		}
	}()

	ready := uint32(bpfgen.NodeIfaceFlagsIFACE_READY)
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"maps", func() error { return d.putIface(e, 0) }},
		{"veth", func() error {
			err := d.makeVeth(ctx, e, netns)
			madeLink = err == nil
			return err
		}},
		{"programs", func() error { return d.hooks.attach(e.device()) }},
		{"pod", func() error { return configurePod(pod, e) }},
		{"host", func() error { return d.configureHost(e) }},
		{"carrier", func() error { return settle(ctx, pod, e) }},
		{"policy", func() error {
			if d.opts.BeforeReady == nil {
				return nil
			}
			<-d.work
			working = false
			if err := d.opts.BeforeReady(ctx, *e); err != nil {
				return fmt.Errorf("prepare the endpoint's policy: %w", err)
			}
			return nil
		}},
		{"gate", func() error { return d.putIface(e, ready) }},
		{"live", func() error {
			live := *e
			live.State = Live
			return d.commit(&live, ebpf.UpdateExist)
		}},
	} {
		if err := d.reach(ctx, step.name); err != nil {
			return err
		}
		if err := step.do(); err != nil {
			return err
		}
	}
	e.State = Live
	return nil
}

// reach is called before each step of Add and Delete. Tests fail or die there.
func (d *Datapath) reach(ctx context.Context, step string) error {
	if d.opts.reached != nil {
		if err := d.opts.reached(step); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// enter waits for a turn in the kernel; leave by receiving from d.work.
func (d *Datapath) enter(ctx context.Context) error {
	select {
	case d.work <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// putIface writes what the programs know of the endpoint.
func (d *Datapath) putIface(e *Endpoint, flags uint32) error {
	index := uint32(e.HostIfIndex)
	slot, fresh, err := d.slotOf(e.HostIfIndex)
	if err != nil {
		return err
	}
	v := bpfgen.NodeIface{Addr: addrKey(e.Addr), Mark: Mark(e.ENIIndex), Flags: flags, Eni: uint32(e.ENIIndex), Slot: slot}
	if e.StackOnly {
		v.Flags |= uint32(bpfgen.NodeIfaceFlagsIFACE_STACK)
	}
	if e.GroupsHere {
		v.Flags |= uint32(bpfgen.NodeIfaceFlagsIFACE_GROUPS)
	}
	copy(v.PodMac[:], e.MAC)
	copy(v.HostMac[:], hostMAC)
	// Its counters first; those that are there go on.
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return fmt.Errorf("count CPUs: %w", err)
	}
	none := make([]bpfgen.NodeIfaceCounters, cpus)
	err = nl.AwaitMemory(func() error { return d.objs.IfaceStats.Update(&index, none, ebpf.UpdateNoExist) })
	if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
		return fmt.Errorf("make counters of %s: %w", e.HostIfName, err)
	}
	if fresh {
		if err := d.objs.Traffic.Update(&slot, make([]bpfgen.NodeIfaceTraffic, cpus), ebpf.UpdateAny); err != nil {
			return fmt.Errorf("set the counters of %s to zero: %w", e.HostIfName, err)
		}
	}
	if err := d.fillSlot(index, &v); err != nil {
		return err
	}
	if err := nl.AwaitMemory(func() error { return d.objs.Ifaces.Update(&index, &v, ebpf.UpdateAny) }); err != nil {
		return fmt.Errorf("enter %s into the map of interfaces: %w", e.HostIfName, err)
	}
	return nil
}

// makeVeth makes the pair in place. A device that bears our name and group
// but that no record owns is a leftover and gives way.
func (d *Datapath) makeVeth(ctx context.Context, e *Endpoint, netns *os.File) error {
	var b nl.Batch
	b.VethAdd(nl.Veth{
		Name: e.HostIfName, Index: e.HostIfIndex, MAC: hostMAC, MTU: e.MTU, Group: LinkGroup, NoARP: true,
		PeerNetns: netns, PeerName: e.IfName, PeerIndex: e.PeerIfIndex, PeerMAC: e.MAC, PeerMTU: e.MTU,
	})
	err := d.conn.Exec(&b)
	if errors.Is(err, unix.EEXIST) {
		// The pod's namespace may have the device of a container that was
		// deleted a moment ago.
		if n, late := d.awaitReaped(ctx, ""); n > 0 {
			if late != nil {
				return late
			}
			err = d.conn.Exec(&b)
		}
	}
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	// The host's index may be taken, or either end's name.
	if _, lookup := d.conn.LinkByIndex(e.HostIfIndex); lookup == nil {
		return fmt.Errorf("%w: interface index %d is taken: %w", unix.EBUSY, e.HostIfIndex, err)
	}
	old, lookup := d.conn.LinkByName(e.HostIfName)
	switch {
	case errors.Is(lookup, unix.ENODEV):
		return fmt.Errorf("%w: network namespace %s has an interface %s already: remove it, or give another name: %w", ErrInterfaceTaken, e.Netns, e.IfName, err)
	case lookup != nil:
		return errors.Join(err, lookup)
	case !ourGroup(old.Group):
		return fmt.Errorf("%w: the node has an interface %s that is not a pod's: remove it: %w", ErrInterfaceTaken, e.HostIfName, err)
	}
	if err := d.deleteLink(e.HostIfName); err != nil {
		return err
	}
	if err := d.conn.Exec(&b); errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%w: network namespace %s has an interface %s already: remove it, or give another name: %w", ErrInterfaceTaken, e.Netns, e.IfName, err)
	} else if err != nil {
		return err
	}
	return nil
}

// configurePod sets the pod's end up: address, the way out by podGateway, and
// the gateway's MAC, so that the pod never has to ask for it.
func configurePod(pod *nl.Conn, e *Endpoint) error {
	var b nl.Batch
	b.LinkQuiet(e.PeerIfIndex, "")
	b.AddrAdd(e.PeerIfIndex, netip.PrefixFrom(e.Addr, 32))
	b.LinkUp(e.PeerIfIndex)
	b.NeighSet(e.PeerIfIndex, podGateway, hostMAC)
	for _, r := range podRoutes(e) {
		b.RouteSet(r)
	}
	if err := pod.Exec(&b); err != nil {
		return fmt.Errorf("configure %s in the pod: %w", e.IfName, err)
	}
	return nil
}

func podRoutes(e *Endpoint) []nl.Route {
	const main = unix.RT_TABLE_MAIN
	return []nl.Route{
		{Dst: netip.PrefixFrom(podGateway, 32), Index: e.PeerIfIndex, Table: main, Protocol: unix.RTPROT_STATIC},
		{Dst: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Gateway: podGateway, Index: e.PeerIfIndex, Table: main, Protocol: unix.RTPROT_STATIC},
	}
}

// configureHost sets the node's end up. The pod's MAC is entered, not asked
// for: the device speaks no ARP.
func (d *Datapath) configureHost(e *Endpoint) error {
	var b nl.Batch
	b.LinkQuiet(e.HostIfIndex, e.String())
	b.LinkUp(e.HostIfIndex)
	b.NeighSet(e.HostIfIndex, e.Addr, e.MAC)
	b.RouteSet(podRoute(e))
	if err := d.conn.Exec(&b); err != nil {
		return fmt.Errorf("configure %s on the node: %w", e.HostIfName, err)
	}
	return nil
}

// settle waits until the pod's end can send. It came up before the host's, so
// that it had no carrier and the kernel put off its transmit queue; the event
// that brings it waits in a work queue (net/core/link_watch.c), and until then
// packets are dropped without a count. From Linux 6.8 on, to read the device's
// state makes the kernel handle that event first (rtnl_getlink), so that one
// look is enough. The host's end needs no such thing: it came up second, with
// its carrier.
func settle(ctx context.Context, pod *nl.Conn, e *Endpoint) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		l, err := pod.LinkByIndex(e.PeerIfIndex)
		if err != nil || l.Ready {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("wait for the carrier of %s: %w", e.IfName, ctx.Err())
		}
	}
}

func podRoute(e *Endpoint) nl.Route {
	return nl.Route{Dst: netip.PrefixFrom(e.Addr, 32), Index: e.HostIfIndex, Table: PodTable, Protocol: Protocol}
}
