package bpfcache

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Cache is a BPF file system with sets of maps and programs.
type Cache struct {
	dir  string
	made bool // by this process

	releases sync.WaitGroup

	mu       sync.Mutex
	ready    *sync.Cond
	next     int               // number of the next set of maps
	free     []string          // directories m<number> whose maps are empty
	used     map[string]string // such directories by world
	emptying int
	kind     map[string]string // what maps a directory has
	errs     []error
}

// New mounts a cache at dir, which it makes; Close removes both.
func New(dir string) (*Cache, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		return nil, errors.Join(fmt.Errorf("mount a bpffs on %s: %w", dir, err), os.Remove(dir))
	}
	c := Join(dir)
	c.made = true
	return c, nil
}

// Join returns the cache that another process has at dir.
func Join(dir string) *Cache {
	c := &Cache{dir: dir, used: map[string]string{}, kind: map[string]string{}}
	c.ready = sync.NewCond(&c.mu)
	return c
}

// Dir is where the cache is, for Join.
func (c *Cache) Dir() string { return c.dir }

// Close removes everything, and returns what went wrong in releases.
func (c *Cache) Close() error {
	c.releases.Wait()
	err := errors.Join(c.errs...)
	if !c.made {
		return err
	}
	if e := unix.Unmount(c.dir, unix.MNT_DETACH); e != nil {
		err = errors.Join(err, fmt.Errorf("unmount %s: %w", c.dir, e))
	}
	return errors.Join(err, os.Remove(c.dir))
}

// Load is spec.LoadAndAssign, to be called in its place in the world whose maps
// are pinned in opts.Maps.PinPath. In a world whose maps the cache does not know
// it is nothing else.
func (c *Cache) Load(spec *ebpf.CollectionSpec, to any, opts *ebpf.CollectionOptions) error {
	s, err := survey(spec)
	if err != nil {
		return err
	}
	world := opts.Maps.PinPath
	home, err := c.enter(world, s)
	if err != nil {
		return err
	}
	if home == "" {
		return spec.LoadAndAssign(to, opts)
	}
	set, err := c.choose(home, s.key)
	if err != nil {
		return err
	}
	var coll *ebpf.Collection
	if set == "" {
		coll, set, err = c.load(home, s, opts)
	} else {
		coll, err = c.reuse(home, set, s, opts)
	}
	if err != nil {
		return err
	}
	defer coll.Close() // what Assign left
	if err := setLast(home, set); err != nil {
		return err
	}
	return coll.Assign(to)
}

// enter returns the directory with the maps of a world: that of the maps that are
// pinned there, or one that it gives to a new world, whose maps it pins there. It
// returns "" if others' maps are pinned, or if there are none and this process does
// not give any.
func (c *Cache) enter(world string, s *surveyed) (home string, err error) {
	pinned := 0
	for _, name := range s.shared {
		if _, err := os.Stat(filepath.Join(world, name)); err == nil {
			pinned++
		}
	}
	switch {
	case pinned == len(s.shared):
		return c.find(world, s)
	case pinned > 0 || !c.made:
		return "", nil
	}
	home, isNew := c.take(world, s)
	if !isNew {
		return home, pinAll(s.shared, filepath.Join(home, "maps"), world)
	}
	return home, os.MkdirAll(filepath.Join(home, "maps"), 0o700)
}

// find returns the directory that has the same maps as the world, or "".
func (c *Cache) find(world string, s *surveyed) (string, error) {
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		home := filepath.Join(c.dir, e.Name())
		same := len(s.shared) > 0
		for _, name := range s.shared {
			if same = same && sameMap(filepath.Join(world, name), filepath.Join(home, "maps", name)); !same {
				break
			}
		}
		if same {
			return home, nil
		}
	}
	return "", nil
}

func sameMap(a, b string) bool {
	var ids [2]ebpf.MapID
	for i, path := range []string{a, b} {
		m, err := ebpf.LoadPinnedMap(path, nil)
		if err != nil {
			return false
		}
		info, err := m.Info()
		m.Close()
		if err != nil {
			return false
		}
		ids[i], _ = info.ID()
	}
	return ids[0] != 0 && ids[0] == ids[1]
}

