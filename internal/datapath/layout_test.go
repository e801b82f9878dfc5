package datapath

import (
	"reflect"
	"strings"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf/btf"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
)

func copyInto(r *bpfgen.NodeEndpoint, b []byte) {
	copy(unsafe.Slice((*byte)(unsafe.Pointer(r)), unsafe.Sizeof(*r)), b)
}

// What C and Go share is laid out alike, and in C without holes, whose bytes
// would be compared and printed though nobody wrote them.
func TestSharedStructs(t *testing.T) {
	spec, err := bpfgen.LoadNode()
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]any{
		"addr": bpfgen.NodeAddr{}, "iface": bpfgen.NodeIface{}, "iface_counters": bpfgen.NodeIfaceCounters{},
		"endpoint": bpfgen.NodeEndpoint{}, "layout_meta": bpfgen.NodeLayoutMeta{},
		"tuple": bpfgen.NodeTuple{}, "conn_key": bpfgen.NodeConnKey{}, "conn": bpfgen.NodeConn{}, "fragment_key": bpfgen.NodeFragmentKey{}, "fragment": bpfgen.NodeFragment{},
		"eni": bpfgen.NodeEni{}, "net_key": bpfgen.NodeNetKey{}, "event": bpfgen.NodeEvent{}, "conn_way": bpfgen.NodeConnWay{}, "conn_set": bpfgen.NodeConnSet{}, "conn_seed": bpfgen.NodeConnSeed{}, "cpu": bpfgen.NodeCpu{}, "router": bpfgen.NodeRouter{}, "sweep": bpfgen.NodeSweep{}, "stayed": bpfgen.NodeStayed{},
	} {
		var c *btf.Struct
		if err := spec.Types.TypeByName(name, &c); err != nil {
			t.Errorf("struct %s: %v", name, err)
			continue
		}
		g := reflect.TypeOf(v)
		if uintptr(c.Size) != g.Size() {
			t.Errorf("struct %s has %d bytes in C, %d in Go", name, c.Size, g.Size())
		}
		fields := map[string]reflect.StructField{}
		for i := range g.NumField() {
			f := g.Field(i)
			fields[strings.ToLower(f.Name)] = f
		}
		end := uint32(0)
		for _, m := range c.Members {
			f, ok := fields[strings.ReplaceAll(m.Name, "_", "")]
			if !ok || f.Offset != uintptr(m.Offset.Bytes()) {
				t.Errorf("%s.%s is at %d in C, at %d in Go", name, m.Name, m.Offset.Bytes(), f.Offset)
			}
			size, err := btf.Sizeof(m.Type)
			if err != nil || uintptr(size) != f.Type.Size() {
				t.Errorf("%s.%s has %d bytes in C, %d in Go (%v)", name, m.Name, size, f.Type.Size(), err)
			}
			if m.Offset.Bytes() != end {
				t.Errorf("a hole before %s.%s", name, m.Name)
			}
			end = m.Offset.Bytes() + uint32(size)
		}
		if end != c.Size {
			t.Errorf("a hole at the end of %s", name)
		}
	}
}

// Every reason that a program can give has a name.
func TestReasonsHaveNames(t *testing.T) {
	spec, err := bpfgen.LoadNode()
	if err != nil {
		t.Fatal(err)
	}
	var reasons *btf.Enum
	if err := spec.Types.TypeByName("drop_reason", &reasons); err != nil {
		t.Fatal(err)
	}
	for _, v := range reasons.Values {
		if v.Name == "DROP_NONE" || v.Name == "DROP_REASONS" {
			continue
		}
		want := strings.ToLower(strings.TrimPrefix(v.Name, "DROP_"))
		if got := reasonNames[bpfgen.NodeDropReason(v.Value)]; got != want {
			t.Errorf("%s is called %q, want %q", v.Name, got, want)
		}
	}
	if len(reasonNames) != int(bpfgen.NodeDropReasonDROP_REASONS)-1 {
		t.Errorf("%d names for %d reasons", len(reasonNames), bpfgen.NodeDropReasonDROP_REASONS-1)
	}
	if slots := spec.Maps[bpfgen.NodeMapDrops].MaxEntries; uint32(bpfgen.NodeDropReasonDROP_REASONS) > slots || int(slots) != len(bpfgen.NodeIfaceCounters{}.Drops) {
		t.Errorf("%d reasons, %d slots", bpfgen.NodeDropReasonDROP_REASONS, slots)
	}
}
