package api

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// TestRandomCallsKeepTheBooks makes random calls and checks after each that no
// address has two owners, that counts are right, that limits hold and that
// refused calls changed nothing; and now and then that a restart changes
// nothing either.
func TestRandomCallsKeepTheBooks(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { randomCalls(t, rand.New(rand.NewPCG(seed, 7)), 300) })
	}
}

func randomCalls(t *testing.T, r *rand.Rand, steps int) {
	w := newWorld(t)
	if r.IntN(2) == 0 {
		if err := w.chaos.Set(chaos.Settings{Throttle: "off", Addresses: chaos.AddressesScattered}); err != nil {
			t.Fatal(err)
		}
	}
	vpcID, _ := w.vpc("10.0.0.0/16", "10.0.255.0/28")
	subnets := map[string]netip.Prefix{}
	for i, size := range []int{25, 26, 28} {
		cidr := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i), 0}), size)
		id := w.must("CreateSubnet", "VpcId="+vpcID, "CidrBlock="+cidr.String(), "AvailabilityZone=us-east-1a").get("subnet.subnetId")
		subnets[id] = cidr
	}
	ids := slices.Sorted(maps.Keys(subnets))
	pick := func(list []string) string {
		if len(list) == 0 {
			return "eni-00000000000000000"
		}
		return list[r.IntN(len(list))]
	}
	addr := func(e string) string {
		c := subnets[pick(ids)]
		if s := w.store.View().ENI(vpc.ENIID(e)); s != nil && r.IntN(2) == 0 {
			c = subnets[string(s.Subnet)]
		}
		b := c.Addr().As4()
		b[3] += byte(r.IntN(1 << (32 - c.Bits())))
		return netip.AddrFrom4(b).String()
	}
	accepted := 0
	for step := range steps {
		var enis, instances, attachments []string
		for id, e := range w.store.View().ENIs.All() {
			enis = append(enis, string(id))
			if e.Attachment != nil {
				attachments = append(attachments, string(e.Attachment.ID))
			}
		}
		for id := range w.store.View().Instances.All() {
			instances = append(instances, string(id))
		}
		e := pick(enis)
		var action string
		var params []string
		switch r.IntN(15) {
		case 0, 1:
			action, params = "CreateNetworkInterface", []string{"SubnetId=" + pick(ids), fmt.Sprintf("SecondaryPrivateIpAddressCount=%d", r.IntN(4))}
		case 2:
			action, params = "CreateNetworkInterface", []string{"SubnetId=" + pick(ids), "Ipv4PrefixCount=1"}
		case 3:
			action, params = "DeleteNetworkInterface", []string{"NetworkInterfaceId=" + e}
		case 4, 5:
			action, params = "AssignPrivateIpAddresses", []string{"NetworkInterfaceId=" + e, fmt.Sprintf("SecondaryPrivateIpAddressCount=%d", 1+r.IntN(5))}
		case 6:
			action, params = "AssignPrivateIpAddresses", []string{"NetworkInterfaceId=" + e, fmt.Sprintf("Ipv4PrefixCount=%d", 1+r.IntN(2))}
		case 7, 8:
			action, params = "AssignPrivateIpAddresses", []string{"NetworkInterfaceId=" + e, "PrivateIpAddress.1=" + addr(e), fmt.Sprintf("AllowReassignment=%v", r.IntN(2) == 0)}
		case 9:
			if s := w.store.View().ENI(vpc.ENIID(e)); s != nil && len(s.Prefixes) > 0 {
				action, params = "UnassignPrivateIpAddresses", []string{"NetworkInterfaceId=" + e, "Ipv4Prefix.1=" + s.Prefixes[r.IntN(len(s.Prefixes))].String()}
			}
		case 10:
			if s := w.store.View().ENI(vpc.ENIID(e)); s != nil && len(s.Secondary) > 0 {
				action, params = "UnassignPrivateIpAddresses", []string{"NetworkInterfaceId=" + e, "PrivateIpAddress.1=" + s.Secondary[r.IntN(len(s.Secondary))].String()}
			}
		case 11:
			action, params = "RunInstances", []string{image, "InstanceType=" + pick([]string{"t3.small", "m5.large", "m4.large"}), "MinCount=1", "MaxCount=2", "SubnetId=" + pick(ids)}
		case 12:
			action, params = "AttachNetworkInterface", []string{"NetworkInterfaceId=" + e, "InstanceId=" + pick(instances), fmt.Sprintf("DeviceIndex=%d", 1+r.IntN(3))}
			if r.IntN(3) == 0 && len(attachments) > 0 {
				action, params = "DetachNetworkInterface", []string{"AttachmentId=" + pick(attachments)}
			}
		case 14:
			n := pick(ids)
			c := netip.PrefixFrom(netip.MustParseAddr(addr(e)), 26+r.IntN(5)).Masked()
			action, params = "CreateSubnetCidrReservation", []string{"SubnetId=" + n, "Cidr=" + c.String(), "ReservationType=" + pick([]string{"prefix", "explicit"})}
			if reserved := slices.Collect(maps.Keys(maps.Collect(w.store.View().Reservations.All()))); r.IntN(2) == 0 && len(reserved) > 0 {
				action, params = "DeleteSubnetCidrReservation", []string{"SubnetCidrReservationId=" + pick(slices.Sorted(slices.Values(reserved)))}
			}
		case 13:
			action, params = "TerminateInstances", []string{"InstanceId.1=" + pick(instances)}
		}
		if action == "" {
			continue
		}
		if err := w.api.Settle(); err != nil {
			t.Fatal(err)
		}
		before := w.store.View()
		n, status := w.post(action, params...)
		switch {
		case status >= 500:
			t.Fatalf("step %d: %s %v: %s", step, action, params, n.get("Errors.Error.Message"))
		case status == 200:
			accepted++
		case w.store.View() != before:
			t.Fatalf("step %d: %s %v was refused and changed something", step, action, params)
		}
		if named := strings.Contains(strings.Join(params, " "), "PrivateIpAddress.1="); !named {
			checkReserved(t, before, w.store.View())
		}
		checkBooks(t, w, subnets)
		if r.IntN(50) == 0 {
			was := dump(w)
			w.restart()
			if got := dump(w); got != was {
				t.Fatalf("step %d: after a restart\n%s\nbefore\n%s", step, got, was)
			}
		}
		if t.Failed() {
			t.Fatalf("step %d: after %s %v", step, action, params)
		}
	}
	if accepted < steps/4 {
		t.Errorf("only %d of %d calls were accepted: the test tests little", accepted, steps)
	}
}

