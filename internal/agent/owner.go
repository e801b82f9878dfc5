package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/datapath"
	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// owner holds the state of the addresses. Its methods run in one goroutine,
// except where they say otherwise.
type owner struct {
	a   *Agent
	ctx context.Context
	ec2 EC2

	state   ipam.State
	timer   *time.Timer
	waiters map[ipam.RequestID]chan answer

	jobs  sync.WaitGroup // what runs beside the owner
	setMu sync.Mutex     // one SetENIs at a time
}

// answer is the end of a request: an address, or why there is none.
type answer struct {
	addr   ipamAddr
	err    *ipam.Error
	groups vpc.GroupSet
}

type ipamAddr struct {
	reply ipam.Reply
	index int // of the ENI's mark
}

// run serves posts and the timer until ctx ends.
func (o *owner) run() error {
	defer o.timer.Stop()
	for {
		select {
		case fn := <-o.a.post:
			fn(o)
		case <-o.timer.C:
			o.step(ipam.Tick{At: time.Now()})
		case <-o.ctx.Done():
			return nil
		}
	}
}

func (o *owner) wait() { o.jobs.Wait() }

// spawn runs fn beside the owner; fn ends when o.ctx does.
func (o *owner) spawn(fn func()) { o.jobs.Go(fn) }

// start gives the plan its configuration and what the kernel remembers.
func (o *owner) start(cfg ipam.Config) {
	eps, err := o.a.opts.Datapath.Endpoints()
	if err != nil {
		o.a.incident("recover", err.Error())
		o.a.setWaitsFor("not ready: the endpoints cannot be read back: " + err.Error() + "; restart the agent")
		return
	}
	ev := ipam.Started{At: time.Now(), Config: cfg}
	live := 0
	for _, ep := range eps {
		if ep.State == datapath.Live {
			live++
		}
		ev.Endpoints = append(ev.Endpoints, ipam.Endpoint{Addr: ep.Addr, ENI: ep.ENI, Owner: key{ep.ContainerID, ep.IfName}.String(),
			Live: ep.State == datapath.Live, Released: ep.Released})
	}
	o.a.log.Info("endpoints read back", "live", live, "tombstones", len(eps)-live)
	o.step(ev)
}

// step feeds one event to the plan and carries out what it says.
func (o *owner) step(ev ipam.Event) {
	var actions []ipam.Action
	o.state, actions = ipam.Step(o.state, ev)
	for _, act := range actions {
		o.do(act)
	}
	o.readiness()
}

// readiness opens the agent for ADDs when EC2 was read and the node's own
// interface is configured.
func (o *owner) readiness() {
	select {
	case <-o.a.ready:
		return
	default:
	}
	if !o.state.Started {
		return
	}
	own := o.state.Primary()
	switch {
	case !o.state.Known:
		if t := o.state.Trouble[ipam.Pool{}]; t != nil {
			o.a.setWaitsFor("not ready: waiting for EC2: " + t.Error())
		}
		return
	case own == nil:
		o.a.setWaitsFor("not ready: EC2 lists no interface at device index 0 of this instance; check that the agent runs on the instance that IMDS names")
		return
	case !own.Link:
		return // the links are being set; a problem there has said so itself
	}
	o.a.setWaitsFor("")
	close(o.a.ready)
	o.a.log.Info("ready", "enis", len(o.state.ENIs), "held", o.state.Held(), "after", time.Since(o.a.started).Round(time.Millisecond))
}

func (o *owner) do(act ipam.Action) {
	switch act := act.(type) {
	case ipam.SetTimer:
		o.timer.Stop()
		if !act.At.IsZero() {
			o.timer.Reset(max(0, time.Until(act.At)))
		}
	case ipam.Reply:
		o.reply(act)
	case ipam.Forget:
		if err := o.a.opts.Datapath.Forget(act.Addr); err != nil {
			o.a.incident("forget", err.Error())
		}
	case ipam.Report:
		o.a.incident("reconcile", "EC2 no longer lists "+act.Addr.String()+", which "+act.Owner+" uses: its packets are lost; recreate that pod")
	case ipam.Reread:
		o.reread(act.Source)
	default:
		o.call(act)
	}
}

func (o *owner) reply(r ipam.Reply) {
	ch := o.waiters[r.Request]
	delete(o.waiters, r.Request)
	if ch == nil {
		if r.Err == nil { // asked by nobody we know: give it back
			o.step(ipam.Released{At: time.Now(), Addr: r.Addr, Unused: true})
		}
		return
	}
	ans := answer{addr: ipamAddr{reply: r}, err: r.Err}
	if e := o.state.ENI(r.ENI); e != nil {
		ans.addr.index, ans.groups = e.Device+1, e.Groups
	}
	ch <- ans // has room for one
}

