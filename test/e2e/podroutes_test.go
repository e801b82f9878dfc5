package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/test/lab"
)

// A pod is in the VPC as an instance is: a network ACL of its subnet and a route
// by a middlebox hold for it, though it is on an interface that its node attached
// later, in another subnet than the node's, and take effect before EC2 has answered.
// Within the subnet neither does.
func TestRoutesAndACLsHoldForPods(t *testing.T) {
	l := lab.Up(t, "--nodes", "2", "--instance-type", "t3.medium")
	w := &tiers{t: t, l: l, netns: map[string]string{}, at: map[string]netip.AddrPort{}, groups: map[string]string{}}
	one, two := l.Nodes[0], l.Nodes[1]
	var made struct{ Subnet struct{ SubnetId string } }
	l.AWS(&made, "ec2", "create-subnet", "--vpc-id", l.VPCID, "--cidr-block", "10.0.200.0/24", "--availability-zone", "us-east-1a")
	inside := made.Subnet.SubnetId
	if _, errOut, code := l.Try("run", "nowhere", "--node", two.Name, "--subnet", inside); code == 0 || !strings.Contains(errOut, "name a subnet of the node's VPC and zone") {
		t.Errorf("a subnet of another zone: exit %d, %s", code, errOut)
	}
	if _, errOut, code := l.Try("run", "nowhere", "--node", one.Name, "--subnet", "subnet-0123456789abcdef0"); code == 0 || !strings.Contains(errOut, "subnet-0123456789abcdef0") {
		t.Errorf("no such subnet: exit %d, %s", code, errOut)
	}
	for _, name := range []string{"target", "beside"} {
		w.podWith(name, one.Name, "--subnet", inside)
	}
	w.pod("plain", one.Name)
	w.pod("across", two.Name)
	target := w.at["target"].Addr()
	if !netip.MustParsePrefix("10.0.200.0/24").Contains(target) || netip.MustParsePrefix("10.0.200.0/24").Contains(w.at["plain"].Addr()) {
		t.Fatalf("the pods have %v", w.at)
	}
	reaches := func(from string, want bool) {
		t.Helper()
		limit := 3 * time.Second
		if !want {
			limit = 300 * time.Millisecond
		}
		if err := w.connect(from, "target", limit); (err == nil) != want {
			t.Errorf("%s to the pod: %v", from, err)
		}
	}
	reaches("across", true)
	reaches("plain", true)
	reaches("beside", true)

	// A network ACL of the pod's subnet refuses one port, to this pod alone.
	var acl struct{ NetworkAcl struct{ NetworkAclId string } }
	l.AWS(&acl, "ec2", "create-network-acl", "--vpc-id", l.VPCID)
	entry := func(verb string, number int, more ...string) {
		t.Helper()
		args := append([]string{"ec2", verb + "-network-acl-entry", "--network-acl-id", acl.NetworkAcl.NetworkAclId, "--rule-number", fmt.Sprint(number)}, more...)
		l.AWS(nil, args...)
	}
	for _, way := range []string{"--ingress", "--egress"} {
		entry("create", 100, way, "--protocol", "-1", "--cidr-block", "0.0.0.0/0", "--rule-action", "allow")
	}
	across := w.at["across"].Addr()
	entry("create", 50, "--ingress", "--protocol", "tcp", "--port-range", fmt.Sprintf("From=%d,To=%d", tierPort, tierPort), "--cidr-block", across.String()+"/32", "--rule-action", "deny")
	var tied struct {
		NetworkAcls []struct {
			Associations []struct{ NetworkAclAssociationId, SubnetId string }
		}
	}
	l.AWS(&tied, "ec2", "describe-network-acls", "--filters", "Name=association.subnet-id,Values="+inside)
	association := ""
	for _, a := range tied.NetworkAcls[0].Associations {
		if a.SubnetId == inside {
			association = a.NetworkAclAssociationId
		}
	}
	var replaced struct{ NewAssociationId string }
	l.AWS(&replaced, "ec2", "replace-network-acl-association", "--network-acl-id", acl.NetworkAcl.NetworkAclId, "--association-id", association)
	reaches("across", false)
	reaches("beside", true)
	lab.Eventually(t, 10*time.Second, "the flow log says that an ACL refused it, at the pod's interface", func() error {
		out := l.Underlay("flows", "--action", "REJECT", "-o", "json")
		for line := range strings.Lines(out) {
			if strings.Contains(line, across.String()) && strings.Contains(line, target.String()) {
				return nil
			}
		}
		return errors.New("it does not:\n" + out)
	})
	entry("delete", 50, "--ingress")
	reaches("across", true)

	// From the other subnet, the way to the pod's leads by a VM.
	box := lab.Node{Name: "vm-1", IP: l.OutsideIP("vm-1")}
	for _, o := range l.Outside {
		if o.Name == box.Name {
			box.Netns = o.Netns
		}
	}
	var boxENI struct {
		NetworkInterfaces []struct{ NetworkInterfaceId, SubnetId string }
	}
	l.AWS(&boxENI, "ec2", "describe-network-interfaces", "--filters", "Name=addresses.private-ip-address,Values="+box.IP.String())
	if boxENI.NetworkInterfaces[0].SubnetId != one.SubnetID {
		t.Fatalf("vm-1 is in %s, not in node-1's subnet", boxENI.NetworkInterfaces[0].SubnetId)
	}
	eni := boxENI.NetworkInterfaces[0].NetworkInterfaceId
	l.AWS(nil, "ec2", "modify-network-interface-attribute", "--network-interface-id", eni, "--no-source-dest-check")
	l.AWS(nil, "ec2", "modify-network-interface-attribute", "--network-interface-id", eni, "--groups", groupsOf(t, l, one.IP)[0])
	var table struct{ RouteTable struct{ RouteTableId string } }
	l.AWS(&table, "ec2", "create-route-table", "--vpc-id", l.VPCID)
	forward(t, box, false)
	l.AWS(nil, "ec2", "create-route", "--route-table-id", table.RouteTable.RouteTableId, "--destination-cidr-block", "10.0.200.0/24", "--network-interface-id", eni)
	l.AWS(nil, "ec2", "associate-route-table", "--route-table-id", table.RouteTable.RouteTableId, "--subnet-id", two.SubnetID)
	reaches("across", false) // the VM does not forward
	reaches("beside", true)
	forward(t, box, true)
	before := forwarded(t, box)
	reaches("across", true)
	if after := forwarded(t, box); after <= before {
		t.Errorf("the VM forwarded %d datagrams before, %d after", before, after)
	}
	reaches("beside", true)
}

// forward says whether a VM sends on what is not for itself.
func forward(t *testing.T, vm lab.Node, yes bool) {
	t.Helper()
	value := map[bool]string{false: "0", true: "1"}[yes]
	vm.Exec(t, "sysctl", "-qw", "net.ipv4.ip_forward="+value, "net.ipv4.conf.all.send_redirects=0", "net.ipv4.conf.eth0.send_redirects=0", "net.ipv4.conf.eth0.rp_filter=2")
}

// forwarded is how many datagrams a VM has sent on.
func forwarded(t *testing.T, vm lab.Node) int {
	t.Helper()
	const forwardedDatagrams = 6 // ForwDatagrams, of the lines of Ip in /proc/net/snmp
	var n int
	ip := strings.Fields(strings.SplitN(vm.Exec(t, "cat", "/proc/net/snmp"), "\n", 3)[1])
	if _, err := fmt.Sscan(ip[forwardedDatagrams], &n); err != nil {
		t.Fatal(err)
	}
	return n
}
