package agent

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/ec2"
	"github.com/underlay-cni/underlay/internal/groups"
	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// tagCreated is when an interface was made, for those who sweep.
const tagCreated = "node.k8s.amazonaws.com/createdAt"

// outcome is that of a call of ours, or of one that a poller made for us.
func outcome(err error) (ipam.Outcome, ipam.Class) {
	var elsewhere *groups.Error
	if errors.As(err, &elsewhere) {
		return ipam.Refused, elsewhere.Class
	}
	return ec2.Outcome(err)
}

// cause shortens an SDK error to what EC2 said.
func cause(err error) string {
	msg := err.Error()
	if i := strings.LastIndex(msg, "api error "); i >= 0 {
		return msg[i+len("api error "):]
	}
	return msg
}

// call makes one mutation beside the owner and posts how it ended.
func (o *owner) call(act ipam.Action) {
	var (
		id   ipam.CallID
		name string
		run  func(context.Context, *ipam.CallDone) error
	)
	attrs := []any{}
	switch act := act.(type) {
	case ipam.AssignAddresses:
		id, name, attrs = act.Call, "assign", []any{"eni", act.ENI, "n", act.N}
		run = func(ctx context.Context, d *ipam.CallDone) (err error) {
			d.Addrs, err = o.ec2.AssignAddresses(ctx, act.ENI, act.N)
			return err
		}
	case ipam.AssignPrefixes:
		id, name, attrs = act.Call, "assign-prefixes", []any{"eni", act.ENI, "n", act.N}
		run = func(ctx context.Context, d *ipam.CallDone) (err error) {
			d.Prefixes, err = o.ec2.AssignPrefixes(ctx, act.ENI, act.N)
			return err
		}
	case ipam.Unassign:
		id, name, attrs = act.Call, "unassign", []any{"eni", act.ENI, "n", len(act.Addrs), "prefixes", len(act.Prefixes)}
		run = func(ctx context.Context, _ *ipam.CallDone) error {
			return o.ec2.Unassign(ctx, act.ENI, act.Addrs, act.Prefixes)
		}
	case ipam.CreateENI:
		id, name, attrs = act.Call, "create", []any{"subnet", act.Subnet, "device", act.Device, "n", act.N}
		n := o.newInterface(act)
		run = func(ctx context.Context, d *ipam.CallDone) error {
			e, err := o.ec2.CreateInterface(ctx, n)
			d.ENI = &e
			return err
		}
	case ipam.AttachENI:
		id, name, attrs = act.Call, "attach", []any{"eni", act.ENI, "device", act.Device}
		instance := o.state.Config.Instance
		run = func(ctx context.Context, d *ipam.CallDone) error {
			att, err := o.ec2.AttachInterface(ctx, act.ENI, instance, act.Device)
			d.ENI = &vpc.ENI{ID: act.ENI, Attachment: att}
			return err
		}
	case ipam.SetDeleteOnTermination:
		id, name, attrs = act.Call, "set-delete-on-termination", []any{"eni", act.ENI}
		run = func(ctx context.Context, _ *ipam.CallDone) error {
			return o.ec2.SetDeleteOnTermination(ctx, act.ENI, act.Attachment)
		}
	case ipam.DeleteENI:
		id, name, attrs = act.Call, "delete", []any{"eni", act.ENI}
		links := o.links() // without this one, which retires
		run = func(ctx context.Context, _ *ipam.CallDone) error {
			if _, err := o.setENIs(links); err != nil {
				return err
			}
			return o.ec2.DeleteInterface(ctx, act.ENI, act.Attachment)
		}
	default:
		return
	}
	o.spawn(func() {
		began := time.Now()
		done := ipam.CallDone{Call: id}
		err := run(o.ctx, &done)
		if err != nil && o.ctx.Err() != nil {
			return // the agent ends; the next one asks EC2
		}
		o.a.metrics.call(name, err)
		done.At = time.Now()
		attrs = append([]any{"op", name, "ms", time.Since(began).Milliseconds()}, attrs...)
		if err != nil {
			done.ENI, done.Addrs, done.Prefixes = nil, nil, nil
			done.Outcome, done.Class = outcome(err)
			done.Err = cause(err)
			o.a.incident("ec2 "+name, stable(err))
			o.a.log.Debug("ec2 call ended", append(attrs, "err", err)...)
		} else {
			o.a.log.Info("ec2 call done", attrs...)
		}
		o.a.tell(o.ctx, func(o *owner) { o.step(done) })
	})
}

func (o *owner) newInterface(act ipam.CreateENI) ec2.NewInterface {
	n := ec2.NewInterface{
		Subnet: act.Subnet, Groups: act.Groups, Token: act.Token,
		Description: "Underlay: pods of " + string(o.state.Config.Instance),
		// The same for each repetition: the token stands for all parameters.
		Tags: map[string]string{ipam.TagCluster: o.state.Config.Cluster, ipam.TagInstance: string(o.state.Config.Instance), tagCreated: act.Created.UTC().Format(time.RFC3339)},
	}
	if act.Pool.Groups != "" {
		n.Tags[ipam.TagPool] = string(act.Pool.Groups)
	}
	if act.Prefixes {
		n.Prefixes = act.N
	} else {
		n.Addresses = act.N
	}
	return n
}

// stable returns an error's text without what differs from call to call, so
// that equal errors are counted and not repeated.
func stable(err error) string {
	msg := err.Error()
	if i := strings.Index(msg, "RequestID: "); i >= 0 {
		rest := msg[i:]
		if j := strings.Index(rest, ", "); j >= 0 {
			msg = msg[:i] + rest[j+2:]
		}
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return "no answer in time: " + msg
	}
	return msg
}
