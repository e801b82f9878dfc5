package vpcd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
)

// gatewayWorld is a VPC with an internet gateway and an open group.
type gatewayWorld struct {
	*running
	t                       *testing.T
	lab                     string
	vpc, group, igw, public string // public: a subnet with a default route
}

func newGatewayWorld(t *testing.T, o Options) *gatewayWorld {
	w := &gatewayWorld{running: start(t, o), t: t, lab: o.Name}
	w.vpc = w.id("vpc", "CreateVpc", "CidrBlock=10.0.0.0/16")
	w.public = w.id("subnet", "CreateSubnet", "VpcId="+w.vpc, "CidrBlock=10.0.1.0/24")
	w.group = w.openGroup(w.vpc)
	w.igw = w.id("igw", "CreateInternetGateway")
	w.ec2("AttachInternetGateway", "InternetGatewayId="+w.igw, "VpcId="+w.vpc)
	table := w.id("rtb", "CreateRouteTable", "VpcId="+w.vpc)
	w.ec2("AssociateRouteTable", "RouteTableId="+table, "SubnetId="+w.public)
	w.ec2("CreateRoute", "RouteTableId="+table, "DestinationCidrBlock=0.0.0.0/0", "GatewayId="+w.igw)
	return w
}

func (w *gatewayWorld) openGroup(vpc string) string {
	g := w.id("sg", "CreateSecurityGroup", "GroupName=open", "GroupDescription=x", "VpcId="+vpc)
	w.ec2("AuthorizeSecurityGroupIngress", "GroupId="+g, "IpPermissions.1.IpProtocol=-1", "IpPermissions.1.IpRanges.1.CidrIp=0.0.0.0/0")
	return g
}

// instance starts one and returns its namespace and its interface.
func (w *gatewayWorld) instance(subnet, group, address string) (netns, eni string) {
	w.t.Helper()
	id := w.id("i", "RunInstances", "ImageId=ami-00000000000000001", "InstanceType=m5.large", "MinCount=1", "MaxCount=1",
		"SubnetId="+subnet, "PrivateIpAddress="+address, "SecurityGroupId.1="+group)
	eventually(w.t, "running", func() bool {
		var all []InstanceInfo
		w.admin("GET", "instances", nil, &all)
		for _, i := range all {
			if i.InstanceID == id && i.State == "running" {
				netns = i.Netns
			}
		}
		return netns != ""
	})
	return netns, w.id("eni", "DescribeNetworkInterfaces", "Filter.1.Name=attachment.instance-id", "Filter.1.Value.1="+id)
}

// between cuts what is between two marks out of an answer.
func between(s, from, to string) string {
	_, s, _ = strings.Cut(s, from)
	s, _, _ = strings.Cut(s, to)
	return s
}

// elastic allocates a public address.
func (w *gatewayWorld) elastic() (allocation, public string) {
	answer := w.ec2("AllocateAddress", "Domain=vpc")
	return between(answer, "<allocationId>", "<"), between(answer, "<publicIp>", "<")
}

// get asks a web server from an address, "" if nobody answers.
func get(t *testing.T, netns, from, url string, wait time.Duration) string {
	t.Helper()
	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, address string) (c net.Conn, err error) {
		err = nl.Do(netns, func() error {
			d := net.Dialer{Timeout: wait, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 0))}
			d.SetMultipathTCP(false)
			c, err = d.DialContext(ctx, "tcp4", address)
			return err
		})
		return c, err
	}}
	resp, err := (&http.Client{Transport: tr, Timeout: wait}).Get(url)
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

const (
	soon   = 5 * time.Second        // for what must be answered
	refuse = 300 * time.Millisecond // for what must not
)

