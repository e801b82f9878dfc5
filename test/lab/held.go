package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Held is an established TCP connection that carries a number every ten
// milliseconds, and the same number back. It must live through what is done to
// the network: a reset, an end or a wrong number is an error that Check tells.
type Held struct {
	t      testing.TB
	Name   string
	client net.Conn
	server net.Conn
	back   atomic.Int64 // numbers that came back

	mu  sync.Mutex
	err error // what broke it
}

// Listen listens for connections to hold, at an address inside netns. What
// dials a Service or a node's port ends there as well.
func Listen(t testing.TB, netns string, at netip.AddrPort) net.Listener {
	t.Helper()
	l := In(t, netns, func() (net.Listener, error) { return net.Listen("tcp4", at.String()) })
	t.Cleanup(func() { l.Close() })
	return l
}

// Hold connects from netns to an address that leads to l, and keeps the
// connection in use. Connections to one listener are to be made one after
// another.
func Hold(t testing.TB, name, netns string, to netip.AddrPort, l net.Listener) *Held {
	t.Helper()
	h := &Held{t: t, Name: name}
	accepted := make(chan error, 1)
	go func() {
		var err error
		h.server, err = l.Accept()
		accepted <- err
	}()
	h.client = In(t, netns, func() (net.Conn, error) { return net.DialTimeout("tcp4", to.String(), 10*time.Second) })
	select {
	case err := <-accepted:
		if err != nil {
			t.Fatalf("hold %s: %v", name, err)
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("hold %s: connected to %s, but nothing came to the listener", name, to)
	}
	quit := make(chan struct{})
	t.Cleanup(func() { close(quit); h.client.Close(); h.server.Close() })
	broken := func(what string, err error) {
		select {
		case <-quit:
			return
		default:
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.err == nil {
			h.err = fmt.Errorf("%s after %d numbers: %w", what, h.back.Load(), err)
		}
	}
	go func() { // ends when the cleanup closes the sockets, as do the others
		_, err := io.Copy(h.server, h.server)
		if err == nil {
			err = io.EOF
		}
		broken("the server's side", err)
	}()
	go func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		var b [8]byte
		for n := uint64(1); ; n++ {
			select {
			case <-quit:
				return
			case <-tick.C:
			}
			binary.BigEndian.PutUint64(b[:], n)
			if _, err := h.client.Write(b[:]); err != nil {
				broken("write", err)
				return
			}
		}
	}()
	go func() {
		var b [8]byte
		for want := uint64(1); ; want++ {
			if _, err := io.ReadFull(h.client, b[:]); err != nil {
				broken("read", err)
				return
			}
			if got := binary.BigEndian.Uint64(b[:]); got != want {
				broken("read", fmt.Errorf("%d came instead of %d", got, want))
				return
			}
			h.back.Add(1)
		}
	}()
	h.More(1)
	return h
}

// ServerSees returns the client's address as the server's side sees it.
func (h *Held) ServerSees() netip.Addr {
	return h.server.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
}

// Check returns what broke the connection, or nil.
func (h *Held) Check() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.err
}

// More waits until n further numbers have come back.
func (h *Held) More(n int64) {
	h.t.Helper()
	want := h.back.Load() + n
	Eventually(h.t, 20*time.Second, h.Name+" goes on", func() error {
		if err := h.Check(); err != nil {
			return err
		}
		if h.back.Load() < want {
			return errors.New("too few numbers came back")
		}
		return nil
	})
}
