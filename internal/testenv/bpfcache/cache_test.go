package bpfcache

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/testenv"
)

type objects struct {
	Program *ebpf.Program `ebpf:"program"`
	Hash    *ebpf.Map     `ebpf:"hash"`
	LRU     *ebpf.Map     `ebpf:"lru"`
	PerCPU  *ebpf.Map     `ebpf:"percpu"`
	Trie    *ebpf.Map     `ebpf:"trie"`
	Array   *ebpf.Map     `ebpf:"array"`
	Cells   *ebpf.Map     `ebpf:"cells"`
	Tables  *ebpf.Map     `ebpf:"tables"`
	Rules   *ebpf.Map     `ebpf:"rules"`
	Jumps   *ebpf.Map     `ebpf:"jumps"`
	Own     *ebpf.Map     `ebpf:"own"`
	Ring    *ebpf.Map     `ebpf:"ring"`
	Unused  *ebpf.Map     `ebpf:"unused"`
}

func (o *objects) all() map[string]*ebpf.Map {
	return map[string]*ebpf.Map{
		"hash": o.Hash, "lru": o.LRU, "percpu": o.PerCPU, "trie": o.Trie, "array": o.Array, "cells": o.Cells,
		"tables": o.Tables, "rules": o.Rules, "jumps": o.Jumps, "own": o.Own, "ring": o.Ring,
	}
}

func (o *objects) close() {
	o.Program.Close()
	o.Unused.Close()
	for _, m := range o.all() {
		m.Close()
	}
}

// spec is of a program that writes to its ring buffer, and names a map of each type.
func spec() *ebpf.CollectionSpec {
	inner := &ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1}
	const noPrealloc = unix.BPF_F_NO_PREALLOC
	s := &ebpf.CollectionSpec{
		Maps: map[string]*ebpf.MapSpec{
			"hash":   {Type: ebpf.Hash, KeySize: 4, ValueSize: 12, MaxEntries: 100_000, Flags: noPrealloc, Pinning: ebpf.PinByName},
			"lru":    {Type: ebpf.LRUHash, KeySize: 4, ValueSize: 8, MaxEntries: 64, Pinning: ebpf.PinByName},
			"percpu": {Type: ebpf.PerCPUHash, KeySize: 4, ValueSize: 8, MaxEntries: 64, Pinning: ebpf.PinByName},
			"trie":   {Type: ebpf.LPMTrie, KeySize: 8, ValueSize: 8, MaxEntries: 64, Flags: noPrealloc, Pinning: ebpf.PinByName},
			"array":  {Type: ebpf.Array, KeySize: 4, ValueSize: 12, MaxEntries: 5000, Pinning: ebpf.PinByName},
			"cells":  {Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 8, MaxEntries: 8, Pinning: ebpf.PinByName},
			"tables": {Type: ebpf.ArrayOfMaps, KeySize: 4, ValueSize: 4, MaxEntries: 16384, InnerMap: inner, Pinning: ebpf.PinByName},
			"rules":  {Type: ebpf.HashOfMaps, KeySize: 4, ValueSize: 4, MaxEntries: 64, InnerMap: inner, Pinning: ebpf.PinByName},
			"jumps":  {Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 4, Pinning: ebpf.PinByName},
			"own":    {Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1},
			"ring":   {Type: ebpf.RingBuf, MaxEntries: uint32(os.Getpagesize())},
			"unused": {Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1, Pinning: ebpf.PinByName},
		},
		Variables: map[string]*ebpf.VariableSpec{},
	}
	var code asm.Instructions
	for name, m := range s.Maps {
		m.Name = name
	}
	for _, name := range []string{"hash", "lru", "percpu", "trie", "array", "cells", "tables", "rules", "jumps", "own"} {
		code = append(code, asm.LoadMapPtr(asm.R1, 0).WithReference(name))
	}
	code = append(code,
		asm.Mov.Imm(asm.R2, 1), asm.StoreMem(asm.RFP, -8, asm.R2, asm.DWord),
		asm.LoadMapPtr(asm.R1, 0).WithReference("ring"),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, -8),
		asm.Mov.Imm(asm.R3, 8), asm.Mov.Imm(asm.R4, 0),
		asm.FnRingbufOutput.Call(),
		asm.Mov.Imm(asm.R0, 0), asm.Return(),
	)
	s.Programs = map[string]*ebpf.ProgramSpec{"program": {Name: "program", Type: ebpf.SchedCLS, License: "GPL", Instructions: code}}
	return s
}

