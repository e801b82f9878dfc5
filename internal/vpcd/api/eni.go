package api

import (
	"context"
	"crypto/rand"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func (a *API) eniHandlers(h map[string]query.Handler) {
	h["CreateNetworkInterface"] = handle("CreateNetworkInterface",
		"SubnetId Description PrivateIpAddress PrivateIpAddresses SecondaryPrivateIpAddressCount Ipv4Prefix Ipv4PrefixCount"+
			" Ipv6Addresses.Ipv6Address Ipv6AddressCount Ipv6Prefix Ipv6PrefixCount SecurityGroupId TagSpecification ClientToken ConnectionTrackingSpecification", a.createNetworkInterface)
	h["DeleteNetworkInterface"] = handle("DeleteNetworkInterface", "NetworkInterfaceId", a.deleteNetworkInterface)
	h["DescribeNetworkInterfaces"] = handle("DescribeNetworkInterfaces", "NetworkInterfaceId Filter NextToken MaxResults", a.describeNetworkInterfaces)
	h["DescribeNetworkInterfaceAttribute"] = handle("DescribeNetworkInterfaceAttribute", "NetworkInterfaceId Attribute", a.describeNetworkInterfaceAttribute)
	h["ModifyNetworkInterfaceAttribute"] = handle("ModifyNetworkInterfaceAttribute",
		"NetworkInterfaceId Description SourceDestCheck SecurityGroupId Attachment.AttachmentId Attachment.DeleteOnTermination ConnectionTrackingSpecification", a.modifyNetworkInterfaceAttribute)
	h["AttachNetworkInterface"] = handle("AttachNetworkInterface", "NetworkInterfaceId InstanceId DeviceIndex NetworkCardIndex", a.attachNetworkInterface)
	h["DetachNetworkInterface"] = handle("DetachNetworkInterface", "AttachmentId", a.detachNetworkInterface)
	h["AssignPrivateIpAddresses"] = handle("AssignPrivateIpAddresses",
		"NetworkInterfaceId PrivateIpAddress SecondaryPrivateIpAddressCount Ipv4Prefix Ipv4PrefixCount AllowReassignment", a.assignPrivateIPAddresses)
	h["UnassignPrivateIpAddresses"] = handle("UnassignPrivateIpAddresses", "NetworkInterfaceId PrivateIpAddress Ipv4Prefix", a.unassignPrivateIPAddresses)
}

// mine returns an error if the interface belongs to a managed service.
func mine(e *store.ENI) error {
	if e.RequesterManaged {
		return query.Errorf("AuthFailure", "You do not have permission to access the specified resource.")
	}
	return nil
}

// newMAC returns a locally administered address that no interface of the VPC
// has.
func newMAC(s *store.State, v vpc.VPCID) string {
	for {
		mac := make(net.HardwareAddr, 6)
		_, _ = rand.Read(mac[1:]) // never fails since Go 1.24
		mac[0] = 0x02
		if s.ByMAC(v, mac.String()) == nil {
			return mac.String()
		}
	}
}

// spec is what a request says about an interface to be made.
type spec struct {
	addrs       wanted
	ipv6        wantedIPv6
	groups      []string
	description string
	conntrack   store.Conntrack
}

const maxDescription = 255

func parseSpec(w wanted, groups []string, description *string, ct *query.ConnectionTrackingConfiguration) (spec, error) {
	s := spec{addrs: w, groups: groups, description: deref(description)}
	if len(s.description) > maxDescription {
		return s, query.Errorf("InvalidParameterValue", "The description is longer than %d characters", maxDescription)
	}
	var err error
	s.conntrack, err = parseConntrack(ct)
	return s, err
}

// parseConntrack reads idle timeouts; the bounds are those of the EC2 API
// Reference, ConnectionTrackingSpecificationRequest.
func parseConntrack(ct *query.ConnectionTrackingConfiguration) (store.Conntrack, error) {
	var out store.Conntrack
	if ct == nil {
		return out, nil
	}
	for _, x := range []struct {
		name   string
		from   *int64
		to     *int
		lo, hi int64
	}{
		{"tcpEstablishedTimeout", ct.TcpEstablishedTimeout, &out.TCPEstablished, 60, 432000},
		{"udpTimeout", ct.UdpTimeout, &out.UDP, 30, 60},
		{"udpStreamTimeout", ct.UdpStreamTimeout, &out.UDPStream, 60, 180},
	} {
		if x.from == nil {
			continue
		}
		if *x.from < x.lo || *x.from > x.hi {
			return out, query.Errorf("InvalidParameterValue", "Value (%d) for parameter %s is invalid. Expecting a value between %d and %d.", *x.from, x.name, x.lo, x.hi)
		}
		*x.to = int(*x.from)
	}
	return out, nil
}

// makeENI makes an interface in a subnet, not attached.
func (a *API) makeENI(tx *store.Tx, n *store.Subnet, s spec) (*store.ENI, error) {
	if most := a.quota(chaos.QuotaInterfaces); tx.InterfacesIn(n.Zone) >= most {
		return nil, quotaReached("NetworkInterfaceLimitExceeded", "network interfaces", most)
	}
	groups, err := a.groupsFor(&tx.State, tx.VPC(n.VPC), s.groups)
	if err != nil {
		return nil, err
	}
	w, err := a.allocate(tx, n, s.addrs, true)
	if err != nil {
		return nil, err
	}
	if s.ipv6.unsaid && n.AssignIPv6 {
		s.ipv6.addrCount = 1
	}
	w6, err := a.allocateIPv6(tx, n, s.ipv6)
	if err != nil {
		return nil, err
	}
	return &store.ENI{
		ID: vpc.ENIID(vpc.NewID("eni")), VPC: n.VPC, Subnet: n.ID, Zone: n.Zone, MAC: newMAC(&tx.State, n.VPC),
		Primary: w.primary, Secondary: w.secondary, Prefixes: w.prefixes, IPv6: w6.addrs, IPv6Prefixes: w6.prefixes, Groups: groups,
		Description: s.description, SourceDestCheck: true, RequesterID: a.account, Conntrack: s.conntrack, Created: a.now(),
	}, nil
}

func (a *API) createNetworkInterface(_ context.Context, req *query.CreateNetworkInterfaceRequest) (*query.CreateNetworkInterfaceResponse, error) {
	w, err := parseWanted(req.PrivateIpAddress, req.PrivateIpAddresses, req.SecondaryPrivateIpAddressCount, req.Ipv4Prefix, req.Ipv4PrefixCount)
	if err != nil {
		return nil, err
	}
	s, err := parseSpec(w, req.SecurityGroupId, req.Description, req.ConnectionTrackingSpecification)
	if err != nil {
		return nil, err
	}
	if s.ipv6, err = parseWantedIPv6(req.Ipv6Addresses, req.Ipv6AddressCount, req.Ipv6Prefix, req.Ipv6PrefixCount); err != nil {
		return nil, err
	}
	tags, err := specified(req.TagSpecification, "network-interface")
	if err != nil {
		return nil, err
	}
	params := *req
	params.ClientToken, params.DryRun = nil, nil
	var e *store.ENI
	after, err := a.update(func(tx *store.Tx) error {
		n, err := findSubnet(&tx.State, *req.SubnetId)
		if err != nil {
			return err
		}
		before, err := once(tx, "CreateNetworkInterface", req.ClientToken, params)
		if err != nil {
			return err
		}
		if len(before) == 1 {
			e, err = findENI(&tx.State, before[0])
			return err
		}
		if 1+w.slots() > maxSlots || s.ipv6.slots() > maxIPv6Slots {
			return tooManyAddresses()
		}
		if e, err = a.makeENI(tx, n, s); err != nil {
			return err
		}
		tx.PutENI(e)
		tx.SetTags(string(e.ID), tags["network-interface"])
		return remember(tx, "CreateNetworkInterface", req.ClientToken, params, a.now(), []string{string(e.ID)})
	})
	if err != nil {
		return nil, err
	}
	out := after.eni(e)
	if e.Attachment == nil {
		out.Status = new("pending") // what EC2 answers, though its model does not list it
	}
	return &query.CreateNetworkInterfaceResponse{NetworkInterface: &out, ClientToken: req.ClientToken}, nil
}

func (a *API) deleteNetworkInterface(_ context.Context, req *query.DeleteNetworkInterfaceRequest) (*query.DeleteNetworkInterfaceResponse, error) {
	_, err := a.update(func(tx *store.Tx) error {
		e, err := findENI(&tx.State, *req.NetworkInterfaceId)
		if err != nil {
			return err
		}
		if e.Attachment != nil {
			return query.Errorf("InvalidParameterValue", "Network interface '%s' is currently in use.", e.ID)
		}
		if err := mine(e); err != nil {
			return err
		}
		tx.DeleteENI(e.ID)
		return nil
	})
	return nil, err
}

// attachmentValues makes an attribute of an interface's attachment.
func attachmentValues(value func(v view, at *store.Attachment) string) func(view, *store.ENI) []string {
	return func(v view, e *store.ENI) []string {
		if e.Attachment == nil {
			return nil
		}
		if s := value(v, e.Attachment); s != "" {
			return []string{s}
		}
		return nil
	}
}

func addresses(_ view, e *store.ENI) []string {
	out := []string{e.Primary.String()}
	for _, x := range e.Secondary {
		out = append(out, x.String())
	}
	return out
}

var eniAttributes = attributes[*store.ENI]{
	"addresses.primary": func(_ view, e *store.ENI) []string {
		if len(e.Secondary) > 0 {
			return []string{"true", "false"}
		}
		return []string{"true"}
	},
	"addresses.private-ip-address":     addresses,
	"attachment.attach-time":           attachmentValues(func(_ view, at *store.Attachment) string { return at.Since.UTC().Format("2006-01-02T15:04:05.000Z") }),
	"attachment.attachment-id":         attachmentValues(func(_ view, at *store.Attachment) string { return string(at.ID) }),
	"attachment.delete-on-termination": attachmentValues(func(_ view, at *store.Attachment) string { return strconv.FormatBool(at.DeleteOnTermination) }),
	"attachment.device-index":          attachmentValues(func(_ view, at *store.Attachment) string { return strconv.Itoa(at.DeviceIndex) }),
	"attachment.instance-id":           attachmentValues(func(_ view, at *store.Attachment) string { return string(at.Instance) }),
	"attachment.instance-owner-id":     attachmentValues(func(_ view, at *store.Attachment) string { return at.InstanceOwner }),
	"attachment.status":                attachmentValues(func(_ view, at *store.Attachment) string { return string(at.Status) }),
	"availability-zone":                func(_ view, e *store.ENI) []string { return []string{e.Zone} },
	"availability-zone-id":             func(v view, e *store.ENI) []string { return []string{v.api.zoneID(e.Zone)} },
	"description":                      func(_ view, e *store.ENI) []string { return []string{e.Description} },
	"group-id": func(_ view, e *store.ENI) []string {
		return collect(e.Groups, func(g vpc.SecurityGroupID) string { return string(g) })
	},
	"ipv6-addresses.ipv6-address":     func(_ view, e *store.ENI) []string { return collect(e.IPv6, netip.Addr.String) },
	"interface-type":                  func(_ view, e *store.ENI) []string { return []string{interfaceType(e)} },
	"association.allocation-id":       associations(false, func(x *query.NetworkInterfaceAssociation) *string { return x.AllocationId }),
	"association.association-id":      associations(false, func(x *query.NetworkInterfaceAssociation) *string { return x.AssociationId }),
	"association.ip-owner-id":         associations(false, func(x *query.NetworkInterfaceAssociation) *string { return x.IpOwnerId }),
	"association.public-ip":           associations(false, func(x *query.NetworkInterfaceAssociation) *string { return x.PublicIp }),
	"association.public-dns-name":     associations(false, func(x *query.NetworkInterfaceAssociation) *string { return x.PublicDnsName }),
	"addresses.association.owner-id":  associations(true, func(x *query.NetworkInterfaceAssociation) *string { return x.IpOwnerId }),
	"addresses.association.public-ip": associations(true, func(x *query.NetworkInterfaceAssociation) *string { return x.PublicIp }),
	"mac-address":                     func(_ view, e *store.ENI) []string { return []string{e.MAC} },
	"network-interface-id":            func(_ view, e *store.ENI) []string { return []string{string(e.ID)} },
	"operator.managed":                func(view, *store.ENI) []string { return []string{"false"} },
	"owner-id":                        func(v view, _ *store.ENI) []string { return []string{v.api.account} },
	"private-dns-name":                func(v view, e *store.ENI) []string { return []string{v.api.dnsName(e.Primary)} },
	"private-ip-address":              addresses,
	"requester-id":                    func(_ view, e *store.ENI) []string { return []string{e.RequesterID} },
	"requester-managed":               func(_ view, e *store.ENI) []string { return []string{strconv.FormatBool(e.RequesterManaged)} },
	"source-dest-check":               func(_ view, e *store.ENI) []string { return []string{strconv.FormatBool(e.SourceDestCheck)} },
	"status":                          func(_ view, e *store.ENI) []string { return []string{eniStatus(e)} },
	"subnet-id":                       func(_ view, e *store.ENI) []string { return []string{string(e.Subnet)} },
	"vpc-id":                          func(_ view, e *store.ENI) []string { return []string{string(e.VPC)} },
}

func eniStatus(e *store.ENI) string {
	if e.Attachment == nil {
		return "available"
	}
	return "in-use"
}

func eniTags(v view, e *store.ENI) map[string]string { return v.TagsOf(string(e.ID)) }

func (a *API) describeNetworkInterfaces(_ context.Context, req *query.DescribeNetworkInterfacesRequest) (*query.DescribeNetworkInterfacesResponse, error) {
	v := a.read()
	match, err := matcher(v, "DescribeNetworkInterfaces", req.Filter, eniAttributes, nil, eniTags)
	if err != nil {
		return nil, err
	}
	c, err := paging("DescribeNetworkInterfaces", req.Filter, len(req.NetworkInterfaceId), req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	items := entries(v.ENIs)
	if len(req.NetworkInterfaceId) > 0 {
		named, err := findAll(v.State, req.NetworkInterfaceId, findENI)
		if err != nil {
			return nil, err
		}
		items = listed(named, func(e *store.ENI) string { return string(e.ID) })
	} else if ids, ok := exact(req.Filter, "attachment.instance-id"); ok {
		// What every node asks: not to be searched for among all interfaces.
		var held []*store.ENI
		for _, id := range ids {
			held = slices.AppendSeq(held, v.InterfacesOf(vpc.InstanceID(id)))
		}
		slices.SortFunc(held, func(x, y *store.ENI) int { return strings.Compare(string(x.ID), string(y.ID)) })
		items = listed(held, func(e *store.ENI) string { return string(e.ID) })
	}
	found, next := take(c, items, match)
	return &query.DescribeNetworkInterfacesResponse{NextToken: next, NetworkInterfaceSet: collect(found, v.eni)}, nil
}

// dnsName returns the private DNS name of an address.
func (a *API) dnsName(addr netip.Addr) string {
	return vpc.PrivateName(addr, a.region)
}

func (a *API) domain() string { return vpc.PrivateDomain(a.region) }

func interfaceType(e *store.ENI) string {
	switch {
	case e.NAT != "":
		return "nat_gateway"
	case e.Service != "" && KindOf(e) == LoadBalancer:
		return "network_load_balancer"
	}
	return "interface"
}

func (v view) eni(e *store.ENI) query.NetworkInterface {
	out := query.NetworkInterface{
		Attachment:            v.attachment(e),
		AvailabilityZone:      text(e.Zone),
		AvailabilityZoneId:    text(v.api.zoneID(e.Zone)),
		Description:           new(e.Description),
		GroupSet:              v.groupSet(e.Groups),
		InterfaceType:         new(interfaceType(e)),
		Ipv6Address:           firstIPv6(e),
		Ipv6AddressesSet:      ipv6Addresses(e),
		Ipv6PrefixSet:         ipv6Prefixes(e),
		MacAddress:            text(e.MAC),
		NetworkInterfaceId:    text(e.ID),
		OwnerId:               &v.api.account,
		PrivateDnsName:        new(v.api.dnsName(e.Primary)),
		PrivateIpAddress:      new(e.Primary.String()),
		PrivateIpAddressesSet: make([]query.NetworkInterfacePrivateIpAddress, 0, 1+len(e.Secondary)),
		RequesterId:           text(e.RequesterID),
		RequesterManaged:      &e.RequesterManaged,
		SourceDestCheck:       &e.SourceDestCheck,
		Status:                new(eniStatus(e)),
		SubnetId:              text(e.Subnet),
		TagSet:                v.tags(string(e.ID)),
		VpcId:                 text(e.VPC),
		DenyAllIgwTraffic:     new(false),
		Operator:              &query.Operator{Managed: new(false)},
	}
	if out.Association = v.association(e, e.Primary); out.Association != nil {
		out.PublicDnsName = out.Association.PublicDnsName
	}
	out.ConnectionTrackingConfiguration = conntrack(e.Conntrack)
	for i, x := range append([]netip.Addr{e.Primary}, e.Secondary...) {
		out.PrivateIpAddressesSet = append(out.PrivateIpAddressesSet, query.NetworkInterfacePrivateIpAddress{
			Primary: new(i == 0), PrivateIpAddress: new(x.String()), PrivateDnsName: new(v.api.dnsName(x)), Association: v.association(e, x),
		})
	}
	out.Ipv4PrefixSet = ipv4Prefixes(e)
	return out
}

func ipv4Prefixes(e *store.ENI) []query.Ipv4Prefix {
	if len(e.Prefixes) == 0 {
		return nil
	}
	return collect(e.Prefixes, func(p netip.Prefix) query.Ipv4Prefix { return query.Ipv4Prefix{Ipv4Prefix: new(p.String())} })
}

func conntrack(c store.Conntrack) *query.ConnectionTrackingConfiguration {
	if c == (store.Conntrack{}) {
		return nil
	}
	out := &query.ConnectionTrackingConfiguration{}
	for _, x := range []struct {
		from int
		to   **int64
	}{{c.TCPEstablished, &out.TcpEstablishedTimeout}, {c.UDP, &out.UdpTimeout}, {c.UDPStream, &out.UdpStreamTimeout}} {
		if x.from > 0 {
			*x.to = integer(x.from)
		}
	}
	return out
}

func (v view) attachment(e *store.ENI) *query.NetworkInterfaceAttachment {
	at := e.Attachment
	if at == nil {
		return nil
	}
	return &query.NetworkInterfaceAttachment{
		AttachTime:          moment(at.Since),
		AttachmentId:        text(at.ID),
		DeleteOnTermination: &at.DeleteOnTermination,
		DeviceIndex:         integer(at.DeviceIndex),
		NetworkCardIndex:    integer(at.NetworkCard),
		InstanceId:          text(at.Instance),
		InstanceOwnerId:     text(at.InstanceOwner),
		Status:              text(at.Status),
	}
}

// moment returns a time as EC2 shows it: UTC, to the second.
func moment(t time.Time) *time.Time { return new(t.UTC().Truncate(time.Second)) }

func (a *API) describeNetworkInterfaceAttribute(_ context.Context, req *query.DescribeNetworkInterfaceAttributeRequest) (*query.DescribeNetworkInterfaceAttributeResponse, error) {
	v := a.read()
	e, err := findENI(v.State, *req.NetworkInterfaceId)
	if err != nil {
		return nil, err
	}
	resp := &query.DescribeNetworkInterfaceAttributeResponse{NetworkInterfaceId: text(e.ID)}
	switch deref(req.Attribute) {
	case "description":
		resp.Description = &query.AttributeValue{Value: &e.Description}
	case "groupSet":
		resp.GroupSet = v.groupSet(e.Groups)
	case "sourceDestCheck":
		resp.SourceDestCheck = &query.AttributeBooleanValue{Value: &e.SourceDestCheck}
	case "attachment":
		resp.Attachment = v.attachment(e)
	case "associatePublicIpAddress":
		resp.AssociatePublicIpAddress = new(false)
	default:
		return nil, query.Errorf("MissingParameter", "The request must contain the parameter attribute")
	}
	return resp, nil
}

func (a *API) modifyNetworkInterfaceAttribute(_ context.Context, req *query.ModifyNetworkInterfaceAttributeRequest) (*query.ModifyNetworkInterfaceAttributeResponse, error) {
	given := 0
	for _, is := range []bool{
		req.Description != nil, req.SourceDestCheck != nil, len(req.SecurityGroupId) > 0, req.Attachment != nil,
		req.ConnectionTrackingSpecification != nil, req.AssociatePublicIpAddress != nil,
	} {
		if is {
			given++
		}
	}
	if given != 1 {
		return nil, query.Errorf("InvalidParameterCombination", "One attribute must be given, and no more than one. Got %d.", given)
	}
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findENI(&tx.State, *req.NetworkInterfaceId)
		if err != nil {
			return err
		}
		if err := mine(old); err != nil {
			return err
		}
		e := *old
		switch {
		case req.Description != nil:
			e.Description = deref(req.Description.Value)
			if len(e.Description) > maxDescription {
				return query.Errorf("InvalidParameterValue", "The description is longer than %d characters", maxDescription)
			}
		case req.SourceDestCheck != nil:
			if req.SourceDestCheck.Value == nil {
				return query.Errorf("MissingParameter", "The request must contain the parameter sourceDestCheck.value")
			}
			e.SourceDestCheck = *req.SourceDestCheck.Value
		case len(req.SecurityGroupId) > 0:
			if e.Groups, err = a.groupsFor(&tx.State, tx.VPC(e.VPC), req.SecurityGroupId); err != nil {
				return err
			}
		case req.ConnectionTrackingSpecification != nil:
			if e.Conntrack, err = parseConntrack(req.ConnectionTrackingSpecification); err != nil {
				return err
			}
		case req.Attachment != nil:
			if req.Attachment.AttachmentId == nil || req.Attachment.DeleteOnTermination == nil {
				return query.Errorf("MissingParameter", "The request must contain the parameters attachment.attachmentId and attachment.deleteOnTermination")
			}
			id := *req.Attachment.AttachmentId
			if err := checkID("eni-attach", id); err != nil {
				return err
			}
			if e.Attachment == nil || string(e.Attachment.ID) != id {
				return noAttachment(id)
			}
			at := *e.Attachment
			at.DeleteOnTermination = *req.Attachment.DeleteOnTermination
			e.Attachment = &at
		}
		tx.PutENI(&e)
		return nil
	})
	return nil, err
}
