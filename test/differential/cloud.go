package differential

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/test/vpcmodel"
)

// cloud makes the objects of one script in a running vpcd, by the EC2 API. ids
// has EC2's identifier of each name.
type cloud struct {
	ctx      context.Context
	endpoint string
	ids      map[string]string
	world    *vpcmodel.World // as it is in vpcd; statements are applied to both

	macs       map[vpc.ENIID]string
	devices    map[vpc.InstanceID]int // interfaces of an instance so far
	tableOf    map[vpc.SubnetID]string
	aclOf      map[vpc.SubnetID]string
	listIs     map[vpcmodel.ListID]listState
	silent     map[vpc.VPCID]string          // a group without rules, for interfaces without groups
	publics    map[netip.Addr]netip.Addr     // Elastic IPs: EC2's by the script's
	blocks     map[netip.Prefix]netip.Prefix // IPv6 blocks of VPCs: EC2's by the script's
	attachedTo map[vpcmodel.GatewayID]string // VPCs, by the script's name
	lists      int
	peerings   []string
	instances  []string
	defaults   []string // names of groups that go with their VPC
}

func (c *cloud) isDefault(name string) bool { return slices.Contains(c.defaults, name) }

type listState struct {
	version int
	cidrs   []netip.Prefix
}

func newCloud(ctx context.Context, endpoint string) *cloud {
	return &cloud{
		ctx: ctx, endpoint: endpoint, ids: map[string]string{}, world: vpcmodel.NewWorld(vpcmodel.Defaults()),
		macs: map[vpc.ENIID]string{}, devices: map[vpc.InstanceID]int{},
		tableOf: map[vpc.SubnetID]string{}, aclOf: map[vpc.SubnetID]string{}, listIs: map[vpcmodel.ListID]listState{},
		silent: map[vpc.VPCID]string{}, publics: map[netip.Addr]netip.Addr{}, blocks: map[netip.Prefix]netip.Prefix{}, attachedTo: map[vpcmodel.GatewayID]string{},
	}
}

// answer is an EC2 answer, read by element names.
type answer struct{ body []byte }

// element of an answer, without its attributes.
type element struct {
	XMLName  xml.Name
	Text     string    `xml:",chardata"`
	Children []element `xml:",any"`
}

// find calls yield with each element at a path below the root.
func (a answer) find(path []string, yield func(element)) {
	var walk func(e element, path []string)
	walk = func(e element, path []string) {
		if len(path) == 0 {
			yield(e)
			return
		}
		for _, child := range e.Children {
			if child.XMLName.Local == path[0] {
				walk(child, path[1:])
			}
		}
	}
	var root element
	if xml.Unmarshal(a.body, &root) == nil {
		walk(root, path)
	}
}

// text returns what stands at a path of elements the first time, "" if nothing does.
func (a answer) text(path ...string) string {
	var texts []string
	a.find(path, func(e element) { texts = append(texts, e.Text) })
	if len(texts) == 0 {
		return ""
	}
	return texts[0]
}

// items returns the items of the lists at a path, by element name.
func (a answer) items(path ...string) (out []map[string]string) {
	a.find(append(path, "item"), func(e element) {
		m := map[string]string{}
		for _, child := range e.Children {
			m[child.XMLName.Local] = child.Text
		}
		out = append(out, m)
	})
	return out
}

// call sends one call; params are "Name", "value", ….
func (c *cloud) call(action string, params ...string) (answer, error) {
	form := url.Values{"Action": {action}, "Version": {"2016-11-15"}}
	for i := 0; i < len(params); i += 2 {
		form.Set(params[i], params[i+1])
	}
	req, err := http.NewRequestWithContext(c.ctx, http.MethodPost, c.endpoint+"/", strings.NewReader(form.Encode()))
	if err != nil {
		return answer{}, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
	req.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=test/20260102/us-east-1/ec2/aws4_request, SignedHeaders=host, Signature=0")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return answer{}, err
	}
	if resp.StatusCode != http.StatusOK {
		return answer{}, fmt.Errorf("%s %v: %s: %s", action, params, resp.Status, b)
	}
	return answer{b}, nil
}

// create makes an object and notes its identifier.
func (c *cloud) create(name string, path []string, action string, params ...string) error {
	a, err := c.call(action, params...)
	if err != nil {
		return err
	}
	if c.ids[name] = a.text(path...); c.ids[name] == "" {
		return fmt.Errorf("%s names no identifier: %s", action, a.body)
	}
	return nil
}

