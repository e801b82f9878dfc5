package store

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// ErrConflict says that a transaction gave one address or MAC to two
// interfaces, or one device index to two attachments.
var ErrConflict = errors.New("already taken")

// Tx is a transaction: a private copy of the newest snapshot, which its methods
// change. It is valid inside the function that Update calls, and is a State to
// read from.
type Tx struct {
	State
	writes []write
	own    map[vpc.SubnetID]bool // spaces that are already this transaction's copies
	err    error                 // the first conflict
}

type write struct {
	bucket string
	key    string
	value  any // nil: delete
}

func (t *Tx) put(bucket, key string, value any) {
	t.writes = append(t.writes, write{bucket, key, value})
}

func (t *Tx) conflict(format string, args ...any) {
	if t.err == nil {
		t.err = fmt.Errorf(format+": %w", append(args, ErrConflict)...)
	}
}

// Try runs fn. When it fails, or causes a conflict, everything that it changed
// is undone, and the error is returned.
func (t *Tx) Try(fn func() error) error {
	if t.err != nil {
		return t.err
	}
	state, writes := t.State, len(t.writes)
	t.own = nil // what the saved state has must not be changed in place
	err := fn()
	if err == nil {
		err = t.err
	}
	if err != nil {
		t.State, t.writes, t.own, t.err = state, t.writes[:writes], nil, nil
	}
	return err
}

// NewVNI returns a number that no VPC ever had.
func (t *Tx) NewVNI() uint32 {
	t.lastVNI++
	t.put(bucketMeta, keyLastVNI, t.lastVNI)
	return t.lastVNI
}

// PutVPC adds or replaces a VPC. A new one gets a main route table and a default
// network ACL.
func (t *Tx) PutVPC(v *VPC) {
	t.VPCs = t.VPCs.with(v.ID, v)
	t.put(bucketVPC, string(v.ID), v)
	t.addDefaults(v)
}

// DeleteVPC removes a VPC with what came with it, and the tags of all.
func (t *Tx) DeleteVPC(id vpc.VPCID) {
	if r := t.MainTable(id); r != nil {
		t.DeleteRouteTable(r.ID)
	}
	if a := t.DefaultACL(id); a != nil {
		t.DeleteACL(a.ID)
	}
	t.VPCs = t.VPCs.without(id)
	t.put(bucketVPC, string(id), nil)
	t.SetTags(string(id), nil)
}

// PutSubnet adds or replaces a subnet. The IPv4 block of a subnet never changes,
// and that of IPv6 only while no interface has an address of it. A new one is
// tied to the default network ACL of its VPC.
func (t *Tx) PutSubnet(s *Subnet) {
	t.addSubnet(s)
	t.put(bucketSubnet, string(s.ID), s)
	t.addDefaultACL(s)
}

func (t *Tx) addSubnet(s *Subnet) {
	if _, ok := t.space.Get(s.ID); !ok {
		t.space = t.space.with(s.ID, newSpace(s.CIDR))
	}
	t.setSpace6(s.ID, s.IPv6.CIDR)
	t.Subnets = t.Subnets.with(s.ID, s)
}

// PutReservation adds or replaces a reservation. Its subnet and range never
// change; one that overlaps another fails the transaction with ErrConflict.
func (t *Tx) PutReservation(r *Reservation) {
	t.addReservation(r)
	t.put(bucketReservation, r.ID, r)
}

func (t *Tx) addReservation(r *Reservation) {
	if _, ok := t.Reservations.Get(r.ID); !ok {
		if s := t.ownSpace(r.Subnet); s == nil || !s.setAside(r.CIDR, r.Prefixes) {
			t.conflict("range %s of %s", r.CIDR, r.ID)
		}
	}
	t.Reservations = t.Reservations.with(r.ID, r)
}

// DeleteReservation removes a reservation and its tags.
func (t *Tx) DeleteReservation(id string) {
	if r, ok := t.Reservations.Get(id); ok {
		if s := t.ownSpace(r.Subnet); s != nil {
			s.bringBack(r.CIDR)
		}
	}
	t.Reservations = t.Reservations.without(id)
	t.put(bucketReservation, id, nil)
	t.SetTags(id, nil)
}

