package api

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// TestRandomRoutingKeepsTheBooks makes random calls on route tables, network
// ACLs, gateways, Elastic IPs and peerings, and checks after each that what must
// hold does, that refused calls changed nothing, and that a restart does not.
func TestRandomRoutingKeepsTheBooks(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { randomRouting(t, rand.New(rand.NewPCG(seed, 11)), 400) })
	}
}

// ids of a table, and one of an object that there is not.
func idsOf[K ~string, V any](t store.Table[K, V], prefix string) []string {
	out := []string{prefix + "-00000000000000000"}
	for id := range t.All() {
		out = append(out, string(id))
	}
	return out
}

func randomRouting(t *testing.T, r *rand.Rand, steps int) {
	w := newWorld(t)
	if err := w.chaos.Set(chaos.Settings{Throttle: "off", AttachLatency: time.Second, Quotas: map[chaos.Quota]int{chaos.QuotaACLs: 4, chaos.QuotaRouteTables: 4, chaos.QuotaNATs: 2}}); err != nil {
		t.Fatal(err)
	}
	pick := func(list []string) string { return list[r.IntN(len(list))] }
	accepted := 0
	for step := range steps {
		s := w.store.View()
		vpcs, subnets, enis := idsOf(s.VPCs, "vpc"), idsOf(s.Subnets, "subnet"), idsOf(s.ENIs, "eni")
		tables, acls, gateways := idsOf(s.RouteTables, "rtb"), idsOf(s.ACLs, "acl"), idsOf(s.Gateways, "igw")
		addresses, nats, peerings, instances := idsOf(s.Addresses, "eipalloc"), idsOf(s.NATs, "nat"), idsOf(s.Peerings, "pcx"), idsOf(s.Instances, "i")
		routes, entries, elastic := []string{"rtbassoc-00000000000000000"}, []string{"aclassoc-00000000000000000"}, []string{"eipassoc-00000000000000000"}
		for _, x := range s.RouteTables.All() {
			for _, a := range x.Associations {
				routes = append(routes, a.ID)
			}
		}
		for _, x := range s.ACLs.All() {
			for _, a := range x.Associations {
				entries = append(entries, a.ID)
			}
		}
		for _, x := range s.Addresses.All() {
			if x.Association != "" {
				elastic = append(elastic, x.Association)
			}
		}
		n := r.IntN(4)
		block := pick([]string{fmt.Sprintf("10.%d.0.0/16", n), fmt.Sprintf("10.%d.%d.0/24", n, r.IntN(3)), "0.0.0.0/0", "192.168.0.0/24"})
		target := pick([]string{"GatewayId=" + pick(gateways), "NatGatewayId=" + pick(nats), "NetworkInterfaceId=" + pick(enis), "VpcPeeringConnectionId=" + pick(peerings), "InstanceId=" + pick(instances)})
		call := [][]string{
			{"CreateVpc", fmt.Sprintf("CidrBlock=10.%d.0.0/16", n)},
			{"DeleteVpc", "VpcId=" + pick(vpcs)},
			{"CreateSubnet", "VpcId=" + pick(vpcs), fmt.Sprintf("CidrBlock=10.%d.%d.0/24", n, r.IntN(3))},
			{"CreateSubnet", "VpcId=" + pick(vpcs), fmt.Sprintf("CidrBlock=10.%d.%d.0/24", n, r.IntN(3))},
			{"DeleteSubnet", "SubnetId=" + pick(subnets)},
			{"CreateNetworkInterface", "SubnetId=" + pick(subnets), "SecondaryPrivateIpAddressCount=1"},
			{"DeleteNetworkInterface", "NetworkInterfaceId=" + pick(enis)},
			{"AssignPrivateIpAddresses", "NetworkInterfaceId=" + pick(enis), "PrivateIpAddress.1=" + fmt.Sprintf("10.%d.%d.9", n, r.IntN(3)), "AllowReassignment=true"},
			{"RunInstances", image, "InstanceType=t3.small", "MinCount=1", "MaxCount=1", "SubnetId=" + pick(subnets)},
			{pick([]string{"TerminateInstances", "StopInstances", "StartInstances", "RebootInstances"}), "InstanceId.1=" + pick(instances)},
			{"CreateRouteTable", "VpcId=" + pick(vpcs)},
			{"DeleteRouteTable", "RouteTableId=" + pick(tables)},
			{"AssociateRouteTable", "RouteTableId=" + pick(tables), pick([]string{"SubnetId=" + pick(subnets), "GatewayId=" + pick(gateways)})},
			{"ReplaceRouteTableAssociation", "AssociationId=" + pick(routes), "RouteTableId=" + pick(tables)},
			{"DisassociateRouteTable", "AssociationId=" + pick(routes)},
			{pick([]string{"CreateRoute", "CreateRoute", "ReplaceRoute"}), "RouteTableId=" + pick(tables), "DestinationCidrBlock=" + block, target},
			{"DeleteRoute", "RouteTableId=" + pick(tables), "DestinationCidrBlock=" + block},
			{"CreateNetworkAcl", "VpcId=" + pick(vpcs)},
			{"DeleteNetworkAcl", "NetworkAclId=" + pick(acls)},
			{"ReplaceNetworkAclAssociation", "AssociationId=" + pick(entries), "NetworkAclId=" + pick(acls)},
			{"CreateInternetGateway"},
			{pick([]string{"AttachInternetGateway", "AttachInternetGateway", "DetachInternetGateway"}), "InternetGatewayId=" + pick(gateways), "VpcId=" + pick(vpcs)},
			{"DeleteInternetGateway", "InternetGatewayId=" + pick(gateways)},
			{"AllocateAddress"},
			{"ReleaseAddress", "AllocationId=" + pick(addresses)},
			{"AssociateAddress", "AllocationId=" + pick(addresses), "NetworkInterfaceId=" + pick(enis), fmt.Sprintf("AllowReassociation=%v", r.IntN(2) == 0)},
			{"DisassociateAddress", "AssociationId=" + pick(elastic)},
			{"CreateNatGateway", "SubnetId=" + pick(subnets), pick([]string{"AllocationId=" + pick(addresses), "ConnectivityType=private"})},
			{"DeleteNatGateway", "NatGatewayId=" + pick(nats)},
			{"CreateVpcPeeringConnection", "VpcId=" + pick(vpcs), "PeerVpcId=" + pick(vpcs)},
			{pick([]string{"AcceptVpcPeeringConnection", "AcceptVpcPeeringConnection", "RejectVpcPeeringConnection", "DeleteVpcPeeringConnection"}), "VpcPeeringConnectionId=" + pick(peerings)},
			{"AssociateVpcCidrBlock", "VpcId=" + pick(vpcs), fmt.Sprintf("CidrBlock=10.%d.0.0/16", 4+n)},
		}[r.IntN(32)]
		if r.IntN(3) == 0 {
			w.clock.Advance(time.Second)
		}
		if err := w.api.Settle(); err != nil {
			t.Fatal(err)
		}
		before := w.store.View()
		answer, status := w.post(call[0], call[1:]...)
		switch {
		case status >= 500:
			t.Fatalf("step %d: %v: %s", step, call, answer.get("Errors.Error.Message"))
		case status == 200:
			accepted++
		case w.store.View() != before:
			t.Fatalf("step %d: %v was refused and changed something", step, call)
		}
		checkRouting(t, w.store.View())
		if r.IntN(50) == 0 {
			was := dumpRouting(w)
			w.restart()
			if err := w.chaos.Set(chaos.Settings{Throttle: "off", AttachLatency: time.Second}); err != nil {
				t.Fatal(err)
			}
			if got := dumpRouting(w); got != was {
				t.Fatalf("step %d: after a restart\n%s\nbefore\n%s", step, got, was)
			}
		}
		if t.Failed() {
			t.Fatalf("step %d: after %v", step, call)
		}
	}
	if accepted < steps/8 {
		t.Errorf("only %d of %d calls were accepted: the test tests little", accepted, steps)
	}
}

