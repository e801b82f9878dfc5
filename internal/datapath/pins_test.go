package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	"github.com/underlay-cni/underlay/internal/testenv"
)

func TestOpenRefuses(t *testing.T) {
	w := newWorld(t)
	check := func(err error, want string) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Open: %v, want %q", err, want)
		}
	}
	bpffs := w.bpffs
	w.bpffs = t.TempDir()
	_, err := w.tryOpen(Options{})
	check(err, "mount -t bpf bpf "+w.bpffs)
	w.bpffs = ""
	_, err = w.tryOpen(Options{})
	check(err, "no directory")

	w.bpffs = bpffs
	d := w.open(Options{})
	_, err = w.tryOpen(Options{})
	check(err, "stop the other agent")

	setLayout := func(v uint32) {
		if err := d.objs.Meta.Put(uint32(0), bpfgen.NodeLayoutMeta{Layout: v}); err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	setLayout(layoutVersion + 1)
	_, err = w.tryOpen(Options{})
	check(err, fmt.Sprintf("layout %d, this agent knows up to %d", layoutVersion+1, layoutVersion))

	if err := os.Remove(filepath.Join(mapDir(w.bpffs), bpfgen.NodeMapMeta)); err != nil {
		t.Fatal(err)
	}
	_, err = w.tryOpen(Options{})
	check(err, "not the one with their layout's version")

	// A map of the same name and layout that is another one.
	w.bpffs = bpffs + "-2"
	d = w.open(Options{})
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(mapDir(w.bpffs), bpfgen.NodeMapIfaces)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Pin(path); err != nil {
		t.Fatal(err)
	}
	_, err = w.tryOpen(Options{})
	check(err, "drain the node")
}

// A record of a version to come is refused, and left as it is.
func TestOpenRefusesLaterRecords(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	k := addrKey(farIP)
	if err := d.objs.Endpoints.Put(&k, &bpfgen.NodeEndpoint{Version: recordVersion + 1}); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.tryOpen(Options{}); err == nil || !strings.Contains(err.Error(), "run the agent version that wrote it") {
		t.Errorf("Open: %v", err)
	}
}

func TestMigrations(t *testing.T) {
	testenv.Require(t, "root", "bpf")
	dir := mountBPFFS(t)
	lock, err := lockPins(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	spec, err := bpfgen.LoadNode()
	if err != nil {
		t.Fatal(err)
	}
	if err := prepareLayout(dir, spec, nil); err != nil {
		t.Fatal(err)
	}
	meta, err := ebpf.LoadPinnedMap(filepath.Join(mapDir(dir), bpfgen.NodeMapMeta), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer meta.Close()
	layout := func() uint32 {
		var v bpfgen.NodeLayoutMeta
		if err := meta.Lookup(uint32(0), &v); err != nil {
			t.Fatal(err)
		}
		return v.Layout
	}
	var ran []uint32
	var fail error
	step := func(from uint32) migration {
		return func(string) error { ran = append(ran, from); return fail }
	}
	if err := migrate(dir, meta, 1, 3, map[uint32]migration{1: step(1)}); err == nil || !strings.Contains(err.Error(), "layout 2, from which this agent (layout 3) knows no way") {
		t.Errorf("without the second step: %v", err)
	}
	fail = errors.New("no space")
	if err := migrate(dir, meta, 2, 3, map[uint32]migration{2: step(2)}); !errors.Is(err, fail) || layout() != 2 {
		t.Errorf("a step that fails: %v, layout %d", err, layout())
	}
	fail = nil
	if err := migrate(dir, meta, layout(), 3, map[uint32]migration{1: step(1), 2: step(2)}); err != nil || layout() != 3 {
		t.Errorf("the second try: %v, layout %d", err, layout())
	}
	if diff := cmp.Diff([]uint32{1, 2, 2}, ran); diff != "" {
		t.Errorf("steps (-want +got):\n%s", diff)
	}
}