func (c *cloud) do(action string, params ...string) error {
	_, err := c.call(action, params...)
	return err
}

func id[T ~string](c *cloud, name T) string {
	if known := c.ids[string(name)]; known != "" {
		return known
	}
	return "unknown-" + string(name)
}

// protocolOf is how the API spells a protocol.
func protocolOf(n int) string { return strconv.Itoa(n) }

// permission are the parameters of one rule of a group.
func (c *cloud) permission(group vpc.SecurityGroupID, r vpcmodel.Rule) []string {
	const head = "IpPermissions.1."
	params := []string{"GroupId", id(c, group), head + "IpProtocol", protocolOf(r.Proto)}
	if r.Proto == 6 || r.Proto == 17 || r.Proto == 1 || r.Proto == 58 {
		params = append(params, head+"FromPort", strconv.Itoa(r.From), head+"ToPort", strconv.Itoa(r.To))
	}
	switch {
	case r.Group != "":
		params = append(params, head+"Groups.1.GroupId", id(c, r.Group))
	case r.List != "":
		params = append(params, head+"PrefixListIds.1.PrefixListId", id(c, r.List))
	case r.CIDR.Addr().Is6():
		params = append(params, head+"Ipv6Ranges.1.CidrIpv6", c.block(r.CIDR).String())
	default:
		params = append(params, head+"IpRanges.1.CidrIp", r.CIDR.String())
	}
	return params
}

// apply makes what a statement says, in the model's world and in vpcd.
func (c *cloud) apply(st vpcmodel.Statement) error {
	if err := st.Apply(c.world); err != nil {
		return err
	}
	return c.make(st)
}

// make makes what a statement says in vpcd alone.
func (c *cloud) make(st vpcmodel.Statement) error {
	switch s := st.(type) {
	case vpcmodel.MakeVPC:
		if err := c.create(string(s.ID), []string{"vpc", "vpcId"}, "CreateVpc", "CidrBlock", s.CIDRs[0].String(), "AmazonProvidedIpv6CidrBlock", strconv.FormatBool(c.hasIPv6(s.ID))); err != nil {
			return err
		}
		for _, more := range s.CIDRs[1:] {
			if more.Addr().Is6() {
				if err := c.learnBlock(s.ID, more); err != nil {
					return err
				}
				continue
			}
			if err := c.do("AssociateVpcCidrBlock", "VpcId", id(c, s.ID), "CidrBlock", more.String()); err != nil {
				return err
			}
		}
		return nil
	case vpcmodel.MakeSubnet:
		params := []string{"VpcId", id(c, s.VPC), "CidrBlock", s.CIDR.String(), "AvailabilityZone", "us-east-1a"}
		if s.CIDR6.IsValid() {
			params = append(params, "Ipv6CidrBlock", c.block(s.CIDR6).String())
		}
		return c.create(string(s.ID), []string{"subnet", "subnetId"}, "CreateSubnet", params...)
	case vpcmodel.MakeENI:
		return c.makeENI(s)
	case vpcmodel.MakeGroup:
		return c.makeGroup(s)
	case vpcmodel.Allow:
		action := "AuthorizeSecurityGroupIngress"
		if s.Dir == vpcmodel.Out {
			action = "AuthorizeSecurityGroupEgress"
		}
		return c.do(action, c.permission(s.Group, s.Rule)...)
	case vpcmodel.Revoke:
		action := "RevokeSecurityGroupIngress"
		if s.Dir == vpcmodel.Out {
			action = "RevokeSecurityGroupEgress"
		}
		return c.do(action, c.permission(s.Group, s.Rule)...)
	case vpcmodel.DeleteGroup:
		return c.do("DeleteSecurityGroup", "GroupId", id(c, s.ID))
	case vpcmodel.SetGroups:
		return c.setGroups(s)
	case vpcmodel.SetCheck:
		return c.do("ModifyNetworkInterfaceAttribute", "NetworkInterfaceId", id(c, s.ENI), "SourceDestCheck.Value", strconv.FormatBool(s.On))
	case vpcmodel.SetTimeouts:
		return c.do("ModifyNetworkInterfaceAttribute", "NetworkInterfaceId", id(c, s.ENI),
			"ConnectionTrackingSpecification.TcpEstablishedTimeout", strconv.Itoa(int(s.TCPEstablished.Seconds())),
			"ConnectionTrackingSpecification.UdpStreamTimeout", strconv.Itoa(int(s.UDPStream.Seconds())),
			"ConnectionTrackingSpecification.UdpTimeout", strconv.Itoa(int(s.UDP.Seconds())))
	case vpcmodel.Assign:
		return c.assign("Assign", s.ENI, s.CIDR)
	case vpcmodel.Unassign:
		return c.assign("Unassign", s.ENI, s.CIDR)
	case vpcmodel.Detach:
		return c.detach(s.ENI)
	case vpcmodel.Attach:
		device := c.devices[s.To]
		c.devices[s.To]++
		return c.attach(vpcmodel.MakeENI{ID: s.ENI, Instance: s.To}, id(c, s.ENI), device)
	case vpcmodel.SetList:
		return c.setList(s)
	case vpcmodel.Wait:
		return errors.New("the fabric's clock is the machine's")
	default:
		return c.applyBoundary(st)
	}
}

