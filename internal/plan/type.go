package plan

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

const (
	// hostPods is the +2 of the well-known formula: the CNI's own pod and
	// kube-proxy live in the node's network and need no address.
	hostPods = 2

	// EKS tells a kubelet no more than this, whatever the addresses would
	// allow: 110 below 30 vCPUs, as Kubernetes' own scalability targets have
	// it, 250 from there on (Amazon EKS user guide, "Choose an optimal EC2 node
	// instance type"; its max-pods calculator, read in 2025).
	smallCap, largeCap = 110, 250
	largeVCPUs         = 30
)

// Pods says how many pods an instance type takes.
type Pods struct {
	Type         string   `json:"type"`
	ENIs         int      `json:"enis"`         // that can carry pods' addresses: those of network card 0
	ENIsTotal    int      `json:"enisTotal"`    // over all network cards
	NetworkCards int      `json:"networkCards"` // 0: not known
	IPv4PerENI   int      `json:"ipv4PerENI"`   // the primary included
	VCPUs        int      `json:"vcpus"`        // 0: not known
	Prefixes     bool     `json:"prefixes"`     // counted with delegated /28s
	Formula      int      `json:"formula"`      // ENIs × (addresses − 1) [× 16] + 2
	EKSCaps      []int    `json:"eksCaps"`      // what EKS caps it at; both caps when the vCPUs are not known
	EKS          int      `json:"eks"`          // the smaller of the formula and the (lower) cap
	Underlay     int      `json:"underlay"`     // pods with an address of their own at most
	Why          []string `json:"why"`
}

// PodsOf returns how many pods a type takes, with a reason for each figure. It
// refuses prefixes on a type that cannot hold them.
func PodsOf(l vpc.InstanceLimits, prefixes bool) (Pods, error) {
	if prefixes && !l.Nitro() {
		return Pods{}, fmt.Errorf("%s takes no delegated prefixes: they need a Nitro type; leave out --prefixes or choose one such as m5.large", l.Type)
	}
	card := l.PodENIs()
	// What the allocator would take is asked of the allocator.
	most := (&ipam.Config{Limits: l}).ENIs()
	p := Pods{Type: l.Type, ENIs: card, ENIsTotal: cmp.Or(l.ENIs, card), NetworkCards: l.NetworkCards, IPv4PerENI: l.IPv4PerENI, VCPUs: l.VCPUs, Prefixes: prefixes}
	per, times := 1, ""
	if prefixes {
		per, times = ipam.PrefixAddresses, fmt.Sprintf(" × %d", ipam.PrefixAddresses)
	}
	p.Formula = l.MaxPods(per)
	p.Underlay = most * (l.IPv4PerENI - 1) * per
	switch {
	case l.VCPUs == 0:
		p.EKSCaps = []int{smallCap, largeCap}
	case l.VCPUs < largeVCPUs:
		p.EKSCaps = []int{smallCap}
	default:
		p.EKSCaps = []int{largeCap}
	}
	p.EKS = min(p.Formula, p.EKSCaps[0])

	why := func(f string, v ...any) { p.Why = append(p.Why, fmt.Sprintf(f, v...)) }
	why("formula: %d ENIs × (%d − 1)%s + %d; each ENI's primary address is no pod's, and %d pods live in the node's own network", card, l.IPv4PerENI, times, hostPods, hostPods)
	if l.ENIs > card {
		why("network cards: %d of its %d ENIs are on card 0; those of further cards carry no pods", card, l.ENIs)
	}
	switch {
	case l.VCPUs == 0:
		why("EKS: its vCPUs are not in the table, so the cap is %d (below %d vCPUs) or %d; the lower one is used", smallCap, largeVCPUs, largeCap)
	case p.Formula > p.EKSCaps[0]:
		why("EKS: a kubelet is told %d at most on %d vCPUs (%d below %d vCPUs, else %d), and the addresses would allow more", p.EKSCaps[0], l.VCPUs, smallCap, largeVCPUs, largeCap)
	default:
		why("EKS: below its cap of %d for %d vCPUs, so the addresses decide", p.EKSCaps[0], l.VCPUs)
	}
	if most < card {
		why("Underlay: device indices 0 to %d, so %d of %d ENIs", most-1, most, card)
	}
	why("Underlay: %d ENIs × (%d − 1)%s addresses, each for a pod; pods in the node's own network come on top", most, l.IPv4PerENI, times)
	return p, nil
}

// Near returns up to n known types that a wrong name may have meant, the
// nearest first.
func Near(name string, n int) []string {
	name = strings.ToLower(strings.TrimSpace(name))
	type match struct {
		name string
		far  int
	}
	var all []match
	for _, t := range vpc.InstanceTypes() {
		all = append(all, match{t, distance(name, t)})
	}
	slices.SortStableFunc(all, func(a, b match) int { return a.far - b.far })
	var out []string
	for _, m := range all {
		if len(out) == n || m.far > max(2, len(name)/2) {
			break
		}
		out = append(out, m.name)
	}
	return out
}

// distance is Levenshtein's: insertions, deletions and replacements.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			next := diagonal
			if a[i] != b[j] {
				next++
			}
			diagonal = row[j+1]
			row[j+1] = min(next, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
