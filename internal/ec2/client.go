package ec2

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/aws-sdk-go-v2/config"
	awsec2 "github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// api lists the calls that are made, and no others: the node's IAM policy
// needs exactly these, and docs/reference/iam-policy.json is made of them.
type api interface {
	DescribeNetworkInterfaces(context.Context, *awsec2.DescribeNetworkInterfacesInput, ...func(*awsec2.Options)) (*awsec2.DescribeNetworkInterfacesOutput, error)
	DescribeSubnets(context.Context, *awsec2.DescribeSubnetsInput, ...func(*awsec2.Options)) (*awsec2.DescribeSubnetsOutput, error)
	DescribeInstanceTypes(context.Context, *awsec2.DescribeInstanceTypesInput, ...func(*awsec2.Options)) (*awsec2.DescribeInstanceTypesOutput, error)
	CreateNetworkInterface(context.Context, *awsec2.CreateNetworkInterfaceInput, ...func(*awsec2.Options)) (*awsec2.CreateNetworkInterfaceOutput, error)
	AttachNetworkInterface(context.Context, *awsec2.AttachNetworkInterfaceInput, ...func(*awsec2.Options)) (*awsec2.AttachNetworkInterfaceOutput, error)
	ModifyNetworkInterfaceAttribute(context.Context, *awsec2.ModifyNetworkInterfaceAttributeInput, ...func(*awsec2.Options)) (*awsec2.ModifyNetworkInterfaceAttributeOutput, error)
	DetachNetworkInterface(context.Context, *awsec2.DetachNetworkInterfaceInput, ...func(*awsec2.Options)) (*awsec2.DetachNetworkInterfaceOutput, error)
	DeleteNetworkInterface(context.Context, *awsec2.DeleteNetworkInterfaceInput, ...func(*awsec2.Options)) (*awsec2.DeleteNetworkInterfaceOutput, error)
	DescribeInstances(context.Context, *awsec2.DescribeInstancesInput, ...func(*awsec2.Options)) (*awsec2.DescribeInstancesOutput, error)
	AssignPrivateIpAddresses(context.Context, *awsec2.AssignPrivateIpAddressesInput, ...func(*awsec2.Options)) (*awsec2.AssignPrivateIpAddressesOutput, error)
	UnassignPrivateIpAddresses(context.Context, *awsec2.UnassignPrivateIpAddressesInput, ...func(*awsec2.Options)) (*awsec2.UnassignPrivateIpAddressesOutput, error)
	DescribeVpcPeeringConnections(context.Context, *awsec2.DescribeVpcPeeringConnectionsInput, ...func(*awsec2.Options)) (*awsec2.DescribeVpcPeeringConnectionsOutput, error)
	DescribeSecurityGroups(context.Context, *awsec2.DescribeSecurityGroupsInput, ...func(*awsec2.Options)) (*awsec2.DescribeSecurityGroupsOutput, error)
	DescribeSecurityGroupRules(context.Context, *awsec2.DescribeSecurityGroupRulesInput, ...func(*awsec2.Options)) (*awsec2.DescribeSecurityGroupRulesOutput, error)
	DescribeManagedPrefixLists(context.Context, *awsec2.DescribeManagedPrefixListsInput, ...func(*awsec2.Options)) (*awsec2.DescribeManagedPrefixListsOutput, error)
	GetManagedPrefixListEntries(context.Context, *awsec2.GetManagedPrefixListEntriesInput, ...func(*awsec2.Options)) (*awsec2.GetManagedPrefixListEntriesOutput, error)
}

const (
	// callTimeout bounds one call; EC2 answers mutations within a second or
	// two, and a node that waits has pods that wait.
	callTimeout = 15 * time.Second
	// detachTimeout bounds the wait for an interface to come off an instance:
	// seconds on a good day, a minute and more on a bad one.
	detachTimeout = 2 * time.Minute
	detachPoll    = time.Second
	// again is the first delay before a throttled second half of a read is
	// tried again, doubled each time: a minute or so in all.
	again      = time.Second
	againTries = 6
)

// Client makes the node's calls.
type Client struct {
	api   api
	poll  time.Duration // between looks at a detaching interface
	again time.Duration
}

