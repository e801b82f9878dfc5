package vpcd

import (
	"testing"

	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
)

// An instance of a public subnet has its public address on the wires and in
// IMDS, and nothing leads to it when it has stopped.
func TestPublicAddressesOnTheWires(t *testing.T) {
	w := newGatewayWorld(t, labOptions(t))
	w.ec2("ModifySubnetAttribute", "SubnetId="+w.public, "MapPublicIpOnLaunch.Value=true")
	netns, eni := w.instance(w.public, w.group, "10.0.1.10")
	serveWeb(t, netns, "10.0.1.10:80")
	public := between(w.ec2("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+eni), "<publicIp>", "<")
	server := "http://" + fabric.InternetAddrs[0].Addr().String()
	outside := fabric.NetnsPath("ul-" + w.lab + "-internet")
	if got := get(t, netns, "10.0.1.10", server, soon); got != public || public == "" {
		t.Errorf("the internet sees %q, want %q", got, public)
	}
	if got := get(t, outside, "203.0.113.20", "http://"+public, soon); got != "203.0.113.20" {
		t.Errorf("the instance sees %q, want 203.0.113.20", got)
	}
	c := inside(t, netns, 1)
	_, token := ask(t, c, "PUT", "http://169.254.169.254/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 60")
	if code, got := ask(t, c, "GET", "http://169.254.169.254/latest/meta-data/public-ipv4", "X-aws-ec2-metadata-token: "+token); code != 200 || got != public {
		t.Errorf("IMDS: %d %q, want %q", code, got, public)
	}
	instance := w.id("i", "DescribeInstances")
	w.ec2("StopInstances", "InstanceId.1="+instance)
	eventually(t, "released", func() bool {
		return between(w.ec2("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+eni), "<publicIp>", "<") == ""
	})
	eventually(t, "nothing leads there", func() bool { return get(t, outside, "203.0.113.20", "http://"+public, refuse) == "" })
}
