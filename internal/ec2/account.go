package ec2

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	awsec2 "github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// Account reads what is in an account's region and changes nothing: it needs
// DescribeSubnets, DescribeNetworkInterfaces, DescribeInstances and
// GetSubnetCidrReservations. It is for people's tools; unlike the node's client
// it repeats what was throttled as the SDK does.
type Account struct {
	c   Client
	sdk *awsec2.Client // for what a node does not call
}

// NewAccount returns an Account, configured as the SDK documents it:
// environment, shared files, AWS_ENDPOINT_URL_EC2 for another endpoint.
func NewAccount(ctx context.Context) (*Account, error) {
	cfg, err := config.LoadDefaultConfig(ctx)
	if err != nil {
		return nil, fmt.Errorf("load the AWS configuration: %w; check AWS_PROFILE and the shared files", err)
	}
	if cfg.Region == "" {
		return nil, fmt.Errorf("no AWS region is configured; set AWS_REGION, or for a lab: eval \"$(underlay env)\"")
	}
	sdk := awsec2.NewFromConfig(cfg)
	return &Account{c: Client{api: sdk}, sdk: sdk}, nil
}

// inVPC filters by VPC; "" is all.
func inVPC(id vpc.VPCID) []types.Filter {
	if id == "" {
		return nil
	}
	return []types.Filter{filter("vpc-id", string(id))}
}

// Subnets describes the subnets of a VPC, or of all.
func (a *Account) Subnets(ctx context.Context, id vpc.VPCID) ([]vpc.Subnet, error) {
	in := &awsec2.DescribeSubnetsInput{Filters: inVPC(id), MaxResults: aws.Int32(1000)}
	var out []vpc.Subnet
	for {
		page, err := call(ctx, a.c.api.DescribeSubnets, in)
		if err != nil {
			return nil, fmt.Errorf("describe subnets: %w", err)
		}
		for _, s := range page.Subnets {
			if aws.ToString(s.CidrBlock) == "" {
				continue // IPv6 alone
			}
			cidr, err := netip.ParsePrefix(aws.ToString(s.CidrBlock))
			if err != nil {
				return nil, fmt.Errorf("describe subnets: %w", err)
			}
			out = append(out, vpc.Subnet{ID: vpc.SubnetID(aws.ToString(s.SubnetId)), VPC: vpc.VPCID(aws.ToString(s.VpcId)), CIDR: cidr,
				AvailabilityZone: aws.ToString(s.AvailabilityZone), Available: int(aws.ToInt32(s.AvailableIpAddressCount))})
		}
		if aws.ToString(page.NextToken) == "" {
			return out, nil
		}
		in.NextToken = page.NextToken
	}
}

// Reservations returns the CIDR reservations of a subnet.
func (a *Account) Reservations(ctx context.Context, id vpc.SubnetID) ([]vpc.Reservation, error) {
	in := &awsec2.GetSubnetCidrReservationsInput{SubnetId: aws.String(string(id)), MaxResults: aws.Int32(1000)}
	var out []vpc.Reservation
	for {
		page, err := call(ctx, a.sdk.GetSubnetCidrReservations, in)
		if err != nil {
			return nil, fmt.Errorf("get the CIDR reservations of %s: %w", id, err)
		}
		for _, r := range page.SubnetIpv4CidrReservations {
			cidr, err := netip.ParsePrefix(aws.ToString(r.Cidr))
			if err != nil {
				return nil, fmt.Errorf("get the CIDR reservations of %s: %w", id, err)
			}
			out = append(out, vpc.Reservation{CIDR: cidr, Prefixes: r.ReservationType == types.SubnetCidrReservationTypePrefix})
		}
		if aws.ToString(page.NextToken) == "" {
			return out, nil
		}
		in.NextToken = page.NextToken
	}
}

// Interfaces describes the network interfaces in a VPC, or in all.
func (a *Account) Interfaces(ctx context.Context, id vpc.VPCID) ([]vpc.ENI, error) {
	out, err := a.c.interfaces(ctx, inVPC(id)...)
	if err != nil {
		return nil, fmt.Errorf("describe network interfaces: %w", err)
	}
	return out, nil
}

// Instances describes the instances in a VPC, or in all, that are not gone.
func (a *Account) Instances(ctx context.Context, id vpc.VPCID) ([]LabInstance, error) {
	in := &awsec2.DescribeInstancesInput{MaxResults: aws.Int32(1000),
		Filters: append(inVPC(id), filter("instance-state-name", "pending", "running", "stopping", "stopped"))}
	var out []LabInstance
	for {
		page, err := call(ctx, a.c.api.DescribeInstances, in)
		if err != nil {
			return nil, fmt.Errorf("describe instances: %w", err)
		}
		for _, r := range page.Reservations {
			for i := range r.Instances {
				one, err := labInstance(&r.Instances[i])
				if err != nil {
					return nil, err
				}
				out = append(out, one)
			}
		}
		if aws.ToString(page.NextToken) == "" {
			return out, nil
		}
		in.NextToken = page.NextToken
	}
}