// reread reads a source beside the owner and posts what it says.
func (o *owner) reread(src ipam.Source) {
	var read func() (ipam.Event, error)
	switch src {
	case ipam.EC2:
		instance := o.state.Config.Instance
		read = func() (ipam.Event, error) {
			began := time.Now()
			enis, err := o.ec2.Interfaces(o.ctx, instance, ipam.TagInstance)
			o.a.metrics.call("describe", err)
			return ipam.ObservedEC2{At: time.Now(), Read: began, ENIs: enis}, err
		}
	case ipam.IMDS:
		read = func() (ipam.Event, error) {
			ifs, err := o.a.opts.Metadata.Interfaces(o.ctx)
			ev := ipam.ObservedIMDS{}
			for _, i := range ifs {
				ev.ENIs = append(ev.ENIs, ipam.MetadataENI{ID: i.ID, Addrs: i.Addresses, Prefixes: i.Prefixes})
			}
			ev.At = time.Now()
			return ev, err
		}
	case ipam.Links:
		links := o.links()
		read = func() (ipam.Event, error) {
			return o.observeLinks(links)
		}
	}
	o.spawn(func() {
		ev, err := read()
		if err != nil {
			if o.ctx.Err() != nil {
				return
			}
			o.a.incident("read "+src.String(), err.Error())
			_, class := outcome(err)
			ev = ipam.ReadFailed{At: time.Now(), Source: src, Class: class, Err: cause(err)}
			if src == ipam.Links {
				select {
				case <-o.a.ready:
				default:
					o.a.setWaitsFor("not ready: the interfaces cannot be configured: " + err.Error() + "; see the agent's log")
				}
			}
		}
		o.a.tell(o.ctx, func(o *owner) { o.step(ev) })
	})
}

// link is an interface to be configured, before its subnet is looked up.
type link struct {
	eni    datapath.ENI
	subnet vpc.SubnetID
}

// links returns the interfaces that the datapath is to configure.
func (o *owner) links() []link {
	var out []link
	for _, e := range o.state.ENIs {
		if !e.Managed || e.Phase != ipam.Attached || !e.Primary.IsValid() {
			continue
		}
		mac, err := net.ParseMAC(e.MAC)
		if err != nil {
			o.a.incident("links", "EC2 lists "+string(e.ID)+" with the MAC "+e.MAC+", which does not parse")
			continue
		}
		idle := e.Idle
		if idle.TCPEstablished == 0 {
			idle.TCPEstablished = time.Duration(o.state.Config.Limits.TCPEstablished) * time.Second
		}
		out = append(out, link{eni: datapath.ENI{ID: e.ID, Index: e.Device + 1, MAC: mac, Primary: e.Primary, Idle: idle}, subnet: e.Subnet})
	}
	return out
}

// observeLinks has the datapath configure the interfaces and looks at what
// others have configured. It runs beside the owner.
func (o *owner) observeLinks(links []link) (ipam.ObservedLinks, error) {
	ready, err := o.setENIs(links)
	if err != nil {
		return ipam.ObservedLinks{}, err
	}
	host, err := o.a.opts.Datapath.Foreign()
	if err != nil {
		return ipam.ObservedLinks{}, fmt.Errorf("look for addresses that others use: %w", err)
	}
	return ipam.ObservedLinks{At: time.Now(), Ready: ready, Host: host}, nil
}

// setENIs has the datapath configure the interfaces and returns those that
// are. It runs beside the owner.
func (o *owner) setENIs(links []link) ([]vpc.ENIID, error) {
	enis := make([]datapath.ENI, len(links))
	for i, l := range links {
		cidr, err := o.a.subnetCIDR(o.ctx, o.ec2, l.subnet)
		if err != nil {
			return nil, err
		}
		enis[i] = l.eni
		enis[i].Subnet = cidr
	}
	o.setMu.Lock()
	defer o.setMu.Unlock()
	err := o.a.opts.Datapath.SetENIs(o.ctx, enis)
	var missing *datapath.LinkMissingError
	if err != nil && (!errors.As(err, &missing) || !only(err)) {
		return nil, err
	}
	absent := map[vpc.ENIID]bool{}
	if missing != nil {
		for _, id := range missing.ENIs {
			absent[id] = true
		}
	}
	var ready []vpc.ENIID
	for _, e := range enis {
		if !absent[e.ID] {
			ready = append(ready, e.ID)
		}
	}
	return ready, nil
}

// only reports whether err is one error, and not several joined.
func only(err error) bool {
	many, ok := err.(interface{ Unwrap() []error })
	return !ok || len(many.Unwrap()) == 1
}
