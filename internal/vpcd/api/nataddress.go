package api

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func (a *API) natAddressHandlers(h map[string]query.Handler) {
	h["AssociateNatGatewayAddress"] = handle("AssociateNatGatewayAddress", "NatGatewayId AllocationId PrivateIpAddress", a.associateNATAddress)
	h["DisassociateNatGatewayAddress"] = handle("DisassociateNatGatewayAddress", "NatGatewayId AssociationId MaxDrainDurationSeconds", a.disassociateNATAddress)
	h["AssignPrivateNatGatewayAddress"] = handle("AssignPrivateNatGatewayAddress", "NatGatewayId PrivateIpAddress PrivateIpAddressCount", a.assignNATAddress)
	h["UnassignPrivateNatGatewayAddress"] = handle("UnassignPrivateNatGatewayAddress", "NatGatewayId PrivateIpAddress MaxDrainDurationSeconds", a.unassignNATAddress)
}

// How long connections by an address that is taken from a NAT gateway may still
// end, in seconds (EC2 API Reference, DisassociateNatGatewayAddress, read 2026).
const (
	defaultDrain = 350
	maxDrain     = 4000
)

// availableNAT looks up a NAT gateway whose addresses may change.
func availableNAT(s *store.State, id string, private bool) (*store.NATGateway, error) {
	n, err := findNAT(s, id)
	switch {
	case err != nil:
		return nil, err
	case n.State != store.NATAvailable:
		return nil, query.Errorf("IncorrectState", "The NAT gateway %s is in the state %s. It must be available.", n.ID, n.State)
	case n.Private != private:
		return nil, query.Errorf("InvalidParameterValue", "The connectivity type of the NAT gateway %s does not fit this action", n.ID)
	}
	return n, nil
}

// growNAT gives a NAT gateway more addresses, on its interface too. One of
// elastic belongs to each of a public one.
func (a *API) growNAT(tx *store.Tx, old *store.NATGateway, w wanted, elastic []*store.Address) (*store.NATGateway, []store.NATAddress, error) {
	if len(old.Addresses)+w.slots() > maxNATAddresses {
		return nil, nil, query.Errorf("InvalidParameterValue", "A NAT gateway has %d addresses at most", maxNATAddresses)
	}
	got, err := a.allocate(tx, tx.Subnet(old.Subnet), w, false)
	if err != nil {
		return nil, nil, err
	}
	e := *tx.ENI(old.ENI)
	e.Secondary = slices.Concat(e.Secondary, got.secondary)
	tx.PutENI(&e)
	var made []store.NATAddress
	for i, private := range got.secondary {
		x := store.NATAddress{Private: private}
		if len(elastic) > 0 {
			x.Allocation, x.Public = elastic[i].ID, elastic[i].Public
			tx.PutAddress(&store.Address{
				ID: elastic[i].ID, Public: elastic[i].Public, Created: elastic[i].Created,
				Association: vpc.NewID("eipassoc"), ENI: e.ID, Private: private, NAT: old.ID,
			})
		}
		made = append(made, x)
	}
	n := *old
	n.Addresses = slices.Concat(old.Addresses, made)
	tx.PutNAT(&n)
	return &n, made, nil
}

// freeElastic looks up Elastic IP addresses that are associated with nothing.
func freeElastic(s *store.State, ids []string) ([]*store.Address, error) {
	var out []*store.Address
	for _, id := range ids {
		x, err := findAddress(s, id)
		if err != nil {
			return nil, err
		}
		if x.ENI != "" || slices.Contains(out, x) {
			return nil, query.Errorf("Resource.AlreadyAssociated", "Elastic IP address [%s] is already associated", x.ID)
		}
		out = append(out, x)
	}
	return out, nil
}

// parseNATAddrs reads private addresses, by name or by number.
func parseNATAddrs(names []string, count int) (wanted, error) {
	var w wanted
	for _, s := range names {
		p, err := parseAddr(s)
		if err != nil {
			return w, err
		}
		if slices.Contains(w.secondary, p) {
			return w, query.Errorf("InvalidParameterValue", "The address %s is given twice", p)
		}
		w.secondary = append(w.secondary, p)
	}
	w.addrCount = count
	return w, nil
}

