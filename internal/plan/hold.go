package plan

import (
	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// Holding is what takes addresses of a subnet.
type Holding struct {
	ENIs     int `json:"enis"`     // each with a primary address
	Singles  int `json:"singles"`  // secondary addresses
	Prefixes int `json:"prefixes"` // delegated /28s
}

// Addresses returns how many addresses of the subnet it takes.
func (h Holding) Addresses() int { return h.ENIs + h.Singles + h.Prefixes*ipam.PrefixAddresses }

func (h Holding) add(o Holding) Holding {
	return Holding{h.ENIs + o.ENIs, h.Singles + o.Singles, h.Prefixes + o.Prefixes}
}

// Underlay returns what a node with this many pods holds once it has settled:
// an address for each, the free ones of floor, and an ENI more only where the
// others are full.
func Underlay(l vpc.InstanceLimits, pods, floor int, prefixes bool) Holding {
	enis := (&ipam.Config{Limits: l}).ENIs()
	slots := l.IPv4PerENI - 1
	if prefixes {
		q := min(ceil(pods+floor, ipam.PrefixAddresses), enis*slots)
		return Holding{ENIs: max(1, ceil(q, slots)), Prefixes: q}
	}
	n := min(pods+floor, enis*slots)
	return Holding{ENIs: max(1, ceil(n, slots)), Singles: n}
}

// AWSDefault returns what a node with this many pods holds under the AWS VPC
// CNI (v1.23) as it is installed: WARM_ENI_TARGET=1, so that it keeps as many
// free addresses as one ENI has, in whole ENIs; with prefixes, the chart's
// WARM_PREFIX_TARGET=1, one /28 that is wholly free. Either way it grows no
// further once it holds maxPods addresses. With prefixes this is its best case:
// it packs pods in no order, and scattered ones keep more prefixes in use.
func AWSDefault(l vpc.InstanceLimits, pods, maxPods int, prefixes bool) Holding {
	enis := l.PodENIs()
	slots := l.IPv4PerENI - 1
	if prefixes {
		const per = ipam.PrefixAddresses
		q := min(ceil(pods, per)+1, ceil(maxPods, per), enis*slots)
		return Holding{ENIs: max(1, ceil(q, slots)), Prefixes: q}
	}
	k := max(1, min(ceil(pods, slots)+1, ceil(maxPods, slots), enis))
	return Holding{ENIs: k, Singles: k * slots}
}

// ceil returns n/d, rounded up.
func ceil(n, d int) int { return (n + d - 1) / d }
