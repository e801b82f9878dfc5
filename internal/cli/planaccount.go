package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/underlay-cni/underlay/internal/ec2"
	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/plan"
	"github.com/underlay-cni/underlay/internal/vpc"
)

const planAccountHelp = `Reads an account's subnets, interfaces and instances (and changes nothing), and
prints what each node holds, how full each subnet is, and, with snapshots of
earlier, when it is full if it goes on as it did (a straight line).

EC2 knows which addresses a node holds, not which of them a pod uses. --pods FILE
tells it, one address a line ("-" is the standard input); without it what is used,
and what Underlay would hold for the same pods, is not known and not guessed.

The account is found as the AWS SDK documents it: AWS_PROFILE, AWS_REGION, and
AWS_ENDPOINT_URL_EC2 for another endpoint, such as a lab's.`

const planAccountExample = `  underlay plan account --vpc-id vpc-0123456789abcdef0 --save monday.json
  underlay plan account --since monday.json
  kubectl get pods -A -o jsonpath='{range .items[*]}{.status.podIP}{"\n"}{end}' | underlay plan account --pods -
  eval "$(underlay env)"; underlay pods -o json | jq -r '.[].ip' | underlay plan account --pods -`

func (a *App) planAccountCommand() *cobra.Command {
	var vpcID, pods, save string
	var since []string
	quota := plan.ENIQuota
	c := &cobra.Command{
		Use:     "account",
		Short:   "Print what an account's nodes hold, and when its subnets are full",
		Long:    planAccountHelp,
		Example: planAccountExample,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var earlier []plan.Snapshot
			for _, path := range since {
				s, err := readSnapshot(path)
				if err != nil {
					return err
				}
				earlier = append(earlier, s)
			}
			seen, err := a.readAccount(cmd.Context(), vpcID)
			if err != nil {
				return err
			}
			seen.At, seen.Floor, seen.ENIQuota = a.now().UTC(), ipam.Default().Floor, quota
			if pods != "" {
				if seen.Pods, err = a.readPodAddresses(pods); err != nil {
					return err
				}
				seen.PodsKnown = true
			}
			acc, err := plan.Look(seen, earlier)
			if err != nil {
				return fmt.Errorf("--since: %w", err)
			}
			if save != "" {
				if err := saveSnapshot(save, acc.Snapshot()); err != nil {
					return err
				}
			}
			return a.print(acc, func(w io.Writer) { writeAccount(w, &acc, colored(w)) })
		},
	}
	f := c.Flags()
	f.SortFlags = false
	f.StringVar(&vpcID, "vpc-id", "", "this VPC alone (default: all of the region)")
	f.StringVar(&pods, "pods", "", "file with the addresses of all pods, one a line; - is the standard input")
	f.StringVar(&save, "save", "", "keep a snapshot in this new file, for a later --since")
	f.StringSliceVar(&since, "since", nil, "snapshots of earlier; repeat it, or separate by commas")
	f.IntVar(&quota, "eni-quota", quota, "network interfaces that the account may have in a zone")
	_ = c.RegisterFlagCompletionFunc("vpc-id", cobra.NoFileCompletions)
	return c
}

// readAccount reads what there is.
func (a *App) readAccount(ctx context.Context, vpcID string) (plan.Seen, error) {
	var s plan.Seen
	if vpcID != "" {
		if err := vpc.CheckID("vpc", vpcID); err != nil {
			return s, fmt.Errorf("--vpc-id %w; find it with: aws ec2 describe-vpcs", err)
		}
	}
	id := vpc.VPCID(vpcID)
	c, err := ec2.NewAccount(ctx)
	if err != nil {
		return s, err
	}
	hint := func(err error) error {
		return fmt.Errorf("%w; check AWS_PROFILE, AWS_REGION and AWS_ENDPOINT_URL_EC2, and that ec2:Describe* and ec2:GetSubnetCidrReservations are allowed", err)
	}
	if s.Subnets, err = c.Subnets(ctx, id); err != nil {
		return s, hint(err)
	}
	if len(s.Subnets) == 0 {
		if vpcID != "" {
			return s, fmt.Errorf("%s has no subnet in this region; find VPCs with: aws ec2 describe-vpcs", vpcID)
		}
		return s, errors.New("the region has no subnet; is AWS_REGION the one that is meant?")
	}
	for i := range s.Subnets {
		s.Subnets[i].Reservations, err = c.Reservations(ctx, s.Subnets[i].ID)
		if _, class := ec2.Outcome(err); class == ipam.ClassDenied {
			fmt.Fprintln(a.Err, "Subnet CIDR reservations are not counted: ec2:GetSubnetCidrReservations is not allowed. A free /28 in one counts as free.")
			break
		}
		if err != nil {
			return s, hint(err)
		}
	}
	if s.ENIs, err = c.Interfaces(ctx, id); err != nil {
		return s, hint(err)
	}
	machines, err := c.Instances(ctx, id)
	if err != nil {
		return s, hint(err)
	}
	for _, m := range machines {
		s.Machines = append(s.Machines, plan.Machine{ID: m.ID, Name: m.Name, Type: m.Type})
	}
	return s, nil
}

