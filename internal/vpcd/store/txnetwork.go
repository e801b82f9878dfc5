package store

import (
	"net/netip"
	"slices"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// setDue moves an object from one date in the list of what changes by itself to
// another; a zero time is none.
func (t *Tx) setDue(id string, old, next time.Time) {
	if !old.IsZero() {
		t.due = t.due.without(dueKey{old.UnixNano(), id})
	}
	if !next.IsZero() {
		t.due = t.due.with(dueKey{next.UnixNano(), id}, struct{}{})
	}
}

// addDefaults gives a VPC what each has: a main route table, and a network ACL
// that allows all. What is there already stays.
func (t *Tx) addDefaults(v *VPC) {
	if t.MainTable(v.ID) == nil {
		t.PutRouteTable(&RouteTable{
			ID: vpc.RouteTableID(vpc.NewID("rtb")), VPC: v.ID, Created: v.Created,
			Associations: []RouteAssociation{{ID: vpc.NewID("rtbassoc"), Main: true}},
		})
	}
	if t.DefaultACL(v.ID) == nil {
		a := &NetworkACL{ID: vpc.NetworkACLID(vpc.NewID("acl")), VPC: v.ID, Default: true, Created: v.Created}
		for _, egress := range []bool{false, true} {
			a.Entries = append(a.Entries, ACLEntry{Number: 100, Egress: egress, Protocol: -1, Allow: true, CIDR: anywhere, ICMPType: -1, ICMPCode: -1})
		}
		t.PutACL(a)
	}
	if v.DHCPOptions != "" && v.DHCPOptions != NoDHCPOptions && t.DHCP(v.DHCPOptions) == nil {
		t.PutDHCPOptions(&DHCPOptions{ID: v.DHCPOptions, Default: true, Created: v.Created})
	}
}

// addDefaultACL ties a subnet that is tied to no network ACL to the default one
// of its VPC.
func (t *Tx) addDefaultACL(s *Subnet) {
	old := t.DefaultACL(s.VPC)
	if t.ACLOf(s.ID) != nil || old == nil {
		return
	}
	a := *old
	a.Associations = append(slices.Clone(old.Associations), ACLAssociation{ID: vpc.NewID("aclassoc"), Subnet: s.ID})
	t.PutACL(&a)
}

// dropSubnet takes a subnet from its route table and network ACL.
func (t *Tx) dropSubnet(id vpc.SubnetID) {
	if old := t.ExplicitTable(string(id)); old != nil {
		r := *old
		r.Associations = slices.DeleteFunc(slices.Clone(old.Associations), func(a RouteAssociation) bool { return a.Subnet == id })
		t.PutRouteTable(&r)
	}
	if old := t.ACLOf(id); old != nil {
		a := *old
		a.Associations = slices.DeleteFunc(slices.Clone(old.Associations), func(a ACLAssociation) bool { return a.Subnet == id })
		t.PutACL(&a)
	}
}

// PutRouteTable adds or replaces a route table. A subnet, a gateway or the place
// of the main table that another table has fails the transaction with
// ErrConflict: take it from that one first.
func (t *Tx) PutRouteTable(r *RouteTable) {
	t.addRouteTable(r)
	t.put(bucketRouteTable, string(r.ID), r)
}

func (t *Tx) addRouteTable(r *RouteTable) {
	t.unindexRouteTable(t.RouteTable(r.ID))
	for _, a := range r.Associations {
		if a.Main {
			if _, ok := t.mainTables.Get(r.VPC); ok {
				t.conflict("main route table of %s", r.VPC)
			}
			t.mainTables = t.mainTables.with(r.VPC, r.ID)
			continue
		}
		for _, id := range []string{string(a.Subnet), string(a.Gateway)} {
			if id == "" {
				continue
			}
			if _, ok := t.explicitTables.Get(id); ok {
				t.conflict("route table of %s", id)
			}
			t.explicitTables = t.explicitTables.with(id, r.ID)
		}
	}
	t.RouteTables = t.RouteTables.with(r.ID, r)
}

func (t *Tx) unindexRouteTable(old *RouteTable) {
	if old == nil {
		return
	}
	for _, a := range old.Associations {
		if a.Main {
			t.mainTables = t.mainTables.without(old.VPC)
		}
		t.explicitTables = t.explicitTables.without(string(a.Subnet)).without(string(a.Gateway))
	}
}

// DeleteRouteTable removes a route table and its tags.
func (t *Tx) DeleteRouteTable(id vpc.RouteTableID) {
	t.unindexRouteTable(t.RouteTable(id))
	t.RouteTables = t.RouteTables.without(id)
	t.put(bucketRouteTable, string(id), nil)
	t.SetTags(string(id), nil)
}

// PutACL adds or replaces a network ACL. A subnet that another has fails the
// transaction with ErrConflict.
func (t *Tx) PutACL(a *NetworkACL) {
	t.addACL(a)
	t.put(bucketACL, string(a.ID), a)
}

func (t *Tx) addACL(a *NetworkACL) {
	t.unindexACL(t.ACL(a.ID))
	for _, x := range a.Associations {
		if _, ok := t.subnetACLs.Get(x.Subnet); ok {
			t.conflict("network ACL of %s", x.Subnet)
		}
		t.subnetACLs = t.subnetACLs.with(x.Subnet, a.ID)
	}
	if a.Default {
		t.defaultACLs = t.defaultACLs.with(a.VPC, a.ID)
	}
	t.ACLs = t.ACLs.with(a.ID, a)
}

func (t *Tx) unindexACL(old *NetworkACL) {
	if old == nil {
		return
	}
	for _, x := range old.Associations {
		t.subnetACLs = t.subnetACLs.without(x.Subnet)
	}
	if old.Default {
		t.defaultACLs = t.defaultACLs.without(old.VPC)
	}
}

// DeleteACL removes a network ACL and its tags.
func (t *Tx) DeleteACL(id vpc.NetworkACLID) {
	t.unindexACL(t.ACL(id))
	t.ACLs = t.ACLs.without(id)
	t.put(bucketACL, string(id), nil)
	t.SetTags(string(id), nil)
}

// PutGateway adds or replaces an internet gateway. A second one of a VPC fails
// the transaction with ErrConflict.
func (t *Tx) PutGateway(g *InternetGateway) {
	t.addGateway(g)
	t.put(bucketGateway, string(g.ID), g)
}

func (t *Tx) addGateway(g *InternetGateway) {
	if old := t.Gateway(g.ID); old != nil && old.VPC != "" {
		t.vpcGateways = t.vpcGateways.without(old.VPC)
	}
	if g.VPC != "" {
		if _, ok := t.vpcGateways.Get(g.VPC); ok {
			t.conflict("internet gateway of %s", g.VPC)
		}
		t.vpcGateways = t.vpcGateways.with(g.VPC, g.ID)
	}
	t.Gateways = t.Gateways.with(g.ID, g)
}

// DeleteGateway removes an internet gateway, its edge association, and its tags.
func (t *Tx) DeleteGateway(id vpc.GatewayID) {
	t.DropEdge(id)
	if old := t.Gateway(id); old != nil && old.VPC != "" {
		t.vpcGateways = t.vpcGateways.without(old.VPC)
	}
	t.Gateways = t.Gateways.without(id)
	t.put(bucketGateway, string(id), nil)
	t.SetTags(string(id), nil)
}

// PutEgressOnly adds or replaces an egress-only internet gateway.
func (t *Tx) PutEgressOnly(g *EgressOnlyGateway) {
	t.EgressOnlyGateways = t.EgressOnlyGateways.with(g.ID, g)
	t.put(bucketEgressOnly, string(g.ID), g)
}

// DeleteEgressOnly removes an egress-only internet gateway and its tags. Routes
// to it stay, and lead nowhere.
func (t *Tx) DeleteEgressOnly(id vpc.EgressOnlyID) {
	t.EgressOnlyGateways = t.EgressOnlyGateways.without(id)
	t.put(bucketEgressOnly, string(id), nil)
	t.SetTags(string(id), nil)
}

// DropEdge takes an internet gateway from its route table.
func (t *Tx) DropEdge(id vpc.GatewayID) {
	if old := t.ExplicitTable(string(id)); old != nil {
		r := *old
		r.Associations = slices.DeleteFunc(slices.Clone(old.Associations), func(a RouteAssociation) bool { return a.Gateway == id })
		t.PutRouteTable(&r)
	}
}

// PutAddress adds or replaces an Elastic IP address. A number that another has,
// or a private address that another leads to, fails the transaction with
// ErrConflict.
func (t *Tx) PutAddress(a *Address) {
	t.addAddress(a)
	t.put(bucketAddress, string(a.ID), a)
}

func (t *Tx) addAddress(a *Address) {
	t.unindexAddress(t.Address(a.ID))
	if _, ok := t.publics.Get(a.Public); ok {
		t.conflict("Elastic IP address %s", a.Public)
	}
	t.publics = t.publics.with(a.Public, a.ID)
	if a.ENI != "" {
		k := elasticKey{a.ENI, a.Private}
		if _, ok := t.elastics.Get(k); ok {
			t.conflict("Elastic IP address of %s on %s", a.Private, a.ENI)
		}
		t.elastics = t.elastics.with(k, a.ID)
	}
	t.Addresses = t.Addresses.with(a.ID, a)
}

func (t *Tx) unindexAddress(old *Address) {
	if old == nil {
		return
	}
	t.publics = t.publics.without(old.Public)
	if old.ENI != "" {
		t.elastics = t.elastics.without(elasticKey{old.ENI, old.Private})
	}
}

// DeleteAddress removes an Elastic IP address and its tags.
func (t *Tx) DeleteAddress(id vpc.AllocationID) {
	t.unindexAddress(t.Address(id))
	t.Addresses = t.Addresses.without(id)
	t.put(bucketAddress, string(id), nil)
	t.SetTags(string(id), nil)
}

// dropElastics ends the associations of Elastic IP addresses with what an
// interface does not hold any more. A nil e holds nothing.
func (t *Tx) dropElastics(id vpc.ENIID, e *ENI) {
	var gone []*Address
	for a := range t.ElasticsOf(id) {
		if e == nil || !holds(e, a.Private) {
			gone = append(gone, a)
		}
	}
	for _, old := range gone {
		t.PutAddress(&Address{ID: old.ID, Public: old.Public, Created: old.Created})
	}
}

// PutNAT adds or replaces a NAT gateway.
func (t *Tx) PutNAT(n *NATGateway) {
	t.addNAT(n)
	t.put(bucketNAT, string(n.ID), n)
}

func (t *Tx) addNAT(n *NATGateway) {
	var due time.Time
	if old := t.NAT(n.ID); old != nil {
		due = old.Due
	}
	t.setDue(string(n.ID), due, n.Due)
	t.NATs = t.NATs.with(n.ID, n)
}

// DeleteNAT removes a NAT gateway and its tags.
func (t *Tx) DeleteNAT(id vpc.NATGatewayID) {
	if old := t.NAT(id); old != nil {
		t.setDue(string(id), old.Due, time.Time{})
	}
	t.NATs = t.NATs.without(id)
	t.put(bucketNAT, string(id), nil)
	t.SetTags(string(id), nil)
}

// PutPeering adds or replaces a peering connection.
func (t *Tx) PutPeering(p *Peering) {
	t.addPeering(p)
	t.put(bucketPeering, string(p.ID), p)
}

func (t *Tx) addPeering(p *Peering) {
	var due time.Time
	if old := t.Peering(p.ID); old != nil {
		due = old.Due
	}
	t.setDue(string(p.ID), due, p.Due)
	t.Peerings = t.Peerings.with(p.ID, p)
}

// DeletePeering removes a peering connection and its tags.
func (t *Tx) DeletePeering(id vpc.PeeringID) {
	if old := t.Peering(id); old != nil {
		t.setDue(string(id), old.Due, time.Time{})
	}
	t.Peerings = t.Peerings.without(id)
	t.put(bucketPeering, string(id), nil)
	t.SetTags(string(id), nil)
}

// PutPrefixList adds or replaces a prefix list.
func (t *Tx) PutPrefixList(p *PrefixList) {
	t.PrefixLists = t.PrefixLists.with(p.ID, p)
	t.put(bucketPrefixList, string(p.ID), p)
}

// DeletePrefixList removes a prefix list and its tags.
func (t *Tx) DeletePrefixList(id vpc.PrefixListID) {
	t.PrefixLists = t.PrefixLists.without(id)
	t.put(bucketPrefixList, string(id), nil)
	t.SetTags(string(id), nil)
}

// PutDHCPOptions adds or replaces a set of DHCP options.
func (t *Tx) PutDHCPOptions(o *DHCPOptions) {
	t.DHCPOptions = t.DHCPOptions.with(o.ID, o)
	t.put(bucketDHCP, o.ID, o)
}

// DeleteDHCPOptions removes a set of DHCP options and its tags.
func (t *Tx) DeleteDHCPOptions(id string) {
	t.DHCPOptions = t.DHCPOptions.without(id)
	t.put(bucketDHCP, id, nil)
	t.SetTags(id, nil)
}

// PutFlowLog adds or replaces a flow log.
func (t *Tx) PutFlowLog(f *FlowLog) {
	t.FlowLogs = t.FlowLogs.with(f.ID, f)
	t.put(bucketFlowLog, f.ID, f)
}

// DeleteFlowLog removes a flow log and its tags.
func (t *Tx) DeleteFlowLog(id string) {
	t.FlowLogs = t.FlowLogs.without(id)
	t.put(bucketFlowLog, id, nil)
	t.SetTags(id, nil)
}

var anywhere = netip.MustParsePrefix("0.0.0.0/0")
