package api

import (
	"context"
	"iter"
	"net/netip"
	"slices"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func (a *API) dhcpHandlers(h map[string]query.Handler) {
	h["CreateDhcpOptions"] = handle("CreateDhcpOptions", "DhcpConfiguration TagSpecification", a.createDHCPOptions)
	h["DeleteDhcpOptions"] = handle("DeleteDhcpOptions", "DhcpOptionsId", a.deleteDHCPOptions)
	h["DescribeDhcpOptions"] = handle("DescribeDhcpOptions", "DhcpOptionsId Filter NextToken MaxResults", a.describeDHCPOptions)
	h["AssociateDhcpOptions"] = handle("AssociateDhcpOptions", "DhcpOptionsId VpcId", a.associateDHCPOptions)
}

// amazonDNS is the name of the VPC's own resolver among the name servers.
const amazonDNS = "AmazonProvidedDNS"

// maxServers is how many servers of one kind a set may name (VPC User Guide,
// "DHCP option sets", read 2026).
const maxServers = 4

func findDHCP(s *store.State, id string) (*store.DHCPOptions, error) {
	if err := checkID("dopt", id); err != nil {
		return nil, err
	}
	if o := s.DHCP(id); o != nil {
		return o, nil
	}
	return nil, query.Errorf("InvalidDhcpOptionID.NotFound", "The dhcpOption ID '%s' does not exist", id)
}

// checkDHCP returns an error unless an option may have these values.
func checkDHCP(key string, values []string) error {
	bad := func(v string) error {
		return query.Errorf("InvalidParameterValue", "Value (%s) for parameter value is invalid. Invalid DHCP option value for %s.", v, key)
	}
	if len(values) == 0 {
		return query.Errorf("MissingParameter", "The DHCP option %s has no value", key)
	}
	switch key {
	case "domain-name":
		if len(values) != 1 || values[0] == "" {
			return bad(values[0])
		}
	case "domain-name-servers", "ntp-servers", "netbios-name-servers":
		if len(values) > maxServers {
			return query.Errorf("InvalidParameterValue", "The DHCP option %s has more than %d values", key, maxServers)
		}
		for _, v := range values {
			p, err := netip.ParseAddr(v)
			if v == amazonDNS && key == "domain-name-servers" || err == nil && (p.Is4() || key != "netbios-name-servers") {
				continue
			}
			return bad(v)
		}
	case "netbios-node-type":
		if len(values) != 1 || !slices.Contains([]string{"1", "2", "4", "8"}, values[0]) {
			return bad(values[0])
		}
	default:
		return query.Errorf("InvalidParameterValue", "Value (%s) for parameter key is invalid. Unknown DHCP option.", key)
	}
	return nil
}

func (a *API) createDHCPOptions(_ context.Context, req *query.CreateDhcpOptionsRequest) (*query.CreateDhcpOptionsResponse, error) {
	tags, err := specified(req.TagSpecification, "dhcp-options")
	if err != nil {
		return nil, err
	}
	if len(req.DhcpConfiguration) == 0 {
		return nil, query.Errorf("MissingParameter", "The request must contain the parameter dhcpConfiguration")
	}
	o := &store.DHCPOptions{ID: vpc.NewID("dopt"), Created: a.now()}
	for _, c := range req.DhcpConfiguration {
		key := deref(c.Key)
		if err := checkDHCP(key, c.Value); err != nil {
			return nil, err
		}
		if slices.ContainsFunc(o.Options, func(x store.DHCPOption) bool { return x.Key == key }) {
			return nil, query.Errorf("InvalidParameterValue", "The DHCP option %s is given twice", key)
		}
		o.Options = append(o.Options, store.DHCPOption{Key: key, Values: c.Value})
	}
	after, err := a.update(func(tx *store.Tx) error {
		tx.PutDHCPOptions(o)
		tx.SetTags(o.ID, tags["dhcp-options"])
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.CreateDhcpOptionsResponse{DhcpOptions: new(after.dhcp(o))}, nil
}

func (a *API) deleteDHCPOptions(_ context.Context, req *query.DeleteDhcpOptionsRequest) (*query.DeleteDhcpOptionsResponse, error) {
	_, err := a.update(func(tx *store.Tx) error {
		o, err := findDHCP(&tx.State, *req.DhcpOptionsId)
		if err != nil {
			return err
		}
		for _, v := range tx.VPCs.All() {
			if v.DHCPOptions == o.ID {
				return depends("dhcpOptions", o.ID)
			}
		}
		tx.DeleteDHCPOptions(o.ID)
		return nil
	})
	return nil, err
}

// associateDHCPOptions gives a VPC a set of options, or with the id "default"
// none.
func (a *API) associateDHCPOptions(_ context.Context, req *query.AssociateDhcpOptionsRequest) (*query.AssociateDhcpOptionsResponse, error) {
	id := *req.DhcpOptionsId
	_, err := a.update(func(tx *store.Tx) error {
		if id != store.NoDHCPOptions {
			if _, err := findDHCP(&tx.State, id); err != nil {
				return err
			}
		}
		old, err := findVPC(&tx.State, *req.VpcId)
		if err != nil {
			return err
		}
		v := *old
		v.DHCPOptions = id
		tx.PutVPC(&v)
		return nil
	})
	return nil, err
}

// dhcpOptions returns the options of a set; those of the region's own follow
// from the region.
func (v view) dhcpOptions(o *store.DHCPOptions) []store.DHCPOption {
	if !o.Default {
		return o.Options
	}
	return []store.DHCPOption{{Key: "domain-name", Values: []string{v.api.domain()}}, {Key: "domain-name-servers", Values: []string{amazonDNS}}}
}

func (v view) dhcp(o *store.DHCPOptions) query.DhcpOptions {
	return query.DhcpOptions{
		DhcpOptionsId: &o.ID, OwnerId: &v.api.account, TagSet: v.tags(o.ID),
		DhcpConfigurationSet: collect(v.dhcpOptions(o), func(x store.DHCPOption) query.DhcpConfiguration {
			return query.DhcpConfiguration{Key: new(x.Key), ValueSet: collect(x.Values, func(s string) query.AttributeValue { return query.AttributeValue{Value: new(s)} })}
		}),
	}
}

var dhcpListing = listing[*store.DHCPOptions]{
	action: "DescribeDhcpOptions",
	all:    func(v view) iter.Seq2[string, *store.DHCPOptions] { return entries(v.DHCPOptions) },
	find:   findDHCP,
	key:    func(o *store.DHCPOptions) string { return o.ID },
	attrs: attributes[*store.DHCPOptions]{
		"dhcp-options-id": value(func(o *store.DHCPOptions) string { return o.ID }),
		"owner-id":        owned[*store.DHCPOptions],
		"key":             values(view.dhcpOptions, func(_ view, x store.DHCPOption) string { return x.Key }),
		"value": func(v view, o *store.DHCPOptions) []string {
			var out []string
			for _, x := range v.dhcpOptions(o) {
				out = append(out, x.Values...)
			}
			return out
		},
	},
}

func (a *API) describeDHCPOptions(_ context.Context, req *query.DescribeDhcpOptionsRequest) (*query.DescribeDhcpOptionsResponse, error) {
	v := a.read()
	found, next, err := dhcpListing.page(v, req.DhcpOptionsId, req.Filter, req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	return &query.DescribeDhcpOptionsResponse{NextToken: next, DhcpOptionsSet: collect(found, v.dhcp)}, nil
}
