package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/underlay-cni/underlay/internal/cli"
	"github.com/underlay-cni/underlay/internal/sim"
)

const simHelp = `Simulate a cluster of many nodes in virtual time: each node runs Underlay's real
address allocation, all of them share one account's EC2 request limits and the
subnets of one VPC. Beside it, on the same events, a model of the AWS VPC CNI.

Scenarios:
  rollout     all nodes boot, then their pods come
  burst       idle nodes get all their pods at one moment
  wave        a deployment replaces its pods (--share of all), a quarter at a time
  churn       --share of the nodes go within --over, others come for them
  zone-loss   the nodes of one zone vanish, the others take their pods
  exhaustion  a roll-out into subnets that have room for the pods and --spare more

The same flags give the same result, to the byte. What is modelled and what is
not: docs/reference/sim.md.`

const simExample = `  underlay sim                                        # 100 nodes × 30 pods
  underlay sim --nodes 2000 --plot rollout.svg
  underlay sim --nodes 2000 --scenario wave --share 0.5
  underlay sim --nodes 20 --pods-per-node 230 --scenario burst --buckets empty
  underlay sim --nodes 500 --scenario exhaustion --spare 0.1
  underlay sim --nodes 1000 --warm-ip-target 5 --minimum-ip-target 10   # the other's knobs`

