package api

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// TestRandomIPv6CallsKeepTheBooks makes random calls about IPv6 and checks after
// each that blocks and addresses lie within what they are of, that none has two
// owners, that limits hold, and that refused calls changed nothing; and now and
// then that a restart changes nothing either.
func TestRandomIPv6CallsKeepTheBooks(t *testing.T) {
	accepted := map[string]int{}
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { randomIPv6Calls(t, rand.New(rand.NewPCG(seed, 11)), 300, accepted) })
	}
	for _, action := range []string{"AssignIpv6Addresses", "UnassignIpv6Addresses", "CreateNetworkInterface", "RunInstances", "AssociateVpcCidrBlock"} {
		if accepted[action] == 0 {
			t.Errorf("no %s was accepted: the test tests little", action)
		}
	}
}

func randomIPv6Calls(t *testing.T, r *rand.Rand, steps int, accepted map[string]int) {
	w := newWorld(t)
	if r.IntN(2) == 0 {
		if err := w.chaos.Set(chaos.Settings{Throttle: "off", Addresses: chaos.AddressesScattered}); err != nil {
			t.Fatal(err)
		}
	}
	one, subnet := w.vpc6("10.0.0.0/16", "10.0.0.0/22")
	other, plain := w.vpc("10.1.0.0/16", "10.1.0.0/22")
	third := w.must("CreateSubnet", "VpcId="+one, "CidrBlock=10.0.4.0/22", "AvailabilityZone=us-east-1a").get("subnet.subnetId")
	vpcs, subnets := []string{one, other}, []string{subnet, third, plain}
	pick := func(list []string) string {
		if len(list) == 0 {
			return "eni-00000000000000000"
		}
		return list[r.IntN(len(list))]
	}
	block := func() string { return fmt.Sprintf("2001:db8:0:%x", 0x100*(1+r.IntN(3))+r.IntN(3)) }
	addr := func() string {
		if r.IntN(3) == 0 {
			return fmt.Sprintf("%s:%x::%x", block(), r.IntN(4), r.IntN(3))
		}
		return fmt.Sprintf("%s::%x", block(), r.IntN(20))
	}
	for step := range steps {
		s := w.store.View()
		var enis, instances, associations []string
		for id := range s.ENIs.All() {
			enis = append(enis, string(id))
		}
		for id := range s.Instances.All() {
			instances = append(instances, string(id))
		}
		e := pick(enis)
		held := s.ENI(vpc.ENIID(e))
		var action string
		var params []string
		switch r.IntN(14) {
		case 0:
			action, params = "CreateNetworkInterface", []string{"SubnetId=" + pick(subnets), fmt.Sprintf("Ipv6AddressCount=%d", r.IntN(4))}
		case 1:
			action, params = "CreateNetworkInterface", []string{"SubnetId=" + pick(subnets), "Ipv6PrefixCount=1"}
		case 2:
			action, params = "CreateNetworkInterface", []string{"SubnetId=" + pick(subnets)}
		case 3:
			action, params = "AssignIpv6Addresses", []string{"NetworkInterfaceId=" + e, fmt.Sprintf("Ipv6AddressCount=%d", 1+r.IntN(6))}
		case 4:
			action, params = "AssignIpv6Addresses", []string{"NetworkInterfaceId=" + e, "Ipv6Addresses.1=" + addr()}
		case 5:
			action, params = "AssignIpv6Addresses", []string{"NetworkInterfaceId=" + e, fmt.Sprintf("Ipv6PrefixCount=%d", 1+r.IntN(3))}
			if r.IntN(2) == 0 {
				params[1] = fmt.Sprintf("Ipv6Prefix.1=%s:%x::/80", block(), r.IntN(5))
			}
		case 6:
			if held != nil && len(held.IPv6) > 0 {
				action, params = "UnassignIpv6Addresses", []string{"NetworkInterfaceId=" + e, "Ipv6Addresses.1=" + held.IPv6[r.IntN(len(held.IPv6))].String()}
			}
		case 7:
			if held != nil && len(held.IPv6Prefixes) > 0 {
				action, params = "UnassignIpv6Addresses", []string{"NetworkInterfaceId=" + e, "Ipv6Prefix.1=" + held.IPv6Prefixes[r.IntN(len(held.IPv6Prefixes))].String()}
			}
		case 8:
			action, params = "RunInstances", []string{image, "InstanceType=" + pick([]string{"t3.small", "m5.large", "m4.large", "m3.medium"}), "MinCount=1", "MaxCount=2", "SubnetId=" + pick(subnets), "Ipv6AddressCount=1"}
		case 9:
			action, params = "AttachNetworkInterface", []string{"NetworkInterfaceId=" + e, "InstanceId=" + pick(instances), fmt.Sprintf("DeviceIndex=%d", 1+r.IntN(3))}
		case 10:
			action, params = pick([]string{"TerminateInstances", "DeleteNetworkInterface"}), []string{"InstanceId.1=" + pick(instances)}
			if action == "DeleteNetworkInterface" {
				params = []string{"NetworkInterfaceId=" + e}
			}
		case 11:
			action, params = "AssociateVpcCidrBlock", []string{"VpcId=" + pick(vpcs), "AmazonProvidedIpv6CidrBlock=true"}
			for _, v := range s.VPCs.All() {
				for _, c := range v.IPv6CIDRs {
					associations = append(associations, c.ID)
				}
			}
			if r.IntN(2) == 0 && len(associations) > 0 {
				action, params = "DisassociateVpcCidrBlock", []string{"AssociationId=" + pick(associations)}
			}
		case 12:
			action, params = "AssociateSubnetCidrBlock", []string{"SubnetId=" + pick(subnets), "Ipv6CidrBlock=" + block() + "::/64"}
			for _, n := range s.Subnets.All() {
				if n.IPv6.ID != "" {
					associations = append(associations, n.IPv6.ID)
				}
			}
			if r.IntN(2) == 0 && len(associations) > 0 {
				action, params = "DisassociateSubnetCidrBlock", []string{"AssociationId=" + pick(associations)}
			}
		case 13:
			action, params = "ModifySubnetAttribute", []string{"SubnetId=" + pick(subnets), fmt.Sprintf("AssignIpv6AddressOnCreation.Value=%v", r.IntN(2) == 0)}
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
			accepted[action]++
		case w.store.View() != before:
			t.Fatalf("step %d: %s %v was refused and changed something", step, action, params)
		}
		checkIPv6Books(t, w.store.View())
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
}

// checkIPv6Books recomputes who has which block and address from the objects
// alone.
func checkIPv6Books(t *testing.T, s *store.State) {
	t.Helper()
	blocks := map[netip.Prefix]string{}
	claim := func(p netip.Prefix, who string) {
		if o := blocks[p]; o != "" {
			t.Errorf("%s is of %s and %s", p, o, who)
		}
		blocks[p] = who
	}
	for id, v := range s.VPCs.All() {
		for _, c := range v.IPv6CIDRs {
			claim(c.CIDR, string(id))
			if c.CIDR.Bits() != store.VPCIPv6Bits || !store.IPv6Pool.Contains(c.CIDR.Addr()) {
				t.Errorf("%s of %s is no block of %s", c.CIDR, id, store.IPv6Pool)
			}
		}
	}
	for id, n := range s.Subnets.All() {
		c := n.IPv6.CIDR
		if !c.IsValid() {
			if n.AssignIPv6 {
				t.Errorf("%s gives addresses and has none", id)
			}
			continue
		}
		claim(c, string(id))
		if !slices.ContainsFunc(s.VPC(n.VPC).IPv6CIDRs, func(x store.CIDRAssociation) bool { return x.CIDR.Contains(c.Addr()) }) {
			t.Errorf("%s of %s is of no block of its VPC", c, id)
		}
	}
	var taken []netip.Prefix
	for id, e := range s.ENIs.All() {
		ranges := slices.Clone(e.IPv6Prefixes)
		for _, a := range e.IPv6 {
			ranges = append(ranges, netip.PrefixFrom(a, 128))
		}
		for _, p := range ranges {
			if i := slices.IndexFunc(taken, p.Overlaps); i >= 0 {
				t.Errorf("%s of %s overlaps %s", p, id, taken[i])
			}
			taken = append(taken, p)
			if c := s.Subnet(e.Subnet).IPv6.CIDR; !c.Contains(p.Addr()) || store.IPv6Reserved(p.Addr()) {
				t.Errorf("%s of %s is not for interfaces of %s", p, id, c)
			}
			if o := s.ByAddress(e.Subnet, p.Addr()); o != e {
				t.Errorf("ByAddress(%s) = %v, want %s", p.Addr(), o, id)
			}
		}
		if at := e.Attachment; at != nil {
			if l, _ := vpc.LimitsOf(s.Instance(at.Instance).Type); e.IPv6Slots() > l.IPv6PerENI || len(e.IPv6Prefixes) > 0 && !l.Nitro() {
				t.Errorf("%s of a %s is over its limits: %s", id, l.Type, strings.Join(collect(ranges, netip.Prefix.String), " "))
			}
		}
	}
}
