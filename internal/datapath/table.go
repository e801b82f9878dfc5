package datapath

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
)

// The table of connections is in sets of ways, and where these are full in a hash
// table: bpf/node_table.h.

// setWays is how many ways a set has.
const setWays = 8

// noKey is the padding of a key while its way is written.
const noKey = 0xff

// sizeSets has the programs' table have as many sets as there are, or on a node that
// has none yet, as many as its memory affords: each is of 1.5 KiB, and all together
// take no more than a 256th of it, nor more than 16,384, that is 24 MiB.
func sizeSets(spec *ebpf.CollectionSpec, dir string) error {
	old, err := ebpf.LoadPinnedMap(filepath.Join(dir, bpfgen.NodeMapConnSets), nil)
	if err == nil {
		defer old.Close()
		return setSets(spec, old.MaxEntries())
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("open map %s: %w", bpfgen.NodeMapConnSets, err)
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return fmt.Errorf("ask how much memory there is: %w", err)
	}
	return setSets(spec, setsFor(uint64(info.Totalram)*uint64(info.Unit)))
}

// setsFor is a power of two.
func setsFor(memory uint64) uint32 {
	const most, bytes = 16384, setWays * uint64(unsafe.Sizeof(bpfgen.NodeConnWay{}))
	sets := uint32(most)
	for sets > 1 && uint64(sets)*bytes > memory/256 {
		sets /= 2
	}
	return sets
}

func setSets(spec *ebpf.CollectionSpec, sets uint32) error {
	spec.Maps[bpfgen.NodeMapConnSets].MaxEntries = sets
	spec.Maps[bpfgen.NodeMapConnWays].MaxEntries = sets * setWays
	return spec.Variables[bpfgen.NodeVarSetMask].Set(sets - 1)
}

// resizeConns has the programs' table hold so many connections in its hash table, and
// have one set: for tests.
func resizeConns(spec *ebpf.CollectionSpec, entries uint32) error {
	spec.Maps[bpfgen.NodeMapConns].MaxEntries = entries
	return setSets(spec, 1)
}

