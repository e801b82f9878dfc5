package ec2

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsec2 "github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// SecurityGroups returns those of the groups that exist: by ID wherever they
// are, by name within the VPC.
func (c *Client) SecurityGroups(ctx context.Context, in vpc.VPCID, ids []vpc.SecurityGroupID, names []string) ([]vpc.SecurityGroup, error) {
	var out []vpc.SecurityGroup
	// By filter: asking for the ID of one that is not there is an error.
	var queries [][]types.Filter
	if len(ids) > 0 {
		queries = append(queries, []types.Filter{groupFilter(ids)})
	}
	if len(names) > 0 {
		queries = append(queries, []types.Filter{filter("vpc-id", string(in)), filter("group-name", names...)})
	}
	for _, q := range queries {
		in := &awsec2.DescribeSecurityGroupsInput{Filters: q, MaxResults: aws.Int32(1000)}
		for {
			page, err := read(ctx, c.api.DescribeSecurityGroups, in)
			if err != nil {
				return nil, fmt.Errorf("describe security groups: %w", err)
			}
			for i := range page.SecurityGroups {
				g := &page.SecurityGroups[i]
				out = append(out, vpc.SecurityGroup{ID: vpc.SecurityGroupID(aws.ToString(g.GroupId)), Name: aws.ToString(g.GroupName), VPC: vpc.VPCID(aws.ToString(g.VpcId))})
			}
			if aws.ToString(page.NextToken) == "" {
				break
			}
			in.NextToken = page.NextToken
		}
	}
	return out, nil
}

// SecurityGroupRules returns all rules of the groups, sorted by group and ID.
func (c *Client) SecurityGroupRules(ctx context.Context, ids []vpc.SecurityGroupID) ([]vpc.SecurityGroupRule, error) {
	var out []vpc.SecurityGroupRule
	for some := range slices.Chunk(ids, maxFilterValues) {
		in := &awsec2.DescribeSecurityGroupRulesInput{Filters: []types.Filter{groupFilter(some)}, MaxResults: aws.Int32(1000)}
		for {
			page, err := read(ctx, c.api.DescribeSecurityGroupRules, in)
			if err != nil {
				return nil, fmt.Errorf("describe the rules of %d security groups: %w", len(ids), err)
			}
			for i := range page.SecurityGroupRules {
				r, err := groupRule(&page.SecurityGroupRules[i])
				if err != nil {
					return nil, err
				}
				out = append(out, r)
			}
			if aws.ToString(page.NextToken) == "" {
				break
			}
			in.NextToken = page.NextToken
		}
	}
	slices.SortFunc(out, func(a, b vpc.SecurityGroupRule) int {
		if d := strings.Compare(string(a.Group), string(b.Group)); d != 0 {
			return d
		}
		return strings.Compare(a.ID, b.ID)
	})
	return out, nil
}

// PrefixListVersions returns the versions of the prefix lists that exist. AWS's
// own have none and count as of version 0.
func (c *Client) PrefixListVersions(ctx context.Context, ids []vpc.PrefixListID) (map[vpc.PrefixListID]int64, error) {
	out := map[vpc.PrefixListID]int64{}
	for some := range slices.Chunk(ids, 100) {
		values := make([]string, len(some))
		for i, id := range some {
			values[i] = string(id)
		}
		in := &awsec2.DescribeManagedPrefixListsInput{Filters: []types.Filter{filter("prefix-list-id", values...)}, MaxResults: aws.Int32(100)}
		for {
			page, err := read(ctx, c.api.DescribeManagedPrefixLists, in)
			if err != nil {
				return nil, fmt.Errorf("describe %d prefix lists: %w", len(ids), err)
			}
			for _, l := range page.PrefixLists {
				out[vpc.PrefixListID(aws.ToString(l.PrefixListId))] = aws.ToInt64(l.Version)
			}
			if aws.ToString(page.NextToken) == "" {
				break
			}
			in.NextToken = page.NextToken
		}
	}
	return out, nil
}

