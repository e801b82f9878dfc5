package cli

import (
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"

	"github.com/spf13/cobra"

	"github.com/underlay-cni/underlay/internal/nl"
)

func (a *App) execCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "exec POD -- COMMAND…",
		Short: "Run a command inside a pod",
		Long: `Runs a command in a pod's network namespace, with this machine's files, except
that /etc/resolv.conf names the VPC's resolver. Input, output, signals and the exit code are the command's own; 127 when there is no such
command.`,
		Example: `  underlay exec web-1 -- ip addr
  underlay exec web-1 -- ping -c 3 10.0.16.11
  underlay exec web-1 -- bash`,
		Args:              commandArgs("a pod"),
		ValidArgsFunction: a.completePods,
		Annotations:       rootBecause("enters a network namespace"),
		RunE: func(_ *cobra.Command, args []string) error {
			h := a.home()
			f, err := h.loadUp()
			if err != nil {
				return err
			}
			if err := a.useKubectl(f, "kubectl exec "+args[0]+" -- "+args[1]); err != nil {
				return err
			}
			netns := nl.Path(h.podNetns(args[0]))
			if CheckPod(args[0]) != nil || !exists(netns) {
				return fmt.Errorf("lab %s has no pod %q; see: underlay pods%s", h.name, args[0], a.labFlag())
			}
			return a.enter(netns, args[1:])
		},
	}
}

func (a *App) nodeCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "node",
		Short: "Work on a node, or on a machine outside the cluster",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(&cobra.Command{
		Use:   "exec NODE -- COMMAND…",
		Short: "Run a command inside a node, vm-1 or db-1",
		Long: `Runs a command in a machine's network namespace, with this machine's files, except
that /etc/resolv.conf names the VPC's resolver. Input, output, signals and the exit code are the command's own. In a lab with Kubernetes the
nodes and control-plane have namespaces of all kinds, and files of their own.`,
		Example: `  underlay node exec node-1 -- ip rule
  underlay node exec node-1 -- tcpdump -nn -i eth0
  underlay node exec vm-1 -- ping -c 3 10.0.0.23
  underlay node exec node-1 -- ctr containers list   # Kubernetes: its runtime`,
		Args:              commandArgs("a node"),
		ValidArgsFunction: a.completeMachines,
		Annotations:       rootBecause("enters a network namespace"),
		RunE: func(_ *cobra.Command, args []string) error {
			f, err := a.home().loadUp()
			if err != nil {
				return err
			}
			netns, err := f.machineNetns(args[0])
			if err != nil {
				return err
			}
			if name, ok := f.kubernetesMachine(args[0]); ok {
				return a.enterMachine(f, name, args[1:])
			}
			return a.enter(netns, args[1:])
		},
	})
	c.AddCommand(&cobra.Command{
		Use:               "restart-agent NODE",
		Short:             "Kill a node's agent (SIGKILL) and start it anew",
		Long:              "Kills a node's agent as a crash would, and starts it anew. Pods keep their network\nmeanwhile: it is the kernel's.",
		Example:           "  underlay node restart-agent node-1",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeNodes,
		Annotations:       rootBecause("starts a process in a network namespace"),
		RunE: func(cmd *cobra.Command, args []string) error {
			h := a.home()
			f, err := h.loadUp()
			if err != nil {
				return err
			}
			n, err := f.node(args[0])
			if err != nil {
				return err
			}
			if f.Lab.Kubernetes != nil {
				return fmt.Errorf("the agent of %s is a pod of Kubernetes, which starts it anew; kill it with: underlay node exec %s%s -- pkill -9 underlay-agent", n.Name, n.Name, a.labFlag())
			}
			l, err := h.lockLab(cmd.Context(), false)
			if err != nil {
				return err
			}
			defer l.release("")
			took, err := a.restartAgent(cmd.Context(), h, f, n)
			if err != nil {
				return err
			}
			p, err := readProc(h.agentPID(n.Name))
			if err != nil {
				return err
			}
			out := struct {
				Node   string  `json:"node"`
				PID    int     `json:"pid"`
				Millis float64 `json:"millis"`
			}{n.Name, p.PID, millis(took)}
			return a.print(out, func(w io.Writer) {
				fmt.Fprintf(w, "the agent of %s serves again after %s (process %d)\n", n.Name, seconds(took), p.PID)
			})
		},
	}, a.killNodeCommand(), a.bootNodeCommand())
	return c
}

// enter becomes argv inside netns. A command that is not there ends with 127,
// as in a shell.
func (a *App) enter(netns string, argv []string) error {
	err := replace(netns, a.home().resolvConf(), argv)
	if errors.Is(err, exec.ErrNotFound) {
		fmt.Fprintf(a.Err, "underlay: there is no command %q on this machine; inside a pod are the machine's own files\n", argv[0])
		return exitError{127}
	}
	return err
}

// commandArgs wants a name and a command.
func commandArgs(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) >= 2 {
			return nil
		}
		return fmt.Errorf("give %s and a command after --, as in:\n%s", what, firstLine(cmd.Example))
	}
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}
