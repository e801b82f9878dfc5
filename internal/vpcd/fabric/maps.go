package fabric

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// Flags of an ENI and kinds of a route, as bpf/fabric_state.h has them.
const (
	flagCheck  = bpfgen.FabricEniFlagENI_SOURCE_DEST_CHECK
	flagReady  = bpfgen.FabricEniFlagENI_READY
	ungated    = bpfgen.FabricEniFlagENI_UNGATED
	ipv6       = bpfgen.FabricEniFlagENI_IPV6
	routeLocal = bpfgen.FabricRouteKindROUTE_LOCAL
	routeENI   = bpfgen.FabricRouteKindROUTE_ENI
	routeIGW   = bpfgen.FabricRouteKindROUTE_IGW
	routePeer  = bpfgen.FabricRouteKindROUTE_PEER
	blackhole  = bpfgen.FabricRouteKindROUTE_BLACKHOLE
)

// contents is what the maps hold, or are to hold.
type contents struct {
	enis     map[uint32]bpfgen.FabricEni
	mappings map[bpfgen.FabricAddress]bpfgen.FabricTarget
	mapping6 map[bpfgen.FabricAddress6]bpfgen.FabricTarget
	stations map[bpfgen.FabricStation]bpfgen.FabricTarget
	routes   map[bpfgen.FabricRouteKey]bpfgen.FabricRoute
	routes6  map[bpfgen.FabricRouteKey]bpfgen.FabricRoute
	publics  map[uint32]bpfgen.FabricPublic
	elastics map[bpfgen.FabricAddress]uint32
	internet bpfgen.FabricTarget
}

// read returns what the maps hold.
func (f *Fabric) read() (*contents, error) {
	c := &contents{}
	err := errors.Join(
		readMap(f.objs.Enis, &c.enis),
		readMap(f.objs.Mappings, &c.mappings),
		readMap(f.objs.Mappings6, &c.mapping6),
		readMap(f.objs.Stations, &c.stations),
		readMap(f.objs.Routes, &c.routes),
		readMap(f.objs.Routes6, &c.routes6),
		readMap(f.objs.Publics, &c.publics),
		readMap(f.objs.Elastics, &c.elastics),
		f.objs.Internet.Lookup(uint32(0), &c.internet),
		f.policies.read(),
		f.policies6.read(),
		f.acls.read(),
		f.acls6.read(),
	)
	if err != nil {
		return nil, err
	}
	return c, nil
}

func readMap[K, V comparable](m *ebpf.Map, out *map[K]V) error {
	*out = map[K]V{}
	var k K
	var v V
	it := m.Iterate()
	for it.Next(&k, &v) {
		(*out)[k] = v
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read map %s: %w", m, err)
	}
	return nil
}

