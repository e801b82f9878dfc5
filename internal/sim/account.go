package sim

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"time"
)

// action is a call of the EC2 API that one of the models makes.
type action uint8

const (
	describeInstances action = iota
	describeInterfaces
	describeSubnets
	attachInterface
	detachInterface
	assignAddresses
	unassignAddresses
	createInterface
	deleteInterface
	modifyInterface
	actions = 10
)

func (a action) String() string {
	return [...]string{"DescribeInstances", "DescribeNetworkInterfaces", "DescribeSubnets", "AttachNetworkInterface",
		"DetachNetworkInterface", "AssignPrivateIpAddresses", "UnassignPrivateIpAddresses", "CreateNetworkInterface", "DeleteNetworkInterface",
		"ModifyNetworkInterfaceAttribute"}[a]
}

//go:embed throttle.json
var throttleJSON []byte

// limits are the buckets of one account, [tokens at most, tokens per second].
func bucketSizes() ([actions][2]int64, error) {
	var out [actions][2]int64
	var all map[string]json.RawMessage
	if err := json.Unmarshal(throttleJSON, &all); err != nil {
		return out, fmt.Errorf("read throttle.json: %w", err)
	}
	for a := range action(actions) {
		if err := json.Unmarshal(all[a.String()], &out[a]); err != nil {
			return out, fmt.Errorf("read throttle.json: %s: %w", a, err)
		}
		if out[a][0] < 1 || out[a][1] < 1 {
			return out, fmt.Errorf("read throttle.json: %s: %v is no bucket", a, out[a])
		}
	}
	return out, nil
}

// token is one token in the unit that buckets count in: with whole tokens per
// second and time in nanoseconds, no arithmetic is ever rounded.
const token = int64(time.Second)

// account is the token buckets that all nodes share, one per action, and a
// count of what was asked of them.
type account struct {
	size    [actions][2]int64
	tokens  [actions]int64
	filled  [actions]time.Duration // when tokens was right
	open    bool                   // nothing is refused and nothing counted: the time before the scenario
	calls   [actions]int           // that went through
	refused [actions]int
}

func newAccount() (*account, error) {
	size, err := bucketSizes()
	return &account{size: size, open: true}, err
}

// begin starts the scenario at now, with full or with empty buckets.
func (a *account) begin(now time.Duration, empty bool) {
	a.open = false
	for i := range a.tokens {
		a.filled[i], a.tokens[i] = now, a.size[i][0]*token
		if empty {
			a.tokens[i] = 0
		}
	}
}

// take takes a token for one call, and reports whether there was one.
func (a *account) take(act action, now time.Duration) bool {
	if a.open {
		return true
	}
	full := a.size[act][0] * token
	// An hour fills every bucket; beyond it the product could overflow.
	a.tokens[act] = min(full, a.tokens[act]+int64(min(now-a.filled[act], time.Hour))*a.size[act][1])
	a.filled[act] = now
	if a.tokens[act] < token {
		a.refused[act]++
		return false
	}
	a.tokens[act] -= token
	a.calls[act]++
	return true
}

// totals returns the calls made and, of those, the refused.
func (a *account) totals() (calls, refused int) {
	for i := range a.calls {
		calls += a.calls[i] + a.refused[i]
		refused += a.refused[i]
	}
	return calls, refused
}
