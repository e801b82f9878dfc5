package vpc

import (
	"cmp"
	_ "embed"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// InstanceLimits is what one instance type may hold. Source of the numbers:
// the public DescribeInstanceTypes data, merged with the limits that AWS's own
// controllers publish (instance_limits.csv, last column).
type InstanceLimits struct {
	Type              string // "m5.large"
	ENIs              int    // over all network cards
	ENIsDefaultCard   int    // on network card 0
	NetworkCards      int
	IPv4PerENI        int // primary included; a delegated /28 counts one
	IPv6PerENI        int
	TrunkCompatible   bool
	BranchENIs        int
	Hypervisor        string // "nitro", "xen" or ""
	BareMetal         bool
	TCPEstablished    int // default idle timeout of an established flow, seconds
	CurrentGeneration bool
	VCPUs             int
}

// Nitro reports whether the type can hold delegated prefixes.
func (l InstanceLimits) Nitro() bool { return l.Hypervisor == "nitro" || l.BareMetal }

// PodENIs returns how many ENIs can carry pods: those of network card 0.
func (l InstanceLimits) PodENIs() int { return cmp.Or(l.ENIsDefaultCard, l.ENIs) }

// hostPods are the pods in the node's own network that MaxPods counts: on EKS,
// kube-proxy and the network's agent.
const hostPods = 2

// MaxPods returns the well-known figure of pods that the type takes, with per
// addresses in each slot of an ENI: 1, or 16 with prefixes.
func (l InstanceLimits) MaxPods(per int) int { return l.PodENIs()*(l.IPv4PerENI-1)*per + hostPods }

//go:embed instance_limits.csv
var limitsCSV string

var limits = sync.OnceValue(func() map[string]InstanceLimits {
	m, err := parseLimits(limitsCSV)
	if err != nil {
		panic(err) // the embedded table is fixed at build time and tested
	}
	return m
})

// LimitsOf returns the limits of an instance type, and whether it is known.
func LimitsOf(instanceType string) (InstanceLimits, bool) {
	l, ok := limits()[instanceType]
	return l, ok
}

// InstanceTypes returns all known instance types, sorted.
func InstanceTypes() []string { return slices.Sorted(maps.Keys(limits())) }

func parseLimits(csv string) (map[string]InstanceLimits, error) {
	lines := strings.Split(strings.TrimSpace(csv), "\n")
	out := make(map[string]InstanceLimits, len(lines))
	for i, line := range lines[1:] { // the first line names the columns
		f := strings.Split(strings.TrimSpace(line), ",")
		if len(f) != 14 {
			return nil, fmt.Errorf("instance limits line %d: %d columns, want 14", i+2, len(f))
		}
		l := InstanceLimits{
			Type:              f[0],
			Hypervisor:        f[8],
			TrunkCompatible:   strings.EqualFold(f[6], "true"),
			BareMetal:         strings.EqualFold(f[9], "true"),
			CurrentGeneration: strings.EqualFold(f[11], "true"),
		}
		for _, n := range []struct {
			col int
			dst *int
		}{{1, &l.ENIs}, {2, &l.ENIsDefaultCard}, {3, &l.NetworkCards}, {4, &l.IPv4PerENI}, {5, &l.IPv6PerENI}, {7, &l.BranchENIs}, {10, &l.TCPEstablished}, {12, &l.VCPUs}} {
			if f[n.col] == "" {
				continue // unknown in every source
			}
			v, err := strconv.Atoi(f[n.col])
			if err != nil {
				return nil, fmt.Errorf("instance limits line %d column %d: %w", i+2, n.col+1, err)
			}
			*n.dst = v
		}
		out[l.Type] = l
	}
	return out, nil
}