func simCommand(a *cli.App) *cobra.Command {
	c := sim.Default()
	scenario, buckets, subnet, plot, series := string(c.Scenario), string(c.Buckets), "", "", true
	cmd := &cobra.Command{
		Use:     "sim",
		GroupID: cli.GroupAhead,
		Short:   "Simulate thousands of nodes against EC2's request limits",
		Long:    simHelp,
		Example: simExample,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c.Scenario, c.Buckets = sim.Scenario(scenario), sim.Buckets(buckets)
			if subnet != "" {
				if _, err := fmt.Sscanf(strings.TrimPrefix(subnet, "/"), "%d", &c.SubnetBits); err != nil || c.SubnetBits == 0 {
					return fmt.Errorf("--subnet %q is no size; use one such as /20", subnet)
				}
			}
			p := &simProgress{w: a.Err, began: time.Now(), last: time.Now()}
			report, err := sim.Run(cmd.Context(), c, p.tell)
			p.end(err == nil)
			if err != nil {
				return err
			}
			if plot != "" {
				if err := writePlot(plot, report); err != nil {
					return err
				}
			}
			if !series {
				for i := range report.Outcomes {
					report.Outcomes[i].Series = nil
				}
			}
			return a.Print(report, func(w io.Writer) { report.Write(w) })
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.IntVar(&c.Nodes, "nodes", c.Nodes, "nodes")
	f.IntVar(&c.PodsPerNode, "pods-per-node", c.PodsPerNode, "pods on each")
	f.StringVar(&scenario, "scenario", scenario, "what happens: rollout, burst, wave, churn, zone-loss or exhaustion")
	f.Uint64Var(&c.Seed, "seed", c.Seed, "of all that is random")
	f.StringVar(&plot, "plot", "", "write a plot to this file (SVG)")
	f.BoolVar(&series, "series", series, "with -o json: the course over time too")
	f.BoolVar(&c.Compare, "compare", c.Compare, "simulate the AWS VPC CNI too")

	f.StringVar(&c.InstanceType, "type", c.InstanceType, "instance type of the nodes")
	f.IntVar(&c.MaxPods, "max-pods", c.MaxPods, "pods that a node takes (0: ENIs × (addresses − 1) + 2)")
	f.IntVar(&c.Zones, "zones", c.Zones, "availability zones; nodes and subnets are spread over them")
	f.StringVar(&subnet, "subnet", "", "size of the subnets, such as /20 (default: as the scenario needs it)")
	f.IntVar(&c.Subnets, "subnets", c.Subnets, "subnets per zone (0: as the scenario needs it)")
	f.BoolVar(&c.Prefixes, "prefixes", c.Prefixes, "delegate /28 prefixes, in both models")
	f.IntVar(&c.Floor, "floor", c.Floor, "Underlay: free addresses to keep ready on each node")

	f.DurationVar(&c.Call, "call-latency", c.Call, "a call to EC2, there and back")
	f.DurationVar(&c.Attach, "attach-latency", c.Attach, "from the answer to AttachNetworkInterface until the device is there")
	f.DurationVar(&c.IMDSLag, "imds-lag", c.IMDSLag, "from assignment or attachment until IMDS lists an address")
	f.DurationVar(&c.ReadLag, "read-lag", c.ReadLag, "how old what EC2 answers to a read may be")
	f.Float64Var(&c.Jitter, "jitter", c.Jitter, "of these latencies, each way, as a share")
	f.StringVar(&buckets, "buckets", buckets, "the account's token buckets at the start: full or empty")
	f.DurationVar(&c.AddTimeout, "add-timeout", c.AddTimeout, "how long an ADD of Underlay waits for its address")
	f.DurationVar(&c.Retry, "retry", c.Retry, "the kubelet's delay after a failed ADD; up to half as much is added")
	f.DurationVar(&c.Apart, "apart", c.Apart, "between two pods of a node that are created together")

	f.DurationVar(&c.BootOver, "boot-over", c.BootOver, "rollout, exhaustion: time over which the nodes boot")
	f.DurationVar(&c.ReadyAfter, "ready-after", c.ReadyAfter, "from a node's boot until its pods are scheduled")
	f.Float64Var(&c.Share, "share", c.Share, "wave: share of the pods; churn: share of the nodes")
	f.DurationVar(&c.Over, "over", c.Over, "churn: time over which the nodes go")
	f.Float64Var(&c.Spare, "spare", c.Spare, "exhaustion: free addresses above one per node and pod, as a share; may be negative")
	f.DurationVar(&c.Settle, "settle", c.Settle, "how long to go on after the last pod is up")
	f.DurationVar(&c.Limit, "limit", c.Limit, "when to end the scenario at the latest")

	f.IntVar(&c.AWS.WarmENI, "warm-eni-target", c.AWS.WarmENI, "AWS VPC CNI: WARM_ENI_TARGET")
	f.IntVar(&c.AWS.WarmIP, "warm-ip-target", c.AWS.WarmIP, "AWS VPC CNI: WARM_IP_TARGET (0: not set)")
	f.IntVar(&c.AWS.MinimumIP, "minimum-ip-target", c.AWS.MinimumIP, "AWS VPC CNI: MINIMUM_IP_TARGET (0: not set)")
	f.IntVar(&c.AWS.WarmPrefix, "warm-prefix-target", c.AWS.WarmPrefix, "AWS VPC CNI: WARM_PREFIX_TARGET, with --prefixes (0: not set)")

	f.DurationVar(&c.AWS.LinkWait, "link-wait", c.AWS.LinkWait, "AWS VPC CNI: to find and set up the link of a new interface")

	var names []string
	for _, s := range sim.Scenarios {
		names = append(names, string(s))
	}
	_ = cmd.RegisterFlagCompletionFunc("scenario", cobra.FixedCompletions(names, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("buckets", cobra.FixedCompletions([]string{"full", "empty"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// writePlot writes the plot beside path and renames it into place.
func writePlot(path string, r *sim.Report) error {
	svg, err := r.Plot()
	if err != nil {
		return fmt.Errorf("plot %s: %w", path, err)
	}
	if err := os.WriteFile(path, svg, 0o644); err != nil {
		return fmt.Errorf("write the plot: %w; choose another file with --plot", err)
	}
	return nil
}

// simProgress tells on stderr how far a simulation is that takes seconds.
type simProgress struct {
	w           io.Writer
	began, last time.Time
	at          sim.Progress
	told        bool
}

func (p *simProgress) tell(at sim.Progress) {
	p.at = at
	if now := time.Now(); now.Sub(p.last) >= 2*time.Second {
		p.last, p.told = now, true
		phase := ""
		if at.Warming {
			phase = " (before the scenario)"
		}
		fmt.Fprintf(p.w, "  %s%s: %s simulated, %d pods up, %d waiting (%.0f s)\n", at.Model, phase, at.Now.Round(time.Second), at.Up, at.Waiting, now.Sub(p.began).Seconds())
	}
}

func (p *simProgress) end(good bool) {
	if good && p.told {
		fmt.Fprintf(p.w, "  done (%.1f s)\n", time.Since(p.began).Seconds())
	}
}
