package fabric

import (
	"context"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"testing"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// valid is a Config of lab "demo" without fault.
func valid() Config {
	p := netip.MustParsePrefix
	return Config{
		Subnets: []Subnet{{ID: subnetA, VNI: 1, CIDR: p("10.0.0.0/24"), Table: tableMain, ACL: aclOpen}},
		Tables:  []RouteTable{{ID: tableMain, Routes: []Route{{CIDR: p("10.0.0.0/16"), Local: true}, {CIDR: p("0.0.0.0/0")}, {CIDR: p("::/0")}}}},
		ACLs:    []ACL{{ID: aclOpen, Ingress: []ACLEntry{{Protocol: AllProtocols, CIDR: p("0.0.0.0/0"), Allow: true}}}},
		Guests:  []Guest{{Netns: "ul-demo-i-00000000000000001"}, {Netns: "ul-demo-svc-db-1"}},
		Interfaces: []Interface{
			{ID: "eni-00000000000000001", VNI: 1, Subnet: subnetA, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, Guest: "ul-demo-i-00000000000000001",
				Primary: netip.MustParseAddr("10.0.0.4"), Addresses: []netip.Prefix{p("10.0.0.4/32"), p("10.0.0.16/28")}},
			{ID: "eni-00000000000000002", VNI: 1, Subnet: subnetA, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 2}, Guest: "ul-demo-svc-db-1",
				Primary: netip.MustParseAddr("10.0.0.5"), Addresses: []netip.Prefix{p("10.0.0.5/32")}},
		},
	}
}

// hold6 gives the subnet an IPv6 block, and its interfaces an address of it each.
func (c *Config) hold6(first, second string) {
	c.Subnets[0].CIDR6 = netip.MustParsePrefix("fd00::/64")
	for i, a := range []string{first, second} {
		if a != "" {
			c.Interfaces[i].Addresses = append(c.Interfaces[i].Addresses, netip.MustParsePrefix(a))
		}
	}
}