// serveWeb answers who asks with its address.
func serveWeb(t *testing.T, netns, at string) {
	t.Helper()
	var l net.Listener
	if err := nl.Do(netns, func() (err error) {
		l, err = net.Listen("tcp4", at)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(whoAsks)}
	t.Cleanup(func() { _ = s.Close() })
	go func() { _ = s.Serve(l) }()
}

func addAddress(t *testing.T, netns, address string) {
	t.Helper()
	err := nl.Do(netns, func() error {
		c, err := nl.Dial()
		if err != nil {
			return err
		}
		var b nl.Batch
		b.AddrAdd(1, netip.MustParsePrefix(address+"/32"))
		return errors.Join(c.Exec(&b), c.Close())
	})
	if err != nil {
		t.Fatal(err)
	}
}

// An Elastic IP on a secondary address, as a pod has one: out and in, and each
// change is in effect when its call is answered.
func TestElasticIPsOnTheWires(t *testing.T) {
	w := newGatewayWorld(t, labOptions(t))
	netns, eni := w.instance(w.public, w.group, "10.0.1.10")
	w.ec2("AssignPrivateIpAddresses", "NetworkInterfaceId="+eni, "PrivateIpAddress.1=10.0.1.20")
	addAddress(t, netns, "10.0.1.20")
	serveWeb(t, netns, "10.0.1.20:80")
	allocation, public := w.elastic()
	server := "http://" + fabric.InternetAddrs[0].Addr().String()
	outside := fabric.NetnsPath("ul-" + w.lab + "-internet")

	out := func(when, want string) {
		t.Helper()
		wait := soon
		if want == "" {
			wait = refuse
		}
		if got := get(t, netns, "10.0.1.20", server, wait); got != want {
			t.Errorf("%s: the internet sees %q, want %q", when, got, want)
		}
		want = map[bool]string{true: "203.0.113.20", false: ""}[want != ""]
		if got := get(t, outside, "203.0.113.20", "http://"+public, wait); got != want {
			t.Errorf("%s: the pod sees %q, want %q", when, got, want)
		}
	}
	out("without an association", "")
	associate := func() string {
		return between(w.ec2("AssociateAddress", "AllocationId="+allocation, "NetworkInterfaceId="+eni, "PrivateIpAddress=10.0.1.20"), "<associationId>", "<")
	}
	a := associate()
	out("associated", public)
	w.ec2("DisassociateAddress", "AssociationId="+a)
	out("disassociated", "")
	w.ec2("DetachInternetGateway", "InternetGatewayId="+w.igw, "VpcId="+w.vpc)
	associate2, err := w.try("AssociateAddress", "AllocationId="+allocation, "NetworkInterfaceId="+eni, "PrivateIpAddress=10.0.1.20")
	if err == nil && strings.Contains(associate2, "<associationId>") {
		out("without a gateway", "")
		w.ec2("DisassociateAddress", "AssociationId="+between(associate2, "<associationId>", "<"))
	}
	w.ec2("AttachInternetGateway", "InternetGatewayId="+w.igw, "VpcId="+w.vpc)
	associate()
	out("attached again", public)
	table := w.id("rtb", "DescribeRouteTables", "Filter.1.Name=association.subnet-id", "Filter.1.Value.1="+w.public)
	w.ec2("DeleteRoute", "RouteTableId="+table, "DestinationCidrBlock=0.0.0.0/0")
	out("without a route", "")
	w.ec2("CreateRoute", "RouteTableId="+table, "DestinationCidrBlock=0.0.0.0/0", "GatewayId="+w.igw)
	out("with a route", public)
}

// dialEcho opens a connection to the internet's echo.
func dialEcho(t *testing.T, netns string) net.Conn {
	t.Helper()
	var c net.Conn
	if err := nl.Do(netns, func() (err error) {
		d := net.Dialer{Timeout: soon}
		d.SetMultipathTCP(false)
		c, err = d.Dial("tcp4", netip.AddrPortFrom(fabric.InternetAddrs[0].Addr(), internetEcho).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func echoes(c net.Conn, line string) error {
	if err := c.SetDeadline(time.Now().Add(soon)); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(c, line); err != nil {
		return err
	}
	got, err := bufio.NewReader(c).ReadString('\n')
	if err == nil && got != line+"\n" {
		err = fmt.Errorf("echoed %q", got)
	}
	return err
}

// A NAT gateway: instances without public addresses reach the internet under
// its own, while vpcd is away too, and nobody reaches them.
func TestNATGatewayOnTheWires(t *testing.T) {
	o := labOptions(t)
	w := newGatewayWorld(t, o)
	private := w.id("subnet", "CreateSubnet", "VpcId="+w.vpc, "CidrBlock=10.0.2.0/24")
	allocation, public := w.elastic()
	nat := w.id("nat", "CreateNatGateway", "SubnetId="+w.public, "AllocationId="+allocation)
	eventually(t, "NAT gateway available", func() bool {
		return strings.Contains(w.ec2("DescribeNatGateways", "NatGatewayId.1="+nat), "<state>available</state>")
	})
	table := w.id("rtb", "CreateRouteTable", "VpcId="+w.vpc)
	w.ec2("AssociateRouteTable", "RouteTableId="+table, "SubnetId="+private)
	w.ec2("CreateRoute", "RouteTableId="+table, "DestinationCidrBlock=0.0.0.0/0", "NatGatewayId="+nat)
	netns, _ := w.instance(private, w.group, "10.0.2.10")
	server := "http://" + fabric.InternetAddrs[0].Addr().String()
	sees := func(when, want string, wait time.Duration) {
		t.Helper()
		if got := get(t, netns, "10.0.2.10", server, wait); got != want {
			t.Errorf("%s: the internet sees %q, want %q", when, got, want)
		}
	}
	eventually(t, "on the wires", func() bool { return get(t, netns, "10.0.2.10", server, refuse) != "" })
	sees("first", public, soon)

	// Idle for too long: the next packet is answered with a reset.
	c := dialEcho(t, netns)
	if err := echoes(c, "hello"); err != nil {
		t.Fatal(err)
	}
	idle := func(was, seconds string) {
		t.Helper()
		const file = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established"
		if err := nl.Do(fabric.NetnsPath("ul-"+w.lab+"-svc-"+nat), func() error {
			if b, err := os.ReadFile(file); err != nil || strings.TrimSpace(string(b)) != was {
				t.Errorf("idle connections are remembered for %q s, want %s: %v", b, was, err)
			}
			return os.WriteFile(file, []byte(seconds), 0)
		}); err != nil {
			t.Fatal(err)
		}
	}
	idle("350", "1") // nobody waits for so long here
	if err := echoes(c, "again"); err != nil {
		t.Fatal(err)
	}
	// The kernel's clock is the one that counts; a tick of slack.
	sent := time.Now()
	eventually(t, "idle for longer than it is remembered", func() bool { return time.Since(sent) > 1500*time.Millisecond })
	if err := echoes(c, "late"); !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
		t.Errorf("a connection that was idle for too long: %v, want a reset", err)
	}
	idle("1", "350")

	// It outlives vpcd; the internet's server does not.
	r := w.running
	r.stop()
	serveAway(t, o.Name)
	if got := get(t, netns, "10.0.2.10", "http://203.0.113.20:8080", soon); got != public {
		t.Errorf("without vpcd: the internet sees %q, want %q", got, public)
	}
	w.running = start(t, o)
	eventually(t, "the internet's server", func() bool { return get(t, netns, "10.0.2.10", server, refuse) != "" })
	sees("after a restart", public, soon)

	w.ec2("DeleteNatGateway", "NatGatewayId="+nat)
	sees("deleted", "", refuse)
}

// serveAway is a server of the internet's that is not vpcd's.
func serveAway(t *testing.T, lab string) {
	serveWeb(t, fabric.NetnsPath("ul-"+lab+"-internet"), "203.0.113.20:8080")
}

// Two VPCs that are peered meet by the routes of both, under the groups of
// both; a third does not, and none when the peering is gone.
func TestPeeringOnTheWires(t *testing.T) {
	w := newGatewayWorld(t, labOptions(t))
	here, _ := w.instance(w.public, w.group, "10.0.1.10")
	other := w.id("vpc", "CreateVpc", "CidrBlock=10.1.0.0/16")
	subnet := w.id("subnet", "CreateSubnet", "VpcId="+other, "CidrBlock=10.1.1.0/24")
	// Its group lets in who has the open group of the other VPC.
	group := w.id("sg", "CreateSecurityGroup", "GroupName=servers", "GroupDescription=x", "VpcId="+other)
	there, _ := w.instance(subnet, group, "10.1.1.10")
	serveWeb(t, there, "10.1.1.10:80")
	pcx := w.id("pcx", "CreateVpcPeeringConnection", "VpcId="+w.vpc, "PeerVpcId="+other)
	table := func(v, filter, value string) string {
		return w.id("rtb", "DescribeRouteTables", "Filter.1.Name=vpc-id", "Filter.1.Value.1="+v, "Filter.2.Name="+filter, "Filter.2.Value.1="+value)
	}
	sees := func(when, want string) {
		t.Helper()
		wait := soon
		if want == "" {
			wait = refuse
		}
		if got := get(t, here, "10.0.1.10", "http://10.1.1.10", wait); got != want {
			t.Errorf("%s: the peer sees %q, want %q", when, got, want)
		}
	}
	w.ec2("AcceptVpcPeeringConnection", "VpcPeeringConnectionId="+pcx)
	w.ec2("AuthorizeSecurityGroupIngress", "GroupId="+group, "IpPermissions.1.IpProtocol=tcp", "IpPermissions.1.FromPort=80", "IpPermissions.1.ToPort=80",
		"IpPermissions.1.Groups.1.GroupId="+w.group)
	w.ec2("CreateRoute", "RouteTableId="+table(w.vpc, "association.subnet-id", w.public), "DestinationCidrBlock=10.1.0.0/16", "VpcPeeringConnectionId="+pcx)
	sees("no route back", "")
	w.ec2("CreateRoute", "RouteTableId="+table(other, "association.main", "true"), "DestinationCidrBlock=10.0.0.0/16", "VpcPeeringConnectionId="+pcx)
	sees("routes on both sides", "10.0.1.10")
	// No way to the internet through the peer's gateway.
	if got := get(t, there, "10.1.1.10", "http://203.0.113.10", refuse); got != "" {
		t.Errorf("the peer reached the internet as %s", got)
	}
	w.ec2("DeleteVpcPeeringConnection", "VpcPeeringConnectionId="+pcx)
	sees("deleted", "")
}
