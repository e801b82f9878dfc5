package sim

import (
	"net/netip"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/plan"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// What package plan works out for a settled cluster is where the simulated one
// ends, which runs the real allocator and a model of the other.
func TestPlanIsWhereTheSimulationSettles(t *testing.T) {
	subnet, err := plan.NewSubnet(netip.MustParsePrefix("10.0.0.0/16"), 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		instanceType string
		pods         int // on each node
		prefixes     bool
	}{
		{"m5.large", 1, false}, {"m5.large", 8, false}, {"m5.large", 9, false}, {"m5.large", 15, false}, {"m5.large", 27, false},
		{"m6i.4xlarge", 16, false}, {"m6i.4xlarge", 90, false},
		{"m5.large", 15, true}, {"m5.large", 16, true}, {"m5.large", 40, true},
	} {
		const nodes, maxPods = 5, 110
		limits, _ := vpc.LimitsOf(c.instanceType)
		q := plan.Request{Nodes: nodes, Pods: nodes * c.pods, Limits: limits, Subnets: []plan.Subnet{subnet}, Prefixes: c.prefixes, Floor: 1, MaxPods: maxPods}
		if err := q.Check(); err != nil {
			t.Fatal(err)
		}
		want := q.Fit()

		cfg := Default()
		cfg.Nodes, cfg.PodsPerNode, cfg.InstanceType, cfg.Prefixes, cfg.MaxPods = nodes, c.pods, c.instanceType, c.prefixes, maxPods
		cfg.Settle = 15 * time.Minute
		if c.prefixes {
			cfg.AWS.WarmPrefix = 1
		}
		r, err := Run(t.Context(), cfg, nil)
		if err != nil {
			t.Fatal(err)
		}
		us, other := r.Outcomes[0], r.Outcomes[1]
		if us.HeldEnd != want.Underlay.Addresses || us.ENIsEnd != want.Underlay.ENIs {
			t.Errorf("%+v: Underlay ends with %d addresses on %d ENIs, plan says %d on %d", c, us.HeldEnd, us.ENIsEnd, want.Underlay.Addresses, want.Underlay.ENIs)
		}
		// With prefixes plan gives the other's best case: it scatters pods.
		if got := other.HeldEnd; got < want.AWS.Addresses || got > want.AWS.Addresses && !c.prefixes {
			t.Errorf("%+v: the AWS VPC CNI ends with %d addresses, plan says %d", c, got, want.AWS.Addresses)
		}
	}
}
