package cluster

import (
	"context"
	"io"
	"log/slog"
	"net"
	"testing"

	"github.com/underlay-cni/underlay/internal/testenv"
)

func TestForward(t *testing.T) {
	testenv.Require(t, "root")
	far, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	go func() { // ends with far
		for {
			c, err := far.Accept()
			if err != nil {
				return
			}
			b, _ := io.ReadAll(c) // until the other side has finished sending
			_, _ = c.Write(append([]byte("got "), b...))
			c.Close()
		}
	}()
	near, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- Forward(ctx, near, "/proc/self/ns/net", far.Addr().String(), slog.New(slog.DiscardHandler))
	}()
	for range 3 {
		c, err := net.Dial("tcp", near.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(c); err != nil || string(b) != "got hello" {
			t.Errorf("answer %q, %v", b, err)
		}
		c.Close()
	}

	// Nobody listens there: the connection ends, and the forwarder goes on.
	far.Close()
	c, err := net.Dial("tcp", near.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err == nil && len(b) > 0 {
		t.Errorf("an answer out of nothing: %q", b)
	}
	c.Close()
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Forward: %v", err)
	}
}
