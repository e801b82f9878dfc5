package store

import (
	"cmp"
	"iter"
	"net/netip"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// State is one immutable snapshot.
type State struct {
	Seq  uint64    // number of the update that made it; 0 is the state on Open
	Time time.Time // when it was published

	VPCs         Table[vpc.VPCID, *VPC]
	Subnets      Table[vpc.SubnetID, *Subnet]
	Reservations Table[string, *Reservation]
	Instances    Table[vpc.InstanceID, *Instance]
	ENIs         Table[vpc.ENIID, *ENI]
	Groups       Table[vpc.SecurityGroupID, *Group]
	Services     Table[string, *Service]
	RouteTables  Table[vpc.RouteTableID, *RouteTable]
	ACLs         Table[vpc.NetworkACLID, *NetworkACL]
	Gateways     Table[vpc.GatewayID, *InternetGateway]
	Addresses    Table[vpc.AllocationID, *Address]
	NATs         Table[vpc.NATGatewayID, *NATGateway]
	Peerings     Table[vpc.PeeringID, *Peering]
	PrefixLists  Table[vpc.PrefixListID, *PrefixList]
	DHCPOptions  Table[string, *DHCPOptions]
	FlowLogs     Table[string, *FlowLog]
	Tags         Table[string, map[string]string] // by resource id; no empty maps
	tokens       Table[string, *Token]
	lastVNI      uint32

	EgressOnlyGateways Table[vpc.EgressOnlyID, *EgressOnlyGateway]

	// Derived from the above.
	space       Table[vpc.SubnetID, *Space]
	owners      Table[addrKey, vpc.ENIID]
	gaps6       Table[gapKey, uint64] // first offsets of what is free in IPv6 blocks
	owners6     Table[addrKey, owner6]
	macs        Table[macKey, vpc.ENIID]
	attachments Table[vpc.AttachmentID, vpc.ENIID]
	held        Table[heldKey, *ENI]
	interfaces  Table[string, int] // by zone
	due         Table[dueKey, struct{}]

	mainTables     Table[vpc.VPCID, vpc.RouteTableID]
	explicitTables Table[string, vpc.RouteTableID] // by subnet or gateway
	defaultACLs    Table[vpc.VPCID, vpc.NetworkACLID]
	subnetACLs     Table[vpc.SubnetID, vpc.NetworkACLID]
	vpcGateways    Table[vpc.VPCID, vpc.GatewayID]
	publics        Table[netip.Addr, vpc.AllocationID]
	elastics       Table[elasticKey, vpc.AllocationID]
}

type (
	addrKey struct {
		subnet vpc.SubnetID
		addr   netip.Addr // of a prefix: its first
	}
	macKey struct {
		vpc vpc.VPCID
		mac string
	}
	heldKey struct {
		instance vpc.InstanceID
		card     int
		device   int
		eni      vpc.ENIID
	}
	elasticKey struct {
		eni     vpc.ENIID
		private netip.Addr
	}
	dueKey struct {
		at int64 // ns
		id string
	}
)

func emptyState(now time.Time) *State {
	return &State{
		Time:         now,
		VPCs:         Table[vpc.VPCID, *VPC]{cmp: cmp.Compare[vpc.VPCID]},
		Subnets:      Table[vpc.SubnetID, *Subnet]{cmp: cmp.Compare[vpc.SubnetID]},
		Reservations: Table[string, *Reservation]{cmp: strings.Compare},
		Instances:    Table[vpc.InstanceID, *Instance]{cmp: cmp.Compare[vpc.InstanceID]},
		ENIs:         Table[vpc.ENIID, *ENI]{cmp: cmp.Compare[vpc.ENIID]},
		Groups:       Table[vpc.SecurityGroupID, *Group]{cmp: cmp.Compare[vpc.SecurityGroupID]},
		Services:     Table[string, *Service]{cmp: strings.Compare},
		Tags:         Table[string, map[string]string]{cmp: strings.Compare},
		RouteTables:  newTable[vpc.RouteTableID, *RouteTable](),
		ACLs:         newTable[vpc.NetworkACLID, *NetworkACL](),
		Gateways:     newTable[vpc.GatewayID, *InternetGateway](),
		Addresses:    newTable[vpc.AllocationID, *Address](),
		NATs:         newTable[vpc.NATGatewayID, *NATGateway](),
		Peerings:     newTable[vpc.PeeringID, *Peering](),
		PrefixLists:  newTable[vpc.PrefixListID, *PrefixList](),
		DHCPOptions:  newTable[string, *DHCPOptions](),
		FlowLogs:     newTable[string, *FlowLog](),
		tokens:       Table[string, *Token]{cmp: strings.Compare},

		EgressOnlyGateways: newTable[vpc.EgressOnlyID, *EgressOnlyGateway](),

		space:   Table[vpc.SubnetID, *Space]{cmp: cmp.Compare[vpc.SubnetID]},
		owners:  Table[addrKey, vpc.ENIID]{cmp: compareAddrs},
		owners6: Table[addrKey, owner6]{cmp: compareAddrs},
		gaps6: Table[gapKey, uint64]{cmp: func(a, b gapKey) int {
			return cmp.Or(cmp.Compare(a.subnet, b.subnet), cmp.Compare(a.last, b.last))
		}},
		macs: Table[macKey, vpc.ENIID]{cmp: func(a, b macKey) int {
			return cmp.Or(cmp.Compare(a.vpc, b.vpc), cmp.Compare(a.mac, b.mac))
		}},
		attachments: Table[vpc.AttachmentID, vpc.ENIID]{cmp: cmp.Compare[vpc.AttachmentID]},
		held: Table[heldKey, *ENI]{cmp: func(a, b heldKey) int {
			return cmp.Or(cmp.Compare(a.instance, b.instance), cmp.Compare(a.card, b.card),
				cmp.Compare(a.device, b.device), cmp.Compare(a.eni, b.eni))
		}},
		interfaces: Table[string, int]{cmp: strings.Compare},
		due: Table[dueKey, struct{}]{cmp: func(a, b dueKey) int {
			return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(a.id, b.id))
		}},
		mainTables:     newTable[vpc.VPCID, vpc.RouteTableID](),
		explicitTables: newTable[string, vpc.RouteTableID](),
		defaultACLs:    newTable[vpc.VPCID, vpc.NetworkACLID](),
		subnetACLs:     newTable[vpc.SubnetID, vpc.NetworkACLID](),
		vpcGateways:    newTable[vpc.VPCID, vpc.GatewayID](),
		publics:        Table[netip.Addr, vpc.AllocationID]{cmp: netip.Addr.Compare},
		elastics: Table[elasticKey, vpc.AllocationID]{cmp: func(a, b elasticKey) int {
			return cmp.Or(cmp.Compare(a.eni, b.eni), a.private.Compare(b.private))
		}},
	}
}

