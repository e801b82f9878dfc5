package cli

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/plan"
	"github.com/underlay-cni/underlay/internal/vpc"
)

func (a *App) planCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "plan",
		Short: "Work out how many pods and addresses fit",
		Long: `Works out how many pods an instance type takes, and whether nodes and pods find
room in subnets: under Underlay, and beside it under the AWS VPC CNI as it is
installed. It needs no lab and no root. It reads an account only where that is
asked for, and changes nothing there.`,
		Example: `  underlay plan type m5.large p5.48xlarge
  underlay plan fit --nodes 20 --pods 300 --type m5.large --subnet 10.0.0.0/24,10.0.1.0/24`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(a.planTypeCommand(), a.planFitCommand(), a.planAccountCommand())
	return c
}

func completeTypes(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return slices.DeleteFunc(vpc.InstanceTypes(), func(t string) bool { return slices.Contains(args, t) }), noFiles
}

// limitsOf finds a type, or says which may have been meant.
func limitsOf(name string) (vpc.InstanceLimits, error) {
	if l, ok := vpc.LimitsOf(name); ok {
		return l, nil
	}
	if near := plan.Near(name, 3); len(near) > 0 {
		return vpc.InstanceLimits{}, fmt.Errorf("instance type %q is not known; did you mean %s?", name, strings.Join(near, ", "))
	}
	return vpc.InstanceLimits{}, fmt.Errorf("instance type %q is not known; use one such as m5.large", name)
}

func (a *App) planTypeCommand() *cobra.Command {
	var prefixes bool
	c := &cobra.Command{
		Use:   "type TYPE...",
		Short: "Print how many pods instance types take, and why",
		Long: `Prints, per instance type, the well-known formula ENIs × (addresses − 1) + 2, what
EKS tells a kubelet (it caps the formula at 110, or at 250 from 30 vCPUs on), and
how many pods with an address of their own Underlay can hold.`,
		Example: `  underlay plan type m5.large
  underlay plan type m5.large p5.48xlarge --prefixes`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return fmt.Errorf("no instance type is named; use one such as: underlay plan type m5.large")
			}
			return nil
		},
		ValidArgsFunction: completeTypes,
		RunE: func(_ *cobra.Command, args []string) error {
			var all []plan.Pods
			for _, name := range args {
				l, err := limitsOf(name)
				if err != nil {
					return err
				}
				p, err := plan.PodsOf(l, prefixes)
				if err != nil {
					return err
				}
				all = append(all, p)
			}
			return a.print(all, func(w io.Writer) { writeTypes(w, all, colored(w)) })
		},
	}
	c.Flags().BoolVar(&prefixes, "prefixes", false, "with delegated /28 prefixes")
	return c
}

func writeTypes(w io.Writer, all []plan.Pods, color bool) {
	t := table{head: []string{"TYPE", "VCPUS", "ENIS", "ADDRESSES", "FORMULA", "EKS", "UNDERLAY"}}
	for _, p := range all {
		eks := cell{text: strconv.Itoa(p.EKS), right: true}
		if len(p.EKSCaps) > 1 && min(p.Formula, p.EKSCaps[1]) != p.EKS {
			eks.text = fmt.Sprintf("%d or %d", p.EKS, min(p.Formula, p.EKSCaps[1]))
		}
		vcpus := cell{text: "?", right: true}
		if p.VCPUs > 0 {
			vcpus = number(p.VCPUs)
		}
		t.row(text(p.Type), vcpus, number(p.ENIs), number(p.IPv4PerENI), number(p.Formula), eks, number(p.Underlay))
	}
	t.write(w, "", color)
	for _, p := range all {
		fmt.Fprintf(w, "\n%s\n", paint(p.Type, strong, color))
		for _, why := range p.Why {
			fmt.Fprintf(w, "  %s\n", why)
		}
	}
}

const planFitHelp = `Works out what --nodes nodes with --pods pods take of the subnets, whether it fits,
and what would make it fit if it does not (exit code 1 then). Nodes are spread
evenly over the subnets, and pods over the nodes; pods in the nodes' own network
do not count. A subnet is CIDR, or CIDR=USED with the addresses in use, beside the
five that EC2 keeps.

Underlay holds an address for each node, each pod, the free ones of --floor, and
each further ENI that these need. The AWS VPC CNI as it is installed keeps as many
free addresses as one ENI has (WARM_ENI_TARGET=1; with prefixes a free /28).`

