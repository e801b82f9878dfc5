package fabric

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// Set makes the fabric be as c says. It finds the differences against the
// kernel and changes those alone; a second Set of the same Config changes
// nothing. What is not valid or cannot be made is left out, and the error joins
// the reasons, one per object; the rest is applied. An interrupted Set (ctx, or
// the process's death) leaves some of the changes made, each of them whole or
// to be repaired by the next.
func (f *Fabric) Set(ctx context.Context, c Config) error {
	want, bad := check(f.names, faulty(f.names.lab, c))

	f.mu.Lock()
	defer f.mu.Unlock()
	if f.route == nil {
		return errors.New("set fabric: it is closed")
	}
	err := errors.Join(f.set(ctx, want), f.countGeneration())
	if err != nil {
		f.seen = nil // who knows what was written: read it again
	}
	return errors.Join(bad, err)
}

func (f *Fabric) set(ctx context.Context, want desired) error {
	adopted := f.seen == nil
	if adopted {
		seen, err := f.read()
		if err != nil {
			return err
		}
		f.seen = seen
		// What records may still be about is no other interface's.
		highest, err := f.highestLogged()
		if err != nil {
			return err
		}
		f.nextIndex = max(f.nextIndex, highest+1)
	}
	devices, err := f.route.devices(false)
	if err != nil {
		return err
	}
	f.nextIndex = max(f.nextIndex, 2) // 1 is lo
	for _, d := range devices {
		f.nextIndex = max(f.nextIndex, d.index+1)
	}

	var errs []error
	guests := f.makeGuests(want, &errs)
	kept, doomed := f.sort(want, guests, devices)

	// First nothing leads to what goes, then it goes, then what comes is made,
	// and last something leads to it. An address that moves from one ENI to
	// another that stays is rewritten in place.
	stay := forwarding(want, kept)
	if err := errors.Join(f.putRoutes(stay), f.deleteStale(stay), f.countGeneration()); err != nil {
		return errors.Join(append(errs, err)...)
	}
	if err := f.removePorts(kept, doomed); err != nil {
		return errors.Join(append(errs, err)...)
	}
	if err := f.forget(want, kept, adopted); err != nil {
		return errors.Join(append(errs, err)...)
	}
	f.removeGuests(want, &errs)
	f.repair(devices, kept, &errs)
	index := maps.Clone(kept)
	f.makePorts(ctx, want, guests, index, &errs)
	if err := f.makeInternet(want, devices); err != nil {
		errs = append(errs, err)
	}
	f.translate(want, guests, &errs)
	if err := f.putRules(want, index); err != nil {
		return errors.Join(append(errs, err)...)
	}
	if err := f.putWanted(want, guests, index); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// countGeneration tells the programs that what they judge by has been written:
// what they remember of packets that passed holds no more (bpf/fabric_again.h).
func (f *Fabric) countGeneration() error {
	var n uint32
	if err := f.objs.Generations.Lookup(uint32(0), &n); err != nil {
		return fmt.Errorf("read the generation: %w", err)
	}
	if err := f.objs.Generations.Put(uint32(0), max(n+1, 1)); err != nil {
		return fmt.Errorf("count the generation: %w", err)
	}
	return nil
}

// makeGuests makes the namespaces that are not there; it returns the inode of
// each that is.
func (f *Fabric) makeGuests(want desired, errs *[]error) map[string]uint64 {
	inodes := map[string]uint64{}
	for _, name := range slices.Sorted(maps.Keys(want.guests)) {
		if !nl.ExistsNamed(name) {
			if err := nl.NewNamed(name); err != nil {
				*errs = append(*errs, err)
				continue
			}
			f.log.Info("guest made", "netns", name)
		}
		var st unix.Stat_t
		if err := unix.Stat(nl.Path(name), &st); err != nil {
			*errs = append(*errs, fmt.Errorf("look at guest %s: %w", name, err))
			continue
		}
		inodes[name] = st.Ino
	}
	return inodes
}

func (f *Fabric) removeGuests(want desired, errs *[]error) {
	names, err := f.names.existing()
	if err != nil {
		*errs = append(*errs, err)
	}
	for _, name := range names {
		if want.guests[name] {
			continue
		}
		if err := nl.DeleteNamed(name); err != nil {
			*errs = append(*errs, err)
			continue
		}
		f.log.Info("guest removed", "netns", name)
	}
}

// sort tells the devices that are whole and wanted, by their ENI, from those to
// be deleted.
func (f *Fabric) sort(want desired, guests map[string]uint64, devices []deviceInfo) (kept map[vpc.ENIID]int, doomed []int) {
	kept = map[vpc.ENIID]int{}
	ports := make(map[string]*port, len(want.ports))
	for _, p := range want.ports {
		ports[p.device] = p
	}
	for _, d := range devices {
		if d.name == internetName {
			continue
		}
		p := ports[d.name]
		if p != nil && guests[p.Guest] != 0 &&
			sameIdentity(f.seen.enis[uint32(d.index)], p.record(guests[p.Guest])) &&
			f.taps[p.ID].on(d.index) {
			kept[p.ID] = d.index
			continue
		}
		doomed = append(doomed, d.index)
	}
	return kept, doomed
}

func (f *Fabric) deleteStale(stay *contents) error {
	// An address or MAC that comes to a port not made yet must not lead to where
	// it led before, so it goes too.
	return errors.Join(
		deleteStale(f.objs.Mappings, f.seen.mappings, stay.mappings),
		deleteStale(f.objs.Mappings6, f.seen.mapping6, stay.mapping6),
		deleteStale(f.objs.Stations, f.seen.stations, stay.stations),
		deleteStale(f.objs.Publics, f.seen.publics, stay.publics),
		deleteStale(f.objs.Elastics, f.seen.elastics, stay.elastics),
	)
}

// putRoutes writes routes, the longest first, so that while they come no packet
// follows a shorter one than it should.
func (f *Fabric) putRoutes(want *contents) error {
	return errors.Join(
		putRoutes(f.objs.Routes, f.seen.routes, want.routes),
		putRoutes(f.objs.Routes6, f.seen.routes6, want.routes6),
	)
}

func putRoutes(m *ebpf.Map, have, want map[bpfgen.FabricRouteKey]bpfgen.FabricRoute) error {
	for _, k := range slices.SortedFunc(maps.Keys(want), func(a, b bpfgen.FabricRouteKey) int { return cmp.Compare(b.Prefixlen, a.Prefixlen) }) {
		if err := putWanted(m, have, map[bpfgen.FabricRouteKey]bpfgen.FabricRoute{k: want[k]}); err != nil {
			return err
		}
	}
	return nil
}

// deleteRoutes deletes the routes that are not wanted, the shortest first.
func (f *Fabric) deleteRoutes(want *contents) error {
	return errors.Join(
		deleteRoutes(f.objs.Routes, f.seen.routes, want.routes),
		deleteRoutes(f.objs.Routes6, f.seen.routes6, want.routes6),
	)
}

func deleteRoutes(m *ebpf.Map, have, want map[bpfgen.FabricRouteKey]bpfgen.FabricRoute) error {
	for _, k := range slices.SortedFunc(maps.Keys(have), func(a, b bpfgen.FabricRouteKey) int { return cmp.Compare(a.Prefixlen, b.Prefixlen) }) {
		if _, ok := want[k]; ok {
			continue
		}
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("delete from map %s: %w", m, err)
		}
		delete(have, k)
	}
	return nil
}