// New returns a client for the region, configured as the SDK documents it:
// environment, shared files, the instance's role; AWS_ENDPOINT_URL_EC2 for
// another endpoint.
func New(ctx context.Context, region string) (*Client, error) {
	cfg, err := config.LoadDefaultConfig(ctx, config.WithRegion(region), config.WithRetryer(func() aws.Retryer { return aws.NopRetryer{} }))
	if err != nil {
		return nil, fmt.Errorf("load the AWS configuration: %w; check AWS_PROFILE and the shared files", err)
	}
	return &Client{api: awsec2.NewFromConfig(cfg), poll: detachPoll, again: again}, nil
}

// Interfaces returns every interface that is attached to the instance, and
// those that are attached nowhere and carry tag with the instance as its value.
func (c *Client) Interfaces(ctx context.Context, instance vpc.InstanceID, tag string) ([]vpc.ENI, error) {
	out, err := c.interfaces(ctx, filter("attachment.instance-id", string(instance)))
	if err != nil {
		return nil, fmt.Errorf("describe the interfaces of %s: %w", instance, err)
	}
	// The first half was let through: while the account is short of requests it
	// would be a waste to begin anew for the second, as every other node does.
	var loose []vpc.ENI
	for delay := c.again; ; delay *= 2 {
		loose, err = c.interfaces(ctx, filter("tag:"+tag, string(instance)), filter("status", "available"))
		if err == nil {
			break
		}
		if !isThrottled(err) || delay >= c.again<<againTries {
			return nil, fmt.Errorf("describe the detached interfaces of %s: %w", instance, err)
		}
		t := time.NewTimer(delay/2 + rand.N(delay))
		select {
		case <-ctx.Done():
			t.Stop()
			return nil, fmt.Errorf("describe the detached interfaces of %s: %w", instance, context.Cause(ctx))
		case <-t.C:
		}
	}
	for _, e := range loose {
		// One that was attached between the two reads is in both.
		if !slices.ContainsFunc(out, func(o vpc.ENI) bool { return o.ID == e.ID }) {
			out = append(out, e)
		}
	}
	return out, nil
}

// Detached returns the interfaces that are attached nowhere and carry the tag
// with this value.
func (c *Client) Detached(ctx context.Context, tag, value string) ([]vpc.ENI, error) {
	out, err := c.interfaces(ctx, filter("tag:"+tag, value), filter("status", "available"))
	if err != nil {
		return nil, fmt.Errorf("describe the detached interfaces of %s: %w", value, err)
	}
	return out, nil
}

// maxFilterValues is how many values EC2 takes in one filter.
const maxFilterValues = 200

// Alive returns which of the instances exist and are not on their way out.
func (c *Client) Alive(ctx context.Context, ids []vpc.InstanceID) (map[vpc.InstanceID]bool, error) {
	alive := map[vpc.InstanceID]bool{}
	for some := range slices.Chunk(ids, maxFilterValues) {
		values := make([]string, len(some))
		for i, id := range some {
			values[i] = string(id)
		}
		// By filter: asking for the ID of one that is gone is an error.
		in := &awsec2.DescribeInstancesInput{MaxResults: aws.Int32(1000), Filters: []types.Filter{filter("instance-id", values...),
			filter("instance-state-name", "pending", "running", "stopping", "stopped")}}
		for {
			page, err := read(ctx, c.api.DescribeInstances, in)
			if err != nil {
				return nil, fmt.Errorf("describe %d instances: %w", len(ids), err)
			}
			for _, r := range page.Reservations {
				for _, i := range r.Instances {
					alive[vpc.InstanceID(aws.ToString(i.InstanceId))] = true
				}
			}
			if aws.ToString(page.NextToken) == "" {
				break
			}
			in.NextToken = page.NextToken
		}
	}
	return alive, nil
}

func filter(name string, values ...string) types.Filter {
	return types.Filter{Name: aws.String(name), Values: values}
}