// take gives a world the maps of a directory: of one that is free, with the wanted
// programs rather than without, or of a new one, which has no maps yet.
func (c *Cache) take(world string, s *surveyed) (home string, isNew bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		best := -1
		for i, h := range c.free {
			if c.kind[h] != s.kind {
				continue
			}
			if best < 0 || len(sets(h, s.key)) > len(sets(c.free[best], s.key)) {
				best = i
			}
		}
		if best >= 0 {
			home = c.free[best]
			c.free = append(c.free[:best], c.free[best+1:]...)
			break
		}
		if c.emptying == 0 {
			home, isNew = filepath.Join(c.dir, fmt.Sprintf("m%d", c.next)), true
			c.next++
			c.kind[home] = s.kind
			break
		}
		c.ready.Wait()
	}
	c.used[world] = home
	return home, isNew
}

// Release takes the maps of a world back when a test is done with it. It calls
// quiesce, if that is not nil, which sees to it that no program of the world runs
// any more, and empties the maps, both in the background.
func (c *Cache) Release(world string, quiesce func() error) {
	c.mu.Lock()
	home, ok := c.used[world]
	delete(c.used, world)
	if ok {
		c.emptying++
	}
	c.mu.Unlock()
	c.releases.Go(func() {
		var err error
		if quiesce != nil {
			err = quiesce()
		}
		if ok && err == nil {
			err = errors.Join(forget(home, usedPrefix), forget(home, lastPrefix), emptyAll(filepath.Join(home, "maps")))
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if err != nil {
			c.errs = append(c.errs, fmt.Errorf("release %s: %w", world, err))
		}
		if ok {
			c.emptying--
			if err == nil {
				c.free = append(c.free, home)
			}
			c.ready.Broadcast()
		}
	})
}

// sets lists the sets of programs of a key.
func sets(home, key string) []string {
	entries, _ := os.ReadDir(home) // none there: none
	var out []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "s_"+key+"_") {
			out = append(out, e.Name())
		}
	}
	return out
}

// In the directory of a world's maps: the sets that were loaded in this world and may
// run there still, and the one that was loaded last.
const (
	usedPrefix = "used_"
	lastPrefix = "last_"
)

// choose returns a set of programs that runs nowhere in the world, or "": for one that
// runs is not new, and must not have its maps emptied under it.
func (c *Cache) choose(home, key string) (string, error) {
	for _, set := range sets(home, key) {
		_, err := os.Stat(filepath.Join(home, usedPrefix+set))
		if errors.Is(err, fs.ErrNotExist) {
			return set, nil
		}
		if err != nil {
			return "", err
		}
	}
	return "", nil
}

// setLast marks a set as used in the world, and as the one that was loaded last.
func setLast(home, set string) error {
	if err := forget(home, lastPrefix); err != nil {
		return err
	}
	for _, prefix := range []string{usedPrefix, lastPrefix} {
		if err := os.Mkdir(filepath.Join(home, prefix+set), 0o700); err != nil {
			return err
		}
	}
	return nil
}

// Replaced says that of all programs that were loaded in a world only those of the
// latest Load still run: the others may be given to a Load again, rather than have the
// verifier look anew. Without it none is, until the world is released.
func (c *Cache) Replaced(world string) error {
	c.mu.Lock()
	home, ok := c.used[world]
	c.mu.Unlock()
	if !ok {
		return nil
	}
	last, err := marked(home, lastPrefix)
	if err != nil {
		return err
	}
	return forget(home, usedPrefix, last...)
}

// marked lists the sets that have a mark.
func marked(home, prefix string) (out []string, err error) {
	entries, err := os.ReadDir(home)
	for _, e := range entries {
		if set, ok := strings.CutPrefix(e.Name(), prefix); ok {
			out = append(out, set)
		}
	}
	return out, err
}

// forget removes a mark from all sets but some.
func forget(home, prefix string, but ...string) error {
	all, err := marked(home, prefix)
	for _, set := range all {
		if !slices.Contains(but, set) {
			err = errors.Join(err, os.Remove(filepath.Join(home, prefix+set)))
		}
	}
	return err
}

