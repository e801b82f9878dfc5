package vpcd

import (
	"bytes"
	"net/netip"
	"os/exec"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
)

// TestIPv6IsInEffectWhenAnswered: instances that are launched with IPv6 addresses
// have them and reach each other, and what is assigned and taken later is in
// effect when the call is answered.
func TestIPv6IsInEffectWhenAnswered(t *testing.T) {
	r := start(t, labOptions(t))
	v := r.id("vpc", "CreateVpc", "CidrBlock=10.0.0.0/16", "AmazonProvidedIpv6CidrBlock=true")
	s := r.id("subnet", "CreateSubnet", "VpcId="+v, "CidrBlock=10.0.1.0/24", "Ipv6CidrBlock=2001:db8:0:100::/64")
	g := r.id("sg", "CreateSecurityGroup", "GroupName=all", "GroupDescription=x", "VpcId="+v)
	r.ec2("AuthorizeSecurityGroupIngress", "GroupId="+g, "IpPermissions.1.IpProtocol=udp", "IpPermissions.1.FromPort=53", "IpPermissions.1.ToPort=53",
		"IpPermissions.1.Ipv6Ranges.1.CidrIpv6=2001:db8:0:100::/64")
	netns := map[string]string{}
	enis := map[string]vpc.ENIID{}
	for _, address := range []string{"2001:db8:0:100::10", "2001:db8:0:100::11"} {
		id := r.id("i", "RunInstances", "ImageId=ami-00000000000000001", "InstanceType=m5.large", "MinCount=1", "MaxCount=1",
			"NetworkInterface.1.DeviceIndex=0", "NetworkInterface.1.SubnetId="+s, "NetworkInterface.1.SecurityGroupId.1="+g, "NetworkInterface.1.Ipv6Addresses.1.Ipv6Address="+address)
		enis[address] = vpc.ENIID(r.id("eni", "DescribeNetworkInterfaces", "Filter.1.Name=attachment.instance-id", "Filter.1.Value.1="+id))
		eventually(t, "running", func() bool {
			var instances []InstanceInfo
			r.admin("GET", "instances", nil, &instances)
			for _, i := range instances {
				if i.InstanceID == id && i.State == "running" {
					netns[address] = i.Netns
				}
			}
			return netns[address] != ""
		})
		isLocal(t, netns[address], address)
	}
	client, server := listenUDP(t, netns["2001:db8:0:100::10"], "[2001:db8:0:100::10]:1000"), listenUDP(t, netns["2001:db8:0:100::11"], "[::]:53")
	dropped := func(address string) map[fabric.DropReason]uint64 {
		var c map[vpc.ENIID]fabric.Counters
		r.admin("GET", "counters", nil, &c)
		return c[enis[address]].Drops
	}
	passes := func(when, to string) {
		t.Helper()
		if _, err := client.WriteToUDPAddrPort([]byte(when), netip.AddrPortFrom(netip.MustParseAddr(to), 53)); err != nil {
			t.Fatal(err)
		}
		if err := server.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 64)
		if n, _, err := server.ReadFromUDPAddrPort(buf); err != nil || string(buf[:n]) != when {
			t.Errorf("%s: received %q, %v; drops %v and %v", when, buf[:n], err, dropped("2001:db8:0:100::10"), dropped("2001:db8:0:100::11"))
		}
	}
	refused := func(when, to string) {
		t.Helper()
		before := dropped("2001:db8:0:100::10")[fabric.NoTarget]
		if _, err := client.WriteToUDPAddrPort([]byte(when), netip.AddrPortFrom(netip.MustParseAddr(to), 53)); err != nil {
			t.Fatal(err)
		}
		eventually(t, when+": dropped", func() bool { return dropped("2001:db8:0:100::10")[fabric.NoTarget] > before })
	}
	passes("as launched", "2001:db8:0:100::11")
	addTo(t, netns["2001:db8:0:100::11"], "2001:db8:0:100::12")
	refused("of nobody", "2001:db8:0:100::12")
	for range 3 {
		r.ec2("AssignIpv6Addresses", "NetworkInterfaceId="+string(enis["2001:db8:0:100::11"]), "Ipv6Addresses.1=2001:db8:0:100::12")
		passes("assigned", "2001:db8:0:100::12")
		r.ec2("UnassignIpv6Addresses", "NetworkInterfaceId="+string(enis["2001:db8:0:100::11"]), "Ipv6Addresses.1=2001:db8:0:100::12")
		refused("taken away", "2001:db8:0:100::12")
	}
	addTo(t, netns["2001:db8:0:100::11"], "2001:db8:0:100:7::9")
	r.ec2("AssignIpv6Addresses", "NetworkInterfaceId="+string(enis["2001:db8:0:100::11"]), "Ipv6Prefix.1=2001:db8:0:100:7::/80")
	passes("in a prefix", "2001:db8:0:100:7::9")
}

// addTo gives a guest an address on its loopback device.
func addTo(t *testing.T, netns, address string) {
	t.Helper()
	guestIP(t, netns, "addr", "add", address+"/128", "dev", "lo")
	isLocal(t, netns, address)
}

// isLocal waits until a guest's kernel takes an address for its own, which it
// does a moment after it was added.
func isLocal(t *testing.T, netns, address string) {
	t.Helper()
	eventually(t, address+" is local", func() bool { return bytes.HasPrefix(guestIP(t, netns, "route", "get", address), []byte("local")) })
}

// guestIP runs the ip command in a guest.
func guestIP(t *testing.T, netns string, args ...string) (out []byte) {
	t.Helper()
	if err := nl.Do(netns, func() (err error) {
		out, err = exec.Command("ip", args...).CombinedOutput()
		return err
	}); err != nil {
		t.Fatalf("ip %v: %v: %s", args, err, out)
	}
	return out
}
