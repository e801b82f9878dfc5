package api

import (
	"cmp"
	"context"
	"slices"
	"strconv"
	"strings"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
)

func (a *API) instanceTypeHandlers(h map[string]query.Handler) {
	h["DescribeInstanceTypes"] = handle("DescribeInstanceTypes", "InstanceType Filter NextToken MaxResults", a.describeInstanceTypes)
	h["DescribeInstanceTypeOfferings"] = handle("DescribeInstanceTypeOfferings", "LocationType Filter NextToken MaxResults", a.describeInstanceTypeOfferings)
}

// typeAttributes are the filters whose truth the limits table knows.
var typeAttributes = attributes[vpc.InstanceLimits]{
	"bare-metal":         func(_ view, l vpc.InstanceLimits) []string { return []string{strconv.FormatBool(l.BareMetal)} },
	"current-generation": func(_ view, l vpc.InstanceLimits) []string { return []string{strconv.FormatBool(l.CurrentGeneration)} },
	"hypervisor":         func(_ view, l vpc.InstanceLimits) []string { return []string{l.Hypervisor} },
	"instance-type":      func(_ view, l vpc.InstanceLimits) []string { return []string{l.Type} },
	"network-info.ipv4-addresses-per-interface": func(_ view, l vpc.InstanceLimits) []string { return []string{strconv.Itoa(l.IPv4PerENI)} },
	"network-info.ipv6-addresses-per-interface": func(_ view, l vpc.InstanceLimits) []string { return []string{strconv.Itoa(l.IPv6PerENI)} },
	"network-info.ipv6-supported":               func(_ view, l vpc.InstanceLimits) []string { return []string{strconv.FormatBool(l.IPv6PerENI > 0)} },
	"network-info.maximum-network-cards":        func(_ view, l vpc.InstanceLimits) []string { return []string{strconv.Itoa(max(1, l.NetworkCards))} },
	"network-info.maximum-network-interfaces":   func(_ view, l vpc.InstanceLimits) []string { return []string{strconv.Itoa(l.ENIs)} },
	"processor-info.supported-architecture":     func(_ view, l vpc.InstanceLimits) []string { return []string{architecture(l.Type)} },
	"supported-usage-class":                     func(view, vpc.InstanceLimits) []string { return []string{"on-demand"} },
	"vcpu-info.default-vcpus":                   func(_ view, l vpc.InstanceLimits) []string { return []string{strconv.Itoa(l.VCPUs)} },
}

// unknownTypeFilters are those that ask for what the table does not have.
var unknownTypeFilters = func() []string {
	var out []string
	for _, name := range query.Actions["DescribeInstanceTypes"].Filters {
		if typeAttributes[name] == nil {
			out = append(out, name)
		}
	}
	return out
}()

func noTypes(names []string) error {
	return query.Errorf("InvalidInstanceType", "The following supplied instance types do not exist: [%s]", strings.Join(names, ", "))
}

func (a *API) describeInstanceTypes(_ context.Context, req *query.DescribeInstanceTypesRequest) (*query.DescribeInstanceTypesResponse, error) {
	match, err := matcher(a.read(), "DescribeInstanceTypes", req.Filter, typeAttributes, unknownTypeFilters, nil)
	if err != nil {
		return nil, err
	}
	c, err := paging("DescribeInstanceTypes", req.Filter, len(req.InstanceType), req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	names := vpc.InstanceTypes()
	if len(req.InstanceType) > 0 {
		names = slices.Clone(req.InstanceType)
		slices.Sort(names)
		names = slices.Compact(names)
	}
	var missing []string
	for _, n := range names {
		if _, ok := vpc.LimitsOf(n); !ok {
			missing = append(missing, n)
		}
	}
	if len(missing) > 0 {
		return nil, noTypes(missing)
	}
	found, next := take(c, func(yield func(string, vpc.InstanceLimits) bool) {
		for _, n := range names {
			if l, _ := vpc.LimitsOf(n); !yield(n, l) {
				return
			}
		}
	}, match)
	return &query.DescribeInstanceTypesResponse{NextToken: next, InstanceTypeSet: collect(found, instanceType)}, nil
}

// instanceType describes a type as far as the limits table knows it: what it
// does not know is left out.
func instanceType(l vpc.InstanceLimits) query.InstanceTypeInfo {
	out := query.InstanceTypeInfo{
		InstanceType:          &l.Type,
		CurrentGeneration:     &l.CurrentGeneration,
		BareMetal:             &l.BareMetal,
		Hypervisor:            text(l.Hypervisor),
		SupportedUsageClasses: []string{"on-demand"},
		ProcessorInfo:         &query.ProcessorInfo{SupportedArchitectures: []string{architecture(l.Type)}},
		NetworkInfo: &query.NetworkInfo{
			MaximumNetworkInterfaces:  integer(l.ENIs),
			MaximumNetworkCards:       integer(max(1, l.NetworkCards)),
			DefaultNetworkCardIndex:   integer(0),
			Ipv4AddressesPerInterface: integer(l.IPv4PerENI),
			Ipv6AddressesPerInterface: integer(l.IPv6PerENI),
			Ipv6Supported:             new(l.IPv6PerENI > 0),
		},
	}
	if l.VCPUs > 0 {
		out.VCpuInfo = &query.VCpuInfo{DefaultVCpus: integer(l.VCPUs)}
	}
	for card := range max(1, l.NetworkCards) {
		out.NetworkInfo.NetworkCards = append(out.NetworkInfo.NetworkCards, query.NetworkCard{
			NetworkCardIndex: integer(card), MaximumNetworkInterfaces: integer(cardLimit(l, card)),
		})
	}
	if l.TCPEstablished > 0 {
		out.NetworkInfo.ConnectionTrackingConfiguration = &query.NetworkInfoConnectionTrackingConfiguration{
			DefaultTcpEstablishedTimeout: integer(l.TCPEstablished), DefaultUdpTimeout: integer(30), DefaultUdpStreamTimeout: integer(180),
		}
	}
	return out
}

type offering struct{ instanceType, locationType, location string }

var offeringAttributes = attributes[offering]{
	"instance-type": func(_ view, o offering) []string { return []string{o.instanceType} },
	"location":      func(_ view, o offering) []string { return []string{o.location} },
}

func (a *API) describeInstanceTypeOfferings(_ context.Context, req *query.DescribeInstanceTypeOfferingsRequest) (*query.DescribeInstanceTypeOfferingsResponse, error) {
	match, err := matcher(a.read(), "DescribeInstanceTypeOfferings", req.Filter, offeringAttributes, nil, nil)
	if err != nil {
		return nil, err
	}
	c, err := paging("DescribeInstanceTypeOfferings", req.Filter, 0, req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	kind := cmp.Or(deref(req.LocationType), "region")
	var places []string
	switch kind {
	case "region":
		places = []string{a.region}
	case "availability-zone":
		places = collect(a.zones, func(z zone) string { return z.name })
	case "availability-zone-id":
		places = collect(a.zones, func(z zone) string { return z.id })
	} // an outpost there is not
	found, next := take(c, func(yield func(string, offering) bool) {
		for _, n := range vpc.InstanceTypes() {
			for _, p := range places {
				if !yield(n+"\x00"+p, offering{n, kind, p}) {
					return
				}
			}
		}
	}, match)
	return &query.DescribeInstanceTypeOfferingsResponse{NextToken: next, InstanceTypeOfferingSet: collect(found, func(o offering) query.InstanceTypeOffering {
		return query.InstanceTypeOffering{InstanceType: &o.instanceType, LocationType: &o.locationType, Location: &o.location}
	})}, nil
}
