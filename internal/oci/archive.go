package oci

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// The annotations that name an image in an archive: containerd reads the first,
// a whole name (as podman does), others the second, a tag alone.
const (
	nameAnnotation = "io.containerd.image.name"
	tagAnnotation  = "org.opencontainers.image.ref.name"
)

// WriteArchive writes the image to path under each of refs, whole names with a
// tag such as "registry.k8s.io/pause:3.10.2".
func (i *Image) WriteArchive(path string, refs ...string) error {
	if len(refs) == 0 {
		return fmt.Errorf("write image %s: no name is given", path)
	}
	index := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex}
	mediaType, err := i.root.MediaType()
	if err != nil {
		return fmt.Errorf("write image %s: %w", path, err)
	}
	for _, ref := range refs {
		tag, err := name.NewTag(ref, name.StrictValidation)
		if err != nil {
			return fmt.Errorf("write image %s: %w; give registry/name:tag", path, err)
		}
		index.Manifests = append(index.Manifests, v1.Descriptor{
			MediaType: mediaType, Digest: i.digest, Size: i.size,
			Annotations: map[string]string{nameAnnotation: ref, tagAnnotation: tag.TagStr()},
		})
	}
	indexJSON, err := json.Marshal(index)
	if err != nil {
		return fmt.Errorf("write image %s: %w", path, err)
	}

	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	defer os.Remove(f.Name()) // of a file that was not renamed
	defer f.Close()
	a := &archive{w: tar.NewWriter(f), has: map[v1.Hash]bool{}}
	for _, step := range []func() error{
		func() error { return a.file("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)) },
		func() error { return a.file("index.json", indexJSON) },
		func() error { return a.add(i.root) },
		a.w.Close,
		func() error { return f.Chmod(0o644) },
		f.Sync,
		f.Close,
		func() error { return os.Rename(f.Name(), path) },
	} {
		if err := step(); err != nil {
			return fmt.Errorf("write image %s: %w", path, err)
		}
	}
	return nil
}

// archive is an OCI image layout that is being written.
type archive struct {
	w   *tar.Writer
	has map[v1.Hash]bool
}

func (a *archive) header(path string, size int64) error {
	return a.w.WriteHeader(&tar.Header{Name: path, Typeflag: tar.TypeReg, Mode: 0o644, Size: size, ModTime: time.Unix(0, 0)})
}

func (a *archive) file(path string, b []byte) error {
	if err := a.header(path, int64(len(b))); err != nil {
		return err
	}
	_, err := a.w.Write(b)
	return err
}

// add writes an image or an index and all that it refers to.
func (a *archive) add(root any) error {
	switch root := root.(type) {
	case v1.ImageIndex:
		manifest, err := root.IndexManifest()
		if err != nil {
			return err
		}
		for _, d := range manifest.Manifests {
			image, err := root.Image(d.Digest)
			if err != nil {
				return err
			}
			if err := a.add(image); err != nil {
				return err
			}
		}
		raw, err := root.RawManifest()
		if err != nil {
			return err
		}
		return a.bytes(raw)
	case v1.Image:
		layers, err := root.Layers()
		if err != nil {
			return err
		}
		for _, l := range layers {
			if err := a.layer(l); err != nil {
				return err
			}
		}
		config, err := root.RawConfigFile()
		if err != nil {
			return err
		}
		raw, err := root.RawManifest()
		if err != nil {
			return err
		}
		return errors.Join(a.bytes(config), a.bytes(raw))
	default:
		return fmt.Errorf("%T is neither an image nor an index", root)
	}
}

func (a *archive) layer(l v1.Layer) error {
	digest, err := l.Digest()
	if err != nil {
		return err
	}
	size, err := l.Size()
	if err != nil {
		return err
	}
	r, err := l.Compressed()
	if err != nil {
		return err
	}
	defer r.Close()
	return a.blob(digest, size, r)
}

func (a *archive) bytes(b []byte) error {
	sum := sha256.Sum256(b)
	return a.blob(v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum[:])}, int64(len(b)), bytes.NewReader(b))
}

// blob writes content under its digest, once. Content is read twice in the life
// of an image, so it is held against its digest here.
func (a *archive) blob(digest v1.Hash, size int64, r io.Reader) error {
	if a.has[digest] {
		return nil
	}
	a.has[digest] = true
	if err := a.header("blobs/"+digest.Algorithm+"/"+digest.Hex, size); err != nil {
		return err
	}
	h := sha256.New()
	if _, err := io.CopyN(io.MultiWriter(a.w, h), r, size); err != nil {
		return err
	}
	if hex.EncodeToString(h.Sum(nil)) != digest.Hex {
		return errChanged
	}
	return nil
}
