package api

import (
	"context"
	"slices"
	"strconv"
	"strings"

	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
)

// zone is one availability zone.
type zone struct {
	name string // us-east-1a
	id   string // use1-az1
}

// directions are how zone ids abbreviate the middle of a region's name.
var directions = strings.NewReplacer("gov-west", "gw", "gov-east", "ge", "northeast", "ne", "northwest", "nw", "southeast", "se", "southwest", "sw",
	"north", "n", "south", "s", "east", "e", "west", "w", "central", "c", "-", "")

func zonesOf(region string, n int) []zone {
	zones := make([]zone, n)
	for i := range zones {
		zones[i] = zone{region + string(rune('a'+i)), directions.Replace(region) + "-az" + strconv.Itoa(i+1)}
	}
	return zones
}

// zoneID returns the id of a zone by its name, or "".
func (a *API) zoneID(name string) string {
	for _, z := range a.zones {
		if z.name == name {
			return z.id
		}
	}
	return ""
}

func (a *API) zoneHandlers(h map[string]query.Handler) {
	h["DescribeRegions"] = handle("DescribeRegions", "RegionName Filter", a.describeRegions)
	h["DescribeAvailabilityZones"] = handle("DescribeAvailabilityZones", "ZoneName ZoneId Filter", a.describeAvailabilityZones)
	h["DescribeAccountAttributes"] = handle("DescribeAccountAttributes", "AttributeName", a.describeAccountAttributes)
}

func (a *API) describeRegions(_ context.Context, req *query.DescribeRegionsRequest) (*query.DescribeRegionsResponse, error) {
	for _, name := range req.RegionName {
		if name != a.region {
			return nil, query.Errorf("InvalidParameterValue", "Invalid region provided: '%s'. This vpcd is the region '%s'.", name, a.region)
		}
	}
	r := query.Region{
		RegionName:     &a.region,
		RegionEndpoint: new("ec2." + a.region + ".amazonaws.com"),
		OptInStatus:    new("opt-in-not-required"),
	}
	match, err := matcher(a.read(), "DescribeRegions", req.Filter, attributes[query.Region]{
		"endpoint":      func(_ view, r query.Region) []string { return []string{*r.RegionEndpoint} },
		"opt-in-status": func(_ view, r query.Region) []string { return []string{*r.OptInStatus} },
		"region-name":   func(_ view, r query.Region) []string { return []string{*r.RegionName} },
	}, nil, nil)
	if err != nil {
		return nil, err
	}
	resp := &query.DescribeRegionsResponse{RegionInfo: []query.Region{}}
	if match(r) {
		resp.RegionInfo = append(resp.RegionInfo, r)
	}
	return resp, nil
}

var zoneAttributes = attributes[query.AvailabilityZone]{
	"group-name":     func(_ view, z query.AvailabilityZone) []string { return []string{*z.GroupName} },
	"opt-in-status":  func(_ view, z query.AvailabilityZone) []string { return []string{*z.OptInStatus} },
	"region-name":    func(_ view, z query.AvailabilityZone) []string { return []string{*z.RegionName} },
	"state":          func(_ view, z query.AvailabilityZone) []string { return []string{*z.ZoneState} },
	"zone-id":        func(_ view, z query.AvailabilityZone) []string { return []string{*z.ZoneId} },
	"zone-name":      func(_ view, z query.AvailabilityZone) []string { return []string{*z.ZoneName} },
	"zone-type":      func(_ view, z query.AvailabilityZone) []string { return []string{*z.ZoneType} },
	"parent-zone-id": func(view, query.AvailabilityZone) []string { return nil },
}

func (a *API) describeAvailabilityZones(_ context.Context, req *query.DescribeAvailabilityZonesRequest) (*query.DescribeAvailabilityZonesResponse, error) {
	for _, name := range req.ZoneName {
		if !slices.ContainsFunc(a.zones, func(z zone) bool { return z.name == name }) {
			return nil, query.Errorf("InvalidParameterValue", "Invalid availability zone: [%s]", name)
		}
	}
	for _, id := range req.ZoneId {
		if !slices.ContainsFunc(a.zones, func(z zone) bool { return z.id == id }) {
			return nil, query.Errorf("InvalidParameterValue", "Invalid availability zone-id: [%s]", id)
		}
	}
	match, err := matcher(a.read(), "DescribeAvailabilityZones", req.Filter, zoneAttributes, nil, nil)
	if err != nil {
		return nil, err
	}
	resp := &query.DescribeAvailabilityZonesResponse{AvailabilityZoneInfo: []query.AvailabilityZone{}}
	for _, z := range a.zones {
		if len(req.ZoneName) > 0 && !slices.Contains(req.ZoneName, z.name) || len(req.ZoneId) > 0 && !slices.Contains(req.ZoneId, z.id) {
			continue
		}
		out := query.AvailabilityZone{
			OptInStatus:        new("opt-in-not-required"),
			RegionName:         &a.region,
			ZoneName:           &z.name,
			ZoneId:             &z.id,
			GroupName:          new(a.region + "-zg-1"),
			NetworkBorderGroup: &a.region,
			ZoneType:           new("availability-zone"),
			ZoneState:          new("available"),
		}
		if match(out) {
			resp.AvailabilityZoneInfo = append(resp.AvailabilityZoneInfo, out)
		}
	}
	return resp, nil
}

func (a *API) describeAccountAttributes(_ context.Context, req *query.DescribeAccountAttributesRequest) (*query.DescribeAccountAttributesResponse, error) {
	all := []struct{ name, value string }{
		{"supported-platforms", "VPC"},
		{"default-vpc", "none"},
		{"vpc-max-security-groups-per-interface", strconv.Itoa(a.quota(chaos.QuotaGroupsPerInterface))},
		{"max-instances", "20000"},
		{"max-elastic-ips", strconv.Itoa(a.quota(chaos.QuotaElastic))},
		{"vpc-max-elastic-ips", strconv.Itoa(a.quota(chaos.QuotaElastic))},
	}
	resp := &query.DescribeAccountAttributesResponse{AccountAttributeSet: []query.AccountAttribute{}}
	for _, n := range req.AttributeName {
		if !slices.ContainsFunc(all, func(v struct{ name, value string }) bool { return v.name == n }) {
			return nil, query.Errorf("InvalidParameterValue", "Value (%s) for parameter attributeName is invalid", n)
		}
	}
	for _, v := range all {
		if len(req.AttributeName) == 0 || slices.Contains(req.AttributeName, v.name) {
			resp.AccountAttributeSet = append(resp.AccountAttributeSet, query.AccountAttribute{
				AttributeName:     new(v.name),
				AttributeValueSet: []query.AccountAttributeValue{{AttributeValue: new(v.value)}},
			})
		}
	}
	return resp, nil
}
