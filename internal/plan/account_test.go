package plan

import (
	"fmt"
	"math"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/vpc"
)

var day0 = time.Date(2026, 3, 2, 9, 0, 0, 0, time.UTC)

func TestTrend(t *testing.T) {
	at := func(days float64, free int) Point {
		return Point{day0.Add(time.Duration(days * 24 * float64(time.Hour))), free}
	}
	for name, c := range map[string]struct {
		points  []Point
		perDay  float64
		days    float64 // −1: never
		overDay float64
	}{
		"two":           {[]Point{at(0, 200), at(2, 180)}, 10, 18, 2},
		"in any order":  {[]Point{at(2, 180), at(0, 200)}, 10, 18, 2},
		"given back":    {[]Point{at(0, 100), at(1, 130)}, -30, -1, 1},
		"unchanged":     {[]Point{at(0, 100), at(1, 100)}, 0, -1, 1},
		"full already":  {[]Point{at(0, 50), at(1, 0)}, 50, 0, 1},
		"least squares": {[]Point{at(0, 100), at(1, 70), at(2, 80)}, 10, 8, 2}, // mean 83⅓: slope (0−100·1+…)/2 = (80−100)/2
	} {
		got := TrendOf(c.points)
		if got == nil || math.Abs(got.PerDay-c.perDay) > 1e-9 || got.OverDays != c.overDay || got.Points != len(c.points) {
			t.Errorf("%s: %+v", name, got)
			continue
		}
		if (got.Days == nil) != (c.days < 0) || got.Days != nil && math.Abs(*got.Days-c.days) > 1e-9 {
			t.Errorf("%s: full in %v days, want %v", name, got.Days, c.days)
		}
	}
	for name, points := range map[string][]Point{"none": nil, "one": {at(0, 5)}, "one time": {at(0, 5), at(0, 4)}} {
		if got := TrendOf(points); got != nil {
			t.Errorf("%s: a trend of %+v", name, got)
		}
	}
}

// An m5.large of the AWS VPC CNI with three pods: two full ENIs, so 20
// addresses of which 18 are for pods. Underlay would hold 1 + 3 + 1. Beside it
// a node with prefixes, and a machine without secondary addresses.
func TestLook(t *testing.T) {
	addr := netip.MustParseAddr
	var first, second []netip.Addr
	for i := range 9 {
		first = append(first, addr(fmt.Sprintf("10.0.0.%d", 11+i)))
		second = append(second, addr(fmt.Sprintf("10.0.0.%d", 21+i)))
	}
	s := Seen{
		At: day0, Floor: 1, PodsKnown: true,
		Subnets: []vpc.Subnet{{ID: "subnet-b", VPC: "vpc-1", CIDR: netip.MustParsePrefix("10.0.1.0/24"), Available: 249},
			{ID: "subnet-a", VPC: "vpc-1", CIDR: netip.MustParsePrefix("10.0.0.0/24"), Available: 251 - 20 - 33 - 1}},
		ENIs: []vpc.ENI{
			{ID: "eni-1", Subnet: "subnet-a", Instance: "i-1", Primary: addr("10.0.0.10"), Secondary: first},
			{ID: "eni-2", Subnet: "subnet-a", Instance: "i-1", Primary: addr("10.0.0.20"), Secondary: second},
			{ID: "eni-3", Subnet: "subnet-a", Instance: "i-2", Primary: addr("10.0.0.5"), Prefixes: []netip.Prefix{netip.MustParsePrefix("10.0.0.64/28"), netip.MustParsePrefix("10.0.0.96/28")}},
			{ID: "eni-4", Subnet: "subnet-a", Instance: "i-3", Primary: addr("10.0.0.200")},
			{ID: "eni-5", Subnet: "subnet-b", Primary: addr("10.0.1.9")}, // detached
			{ID: "eni-6", Subnet: "subnet-b", Instance: "i-4", Primary: addr("10.0.1.10")},
		},
		Machines: []Machine{{"i-2", "b", "m5.large"}, {"i-1", "a", "m5.large"}, {"i-3", "db", "m5.large"}, {"i-4", "", "m5.large"}},
		Pods: []netip.Addr{addr("10.0.0.11"), addr("10.0.0.12"), addr("10.0.0.29"), addr("10.0.0.29"), // named twice: one
			addr("10.0.0.70"), addr("10.0.0.5"), addr("192.168.0.1")},
	}
	a, err := Look(s, []Snapshot{{Version: 1, At: day0.AddDate(0, 0, -1), Free: map[vpc.SubnetID]int{"subnet-a": 217}}})
	if err != nil {
		t.Fatal(err)
	}
	n := func(v int) *int { return &v }
	want := []Node{
		{"i-1", "a", "m5.large", Holding{2, 18, 0}, 20, n(3), n(15), n(5)},
		{"i-2", "b", "m5.large", Holding{1, 0, 2}, 33, n(1), n(31), n(17)},
	}
	if d := cmp.Diff(want, a.Nodes); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if a.Others != 2 || a.HostPods != 1 || len(a.Stray) != 1 || a.Stray[0] != addr("192.168.0.1") {
		t.Errorf("%d other machines, %d pods in a node's network, stray %v", a.Others, a.HostPods, a.Stray)
	}
	// /28s taken in subnet-a: .0 (EC2, .5, .10–.15), .16 (.16–.29), .64, .96,
	// .192 and .240 (EC2): 10 of 16. In subnet-b .0 and .240.
	u := a.Subnets[0]
	if u.ID != "subnet-a" || u.Size != 251 || u.ForNodes != 53 || u.Free28s != 10 || u.Trend == nil || u.Trend.PerDay != 20 || *u.Trend.Days != 197.0/20 {
		t.Errorf("%+v, trend %+v", u, u.Trend)
	}
	if u := a.Subnets[1]; u.Free28s != 14 || u.ForNodes != 0 || u.Trend != nil {
		t.Errorf("%+v", u)
	}

	s.PodsKnown, s.Pods = false, nil
	if a, err = Look(s, nil); err != nil || a.Nodes[0].Used != nil || a.Nodes[0].Idle != nil || a.Nodes[0].Underlay != nil {
		t.Errorf("%v: what pods use is not known: %+v", err, a.Nodes[0])
	}
	for name, bad := range map[string]Snapshot{"of later": {Version: 1, At: day0.Add(time.Hour)}, "of nothing": {}, "of now": a.Snapshot()} {
		if _, err := Look(s, []Snapshot{bad}); err == nil {
			t.Errorf("a snapshot %s was taken", name)
		}
	}
}
