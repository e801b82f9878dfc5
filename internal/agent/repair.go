package agent

import (
	"context"
	"fmt"
	"time"
)

const (
	// repairEvery is how often the interfaces' configuration is looked at
	// although nothing was heard: what happens to nftables is not.
	repairEvery = 30 * time.Second
	// repairSettle lets whoever changes things finish, and takes a burst of
	// changes (cloud-init, systemd-networkd) for one.
	repairSettle = 50 * time.Millisecond
)

// repair keeps rules, routes and addresses of the interfaces as the datapath
// made them, whoever else on the node changes them, and tells the plan which
// addresses others have configured, until ctx ends. It returns an error when
// another agent has come that hands out the node's addresses.
func (a *Agent) repair(ctx context.Context, o *owner) error {
	changed := make(chan struct{}, 1)
	o.spawn(func() {
		err := a.opts.Datapath.Watch(ctx, func() {
			select {
			case changed <- struct{}{}:
			default: // one is pending already
			}
		})
		if err != nil && ctx.Err() == nil {
			a.incident("watch", err.Error()+"; repairs now wait for the next look, every "+repairEvery.String())
		}
	})
	select {
	case <-a.ready: // until then the start itself configures the interfaces
	case <-ctx.Done():
		return nil
	}
	tick := time.NewTicker(repairEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if err := a.rival(ctx); err != nil {
				return fmt.Errorf("%w: %w", errRival, err)
			}
		case <-changed:
			settle := time.NewTimer(repairSettle)
			select {
			case <-ctx.Done():
			case <-settle.C:
			}
			settle.Stop()
		}
		a.tell(ctx, func(o *owner) {
			links := o.links()
			o.spawn(func() {
				ev, err := o.observeLinks(links)
				if err != nil {
					if ctx.Err() == nil {
						a.incident("repair", err.Error())
					}
					return
				}
				a.tell(ctx, func(o *owner) { o.step(ev) })
			})
		})
	}
}
