package sim

import (
	"context"
	"fmt"
	"math"
	"time"
)

// Progress is how far a run is.
type Progress struct {
	Model   string
	Warming bool          // the cluster comes up, the scenario has not begun
	Now     time.Duration // since the start of the run
	Up      int           // pods
	Waiting int           // pods
	Events  uint64
}

// Report is what a simulation found. Equal configurations give equal reports.
type Report struct {
	Config   Config    `json:"config"`
	Minimum  *Minimum  `json:"minimum,omitempty"`
	Outcomes []Outcome `json:"outcomes"`
}

// The models' names.
const (
	Underlay  = "Underlay"
	AWSVPCCNI = "AWS VPC CNI"
)

// Run simulates cfg. From time to time it calls progress, which may be nil.
func Run(ctx context.Context, cfg Config, progress func(Progress)) (*Report, error) {
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	r := &Report{Config: cfg, Minimum: cfg.minimum()}
	models := []string{Underlay}
	if cfg.Compare {
		models = append(models, AWSVPCCNI)
	}
	for _, model := range models {
		w, err := runModel(ctx, &cfg, model, progress)
		if err != nil {
			return nil, fmt.Errorf("simulate %s: %w", model, err)
		}
		r.Outcomes = append(r.Outcomes, w.outcome(model))
	}
	return r, nil
}

func runModel(ctx context.Context, cfg *Config, model string, progress func(Progress)) (*world, error) {
	makes := map[string]func(*host) cni{Underlay: newAgent, AWSVPCCNI: newAWS}
	w, err := newWorld(cfg, makes[model])
	if err != nil {
		return nil, err
	}
	if progress == nil {
		progress = func(Progress) {}
	}
	w.tell = func() error {
		progress(Progress{Model: model, Warming: !w.m.running, Now: w.clk.now, Up: w.m.used, Waiting: w.m.waiting, Events: w.clk.ran})
		return context.Cause(ctx)
	}
	var done func() bool
	switch cfg.Scenario {
	case Rollout, Exhaustion:
		done = w.rollout()
	case Burst:
		err = w.warm(0)
		done = w.burst()
	case Wave:
		err = w.warm(cfg.PodsPerNode)
		done = w.wave()
	case Churn:
		err = w.warm(cfg.PodsPerNode)
		done = w.churn()
	case ZoneLoss:
		err = w.warm(cfg.PodsPerNode)
		done = w.zoneLoss()
	}
	if err != nil {
		return nil, err
	}
	if _, err = w.until(w.m.start+cfg.Limit, func() bool { return done() && w.m.waiting+w.coming == 0 }); err != nil {
		return nil, err
	}
	if w.clk.now < w.m.start+cfg.Limit {
		_, err = w.until(w.clk.now+cfg.Settle, nil)
	}
	return w, err
}

// until lets time pass until t, or until cond holds (nil: never), and reports
// whether it did.
func (w *world) until(t time.Duration, cond func() bool) (bool, error) {
	for {
		if cond != nil && cond() {
			return true, nil
		}
		if len(w.clk.heap) == 0 || w.clk.heap[0].at > t {
			w.clk.now = t
			return false, nil
		}
		if w.clk.ran%8192 == 0 {
			if err := w.tell(); err != nil {
				return false, err
			}
		}
		w.clk.step()
	}
}

const (
	warmOver  = 10 * time.Second // over which the nodes of a standing cluster booted
	warmQuiet = 7 * time.Minute  // longer than either model keeps surplus
)

// warm brings a cluster up with pods on each node, without throttling, and
// lets it settle.
func (w *world) warm(pods int) error {
	n := w.cfg.Nodes
	for i := range n {
		w.clk.after(warmOver*time.Duration(i)/time.Duration(n), func() {
			h := w.boot(i)
			w.scheduleAll(h, pods)
		})
	}
	up, err := w.until(time.Hour, func() bool { return w.m.nodes == n && w.m.waiting == 0 && w.m.used == n*pods })
	if err != nil {
		return err
	}
	if !up {
		return fmt.Errorf("bring the cluster up before the scenario: %d of %d pods got an address within an hour; use larger subnets (--subnet, --subnets)", w.m.used, n*pods)
	}
	_, err = w.until(w.clk.now+warmQuiet, nil)
	return err
}

