package api

import (
	"context"
	"fmt"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// maxDeviceIndex bounds device indices: no instance type has so many
// interfaces on one card.
const maxDeviceIndex = 255

func noAttachment(id string) error {
	return query.Errorf("InvalidAttachmentID.NotFound", "The attachment ID '%s' does not exist", id)
}

func inUse(id vpc.ENIID) error {
	return query.Errorf("InvalidNetworkInterface.InUse", "Interface: [%s] in use.", id)
}

// cardLimit returns how many interfaces a network card of the type holds. The
// published numbers are those of the whole instance and of card 0; the other
// cards share the rest evenly.
func cardLimit(l vpc.InstanceLimits, card int) int {
	switch {
	case card == 0 && l.ENIsDefaultCard > 0:
		return l.ENIsDefaultCard
	case card == 0 || l.NetworkCards < 2:
		return l.ENIs
	default:
		return (l.ENIs - l.ENIsDefaultCard) / (l.NetworkCards - 1)
	}
}

// fits returns an error unless an interface may be attached at a place of an
// instance of the type that has held interfaces, heldOnCard of them on the
// card.
func fits(l vpc.InstanceLimits, held, heldOnCard, card, device int) error {
	switch {
	case card < 0 || card >= max(1, l.NetworkCards):
		return query.Errorf("InvalidParameterValue", "The network card index %d is not valid for %s, which has %d", card, l.Type, max(1, l.NetworkCards))
	case device < 0 || device > maxDeviceIndex:
		return query.Errorf("InvalidParameterValue", "The device index %d is not valid", device)
	case held+1 > l.ENIs:
		return query.Errorf("AttachmentLimitExceeded", "Interface count %d exceeds the limit for %s", held+1, l.Type)
	case heldOnCard+1 > cardLimit(l, card):
		return query.Errorf("AttachmentLimitExceeded", "Interface count %d on network card %d exceeds the limit for %s", heldOnCard+1, card, l.Type)
	}
	return nil
}

// attachmentOf makes an attachment that ends its attaching when the attach
// latency has passed.
func (a *API) attachmentOf(i vpc.InstanceID, card, device int, deleteOnTermination bool) *store.Attachment {
	now := a.now()
	return &store.Attachment{
		ID: vpc.AttachmentID(vpc.NewID("eni-attach")), Instance: i, InstanceOwner: a.account,
		DeviceIndex: device, NetworkCard: card, Status: store.Attaching, Since: now, Due: a.due(now), DeleteOnTermination: deleteOnTermination,
	}
}

// due returns when what begins now is finished.
func (a *API) due(now time.Time) time.Time { return now.Add(a.chaos.Get().AttachLatency) }

func (a *API) attachNetworkInterface(_ context.Context, req *query.AttachNetworkInterfaceRequest) (*query.AttachNetworkInterfaceResponse, error) {
	card, device := int(deref(req.NetworkCardIndex)), int(*req.DeviceIndex)
	var at *store.Attachment
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findENI(&tx.State, *req.NetworkInterfaceId)
		if err != nil {
			return err
		}
		i, err := findInstance(&tx.State, *req.InstanceId)
		if err != nil {
			return err
		}
		if old.Attachment != nil {
			return inUse(old.ID)
		}
		if i.State != store.Running && i.State != store.Stopped {
			return query.Errorf("IncorrectState", "Instance '%s' is not 'running' or 'stopped'; it is '%s'.", i.ID, i.State)
		}
		if old.Zone != i.Zone {
			return query.Errorf("InvalidParameterCombination", "You may not attach a network interface to an instance if they are not in the same availability zone")
		}
		l, ok := vpc.LimitsOf(i.Type)
		if !ok {
			return fmt.Errorf("instance %s has the unknown type %s", i.ID, i.Type)
		}
		held, onCard := 0, 0
		for e := range tx.InterfacesOf(i.ID) {
			held++
			if e.Attachment.NetworkCard != card {
				continue
			}
			onCard++
			if e.Attachment.DeviceIndex == device {
				return query.Errorf("InvalidParameterValue", "Instance '%s' already has an interface attached at device index '%d'.", i.ID, device)
			}
		}
		if err := fits(l, held, onCard, card, device); err != nil {
			return err
		}
		if old.Slots() > l.IPv4PerENI {
			return tooManyAddresses()
		}
		if err := fitsIPv6(l, len(old.IPv6), len(old.IPv6Prefixes), limitExceeded); err != nil {
			return err
		}
		if len(old.Prefixes) > 0 && !l.Nitro() {
			return noPrefixes(i.Type)
		}
		at = a.attachmentOf(i.ID, card, device, false)
		e := *old
		e.Attachment = at
		tx.PutENI(&e)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.AttachNetworkInterfaceResponse{AttachmentId: text(at.ID), NetworkCardIndex: integer(card)}, nil
}

func (a *API) detachNetworkInterface(_ context.Context, req *query.DetachNetworkInterfaceRequest) (*query.DetachNetworkInterfaceResponse, error) {
	id := *req.AttachmentId
	if err := checkID("eni-attach", id); err != nil {
		return nil, err
	}
	_, err := a.update(func(tx *store.Tx) error {
		old := tx.ByAttachment(vpc.AttachmentID(id))
		switch {
		case old == nil:
			return noAttachment(id)
		case old.RequesterManaged:
			return query.Errorf("OperationNotPermitted", "You are not allowed to manage attachments of '%s'.", old.RequesterID)
		case old.Attachment.DeviceIndex == 0 && old.Attachment.NetworkCard == 0:
			return query.Errorf("OperationNotPermitted", "The network interface at device index 0 and networkCard index 0 cannot be detached.")
		case old.Attachment.Status == store.Detaching:
			return query.Errorf("IncorrectState", "The attachment '%s' is already detaching", id)
		}
		at := *old.Attachment
		at.Status, at.Due = store.Detaching, a.due(a.now())
		e := *old
		e.Attachment = &at
		tx.PutENI(&e)
		return nil
	})
	return nil, err
}
