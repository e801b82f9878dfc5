package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
)

// What is pinned below Options.BPFFS:
//
//	maps/{meta,endpoints,ifaces,iface_stats,slots,traffic,drops,paths,conns,conn_sets,conn_ways,conn_seeds,cpus,ends,fragments,enis,eni_idle,nets,policy_tables,policy_endpoints,policy_generation}
//	links/<host interface>_{from_pod,to_pod}, links/<ENI's device>_{from_eni,to_eni}
func mapDir(bpffs string) string  { return filepath.Join(bpffs, "maps") }
func linkDir(bpffs string) string { return filepath.Join(bpffs, "links") }

// layoutVersion is that of the maps: their kinds, keys and values.
const layoutVersion = uint32(bpfgen.NodeNodeConstNODE_LAYOUT)

// migration brings the maps pinned in dir from one layout to the next. It may
// be run again after a crash in its middle: the version is raised afterwards.
type migration func(dir string) error

// migrations are keyed by the layout that they start from.
var migrations = map[uint32]migration{1: widenIfaces, 2: toLayout3, 3: removeClosed}

// lockPins makes the directories and takes the lock that lets one agent at a
// time own them. It goes with the process.
func lockPins(bpffs string) (*os.File, error) {
	if bpffs == "" {
		return nil, errors.New("no directory for pinned BPF maps: set one in a mounted BPF file system, such as /sys/fs/bpf/underlay")
	}
	if err := os.MkdirAll(bpffs, 0o700); err != nil {
		return nil, fmt.Errorf("make directory for pinned BPF maps: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(bpffs, &st); err != nil {
		return nil, fmt.Errorf("stat %s: %w", bpffs, err)
	}
	if st.Type != unix.BPF_FS_MAGIC {
		return nil, fmt.Errorf("%s is not in a BPF file system: mount one with `mount -t bpf bpf %s`, outside any private mount namespace, so that it outlives the agent", bpffs, bpffs)
	}
	for _, dir := range []string{mapDir(bpffs), linkDir(bpffs)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("make directory for pinned BPF objects: %w", err)
		}
	}
	f, err := os.Open(bpffs)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", bpffs, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("another process has the datapath in %s open: stop the other agent first", bpffs)
		}
		return nil, fmt.Errorf("lock %s: %w", bpffs, err)
	}
	return f, nil
}

// prepareLayout brings the pinned maps to the layout of this program, or
// refuses them. The map that holds the version is made first and alone, so
// that no crash leaves maps without it.
func prepareLayout(bpffs string, spec *ebpf.CollectionSpec, steps map[uint32]migration) error {
	dir := mapDir(bpffs)
	if _, err := os.Stat(filepath.Join(dir, bpfgen.NodeMapMeta)); errors.Is(err, fs.ErrNotExist) {
		if names, err := pinNames(dir); err != nil {
			return err
		} else if len(names) > 0 {
			return fmt.Errorf("%s holds maps (%s, …) but not the one with their layout's version: they are not this agent's; give it another directory, or drain the node and remove this one", dir, names[0])
		}
	}
	meta, err := ebpf.NewMapWithOptions(spec.Maps[bpfgen.NodeMapMeta], ebpf.MapOptions{PinPath: dir})
	if err != nil {
		return fmt.Errorf("open map %s: %w", filepath.Join(dir, bpfgen.NodeMapMeta), err)
	}
	defer meta.Close()
	var zero uint32
	var value bpfgen.NodeLayoutMeta
	if err := meta.Lookup(&zero, &value); err != nil {
		return fmt.Errorf("read the maps' layout: %w", err)
	}
	if value.Layout > layoutVersion {
		return fmt.Errorf("the maps in %s have layout %d, this agent knows up to %d: run the agent version that made them, or drain the node and remove the directory", dir, value.Layout, layoutVersion)
	}
	if value.Layout != 0 {
		return migrate(dir, meta, value.Layout, layoutVersion, steps)
	}
	return setLayout(meta, layoutVersion)
}

// migrate brings the maps from one layout to another, step by step; each
// step's end is written down.
func migrate(dir string, meta *ebpf.Map, from, to uint32, steps map[uint32]migration) error {
	for v := from; v < to; v++ {
		step, ok := steps[v]
		if !ok {
			return fmt.Errorf("the maps in %s have layout %d, from which this agent (layout %d) knows no way: run an agent version in between first, or drain the node and remove the directory", dir, v, to)
		}
		if err := step(dir); err != nil {
			return fmt.Errorf("migrate the maps in %s from layout %d: %w", dir, v, err)
		}
		if err := setLayout(meta, v+1); err != nil {
			return err
		}
	}
	return nil
}

func setLayout(meta *ebpf.Map, v uint32) error {
	var zero uint32
	if err := meta.Update(&zero, &bpfgen.NodeLayoutMeta{Layout: v}, ebpf.UpdateAny); err != nil {
		return fmt.Errorf("write the maps' layout: %w", err)
	}
	return nil
}

// replacePin pins the map in the place of another of that name, in one step.
func replacePin(dir, name string, m *ebpf.Map) error {
	next := filepath.Join(dir, name+"_next")
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove what a crash left: %w", err)
	}
	if err := m.Pin(next); err != nil {
		return fmt.Errorf("pin map %s: %w", name, err)
	}
	if err := os.Rename(next, filepath.Join(dir, name)); err != nil {
		return fmt.Errorf("put map %s in its place: %w", name, err)
	}
	return nil
}

func pinNames(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list pins: %w", err)
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}

func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}
