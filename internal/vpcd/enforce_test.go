package vpcd

import (
	"net"
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
