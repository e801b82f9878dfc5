package api

import (
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// amazonOwned is who owns a public address that an instance has for its life, in
// the words of Describe calls.
const amazonOwned = "amazon"

// wantsPublic says of a new interface at device 0 of an instance whether the
// instance is to have a public address for its life: as the launch says, else as
// the subnet does. Instances that begin with several interfaces have none (EC2
// user guide, "Public IPv4 addresses").
func (l *launch) wantsPublic(want nic, n *store.Subnet) bool {
	switch {
	case want.existing != "" || len(l.nics) > 1:
		return false
	case want.public != nil:
		return *want.public
	}
	return n.MapPublicOnLaunch
}

// checkPublic refuses what AssociatePublicIpAddress cannot be asked for.
func checkPublic(nics []nic) error {
	for _, n := range nics {
		switch {
		case !deref(n.public):
		case len(nics) > 1:
			return query.Errorf("InvalidParameterCombination", "The associatePublicIPAddress parameter cannot be specified when launching with multiple network interfaces.")
		case n.existing != "":
			return query.Errorf("InvalidParameterCombination", "A network interface may not specify both a network interface ID and an associated public IP address")
		}
	}
	return nil
}

// settlePublic gives an interface the public address that its instance has for
// its life, or takes it away. It is of the primary interface's primary address
// and leads there as an Elastic IP address does; it goes when the instance has
// stopped or is gone, when an Elastic IP address comes in its place, or when the
// interface is not to have one any more. An instance that goes without gets a
// new one only while it has this interface alone and no Elastic IP address on it
// (EC2 user guide, "Public IPv4 addresses").
func settlePublic(tx *store.Tx, id vpc.ENIID, now time.Time) error {
	e := tx.ENI(id)
	if e == nil {
		return nil
	}
	var has *store.Address
	elastic, elsewhere := false, false
	for x := range tx.ElasticsOf(id) {
		switch {
		case x.Auto:
			has = x
		case x.Private == e.Primary:
			elastic = true
		default:
			elsewhere = true
		}
	}
	at := e.Attachment
	wants := e.AssociatePublic && !elastic && at != nil && at.Instance != "" && at.DeviceIndex == 0 && at.NetworkCard == 0
	var i *store.Instance
	if wants {
		i = tx.Instance(at.Instance)
		wants = i != nil && i.State != store.Stopped && i.State != store.Terminated
	}
	if has != nil {
		if !wants {
			tx.DeleteAddress(has.ID)
		}
		return nil
	}
	if !wants || elsewhere || i.State != store.Pending && i.State != store.Running {
		return nil
	}
	held := 0
	for range tx.InterfacesOf(i.ID) {
		held++
	}
	if held > 1 {
		return nil
	}
	public, err := freePublic(&tx.State, nil)
	if err != nil {
		return err
	}
	tx.PutAddress(&store.Address{ID: autoID(id), Public: public, Auto: true, ENI: id, Private: e.Primary, Created: now})
	return nil
}

// autoID is what the store calls an interface's public address for life. It is
// no allocation's: nobody allocated it.
func autoID(id vpc.ENIID) vpc.AllocationID { return vpc.AllocationID("auto-" + string(id)) }

// settlePublicOf is settlePublic of an instance's interfaces.
func settlePublicOf(tx *store.Tx, id vpc.InstanceID, now time.Time) error {
	var held []vpc.ENIID
	for e := range tx.InterfacesOf(id) {
		held = append(held, e.ID)
	}
	for _, e := range held {
		if err := settlePublic(tx, e, now); err != nil {
			return err
		}
	}
	return nil
}

// elastics counts the Elastic IP addresses, without those that instances have
// for their life.
func elastics(s *store.State) (n int) {
	for _, x := range s.Addresses.All() {
		if !x.Auto {
			n++
		}
	}
	return n
}
