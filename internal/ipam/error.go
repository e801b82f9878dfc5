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
	KindSetsFull                // other sets of security groups have the node's interfaces
	KindGroups                  // EC2 refuses the security groups
)

func (k Kind) String() string {
	return [...]string{"slow", "node-full", "subnet-full", "throttled", "denied", "quota", "unavailable", "refused", "sets-full", "groups"}[k]
}

// Error is why a request got no address. Its text ends with the next step.
type Error struct {
	Kind   Kind
	Subnet vpc.SubnetID // KindSubnetFull
	Type   string       // KindNodeFull, KindSetsFull: the instance type
	Max    int          // KindNodeFull: addresses for pods that the type holds; KindSetsFull: interfaces
	Groups vpc.GroupSet // KindSetsFull, KindGroups: what was asked for
	Sets   []SetUse     // KindNodeFull, KindSetsFull: who has the node's interfaces
	Others int          // KindNodeFull, KindSetsFull: interfaces that are not ours
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
		if len(e.Sets) > 1 {
			return fmt.Sprintf("the node is full: a %s holds at most %d pod addresses, on interfaces that serve sets of security groups, %s; schedule fewer pods or sets on it or use a larger instance type", e.Type, e.Max, e.holders())
		}
		return fmt.Sprintf("the node is full: a %s holds at most %d pod addresses; schedule fewer pods on it or use a larger instance type", e.Type, e.Max)
	case KindSetsFull:
		return fmt.Sprintf("the node has no network interface left for security groups %s%s%s: the %d of a %s serve %s; schedule the pod on another node, remove pods of a set here, or use a larger instance type", e.Groups, within, cause, e.Max, e.Type, e.holders())
	case KindGroups:
		return fmt.Sprintf("EC2 refuses an interface with security groups %s%s; check that they exist in the node's VPC and how many the account's quota allows on one interface", e.Groups, cause)
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
	case ClassGroups:
		return KindGroups
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
