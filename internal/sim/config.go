package sim

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// Scenario is what happens to the cluster.
type Scenario string

// The scenarios. Rollout and Exhaustion begin with no node; the others with a
// cluster that has stood for a while.
const (
	Rollout    Scenario = "rollout"    // all nodes boot, then their pods come
	Burst      Scenario = "burst"      // idle nodes get all their pods at one moment
	Wave       Scenario = "wave"       // a deployment replaces its pods, a quarter at a time
	Churn      Scenario = "churn"      // nodes go and others come for them
	ZoneLoss   Scenario = "zone-loss"  // the nodes of one zone vanish
	Exhaustion Scenario = "exhaustion" // a roll-out into subnets that have room for the pods and little more
)

// Scenarios lists them all.
var Scenarios = []Scenario{Rollout, Burst, Wave, Churn, ZoneLoss, Exhaustion}

// Buckets is how the account's token buckets are when the scenario begins.
type Buckets string

// The states of the buckets.
const (
	FullBuckets  Buckets = "full"
	EmptyBuckets Buckets = "empty"
)

// Config says what is simulated. The zero value is of no use: start from
// Default.
type Config struct {
	Scenario     Scenario `json:"scenario"`
	Nodes        int      `json:"nodes"`
	PodsPerNode  int      `json:"podsPerNode"`
	Seed         uint64   `json:"seed"`
	InstanceType string   `json:"instanceType"`
	MaxPods      int      `json:"maxPods"` // of a node, as the kubelet has it; 0: ENIs × (addresses − 1) + 2

	Zones      int     `json:"zones"`
	SubnetBits int     `json:"subnetBits"` // 0: as the scenario needs it
	Subnets    int     `json:"subnets"`    // per zone; 0: as the scenario needs it
	Spare      float64 `json:"spare"`      // Exhaustion: free addresses above one per node and pod, as a share

	Call    time.Duration `json:"callNs"`   // a call to EC2, there and back
	Attach  time.Duration `json:"attachNs"` // from the answer until the device is there
	IMDSLag time.Duration `json:"imdsLagNs"`
	ReadLag time.Duration `json:"readLagNs"` // a read of EC2 is this old at the most
	Jitter  float64       `json:"jitter"`    // of these, each way, as a share
	Buckets Buckets       `json:"buckets"`

	AddTimeout time.Duration `json:"addTimeoutNs"` // how long an ADD of Underlay waits
	Retry      time.Duration `json:"retryNs"`      // the kubelet's, after an ADD failed: this to half as much again

	Apart      time.Duration `json:"apartNs"`      // between two pods of a node that are created together: what a runtime takes for a sandbox
	BootOver   time.Duration `json:"bootOverNs"`   // Rollout, Exhaustion: over which the nodes boot
	ReadyAfter time.Duration `json:"readyAfterNs"` // from a node's boot until its pods are scheduled
	Share      float64       `json:"share"`        // Wave: of the pods; Churn: of the nodes
	Over       time.Duration `json:"overNs"`       // Churn: over which they go
	Terminated time.Duration `json:"terminatedNs"` // from a node's end until EC2 frees what was its own
	Settle     time.Duration `json:"settleNs"`     // after the last pod is up
	Limit      time.Duration `json:"limitNs"`      // of the scenario

	Prefixes bool     `json:"prefixes"` // /28s, in both models
	Floor    int      `json:"floor"`    // Underlay: free addresses to keep ready
	Compare  bool     `json:"compare"`  // the AWS VPC CNI too
	AWS      AWSKnobs `json:"awsVPCCNI"`

	limits vpc.InstanceLimits
	verify func(*ipam.State) // tests look at each state
}

