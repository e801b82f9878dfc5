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

// DelegatePrefixes delegates n /28 prefixes to the primary interface of an
// instance, and returns them. EC2 refuses more than the instance type holds.
func (l *Lab) DelegatePrefixes(ctx context.Context, id vpc.InstanceID, n int) ([]netip.Prefix, error) {
	enis, err := l.c.DescribeNetworkInterfaces(ctx, &awsec2.DescribeNetworkInterfacesInput{Filters: []types.Filter{
		{Name: aws.String("attachment.instance-id"), Values: []string{string(id)}},
		{Name: aws.String("attachment.device-index"), Values: []string{"0"}},
	}})
	if err != nil {
		return nil, fmt.Errorf("find the primary interface of %s: %w", id, err)
	}
	if len(enis.NetworkInterfaces) != 1 {
		return nil, fmt.Errorf("find the primary interface of %s: EC2 lists %d", id, len(enis.NetworkInterfaces))
	}
	eni := enis.NetworkInterfaces[0].NetworkInterfaceId
	out, err := l.c.AssignPrivateIpAddresses(ctx, &awsec2.AssignPrivateIpAddressesInput{NetworkInterfaceId: eni, Ipv4PrefixCount: aws.Int32(int32(n))})
	if err != nil {
		return nil, fmt.Errorf("delegate %d prefixes to %s: %w", n, aws.ToString(eni), err)
	}
	var prefixes []netip.Prefix
	for _, p := range out.AssignedIpv4Prefixes {
		prefix, err := netip.ParsePrefix(aws.ToString(p.Ipv4Prefix))
		if err != nil {
			return nil, fmt.Errorf("read a prefix of %s: %w", aws.ToString(eni), err)
		}
		prefixes = append(prefixes, prefix)
	}
	return prefixes, nil
}