func (f *Fabric) putWanted(want desired, guests map[string]uint64, index map[vpc.ENIID]int) error {
	enis := map[uint32]bpfgen.FabricEni{}
	for id, i := range index {
		p := want.ports[id]
		enis[uint32(i)] = p.record(guests[p.Guest])
	}
	come := forwarding(want, index)
	return errors.Join(
		f.putRoutes(come), // before interfaces use another table
		putWanted(f.objs.Enis, f.seen.enis, enis),
		putWanted(f.objs.Stations, f.seen.stations, come.stations),
		putWanted(f.objs.Mappings, f.seen.mappings, come.mappings),
		putWanted(f.objs.Mappings6, f.seen.mapping6, come.mapping6),
		putWanted(f.objs.Elastics, f.seen.elastics, come.elastics),
		putWanted(f.objs.Publics, f.seen.publics, come.publics),
		f.deleteRoutes(come), // when no interface uses them
	)
}

// forget removes the rules of who is gone, and the flows of interfaces that
// are. adopted says that it is not known who came and went before.
func (f *Fabric) forget(want desired, kept map[vpc.ENIID]int, adopted bool) error {
	live := map[uint32]bool{}
	for _, i := range kept {
		live[uint32(i)] = true
	}
	gone, err := f.policies.remove(func(i uint32) bool { return live[i] })
	if err != nil {
		return err
	}
	if _, err := f.policies6.remove(func(i uint32) bool { return live[i] }); err != nil {
		return err
	}
	stays := func(k bpfgen.FabricSubnetKey) bool { _, ok := want.acls[k]; return ok }
	if _, err := f.acls.remove(stays); err != nil {
		return err
	}
	if _, err := f.acls6.remove(stays); err != nil {
		return err
	}
	if gone || adopted {
		return f.purgeFlows(live)
	}
	return nil
}

