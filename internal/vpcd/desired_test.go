package vpcd

import (
	"encoding/base64"
	"net"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
	"github.com/underlay-cni/underlay/internal/vpcd/imds"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

const (
	testVPC    = vpc.VPCID("vpc-00000000000000001")
	testSubnet = vpc.SubnetID("subnet-00000000000000001")
	testNode   = vpc.InstanceID("i-00000000000000001")
)

func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// world is a store with a clock of its own.
type world struct {
	*testing.T
	*store.Store
	now time.Time
}

func newWorld(t *testing.T) *world {
	w := &world{T: t, now: time.Unix(1_000_000, 0)}
	s, err := store.Open(filepath.Join(t.TempDir(), stateFile), store.Options{Now: func() time.Time { return w.now }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	w.Store = s
	s.KeepHistory(func() time.Duration { return time.Hour })
	w.change(func(tx *store.Tx) {
		tx.PutVPC(&store.VPC{ID: testVPC, VNI: 7, CIDRs: []store.CIDRAssociation{{CIDR: prefix("10.0.0.0/16")}, {CIDR: prefix("100.64.0.0/16")}}})
		tx.PutSubnet(&store.Subnet{ID: testSubnet, VPC: testVPC, CIDR: prefix("10.0.1.0/24"), Zone: "us-east-1a"})
		tx.PutGroup(&store.Group{ID: "sg-1", VPC: testVPC, Name: "web"})
		tx.PutInstance(&store.Instance{
			ID: testNode, Type: "m5.large", VPC: testVPC, Subnet: testSubnet, Zone: "us-east-1a", State: store.Running,
			UserData: base64.StdEncoding.EncodeToString([]byte("hi")),
			Metadata: store.MetadataOptions{Tokens: "required", HopLimit: 2, Endpoint: "enabled", Tags: "disabled"},
		})
		tx.PutENI(testENI(1, "10.0.1.10", attached(0, store.Attached)))
	})
	return w
}

func (w *world) change(fn func(tx *store.Tx)) {
	w.Helper()
	if err := w.Update(func(tx *store.Tx) error { fn(tx); return nil }); err != nil {
		w.Fatal(err)
	}
}

func attached(device int, status store.AttachmentStatus) *store.Attachment {
	return &store.Attachment{ID: vpc.AttachmentID("eni-attach-" + string(rune('0'+device))), Instance: testNode, DeviceIndex: device, Status: status}
}

func testENI(n byte, primary string, a *store.Attachment) *store.ENI {
	return &store.ENI{
		ID: vpc.ENIID("eni-0000000000000000" + string(rune('0'+n))), VPC: testVPC, Subnet: testSubnet, MAC: net.HardwareAddr{2, 0, 0, 0, 0, n}.String(),
		Primary: addr(primary), SourceDestCheck: true, Attachment: a, Groups: []vpc.SecurityGroupID{"sg-1"},
	}
}

var ignoreOrder = cmpopts.SortSlices(func(a, b fabric.Interface) bool { return a.ID < b.ID })

var compareNetip = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
}

func TestDesired(t *testing.T) {
	w := newWorld(t)
	w.change(func(tx *store.Tx) {
		second := testENI(2, "10.0.1.11", attached(1, store.Detaching))
		second.Secondary = []netip.Addr{addr("10.0.1.12")}
		second.Prefixes = []netip.Prefix{prefix("10.0.1.32/28")}
		second.SourceDestCheck = false
		tx.PutENI(second)
		tx.PutENI(testENI(3, "10.0.1.13", attached(2, store.Attaching))) // not yet
		tx.PutENI(testENI(4, "10.0.1.14", nil))                          // to nothing
		managed := testENI(5, "10.0.1.15", &store.Attachment{ID: "eni-attach-9", DeviceIndex: 1, Status: store.Attached})
		managed.Service, managed.RequesterManaged = "db-1", true
		tx.PutENI(managed)
		tx.PutService(&store.Service{Name: "db-1", ENI: managed.ID})
		tx.PutInstance(&store.Instance{ID: "i-00000000000000002", State: store.Terminated})
		second.Conntrack = store.Conntrack{TCPEstablished: 60, UDP: 31, UDPStream: 61}
		tx.PutPrefixList(&store.PrefixList{ID: "pl-1", Versions: []store.PrefixListVersion{{Entries: []store.PrefixListEntry{{CIDR: prefix("10.9.1.0/24")}, {CIDR: prefix("10.9.2.0/24")}}}}})
		main, def := *tx.MainTable(testVPC), *tx.DefaultACL(testVPC)
		main.Routes = []store.Route{
			{PrefixList: "pl-1", Target: store.Target{ENI: "eni-00000000000000001"}},
			{CIDR: prefix("10.9.0.0/24"), Target: store.Target{ENI: "eni-00000000000000001"}},
			{CIDR: prefix("10.9.1.0/24"), Target: store.Target{ENI: "eni-00000000000000004"}},
			{CIDR: prefix("0.0.0.0/0"), Target: store.Target{Gateway: "igw-1"}},
		}
		tx.PutRouteTable(&main)
		def.Entries = []store.ACLEntry{
			{Number: 1, Protocol: 6, From: 80, To: 81, CIDR: prefix("0.0.0.0/0"), Allow: true},
			{Number: 2, Protocol: 1, ICMPType: 8, ICMPCode: -1, CIDR: prefix("10.0.0.0/8")},
			{Number: 1, Egress: true, Protocol: -1, CIDR: prefix("0.0.0.0/0"), Allow: true},
		}
		tx.PutACL(&def)
		tx.PutGroup(&store.Group{ID: "sg-1", VPC: testVPC, Name: "web", Rules: []store.Rule{
			{ID: "sgr-1", Protocol: "tcp", From: 80, To: 81, CIDR: prefix("0.0.0.0/0")},
			{ID: "sgr-2", Protocol: "icmp", From: 8, To: -1, Group: "sg-1"},
			{ID: "sgr-3", Egress: true, Protocol: "-1", From: -1, To: -1, CIDR: prefix("2001:db8::/32")},
			{ID: "sgr-4", Egress: true, Protocol: "47", From: -1, To: -1, CIDR: prefix("10.0.0.0/8")},
			{ID: "sgr-5", Egress: true, Protocol: "udp", From: 53, To: 53, PrefixList: "pl-1"},
			{ID: "sgr-6", Egress: true, Protocol: "nonsense", CIDR: prefix("10.0.0.0/8")},
		}})
	})
	got, err := desired(names{"demo"}, w.View(), w.View())
	if err != nil {
		t.Fatal(err)
	}
	node := "ul-demo-i-00000000000000001"
	owner := fabric.Owner{VPC: testVPC, Instance: "i-00000000000000001", Zone: "us-east-1a"}
	want := fabric.Config{
		Subnets: []fabric.Subnet{{ID: testSubnet, VNI: 7, CIDR: prefix("10.0.1.0/24"), Table: w.View().MainTable(testVPC).ID, ACL: w.View().DefaultACL(testVPC).ID}},
		Tables: []fabric.RouteTable{{ID: w.View().MainTable(testVPC).ID, Routes: []fabric.Route{
			{CIDR: prefix("10.0.0.0/16"), Local: true}, {CIDR: prefix("100.64.0.0/16"), Local: true},
			{CIDR: prefix("10.9.0.0/24"), ENI: "eni-00000000000000001"},
			{CIDR: prefix("10.9.1.0/24")}, // an interface that is not attached
			{CIDR: prefix("0.0.0.0/0")},   // a gateway that is not there
			{CIDR: prefix("10.9.2.0/24"), ENI: "eni-00000000000000001"},
		}}},
		ACLs: []fabric.ACL{{
			ID:      w.View().DefaultACL(testVPC).ID,
			Ingress: []fabric.ACLEntry{{Protocol: 6, From: 80, To: 81, CIDR: prefix("0.0.0.0/0"), Allow: true}, {Protocol: 1, From: 8, To: -1, CIDR: prefix("10.0.0.0/8")}},
			Egress:  []fabric.ACLEntry{{Protocol: -1, CIDR: prefix("0.0.0.0/0"), Allow: true}},
		}},
		Guests: []fabric.Guest{{Netns: node}, {Netns: "ul-demo-svc-db-1"}},
		Groups: []fabric.Group{{
			ID: "sg-1",
			Ingress: []fabric.Rule{
				{Protocol: 6, From: 80, To: 81, Peers: []netip.Prefix{prefix("0.0.0.0/0")}},
				{Protocol: 1, From: 8, To: -1, Group: "sg-1"},
			},
			Egress: []fabric.Rule{
				{Protocol: -1, From: -1, To: -1, Peers: []netip.Prefix{prefix("2001:db8::/32")}},
				{Protocol: 47, From: -1, To: -1, Peers: []netip.Prefix{prefix("10.0.0.0/8")}},
				{Protocol: 17, From: 53, To: 53, Peers: []netip.Prefix{prefix("10.9.1.0/24"), prefix("10.9.2.0/24")}},
				{Protocol: noProtocol, Peers: []netip.Prefix{prefix("10.0.0.0/8")}},
			},
		}},
		Interfaces: []fabric.Interface{
			{ID: "eni-00000000000000001", VNI: 7, Subnet: testSubnet, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, Guest: node, DeviceIndex: 0,
				Primary: addr("10.0.1.10"), Addresses: []netip.Prefix{prefix("10.0.1.10/32")}, SourceDestCheck: true, Configure: true,
				Groups: []vpc.SecurityGroupID{"sg-1"}, Timeouts: fabric.IdleTimeouts{TCPEstablished: 432000 * time.Second}, Owner: owner},
			{ID: "eni-00000000000000002", VNI: 7, Subnet: testSubnet, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 2}, Guest: node, DeviceIndex: 1,
				Primary: addr("10.0.1.11"), Addresses: []netip.Prefix{prefix("10.0.1.11/32"), prefix("10.0.1.12/32"), prefix("10.0.1.32/28")},
				Groups: []vpc.SecurityGroupID{"sg-1"}, Timeouts: fabric.IdleTimeouts{TCPEstablished: time.Minute, UDP: 31 * time.Second, UDPStream: 61 * time.Second}, Owner: owner},
			{ID: "eni-00000000000000005", VNI: 7, Subnet: testSubnet, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 5}, Guest: "ul-demo-svc-db-1", DeviceIndex: 0,
				Primary: addr("10.0.1.15"), Addresses: []netip.Prefix{prefix("10.0.1.15/32")}, SourceDestCheck: true, Configure: true,
				Groups: []vpc.SecurityGroupID{"sg-1"}, Owner: fabric.Owner{VPC: testVPC, Zone: "us-east-1a"}},
		},
	}
	if d := cmp.Diff(want, got, ignoreOrder, compareNetip); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestDesiredMappingLags(t *testing.T) {
	w := newWorld(t)
	w.change(func(tx *store.Tx) {
		e := *tx.ENI("eni-00000000000000001")
		e.Secondary = []netip.Addr{addr("10.0.1.20"), addr("10.0.1.21")}
		tx.PutENI(&e)
	})
	old := w.View()
	w.now = w.now.Add(time.Minute)
	w.change(func(tx *store.Tx) {
		e := *tx.ENI("eni-00000000000000001")
		e.Secondary = []netip.Addr{addr("10.0.1.22")}
		tx.PutENI(&e)
		// A new interface has taken an address that the first had.
		other := testENI(2, "10.0.1.21", attached(1, store.Attached))
		other.Secondary = []netip.Addr{addr("10.0.1.23")}
		tx.PutENI(other)
	})
	got, err := desired(names{"demo"}, w.View(), old)
	if err != nil {
		t.Fatal(err)
	}
	addresses := map[vpc.ENIID][]netip.Prefix{}
	for _, i := range got.Interfaces {
		addresses[i.ID] = i.Addresses
	}
	want := map[vpc.ENIID][]netip.Prefix{
		"eni-00000000000000001": {prefix("10.0.1.10/32"), prefix("10.0.1.20/32")},
		"eni-00000000000000002": {prefix("10.0.1.21/32")},
	}
	if d := cmp.Diff(want, addresses, compareNetip); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestMetadata(t *testing.T) {
	w := newWorld(t)
	var lag time.Duration
	m := &metadata{store: w.Store, lag: func() time.Duration { return lag }, now: func() time.Time { return w.now },
		account: "123456789012", region: "us-east-1", zoneIDs: map[string]string{"us-east-1a": "use1-az1"}}
	w.now = w.now.Add(time.Second)
	w.change(func(tx *store.Tx) {
		e := *tx.ENI("eni-00000000000000001")
		e.Secondary = []netip.Addr{addr("10.0.1.20")}
		tx.PutENI(&e)
		tx.PutENI(testENI(2, "10.0.1.11", attached(1, store.Attaching)))
		i := *tx.Instance(testNode)
		i.Metadata.Tokens = "optional"
		tx.PutInstance(&i)
	})
	lag = 500 * time.Millisecond
	got, ok := m.Metadata(testNode)
	if !ok {
		t.Fatal("no metadata")
	}
	want := &imds.Instance{
		ID: testNode, Type: "m5.large", Account: "123456789012", Region: "us-east-1", Zone: "us-east-1a", ZoneID: "use1-az1",
		Arch: "x86_64", UserData: []byte("hi"), Options: imds.Options{HopLimit: 2},
		Interfaces: []imds.Interface{{
			ID: "eni-00000000000000001", MAC: "02:00:00:00:00:01", Subnet: testSubnet, SubnetCIDR: prefix("10.0.1.0/24"), VPC: testVPC,
			VPCCIDRs: []netip.Prefix{prefix("10.0.0.0/16"), prefix("100.64.0.0/16")}, Primary: addr("10.0.1.10"),
			GroupIDs: []vpc.SecurityGroupID{"sg-1"}, GroupNames: []string{"web"}, OwnerID: "123456789012",
		}},
	}
	if d := cmp.Diff(want, got, compareNetip); d != "" {
		t.Errorf("lagging (-want +got):\n%s", d)
	}
	w.now = w.now.Add(lag)
	want.Interfaces[0].Secondary = []netip.Addr{addr("10.0.1.20")}
	got, _ = m.Metadata(testNode)
	if d := cmp.Diff(want, got, compareNetip); d != "" {
		t.Errorf("after the lag (-want +got):\n%s", d)
	}
	// What is not on the wire is not told.
	mapped := w.View()
	m.mapped = func() *store.State { return mapped }
	lag = 0
	w.change(func(tx *store.Tx) {
		e := *tx.ENI("eni-00000000000000001")
		e.Secondary = append(e.Secondary[:1:1], addr("10.0.1.21"))
		tx.PutENI(&e)
	})
	got, _ = m.Metadata(testNode)
	if d := cmp.Diff(want, got, compareNetip); d != "" {
		t.Errorf("unmapped (-want +got):\n%s", d)
	}
	mapped = w.View()
	want.Interfaces[0].Secondary = []netip.Addr{addr("10.0.1.20"), addr("10.0.1.21")}
	got, _ = m.Metadata(testNode)
	if d := cmp.Diff(want, got, compareNetip); d != "" {
		t.Errorf("mapped (-want +got):\n%s", d)
	}
	// An instance younger than the lag knows itself; a terminated one nothing.
	w.change(func(tx *store.Tx) {
		tx.PutInstance(&store.Instance{ID: "i-00000000000000002", State: store.Pending})
	})
	if _, ok := m.Metadata("i-00000000000000002"); !ok {
		t.Error("a new instance has no metadata")
	}
	w.change(func(tx *store.Tx) {
		tx.PutInstance(&store.Instance{ID: "i-00000000000000002", State: store.Terminated})
	})
	if _, ok := m.Metadata("i-00000000000000002"); ok {
		t.Error("a terminated instance has metadata")
	}
}

func TestArchitecture(t *testing.T) {
	for in, want := range map[string]string{
		"m5.large": "x86_64", "m6g.large": "arm64", "c7gn.xlarge": "arm64", "im4gn.large": "arm64", "t4g.nano": "arm64", "a1.medium": "arm64",
		"g4dn.xlarge": "x86_64", "g5.xlarge": "x86_64", "g5g.xlarge": "arm64", "m8g.metal-24xl": "arm64", "c6a.large": "x86_64", "x2gd.large": "arm64",
	} {
		if got := architecture(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}

func TestIMDSKeyIsKept(t *testing.T) {
	dir := t.TempDir()
	first, err := imdsKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	again, err := imdsKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(first) != imds.KeySize || string(first) != string(again) {
		t.Errorf("first %x, then %x", first, again)
	}
}

// Gateways and peerings as the fabric gets them.
func TestDesiredGateways(t *testing.T) {
	w := newWorld(t)
	const igw, nat, pcx, peer = vpc.GatewayID("igw-00000000000000001"), vpc.NATGatewayID("nat-00000000000000001"), vpc.PeeringID("pcx-00000000000000001"), vpc.VPCID("vpc-00000000000000002")
	managed := testENI(5, "10.0.1.50", &store.Attachment{ID: "eni-attach-5", DeviceIndex: 1, Status: store.Attached})
	managed.NAT, managed.Groups, managed.SourceDestCheck = nat, nil, false
	gateway := &store.NATGateway{ID: nat, VPC: testVPC, Subnet: testSubnet, ENI: managed.ID, State: store.NATPending, Addresses: []store.NATAddress{
		{Private: managed.Primary, Primary: true}, {Private: addr("10.0.1.51"), Drains: time.Unix(2_000_000, 0)},
	}}
	peering := &store.Peering{ID: pcx, Status: store.PeeringPending, Requester: store.PeeringSide{VPC: testVPC}, Accepter: store.PeeringSide{VPC: peer}}
	w.change(func(tx *store.Tx) {
		tx.PutVPC(&store.VPC{ID: peer, VNI: 8, CIDRs: []store.CIDRAssociation{{CIDR: prefix("10.8.0.0/16")}}})
		tx.PutGateway(&store.InternetGateway{ID: igw})
		tx.PutENI(managed)
		tx.PutNAT(gateway)
		tx.PutPeering(peering)
		tx.PutAddress(&store.Address{ID: "eipalloc-1", Public: addr("198.51.100.1"), Association: "eipassoc-1", ENI: "eni-00000000000000001", Private: addr("10.0.1.10")})
		tx.PutAddress(&store.Address{ID: "eipalloc-2", Public: addr("198.51.100.2")})
		main := *tx.MainTable(testVPC)
		main.Routes = []store.Route{
			{CIDR: prefix("0.0.0.0/0"), Target: store.Target{Gateway: igw}},
			{CIDR: prefix("203.0.113.0/24"), Target: store.Target{NAT: nat}},
			{CIDR: prefix("10.8.0.0/16"), Target: store.Target{Peering: pcx}},
		}
		tx.PutRouteTable(&main)
	})
	routes := func(c fabric.Config) []fabric.Route {
		for _, t := range c.Tables {
			if t.ID == w.View().MainTable(testVPC).ID {
				return t.Routes[2:] // behind the local ones
			}
		}
		return nil
	}
	get := func() fabric.Config {
		t.Helper()
		c, err := desired(names{"demo"}, w.View(), w.View())
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	// Detached, pending, not accepted: nothing of it, but the gateway's address
	// is where the fabric has no interface yet.
	c := get()
	if diff := cmp.Diff([]fabric.Route{{CIDR: prefix("0.0.0.0/0")}, {CIDR: prefix("203.0.113.0/24"), ENI: managed.ID}, {CIDR: prefix("10.8.0.0/16")}}, routes(c), cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
		t.Error(diff)
	}
	if len(c.Publics) != 0 || len(c.Interfaces) != 1 || len(c.Guests) != 1 || !c.Internet {
		t.Errorf("public addresses %v, interfaces %v, guests %v, internet %v", c.Publics, c.Interfaces, c.Guests, c.Internet)
	}

	w.change(func(tx *store.Tx) {
		tx.PutGateway(&store.InternetGateway{ID: igw, VPC: testVPC})
		available, active := *gateway, *peering
		available.State, active.Status = store.NATAvailable, store.PeeringActive
		tx.PutNAT(&available)
		tx.PutPeering(&active)
	})
	c = get()
	if diff := cmp.Diff([]fabric.Route{{CIDR: prefix("0.0.0.0/0"), Internet: true}, {CIDR: prefix("203.0.113.0/24"), ENI: managed.ID}, {CIDR: prefix("10.8.0.0/16"), Peer: 8}}, routes(c), cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]fabric.Public{{Addr: addr("198.51.100.1"), VNI: 7, Private: addr("10.0.1.10")}}, c.Publics, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Error(diff)
	}
	want := fabric.Guest{Netns: "ul-demo-svc-" + string(nat), NAT: &fabric.NAT{
		Addresses: []netip.Addr{addr("10.0.1.50")}, CIDRs: []netip.Prefix{prefix("10.0.0.0/16"), prefix("100.64.0.0/16")},
	}}
	if diff := cmp.Diff(want, c.Guests[1], cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
		t.Error(diff)
	}
	i := c.Interfaces[1]
	if i.ID != managed.ID || !i.Ungated || i.MTU != fabric.NATMTU || i.SourceDestCheck || i.Guest != want.Netns || !i.Configure {
		t.Errorf("the NAT gateway's interface: %+v", i)
	}
}

// IMDS shows host names in the domain of the VPC's DHCP options, if they have one.
func TestDomainOf(t *testing.T) {
	for name, tt := range map[string]struct {
		options *store.DHCPOptions
		want    string
	}{
		"none":         {nil, ""},
		"the region's": {&store.DHCPOptions{Default: true}, ""},
		"others":       {&store.DHCPOptions{Options: []store.DHCPOption{{Key: "ntp-servers", Values: []string{"10.0.0.9"}}}}, ""},
		"one":          {&store.DHCPOptions{Options: []store.DHCPOption{{Key: "domain-name", Values: []string{"corp.example"}}}}, "corp.example"},
		"several":      {&store.DHCPOptions{Options: []store.DHCPOption{{Key: "domain-name", Values: []string{"corp.example lab.example"}}}}, "corp.example"},
	} {
		if got := domainOf(tt.options); got != tt.want {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
}

// TestDesiredIPv6: blocks, addresses, routes, entries and rules of IPv6 come to
// the fabric, addresses as late as those of IPv4.
func TestDesiredIPv6(t *testing.T) {
	w := newWorld(t)
	w.change(func(tx *store.Tx) {
		v := *tx.VPC(testVPC)
		v.IPv6CIDRs = []store.CIDRAssociation{{ID: "vpc-cidr-assoc-6", CIDR: prefix("2001:db8:0:100::/56")}}
		tx.PutVPC(&v)
		s := *tx.Subnet(testSubnet)
		s.IPv6 = store.CIDRAssociation{ID: "subnet-cidr-assoc-6", CIDR: prefix("2001:db8:0:101::/64")}
		tx.PutSubnet(&s)
		main, def := *tx.MainTable(testVPC), *tx.DefaultACL(testVPC)
		tx.PutEgressOnly(&store.EgressOnlyGateway{ID: "eigw-1", VPC: testVPC})
		main.Routes = []store.Route{
			{CIDR: prefix("::/0"), Target: store.Target{EgressOnly: "eigw-1"}},
			{CIDR: prefix("2001:db8:9::/48"), Target: store.Target{ENI: "eni-00000000000000001"}},
		}
		tx.PutRouteTable(&main)
		def.Entries = []store.ACLEntry{{Number: 1, Protocol: 58, ICMPType: 128, ICMPCode: -1, CIDR: prefix("::/0"), Allow: true}}
		tx.PutACL(&def)
		tx.PutGroup(&store.Group{ID: "sg-1", VPC: testVPC, Name: "web", Rules: []store.Rule{
			{ID: "sgr-1", Protocol: "icmpv6", From: 128, To: -1, CIDR: prefix("2001:db8::/32")},
		}})
	})
	before := w.View()
	w.change(func(tx *store.Tx) {
		e := *tx.ENI("eni-00000000000000001")
		e.IPv6, e.IPv6Prefixes = []netip.Addr{addr("2001:db8:0:101::4")}, []netip.Prefix{prefix("2001:db8:0:101:1::/80")}
		tx.PutENI(&e)
	})
	c, err := desired(names{"demo"}, w.View(), w.View())
	if err != nil {
		t.Fatal(err)
	}
	got := fabric.Config{Subnets: c.Subnets, Tables: c.Tables, ACLs: c.ACLs, Groups: c.Groups}
	want := fabric.Config{
		Subnets: []fabric.Subnet{{ID: testSubnet, VNI: 7, CIDR: prefix("10.0.1.0/24"), CIDR6: prefix("2001:db8:0:101::/64"), Table: w.View().MainTable(testVPC).ID, ACL: w.View().DefaultACL(testVPC).ID}},
		Tables: []fabric.RouteTable{{ID: w.View().MainTable(testVPC).ID, Routes: []fabric.Route{
			{CIDR: prefix("10.0.0.0/16"), Local: true}, {CIDR: prefix("100.64.0.0/16"), Local: true}, {CIDR: prefix("2001:db8:0:100::/56"), Local: true},
			{CIDR: prefix("::/0"), Internet: true}, {CIDR: prefix("2001:db8:9::/48"), ENI: "eni-00000000000000001"},
		}}},
		ACLs: []fabric.ACL{{ID: w.View().DefaultACL(testVPC).ID, Ingress: []fabric.ACLEntry{{Protocol: 58, From: 128, To: -1, CIDR: prefix("::/0"), Allow: true}}}},
	}
	for _, g := range c.Groups {
		if g.ID == "sg-1" {
			want.Groups = append(want.Groups, fabric.Group{ID: "sg-1", Ingress: []fabric.Rule{{Protocol: 58, From: 128, To: -1, Peers: []netip.Prefix{prefix("2001:db8::/32")}}}})
		} else {
			want.Groups = append(want.Groups, g)
		}
	}
	if diff := cmp.Diff(want, got, compareNetip); diff != "" {
		t.Errorf("desired (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]netip.Prefix{prefix("10.0.1.10/32"), prefix("2001:db8:0:101::4/128"), prefix("2001:db8:0:101:1::/80")}, c.Interfaces[0].Addresses, compareNetip); diff != "" {
		t.Errorf("addresses (-want +got):\n%s", diff)
	}
	late, err := desired(names{"demo"}, w.View(), before)
	if err != nil || len(late.Interfaces[0].Addresses) != 1 {
		t.Errorf("by an older snapshot %v, %v; want the primary address alone", late.Interfaces[0].Addresses, err)
	}
	// The subnet's block goes, and with it what an older snapshot has.
	old := w.View()
	w.change(func(tx *store.Tx) {
		e, s := *tx.ENI("eni-00000000000000001"), *tx.Subnet(testSubnet)
		e.IPv6, e.IPv6Prefixes, s.IPv6 = nil, nil, store.CIDRAssociation{}
		tx.PutENI(&e)
		tx.PutSubnet(&s)
	})
	gone, err := desired(names{"demo"}, w.View(), old)
	if err != nil || len(gone.Interfaces[0].Addresses) != 1 || gone.Subnets[0].CIDR6.IsValid() {
		t.Errorf("without a block %v, %v; want the primary address alone", gone.Interfaces[0].Addresses, err)
	}
}