// load loads a set of programs that is not there yet, and keeps it.
func (c *Cache) load(home string, s *surveyed, opts *ebpf.CollectionOptions) (coll *ebpf.Collection, set string, err error) {
	coll, err = ebpf.NewCollectionWithOptions(s.spec, *opts)
	if err != nil {
		return nil, "", err
	}
	defer func() {
		if err != nil {
			coll.Close()
		}
	}()
	maps := filepath.Join(home, "maps")
	for _, name := range s.shared {
		path := filepath.Join(maps, name)
		if _, err := os.Stat(path); err == nil {
			continue
		}
		if err := pinMap(coll.Maps[name], path); err != nil {
			return nil, "", err
		}
	}
	// Whole or not at all, should this process be killed.
	made := filepath.Join(home, fmt.Sprintf("making_%d", os.Getpid()))
	if err := os.Mkdir(made, 0o700); err != nil {
		return nil, "", err
	}
	for name, p := range coll.Programs {
		clone, err := p.Clone()
		if err != nil {
			return nil, "", err
		}
		err = clone.Pin(filepath.Join(made, "p_"+name))
		clone.Close()
		if err != nil {
			return nil, "", fmt.Errorf("pin program %s: %w", name, err)
		}
	}
	for _, name := range s.own {
		if err := pinMap(coll.Maps[name], filepath.Join(made, ownPin(name))); err != nil {
			return nil, "", err
		}
	}
	for n := 0; ; n++ {
		set = fmt.Sprintf("s_%s_%d", s.key, n)
		if _, err := os.Stat(filepath.Join(home, set)); errors.Is(err, fs.ErrNotExist) {
			return coll, set, os.Rename(made, filepath.Join(home, set))
		}
	}
}

// reuse opens a set of programs that is there.
func (c *Cache) reuse(home, set string, s *surveyed, opts *ebpf.CollectionOptions) (_ *ebpf.Collection, err error) {
	coll := &ebpf.Collection{Programs: map[string]*ebpf.Program{}, Maps: map[string]*ebpf.Map{}, Variables: map[string]*ebpf.Variable{}}
	defer func() {
		if err != nil {
			coll.Close()
		}
	}()
	for name := range s.spec.Programs {
		if coll.Programs[name], err = ebpf.LoadPinnedProgram(filepath.Join(home, set, "p_"+name), nil); err != nil {
			return nil, fmt.Errorf("open kept program %s: %w", name, err)
		}
	}
	// As a Load opens them, with its errors.
	for _, name := range append(s.shared, s.unused...) {
		if coll.Maps[name], err = ebpf.NewMapWithOptions(s.spec.Maps[name], opts.Maps); err != nil {
			return nil, fmt.Errorf("map %s: %w", name, err)
		}
	}
	sections := &ebpf.CollectionSpec{Maps: map[string]*ebpf.MapSpec{}, Variables: s.spec.Variables, ByteOrder: s.spec.ByteOrder}
	kept := map[string]*ebpf.Map{}
	for _, name := range s.own {
		m, err := ebpf.LoadPinnedMap(filepath.Join(home, set, ownPin(name)), nil)
		if err != nil {
			return nil, fmt.Errorf("open kept map %s: %w", name, err)
		}
		coll.Maps[name] = m
		if err := renew(m, s.spec, name); err != nil {
			return nil, fmt.Errorf("make map %s new: %w", name, err)
		}
		if isSection(name) {
			sections.Maps[name], kept[name] = s.spec.Maps[name], m
		}
	}
	if len(kept) > 0 {
		variables, err := ebpf.NewCollectionWithOptions(sections, ebpf.CollectionOptions{MapReplacements: kept})
		if err != nil {
			return nil, fmt.Errorf("open kept variables: %w", err)
		}
		defer variables.Close()
		coll.Variables, variables.Variables = variables.Variables, nil
	}
	return coll, nil
}

// pinAll pins what is pinned in one directory in another one as well.
func pinAll(names []string, from, to string) error {
	for _, name := range names {
		m, err := ebpf.LoadPinnedMap(filepath.Join(from, name), nil)
		if err != nil {
			return err
		}
		err = pinMap(m, filepath.Join(to, name))
		m.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// pinMap pins a map in one place more.
func pinMap(m *ebpf.Map, path string) error {
	clone, err := m.Clone() // Pin would move the pin that a map has
	if err != nil {
		return err
	}
	defer clone.Close()
	if err := clone.Pin(path); err != nil {
		return fmt.Errorf("pin map %s: %w", filepath.Base(path), err)
	}
	return nil
}

// ownPin is under what name a map is pinned; a bpffs takes no dots.
func ownPin(name string) string { return "m_" + strings.ReplaceAll(name, ".", "_") }
