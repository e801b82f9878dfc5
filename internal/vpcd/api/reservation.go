package api

import (
	"context"
	"net/netip"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// The types of a subnet CIDR reservation.
const (
	reservedForPrefixes = "prefix"
	reservedExplicit    = "explicit"
)

func (a *API) reservationHandlers(h map[string]query.Handler) {
	h["CreateSubnetCidrReservation"] = handle("CreateSubnetCidrReservation", "SubnetId Cidr ReservationType Description TagSpecification", a.createSubnetCidrReservation)
	h["DeleteSubnetCidrReservation"] = handle("DeleteSubnetCidrReservation", "SubnetCidrReservationId", a.deleteSubnetCidrReservation)
	h["GetSubnetCidrReservations"] = handle("GetSubnetCidrReservations", "SubnetId Filter NextToken MaxResults", a.getSubnetCidrReservations)
}

// createSubnetCidrReservation keeps a range of a subnet back. The range may
// hold addresses that are in use, and they stay (VPC User Guide, "Subnet CIDR
// reservations", read 2026). The words of the overlap are those seen in the
// field (terraform-provider-aws issue 45304); those of a range outside the
// subnet are inferred, and so is that any size will do: a range below a /28
// serves no prefix.
func (a *API) createSubnetCidrReservation(_ context.Context, req *query.CreateSubnetCidrReservationRequest) (*query.CreateSubnetCidrReservationResponse, error) {
	if p, err := netip.ParsePrefix(*req.Cidr); err == nil && p.Addr().Is6() {
		return nil, query.Errorf("UnsupportedOperation", "vpcd keeps no reservations of IPv6, and %s is one.", p)
	}
	cidr, err := parseCIDR(*req.Cidr)
	if err != nil {
		return nil, err
	}
	tags, err := specified(req.TagSpecification, "subnet-cidr-reservation")
	if err != nil {
		return nil, err
	}
	r := &store.Reservation{
		ID: vpc.NewID("scr"), CIDR: cidr, Prefixes: *req.ReservationType == reservedForPrefixes, Description: deref(req.Description), Created: a.now().Truncate(time.Second),
	}
	if len(r.Description) > maxDescription {
		return nil, query.Errorf("InvalidParameterValue", "The description is longer than %d characters", maxDescription)
	}
	after, err := a.update(func(tx *store.Tx) error {
		n, err := findSubnet(&tx.State, *req.SubnetId)
		if err != nil {
			return err
		}
		if cidr.Bits() < n.CIDR.Bits() || !n.CIDR.Contains(cidr.Addr()) {
			return query.Errorf("InvalidParameterValue", "Reservation CIDR %s is not within the CIDR block %s of the subnet", cidr, n.CIDR)
		}
		for _, o := range tx.Reservations.All() {
			if o.Subnet == n.ID && o.CIDR.Overlaps(cidr) {
				return query.Errorf("InvalidParameterValue", "Reservation CIDR %s has overlap with existing reserved CIDR block", cidr)
			}
		}
		r.Subnet = n.ID
		tx.PutReservation(r)
		tx.SetTags(r.ID, tags["subnet-cidr-reservation"])
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.CreateSubnetCidrReservationResponse{SubnetCidrReservation: new(after.reservation(r))}, nil
}

func (a *API) deleteSubnetCidrReservation(_ context.Context, req *query.DeleteSubnetCidrReservationRequest) (*query.DeleteSubnetCidrReservationResponse, error) {
	var gone query.SubnetCidrReservation
	_, err := a.update(func(tx *store.Tx) error {
		r, err := findReservation(&tx.State, *req.SubnetCidrReservationId)
		if err != nil {
			return err
		}
		gone = a.fresh(&tx.State).reservation(r) // with its tags
		tx.DeleteReservation(r.ID)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.DeleteSubnetCidrReservationResponse{DeletedSubnetCidrReservation: &gone}, nil
}

var reservationAttributes = attributes[*store.Reservation]{
	"reservationType": func(_ view, r *store.Reservation) []string { return []string{reservationType(r)} },
	"subnet-id":       func(_ view, r *store.Reservation) []string { return []string{string(r.Subnet)} },
}

func (a *API) getSubnetCidrReservations(_ context.Context, req *query.GetSubnetCidrReservationsRequest) (*query.GetSubnetCidrReservationsResponse, error) {
	v := a.read()
	n, err := findSubnet(v.State, *req.SubnetId)
	if err != nil {
		return nil, err
	}
	match, err := matcher(v, "GetSubnetCidrReservations", req.Filter, reservationAttributes, nil, func(v view, r *store.Reservation) map[string]string { return v.TagsOf(r.ID) })
	if err != nil {
		return nil, err
	}
	c, err := paging("GetSubnetCidrReservations", req.Filter, 0, req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	found, next := take(c, entries(v.Reservations), func(r *store.Reservation) bool { return r.Subnet == n.ID && match(r) })
	return &query.GetSubnetCidrReservationsResponse{NextToken: next, SubnetIpv4CidrReservationSet: collect(found, v.reservation)}, nil
}

func reservationType(r *store.Reservation) string {
	if r.Prefixes {
		return reservedForPrefixes
	}
	return reservedExplicit
}

func (v view) reservation(r *store.Reservation) query.SubnetCidrReservation {
	return query.SubnetCidrReservation{
		SubnetCidrReservationId: &r.ID,
		SubnetId:                text(r.Subnet),
		Cidr:                    new(r.CIDR.String()),
		ReservationType:         new(reservationType(r)),
		OwnerId:                 &v.api.account,
		Description:             text(r.Description),
		TagSet:                  v.tags(r.ID),
	}
}
