package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/underlay-cni/underlay/internal/agentapi/pipe"
)

const (
	// Network is the name of the network in the configuration list.
	Network = "underlay"
	// ConfList is the list's usual file name: early in the order in which
	// runtimes look for the first.
	ConfList = "10-underlay.conflist"
)

// Target is one runtime's place for plugins.
type Target struct {
	ConfList string // path of the configuration list
	Bin      string // folder of the plugins
	Plugin   string // the plugin to be copied there, under its own base name
	Socket   string // of the agent, as the runtime's processes see it
}

// plugin returns where the plugin goes.
func (t Target) plugin() string { return filepath.Join(t.Bin, filepath.Base(t.Plugin)) }

// Install brings both files to what they should be, and reports whether either
// was not. Both folders must exist.
func (t Target) Install() (changed bool, err error) {
	for _, path := range []string{t.plugin(), t.ConfList} {
		if err := sweep(path); err != nil {
			return false, err
		}
	}
	program, err := os.Open(t.Plugin)
	if err != nil {
		return false, fmt.Errorf("read the CNI plugin to be installed: %w", err)
	}
	defer program.Close()
	st, err := program.Stat()
	if err != nil {
		return false, fmt.Errorf("read the CNI plugin to be installed: %w", err)
	}
	newPlugin, err := put(t.plugin(), io.NewSectionReader(program, 0, st.Size()), 0o755)
	if err != nil {
		return false, fmt.Errorf("install the CNI plugin: %w", err)
	}
	list := t.List()
	newList, err := put(t.ConfList, io.NewSectionReader(bytes.NewReader(list), 0, int64(len(list))), 0o644)
	if err != nil {
		return newPlugin, fmt.Errorf("install the CNI configuration list: %w", err)
	}
	return newPlugin || newList, nil
}

// Remove takes the list away, then the plugin. What is not there is no error.
func (t Target) Remove() (removed bool, err error) {
	var errs []error
	for _, path := range []string{t.ConfList, t.plugin()} {
		switch err := os.Remove(path); {
		case err == nil:
			removed = true
			errs = append(errs, syncDir(filepath.Dir(path)))
		case !errors.Is(err, fs.ErrNotExist):
			errs = append(errs, fmt.Errorf("remove from the runtime's folders: %w", err))
		}
		errs = append(errs, sweep(path))
	}
	return removed, errors.Join(errs...)
}

// List returns the configuration list: our plugin, and the CNI project's
// portmap behind it, which makes hostPort work, if it is in the folder.
//
// The version is 1.0.0, which all runtimes in use read (containerd 1.6 knows
// nothing later). 1.1.0, which has STATUS and GC, is offered beside it where
// every plugin of the list speaks it.
func (t Target) List() []byte {
	type plugin struct {
		Type         string          `json:"type"`
		Socket       string          `json:"socket,omitempty"`
		Capabilities map[string]bool `json:"capabilities,omitempty"`
		MarkMasqBit  int             `json:"markMasqBit,omitempty"`
	}
	list := struct {
		CNIVersion  string   `json:"cniVersion"`
		CNIVersions []string `json:"cniVersions,omitempty"`
		Name        string   `json:"name"`
		Plugins     []plugin `json:"plugins"`
	}{
		CNIVersion: "1.0.0", CNIVersions: []string{"1.0.0", "1.1.0"}, Name: Network,
		Plugins: []plugin{{Type: filepath.Base(t.Plugin), Socket: t.Socket}},
	}
	portmap := filepath.Join(t.Bin, "portmap")
	if st, err := os.Stat(portmap); err == nil && st.Mode().IsRegular() {
		// Bit 16: portmap's own choice, 13, is one of ours.
		list.Plugins = append(list.Plugins, plugin{Type: "portmap", Capabilities: map[string]bool{"portMappings": true}, MarkMasqBit: 16})
		if !speaks110(portmap) {
			list.CNIVersions = nil
		}
	}
	b, err := json.MarshalIndent(list, "", "  ")
	if err != nil { // strings and numbers
		panic(err)
	}
	return append(b, '\n')
}

// Before returns the base names of the configurations that a runtime takes
// instead of ours: it uses the first in the order of names (libcni's extensions
// .conf, .conflist, .json). One that hands on to ours, such as Multus', belongs
// there. foreign names the first of them, if any, that is the AWS VPC CNI's:
// pods would get addresses that nobody hands out any more.
func (t Target) Before() (names []string, foreign string, err error) {
	dir := filepath.Dir(t.ConfList)
	entries, err := os.ReadDir(dir) // sorted
	if err != nil {
		return nil, "", fmt.Errorf("look at the runtime's configurations: %w", err)
	}
	for _, e := range entries {
		if e.Name() >= filepath.Base(t.ConfList) {
			break
		}
		switch filepath.Ext(e.Name()) {
		case ".conf", ".conflist", ".json":
		default:
			continue
		}
		names = append(names, e.Name())
		var list struct {
			Type    string
			Plugins []struct{ Type string }
		}
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil || json.Unmarshal(b, &list) != nil || foreign != "" {
			continue // gone meanwhile, or the runtime's to complain about
		}
		for _, p := range append(list.Plugins, struct{ Type string }{list.Type}) {
			if p.Type == "aws-cni" {
				foreign = e.Name()
			}
		}
	}
	return names, foreign, nil
}

// put writes a file, unless it is as it should be, so that it is there whole or
// not at all, and reports whether it wrote.
func put(path string, content *io.SectionReader, mode fs.FileMode) (bool, error) {
	if same(path, content, mode) {
		return false, nil
	}
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, temporary(path)+"*")
	if err != nil {
		return false, err
	}
	defer os.Remove(f.Name()) // nothing to remove after the rename
	_, err = io.Copy(f, io.NewSectionReader(content, 0, content.Size()))
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err == nil {
		err = syncDir(dir)
	}
	if err != nil {
		return false, fmt.Errorf("write %s: %w", path, err)
	}
	return true, nil
}

// same reports whether the file has that content and mode. It reads piece by
// piece: the agent looks again and again, and a plugin is a megabyte.
func same(path string, content *io.SectionReader, mode fs.FileMode) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() || st.Mode().Perm() != mode || st.Size() != content.Size() {
		return false
	}
	var have, want [32 << 10]byte
	for at := int64(0); at < content.Size(); {
		n := min(int64(len(want)), content.Size()-at)
		if _, err := content.ReadAt(want[:n], at); err != nil && !errors.Is(err, io.EOF) {
			return false
		}
		if _, err := f.ReadAt(have[:n], at); err != nil && !errors.Is(err, io.EOF) || !bytes.Equal(have[:n], want[:n]) {
			return false
		}
		at += n
	}
	return true
}

// temporary begins the names of what becomes the file at path.
func temporary(path string) string { return pipe.NewPrefix + filepath.Base(path) + "-" }

// sweep removes what was to become the file at path.
func sweep(path string) error {
	entries, err := os.ReadDir(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // there is no such folder
	}
	if err != nil {
		return fmt.Errorf("look for half-made files: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if name := e.Name(); len(name) > len(temporary(path)) && name[:len(temporary(path))] == temporary(path) {
			if err := os.Remove(filepath.Join(filepath.Dir(path), name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, fmt.Errorf("remove a half-made file: %w", err))
			}
		}
	}
	return errors.Join(errs...)
}

// syncDir makes renames and removals in a folder last.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("write %s to disk: %w", dir, err)
	}
	return nil
}
