package agent

import (
	"cmp"
	"context"
	"errors"
	"net/netip"
	"os"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/agentapi/cni"
	"github.com/underlay-cni/underlay/internal/agentapi/pipe"
	"github.com/underlay-cni/underlay/internal/datapath"
	"github.com/underlay-cni/underlay/internal/ipam"
)

// gateway is the next hop inside every pod: link-local, so that it is the same
// everywhere and takes no address of the VPC.
var gateway = netip.MustParseAddr("169.254.1.1")

// addTries bounds how many addresses an ADD goes through when the kernel's
// records say that one is taken.
const addTries = 3

var (
	_ agentapi.Handler = (*Agent)(nil)
	_ cni.Backend      = (*Agent)(nil)
)

// Version returns the agent's version.
func (a *Agent) Version() string { return a.opts.Version }

// CNI carries out a call of the plugin.
func (a *Agent) CNI(ctx context.Context, call *pipe.Call, netns *os.File) (exit byte, stdout []byte) {
	return cni.Run(ctx, a, call, netns)
}

// Add makes the endpoint, or answers with the one that is there.
func (a *Agent) Add(ctx context.Context, at *agentapi.Attachment, timeout time.Duration, netns *os.File) (*agentapi.Result, error) {
	began := time.Now()
	res, err := a.add(ctx, at, timeout, netns)
	a.metrics.added(time.Since(began), err)
	switch {
	case err != nil && ctx.Err() == nil:
		a.incident("add", err.Error())
		a.tellFailed(at.Pod, err)
	case err == nil && a.opts.Orchestrator != nil:
		a.opts.Orchestrator.Served(at.Pod)
	}
	return res, err
}

func (a *Agent) add(ctx context.Context, at *agentapi.Attachment, timeout time.Duration, netns *os.File) (*agentapi.Result, error) {
	if netns == nil {
		return nil, agentapi.Errorf(agentapi.CodeInvalidNetns, "no network namespace came with the request; the runtime must make it before ADD and name it in CNI_NETNS")
	}
	if timeout <= 0 || timeout > a.opts.AddTimeout {
		timeout = a.opts.AddTimeout
	}
	deadline := time.Now().Add(timeout)
	if err := a.awaitReady(ctx, min(startTimeout, timeout)); err != nil {
		return nil, err
	}
	a.drainSpool(ctx)
	k := key{at.ContainerID, at.IfName}
	unlock, err := a.locks.lock(ctx, k)
	if err != nil {
		return nil, err
	}
	defer unlock()
	set, err := a.groupSet(ctx, at.Groups, deadline)
	if err != nil {
		return nil, err
	}
	here := set != "" && cmp.Or(at.GroupsMode, a.opts.GroupsMode) == agentapi.GroupsHost
	pool := ipam.Pool{Groups: set}
	if pool.Subnet, err = a.poolSubnet(ctx, at.Subnet); err != nil {
		return nil, err
	}
	if here { // to the VPC it has the node's
		pool.Groups = ""
		if a.gate == nil {
			return nil, groupsError("the node judges nothing by security groups; ask for mode vpc")
		}
	}
	if ep, ok := a.endpoint(k); ok {
		err := a.opts.Datapath.Check(ctx, ep, netns)
		if err == nil {
			has, same, err := a.inGroups(ctx, ep, set, here)
			if err != nil {
				return nil, err
			}
			if !same { // a pod keeps its groups until it is made anew
				return nil, agentapi.Errorf(agentapi.CodeConflict, "container %s has %s with %s, and ADD asks for %s; send DEL first", at.ContainerID, ep.Addr, describeSet(has), describeSet(set))
			}
			return result(ep), nil
		}
		// The runtime made the container's namespace anew without a DEL.
		a.log.Info("endpoint made anew", "pod", at.Pod.String(), "ip", ep.Addr, "op", "add", "err", err)
		if err := a.del(ctx, k); err != nil {
			return nil, err
		}
	}
	for try := 1; ; try++ {
		ans, err := a.request(ctx, at, pool, deadline)
		if err != nil {
			return nil, err
		}
		if pool.Groups != "" && ans.groups != set { // changed by somebody a moment ago, or the address is of an earlier request
			a.release(ans.addr.reply.Addr, time.Now(), true)
			return nil, agentapi.Errorf(agentapi.CodeTryAgain, "%s, where the pod was to have its address, carries security groups %s and no longer %s; try again", ans.addr.reply.ENI, ans.groups, set)
		}
		if here {
			ans.groups = set
		}
		ep, err := a.attach(ctx, k, deadline, datapath.Endpoint{
			ContainerID: at.ContainerID, IfName: at.IfName, Netns: at.Netns, Addr: ans.addr.reply.Addr, ENI: ans.addr.reply.ENI, ENIIndex: ans.addr.index,
			PodNamespace: at.Pod.Namespace, PodName: at.Pod.Name, PodUID: at.Pod.UID, Groups: ans.groups, GroupsHere: here}, netns)
		if err == nil {
			a.log.Info("endpoint added", "pod", at.Pod.String(), "ip", ep.Addr, "eni", ep.ENI, "if", ep.HostIfName, "container", at.ContainerID)
			return result(ep), nil
		}
		inUse := errors.Is(err, datapath.ErrAddressInUse)
		// An address that the kernel's records give to somebody else is not
		// handed out again before a cooldown.
		a.release(ans.addr.reply.Addr, time.Now(), !inUse)
		if inUse && try < addTries {
			a.incident("add", err.Error())
			continue
		}
		return nil, datapathError(err, at)
	}
}

