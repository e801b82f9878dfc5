package plan

import (
	"cmp"
	"fmt"
	"net/netip"
	"sort"
)

// remedies lists changes each of which, by itself, makes the request fit. Each
// was tried before it is named.
func (r Request) remedies(f Fit) []string {
	var out []string
	try := func(q Request, say string, v ...any) bool {
		if q.count().Fits {
			out = append(out, fmt.Sprintf(say, v...))
			return true
		}
		return false
	}
	if r.Prefixes {
		q := r
		q.Prefixes = false
		try(q, "single addresses: leave out --prefixes")
	} else if r.Limits.Nitro() {
		q := r
		q.Prefixes = true
		try(q, "delegated prefixes: --prefixes")
	}
	if f.MostPerNode > 0 && r.Pods > 0 {
		least := ceil(r.Pods, f.MostPerNode)
		q := r
		q.Nodes = least
		if least != r.Nodes && least <= mostNodes {
			word := "more"
			if least < r.Nodes {
				word = "fewer and fuller"
			}
			try(q, "%s nodes: %d, with up to %d pods each", word, least, ceil(r.Pods, least))
		}
	}
	if f.PodsPerNode > f.MostPerNode {
		if p, err := PodsOf(r.Limits, r.Prefixes); err == nil && f.PodsPerNode <= p.Underlay {
			q := r
			q.MaxPods = f.PodsPerNode + hostPods
			try(q, "tell the kubelets more than the %d of now: --max-pods %d; there are addresses for it", f.MaxPods, q.MaxPods)
		}
	}
	need := 0
	for _, z := range f.Zones {
		need = max(need, z.Have+z.Underlay)
	}
	if need > cmp.Or(r.ENIQuota, ENIQuota) {
		q := r
		q.ENIQuota = need
		try(q, "a higher quota of network interfaces, asked of AWS: %d a zone", need)
	}
	if size, ok := r.another(); ok {
		out = append(out, fmt.Sprintf("one more subnet, a /%d or larger, with nodes spread over all", size))
	}
	if size, ok := r.larger(); ok {
		out = append(out, fmt.Sprintf("subnets of a /%d each in place of these, with as much in use", size))
	}
	most := sort.Search(r.Pods+1, func(n int) bool {
		q := r
		q.Pods = n
		return !q.count().Fits
	}) - 1
	if most >= 0 {
		out = append(out, fmt.Sprintf("fewer pods: %d at most on these %d nodes", most, r.Nodes))
	}
	return out
}

// another returns the smallest size of a further, empty subnet that makes the
// request fit.
func (r Request) another() (bits int, ok bool) {
	for bits := smallest; bits >= largest; bits-- {
		s, err := NewSubnet(netip.PrefixFrom(netip.AddrFrom4([4]byte{}), bits), 0)
		if err != nil {
			return 0, false
		}
		q := r
		q.Subnets = append(append([]Subnet(nil), r.Subnets...), s)
		if q.count().Fits {
			return bits, true
		}
	}
	return 0, false
}

// larger returns the smallest common size at which the subnets have room.
func (r Request) larger() (bits int, ok bool) {
	for bits := smallest; bits >= largest; bits-- {
		q := r
		q.Subnets = nil
		for _, s := range r.Subnets {
			big, err := NewSubnet(netip.PrefixFrom(netip.AddrFrom4([4]byte{}), min(bits, s.CIDR.Bits())), s.Used)
			if err != nil {
				break
			}
			big.Name, big.Zone, big.ENIs, big.Kept = s.Name, s.Zone, s.ENIs, s.Kept
			q.Subnets = append(q.Subnets, big)
		}
		if len(q.Subnets) == len(r.Subnets) && q.count().Fits {
			return bits, true
		}
	}
	return 0, false
}
