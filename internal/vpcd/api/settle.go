package api

import (
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// terminatedFor is how long a terminated instance is still described (EC2 user
// guide: "a short while", about an hour).
const terminatedFor = time.Hour

// Settle finishes what is due: attachments, instances, NAT gateways and peering
// connections whose transition ends now or before. Run calls it; it changes nothing when nothing is due.
func (a *API) Settle() error {
	now := a.now()
	if at, ok := a.store.View().NextDue(); !ok || at.After(now) {
		return nil
	}
	return a.store.Update(func(tx *store.Tx) error {
		for _, id := range tx.DueBy(now) {
			if e := tx.ENI(vpc.ENIID(id)); e != nil {
				settleAttachment(tx, e)
			} else if i := tx.Instance(vpc.InstanceID(id)); i != nil {
				if err := settleInstance(tx, i, now); err != nil {
					return err
				}
			} else if n := tx.NAT(vpc.NATGatewayID(id)); n != nil {
				settleNAT(tx, n, now)
			} else if p := tx.Peering(vpc.PeeringID(id)); p != nil {
				settlePeering(tx, p, now)
			}
		}
		return nil
	})
}

// forget drops client tokens that are too old to matter.
func (a *API) forget() error {
	now := a.now()
	return a.store.Update(func(tx *store.Tx) error {
		tx.ForgetTokens(func(t *store.Token) bool { return now.Sub(t.Created) > tokenLifetime })
		return nil
	})
}

func settleAttachment(tx *store.Tx, old *store.ENI) {
	e := *old
	if at := *old.Attachment; at.Status == store.Attaching {
		at.Status, at.Due = store.Attached, time.Time{}
		e.Attachment = &at
	} else {
		e.Attachment = nil
	}
	tx.PutENI(&e)
}

func settleInstance(tx *store.Tx, old *store.Instance, now time.Time) error {
	i := *old
	switch old.State {
	case store.Pending:
		i.State, i.Due = store.Running, time.Time{}
	case store.ShuttingDown:
		i.State, i.Due = store.Terminated, now.Add(terminatedFor)
		if err := release(tx, i.ID, now); err != nil {
			return err
		}
	case store.Terminated:
		tx.DeleteInstance(i.ID)
		return nil
	case store.Stopping:
		i.State, i.Due, i.Power = store.Stopped, time.Time{}, store.PowerOff
	case store.Running, store.Stopped:
		i.Due = time.Time{}
	}
	tx.PutInstance(&i)
	return settlePublicOf(tx, i.ID, now)
}

// release takes the interfaces from an instance that is gone.
func release(tx *store.Tx, id vpc.InstanceID, now time.Time) error {
	var held []*store.ENI
	for e := range tx.InterfacesOf(id) {
		held = append(held, e)
	}
	for _, old := range held {
		if old.Attachment.DeleteOnTermination {
			tx.DeleteENI(old.ID)
			continue
		}
		e := *old
		e.Attachment = nil
		tx.PutENI(&e)
		if err := settlePublic(tx, e.ID, now); err != nil {
			return err
		}
	}
	return nil
}