// setSeed gives the programs the numbers by which they hash: those of the table that is
// there, or new ones.
func (d *Datapath) setSeed(spec *ebpf.CollectionSpec) error {
	var seed bpfgen.NodeConnSeed
	old, err := ebpf.LoadPinnedMap(filepath.Join(mapDir(d.opts.BPFFS), bpfgen.NodeMapConnSeeds), nil)
	switch {
	case err == nil:
		defer old.Close()
		if err := old.Lookup(uint32(0), &seed); err != nil {
			return fmt.Errorf("read the seed of the table of connections: %w", err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("open map %s: %w", bpfgen.NodeMapConnSeeds, err)
	}
	if seed.By[0] == 0 {
		if d.opts.loader != nil {
			return nil // what tests have loaded already has the object's own
		}
		var b [8]byte
		for i := range seed.By {
			_, _ = rand.Read(b[:]) // never fails
			seed.By[i] = binary.NativeEndian.Uint64(b[:]) | 1
		}
	}
	if err := spec.Variables[bpfgen.NodeVarSeed].Set(seed); err != nil {
		return fmt.Errorf("set the seed in the BPF object: %w", err)
	}
	return nil
}

// keepSeed has the programs of the next agent hash as these do.
func (d *Datapath) keepSeed(spec *ebpf.CollectionSpec) error {
	var zero uint32
	var seed bpfgen.NodeConnSeed
	if err := d.objs.ConnSeeds.Lookup(&zero, &seed); err != nil {
		return fmt.Errorf("read the seed of the table of connections: %w", err)
	}
	if seed.By[0] != 0 {
		return nil
	}
	if err := spec.Variables[bpfgen.NodeVarSeed].Get(&seed); err != nil {
		return fmt.Errorf("read the seed of the BPF object: %w", err)
	}
	// What was there before layout 4 is in the hash table, and in nobody's count.
	var a bpfgen.NodeAddr
	switch err := d.objs.Endpoints.NextKey(nil, &a); {
	case err == nil:
		for set := range d.objs.ConnSets.MaxEntries() {
			if err := d.objs.ConnSets.Put(set, bpfgen.NodeConnSet{Spilled: 1}); err != nil {
				return fmt.Errorf("write the sets of connections: %w", err)
			}
		}
	case !errors.Is(err, ebpf.ErrKeyNotExist):
		return fmt.Errorf("read the map of endpoints: %w", err)
	}
	if err := d.objs.ConnSeeds.Update(&zero, &seed, ebpf.UpdateAny); err != nil {
		return fmt.Errorf("write the seed of the table of connections: %w", err)
	}
	return nil
}

// removeClosed is the way from layout 3 to 4: what is closed stays in the table of
// connections, which has got sets. What is in its hash table goes on there.
func removeClosed(dir string) error {
	if err := os.Remove(filepath.Join(dir, "closed")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the map of closed connections: %w", err)
	}
	return nil
}

// conns iterates over the table, in no order and some at a time; these are valid until
// the next ones.
func (d *Datapath) conns() iter.Seq2[[]bpfgen.NodeConn, error] {
	return func(yield func([]bpfgen.NodeConn, error) bool) {
		for some, err := range d.ways() {
			if !yield(some, err) || err != nil {
				return
			}
		}
		for batch, err := range connBatches[bpfgen.NodeConn](d.objs.Conns) {
			if !yield(batch.values, err) {
				return
			}
		}
	}
}

// ways is conns for those in sets.
func (d *Datapath) ways() iter.Seq2[[]bpfgen.NodeConn, error] {
	const sets = 128 // that are read in one go
	return func(yield func([]bpfgen.NodeConn, error) bool) {
		fail := func(err error) { yield(nil, fmt.Errorf("read the sets of connections: %w", err)) }
		numbers, heads := make([]uint32, sets), make([]bpfgen.NodeConnSet, sets)
		indexes, ways := make([]uint32, sets*setWays), make([]bpfgen.NodeConnWay, sets*setWays)
		var atSet, atWay ebpf.MapBatchCursor
		var some []bpfgen.NodeConn
		for {
			n, end := d.objs.ConnSets.BatchLookup(&atSet, numbers, heads, nil)
			if end != nil && !errors.Is(end, ebpf.ErrKeyNotExist) {
				fail(end)
				return
			}
			m, err := d.objs.ConnWays.BatchLookup(&atWay, indexes[:n*setWays], ways[:n*setWays], nil)
			if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				fail(err)
				return
			}
			some = some[:0]
			for i := range ways[:m] {
				if byte(heads[i/setWays].Tags>>(8*(i%setWays))) == 0 {
					continue // it is free
				}
				w := &ways[i]
				if torn(w) {
					if err := d.objs.ConnWays.Lookup(&indexes[i], w); err != nil {
						fail(err)
						return
					}
				}
				if !torn(w) && w.Conn.Key.Pad[0] != noKey {
					some = append(some, w.Conn)
				}
			}
			if len(some) > 0 && !yield(some, nil) || end != nil {
				return
			}
		}
	}
}

// torn tells of what was read while it was written.
func torn(w *bpfgen.NodeConnWay) bool { return w.Written != w.WrittenEnd || w.Written%2 != 0 }

// sweepWays frees the ways of connections that are over at a time of CLOCK_MONOTONIC,
// and of those of pods that are gone, and tells how many there were. It counts those
// that stay, but for what is closed, which takes no room.
func (d *Datapath) sweepWays(now uint64, share *shares, fill *connFill) (removed int, err error) {
	const sets = 256 // of which the ends find room in the ring
	all := d.objs.ConnSets.MaxEntries()
	var zero uint32
	var stayed bpfgen.NodeStayed
	if err := d.objs.SharesStayed.Update(&zero, &stayed, ebpf.UpdateAny); err != nil {
		return 0, fmt.Errorf("write what is left of shares: %w", err)
	}
	for set := uint32(0); set < all; {
		ask := bpfgen.NodeSweep{Now: now, Set: set, Sets: min(sets, all-set)}
		said, err := d.runSweep(d.objs.SweepWays, &ask)
		removed += int(said.Removed)
		if err != nil {
			return removed, err
		}
		fill.entries += int(said.Stayed)
		fill.direct += int(said.Direct)
		set += ask.Sets - said.Sets
	}
	if err := d.objs.SharesStayed.Lookup(&zero, &stayed); err != nil {
		return removed, fmt.Errorf("read what is left of shares: %w", err)
	}
	share.entries[0] += uint64(fill.entries)
	for slot, n := range stayed.Entries {
		if slot != 0 {
			share.entries[slot] += n
		}
	}
	return removed, nil
}

// sweepConn removes a connection of the hash table, if it is over still.
func (d *Datapath) sweepConn(k *bpfgen.NodeConnKey, now uint64) (removed int, err error) {
	said, err := d.runSweep(d.objs.SweepConn, &bpfgen.NodeSweep{Now: now, Key: *k})
	return int(said.Removed), err
}

// runSweep has a program remove connections; the ring, by which it tells of them, is
// emptied if that is full.
func (d *Datapath) runSweep(program *ebpf.Program, ask *bpfgen.NodeSweep) (said bpfgen.NodeSweep, err error) {
	for range 3 {
		if _, err := program.Run(&ebpf.RunOptions{Context: ask, ContextOut: &said}); err != nil {
			return said, fmt.Errorf("sweep the table of connections: %w", err)
		}
		if said.Full == 0 {
			return said, nil
		}
		d.ends.drain()
		if said.Removed > 0 {
			return said, nil
		}
	}
	return said, errors.New("sweep the table of connections: the ring of those that ended has no room")
}
