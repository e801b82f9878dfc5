package plan

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// Request asks whether nodes and pods find room in subnets.
type Request struct {
	Nodes    int
	Pods     int // with an address of their own, spread evenly over the nodes
	Limits   vpc.InstanceLimits
	Subnets  []Subnet // nodes are spread evenly over them
	Prefixes bool
	Floor    int // Underlay: free addresses that each node keeps ready
	Reserve  int // addresses of each subnet that stay free for others
	MaxPods  int // what the kubelet is told; 0: as EKS tells it
	ENIQuota int // network interfaces that the account may have in a zone; 0: ENIQuota
}

// ENIQuota is how many network interfaces an account may have in a zone to
// begin with: its quota is of the Region, and each zone has it for itself
// (Amazon VPC quotas, 2026).
const ENIQuota = 5000

// ZoneFit is how many network interfaces a zone would have.
type ZoneFit struct {
	Zone     string `json:"zone"` // of a subnet whose zone is not known: its name
	Have     int    `json:"have"` // in the subnets that are named
	Underlay int    `json:"underlay"`
	AWS      int    `json:"awsVPCCNI"`
	Quota    int    `json:"quota"`
}

// SubnetFit is one subnet's part.
type SubnetFit struct {
	Subnet   Subnet `json:"subnet"`
	Free     int    `json:"free"` // before
	Nodes    int    `json:"nodes"`
	Pods     int    `json:"pods"`
	Underlay Share  `json:"underlay"`
	AWS      Share  `json:"awsVPCCNI"`
}

// Fit is the answer.
type Fit struct {
	Type        string      `json:"type"`
	Nodes       int         `json:"nodes"`
	Pods        int         `json:"pods"`
	Prefixes    bool        `json:"prefixes"`
	Floor       int         `json:"floor"`
	Reserve     int         `json:"reserve"`
	MaxPods     int         `json:"maxPods"`     // of a node, those in its own network included
	PodsPerNode int         `json:"podsPerNode"` // on the fullest
	MostPerNode int         `json:"mostPodsPerNode"`
	Node        Holding     `json:"underlayNode"` // the fullest
	AWSNode     Holding     `json:"awsVPCCNINode"`
	Subnets     []SubnetFit `json:"subnets"`
	Zones       []ZoneFit   `json:"zones"`
	Underlay    Share       `json:"underlay"` // over all subnets
	AWS         Share       `json:"awsVPCCNI"`
	Fits        bool        `json:"fits"` // under Underlay
	AWSFits     bool        `json:"awsVPCCNIFits"`
	Problems    []string    `json:"problems,omitempty"`
	Remedies    []string    `json:"remedies,omitempty"` // each by itself would make it fit
}

// bounds of a request: beyond them nobody's cluster is meant.
const (
	mostNodes = 100_000
	mostPods  = 10_000_000
)

// Check reports why the request cannot be answered.
func (r Request) Check() error {
	switch {
	case r.Nodes < 1 || r.Nodes > mostNodes:
		return fmt.Errorf("%d nodes are no cluster; use --nodes 1 to %d", r.Nodes, mostNodes)
	case r.Pods < 0 || r.Pods > mostPods:
		return fmt.Errorf("%d pods cannot be planned; use --pods 0 to %d", r.Pods, mostPods)
	case r.Floor < 0 || r.Reserve < 0 || r.MaxPods < 0 || r.ENIQuota < 0:
		return errors.New("--floor, --reserve, --max-pods and --eni-quota cannot be negative; leave out what is not meant")
	case len(r.Subnets) == 0:
		return errors.New("no subnet to fit anything in; name at least one with --subnet 10.0.0.0/20")
	}
	for i, s := range r.Subnets {
		for _, o := range r.Subnets[:i] {
			if s.CIDR.Overlaps(o.CIDR) && (s.Name == s.CIDR.String() || o.Name == s.Name) {
				return fmt.Errorf("subnets %s and %s overlap; subnets of a VPC do not", o.CIDR, s.CIDR)
			}
		}
	}
	_, err := PodsOf(r.Limits, r.Prefixes)
	return err
}

