package groups

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi"
)

const (
	// beat is between two messages to a book of which nothing has changed, and
	// silence after how long without one a book gives up on the poller.
	beat    = 2 * time.Second
	silence = 10 * time.Second
	// patience bounds how long a book may take over a message.
	patience = 5 * time.Second
	// maxBooks bounds the connections served at once; more wait in the listener's
	// backlog. The largest clusters that we mean have 2,000 nodes.
	maxBooks = 4096
)

// Serve answers books until ctx ends, then closes l and the connections.
func (p *Poller) Serve(ctx context.Context, l net.Listener, log *slog.Logger) error {
	return agentapi.Accept(ctx, l, maxBooks, log, func(conn net.Conn) {
		if err := p.serve(ctx, conn); err != nil && ctx.Err() == nil {
			log.Warn("subscriber dropped", "op", "serve", "err", err)
		}
	})
}

// serve tells one book what concerns it, until it hangs up or ctx ends.
func (p *Poller) serve(ctx context.Context, conn net.Conn) error {
	defer conn.Close()
	sub := p.Subscribe()
	defer sub.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()

	asked := make(chan struct{}) // closed with the first message
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		defer conn.Close() // who writes sees it, too
		for first := true; ; first = false {
			var m needMessage
			err := receive(conn, maxNeed, &m)
			var n Need
			if err == nil {
				n, err = m.need()
			}
			switch {
			case errors.Is(err, io.EOF), errors.Is(err, net.ErrClosed):
				cancel(nil)
				return
			case err != nil:
				_ = conn.SetWriteDeadline(time.Now().Add(patience))
				_ = send(conn, update{Version: protocolVersion, Refused: err.Error()}) // it may be gone
				cancel(err)
				return
			}
			sub.Want(n)
			if first {
				close(asked)
			}
		}
	})
	defer cancel(nil) // before the wait
	select {
	case <-asked:
	case <-ctx.Done():
		return because(ctx)
	}
	told := newSnapshot()
	tick := time.NewTicker(beat)
	defer tick.Stop()
	for number := uint64(1); ; number++ {
		now, news := sub.Current()
		u := between(told, now)
		u.Version, u.Number = protocolVersion, number
		u.add(p.Status(), time.Now())
		_ = conn.SetWriteDeadline(time.Now().Add(patience))
		if err := send(conn, u); err != nil {
			if ctx.Err() != nil {
				return because(ctx)
			}
			return fmt.Errorf("tell a book of its groups: %w", err)
		}
		told = now
		select {
		case <-news:
		case <-tick.C:
		case <-ctx.Done():
			return because(ctx)
		}
	}
}

// because is why ctx ended, nil when nobody is to blame.
func because(ctx context.Context) error {
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}
