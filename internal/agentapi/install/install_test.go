package install

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"github.com/underlay-cni/underlay/internal/testenv"
)

// target is a runtime's folders in a directory of the test.
func target(t *testing.T) Target {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"net.d", "bin", "image"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	tg := Target{ConfList: filepath.Join(dir, "net.d", ConfList), Bin: filepath.Join(dir, "bin"), Plugin: filepath.Join(dir, "image", "underlay-cni"), Socket: "/run/underlay/agent.sock"}
	write(t, tg.Plugin, "program 1")
	return tg
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func install(t *testing.T, tg Target, changes bool) {
	t.Helper()
	if changed, err := tg.Install(); err != nil || changed != changes {
		t.Fatalf("Install: changed %v, want %v; %v", changed, changes, err)
	}
}

func TestInstall(t *testing.T) {
	tg := target(t)
	install(t, tg, true)
	if got := read(t, tg.plugin()); got != "program 1" {
		t.Errorf("the plugin is %q", got)
	}
	if st, err := os.Stat(tg.plugin()); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("the plugin: %v, %v", st.Mode(), err)
	}

	// As it should be: not touched.
	before := inodes(t, tg)
	install(t, tg, false)
	if after := inodes(t, tg); after != before {
		t.Errorf("equal files were replaced: inodes %v, then %v", before, after)
	}

	// A newer plugin takes the place of one that is running.
	running, err := os.Open(tg.plugin())
	if err != nil {
		t.Fatal(err)
	}
	defer running.Close()
	write(t, tg.Plugin, "program 2, longer")
	install(t, tg, true)
	if got := read(t, tg.plugin()); got != "program 2, longer" {
		t.Errorf("the plugin is %q", got)
	}
	old := make([]byte, 100)
	if n, _ := running.Read(old); string(old[:n]) != "program 1" {
		t.Errorf("who runs the old plugin sees %q", old[:n])
	}

	// What others changed comes back: content, mode, absence.
	for name, damage := range map[string]func() error{
		"content": func() error { return os.WriteFile(tg.ConfList, []byte("{}"), 0o644) },
		"mode":    func() error { return os.Chmod(tg.plugin(), 0o644) },
		"absence": func() error { return os.Remove(tg.ConfList) },
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		if changed, err := tg.Install(); err != nil || !changed {
			t.Errorf("%s: changed %v, %v", name, changed, err)
		}
		install(t, tg, false)
	}
}

func inodes(t *testing.T, tg Target) (out [2]uint64) {
	t.Helper()
	for i, path := range []string{tg.plugin(), tg.ConfList} {
		var st syscall.Stat_t
		if err := syscall.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		out[i] = st.Ino
	}
	return out
}

// A process that died left half of each file.
func TestHalfMadeFilesGo(t *testing.T) {
	tg := target(t)
	half := []string{tg.Bin + "/.new-underlay-cni-123", filepath.Dir(tg.ConfList) + "/.new-" + ConfList + "-9"}
	others := []string{tg.Bin + "/.new-somebody-else", filepath.Dir(tg.ConfList) + "/.new-"}
	for _, path := range slices.Concat(half, others) {
		write(t, path, "half")
	}
	install(t, tg, true)
	for _, path := range half {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there: %v", path, err)
		}
	}
	for _, path := range others {
		if got := read(t, path); got != "half" {
			t.Errorf("%s is %q", path, got)
		}
	}
}

// The list appears after the plugin, or not at all.
func TestListOnlyWithThePlugin(t *testing.T) {
	tg := target(t)
	if err := os.Remove(tg.Plugin); err != nil {
		t.Fatal(err)
	}
	if _, err := tg.Install(); err == nil {
		t.Error("no plugin to install, and no error")
	}
	if _, err := os.Stat(tg.ConfList); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a list without a plugin: %v", err)
	}
}