// Fit answers the request, which Check has let through.
func (r Request) Fit() Fit {
	f := r.count()
	if f.Fits {
		return f
	}
	if f.PodsPerNode > f.MostPerNode {
		f.Problems = append(f.Problems, fmt.Sprintf("a node takes %d pods with an address of their own, and %d would be on one", f.MostPerNode, f.PodsPerNode))
	}
	for _, s := range f.Subnets {
		switch u := s.Underlay; {
		case u.Left < 0:
			f.Problems = append(f.Problems, fmt.Sprintf("%s lacks %d addresses", s.Subnet.Name, -u.Left))
		case u.BlocksGap > 0:
			f.Problems = append(f.Problems, fmt.Sprintf("%s lacks %d aligned free /28s, though addresses are left; nodes would take single addresses for these", s.Subnet.Name, u.BlocksGap))
		}
	}
	for _, z := range f.Zones {
		if n := z.Have + z.Underlay; n > z.Quota {
			f.Problems = append(f.Problems, fmt.Sprintf("%s would have %d network interfaces, and the account's quota is %d a zone", z.Zone, n, z.Quota))
		}
	}
	f.Remedies = r.remedies(f)
	return f
}

// count works out who holds what.
func (r Request) count() Fit {
	p, _ := PodsOf(r.Limits, r.Prefixes) // Check has seen its error
	f := Fit{Type: r.Limits.Type, Nodes: r.Nodes, Pods: r.Pods, Prefixes: r.Prefixes, Floor: r.Floor, Reserve: r.Reserve, MaxPods: r.MaxPods}
	if f.MaxPods == 0 {
		f.MaxPods = p.EKS
	}
	f.PodsPerNode = ceil(r.Pods, r.Nodes)
	f.MostPerNode = max(0, min(f.MaxPods-hostPods, p.Underlay))
	f.Node = Underlay(r.Limits, f.PodsPerNode, r.Floor, r.Prefixes)
	f.AWSNode = AWSDefault(r.Limits, f.PodsPerNode, f.MaxPods, r.Prefixes)

	// Only two kinds of nodes differ: with and without the odd pod.
	base, odd := r.Pods/r.Nodes, r.Pods%r.Nodes
	full, lean := [2]Holding{f.Node, f.AWSNode}, [2]Holding{Underlay(r.Limits, base, r.Floor, r.Prefixes), AWSDefault(r.Limits, base, f.MaxPods, r.Prefixes)}
	var sum [2]Share
	f.Fits, f.AWSFits = f.PodsPerNode <= f.MostPerNode, f.PodsPerNode <= f.MostPerNode
	for i, s := range r.Subnets {
		// Node j is in subnet j mod len, and has the odd pod if j < odd.
		n, o := share(r.Nodes, len(r.Subnets), i), share(odd, len(r.Subnets), i)
		sf := SubnetFit{Subnet: s, Free: s.Free(), Nodes: n, Pods: n*base + o}
		for k, dst := range []*Share{&sf.Underlay, &sf.AWS} {
			h := Holding{
				ENIs:     o*full[k].ENIs + (n-o)*lean[k].ENIs,
				Singles:  o*full[k].Singles + (n-o)*lean[k].Singles,
				Prefixes: o*full[k].Prefixes + (n-o)*lean[k].Prefixes,
			}
			*dst = s.take(h, r.Reserve)
			sum[k].Holding = sum[k].add(h)
			sum[k].Addresses += dst.Addresses
			sum[k].Left += dst.Left
			sum[k].BlocksGap += dst.BlocksGap
		}
		f.Fits, f.AWSFits = f.Fits && sf.Underlay.Fits, f.AWSFits && sf.AWS.Fits
		f.Subnets = append(f.Subnets, sf)
	}
	f.Zones = r.zones(f.Subnets)
	for _, z := range f.Zones {
		f.Fits, f.AWSFits = f.Fits && z.Have+z.Underlay <= z.Quota, f.AWSFits && z.Have+z.AWS <= z.Quota
	}
	sum[0].Fits, sum[1].Fits = f.Fits, f.AWSFits
	f.Underlay, f.AWS = sum[0], sum[1]
	return f
}

// zones adds up the network interfaces by zone.
func (r Request) zones(subnets []SubnetFit) []ZoneFit {
	var out []ZoneFit
	for _, s := range subnets {
		name := cmp.Or(s.Subnet.Zone, s.Subnet.Name)
		i := slices.IndexFunc(out, func(z ZoneFit) bool { return z.Zone == name })
		if i < 0 {
			i = len(out)
			out = append(out, ZoneFit{Zone: name, Quota: cmp.Or(r.ENIQuota, ENIQuota)})
		}
		z := &out[i]
		z.Have, z.Underlay, z.AWS = z.Have+s.Subnet.ENIs, z.Underlay+s.Underlay.ENIs, z.AWS+s.AWS.ENIs
	}
	return out
}

// share is how many of n things, dealt out in turn to parts, part i gets.
func share(n, parts, i int) int {
	if i >= n {
		return 0
	}
	return (n-i-1)/parts + 1
}
