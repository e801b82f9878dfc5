package ec2

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsec2 "github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
)

// Internet gives a lab's private subnets a way to the internet, as is usual for
// nodes of a cluster: an internet gateway, a public subnet with a NAT gateway in
// it, and a default route in the main table to that. It returns the public
// address under which the internet sees them. The NAT gateway is available when
// it returns.
func (l *Lab) Internet(ctx context.Context, name string, n LabNetwork, public netip.Prefix) (netip.Addr, error) {
	var none netip.Addr
	v := aws.String(string(n.VPC))
	gateway, err := l.c.CreateInternetGateway(ctx, &awsec2.CreateInternetGatewayInput{TagSpecifications: nameTag(types.ResourceTypeInternetGateway, name)})
	if err != nil {
		return none, fmt.Errorf("create internet gateway: %w", err)
	}
	igw := gateway.InternetGateway.InternetGatewayId
	if _, err := l.c.AttachInternetGateway(ctx, &awsec2.AttachInternetGatewayInput{InternetGatewayId: igw, VpcId: v}); err != nil {
		return none, fmt.Errorf("attach internet gateway: %w", err)
	}
	subnet, err := l.c.CreateSubnet(ctx, &awsec2.CreateSubnetInput{
		VpcId: v, CidrBlock: aws.String(public.String()), AvailabilityZone: aws.String(n.Subnets[0].AvailabilityZone),
		TagSpecifications: nameTag(types.ResourceTypeSubnet, name+"-public"),
	})
	if err != nil {
		return none, fmt.Errorf("create subnet %s: %w", public, err)
	}
	table, err := l.c.CreateRouteTable(ctx, &awsec2.CreateRouteTableInput{VpcId: v, TagSpecifications: nameTag(types.ResourceTypeRouteTable, name+"-public")})
	if err != nil {
		return none, fmt.Errorf("create route table: %w", err)
	}
	if _, err := l.c.AssociateRouteTable(ctx, &awsec2.AssociateRouteTableInput{RouteTableId: table.RouteTable.RouteTableId, SubnetId: subnet.Subnet.SubnetId}); err != nil {
		return none, fmt.Errorf("associate route table: %w", err)
	}
	anywhere := aws.String("0.0.0.0/0")
	if _, err := l.c.CreateRoute(ctx, &awsec2.CreateRouteInput{RouteTableId: table.RouteTable.RouteTableId, DestinationCidrBlock: anywhere, GatewayId: igw}); err != nil {
		return none, fmt.Errorf("create route to the internet gateway: %w", err)
	}
	elastic, err := l.c.AllocateAddress(ctx, &awsec2.AllocateAddressInput{Domain: types.DomainTypeVpc, TagSpecifications: nameTag(types.ResourceTypeElasticIp, name)})
	if err != nil {
		return none, fmt.Errorf("allocate Elastic IP: %w", err)
	}
	addr, err := netip.ParseAddr(aws.ToString(elastic.PublicIp))
	if err != nil {
		return none, fmt.Errorf("read the Elastic IP: %w", err)
	}
	made, err := l.c.CreateNatGateway(ctx, &awsec2.CreateNatGatewayInput{
		SubnetId: subnet.Subnet.SubnetId, AllocationId: elastic.AllocationId, TagSpecifications: nameTag(types.ResourceTypeNatgateway, name),
	})
	if err != nil {
		return none, fmt.Errorf("create NAT gateway: %w", err)
	}
	nat := made.NatGateway.NatGatewayId
	if err := l.awaitNAT(ctx, aws.ToString(nat)); err != nil {
		return none, err
	}
	main, err := l.c.DescribeRouteTables(ctx, &awsec2.DescribeRouteTablesInput{Filters: []types.Filter{
		{Name: aws.String("vpc-id"), Values: []string{string(n.VPC)}}, {Name: aws.String("association.main"), Values: []string{"true"}},
	}})
	if err != nil {
		return none, fmt.Errorf("find the main route table: %w", err)
	}
	if len(main.RouteTables) != 1 {
		return none, fmt.Errorf("find the main route table of %s: EC2 lists %d", n.VPC, len(main.RouteTables))
	}
	if _, err := l.c.CreateRoute(ctx, &awsec2.CreateRouteInput{RouteTableId: main.RouteTables[0].RouteTableId, DestinationCidrBlock: anywhere, NatGatewayId: nat}); err != nil {
		return none, fmt.Errorf("create route to the NAT gateway: %w", err)
	}
	return addr, nil
}

// awaitNAT waits until a NAT gateway is available.
func (l *Lab) awaitNAT(ctx context.Context, id string) error {
	t := time.NewTicker(50 * time.Millisecond)
	defer t.Stop()
	for {
		out, err := l.c.DescribeNatGateways(ctx, &awsec2.DescribeNatGatewaysInput{NatGatewayIds: []string{id}})
		if err != nil {
			return fmt.Errorf("describe NAT gateway %s: %w", id, err)
		}
		for _, g := range out.NatGateways {
			switch g.State {
			case types.NatGatewayStateAvailable:
				return nil
			case types.NatGatewayStatePending:
			default:
				return fmt.Errorf("wait for NAT gateway %s: it is %s: %s", id, g.State, aws.ToString(g.FailureMessage))
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for NAT gateway %s: %w", id, context.Cause(ctx))
		case <-t.C:
		}
	}
}