// PrefixListEntries returns a prefix list's entries.
func (c *Client) PrefixListEntries(ctx context.Context, id vpc.PrefixListID) ([]netip.Prefix, error) {
	var out []netip.Prefix
	in := &awsec2.GetManagedPrefixListEntriesInput{PrefixListId: aws.String(string(id)), MaxResults: aws.Int32(100)}
	for {
		page, err := read(ctx, c.api.GetManagedPrefixListEntries, in)
		if err != nil {
			return nil, fmt.Errorf("read the entries of %s: %w", id, err)
		}
		for _, e := range page.Entries {
			p, err := netip.ParsePrefix(aws.ToString(e.Cidr))
			if err != nil {
				return nil, fmt.Errorf("read the entries of %s: %w", id, err)
			}
			out = append(out, p.Masked())
		}
		if aws.ToString(page.NextToken) == "" {
			return out, nil
		}
		in.NextToken = page.NextToken
	}
}

// Members returns the private addresses of all interfaces that carry a group, by
// group: primary, secondary, and those of delegated prefixes; sorted.
func (c *Client) Members(ctx context.Context, ids []vpc.SecurityGroupID) (map[vpc.SecurityGroupID][]netip.Prefix, error) {
	out := map[vpc.SecurityGroupID][]netip.Prefix{}
	for some := range slices.Chunk(ids, maxFilterValues) {
		enis, err := c.interfaces(ctx, groupFilter(some))
		if err != nil {
			return nil, fmt.Errorf("describe the members of %d security groups: %w", len(ids), err)
		}
		for i := range enis {
			e := &enis[i]
			addrs := slices.Clone(e.Prefixes)
			for _, a := range append([]netip.Addr{e.Primary}, e.Secondary...) {
				if a.IsValid() {
					addrs = append(addrs, netip.PrefixFrom(a, a.BitLen()))
				}
			}
			for _, g := range e.Groups {
				if slices.Contains(some, g) {
					out[g] = append(out[g], addrs...)
				}
			}
		}
	}
	for _, list := range out {
		slices.SortFunc(list, netip.Prefix.Compare)
	}
	return out, nil
}

func groupFilter(ids []vpc.SecurityGroupID) types.Filter {
	values := make([]string, len(ids))
	for i, id := range ids {
		values[i] = string(id)
	}
	return filter("group-id", values...)
}

// protocols are the names that EC2 answers with in place of numbers.
var protocols = map[string]int{"tcp": 6, "udp": 17, "icmp": 1, "icmpv6": 58, "-1": -1}

func groupRule(r *types.SecurityGroupRule) (vpc.SecurityGroupRule, error) {
	out := vpc.SecurityGroupRule{ID: aws.ToString(r.SecurityGroupRuleId), Group: vpc.SecurityGroupID(aws.ToString(r.GroupId)), Egress: aws.ToBool(r.IsEgress),
		FromPort: -1, ToPort: -1, PrefixList: vpc.PrefixListID(aws.ToString(r.PrefixListId))}
	name := aws.ToString(r.IpProtocol)
	proto, ok := protocols[name]
	if !ok {
		var err error
		if proto, err = strconv.Atoi(name); err != nil || proto < 0 || proto > 255 {
			return out, fmt.Errorf("read rule %s: %q is no protocol", out.ID, name)
		}
	}
	out.Protocol = proto
	if r.FromPort != nil {
		out.FromPort = int(*r.FromPort)
	}
	if r.ToPort != nil {
		out.ToPort = int(*r.ToPort)
	}
	if g := r.ReferencedGroupInfo; g != nil {
		out.Referenced = vpc.SecurityGroupID(aws.ToString(g.GroupId))
	}
	for _, text := range []*string{r.CidrIpv4, r.CidrIpv6} {
		if aws.ToString(text) == "" {
			continue
		}
		p, err := netip.ParsePrefix(*text)
		if err != nil {
			return out, fmt.Errorf("read rule %s: %w", out.ID, err)
		}
		out.CIDR = p.Masked()
	}
	return out, nil
}
