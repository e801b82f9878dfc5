package api

import (
	"cmp"
	"context"
	"net/netip"
	"strconv"
	"strings"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func (a *API) instanceHandlers(h map[string]query.Handler) {
	h["RunInstances"] = handle("RunInstances",
		"ImageId InstanceType MinCount MaxCount SubnetId SecurityGroupId PrivateIpAddress KeyName UserData ClientToken TagSpecification"+
			" IamInstanceProfile Monitoring DisableApiTermination DisableApiStop InstanceInitiatedShutdownBehavior PrivateDnsNameOptions.HostnameType PrivateDnsNameOptions.EnableResourceNameDnsARecord"+
			" Placement.AvailabilityZone Placement.AvailabilityZoneId"+
			" MetadataOptions.HttpTokens MetadataOptions.HttpPutResponseHopLimit MetadataOptions.HttpEndpoint MetadataOptions.InstanceMetadataTags"+
			" NetworkInterface.DeviceIndex NetworkInterface.NetworkCardIndex NetworkInterface.NetworkInterfaceId NetworkInterface.SubnetId"+
			" NetworkInterface.SecurityGroupId NetworkInterface.Description NetworkInterface.DeleteOnTermination"+
			" NetworkInterface.PrivateIpAddress NetworkInterface.PrivateIpAddresses NetworkInterface.SecondaryPrivateIpAddressCount"+
			" Ipv6AddressCount Ipv6Address.Ipv6Address NetworkInterface.Ipv6AddressCount NetworkInterface.Ipv6Addresses.Ipv6Address NetworkInterface.Ipv6Prefix NetworkInterface.Ipv6PrefixCount"+
			" NetworkInterface.Ipv4Prefix NetworkInterface.Ipv4PrefixCount NetworkInterface.ConnectionTrackingSpecification", a.runInstances)
	h["DescribeInstances"] = handle("DescribeInstances", "InstanceId Filter NextToken MaxResults", a.describeInstances)
	h["DescribeInstanceStatus"] = handle("DescribeInstanceStatus", "InstanceId Filter NextToken MaxResults IncludeAllInstances", a.describeInstanceStatus)
	h["DescribeInstanceAttribute"] = handle("DescribeInstanceAttribute", "InstanceId Attribute", a.describeInstanceAttribute)
	h["ModifyInstanceAttribute"] = handle("ModifyInstanceAttribute",
		"InstanceId SourceDestCheck DisableApiTermination DisableApiStop InstanceInitiatedShutdownBehavior GroupId", a.modifyInstanceAttribute)
	h["ModifyInstanceMetadataOptions"] = handle("ModifyInstanceMetadataOptions",
		"InstanceId HttpTokens HttpPutResponseHopLimit HttpEndpoint InstanceMetadataTags", a.modifyInstanceMetadataOptions)
}

// stateCodes are the numbers of the states (EC2 API Reference, InstanceState).
var stateCodes = map[store.InstanceState]int{
	store.Pending: 0, store.Running: 16, store.ShuttingDown: 32, store.Terminated: 48, store.Stopping: 64, store.Stopped: 80,
}

func instanceState(s store.InstanceState) *query.InstanceState {
	return &query.InstanceState{Code: integer(stateCodes[s]), Name: text(s)}
}

// primary returns the interface at device 0 of an instance, or nil once it is
// terminated.
func (v view) primary(id vpc.InstanceID) *store.ENI {
	for e := range v.InterfacesOf(id) {
		return e
	}
	return nil
}

// hostName returns the private DNS name of an instance.
func (v view) hostName(i *store.Instance) string {
	e := v.primary(i.ID)
	switch {
	case e == nil:
		return ""
	case i.HostType == resourceName:
		return string(i.ID) + "." + v.api.domain()
	default:
		return v.api.dnsName(e.Primary)
	}
}

// placed reports whether an instance still is in a subnet: a terminated one is
// not.
func placed(i *store.Instance) bool { return i.State != store.Terminated }

func (v view) instance(i *store.Instance) query.Instance {
	out := query.Instance{
		InstanceId:               text(i.ID),
		ImageId:                  &i.Image,
		InstanceType:             &i.Type,
		InstanceState:            instanceState(i.State),
		KeyName:                  text(i.KeyName),
		AmiLaunchIndex:           integer(i.LaunchIndex),
		LaunchTime:               moment(i.Launched),
		Placement:                &query.Placement{AvailabilityZone: text(i.Zone), AvailabilityZoneId: text(v.api.zoneID(i.Zone)), GroupName: new(""), Tenancy: new("default")},
		Monitoring:               &query.Monitoring{State: new(onOff(i.Monitoring))},
		PrivateDnsName:           new(v.hostName(i)),
		DnsName:                  new(""),
		Reason:                   new(""),
		Architecture:             new(architecture(i.Type)),
		Hypervisor:               new("xen"), // what EC2 answers for Nitro types too
		VirtualizationType:       new("hvm"),
		RootDeviceType:           new("ebs"),
		RootDeviceName:           new("/dev/xvda"),
		EnaSupport:               new(true),
		EbsOptimized:             new(false),
		ClientToken:              new(i.ClientToken),
		ProductCodes:             []query.ProductCode{},
		BlockDeviceMapping:       []query.BlockDeviceMapping{},
		NetworkInterfaceSet:      []query.InstanceNetworkInterface{},
		GroupSet:                 []query.GroupIdentifier{},
		TagSet:                   v.tags(string(i.ID)),
		MetadataOptions:          metadataOptions(i.Metadata, i.State != store.Pending),
		PlatformDetails:          new("Linux/UNIX"),
		UsageOperation:           new("RunInstances"),
		UsageOperationUpdateTime: moment(i.Launched),
		HibernationOptions:       &query.HibernationOptions{Configured: new(false)},
		EnclaveOptions:           &query.EnclaveOptions{Enabled: new(false)},
	}
	if i.Profile != "" {
		out.IamInstanceProfile = &query.IamInstanceProfile{Arn: &i.Profile}
	}
	if i.Reason != "" {
		out.StateReason = &query.StateReason{Code: &i.Reason, Message: new(i.Reason + ": User initiated shutdown")}
		out.Reason = new("User initiated")
	}
	if !placed(i) {
		return out
	}
	out.VpcId, out.SubnetId = text(i.VPC), text(i.Subnet)
	out.PrivateDnsNameOptions = &query.PrivateDnsNameOptions{
		HostnameType: text(cmp.Or(i.HostType, ipName)), EnableResourceNameDnsARecord: &i.ResourceNameA, EnableResourceNameDnsAAAARecord: new(false),
	}
	for e := range v.InterfacesOf(i.ID) {
		out.NetworkInterfaceSet = append(out.NetworkInterfaceSet, v.instanceNIC(e))
	}
	if e := v.primary(i.ID); e != nil {
		out.PrivateIpAddress = new(e.Primary.String())
		out.Ipv6Address = firstIPv6(e)
		if x := v.instanceAssociation(e, e.Primary); x != nil {
			out.IpAddress, out.DnsName = x.PublicIp, x.PublicDnsName
		}
		out.SourceDestCheck = &e.SourceDestCheck
		out.GroupSet = v.groupSet(e.Groups)
	}
	return out
}

// architecture tells the processor by the name of the family: a "g" after the
// generation is a Graviton, a1 the first of them.
func architecture(instanceType string) string {
	family, _, _ := strings.Cut(instanceType, ".")
	rest := strings.TrimLeft(family, "abcdefghijklmnopqrstuvwxyz")
	if family == "a1" || strings.Contains(strings.TrimLeft(rest, "0123456789"), "g") && len(rest) > 0 {
		return "arm64"
	}
	return "x86_64"
}

func onOff(b bool) string {
	if b {
		return "enabled"
	}
	return "disabled"
}

func metadataOptions(m store.MetadataOptions, applied bool) *query.InstanceMetadataOptions {
	state := "pending"
	if applied {
		state = "applied"
	}
	return &query.InstanceMetadataOptions{
		State: &state, HttpTokens: &m.Tokens, HttpPutResponseHopLimit: integer(m.HopLimit), HttpEndpoint: &m.Endpoint,
		HttpProtocolIpv6: new("disabled"), InstanceMetadataTags: &m.Tags,
	}
}

// instanceNIC describes an interface as part of its instance.
func (v view) instanceNIC(e *store.ENI) query.InstanceNetworkInterface {
	at := e.Attachment
	out := query.InstanceNetworkInterface{
		Association: v.instanceAssociation(e, e.Primary),
		Attachment: &query.InstanceNetworkInterfaceAttachment{
			AttachTime: moment(at.Since), AttachmentId: text(at.ID), DeleteOnTermination: &at.DeleteOnTermination,
			DeviceIndex: integer(at.DeviceIndex), NetworkCardIndex: integer(at.NetworkCard), Status: text(at.Status),
		},
		Description:                     new(e.Description),
		GroupSet:                        v.groupSet(e.Groups),
		Ipv6AddressesSet:                instanceIPv6Addresses(e),
		Ipv6PrefixSet:                   ipv6Prefixes(e),
		MacAddress:                      text(e.MAC),
		NetworkInterfaceId:              text(e.ID),
		OwnerId:                         &v.api.account,
		PrivateDnsName:                  new(v.api.dnsName(e.Primary)),
		PrivateIpAddress:                new(e.Primary.String()),
		SourceDestCheck:                 &e.SourceDestCheck,
		Status:                          new(eniStatus(e)),
		SubnetId:                        text(e.Subnet),
		VpcId:                           text(e.VPC),
		InterfaceType:                   new("interface"),
		Ipv4PrefixSet:                   ipv4Prefixes(e),
		ConnectionTrackingConfiguration: conntrack(e.Conntrack),
	}
	for k, x := range append([]netip.Addr{e.Primary}, e.Secondary...) {
		out.PrivateIpAddressesSet = append(out.PrivateIpAddressesSet, query.InstancePrivateIpAddress{
			Primary: new(k == 0), PrivateIpAddress: new(x.String()), PrivateDnsName: new(v.api.dnsName(x)), Association: v.instanceAssociation(e, x),
		})
	}
	return out
}

// nicValues makes an attribute of an instance out of one of its interfaces.
func nicValues(value func(v view, e *store.ENI) []string) func(view, *store.Instance) []string {
	return func(v view, i *store.Instance) []string {
		var out []string
		for e := range v.InterfacesOf(i.ID) {
			out = append(out, value(v, e)...)
		}
		return out
	}
}

// primaryValue makes an attribute of an instance out of its primary interface.
func primaryValue(value func(v view, e *store.ENI) []string) func(view, *store.Instance) []string {
	return func(v view, i *store.Instance) []string {
		if e := v.primary(i.ID); e != nil {
			return value(v, e)
		}
		return nil
	}
}

func plain(value func(i *store.Instance) string) func(view, *store.Instance) []string {
	return func(_ view, i *store.Instance) []string {
		if s := value(i); s != "" {
			return []string{s}
		}
		return nil
	}
}

func constant(s string) func(view, *store.Instance) []string {
	return plain(func(*store.Instance) string { return s })
}

func inPlace(value func(i *store.Instance) string) func(view, *store.Instance) []string {
	return plain(func(i *store.Instance) string {
		if !placed(i) {
			return ""
		}
		return value(i)
	})
}

func groupNames(v view, e *store.ENI) []string {
	var out []string
	for _, g := range v.groupSet(e.Groups) {
		out = append(out, deref(g.GroupName))
	}
	return out
}

var instanceAttributes = func() attributes[*store.Instance] {
	attrs := attributes[*store.Instance]{
		"architecture":                        plain(func(i *store.Instance) string { return architecture(i.Type) }),
		"availability-zone":                   plain(func(i *store.Instance) string { return i.Zone }),
		"availability-zone-id":                func(v view, i *store.Instance) []string { return []string{v.api.zoneID(i.Zone)} },
		"client-token":                        plain(func(i *store.Instance) string { return i.ClientToken }),
		"ebs-optimized":                       constant("false"),
		"ena-support":                         constant("true"),
		"enclave-options.enabled":             constant("false"),
		"hibernation-options.configured":      constant("false"),
		"hypervisor":                          constant("xen"),
		"iam-instance-profile.arn":            plain(func(i *store.Instance) string { return i.Profile }),
		"image-id":                            plain(func(i *store.Instance) string { return i.Image }),
		"instance-id":                         plain(func(i *store.Instance) string { return string(i.ID) }),
		"instance-state-code":                 plain(func(i *store.Instance) string { return strconv.Itoa(stateCodes[i.State]) }),
		"instance-state-name":                 plain(func(i *store.Instance) string { return string(i.State) }),
		"instance-type":                       plain(func(i *store.Instance) string { return i.Type }),
		"instance.group-id":                   primaryValue(eniAttributes["group-id"]),
		"instance.group-name":                 primaryValue(groupNames),
		"key-name":                            plain(func(i *store.Instance) string { return i.KeyName }),
		"launch-index":                        plain(func(i *store.Instance) string { return strconv.Itoa(i.LaunchIndex) }),
		"launch-time":                         plain(func(i *store.Instance) string { return i.Launched.UTC().Format("2006-01-02T15:04:05.000Z") }),
		"metadata-options.http-endpoint":      plain(func(i *store.Instance) string { return i.Metadata.Endpoint }),
		"metadata-options.http-protocol-ipv4": constant("enabled"),
		"metadata-options.http-protocol-ipv6": constant("disabled"),
		"metadata-options.http-put-response-hop-limit": plain(func(i *store.Instance) string { return strconv.Itoa(i.Metadata.HopLimit) }),
		"metadata-options.http-tokens":                 plain(func(i *store.Instance) string { return i.Metadata.Tokens }),
		"metadata-options.instance-metadata-tags":      plain(func(i *store.Instance) string { return i.Metadata.Tags }),
		"monitoring-state":                             plain(func(i *store.Instance) string { return onOff(i.Monitoring) }),
		"owner-id":                                     func(v view, _ *store.Instance) []string { return []string{v.api.account} },
		"platform-details":                             constant("Linux/UNIX"),
		"private-dns-name":                             func(v view, i *store.Instance) []string { return []string{v.hostName(i)} },
		"private-dns-name-options.hostname-type":       inPlace(func(i *store.Instance) string { return i.HostType }),
		"private-ip-address":                           primaryValue(func(_ view, e *store.ENI) []string { return []string{e.Primary.String()} }),
		"reservation-id":                               plain(func(i *store.Instance) string { return i.Reservation }),
		"root-device-name":                             constant("/dev/xvda"),
		"root-device-type":                             constant("ebs"),
		"source-dest-check":                            primaryValue(eniAttributes["source-dest-check"]),
		"state-reason-code":                            plain(func(i *store.Instance) string { return i.Reason }),
		"subnet-id":                                    inPlace(func(i *store.Instance) string { return string(i.Subnet) }),
		"tenancy":                                      constant("default"),
		"usage-operation":                              constant("RunInstances"),
		"virtualization-type":                          constant("hvm"),
		"vpc-id":                                       inPlace(func(i *store.Instance) string { return string(i.VPC) }),
		"network-interface.addresses.private-dns-name": nicValues(func(v view, e *store.ENI) []string {
			return collect(append([]netip.Addr{e.Primary}, e.Secondary...), v.api.dnsName)
		}),
		"ip-address": primaryValue(eniAttributes["association.public-ip"]),
		"dns-name":   primaryValue(eniAttributes["association.public-dns-name"]),
		"network-interface.addresses.association.allocation-id":   nicValues(associations(true, func(x *query.NetworkInterfaceAssociation) *string { return x.AllocationId })),
		"network-interface.addresses.association.association-id":  nicValues(associations(true, func(x *query.NetworkInterfaceAssociation) *string { return x.AssociationId })),
		"network-interface.addresses.association.ip-owner-id":     nicValues(eniAttributes["addresses.association.owner-id"]),
		"network-interface.addresses.association.public-dns-name": nicValues(associations(true, func(x *query.NetworkInterfaceAssociation) *string { return x.PublicDnsName })),
		"network-interface.public-dns-name":                       nicValues(eniAttributes["association.public-dns-name"]),
		"network-interface.attachment.network-card-index":         nicValues(attachmentValues(func(_ view, at *store.Attachment) string { return strconv.Itoa(at.NetworkCard) })),
		"network-interface.group-name":                            nicValues(groupNames),
		"network-interface.ipv4-prefixes.ipv4-prefix": nicValues(func(_ view, e *store.ENI) []string {
			return collect(e.Prefixes, netip.Prefix.String)
		}),
		"ipv6-address":                   primaryValue(eniAttributes["ipv6-addresses.ipv6-address"]),
		"network-interface.ipv6-address": nicValues(eniAttributes["ipv6-addresses.ipv6-address"]),
		"network-interface.ipv6-addresses.is-primary-ipv6": nicValues(func(_ view, e *store.ENI) []string {
			return collect(e.IPv6, func(netip.Addr) string { return "false" })
		}),
		"network-interface.ipv6-prefixes.ipv6-prefix": nicValues(func(_ view, e *store.ENI) []string {
			return collect(e.IPv6Prefixes, netip.Prefix.String)
		}),
		"network-interface.private-ip-address": nicValues(func(_ view, e *store.ENI) []string { return []string{e.Primary.String()} }),
		"network-interface.tag-key": nicValues(func(v view, e *store.ENI) []string {
			var out []string
			for k := range v.TagsOf(string(e.ID)) {
				out = append(out, k)
			}
			return out
		}),
		"network-interface.tag-value": nicValues(func(v view, e *store.ENI) []string {
			var out []string
			for _, s := range v.TagsOf(string(e.ID)) {
				out = append(out, s)
			}
			return out
		}),
	}
	// What an interface is found by, its instance is found by as well.
	for name, value := range eniAttributes {
		if _, ok := attrs["network-interface."+name]; !ok {
			attrs["network-interface."+name] = nicValues(value)
		}
	}
	return attrs
}()

func instanceTags(v view, i *store.Instance) map[string]string { return v.TagsOf(string(i.ID)) }

// instancesFor returns the instances that a Describe is about: those named, all
// of which must exist, or all.
func (v view) instancesFor(ids []string) (items func(yield func(string, *store.Instance) bool), err error) {
	if len(ids) == 0 {
		return entries(v.Instances), nil
	}
	var named []*store.Instance
	var missing []string
	for _, id := range ids {
		if err := checkID("i", id); err != nil {
			return nil, err
		}
		if i := v.Instance(vpc.InstanceID(id)); i != nil {
			named = append(named, i)
		} else {
			missing = append(missing, id)
		}
	}
	if len(missing) > 0 {
		return nil, noInstance(missing...)
	}
	return listed(named, func(i *store.Instance) string { return string(i.ID) }), nil
}

func (a *API) describeInstances(_ context.Context, req *query.DescribeInstancesRequest) (*query.DescribeInstancesResponse, error) {
	v := a.read()
	match, err := matcher(v, "DescribeInstances", req.Filter, instanceAttributes, nil, instanceTags)
	if err != nil {
		return nil, err
	}
	c, err := paging("DescribeInstances", req.Filter, len(req.InstanceId), req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	items, err := v.instancesFor(req.InstanceId)
	if err != nil {
		return nil, err
	}
	found, next := take(c, items, match)
	// One reservation for those of one launch that are on this page, in the
	// order of their first instance.
	resp := &query.DescribeInstancesResponse{NextToken: next, ReservationSet: []query.Reservation{}}
	at := map[string]int{}
	for _, i := range found {
		k, ok := at[i.Reservation]
		if !ok {
			k = len(resp.ReservationSet)
			at[i.Reservation] = k
			resp.ReservationSet = append(resp.ReservationSet, query.Reservation{
				ReservationId: text(i.Reservation), OwnerId: &a.account, GroupSet: []query.GroupIdentifier{},
			})
		}
		resp.ReservationSet[k].InstancesSet = append(resp.ReservationSet[k].InstancesSet, v.instance(i))
	}
	return resp, nil
}

var statusAttributes = func() attributes[*store.Instance] {
	attrs := attributes[*store.Instance]{}
	for _, name := range []string{"availability-zone", "availability-zone-id", "instance-state-code", "instance-state-name"} {
		attrs[name] = instanceAttributes[name]
	}
	for _, which := range []string{"instance-status", "system-status"} {
		attrs[which+".status"] = plain(func(i *store.Instance) string { s, _ := health(i); return s })
		attrs[which+".reachability"] = plain(func(i *store.Instance) string { _, r := health(i); return r })
	}
	return attrs
}()

// health returns the status of an instance's checks, and of reachability.
func health(i *store.Instance) (status, reachability string) {
	if i.State == store.Running {
		return "ok", "passed"
	}
	return "not-applicable", ""
}

func (a *API) describeInstanceStatus(_ context.Context, req *query.DescribeInstanceStatusRequest) (*query.DescribeInstanceStatusResponse, error) {
	v := a.read()
	match, err := matcher(v, "DescribeInstanceStatus", req.Filter, statusAttributes, nil, nil)
	if err != nil {
		return nil, err
	}
	c, err := paging("DescribeInstanceStatus", req.Filter, len(req.InstanceId), req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	items, err := v.instancesFor(req.InstanceId)
	if err != nil {
		return nil, err
	}
	found, next := take(c, items, func(i *store.Instance) bool {
		return (i.State == store.Running || deref(req.IncludeAllInstances)) && match(i)
	})
	return &query.DescribeInstanceStatusResponse{NextToken: next, InstanceStatusSet: collect(found, func(i *store.Instance) query.InstanceStatus {
		summary := func() *query.InstanceStatusSummary {
			status, reachability := health(i)
			s := &query.InstanceStatusSummary{Status: &status}
			if reachability != "" {
				s.Details = []query.InstanceStatusDetail{{Name: new("reachability"), Status: &reachability}}
			}
			return s
		}
		return query.InstanceStatus{
			InstanceId: text(i.ID), AvailabilityZone: text(i.Zone), AvailabilityZoneId: text(a.zoneID(i.Zone)),
			InstanceState: instanceState(i.State), InstanceStatus: summary(), SystemStatus: summary(),
		}
	})}, nil
}

func (a *API) describeInstanceAttribute(_ context.Context, req *query.DescribeInstanceAttributeRequest) (*query.DescribeInstanceAttributeResponse, error) {
	v := a.read()
	i, err := findInstance(v.State, *req.InstanceId)
	if err != nil {
		return nil, err
	}
	resp := &query.DescribeInstanceAttributeResponse{InstanceId: text(i.ID)}
	e := v.primary(i.ID)
	switch *req.Attribute {
	case "instanceType":
		resp.InstanceType = &query.AttributeValue{Value: &i.Type}
	case "kernel":
		resp.Kernel = &query.AttributeValue{}
	case "ramdisk":
		resp.Ramdisk = &query.AttributeValue{}
	case "userData":
		resp.UserData = &query.AttributeValue{Value: text(i.UserData)}
	case "disableApiTermination":
		resp.DisableApiTermination = &query.AttributeBooleanValue{Value: &i.TerminationLocked}
	case "disableApiStop":
		resp.DisableApiStop = &query.AttributeBooleanValue{Value: &i.StopLocked}
	case "instanceInitiatedShutdownBehavior":
		behaviour := "stop"
		if i.ShutdownTerminates {
			behaviour = "terminate"
		}
		resp.InstanceInitiatedShutdownBehavior = &query.AttributeValue{Value: &behaviour}
	case "rootDeviceName":
		resp.RootDeviceName = &query.AttributeValue{Value: new("/dev/xvda")}
	case "blockDeviceMapping":
		resp.BlockDeviceMapping = []query.BlockDeviceMapping{}
	case "productCodes":
		resp.ProductCodes = []query.ProductCode{}
	case "sourceDestCheck":
		if e != nil {
			resp.SourceDestCheck = &query.AttributeBooleanValue{Value: &e.SourceDestCheck}
		}
	case "groupSet":
		if e != nil {
			resp.GroupSet = v.groupSet(e.Groups)
		}
	case "ebsOptimized":
		resp.EbsOptimized = &query.AttributeBooleanValue{Value: new(false)}
	case "enaSupport":
		resp.EnaSupport = &query.AttributeBooleanValue{Value: new(true)}
	case "sriovNetSupport":
		resp.SriovNetSupport = &query.AttributeValue{}
	case "enclaveOptions":
		resp.EnclaveOptions = &query.EnclaveOptions{Enabled: new(false)}
	default:
		return nil, query.Errorf("InvalidParameterValue", "Value (%s) for parameter attribute is invalid. Unknown attribute.", *req.Attribute)
	}
	return resp, nil
}

func (a *API) modifyInstanceAttribute(_ context.Context, req *query.ModifyInstanceAttributeRequest) (*query.ModifyInstanceAttributeResponse, error) {
	given := 0
	for _, is := range []bool{req.SourceDestCheck != nil, req.DisableApiTermination != nil, req.DisableApiStop != nil, req.InstanceInitiatedShutdownBehavior != nil, len(req.GroupId) > 0} {
		if is {
			given++
		}
	}
	if given != 1 {
		return nil, query.Errorf("InvalidParameterCombination", "One attribute must be given, and no more than one. Got %d.", given)
	}
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findInstance(&tx.State, *req.InstanceId)
		if err != nil {
			return err
		}
		i := *old
		switch {
		case req.DisableApiTermination != nil:
			i.TerminationLocked = deref(req.DisableApiTermination.Value)
			tx.PutInstance(&i)
			return nil
		case req.DisableApiStop != nil:
			i.StopLocked = deref(req.DisableApiStop.Value)
			tx.PutInstance(&i)
			return nil
		case req.InstanceInitiatedShutdownBehavior != nil:
			b := deref(req.InstanceInitiatedShutdownBehavior.Value)
			if b != "stop" && b != "terminate" {
				return query.Errorf("InvalidParameterValue", "Value (%s) for parameter instanceInitiatedShutdownBehavior is invalid. Expecting stop or terminate.", b)
			}
			i.ShutdownTerminates = b == "terminate"
			tx.PutInstance(&i)
			return nil
		}
		// The rest is the primary interface's.
		p := a.fresh(&tx.State).primary(i.ID)
		if p == nil {
			return query.Errorf("IncorrectInstanceState", "The instance '%s' is not in a state from which it can be modified: it is '%s'.", i.ID, i.State)
		}
		e := *p
		if req.SourceDestCheck != nil {
			e.SourceDestCheck = deref(req.SourceDestCheck.Value)
		} else if e.Groups, err = a.groupsFor(&tx.State, tx.VPC(e.VPC), req.GroupId); err != nil {
			return err
		}
		tx.PutENI(&e)
		return nil
	})
	return nil, err
}

func (a *API) modifyInstanceMetadataOptions(_ context.Context, req *query.ModifyInstanceMetadataOptionsRequest) (*query.ModifyInstanceMetadataOptionsResponse, error) {
	var i store.Instance
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findInstance(&tx.State, *req.InstanceId)
		if err != nil {
			return err
		}
		if old.State == store.Terminated || old.State == store.ShuttingDown {
			return query.Errorf("IncorrectInstanceState", "The instance '%s' is not in a state from which it can be modified: it is '%s'.", old.ID, old.State)
		}
		i = *old
		if i.Metadata, err = metadata(old.Metadata, &query.MetadataOptions{
			HttpTokens: req.HttpTokens, HttpEndpoint: req.HttpEndpoint, HttpPutResponseHopLimit: req.HttpPutResponseHopLimit, InstanceMetadataTags: req.InstanceMetadataTags,
		}); err != nil {
			return err
		}
		tx.PutInstance(&i)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.ModifyInstanceMetadataOptionsResponse{InstanceId: req.InstanceId, InstanceMetadataOptions: metadataOptions(i.Metadata, true)}, nil
}
