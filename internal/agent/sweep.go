package agent

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/underlay-cni/underlay/internal/ec2"
	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// sweepGrace is how old an interface must be before it may be what a dead node
// left: longer than EC2 takes to list a new instance to everybody.
const sweepGrace = 5 * time.Minute

// sweep deletes, every Options.Sweep until ctx ends, what dead nodes of the
// cluster left: interfaces with the cluster's tag that are attached nowhere and
// were made for an instance that is gone. Those of living nodes are their own
// agents' business. One agent of a cluster does it for all.
func (a *Agent) sweep(ctx context.Context, client EC2, own vpc.InstanceID) {
	seen := map[vpc.ENIID]bool{}
	for {
		t := time.NewTimer(a.opts.Sweep*3/4 + rand.N(a.opts.Sweep/2+1))
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		var err error
		if seen, err = a.sweepOnce(ctx, client, own, seen); err != nil && ctx.Err() == nil {
			a.incident("sweep", stable(err))
		}
	}
}

// sweepOnce deletes the leavings that were there in the round before as well,
// and returns those of this round.
func (a *Agent) sweepOnce(ctx context.Context, client EC2, own vpc.InstanceID, before map[vpc.ENIID]bool) (map[vpc.ENIID]bool, error) {
	enis, err := client.Detached(ctx, ipam.TagCluster, a.opts.Cluster)
	a.metrics.call("describe-detached", err)
	if err != nil {
		return before, err
	}
	old := enis[:0]
	var instances []vpc.InstanceID
	for _, e := range enis {
		if of := leftBy(&e, time.Now()); of != "" && of != own {
			old = append(old, e)
			instances = append(instances, of)
		}
	}
	if len(old) == 0 {
		return nil, nil
	}
	alive, err := client.Alive(ctx, instances)
	a.metrics.call("describe-instances", err)
	if err != nil {
		return before, err
	}
	seen := map[vpc.ENIID]bool{}
	for i, e := range old {
		if !alive[instances[i]] {
			seen[e.ID] = true
		}
	}
	var errs []error
	for i, e := range old {
		if !seen[e.ID] || !before[e.ID] {
			continue
		}
		err := client.DeleteInterface(ctx, e.ID, "")
		a.metrics.call("delete", err)
		if err == nil {
			delete(seen, e.ID)
			a.log.Info("interface of a dead node deleted", "eni", e.ID, "node", instances[i], "op", "sweep")
			continue
		}
		errs = append(errs, err)
		if _, class := ec2.Outcome(err); class == ipam.ClassThrottled || class == ipam.ClassDenied {
			break // the others would fare no better
		}
	}
	return seen, errors.Join(errs...)
}

// leftBy returns the instance that a detached interface was made for, if the
// interface is old enough to be judged; "" if it is nobody's to delete.
func leftBy(e *vpc.ENI, now time.Time) vpc.InstanceID {
	made, err := time.Parse(time.RFC3339, e.Tags[tagCreated])
	if err != nil || now.Sub(made) < sweepGrace || e.RequesterOwned || e.Instance != "" || e.Tags[ipam.TagNoManage] == "true" {
		return ""
	}
	return vpc.InstanceID(e.Tags[ipam.TagInstance])
}
