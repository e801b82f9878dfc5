package ec2

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	awsec2 "github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// Lab makes and describes what a lab is built of: a VPC with subnets and
// groups, and instances. It is for people's tools; the agent has a narrower
// client. Safe for concurrent use.
type Lab struct {
	c *awsec2.Client
}

// labKey is the access key of whoever builds a lab. vpcd reads it to tell
// callers apart and verifies no signature.
const labKey = "AKIAUNDERLAYLAB00000"

// NewLab returns a Lab that speaks to endpoint ("http://127.0.0.1:7424"). It
// reads neither the environment nor any file: a person's own AWS profile never
// comes into it.
func NewLab(endpoint, region string) *Lab {
	return &Lab{c: awsec2.New(awsec2.Options{
		BaseEndpoint: aws.String(endpoint),
		Region:       region,
		Credentials:  credentials.NewStaticCredentialsProvider(labKey, "underlay", ""),
	})}
}

// LabNetwork is a VPC with its subnets and the groups of those who live there.
type LabNetwork struct {
	VPC      vpc.VPCID
	Subnets  []vpc.Subnet // one per zone, in the order asked for
	Nodes    vpc.SecurityGroupID
	VMs      vpc.SecurityGroupID
	Database vpc.SecurityGroupID
}

// The ports that the groups of a lab open to its nodes.
const (
	LabVMPort       = 8080
	LabDatabasePort = 5432
)

// Network makes a VPC with a subnet in a zone of its own for each of subnets,
// and three security groups, which the VPC enforces: nodes talk to all within
// the VPC, VMs and the database answer on their port to whoever carries the
// nodes' group (VMs echo requests too), and to nobody else.
func (l *Lab) Network(ctx context.Context, name string, cidr netip.Prefix, subnets []netip.Prefix) (LabNetwork, error) {
	var n LabNetwork
	v, err := l.c.CreateVpc(ctx, &awsec2.CreateVpcInput{
		CidrBlock:         aws.String(cidr.String()),
		TagSpecifications: nameTag(types.ResourceTypeVpc, name),
	})
	if err != nil {
		return n, fmt.Errorf("create VPC %s: %w", cidr, err)
	}
	n.VPC = vpc.VPCID(aws.ToString(v.Vpc.VpcId))

	// Private names resolve where both DNS attributes are on; this one is off
	// unless asked for.
	if _, err := l.c.ModifyVpcAttribute(ctx, &awsec2.ModifyVpcAttributeInput{
		VpcId: v.Vpc.VpcId, EnableDnsHostnames: &types.AttributeBooleanValue{Value: aws.Bool(true)},
	}); err != nil {
		return n, fmt.Errorf("give VPC %s DNS names: %w", n.VPC, err)
	}

	zones, err := l.c.DescribeAvailabilityZones(ctx, &awsec2.DescribeAvailabilityZonesInput{})
	if err != nil {
		return n, fmt.Errorf("list availability zones: %w", err)
	}
	if len(zones.AvailabilityZones) < len(subnets) {
		return n, fmt.Errorf("make %d subnets in as many zones: the region has %d", len(subnets), len(zones.AvailabilityZones))
	}
	for i, s := range subnets {
		zone := aws.ToString(zones.AvailabilityZones[i].ZoneName)
		out, err := l.c.CreateSubnet(ctx, &awsec2.CreateSubnetInput{
			VpcId:             v.Vpc.VpcId,
			CidrBlock:         aws.String(s.String()),
			AvailabilityZone:  aws.String(zone),
			TagSpecifications: nameTag(types.ResourceTypeSubnet, fmt.Sprintf("%s-private-%d", name, i+1)),
		})
		if err != nil {
			return n, fmt.Errorf("create subnet %s: %w", s, err)
		}
		n.Subnets = append(n.Subnets, vpc.Subnet{
			ID: vpc.SubnetID(aws.ToString(out.Subnet.SubnetId)), VPC: n.VPC, CIDR: s, AvailabilityZone: zone,
			Available: int(aws.ToInt32(out.Subnet.AvailableIpAddressCount)),
		})
	}

	for _, g := range []struct {
		id         *vpc.SecurityGroupID
		name, desc string
	}{
		{&n.Nodes, name + "-nodes", "nodes and their pods"},
		{&n.VMs, name + "-vms", "machines outside the cluster"},
		{&n.Database, name + "-db", "managed databases"},
	} {
		out, err := l.c.CreateSecurityGroup(ctx, &awsec2.CreateSecurityGroupInput{
			GroupName: aws.String(g.name), Description: aws.String(g.desc), VpcId: v.Vpc.VpcId,
			TagSpecifications: nameTag(types.ResourceTypeSecurityGroup, g.name),
		})
		if err != nil {
			return n, fmt.Errorf("create security group %s: %w", g.name, err)
		}
		*g.id = vpc.SecurityGroupID(aws.ToString(out.GroupId))
	}
	fromNodes := []types.UserIdGroupPair{{GroupId: aws.String(string(n.Nodes))}}
	for _, r := range []struct {
		group vpc.SecurityGroupID
		perms []types.IpPermission
	}{
		{n.Nodes, []types.IpPermission{{IpProtocol: aws.String("-1"), IpRanges: []types.IpRange{{CidrIp: aws.String(cidr.String())}}}}},
		{n.VMs, []types.IpPermission{
			{IpProtocol: aws.String("tcp"), FromPort: aws.Int32(LabVMPort), ToPort: aws.Int32(LabVMPort), UserIdGroupPairs: fromNodes},
			{IpProtocol: aws.String("icmp"), FromPort: aws.Int32(-1), ToPort: aws.Int32(-1), UserIdGroupPairs: fromNodes},
		}},
		{n.Database, []types.IpPermission{
			{IpProtocol: aws.String("tcp"), FromPort: aws.Int32(LabDatabasePort), ToPort: aws.Int32(LabDatabasePort), UserIdGroupPairs: fromNodes},
		}},
	} {
		_, err := l.c.AuthorizeSecurityGroupIngress(ctx, &awsec2.AuthorizeSecurityGroupIngressInput{
			GroupId: aws.String(string(r.group)), IpPermissions: r.perms,
		})
		if err != nil {
			return n, fmt.Errorf("add rules to security group %s: %w", r.group, err)
		}
	}
	return n, nil
}