func TestCheck(t *testing.T) {
	n := namespaces{"demo"}
	if d, err := check(n, valid()); err != nil || len(d.ports) != 2 {
		t.Fatalf("%d ports, %v", len(d.ports), err)
	}
	p := netip.MustParsePrefix
	for name, c := range map[string]struct {
		spoil func(*Config)
		want  string
		ports int // that are left
	}{
		"subnet twice":             {func(c *Config) { c.Subnets = append(c.Subnets, c.Subnets[0]) }, "occurs twice", 2},
		"subnets overlap":          {func(c *Config) { c.Subnets = append(c.Subnets, c.Subnets[0]); c.Subnets[1].ID = subnetB }, "overlaps", 2},
		"VNI 0":                    {func(c *Config) { c.Subnets[0].VNI = 0 }, "VNI 0", 0},
		"subnet too small":         {func(c *Config) { c.Subnets[0].CIDR = p("10.0.0.0/29") }, "/16 to /28", 0},
		"subnet of IPv6":           {func(c *Config) { c.Subnets[0].CIDR = p("fd00::/24") }, "not IPv4", 0},
		"no CIDR":                  {func(c *Config) { c.Subnets[0].CIDR = netip.Prefix{} }, "not IPv4", 0},
		"unknown route table":      {func(c *Config) { c.Subnets[0].Table = tableOther }, "route table \"rtb-0000000000000000b\" is not there", 2},
		"no route table":           {func(c *Config) { c.Subnets[0].Table = "" }, "route table \"\" is not there", 2},
		"unknown ACL":              {func(c *Config) { c.Subnets[0].ACL = "acl-0000000000000000b" }, "network ACL \"acl-0000000000000000b\" is not there", 2},
		"route table twice":        {func(c *Config) { c.Tables = append(c.Tables, c.Tables[0]) }, "occurs twice", 2},
		"route table without ID":   {func(c *Config) { c.Tables = append(c.Tables, RouteTable{}) }, "not of the form", 2},
		"route table 0":            {func(c *Config) { c.Tables = append(c.Tables, RouteTable{ID: "rtb-00000000000000000"}) }, "means none", 2},
		"route twice":              {func(c *Config) { c.Tables[0].Routes[1].CIDR = p("10.0.0.9/16") }, "where another is", 2},
		"route to nowhere":         {func(c *Config) { c.Tables[0].Routes[1].CIDR = netip.Prefix{} }, "to nowhere", 2},
		"route with two targets":   {func(c *Config) { c.Tables[0].Routes[0].ENI = "eni-00000000000000001" }, "more than one target", 2},
		"ACL twice":                {func(c *Config) { c.ACLs = append(c.ACLs, c.ACLs[0]) }, "occurs twice", 2},
		"ACL without ID":           {func(c *Config) { c.ACLs = append(c.ACLs, ACL{}) }, "not of the form", 2},
		"ACL entry for no address": {func(c *Config) { c.ACLs[0].Ingress[0].CIDR = netip.Prefix{} }, "CIDR block that is none", 2},
		"ACL of 41 entries": {func(c *Config) {
			for len(c.ACLs[0].Ingress) < 41 {
				c.ACLs[0].Ingress = append(c.ACLs[0].Ingress, c.ACLs[0].Ingress[0])
			}
		}, "behind entry 40", 2},
		"guest of another lab":     {func(c *Config) { c.Guests[0].Netns = "ul-other-i-00000000000000001" }, "want ul-demo-i", 1},
		"guest by path":            {func(c *Config) { c.Guests[0].Netns = "/run/netns/x" }, "want ul-demo-i", 1},
		"guest named as a pod":     {func(c *Config) { c.Guests[0].Netns = "ul-demo-pod-web" }, "want ul-demo-i", 1},
		"ENI without ID":           {func(c *Config) { c.Interfaces[0].ID = "" }, "not of the form", 1},
		"ENI twice":                {func(c *Config) { c.Interfaces[1].ID = c.Interfaces[0].ID }, "occurs twice", 1},
		"unknown subnet":           {func(c *Config) { c.Interfaces[0].Subnet = subnetB }, "not there", 1},
		"VNI not the subnet's":     {func(c *Config) { c.Interfaces[0].VNI = 2 }, "has VNI 2", 1},
		"unknown guest":            {func(c *Config) { c.Interfaces[0].Guest = "ul-demo-svc-no" }, "guest", 1},
		"no MAC":                   {func(c *Config) { c.Interfaces[0].MAC = nil }, "MAC", 1},
		"MAC of zeros":             {func(c *Config) { c.Interfaces[0].MAC = make([]byte, 6) }, "MAC", 1},
		"group MAC":                {func(c *Config) { c.Interfaces[0].MAC = net.HardwareAddr{3, 0, 0, 0, 0, 1} }, "MAC", 1},
		"MAC of the router":        {func(c *Config) { c.Interfaces[0].MAC = RouterMAC }, "MAC", 1},
		"MAC twice":                {func(c *Config) { c.Interfaces[1].MAC = c.Interfaces[0].MAC }, "is that of eni-00000000000000001", 1},
		"device index below 0":     {func(c *Config) { c.Interfaces[0].DeviceIndex = -1 }, "device index", 1},
		"device index beyond":      {func(c *Config) { c.Interfaces[0].DeviceIndex = 10000 }, "device index", 1},
		"device twice":             {func(c *Config) { c.Interfaces[1].Guest = c.Interfaces[0].Guest }, "eth0 of", 1},
		"primary outside":          {func(c *Config) { c.Interfaces[0].Primary = netip.MustParseAddr("10.0.1.4") }, "not in its subnet", 1},
		"no primary":               {func(c *Config) { c.Interfaces[0].Primary = netip.Addr{} }, "not in its subnet", 1},
		"primary not held":         {func(c *Config) { c.Interfaces[0].Addresses = c.Interfaces[0].Addresses[1:] }, "lack its primary", 1},
		"prefix of another length": {func(c *Config) { c.Interfaces[0].Addresses[1] = p("10.0.0.16/29") }, "neither", 1},
		"prefix not aligned":       {func(c *Config) { c.Interfaces[0].Addresses[1] = p("10.0.0.17/28") }, "neither", 1},
		"address outside":          {func(c *Config) { c.Interfaces[0].Addresses[1] = p("10.0.1.16/28") }, "not in its subnet", 1},
		"address of IPv6":          {func(c *Config) { c.Interfaces[0].Addresses[1] = p("fd00::1/128") }, "not in its subnet's IPv6 block", 1},
		"IPv6 block of /66":        {func(c *Config) { c.Subnets[0].CIDR6 = p("fd00::/66") }, "not IPv6 of /44", 0},
		"IPv6 block of IPv4":       {func(c *Config) { c.Subnets[0].CIDR6 = p("10.0.0.0/16") }, "not IPv6 of /44", 0},
		"IPv6 blocks overlap": {func(c *Config) {
			c.Subnets[0].CIDR6 = p("fd00::/60")
			c.Subnets = append(c.Subnets, c.Subnets[0])
			c.Subnets[1].ID, c.Subnets[1].CIDR, c.Subnets[1].CIDR6 = subnetB, p("10.0.1.0/24"), p("fd00::/64")
		}, "overlaps", 2},
		"IPv6 prefix of another length": {func(c *Config) { c.hold6("fd00::/96", "") }, "neither", 1},
		"IPv6 prefix not aligned":       {func(c *Config) { c.hold6("fd00::1/80", "") }, "neither", 1},
		"IPv6 address outside":          {func(c *Config) { c.hold6("fd00:1::1/128", "") }, "not in its subnet's IPv6 block", 1},
		"IPv6 address twice":            {func(c *Config) { c.hold6("fd00::1/128", "fd00::1/128") }, "held by eni-00000000000000001", 1},
		"IPv6 address in a prefix":      {func(c *Config) { c.hold6("fd00::/80", "fd00::1/128") }, "held by eni-00000000000000001", 1},
		"IPv6 prefix around an address": {func(c *Config) { c.hold6("fd00::1/128", "fd00::/80") }, "held by eni-00000000000000001", 1},
		"address held by another":       {func(c *Config) { c.Interfaces[1].Addresses = append(c.Interfaces[1].Addresses, p("10.0.0.20/32")) }, "held by eni-00000000000000001", 1},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := valid()
			c.spoil(&cfg)
			d, err := check(n, cfg)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one that says %q", err, c.want)
			}
			if len(d.ports) != c.ports || len(d.order) != c.ports {
				t.Errorf("%d ports are left, want %d", len(d.ports), c.ports)
			}
		})
	}
}