func (c *Client) interfaces(ctx context.Context, filters ...types.Filter) ([]vpc.ENI, error) {
	var out []vpc.ENI
	in := &awsec2.DescribeNetworkInterfacesInput{Filters: filters, MaxResults: aws.Int32(1000)}
	for {
		page, err := read(ctx, c.api.DescribeNetworkInterfaces, in)
		if err != nil {
			return nil, err
		}
		for i := range page.NetworkInterfaces {
			e, err := eni(&page.NetworkInterfaces[i])
			if err != nil {
				return nil, err
			}
			out = append(out, e)
		}
		if aws.ToString(page.NextToken) == "" {
			return out, nil
		}
		in.NextToken = page.NextToken
	}
}

// Subnet describes one subnet.
func (c *Client) Subnet(ctx context.Context, id vpc.SubnetID) (vpc.Subnet, error) {
	out, err := read(ctx, c.api.DescribeSubnets, &awsec2.DescribeSubnetsInput{SubnetIds: []string{string(id)}})
	if err != nil {
		return vpc.Subnet{}, fmt.Errorf("describe %s: %w", id, err)
	}
	if len(out.Subnets) != 1 {
		return vpc.Subnet{}, fmt.Errorf("describe %s: %d subnets answered", id, len(out.Subnets))
	}
	s := &out.Subnets[0]
	cidr, err := netip.ParsePrefix(aws.ToString(s.CidrBlock))
	if err != nil {
		return vpc.Subnet{}, fmt.Errorf("describe %s: %w", id, err)
	}
	return vpc.Subnet{ID: id, VPC: vpc.VPCID(aws.ToString(s.VpcId)), CIDR: cidr, AvailabilityZone: aws.ToString(s.AvailabilityZone),
		Available: int(aws.ToInt32(s.AvailableIpAddressCount))}, nil
}

// Limits returns what an instance type holds: from the built-in table, or from
// EC2 for a type that is newer.
func (c *Client) Limits(ctx context.Context, instanceType string) (vpc.InstanceLimits, error) {
	if l, ok := vpc.LimitsOf(instanceType); ok {
		return l, nil
	}
	out, err := read(ctx, c.api.DescribeInstanceTypes, &awsec2.DescribeInstanceTypesInput{InstanceTypes: []types.InstanceType{types.InstanceType(instanceType)}})
	if err != nil {
		return vpc.InstanceLimits{}, fmt.Errorf("describe instance type %s: %w", instanceType, err)
	}
	if len(out.InstanceTypes) != 1 || out.InstanceTypes[0].NetworkInfo == nil {
		return vpc.InstanceLimits{}, fmt.Errorf("describe instance type %s: no network limits answered", instanceType)
	}
	t := &out.InstanceTypes[0]
	n := t.NetworkInfo
	l := vpc.InstanceLimits{Type: instanceType, ENIs: int(aws.ToInt32(n.MaximumNetworkInterfaces)), IPv4PerENI: int(aws.ToInt32(n.Ipv4AddressesPerInterface)),
		IPv6PerENI: int(aws.ToInt32(n.Ipv6AddressesPerInterface)), NetworkCards: int(aws.ToInt32(n.MaximumNetworkCards)),
		Hypervisor: string(t.Hypervisor), BareMetal: aws.ToBool(t.BareMetal), CurrentGeneration: aws.ToBool(t.CurrentGeneration)}
	l.ENIsDefaultCard = l.ENIs
	if c := n.ConnectionTrackingConfiguration; c != nil {
		l.TCPEstablished = int(aws.ToInt32(c.DefaultTcpEstablishedTimeout))
	}
	for _, card := range n.NetworkCards {
		if aws.ToInt32(card.NetworkCardIndex) == aws.ToInt32(n.DefaultNetworkCardIndex) {
			l.ENIsDefaultCard = int(aws.ToInt32(card.MaximumNetworkInterfaces))
		}
	}
	return l, nil
}

