package ec2

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsec2 "github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// PeerCIDRs returns the IPv4 ranges of the VPCs with which a VPC has an active
// peering.
func (c *Client) PeerCIDRs(ctx context.Context, of vpc.VPCID) ([]netip.Prefix, error) {
	var out []netip.Prefix
	in := &awsec2.DescribeVpcPeeringConnectionsInput{Filters: []types.Filter{filter("status-code", "active")}, MaxResults: aws.Int32(1000)}
	for {
		page, err := read(ctx, c.api.DescribeVpcPeeringConnections, in)
		if err != nil {
			return nil, fmt.Errorf("describe the peerings of %s: %w", of, err)
		}
		for i := range page.VpcPeeringConnections {
			p := &page.VpcPeeringConnections[i]
			for _, side := range [][2]*types.VpcPeeringConnectionVpcInfo{{p.RequesterVpcInfo, p.AccepterVpcInfo}, {p.AccepterVpcInfo, p.RequesterVpcInfo}} {
				own, peer := side[0], side[1]
				if own == nil || peer == nil || aws.ToString(own.VpcId) != string(of) {
					continue
				}
				for _, block := range peer.CidrBlockSet {
					cidr, err := netip.ParsePrefix(aws.ToString(block.CidrBlock))
					if err != nil {
						return nil, fmt.Errorf("describe the peerings of %s: %s: %w", of, aws.ToString(p.VpcPeeringConnectionId), err)
					}
					out = append(out, cidr)
				}
			}
		}
		if aws.ToString(page.NextToken) == "" {
			return out, nil
		}
		in.NextToken = page.NextToken
	}
}
