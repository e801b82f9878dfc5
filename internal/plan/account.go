package plan

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// Machine is an instance of the account.
type Machine struct {
	ID   vpc.InstanceID
	Name string
	Type string
}

// Seen is what was read of an account at one time.
type Seen struct {
	At       time.Time
	Subnets  []vpc.Subnet
	ENIs     []vpc.ENI
	Machines []Machine
	// Pods are the addresses of pods, if PodsKnown: EC2 says what is held, not
	// what is used.
	Pods      []netip.Addr
	PodsKnown bool
	Floor     int // of Underlay
	ENIQuota  int // network interfaces that the account may have in a zone; 0: ENIQuota
}

// Node is a machine that holds addresses for pods.
type Node struct {
	ID       vpc.InstanceID `json:"id"`
	Name     string         `json:"name"`
	Type     string         `json:"type"`
	Held     Holding        `json:"held"`
	Holds    int            `json:"holds"`    // addresses, primaries included
	Used     *int           `json:"used"`     // by pods; null: not known
	Idle     *int           `json:"idle"`     // held for pods and not used
	Underlay *int           `json:"underlay"` // what it would hold for the same pods; null: pods or type not known
}

// SubnetUse is a subnet and where it is going.
type SubnetUse struct {
	ID       vpc.SubnetID `json:"id"`
	VPC      vpc.VPCID    `json:"vpc"`
	CIDR     netip.Prefix `json:"cidr"`
	Zone     string       `json:"zone"`
	Free     int          `json:"free"`
	Size     int          `json:"size"`    // without EC2's own five
	Free28s  int          `json:"free28s"` // aligned, wholly free, and in no CIDR reservation
	Kept28s  int          `json:"kept28s"` // likewise, in reservations for prefixes
	ForNodes int          `json:"forNodes"`
	Trend    *Trend       `json:"trend"` // null: no earlier snapshot has it
}

// ZoneUse is how many network interfaces a zone has, in the subnets that were
// read, of those that the account may have there.
type ZoneUse struct {
	Zone  string `json:"zone"`
	ENIs  int    `json:"enis"`
	Quota int    `json:"quota"`
}

// Near reports whether the quota may soon bind.
func (z ZoneUse) Near() bool { return z.ENIs*5 >= z.Quota*4 }

// Account is what the addresses of an account are held for.
type Account struct {
	At      time.Time   `json:"at"`
	Subnets []SubnetUse `json:"subnets"`
	Zones   []ZoneUse   `json:"zones"`
	Nodes   []Node      `json:"nodes"`
	// Others are machines that hold primary addresses alone: no CNI gives
	// pods addresses there.
	Others int `json:"otherMachines"`
	// Stray are addresses of pods that no interface of a node holds, and
	// HostPods those of pods in a node's own network.
	Stray    []netip.Addr `json:"strayPods"`
	HostPods int          `json:"hostPods"`
}

// Snapshot is what is kept of an account to tell a trend later.
type Snapshot struct {
	Version int                  `json:"version"` // 1
	At      time.Time            `json:"at"`
	Free    map[vpc.SubnetID]int `json:"free"`
}

