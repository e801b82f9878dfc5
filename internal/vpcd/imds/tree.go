package imds

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// dir is a directory of items: each is a string, or a dir.
type dir map[string]any

// list is what a directory answers: its items, one per line, directories with
// a slash.
func (d dir) list() string {
	names := slices.Sorted(maps.Keys(d))
	for i, n := range names {
		if _, ok := d[n].(dir); ok {
			names[i] = n + "/"
		}
	}
	return strings.Join(names, "\n")
}

// versions that the service answers to, all alike.
var versions = []string{
	"1.0", "2007-01-19", "2007-03-01", "2007-08-29", "2007-10-10", "2007-12-15", "2008-02-01", "2008-09-01",
	"2009-04-04", "2011-01-01", "2011-05-01", "2012-01-12", "2014-02-25", "2014-11-05", "2015-10-20",
	"2016-04-19", "2016-06-30", "2016-09-02", "2018-03-28", "2018-08-17", "2018-09-24", "2019-10-01",
	"2020-10-27", "2021-01-03", "2021-03-23", "2021-07-15", "2022-09-24", "2024-04-11", "latest",
}

// lookup finds the item at a path; false: there is none.
func (s *Server) lookup(i *Instance, path string) (body string, found bool) {
	isDir := strings.HasSuffix(path, "/")
	var parts []string
	for p := range strings.SplitSeq(path, "/") {
		if p != "" {
			parts = append(parts, p)
		}
	}
	if len(parts) == 0 {
		return strings.Join(versions, "\n"), true
	}
	if !slices.Contains(versions, parts[0]) {
		return "", false
	}
	root := s.tree(i)
	if len(parts) == 1 {
		// Unlike the directories below, this one has no slashes.
		return strings.Join(slices.Sorted(maps.Keys(root)), "\n"), true
	}
	var at any = root
	for _, p := range parts[1:] {
		d, ok := at.(dir)
		if !ok {
			return "", false
		}
		if at, ok = d[p]; !ok {
			return "", false
		}
	}
	switch v := at.(type) {
	case dir:
		return v.list(), true
	case string:
		return v, !isDir
	}
	return "", false
}

// tree is all there is below a version.
func (s *Server) tree(i *Instance) dir {
	root := dir{
		"meta-data": s.metadata(i),
		"dynamic":   dir{"instance-identity": dir{"document": identity(i)}},
	}
	if len(i.UserData) > 0 {
		root["user-data"] = string(i.UserData)
	}
	return root
}

func (s *Server) metadata(i *Instance) dir {
	d := dir{
		"ami-id":              i.Image,
		"ami-launch-index":    strconv.Itoa(i.LaunchIndex),
		"instance-action":     "none",
		"instance-id":         string(i.ID),
		"instance-life-cycle": "on-demand",
		"instance-type":       i.Type,
		"profile":             "default-hvm",
		"reservation-id":      i.Reservation,
		"system":              "nitro",
		"placement": dir{
			"availability-zone":    i.Zone,
			"availability-zone-id": i.ZoneID,
			"region":               i.Region,
		},
		"services": dir{"domain": "amazonaws.com", "partition": "aws"},
	}
	macs := dir{}
	for k := range i.Interfaces {
		n := &i.Interfaces[k]
		macs[n.MAC] = i.network(n)
	}
	d["network"] = dir{"interfaces": dir{"macs": macs}}
	if p := i.primary(); p != nil {
		name := i.hostname(p.Primary)
		d["hostname"], d["local-hostname"] = name, name
		d["local-ipv4"] = p.Primary.String()
		d["mac"] = p.MAC
		if len(p.IPv6) > 0 {
			d["ipv6"] = p.IPv6[0].String()
		}
		d["security-groups"] = strings.Join(p.GroupNames, "\n")
		for _, x := range p.Elastic {
			if x.Private == p.Primary {
				d["public-ipv4"] = x.Public.String()
			}
		}
	}
	if i.Profile != "" {
		d["iam"] = dir{
			"info":                 iamInfo(i),
			"security-credentials": dir{i.role(): s.credentials(i)},
		}
	}
	if i.Options.Tags {
		tags := dir{}
		for k, v := range i.Tags {
			// EC2 refuses such keys where tags are to be seen in metadata.
			if k != "" && !strings.ContainsAny(k, "/ ") && k != "." && k != ".." {
				tags[k] = v
			}
		}
		d["tags"] = dir{"instance": tags}
	}
	return d
}