// fill puts something into every map.
func (o *objects) fill(t *testing.T) {
	t.Helper()
	inner, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer inner.Close()
	cpus := make([]uint64, ebpf.MustPossibleCPU())
	for i := range cpus {
		cpus[i] = 7
	}
	var many [40_000]uint32
	for i := range many {
		many[i] = uint32(i)
	}
	if _, err := o.Hash.BatchUpdate(many[:], make([][12]byte, len(many)), nil); err != nil {
		t.Fatal(err)
	}
	for name, put := range map[string]struct{ key, value any }{
		"lru": {uint32(3), uint64(7)}, "percpu": {uint32(3), cpus}, "trie": {[8]byte{32, 0, 0, 0, 10}, uint64(7)},
		"array": {uint32(4999), [12]byte{7}}, "cells": {uint32(7), cpus}, "tables": {uint32(16000), inner}, "rules": {uint32(3), inner},
		"jumps": {uint32(1), o.Program}, "own": {uint32(0), uint64(7)},
	} {
		if err := o.all()[name].Put(put.key, put.value); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	if _, err := o.Program.Run(&ebpf.RunOptions{Data: make([]byte, 64)}); err != nil {
		t.Fatal(err)
	}
}

// filled lists the maps that have something in them.
func (o *objects) filled(t *testing.T) (out []string) {
	t.Helper()
	for name, m := range o.all() {
		something := false
		switch {
		case name == "ring":
			something = records(t, m) > 0
		case m.Type() == ebpf.PerCPUArray:
			for i := range m.MaxEntries() {
				var v []uint64
				if err := m.Lookup(i, &v); err != nil {
					t.Fatal(err)
				}
				something = something || slices.Max(v) > 0
			}
		default:
			keys, err := keysOf(m)
			if err != nil {
				t.Fatal(err)
			}
			for _, k := range keys {
				v, err := m.LookupBytes(k)
				if err != nil {
					t.Fatal(err)
				}
				isArray := m.Type() == ebpf.Array
				something = something || v != nil && (!isArray || slices.Max(v) > 0)
			}
		}
		if something {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// records reads a ring buffer.
func records(t *testing.T, m *ebpf.Map) (n int) {
	t.Helper()
	r, err := ringbuf.NewReader(m)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	r.SetDeadline(time.Unix(1, 0))
	for ; ; n++ {
		if _, err := r.Read(); errors.Is(err, os.ErrDeadlineExceeded) {
			return n
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

func id(t *testing.T, p *ebpf.Program) ebpf.ProgramID {
	t.Helper()
	info, err := p.Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID()
	return id
}

// machine is a directory for pins in the file system of a test.
type machine struct {
	t    *testing.T
	c    *Cache
	pins string
}

func (m machine) load(c *Cache) *objects {
	m.t.Helper()
	o := new(objects)
	if err := c.Load(spec(), o, &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: m.pins}}); err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(o.close)
	return o
}

func (m machine) release() {
	m.c.Release(m.pins, nil)
	m.c.releases.Wait()
	if err := errors.Join(m.c.errs...); err != nil {
		m.t.Fatal(err)
	}
}

func newCache(t *testing.T) (c *Cache, another func() machine) {
	t.Helper()
	testenv.Require(t, "root", "bpf")
	dir := fmt.Sprintf("/run/ul-bpfcache%d", os.Getpid())
	c, err := New(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	n := 0
	return c, func() machine {
		n++
		m := machine{t, c, filepath.Join(dir, fmt.Sprintf("machine%d", n))}
		if err := os.Mkdir(m.pins, 0o700); err != nil {
			t.Fatal(err)
		}
		return m
	}
}

func TestLoad(t *testing.T) {
	c, another := newCache(t)
	m := another()
	first := m.load(c)
	if got := first.filled(t); len(got) > 0 {
		t.Errorf("%v are not empty at first", got)
	}
	first.fill(t)
	all := first.filled(t) // which reads the ring
	if len(all) != len(first.all()) {
		t.Fatalf("only %v are filled", all)
	}

	// The next process on the machine: the maps that are pinned, other programs.
	second := m.load(c)
	if id(t, first.Program) == id(t, second.Program) {
		t.Error("the second Load has the first one's programs")
	}
	shared := slices.DeleteFunc(slices.Clone(all), func(name string) bool { return name == "own" || name == "ring" })
	if diff := cmp.Diff(shared, second.filled(t)); diff != "" {
		t.Errorf("what the second Load finds (-want +got):\n%s", diff)
	}
	second.fill(t)
	if first.filled(t); records(t, first.Ring) != 0 {
		t.Error("the second one's programs write to the first one's ring")
	}
	// The first one's may run still, and what they run with is not touched.
	first.fill(t)
	between := m.load(c)
	if got := id(t, between.Program); got == id(t, first.Program) || got == id(t, second.Program) {
		t.Error("a third Load has programs that may run")
	}
	if got := first.filled(t); !slices.Contains(got, "own") || !slices.Contains(got, "ring") {
		t.Errorf("programs that may run have only %v filled", got)
	}
	// Once they do not, they are given again, as new.
	if err := c.Replaced(m.pins); err != nil {
		t.Fatal(err)
	}
	third := m.load(c)
	if id(t, third.Program) != id(t, first.Program) {
		t.Error("the third Load has the verifier look again")
	}
	if diff := cmp.Diff(shared, third.filled(t)); diff != "" {
		t.Errorf("what the third Load finds (-want +got):\n%s", diff)
	}
	// And from another process.
	third.fill(t)
	if err := c.Replaced(m.pins); err != nil {
		t.Fatal(err)
	}
	fourth := m.load(Join(c.Dir()))
	if id(t, fourth.Program) != id(t, second.Program) {
		t.Error("another process has the verifier look again, or the latest programs")
	}
	if diff := cmp.Diff(shared, fourth.filled(t)); diff != "" {
		t.Errorf("what another process finds (-want +got):\n%s", diff)
	}

	// Another machine at the same time has maps of its own.
	other := another().load(c)
	if got := other.filled(t); len(got) > 0 {
		t.Errorf("on another machine %v are not empty", got)
	}
	// One that comes later has these, empty.
	m.release()
	later := another()
	fifth := later.load(c)
	if got := id(t, fifth.Program); got != id(t, first.Program) && got != id(t, second.Program) {
		t.Error("on a later machine the verifier looks again")
	}
	if got := fifth.filled(t); len(got) > 0 {
		t.Errorf("on a later machine %v are not empty", got)
	}
	if _, err := os.Stat(filepath.Join(later.pins, "unused")); err != nil {
		t.Error(err)
	}
}

// Constants and code tell programs apart, the shape of maps the machines.
func TestKinds(t *testing.T) {
	a, b, c := spec(), spec(), spec()
	b.Maps["hash"].MaxEntries++
	c.Programs["program"].Instructions[len(c.Programs["program"].Instructions)-2].Constant = 1
	d := spec()
	d.Variables["clock"] = &ebpf.VariableSpec{Name: "clock", SectionName: ".rodata", Value: []byte{1}}
	var got []surveyed
	for _, s := range []*ebpf.CollectionSpec{a, b, c, d, spec()} {
		v, err := survey(s)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, *v)
	}
	for i, want := range []struct{ kind, key bool }{{true, true}, {false, true}, {true, false}, {true, false}, {true, true}} {
		if same := got[i].kind == got[0].kind; same != want.kind {
			t.Errorf("spec %d: the same kind: %v", i, same)
		}
		if same := got[i].key == got[0].key; same != want.key {
			t.Errorf("spec %d: the same key: %v", i, same)
		}
	}
	if diff := cmp.Diff([]string{"own", "ring"}, got[0].own); diff != "" {
		t.Error(diff)
	}
	a.Maps["hash"].Contents = []ebpf.MapKV{{Key: uint32(1), Value: [12]byte{1}}}
	if _, err := survey(a); err == nil {
		t.Error("a map with contents is taken")
	}
}

// Maps that the cache did not give are what they are, and stay so.
func TestOthersMaps(t *testing.T) {
	c, another := newCache(t)
	m := another()
	real := new(objects)
	if err := spec().LoadAndAssign(real, &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: m.pins}}); err != nil {
		t.Fatal(err)
	}
	defer real.close()
	real.fill(t)
	o := m.load(c)
	m.release()
	if got := o.filled(t); !slices.Contains(got, "hash") || !slices.Contains(got, "array") || slices.Contains(got, "own") {
		t.Errorf("%v are filled", got)
	}

	// A pin that somebody removed comes back as by LoadAndAssign, and what the
	// cache gave is emptied all the same.
	lost := another()
	lost.load(c).fill(t)
	if err := os.Remove(filepath.Join(lost.pins, "hash")); err != nil {
		t.Fatal(err)
	}
	if got := lost.load(c).filled(t); slices.Contains(got, "hash") || !slices.Contains(got, "array") {
		t.Errorf("without one pin, %v are filled", got)
	}
	lost.release()
	if got := another().load(c).filled(t); len(got) > 0 {
		t.Errorf("afterwards %v are not empty", got)
	}
}
