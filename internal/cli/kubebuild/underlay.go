package kubebuild

import (
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/crypto/x509roots/fallback/bundle"

	"github.com/underlay-cni/underlay/internal/oci"
)

// UnderlayRef is Underlay's image without a tag.
const UnderlayRef = "ghcr.io/underlay-cni/underlay"

// underlayPrograms are what the image holds.
var underlayPrograms = []string{"underlay-agent", "underlay-cni"}

// underlayConfig is the image's. There is no shell, no library and no user
// beside root in it: the agent works on the node's kernel, and what it may do
// there the DaemonSet says.
func underlayConfig() oci.Config {
	return oci.Config{
		Entrypoint: []string{"/underlay-agent"},
		Env:        []string{searchPath},
		WorkingDir: "/",
		Labels: map[string]string{ // https://github.com/opencontainers/image-spec/blob/v1.1.1/annotations.md
			"org.opencontainers.image.title":       "underlay",
			"org.opencontainers.image.description": "Underlay's node agent and CNI plugin",
			"org.opencontainers.image.source":      "https://github.com/underlay-cni/underlay",
			"org.opencontainers.image.licenses":    "Apache-2.0",
		},
	}
}

// underlayTree is the image's content: the programs of a folder, and the
// certificates of authorities, without which nobody speaks to EC2.
func underlayTree(programs string) (*oci.Tree, error) {
	t := &oci.Tree{}
	for _, name := range underlayPrograms {
		if err := t.File("/"+name, 0o755, filepath.Join(programs, name)); err != nil {
			return nil, err
		}
	}
	t.Bytes("/etc/ssl/certs/ca-certificates.crt", 0o644, authorities())
	t.Dir("/tmp", 0o1777)
	return t, nil
}

// authorities returns Mozilla's root certificates as the module golang.org/x/crypto
// has them, so that an image does not depend on who made it. Those that are good
// under a constraint only are left out: a file cannot tell of it.
func authorities() []byte {
	var b []byte
	for root := range bundle.Roots() {
		if root.Constraint == nil {
			b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate})...)
		}
	}
	return b
}

// underlayItem is the image of the programs in a folder, for this machine. Its
// tag is of its content.
func underlayItem(programs string) (item, error) {
	if programs == "" {
		self, err := os.Executable()
		if err != nil {
			return item{}, fmt.Errorf("find Underlay's programs: %w", err)
		}
		if self, err = filepath.EvalSymlinks(self); err != nil {
			return item{}, fmt.Errorf("find Underlay's programs: %w", err)
		}
		programs = filepath.Dir(self)
	}
	h := sha256.New()
	fmt.Fprintln(h, recipe, underlayConfig(), arch)
	h.Write(authorities())
	for _, name := range underlayPrograms {
		f, err := os.Open(filepath.Join(programs, name))
		if err != nil {
			return item{}, fmt.Errorf("find Underlay's programs: %w; build all commands with: make build", err)
		}
		_, err = io.Copy(h, f)
		if err == nil {
			err = checkStatic(f)
		}
		f.Close()
		if err != nil {
			return item{}, fmt.Errorf("read %s: %w", f.Name(), err)
		}
	}
	key := hex.EncodeToString(h.Sum(nil))
	make := func(_ context.Context, _ *builder, to string) ([]string, error) {
		t, err := underlayTree(programs)
		if err != nil {
			return nil, err
		}
		made, err := oci.New(underlayConfig(), oci.Platform{Files: t})
		if err != nil {
			return nil, err
		}
		ref := UnderlayRef + ":lab-" + strings.TrimPrefix(made.Digest(), "sha256:")[:12]
		return []string{ref}, made.WriteArchive(to, ref)
	}
	return item{name: Underlay, image: true, path: imagePath(Underlay, key), key: key, make: make}, nil
}

// checkStatic refuses a program that wants a dynamic linker: the image has none,
// and a kernel that finds none says that the program is not there.
func checkStatic(r io.ReaderAt) error {
	f, err := elf.NewFile(r)
	if err != nil {
		return nil // no program of this system, as a test may have it
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("it is linked dynamically, and an image of it alone would not start; build it with CGO_ENABLED=0, as make build does")
		}
	}
	return nil
}

// Platforms are the architectures that Underlay's image is released for.
var Platforms = []string{"amd64", "arm64"}

// WriteUnderlay compiles Underlay's programs for each of archs and writes an
// image of all of them to path, under the given names. It returns the image's
// digest. Compilation for a foreign architecture takes minutes the first time.
func WriteUnderlay(ctx context.Context, o Options, path string, archs []string, refs ...string) (digest string, err error) {
	b := &builder{progress: o.Progress, log: io.Discard}
	if o.Log != nil {
		b.log = o.Log
	}
	if b.progress == nil {
		b.progress = func(string, int, int) {}
	}
	if b.source, err = findSource(o.Source); err != nil {
		return "", err
	}
	if b.goTool, err = findGo(); err != nil {
		return "", err
	}
	scratch, err := os.MkdirTemp("", "underlay-image-")
	if err != nil {
		return "", fmt.Errorf("make Underlay's image: %w", err)
	}
	defer os.RemoveAll(scratch)
	b.of = len(archs) + 1
	var platforms []oci.Platform
	for i, arch := range archs {
		if !slices.Contains(Platforms, arch) {
			return "", fmt.Errorf("make Underlay's image: linux/%s is not supported; supported are linux/%s", arch, strings.Join(Platforms, ", linux/"))
		}
		b.done = i
		dir := filepath.Join(scratch, arch)
		args := []string{"build", "-v", "-trimpath", "-ldflags", "-s -w", "-o", dir + "/"}
		for _, name := range underlayPrograms {
			args = append(args, "./cmd/"+name)
		}
		if err := b.goRun(ctx, goCommand{name: "linux/" + arch, dir: b.source, args: args, env: buildEnv(arch)}); err != nil {
			return "", err
		}
		t, err := underlayTree(dir)
		if err != nil {
			return "", err
		}
		platforms = append(platforms, oci.Platform{Architecture: arch, Files: t})
	}
	b.done = len(archs)
	b.progress("image", b.done, b.of)
	config := underlayConfig()
	config.Gzip = true
	image, err := oci.New(config, platforms...)
	if err != nil {
		return "", err
	}
	if len(refs) == 0 {
		return "", errors.New("make Underlay's image: no name is given")
	}
	if err := image.WriteArchive(path, refs...); err != nil {
		return "", err
	}
	b.progress("finished", b.of, b.of)
	return image.Digest(), nil
}