// Look works out what is held for what, and with earlier snapshots, in any
// order, where it is going.
func Look(s Seen, since []Snapshot) (Account, error) {
	a := Account{At: s.At, Subnets: []SubnetUse{}, Zones: []ZoneUse{}, Nodes: []Node{}, Stray: []netip.Addr{}}
	for _, e := range since {
		if e.Version != 1 || e.At.IsZero() {
			return a, errors.New("that is no snapshot of an account; make one with --save")
		}
		if !e.At.Before(s.At) {
			return a, fmt.Errorf("the snapshot of %s is not older than now; use one made before", e.At.Format(time.RFC3339))
		}
	}
	byMachine := map[vpc.InstanceID][]vpc.ENI{}
	bySubnet := map[vpc.SubnetID][]vpc.ENI{}
	for _, e := range s.ENIs {
		bySubnet[e.Subnet] = append(bySubnet[e.Subnet], e)
		if e.Instance != "" {
			byMachine[e.Instance] = append(byMachine[e.Instance], e)
		}
	}
	nodes := map[vpc.InstanceID]bool{}
	left := map[netip.Addr]bool{}
	for _, p := range s.Pods {
		left[p] = true
	}
	for _, m := range s.Machines {
		n := Node{ID: m.ID, Name: m.Name, Type: m.Type}
		used := 0
		for _, e := range byMachine[m.ID] {
			n.Held = n.Held.add(Holding{1, len(e.Secondary), len(e.Prefixes)})
			for p := range left {
				if !e.Holds(p) {
					continue
				}
				if p == e.Primary {
					a.HostPods++
				} else {
					used++
				}
				delete(left, p)
			}
		}
		if n.Held.Singles == 0 && n.Held.Prefixes == 0 {
			a.Others++
			continue
		}
		nodes[m.ID] = true
		n.Holds = n.Held.Addresses()
		if s.PodsKnown {
			idle := n.Holds - n.Held.ENIs - used
			n.Used, n.Idle = &used, &idle
			if l, ok := vpc.LimitsOf(m.Type); ok {
				would := Underlay(l, used, s.Floor, n.Held.Prefixes > 0 && l.Nitro()).Addresses()
				n.Underlay = &would
			}
		}
		a.Nodes = append(a.Nodes, n)
	}
	for p := range left {
		a.Stray = append(a.Stray, p)
	}
	slices.SortFunc(a.Stray, netip.Addr.Compare)
	slices.SortFunc(a.Nodes, func(x, y Node) int { return cmp.Or(cmp.Compare(x.Name, y.Name), cmp.Compare(x.ID, y.ID)) })

	zones := map[string]int{}
	for _, v := range s.Subnets {
		sub := FromEC2(v, bySubnet[v.ID])
		u := SubnetUse{ID: v.ID, VPC: v.VPC, CIDR: v.CIDR, Zone: v.AvailabilityZone, Free: v.Available, Size: sub.size(), Free28s: sub.Blocks, Kept28s: sub.Kept}
		zones[v.AvailabilityZone] += sub.ENIs
		for _, e := range bySubnet[v.ID] {
			if nodes[e.Instance] {
				u.ForNodes += 1 + len(e.Secondary) + ipam.PrefixAddresses*len(e.Prefixes)
			}
		}
		points := []Point{{s.At, v.Available}}
		for _, e := range since {
			if free, ok := e.Free[v.ID]; ok {
				points = append(points, Point{e.At, free})
			}
		}
		u.Trend = TrendOf(points)
		a.Subnets = append(a.Subnets, u)
	}
	for _, z := range slices.Sorted(maps.Keys(zones)) {
		a.Zones = append(a.Zones, ZoneUse{z, zones[z], cmp.Or(s.ENIQuota, ENIQuota)})
	}
	slices.SortFunc(a.Subnets, func(x, y SubnetUse) int {
		return cmp.Or(cmp.Compare(x.VPC, y.VPC), x.CIDR.Addr().Compare(y.CIDR.Addr()))
	})
	return a, nil
}

// FromEC2 returns a subnet as EC2 describes it, with its whole free /28s as its
// interfaces leave them.
func FromEC2(v vpc.Subnet, enis []vpc.ENI) Subnet {
	s := Subnet{Name: string(v.ID), CIDR: v.CIDR, Zone: v.AvailabilityZone}
	s.Used = s.size() - v.Available
	var addrs []netip.Addr
	var prefixes []netip.Prefix
	for _, e := range enis {
		addrs = append(append(addrs, e.Primary), e.Secondary...)
		prefixes = append(prefixes, e.Prefixes...)
	}
	s.FreeBlocks(addrs, prefixes, v.Reservations)
	s.ENIs = len(enis)
	return s
}

// Snapshot returns what a later look needs.
func (a Account) Snapshot() Snapshot {
	s := Snapshot{Version: 1, At: a.At, Free: map[vpc.SubnetID]int{}}
	for _, u := range a.Subnets {
		s.Free[u.ID] = u.Free
	}
	return s
}

// Point is how many addresses were free at a time.
type Point struct {
	At   time.Time
	Free int
}

// Trend is a straight line through some points.
type Trend struct {
	PerDay   float64  `json:"perDay"`   // addresses taken a day; negative: given back
	Days     *float64 `json:"days"`     // until none is free; null: never at this rate
	OverDays float64  `json:"overDays"` // the time between the first and the last point
	Points   int      `json:"points"`
}

// TrendOf lays a straight line through the points (least squares) and follows
// it from the latest on. It returns nil when fewer than two times are known.
func TrendOf(points []Point) *Trend {
	points = slices.Clone(points)
	slices.SortFunc(points, func(a, b Point) int { return a.At.Compare(b.At) })
	if len(points) < 2 || !points[0].At.Before(points[len(points)-1].At) {
		return nil
	}
	first, last := points[0], points[len(points)-1]
	var n, sx, sy, sxx, sxy float64
	for _, p := range points {
		x, y := p.At.Sub(first.At).Hours()/24, float64(p.Free)
		n, sx, sy, sxx, sxy = n+1, sx+x, sy+y, sxx+x*x, sxy+x*y
	}
	t := &Trend{OverDays: last.At.Sub(first.At).Hours() / 24, Points: len(points)}
	// Not a negative zero where nothing changed.
	if slope := (n*sxy - sx*sy) / (n*sxx - sx*sx); slope != 0 {
		t.PerDay = -slope
	}
	if t.PerDay > 0 {
		days := float64(last.Free) / t.PerDay
		t.Days = &days
	}
	return t
}