// LabInstance is an instance as a person wants to see it.
type LabInstance struct {
	ID     vpc.InstanceID
	Name   string // of its Name tag
	Type   string
	State  string // "pending", "running", …
	IP     netip.Addr
	Subnet vpc.SubnetID
	Zone   string
}

// Launch starts an instance with one interface in subnet, that carries group.
func (l *Lab) Launch(ctx context.Context, name, instanceType string, subnet vpc.SubnetID, group vpc.SecurityGroupID) (LabInstance, error) {
	out, err := l.c.RunInstances(ctx, &awsec2.RunInstancesInput{
		ImageId:      aws.String("ami-00000000000000000"), // a namespace boots no image
		InstanceType: types.InstanceType(instanceType),
		MinCount:     aws.Int32(1),
		MaxCount:     aws.Int32(1),
		NetworkInterfaces: []types.InstanceNetworkInterfaceSpecification{{
			DeviceIndex: aws.Int32(0), SubnetId: aws.String(string(subnet)), Groups: []string{string(group)},
			DeleteOnTermination: aws.Bool(true),
		}},
		TagSpecifications: nameTag(types.ResourceTypeInstance, name),
	})
	if err != nil {
		return LabInstance{}, fmt.Errorf("start instance %s: %w", name, err)
	}
	if len(out.Instances) != 1 {
		return LabInstance{}, fmt.Errorf("start instance %s: EC2 answered with %d instances", name, len(out.Instances))
	}
	return labInstance(&out.Instances[0])
}

// AwaitRunning waits until every instance is running, and returns them in the
// order of ids. An instance that ends instead is an error.
func (l *Lab) AwaitRunning(ctx context.Context, ids []vpc.InstanceID) ([]LabInstance, error) {
	return l.await(ctx, ids, types.InstanceStateNameRunning, types.InstanceStateNamePending)
}

