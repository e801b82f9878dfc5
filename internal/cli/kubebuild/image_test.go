package kubebuild

import (
	"archive/tar"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/oci"
	"github.com/underlay-cni/underlay/internal/testenv"
)

// needTools skips the test where the distribution's tools are not there.
func needTools(t *testing.T) {
	t.Helper()
	if err := (&builder{}).checkTools([]item{{name: "agnhost", image: true}}); err != nil {
		testenv.Lacks(t, "kubernetes", err.Error())
	}
}

// The image's tools find their libraries in it and nowhere else.
func TestToolsRunInTheImage(t *testing.T) {
	testenv.Require(t, "root")
	needTools(t)
	tree, err := busyboxTree()
	if err != nil {
		t.Fatal(err)
	}
	if err := addTools(tree); err != nil {
		t.Fatal(err)
	}
	root := unpack(t, tree)
	for _, c := range []struct{ command, want string }{
		{"echo $0", "sh"},
		{"bash --version", "GNU bash"},
		{"curl --version", "libcurl"},
		{"nc -h 2>&1", "OpenBSD netcat"},
		{"dig -v", "DiG"},
		{"nslookup -version", "nslookup"},
		{"host -V", "host"},
		{"ip -V 2>&1", "iproute2"},
		{"ss -V", "iproute2"},
		{"iperf -v", "iperf version 2"},
		{"socat -V", "socat version"},
		{"tcpdump --version 2>&1", "libpcap"},
		{"ping -V", "iputils"},
		{"getent passwd user-defined-in-image", "1000"},
		{"ipcs", "Semaphore"},
		{"wget --version", "GNU Wget"},
		{"conntrack --version", "conntrack v"},
		{"httpd --help 2>&1", "BusyBox"},
		{"readlink -f /bin/sh", "/bin/dash"},
	} {
		cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", c.command)
		cmd.Dir = "/"
		cmd.Env = []string{searchPath}
		cmd.SysProcAttr = &unix.SysProcAttr{Chroot: root}
		out, _ := cmd.CombinedOutput() // iperf -v ends with 1
		if !strings.Contains(string(out), c.want) {
			t.Errorf("%s: %q is not in %q", c.command, c.want, out)
		}
	}
}

// unpack writes a tree to a folder as a runtime does.
func unpack(t *testing.T, tree *oci.Tree) string {
	t.Helper()
	r, w := io.Pipe()
	go func() { w.CloseWithError(tree.WriteTar(w)) }()
	root := t.TempDir()
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return root
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(root, h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			err = os.Mkdir(path, h.FileInfo().Mode())
		case tar.TypeSymlink:
			err = os.Symlink(h.Linkname, path)
		default:
			var b []byte
			if b, err = io.ReadAll(tr); err == nil {
				err = os.WriteFile(path, b, h.FileInfo().Mode())
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestMakefileInstallsTheTools(t *testing.T) {
	b, err := os.ReadFile("../../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^KUBERNETES_PACKAGES := ((?:.*\\\n)*.*)$`).FindSubmatch(b)
	if m == nil {
		t.Fatal("the Makefile has no KUBERNETES_PACKAGES")
	}
	have := strings.Fields(strings.ReplaceAll(string(m[1]), "\\", ""))
	for _, p := range Packages() {
		if !slices.Contains(have, p) {
			t.Errorf("%s goes into the agnhost image, and the Makefile does not install it", p)
		}
	}
}

// Names of images go with a version of Kubernetes: its tests and its kubelet ask
// for these.
func TestImagesAreThoseOfKubernetes(t *testing.T) {
	cmd := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes")
	cmd.Dir = "../../../hack/kubernetes"
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=readonly", "GOWORK=off", "GOPROXY=off")
	out, err := cmd.Output()
	dir := strings.TrimSpace(string(out))
	if err != nil || dir == "" {
		testenv.Lacks(t, "kubernetes", "its source is not in Go's module cache; make kubernetes downloads it")
	}
	b, err := os.ReadFile(filepath.Join(dir, "test/utils/image/manifest.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{pauseRef, busyboxRef, agnhostRef, glibcRef, distrolessRef} {
		path, version, _ := strings.Cut(ref, ":")
		if want := `"` + filepath.Base(path) + `", "` + version + `"`; !strings.Contains(string(b), want) {
			t.Errorf("%s: the tests of this Kubernetes do not use it; see test/utils/image/manifest.go", ref)
		}
	}
}

func TestVersionsOfTheModules(t *testing.T) {
	v, err := readVersions("../../..")
	if err != nil {
		t.Fatal(err)
	}
	for name, version := range map[string]string{"kubernetes": v.kubernetes, "coredns": v.coredns, "helm": v.helm} {
		if !regexp.MustCompile(`^v[0-9]+\.[0-9]+\.[0-9]+$`).MatchString(version) {
			t.Errorf("version of %s: %q", name, version)
		}
	}
}

// An agent on AWS speaks to EC2 over TLS, and its image has no other file to
// learn from whom to believe.
func TestAuthorities(t *testing.T) {
	var names []string
	for rest := authorities(); ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, c.Subject.CommonName)
	}
	if !slices.Contains(names, "Amazon Root CA 1") || len(names) < 100 {
		t.Errorf("%d authorities, want Amazon Root CA 1 among a hundred: %v", len(names), names)
	}
}

// An image has no dynamic linker; what needs one is refused beforehand.
func TestDynamicProgramIsRefused(t *testing.T) {
	for name, refused := range map[string]bool{"dash": true, "busybox": false} {
		path := findFile(name)
		if path == "" {
			testenv.Lacks(t, "kubernetes", name+" is not installed")
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := checkStatic(f); (err != nil) != refused {
			t.Errorf("%s: %v", path, err)
		}
	}
}