// ruleTime is what an ADD has at least, once it has its address, to learn the
// rules of its security groups.
const ruleTime = 5 * time.Second

// attach makes the endpoint in the kernel, with its policy.
func (a *Agent) attach(ctx context.Context, k key, deadline time.Time, ep datapath.Endpoint, netns *os.File) (datapath.Endpoint, error) {
	if least := time.Now().Add(ruleTime); deadline.Before(least) {
		deadline = least
	}
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	ep, err := a.opts.Datapath.Add(ctx, ep, netns)
	if err == nil {
		a.remember(k, ep)
	}
	if a.gate != nil {
		a.gate.leave(k) // it is among the endpoints now, or not there
	}
	return ep, err
}

// BeforeReady puts the policy of an endpoint into the kernel before its first
// packet passes. It is for datapath.Options.
func (a *Agent) BeforeReady(ctx context.Context, ep datapath.Endpoint) error {
	if a.gate == nil {
		return nil
	}
	return a.gate.admit(ctx, ep)
}

// keepGate keeps the endpoints' policy up to date, from when the node's
// interfaces are known.
func (a *Agent) keepGate(ctx context.Context) {
	select {
	case <-a.ready:
		a.gate.run(ctx)
	case <-ctx.Done():
	}
}

func datapathError(err error, at *agentapi.Attachment) error {
	var rules *rulesError
	if errors.As(err, &rules) {
		_, class := outcome(rules.cause)
		if class == ipam.ClassDenied {
			return &reasonError{agentapi.Errorf(agentapi.CodeDenied, "EC2 denies the node to read the rules of the pod's security groups (%s); attach the documented IAM policy to the node's role", cause(rules.cause)), reasons[ipam.KindDenied]}
		}
		return &reasonError{agentapi.Errorf(agentapi.CodeTryAgain, "EC2 did not say in time what the rules of the pod's security groups are (%s); the next try may succeed", cause(rules.cause)), lateReason(class)}
	}
	switch {
	case errors.Is(err, datapath.ErrInterfaceTaken):
		e := agentapi.Errorf(agentapi.CodeInvalidEnvironment, "the container's namespace has an interface %s that is not ours; delete it, or choose another CNI_IFNAME", at.IfName)
		e.Details = err.Error()
		return e
	case errors.Is(err, datapath.ErrExists):
		return agentapi.Errorf(agentapi.CodeConflict, "%v; send DEL for container %s first", err, at.ContainerID)
	}
	return agentapi.Errorf(agentapi.CodeDatapath, "make the endpoint: %v; nothing of it is left, the next try may succeed; see the agent's log if it does not", err)
}

// awaitReady waits a little for an agent that is starting.
func (a *Agent) awaitReady(ctx context.Context, d time.Duration) error {
	select {
	case <-a.ready:
		return nil
	default:
	}
	a.mu.Lock()
	if a.refuses {
		d = 0
	}
	a.mu.Unlock()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-a.ready:
		return nil
	case <-t.C:
		return &reasonError{agentapi.Errorf(agentapi.CodeTryAgain, "%s", a.unready()), reasonNotReady}
	case <-ctx.Done():
		return errGone
	}
}

