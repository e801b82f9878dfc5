package agent

import (
	"context"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/ipam"
)

// maxListed bounds the free addresses that Inspect lists, so that a node with
// hundreds of prefixes stays within one message.
const maxListed = 512

// Inspect returns the agent's view of its node.
func (a *Agent) Inspect(ctx context.Context) (*agentapi.Inspection, error) {
	in := &agentapi.Inspection{Version: a.opts.Version, Since: a.started, ENIs: []agentapi.ENI{}, Addresses: []agentapi.Address{}, Endpoints: []agentapi.Endpoint{}}
	var trouble string
	lost := map[netip.Addr]bool{}
	if err := a.ask(ctx, func(o *owner) {
		in.Waiting = len(o.state.Waiting)
		in.Sets, in.SetsLeft = sets(&o.state), o.state.SlotsLeft()
		if t := o.state.Trouble[ipam.Pool{}]; t != nil {
			trouble = t.Error()
		}
		snapshot(&o.state, in, lost)
	}); err != nil {
		return nil, err
	}

	a.mu.Lock()
	id := a.identity
	in.Reason, in.LastErrors = a.waitsFor, append([]agentapi.Incident{}, a.incidents...)
	if c := &a.config; c.Limits.ENIs > 0 {
		in.Limits = agentapi.Limits{ENIs: c.ENIs(), IPv4PerENI: c.Limits.IPv4PerENI, Addresses: c.Capacity(), MaxPods: c.Limits.MaxPods(c.PerSlot())}
	}
	a.mu.Unlock()
	in.Node = agentapi.Node{InstanceID: string(id.Instance), InstanceType: id.Type, AvailabilityZone: id.AvailabilityZone, Region: id.Region,
		VPC: string(id.VPC), VPCCIDRs: id.VPCCIDRs, Subnet: string(id.Subnet), IP: id.Addr, Cluster: a.opts.Cluster}
	if in.Reason == "" {
		in.Reason = trouble
	}
	if in.Reason == "" && len(lost) > 0 {
		in.Reason = "EC2 no longer lists addresses that pods use; recreate the pods with a problem"
	}
	in.Healthy = in.Reason == ""
	if a.gate != nil {
		in.Policy = a.gate.status()
	}

	eps, err := a.opts.Datapath.Endpoints()
	if err != nil {
		return nil, agentapi.Errorf(agentapi.CodeDatapath, "read the endpoints: %v; see the agent's log", err)
	}
	for _, ep := range eps {
		e := agentapi.Endpoint{ContainerID: ep.ContainerID, IfName: ep.IfName, Netns: ep.Netns, IP: ep.Addr, ENI: string(ep.ENI), MAC: ep.MAC.String(),
			HostIfName: ep.HostIfName, Pod: agentapi.Pod{Namespace: ep.PodNamespace, Name: ep.PodName, UID: ep.PodUID}, Since: ep.Created, State: strings.ToLower(ep.State.String()), Groups: groupIDs(ep.Groups)}
		if ep.GroupsHere {
			e.GroupsMode = agentapi.GroupsHost
		}
		if lost[ep.Addr] {
			e.Problem = "EC2 no longer lists this address; recreate the pod"
		}
		in.Endpoints = append(in.Endpoints, e)
	}
	nameLinks(in.ENIs)
	slices.SortFunc(in.Endpoints, func(x, y agentapi.Endpoint) int { return x.IP.Compare(y.IP) })
	drops, err := a.opts.Datapath.Counters()
	if err != nil {
		return nil, agentapi.Errorf(agentapi.CodeDatapath, "read the counters: %v; see the agent's log", err)
	}
	in.Counters.Drops = maps.Clone(drops)
	st, err := a.opts.Datapath.Status()
	if err != nil {
		return nil, agentapi.Errorf(agentapi.CodeDatapath, "read the datapath's state: %v; see the agent's log", err)
	}
	in.Datapath = agentapi.Datapath{
		Hook: string(st.Hook), ENIHook: string(st.ENIHook), Moved: st.Moved, Direct: st.Direct, Connections: st.Connections, DirectConnections: st.DirectConnections, MaxConnections: st.MaxConnections,
		DirectPackets: st.Paths.Direct, StackPackets: st.Paths.Stack + st.Paths.Exceptions, SlowShare: st.Paths.SlowShare(),
	}
	return in, nil
}

// nameLinks fills in the names of the interfaces' links in this namespace.
func nameLinks(enis []agentapi.ENI) {
	links, err := net.Interfaces()
	if err != nil {
		return // names are for people; the rest is worth having without them
	}
	for i := range enis {
		for _, l := range links {
			// A veth of ours never has an ENI's MAC.
			if l.HardwareAddr.String() == enis[i].MAC {
				enis[i].IfName = l.Name
			}
		}
	}
}

// snapshot copies what people see of the plan's state.
func snapshot(s *ipam.State, in *agentapi.Inspection, lost map[netip.Addr]bool) {
	listed := 0
	add := func(e *ipam.ENI, ad *ipam.Address) {
		if ad.Reported {
			lost[ad.Addr] = true
		}
		if ad.State == ipam.Free || ad.State == ipam.Assigned {
			if listed++; listed > maxListed {
				in.Omitted++
				return
			}
		}
		out := agentapi.Address{IP: ad.Addr, State: ad.State.String(), Endpoint: ad.Owner}
		if e != nil {
			out.ENI = string(e.ID)
		}
		if ad.Foreign() {
			out.State = "foreign"
		}
		if ad.State == ipam.Cooling {
			until := ad.Until
			out.Until = &until
		}
		in.Addresses = append(in.Addresses, out)
	}
	for _, e := range s.ENIs {
		out := agentapi.ENI{ID: string(e.ID), Device: e.Device, MAC: e.MAC, Primary: e.Primary, Subnet: string(e.Subnet), Groups: []string{},
			Prefixes: e.Prefixes, Managed: e.Managed, State: state(e), Addresses: counts(e)}
		out.Prefixes = slices.Clone(e.Prefixes)
		out.Groups = groupIDs(e.Groups)
		if e.Managed {
			out.Addresses.Limit = max(0, s.Config.Limits.IPv4PerENI-1)
		}
		in.ENIs = append(in.ENIs, out)
		for _, ad := range e.Addrs {
			add(e, ad)
		}
	}
	for _, ad := range s.Lost {
		add(nil, ad)
	}
	slices.SortFunc(in.Addresses, func(x, y agentapi.Address) int { return x.IP.Compare(y.IP) })
}

// state says where an ENI stands.
func state(e *ipam.ENI) string {
	switch {
	case !e.Managed:
		return "foreign"
	case e.Phase == ipam.Attached && !e.Link:
		return "attaching"
	}
	return e.Phase.String()
}

func counts(e *ipam.ENI) agentapi.Counts {
	var c agentapi.Counts
	for _, a := range e.Addrs {
		c.Total++
		switch {
		case a.Foreign():
			c.Foreign++
		case a.State == ipam.Assigned:
			c.Assigned++
		case a.State == ipam.Bound:
			c.Bound++
		case a.State == ipam.Cooling:
			c.Cooling++
		default:
			c.Free++
		}
	}
	return c
}

// countAll returns the addresses of all managed ENIs by state.
func countAll(s *ipam.State) agentapi.Counts {
	var sum agentapi.Counts
	for _, e := range s.ENIs {
		c := counts(e)
		sum.Assigned += c.Assigned
		sum.Free += c.Free
		sum.Bound += c.Bound
		sum.Cooling += c.Cooling
		sum.Foreign += c.Foreign
		sum.Total += c.Total
	}
	return sum
}
