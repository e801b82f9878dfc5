package fabric

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"unsafe"

	"github.com/cilium/ebpf"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// policySize is the size of a policy in bytes.
const policySize = unsafe.Sizeof(bpfgen.FabricPolicy{})

// readPolicies reads which version of a policy each fabric end has, and keeps
// the policies.
func (f *Fabric) readPolicies(out *map[uint32]uint64) error {
	var ids map[uint32]uint32
	if err := readMap(f.objs.Policies, &ids); err != nil {
		return err
	}
	*out = map[uint32]uint64{}
	versions := map[uint32]uint64{} // by map ID
	for index, id := range ids {
		version, ok := versions[id]
		if !ok {
			m, err := ebpf.NewMapFromID(ebpf.MapID(id))
			if err != nil {
				return fmt.Errorf("open a policy: %w", err)
			}
			var p bpfgen.FabricPolicy
			if err := m.Lookup(uint32(0), &p); err != nil {
				return errors.Join(fmt.Errorf("read a policy: %w", err), m.Close())
			}
			version = p.Version
			versions[id] = version
			if f.kept[version] == nil {
				f.kept[version] = m
			} else if err := m.Close(); err != nil {
				return fmt.Errorf("close a policy: %w", err)
			}
		}
		(*out)[index] = version
	}
	return nil
}

// policyMap returns a map that holds the policy, the one that is there or a new
// one.
func (f *Fabric) policyMap(p *bpfgen.FabricPolicy) (*ebpf.Map, error) {
	if m := f.kept[p.Version]; m != nil {
		return m, nil
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "policy", Type: ebpf.Array, KeySize: 4, ValueSize: uint32(policySize), MaxEntries: 1,
	})
	if err != nil {
		return nil, fmt.Errorf("make a policy: %w", err)
	}
	if err := m.Put(uint32(0), p); err != nil {
		return nil, errors.Join(fmt.Errorf("write a policy: %w", err), m.Close())
	}
	f.kept[p.Version] = m
	return m, nil
}

// putPolicies gives each fabric end its policy, all that change by one system
// call: it waits for the programs that still have the former ones.
func (f *Fabric) putPolicies(want desired, index map[vpc.ENIID]int) error {
	var keys, values []uint32
	for id, i := range index {
		p := want.ports[id].policy
		if f.seen.policies[uint32(i)] == p.Version {
			continue
		}
		m, err := f.policyMap(p)
		if err != nil {
			return err
		}
		keys, values = append(keys, uint32(i)), append(values, uint32(m.FD()))
	}
	if len(keys) > 0 {
		if _, err := f.objs.Policies.BatchUpdate(keys, values, nil); err != nil {
			return fmt.Errorf("put policies in place: %w", err)
		}
	}
	used := map[uint64]bool{}
	for id, i := range index {
		version := want.ports[id].policy.Version
		f.seen.policies[uint32(i)] = version
		used[version] = true
	}
	for version, m := range f.kept {
		if used[version] {
			continue
		}
		delete(f.kept, version)
		if err := m.Close(); err != nil {
			return fmt.Errorf("close a policy: %w", err)
		}
	}
	return nil
}

// forget removes policies and flows of fabric ends that are gone. adopted says
// that it is not known who came and went before.
func (f *Fabric) forget(kept map[vpc.ENIID]int, adopted bool) error {
	live := map[uint32]bool{}
	for _, i := range kept {
		live[uint32(i)] = true
	}
	gone := slices.DeleteFunc(slices.Collect(maps.Keys(f.seen.policies)), func(i uint32) bool { return live[i] })
	if len(gone) == 0 && !adopted {
		return nil
	}
	if len(gone) > 0 {
		if _, err := f.objs.Policies.BatchDelete(gone, nil); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove policies: %w", err)
		}
	}
	if err := f.purgeFlows(live); err != nil {
		return err
	}
	for _, i := range gone {
		delete(f.seen.policies, i)
	}
	return nil
}
