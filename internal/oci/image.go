package oci

import (
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Config is how a container of the image starts, and what the image says of
// itself. Field by field it is the "config" object of
// https://github.com/opencontainers/image-spec/blob/v1.1.1/config.md.
type Config struct {
	Entrypoint []string
	Cmd        []string
	Env        []string // "NAME=VALUE"
	User       string   // "65535:65535"; "" is root
	WorkingDir string
	Ports      []string // "8080/tcp"; informs, opens nothing
	Labels     map[string]string

	// Gzip compresses the layers: for images that travel. Those that are
	// imported on the machine that made them are unpacked faster without.
	Gzip bool
}

// Platform is the content of an image on one architecture; the system is Linux.
type Platform struct {
	Architecture string // as GOARCH; "" is this machine's
	Files        *Tree
}

// Image is an image for one platform, or, as an OCI index, for several.
type Image struct {
	root   mutate.Appendable
	digest v1.Hash
	size   int64
}

// New makes an image. It reads all files, and reads them again when the image is
// written.
func New(c Config, platforms ...Platform) (*Image, error) {
	if len(platforms) == 0 {
		return nil, errors.New("make an image: no platform is given")
	}
	var images []v1.Image
	var archs []string
	for _, p := range platforms {
		if p.Architecture == "" {
			p.Architecture = runtime.GOARCH
		}
		if slices.Contains(archs, p.Architecture) {
			return nil, fmt.Errorf("make an image: linux/%s is given twice", p.Architecture)
		}
		image, err := one(c, p)
		if err != nil {
			return nil, fmt.Errorf("make an image for linux/%s: %w", p.Architecture, err)
		}
		images, archs = append(images, image), append(archs, p.Architecture)
	}
	if len(images) == 1 {
		return finished(images[0])
	}
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for i, image := range images {
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add:        image,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: archs[i]}},
		})
	}
	return finished(index)
}

func finished(root mutate.Appendable) (*Image, error) {
	digest, err := root.Digest()
	if err != nil {
		return nil, fmt.Errorf("make an image: %w", err)
	}
	size, err := root.Size()
	if err != nil {
		return nil, fmt.Errorf("make an image: %w", err)
	}
	return &Image{root: root, digest: digest, size: size}, nil
}

// Digest identifies the image: "sha256:" and 64 hexadecimal digits, of its
// manifest, or of its index when it has several platforms.
func (i *Image) Digest() string { return i.digest.String() }

func one(c Config, p Platform) (v1.Image, error) {
	layer, err := newLayer(p.Files, c.Gzip)
	if err != nil {
		return nil, err
	}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if image, err = mutate.AppendLayers(image, layer); err != nil {
		return nil, err
	}
	file, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture = "linux", p.Architecture
	file.Created = v1.Time{Time: time.Unix(0, 0).UTC()}
	file.History = nil // it would say when and by which library
	file.Config = v1.Config{
		Entrypoint: c.Entrypoint, Cmd: c.Cmd, Env: c.Env,
		User: c.User, WorkingDir: c.WorkingDir, Labels: maps.Clone(c.Labels),
	}
	for _, port := range c.Ports {
		if file.Config.ExposedPorts == nil {
			file.Config.ExposedPorts = map[string]struct{}{}
		}
		file.Config.ExposedPorts[port] = struct{}{}
	}
	return mutate.ConfigFile(image, file)
}

func newLayer(t *Tree, compress bool) (v1.Layer, error) {
	if t == nil {
		t = &Tree{}
	}
	if compress {
		return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return t.open(), nil },
			tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(gzip.DefaultCompression))
	}
	h, n := sha256.New(), counter(0)
	if err := t.WriteTar(io.MultiWriter(h, &n)); err != nil {
		return nil, err
	}
	return &plainLayer{tree: t, size: int64(n), digest: v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(h.Sum(nil))}}, nil
}

// open returns the tree as a tar stream.
func (t *Tree) open() io.ReadCloser {
	r, w := io.Pipe()
	go func() { w.CloseWithError(t.WriteTar(w)) }() // ends with the stream, or when it is closed
	return r
}

type counter int64

func (c *counter) Write(p []byte) (int, error) { *c += counter(len(p)); return len(p), nil }

// plainLayer is an uncompressed layer, made anew from its tree each time it is
// read: go-containerregistry's own layers compress always.
type plainLayer struct {
	tree   *Tree
	digest v1.Hash
	size   int64 // bytes of the tar stream
}

func (l *plainLayer) Digest() (v1.Hash, error)             { return l.digest, nil }
func (l *plainLayer) DiffID() (v1.Hash, error)             { return l.digest, nil }
func (l *plainLayer) Compressed() (io.ReadCloser, error)   { return l.tree.open(), nil }
func (l *plainLayer) Uncompressed() (io.ReadCloser, error) { return l.tree.open(), nil }
func (l *plainLayer) Size() (int64, error)                 { return l.size, nil }
func (l *plainLayer) MediaType() (types.MediaType, error)  { return types.OCIUncompressedLayer, nil }