func TestRemove(t *testing.T) {
	tg := target(t)
	install(t, tg, true)
	write(t, tg.Bin+"/.new-underlay-cni-1", "half")
	other := filepath.Join(tg.Bin, "loopback")
	write(t, other, "other")
	for _, want := range []bool{true, false} { // the second time there is nothing
		if removed, err := tg.Remove(); err != nil || removed != want {
			t.Errorf("Remove: %v, %v; want %v", removed, err, want)
		}
	}
	for dir, want := range map[string]int{tg.Bin: 1, filepath.Dir(tg.ConfList): 0} {
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != want {
			t.Errorf("%s holds %v, %v", dir, entries, err)
		}
	}
	tg.Bin = filepath.Join(tg.Bin, "none") // the runtime itself was removed
	if _, err := tg.Remove(); err != nil {
		t.Error(err)
	}
}

// What libcni makes of the list.
func TestListIsLibcnis(t *testing.T) {
	tg := target(t)
	for _, tc := range []struct {
		portmap string // content
		types   []string
		version string
	}{
		{"", []string{"underlay-cni"}, "1.1.0"},
		{"a script", []string{"underlay-cni", "portmap"}, "1.0.0"},
	} {
		if tc.portmap != "" {
			write(t, filepath.Join(tg.Bin, "portmap"), tc.portmap)
		}
		install(t, tg, true)
		list, err := libcni.LoadConfList(filepath.Dir(tg.ConfList), Network)
		if err != nil {
			t.Fatal(err)
		}
		var types []string
		for _, p := range list.Plugins {
			types = append(types, p.Network.Type)
		}
		if !slices.Equal(types, tc.types) || list.CNIVersion != tc.version {
			t.Errorf("libcni reads %v in %s, want %v in %s\n%s", types, list.CNIVersion, tc.types, tc.version, list.Bytes)
		}
		var first struct{ Socket string }
		if err := json.Unmarshal(list.Plugins[0].Bytes, &first); err != nil || first.Socket != tg.Socket {
			t.Errorf("socket %q, %v", first.Socket, err)
		}
		if len(types) > 1 && (!list.Plugins[1].Network.Capabilities["portMappings"] || !strings.Contains(string(list.Plugins[1].Bytes), `"markMasqBit":16`)) {
			t.Errorf("portmap: %s", list.Plugins[1].Bytes)
		}
		// What does not know cniVersions, such as containerd 1.6, reads 1.0.0.
		var plain struct{ CNIVersion string }
		if err := json.Unmarshal(list.Bytes, &plain); err != nil || plain.CNIVersion != "1.0.0" {
			t.Errorf("cniVersion %q, %v", plain.CNIVersion, err)
		}
	}
}

func TestVersionOfPortmap(t *testing.T) {
	for version, want := range map[string]bool{"v1.1.2": false, "v1.2.0": true, "v1.2.0-rc0": true, "v1.3.1": true, "v2.0.0": true, "v0.8.1": false, "(devel)": false, "": false} {
		if atLeast12(version) != want {
			t.Errorf("%q: %v", version, !want)
		}
	}
	// Debian's, whose build says nothing, does not speak it.
	testenv.Require(t, "portmap")
	portmap := testenv.PluginDir + "/portmap"
	cmd := exec.Command(portmap)
	cmd.Env = []string{"CNI_COMMAND=VERSION"}
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if said := strings.Contains(string(out), `"1.1.0"`); speaks110(portmap) && !said {
		t.Errorf("%s says %s", portmap, out)
	}
}

func TestBefore(t *testing.T) {
	tg := target(t)
	dir := filepath.Dir(tg.ConfList)
	install(t, tg, true)
	check := func(want []string, foreign string) {
		t.Helper()
		names, got, err := tg.Before()
		if err != nil || !slices.Equal(names, want) || got != foreign {
			t.Errorf("%q, %q, %v; want %q, %q", names, got, err, want, foreign)
		}
	}
	check(nil, "")
	write(t, dir+"/00-multus.conf", `{"type":"multus","delegates":[]}`)
	write(t, dir+"/05-broken.json", `{`)
	write(t, dir+"/09-notes.txt", `{"type":"aws-cni"}`)
	write(t, dir+"/99-loopback.conf", `{"type":"aws-cni"}`) // after ours
	check([]string{"00-multus.conf", "05-broken.json"}, "")
	write(t, dir+"/10-aws.conflist", `{"plugins":[{"type":"aws-cni"},{"type":"egress-cni"}]}`)
	check([]string{"00-multus.conf", "05-broken.json", "10-aws.conflist"}, "10-aws.conflist")
}
