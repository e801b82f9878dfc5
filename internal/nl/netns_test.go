package nl

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"runtime"
	"testing"

	"github.com/underlay-cni/underlay/internal/testenv"
)

func TestNamedNetns(t *testing.T) {
	testenv.Require(t, "root")
	name := fmt.Sprintf("ul-tnl%d-a", os.Getpid())
	t.Cleanup(func() { _ = DeleteNamed(name) })

	if err := DeleteNamed(name); err != nil {
		t.Errorf("DeleteNamed of none: %v", err)
	}
	if ExistsNamed(name) {
		t.Error("exists before it is made")
	}
	// What an attempt leaves that was killed before its mount.
	if err := os.MkdirAll(NetnsDir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(Path(name), nil, 0o444); err != nil {
		t.Fatal(err)
	}
	if err := NewNamed(name); err != nil {
		t.Fatal(err)
	}
	if !ExistsNamed(name) {
		t.Error("does not exist after it was made")
	}
	if err := NewNamed(name); !errors.Is(err, fs.ErrExist) {
		t.Errorf("second NewNamed: %v, want fs.ErrExist", err)
	}

	var links []net.Interface
	if err := Do(Path(name), func() (err error) { links, err = net.Interfaces(); return err }); err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if l.Name == "lo" && l.Flags&net.FlagUp == 0 {
			t.Error("lo is down")
		}
		if l.Name == "eth0" {
			t.Error("Do ran outside the namespace")
		}
	}

	if err := DeleteNamed(name); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(Path(name)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after DeleteNamed: %v", err)
	}
}

func TestDoKeepsThreadsHome(t *testing.T) {
	testenv.Require(t, "root")
	name := fmt.Sprintf("ul-tnl%d-b", os.Getpid())
	if err := NewNamed(name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = DeleteNamed(name) })
	own := func() string {
		s, err := os.Readlink("/proc/thread-self/ns/net")
		if err != nil {
			t.Error(err)
		}
		return s
	}
	home := own()
	want := errors.New("from inside")
	for range 50 {
		var inside string
		if err := Do(Path(name), func() error { inside = own(); return want }); !errors.Is(err, want) {
			t.Fatalf("Do = %v", err)
		}
		if inside == home {
			t.Fatal("did not enter")
		}
	}
	if err := Do(Path(name), func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("Do of a function that ends its goroutine: no error")
	}
	// Whatever threads there are now, new goroutines find themselves at home.
	got := make(chan string)
	for range 64 {
		go func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			got <- own()
		}()
	}
	for range 64 {
		if s := <-got; s != home {
			t.Errorf("a thread stayed in %s", s)
		}
	}
}

func TestBadNetnsNames(t *testing.T) {
	for _, name := range []string{"", ".", "..", "a/b", "a\x00b"} {
		if err := NewNamed(name); err == nil {
			t.Errorf("NewNamed(%q): no error", name)
		}
		if err := DeleteNamed(name); err == nil {
			t.Errorf("DeleteNamed(%q): no error", name)
		}
	}
	if err := Do("/run/netns/ul-there-is-none", func() error { return nil }); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Do in no namespace: %v", err)
	}
}
