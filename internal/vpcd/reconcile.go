package vpcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
	"github.com/underlay-cni/underlay/internal/vpcd/imds"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// network is what the reconciler needs of a *fabric.Fabric.
type network interface {
	Set(ctx context.Context, c fabric.Config) error
	ListenTCP(eni vpc.ENIID, at netip.AddrPort) (net.Listener, error)
	Counters() (map[vpc.ENIID]fabric.Counters, error)
}

// Where the fabric's namespace answers the instances (package fabric's
// addresses; the ports are IMDS's and vpcd's default).
var (
	imdsAt = netip.AddrPortFrom(fabric.IMDSAddr, 80)
	ec2At  = netip.AddrPortFrom(fabric.EndpointAddr, 7424)
)

// retryAfter is how long after an error the reconciler tries again, and
// lookAgainAfter how long after success.
const (
	retryAfter     = time.Second
	lookAgainAfter = 10 * time.Second
)

// reconciler keeps the fabric and its listeners as the store wants them.
type reconciler struct {
	names      names
	store      *store.Store
	net        network
	mappingLag func() time.Duration
	now        func() time.Time
	log        *slog.Logger
	ec2        *http.Server // serves the EC2 API on every listener
	imds       func(vpc.InstanceID) *imds.Server
	exists     func(netns string) bool // whether a name is there
	internet   func()                  // there is an internet now; may be nil

	changed <-chan struct{} // of the store
	again   chan struct{}   // something else asks for another look; size 1
	due     []time.Time     // when past changes reach a lagging mapping, in order
	open    map[vpc.ENIID]*doors

	mu      sync.Mutex
	applied uint64          // Seq of the newest snapshot that was applied, with or without errors
	mapping *store.State    // whose address mapping the fabric has; nil before the first time
	err     error           // of the last try
	waiters []chan struct{} // closed after the next application
}

// doors are the listeners of one ENI.
type doors struct {
	instance vpc.InstanceID
	imds     *http.Server
	ec2      net.Listener
	shut     chan struct{} // closed when one of the listeners is
}

// Run reconciles until ctx ends.
func (r *reconciler) Run(ctx context.Context) error {
	r.open = map[vpc.ENIID]*doors{}
	defer func() {
		for _, d := range r.open {
			d.close()
		}
	}()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.changed:
		case <-r.again:
		case <-timer.C:
		}
		retry := r.once(ctx)
		timer.Reset(r.next(retry))
	}
}

// lookAgain asks for another look at once.
func (r *reconciler) lookAgain() {
	select {
	case r.again <- struct{}{}:
	default: // one is coming
	}
}

// next is how long to wait for a change before doing it all again.
func (r *reconciler) next(retry bool) time.Duration {
	// Nothing should change the fabric but us; look now and then all the same.
	wait := lookAgainAfter
	if retry {
		wait = retryAfter
	}
	if len(r.due) > 0 {
		wait = min(wait, max(0, r.due[0].Sub(r.now())))
	}
	return wait
}

// once applies the newest snapshot and reports whether it must be done again.
// An instance that cycles its power is applied without its namespace and then
// with it, before anybody who waits is told.
func (r *reconciler) once(ctx context.Context) (retry bool) {
	state, mapping, err := r.apply(ctx)
	for ctx.Err() == nil {
		ready, upErr := r.powerUp(state)
		if !ready || upErr != nil {
			err = errors.Join(err, upErr)
			break
		}
		state, mapping, err = r.apply(ctx)
	}
	if ctx.Err() != nil {
		return false
	}
	r.report(state, mapping, err)
	return err != nil
}

// powerUp ends the power cycles of those instances of state whose namespace is
// gone, and reports whether there were any.
func (r *reconciler) powerUp(state *store.State) (bool, error) {
	var ready []vpc.InstanceID
	for _, i := range state.Instances.All() {
		if i.Power == store.PowerCycle && !r.exists(r.names.instance(i.ID)) {
			ready = append(ready, i.ID)
		}
	}
	if len(ready) == 0 {
		return false, nil
	}
	err := r.store.Update(func(tx *store.Tx) error {
		for _, id := range ready {
			if old := tx.Instance(id); old != nil && old.Power == store.PowerCycle {
				i := *old
				i.Power = store.PowerOn
				tx.PutInstance(&i)
			}
		}
		return nil
	})
	if err != nil {
		return true, fmt.Errorf("end the power cycle of %v: %w", ready, err)
	}
	return true, nil
}