func TestDeviceNames(t *testing.T) {
	seen := map[string]vpc.ENIID{}
	ids := []vpc.ENIID{"eni-00000000", "eni-00000000000000000", "eni-ffffffff", "eni-fffffffffffffffff", "eni-00000000000000001", "eni-10000000000000000", "eni-000000000ffffffff"}
	for range 1000 {
		ids = append(ids, vpc.ENIID(vpc.NewID("eni")))
	}
	form := regexp.MustCompile(`^e[0-9a-v]{8,14}$`)
	for _, id := range ids {
		name, err := device(id)
		if err != nil || !form.MatchString(name) {
			t.Errorf("device(%s) = %q, %v", id, name, err)
		}
		if other, ok := seen[name]; ok && other != id {
			t.Errorf("%s and %s are both %s", id, other, name)
		}
		seen[name] = id
	}
	for _, id := range []vpc.ENIID{"", "eni-", "eni-xyz", "i-00000000", "eni-../../etc/passwd"} {
		if name, err := device(id); err == nil {
			t.Errorf("device(%q) = %q", id, name)
		}
	}
}

func TestLabNames(t *testing.T) {
	for lab, ok := range map[string]bool{
		"demo": true, "a": true, "t1-x2": true, "abcdefghij0123456789": true, "demo-ip": true, "svc": true,
		"": false, "Demo": false, "1a": false, "a/b": false, "abcdefghij01234567890": false, "-a": false,
		"demo-svc": false, "demo-i": false, "demo-pod-x": false, "a-svc-b": false,
	} {
		if err := checkLab(lab); (err == nil) != ok {
			t.Errorf("checkLab(%q) = %v", lab, err)
		}
	}
}

func TestGuestNames(t *testing.T) {
	n := namespaces{"demo"}
	for name, ok := range map[string]bool{
		"ul-demo-i-0123456789abcdef0": true, "ul-demo-i-01234567": true, "ul-demo-svc-db-1": true,
		"ul-demo-fabric": false, "ul-demo-pod-web": false, "ul-demo-i-": false, "ul-demo-i-fabric": false, "ul-demo-svc-": false,
		"ul-demo2-i-0123456789abcdef0": false, "ul-demo-svc-a/b": false, "ul-demo-svc-../x": false, "eth0": false, "": false,
	} {
		if got := n.guest(name); got != ok {
			t.Errorf("guest(%q) = %v", name, got)
		}
	}
}

// TestBadConfigIsLeftOut sets a Config with faults: the rest works.
func TestBadConfigIsLeftOut(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetA, "10.0.0.5")
	bad := l.add(subnetA, "10.0.0.6")
	l.iface(bad.eni).MAC = RouterMAC
	l.cfg.Guests = append(l.cfg.Guests, Guest{Netns: "nobody"})
	err := l.Set(context.Background(), l.cfg)
	if err == nil || !strings.Contains(err.Error(), string(bad.eni)) || !strings.Contains(err.Error(), `"nobody"`) {
		t.Errorf("Set = %v, want both faults", err)
	}
	a.reaches(b)
	l.iface(bad.eni).MAC = bad.mac
	l.cfg.Guests = l.cfg.Guests[:3]
	l.set()
	a.reaches(bad)
}

