package sim

import (
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// host is a node: an instance, its kubelet and its CNI.
type host struct {
	w      *world
	id     vpc.InstanceID
	subnet *subnet
	tags   map[string]string
	enis   []*iface // attached to it, or made for it
	alive  bool
	ready  bool // its CNI answers
	cni    cni
	pods   []*pod // scheduled on it
	early  []*pod // came before the CNI was ready
}

// cni is what a model has on each node.
type cni interface {
	boot()       // begins; ends with world.ready
	add(p *pod)  // CNI ADD; ends with world.up or world.failed, perhaps before it returns
	del(p *pod)  // CNI DEL of a pod that is up
	quit(p *pod) // the pod of an ADD that has not ended is gone
}

// pod is one pod, from the moment it is scheduled.
type pod struct {
	host  *host
	due   time.Duration
	asked bool // an ADD is under way
	up    bool
	gone  bool
	tried bool // an ADD failed
	addr  netip.Addr
	req   uint64 // the model's
	onUp  func() // for the scenario; may be nil
}

// world is one run of one model.
type world struct {
	cfg    *Config
	clk    *clock
	cloud  *cloud
	acct   *account
	hosts  []*host // all that ever were
	plan   *rand.Rand
	m      metrics
	new    func(*host) cni
	coming int          // pods that will be scheduled
	tell   func() error // says how far the run is; an error ends it
}

func newWorld(cfg *Config, model func(*host) cni) (*world, error) {
	acct, err := newAccount()
	if err != nil {
		return nil, err
	}
	w := &world{cfg: cfg, clk: &clock{}, acct: acct, plan: rand.New(rand.NewPCG(cfg.Seed, 1)), new: model}
	w.cloud = &cloud{cfg: cfg, clk: w.clk, acct: acct, rng: rand.New(rand.NewPCG(cfg.Seed, 2)), enis: map[vpc.ENIID]*iface{}}
	cidrs, free := cfg.layout()
	for i, cidr := range cidrs {
		s := newSubnet(vpc.SubnetID(w.cloud.newID("subnet")), i%cfg.Zones, cidr, w.cloud.rng)
		for s.free > free[i] { // others were here before
			s.take()
		}
		w.cloud.subnets = append(w.cloud.subnets, s)
	}
	return w, nil
}

// boot starts the n-th node of the plan: zones take turns, and the subnets of
// a zone.
func (w *world) boot(n int) *host {
	h := &host{w: w, id: vpc.InstanceID(w.cloud.newID("i")), subnet: w.cloud.subnets[n%len(w.cloud.subnets)], alive: true}
	h.tags = map[string]string{tagCluster: clusterName, tagInstance: string(h.id)}
	w.hosts = append(w.hosts, h)
	w.m.nodes++
	if w.cloud.launch(h) != ok {
		h.alive = false // EC2 starts no instance without an address
		w.m.unlaunched++
		return h
	}
	h.cni = w.new(h)
	h.cni.boot()
	return h
}

// markReady says that the CNI of h answers.
func (w *world) markReady(h *host) {
	h.ready = true
	early := h.early
	h.early = nil
	for _, p := range early {
		if !p.gone {
			w.ask(p)
		}
	}
}

// scheduleAll puts n new pods on h. The runtime creates their sandboxes one
// after the other.
func (w *world) scheduleAll(h *host, n int) {
	for i := range n {
		w.coming++
		w.clk.after(time.Duration(i)*w.cfg.Apart, func() {
			w.coming--
			w.schedule(h, nil)
		})
	}
}

// schedule puts a new pod on h now; onUp may be nil.
func (w *world) schedule(h *host, onUp func()) {
	p := &pod{host: h, due: w.clk.now, onUp: onUp}
	h.pods = append(h.pods, p)
	w.m.wanted++
	w.m.waiting++
	switch {
	case !h.alive:
	case h.ready:
		w.ask(p)
	default:
		h.early = append(h.early, p)
	}
}

func (w *world) ask(p *pod) {
	p.asked = true
	p.host.cni.add(p)
}

// up ends an ADD with an address.
func (w *world) up(p *pod, a netip.Addr) {
	p.asked, p.up, p.addr = false, true, a
	w.m.up(p, w.clk.now)
	if p.onUp != nil {
		w.clk.after(0, p.onUp)
	}
}

// failed ends an ADD with an error. The kubelet tries again.
func (w *world) failed(p *pod, why string) {
	p.asked = false
	w.m.fail(p, why)
	// wait.Jitter(backOffPeriod, 0.5): pkg/kubelet/pod_workers.go.
	d := w.cfg.Retry + time.Duration(w.cloud.rng.Int64N(int64(w.cfg.Retry)/2+1))
	w.clk.after(d, func() {
		if !p.gone && p.host.alive {
			w.ask(p)
		}
	})
}

// remove deletes a pod.
func (w *world) remove(p *pod) {
	if p.gone {
		return
	}
	p.gone = true
	h := p.host
	for i, o := range h.pods {
		if o == p {
			h.pods[i] = h.pods[len(h.pods)-1]
			h.pods = h.pods[:len(h.pods)-1]
			break
		}
	}
	switch {
	case p.up:
		w.m.used--
		if h.alive {
			h.cni.del(p)
		}
	default:
		w.m.withdrawn++
		w.m.waiting--
		if p.asked && h.alive {
			h.cni.quit(p)
		}
	}
}

// vanish ends a node without a word: its pods are gone, and after a while its
// instance counts as terminated.
func (w *world) vanish(h *host, terminated time.Duration) {
	if !h.alive {
		return
	}
	h.alive = false
	w.m.nodes--
	for len(h.pods) > 0 {
		w.remove(h.pods[len(h.pods)-1])
	}
	w.clk.after(terminated, func() { w.cloud.terminated(h) })
}
