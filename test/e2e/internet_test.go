package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/test/lab"
)

// internetHost is in the internet of a lab, and answers HTTP with the address
// that it sees.
var internetHost = netip.MustParseAddrPort("203.0.113.10:80")

// Pods reach the internet under the address that their interface has there, or
// that of the node's first one: by a NAT gateway, which takes any address of the
// VPC, and by an internet gateway, which takes those that have a public one.
func TestSourceAddressTowardsTheInternet(t *testing.T) {
	for _, tc := range []struct {
		mode string
		// Which interface's public address the internet sees, of a pod on the
		// first and on the second one; -1: the pod does not get through.
		first, second int
	}{{"eni", 0, 1}, {"primary", 0, 0}, {"none", -1, -1}} {
		t.Run(tc.mode, func(t *testing.T) {
			// Two addresses on each of two interfaces.
			l := lab.Up(t, "--nodes", "1", "--instance-type", "t3.nano", "--internet", "--agent-arg=--snat="+tc.mode)
			n := l.Nodes[0]
			pods := [2]lab.Pod{l.Run("first", "--node", n.Name), l.Run("second", "--node", n.Name)}
			enis := l.Inspect(n).ENIs
			if len(enis) != 2 {
				t.Fatalf("the node has %d interfaces", len(enis))
			}

			nat := seenInInternet(t, n.Netns)
			for i, p := range pods {
				if got := seenInInternet(t, p.Netns); got != nat || got == "" {
					t.Errorf("behind the NAT gateway pod %d is seen as %q, the node as %q", i, got, nat)
				}
			}

			byInternetGateway(t, l)
			var public [2]string
			for i, e := range enis {
				public[i] = elasticIP(t, l, e.ID, e.Primary)
			}
			for i, want := range []int{tc.first, tc.second} {
				got := seenInInternet(t, pods[i].Netns)
				if want < 0 && got != "" || want >= 0 && got != public[want] {
					t.Errorf("pod %d is seen as %q; the interfaces' public addresses are %v", i, got, public)
				}
			}
			// What is begun from outside is another matter, and so is what stays
			// within the VPC.
			vm := netip.AddrPortFrom(l.OutsideIP("vm-1"), 8080)
			if got := lab.AskTCP(t, pods[1].Netns, vm); !strings.Contains(got, pods[1].IP.String()) {
				t.Errorf("a VM sees the second pod as %q, want %s", got, pods[1].IP)
			}
		})
	}
}

// seenInInternet is what the internet says that it sees; "" if it is not reached.
func seenInInternet(t *testing.T, netns string) string {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	var conn net.Conn
	err := lab.Try(netns, func() (err error) {
		conn, err = net.DialTimeout("tcp4", internetHost.String(), time.Second)
		return err
	})
	if err != nil {
		return ""
	}
	defer conn.Close()
	_ = conn.SetDeadline(deadline)
	req, err := http.NewRequest(http.MethodGet, "http://"+internetHost.String()+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil }}}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(body))
}

// byInternetGateway makes the private subnets public ones.
func byInternetGateway(t *testing.T, l *lab.Lab) {
	t.Helper()
	var tables struct {
		ID []string `xml:"routeTableSet>item>routeTableId"`
	}
	var gateways struct {
		ID []string `xml:"internetGatewaySet>item>internetGatewayId"`
	}
	call(t, l, "DescribeRouteTables", map[string]string{"Filter.1.Name": "association.main", "Filter.1.Value.1": "true", "Filter.2.Name": "vpc-id", "Filter.2.Value.1": l.VPCID}, &tables)
	call(t, l, "DescribeInternetGateways", nil, &gateways)
	if len(tables.ID) != 1 || len(gateways.ID) != 1 {
		t.Fatalf("main tables %v, internet gateways %v", tables.ID, gateways.ID)
	}
	call(t, l, "ReplaceRoute", map[string]string{"RouteTableId": tables.ID[0], "DestinationCidrBlock": "0.0.0.0/0", "GatewayId": gateways.ID[0]}, &struct{}{})
}

// elasticIP gives an address of an interface a public one.
func elasticIP(t *testing.T, l *lab.Lab, eni string, private netip.Addr) string {
	t.Helper()
	var allocated struct {
		ID string `xml:"allocationId"`
		IP string `xml:"publicIp"`
	}
	call(t, l, "AllocateAddress", map[string]string{"Domain": "vpc"}, &allocated)
	call(t, l, "AssociateAddress", map[string]string{"AllocationId": allocated.ID, "NetworkInterfaceId": eni, "PrivateIpAddress": private.String()}, &struct{}{})
	return allocated.IP
}

func call(t *testing.T, l *lab.Lab, action string, params map[string]string, out any) {
	t.Helper()
	if err := l.Call(action, params, out); err != nil {
		t.Fatal(fmt.Errorf("%s: %w", action, err))
	}
}