// checkRouting recomputes from the objects alone what the store keeps as books.
func checkRouting(t *testing.T, s *store.State) {
	t.Helper()
	mains, defaults := map[vpc.VPCID]int{}, map[vpc.VPCID]int{}
	table, acl := map[string]vpc.RouteTableID{}, map[vpc.SubnetID]vpc.NetworkACLID{}
	for id, x := range s.RouteTables.All() {
		for _, a := range x.Associations {
			if a.Main {
				mains[x.VPC]++
			}
			for _, user := range []string{string(a.Subnet), string(a.Gateway)} {
				if user == "" {
					continue
				}
				if other, ok := table[user]; ok {
					t.Errorf("%s uses %s and %s", user, other, id)
				}
				table[user] = id
			}
			if n := s.Subnet(a.Subnet); a.Subnet != "" && (n == nil || n.VPC != x.VPC) {
				t.Errorf("%s is tied to %s", id, a.Subnet)
			}
			if g := s.Gateway(a.Gateway); a.Gateway != "" && (g == nil || g.VPC != x.VPC) {
				t.Errorf("%s is tied to %s", id, a.Gateway)
			}
		}
		seen := map[netip.Prefix]bool{}
		for _, route := range s.RoutesOf(x) {
			if seen[route.CIDR] {
				t.Errorf("%s has two routes to %s", id, route.CIDR)
			}
			seen[route.CIDR] = true
		}
		for _, c := range s.VPC(x.VPC).CIDRs {
			if !seen[c.CIDR] {
				t.Errorf("%s has no route to %s of its VPC", id, c.CIDR)
			}
		}
	}
	for id, x := range s.ACLs.All() {
		if x.Default {
			defaults[x.VPC]++
		}
		for _, a := range x.Associations {
			if other, ok := acl[a.Subnet]; ok {
				t.Errorf("%s has %s and %s", a.Subnet, other, id)
			}
			acl[a.Subnet] = id
		}
	}
	for id := range s.VPCs.All() {
		if mains[id] != 1 || defaults[id] != 1 || s.MainTable(id) == nil || s.DefaultACL(id) == nil {
			t.Errorf("%s has %d main tables and %d default ACLs", id, mains[id], defaults[id])
		}
	}
	if len(mains) != s.VPCs.Len() || len(defaults) != s.VPCs.Len() || len(acl) != s.Subnets.Len() {
		t.Errorf("%d VPCs with %d main tables and %d default ACLs; %d subnets, %d with an ACL", s.VPCs.Len(), len(mains), len(defaults), s.Subnets.Len(), len(acl))
	}
	for id := range s.Subnets.All() {
		want := table[string(id)]
		if want == "" {
			want = s.MainTable(s.Subnet(id).VPC).ID
		}
		if got := s.TableOf(id); got == nil || got.ID != want || s.ACLOf(id) == nil || s.ACLOf(id).ID != acl[id] {
			t.Errorf("%s uses %v, want %s", id, got, want)
		}
	}
	attached := map[vpc.VPCID]bool{}
	for id, g := range s.Gateways.All() {
		if g.VPC == "" {
			continue
		}
		if attached[g.VPC] || s.GatewayOf(g.VPC) != g {
			t.Errorf("%s is one of several of %s", id, g.VPC)
		}
		attached[g.VPC] = true
	}
	for id, x := range s.Addresses.All() {
		e := s.ENI(x.ENI)
		switch {
		case x.ENI == "" && x.Association == "" && x.NAT == "":
		case e == nil || s.ByAddress(e.Subnet, x.Private) != e || s.ElasticOf(e.ID, x.Private) != x || s.ByPublic(x.Public) != x || e.NAT != x.NAT:
			t.Errorf("%s leads to %s of %v: %+v", id, x.Private, e, x)
		case !attached[e.VPC] && x.NAT == "": // a NAT gateway without one is about to fail
			t.Errorf("%s is associated in %s, which has no internet gateway", id, e.VPC)
		}
	}
	for id, n := range s.NATs.All() {
		e := s.ENI(n.ENI)
		if lives := n.State == store.NATPending || n.State == store.NATAvailable || n.State == store.NATDeleting; lives != (e != nil && e.NAT == id) {
			t.Errorf("%s is %s and has the interface %v", id, n.State, e)
		}
	}
	for id, p := range s.Peerings.All() {
		if p.Status != store.PeeringActive {
			continue
		}
		one, other := s.VPC(p.Requester.VPC), s.VPC(p.Accepter.VPC)
		if one == nil || other == nil || overlap(blocks(one), blocks(other)) {
			t.Errorf("%s is active between %v and %v", id, one, other)
		}
	}
}

// dumpRouting is what clients see of it.
func dumpRouting(w *world) string {
	var b strings.Builder
	for _, action := range []string{"DescribeRouteTables", "DescribeNetworkAcls", "DescribeInternetGateways", "DescribeAddresses", "DescribeNatGateways",
		"DescribeVpcPeeringConnections", "DescribeDhcpOptions", "DescribeNetworkInterfaces", "DescribeVpcs", "DescribeSubnets", "DescribeInstances"} {
		n := w.must(action)
		for i := range n.Children {
			if n.Children[i].XMLName.Local == "requestId" {
				n.Children[i].Text = ""
			}
		}
		fmt.Fprintf(&b, "%v\n", n)
	}
	return b.String()
}
