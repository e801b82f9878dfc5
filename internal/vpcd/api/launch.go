package api

import (
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"slices"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// maxUserData is the limit of user data before it is encoded, in bytes (EC2
// user guide, "instance user data").
const maxUserData = 16 << 10

// nic is one interface that RunInstances asks for.
type nic struct {
	device, card        int
	existing            string // id of an interface that is to be attached, or ""
	subnet              string
	spec                spec
	deleteOnTermination bool
}

// launch is a RunInstances request, read.
type launch struct {
	min, max int
	image    string
	limits   vpc.InstanceLimits
	nics     []nic // the one at device 0 of card 0 first
	tags     map[string]map[string]string
	proto    store.Instance // what all instances of the launch have in common
	zone     zone           // zero: any

	resourceNameA *bool // nil: as the subnet says
}

func parseLaunch(a *API, req *query.RunInstancesRequest) (launch, error) {
	l := launch{min: int(*req.MinCount), max: int(*req.MaxCount), image: deref(req.ImageId)}
	if *req.MinCount < 1 || *req.MaxCount < *req.MinCount || *req.MaxCount > 1<<20 {
		return l, query.Errorf("InvalidParameterValue", "Value (%d) for parameter maxCount is invalid. It must be at least minCount (%d), which must be at least 1.", *req.MaxCount, *req.MinCount)
	}
	if l.image == "" {
		return l, query.Errorf("MissingParameter", "The request must contain the parameter ImageId")
	}
	if err := checkID("ami", l.image); err != nil {
		return l, err
	}
	typ := cmp.Or(deref(req.InstanceType), "m1.small") // EC2's default of old
	var ok bool
	if l.limits, ok = vpc.LimitsOf(typ); !ok {
		return l, query.Errorf("InvalidParameterValue", "Invalid value '%s' for InstanceType.", typ)
	}
	var err error
	if l.tags, err = specified(req.TagSpecification, "instance", "network-interface", "volume"); err != nil {
		return l, err
	}
	if req.UserData != nil {
		if raw, err := base64.StdEncoding.DecodeString(*req.UserData); err != nil || len(raw) > maxUserData {
			return l, query.Errorf("InvalidParameterValue", "User data must be base64-encoded, and at most %d bytes before it is", maxUserData)
		}
	}
	md, err := metadata(store.MetadataOptions{Tokens: "optional", HopLimit: 1, Endpoint: "enabled", Tags: "disabled"}, req.MetadataOptions)
	if err != nil {
		return l, err
	}
	l.proto = store.Instance{
		Reservation: vpc.NewID("r"), Type: typ, Image: l.image, KeyName: deref(req.KeyName), State: store.Pending,
		ClientToken: deref(req.ClientToken), Metadata: md, UserData: deref(req.UserData),
		TerminationLocked: deref(req.DisableApiTermination), StopLocked: deref(req.DisableApiStop), ShutdownTerminates: deref(req.InstanceInitiatedShutdownBehavior) == "terminate",
	}
	if p := req.IamInstanceProfile; p != nil {
		l.proto.Profile = cmp.Or(deref(p.Arn), "arn:aws:iam::"+a.account+":instance-profile/"+deref(p.Name))
	}
	if req.Monitoring != nil {
		l.proto.Monitoring = deref(req.Monitoring.Enabled)
	}
	if req.PrivateDnsNameOptions != nil {
		l.proto.HostType = deref(req.PrivateDnsNameOptions.HostnameType)
		l.resourceNameA = req.PrivateDnsNameOptions.EnableResourceNameDnsARecord
	}
	if p := req.Placement; p != nil && (p.AvailabilityZone != nil || p.AvailabilityZoneId != nil) {
		if l.zone, err = a.pickZone(p.AvailabilityZone, p.AvailabilityZoneId); err != nil {
			return l, err
		}
	}
	l.nics, err = parseNICs(req)
	return l, err
}

// metadata applies what a request says to the metadata options of an instance.
func metadata(o store.MetadataOptions, req *query.MetadataOptions) (store.MetadataOptions, error) {
	if req == nil {
		return o, nil
	}
	o.Tokens = cmp.Or(deref(req.HttpTokens), o.Tokens)
	o.Endpoint = cmp.Or(deref(req.HttpEndpoint), o.Endpoint)
	o.Tags = cmp.Or(deref(req.InstanceMetadataTags), o.Tags)
	if h := req.HttpPutResponseHopLimit; h != nil {
		if *h < 1 || *h > 64 {
			return o, query.Errorf("InvalidParameterValue", "Value (%d) for parameter HttpPutResponseHopLimit is invalid. Expecting a value between 1 and 64.", *h)
		}
		o.HopLimit = int(*h)
	}
	return o, nil
}

// parseNICs reads the interfaces: those that the request lists, or the one that
// its own subnet, groups and address describe.
func parseNICs(req *query.RunInstancesRequest) ([]nic, error) {
	if len(req.NetworkInterface) == 0 {
		if req.SubnetId == nil {
			return nil, query.Errorf("MissingInput", "No subnets found for the default VPC. Please specify a subnet.")
		}
		w, err := parseWanted(req.PrivateIpAddress, nil, nil, nil, nil)
		if err != nil {
			return nil, err
		}
		if w.named() && *req.MaxCount > 1 {
			return nil, oneAtATime("a private IP address")
		}
		w6, err := parseWantedIPv6(req.Ipv6Address, req.Ipv6AddressCount, nil, nil)
		if err != nil {
			return nil, err
		}
		if len(w6.addrs) > 0 && *req.MaxCount > 1 {
			return nil, oneAtATime("IPv6 addresses")
		}
		return []nic{{subnet: *req.SubnetId, spec: spec{addrs: w, ipv6: w6, groups: req.SecurityGroupId}, deleteOnTermination: true}}, nil
	}
	switch {
	case req.SubnetId != nil:
		return nil, query.Errorf("InvalidParameterCombination", "Network interfaces and an instance-level subnet ID may not be specified on the same request")
	case len(req.SecurityGroupId) > 0:
		return nil, query.Errorf("InvalidParameterCombination", "Network interfaces and an instance-level security groups may not be specified on the same request")
	case req.PrivateIpAddress != nil:
		return nil, query.Errorf("InvalidParameterCombination", "Network interfaces and an instance-level private IP address may not be specified on the same request")
	case len(req.Ipv6Address) > 0 || req.Ipv6AddressCount != nil:
		return nil, query.Errorf("InvalidParameterCombination", "Network interfaces and instance-level IPv6 addresses may not be specified on the same request")
	}
	var nics []nic
	for i := range req.NetworkInterface {
		n, err := parseNIC(&req.NetworkInterface[i], *req.MaxCount)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(nics, func(o nic) bool { return o.device == n.device && o.card == n.card }) {
			return nil, query.Errorf("InvalidParameterValue", "The device index %d of network card %d is given twice", n.device, n.card)
		}
		nics = append(nics, n)
	}
	slices.SortFunc(nics, func(x, y nic) int { return cmp.Or(cmp.Compare(x.card, y.card), cmp.Compare(x.device, y.device)) })
	if nics[0].device != 0 || nics[0].card != 0 {
		return nil, query.Errorf("InvalidParameterCombination", "An instance needs a network interface at device index 0")
	}
	return nics, nil
}

func oneAtATime(what string) error {
	return query.Errorf("InvalidParameterCombination", "You cannot specify %s when launching more than one instance", what)
}

func parseNIC(r *query.RunInstancesNetworkInterface, maxCount int64) (nic, error) {
	if r.DeviceIndex == nil {
		return nic{}, query.Errorf("InvalidParameterValue", "Each network interface requires a device index.")
	}
	n := nic{device: int(*r.DeviceIndex), card: int(deref(r.NetworkCardIndex)), existing: deref(r.NetworkInterfaceId), subnet: deref(r.SubnetId)}
	w, err := parseWanted(r.PrivateIpAddress, r.PrivateIpAddresses, r.SecondaryPrivateIpAddressCount, r.Ipv4Prefix, r.Ipv4PrefixCount)
	if err != nil {
		return n, err
	}
	if n.spec, err = parseSpec(w, r.SecurityGroupId, r.Description, r.ConnectionTrackingSpecification); err != nil {
		return n, err
	}
	if n.spec.ipv6, err = parseWantedIPv6(r.Ipv6Addresses, r.Ipv6AddressCount, r.Ipv6Prefix, r.Ipv6PrefixCount); err != nil {
		return n, err
	}
	if n.existing == "" {
		if n.subnet == "" {
			return n, query.Errorf("MissingInput", "No subnets found for the default VPC. Please specify a subnet.")
		}
		if w.named() && maxCount > 1 {
			return n, oneAtATime("private IP addresses or prefixes")
		}
		if n.spec.ipv6.named() && maxCount > 1 {
			return n, oneAtATime("IPv6 addresses or prefixes")
		}
		n.deleteOnTermination = r.DeleteOnTermination == nil || *r.DeleteOnTermination
		return n, nil
	}
	if maxCount > 1 {
		return n, oneAtATime("a network interface ID")
	}
	for name, given := range map[string]bool{
		"a subnet ID": n.subnet != "", "security groups": len(r.SecurityGroupId) > 0, "a description": r.Description != nil,
		"private IP addresses or prefixes": w.named() || w.slots() > 0, "delete on termination": deref(r.DeleteOnTermination),
		"connection tracking": r.ConnectionTrackingSpecification != nil, "IPv6 addresses or prefixes": !n.spec.ipv6.unsaid,
	} {
		if given {
			return n, query.Errorf("InvalidParameterCombination", "A network interface may not specify both a network interface ID and %s", name)
		}
	}
	return n, nil
}

func (a *API) runInstances(_ context.Context, req *query.RunInstancesRequest) (*query.RunInstancesResponse, error) {
	l, err := parseLaunch(a, req)
	if err != nil {
		return nil, err
	}
	params := *req
	params.ClientToken, params.DryRun = nil, nil
	var made []*store.Instance
	after, err := a.update(func(tx *store.Tx) error {
		before, err := once(tx, "RunInstances", req.ClientToken, params)
		if err != nil {
			return err
		}
		if len(before) > 0 {
			made, err = findAll(&tx.State, before, findInstance)
			return err
		}
		for n := range l.max {
			var i *store.Instance
			err := tx.Try(func() (err error) {
				i, err = a.launchOne(tx, l, n)
				return err
			})
			if code := new(query.Error); n >= l.min && errors.As(err, &code) && code.Code == "InsufficientFreeAddressesInSubnet" {
				break // as many as there is room for
			}
			if err != nil {
				return err
			}
			made = append(made, i)
		}
		ids := collect(made, func(i *store.Instance) string { return string(i.ID) })
		return remember(tx, "RunInstances", req.ClientToken, params, a.now(), ids)
	})
	if err != nil {
		return nil, err
	}
	return &query.RunInstancesResponse{
		ReservationId: text(made[0].Reservation), OwnerId: &a.account, GroupSet: []query.GroupIdentifier{},
		InstancesSet: collect(made, func(i *store.Instance) query.Instance { return after.instance(i) }),
	}, nil
}

// launchOne makes the nth instance of a launch and its interfaces.
func (a *API) launchOne(tx *store.Tx, l launch, n int) (*store.Instance, error) {
	i := l.proto
	i.ID, i.LaunchIndex = vpc.InstanceID(vpc.NewID("i")), n
	i.Launched = a.now()
	i.Due = a.due(i.Launched)
	onCard := map[int]int{}
	for k, want := range l.nics {
		if err := fits(l.limits, k, onCard[want.card], want.card, want.device); err != nil {
			return nil, err
		}
		onCard[want.card]++
		e, err := a.launchNIC(tx, l, want)
		if err != nil {
			return nil, err
		}
		if e.Slots() > l.limits.IPv4PerENI {
			return nil, query.Errorf(launchLimitExceeded, "Number of private addresses will exceed limit.")
		}
		if len(e.Prefixes) > 0 && !l.limits.Nitro() {
			return nil, noPrefixes(i.Type)
		}
		if err := fitsIPv6(l.limits, len(e.IPv6), len(e.IPv6Prefixes), launchLimitExceeded); err != nil {
			return nil, err
		}
		if k == 0 {
			i.VPC, i.Subnet, i.Zone = e.VPC, e.Subnet, e.Zone
			if n := tx.Subnet(e.Subnet); l.resourceNameA != nil {
				i.ResourceNameA = *l.resourceNameA
			} else {
				i.ResourceNameA = n.ResourceNameA
			}
			if i.HostType == "" {
				i.HostType = tx.Subnet(e.Subnet).HostType
			}
		}
		if e.Zone != i.Zone || l.zone.name != "" && e.Zone != l.zone.name {
			return nil, query.Errorf("InvalidParameterCombination", "All network interfaces of an instance must be in its availability zone, '%s'", cmp.Or(l.zone.name, i.Zone))
		}
		e.Attachment = a.attachmentOf(i.ID, want.card, want.device, want.deleteOnTermination)
		tx.PutENI(e)
		if want.existing == "" {
			tx.SetTags(string(e.ID), l.tags["network-interface"])
		}
	}
	tx.PutInstance(&i)
	tx.SetTags(string(i.ID), l.tags["instance"])
	return &i, nil
}

// launchNIC makes one interface of an instance, or takes the one that is named.
// It is the caller's to change and to put.
func (a *API) launchNIC(tx *store.Tx, l launch, want nic) (*store.ENI, error) {
	if want.existing != "" {
		old, err := findENI(&tx.State, want.existing)
		if err != nil {
			return nil, err
		}
		if old.Attachment != nil {
			return nil, inUse(old.ID)
		}
		e := *old
		return &e, nil
	}
	if 1+want.spec.addrs.slots() > l.limits.IPv4PerENI {
		// Before they are looked for: the subnet may not have so many.
		return nil, query.Errorf(launchLimitExceeded, "Number of private addresses will exceed limit.")
	}
	w6 := want.spec.ipv6
	if err := fitsIPv6(l.limits, len(w6.addrs)+w6.addrCount, len(w6.prefixes)+w6.prefixCount, launchLimitExceeded); err != nil {
		return nil, err
	}
	n, err := findSubnet(&tx.State, want.subnet)
	if err != nil {
		return nil, err
	}
	return a.makeENI(tx, n, want.spec)
}