// TestNameTaken has a guest that made an eth1 of its own.
func TestNameTaken(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetA, "10.0.0.5")
	l.set()
	a.ip("link", "add", "eth1", "type", "veth", "peer", "name", "x")
	second := *l.iface(b.eni)
	second.ID, second.Guest, second.DeviceIndex, second.MAC = "eni-00000000000000009", a.ns, 1, net.HardwareAddr{2, 9, 9, 9, 9, 9}
	second.Primary = netip.MustParseAddr("10.0.0.9")
	second.Addresses = []netip.Prefix{netip.MustParsePrefix("10.0.0.9/32")}
	l.cfg.Interfaces = append(l.cfg.Interfaces, second)
	if err := l.Set(context.Background(), l.cfg); err == nil || !strings.Contains(err.Error(), "eth1") {
		t.Errorf("Set = %v, want an error that names eth1", err)
	}
	a.reaches(b)
	a.ip("link", "del", "eth1")
	l.set()
}

func TestOpenErrors(t *testing.T) {
	for name, o := range map[string]Options{
		"bad lab": {Lab: "no/lab", BPFFS: "/sys/fs/bpf/x"},
		"no pins": {Lab: "demo"},
	} {
		if f, err := Open(o); err == nil {
			f.Close()
			t.Errorf("%s: no error", name)
		}
		if err := Destroy(o); err == nil {
			t.Errorf("Destroy, %s: no error", name)
		}
	}
	l := newLab(t)
	if f, err := Open(Options{Lab: l.name, BPFFS: t.TempDir()}); err == nil || !strings.Contains(err.Error(), "mount -t bpf") {
		if f != nil {
			f.Close()
		}
		t.Errorf("directory outside a bpffs: %v", err)
	}
}

// TestOneAtATime opens and destroys a lab that is open.
func TestOneAtATime(t *testing.T) {
	l := newLab(t)
	if f, err := Open(labOptions(l.name)); err == nil || !strings.Contains(err.Error(), "stop it first") {
		if f != nil {
			f.Close()
		}
		t.Errorf("second Open: %v", err)
	}
	if err := Destroy(labOptions(l.name)); err == nil || !strings.Contains(err.Error(), "stop it first") {
		t.Errorf("Destroy of an open fabric: %v", err)
	}
	l.shut()
	l.open()
	f := l.Fabric
	l.shut()
	if _, err := f.Counters(); err == nil {
		t.Error("Counters of a closed fabric: no error")
	}
	if err := f.Set(context.Background(), l.cfg); err == nil {
		t.Error("Set of a closed fabric: no error")
	}
}

// TestBadEntryEndsACL: what stands behind an entry that is not valid is left
// out, as the entry may have denied it.
func TestBadEntryEndsACL(t *testing.T) {
	allow := ACLEntry{Protocol: 6, From: 1, To: 2, CIDR: netip.MustParsePrefix("10.0.0.0/8"), Allow: true}
	bad := allow
	bad.From = 3
	six := ACLEntry{Protocol: AllProtocols, CIDR: netip.MustParsePrefix("::/0")}
	got, errs := checkACLs([]ACL{{ID: aclOpen, Egress: []ACLEntry{six, allow, bad, allow}, Ingress: []ACLEntry{allow, six, allow}}})
	four, six6 := got[aclOpen].four.Count, got[aclOpen].six.Count
	if len(errs) != 1 || four != [2]uint32{egress: 1, ingress: 2} || six6 != [2]uint32{1, 1} {
		t.Errorf("%d errors, %v entries of IPv4, %v of IPv6", len(errs), four, six6)
	}
}

// TestBadRouteEmptiesTable: without a route, a shorter one would be followed.
func TestBadRouteEmptiesTable(t *testing.T) {
	p := netip.MustParsePrefix
	_, routes, errs := checkTables([]RouteTable{{ID: tableMain, Routes: []Route{{CIDR: p("10.0.0.0/16"), Local: true}, {CIDR: p("10.0.1.0/24"), Local: true, ENI: "eni-1"}}}})
	if len(errs) != 1 || len(routes) != 1 || len(routes[0xa]) != 0 {
		t.Errorf("errors %v, routes %v", errs, routes)
	}
}
