package datapath

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// attachENIs puts the programs on the devices of ENIs: before a rule leads there,
// since what a pod sends by the stack is judged where it leaves. The programs on
// pods' devices send packets straight to an ENI only while it has its own. An ENI
// that can have none, as when another's ingress qdisc is in the way, goes on by
// the stack alone.
func (d *Datapath) attachENIs(ctx context.Context, present map[int]ENI, links []nl.Link) error {
	var errs []error
	for i := 1; i <= MaxENIIndex; i++ {
		eni, ok := present[i]
		old, had := d.eniLinks[i]
		errs = append(errs, d.putIdle(i, eni.Idle))
		if !ok {
			errs = append(errs, d.putENI(i, bpfgen.NodeEni{}))
			continue
		}
		l, _ := linkOf(links, eni.MAC)
		dev := device{l.Name, l.Index, eniPrograms}
		if had && (old.name != dev.name || old.index != dev.index) {
			errs = append(errs, d.releaseENI(old, links))
		}
		if err := ctx.Err(); err != nil {
			return errors.Join(append(errs, err)...)
		}
		errs = append(errs, d.attachENI(i, eni, dev))
	}
	return errors.Join(errs...)
}

// releaseENIs takes the programs off devices that are ENIs no more: when no rule
// leads there any longer.
func (d *Datapath) releaseENIs(present map[int]ENI, links []nl.Link) error {
	var errs []error
	for i := 1; i <= MaxENIIndex; i++ {
		_, ok := present[i]
		if old, had := d.eniLinks[i]; had && !ok {
			errs = append(errs, d.releaseENI(old, links))
			d.forgetENI(i)
		}
	}
	return errors.Join(append(errs, d.sweepENIPins())...)
}

// attachENI makes one ENI's device whole, and known to the programs.
func (d *Datapath) attachENI(i int, eni ENI, dev device) error {
	v := bpfgen.NodeEni{Ifindex: uint32(dev.index), Gateway: wire4(vpc.Router(eni.Subnet)), Subnet: wire4(eni.Subnet.Masked().Addr()), Mask: mask4(eni.Subnet.Bits())}
	if damage := d.eniHooks.check(dev); damage != nil {
		if _, had := d.eniLinks[i]; had {
			d.log.Warn("programs were taken off an ENI's device, put back", "eni", eni.ID, "link", dev.name, "err", damage)
		}
		if err := d.eniHooks.replace(dev); err != nil {
			// By the stack all goes on; what replies belong to is not recorded.
			return errors.Join(d.putENI(i, v), fmt.Errorf("set up %s (%s) for direct forwarding: %w", eni.ID, dev.name, err))
		}
	}
	d.mu.Lock()
	d.eniLinks[i] = dev
	d.mu.Unlock()
	v.Flags = uint32(bpfgen.NodeEniFlagENI_DIRECT)
	return d.putENI(i, v)
}

// releaseENI takes the programs off a device, if it is there still.
func (d *Datapath) releaseENI(dev device, links []nl.Link) error {
	for _, l := range links {
		if l.Index == dev.index && l.Name == dev.name {
			return d.eniHooks.detach(dev)
		}
	}
	return d.eniHooks.forget(dev)
}

func (d *Datapath) forgetENI(i int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.eniLinks, i)
}

// isENILink tells whether an ifindex is that of an ENI with our programs.
func (d *Datapath) isENILink(index int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, dev := range d.eniLinks {
		if dev.index == index {
			return true
		}
	}
	return false
}

func (d *Datapath) putENI(i int, v bpfgen.NodeEni) error {
	index := uint32(i)
	var have bpfgen.NodeEni
	if err := d.objs.Enis.Lookup(&index, &have); err == nil && have == v {
		return nil
	}
	if err := d.objs.Enis.Update(&index, &v, ebpf.UpdateAny); err != nil {
		return fmt.Errorf("enter ENI %d into the map of ENIs: %w", i, err)
	}
	return nil
}

// putIdle tells the programs an ENI's idle times. A flow that is under way has the
// new ones from its next state on.
func (d *Datapath) putIdle(i int, idle vpc.IdleTimeouts) error {
	index := uint32(i)
	v := bpfgen.NodeIdle{TcpEstablished: wholeSeconds(idle.TCPEstablished), Udp: wholeSeconds(idle.UDP), UdpStream: wholeSeconds(idle.UDPStream)}
	var have bpfgen.NodeIdle
	if err := d.objs.EniIdle.Lookup(&index, &have); err == nil && have == v {
		return nil
	}
	if err := d.objs.EniIdle.Update(&index, &v, ebpf.UpdateAny); err != nil {
		return fmt.Errorf("enter the idle times of ENI %d: %w", i, err)
	}
	return nil
}

// sweepENIPins removes the pins of programs on devices that are no ENI's.
func (d *Datapath) sweepENIPins() error {
	names, err := pinNames(linkDir(d.opts.BPFFS))
	if err != nil {
		return err
	}
	wanted := map[string]bool{}
	if d.eniHooks.kind == TCX {
		for _, dev := range d.eniLinks {
			for _, p := range dev.programs {
				wanted[dev.name+"_"+p.name] = true
			}
		}
	}
	var errs []error
	for _, name := range names {
		if strings.HasSuffix(name, "_eni") && !wanted[name] {
			errs = append(errs, os.Remove(filepath.Join(linkDir(d.opts.BPFFS), name)))
		}
	}
	return errors.Join(errs...)
}

// wire4 is an IPv4 address in the network's order, as a program compares it.
func wire4(a netip.Addr) uint32 {
	b := a.As4()
	return binary.NativeEndian.Uint32(b[:])
}

func mask4(bits int) uint32 { return binary.NativeEndian.Uint32(net.CIDRMask(bits, 32)) }

// setNets says which networks the programs take for the VPC's own, whole, and
// within them which are for the stack alone. The longest prefix counts. d.eniMu is
// held.
func (d *Datapath) setNets(own, stack []netip.Prefix) error {
	want := map[bpfgen.NodeNetKey]uint32{}
	for flags, list := range map[uint32][]netip.Prefix{0: stack, uint32(bpfgen.NodeNetFlagNET_DIRECT): own} {
		for _, p := range list {
			if !p.IsValid() || !p.Addr().Is4() {
				return fmt.Errorf("set networks: %s is no IPv4 network", p)
			}
			k := bpfgen.NodeNetKey{Bits: uint32(96 + p.Bits()), Addr: addrKey(p.Masked().Addr())}
			if have, ok := want[k]; !ok || have != 0 { // a network in both is the stack's
				want[k] = flags
			}
		}
	}
	var k bpfgen.NodeNetKey
	var flags uint32
	var stale []bpfgen.NodeNetKey
	it := d.objs.Nets.Iterate()
	for it.Next(&k, &flags) {
		if have, ok := want[k]; ok && have == flags {
			delete(want, k)
		} else if !ok {
			stale = append(stale, k)
		}
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read the map of networks: %w", err)
	}
	// What is the stack's first, so that no moment has it direct.
	for _, first := range []uint32{0, uint32(bpfgen.NodeNetFlagNET_DIRECT)} {
		for k, flags := range want {
			if flags != first {
				continue
			}
			if err := nl.AwaitMemory(func() error { return d.objs.Nets.Update(&k, &flags, ebpf.UpdateAny) }); err != nil {
				return fmt.Errorf("enter a network: %w", err)
			}
		}
	}
	for _, k := range stale {
		if err := d.objs.Nets.Delete(&k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove a network: %w", err)
		}
	}
	return nil
}
