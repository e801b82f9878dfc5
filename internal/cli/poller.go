package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
)

// pollerSocket is where a node's agent finds the lab's poller of security groups,
// seen from outside; of a node of Kubernetes the directory is its /run/underlay.
func pollerSocket(n Node) string { return filepath.Join(filepath.Dir(n.AgentSocket), pollerName) }

const pollerName = "poller.sock"

// startPoller starts what reads security groups for all agents of the lab, and
// waits until it listens. It speaks to EC2 with what the agents may do, at the
// address that this machine knows vpcd by.
func startPoller(ctx context.Context, h home, f *labFile, agent string) error {
	cmd := newCommand(agent, "poller")
	cmd.Args[0] = "underlay-poller" // so that nobody takes it for a node's agent
	for _, n := range f.Lab.Nodes {
		if err := os.MkdirAll(filepath.Dir(pollerSocket(n)), 0o755); err != nil {
			return fmt.Errorf("make the directory of the poller's socket: %w", err)
		}
		cmd.Args = append(cmd.Args, "--listen", pollerSocket(n))
	}
	cmd.Env = cleanEnv(nodeEnv(f.Lab.Endpoint)...)
	p, exited, err := background(cmd, "", h.pollerLog())
	if err != nil {
		return err
	}
	if err := writeJSON(h.pollerPID(), p); err != nil {
		return err
	}
	return whileAlive(ctx, "the poller of security groups", exited, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("the poller of security groups did not listen within 30 s"))
		defer cancel()
		return poll(ctx, 5*time.Millisecond, func() (bool, error) {
			for _, n := range f.Lab.Nodes {
				c, err := net.Dial("unix", pollerSocket(n))
				if err != nil {
					return false, nil
				}
				c.Close()
			}
			return true, nil
		})
	})
}

// hasPoller reports whether the lab was made with a poller.
func (h home) hasPoller() bool { return exists(h.pollerPID()) }

func (a *App) pollerCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "poller",
		Short: "Work on what reads security groups for all agents: restart it",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(&cobra.Command{
		Use:   "restart",
		Short: "Kill the poller of security groups (SIGKILL) and start it anew",
		Long: `Kills the lab's poller as a crash would, and starts it anew. Pods are judged by the
rules that were read last meanwhile; an agent that misses the poller for 5 to 10 s
reads the rules itself until it is back.`,
		Example:     "  underlay poller restart",
		Args:        cobra.NoArgs,
		Annotations: rootBecause("listens where agents' sockets are"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			h := a.home()
			f, err := h.loadUp()
			if err != nil {
				return err
			}
			if !h.hasPoller() {
				return fmt.Errorf("lab %s has no poller: its agents read the rules themselves", h.name)
			}
			agent, err := program("underlay-agent")
			if err != nil {
				return err
			}
			return a.restart(cmd.Context(), h, "the poller", "poller", h.dir(), h.pollerPID(), func(ctx context.Context) error { return startPoller(ctx, h, f, agent) })
		},
	})
	return c
}
