package datapath

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
)

// reapDelay is how long a deleted endpoint's device may wait for others to go
// with it. The kernel deletes fifty in hardly more time than one, some 18 ms,
// and for all of it nobody else gets rtnetlink's lock, other pods' ADD and DEL
// included: a stream of DELs leaves most of the time to them.
const reapDelay = 100 * time.Millisecond

// remains is what is left of an endpoint when nothing passes it any more and
// no route leads to it: the device, the programs' pins, the counters.
type remains struct {
	name     string
	index    int           // of the device, reserved until then; 0: it is known by its name alone
	counters int           // index of the entry in `iface_stats`; 0: none
	done     chan struct{} // closed when it is over
	err      error         // valid then
}

// startReaper starts the goroutine that removes remains. It ends with Close.
func (d *Datapath) startReaper() {
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		d.reap(stop)
	}()
	d.stopReaper = sync.OnceFunc(func() { close(stop); <-ended })
}

// reap removes remains as they come, several at once, until stop is closed and
// nothing is left.
func (d *Datapath) reap(stop <-chan struct{}) {
	for {
		stopping := false
		select {
		case <-d.wake:
			t := time.NewTimer(reapDelay)
			select {
			case <-t.C:
			case <-d.urgent:
			case <-stop:
			}
			t.Stop()
		case <-stop:
			stopping = true
		}
		d.mu.Lock()
		batch := d.doomed[:len(d.doomed):len(d.doomed)]
		d.mu.Unlock()
		d.remove(batch)
		d.mu.Lock()
		d.doomed = d.doomed[len(batch):] // those that came meanwhile stay
		d.mu.Unlock()
		for _, r := range batch {
			if r.err != nil {
				d.log.Warn("remains of a deleted endpoint are left until DEL comes again or the agent starts", "link", r.name, "op", "del", "err", r.err)
			}
			close(r.done)
		}
		if stopping && len(batch) == 0 {
			return
		}
	}
}

// doom hands remains to the reaper.
func (d *Datapath) doom(r *remains) *remains {
	r.done = make(chan struct{})
	d.mu.Lock()
	d.doomed = append(d.doomed, r)
	d.mu.Unlock()
	signal(d.wake)
	return r
}

// signal wakes who waits on a channel of size 1, or who will.
func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// awaitReaped waits until the remains that are doomed now are gone: those of
// the host interface name, or all when it is empty. It returns how many there
// were.
func (d *Datapath) awaitReaped(ctx context.Context, name string) (int, error) {
	d.mu.Lock()
	var await []*remains
	for _, r := range d.doomed {
		if name == "" || r.name == name {
			await = append(await, r)
		}
	}
	d.mu.Unlock()
	for _, r := range await {
		signal(d.urgent)
		select {
		case <-r.done:
		case <-ctx.Done():
			return len(await), fmt.Errorf("wait until deleted endpoints are gone: %w", ctx.Err())
		}
	}
	return len(await), nil
}

// isDoomed reports whether remains of a host interface wait to be removed.
func (d *Datapath) isDoomed(name string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, r := range d.doomed {
		if r.name == name {
			return true
		}
	}
	return false
}

// deleteLink deletes the device of that name now, together with what else is
// doomed; if there is none, that is no error.
func (d *Datapath) deleteLink(name string) error {
	return d.deleteLinks([]string{name})
}

// deleteLinks is deleteLink of several.
func (d *Datapath) deleteLinks(names []string) error {
	all := make([]*remains, len(names))
	for i, name := range names {
		all[i] = d.doom(&remains{name: name})
	}
	signal(d.urgent)
	var errs []error
	for _, r := range all {
		<-r.done // the reaper never waits for us
		errs = append(errs, r.err)
	}
	return errors.Join(errs...)
}

// remove removes remains from the kernel; each one's error is set.
func (d *Datapath) remove(batch []*remains) {
	err := d.removeLinks(batch)
	for _, r := range batch {
		r.err = errors.Join(err, d.reach(context.Background(), "gone from links"), d.hooks.forget(device{name: r.name, programs: podPrograms}))
		if r.counters != 0 {
			r.err = errors.Join(r.err, d.deleteCounters(r.counters))
		}
		if r.index != 0 {
			d.releaseIndex(r.index)
		}
	}
}

// removeLinks deletes the devices of remains, several in one group.
func (d *Datapath) removeLinks(batch []*remains) error {
	var b nl.Batch
	one := len(batch) == 1
	for _, r := range batch {
		switch {
		case one && r.index != 0:
			b.LinkDeleteIndex(r.index)
		case one:
			b.LinkDelete(r.name)
		case r.index != 0:
			b.LinkGroupIndex(r.index, dyingGroup)
		default:
			b.LinkGroup(r.name, dyingGroup)
		}
		b.Tolerate(unix.ENODEV) // gone, as with the pod's network namespace
	}
	if len(batch) > 1 {
		b.LinkDeleteGroup(dyingGroup)
		b.Tolerate(unix.ENODEV)
	}
	return d.slow.Exec(&b)
}