func compareAddrs(a, b addrKey) int {
	return cmp.Or(cmp.Compare(a.subnet, b.subnet), a.addr.Compare(b.addr))
}

func newTable[K cmp.Ordered, V any]() Table[K, V] { return Table[K, V]{cmp: cmp.Compare[K]} }

// VPC, Subnet, Instance, ENI and Group return the object with this id, or nil.
func (s *State) VPC(id vpc.VPCID) *VPC                    { v, _ := s.VPCs.Get(id); return v }
func (s *State) Subnet(id vpc.SubnetID) *Subnet           { v, _ := s.Subnets.Get(id); return v }
func (s *State) Instance(id vpc.InstanceID) *Instance     { v, _ := s.Instances.Get(id); return v }
func (s *State) ENI(id vpc.ENIID) *ENI                    { v, _ := s.ENIs.Get(id); return v }
func (s *State) Group(id vpc.SecurityGroupID) *Group      { v, _ := s.Groups.Get(id); return v }
func (s *State) TagsOf(resource string) map[string]string { v, _ := s.Tags.Get(resource); return v }

// Space returns which addresses of a subnet are in use, or nil for a subnet
// that does not exist.
func (s *State) Space(id vpc.SubnetID) *Space { v, _ := s.space.Get(id); return v }

// InterfacesOf iterates over the interfaces of an instance, whatever the
// status of their attachment, by network card and device index.
func (s *State) InterfacesOf(id vpc.InstanceID) iter.Seq[*ENI] {
	return func(yield func(*ENI) bool) {
		for k, e := range s.held.From(heldKey{instance: id, card: -1}) {
			if k.instance != id || !yield(e) {
				return
			}
		}
	}
}

// InterfacesIn returns how many interfaces there are in a zone.
func (s *State) InterfacesIn(zone string) int { n, _ := s.interfaces.Get(zone); return n }

// ByAttachment returns the interface with this attachment, or nil.
func (s *State) ByAttachment(id vpc.AttachmentID) *ENI {
	e, ok := s.attachments.Get(id)
	if !ok {
		return nil
	}
	return s.ENI(e)
}

// ByMAC returns the interface of the VPC with this MAC, or nil.
func (s *State) ByMAC(id vpc.VPCID, mac string) *ENI {
	e, ok := s.macs.Get(macKey{id, mac})
	if !ok {
		return nil
	}
	return s.ENI(e)
}

// ByAddress returns the interface of the subnet that holds a, alone or within
// a prefix, or nil.
func (s *State) ByAddress(subnet vpc.SubnetID, a netip.Addr) *ENI {
	if a.Is6() {
		o, _ := s.owner6(subnet, a)
		return s.ENI(o.eni)
	}
	id, ok := s.owners.Get(addrKey{subnet, a})
	if !ok {
		if id, ok = s.owners.Get(addrKey{subnet, netip.PrefixFrom(a, vpc.PrefixBits).Masked().Addr()}); !ok {
			return nil
		}
	}
	e := s.ENI(id)
	if e == nil || !holds(e, a) {
		return nil // the block's first address is held alone
	}
	return e
}

func holds(e *ENI, a netip.Addr) bool {
	if e.Primary == a {
		return true
	}
	for _, s := range e.Secondary {
		if s == a {
			return true
		}
	}
	for _, p := range e.Prefixes {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// NextDue returns when the first of the objects that change by themselves is
// due, and false when none is.
func (s *State) NextDue() (time.Time, bool) {
	for k := range s.due.All() {
		return time.Unix(0, k.at), true
	}
	return time.Time{}, false
}

// DueBy returns the ids of the objects due at now or before, first those due
// first.
func (s *State) DueBy(now time.Time) []string {
	var ids []string
	for k := range s.due.All() {
		if k.at > now.UnixNano() {
			break
		}
		ids = append(ids, k.id)
	}
	return ids
}
