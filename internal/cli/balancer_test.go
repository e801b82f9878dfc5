package cli

import (
	"context"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// helloServer answers with its name until the test ends or it is closed.
func helloServer(t *testing.T, name, at string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp4", at)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = serveHello(t.Context(), l, name, time.Now, func(string) {}) }()
	t.Cleanup(func() { l.Close() })
	return l
}

func said(t *testing.T, at string) string {
	t.Helper()
	c, err := net.DialTimeout("tcp4", at, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// Targets take turns; one that ends gets nothing more, and comes back by itself.
func TestBalancer(t *testing.T) {
	one := helloServer(t, "one", "127.0.0.1:0")
	two := helloServer(t, "two", "127.0.0.1:0")
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	b := newBalancer([]netip.AddrPort{netip.MustParseAddrPort(one.Addr().String()), netip.MustParseAddrPort(two.Addr().String())}, func(string) {})
	go func() { done <- b.serve(ctx, l) }()

	count := func(n int) (ones, twos int) {
		for range n {
			switch said(t, l.Addr().String()) {
			case "one: hello 127.0.0.1":
				ones++
			case "two: hello 127.0.0.1":
				twos++
			}
		}
		return ones, twos
	}
	if ones, twos := count(10); ones != 5 || twos != 5 {
		t.Errorf("of ten connections %d and %d", ones, twos)
	}
	two.Close()
	if ones, twos := count(10); ones != 10 || twos != 0 {
		t.Errorf("with one target down: %d and %d", ones, twos)
	}
	helloServer(t, "two", two.Addr().String())
	for deadline := time.Now().Add(10 * time.Second); ; {
		if _, twos := count(2); twos == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a target that is back gets nothing")
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// What a client says after it has closed its side reaches the target, and the
// answer the client.
func TestBalancerCarriesBothWays(t *testing.T) {
	target, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	go func() {
		c, err := target.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b, _ := io.ReadAll(c)
		_, _ = c.Write(append(b, '!'))
	}()
	near, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	go func() {
		c, err := near.Accept()
		if err != nil {
			return
		}
		newBalancer([]netip.AddrPort{netip.MustParseAddrPort(target.Addr().String())}, func(string) {}).forward(t.Context(), c)
	}()
	c, err := net.Dial("tcp4", near.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "select 1"); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != "select 1!" {
		t.Errorf("%q %v", b, err)
	}
}

func TestParseTargets(t *testing.T) {
	for _, s := range []string{"10.0.0.7", "10.0.0.7:0", "[::1]:80", "web:80", ""} {
		if got, err := parseTargets([]string{s}); err == nil {
			t.Errorf("%q is %v", s, got)
		}
	}
	if _, err := parseTargets(nil); err == nil {
		t.Error("no target is enough")
	}
}
