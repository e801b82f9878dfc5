package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	"github.com/underlay-cni/underlay/internal/nl"
)

// Check looks at everything that Add made for the endpoint of e's container
// and interface, in the kernel, and returns an error that lists what is
// missing or different. netns is an open file of the pod's namespace. If
// e.Addr is set, it must be the endpoint's.
func (d *Datapath) Check(ctx context.Context, e Endpoint, netns *os.File) error {
	release, err := d.claim(ctx, e.key())
	if err != nil {
		return err
	}
	defer release()
	d.mu.Lock()
	addr, ok := d.byKey[e.key()]
	d.mu.Unlock()
	if !ok {
		return fmt.Errorf("check %s: %w", e.String(), ErrNotFound)
	}
	if e.Addr.IsValid() && e.Addr != addr {
		return fmt.Errorf("check %s: it has address %s, not %s", e.String(), addr, e.Addr)
	}
	rec, err := d.record(addr)
	if err != nil {
		return err
	}
	var errs []error
	if rec.State != Live {
		errs = append(errs, fmt.Errorf("its state is %s", rec.State))
	}
	errs = append(errs, d.checkHost(&rec), d.checkPod(&rec, netns))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("check %s: %w", e.String(), err)
	}
	return nil
}

// checkHost looks at the maps and at the node's end.
func (d *Datapath) checkHost(e *Endpoint) error {
	var errs []error
	index := uint32(e.HostIfIndex)
	var v bpfgen.NodeIface
	switch err := d.objs.Ifaces.Lookup(&index, &v); {
	case err != nil:
		errs = append(errs, fmt.Errorf("look up %s in the map of interfaces: %w", e.HostIfName, err))
	case v.Addr != addrKey(e.Addr) || v.Mark != Mark(e.ENIIndex) || [6]byte(e.MAC) != v.PodMac:
		errs = append(errs, fmt.Errorf("the map of interfaces has another endpoint for %s", e.HostIfName))
	case v.Flags&uint32(bpfgen.NodeIfaceFlagsIFACE_READY) == 0:
		errs = append(errs, fmt.Errorf("the gate of %s is shut", e.HostIfName))
	}
	errs = append(errs, d.hooks.check(e.device()))

	l, err := d.conn.LinkByName(e.HostIfName)
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	if l.Index != e.HostIfIndex || l.Group != LinkGroup {
		errs = append(errs, fmt.Errorf("the node's %s is another device", e.HostIfName))
	}
	if !l.Up {
		errs = append(errs, fmt.Errorf("%s is down", e.HostIfName))
	}
	routes, err := d.conn.Routes(PodTable)
	errs = append(errs, err)
	if !slices.Contains(routes, podRoute(e)) {
		errs = append(errs, fmt.Errorf("the node lacks %s", podRoute(e)))
	}
	neighs, err := d.conn.Neighs()
	errs = append(errs, err, checkNeigh(neighs, e.HostIfIndex, e.Addr, e.MAC.String()))
	return errors.Join(errs...)
}

// checkPod looks at the pod's end.
func (d *Datapath) checkPod(e *Endpoint, netns *os.File) error {
	pod, err := nl.DialIn(netns)
	if err != nil {
		return fmt.Errorf("open a socket in the pod's network namespace: %w", err)
	}
	defer pod.Close()
	cookie, err := pod.NetnsCookie()
	if err != nil {
		return err
	}
	if cookie != e.NetnsCookie {
		return fmt.Errorf("it is in another network namespace than %s", e.Netns)
	}
	l, err := pod.LinkByName(e.IfName)
	if err != nil {
		return fmt.Errorf("in the pod: %w", err)
	}
	var errs []error
	if l.Index != e.PeerIfIndex || l.Kind != "veth" {
		errs = append(errs, fmt.Errorf("the pod's %s is another device", e.IfName))
	}
	if l.MAC.String() != e.MAC.String() {
		errs = append(errs, fmt.Errorf("the pod's %s has MAC %s, not %s", e.IfName, l.MAC, e.MAC))
	}
	if !l.Up {
		errs = append(errs, fmt.Errorf("the pod's %s is down", e.IfName))
	}
	addrs, err := pod.Addrs()
	errs = append(errs, err)
	if !slices.Contains(addrs, nl.Addr{Index: e.PeerIfIndex, Prefix: netip.PrefixFrom(e.Addr, 32)}) {
		errs = append(errs, fmt.Errorf("the pod's %s lacks address %s/32", e.IfName, e.Addr))
	}
	routes, err := pod.Routes(unix.RT_TABLE_MAIN)
	errs = append(errs, err)
	for _, r := range podRoutes(e) {
		if !slices.Contains(routes, r) {
			errs = append(errs, fmt.Errorf("the pod lacks %s", r))
		}
	}
	neighs, err := pod.Neighs()
	errs = append(errs, err, checkNeigh(neighs, e.PeerIfIndex, podGateway, hostMAC.String()))
	return errors.Join(errs...)
}

func checkNeigh(all []nl.Neigh, index int, addr netip.Addr, mac string) error {
	for _, n := range all {
		if n.Index == index && n.Addr == addr && n.MAC.String() == mac && n.State&unix.NUD_PERMANENT != 0 {
			return nil
		}
	}
	return fmt.Errorf("the permanent neighbour %s (%s) is missing", addr, mac)
}