// accountSubnets returns the account's subnets, or those named by their IDs.
func (a *App) accountSubnets(ctx context.Context, vpcID string, ids []string) ([]plan.Subnet, error) {
	seen, err := a.readAccount(ctx, vpcID)
	if err != nil {
		return nil, err
	}
	var out []plan.Subnet
	vpcs := map[vpc.VPCID]bool{}
	for _, s := range seen.Subnets {
		if len(ids) > 0 && !slices.Contains(ids, string(s.ID)) {
			continue
		}
		vpcs[s.VPC] = true
		var enis []vpc.ENI
		for _, e := range seen.ENIs {
			if e.Subnet == s.ID {
				enis = append(enis, e)
			}
		}
		out = append(out, plan.FromEC2(s, enis))
	}
	if len(vpcs) > 1 {
		return nil, fmt.Errorf("the subnets are of %d VPCs, and nodes live in one; choose it with --vpc-id", len(vpcs))
	}
	for _, id := range ids {
		if !slices.ContainsFunc(out, func(s plan.Subnet) bool { return s.Name == id }) {
			return nil, fmt.Errorf("--subnet %q is none of the account's; with --from-aws name IDs, as in: aws ec2 describe-subnets", id)
		}
	}
	return out, nil
}

func (a *App) readPodAddresses(path string) ([]netip.Addr, error) {
	in, name := a.In, "the standard input"
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("--pods: %w; name a file with one address a line, or -", err)
		}
		defer f.Close()
		in, name = f, path
	}
	var out []netip.Addr
	lines := bufio.NewScanner(in)
	for n := 1; lines.Scan(); n++ {
		for _, word := range strings.FieldsFunc(lines.Text(), func(r rune) bool { return r == ' ' || r == '\t' || r == ',' || r == '\r' }) {
			addr, err := netip.ParseAddr(word)
			if err != nil {
				return nil, fmt.Errorf("--pods: line %d of %s: %q is no address; one address a line is wanted", n, name, word)
			}
			out = append(out, addr.Unmap())
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("--pods: read %s: %w; one address a line is wanted", name, err)
	}
	return out, nil
}

func readSnapshot(path string) (plan.Snapshot, error) {
	var s plan.Snapshot
	b, err := os.ReadFile(path)
	if err != nil {
		return s, fmt.Errorf("--since: %w; make a snapshot with --save", err)
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("--since: %s is no snapshot: %w; make one with --save", path, err)
	}
	return s, nil
}

// saveSnapshot overwrites nothing: an old snapshot cannot be made again.
func saveSnapshot(path string, s plan.Snapshot) error {
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("--save: %s exists, and an old snapshot cannot be made again; choose another name", path)
	}
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return fmt.Errorf("--save: %w", err)
	}
	if err := writeFile(path, append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("--save: %w; choose another file", err)
	}
	return nil
}

// shortest is over how many days a trend must go to be told: in less, one
// deployment looks like a flood.
const shortest = 1.0 / 24

func days(n float64) time.Duration { return time.Duration(n * 24 * float64(time.Hour)) }

// fullIn says when a subnet is full, in days unless that is soon.
func fullIn(t *plan.Trend) cell {
	switch {
	case t.OverDays < shortest:
		return cell{text: "?", tone: dim}
	case t.Days == nil:
		return text("not at this rate")
	case *t.Days < 2:
		return cell{text: fmt.Sprintf("%.1f hours", *t.Days*24), tone: bad}
	}
	return textf("%.1f days", *t.Days)
}

