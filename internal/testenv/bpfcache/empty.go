package bpfcache

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
)

// renew makes a map that belongs to programs what it was when they were loaded.
func renew(m *ebpf.Map, spec *ebpf.CollectionSpec, name string) error {
	switch {
	case isConstant(name):
		return nil
	case isSection(name):
		return m.Put(uint32(0), initial(spec, name))
	}
	return empty(m)
}

// emptyAll empties the maps that are pinned in a directory.
func emptyAll(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, e.Name()), nil)
		if err != nil {
			return err
		}
		err = empty(m)
		m.Close()
		if err != nil {
			return fmt.Errorf("empty map %s: %w", e.Name(), err)
		}
	}
	return nil
}

// empty brings a map to the state of one that was just made.
func empty(m *ebpf.Map) error {
	switch m.Type() {
	case ebpf.Hash, ebpf.LRUHash:
		return emptyHash(m)
	case ebpf.PerCPUHash, ebpf.LRUCPUHash, ebpf.LPMTrie:
		return deleteEach(m)
	case ebpf.HashOfMaps:
		return deleteAtOnce(m)
	case ebpf.Array:
		n := int(m.MaxEntries())
		_, err := m.BatchUpdate(indexes(n), bytesOf(n, m.ValueSize()), nil)
		return err
	case ebpf.PerCPUArray:
		cpus, err := ebpf.PossibleCPU()
		if err != nil {
			return err
		}
		zero := make([][]byte, cpus)
		for i := range zero {
			zero[i] = make([]byte, m.ValueSize())
		}
		for i := range m.MaxEntries() {
			if err := m.Put(i, zero); err != nil {
				return err
			}
		}
		return nil
	case ebpf.ArrayOfMaps:
		return emptyArrayOfMaps(m)
	case ebpf.ProgramArray:
		return deleteEach(m)
	case ebpf.RingBuf:
		return drain(m)
	}
	return fmt.Errorf("the cache cannot empty a map of type %s", m.Type())
}

func indexes(n int) []uint32 {
	out := make([]uint32, n)
	for i := range out {
		out[i] = uint32(i)
	}
	return out
}

// bytesOf returns a slice of n arrays of so many bytes.
func bytesOf(n int, size uint32) any {
	t := reflect.SliceOf(reflect.ArrayOf(int(size), reflect.TypeFor[byte]()))
	return reflect.MakeSlice(t, n, n).Interface()
}

func emptyHash(m *ebpf.Map) error {
	const batch = 16384
	n := min(batch, int(m.MaxEntries()))
	keys, values := bytesOf(n, m.KeySize()), bytesOf(n, m.ValueSize())
	var cursor ebpf.MapBatchCursor
	for {
		_, err := m.BatchLookupAndDelete(&cursor, keys, values, nil)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil // that was the end
		}
		if err != nil {
			return err
		}
	}
}

// emptyArrayOfMaps asks for what is there before it deletes it: such an array may
// have thousands of places.
func emptyArrayOfMaps(m *ebpf.Map) error {
	keys, ids := make([]uint32, m.MaxEntries()), make([]uint32, m.MaxEntries())
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, ids, nil)
		for _, k := range keys[:n] {
			if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return err
			}
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil // that was the end
		}
		if err != nil {
			return err
		}
	}
}

// keysOf lists the keys of a map. An array has all its indexes as keys, with
// something there or not.
func keysOf(m *ebpf.Map) (keys [][]byte, err error) {
	var prev any
	for {
		k, err := m.NextKeyBytes(prev)
		if err != nil || k == nil {
			return keys, err
		}
		keys = append(keys, k)
		prev = k
	}
}

func deleteEach(m *ebpf.Map) error {
	keys, err := keysOf(m)
	if err != nil {
		return err
	}
	for _, k := range keys {
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
	return nil
}

// deleteAtOnce is for maps of maps, where the kernel waits for an RCU grace period
// after each call.
func deleteAtOnce(m *ebpf.Map) error {
	keys, err := keysOf(m)
	if err != nil || len(keys) == 0 {
		return err
	}
	all := reflect.MakeSlice(reflect.SliceOf(reflect.ArrayOf(int(m.KeySize()), reflect.TypeFor[byte]())), len(keys), len(keys))
	for i, k := range keys {
		reflect.Copy(all.Index(i), reflect.ValueOf(k))
	}
	_, err = m.BatchDelete(all.Interface(), nil)
	return err
}

// drain reads a ring buffer until it is empty.
func drain(m *ebpf.Map) error {
	r, err := ringbuf.NewReader(m)
	if err != nil {
		return err
	}
	defer r.Close()
	r.SetDeadline(time.Unix(1, 0)) // long past: it reads what is there
	for {
		if _, err := r.Read(); errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		} else if err != nil {
			return err
		}
	}
}