// rollout boots the nodes one after the other; the pods of each come a while
// later.
func (w *world) rollout() (done func() bool) {
	w.begin()
	n, booted := w.cfg.Nodes, 0
	for i := range n {
		w.clk.after(w.cfg.BootOver*time.Duration(i)/time.Duration(n), func() {
			h := w.boot(i)
			w.clk.after(w.cfg.ReadyAfter, func() {
				booted++
				w.scheduleAll(h, w.cfg.PodsPerNode)
			})
		})
	}
	return func() bool { return booted == n }
}

// burst gives every node all its pods at once.
func (w *world) burst() (done func() bool) {
	w.begin()
	for _, h := range w.hosts {
		w.scheduleAll(h, w.cfg.PodsPerNode)
	}
	return func() bool { return true }
}

// shuffled returns the hosts that are alive in an order that the seed gives.
func (w *world) shuffled() []*host {
	var hosts []*host
	for _, h := range w.hosts {
		if h.alive {
			hosts = append(hosts, h)
		}
	}
	w.plan.Shuffle(len(hosts), func(i, j int) { hosts[i], hosts[j] = hosts[j], hosts[i] })
	return hosts
}

// wave replaces a share of the pods as one Deployment does with its defaults:
// a quarter more pods than wanted at the most, rounded up, and a quarter fewer
// that are available, rounded down.
func (w *world) wave() (done func() bool) {
	w.begin()
	hosts := w.shuffled()
	var old []*pod
	for _, h := range hosts {
		old = append(old, h.pods...)
	}
	w.plan.Shuffle(len(old), func(i, j int) { old[i], old[j] = old[j], old[i] })
	n := max(1, int(math.Round(w.cfg.Share*float64(len(old)))))
	old = old[:n]
	surge, unavailable := (n+3)/4, n/4
	created, ready, next := 0, 0, 0
	room := func() *host {
		for range hosts {
			h := hosts[next%len(hosts)]
			next++
			if len(h.pods) < w.cfg.maxPods() && len(h.pods) < w.cfg.capacity() {
				return h
			}
		}
		return nil
	}
	var move func()
	move = func() {
		for len(old) > 0 && len(old)+ready > n-unavailable {
			w.remove(old[0])
			old = old[1:]
		}
		for created < n && len(old)+created < n+surge {
			h := room()
			if h == nil {
				break
			}
			created++
			w.schedule(h, func() { ready++; move() })
		}
	}
	move()
	return func() bool { return created == n && len(old) == 0 }
}

// churn replaces a share of the nodes, evenly over time: another boots, and
// when it is ready the old one vanishes and its pods are made anew there.
func (w *world) churn() (done func() bool) {
	w.begin()
	place := map[*host]int{}
	for i, h := range w.hosts {
		place[h] = i
	}
	leaving := w.shuffled()
	leaving = leaving[:max(1, int(math.Round(w.cfg.Share*float64(len(leaving)))))]
	left := len(leaving)
	for i, old := range leaving {
		w.clk.after(w.cfg.Over*time.Duration(i)/time.Duration(len(leaving)), func() {
			h := w.boot(place[old])
			w.clk.after(w.cfg.ReadyAfter, func() {
				left--
				pods := len(old.pods)
				w.vanish(old, w.cfg.Terminated)
				w.scheduleAll(h, pods)
			})
		})
	}
	return func() bool { return left == 0 }
}

// zoneLoss ends every node of the first zone; the pods are made anew on the
// others, evenly.
func (w *world) zoneLoss() (done func() bool) {
	w.begin()
	lost := 0
	for _, h := range w.hosts {
		if h.subnet.zone == 0 {
			lost += len(h.pods)
			w.vanish(h, w.cfg.Terminated)
		}
	}
	hosts := w.shuffled()
	for i, h := range hosts {
		w.scheduleAll(h, (lost+len(hosts)-1-i)/len(hosts))
	}
	return func() bool { return true }
}
