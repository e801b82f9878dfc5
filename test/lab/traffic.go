package lab

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/nl"
)

// Stream is UDP from one namespace to an address in another and back, one
// numbered datagram each millisecond. What is lost is counted exactly.
type Stream struct {
	t        testing.TB
	conn     net.Conn
	echo     net.PacketConn
	sent     atomic.Int64
	received atomic.Int64
	quit     chan struct{}
	done     chan struct{}
}

const streamPort = 7007

func In[T any](t testing.TB, netns string, fn func() (T, error)) T {
	t.Helper()
	var v T
	err := nl.Do(netns, func() (err error) {
		v, err = fn()
		return err
	})
	if err != nil {
		t.Fatalf("in %s: %v", netns, err)
	}
	return v
}

// Try is nl.Do for tests: it runs fn in a namespace and returns its error.
func Try(netns string, fn func() error) error { return nl.Do(netns, fn) }

// StartStream begins to send from netns from to the address to inside netns
// dst. It returns once the first answer has come.
func StartStream(t testing.TB, from, dst string, to netip.Addr) *Stream {
	t.Helper()
	s := &Stream{t: t, quit: make(chan struct{}), done: make(chan struct{})}
	at := netip.AddrPortFrom(to, streamPort)
	s.echo = In(t, dst, func() (net.PacketConn, error) { return net.ListenPacket("udp4", at.String()) })
	s.conn = In(t, from, func() (net.Conn, error) { return net.Dial("udp4", at.String()) })
	t.Cleanup(func() { s.conn.Close(); s.echo.Close() })

	go func() { // ends when the cleanup closes the socket
		b := make([]byte, 64)
		for {
			n, peer, err := s.echo.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = s.echo.WriteTo(b[:n], peer)
		}
	}()
	seen := make(map[uint64]bool)
	go func() {
		b := make([]byte, 64)
		for {
			n, err := s.conn.Read(b)
			if errors.Is(err, syscall.ECONNREFUSED) {
				continue
			}
			if err != nil {
				return
			}
			if seq := binary.BigEndian.Uint64(b[:n]); !seen[seq] {
				seen[seq] = true
				s.received.Add(1)
			}
		}
	}()
	go func() {
		defer close(s.done)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		var b [8]byte
		for {
			select {
			case <-s.quit:
				return
			case <-tick.C:
				binary.BigEndian.PutUint64(b[:], uint64(s.sent.Load()))
				if _, err := s.conn.Write(b[:]); err == nil {
					s.sent.Add(1)
				}
			}
		}
	}()
	Eventually(t, 5*time.Second, "the first answer", func() error {
		if s.received.Load() == 0 {
			return errors.New("nothing came back")
		}
		return nil
	})
	return s
}

// Stop ends the stream and returns how many datagrams were sent and how many
// of their answers never came.
func (s *Stream) Stop() (sent, lost int64) {
	close(s.quit)
	<-s.done
	deadline := time.Now().Add(2 * time.Second)
	for s.received.Load() < s.sent.Load() && time.Now().Before(deadline) {
		<-time.After(5 * time.Millisecond)
	}
	return s.sent.Load(), s.sent.Load() - s.received.Load()
}

// More waits until n further answers have come.
func (s *Stream) More(n int64) {
	s.t.Helper()
	want := s.received.Load() + n
	Eventually(s.t, 20*time.Second, "traffic goes on", func() error {
		if s.received.Load() < want {
			return errors.New("too few answers")
		}
		return nil
	})
}

// AskTCP connects from a namespace and returns all that the server says.
func AskTCP(t testing.TB, from string, to netip.AddrPort) string {
	t.Helper()
	conn := In(t, from, func() (net.Conn, error) { return net.DialTimeout("tcp4", to.String(), 5*time.Second) })
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	b, err := io.ReadAll(conn)
	if err != nil {
		t.Fatalf("read from %s: %v", to, err)
	}
	return string(b)
}

// ServeTCP listens in a namespace; the server says which address it sees.
func ServeTCP(t testing.TB, netns string, at netip.AddrPort) {
	t.Helper()
	l := In(t, netns, func() (net.Listener, error) { return net.Listen("tcp4", at.String()) })
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			peer := c.RemoteAddr().(*net.TCPAddr).AddrPort()
			_, _ = io.WriteString(c, peer.Addr().String())
			c.Close()
		}
	}()
}
