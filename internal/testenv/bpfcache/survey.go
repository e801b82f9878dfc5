package bpfcache

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"maps"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
)

// surveyed is what a spec has.
type surveyed struct {
	spec   *ebpf.CollectionSpec
	shared []string // maps that are pinned and used by programs
	own    []string // maps that are used by programs and not pinned
	unused []string // maps that no program uses
	kind   string   // tells shared maps of different shape apart
	key    string   // tells programs apart, by their code and by what their constants are set to
}

// isSection tells whether a map is a section of global variables.
func isSection(name string) bool {
	return name == ".bss" || strings.HasPrefix(name, ".data") || strings.HasPrefix(name, ".rodata")
}

func isConstant(name string) bool { return strings.HasPrefix(name, ".rodata") }

func survey(spec *ebpf.CollectionSpec) (*surveyed, error) {
	s := &surveyed{spec: spec}
	used := map[string]bool{}
	key := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(spec.Programs)) {
		p := spec.Programs[name]
		fmt.Fprintln(key, name, p.Type, p.AttachType, p.Flags)
		for _, ins := range p.Instructions {
			ref := ins.Reference()
			if ins.IsLoadFromMap() {
				used[ref] = true
			}
			var b [20]byte
			b[0], b[1], b[2] = byte(ins.OpCode), byte(ins.Dst), byte(ins.Src)
			binary.LittleEndian.PutUint16(b[4:], uint16(ins.Offset))
			binary.LittleEndian.PutUint32(b[8:], uint32(ins.OpCode))
			binary.LittleEndian.PutUint64(b[12:], uint64(ins.Constant))
			key.Write(b[:])
			key.Write([]byte(ref))
		}
	}
	kind := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(spec.Maps)) {
		m := spec.Maps[name]
		switch {
		case !used[name]:
			s.unused = append(s.unused, name)
		case m.Pinning == ebpf.PinByName:
			s.shared = append(s.shared, name)
			shape(kind, m)
		default:
			s.own = append(s.own, name)
			shape(key, m)
		}
		if len(m.Contents) > 0 && !isSection(name) {
			return nil, fmt.Errorf("map %s has contents of its own, which the cache cannot restore", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(spec.Variables)) {
		fmt.Fprintf(key, "%s %x\n", name, spec.Variables[name].Value)
	}
	if len(s.shared) == 0 {
		return nil, errors.New("the programs use no pinned map")
	}
	s.kind, s.key = sum(kind), sum(key)
	return s, nil
}

func shape(w hash.Hash, m *ebpf.MapSpec) {
	fmt.Fprintln(w, m.Name, m.Type, m.KeySize, m.ValueSize, m.MaxEntries, m.Flags)
	if m.InnerMap != nil {
		shape(w, m.InnerMap)
	}
}

func sum(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)[:8]) }

// initial is what a section of global variables begins with.
func initial(spec *ebpf.CollectionSpec, section string) []byte {
	m := spec.Maps[section]
	out := make([]byte, m.ValueSize)
	if len(m.Contents) == 1 {
		if b, ok := m.Contents[0].Value.([]byte); ok {
			copy(out, b)
		}
	}
	for _, v := range spec.Variables {
		if v.SectionName == section {
			copy(out[v.Offset:], v.Value)
		}
	}
	return out
}