// deleteStale deletes from the map what want lacks.
func deleteStale[K, V comparable](m *ebpf.Map, have, want map[K]V) error {
	for k := range have {
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

// putWanted writes what the map lacks of want, or has otherwise.
func putWanted[K, V comparable](m *ebpf.Map, have, want map[K]V) error {
	for k, v := range want {
		if old, ok := have[k]; ok && old == v {
			continue
		}
		if err := nl.AwaitMemory(func() error { return m.Put(k, v) }); err != nil {
			return fmt.Errorf("write map %s: %w", m, err)
		}
		have[k] = v
	}
	return nil
}

// forwarding returns the contents by which packets to the ports find their
// way; index tells each port's fabric end. Map enis is not part of it: an entry
// there is made with its device.
func forwarding(d desired, index map[vpc.ENIID]int) *contents {
	c := &contents{
		mappings: map[bpfgen.FabricAddress]bpfgen.FabricTarget{},
		mapping6: map[bpfgen.FabricAddress6]bpfgen.FabricTarget{},
		stations: map[bpfgen.FabricStation]bpfgen.FabricTarget{},
		routes:   map[bpfgen.FabricRouteKey]bpfgen.FabricRoute{},
		routes6:  map[bpfgen.FabricRouteKey]bpfgen.FabricRoute{},
		publics:  d.publics,
		elastics: d.elastics,
	}
	targets := map[vpc.ENIID]bpfgen.FabricTarget{}
	for id, ifindex := range index {
		p := d.ports[id]
		t := bpfgen.FabricTarget{Ifindex: uint32(ifindex), Flags: p.flags(), Subnet: be32(p.subnet.CIDR.Addr()), Mac: [6]byte(p.MAC), Mtu: uint16(p.MTU)}
		targets[id] = t
		for a := range each(p.Addresses) {
			c.mappings[bpfgen.FabricAddress{Vni: p.VNI, Addr: a.As16()}] = t
		}
		for _, a := range p.Addresses {
			if a.Addr().Is6() && p.flags()&ipv6 != 0 {
				c.mapping6[mapping6(p.VNI, a)] = t
			}
		}
		c.stations[bpfgen.FabricStation{Vni: p.VNI, Subnet: t.Subnet, Mac: t.Mac}] = t
	}
	for table, routes := range d.routes {
		for _, r := range routes {
			to := bpfgen.FabricRoute{Kind: blackhole}
			switch t, attached := targets[r.ENI]; {
			case r.Local:
				to.Kind = routeLocal
			case r.Internet:
				to.Kind = routeIGW
			case r.Peer != 0:
				to.Kind, to.Vni = routePeer, r.Peer
			case attached:
				to.Kind, to.Target = routeENI, t
			}
			if r.CIDR.Addr().Is4() {
				c.routes[routeKey(table, r.CIDR)] = to
			} else {
				c.routes6[routeKey(table, r.CIDR)] = to
			}
		}
	}
	return c
}

// flags are those that a Config decides.
func (p *port) flags() (f bpfgen.FabricEniFlag) {
	if p.SourceDestCheck {
		f |= flagCheck
	}
	if p.Ungated {
		f |= ungated
	}
	// A NAT gateway has no IPv6.
	if p.subnet.CIDR6.IsValid() && !p.Ungated {
		f |= ipv6
	}
	return f
}

// record is the port's entry in map enis, once it is ready. guest is the inode
// of its guest's namespace.
func (p *port) record(guest uint64) bpfgen.FabricEni {
	r := bpfgen.FabricEni{
		Vni:         p.VNI,
		Flags:       p.flags() | flagReady,
		Subnet:      be32(p.subnet.CIDR.Addr()),
		Netmask:     netmask(p.subnet.CIDR),
		Mac:         [6]byte(p.MAC),
		DeviceIndex: uint16(p.DeviceIndex),
		Table:       p.table,
		Guest:       guest,
		Mtu:         uint16(p.MTU),
	}
	if p.subnet.Resolver.IsValid() {
		r.Resolver = be32(p.subnet.Resolver)
	}
	if r.Flags&ipv6 != 0 {
		r.Subnet6, r.Netmask6 = words(p.subnet.CIDR6.Addr()), netmask6(p.subnet.CIDR6)
	}
	if p.Configure {
		r.Configured = be32(p.Primary)
	}
	for i, c := range []byte(p.ID) { // at most 21 bytes: check saw to that
		r.Id[i] = int8(c)
	}
	return r
}

// sameIdentity tells whether two records differ in nothing but what can be
// changed in place.
func sameIdentity(a, b bpfgen.FabricEni) bool {
	const changes = flagCheck | ungated | ipv6
	a.Flags = a.Flags&^changes | b.Flags&changes
	a.Table = b.Table
	a.Resolver = b.Resolver
	a.Subnet6, a.Netmask6 = b.Subnet6, b.Netmask6
	return a == b
}

func eniID(r bpfgen.FabricEni) vpc.ENIID {
	var b []byte
	for _, c := range r.Id {
		if c == 0 {
			break
		}
		b = append(b, byte(c))
	}
	return vpc.ENIID(b)
}

// addCounter makes the counters of a fabric end; those that are there stay.
func addCounter(m *ebpf.Map, index uint32) error {
	zero := make([]bpfgen.FabricCounters, ebpf.MustPossibleCPU())
	if err := nl.AwaitMemory(func() error { return m.Update(index, zero, ebpf.UpdateNoExist) }); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
		return fmt.Errorf("make counters: %w", err)
	}
	return nil
}
