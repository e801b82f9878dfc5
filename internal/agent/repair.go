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
	o.spawn(func() { a.survey(ctx) })
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
				a.survey(ctx)
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

// Peers come and go by people's hands. Few have public addresses, which alone
// matter; thousands of nodes must not spend the account's calls on them.
const (
	peersEvery = time.Hour
	peersAgain = 10 * time.Minute // after an error
)

// followPeers keeps the datapath's knowledge of peered VPCs until ctx ends. Where
// calls are short, what ADDs wait for comes first.
func (a *Agent) followPeers(ctx context.Context, client EC2) {
	select {
	case <-a.ready:
	case <-ctx.Done():
		return
	}
	for {
		a.mu.Lock()
		id := a.identity.VPC
		a.mu.Unlock()
		wait := peersEvery
		cidrs, err := client.PeerCIDRs(ctx, id)
		if err == nil {
			err = a.opts.Datapath.SetPeers(ctx, cidrs)
		}
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			wait = peersAgain
			a.incident("peers", err.Error()+"; pods speak to peered VPCs with public ranges by the node's address, unless --snat-exclude names them")
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}

// survey looks at what changes around the node without a word: the VPC's ranges,
// and what others on the node let through.
func (a *Agent) survey(ctx context.Context) {
	a.mu.Lock()
	mac := a.identity.MAC
	a.mu.Unlock()
	cidrs, err := a.opts.Metadata.VPCCIDRs(ctx, mac)
	if err == nil {
		err = a.opts.Datapath.SetVPC(ctx, cidrs)
	}
	switch {
	case err != nil && ctx.Err() == nil:
		a.incident("vpc", err.Error()+"; the VPC's ranges stay as they were known")
	case err == nil:
		a.mu.Lock()
		a.identity.VPCCIDRs = cidrs
		a.mu.Unlock()
	}
	obstacle, err := a.opts.Datapath.Obstacle()
	if err != nil {
		obstacle = "what others on the node let through is not known: " + err.Error()
	}
	if obstacle != "" {
		a.incident("forwarding", obstacle)
	}
}
