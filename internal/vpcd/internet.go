package vpcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
)

// The services of the internet's hosts (fabric.InternetAddrs).
const (
	internetHTTP = 80 // answers every request with the client's address, as text
	internetEcho = 7  // RFC 862, TCP and UDP
)

// internet is who answers in the internet's namespace, so that a gateway can be
// tried. Its sockets are made when there is an internet, and end with this
// process; the next one makes them anew.
type internet struct {
	run   func(fn func() error) error // in the namespace
	there chan struct{}               // size 1
	log   *slog.Logger
}

// isThere says that the namespace is there.
func (i *internet) isThere() {
	select {
	case i.there <- struct{}{}:
	default: // it is known
	}
}

// Run serves until ctx ends.
func (i *internet) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-i.there:
		}
		s, err := i.open()
		if err == nil {
			err = s.serve(ctx)
		}
		if err != nil { // the reconciler says again that it is there
			i.log.Error("internet does not answer", "err", err)
		}
	}
}

// sockets are what the internet's hosts listen on.
type sockets struct {
	http []net.Listener
	tcp  []net.Listener
	udp  []*net.UDPConn
}

func (s *sockets) close() {
	for _, l := range append(s.http, s.tcp...) {
		_ = l.Close()
	}
	for _, c := range s.udp {
		_ = c.Close()
	}
}

func (i *internet) open() (*sockets, error) {
	s := &sockets{}
	err := i.run(func() error {
		for _, p := range fabric.InternetAddrs {
			for _, l := range []struct {
				port uint16
				to   *[]net.Listener
			}{{internetHTTP, &s.http}, {internetEcho, &s.tcp}} {
				one, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(p.Addr(), l.port)))
				if err != nil {
					return err
				}
				*l.to = append(*l.to, one)
			}
			c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(p.Addr(), internetEcho)))
			if err != nil {
				return err
			}
			s.udp = append(s.udp, c)
		}
		return nil
	})
	if err != nil {
		s.close()
		return nil, fmt.Errorf("listen in the internet: %w", err)
	}
	return s, nil
}

func (s *sockets) serve(ctx context.Context) error {
	server := &http.Server{
		Handler: http.HandlerFunc(whoAsks), ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute,
	}
	group, ctx := errgroup.WithContext(ctx)
	for _, l := range s.http {
		group.Go(func() error { return ended(server.Serve(l)) })
	}
	for _, l := range s.tcp {
		group.Go(func() error { return echoStreams(ctx, l) })
	}
	for _, c := range s.udp {
		group.Go(func() error { return echoDatagrams(c) })
	}
	group.Go(func() error {
		<-ctx.Done()
		_ = server.Close()
		s.close()
		return nil
	})
	return group.Wait()
}

// ended is no error if a server's socket was closed.
func ended(err error) error {
	if errors.Is(err, http.ErrServerClosed) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return fmt.Errorf("serve the internet: %w", err)
}

// whoAsks tells a client its address.
func whoAsks(w http.ResponseWriter, r *http.Request) {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		host = r.RemoteAddr
	}
	w.Header().Set("Content-Type", "text/plain")
	_, _ = fmt.Fprintln(w, host) // who does not listen any more loses it
}

// echoIdle is how long an echo waits for more.
const echoIdle = time.Minute

func echoStreams(ctx context.Context, l net.Listener) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return ended(err)
		}
		go func() {
			defer context.AfterFunc(ctx, func() { _ = c.Close() })()
			defer c.Close()
			buf := make([]byte, 32<<10)
			for c.SetDeadline(time.Now().Add(echoIdle)) == nil {
				n, err := c.Read(buf)
				if _, werr := c.Write(buf[:n]); err != nil || werr != nil {
					return // io.EOF, mostly
				}
			}
		}()
	}
}

func echoDatagrams(c *net.UDPConn) error {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err == nil {
			_, _ = c.WriteToUDPAddrPort(buf[:n], from) // datagrams may get lost
		}
	}
}
