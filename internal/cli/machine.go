package cli

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"

	"github.com/spf13/cobra"

	"github.com/underlay-cni/underlay/internal/cli/cluster"
)

// nodeInitCommand is the first process of a machine of a lab with Kubernetes.
func (a *App) nodeInitCommand() *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use:   "node-init",
		Short: "Be the first process of a node",
		Long: `Is the first process of a machine in a lab with Kubernetes: makes its mounts, starts
its programs, starts again what ends, and reaps. What it is to be stands in spec.json.
underlay up --kubernetes and underlay node boot start it.`,
		Example: "  underlay node-init --home /run/underlay/demo/nodes/node-1",
		Hidden:  true,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cluster.Init(cmd.Context(), dir, a.Err)
		},
	}
	c.Flags().StringVar(&dir, "home", "", "the machine's directory, with spec.json")
	return c
}

// forwardCommand carries connections into the control plane's namespace.
func (a *App) forwardCommand() *cobra.Command {
	var config string
	var inherit bool
	c := &cobra.Command{
		Use:     "forward",
		Short:   "Carry TCP connections into a network namespace",
		Long:    "Listens on loopback and carries connections into a network namespace: kubectl's to the\nAPI server of a lab.",
		Example: "  underlay forward --config /run/underlay/demo/kubernetes/forward.json",
		Hidden:  true,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var f forward
			if err := readJSON(config, &f); err != nil {
				return fmt.Errorf("read what to forward: %w", err)
			}
			var l net.Listener
			var err error
			if inherit {
				l, err = net.FileListener(os.NewFile(3, "listener"))
			} else {
				l, err = net.Listen("tcp", f.Listen)
			}
			if err != nil {
				return fmt.Errorf("listen on %s: %w", f.Listen, err)
			}
			return cluster.Forward(cmd.Context(), l, f.Netns, f.To, slog.New(slog.NewTextHandler(a.Err, nil)))
		},
	}
	c.Flags().StringVar(&config, "config", "", "a file that says from where to where")
	c.Flags().BoolVar(&inherit, "inherit", false, "the listener is open already, as file descriptor 3")
	return c
}

// kubernetesMachine reports whether a machine, given by its name or instance,
// has a first process of its own, and returns its name.
func (f *labFile) kubernetesMachine(name string) (string, bool) {
	k := f.Lab.Kubernetes
	if k == nil {
		return "", false
	}
	if name == k.ControlPlane.Name || name == k.ControlPlane.InstanceID {
		return k.ControlPlane.Name, true
	}
	for _, n := range f.Lab.Nodes {
		if name == n.Name || name == n.InstanceID {
			return n.Name, true
		}
	}
	return "", false
}

// enterMachine runs argv inside a machine of a lab with Kubernetes, in all of
// its namespaces.
func (a *App) enterMachine(f *labFile, name string, argv []string) error {
	h := a.home()
	p, err := readProc(h.initPID(name))
	if err != nil || !p.alive() {
		return fmt.Errorf("%s is off; power it on with: underlay node boot %s%s", name, name, a.labFlag())
	}
	env := cluster.NodeEnv(os.Environ())
	if name == cluster.ControlPlane {
		env = cluster.VPCEnv(os.Environ(), h.dir(), f.Lab.Kubernetes.Bin)
	}
	code, err := cluster.Enter(p.PID, argv, env)
	if errors.Is(err, cluster.ErrNoCommand) {
		fmt.Fprintf(a.Err, "underlay: there is no command %q on %s\n", argv[0], name)
		return exitError{127}
	}
	if err != nil {
		return err
	}
	if code != 0 {
		return exitError{code}
	}
	return nil
}