// request waits for an address from the plan.
func (a *Agent) request(ctx context.Context, at *agentapi.Attachment, pool ipam.Pool, deadline time.Time) (answer, error) {
	k := key{at.ContainerID, at.IfName}
	ch := make(chan answer, 1)
	a.mu.Lock()
	a.nextReq++
	id := a.nextReq
	a.mu.Unlock()
	if !a.tell(ctx, func(o *owner) {
		o.waiters[id] = ch
		o.step(ipam.AddRequested{At: time.Now(), ID: id, Owner: k.String(), Pool: pool, Deadline: deadline})
	}) {
		return answer{}, errStopping
	}
	long := time.NewTimer(patience)
	defer long.Stop()
	for waits := true; waits; {
		select {
		case ans := <-ch:
			if ans.err != nil {
				return ans, addressError(ans.err)
			}
			return ans, nil
		case <-long.C:
			a.tellWaits(ctx, at.Pod, id)
		case <-a.done:
			return answer{}, errStopping
		case <-ctx.Done():
			waits = false
		}
	}
	a.tell(context.WithoutCancel(ctx), func(o *owner) { // the owner takes it, or has ended
		delete(o.waiters, id)
		o.step(ipam.Canceled{At: time.Now(), ID: id})
		select {
		case ans := <-ch: // it was served just before
			if ans.err == nil {
				o.step(ipam.Released{At: time.Now(), Addr: ans.addr.reply.Addr, Unused: true})
			}
		default:
		}
	})
	return answer{}, errGone
}

// addressError gives the plan's error its code.
func addressError(e *ipam.Error) error {
	code := agentapi.CodeNoAddress
	switch e.Kind {
	case ipam.KindNodeFull:
		code = agentapi.CodeNodeFull
	case ipam.KindSetsFull:
		code = agentapi.CodeSetsFull
	case ipam.KindGroups:
		code = agentapi.CodeGroups
	case ipam.KindSubnetFull:
		code = agentapi.CodeSubnetFull
	case ipam.KindDenied:
		code = agentapi.CodeDenied
	case ipam.KindSlow, ipam.KindThrottled, ipam.KindUnavailable:
		code = agentapi.CodeTryAgain
	}
	return &reasonError{agentapi.Errorf(code, "%v", e), reasons[e.Kind]}
}

// release gives an address back to the plan. It is done even if whoever asked
// has left.
func (a *Agent) release(addr netip.Addr, when time.Time, unused bool) {
	a.tell(context.Background(), func(o *owner) {
		o.step(ipam.Released{At: time.Now(), Addr: addr, When: when, Unused: unused})
	})
}

func result(ep datapath.Endpoint) *agentapi.Result {
	return &agentapi.Result{Addr: ep.Addr, Gateway: gateway, MAC: ep.MAC.String(), HostIfName: ep.HostIfName, HostMAC: datapath.HostMAC().String(), MTU: ep.MTU, ENI: string(ep.ENI)}
}

func (a *Agent) endpoint(k key) (datapath.Endpoint, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	ep, ok := a.endpoints[k]
	return ep, ok
}

func (a *Agent) remember(k key, ep datapath.Endpoint) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.endpoints[k] = ep
}

// Del removes the endpoint. One that is not there is no error.
func (a *Agent) Del(ctx context.Context, at *agentapi.Attachment) error {
	k := key{at.ContainerID, at.IfName}
	unlock, err := a.locks.lock(ctx, k)
	if err != nil {
		return err
	}
	defer unlock()
	err = a.del(ctx, k)
	a.metrics.deleted(err)
	if err != nil {
		a.incident("del", err.Error())
		return err
	}
	return nil
}

// del removes the endpoint of k, whose lock is held. The tombstone starts the
// address's cooldown.
func (a *Agent) del(ctx context.Context, k key) error {
	// Not to be cut off half-way: what is begun here is finished.
	ep, err := a.opts.Datapath.Delete(context.WithoutCancel(ctx), k.containerID, k.ifName)
	if errors.Is(err, datapath.ErrNotFound) {
		a.forget(k)
		return nil
	}
	if ep.State != datapath.Tombstone && err != nil {
		return agentapi.Errorf(agentapi.CodeDatapath, "delete the endpoint: %v; try again, see the agent's log if it does not help", err)
	}
	if err != nil { // released, but something is left, which a later Open sweeps
		a.incident("del", err.Error())
	}
	a.forget(k)
	a.release(ep.Addr, ep.Released, false)
	a.log.Info("endpoint deleted", "pod", podName(ep), "ip", ep.Addr, "eni", ep.ENI, "container", k.containerID)
	return nil
}

func podName(ep datapath.Endpoint) string {
	return agentapi.Pod{Namespace: ep.PodNamespace, Name: ep.PodName}.String()
}

func (a *Agent) forget(k key) {
	a.mu.Lock()
	delete(a.endpoints, k)
	a.mu.Unlock()
	if a.gate != nil {
		a.gate.gone(k)
	}
}

