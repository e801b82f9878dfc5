package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/agent"
	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/agentapi/install"
	"github.com/underlay-cni/underlay/internal/kube"
)

const (
	// installEvery is how often the runtime's folders are looked at: others
	// write there too, and portmap may come after us.
	installEvery = 30 * time.Second
	// leaveTimeout bounds the question at the end whether this is an update or
	// a removal: kubelet kills after 30 s, and an update waits for us.
	leaveTimeout = 3 * time.Second
)

// What the node's object says of us, for people; each begins with underlay.dev/.
const (
	annotENIs    = "enis"               // attached/most, the node's own included
	annotMax     = "max-pod-addresses"  // as the capacity underlay.dev/pod-addresses
	annotFree    = "free-pod-addresses" // "16+": at least so many more; "0": none
	annotVersion = "agent-version"
)

var annotations = []string{annotENIs, annotMax, annotFree, annotVersion}

// node is what surrounds the agent on its node: the runtime's folders, and the
// cluster's API if there is one.
type node struct {
	log    *slog.Logger
	target *install.Target // nil: somebody else installs
	api    *kube.Client    // nil: there is no Kubernetes

	before []string // configurations that the runtime takes before ours, as told last

	mu     sync.Mutex
	err    error            // why the plugin is not installed (any more)
	status agent.NodeStatus // as last published
}

func newNode(o options, log *slog.Logger) (*node, error) {
	n := &node{log: log}
	if o.cniConf != "" {
		t, err := o.target()
		if err != nil {
			return nil, err
		}
		n.target, n.err = &t, fmt.Errorf("the CNI plugin is not installed yet; ask again in a second")
	}
	if o.nodeName != "" {
		var err error
		n.api, err = kube.New(kube.Options{Node: o.nodeName, Kubeconfig: o.kubeconfig, Namespace: os.Getenv("POD_NAMESPACE"), DaemonSet: os.Getenv("DAEMONSET_NAME"), Version: version(), Logger: log})
		if err != nil {
			return nil, err
		}
	}
	return n, nil
}

// run speaks to the API server until ctx ends.
func (n *node) run(ctx context.Context) error {
	if n.api == nil {
		return nil
	}
	return n.api.Run(ctx)
}

// install keeps plugin and list in the runtime's folders until ctx ends.
func (n *node) install(ctx context.Context) {
	if n.target == nil {
		return
	}
	told := ""
	tick := time.NewTicker(installEvery)
	defer tick.Stop()
	for {
		changed, err := n.target.Install()
		if changed {
			n.log.Info("plugin installed", "op", "install", "list", n.target.ConfList, "bin", n.target.Bin)
		}
		if err != nil {
			err = fmt.Errorf("the CNI plugin is not installed: %w; check that the agent can write to the runtime's folders", err)
		} else {
			err = n.first()
		}
		switch {
		case err == nil:
			told = ""
		case err.Error() != told:
			told = err.Error()
			n.log.Warn("node not ready", "op", "install", "err", err)
		}
		n.mu.Lock()
		n.err = err
		n.mu.Unlock()
		n.publish()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// first returns an error while the runtime takes the AWS VPC CNI's list instead
// of ours. Another's before ours may be meant so, and is told once.
func (n *node) first() error {
	before, foreign, err := n.target.Before()
	if err != nil {
		return fmt.Errorf("%w; check that the agent can read the runtime's folders", err)
	}
	if foreign != "" {
		return fmt.Errorf("the runtime takes %s, of the AWS VPC CNI, before our %s; remove it from the node's CNI configuration folder", foreign, filepath.Base(n.target.ConfList))
	}
	if !slices.Equal(before, n.before) {
		n.before = before
		if len(before) > 0 {
			n.log.Warn("the runtime takes another configuration before ours; remove it, unless it hands on to ours", "op", "install", "first", before[0], "ours", filepath.Base(n.target.ConfList))
		}
	}
	return nil
}

// installed returns why the runtime does not have the plugin.
func (n *node) installed() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.err
}

// leave takes plugin and list away if it is not this process alone that ends,
// but its installation.
func (n *node) leave() {
	if n.target == nil || n.api == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), leaveTimeout)
	defer cancel()
	why, err := n.api.Leaving(ctx)
	if err != nil {
		n.log.Warn("plugin and its configuration stay: it is not known whether the agent comes back; underlay-agent uninstall removes them", "op", "leave", "err", err)
		return
	}
	if why == "" {
		return
	}
	if _, err := n.target.Remove(); err != nil {
		n.log.Warn("plugin not removed", "op", "leave", "err", err)
		return
	}
	n.log.Info("plugin removed", "op", "leave", "why", why)
}

// orchestrator is the cluster's API as the agent knows it.
func (n *node) orchestrator() agent.Orchestrator {
	if n.api == nil {
		return nil
	}
	return orchestrator{n}
}

type orchestrator struct{ n *node }

func (o orchestrator) Publish(s agent.NodeStatus) {
	o.n.mu.Lock()
	o.n.status = s
	o.n.mu.Unlock()
	o.n.publish()
}

func (o orchestrator) Tell(pod agentapi.Pod, n agent.Notice) {
	o.n.api.Tell(kube.Pod(pod), kube.Notice(n))
}

func (o orchestrator) Served(pod agentapi.Pod) { o.n.api.Served(kube.Pod(pod)) }

func (o orchestrator) Dropped() uint64 { return o.n.api.Dropped() }

// publish tells the API how the node stands. Pods may come when the agent serves
// and the runtime can ask it.
func (n *node) publish() {
	if n.api == nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.status
	out := kube.Status{Ready: s.Ready && n.err == nil, Addresses: s.Addresses}
	if s.Addresses > 0 {
		free := "0"
		if s.FreeAtLeast > 0 {
			free = strconv.Itoa(s.FreeAtLeast) + "+"
		}
		out.Annotations = map[string]string{
			annotENIs: fmt.Sprintf("%d/%d", s.ENIs, s.MaxENIs), annotMax: strconv.Itoa(s.Addresses), annotFree: free, annotVersion: version(),
		}
	}
	n.api.Publish(out)
}
