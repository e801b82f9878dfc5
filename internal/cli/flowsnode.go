package cli

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/flowlog"
)

// askAgain is how often an agent is asked for new records while they are
// followed: they come once an interval.
const askAgain = time.Second

// nodeFlows are the nodes' agents as a source: what passed each pod's interface,
// traffic between pods of one node included, which the VPC does not see.
func (a *App) nodeFlows(f *labFile) flowSource {
	return func(ctx context.Context, q flowQuery, emit func(flowRecord) error) error {
		errs := make([]error, len(f.Lab.Nodes))
		var wg sync.WaitGroup
		for i, n := range f.Lab.Nodes {
			wg.Go(func() { errs[i] = a.flowsOf(ctx, n, q, emit) })
		}
		wg.Wait()
		for _, err := range errs {
			if err != nil {
				return err
			}
		}
		return nil
	}
}

// flowsOf tells one node's records. A node whose agent does not answer is named
// and left out: what the others know is worth having.
func (a *App) flowsOf(ctx context.Context, n Node, q flowQuery, emit func(flowRecord) error) error {
	client := &agentapi.Client{Socket: n.AgentSocket}
	since, silent := q.since, false
	if q.follow && since.IsZero() {
		since = a.now()
	}
	for {
		flows, err := client.Flows(ctx, agentapi.FlowQuery{Since: since})
		switch {
		case err != nil && ctx.Err() == nil && !silent:
			silent = true
			fmt.Fprintf(a.Err, "the records of %s are missing: %v; see: underlay logs %s%s\n", n.Name, err, n.Name, a.labFlag())
		case err == nil:
			silent = false
			if flows.Omitted > 0 {
				fmt.Fprintf(a.Err, "%s has %d more records than one answer holds\n", n.Name, flows.Omitted)
			}
			for i := range flows.Ended {
				o := &flows.Ended[i]
				if o.End.Compare(since) >= 0 {
					since = o.End.Add(1)
				}
				if err := emitNode(n, q, o, false, emit); err != nil {
					return err
				}
			}
			if q.follow {
				break // the running ones come when their interval has ended
			}
			for i := range flows.Running {
				if err := emitNode(n, q, &flows.Running[i], true, emit); err != nil {
					return err
				}
			}
		}
		if !q.follow {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(askAgain):
		}
	}
}

// emitNode tells a record if it is wanted.
func emitNode(n Node, q flowQuery, o *flowlog.Object, running bool, emit func(flowRecord) error) error {
	switch {
	case o.End.Before(q.since),
		q.eni != "" && o.ENI != q.eni,
		q.action != "" && o.Action != q.action,
		q.address.IsValid() && !q.address.Contains(o.Src) && !q.address.Contains(o.Dst):
		return nil
	}
	return emit(nodeRecord(n, o, running))
}

// nodeRecord is a node's record with the names that the VPC's have.
func nodeRecord(n Node, o *flowlog.Object, running bool) flowRecord {
	r := flowRecord{
		"seen-by": n.Name, "machine": n.Name, "log-status": o.Status,
		"start": float64(o.Start.Unix()), "end": float64(o.End.Unix()),
	}
	text := func(field, v string) {
		if v != "" {
			r[field] = v
		}
	}
	text("interface-id", o.ENI)
	text("instance-id", o.Instance)
	text("subnet-id", o.Subnet)
	text("pod", o.Pod)
	text("namespace", o.Namespace)
	if o.Status != flowlog.OK.String() {
		return r
	}
	text("action", o.Action)
	text("flow-direction", o.Direction)
	text("verdict", o.Verdict)
	text("rule", o.Rule)
	r["packets"], r["bytes"], r["protocol"], r["tcp-flags"] = float64(o.Packets), float64(o.Bytes), float64(o.Protocol), float64(o.TCPFlags)
	r["srcport"], r["dstport"] = float64(o.SrcPort), float64(o.DstPort)
	r["pkt-srcaddr"], r["pkt-dstaddr"] = o.Src.String(), o.Dst.String()
	// The interface's side shows its primary address, as in VPC flow logs.
	side := func(a netip.Addr, own bool) string {
		if own && o.Primary.IsValid() {
			return o.Primary.String()
		}
		return a.String()
	}
	egress := o.Direction == flowlog.Egress.String()
	r["srcaddr"], r["dstaddr"] = side(o.Src, egress), side(o.Dst, !egress)
	if o.Action == "REJECT" {
		text("refused-by", o.Rule)
	}
	if running {
		r["running"] = true
	}
	return r
}
