package sim

import (
	"time"
)

// Minimum is the shortest time in which the pods could be served: the calls
// that change something, as few as EC2's limits allow, at the rate at
// which the account's buckets give tokens, and after the last of them the
// latencies of EC2 at their shortest. Whoever makes the calls knows everything
// and is never refused.
type Minimum struct {
	Seconds seconds     `json:"seconds"`
	Binds   string      `json:"binds"` // the action whose bucket decides; "" if latencies or arrivals do
	Calls   []CallCount `json:"calls"`
}

// minimum returns the bound for scenarios that start without pods, nil for the
// others.
func (c *Config) minimum() *Minimum {
	have := 0 // free addresses per node at the start
	switch c.Scenario {
	case Rollout, Exhaustion:
	case Burst:
		have = (c.Floor + c.perSlot() - 1) / c.perSlot() * c.perSlot()
	default:
		return nil
	}
	size, err := bucketSizes()
	if err != nil {
		return nil
	}
	// A node needs enis further interfaces, which come with their addresses,
	// and one Assign for its own if those do not suffice.
	per := (c.limits.IPv4PerENI - 1) * c.perSlot()
	enis := max(0, (c.PodsPerNode+per-1)/per-1)
	assign := 0
	if enis*per+have < c.PodsPerNode {
		assign = 1
	}
	shortest := func(d time.Duration) float64 { return d.Seconds() * (1 - c.Jitter) }
	call, attach, imds := shortest(c.Call), shortest(c.Attach), shortest(c.IMDSLag)
	// From the moment a call takes effect until a pod can have the address.
	tail := map[action]float64{
		assignAddresses: max(imds, call/2),
		createInterface: call + attach + imds,
		attachInterface: attach + imds,
		modifyInterface: call / 2,
	}
	order := []action{assignAddresses, createInterface, attachInterface, modifyInterface}
	made := c.Nodes * enis
	need := map[action]int{assignAddresses: c.Nodes * assign, createInterface: made, attachInterface: made, modifyInterface: made}
	m := &Minimum{}
	least := 0.0
	for _, a := range order {
		if need[a] == 0 {
			continue
		}
		m.Calls = append(m.Calls, CallCount{Action: a.String(), Calls: need[a]})
		tokens := float64(need[a])
		if c.Buckets == FullBuckets {
			tokens -= float64(size[a][0])
		}
		if t := max(call/2, tokens/float64(size[a][1])) + tail[a]; t > least {
			least, m.Binds = t, a.String()
			if tokens <= 0 {
				m.Binds = ""
			}
		}
	}
	last := time.Duration(c.PodsPerNode-1) * c.Apart // the last pod comes
	if c.Scenario != Burst {
		last += c.BootOver*time.Duration(c.Nodes-1)/time.Duration(c.Nodes) + c.ReadyAfter
	}
	if last.Seconds() >= least {
		least, m.Binds = last.Seconds(), ""
	}
	m.Seconds = seconds(least * float64(time.Second))
	return m
}
