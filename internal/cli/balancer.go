package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/underlay-cni/underlay/internal/cli/cluster"
)

// What a balancer waits for, and how often it looks.
const (
	targetEvery   = time.Second     // between two checks of a target
	targetTimeout = 2 * time.Second // for a target's answer to a SYN
)

func (a *App) serveBalancerCommand() *cobra.Command {
	var listen, name string
	var targets []string
	c := &cobra.Command{
		Use:   "serve-balancer",
		Short: "Forward each TCP connection to one of several targets",
		Long: `Forwards TCP connections to targets in turn, from its own address. A target is
healthy when it takes connections; one that is not gets none, unless all are so.
What stands behind a load balancer of underlay service add.`,
		Example: "  underlay serve-balancer --listen :80 --target 10.0.0.7:8080 --target 10.0.16.6:8080",
		Hidden:  true,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			to, err := parseTargets(targets)
			if err != nil {
				return err
			}
			l, err := net.Listen("tcp", listen)
			if err != nil {
				return fmt.Errorf("listen on %s: %w", listen, err)
			}
			fmt.Fprintf(a.Err, "%s serves on %s\n", name, l.Addr())
			var mu sync.Mutex
			b := newBalancer(to, func(line string) {
				mu.Lock()
				defer mu.Unlock()
				fmt.Fprintf(a.Err, "%s %s\n", a.now().Format(time.RFC3339), line)
			})
			return b.serve(cmd.Context(), l)
		},
	}
	c.Flags().StringVar(&listen, "listen", ":80", "where to listen")
	c.Flags().StringVar(&name, "server-name", "balancer", "its name, for the log")
	c.Flags().StringArrayVar(&targets, "target", nil, "`ADDRESS:PORT` of a target; repeatable")
	return c
}

func parseTargets(targets []string) ([]netip.AddrPort, error) {
	var out []netip.AddrPort
	for _, s := range targets {
		t, err := netip.ParseAddrPort(s)
		if err != nil || !t.Addr().Is4() || t.Port() == 0 {
			return nil, fmt.Errorf("--target %s: give an IPv4 address and a port, such as 10.0.0.7:8080", s)
		}
		out = append(out, t)
	}
	if len(out) == 0 {
		return nil, errors.New("a load balancer without a target has nothing to do; give --target ADDRESS:PORT")
	}
	return out, nil
}

// balancer forwards connections to its targets in turn.
type balancer struct {
	targets []netip.AddrPort
	log     func(string)
	dialer  net.Dialer

	mu   sync.Mutex
	sick []bool // by target
	next int
}

func newBalancer(targets []netip.AddrPort, log func(string)) *balancer {
	b := &balancer{targets: targets, log: log, dialer: net.Dialer{Timeout: targetTimeout}, sick: make([]bool, len(targets))}
	b.dialer.SetMultipathTCP(false)
	return b
}

// serve forwards until ctx ends. Connections that it carries end then, too.
func (b *balancer) serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	for i := range b.targets {
		running.Go(func() { b.check(ctx, i) })
	}
	return cluster.AcceptEach(ctx, l, func(c net.Conn) {
		running.Go(func() { b.forward(ctx, c) })
	})
}

// check watches one target.
func (b *balancer) check(ctx context.Context, i int) {
	tick := time.NewTicker(targetEvery)
	defer tick.Stop()
	for {
		c, err := b.dialer.DialContext(ctx, "tcp4", b.targets[i].String())
		if err == nil {
			c.Close()
		}
		if ctx.Err() != nil {
			return
		}
		b.found(i, err)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// found keeps what a connection to a target came to.
func (b *balancer) found(i int, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if was := b.sick[i]; was != (err != nil) {
		b.sick[i] = err != nil
		if err != nil {
			b.log(fmt.Sprintf("target %s is unhealthy: %v", b.targets[i], err))
		} else {
			b.log(fmt.Sprintf("target %s is healthy", b.targets[i]))
		}
	}
}

// order is the targets as a connection tries them: the healthy ones, from the
// next on, and then the others, as they may be better than they looked.
func (b *balancer) order() []int {
	b.mu.Lock()
	defer b.mu.Unlock()
	var well, sick []int
	for k := range b.targets {
		if i := (b.next + k) % len(b.targets); b.sick[i] {
			sick = append(sick, i)
		} else {
			well = append(well, i)
		}
	}
	if len(well) > 0 {
		b.next = (well[0] + 1) % len(b.targets)
	}
	return append(well, sick...)
}

func (b *balancer) forward(ctx context.Context, client net.Conn) {
	defer client.Close()
	for _, i := range b.order() {
		target, err := b.dialer.DialContext(ctx, "tcp4", b.targets[i].String())
		if ctx.Err() != nil {
			return
		}
		b.found(i, err)
		if err != nil {
			continue
		}
		defer target.Close()
		b.log(fmt.Sprintf("%s to %s", client.RemoteAddr(), b.targets[i]))
		defer context.AfterFunc(ctx, func() { client.Close(); target.Close() })()
		join(client, target)
		return
	}
	b.log(fmt.Sprintf("%s refused: no target answers", client.RemoteAddr()))
}

// join carries bytes both ways until both sides have said all.
func join(a, b net.Conn) {
	var both sync.WaitGroup
	carry := func(to, from net.Conn) {
		_, err := io.Copy(to, from)
		if t, ok := to.(*net.TCPConn); ok && err == nil {
			_ = t.CloseWrite() // it may be closed already
			return
		}
		to.Close()
		from.Close()
	}
	both.Go(func() { carry(a, b) })
	both.Go(func() { carry(b, a) })
	both.Wait()
}