// DeleteSubnet removes a subnet with its reservations and the tags of all.
func (t *Tx) DeleteSubnet(id vpc.SubnetID) {
	for _, r := range t.Reservations.All() {
		if r.Subnet == id {
			t.DeleteReservation(r.ID)
		}
	}
	t.dropSubnet(id)
	t.Subnets = t.Subnets.without(id)
	t.space = t.space.without(id)
	t.dropSpace6(id)
	delete(t.own, id)
	t.put(bucketSubnet, string(id), nil)
	t.SetTags(string(id), nil)
}

// PutGroup adds or replaces a security group.
func (t *Tx) PutGroup(g *Group) {
	t.Groups = t.Groups.with(g.ID, g)
	t.put(bucketGroup, string(g.ID), g)
}

// DeleteGroup removes a security group with the tags of it and its rules.
func (t *Tx) DeleteGroup(id vpc.SecurityGroupID) {
	if g := t.Group(id); g != nil {
		for _, r := range g.Rules {
			t.SetTags(r.ID, nil)
		}
	}
	t.Groups = t.Groups.without(id)
	t.put(bucketGroup, string(id), nil)
	t.SetTags(string(id), nil)
}

// PutService adds or replaces a managed service.
func (t *Tx) PutService(s *Service) {
	t.Services = t.Services.with(s.Name, s)
	t.put(bucketService, s.Name, s)
}

// DeleteService removes a managed service; its interface stays.
func (t *Tx) DeleteService(name string) {
	t.Services = t.Services.without(name)
	t.put(bucketService, name, nil)
}

// SetTags replaces the tags of a resource. The map is kept.
func (t *Tx) SetTags(resource string, tags map[string]string) {
	if len(tags) == 0 {
		if _, ok := t.Tags.Get(resource); !ok {
			return
		}
		t.Tags = t.Tags.without(resource)
		t.put(bucketTags, resource, nil)
		return
	}
	t.Tags = t.Tags.with(resource, tags)
	t.put(bucketTags, resource, tags)
}

// Token returns what was remembered under a key, or nil.
func (t *Tx) Token(key string) *Token { v, _ := t.tokens.Get(key); return v }

// PutToken remembers the answer to a request.
func (t *Tx) PutToken(k *Token) {
	t.tokens = t.tokens.with(k.Key, k)
	t.put(bucketToken, k.Key, k)
}

// ForgetTokens drops the remembered answers for which old is true.
func (t *Tx) ForgetTokens(old func(*Token) bool) {
	for key, k := range t.tokens.All() {
		if old(k) {
			t.tokens = t.tokens.without(key)
			t.put(bucketToken, key, nil)
		}
	}
}

// PutInstance adds or replaces an instance.
func (t *Tx) PutInstance(i *Instance) {
	t.addInstance(i)
	t.put(bucketInstance, string(i.ID), i)
}

func (t *Tx) addInstance(i *Instance) {
	var due time.Time
	if old := t.Instance(i.ID); old != nil {
		due = old.Due
	}
	t.setDue(string(i.ID), due, i.Due)
	t.Instances = t.Instances.with(i.ID, i)
}

// DeleteInstance removes an instance and its tags.
func (t *Tx) DeleteInstance(id vpc.InstanceID) {
	if old := t.Instance(id); old != nil {
		t.setDue(string(id), old.Due, time.Time{})
	}
	t.Instances = t.Instances.without(id)
	t.put(bucketInstance, string(id), nil)
	t.SetTags(string(id), nil)
}

// PutENI adds or replaces an interface. When it takes what another has, the
// transaction fails with ErrConflict. Elastic IP addresses leave with the private
// address that they led to.
func (t *Tx) PutENI(e *ENI) {
	t.addENI(e)
	t.dropElastics(e.ID, e)
	t.put(bucketENI, string(e.ID), e)
}

// DeleteENI removes an interface and its tags.
func (t *Tx) DeleteENI(id vpc.ENIID) {
	if old := t.ENI(id); old != nil {
		t.interfaces = t.interfaces.with(old.Zone, t.InterfacesIn(old.Zone)-1)
		t.releaseAddrs(old, nil)
		t.releaseAddrs6(old, nil)
		t.unindexENI(old)
	}
	t.dropElastics(id, nil)
	t.ENIs = t.ENIs.without(id)
	t.put(bucketENI, string(id), nil)
	t.SetTags(string(id), nil)
}