// putRules gives fabric ends and subnets the rules that they are to have.
func (f *Fabric) putRules(want desired, index map[vpc.ENIID]int) error {
	policies, policies6 := map[uint32]ruleSet{}, map[uint32]ruleSet{}
	for id, i := range index {
		p := want.ports[id].policy
		policies[uint32(i)] = ruleSet{p.Version, p}
		if six := want.ports[id].six; six != nil {
			policies6[uint32(i)] = ruleSet{six.Version, six}
		}
	}
	acls, acls6 := map[bpfgen.FabricSubnetKey]ruleSet{}, map[bpfgen.FabricSubnetKey]ruleSet{}
	for k, a := range want.acls {
		acls[k], acls6[k] = ruleSet{a.four.Version, a.four}, ruleSet{a.six.Version, a.six}
	}
	return errors.Join(f.acls.put(acls), f.acls6.put(acls6), f.policies6.put(policies6), f.policies.put(policies))
}

// removePorts removes all that is not kept: devices, programs, records, counters,
// listeners.
func (f *Fabric) removePorts(kept map[vpc.ENIID]int, doomed []int) error {
	if err := f.route.remove(doomed...); err != nil {
		return err
	}
	for id, t := range f.taps {
		if _, ok := kept[id]; ok || id == internetName {
			continue
		}
		delete(f.taps, id)
		if err := t.unpin(); err != nil {
			return fmt.Errorf("unpin programs of %s: %w", id, err)
		}
	}
	live := map[uint32]bool{}
	for _, i := range kept {
		live[uint32(i)] = true
	}
	for i, r := range f.seen.enis {
		if live[i] {
			continue
		}
		for _, m := range []*ebpf.Map{f.objs.Enis, f.objs.Counts, f.objs.Buckets} {
			if err := m.Delete(i); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return fmt.Errorf("delete record of %s: %w", eniID(r), err)
			}
		}
		delete(f.seen.enis, i)
		f.listening.close(eniID(r))
		f.log.Info("interface removed", "eni", eniID(r))
	}
	return nil
}

// repair sets kept fabric ends right that somebody changed, or that a killed
// process did not come to finish.
func (f *Fabric) repair(devices []deviceInfo, kept map[vpc.ENIID]int, errs *[]error) {
	byIndex := map[int]vpc.ENIID{}
	for id, i := range kept {
		byIndex[i] = id
	}
	for _, d := range devices {
		id, ok := byIndex[d.index]
		const flags = unix.IFF_UP | unix.IFF_NOARP
		if !ok || d.flags&flags == flags && d.mtu == wireMTU && d.alias == string(id) {
			continue
		}
		if err := f.route.enable(d.index, string(id)); err != nil {
			*errs = append(*errs, err)
		}
	}
}

// makePorts makes the wanted ports that index lacks, and adds them to it.
func (f *Fabric) makePorts(ctx context.Context, want desired, guests map[string]uint64, index map[vpc.ENIID]int, errs *[]error) {
	var missing []*port
	for _, p := range want.order {
		if _, ok := index[p.ID]; !ok {
			missing = append(missing, p)
		}
	}
	if len(missing) == 0 {
		return
	}
	// Programs are attached to an ifindex of the thread's namespace.
	err := nl.Do(nl.Path(f.names.fabric()), func() error {
		for _, p := range missing {
			if err := ctx.Err(); err != nil {
				return fmt.Errorf("set fabric: %w", err)
			}
			if guests[p.Guest] == 0 {
				*errs = append(*errs, fmt.Errorf("interface %s: its guest %s could not be made", p.ID, p.Guest))
				continue
			}
			i, err := f.makePort(p, guests[p.Guest])
			if err != nil {
				*errs = append(*errs, fmt.Errorf("interface %s: %w", p.ID, err))
				continue
			}
			index[p.ID] = i
			f.log.Info("interface made", "eni", p.ID, "netns", p.Guest, "device", p.DeviceIndex)
		}
		return nil
	})
	if err != nil {
		*errs = append(*errs, err)
	}
}

