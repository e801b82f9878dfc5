package plan

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/underlay-cni/underlay/internal/vpc"
)

func limits(t *testing.T, name string) vpc.InstanceLimits {
	t.Helper()
	l, ok := vpc.LimitsOf(name)
	if !ok {
		t.Fatalf("%s is not in the table", name)
	}
	return l
}

func subnet(t *testing.T, cidr string, used int) Subnet {
	t.Helper()
	s, err := NewSubnet(netip.MustParsePrefix(cidr), used)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// The expectations are worked out by hand from the published limits: m5.large
// 3 × 10, 2 vCPUs; m6i.4xlarge 8 × 30, 16; m5.24xlarge 15 × 50, 96; p4d.24xlarge
// 60 × 50 of which 15 on card 0; p5.48xlarge 64 × 50 of which 2 on card 0.
func TestPodsOfATypes(t *testing.T) {
	for _, c := range []struct {
		name                   string
		prefixes               bool
		formula, eks, underlay int
		caps                   []int
		why                    string
	}{
		{"m5.large", false, 29, 29, 27, []int{110}, "addresses decide"},
		{"m5.large", true, 434, 110, 432, []int{110}, "would allow more"},
		{"m6i.4xlarge", false, 234, 110, 232, []int{110}, "would allow more"},
		{"m5.24xlarge", false, 737, 250, 735, []int{250}, "250 at most on 96 vCPUs"},
		{"p4d.24xlarge", false, 737, 250, 735, []int{250}, "15 of its 60 ENIs are on card 0"},
		{"p5.48xlarge", false, 100, 100, 98, []int{250}, "2 of its 64 ENIs are on card 0"},
		{"dl1.24xlarge", false, 737, 110, 735, []int{110, 250}, "not in the table"},
		{"t2.medium", false, 17, 17, 15, []int{110}, "addresses decide"},
	} {
		p, err := PodsOf(limits(t, c.name), c.prefixes)
		if err != nil {
			t.Fatal(err)
		}
		if p.Formula != c.formula || p.EKS != c.eks || p.Underlay != c.underlay || !slices.Equal(p.EKSCaps, c.caps) {
			t.Errorf("%s (prefixes %v): formula %d, EKS %d of %v, Underlay %d; want %d, %d of %v, %d", c.name, c.prefixes, p.Formula, p.EKS, p.EKSCaps, p.Underlay, c.formula, c.eks, c.caps, c.underlay)
		}
		if all := strings.Join(p.Why, "\n"); !strings.Contains(all, c.why) {
			t.Errorf("%s: %q is not among the reasons:\n%s", c.name, c.why, all)
		}
	}
	if _, err := PodsOf(limits(t, "t2.medium"), true); err == nil {
		t.Error("prefixes on a Xen type were not refused")
	}
}

// No type has so many ENIs on one card yet; the datapath has 31 marks.
func TestDeviceIndexBoundsUnderlay(t *testing.T) {
	p, err := PodsOf(vpc.InstanceLimits{Type: "x", ENIs: 40, ENIsDefaultCard: 40, NetworkCards: 1, IPv4PerENI: 11, VCPUs: 64, Hypervisor: "nitro"}, false)
	if err != nil || p.Formula != 402 || p.Underlay != 310 || !strings.Contains(strings.Join(p.Why, "\n"), "31 of 40 ENIs") {
		t.Errorf("%v: %+v", err, p)
	}
}

func TestNear(t *testing.T) {
	for in, want := range map[string]string{"m5.lrge": "m5.large", "M5.Large": "m5.large", "m5large": "m5.large", "p5.48xlarg": "p5.48xlarge"} {
		if got := Near(in, 3); len(got) == 0 || got[0] != want {
			t.Errorf("Near(%q) = %v, want %s first", in, got, want)
		}
	}
	if got := Near("kubernetes-worker", 3); len(got) != 0 {
		t.Errorf("Near of nothing like a type = %v", got)
	}
}

func TestNodesHold(t *testing.T) {
	for _, c := range []struct {
		name     string
		pods     int
		maxPods  int
		prefixes bool
		underlay Holding
		aws      Holding
	}{
		// One pod: primary, its address, one free. The other: 9 are fewer than
		// the 9 free it wants beside the one in use, so a second ENI.
		{"m5.large", 1, 29, false, Holding{1, 2, 0}, Holding{2, 18, 0}},
		{"m5.large", 0, 29, false, Holding{1, 1, 0}, Holding{1, 9, 0}},
		// Eight pods and the floor fill the first ENI; a ninth needs a second.
		{"m5.large", 8, 29, false, Holding{1, 9, 0}, Holding{2, 18, 0}},
		{"m5.large", 9, 29, false, Holding{2, 10, 0}, Holding{2, 18, 0}},
		{"m5.large", 10, 29, false, Holding{2, 11, 0}, Holding{3, 27, 0}},
		// Nothing is left for the floor.
		{"m5.large", 27, 29, false, Holding{3, 27, 0}, Holding{3, 27, 0}},
		// 16 pods pin 60 addresses, 3 on a p3dn 98 secondary ones: as reported
		// of the AWS VPC CNI.
		{"m6i.4xlarge", 16, 234, false, Holding{1, 17, 0}, Holding{2, 58, 0}},
		{"p3dn.24xlarge", 3, 250, false, Holding{1, 4, 0}, Holding{2, 98, 0}},
		// It stops at 110 addresses, reached with the fourth ENI (116).
		{"m6i.4xlarge", 100, 110, false, Holding{4, 101, 0}, Holding{4, 116, 0}},
		// 16 pods and the floor are 17: two /28s. 15 and the floor are one.
		{"m5.large", 16, 110, true, Holding{1, 0, 2}, Holding{1, 0, 2}},
		{"m5.large", 15, 110, true, Holding{1, 0, 1}, Holding{1, 0, 2}},
		{"m5.large", 108, 110, true, Holding{1, 0, 7}, Holding{1, 0, 7}},
		{"m5.large", 200, 250, true, Holding{2, 0, 13}, Holding{2, 0, 14}},
	} {
		l := limits(t, c.name)
		if got := Underlay(l, c.pods, 1, c.prefixes); got != c.underlay {
			t.Errorf("Underlay, %d pods on %s: %+v, want %+v", c.pods, c.name, got, c.underlay)
		}
		if got := AWSDefault(l, c.pods, c.maxPods, c.prefixes); got != c.aws {
			t.Errorf("AWS VPC CNI, %d pods on %s: %+v, want %+v", c.pods, c.name, got, c.aws)
		}
	}
}

func TestSubnetSizes(t *testing.T) {
	for _, c := range []struct {
		cidr         string
		used         int
		free, blocks int
	}{
		{"10.0.0.0/28", 0, 11, 0},
		{"10.0.0.0/27", 0, 27, 0},
		{"10.0.0.0/26", 0, 59, 2},
		{"10.0.0.0/24", 0, 251, 14},
		{"10.0.0.0/24", 27, 224, 14}, // all in the first and last /28
		{"10.0.0.0/24", 28, 223, 13},
		{"10.0.0.0/24", 251, 0, 0},
		{"10.0.0.0/16", 0, 65531, 4094},
	} {
		if s := subnet(t, c.cidr, c.used); s.Free() != c.free || s.Blocks != c.blocks {
			t.Errorf("%s with %d used: %d free, %d /28s; want %d, %d", c.cidr, c.used, s.Free(), s.Blocks, c.free, c.blocks)
		}
	}
	for _, bad := range []struct {
		cidr string
		used int
	}{{"10.0.0.5/24", 0}, {"10.0.0.0/15", 0}, {"10.0.0.0/29", 0}, {"fd00::/64", 0}, {"10.0.0.0/24", 252}, {"10.0.0.0/24", -1}} {
		if _, err := NewSubnet(netip.MustParsePrefix(bad.cidr), bad.used); err == nil {
			t.Errorf("%s with %d used was taken", bad.cidr, bad.used)
		}
	}
}

// Six scattered addresses in a /24, and one /28: the /28s of .0 and .240 are
// EC2's, .16, .32 and .48 have an address each, .64 is delegated.
func TestFreeBlocks(t *testing.T) {
	s := subnet(t, "10.0.1.0/24", 22)
	var used []netip.Addr
	for _, a := range []string{"10.0.1.4", "10.0.1.17", "10.0.1.18", "10.0.1.33", "10.0.1.63", "10.0.1.250", "10.0.2.100"} {
		used = append(used, netip.MustParseAddr(a))
	}
	s.FreeBlocks(used, []netip.Prefix{netip.MustParsePrefix("10.0.1.64/28")}, nil)
	if s.Blocks != 10 || !s.BlocksKnown {
		t.Errorf("%d free /28s, want 10 of 16", s.Blocks)
	}
}

// Of eight whole /28s of a /24 half is kept for prefixes, one for names, and one
// of those left has an address that a reservation of a single one keeps.
func TestFreeBlocksBesideReservations(t *testing.T) {
	s := subnet(t, "10.0.1.0/25", 0) // whole: .16 to .96, six
	in := func(cidr string, prefixes bool) vpc.Reservation {
		return vpc.Reservation{CIDR: netip.MustParsePrefix(cidr), Prefixes: prefixes}
	}
	s.FreeBlocks([]netip.Addr{netip.MustParseAddr("10.0.1.35")}, nil, []vpc.Reservation{
		in("10.0.1.32/27", true), // .32 is taken in part
		in("10.0.1.64/28", false), in("10.0.1.80/32", false), in("10.0.1.96/29", true),
	})
	if s.Blocks != 1 || s.Kept != 1 { // .16; .48
		t.Errorf("%d free /28s and %d kept for prefixes, want 1 and 1", s.Blocks, s.Kept)
	}
}

// Three nodes want three /28s of a /26 that has two; with one more that a
// reservation keeps for prefixes, and that no single address may have, it fits.
func TestFitWithReservedPrefixes(t *testing.T) {
	s := subnet(t, "10.0.0.0/26", 16)
	s.Blocks, s.BlocksKnown, s.Kept = 1, true, 1 // 43 free, beside the 16 that are set aside
	r := Request{Nodes: 2, Pods: 30, Prefixes: true, Floor: 1, Limits: limits(t, "m5.large"), Subnets: []Subnet{s}}
	f := r.Fit()
	if u := f.Subnets[0].Underlay; !f.Fits || u.Addresses != 34 || u.Left != 43-18 || u.BlocksGap != 0 {
		t.Errorf("%+v: %v", u, f.Problems)
	}
	r.Prefixes = false // singles have nothing of it: 2 × (1 + 16), and two ENIs more
	if u := r.Fit().Subnets[0].Underlay; u.Left != 43-36 {
		t.Errorf("singles: %+v", u)
	}
}

func TestQuotaOfInterfaces(t *testing.T) {
	a, b := subnet(t, "10.0.0.0/20", 100), subnet(t, "10.0.16.0/20", 0)
	a.Zone, a.ENIs, b.Zone = "z1", 40, "z2"
	// Four ENIs a node would be too many; two, with 15 pods: 100 in each zone.
	r := Request{Nodes: 100, Pods: 1500, Floor: 1, Limits: limits(t, "m5.large"), Subnets: []Subnet{a, b}, ENIQuota: 139}
	f := r.Fit()
	if f.Fits || len(f.Problems) != 1 || !strings.Contains(f.Problems[0], "z1 would have 140 network interfaces, and the account's quota is 139 a zone") ||
		!strings.Contains(strings.Join(f.Remedies, "\n"), "a higher quota of network interfaces, asked of AWS: 140 a zone") {
		t.Errorf("%v: %q, %q", f.Fits, f.Problems, f.Remedies)
	}
	if r.ENIQuota = 140; !r.Fit().Fits {
		t.Errorf("%q", r.Fit().Problems)
	}
	if r.ENIQuota = 0; r.Fit().Zones[1] != (ZoneFit{"z2", 0, 100, 150, ENIQuota}) {
		t.Errorf("%+v", r.Fit().Zones)
	}
}

func TestFit(t *testing.T) {
	two := func(t *testing.T) []Subnet { return []Subnet{subnet(t, "10.0.0.0/24", 0), subnet(t, "10.0.1.0/24", 0)} }
	for _, c := range []struct {
		name          string
		r             Request
		underlay, aws int // addresses
		left          []int
		gaps          []int
		fits, awsFits bool
		remedy        string
	}{
		// 15 pods a node: 2 ENIs, 16 addresses: 18 × 20. The other: 30 × 20.
		{"a fit", Request{Nodes: 20, Pods: 300, Subnets: two(t)}, 360, 600, []int{71, 71}, []int{0, 0}, true, false, ""},
		// 25 a node: 3 ENIs, 26: 29 × 10 of 251. 422 pods: two odd ones, one in
		// each subnet: 9 × 25 (21 pods: 3 ENIs, 22) + 26 = 251.
		{"too many pods", Request{Nodes: 20, Pods: 500, Subnets: two(t)}, 580, 600, []int{-39, -39}, []int{0, 0}, false, false, "fewer pods: 422 at most"},
		{"another subnet", Request{Nodes: 20, Pods: 500, Subnets: two(t)}, 580, 600, []int{-39, -39}, []int{0, 0}, false, false, "one more subnet, a /24"},
		// 50 on a node that takes 27: 19 nodes.
		{"too few nodes", Request{Nodes: 10, Pods: 500, Subnets: []Subnet{subnet(t, "10.0.0.0/20", 0)}}, 300, 300, []int{3791}, []int{0}, false, false, "more nodes: 19, with up to 27"},
		// Three nodes in two subnets: two in the first; 7 pods: 3, 2, 2. They
		// hold 5 and 4 (nodes 0 and 2), and 4.
		{"uneven", Request{Nodes: 3, Pods: 7, Subnets: two(t)}, 13, 60, []int{242, 247}, []int{0, 0}, true, true, ""},
		{"reserve", Request{Nodes: 3, Pods: 7, Reserve: 243, Subnets: two(t)}, 13, 60, []int{-1, 4}, []int{0, 0}, false, false, ""},
		// A /26 has two whole /28s and 27 other addresses. Two nodes of 15 pods
		// take one each; the other wants four in all.
		{"prefixes", Request{Nodes: 2, Pods: 30, Prefixes: true, Subnets: []Subnet{subnet(t, "10.0.0.0/26", 0)}}, 34, 66, []int{25}, []int{0}, true, false, ""},
		// Three nodes: 51 of 59 addresses, but only two whole /28s. As single
		// addresses 18 each (16 beside two primaries): 54.
		{"fragments", Request{Nodes: 3, Pods: 45, Prefixes: true, Subnets: []Subnet{subnet(t, "10.0.0.0/26", 0)}}, 51, 99, []int{8}, []int{1}, false, false, "leave out --prefixes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.r.Limits, c.r.Floor = limits(t, "m5.large"), 1
			if err := c.r.Check(); err != nil {
				t.Fatal(err)
			}
			f := c.r.Fit()
			if f.Underlay.Addresses != c.underlay || f.AWS.Addresses != c.aws || f.Fits != c.fits || f.AWSFits != c.awsFits {
				t.Errorf("Underlay %d (%v), AWS VPC CNI %d (%v); want %d (%v), %d (%v)", f.Underlay.Addresses, f.Fits, f.AWS.Addresses, f.AWSFits, c.underlay, c.fits, c.aws, c.awsFits)
			}
			for i, s := range f.Subnets {
				if s.Underlay.Left != c.left[i] || s.Underlay.BlocksGap != c.gaps[i] {
					t.Errorf("%s: %d left, %d /28s lacking; want %d, %d", s.Subnet.Name, s.Underlay.Left, s.Underlay.BlocksGap, c.left[i], c.gaps[i])
				}
			}
			if all := strings.Join(f.Remedies, "\n"); !strings.Contains(all, c.remedy) || f.Fits != (len(f.Problems) == 0) {
				t.Errorf("problems %q; %q is not among the remedies:\n%s", f.Problems, c.remedy, all)
			}
		})
	}
}

func TestRequestsThatCannotBe(t *testing.T) {
	good := Request{Nodes: 1, Pods: 1, Limits: limits(t, "m5.large"), Subnets: []Subnet{subnet(t, "10.0.0.0/24", 0)}}
	if err := good.Check(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Request){
		"no nodes":   func(r *Request) { r.Nodes = 0 },
		"no subnets": func(r *Request) { r.Subnets = nil },
		"negative":   func(r *Request) { r.Pods = -1 },
		"overlap":    func(r *Request) { r.Subnets = append(r.Subnets, subnet(t, "10.0.0.128/25", 0)) },
		"xen":        func(r *Request) { r.Limits, r.Prefixes = limits(t, "t2.medium"), true },
	} {
		r := good
		change(&r)
		if r.Check() == nil {
			t.Errorf("%s: taken", name)
		}
	}
}
