package nl

import (
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/testenv"
)

func TestFilters(t *testing.T) {
	testenv.Require(t, "bpf")
	names, _, conns := namespaces(t)
	c := conns[0]
	const loopback = 1
	var programs [2]*ebpf.Program
	var ids [2]uint32
	for i := range programs {
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, int32(i)), asm.Return()}})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		info, err := p.Info()
		if err != nil {
			t.Fatal(err)
		}
		id, _ := info.ID()
		programs[i], ids[i] = p, uint32(id)
	}
	expect := func(d Direction, want ...Filter) {
		t.Helper()
		have, err := c.Filters(loopback, d)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(append([]Filter{}, want...), have); diff != "" {
			t.Errorf("filters of %s (-want +got):\n%s", d, diff)
		}
	}
	run := func(fill func(*Batch)) error {
		var b Batch
		fill(&b)
		return c.Exec(&b)
	}
	expect(Ingress) // without a qdisc

	first := Filter{Index: loopback, Direction: Ingress, Priority: 1, Handle: 7, Name: "first", FD: programs[0].FD()}
	second := Filter{Index: loopback, Direction: Ingress, Priority: 2, Handle: 1, Name: "second", FD: programs[1].FD()}
	out := Filter{Index: loopback, Direction: Egress, Priority: 1, Handle: 7, Name: "out", FD: programs[1].FD()}
	err := run(func(b *Batch) {
		b.ClsactSet(loopback)
		b.ClsactSet(loopback) // it has one
		b.FilterSet(second)
		b.FilterSet(first)
		b.FilterSet(out)
	})
	if err != nil {
		t.Fatal(err)
	}
	read := func(f Filter, id uint32) Filter { f.FD, f.ProgID = 0, id; return f }
	expect(Ingress, read(first, ids[0]), read(second, ids[1]))
	expect(Egress, read(out, ids[1]))

	first.FD = programs[1].FD()
	if err := run(func(b *Batch) { b.FilterSet(first); b.FilterDelete(second) }); err != nil {
		t.Fatal(err)
	}
	expect(Ingress, read(first, ids[1]))
	if err := run(func(b *Batch) { b.FilterDelete(second) }); !errors.Is(err, unix.ENOENT) {
		t.Errorf("delete what is not there: %v", err)
	}
	// Another program reads it as we meant it.
	shown, err := exec.Command("tc", "-n", names[0], "filter", "show", "dev", "lo", "ingress").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"protocol all pref 1 bpf", "handle 0x7 first direct-action"} {
		if !strings.Contains(string(shown), want) {
			t.Errorf("tc does not show %q:\n%s", want, shown)
		}
	}

	// An ingress qdisc is no clsact, although it would take the filters.
	if out, err := exec.Command("sh", "-c", "tc -n "+names[0]+" qdisc del dev lo clsact && tc -n "+names[0]+" qdisc add dev lo ingress").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := run(func(b *Batch) { b.ClsactSet(loopback) }); !errors.Is(err, unix.EINVAL) {
		t.Errorf("clsact over an ingress qdisc: %v", err)
	}
}