// Default returns a roll-out with the latencies that were assumed where the
// AWS VPC CNI was measured (docs/reference/sim.md).
func Default() Config {
	return Config{
		Scenario: Rollout, Nodes: 100, PodsPerNode: 30, Seed: 1, InstanceType: "m6i.4xlarge", Zones: 3, Spare: 0.1,
		Call: 50 * time.Millisecond, Attach: time.Second, IMDSLag: 500 * time.Millisecond, ReadLag: time.Second, Jitter: 0.2, Buckets: FullBuckets,
		AddTimeout: 50 * time.Second, // agent.DefaultAddTimeout
		Retry:      10 * time.Second, // backOffPeriod in pkg/kubelet/kubelet.go
		Apart:      20 * time.Millisecond, BootOver: time.Minute, ReadyAfter: 10 * time.Second, Share: 0.25, Over: 30 * time.Minute, Terminated: 30 * time.Second,
		Settle: 7 * time.Minute, // what is surplus comes back within five
		Limit:  2 * time.Hour,
		Floor:  ipam.Default().Floor, Compare: true, AWS: AWSKnobs{WarmENI: 1, WarmPrefix: 1, LinkWait: 3 * time.Second},
	}
}

// Check completes c and reports what does not go together.
func (c *Config) Check() error {
	if !slices.Contains(Scenarios, c.Scenario) {
		var names []string
		for _, s := range Scenarios {
			names = append(names, string(s))
		}
		return fmt.Errorf("scenario %q is not known; use one of %s", c.Scenario, strings.Join(names, ", "))
	}
	limits, known := vpc.LimitsOf(c.InstanceType)
	if !known || limits.ENIs < 1 || limits.IPv4PerENI < 2 {
		return fmt.Errorf("the limits of instance type %q are not known; use another, such as m5.large", c.InstanceType)
	}
	c.limits = limits
	switch {
	case c.Nodes < 1 || c.Nodes > 100_000:
		return fmt.Errorf("%d nodes cannot be simulated; use 1 to 100000", c.Nodes)
	case c.PodsPerNode < 1:
		return fmt.Errorf("%d pods per node make no scenario; use at least 1", c.PodsPerNode)
	case c.Zones < 1 || c.Zones > 16:
		return fmt.Errorf("%d zones cannot be simulated; use 1 to 16", c.Zones)
	case c.SubnetBits != 0 && (c.SubnetBits < 16 || c.SubnetBits > 28):
		return fmt.Errorf("a VPC has no subnet of /%d; use /16 to /28", c.SubnetBits)
	case c.Subnets < 0 || c.Subnets > 1000:
		return fmt.Errorf("%d subnets per zone cannot be simulated; use 1 to 1000, or 0 for as many as the scenario needs", c.Subnets)
	case c.Spare < -0.9 || c.Spare > 10:
		return fmt.Errorf("%g of the addresses cannot be spare; use -0.9 to 10", c.Spare)
	case c.Jitter < 0 || c.Jitter > 1:
		return fmt.Errorf("a jitter of %g is no share; use 0 to 1", c.Jitter)
	case c.Share <= 0 || c.Share > 1:
		return fmt.Errorf("%g is no share; use more than 0, at most 1", c.Share)
	case c.Buckets != FullBuckets && c.Buckets != EmptyBuckets:
		return fmt.Errorf("buckets cannot be %q; use full or empty", c.Buckets)
	case c.Retry < time.Second:
		return fmt.Errorf("a pod cannot be retried after %s; use 1s or more", c.Retry)
	case c.AddTimeout < time.Second:
		return fmt.Errorf("an ADD cannot end after %s; use 1s or more", c.AddTimeout)
	case c.Call <= 0:
		return fmt.Errorf("a call cannot take %s; use 1ms or more", c.Call)
	case min(c.Attach, c.IMDSLag, c.ReadLag, c.Apart, c.BootOver, c.ReadyAfter, c.Over, c.Terminated, c.Settle, c.AWS.LinkWait) < 0:
		return fmt.Errorf("a duration is negative; use 0s or more")
	case c.Limit < time.Minute || c.Limit > 240*time.Hour:
		return fmt.Errorf("a scenario cannot be ended after %s; use 1m to 240h", c.Limit)
	case c.Floor < 0 || c.AWS.WarmENI < 0 || c.AWS.WarmIP < 0 || c.AWS.MinimumIP < 0 || c.AWS.WarmPrefix < 0 || c.MaxPods < 0:
		return fmt.Errorf("a target is negative; use 0 or more")
	case c.Prefixes && !limits.Nitro():
		return fmt.Errorf("a %s holds no prefixes; use a type on Nitro, or leave --prefixes away", c.InstanceType)
	case c.Scenario == ZoneLoss && c.Zones < 2:
		return fmt.Errorf("with one zone nothing is left after its loss; use --zones 2 or more")
	case c.Scenario == ZoneLoss && c.Nodes < c.Zones:
		return fmt.Errorf("%d nodes are fewer than the %d zones; use more nodes or fewer zones", c.Nodes, c.Zones)
	}
	if c.MaxPods == 0 {
		c.MaxPods = limits.MaxPods(1)
	}
	most := min(c.MaxPods, c.capacity())
	need, why := c.PodsPerNode, ""
	switch c.Scenario {
	case ZoneLoss:
		need, why = (c.PodsPerNode*c.Zones+c.Zones-2)/(c.Zones-1), " once those of the lost zone have come"
		need++ // zones differ by one node
	case Wave:
		need, why = c.PodsPerNode+1, " while some are replaced"
	}
	if need > most {
		return fmt.Errorf("a %s holds %d pods, not the %d of a node%s; use fewer pods per node, a larger type, --max-pods or --prefixes", c.InstanceType, most, need, why)
	}
	if _, free := c.layout(); free == nil {
		return fmt.Errorf("the subnets of %d nodes do not fit into 10.0.0.0/8; use fewer nodes or smaller subnets", c.Nodes)
	}
	return nil
}

