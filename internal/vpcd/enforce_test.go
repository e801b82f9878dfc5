package vpcd

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
)

// A change of rules is in effect when its call is answered: the next packet is
// judged by it.
func TestRulesAreInEffectWhenAnswered(t *testing.T) {
	r := start(t, labOptions(t))
	v := r.id("vpc", "CreateVpc", "CidrBlock=10.0.0.0/16")
	s := r.id("subnet", "CreateSubnet", "VpcId="+v, "CidrBlock=10.0.1.0/24")
	open := r.id("sg", "CreateSecurityGroup", "GroupName=clients", "GroupDescription=x", "VpcId="+v)
	g := r.id("sg", "CreateSecurityGroup", "GroupName=servers", "GroupDescription=x", "VpcId="+v)
	other := r.id("sg", "CreateSecurityGroup", "GroupName=others", "GroupDescription=x", "VpcId="+v)
	netns := map[string]string{}
	enis := map[string]vpc.ENIID{}
	for address, group := range map[string]string{"10.0.1.10": open, "10.0.1.11": g} {
		id := r.id("i", "RunInstances", "ImageId=ami-00000000000000001", "InstanceType=m5.large", "MinCount=1", "MaxCount=1",
			"SubnetId="+s, "PrivateIpAddress="+address, "SecurityGroupId.1="+group)
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
	}
	client, server := listenUDP(t, netns["10.0.1.10"], "10.0.1.10:1000"), listenUDP(t, netns["10.0.1.11"], "10.0.1.11:53")
	to := server.LocalAddr().(*net.UDPAddr).AddrPort()
	refused := func() uint64 {
		var c map[vpc.ENIID]fabric.Counters
		r.admin("GET", "counters", nil, &c)
		return c[enis["10.0.1.11"]].Drops[fabric.SGIngress]
	}
	// Sending is synchronous up to the receiver's queue.
	passes := func(when string, want bool) {
		t.Helper()
		before := refused()
		if _, err := client.WriteToUDPAddrPort([]byte(when), to); err != nil {
			t.Fatal(err)
		}
		if !want {
			eventually(t, when+": refused", func() bool { return refused() > before })
			return
		}
		if err := server.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 64)
		if n, _, err := server.ReadFromUDPAddrPort(buf); err != nil || string(buf[:n]) != when {
			t.Errorf("%s: received %q, %v (%d refused)", when, buf[:n], err, refused()-before)
		}
	}
	rule := []string{"GroupId=" + g, "IpPermissions.1.IpProtocol=udp", "IpPermissions.1.FromPort=53", "IpPermissions.1.ToPort=53",
		"IpPermissions.1.IpRanges.1.CidrIp=0.0.0.0/0"} // untracked
	passes("without a rule", false)
	for range 10 {
		r.ec2("AuthorizeSecurityGroupIngress", rule...)
		passes("with the rule", true)
		r.ec2("RevokeSecurityGroupIngress", rule...)
		passes("with the rule revoked", false)
	}
	r.ec2("AuthorizeSecurityGroupIngress", rule...)
	for range 5 {
		r.ec2("ModifyNetworkInterfaceAttribute", "NetworkInterfaceId="+string(enis["10.0.1.11"]), "SecurityGroupId.1="+other)
		passes("with another group", false)
		r.ec2("ModifyNetworkInterfaceAttribute", "NetworkInterfaceId="+string(enis["10.0.1.11"]), "SecurityGroupId.1="+g)
		passes("with the group again", true)
	}
}

// So is a move of an address or an interface, when nothing lags: the next packet
// finds it where it is, or not at all.
func TestMovesAreInEffectWhenAnswered(t *testing.T) {
	r := start(t, labOptions(t))
	v := r.id("vpc", "CreateVpc", "CidrBlock=10.0.0.0/16")
	s := r.id("subnet", "CreateSubnet", "VpcId="+v, "CidrBlock=10.0.1.0/24")
	instances, enis := map[string]string{}, map[string]vpc.ENIID{}
	for _, address := range []string{"10.0.1.10", "10.0.1.11"} {
		instances[address] = r.id("i", "RunInstances", "ImageId=ami-00000000000000001", "InstanceType=m5.large", "MinCount=1", "MaxCount=1",
			"SubnetId="+s, "PrivateIpAddress="+address)
		enis[address] = vpc.ENIID(r.id("eni", "DescribeNetworkInterfaces", "Filter.1.Name=attachment.instance-id", "Filter.1.Value.1="+instances[address]))
	}
	enis["10.0.1.30"] = vpc.ENIID(r.id("eni", "CreateNetworkInterface", "SubnetId="+s, "PrivateIpAddress=10.0.1.30"))
	netns := ""
	eventually(t, "running", func() bool {
		var all []InstanceInfo
		r.admin("GET", "instances", nil, &all)
		running := 0
		for _, i := range all {
			if i.State == "running" {
				running++
			}
			if i.InstanceID == instances["10.0.1.10"] {
				netns = i.Netns
			}
		}
		return running == 2
	})
	client := listenUDP(t, netns, "10.0.1.10:1000")
	arrives := func(when, to, at string, want bool) {
		t.Helper()
		// By its neighbour table the client may send to the MAC of before.
		count := func() (delivered, nowhere uint64) {
			var c map[vpc.ENIID]fabric.Counters
			r.admin("GET", "counters", nil, &c)
			drops := c[enis["10.0.1.10"]].Drops
			return c[enis[at]].RxPackets, drops[fabric.NoTarget] + drops[fabric.UnknownMAC] + drops[fabric.DestAddress] + c[enis[at]].Drops[fabric.DestAddress]
		}
		delivered, nowhere := count()
		if _, err := client.WriteToUDPAddrPort([]byte(when), netip.MustParseAddrPort(to+":53")); err != nil {
			t.Fatal(err)
		}
		eventually(t, when+": judged", func() bool {
			d, n := count()
			if n > nowhere && want {
				t.Fatalf("%s: nobody has %s", when, to)
			} else if d > delivered && !want {
				t.Fatalf("%s: %s still receives", when, at)
			}
			return d > delivered || n > nowhere
		})
	}
	for range 5 {
		r.ec2("AssignPrivateIpAddresses", "NetworkInterfaceId="+string(enis["10.0.1.11"]), "PrivateIpAddress.1=10.0.1.20")
		arrives("assigned", "10.0.1.20", "10.0.1.11", true)
		r.ec2("UnassignPrivateIpAddresses", "NetworkInterfaceId="+string(enis["10.0.1.11"]), "PrivateIpAddress.1=10.0.1.20")
		arrives("unassigned", "10.0.1.20", "10.0.1.11", false)
	}
	for range 3 {
		at := r.id("eni-attach", "AttachNetworkInterface", "NetworkInterfaceId="+string(enis["10.0.1.30"]), "InstanceId="+instances["10.0.1.11"], "DeviceIndex=1")
		arrives("attached", "10.0.1.30", "10.0.1.30", true)
		r.ec2("DetachNetworkInterface", "AttachmentId="+at)
		arrives("detached", "10.0.1.30", "10.0.1.30", false)
	}
}