// checkReserved reports addresses that came by number out of a range that is
// set aside.
func checkReserved(t *testing.T, before, after *store.State) {
	t.Helper()
	for id, e := range after.ENIs.All() {
		old := before.ENI(id)
		if old == nil {
			old = new(store.ENI)
		}
		for _, r := range before.Reservations.All() {
			if r.Subnet != e.Subnet {
				continue
			}
			for _, a := range append(slices.Clone(e.Secondary), e.Primary) {
				if r.CIDR.Contains(a) && a != old.Primary && !slices.Contains(old.Secondary, a) {
					t.Errorf("%s of %s is set aside by %s", a, id, r.CIDR)
				}
			}
			for _, p := range e.Prefixes {
				if r.CIDR.Overlaps(p) && !slices.Contains(old.Prefixes, p) && (!r.Prefixes || r.CIDR.Bits() > p.Bits()) {
					t.Errorf("%s of %s is set aside by %s", p, id, r.CIDR)
				}
			}
		}
	}
}

// checkBooks recomputes who has which address from the interfaces alone.
func checkBooks(t *testing.T, w *world, subnets map[string]netip.Prefix) {
	t.Helper()
	s := w.store.View()
	owner := map[netip.Addr]vpc.ENIID{}
	used := map[vpc.SubnetID]int{}
	macs := map[string]bool{}
	held := map[vpc.InstanceID]int{}
	for id, e := range s.ENIs.All() {
		take := func(a netip.Addr) {
			if o, ok := owner[a]; ok {
				t.Errorf("%s belongs to %s and %s", a, o, id)
			}
			owner[a] = id
			used[e.Subnet]++
			if c := subnets[string(e.Subnet)]; !c.Contains(a) || s.Space(e.Subnet).Reserved(a) {
				t.Errorf("%s of %s is not for interfaces of %s", a, id, c)
			}
			if o := s.ByAddress(e.Subnet, a); o != e {
				t.Errorf("ByAddress(%s) = %v, want %s", a, o, id)
			}
		}
		take(e.Primary)
		for _, a := range e.Secondary {
			take(a)
		}
		for _, p := range e.Prefixes {
			for a := p.Addr(); p.Contains(a); a = a.Next() {
				take(a)
			}
		}
		if macs[e.MAC] {
			t.Errorf("MAC %s twice", e.MAC)
		}
		macs[e.MAC] = true
		if at := e.Attachment; at != nil {
			i := s.Instance(at.Instance)
			l, _ := vpc.LimitsOf(i.Type)
			held[at.Instance]++
			if e.Slots() > l.IPv4PerENI || held[at.Instance] > l.ENIs || len(e.Prefixes) > 0 && !l.Nitro() {
				t.Errorf("%s of %s (%s) is over its limits", id, i.ID, i.Type)
			}
		}
	}
	for id, c := range subnets {
		want := 1<<(32-c.Bits()) - 5 - used[vpc.SubnetID(id)]
		for _, r := range s.Reservations.All() {
			for a := r.CIDR.Addr(); string(r.Subnet) == id && r.CIDR.Contains(a); a = a.Next() {
				if _, taken := owner[a]; !taken && !s.Space(r.Subnet).Reserved(a) {
					want--
				}
			}
		}
		if s.Space(vpc.SubnetID(id)).Free() != want {
			t.Errorf("%s: %d free, want %d", c, s.Space(vpc.SubnetID(id)).Free(), want)
		}
	}
}

// dump is what clients see.
func dump(w *world) string {
	var b strings.Builder
	for _, action := range []string{"DescribeSubnets", "DescribeInstances", "DescribeNetworkInterfaces", "DescribeSecurityGroups", "DescribeTags"} {
		n := w.must(action)
		n.Children = slices.DeleteFunc(n.Children, func(c node) bool { return c.XMLName.Local == "requestId" })
		fmt.Fprintf(&b, "%v\n", n)
	}
	return b.String()
}
