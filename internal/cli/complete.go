package cli

import (
	"slices"

	"github.com/spf13/cobra"
)

const noFiles = cobra.ShellCompDirectiveNoFileComp

func (a *App) podNames() []string {
	pods, err := a.home().loadPods()
	if err != nil {
		return nil
	}
	names := []string{}
	for _, p := range pods {
		names = append(names, p.Pod.Name)
	}
	return names
}

func (a *App) machineNames(outsideToo bool) []string {
	f, err := a.home().load()
	if err != nil {
		return nil
	}
	var names []string
	for _, n := range f.Lab.Nodes {
		names = append(names, n.Name)
	}
	if k := f.Lab.Kubernetes; k != nil && outsideToo {
		names = append(names, k.ControlPlane.Name)
	}
	if outsideToo {
		for _, o := range f.Lab.Outside {
			names = append(names, o.Name)
		}
	}
	return names
}

// completePods completes the first argument; after it comes a command.
func (a *App) completePods(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return a.podNames(), noFiles
}

// completeMorePods completes any number of different pods.
func (a *App) completeMorePods(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return slices.DeleteFunc(a.podNames(), func(n string) bool { return slices.Contains(args, n) }), noFiles
}

func (a *App) completeMachines(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return a.machineNames(true), noFiles
}

func (a *App) completeNodes(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, noFiles
	}
	return a.machineNames(false), noFiles
}

// completeKubernetesMachines completes what has a power switch.
func (a *App) completeKubernetesMachines(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	f, err := a.home().load()
	if len(args) > 0 || err != nil || f.Lab.Kubernetes == nil {
		return nil, noFiles
	}
	return append(a.machineNames(false), f.Lab.Kubernetes.ControlPlane.Name), noFiles
}

// logNames are the names that underlay logs knows, pods' left out.
func (a *App) logNames() []string {
	names := append([]string{"vpcd"}, a.machineNames(true)...)
	if a.home().hasPoller() {
		names = append(names, "poller")
	}
	f, err := a.home().load()
	if err != nil {
		return names
	}
	for _, l := range a.home().kubernetesLogs(f) {
		if !slices.Contains(names, l.name) {
			names = append(names, l.name)
		}
	}
	return names
}
