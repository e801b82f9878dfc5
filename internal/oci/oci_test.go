package oci

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// sample is a tree whose entries are added in an order of the caller's choice.
func sample(t *testing.T, dir string, reverse bool) *Tree {
	t.Helper()
	source := filepath.Join(dir, "program")
	if err := os.WriteFile(source, []byte("#!/bin/sh\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	tree := &Tree{}
	steps := []func(){
		func() {
			if err := tree.File("/usr/bin/program", 0o755, source); err != nil {
				t.Fatal(err)
			}
		},
		func() { tree.Symlink("bin", "usr/bin") },
		func() { tree.Dir("/tmp", 0o1777) },
		func() { tree.Bytes("/etc/passwd", 0o644, []byte("root:x:0:0::/:\n")) },
	}
	for i := range steps {
		if reverse {
			i = len(steps) - 1 - i
		}
		steps[i]()
	}
	return tree
}

func archiveOf(t *testing.T, image *Image, refs ...string) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.tar")
	if err := image.WriteArchive(path, refs...); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// read returns the files of a tar stream and its headers in short.
func read(t *testing.T, b []byte) (map[string][]byte, []string) {
	t.Helper()
	files, list := map[string][]byte{}, []string{}
	for r := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files, list
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
		if h.ModTime.Unix() != 0 || h.Uid != 0 || h.Gid != 0 || h.Uname != "" {
			t.Errorf("%s: time %d, owner %d:%d %q; want 0, 0:0 and no name", h.Name, h.ModTime.Unix(), h.Uid, h.Gid, h.Uname)
		}
		line := h.FileInfo().Mode().String() + " " + h.Name
		if h.Linkname != "" {
			line += " -> " + h.Linkname
		}
		list = append(list, line)
	}
}

func TestArchive(t *testing.T) {
	config := Config{Entrypoint: []string{"/bin/program"}, User: "65535:65535", Ports: []string{"80/tcp"}, Labels: map[string]string{"a": "b"}}
	image, err := New(config, Platform{Architecture: "arm64", Files: sample(t, t.TempDir(), false)})
	if err != nil {
		t.Fatal(err)
	}
	files, _ := read(t, archiveOf(t, image, "registry.k8s.io/x/y:1.0", "docker.io/underlay/z:2"))

	if got := string(files["oci-layout"]); got != `{"imageLayoutVersion":"1.0.0"}` {
		t.Errorf("oci-layout is %s", got)
	}
	var index v1.IndexManifest
	if err := json.Unmarshal(files["index.json"], &index); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, d := range index.Manifests {
		if d.Digest.String() != image.Digest() {
			t.Errorf("index.json has %s, Digest is %s", d.Digest, image.Digest())
		}
		names = append(names, d.Annotations["io.containerd.image.name"]+" "+d.Annotations["org.opencontainers.image.ref.name"])
	}
	if d := cmp.Diff([]string{"registry.k8s.io/x/y:1.0 1.0", "docker.io/underlay/z:2 2"}, names); d != "" {
		t.Errorf("names (-want +got):\n%s", d)
	}
	var manifest v1.Manifest
	if err := json.Unmarshal(blob(t, files, index.Manifests[0].Digest), &manifest); err != nil {
		t.Fatal(err)
	}
	var file v1.ConfigFile
	if err := json.Unmarshal(blob(t, files, manifest.Config.Digest), &file); err != nil {
		t.Fatal(err)
	}
	want := v1.Config{Entrypoint: []string{"/bin/program"}, User: "65535:65535", ExposedPorts: map[string]struct{}{"80/tcp": {}}, Labels: map[string]string{"a": "b"}}
	if d := cmp.Diff(want, file.Config); d != "" {
		t.Errorf("config (-want +got):\n%s", d)
	}
	if file.OS != "linux" || file.Architecture != "arm64" || len(file.RootFS.DiffIDs) != 1 {
		t.Errorf("config file: %+v", file)
	}
	_, list := read(t, blob(t, files, manifest.Layers[0].Digest))
	if d := cmp.Diff([]string{
		"Lrwxrwxrwx bin -> usr/bin",
		"drwxr-xr-x etc/",
		"-rw-r--r-- etc/passwd",
		"dtrwxrwxrwx tmp/",
		"drwxr-xr-x usr/",
		"drwxr-xr-x usr/bin/",
		"-rwxr-xr-x usr/bin/program",
	}, list); d != "" {
		t.Errorf("layer (-want +got):\n%s", d)
	}
}

func blob(t *testing.T, files map[string][]byte, digest v1.Hash) []byte {
	t.Helper()
	b, ok := files["blobs/"+digest.Algorithm+"/"+digest.Hex]
	if !ok {
		t.Fatalf("there is no blob %s", digest)
	}
	return b
}

func TestEqualFilesEqualDigest(t *testing.T) {
	for _, gzip := range []bool{false, true} {
		c := Config{Gzip: gzip, Labels: map[string]string{"a": "1", "b": "2"}}
		var digests []string
		var archives [][]byte
		for _, reverse := range []bool{false, true} {
			image, err := New(c,
				Platform{Architecture: "amd64", Files: sample(t, t.TempDir(), reverse)},
				Platform{Architecture: "arm64", Files: sample(t, t.TempDir(), reverse)})
			if err != nil {
				t.Fatal(err)
			}
			digests = append(digests, image.Digest())
			archives = append(archives, archiveOf(t, image, "example.com/a:b"))
		}
		if digests[0] != digests[1] || !bytes.Equal(archives[0], archives[1]) {
			t.Errorf("gzip %t: two images of equal files differ: %v", gzip, digests)
		}
		other := sample(t, t.TempDir(), false)
		other.Bytes("/etc/passwd", 0o600, []byte("root:x:0:0::/:\n")) // another mode
		image, err := New(c, Platform{Architecture: "amd64", Files: other}, Platform{Architecture: "arm64", Files: other})
		if err != nil {
			t.Fatal(err)
		}
		if image.Digest() == digests[0] {
			t.Errorf("gzip %t: a file's mode does not change the digest", gzip)
		}
	}
}

func TestSeveralPlatforms(t *testing.T) {
	image, err := New(Config{Gzip: true},
		Platform{Architecture: "amd64", Files: sample(t, t.TempDir(), false)},
		Platform{Architecture: "arm64", Files: sample(t, t.TempDir(), false)})
	if err != nil {
		t.Fatal(err)
	}
	files, _ := read(t, archiveOf(t, image, "example.com/a:b"))
	var top, index v1.IndexManifest
	if err := json.Unmarshal(files["index.json"], &top); err != nil {
		t.Fatal(err)
	}
	if len(top.Manifests) != 1 || !top.Manifests[0].MediaType.IsIndex() {
		t.Fatalf("index.json: %s", files["index.json"])
	}
	if err := json.Unmarshal(blob(t, files, top.Manifests[0].Digest), &index); err != nil {
		t.Fatal(err)
	}
	var platforms []string
	for _, d := range index.Manifests {
		platforms = append(platforms, d.Platform.String())
		var m v1.Manifest
		if err := json.Unmarshal(blob(t, files, d.Digest), &m); err != nil {
			t.Fatal(err)
		}
		blob(t, files, m.Config.Digest)
		blob(t, files, m.Layers[0].Digest)
	}
	if d := cmp.Diff([]string{"linux/amd64", "linux/arm64"}, platforms); d != "" {
		t.Errorf("platforms (-want +got):\n%s", d)
	}
}

func TestBadImages(t *testing.T) {
	dir := t.TempDir()
	good := sample(t, dir, false)
	underFile, underLink := &Tree{}, &Tree{}
	underFile.Bytes("/etc", 0o644, nil)
	underFile.Bytes("/etc/passwd", 0o644, nil)
	underLink.Symlink("/bin", "usr/bin")
	underLink.Bytes("/bin/sh", 0o755, nil)
	for name, c := range map[string]struct {
		platforms []Platform
		want      string
	}{
		"no platform":        {nil, "no platform"},
		"a platform twice":   {[]Platform{{"amd64", good}, {"amd64", good}}, "linux/amd64 is given twice"},
		"below a file":       {[]Platform{{"amd64", underFile}}, "/etc/passwd below the file /etc"},
		"below a link":       {[]Platform{{"amd64", underLink}}, "/bin/sh below the symbolic link /bin"},
		"compressed, as bad": {[]Platform{{"amd64", underLink}}, "below the symbolic link"},
	} {
		_, err := New(Config{Gzip: strings.HasPrefix(name, "compressed")}, c.platforms...)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", name, err, c.want)
		}
	}
	if err := (&Tree{}).File("/x", 0o644, dir); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a folder as a file: %v", err)
	}

	image, err := New(Config{}, Platform{Files: good})
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "image.tar")
	for _, refs := range [][]string{nil, {"pause"}, {"pause:3.10"}, {"example.com/UPPER:1"}} {
		if err := image.WriteArchive(out, refs...); err == nil {
			t.Errorf("an archive under the names %q: no error", refs)
		}
	}
	// What changes between making and writing is noticed, and leaves nothing.
	for _, content := range []string{"#!/bin/no\n", "#!/bin/sh -longer\n", "short"} {
		if err := os.WriteFile(filepath.Join(dir, "program"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := image.WriteArchive(out, "example.com/a:b"); !errors.Is(err, errChanged) {
			t.Errorf("program is now %q: error %v", content, err)
		}
	}
	left, err := os.ReadDir(filepath.Dir(out))
	if err != nil || len(left) != 0 {
		t.Errorf("failed writes left %v (%v)", left, err)
	}
}
