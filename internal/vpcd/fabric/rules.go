package fabric

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/cilium/ebpf"
)

// ruleMaps gives rules of one kind to whom they are for: outer is a map of maps,
// by K, of which each inner map holds one set of rules and is never changed.
// Equal sets, with equal versions, are one inner map.
type ruleMaps[K comparable] struct {
	what  string    // for errors
	outer *ebpf.Map // pinned
	size  uint32    // of a set, in bytes
	// version reads the version of the set that a map holds.
	version func(m *ebpf.Map) (uint64, error)
	kept    map[uint64]*ebpf.Map // in use, by version
	seen    map[K]uint64         // what outer holds, as versions
}

// ruleSet is a set of rules: a pointer to it, and its version.
type ruleSet struct {
	version uint64
	value   any
}

// read makes seen what is in the kernel.
func (r *ruleMaps[K]) read() error {
	var ids map[K]uint32
	if err := readMap(r.outer, &ids); err != nil {
		return err
	}
	r.seen = map[K]uint64{}
	versions := map[uint32]uint64{} // by map ID
	for k, id := range ids {
		version, ok := versions[id]
		if !ok {
			m, err := ebpf.NewMapFromID(ebpf.MapID(id))
			if err != nil {
				return fmt.Errorf("open %s: %w", r.what, err)
			}
			if version, err = r.version(m); err != nil {
				return errors.Join(fmt.Errorf("read %s: %w", r.what, err), m.Close())
			}
			versions[id] = version
			if r.kept[version] == nil {
				r.kept[version] = m
			} else if err := m.Close(); err != nil {
				return fmt.Errorf("close %s: %w", r.what, err)
			}
		}
		r.seen[k] = version
	}
	return nil
}

// put gives each K of want its rules, all that change by one system call: it
// returns when no program has the former ones.
func (r *ruleMaps[K]) put(want map[K]ruleSet) error {
	var keys []K
	var values []uint32
	used := map[uint64]bool{}
	for k, s := range want {
		used[s.version] = true
		if version, ok := r.seen[k]; ok && version == s.version {
			continue
		}
		m, err := r.inner(s)
		if err != nil {
			return err
		}
		keys, values = append(keys, k), append(values, uint32(m.FD()))
	}
	if len(keys) > 0 {
		if _, err := r.outer.BatchUpdate(keys, values, nil); err != nil {
			return fmt.Errorf("put %s in place: %w", r.what, err)
		}
	}
	for _, k := range keys {
		r.seen[k] = want[k].version
	}
	for version, m := range r.kept {
		if used[version] {
			continue
		}
		delete(r.kept, version)
		if err := m.Close(); err != nil {
			return fmt.Errorf("close %s: %w", r.what, err)
		}
	}
	return nil
}

// inner returns a map that holds the rules, the one that is there or a new one.
func (r *ruleMaps[K]) inner(s ruleSet) (*ebpf.Map, error) {
	if m := r.kept[s.version]; m != nil {
		return m, nil
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: r.outer.String(), Type: ebpf.Array, KeySize: 4, ValueSize: r.size, MaxEntries: 1})
	if err != nil {
		return nil, fmt.Errorf("make %s: %w", r.what, err)
	}
	if err := m.Put(uint32(0), s.value); err != nil {
		return nil, errors.Join(fmt.Errorf("write %s: %w", r.what, err), m.Close())
	}
	r.kept[s.version] = m
	return m, nil
}

// remove takes the rules from each K that is not to have any, and reports
// whether there was one.
func (r *ruleMaps[K]) remove(stays func(K) bool) (bool, error) {
	gone := slices.DeleteFunc(slices.Collect(maps.Keys(r.seen)), stays)
	if len(gone) == 0 {
		return false, nil
	}
	if _, err := r.outer.BatchDelete(gone, nil); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return true, fmt.Errorf("remove %s: %w", r.what, err)
	}
	for _, k := range gone {
		delete(r.seen, k)
	}
	return true, nil
}

func (r *ruleMaps[K]) close() error {
	var errs []error
	for _, m := range r.kept {
		errs = append(errs, m.Close())
	}
	r.kept = nil
	return errors.Join(errs...)
}