// Stop stops running instances and waits until they are stopped: their network
// namespaces are gone, their interfaces stay with their addresses. With force
// the namespaces go first, as when the power is cut. One that is stopped
// already stays so.
func (l *Lab) Stop(ctx context.Context, ids []vpc.InstanceID, force bool) error {
	if _, err := l.c.StopInstances(ctx, &awsec2.StopInstancesInput{InstanceIds: texts(ids), Force: aws.Bool(force)}); err != nil {
		return fmt.Errorf("stop instances %v: %w", ids, err)
	}
	_, err := l.await(ctx, ids, types.InstanceStateNameStopped, types.InstanceStateNameStopping, types.InstanceStateNameRunning)
	return err
}

// Start starts stopped instances, waits until they are running, and returns
// them in the order of ids. Their namespaces are new. One that runs already
// stays as it is.
func (l *Lab) Start(ctx context.Context, ids []vpc.InstanceID) ([]LabInstance, error) {
	if _, err := l.c.StartInstances(ctx, &awsec2.StartInstancesInput{InstanceIds: texts(ids)}); err != nil {
		return nil, fmt.Errorf("start instances %v: %w", ids, err)
	}
	return l.await(ctx, ids, types.InstanceStateNameRunning, types.InstanceStateNamePending, types.InstanceStateNameStopped)
}

// Reboot gives running instances new network namespaces. They are running all
// the while; vpcd's list of namespaces waits for the new ones.
func (l *Lab) Reboot(ctx context.Context, ids []vpc.InstanceID) error {
	if _, err := l.c.RebootInstances(ctx, &awsec2.RebootInstancesInput{InstanceIds: texts(ids)}); err != nil {
		return fmt.Errorf("reboot instances %v: %w", ids, err)
	}
	return nil
}

// await waits until every instance is in a state, and returns them in the order
// of ids. One that is neither in it nor in one of passing, which it may be in
// before, is an error.
func (l *Lab) await(ctx context.Context, ids []vpc.InstanceID, state types.InstanceStateName, passing ...types.InstanceStateName) ([]LabInstance, error) {
	t := time.NewTicker(50 * time.Millisecond) // vpcd is local; it throttles as EC2 does only when told to
	defer t.Stop()
	for {
		all, err := l.Instances(ctx, ids)
		if err != nil {
			return nil, err
		}
		waiting := ""
		for _, i := range all {
			switch is := types.InstanceStateName(i.State); {
			case is == state:
			case slices.Contains(passing, is):
				waiting = i.Name
			default:
				return nil, fmt.Errorf("wait for instance %s (%s) to be %s: it is %s", i.Name, i.ID, state, i.State)
			}
		}
		if waiting == "" && len(all) == len(ids) {
			out := make([]LabInstance, 0, len(ids))
			for _, id := range ids {
				k := slices.IndexFunc(all, func(i LabInstance) bool { return i.ID == id })
				if k < 0 {
					return nil, fmt.Errorf("wait for instance %s: EC2 does not list it", id)
				}
				out = append(out, all[k])
			}
			return out, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for instance %s to be %s: %w", waiting, state, context.Cause(ctx))
		case <-t.C:
		}
	}
}

func texts(ids []vpc.InstanceID) []string {
	out := make([]string, len(ids))
	for i, id := range ids {
		out[i] = string(id)
	}
	return out
}

// Instances describes instances; no id means all.
func (l *Lab) Instances(ctx context.Context, ids []vpc.InstanceID) ([]LabInstance, error) {
	in := &awsec2.DescribeInstancesInput{InstanceIds: texts(ids)}
	var all []LabInstance
	for p := awsec2.NewDescribeInstancesPaginator(l.c, in); p.HasMorePages(); {
		page, err := p.NextPage(ctx)
		if err != nil {
			return nil, fmt.Errorf("describe instances: %w", err)
		}
		for _, r := range page.Reservations {
			for i := range r.Instances {
				li, err := labInstance(&r.Instances[i])
				if err != nil {
					return nil, err
				}
				all = append(all, li)
			}
		}
	}
	return all, nil
}