// AssignAddresses adds n secondary addresses to an interface. EC2 may give
// fewer.
func (c *Client) AssignAddresses(ctx context.Context, id vpc.ENIID, n int) ([]netip.Addr, error) {
	out, err := call(ctx, c.api.AssignPrivateIpAddresses, &awsec2.AssignPrivateIpAddressesInput{
		NetworkInterfaceId: aws.String(string(id)), SecondaryPrivateIpAddressCount: aws.Int32(int32(n))})
	if err != nil {
		return nil, fmt.Errorf("assign %d addresses to %s: %w", n, id, err)
	}
	var addrs []netip.Addr
	for _, a := range out.AssignedPrivateIpAddresses {
		addr, err := netip.ParseAddr(aws.ToString(a.PrivateIpAddress))
		if err != nil {
			return nil, fmt.Errorf("assign %d addresses to %s: %w", n, id, err)
		}
		addrs = append(addrs, addr)
	}
	return addrs, nil
}

// AssignPrefixes adds n delegated /28 prefixes to an interface. EC2 may give
// fewer.
func (c *Client) AssignPrefixes(ctx context.Context, id vpc.ENIID, n int) ([]netip.Prefix, error) {
	out, err := call(ctx, c.api.AssignPrivateIpAddresses, &awsec2.AssignPrivateIpAddressesInput{
		NetworkInterfaceId: aws.String(string(id)), Ipv4PrefixCount: aws.Int32(int32(n))})
	if err != nil {
		return nil, fmt.Errorf("assign %d prefixes to %s: %w", n, id, err)
	}
	var prefixes []netip.Prefix
	for _, p := range out.AssignedIpv4Prefixes {
		prefix, err := netip.ParsePrefix(aws.ToString(p.Ipv4Prefix))
		if err != nil {
			return nil, fmt.Errorf("assign %d prefixes to %s: %w", n, id, err)
		}
		prefixes = append(prefixes, prefix)
	}
	return prefixes, nil
}

// Unassign takes addresses and prefixes off an interface.
func (c *Client) Unassign(ctx context.Context, id vpc.ENIID, addrs []netip.Addr, prefixes []netip.Prefix) error {
	in := &awsec2.UnassignPrivateIpAddressesInput{NetworkInterfaceId: aws.String(string(id))}
	for _, a := range addrs {
		in.PrivateIpAddresses = append(in.PrivateIpAddresses, a.String())
	}
	for _, p := range prefixes {
		in.Ipv4Prefixes = append(in.Ipv4Prefixes, p.String())
	}
	if _, err := call(ctx, c.api.UnassignPrivateIpAddresses, in); err != nil {
		return fmt.Errorf("unassign %d addresses and %d prefixes from %s: %w", len(addrs), len(prefixes), id, err)
	}
	return nil
}

// NewInterface says what CreateInterface makes.
type NewInterface struct {
	Subnet      vpc.SubnetID
	Groups      []vpc.SecurityGroupID
	Addresses   int // secondary ones, beside the primary
	Prefixes    int // instead of Addresses
	Description string
	Tags        map[string]string
	Token       string // the same token and parameters make one interface, however often they are sent
}

// CreateInterface makes an interface with its addresses and tags.
func (c *Client) CreateInterface(ctx context.Context, n NewInterface) (vpc.ENI, error) {
	in := &awsec2.CreateNetworkInterfaceInput{
		SubnetId: aws.String(string(n.Subnet)), ClientToken: aws.String(n.Token), Description: aws.String(n.Description),
		TagSpecifications: []types.TagSpecification{{ResourceType: types.ResourceTypeNetworkInterface, Tags: tags(n.Tags)}},
	}
	for _, g := range n.Groups {
		in.Groups = append(in.Groups, string(g))
	}
	if n.Addresses > 0 {
		in.SecondaryPrivateIpAddressCount = aws.Int32(int32(n.Addresses))
	}
	if n.Prefixes > 0 {
		in.Ipv4PrefixCount = aws.Int32(int32(n.Prefixes))
	}
	out, err := call(ctx, c.api.CreateNetworkInterface, in)
	if err != nil {
		return vpc.ENI{}, fmt.Errorf("create an interface in %s: %w", n.Subnet, err)
	}
	if out.NetworkInterface == nil {
		return vpc.ENI{}, fmt.Errorf("create an interface in %s: none answered", n.Subnet)
	}
	return eni(out.NetworkInterface)
}