func (c *cloud) makeGroup(s vpcmodel.MakeGroup) error {
	if s.As == "defaultgroup" {
		a, err := c.call("DescribeSecurityGroups", "Filter.1.Name", "vpc-id", "Filter.1.Value.1", id(c, s.VPC), "Filter.2.Name", "group-name", "Filter.2.Value.1", "default")
		if err != nil {
			return err
		}
		c.ids[string(s.ID)] = a.text("securityGroupInfo", "item", "groupId")
		c.defaults = append(c.defaults, string(s.ID))
		return nil
	}
	err := c.create(string(s.ID), []string{"groupId"}, "CreateSecurityGroup", "GroupName", string(s.ID), "GroupDescription", "of a test", "VpcId", id(c, s.VPC))
	if err != nil || s.As == "newgroup" {
		return err
	}
	return c.allowNothing(s.VPC, id(c, s.ID))
}

// allowNothing revokes what a new group allows.
func (c *cloud) allowNothing(v vpc.VPCID, group string) error {
	params := []string{"GroupId", group, "IpPermissions.1.IpProtocol", "-1", "IpPermissions.1.IpRanges.1.CidrIp", "0.0.0.0/0"}
	if c.hasIPv6(v) {
		params = append(params, "IpPermissions.2.IpProtocol", "-1", "IpPermissions.2.Ipv6Ranges.1.CidrIpv6", "::/0")
	}
	return c.do("RevokeSecurityGroupEgress", params...)
}

// silentGroup is a group of a VPC that allows nothing.
func (c *cloud) silentGroup(v vpc.VPCID) (string, error) {
	if c.silent[v] == "" {
		name := "silent-" + string(v)
		if err := c.create(name, []string{"groupId"}, "CreateSecurityGroup", "GroupName", name, "GroupDescription", "allows nothing", "VpcId", id(c, v)); err != nil {
			return "", err
		}
		c.silent[v] = c.ids[name]
		if err := c.allowNothing(v, c.silent[v]); err != nil {
			return "", err
		}
	}
	return c.silent[v], nil
}

func (c *cloud) vpcOf(s vpc.SubnetID) vpc.VPCID { return c.world.Subnets[s].VPC }

func (c *cloud) makeENI(s vpcmodel.MakeENI) error {
	group, err := c.silentGroup(c.vpcOf(s.Subnet))
	if err != nil {
		return err
	}
	params := []string{"SubnetId", id(c, s.Subnet), "SecurityGroupId.1", group, "PrivateIpAddress", s.Primary.String()}
	a, err := c.call("CreateNetworkInterface", params...)
	if err != nil {
		return err
	}
	eni := a.text("networkInterface", "networkInterfaceId")
	c.ids[string(s.ID)], c.macs[s.ID] = eni, a.text("networkInterface", "macAddress")
	for _, o := range s.Others {
		if err := c.assign("Assign", s.ID, o); err != nil {
			return err
		}
	}
	device := c.devices[s.Instance]
	c.devices[s.Instance]++
	if device > 0 {
		return c.attach(s, eni, device)
	}
	err = c.create(string(s.Instance), []string{"instancesSet", "item", "instanceId"}, "RunInstances", "ImageId", "ami-00000000000000001", "InstanceType", "m5.4xlarge",
		"MinCount", "1", "MaxCount", "1", "NetworkInterface.1.DeviceIndex", "0", "NetworkInterface.1.NetworkInterfaceId", eni)
	c.instances = append(c.instances, c.ids[string(s.Instance)])
	return err
}