// Check compares the endpoint with what Add made, in the kernel and in EC2.
func (a *Agent) Check(ctx context.Context, at *agentapi.Attachment, netns *os.File) error {
	if netns == nil {
		return agentapi.Errorf(agentapi.CodeInvalidNetns, "no network namespace came with the request; the runtime must name it in CNI_NETNS")
	}
	if err := a.awaitReady(ctx, startTimeout); err != nil {
		return err
	}
	k := key{at.ContainerID, at.IfName}
	unlock, err := a.locks.lock(ctx, k)
	if err != nil {
		return err
	}
	defer unlock()
	ep, ok := a.endpoint(k)
	if !ok {
		return agentapi.Errorf(agentapi.CodeUnknownContainer, "container %s has no interface %s on this node; send ADD again", at.ContainerID, at.IfName)
	}
	if at.Addr.IsValid() && at.Addr != ep.Addr {
		return agentapi.Errorf(agentapi.CodeCheckFailed, "container %s has %s, the runtime believes %s; recreate the container", at.ContainerID, ep.Addr, at.Addr)
	}
	if err := a.opts.Datapath.Check(ctx, ep, netns); err != nil {
		return agentapi.Errorf(agentapi.CodeCheckFailed, "%v; recreate the container", err)
	}
	lost := false
	if err := a.ask(ctx, func(o *owner) {
		if ad, _ := o.state.Lookup(ep.Addr); ad != nil {
			lost = ad.Reported
		}
	}); err != nil {
		return err
	}
	if lost {
		return agentapi.Errorf(agentapi.CodeCheckFailed, "EC2 no longer lists %s on %s; recreate the container", ep.Addr, ep.ENI)
	}
	return nil
}

// GC removes every endpoint that is not among valid.
func (a *Agent) GC(ctx context.Context, valid []agentapi.Attachment) error {
	keep := make(map[key]bool, len(valid))
	for _, v := range valid {
		keep[key{v.ContainerID, v.IfName}] = true
	}
	a.mu.Lock()
	var stale []key
	for k := range a.endpoints {
		if !keep[k] {
			stale = append(stale, k)
		}
	}
	a.mu.Unlock()
	var errs []error
	for _, k := range stale {
		errs = append(errs, a.Del(ctx, &agentapi.Attachment{ContainerID: k.containerID, IfName: k.ifName}))
	}
	if err := errors.Join(errs...); err != nil {
		return agentapi.Errorf(agentapi.CodeTryAgain, "collect %d stale attachments: %v; run GC again", len(stale), err)
	}
	return nil
}

// Status returns nil when the agent can serve an ADD. A node that runs pods is
// not called unavailable for want of further addresses: its runtime would
// report it not ready, and its pods would be evicted.
func (a *Agent) Status(ctx context.Context) error {
	if why := a.unready(); why != "" {
		return agentapi.Errorf(agentapi.CodeNotAvailable, "%s", why)
	}
	var trouble *ipam.Error
	pods := 0
	if err := a.ask(ctx, func(o *owner) {
		n := countAll(&o.state)
		pods = n.Bound
		if t := o.state.Trouble[ipam.Pool{}]; t != nil && n.Free == 0 {
			e := *t
			trouble = &e
		}
	}); err != nil {
		return err
	}
	if trouble != nil && pods == 0 {
		return agentapi.Errorf(agentapi.CodeNotAvailable, "the node has no address for a pod: %v", trouble)
	}
	return nil
}

// Alive returns nil when the agent does its work, whatever it waits for.
func (a *Agent) Alive(ctx context.Context) error { return a.ask(ctx, func(*owner) {}) }

// spoolEvery is how often the spool is looked at: it fills only while no agent
// listens, so that this is for what came in the moment before we did.
const spoolEvery = 10 * time.Second

// spoolPatience bounds the wait for one attachment's lock, so that an ADD that
// waits for EC2 does not hold up the others.
const spoolPatience = 100 * time.Millisecond

func (a *Agent) watchSpool(ctx context.Context) {
	a.drainSpool(ctx)
	tick := time.NewTicker(spoolEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			a.drainSpool(ctx)
		}
	}
}

// drainSpool carries out the DELs that found no agent. One drain at a time: an
// ADD waits for the one that runs, so that no DEL from before it comes after.
func (a *Agent) drainSpool(ctx context.Context) {
	a.spoolMu.Lock()
	defer a.spoolMu.Unlock()
	err := agentapi.DrainSpool(a.opts.Socket, func(at agentapi.Attachment) error {
		k := key{at.ContainerID, at.IfName}
		ctx, cancel := context.WithTimeout(ctx, spoolPatience)
		defer cancel()
		unlock, err := a.locks.lock(ctx, k)
		if err != nil {
			return err // busy with another request; next time
		}
		defer unlock()
		if err := a.del(ctx, k); err != nil {
			return err
		}
		a.log.Info("spooled release taken up", "op", "del", "container", at.ContainerID)
		return nil
	})
	if err != nil && !errors.Is(err, errGone) {
		a.incident("spool", err.Error())
	}
}
