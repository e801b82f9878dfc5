package api

import (
	"context"
	"iter"
	"net/netip"
	"slices"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func (a *API) elasticHandlers(h map[string]query.Handler) {
	h["AllocateAddress"] = handle("AllocateAddress", "Address NetworkBorderGroup TagSpecification", a.allocateAddress)
	h["ReleaseAddress"] = handle("ReleaseAddress", "AllocationId NetworkBorderGroup", a.releaseAddress)
	h["AssociateAddress"] = handle("AssociateAddress", "AllocationId PublicIp InstanceId NetworkInterfaceId PrivateIpAddress AllowReassociation", a.associateAddress)
	h["DisassociateAddress"] = handle("DisassociateAddress", "AssociationId PublicIp", a.disassociateAddress)
	h["DescribeAddresses"] = handle("DescribeAddresses", "PublicIp AllocationId Filter", a.describeAddresses)
}

func findAddress(s *store.State, id string) (*store.Address, error) {
	if err := checkID("eipalloc", id); err != nil {
		return nil, err
	}
	if x := s.Address(vpc.AllocationID(id)); x != nil {
		return x, nil
	}
	return nil, query.Errorf("InvalidAllocationID.NotFound", "The allocation ID '%s' does not exist", id)
}

// findPublic looks up an Elastic IP address by its number.
func findPublic(s *store.State, number string) (*store.Address, error) {
	p, err := netip.ParseAddr(number)
	if err != nil || !p.Is4() {
		return nil, query.Errorf("InvalidParameterValue", "Value (%s) for parameter publicIp is invalid. Invalid IPv4 address.", number)
	}
	if x := s.ByPublic(p); x != nil && !x.Auto {
		return x, nil
	}
	return nil, query.Errorf("InvalidAddress.NotFound", "Address '%s' not found.", number)
}

// borderGroup returns an error unless a network border group is that of the
// region.
func (a *API) borderGroup(name *string) error {
	if name != nil && *name != a.region {
		return query.Errorf("InvalidParameterValue", "Value (%s) for parameter networkBorderGroup is invalid. There is %s alone.", *name, a.region)
	}
	return nil
}

func (a *API) allocateAddress(_ context.Context, req *query.AllocateAddressRequest) (*query.AllocateAddressResponse, error) {
	if err := a.borderGroup(req.NetworkBorderGroup); err != nil {
		return nil, err
	}
	tags, err := specified(req.TagSpecification, "elastic-ip")
	if err != nil {
		return nil, err
	}
	x := &store.Address{ID: vpc.AllocationID(vpc.NewID("eipalloc")), Created: a.now()}
	_, err = a.update(func(tx *store.Tx) error {
		if most := a.quota(chaos.QuotaElastic); elastics(&tx.State) >= most {
			return query.Errorf("AddressLimitExceeded", "The maximum number of addresses has been reached.")
		}
		if x.Public, err = freePublic(&tx.State, req.Address); err != nil {
			return err
		}
		tx.PutAddress(x)
		tx.SetTags(string(x.ID), tags["elastic-ip"])
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.AllocateAddressResponse{
		AllocationId: text(x.ID), PublicIp: new(x.Public.String()), Domain: new("vpc"), PublicIpv4Pool: new("amazon"), NetworkBorderGroup: &a.region,
	}, nil
}

// freePublic returns the address that is asked for, or the first of the pool
// that nobody has. Network and broadcast address of the pool are left out.
func freePublic(s *store.State, want *string) (netip.Addr, error) {
	pool := store.ElasticPool
	first, last := pool.Addr().Next(), lastAddr(pool)
	if want != nil {
		p, err := netip.ParseAddr(*want)
		if err != nil || !pool.Contains(p) || p.Less(first) || !p.Less(last) {
			return p, query.Errorf("InvalidAddress.NotFound", "Address '%s' not found. There are those of %s.", *want, pool)
		}
		if s.ByPublic(p) != nil {
			return p, taken(p)
		}
		return p, nil
	}
	for p := first; p.Less(last); p = p.Next() {
		if s.ByPublic(p) == nil {
			return p, nil
		}
	}
	return netip.Addr{}, query.Errorf("InsufficientAddressCapacity", "All addresses of %s are in use.", pool)
}

// lastAddr returns the last address of an IPv4 block.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(b)
}

func (a *API) releaseAddress(_ context.Context, req *query.ReleaseAddressRequest) (*query.ReleaseAddressResponse, error) {
	if err := a.borderGroup(req.NetworkBorderGroup); err != nil {
		return nil, err
	}
	if req.AllocationId == nil {
		return nil, query.Errorf("MissingParameter", "You must specify an allocation id when releasing a VPC elastic IP address")
	}
	_, err := a.update(func(tx *store.Tx) error {
		x, err := findAddress(&tx.State, *req.AllocationId)
		if err != nil {
			return err
		}
		if x.ENI != "" {
			return taken(x.Public)
		}
		tx.DeleteAddress(x.ID)
		return nil
	})
	return nil, err
}

// associateAddress makes an Elastic IP address lead to a private address of an
// interface. Asked for what there is it answers with the association that there
// is. An address that leads elsewhere, or a private one that another leads to,
// is taken away if the request allows it.
func (a *API) associateAddress(_ context.Context, req *query.AssociateAddressRequest) (*query.AssociateAddressResponse, error) {
	if (req.AllocationId == nil) == (req.PublicIp == nil) {
		return nil, query.Errorf("InvalidParameterCombination", "The request must contain exactly one of the parameters allocationId, publicIp")
	}
	if (req.InstanceId == nil) == (req.NetworkInterfaceId == nil) {
		return nil, query.Errorf("InvalidParameterCombination", "The request must contain exactly one of the parameters instanceId, networkInterfaceId")
	}
	association := vpc.NewID("eipassoc")
	_, err := a.update(func(tx *store.Tx) error {
		var old *store.Address
		var err error
		if req.AllocationId != nil {
			old, err = findAddress(&tx.State, *req.AllocationId)
		} else {
			old, err = findPublic(&tx.State, *req.PublicIp)
		}
		if err != nil {
			return err
		}
		e, err := targetInterface(&tx.State, targets{instance: req.InstanceId, eni: req.NetworkInterfaceId})
		if err != nil {
			return err
		}
		if err := mine(e); err != nil {
			return err
		}
		private := e.Primary
		if req.PrivateIpAddress != nil {
			if private, err = parseAddr(*req.PrivateIpAddress); err != nil {
				return err
			}
			if tx.ByAddress(e.Subnet, private) != e {
				return query.Errorf("InvalidParameterValue", "The address %s is not assigned to interface %s", private, e.ID)
			}
		}
		if tx.GatewayOf(e.VPC) == nil {
			return query.Errorf("Gateway.NotAttached", "Network %s is not attached to any internet gateway", e.VPC)
		}
		switch {
		case old.ENI == e.ID && old.Private == private:
			association = old.Association
			return nil
		case old.NAT != "":
			return query.Errorf("OperationNotPermitted", "The address %s is used by the NAT gateway %s", old.Public, old.NAT)
		case old.ENI != "" && !deref(req.AllowReassociation):
			return query.Errorf("Resource.AlreadyAssociated", "resource %s is already associated with associate-id %s", old.ID, old.Association)
		}
		if other := tx.ElasticOf(e.ID, private); other != nil && other.Auto {
			tx.DeleteAddress(other.ID) // makes room
		} else if other != nil {
			if !deref(req.AllowReassociation) {
				return query.Errorf("Resource.AlreadyAssociated", "resource %s is already associated with associate-id %s", e.ID, other.Association)
			}
			tx.PutAddress(&store.Address{ID: other.ID, Public: other.Public, Created: other.Created})
		}
		tx.PutAddress(&store.Address{ID: old.ID, Public: old.Public, Created: old.Created, Association: association, ENI: e.ID, Private: private})
		return settlePublic(tx, old.ENI, a.now()) // which lost it
	})
	if err != nil {
		return nil, err
	}
	return &query.AssociateAddressResponse{AssociationId: &association}, nil
}

func (a *API) disassociateAddress(_ context.Context, req *query.DisassociateAddressRequest) (*query.DisassociateAddressResponse, error) {
	if (req.AssociationId == nil) == (req.PublicIp == nil) {
		return nil, query.Errorf("InvalidParameterCombination", "The request must contain exactly one of the parameters associationId, publicIp")
	}
	_, err := a.update(func(tx *store.Tx) error {
		var old *store.Address
		var err error
		if req.PublicIp != nil {
			old, err = findPublic(&tx.State, *req.PublicIp)
		} else if err = checkID("eipassoc", *req.AssociationId); err == nil {
			if old = byAssociation(&tx.State, *req.AssociationId); old == nil {
				err = noAssociation(*req.AssociationId)
			}
		}
		switch {
		case err != nil:
			return err
		case old.NAT != "":
			return query.Errorf("AuthFailure", "You do not have permission to access the specified resource.")
		case old.ENI == "":
			return nil
		}
		tx.PutAddress(&store.Address{ID: old.ID, Public: old.Public, Created: old.Created})
		return settlePublic(tx, old.ENI, a.now())
	})
	return nil, err
}

func byAssociation(s *store.State, id string) *store.Address {
	for _, x := range s.Addresses.All() {
		if x.Association == id {
			return x
		}
	}
	return nil
}

// attachedInstance returns the instance that an interface is attached to, or "".
func (v view) attachedInstance(id vpc.ENIID) string {
	if e := v.ENI(id); e != nil && e.Attachment != nil {
		return string(e.Attachment.Instance)
	}
	return ""
}

func privateOf(x *store.Address) string {
	if x.ENI == "" {
		return ""
	}
	return x.Private.String()
}

func (v view) address(x *store.Address) query.Address {
	out := query.Address{
		AllocationId: text(x.ID), PublicIp: new(x.Public.String()), Domain: new("vpc"), PublicIpv4Pool: new("amazon"), NetworkBorderGroup: &v.api.region,
		AssociationId: text(x.Association), NetworkInterfaceId: text(x.ENI), PrivateIpAddress: text(privateOf(x)), InstanceId: text(v.attachedInstance(x.ENI)),
		TagSet: v.tags(string(x.ID)),
	}
	if x.ENI != "" {
		out.NetworkInterfaceOwnerId = &v.api.account
	}
	return out
}

var addressListing = listing[*store.Address]{
	action: "DescribeAddresses",
	all: func(v view) iter.Seq2[string, *store.Address] {
		return func(yield func(string, *store.Address) bool) {
			for id, x := range entries(v.Addresses) {
				if !x.Auto && !yield(id, x) {
					return
				}
			}
		}
	},
	find: findAddress,
	key:  func(x *store.Address) string { return string(x.ID) },
	attrs: attributes[*store.Address]{
		"allocation-id":        value(func(x *store.Address) string { return string(x.ID) }),
		"association-id":       value(func(x *store.Address) string { return x.Association }),
		"instance-id":          func(v view, x *store.Address) []string { return some(v.attachedInstance(x.ENI)) },
		"network-border-group": func(v view, _ *store.Address) []string { return []string{v.api.region} },
		"network-interface-id": value(func(x *store.Address) string { return string(x.ENI) }),
		"network-interface-owner-id": func(v view, x *store.Address) []string {
			if x.ENI == "" {
				return nil
			}
			return []string{v.api.account}
		},
		"private-ip-address": value(privateOf),
		"public-ip":          value(func(x *store.Address) string { return x.Public.String() }),
	},
}

// some returns a list of one string, or of none when it is empty.
func some(s string) []string {
	if s == "" {
		return nil
	}
	return []string{s}
}

func (a *API) describeAddresses(_ context.Context, req *query.DescribeAddressesRequest) (*query.DescribeAddressesResponse, error) {
	v := a.read()
	ids := slices.Clone(req.AllocationId)
	for _, p := range req.PublicIp {
		x, err := findPublic(v.State, p)
		if err != nil {
			return nil, err
		}
		ids = append(ids, string(x.ID))
	}
	found, _, err := addressListing.page(v, ids, req.Filter, nil, nil)
	if err != nil {
		return nil, err
	}
	return &query.DescribeAddressesResponse{AddressesSet: collect(found, v.address)}, nil
}

// publicName returns the public DNS name of an address; "" where the VPC gives
// none.
func (v view) publicName(id vpc.VPCID, public netip.Addr) string {
	o := v.VPC(id)
	if o == nil || !o.DNSHostnames {
		return ""
	}
	return vpc.PublicName(public, v.api.region)
}

// association describes the public address of a private address, or nothing.
func (v view) association(e *store.ENI, private netip.Addr) *query.NetworkInterfaceAssociation {
	x := v.ElasticOf(e.ID, private)
	if x == nil {
		return nil
	}
	if x.Auto {
		return &query.NetworkInterfaceAssociation{IpOwnerId: new(amazonOwned), PublicIp: new(x.Public.String()), PublicDnsName: new(v.publicName(e.VPC, x.Public))}
	}
	return &query.NetworkInterfaceAssociation{
		AllocationId: text(x.ID), AssociationId: text(x.Association), IpOwnerId: &v.api.account,
		PublicIp: new(x.Public.String()), PublicDnsName: new(v.publicName(e.VPC, x.Public)),
	}
}

// instanceAssociation is association in the words of an instance.
func (v view) instanceAssociation(e *store.ENI, private netip.Addr) *query.InstanceNetworkInterfaceAssociation {
	x := v.association(e, private)
	if x == nil {
		return nil
	}
	return &query.InstanceNetworkInterfaceAssociation{IpOwnerId: x.IpOwnerId, PublicDnsName: x.PublicDnsName, PublicIp: x.PublicIp}
}

// associations makes an attribute of the Elastic IP addresses of an interface:
// those of all its addresses, or of the primary alone.
func associations(all bool, of func(x *query.NetworkInterfaceAssociation) *string) func(view, *store.ENI) []string {
	return func(v view, e *store.ENI) []string {
		var out []string
		for x := range v.ElasticsOf(e.ID) {
			if all || x.Private == e.Primary {
				out = append(out, some(deref(of(v.association(e, x.Private))))...)
			}
		}
		return out
	}
}