// apply makes the fabric be as the newest snapshot says. It returns the
// snapshot, and the one whose address mapping the fabric now has.
func (r *reconciler) apply(ctx context.Context) (state, mapping *store.State, err error) {
	now := r.now()
	state = r.store.View()
	mapping = state
	if lag := r.mappingLag(); lag > 0 {
		mapping = r.store.At(now.Add(-lag))
		if due := state.Time.Add(lag); due.After(now) && (len(r.due) == 0 || due.After(r.due[len(r.due)-1])) {
			r.due = append(r.due, due)
		}
	}
	for len(r.due) > 0 && !r.due[0].After(now) {
		r.due = r.due[1:]
	}
	config, err := desired(r.names, state, mapping)
	errs := []error{err}
	if err := r.net.Set(ctx, config); err != nil {
		errs = append(errs, fmt.Errorf("set the fabric: %w", err))
	}
	if config.Internet && r.internet != nil {
		r.internet()
	}
	errs = append(errs, r.listen(state, config))
	return state, mapping, errors.Join(errs...)
}

// listen opens and closes listeners so that every interface of an instance has
// both.
func (r *reconciler) listen(state *store.State, c fabric.Config) error {
	want := map[vpc.ENIID]vpc.InstanceID{}
	for _, i := range c.Interfaces {
		if e := state.ENI(i.ID); e.Attachment != nil && e.Attachment.Instance != "" {
			want[i.ID] = e.Attachment.Instance
		}
	}
	for id, d := range r.open {
		// The fabric ends the listeners of an interface that it removes or
		// makes anew.
		if want[id] != d.instance || d.isShut() {
			d.close()
			delete(r.open, id)
		}
	}
	var errs []error
	for id, instance := range want {
		if r.open[id] != nil {
			continue
		}
		d, err := r.openDoors(id, instance)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		r.open[id] = d
	}
	return errors.Join(errs...)
}

func (r *reconciler) openDoors(id vpc.ENIID, instance vpc.InstanceID) (*doors, error) {
	forIMDS, err := r.net.ListenTCP(id, imdsAt)
	if err != nil {
		return nil, fmt.Errorf("listen for IMDS of %s: %w", id, err)
	}
	forEC2, err := r.net.ListenTCP(id, ec2At)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen for EC2 of %s: %w", id, err), forIMDS.Close())
	}
	d := &doors{instance: instance, imds: r.imds(instance).HTTP(), ec2: forEC2, shut: make(chan struct{})}
	var once sync.Once
	serve := func(name string, s *http.Server, l net.Listener) {
		err := s.Serve(l)
		r.log.Debug("listener closed", "eni", id, "service", name, "err", err)
		once.Do(func() { close(d.shut) })
		r.lookAgain()
	}
	go serve("imds", d.imds, forIMDS)
	go serve("ec2", r.ec2, forEC2)
	return d, nil
}

func (d *doors) isShut() bool {
	select {
	case <-d.shut:
		return true
	default:
		return false
	}
}

// close ends the listeners and IMDS's connections. EC2's end with their
// requests, or with the interface.
func (d *doors) close() {
	_ = d.imds.Close() // closes the listener; whether it was open does not matter
	_ = d.ec2.Close()
}

// report publishes the outcome of an application. An error is logged when it is
// new, not at each try.
func (r *reconciler) report(state, mapping *store.State, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case err != nil && (r.err == nil || r.err.Error() != err.Error()):
		r.log.Error("fabric not as wanted", "retry", retryAfter, "err", err)
	case err == nil && r.err != nil:
		r.log.Info("fabric as wanted again")
	}
	r.applied, r.mapping, r.err = state.Seq, mapping, err
	for _, w := range r.waiters {
		close(w)
	}
	r.waiters = nil
}

// problem returns whether the fabric has been set at all yet, and what was
// wrong the last time.
func (r *reconciler) problem() (tried bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mapping != nil, r.err
}

// mapped returns the snapshot whose address mapping is on the wire, or nil when
// none is yet.
func (r *reconciler) mapped() *store.State {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mapping
}

// wait returns when the fabric has been set to the newest snapshot of now
// (address mappings may lag), with what was wrong then, or ctx has ended.
func (r *reconciler) wait(ctx context.Context) error {
	seq := r.store.View().Seq
	for {
		r.mu.Lock()
		if r.mapping != nil && r.applied >= seq {
			err := r.err
			r.mu.Unlock()
			return err
		}
		w := make(chan struct{})
		r.waiters = append(r.waiters, w)
		r.mu.Unlock()
		select {
		case <-w:
		case <-ctx.Done():
			return fmt.Errorf("wait for the fabric: %w", ctx.Err())
		}
	}
}
