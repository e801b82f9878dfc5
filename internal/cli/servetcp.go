package cli

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/spf13/cobra"

	"github.com/underlay-cni/underlay/internal/cli/cluster"
)

func (a *App) serveTCPCommand() *cobra.Command {
	var listen, name string
	c := &cobra.Command{
		Use:     "serve-tcp",
		Short:   "Answer each TCP connection with the address it came from",
		Long:    "Answers each TCP connection with one line, \"NAME: hello ADDRESS\", where ADDRESS is the\nclient's as this server sees it. What stands behind db-1 and vm-1, and useful in a pod.",
		Example: "  underlay run web -- underlay serve-tcp --server-name web --listen :8080\n  underlay exec other -- bash -c 'cat </dev/tcp/10.0.0.23/8080'",
		Hidden:  true,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := net.Listen("tcp", listen)
			if err != nil {
				return fmt.Errorf("listen on %s: %w", listen, err)
			}
			fmt.Fprintf(a.Err, "%s serves on %s\n", name, l.Addr())
			return serveHello(cmd.Context(), l, name, a.now, func(line string) { fmt.Fprintln(a.Err, line) })
		},
	}
	c.Flags().StringVar(&listen, "listen", ":8080", "where to listen")
	c.Flags().StringVar(&name, "server-name", "server", "the name that it answers with")
	return c
}

// serveHello answers connections until ctx ends, and logs each.
func serveHello(ctx context.Context, l net.Listener, name string, now func() time.Time, log func(string)) error {
	return cluster.AcceptEach(ctx, l, func(c net.Conn) {
		from, err := netip.ParseAddrPort(c.RemoteAddr().String())
		if err == nil {
			// One short line fits into any send buffer: this blocks for nobody.
			_, err = fmt.Fprintf(c, "%s: hello %s\n", name, from.Addr().Unmap())
		}
		if err != nil {
			log(fmt.Sprintf("%s %s: %v", now().Format(time.RFC3339), c.RemoteAddr(), err))
		} else {
			log(fmt.Sprintf("%s hello %s", now().Format(time.RFC3339), from))
		}
		c.Close()
	})
}