func (a *API) associateNATAddress(_ context.Context, req *query.AssociateNatGatewayAddressRequest) (*query.AssociateNatGatewayAddressResponse, error) {
	if len(req.PrivateIpAddress) > len(req.AllocationId) {
		return nil, query.Errorf("InvalidParameterCombination", "There are more private IP addresses than allocation ids")
	}
	w, err := parseNATAddrs(req.PrivateIpAddress, len(req.AllocationId)-len(req.PrivateIpAddress))
	if err != nil {
		return nil, err
	}
	var n *store.NATGateway
	var made []store.NATAddress
	after, err := a.update(func(tx *store.Tx) error {
		old, err := availableNAT(&tx.State, *req.NatGatewayId, false)
		if err != nil {
			return err
		}
		elastic, err := freeElastic(&tx.State, req.AllocationId)
		if err != nil {
			return err
		}
		n, made, err = a.growNAT(tx, old, w, elastic)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &query.AssociateNatGatewayAddressResponse{NatGatewayId: req.NatGatewayId, NatGatewayAddressSet: after.natAddresses(n, made, "associating")}, nil
}

func (a *API) assignNATAddress(_ context.Context, req *query.AssignPrivateNatGatewayAddressRequest) (*query.AssignPrivateNatGatewayAddressResponse, error) {
	if (len(req.PrivateIpAddress) > 0) == (req.PrivateIpAddressCount != nil) {
		return nil, query.Errorf("InvalidParameterCombination", "The request must contain exactly one of the parameters privateIpAddress, privateIpAddressCount")
	}
	more, err := count(req.PrivateIpAddressCount, "privateIpAddressCount")
	if err != nil {
		return nil, err
	}
	w, err := parseNATAddrs(req.PrivateIpAddress, more)
	if err != nil {
		return nil, err
	}
	var n *store.NATGateway
	var made []store.NATAddress
	after, err := a.update(func(tx *store.Tx) error {
		old, err := availableNAT(&tx.State, *req.NatGatewayId, true)
		if err != nil {
			return err
		}
		n, made, err = a.growNAT(tx, old, w, nil)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &query.AssignPrivateNatGatewayAddressResponse{NatGatewayId: req.NatGatewayId, NatGatewayAddressSet: after.natAddresses(n, made, "assigning")}, nil
}

// drainNAT takes addresses from a NAT gateway as soon as the drain is over. find
// returns their places.
func (a *API) drainNAT(id string, private bool, seconds *int64, find func(s *store.State, n *store.NATGateway) ([]int, error)) (view, *store.NATGateway, []store.NATAddress, error) {
	drain := int64(defaultDrain)
	if seconds != nil {
		if drain = *seconds; drain < 1 || drain > maxDrain {
			return view{}, nil, nil, query.Errorf("InvalidParameterValue", "Value (%d) for parameter maxDrainDurationSeconds is invalid. Expecting a value between 1 and %d.", drain, maxDrain)
		}
	}
	var n store.NATGateway
	var going []store.NATAddress
	after, err := a.update(func(tx *store.Tx) error {
		old, err := availableNAT(&tx.State, id, private)
		if err != nil {
			return err
		}
		places, err := find(&tx.State, old)
		if err != nil {
			return err
		}
		n = *old
		n.Addresses = slices.Clone(old.Addresses)
		for _, i := range places {
			if n.Addresses[i].Primary {
				return query.Errorf("InvalidParameterValue", "The primary address of the NAT gateway %s cannot be taken from it", n.ID)
			}
			if n.Addresses[i].Drains.IsZero() {
				n.Addresses[i].Drains = a.now().Add(time.Duration(drain) * time.Second)
			}
			going = append(going, n.Addresses[i])
		}
		n.Due = nextDrain(n.Addresses)
		tx.PutNAT(&n)
		return nil
	})
	return after, &n, going, err
}

// nextDrain returns when the first of the addresses is taken away.
func nextDrain(addrs []store.NATAddress) time.Time {
	var first time.Time
	for _, x := range addrs {
		if !x.Drains.IsZero() && (first.IsZero() || x.Drains.Before(first)) {
			first = x.Drains
		}
	}
	return first
}

// settleDrains takes away the addresses of an available NAT gateway whose drain
// is over.
func settleDrains(tx *store.Tx, n *store.NATGateway, now time.Time) {
	e := *tx.ENI(n.ENI)
	e.Secondary = slices.Clone(e.Secondary)
	n.Addresses = slices.DeleteFunc(slices.Clone(n.Addresses), func(x store.NATAddress) bool {
		over := !x.Drains.IsZero() && !x.Drains.After(now)
		if over {
			e.Secondary = slices.DeleteFunc(e.Secondary, func(p netip.Addr) bool { return p == x.Private })
		}
		return over
	})
	tx.PutENI(&e) // its Elastic IP addresses leave with them
	n.Due = nextDrain(n.Addresses)
}

func (a *API) disassociateNATAddress(_ context.Context, req *query.DisassociateNatGatewayAddressRequest) (*query.DisassociateNatGatewayAddressResponse, error) {
	after, n, going, err := a.drainNAT(*req.NatGatewayId, false, req.MaxDrainDurationSeconds, func(s *store.State, n *store.NATGateway) ([]int, error) {
		var places []int
		for _, id := range req.AssociationId {
			if err := checkID("eipassoc", id); err != nil {
				return nil, err
			}
			x := byAssociation(s, id)
			if x == nil || x.NAT != n.ID {
				return nil, noAssociation(id)
			}
			places = append(places, slices.IndexFunc(n.Addresses, func(y store.NATAddress) bool { return y.Allocation == x.ID }))
		}
		return places, nil
	})
	if err != nil {
		return nil, err
	}
	return &query.DisassociateNatGatewayAddressResponse{NatGatewayId: req.NatGatewayId, NatGatewayAddressSet: after.natAddresses(n, going, "disassociating")}, nil
}

func (a *API) unassignNATAddress(_ context.Context, req *query.UnassignPrivateNatGatewayAddressRequest) (*query.UnassignPrivateNatGatewayAddressResponse, error) {
	after, n, going, err := a.drainNAT(*req.NatGatewayId, true, req.MaxDrainDurationSeconds, func(_ *store.State, n *store.NATGateway) ([]int, error) {
		var places []int
		for _, s := range req.PrivateIpAddress {
			p, err := parseAddr(s)
			if err != nil {
				return nil, err
			}
			i := slices.IndexFunc(n.Addresses, func(x store.NATAddress) bool { return x.Private == p })
			if i < 0 {
				return nil, query.Errorf("InvalidParameterValue", "The address %s is not assigned to the NAT gateway %s", p, n.ID)
			}
			places = append(places, i)
		}
		return places, nil
	})
	if err != nil {
		return nil, err
	}
	return &query.UnassignPrivateNatGatewayAddressResponse{NatGatewayId: req.NatGatewayId, NatGatewayAddressSet: after.natAddresses(n, going, "unassigning")}, nil
}

// natAddresses describes addresses of a NAT gateway; status "" is what follows
// from the gateway and the address.
func (v view) natAddresses(n *store.NATGateway, addrs []store.NATAddress, status string) []query.NatGatewayAddress {
	return collect(addrs, func(x store.NATAddress) query.NatGatewayAddress {
		q := query.NatGatewayAddress{
			PrivateIp: new(x.Private.String()), NetworkInterfaceId: text(n.ENI), AllocationId: text(x.Allocation), IsPrimary: new(x.Primary), Status: new(status),
		}
		if status == "" {
			q.Status = new(natAddressStatus(n, x))
		}
		if x.Public.IsValid() {
			q.PublicIp = new(x.Public.String())
		}
		if e := v.Address(x.Allocation); e != nil && e.NAT == n.ID {
			q.AssociationId = text(e.Association)
		}
		return q
	})
}

func natAddressStatus(n *store.NATGateway, x store.NATAddress) string {
	coming, going := "associating", "disassociating"
	if n.Private {
		coming, going = "assigning", "unassigning"
	}
	switch {
	case n.State == store.NATPending:
		return coming
	case n.State == store.NATDeleting || !x.Drains.IsZero():
		return going
	case n.State == store.NATFailed:
		return "failed"
	}
	return "succeeded"
}