// makePort makes one port but for the way to it, in the fabric's namespace.
func (f *Fabric) makePort(p *port, guest uint64) (_ int, err error) {
	ns, err := os.Open(nl.Path(p.Guest))
	if err != nil {
		return 0, fmt.Errorf("open guest: %w", err)
	}
	defer ns.Close()
	index := f.nextIndex
	f.nextIndex++
	v := veth{name: p.device, index: index, peerName: fmt.Sprintf("eth%d", p.DeviceIndex), peerMAC: p.MAC, peerMTU: p.MTU, peerNS: ns}
	if err := f.route.add(v); err != nil {
		return 0, err
	}
	record := p.record(guest)
	defer func() {
		if err != nil {
			err = errors.Join(err, f.unmakePort(p.ID, index))
		}
	}()
	if err := addCounter(f.objs.Counts, uint32(index)); err != nil {
		return 0, err
	}
	half := record
	half.Flags &^= flagReady
	if err := nl.AwaitMemory(func() error { return f.objs.Enis.Put(uint32(index), half) }); err != nil {
		return 0, fmt.Errorf("write record: %w", err)
	}
	f.seen.enis[uint32(index)] = half
	if err := nl.AwaitMemory(func() error { return f.objs.LoggedEnis.Put(uint32(index), p.logged()) }); err != nil {
		return 0, fmt.Errorf("write what flow records say: %w", err)
	}
	if err := f.attach(p.ID, index, f.objs.FromGuest, f.objs.ToGuest); err != nil {
		return 0, err
	}
	if err := f.route.enable(index, string(p.ID)); err != nil {
		return 0, err
	}
	if p.Configure {
		if err := configure(p); err != nil {
			return 0, err
		}
	}
	if err := nl.AwaitMemory(func() error { return f.objs.Enis.Put(uint32(index), record) }); err != nil {
		return 0, fmt.Errorf("write record: %w", err)
	}
	f.seen.enis[uint32(index)] = record
	return index, nil
}

func (f *Fabric) unmakePort(id vpc.ENIID, index int) error {
	errs := []error{f.route.remove(index)}
	if t := f.taps[id]; t != nil {
		delete(f.taps, id)
		errs = append(errs, t.unpin())
	}
	for _, m := range []*ebpf.Map{f.objs.Enis, f.objs.Counts, f.objs.Buckets} {
		if err := m.Delete(uint32(index)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, err)
		}
	}
	delete(f.seen.enis, uint32(index))
	return errors.Join(errs...)
}

// attach puts two programs onto a device and pins their links.
func (f *Fabric) attach(id vpc.ENIID, index int, in, out *ebpf.Program) error {
	t := &tap{}
	f.taps[id] = t
	for _, a := range []struct {
		to        *link.Link
		program   *ebpf.Program
		point     ebpf.AttachType
		direction string
	}{
		{&t.in, in, ebpf.AttachTCXIngress, "in"},
		{&t.out, out, ebpf.AttachTCXEgress, "out"},
	} {
		l, err := link.AttachTCX(link.TCXOptions{Interface: index, Program: a.program, Attach: a.point})
		if err != nil {
			return fmt.Errorf("attach program (needs Linux 6.6): %w", err)
		}
		*a.to = l
		path := filepath.Join(f.pins, "links", string(id)+"-"+a.direction)
		if err := l.Pin(path); err != nil {
			return fmt.Errorf("pin program: %w", err)
		}
	}
	return nil
}

// configure does in the guest what a DHCP client would, for its primary
// interface: address, MTU (set when the link was made), default route.
func configure(p *port) error {
	return nl.Do(nl.Path(p.Guest), func() error {
		route, err := dialRoute()
		if err != nil {
			return err
		}
		defer route.Close()
		devices, err := route.devices(false)
		if err != nil {
			return err
		}
		name := fmt.Sprintf("eth%d", p.DeviceIndex)
		i := slices.IndexFunc(devices, func(d deviceInfo) bool { return d.name == name })
		if i < 0 {
			return fmt.Errorf("configure %s: it is not in the guest any more", name)
		}
		index := devices[i].index
		for _, err := range []error{
			route.up(index, 0),
			route.addAddress(index, netip.PrefixFrom(p.Primary, p.subnet.CIDR.Bits()), unix.RT_SCOPE_UNIVERSE),
			route.addDefault(index, vpc.Router(p.subnet.CIDR), p.Primary),
		} {
			if err != nil {
				return fmt.Errorf("configure %s: %w", name, err)
			}
		}
		if err := configure6(route, index, p); err != nil {
			return fmt.Errorf("configure %s: %w", name, err)
		}
		return nil
	})
}

// configure6 gives the guest's end its first IPv6 address, if it has one, and the
// way to the router. A guest that has IPv6 switched off stays as it is.
func configure6(route *rtnetlink, index int, p *port) error {
	i := slices.IndexFunc(p.Addresses, func(a netip.Prefix) bool { return a.Addr().Is6() && a.IsSingleIP() })
	if i < 0 || p.flags()&ipv6 == 0 {
		return nil
	}
	err := route.addAddress6(index, p.Addresses[i].Addr())
	if err == nil {
		err = route.addDefault6(index)
	}
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) {
		return nil
	}
	return err
}
