package oci

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"
)

// Tree is the content of an image: directories, files and symbolic links by
// their absolute paths. Parents that nobody named are directories of mode 0755.
// The zero value is an empty tree.
type Tree struct {
	entries map[string]entry // by clean path without the leading slash
}

type entry struct {
	kind byte // tar.TypeDir, tar.TypeReg, tar.TypeSymlink
	mode int64
	size int64
	link string // of a symbolic link

	content []byte // of a file, unless source names one on disk
	source  string
}

// Dir adds a directory. Mode is permissions with the set-id and sticky bits as
// chmod(2) has them, such as 0o1777.
func (t *Tree) Dir(name string, mode int64) { t.put(name, entry{kind: tar.TypeDir, mode: mode}) }

// Bytes adds a file with the given content.
func (t *Tree) Bytes(name string, mode int64, content []byte) {
	t.put(name, entry{kind: tar.TypeReg, mode: mode, size: int64(len(content)), content: content})
}

// File adds the file at source, which has to stay as it is until the image is
// written. A symbolic link is followed.
func (t *Tree) File(name string, mode int64, source string) error {
	st, err := os.Stat(source)
	if err != nil {
		return fmt.Errorf("add %s to an image: %w", name, err)
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("add %s to an image: %s is not a regular file", name, source)
	}
	t.put(name, entry{kind: tar.TypeReg, mode: mode, size: st.Size(), source: source})
	return nil
}

// Symlink adds a symbolic link to target.
func (t *Tree) Symlink(name, target string) {
	t.put(name, entry{kind: tar.TypeSymlink, mode: 0o777, link: target})
}

// Has reports whether something has that name already.
func (t *Tree) Has(name string) bool {
	_, ok := t.entries[clean(name)]
	return ok
}

func clean(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

// put adds an entry, in the place of one that has its name.
func (t *Tree) put(name string, e entry) {
	if t.entries == nil {
		t.entries = map[string]entry{}
	}
	t.entries[clean(name)] = e
}

// WriteTar writes the tree as a tar stream, the uncompressed form of a layer.
func (t *Tree) WriteTar(w io.Writer) error {
	all := maps.Clone(t.entries)
	for name := range t.entries {
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			e, ok := all[dir]
			switch {
			case !ok:
				all[dir] = entry{kind: tar.TypeDir, mode: 0o755}
			case e.kind == tar.TypeReg:
				return fmt.Errorf("an image cannot hold /%s below the file /%s", name, dir)
			case e.kind == tar.TypeSymlink:
				return fmt.Errorf("an image cannot hold /%s below the symbolic link /%s", name, dir)
			}
		}
	}
	tw := tar.NewWriter(w)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		e := all[name]
		h := &tar.Header{Name: name, Typeflag: e.kind, Mode: e.mode, Size: e.size, Linkname: e.link, ModTime: time.Unix(0, 0)}
		if e.kind == tar.TypeDir {
			h.Name += "/"
		}
		if err := tw.WriteHeader(h); err != nil {
			return fmt.Errorf("write /%s: %w", name, err)
		}
		if e.kind != tar.TypeReg {
			continue
		}
		if err := e.copy(tw); err != nil {
			return fmt.Errorf("write /%s: %w", name, err)
		}
	}
	return tw.Close()
}

// errChanged says that a file is not what it was when it was added.
var errChanged = errors.New("the file changed while its image was made; make it again")

func (e entry) copy(w io.Writer) error {
	var r io.Reader = bytes.NewReader(e.content)
	if e.source != "" {
		f, err := os.Open(e.source)
		if err != nil {
			return err
		}
		defer f.Close()
		if st, err := f.Stat(); err != nil {
			return err
		} else if st.Size() != e.size || st.Mode().Type() != fs.FileMode(0) {
			return fmt.Errorf("%s: %w", e.source, errChanged)
		}
		r = f
	}
	_, err := io.CopyN(w, r, e.size)
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: %w", e.source, errChanged)
	}
	return err
}
