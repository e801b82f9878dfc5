package kubebuild

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// folder is one folder of the cache: what belongs to one set of module files.
type folder struct{ dir string }

// manifest is manifest.json: the files of a folder that are whole.
type manifest struct {
	Entries map[string]entry `json:"entries"` // by path in the folder: "bin/kubelet"
}

type entry struct {
	Key  string   `json:"key"`
	Size int64    `json:"size"` // bytes
	Refs []string `json:"refs,omitempty"`
}

func (f folder) log() string { return filepath.Join(f.dir, "build.log") }

// manifest reads manifest.json. One that is not there or not readable as such
// says that nothing is whole.
func (f folder) manifest() (manifest, error) {
	m := manifest{Entries: map[string]entry{}}
	b, err := os.ReadFile(filepath.Join(f.dir, "manifest.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return m, nil
	}
	if err != nil {
		return m, fmt.Errorf("read the cache of Kubernetes' programs: %w", err)
	}
	if err := json.Unmarshal(b, &m); err != nil || m.Entries == nil {
		return manifest{Entries: map[string]entry{}}, nil
	}
	return m, nil
}

// has reports whether the folder has it, whole.
func (f folder) has(m manifest, it item) bool {
	e, ok := m.Entries[it.path]
	if !ok || e.Key != it.key {
		return false
	}
	st, err := os.Stat(filepath.Join(f.dir, it.path))
	return err == nil && st.Mode().IsRegular() && st.Size() == e.Size
}

const scratchPrefix = ".making-"

// scratch makes a folder to work in, and removes those that killed builders
// left. The caller holds the lock.
func (f folder) scratch() (string, error) {
	for _, dir := range []string{"bin", "images"} {
		if err := os.MkdirAll(filepath.Join(f.dir, dir), 0o755); err != nil {
			return "", fmt.Errorf("make the cache of Kubernetes' programs: %w", err)
		}
	}
	old, err := filepath.Glob(filepath.Join(f.dir, scratchPrefix+"*"))
	if err != nil {
		return "", fmt.Errorf("make the cache of Kubernetes' programs: %w", err)
	}
	for _, dir := range old {
		if err := os.RemoveAll(dir); err != nil {
			return "", fmt.Errorf("remove what an interrupted build left: %w", err)
		}
	}
	// The log is of this build alone.
	if err := os.WriteFile(f.log(), nil, 0o644); err != nil {
		return "", fmt.Errorf("make the cache of Kubernetes' programs: %w", err)
	}
	dir, err := os.MkdirTemp(f.dir, scratchPrefix)
	if err != nil {
		return "", fmt.Errorf("make the cache of Kubernetes' programs: %w", err)
	}
	return dir, nil
}

// put moves the file at from to its place and enters it in the manifest. The
// caller holds the lock.
func (f folder) put(it item, from string, e entry) error {
	if err := f.tryPut(it, from, e); err != nil {
		return fmt.Errorf("keep %s: %w", it.name, err)
	}
	return nil
}

func (f folder) tryPut(it item, from string, e entry) error {
	st, err := syncFile(from)
	if err != nil {
		return err
	}
	e.Size = st.Size()
	m, err := f.manifest()
	if err != nil {
		return err
	}
	if err := os.Rename(from, filepath.Join(f.dir, it.path)); err != nil {
		return err
	}
	m.Entries[it.path] = e
	return f.write(m)
}

func (f folder) write(m manifest) error {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	file := filepath.Join(f.dir, "manifest.json")
	if err := os.WriteFile(file+".new", append(b, '\n'), 0o644); err != nil {
		return err
	}
	if _, err := syncFile(file + ".new"); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

func syncFile(path string) (fs.FileInfo, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if err := file.Sync(); err != nil {
		return nil, err
	}
	return file.Stat()
}

// folders returns all folders of the cache, by name.
func folders(root string) ([]folder, error) {
	list, err := os.ReadDir(root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look into the cache of Kubernetes' programs: %w", err)
	}
	var all []folder
	for _, d := range list {
		if d.IsDir() {
			all = append(all, folder{filepath.Join(root, d.Name())})
		}
	}
	return all, nil
}

// linkFrom makes to a link of the file that some folder has under the same key.
func linkFrom(root string, it item, to string) (entry, bool) {
	all, err := folders(root)
	if err != nil {
		return entry{}, false
	}
	for _, f := range all {
		m, err := f.manifest()
		if err != nil || !f.has(m, it) {
			continue
		}
		if os.Link(filepath.Join(f.dir, it.path), to) == nil {
			return m.Entries[it.path], true
		}
	}
	return entry{}, false
}

// imagePath is where an image stands in a folder. Its key is in the name, so that
// another recipe, another tool or another agent makes another file: a lab that
// runs imports its images again when a node boots.
func imagePath(name, key string) string { return "images/" + name + "-" + key[:12] + ".tar" }

// Of each image these many are kept, and all of the last hours: each change of
// the agent makes one.
const (
	keptImages = 4
	keptAge    = 24 * time.Hour
)

// prune removes images, but of each name the newest few and those younger than
// age. The caller holds the lock.
func (f folder) prune(now time.Time, few int, age time.Duration) {
	m, err := f.manifest()
	if err != nil {
		return
	}
	made := map[string]time.Time{}
	byName := map[string][]string{}
	for path := range m.Entries {
		if !strings.HasPrefix(path, "images/") {
			continue
		}
		if st, err := os.Stat(filepath.Join(f.dir, path)); err == nil {
			made[path] = st.ModTime()
			name := path[:max(0, strings.LastIndexByte(path, '-'))]
			byName[name] = append(byName[name], path)
		}
	}
	var old []string
	for _, paths := range byName {
		slices.SortFunc(paths, func(a, b string) int { return made[b].Compare(made[a]) })
		for _, path := range paths[min(len(paths), few):] {
			if now.Sub(made[path]) >= age {
				old = append(old, path)
				delete(m.Entries, path)
			}
		}
	}
	if len(old) == 0 || f.write(m) != nil {
		return // they stay, and stand in the manifest
	}
	for _, path := range old {
		_ = os.Remove(filepath.Join(f.dir, path))
	}
}