func writeAccount(w io.Writer, acc *plan.Account, color bool) {
	t := table{head: []string{"SUBNET", "VPC", "CIDR", "ZONE", "SIZE", "FOR NODES", "FREE", "FREE /28S", "TAKEN A DAY", "FULL IN"}}
	vpcs := map[vpc.VPCID]bool{}
	for _, s := range acc.Subnets {
		vpcs[s.VPC] = true
	}
	trends := 0
	over := 0.0
	for _, s := range acc.Subnets {
		row := []cell{text(string(s.ID)), {}, text(s.CIDR.String()), text(s.Zone), number(s.Size), number(s.ForNodes), number(s.Free), number(s.Free28s), {}, {}}
		if len(vpcs) > 1 {
			row[1] = text(string(s.VPC))
		}
		if s.Trend != nil {
			trends++
			over = max(over, s.Trend.OverDays)
			if s.Trend.OverDays >= shortest {
				row[8] = cell{text: fmt.Sprintf("%+.1f", s.Trend.PerDay), right: true}
			}
			row[9] = fullIn(s.Trend)
		}
		t.row(row...)
	}
	t.write(w, "", color)
	kept := 0
	for _, s := range acc.Subnets {
		kept += s.Kept28s
	}
	if kept > 0 {
		fmt.Fprintf(w, "CIDR reservations keep %s more for prefixes.\n", plural(kept, "free /28"))
	}
	for _, z := range acc.Zones {
		if z.Near() {
			fmt.Fprintf(w, "%s\n", paint(fmt.Sprintf("%s has %d of the %d network interfaces that the account may have in a zone.", z.Zone, z.ENIs, z.Quota), bad, color))
		}
	}
	switch {
	case trends == 0:
		fmt.Fprintln(w, "When a subnet is full is not known without earlier figures: keep them with --save, and give them with --since.")
	case over < shortest:
		fmt.Fprintf(w, "The snapshots go back %s: too short a time for a trend.\n", age(days(over)))
	case over < 1:
		fmt.Fprintf(w, "The trend is a straight line over %s: that says little about days.\n", age(days(over)))
	default:
		fmt.Fprintf(w, "The trend is a straight line over %.1f days.\n", over)
	}

	fmt.Fprintln(w)
	if len(acc.Nodes) == 0 {
		fmt.Fprintf(w, "No machine holds addresses for pods (%s with primary addresses alone).\n", plural(acc.Others, "machine"))
		return
	}
	t = table{head: []string{"NODE", "TYPE", "ENIS", "HOLDS", "USED", "IDLE", "UNDERLAY WOULD HOLD"}}
	optional := func(n *int) cell {
		if n == nil {
			return cell{text: "?", right: true, tone: dim}
		}
		return number(*n)
	}
	var holds, used, idle, would int
	known, wouldKnown := true, true
	for _, n := range acc.Nodes {
		name := n.Name
		if name == "" {
			name = string(n.ID)
		}
		t.row(text(name), text(n.Type), number(n.Held.ENIs), number(n.Holds), optional(n.Used), optional(n.Idle), optional(n.Underlay))
		holds += n.Holds
		if known = known && n.Used != nil; known {
			used, idle = used+*n.Used, idle+*n.Idle
		}
		if wouldKnown = wouldKnown && n.Underlay != nil; wouldKnown {
			would += *n.Underlay
		}
	}
	sum := func(n int, ok bool) cell {
		if !ok {
			return optional(nil)
		}
		return number(n)
	}
	if len(acc.Nodes) > 1 {
		t.row(text("all"), cell{}, cell{}, number(holds), sum(used, known), sum(idle, known), sum(would, wouldKnown))
	}
	t.write(w, "", color)
	if !known {
		fmt.Fprintln(w, "EC2 says what is held, not what pods use: give the pods' addresses with --pods.")
	}
	if acc.Others > 0 {
		fmt.Fprintf(w, "%s with primary addresses alone: not counted as nodes.\n", plural(acc.Others, "machine"))
	}
	if acc.HostPods > 0 {
		fmt.Fprintf(w, "%s at a node's own address: in its network, no address of their own.\n", plural(acc.HostPods, "pod"))
	}
	if len(acc.Stray) > 0 {
		fmt.Fprintf(w, "%s at addresses that no node here holds, such as %s: another VPC, an overlay, or gone since.\n", plural(len(acc.Stray), "pod"), acc.Stray[0])
	}
}
