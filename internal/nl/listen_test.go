package nl

import (
	"errors"
	"fmt"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// A port of Listen's choice is free again when its listener has gone, whoever else
// has the kernel choose meanwhile.
func TestListen(t *testing.T) {
	text, err := os.ReadFile(localPorts)
	if err != nil {
		t.Fatal(err)
	}
	var kernels int // the first port of its choice
	if _, err := fmt.Sscan(string(text), &kernels); err != nil {
		t.Fatalf("%s has %q: %v", localPorts, text, err)
	}
	seen := map[string]bool{}
	for range 50 {
		l, err := Listen("127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		a := l.Addr().(*net.TCPAddr)
		if seen[a.String()] || !a.IP.IsLoopback() || kernels > firstApart && (a.Port < firstApart || a.Port >= kernels) {
			t.Errorf("listens on %s", a)
		}
		seen[a.String()] = true
		if _, err := Listen(a.String()); !errors.Is(err, unix.EADDRINUSE) {
			t.Errorf("a second time on %s: %v", a, err)
		}
	}
	for _, bad := range []string{"127.0.0.1", "127.0.0.1:nothing", "192.0.2.1:0"} {
		if l, err := Listen(bad); err == nil {
			t.Errorf("listens on %s: %s", bad, l.Addr())
		}
	}
}
