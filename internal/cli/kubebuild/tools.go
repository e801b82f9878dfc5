package kubebuild

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/underlay-cni/underlay/internal/oci"
)

// tool is a program of the distribution that goes into the agnhost image.
type tool struct {
	name string // in the image: /bin/name
	file string // on this machine, in /usr/bin or /usr/sbin; "" is name
	pkg  string // Debian's package
}

// tools are what upstream's specs call inside agnhost. The shell is dash:
// busybox's runs its own nc, ping and wget before those in PATH; its nc answers
// UDP specs wrongly, and its wget, linked statically against another glibc than
// the image's, dies of a segmentation fault when it looks up a host.
var tools = []tool{
	{name: "dash", pkg: "dash"},
	{name: "bash", pkg: "bash"},
	{name: "curl", pkg: "curl"},
	{name: "wget", pkg: "wget"},
	{name: "conntrack", pkg: "conntrack"},
	{name: "nc", file: "nc.openbsd", pkg: "netcat-openbsd"},
	{name: "dig", pkg: "bind9-dnsutils"},
	{name: "nslookup", pkg: "bind9-dnsutils"},
	{name: "host", pkg: "bind9-host"},
	{name: "ip", pkg: "iproute2"},
	{name: "ss", pkg: "iproute2"},
	{name: "iperf", pkg: "iperf"},
	{name: "socat", pkg: "socat"},
	{name: "tcpdump", pkg: "tcpdump"},
	{name: "ping", pkg: "iputils-ping"},
	{name: "getent", pkg: "libc-bin"},
	{name: "ipcs", pkg: "util-linux"},
}

var busybox = tool{name: "busybox", pkg: "busybox-static"}

func (t tool) path() string {
	if t.file != "" {
		return findFile(t.file)
	}
	return findFile(t.name)
}

// findFile returns the distribution's program of that name, not what stands
// before it in PATH, or "".
func findFile(name string) string {
	for _, dir := range []string{"/usr/bin", "/bin", "/usr/sbin", "/sbin"} {
		path := filepath.Join(dir, name)
		if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return path
		}
	}
	return ""
}

// Packages returns the Debian packages whose programs go into images.
func Packages() []string {
	names := []string{busybox.pkg}
	for _, t := range tools {
		if !slices.Contains(names, t.pkg) {
			names = append(names, t.pkg)
		}
	}
	return names
}

// checkTools says which packages are missing for the images in todo.
func (b *builder) checkTools(todo []item) error {
	need := func(it item) bool {
		return slices.ContainsFunc(images, func(i image) bool { return it.image && i.name == it.name && i.tools })
	}
	if !slices.ContainsFunc(todo, need) {
		return nil
	}
	var missing []string
	for _, t := range append([]tool{busybox}, tools...) {
		if t.path() == "" && !slices.Contains(missing, t.pkg) {
			missing = append(missing, t.pkg)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return fmt.Errorf("make the agnhost image: it holds tools of this machine, and some are not there; as root: apt-get install -y --no-install-recommends %s", strings.Join(missing, " "))
}

// toolsKey tells by size and time of change whether the tools are still those
// that an image was made with.
func (b *builder) toolsKey() string {
	var s strings.Builder
	for _, t := range append([]tool{busybox}, tools...) {
		path := t.path()
		fmt.Fprintf(&s, "%s %s", t.name, path)
		if st, err := os.Stat(path); err == nil {
			fmt.Fprintf(&s, " %d %d", st.Size(), st.ModTime().UnixNano())
		}
		s.WriteByte('\n')
	}
	return s.String()
}

// nss are what getaddrinfo of older glibc loads by name, and what newer keep for
// static programs; they stand in nobody's list of needed libraries.
var nss = []string{"libnss_files.so.2", "libnss_dns.so.2"}

// addTools adds the tools with their libraries.
func addTools(t *oci.Tree) error {
	libs := libraries{found: map[string]string{}}
	for _, tool := range tools {
		path, err := filepath.EvalSymlinks(tool.path())
		if err != nil {
			return fmt.Errorf("add %s: %w; as root: apt-get install %s", tool.name, err, tool.pkg)
		}
		if err := t.File("/bin/"+tool.name, 0o755, path); err != nil {
			return err
		}
		if err := libs.of(path); err != nil {
			return fmt.Errorf("find the libraries of %s: %w", path, err)
		}
	}
	t.Symlink("/bin/sh", "dash")
	for _, name := range nss {
		if path := libs.search(name, nil); path != "" {
			libs.found[path] = path
			if err := libs.of(path); err != nil {
				return fmt.Errorf("find the libraries of %s: %w", path, err)
			}
		}
	}
	for name, path := range libs.found {
		if err := t.File(name, 0o755, path); err != nil {
			return err
		}
	}
	return nil
}

// libraries collects shared libraries, and the dynamic linker, under the names
// by which a program asks for them.
type libraries struct {
	found map[string]string // name in the image → file on this machine
}

// of adds what the ELF file at path needs, and what that needs.
func (l *libraries) of(path string) error {
	f, err := elf.Open(path)
	if err != nil {
		var format *elf.FormatError
		if errors.As(err, &format) {
			return nil // a script
		}
		return err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		b := make([]byte, p.Filesz)
		if _, err := p.ReadAt(b, 0); err != nil {
			return err
		}
		linker := strings.TrimRight(string(b), "\x00")
		l.found[linker] = linker
	}
	needed, err := f.ImportedLibraries()
	if err != nil {
		return err
	}
	var rpath []string
	for _, tag := range []elf.DynTag{elf.DT_RPATH, elf.DT_RUNPATH} {
		list, err := f.DynString(tag)
		if err != nil {
			return err
		}
		for _, dirs := range list {
			dirs = strings.NewReplacer("$ORIGIN", filepath.Dir(path), "${ORIGIN}", filepath.Dir(path)).Replace(dirs)
			rpath = append(rpath, strings.Split(dirs, ":")...)
		}
	}
	for _, name := range needed {
		lib := l.search(name, rpath)
		if lib == "" {
			return fmt.Errorf("%s is nowhere", name)
		}
		if l.found[lib] != "" {
			continue
		}
		l.found[lib] = lib
		if err := l.of(lib); err != nil {
			return err
		}
	}
	return nil
}

// multiarch is Debian's name of the architecture, in paths of libraries.
var multiarch = map[string]string{"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}

// search returns the path of a library as ld.so(8) finds it without a cache.
func (l *libraries) search(name string, rpath []string) string {
	dirs := slices.Concat(rpath, []string{
		"/lib/" + multiarch[arch], "/usr/lib/" + multiarch[arch], "/lib64", "/usr/lib64", "/lib", "/usr/lib",
	})
	for _, dir := range dirs {
		path := filepath.Join(dir, name)
		if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() {
			return path
		}
	}
	return ""
}
