package sim

import (
	"hash/fnv"
	"strconv"
	"time"

	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// clusterName is whose interfaces are; tags say so.
const (
	clusterName = "sim"
	tagCluster  = ipam.TagCluster
	tagInstance = ipam.TagInstance
)

// epoch is the wall-clock time at which a run starts.
var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// local is how long the node itself takes to read IMDS or its links.
const local = 2 * time.Millisecond

// How the second half of a read is repeated, as in internal/ec2.
const (
	again      = time.Second
	againTries = 6
)

// agent is Underlay on one node: the real ipam.Step, and around it what the
// agent does, call by call (internal/agent, internal/ec2): no retries by the
// SDK; two DescribeNetworkInterfaces per read, the second repeated alone when
// it is throttled; DetachNetworkInterface, a read per second and
// DeleteNetworkInterface to delete.
type agent struct {
	w        *world
	h        *host
	state    ipam.State
	requests map[ipam.RequestID]*pod
	nextReq  ipam.RequestID
	wake     time.Duration // what SetTimer asked for; 0: nothing
	armed    time.Duration // the earliest Tick in the clock; 0: none
}

func newAgent(h *host) cni { return &agent{w: h.w, h: h, requests: map[ipam.RequestID]*pod{}} }

func (g *agent) now() time.Time { return epoch.Add(g.w.clk.now) }

func (g *agent) boot() {
	cfg := ipam.Default()
	h := fnv.New64a()
	h.Write([]byte(g.h.id))
	cfg.Instance, cfg.Cluster, cfg.Seed, cfg.Limits = g.h.id, clusterName, h.Sum64(), g.w.cfg.limits
	cfg.Prefixes, cfg.Floor = g.w.cfg.Prefixes, g.w.cfg.Floor
	g.step(ipam.Started{At: g.now(), Config: cfg})
}

// call makes a call; done runs if the node is still there then.
func (g *agent) call(a action, apply func() code, done func(code)) {
	if !g.h.alive {
		return
	}
	g.w.cloud.call(a, apply, func(res code) {
		if g.h.alive {
			done(res)
		}
	})
}

func (g *agent) after(d time.Duration, fn func()) {
	g.w.clk.after(d, func() {
		if g.h.alive {
			fn()
		}
	})
}

func (g *agent) step(ev ipam.Event) {
	var acts []ipam.Action
	g.state, acts = ipam.Step(g.state, ev)
	if g.w.cfg.verify != nil {
		g.w.cfg.verify(&g.state)
	}
	for _, a := range acts {
		g.do(a)
	}
	if own := g.state.Primary(); !g.h.ready && g.state.Known && own != nil && own.Link {
		g.w.markReady(g.h)
	}
}

func (g *agent) add(p *pod) {
	g.nextReq++
	p.req = uint64(g.nextReq)
	g.requests[g.nextReq] = p
	g.step(ipam.AddRequested{At: g.now(), ID: g.nextReq, Owner: strconv.FormatUint(p.req, 10) + "/eth0", Deadline: g.now().Add(g.w.cfg.AddTimeout)})
}

func (g *agent) del(p *pod) {
	g.step(ipam.Released{At: g.now(), Addr: p.addr, When: g.now()})
}

func (g *agent) quit(p *pod) {
	id := ipam.RequestID(p.req)
	delete(g.requests, id)
	g.step(ipam.Canceled{At: g.now(), ID: id})
}

func (g *agent) do(act ipam.Action) {
	c := g.w.cloud
	switch act := act.(type) {
	case ipam.SetTimer:
		g.timer(act.At)
	case ipam.Reply:
		p := g.requests[act.Request]
		delete(g.requests, act.Request)
		switch {
		case p == nil: // withdrawn
		case act.Err != nil:
			g.w.failed(p, act.Err.Kind.String())
		default:
			g.w.up(p, act.Addr)
		}
	case ipam.Reread:
		g.read(act.Source)
	case ipam.AssignAddresses:
		d := ipam.CallDone{Call: act.Call}
		e := c.enis[act.ENI]
		g.mutate(assignAddresses, &d, e, func() (res code) {
			d.Addrs, res = c.assign(e, act.N)
			return res
		})
	case ipam.AssignPrefixes:
		d := ipam.CallDone{Call: act.Call}
		e := c.enis[act.ENI]
		g.mutate(assignAddresses, &d, e, func() (res code) {
			d.Prefixes, res = c.assignPrefixes(e, act.N)
			return res
		})
	case ipam.Unassign:
		e := c.enis[act.ENI]
		g.mutate(unassignAddresses, &ipam.CallDone{Call: act.Call}, e, func() code { return c.unassign(e, act.Addrs, act.Prefixes) })
	case ipam.CreateENI:
		d := ipam.CallDone{Call: act.Call}
		g.call(createInterface, func() code {
			e, res := c.create(g.h, act.N, act.Prefixes)
			if res == ok {
				v := vpc.ENI{ID: e.id, Subnet: e.subnet.id, MAC: e.mac, Primary: e.primary, Groups: act.Groups, Tags: g.h.tags}
				for i := range e.grants {
					v.Secondary, v.Prefixes = append(v.Secondary, e.grants[i].addrs...), append(v.Prefixes, e.grants[i].prefixes...)
				}
				d.ENI = &v
			}
			return res
		}, func(res code) { g.ended(&d, res) })
	case ipam.AttachENI:
		d := ipam.CallDone{Call: act.Call}
		e := c.enis[act.ENI]
		g.mutate(attachInterface, &d, e, func() code {
			res := c.attach(e, act.Device)
			d.ENI = &vpc.ENI{ID: e.id, Attachment: e.attach}
			return res
		})
	case ipam.SetDeleteOnTermination:
		e := c.enis[act.ENI]
		g.mutate(modifyInterface, &ipam.CallDone{Call: act.Call}, e, func() code { return c.setDeleteOnTermination(e) })
	case ipam.DeleteENI:
		g.remove(act)
	}
}

// mutate makes a call about an interface and tells the plan how it ended.
func (g *agent) mutate(a action, d *ipam.CallDone, e *iface, apply func() code) {
	g.call(a, func() code {
		if e == nil {
			return notFound
		}
		return apply()
	}, func(res code) { g.ended(d, res) })
}

// ended tells the plan how a call ended.
func (g *agent) ended(d *ipam.CallDone, res code) {
	d.At = g.now()
	if res != ok {
		d.ENI, d.Addrs, d.Prefixes = nil, nil, nil
		d.Outcome, d.Class, d.Err = ipam.Refused, class(res), res.String()
	}
	g.step(*d)
}

// class is what package ec2 makes of an answer.
func class(res code) ipam.Class {
	switch res {
	case throttled:
		return ipam.ClassThrottled
	case subnetFull:
		return ipam.ClassSubnetFull
	case noPrefix:
		return ipam.ClassNoPrefix
	case eniFull:
		return ipam.ClassENIFull
	case slotsFull:
		return ipam.ClassSlots
	case notFound:
		return ipam.ClassNotFound
	case inUse:
		return ipam.ClassInUse
	}
	return ipam.ClassOther
}

// remove detaches an interface, looks once a second until it is off, and
// deletes it.
func (g *agent) remove(act ipam.DeleteENI) {
	c := g.w.cloud
	e := c.enis[act.ENI]
	end := func(res code) {
		if res == notFound {
			res = ok
		}
		g.ended(&ipam.CallDone{Call: act.Call}, res)
	}
	var look func()
	del := func() {
		g.call(deleteInterface, func() code {
			if e == nil {
				return notFound
			}
			return c.delete(e)
		}, end)
	}
	look = func() {
		off := false
		g.call(describeInterfaces, func() code { off = e == nil || e.gone || c.available(e); return ok }, func(res code) {
			if res == ok && off {
				del()
				return
			}
			g.after(time.Second, look)
		})
	}
	if act.Attachment == "" {
		del()
		return
	}
	g.call(detachInterface, func() code {
		if e == nil {
			return notFound
		}
		return c.detach(e)
	}, func(res code) {
		if res != ok && res != notFound {
			end(res)
			return
		}
		look()
	})
}

// timer arms a Tick at t. One that is armed for an earlier time is left to
// ring, and finds then what to wait for.
func (g *agent) timer(t time.Time) {
	if t.IsZero() {
		g.wake = 0
		return
	}
	g.wake = max(t.Sub(epoch), g.w.clk.now)
	g.arm()
}

func (g *agent) arm() {
	if g.armed != 0 && g.armed <= g.wake {
		return
	}
	at := g.wake
	g.armed = at
	g.w.clk.at(at, func() {
		if !g.h.alive || g.armed != at {
			return // an earlier one was armed after this
		}
		g.armed = 0
		switch {
		case g.wake == 0:
		case g.wake > g.w.clk.now:
			g.arm()
		default:
			g.wake = 0
			g.step(ipam.Tick{At: g.now()})
		}
	})
}

func (g *agent) read(src ipam.Source) {
	c := g.w.cloud
	switch src {
	case ipam.EC2:
		ev := ipam.ObservedEC2{Read: g.now()}
		refused := func(res code) {
			g.step(ipam.ReadFailed{At: g.now(), Source: ipam.EC2, Class: class(res), Err: res.String()})
		}
		var second func(delay time.Duration)
		second = func(delay time.Duration) {
			g.call(describeInterfaces, func() code { ev.ENIs = c.describe(g.h); return ok }, func(res code) {
				switch {
				case res == ok:
					ev.At = g.now()
					g.step(ev)
				case delay >= again<<againTries:
					refused(res)
				default:
					g.after(delay/2+time.Duration(c.rng.Int64N(int64(delay))), func() { second(2 * delay) })
				}
			})
		}
		g.call(describeInterfaces, func() code { return ok }, func(res code) {
			if res != ok {
				refused(res)
				return
			}
			second(again)
		})
	case ipam.IMDS:
		g.after(local, func() {
			ev := ipam.ObservedIMDS{At: g.now()}
			for _, e := range g.h.enis {
				if !e.attached || e.deviceAt > g.w.clk.now {
					continue
				}
				m := ipam.MetadataENI{ID: e.id}
				m.Addrs = append(m.Addrs, e.primary)
				for i := range e.grants {
					if gr := &e.grants[i]; c.listed(e, gr) {
						m.Addrs, m.Prefixes = append(m.Addrs, gr.addrs...), append(m.Prefixes, gr.prefixes...)
					}
				}
				ev.ENIs = append(ev.ENIs, m)
			}
			g.step(ev)
		})
	case ipam.Links:
		g.after(local, func() {
			ev := ipam.ObservedLinks{At: g.now()}
			for _, e := range g.h.enis {
				if e.attached && e.deviceAt <= g.w.clk.now {
					ev.Ready = append(ev.Ready, e.id)
				}
			}
			g.step(ev)
		})
	}
}
