package vpcd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/nl"
)

// namesInside is Go's own resolver in a network namespace, asking one server by
// one protocol.
func namesInside(netns, server, network string) *net.Resolver {
	return &net.Resolver{PreferGo: true, StrictErrors: true, Dial: func(ctx context.Context, _, _ string) (c net.Conn, err error) {
		err = nl.Do(netns, func() (err error) {
			d := net.Dialer{Timeout: 2 * time.Second}
			d.SetMultipathTCP(false)
			c, err = d.DialContext(ctx, network, net.JoinHostPort(server, "53"))
			return err
		})
		return c, err
	}}
}

// Names that EC2 shows are those that the VPC's resolver knows, over UDP and
// TCP, at both of its addresses; the VPC's attributes are in force when the call
// that changes them is answered; vpcd's restart changes nothing.
func TestNames(t *testing.T) {
	o := labOptions(t)
	r := start(t, o)
	v := r.id("vpc", "CreateVpc", "CidrBlock=10.3.0.0/16")
	r.ec2("ModifyVpcAttribute", "VpcId="+v, "EnableDnsHostnames.Value=true")
	s := r.id("subnet", "CreateSubnet", "VpcId="+v, "CidrBlock=10.3.1.0/24")
	i := r.id("i", "RunInstances", "ImageId=ami-00000000000000001", "InstanceType=m5.large", "MinCount=1", "MaxCount=1",
		"PrivateDnsNameOptions.EnableResourceNameDnsARecord=true", "NetworkInterface.1.DeviceIndex=0", "NetworkInterface.1.SubnetId="+s,
		"NetworkInterface.1.SecondaryPrivateIpAddressCount=1")
	netns := ""
	eventually(t, "running", func() bool {
		var all []InstanceInfo
		r.admin("GET", "instances", nil, &all)
		for _, x := range all {
			netns = x.Netns
		}
		return len(all) == 1 && all[0].State == "running"
	})
	answer := r.ec2("DescribeInstances")
	if !strings.Contains(answer, "<privateDnsName>ip-10-3-1-4.ec2.internal</privateDnsName>") || !strings.Contains(answer, "<privateDnsName>ip-10-3-1-5.ec2.internal</privateDnsName>") ||
		!strings.Contains(answer, "<enableResourceNameDnsARecord>true</enableResourceNameDnsARecord>") {
		t.Errorf("EC2 shows %s", answer)
	}

	lookup := func(n *net.Resolver, name string) string {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		var got []string
		var err error
		if a, perr := netip.ParseAddr(name); perr == nil {
			got, err = n.LookupAddr(ctx, a.String())
		} else {
			got, err = n.LookupHost(ctx, name)
		}
		var dnsErr *net.DNSError
		if errors.As(err, &dnsErr) {
			switch {
			case dnsErr.IsNotFound:
				return "not found"
			case dnsErr.IsTimeout:
				return "no answer"
			}
		}
		if err != nil {
			return "error"
		}
		slices.Sort(got)
		return fmt.Sprint(got)
	}
	check := func() {
		t.Helper()
		for _, server := range []string{"10.3.0.2", "169.254.169.253"} {
			for _, network := range []string{"udp4", "tcp4"} {
				n := namesInside(netns, server, network)
				for name, want := range map[string]string{
					"ip-10-3-1-4.ec2.internal": "[10.3.1.4]",
					"ip-10-3-1-5.ec2.internal": "[10.3.1.5]",
					i + ".ec2.internal":        "[10.3.1.4]",
					"ip-10-3-1-9.ec2.internal": "not found",
					"10.3.1.5":                 "[ip-10-3-1-5.ec2.internal.]",
					"example.com":              "error", // SERVFAIL: there is no internet to ask
				} {
					if got := lookup(n, name); got != want {
						t.Errorf("%s at %s by %s: %s, want %s", name, server, network, got, want)
					}
				}
			}
		}
	}
	check()

	n := namesInside(netns, "10.3.0.2", "udp4")
	r.ec2("ModifyVpcAttribute", "VpcId="+v, "EnableDnsHostnames.Value=false")
	if got := lookup(n, "ip-10-3-1-4.ec2.internal"); got != "not found" {
		t.Errorf("enableDnsHostnames off: %s", got)
	}
	r.ec2("ModifyVpcAttribute", "VpcId="+v, "EnableDnsHostnames.Value=true")
	r.ec2("ModifyVpcAttribute", "VpcId="+v, "EnableDnsSupport.Value=false")
	quick := namesInside(netns, "10.3.0.2", "udp4")
	if err := nl.Do(netns, func() error {
		c, err := net.Dial("udp4", "10.3.0.2:53")
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write([]byte("\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x04test\x00\x00\x01\x00\x01")); err != nil {
			return err
		}
		if err := c.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			return err
		}
		if n, err := c.Read(make([]byte, 512)); err == nil {
			return fmt.Errorf("%d bytes", n)
		}
		return nil
	}); err != nil {
		t.Errorf("enableDnsSupport off: %v", err)
	}
	r.ec2("ModifyVpcAttribute", "VpcId="+v, "EnableDnsSupport.Value=true")
	if got := lookup(quick, "ip-10-3-1-4.ec2.internal"); got != "[10.3.1.4]" {
		t.Errorf("enableDnsSupport on again: %s", got)
	}

	r.stop()
	r = start(t, o)
	eventually(t, "healthy again", func() bool {
		var h Health
		return r.admin("GET", "health", nil, &h) == 200 && h.Status == StatusOK
	})
	check()
}