func (c *Config) maxPods() int { return c.MaxPods }

// What an instance holds is asked of the allocator, for both.
func (c *Config) node() *ipam.Config { return &ipam.Config{Limits: c.limits, Prefixes: c.Prefixes} }

func (c *Config) maxENIs() int { return c.node().ENIs() }

// perSlot returns the addresses that one of an interface's slots holds.
func (c *Config) perSlot() int { return c.node().PerSlot() }

// capacity returns the pod addresses that a node can hold.
func (c *Config) capacity() int { return c.node().Capacity() }

// nodesIn returns how many of the nodes are at most in one zone.
func (c *Config) nodesIn() int { return (c.Nodes + c.Zones - 1) / c.Zones }

// layout returns the subnets' ranges, zones in turn, and how many addresses
// are free in each at the start; nil if they do not fit.
func (c *Config) layout() (cidrs []netip.Prefix, free []int) {
	bits, perZone := c.SubnetBits, c.Subnets
	var want float64 // addresses in a zone
	if c.Scenario == Exhaustion {
		want = math.Ceil(float64(c.nodesIn()*(c.PodsPerNode+1)) * (1 + c.Spare))
	} else {
		// Plenty for either model: pods, and two interfaces full ahead.
		node := min(c.capacity()+c.maxENIs(), 2*c.PodsPerNode+2*c.limits.IPv4PerENI*c.perSlot())
		want = float64(c.nodesIn() * node)
		if c.Scenario == ZoneLoss || c.Scenario == Churn {
			want *= 2
		}
	}
	if bits == 0 {
		for bits = 28; bits > 16 && float64(int(1)<<(32-bits)-reserved)*float64(max(1, perZone)) < want; {
			bits--
		}
	}
	size := 1<<(32-bits) - reserved
	if perZone == 0 {
		perZone = max(1, int(math.Ceil(want/float64(size))))
	}
	if c.Zones*perZone<<(32-bits) > 1<<24 {
		return nil, nil
	}
	for i := range c.Zones * perZone {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], 10<<24+uint32(i)<<(32-bits))
		cidrs = append(cidrs, netip.PrefixFrom(netip.AddrFrom4(b), bits))
		room := size
		if c.Scenario == Exhaustion && c.SubnetBits == 0 {
			room = min(size, int(math.Ceil(want/float64(perZone))))
		}
		free = append(free, room)
	}
	return cidrs, free
}

// seconds prints as JSON in whole milliseconds.
type seconds time.Duration

func (s seconds) MarshalJSON() ([]byte, error) {
	return json.Marshal(float64(time.Duration(s).Round(time.Millisecond)/time.Millisecond) / 1000)
}