func (a *App) planFitCommand() *cobra.Command {
	r := plan.Request{Floor: ipam.Default().Floor, ENIQuota: plan.ENIQuota}
	var instanceType, vpcID string
	var subnets []string
	var fromAWS bool
	c := &cobra.Command{
		Use:   "fit --nodes N --pods P --subnet CIDR[=USED]...",
		Short: "Work out whether nodes and pods fit into subnets",
		Long:  planFitHelp,
		Example: `  underlay plan fit --nodes 20 --pods 300 --type m5.large --subnet 10.0.0.0/24,10.0.1.0/24
  underlay plan fit --nodes 60 --pods 3000 --type m6i.4xlarge --subnet 10.0.0.0/20=900 --prefixes
  underlay plan fit --nodes 60 --pods 3000 --type m6i.4xlarge --from-aws --vpc-id vpc-0123456789abcdef0`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if r.Limits, err = limitsOf(instanceType); err != nil {
				return err
			}
			switch {
			case fromAWS:
				r.Subnets, err = a.accountSubnets(cmd.Context(), vpcID, subnets)
			case vpcID != "":
				err = fmt.Errorf("--vpc-id names a VPC of an account; add --from-aws")
			default:
				r.Subnets, err = parseSubnets(subnets)
			}
			if err != nil {
				return err
			}
			return a.fit(r)
		},
	}
	f := c.Flags()
	f.SortFlags = false
	f.IntVar(&r.Nodes, "nodes", 0, "nodes")
	f.IntVar(&r.Pods, "pods", 0, "pods with an address of their own, on all nodes together")
	f.StringVar(&instanceType, "type", "m5.large", "instance type of the nodes")
	f.StringSliceVar(&subnets, "subnet", nil, "CIDR or CIDR=USED; repeat it, or separate by commas")
	f.BoolVar(&fromAWS, "from-aws", false, "read the subnets from the account, with what is in use; --subnet then names IDs (default: all)")
	f.StringVar(&vpcID, "vpc-id", "", "with --from-aws: the VPC")
	f.BoolVar(&r.Prefixes, "prefixes", false, "with delegated /28 prefixes")
	f.IntVar(&r.Reserve, "reserve", 0, "addresses to leave free in each subnet, for load balancers and others")
	f.IntVar(&r.Floor, "floor", r.Floor, "Underlay: free addresses that each node keeps ready")
	f.IntVar(&r.MaxPods, "max-pods", 0, "what a kubelet is told, pods of the node's own network included (0: as EKS tells it)")
	f.IntVar(&r.ENIQuota, "eni-quota", r.ENIQuota, "network interfaces that the account may have in a zone")
	_ = c.RegisterFlagCompletionFunc("type", cobra.FixedCompletions(vpc.InstanceTypes(), noFiles))
	for _, name := range []string{"nodes", "pods", "subnet", "vpc-id"} {
		_ = c.RegisterFlagCompletionFunc(name, cobra.NoFileCompletions)
	}
	return c
}

func parseSubnets(args []string) ([]plan.Subnet, error) {
	var out []plan.Subnet
	for _, arg := range args {
		cidr, rest, counted := strings.Cut(strings.TrimSpace(arg), "=")
		p, err := netip.ParsePrefix(cidr)
		if err != nil {
			return nil, fmt.Errorf("--subnet %q is no CIDR; use one such as 10.0.0.0/20, or 10.0.0.0/20=300 with 300 addresses in use", arg)
		}
		used := 0
		if counted {
			if used, err = strconv.Atoi(rest); err != nil {
				return nil, fmt.Errorf("--subnet %q: %q is no count of addresses in use; use %s=300", arg, rest, cidr)
			}
		}
		s, err := plan.NewSubnet(p, used)
		if err != nil {
			return nil, fmt.Errorf("--subnet %w", err)
		}
		out = append(out, s)
	}
	return out, nil
}

