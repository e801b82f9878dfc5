package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/nl"
)

// Forward carries TCP connections from a listener of this network namespace
// to an address inside another one, until ctx ends. netns is opened anew for
// each: the namespace of a machine may go and come with its power.
func Forward(ctx context.Context, l net.Listener, netns, to string, log *slog.Logger) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	return AcceptEach(ctx, l, func(c net.Conn) {
		wg.Go(func() {
			defer c.Close()
			far, err := dialIn(netns, to)
			if err != nil {
				log.Warn("not connected", "to", to, "err", err)
				return
			}
			defer far.Close()
			stop := context.AfterFunc(ctx, func() { c.Close(); far.Close() })
			defer stop()
			both(c, far)
		})
	})
}

// AcceptEach calls fn for each connection, one after the other, until ctx ends.
func AcceptEach(ctx context.Context, l net.Listener, fn func(net.Conn)) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		c, err := l.Accept()
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		fn(c)
	}
}

// dialIn connects from inside a network namespace. The socket stays there.
func dialIn(netns, to string) (c net.Conn, err error) {
	err = nl.Do(netns, func() (err error) {
		// An address and no name: the socket is made on this thread.
		c, err = net.DialTimeout("tcp", to, 5*time.Second)
		return err
	})
	return c, err
}

// both copies in both directions and passes on who has finished sending.
func both(a, b net.Conn) {
	var wg sync.WaitGroup
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		wg.Go(func() {
			_, err := io.Copy(way[0], way[1])
			if t, ok := way[0].(*net.TCPConn); ok && err == nil {
				_ = t.CloseWrite() // the other side may have closed already
				return
			}
			a.Close()
			b.Close()
		})
	}
	wg.Wait()
}