// AttachInterface attaches an interface to an instance. It answers as soon as
// EC2 does; the device appears some seconds later.
func (c *Client) AttachInterface(ctx context.Context, id vpc.ENIID, instance vpc.InstanceID, device int) (vpc.AttachmentID, error) {
	out, err := call(ctx, c.api.AttachNetworkInterface, &awsec2.AttachNetworkInterfaceInput{
		NetworkInterfaceId: aws.String(string(id)), InstanceId: aws.String(string(instance)), DeviceIndex: aws.Int32(int32(device))})
	if err != nil {
		return "", fmt.Errorf("attach %s at index %d: %w", id, device, err)
	}
	return vpc.AttachmentID(aws.ToString(out.AttachmentId)), nil
}

// SetDeleteOnTermination makes an interface go when its instance goes.
func (c *Client) SetDeleteOnTermination(ctx context.Context, id vpc.ENIID, att vpc.AttachmentID) error {
	_, err := call(ctx, c.api.ModifyNetworkInterfaceAttribute, &awsec2.ModifyNetworkInterfaceAttributeInput{
		NetworkInterfaceId: aws.String(string(id)),
		Attachment:         &types.NetworkInterfaceAttachmentChanges{AttachmentId: aws.String(string(att)), DeleteOnTermination: aws.Bool(true)}})
	if err != nil {
		return fmt.Errorf("set delete-on-termination of %s: %w", id, err)
	}
	return nil
}

// DeleteInterface detaches an interface, if att is not empty, waits until it
// is off, and deletes it. An interface that is gone already is no error.
func (c *Client) DeleteInterface(ctx context.Context, id vpc.ENIID, att vpc.AttachmentID) error {
	if att != "" {
		_, err := call(ctx, c.api.DetachNetworkInterface, &awsec2.DetachNetworkInterfaceInput{AttachmentId: aws.String(string(att))})
		if err != nil && !isNotFound(err) && code(err) != "IncorrectState" {
			return fmt.Errorf("detach %s: %w", id, err)
		}
		ctx, cancel := context.WithTimeout(ctx, detachTimeout)
		defer cancel()
		if err := c.awaitDetached(ctx, id); err != nil {
			return err
		}
	}
	_, err := call(ctx, c.api.DeleteNetworkInterface, &awsec2.DeleteNetworkInterfaceInput{NetworkInterfaceId: aws.String(string(id))})
	if err != nil && !isNotFound(err) {
		return fmt.Errorf("delete %s: %w", id, err)
	}
	return nil
}