// attach attaches an interface once its instance runs.
func (c *cloud) attach(s vpcmodel.MakeENI, eni string, device int) error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := c.create("attachment of "+string(s.ID), []string{"attachmentId"}, "AttachNetworkInterface",
			"NetworkInterfaceId", eni, "InstanceId", id(c, s.Instance), "DeviceIndex", strconv.Itoa(device))
		if err == nil || !strings.Contains(err.Error(), "IncorrectState") || time.Now().After(deadline) {
			return err
		}
		<-time.After(5 * time.Millisecond)
	}
}

func (c *cloud) setGroups(s vpcmodel.SetGroups) error {
	params := []string{"NetworkInterfaceId", id(c, s.ENI)}
	for i, g := range s.Groups {
		params = append(params, fmt.Sprintf("SecurityGroupId.%d", i+1), id(c, g))
	}
	if len(s.Groups) == 0 {
		group, err := c.silentGroup(c.vpcOf(c.world.ENIs[s.ENI].Subnet))
		if err != nil {
			return err
		}
		params = append(params, "SecurityGroupId.1", group)
	}
	return c.do("ModifyNetworkInterfaceAttribute", params...)
}

// assign assigns an address or a prefix, or unassigns it: what is "Assign" or
// "Unassign".
func (c *cloud) assign(what string, eni vpc.ENIID, cidr netip.Prefix) error {
	action, one, many := what+"PrivateIpAddresses", "PrivateIpAddress.1", "Ipv4Prefix.1"
	if cidr.Addr().Is6() {
		action, one, many = what+"Ipv6Addresses", "Ipv6Addresses.1", "Ipv6Prefix.1"
		cidr = c.block(cidr)
	}
	if cidr.IsSingleIP() {
		return c.do(action, "NetworkInterfaceId", id(c, eni), one, cidr.Addr().String())
	}
	return c.do(action, "NetworkInterfaceId", id(c, eni), many, cidr.String())
}

func (c *cloud) detach(eni vpc.ENIID) error {
	attachment := c.ids["attachment of "+string(eni)]
	if attachment == "" {
		return fmt.Errorf("%s is its instance's first interface, which cannot be detached", eni)
	}
	return c.do("DetachNetworkInterface", "AttachmentId", attachment)
}

func (c *cloud) setList(s vpcmodel.SetList) error {
	old, made := c.listIs[s.ID]
	if !made {
		c.lists++
		family := "IPv4"
		if s.CIDRs[0].Addr().Is6() {
			family = "IPv6"
		}
		params := []string{"PrefixListName", string(s.ID), "MaxEntries", "10", "AddressFamily", family}
		for i, cidr := range s.CIDRs {
			params = append(params, fmt.Sprintf("Entry.%d.Cidr", i+1), c.block(cidr).String())
		}
		if err := c.create(string(s.ID), []string{"prefixList", "prefixListId"}, "CreateManagedPrefixList", params...); err != nil {
			return err
		}
		c.listIs[s.ID] = listState{1, s.CIDRs}
		return nil
	}
	params := []string{"PrefixListId", id(c, s.ID), "CurrentVersion", strconv.Itoa(old.version)}
	added, removed := difference(s.CIDRs, old.cidrs), difference(old.cidrs, s.CIDRs)
	if len(added)+len(removed) == 0 {
		return nil
	}
	for i, cidr := range added {
		params = append(params, fmt.Sprintf("AddEntry.%d.Cidr", i+1), c.block(cidr).String())
	}
	for i, cidr := range removed {
		params = append(params, fmt.Sprintf("RemoveEntry.%d.Cidr", i+1), c.block(cidr).String())
	}
	if err := c.do("ModifyManagedPrefixList", params...); err != nil {
		return err
	}
	c.listIs[s.ID] = listState{old.version + 1, s.CIDRs}
	return nil
}

// difference returns what a has and b lacks.
func difference(a, b []netip.Prefix) (out []netip.Prefix) {
	in := map[netip.Prefix]bool{}
	for _, c := range b {
		in[c] = true
	}
	for _, c := range a {
		if !in[c] {
			out = append(out, c)
		}
	}
	return out
}