// Interfaces describes the network interfaces of a VPC.
func (l *Lab) Interfaces(ctx context.Context, id vpc.VPCID) ([]vpc.ENI, error) {
	in := &awsec2.DescribeNetworkInterfacesInput{
		Filters: []types.Filter{{Name: aws.String("vpc-id"), Values: []string{string(id)}}},
	}
	var all []vpc.ENI
	for p := awsec2.NewDescribeNetworkInterfacesPaginator(l.c, in); p.HasMorePages(); {
		page, err := p.NextPage(ctx)
		if err != nil {
			return nil, fmt.Errorf("describe network interfaces: %w", err)
		}
		for i := range page.NetworkInterfaces {
			e, err := labInterface(&page.NetworkInterfaces[i])
			if err != nil {
				return nil, err
			}
			all = append(all, e)
		}
	}
	return all, nil
}

func labInstance(i *types.Instance) (LabInstance, error) {
	li := LabInstance{
		ID: vpc.InstanceID(aws.ToString(i.InstanceId)), Type: string(i.InstanceType), Subnet: vpc.SubnetID(aws.ToString(i.SubnetId)),
	}
	if i.State != nil {
		li.State = string(i.State.Name)
	}
	if i.Placement != nil {
		li.Zone = aws.ToString(i.Placement.AvailabilityZone)
	}
	for _, t := range i.Tags {
		if aws.ToString(t.Key) == "Name" {
			li.Name = aws.ToString(t.Value)
		}
	}
	if s := aws.ToString(i.PrivateIpAddress); s != "" { // a terminated instance has none
		a, err := netip.ParseAddr(s)
		if err != nil {
			return li, fmt.Errorf("read the address of instance %s: %w", li.ID, err)
		}
		li.IP = a
	}
	return li, nil
}

func labInterface(n *types.NetworkInterface) (vpc.ENI, error) {
	e := vpc.ENI{
		ID: vpc.ENIID(aws.ToString(n.NetworkInterfaceId)), VPC: vpc.VPCID(aws.ToString(n.VpcId)), Subnet: vpc.SubnetID(aws.ToString(n.SubnetId)),
		MAC: aws.ToString(n.MacAddress), Description: aws.ToString(n.Description), RequesterOwned: aws.ToBool(n.RequesterManaged),
		Tags: map[string]string{},
	}
	for _, a := range n.PrivateIpAddresses {
		ip, err := netip.ParseAddr(aws.ToString(a.PrivateIpAddress))
		if err != nil {
			return e, fmt.Errorf("read an address of %s: %w", e.ID, err)
		}
		if aws.ToBool(a.Primary) {
			e.Primary = ip
		} else {
			e.Secondary = append(e.Secondary, ip)
		}
	}
	for _, p := range n.Ipv4Prefixes {
		pfx, err := netip.ParsePrefix(aws.ToString(p.Ipv4Prefix))
		if err != nil {
			return e, fmt.Errorf("read a prefix of %s: %w", e.ID, err)
		}
		e.Prefixes = append(e.Prefixes, pfx)
	}
	for _, g := range n.Groups {
		e.Groups = append(e.Groups, vpc.SecurityGroupID(aws.ToString(g.GroupId)))
	}
	for _, t := range n.TagSet {
		e.Tags[aws.ToString(t.Key)] = aws.ToString(t.Value)
	}
	if a := n.Attachment; a != nil {
		e.Instance, e.Attachment = vpc.InstanceID(aws.ToString(a.InstanceId)), vpc.AttachmentID(aws.ToString(a.AttachmentId))
		e.DeviceIndex, e.NetworkCard = int(aws.ToInt32(a.DeviceIndex)), int(aws.ToInt32(a.NetworkCardIndex))
		e.Attached = a.Status == types.AttachmentStatusAttached
		e.DeleteOnTermination = aws.ToBool(a.DeleteOnTermination)
	}
	if !e.Primary.IsValid() {
		return e, errors.New("read interface " + string(e.ID) + ": EC2 names no primary address")
	}
	return e, nil
}

func nameTag(r types.ResourceType, name string) []types.TagSpecification {
	return []types.TagSpecification{{ResourceType: r, Tags: []types.Tag{{Key: aws.String("Name"), Value: aws.String(name)}}}}
}
