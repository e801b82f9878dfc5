package kubebuild

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/underlay-cni/underlay/internal/oci"
)

// recipe is part of every image's key: another number makes all images anew.
const recipe = "1"

// Names of images, as upstream's manifests and tests of Kubernetes v1.37.2 have
// them (cmd/kubeadm/app/constants, test/utils/image/manifest.go). A test holds
// them against the module.
const (
	pauseRef   = "registry.k8s.io/pause:3.10.2"
	corednsRef = "registry.k8s.io/coredns/coredns:" // and CoreDNS's own version
	busyboxRef = "registry.k8s.io/e2e-test-images/busybox:1.37.0-2"
	agnhostRef = "registry.k8s.io/e2e-test-images/agnhost:2.66.1"
	// A DNS spec wants dig of glibc rather than of musl, which this agnhost has;
	// one about kube-proxy runs conntrack in an image of it alone.
	glibcRef      = "registry.k8s.io/e2e-test-images/glibc-dns-testing:2.1.1"
	distrolessRef = "registry.k8s.io/build-image/distroless-iptables:v0.9.9"
)

// image is an image that is made of one of the programs.
type image struct {
	name    string
	program string
	also    string // a further program that it holds; ""
	tools   bool   // it holds the distribution's tools
	refs    func(v versions) []string
	content func(ctx context.Context, b *builder) (oci.Config, *oci.Tree, error)
}

func refs(names ...string) func(versions) []string {
	return func(versions) []string { return names }
}

var images = []image{
	{name: "pause", program: "pause", refs: refs(pauseRef), content: pauseImage},
	{name: "coredns", program: "coredns", refs: func(v versions) []string { return []string{corednsRef + v.coredns} }, content: corednsImage},
	{name: "busybox", program: "agnhost", tools: true, refs: refs(busyboxRef), content: busyboxImage},
	{name: "agnhost", program: "agnhost", also: "coredns", tools: true, refs: refs(agnhostRef, glibcRef, distrolessRef), content: agnhostImage},
}

// imageItems returns the images that go with the wanted programs.
func (b *builder) imageItems(want []string, keys map[string]string, programs string) ([]item, error) {
	var items []item
	toolsKey := ""
	for _, i := range images {
		if !slices.Contains(want, i.program) {
			continue
		}
		h := sha256.New()
		fmt.Fprintln(h, recipe, i.name, i.refs(b.versions), keys[i.program], keys[i.also])
		if i.tools {
			if toolsKey == "" {
				toolsKey = b.toolsKey()
			}
			fmt.Fprintln(h, toolsKey)
		}
		key := hex.EncodeToString(h.Sum(nil))
		items = append(items, item{name: i.name, image: true, path: imagePath(i.name, key), key: key, make: i.make})
	}
	if slices.Contains(want, Underlay) {
		it, err := underlayItem(programs)
		if err != nil {
			return nil, err
		}
		items = append(items, it)
	}
	return items, nil
}

// make writes the image to the path to.
func (i image) make(ctx context.Context, b *builder, to string) ([]string, error) {
	config, tree, err := i.content(ctx, b)
	if err != nil {
		return nil, fmt.Errorf("make image %s: %w", i.name, err)
	}
	made, err := oci.New(config, oci.Platform{Files: tree})
	if err != nil {
		return nil, fmt.Errorf("make image %s: %w", i.name, err)
	}
	names := i.refs(b.versions)
	return names, made.WriteArchive(to, names...)
}

func (b *builder) program(name string) string { return filepath.Join(b.folder.dir, "bin", name) }

const searchPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

func pauseImage(_ context.Context, b *builder) (oci.Config, *oci.Tree, error) {
	var t oci.Tree
	err := t.File("/pause", 0o755, b.program("pause"))
	return oci.Config{Entrypoint: []string{"/pause"}, User: "65535:65535", WorkingDir: "/", Env: []string{searchPath}}, &t, err
}