// network is the directory of one interface.
func (i *Instance) network(n *Interface) dir {
	d := dir{
		"device-number":          strconv.Itoa(n.Device),
		"interface-id":           string(n.ID),
		"local-hostname":         i.hostname(n.Primary),
		"local-ipv4s":            lines(n.Primary, n.Secondary),
		"mac":                    n.MAC,
		"owner-id":               n.OwnerID,
		"security-group-ids":     join(n.GroupIDs),
		"security-groups":        strings.Join(n.GroupNames, "\n"),
		"subnet-id":              string(n.Subnet),
		"subnet-ipv4-cidr-block": n.SubnetCIDR.String(),
		"vpc-id":                 string(n.VPC),
		"vpc-ipv4-cidr-blocks":   printed(n.VPCCIDRs),
		// The documented name, and the one that older documents have.
		"network-card":       strconv.Itoa(n.Card),
		"network-card-index": strconv.Itoa(n.Card),
	}
	if len(n.VPCCIDRs) > 0 {
		d["vpc-ipv4-cidr-block"] = n.VPCCIDRs[0].String()
	}
	if len(n.Elastic) > 0 {
		of := dir{}
		var public []netip.Addr
		for _, x := range n.Elastic {
			public = append(public, x.Public)
			of[x.Public.String()] = x.Private.String()
		}
		d["public-ipv4s"], d["ipv4-associations"] = printed(public), of
	}
	if len(n.Prefixes) > 0 {
		d["ipv4-prefix"] = printed(n.Prefixes)
	}
	if len(n.IPv6) > 0 {
		d["ipv6s"] = printed(n.IPv6)
	}
	for item, blocks := range map[string][]netip.Prefix{
		"ipv6-prefix": n.IPv6Prefixes, "subnet-ipv6-cidr-blocks": n.SubnetIPv6, "vpc-ipv6-cidr-blocks": n.VPCIPv6,
	} {
		if len(blocks) > 0 {
			d[item] = printed(blocks)
		}
	}
	return d
}

func lines[T fmt.Stringer](first T, rest []T) string {
	return printed(append([]T{first}, rest...))
}

func printed[T fmt.Stringer](items []T) string {
	out := make([]string, len(items))
	for k, it := range items {
		out[k] = it.String()
	}
	return strings.Join(out, "\n")
}

func join[S ~string](items []S) string {
	out := make([]string, len(items))
	for k, it := range items {
		out[k] = string(it)
	}
	return strings.Join(out, "\n")
}

// identity is the instance identity document, unsigned.
func identity(i *Instance) string {
	address := ""
	if p := i.primary(); p != nil {
		address = p.Primary.String()
	}
	return document(map[string]any{
		"accountId": i.Account, "architecture": i.Arch, "availabilityZone": i.Zone,
		"billingProducts": nil, "devpayProductCodes": nil, "marketplaceProductCodes": nil,
		"imageId": i.Image, "instanceId": i.ID, "instanceType": i.Type, "kernelId": nil,
		"pendingTime": i.Launched.UTC().Format(time.RFC3339), "privateIp": address,
		"ramdiskId": nil, "region": i.Region, "version": "2017-09-30",
	})
}

func iamInfo(i *Instance) string {
	return document(map[string]any{
		"Code": "Success", "LastUpdated": i.Launched.UTC().Format(time.RFC3339),
		"InstanceProfileArn": i.profileARN(), "InstanceProfileId": "AIPA" + strings.ToUpper(strings.TrimPrefix(string(i.ID), "i-")),
	})
}

func document(v map[string]any) string {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		panic("imds: " + err.Error()) // strings and nulls always encode
	}
	return string(b)
}
