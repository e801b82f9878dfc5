package ipam

import (
	"fmt"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// Kind is why a request got no address.
type Kind uint8

// The kinds.
const (
	KindSlow        Kind = iota // nothing was refused, the deadline came first
	KindNodeFull                // the instance type holds no more
	KindSubnetFull              // the subnet has no address left
	KindThrottled               // EC2 throttles
	KindDenied                  // EC2 denies the calls
	KindQuota                   // an account's quota is reached
	KindUnavailable             // EC2 does not answer
	KindRefused                 // EC2 refused for another reason
)

func (k Kind) String() string {
	return [...]string{"slow", "node-full", "subnet-full", "throttled", "denied", "quota", "unavailable", "refused"}[k]
}

// Error is why a request got no address. Its text ends with the next step.
type Error struct {
	Kind   Kind
	Subnet vpc.SubnetID // KindSubnetFull
	Type   string       // KindNodeFull: the instance type
	Max    int          // KindNodeFull: addresses for pods that the type holds
	Waited time.Duration
	Cause  string // what EC2 said
}

func (e *Error) Error() string {
	cause, within := "", ""
	if e.Waited > 0 {
		within = ", no address within " + e.Waited.Round(time.Millisecond).String()
	}
	if e.Cause != "" {
		cause = " (" + e.Cause + ")"
	}
	switch e.Kind {
	case KindNodeFull:
		return fmt.Sprintf("the node is full: a %s holds at most %d pod addresses; schedule fewer pods on it or use a larger instance type", e.Type, e.Max)
	case KindSubnetFull:
		return fmt.Sprintf("subnet %s has no free address%s; free some there or give the nodes a larger subnet", e.Subnet, cause)
	case KindThrottled:
		return fmt.Sprintf("EC2 throttles the account%s%s; the next try may succeed, ask AWS for a higher request rate if this lasts", within, cause)
	case KindDenied:
		return fmt.Sprintf("EC2 denies the node what it needs for an address%s; attach the documented IAM policy to the node's role", cause)
	case KindQuota:
		return fmt.Sprintf("the account's quota of network interfaces is reached%s; delete unused interfaces or ask AWS for a higher quota", cause)
	case KindUnavailable:
		return fmt.Sprintf("EC2 does not answer%s%s; check the node's route to the EC2 endpoint and AWS_ENDPOINT_URL_EC2", within, cause)
	case KindRefused:
		return fmt.Sprintf("EC2 refused the call for an address%s; see the agent's log", cause)
	}
	return fmt.Sprintf("no address within %s; the next try may succeed, see 'underlay status' for what the node waits for", e.Waited)
}

func kindOf(c Class) Kind {
	switch c {
	case ClassThrottled:
		return KindThrottled
	case ClassDenied:
		return KindDenied
	case ClassSubnetFull, ClassNoPrefix:
		return KindSubnetFull
	case ClassAccountLimit, ClassSlots:
		return KindQuota
	case ClassUnavailable:
		return KindUnavailable
	}
	return KindRefused
}

// backoff is a delay that doubles with each failure.
type backoff struct {
	until time.Time
	steps int
}

// fail starts or lengthens the delay: first, doubled each time, at most limit,
// spread by ±25 % so that nodes that failed together do not return together.
func (b *backoff) fail(now time.Time, first, limit time.Duration, seed uint64) {
	d := first
	for range b.steps {
		if d *= 2; d >= limit {
			d = limit
			break
		}
	}
	b.steps++
	b.until = now.Add(spread(d, seed, uint64(b.steps)))
}

// spread returns d ±25 %, by splitmix64 of seed and n: no clock, no global
// state.
func spread(d time.Duration, seed, n uint64) time.Duration {
	z := seed + n*0x9e3779b97f4a7c15
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb
	z ^= z >> 31
	return d*3/4 + time.Duration(z%uint64(d/2+1))
}

func (b *backoff) active(now time.Time) bool { return now.Before(b.until) }
func (b *backoff) reset()                    { *b = backoff{} }