func corednsImage(_ context.Context, b *builder) (oci.Config, *oci.Tree, error) {
	var t oci.Tree
	err := t.File("/coredns", 0o755, b.program("coredns"))
	return oci.Config{Entrypoint: []string{"/coredns"}, WorkingDir: "/", Ports: []string{"53/tcp", "53/udp"}, Env: []string{searchPath}}, &t, err
}

func busyboxImage(context.Context, *builder) (oci.Config, *oci.Tree, error) {
	t, err := busyboxTree()
	return oci.Config{Cmd: []string{"sh"}, Env: []string{searchPath}}, t, err
}

// busyboxTree is a system of Debian's static busybox and the few files that
// programs expect.
func busyboxTree() (*oci.Tree, error) {
	path := findFile("busybox")
	out, err := exec.Command(path, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("ask %s for its commands: %w", path, err)
	}
	t := &oci.Tree{}
	if err := t.File("/bin/busybox", 0o755, path); err != nil {
		return nil, err
	}
	for _, name := range strings.Fields(string(out)) {
		if name != "busybox" {
			t.Symlink("/bin/"+name, "busybox")
		}
	}
	t.Dir("/tmp", 0o1777)
	for _, dir := range []string{"/root", "/home", "/usr/bin", "/usr/sbin", "/var"} {
		t.Dir(dir, 0o755)
	}
	// Specs about supplemental groups look for the last user and group
	// (upstream's test/images/agnhost/Dockerfile).
	t.Bytes("/etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\nuser-defined-in-image:x:1000:1000::/home:/bin/sh\n"))
	t.Bytes("/etc/group", 0o644, []byte("root:x:0:\nnobody:x:65534:\nuser-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n"))
	t.Bytes("/etc/nsswitch.conf", 0o644, []byte("hosts: files dns\n"))
	return t, nil
}

// agnhostImage is upstream's agnhost with CoreDNS, which specs run as a name
// server of a pod, and the tools of its Dockerfile, Debian's instead of Alpine's.
func agnhostImage(ctx context.Context, b *builder) (oci.Config, *oci.Tree, error) {
	c := oci.Config{
		Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}, Env: []string{searchPath},
		Ports: []string{"80/tcp", "8080/tcp", "8081/tcp", "9376/tcp", "5000/tcp"},
	}
	t, err := busyboxTree()
	if err != nil {
		return c, nil, err
	}
	if err := addTools(t); err != nil {
		return c, nil, err
	}
	if err := t.File("/agnhost", 0o755, b.program("agnhost")); err != nil {
		return c, nil, err
	}
	if err := t.File("/coredns", 0o755, b.program("coredns")); err != nil {
		return c, nil, err
	}
	t.Symlink("/agnhost-2", "agnhost") // tests of entrypoints start it
	t.Dir("/uploads", 0o755)           // netexec's
	t.Dir("/var/registry", 0o755)      // fake-registry-server's
	module, err := b.moduleDir(ctx, kubernetesModule, "k8s.io/kubernetes")
	if err != nil {
		return c, nil, err
	}
	for _, name := range []string{"localhost.crt", "localhost.key"} { // porter's
		content, err := os.ReadFile(filepath.Join(module, "test/images/agnhost/porter", name))
		if err != nil {
			return c, nil, err
		}
		t.Bytes("/"+name, 0o644, content)
	}
	return c, t, nil
}

// moduleDir returns where the source of a dependency is.
func (b *builder) moduleDir(ctx context.Context, of, module string) (string, error) {
	cmd := exec.CommandContext(ctx, b.goTool, "list", "-m", "-f", "{{.Dir}}", module)
	cmd.Dir = filepath.Join(b.source, of)
	cmd.Env = append(os.Environ(), buildEnv(arch)...)
	out, err := cmd.Output()
	dir := strings.TrimSpace(string(out))
	if err != nil || dir == "" {
		return "", fmt.Errorf("find the source of %s: go list -m in %s: %w", module, cmd.Dir, err)
	}
	return dir, nil
}
