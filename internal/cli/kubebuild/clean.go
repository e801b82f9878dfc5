package kubebuild

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Cached is a folder of the cache.
type Cached struct {
	Name    string `json:"name"`    // "v1.37.2-3f2a…"
	Dir     string `json:"dir"`     // its path
	Bytes   int64  `json:"bytes"`   // what its files take on disk; shared ones count in full
	Current bool   `json:"current"` // the one that the source asks for
	Used    bool   `json:"used"`    // Clean was told to keep it
	Removed bool   `json:"removed"` // Clean removed it
	Freed   int64  `json:"freed"`   // bytes that removal gave back
}

// Clean removes what the source does not ask for any more, and older images of
// what it asks for; all removes the current folder as well. Folders that used reports stay. Waiting is told whose
// build Clean waits for. It returns what the cache held.
func Clean(ctx context.Context, o Options, all bool, used func(dir string) bool, waiting func(holder string)) ([]Cached, error) {
	root, err := cacheRoot(o.Cache)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(root); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	current := ""
	if !all {
		b, err := prepare(ctx, Options{Source: o.Source, Cache: o.Cache, Want: []string{"pause"}})
		if err != nil {
			return nil, fmt.Errorf("%w; or remove all of the cache with: underlay kubernetes clean --all", err)
		}
		current = b.folder.dir
	}
	l, err := lockBuild(ctx, root, waiting)
	if err != nil {
		return nil, err
	}
	defer l.release()
	l.tell("cleaning")
	list, err := folders(root)
	if err != nil {
		return nil, err
	}
	var cached []Cached
	for _, f := range list {
		c := Cached{Name: filepath.Base(f.dir), Dir: f.dir, Current: f.dir == current, Used: used != nil && used(f.dir)}
		var alone int64
		if c.Bytes, alone, err = f.size(); err != nil {
			return cached, err
		}
		switch {
		case c.Used:
		case c.Current: // only its older images
			before := alone
			f.prune(time.Now(), 1, 0)
			if c.Bytes, alone, err = f.size(); err != nil {
				return cached, err
			}
			c.Freed = before - alone
		default:
			if err := f.remove(); err != nil {
				return cached, err
			}
			c.Removed, c.Freed = true, alone
		}
		cached = append(cached, c)
	}
	return cached, nil
}

// remove removes the folder: its manifest first, so that nobody takes what is
// left of it if this ends half-way.
func (f folder) remove() error {
	if err := os.Remove(filepath.Join(f.dir, "manifest.json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove %s: %w", f.dir, err)
	}
	if err := os.RemoveAll(f.dir); err != nil {
		return fmt.Errorf("remove %s: %w", f.dir, err)
	}
	return nil
}

// size returns the bytes that the folder's files take on disk, and those of them
// that no other folder shares.
func (f folder) size() (all, alone int64, err error) {
	err = filepath.WalkDir(f.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		bytes := st.Blocks * 512 // stat(2): always in units of 512
		all += bytes
		if d.IsDir() || st.Nlink == 1 {
			alone += bytes
		}
		return nil
	})
	if err != nil {
		return 0, 0, fmt.Errorf("measure %s: %w", f.dir, err)
	}
	return all, alone, nil
}
