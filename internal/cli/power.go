package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/cli/cluster"
	"github.com/underlay-cni/underlay/internal/ec2"
	"github.com/underlay-cni/underlay/internal/vpc"
)

func (a *App) killNodeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "kill NODE",
		Short: "Cut a node's power (a lab with Kubernetes)",
		Long: `Cuts the power of a node, or of the control plane: all its processes end at once,
and its network namespace goes with all that is in it. Its interfaces keep their
addresses, its disk what was written. Kubernetes sees it by the silence.`,
		Example:           "  underlay node kill node-1\n  kubectl get nodes -w",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeKubernetesMachines,
		Annotations:       rootBecause("ends processes and removes a network namespace"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.power(cmd.Context(), args[0], func(ctx context.Context, h home, f *labFile, m *poweredMachine) error {
				began := a.now()
				if err := m.off(ctx, h, f); err != nil {
					return err
				}
				return a.print(map[string]any{"name": m.name, "on": false}, func(w io.Writer) {
					fmt.Fprintf(w, "%s is off (%s); power it on with: underlay node boot %s%s\n", m.name, seconds(a.now().Sub(began)), m.name, a.labFlag())
				})
			})
		},
	}
}

func (a *App) bootNodeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "boot NODE",
		Short: "Power a node on that was killed (a lab with Kubernetes)",
		Long: `Powers a node on, or the control plane, and waits until Kubernetes says that it is
Ready. A node that is on already stays as it is.`,
		Example:           "  underlay node boot node-1",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeKubernetesMachines,
		Annotations:       rootBecause("starts processes in namespaces of their own"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.power(cmd.Context(), args[0], func(ctx context.Context, h home, f *labFile, m *poweredMachine) error {
				began := a.now()
				done := newProgress(a.Err, a.now).step("booting " + m.name)
				if err := m.on(ctx, h, f); err != nil {
					return fmt.Errorf("boot %s: %w; see: underlay logs %s%s", m.name, err, m.name, a.labFlag())
				}
				if err := awaitBoot(ctx, h, f, m.name); err != nil {
					return fmt.Errorf("boot %s: it is on, but %w; see: underlay logs %s%s", m.name, err, m.name, a.labFlag())
				}
				done(m.name + " is Ready")
				return a.print(map[string]any{"name": m.name, "on": true, "init": *m.init, "millis": millis(a.now().Sub(began))}, func(io.Writer) {})
			})
		},
	}
}

// poweredMachine is a machine of a lab with Kubernetes, with the places in its
// lab's file where its state stands.
type poweredMachine struct {
	name  string
	id    vpc.InstanceID
	init  *int
	netns *string
}

func (f *labFile) poweredMachine(name string) (*poweredMachine, error) {
	k := f.Lab.Kubernetes
	if k == nil {
		return nil, errors.New("only nodes of a lab with --kubernetes have a power switch")
	}
	name, ok := f.kubernetesMachine(name)
	if !ok {
		_, err := f.node(name)
		return nil, fmt.Errorf("%w, %s", err, cluster.ControlPlane)
	}
	if name == k.ControlPlane.Name {
		cp := &k.ControlPlane
		return &poweredMachine{name, vpc.InstanceID(cp.InstanceID), &cp.Init, &cp.Netns}, nil
	}
	for i := range f.Lab.Nodes {
		if n := &f.Lab.Nodes[i]; n.Name == name {
			return &poweredMachine{name, vpc.InstanceID(n.InstanceID), &n.Init, &n.Netns}, nil
		}
	}
	panic("cli: kubernetesMachine names a machine that is not there")
}

// power changes the power of a machine, alone on the lab: its file changes.
func (a *App) power(ctx context.Context, name string, change func(context.Context, home, *labFile, *poweredMachine) error) error {
	h := a.home()
	if _, err := h.loadUp(); err != nil {
		return err
	}
	lctx, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("it did not end within 30 s"))
	defer cancel()
	l, err := h.lockLab(lctx, true)
	if err != nil {
		return err
	}
	defer l.release("")
	f, err := h.loadUp()
	if err != nil {
		return err
	}
	m, err := f.poweredMachine(name)
	if err != nil {
		return err
	}
	return change(ctx, h, f, m)
}