func (t *Tx) addENI(e *ENI) {
	old := t.ENI(e.ID)
	if old != nil {
		t.releaseAddrs(old, e)
		t.releaseAddrs6(old, e)
		t.unindexENI(old)
	}
	if old == nil {
		t.interfaces = t.interfaces.with(e.Zone, t.InterfacesIn(e.Zone)+1)
	}
	t.claimAddrs(e, old)
	t.claimAddrs6(e, old)
	mac := macKey{e.VPC, e.MAC}
	if _, ok := t.macs.Get(mac); ok {
		t.conflict("MAC %s of %s", e.MAC, e.ID)
	}
	t.macs = t.macs.with(mac, e.ID)
	if a := e.Attachment; a != nil {
		t.attachments = t.attachments.with(a.ID, e.ID)
		if a.Instance != "" {
			for o := range t.InterfacesOf(a.Instance) {
				if o.Attachment.DeviceIndex == a.DeviceIndex && o.Attachment.NetworkCard == a.NetworkCard {
					t.conflict("device index %d of %s", a.DeviceIndex, a.Instance)
				}
			}
			t.held = t.held.with(held(e), e)
		}
		if !a.Due.IsZero() {
			t.due = t.due.with(dueKey{a.Due.UnixNano(), string(e.ID)}, struct{}{})
		}
	}
	t.ENIs = t.ENIs.with(e.ID, e)
}

func held(e *ENI) heldKey {
	return heldKey{e.Attachment.Instance, e.Attachment.NetworkCard, e.Attachment.DeviceIndex, e.ID}
}

func (t *Tx) unindexENI(e *ENI) {
	t.macs = t.macs.without(macKey{e.VPC, e.MAC})
	if a := e.Attachment; a != nil {
		t.attachments = t.attachments.without(a.ID)
		if a.Instance != "" {
			t.held = t.held.without(held(e))
		}
		if !a.Due.IsZero() {
			t.due = t.due.without(dueKey{a.Due.UnixNano(), string(e.ID)})
		}
	}
}

// ranges calls fn for each IPv4 address and prefix of e: its first address and the
// number of addresses.
func ranges(e *ENI, fn func(first netip.Addr, n int)) {
	if e == nil {
		return
	}
	fn(e.Primary, 1)
	for _, a := range e.Secondary {
		fn(a, 1)
	}
	for _, p := range e.Prefixes {
		fn(p.Addr(), blockSize)
	}
}

// has reports whether e has the address alone (n is 1) or the prefix.
func has(e *ENI, first netip.Addr, n int) bool {
	switch {
	case e == nil:
		return false
	case n == 1:
		return e.Primary == first || slices.Contains(e.Secondary, first)
	default:
		return slices.Contains(e.Prefixes, netip.PrefixFrom(first, vpc.PrefixBits))
	}
}

// releaseAddrs frees what old has and next does not.
func (t *Tx) releaseAddrs(old, next *ENI) {
	ranges(old, func(first netip.Addr, n int) {
		if has(next, first, n) {
			return
		}
		if s := t.ownSpace(old.Subnet); s != nil {
			s.flip(int(number(first))-int(s.base), n)
		}
		t.owners = t.owners.without(addrKey{old.Subnet, first})
	})
}

// claimAddrs takes what e has and old had not.
func (t *Tx) claimAddrs(e, old *ENI) {
	ranges(e, func(first netip.Addr, n int) {
		if has(old, first, n) {
			return
		}
		s := t.ownSpace(e.Subnet)
		if s == nil || s.used(int(number(first))-int(s.base), n) {
			t.conflict("address %s of %s", first, e.ID)
			return
		}
		s.flip(int(number(first))-int(s.base), n)
		t.owners = t.owners.with(addrKey{e.Subnet, first}, e.ID)
	})
}

// ownSpace returns the space of a subnet as this transaction's own copy.
func (t *Tx) ownSpace(id vpc.SubnetID) *Space {
	s := t.Space(id)
	if s == nil || t.own[id] {
		return s
	}
	if t.own == nil {
		t.own = map[vpc.SubnetID]bool{}
	}
	t.own[id] = true
	s = s.clone()
	t.space = t.space.with(id, s)
	return s
}
