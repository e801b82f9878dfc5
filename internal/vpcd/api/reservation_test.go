package api

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
)

func (w *world) reserve(subnet, cidr, kind string) string {
	w.t.Helper()
	return w.must("CreateSubnetCidrReservation", "SubnetId="+subnet, "Cidr="+cidr, "ReservationType="+kind).get("subnetCidrReservation.subnetCidrReservationId")
}

func TestReservationLife(t *testing.T) {
	w := newWorld(t)
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	other := w.must("CreateSubnet", "VpcId="+vpcID, "CidrBlock=10.0.1.0/24").get("subnet.subnetId")
	e := w.eni(subnet, "PrivateIpAddress=10.0.0.200") // in use before: it stays

	made := w.must("CreateSubnetCidrReservation", "SubnetId="+subnet, "Cidr=10.0.0.195/26", "ReservationType=explicit", "Description=for appliances",
		"TagSpecification.1.ResourceType=subnet-cidr-reservation", "TagSpecification.1.Tag.1.Key=Name", "TagSpecification.1.Tag.1.Value=fixed")
	id := made.get("subnetCidrReservation.subnetCidrReservationId")
	w.want(made, "subnetCidrReservation.cidr", "10.0.0.192/26")
	w.want(made, "subnetCidrReservation.reservationType", "explicit")
	w.want(made, "subnetCidrReservation.description", "for appliances")
	w.want(made, "subnetCidrReservation.ownerId", "123456789012")
	w.want(made, "subnetCidrReservation.tagSet.value", "fixed")
	w.want(w.must("DescribeTags", "Filter.1.Name=resource-type", "Filter.1.Value.1=subnet-cidr-reservation"), "tagSet.resourceId", id)
	// 251, less the interface's, less the 62 of the range that it and EC2 leave.
	w.want(w.must("DescribeSubnets", "SubnetId.1="+subnet), "subnetSet.availableIpAddressCount", "188")
	w.reserve(other, "10.0.1.64/28", "prefix")
	w.restart()
	for _, params := range [][]string{nil, {"Filter.1.Name=reservationType", "Filter.1.Value.1=explicit"}, {"Filter.1.Name=tag:Name", "Filter.1.Value.1=fix*"}} {
		got := w.must("GetSubnetCidrReservations", append(params, "SubnetId="+subnet)...)
		w.want(got, "subnetIpv4CidrReservationSet.subnetCidrReservationId", id)
		w.want(got, "subnetIpv6CidrReservationSet", "")
	}
	w.want(w.must("GetSubnetCidrReservations", "SubnetId="+subnet, "Filter.1.Name=reservationType", "Filter.1.Value.1=prefix"), "subnetIpv4CidrReservationSet", "")

	for _, c := range []struct {
		code, says string
		params     []string
	}{
		{"InvalidParameterValue", "has overlap with existing reserved CIDR block", []string{"SubnetId=" + subnet, "Cidr=10.0.0.224/28", "ReservationType=prefix"}},
		{"InvalidParameterValue", "not within", []string{"SubnetId=" + subnet, "Cidr=10.0.1.0/28", "ReservationType=prefix"}},
		{"InvalidParameterValue", "not within", []string{"SubnetId=" + subnet, "Cidr=10.0.0.0/23", "ReservationType=prefix"}},
		{"InvalidParameterValue", "not a valid CIDR", []string{"SubnetId=" + subnet, "Cidr=10.0.0.0", "ReservationType=prefix"}},
		{"UnsupportedOperation", "no reservations of IPv6", []string{"SubnetId=" + subnet, "Cidr=2001:db8:0:100:1::/80", "ReservationType=prefix"}},
		{"InvalidParameterValue", "", []string{"SubnetId=" + subnet, "Cidr=10.0.0.0/28", "ReservationType=any"}},
		{"MissingParameter", "", []string{"SubnetId=" + subnet, "Cidr=10.0.0.0/28"}},
		{"InvalidSubnetID.NotFound", "", []string{"SubnetId=subnet-00000000000000000", "Cidr=10.0.0.0/28", "ReservationType=prefix"}},
	} {
		if m := w.fails(c.code, "CreateSubnetCidrReservation", c.params...); !strings.Contains(m, c.says) {
			t.Errorf("%v: %s", c.params, m)
		}
	}
	w.fails("InvalidSubnetCidrReservationID.NotFound", "DeleteSubnetCidrReservation", "SubnetCidrReservationId=scr-00000000000000000")
	w.fails("InvalidSubnetCidrReservationID.Malformed", "DeleteSubnetCidrReservation", "SubnetCidrReservationId=subnet-0")

	gone := w.must("DeleteSubnetCidrReservation", "SubnetCidrReservationId="+id)
	w.want(gone, "deletedSubnetCidrReservation.tagSet.value", "fixed")
	w.want(w.must("DescribeSubnets", "SubnetId.1="+subnet), "subnetSet.availableIpAddressCount", "250")
	w.want(w.must("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+e), "networkInterfaceSet.privateIpAddress", "10.0.0.200")
	w.must("DeleteSubnet", "SubnetId="+other) // its reservation goes with it
	if n := w.store.View().Reservations.Len(); n != 0 {
		t.Errorf("%d reservations left", n)
	}
}

func TestReservationsKeepAddressesBack(t *testing.T) {
	w := newWorld(t)
	_, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/26") // 59 addresses; whole /28s: .16 and .32
	w.reserve(subnet, "10.0.0.0/28", "explicit")
	w.reserve(subnet, "10.0.0.32/28", "prefix")
	e := w.eni(subnet)
	primary := func(e string) string {
		return w.must("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+e).get("networkInterfaceSet.privateIpAddress")
	}
	if p := primary(e); p != "10.0.0.16" {
		t.Errorf("the first address is %s", p)
	}
	// The reserved /28 serves prefixes; when it is taken nothing else is whole.
	assign := func(params ...string) node {
		return w.must("AssignPrivateIpAddresses", append(params, "NetworkInterfaceId="+e)...)
	}
	w.want(assign("Ipv4PrefixCount=1"), "assignedIpv4PrefixSet.ipv4Prefix", "10.0.0.32/28")
	w.fails("InsufficientCidrBlocks", "AssignPrivateIpAddresses", "Ipv4PrefixCount=1", "NetworkInterfaceId="+e)
	// By name all is to be had.
	w.want(assign("PrivateIpAddress.1=10.0.0.4"), "assignedPrivateIpAddressesSet.privateIpAddress", "10.0.0.4")
	w.must("UnassignPrivateIpAddresses", "Ipv4Prefix.1=10.0.0.32/28", "NetworkInterfaceId="+e)
	w.want(assign("PrivateIpAddress.1=10.0.0.40"), "assignedPrivateIpAddressesSet.privateIpAddress", "10.0.0.40")
	// 15 and 15 are left outside the reservations, and not one more.
	w.want(w.must("DescribeSubnets"), "subnetSet.availableIpAddressCount", "30")
	w.must("AssignPrivateIpAddresses", "SecondaryPrivateIpAddressCount=30", "NetworkInterfaceId="+e)
	w.want(w.must("DescribeSubnets"), "subnetSet.availableIpAddressCount", "0")
	w.fails("InsufficientFreeAddressesInSubnet", "AssignPrivateIpAddresses", "SecondaryPrivateIpAddressCount=1", "NetworkInterfaceId="+e)
	w.fails("InsufficientFreeAddressesInSubnet", "CreateNetworkInterface", "SubnetId="+subnet)
	// What is free for an explicit name is no room for a prefix.
	if m := w.fails("InvalidParameterValue", "AssignPrivateIpAddresses", "Ipv4PrefixCount=1", "NetworkInterfaceId="+e); m != "There aren't sufficient free Ipv4 addresses or prefixes" {
		t.Errorf("message %q", m)
	}
}

func TestPrefixesComeFromTheirReservationsFirst(t *testing.T) {
	w := newWorld(t)
	_, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	w.reserve(subnet, "10.0.0.128/27", "prefix")
	w.reserve(subnet, "10.0.0.208/28", "explicit")
	w.reserve(subnet, "10.0.0.192/29", "prefix") // too small for one
	e := w.eni(subnet, "PrivateIpAddress=10.0.0.4")
	got := w.must("AssignPrivateIpAddresses", "NetworkInterfaceId="+e, "Ipv4PrefixCount=3").get("assignedIpv4PrefixSet.ipv4Prefix")
	if want := "10.0.0.128/28,10.0.0.144/28,10.0.0.16/28"; got != want {
		t.Errorf("prefixes %s, want %s", got, want)
	}
}

// Single addresses that come and go as on EC2 leave no /28 whole long before
// the subnet is full; lowest first they leave nearly all.
func TestScatteredAddressesFragment(t *testing.T) {
	for _, c := range []struct {
		addresses string
		min, max  int // whole /28s
	}{{chaos.AddressesLowest, 12, 12}, {chaos.AddressesScattered, 0, 5}} {
		t.Run(c.addresses, func(t *testing.T) {
			w := newWorld(t)
			if err := w.chaos.Set(chaos.Settings{Throttle: "off", Addresses: c.addresses}); err != nil {
				t.Fatal(err)
			}
			_, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
			e := w.eni(subnet, "SecondaryPrivateIpAddressCount=43")
			w.want(w.must("DescribeSubnets"), "subnetSet.availableIpAddressCount", "207")
			whole := 0
			for ; ; whole++ {
				n, status := w.post("AssignPrivateIpAddresses", "NetworkInterfaceId="+e, "Ipv4PrefixCount=1")
				if status != 200 {
					if code := n.get("Errors.Error.Code"); code != "InsufficientCidrBlocks" && c.addresses == chaos.AddressesScattered {
						t.Errorf("refused with %s", code)
					}
					break
				}
				p := netip.MustParsePrefix(n.get("assignedIpv4PrefixSet.ipv4Prefix"))
				if p != p.Masked() || p.Bits() != 28 {
					t.Errorf("prefix %s", p)
				}
			}
			if whole < c.min || whole > c.max {
				t.Errorf("%d whole /28s among 207 free addresses, want %d to %d", whole, c.min, c.max)
			}
		})
	}
}