// off cuts the power. What is off already stays so.
func (m *poweredMachine) off(ctx context.Context, h home, f *labFile) error {
	if p, err := readProc(h.initPID(m.name)); err == nil {
		if left := end(ctx, []proc{p}, 0); len(left) > 0 {
			return fmt.Errorf("cut the power of %s: %s does not end", m.name, describeProcess(p.PID))
		}
	}
	if err := ec2.NewLab(f.Lab.Endpoint, f.Region).Stop(ctx, []vpc.InstanceID{m.id}, true); err != nil {
		return fmt.Errorf("cut the power of %s: %w", m.name, err)
	}
	if err := cluster.RemoveCgroups(ctx, h.name, m.name); err != nil {
		return fmt.Errorf("cut the power of %s: %w", m.name, err)
	}
	*m.init = 0
	return h.save(f)
}

// on powers the machine on, if it is off.
func (m *poweredMachine) on(ctx context.Context, h home, f *labFile) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find our own program: %w", err)
	}
	if p, err := readProc(h.forwardPID()); m.name == cluster.ControlPlane && (err != nil || !p.alive()) {
		if err := startForward(h, self, nil); err != nil {
			return err
		}
	}
	if p, err := readProc(h.initPID(m.name)); err == nil && p.alive() {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("the instance was not running within a minute"))
	defer cancel()
	if _, err := ec2.NewLab(f.Lab.Endpoint, f.Region).Start(ctx, []vpc.InstanceID{m.id}); err != nil {
		return err
	}
	if err := poll(ctx, 20*time.Millisecond, func() (bool, error) {
		all, err := newAdmin(f.Lab.Endpoint).instances(ctx)
		for _, i := range all {
			if _, ok := netnsID(i.Netns); ok && i.InstanceID == string(m.id) {
				*m.netns = i.Netns
				return true, nil
			}
		}
		return false, err
	}); err != nil {
		return fmt.Errorf("wait for its network namespace: %w", err)
	}
	if *m.init, err = startMachine(h, self, m.name, *m.netns); err != nil {
		return err
	}
	return h.save(f)
}

// awaitBoot waits until a machine serves again: a node's kubelet has told of
// this boot, and the node is Ready, if a CNI is there to make it so.
func awaitBoot(ctx context.Context, h home, f *labFile, name string) error {
	api, err := cluster.NewAPI(f.Lab.Kubernetes.Kubeconfig)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, errors.New("it was not Ready within two minutes"))
	defer cancel()
	w := &machineWatch{home: h, api: api, machines: []string{name}}
	return w.await(ctx, func() error {
		if name == cluster.ControlPlane {
			return api.Ready(ctx)
		}
		state, err := cluster.ReadState(h.dir(), name)
		if err != nil {
			return err
		}
		nodes, err := api.Nodes(ctx)
		if err != nil {
			return err
		}
		for _, n := range nodes {
			if n.Name == name && n.BootID != state.BootID {
				return errors.New("its kubelet has not said anything yet")
			}
			if n.Name == name && !n.Ready && f.Lab.Kubernetes.CNI != cluster.CNINone {
				return errors.New("it is not Ready: " + n.Why)
			}
			if n.Name == name && f.Lab.Kubernetes.CNI == cluster.CNIUnderlay {
				// The config list of before is still there, so that the kubelet
				// does not wait for the agent; pods do.
				return agentServes(ctx, f, name)
			}
			if n.Name == name {
				return nil
			}
		}
		return errors.New("it has not registered")
	})
}

// agentServes returns nil when the agent of a node does.
func agentServes(ctx context.Context, f *labFile, name string) error {
	n, err := f.node(name)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if err := (&agentapi.Client{Socket: n.AgentSocket}).Status(ctx); err != nil {
		return fmt.Errorf("its agent does not serve: %w", err)
	}
	return nil
}
