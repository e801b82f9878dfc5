package agent

import (
	"context"
	"errors"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/ipam"
)

// Orchestrator is who places the pods on this node and shows people how they
// are, such as Kubernetes. It is told how the node stands; nothing is asked of
// it, and its methods return at once: an orchestrator that is away is no
// trouble of ours.
type Orchestrator interface {
	// Publish says how the node stands, whole.
	Publish(NodeStatus)
	// Tell is for the users of a pod.
	Tell(agentapi.Pod, Notice)
	// Served says that a pod has what was told to be missing.
	Served(agentapi.Pod)
	// Dropped returns how many notices nobody will hear of, for want of room.
	Dropped() uint64
}

// NodeStatus is how the node stands, as coarse as it may be told to a cluster
// of thousands: with the pods' coming and going it changes rarely.
type NodeStatus struct {
	Ready     bool // ADDs are served
	Addresses int  // how many pods the node can give addresses to; 0: not known yet
	ENIs      int  // interfaces of the node, its own included
	MaxENIs   int  // how many it may have for pods, its own included
	// FreeAtLeast is how many more pods the node can give addresses to, rounded
	// down: 0, 1, 2, 4, 8, …. It falls when it is no longer true, and rises
	// when three times as many are free, so that one pod that comes and goes
	// does not move it.
	FreeAtLeast int
}

// Notice is what a pod's users are to know.
type Notice struct {
	Reason  string // one word, as Kubernetes' events have it
	Message string // ends with the next step
	Warning bool   // false: it is on its way
}

const (
	// publishEvery is how often the node's state is looked at for what changed.
	publishEvery = 5 * time.Second
	// patience is how long an ADD may wait before its pod's users are told.
	patience = 2 * time.Second
)

// publish tells the orchestrator how the node stands, until ctx ends.
func (a *Agent) publish(ctx context.Context) {
	tick := time.NewTicker(publishEvery)
	defer tick.Stop()
	ready := a.ready
	free := 0
	for {
		var s NodeStatus
		if a.ask(ctx, func(o *owner) { s = nodeStatus(&o.state, free) }) != nil {
			return
		}
		s.Ready = a.unready() == ""
		free = s.FreeAtLeast
		a.opts.Orchestrator.Publish(s)
		select {
		case <-ctx.Done():
			return
		case <-ready:
			ready = nil // once
		case <-tick.C:
		}
	}
}

// nodeStatus sums the plan's state up; before is what was said to be free.
func nodeStatus(s *ipam.State, before int) NodeStatus {
	if !s.Known {
		return NodeStatus{}
	}
	out := NodeStatus{Addresses: s.Capacity(), MaxENIs: s.Config.ENIs()}
	for _, e := range s.ENIs {
		if e.Device >= 0 {
			out.ENIs++
		}
	}
	free := max(0, out.Addresses-countAll(s).Bound)
	out.FreeAtLeast = before
	if level := floor2(free); level < before || before == 0 || level > before && free >= 3*before {
		out.FreeAtLeast = level
	}
	return out
}

// floor2 returns the largest power of two that is not above n, or 0.
func floor2(n int) int {
	p := 0
	for i := 1; i <= n; i *= 2 {
		p = i
	}
	return p
}

// The reasons of notices.
const (
	reasonNotReady   = "AgentNotReady"
	reasonAddress    = "WaitingForAddress"
	reasonENI        = "WaitingForENI"
	reasonNoAddress  = "NoAddressInTime"
	reasonDatapath   = "DatapathError"
	reasonRefused    = "NetworkSetupRefused"
	reasonNodeFull   = "NodeFull"
	reasonSubnetFull = "SubnetFull"
	reasonGroups     = "SecurityGroupsRefused"
	reasonSetsFull   = "NoInterfaceForSecurityGroups"
)

// reasons are those of the plan's errors.
var reasons = map[ipam.Kind]string{
	ipam.KindSlow: reasonNoAddress, ipam.KindNodeFull: reasonNodeFull, ipam.KindSubnetFull: reasonSubnetFull, ipam.KindThrottled: "EC2Throttled",
	ipam.KindDenied: "EC2Denied", ipam.KindQuota: "ENIQuotaReached", ipam.KindUnavailable: "EC2Unavailable", ipam.KindRefused: "EC2Refused",
	ipam.KindSetsFull: reasonSetsFull, ipam.KindGroups: reasonGroups,
}

// reasonError is an error as the plugin hears it, with its notice's reason.
type reasonError struct {
	err    *agentapi.Error
	reason string
}

func (e *reasonError) Error() string { return e.err.Error() }
func (e *reasonError) Unwrap() error { return e.err }

// tellFailed has a pod's users told of the error that its ADD ended with.
func (a *Agent) tellFailed(pod agentapi.Pod, err error) {
	var e *agentapi.Error
	if a.opts.Orchestrator == nil || !errors.As(err, &e) || e == errGone || e == errStopping {
		return
	}
	reason := reasonRefused
	var of *reasonError
	switch {
	case errors.As(err, &of):
		reason = of.reason
	case e.Code == agentapi.CodeDatapath:
		reason = reasonDatapath
	}
	a.opts.Orchestrator.Tell(pod, Notice{Reason: reason, Message: e.Error(), Warning: true})
}

// tellWaits has a pod's users told what its request waits for.
func (a *Agent) tellWaits(ctx context.Context, pod agentapi.Pod, id ipam.RequestID) {
	if a.opts.Orchestrator == nil {
		return
	}
	var (
		trouble       *ipam.Error
		attaching, ok bool
	)
	if a.ask(ctx, func(o *owner) { trouble, attaching, ok = o.state.Waits(id) }) != nil || !ok {
		return
	}
	n := Notice{Reason: reasonAddress, Message: "waiting for an address: EC2 was asked for more, or those of deleted pods rest before their next use; nothing to do unless this lasts"}
	switch {
	case trouble != nil:
		n = Notice{Reason: reasons[trouble.Kind], Message: "waiting for an address: " + trouble.Error(), Warning: true}
	case attaching:
		n = Notice{Reason: reasonENI, Message: "waiting for a network interface: EC2 makes and attaches one to the node, which takes seconds; nothing to do unless this lasts"}
	}
	a.opts.Orchestrator.Tell(pod, n)
}