// fit answers r and ends with exit code 1 if it does not fit.
func (a *App) fit(r plan.Request) error {
	if err := r.Check(); err != nil {
		return err
	}
	f := r.Fit()
	if err := a.print(f, func(w io.Writer) { writeFit(w, &f, colored(w)) }); err != nil {
		return err
	}
	if !f.Fits {
		return exitError{1}
	}
	return nil
}

func writeFit(w io.Writer, f *plan.Fit, color bool) {
	prefixes := ""
	if f.Prefixes {
		prefixes = ", with prefixes"
	}
	fmt.Fprintf(w, "%s and %s on %s%s: up to %d on one node, which takes %d\n\n",
		plural(f.Nodes, "node"), plural(f.Pods, "pod"), f.Type, prefixes, f.PodsPerNode, f.MostPerNode)

	t := table{head: []string{"ON THE FULLEST NODE", "ENIS", "SINGLE", "/28S", "ADDRESSES"}}
	for _, h := range []struct {
		who string
		plan.Holding
	}{{"Underlay", f.Node}, {"AWS VPC CNI", f.AWSNode}} {
		row := []cell{text(h.who), number(h.ENIs), number(h.Singles), {}, number(h.Addresses())}
		if f.Prefixes {
			row[2], row[3] = cell{}, number(h.Prefixes)
		}
		t.row(row...)
	}
	t.write(w, "", color)
	if f.Prefixes {
		fmt.Fprintln(w, "(the AWS VPC CNI at best: it scatters pods over its prefixes)")
	}
	fmt.Fprintln(w)

	t = table{head: []string{"SUBNET", "ZONE", "NODES", "PODS", "FREE", "UNDERLAY", "LEFT", "AWS VPC CNI", "LEFT"}}
	left := func(s plan.Share) cell {
		c := number(s.Left)
		if s.BlocksGap > 0 && s.Left >= 0 {
			c.text += fmt.Sprintf(", %s lacking", plural(s.BlocksGap, "/28"))
		}
		if s.Left < 0 || s.BlocksGap > 0 {
			c.tone = bad
		}
		return c
	}
	free := 0
	for _, s := range f.Subnets {
		free += s.Free
		t.row(text(s.Subnet.Name), text(s.Subnet.Zone), number(s.Nodes), number(s.Pods), number(s.Free),
			number(s.Underlay.Addresses), left(s.Underlay), number(s.AWS.Addresses), left(s.AWS))
	}
	if len(f.Subnets) > 1 {
		// No sum of what is left: what one subnet has over is no help to another.
		t.row(text("all"), cell{}, number(f.Nodes), number(f.Pods), number(free), number(f.Underlay.Addresses), cell{}, number(f.AWS.Addresses), cell{})
	}
	t.write(w, "", color)
	if f.Reserve > 0 {
		fmt.Fprintf(w, "(left beside %s kept free in each subnet)\n", plural(f.Reserve, "address"))
	}
	kept := 0
	for _, s := range f.Subnets {
		kept += s.Subnet.Kept
	}
	if f.Prefixes && kept > 0 {
		fmt.Fprintf(w, "(prefixes come first from %s that CIDR reservations keep for them: in neither FREE nor LEFT)\n", plural(kept, "/28"))
	}
	fmt.Fprintln(w)

	verdict := func(who string, fits bool) {
		s := paint("fits", good, color)
		if !fits {
			s = paint("does not fit", bad, color)
		}
		fmt.Fprintf(w, "%s: %s\n", who, s)
	}
	verdict("Underlay", f.Fits)
	for _, p := range f.Problems {
		fmt.Fprintf(w, "  %s\n", p)
	}
	verdict("AWS VPC CNI", f.AWSFits)
	if !f.Fits {
		fmt.Fprintln(w, "\nEach of these by itself would make it fit under Underlay:")
		for _, r := range f.Remedies {
			fmt.Fprintf(w, "  - %s\n", r)
		}
		if len(f.Remedies) == 0 {
			fmt.Fprintln(w, "  (no single change does; change nodes and subnets together)")
		}
	}
}

// plural is "1 node", "2 nodes".
func plural(n int, noun string) string {
	switch {
	case n == 1:
		return "1 " + noun
	case strings.HasSuffix(noun, "s"):
		return fmt.Sprintf("%d %ses", n, noun)
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