func (c *Client) awaitDetached(ctx context.Context, id vpc.ENIID) error {
	tick := time.NewTicker(c.poll)
	defer tick.Stop()
	for {
		// By filter: asking for the ID of one that is gone is an error.
		found, err := c.api.DescribeNetworkInterfaces(ctx, &awsec2.DescribeNetworkInterfacesInput{
			Filters: []types.Filter{filter("network-interface-id", string(id))}, MaxResults: aws.Int32(5)})
		switch {
		case err != nil && !isThrottled(err):
			return fmt.Errorf("wait until %s is detached: %w", id, err)
		case err == nil && (len(found.NetworkInterfaces) == 0 || found.NetworkInterfaces[0].Status == types.NetworkInterfaceStatusAvailable):
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait until %s is detached: %w", id, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

type meterKey struct{}

// Metered returns a context with which a Client asks wait before each request,
// each page of an answer included, and does not send it if that returns an error.
func Metered(ctx context.Context, wait func(context.Context) error) context.Context {
	return context.WithValue(ctx, meterKey{}, wait)
}

// Meter asks what Metered has put into ctx, if anything: for those who stand in
// for a Client in tests.
func Meter(ctx context.Context) error {
	if wait, ok := ctx.Value(meterKey{}).(func(context.Context) error); ok {
		return wait(ctx)
	}
	return nil
}

// call makes one call within callTimeout.
func call[In, Out any](ctx context.Context, fn func(context.Context, *In, ...func(*awsec2.Options)) (*Out, error), in *In) (*Out, error) {
	if err := Meter(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, callTimeout, errors.New("no answer within "+callTimeout.String()))
	defer cancel()
	return fn(ctx, in)
}

// read is call for what changes nothing. It asks once more if the connection broke,
// which happens to net/http now and then with an answer half read
// (https://github.com/aws/aws-sdk-go-v2/issues/2737).
func read[In, Out any](ctx context.Context, fn func(context.Context, *In, ...func(*awsec2.Options)) (*Out, error), in *In) (*Out, error) {
	out, err := call(ctx, fn, in)
	if err != nil && ctx.Err() == nil && (retry.RetryableConnectionError{}).IsErrorRetryable(err).Bool() {
		return call(ctx, fn, in)
	}
	return out, err
}

func tags(m map[string]string) []types.Tag {
	var out []types.Tag
	for k, v := range m {
		out = append(out, types.Tag{Key: aws.String(k), Value: aws.String(v)})
	}
	slices.SortFunc(out, func(a, b types.Tag) int { return strings.Compare(*a.Key, *b.Key) }) // one form per token
	return out
}

func seconds(n *int32) time.Duration { return time.Duration(aws.ToInt32(n)) * time.Second }

// eni translates EC2's description of an interface. Detaching counts as
// detached: nothing may rely on it any more.
func eni(n *types.NetworkInterface) (vpc.ENI, error) {
	e := vpc.ENI{
		ID: vpc.ENIID(aws.ToString(n.NetworkInterfaceId)), VPC: vpc.VPCID(aws.ToString(n.VpcId)), Subnet: vpc.SubnetID(aws.ToString(n.SubnetId)),
		MAC: strings.ToLower(aws.ToString(n.MacAddress)), Description: aws.ToString(n.Description), RequesterOwned: aws.ToBool(n.RequesterManaged), Type: string(n.InterfaceType),
		Tags: make(map[string]string, len(n.TagSet)),
	}
	for _, t := range n.TagSet {
		e.Tags[aws.ToString(t.Key)] = aws.ToString(t.Value)
	}
	for _, g := range n.Groups {
		e.Groups = append(e.Groups, vpc.SecurityGroupID(aws.ToString(g.GroupId)))
	}
	if c := n.ConnectionTrackingConfiguration; c != nil {
		e.Idle = vpc.IdleTimeouts{TCPEstablished: seconds(c.TcpEstablishedTimeout), UDP: seconds(c.UdpTimeout), UDPStream: seconds(c.UdpStreamTimeout)}
	}
	var err error
	if p := aws.ToString(n.PrivateIpAddress); p != "" {
		if e.Primary, err = netip.ParseAddr(p); err != nil {
			return e, fmt.Errorf("read %s: %w", e.ID, err)
		}
	}
	for _, a := range n.PrivateIpAddresses {
		addr, err := netip.ParseAddr(aws.ToString(a.PrivateIpAddress))
		if err != nil {
			return e, fmt.Errorf("read %s: %w", e.ID, err)
		}
		// An address that EC2 gave by itself, at launch, has no allocation.
		if a.Association != nil && aws.ToString(a.Association.AllocationId) != "" {
			e.Elastic = append(e.Elastic, addr)
		}
		if aws.ToBool(a.Primary) || addr == e.Primary {
			e.Primary = addr
			continue
		}
		e.Secondary = append(e.Secondary, addr)
	}
	for _, p := range n.Ipv4Prefixes {
		prefix, err := netip.ParsePrefix(aws.ToString(p.Ipv4Prefix))
		if err != nil {
			return e, fmt.Errorf("read %s: %w", e.ID, err)
		}
		e.Prefixes = append(e.Prefixes, prefix)
	}
	if a := n.Attachment; a != nil && (a.Status == types.AttachmentStatusAttaching || a.Status == types.AttachmentStatusAttached) {
		e.Instance, e.Attachment = vpc.InstanceID(aws.ToString(a.InstanceId)), vpc.AttachmentID(aws.ToString(a.AttachmentId))
		e.DeviceIndex, e.NetworkCard = int(aws.ToInt32(a.DeviceIndex)), int(aws.ToInt32(a.NetworkCardIndex))
		e.Attached, e.DeleteOnTermination = a.Status == types.AttachmentStatusAttached, aws.ToBool(a.DeleteOnTermination)
	}
	return e, nil
}
