package api

import (
	"cmp"
	"context"
	"slices"

	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func (a *API) powerHandlers(h map[string]query.Handler) {
	h["StopInstances"] = handle("StopInstances", "InstanceId Force", a.stopInstances)
	h["StartInstances"] = handle("StartInstances", "InstanceId", a.startInstances)
	h["RebootInstances"] = handle("RebootInstances", "InstanceId", a.rebootInstances)
	h["TerminateInstances"] = handle("TerminateInstances", "InstanceId", a.terminateInstances)
}

// userShutdown is the reason of a state that somebody asked for.
const userShutdown = "Client.UserInitiatedShutdown"

// changeState runs change on the named instances, all or none, in the order of
// their ids. change returns whether it changed the instance that it was given.
func (a *API) changeState(ids []string, change func(i *store.Instance) (bool, error)) ([]query.InstanceStateChange, error) {
	var out []query.InstanceStateChange
	_, err := a.update(func(tx *store.Tx) error {
		items, err := a.fresh(&tx.State).instancesFor(ids)
		if err != nil {
			return err
		}
		var all []*store.Instance
		for _, i := range items {
			all = append(all, i)
		}
		slices.SortFunc(all, func(x, y *store.Instance) int { return cmp.Compare(x.ID, y.ID) })
		for _, old := range all {
			i := *old
			changed, err := change(&i)
			if err != nil {
				return err
			}
			if changed {
				tx.PutInstance(&i)
				if err := settlePublicOf(tx, i.ID, a.now()); err != nil {
					return err
				}
			}
			out = append(out, query.InstanceStateChange{
				InstanceId: text(i.ID), CurrentState: instanceState(i.State), PreviousState: instanceState(old.State),
			})
		}
		return nil
	})
	return out, err
}

// notFrom answers a change for which an instance is in the wrong state.
func notFrom(i *store.Instance, done string) error {
	return query.Errorf("IncorrectInstanceState", "The instance '%s' is not in a state from which it can be %s: it is '%s'.", i.ID, done, i.State)
}

func (a *API) terminateInstances(_ context.Context, req *query.TerminateInstancesRequest) (*query.TerminateInstancesResponse, error) {
	out, err := a.changeState(req.InstanceId, func(i *store.Instance) (bool, error) {
		if i.State == store.Terminated || i.State == store.ShuttingDown {
			return false, nil
		}
		if i.TerminationLocked {
			return false, query.Errorf("OperationNotPermitted", "The instance '%s' may not be terminated. Modify its 'disableApiTermination' instance attribute and try again.", i.ID)
		}
		i.State, i.Due, i.Reason = store.ShuttingDown, a.due(a.now()), userShutdown
		return true, nil
	})
	if err != nil {
		return nil, err
	}
	return &query.TerminateInstancesResponse{InstancesSet: out}, nil
}

// stopInstances takes the network namespace from instances; interfaces stay
// attached and keep their addresses. The namespace goes when the instance is
// stopped, with Force at once: power is cut.
func (a *API) stopInstances(_ context.Context, req *query.StopInstancesRequest) (*query.StopInstancesResponse, error) {
	out, err := a.changeState(req.InstanceId, func(i *store.Instance) (bool, error) {
		force := deref(req.Force)
		switch i.State {
		case store.Running:
			if i.StopLocked {
				return false, query.Errorf("OperationNotPermitted", "The instance '%s' may not be stopped. Modify its 'disableApiStop' instance attribute and try again.", i.ID)
			}
			i.State, i.Due, i.Reason = store.Stopping, a.due(a.now()), userShutdown
		case store.Stopping:
			if !force || i.Power == store.PowerOff {
				return false, nil
			}
		case store.Stopped:
			return false, nil
		default:
			return false, notFrom(i, "stopped")
		}
		if force {
			i.Power = store.PowerOff
		}
		return true, nil
	})
	if err != nil {
		return nil, err
	}
	return &query.StopInstancesResponse{InstancesSet: out}, nil
}

func (a *API) startInstances(_ context.Context, req *query.StartInstancesRequest) (*query.StartInstancesResponse, error) {
	out, err := a.changeState(req.InstanceId, func(i *store.Instance) (bool, error) {
		switch i.State {
		case store.Stopped:
		case store.Pending, store.Running:
			return false, nil
		default:
			return false, notFrom(i, "started")
		}
		// The namespace of before may still be there when the start follows the
		// stop at once.
		now := a.now()
		i.State, i.Due, i.Reason, i.Launched, i.Power = store.Pending, a.due(now), "", now, store.PowerCycle
		return true, nil
	})
	if err != nil {
		return nil, err
	}
	return &query.StartInstancesResponse{InstancesSet: out}, nil
}

// rebootInstances gives instances a new network namespace. As on EC2 their
// state does not tell.
func (a *API) rebootInstances(_ context.Context, req *query.RebootInstancesRequest) (*query.RebootInstancesResponse, error) {
	_, err := a.changeState(req.InstanceId, func(i *store.Instance) (bool, error) {
		if i.State != store.Running {
			return false, notFrom(i, "rebooted")
		}
		i.Power = store.PowerCycle
		return true, nil
	})
	return nil, err
}
