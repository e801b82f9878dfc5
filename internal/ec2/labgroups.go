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

// LabRule allows one port of one protocol, from or to a group or a block.
type LabRule struct {
	Egress   bool
	Protocol string // tcp, udp; "-1" is all, without a port
	Port     int
	Group    vpc.SecurityGroupID
	CIDR     netip.Prefix // when Group is ""
}

// EmptyGroup makes a security group that allows nothing, not even the egress
// that EC2 gives a new one.
func (l *Lab) EmptyGroup(ctx context.Context, id vpc.VPCID, name, description string) (vpc.SecurityGroupID, error) {
	out, err := l.c.CreateSecurityGroup(ctx, &awsec2.CreateSecurityGroupInput{
		GroupName: aws.String(name), Description: aws.String(description), VpcId: aws.String(string(id)),
		TagSpecifications: nameTag(types.ResourceTypeSecurityGroup, name),
	})
	if err != nil {
		return "", fmt.Errorf("create security group %s: %w", name, err)
	}
	if _, err := l.c.RevokeSecurityGroupEgress(ctx, &awsec2.RevokeSecurityGroupEgressInput{
		GroupId:       out.GroupId,
		IpPermissions: []types.IpPermission{{IpProtocol: aws.String("-1"), IpRanges: []types.IpRange{{CidrIp: aws.String("0.0.0.0/0")}}}},
	}); err != nil {
		return "", fmt.Errorf("empty security group %s: %w", name, err)
	}
	return vpc.SecurityGroupID(aws.ToString(out.GroupId)), nil
}

// Allow adds rules to a group.
func (l *Lab) Allow(ctx context.Context, id vpc.SecurityGroupID, rules ...LabRule) error {
	group := aws.String(string(id))
	for _, r := range rules {
		p := types.IpPermission{IpProtocol: aws.String(r.Protocol)}
		if r.Protocol != "-1" {
			p.FromPort, p.ToPort = aws.Int32(int32(r.Port)), aws.Int32(int32(r.Port))
		}
		if r.Group != "" {
			p.UserIdGroupPairs = []types.UserIdGroupPair{{GroupId: aws.String(string(r.Group))}}
		} else {
			p.IpRanges = []types.IpRange{{CidrIp: aws.String(r.CIDR.String())}}
		}
		var err error
		if r.Egress {
			_, err = l.c.AuthorizeSecurityGroupEgress(ctx, &awsec2.AuthorizeSecurityGroupEgressInput{GroupId: group, IpPermissions: []types.IpPermission{p}})
		} else {
			_, err = l.c.AuthorizeSecurityGroupIngress(ctx, &awsec2.AuthorizeSecurityGroupIngressInput{GroupId: group, IpPermissions: []types.IpPermission{p}})
		}
		if err != nil {
			return fmt.Errorf("add a rule to security group %s: %w", id, err)
		}
	}
	return nil
}

// SetGroups gives an interface other security groups.
func (l *Lab) SetGroups(ctx context.Context, id vpc.ENIID, groups ...vpc.SecurityGroupID) error {
	in := &awsec2.ModifyNetworkInterfaceAttributeInput{NetworkInterfaceId: aws.String(string(id))}
	for _, g := range groups {
		in.Groups = append(in.Groups, string(g))
	}
	if _, err := l.c.ModifyNetworkInterfaceAttribute(ctx, in); err != nil {
		return fmt.Errorf("set the security groups of %s: %w", id, err)
	}
	return nil
}
