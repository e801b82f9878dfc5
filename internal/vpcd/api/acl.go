package api

import (
	"cmp"
	"context"
	"iter"
	"net/netip"
	"slices"
	"strconv"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func (a *API) aclHandlers(h map[string]query.Handler) {
	h["CreateNetworkAcl"] = handle("CreateNetworkAcl", "VpcId TagSpecification ClientToken", a.createNetworkACL)
	h["DeleteNetworkAcl"] = handle("DeleteNetworkAcl", "NetworkAclId", a.deleteNetworkACL)
	h["DescribeNetworkAcls"] = handle("DescribeNetworkAcls", "NetworkAclId Filter NextToken MaxResults", a.describeNetworkACLs)
	entry := "NetworkAclId RuleNumber Protocol RuleAction Egress CidrBlock Ipv6CidrBlock Icmp PortRange"
	h["CreateNetworkAclEntry"] = handle("CreateNetworkAclEntry", entry, a.createNetworkACLEntry)
	h["ReplaceNetworkAclEntry"] = handle("ReplaceNetworkAclEntry", entry, a.replaceNetworkACLEntry)
	h["DeleteNetworkAclEntry"] = handle("DeleteNetworkAclEntry", "NetworkAclId RuleNumber Egress", a.deleteNetworkACLEntry)
	h["ReplaceNetworkAclAssociation"] = handle("ReplaceNetworkAclAssociation", "AssociationId NetworkAclId", a.replaceNetworkACLAssociation)
}

func (a *API) createNetworkACL(_ context.Context, req *query.CreateNetworkAclRequest) (*query.CreateNetworkAclResponse, error) {
	tags, err := specified(req.TagSpecification, "network-acl")
	if err != nil {
		return nil, err
	}
	params := *req
	params.ClientToken, params.DryRun = nil, nil
	var made string
	after, err := a.update(func(tx *store.Tx) error {
		v, err := findVPC(&tx.State, *req.VpcId)
		if err != nil {
			return err
		}
		made, err = onceOnly(tx, "CreateNetworkAcl", req.ClientToken, params, a.now(), func() (string, error) {
			n := 0
			for _, l := range tx.ACLs.All() {
				if l.VPC == v.ID {
					n++
				}
			}
			if most := a.quota(chaos.QuotaACLs); n >= most {
				return "", quotaReached("NetworkAclLimitExceeded", "network ACLs of the VPC", most)
			}
			l := &store.NetworkACL{ID: vpc.NetworkACLID(vpc.NewID("acl")), VPC: v.ID, ClientToken: deref(req.ClientToken), Created: a.now()}
			tx.PutACL(l)
			tx.SetTags(string(l.ID), tags["network-acl"])
			return string(l.ID), nil
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	l, err := findACL(after.State, made)
	if err != nil {
		return nil, err
	}
	return &query.CreateNetworkAclResponse{NetworkAcl: new(after.acl(l)), ClientToken: req.ClientToken}, nil
}

func (a *API) deleteNetworkACL(_ context.Context, req *query.DeleteNetworkAclRequest) (*query.DeleteNetworkAclResponse, error) {
	_, err := a.update(func(tx *store.Tx) error {
		l, err := findACL(&tx.State, *req.NetworkAclId)
		switch {
		case err != nil:
			return err
		case l.Default:
			return query.Errorf("InvalidParameterValue", "cannot delete default network ACL %s", l.ID)
		case len(l.Associations) > 0:
			return depends("networkAcl", string(l.ID))
		}
		tx.DeleteACL(l.ID)
		return nil
	})
	return nil, err
}

// aclProtocols are the protocols that may be given by name; the answer has
// their numbers (IANA protocol numbers).
var aclProtocols = map[string]int{"all": -1, "icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58}

const (
	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58
)

// parseACLEntry reads an entry. Ports and ICMP types of protocols that have
// none are not looked at, as on EC2 (EC2 API Reference, CreateNetworkAclEntry,
// "Protocol"; read 2026).
func parseACLEntry(req *query.CreateNetworkAclEntryRequest) (store.ACLEntry, error) {
	e := store.ACLEntry{Number: int(*req.RuleNumber), Egress: *req.Egress, Allow: *req.RuleAction == "allow", ICMPType: -1, ICMPCode: -1}
	if e.Number < 1 || e.Number >= store.LastRule {
		return e, query.Errorf("InvalidParameterValue", "Value (%d) for parameter ruleNumber is invalid. Expecting a number from 1 to %d.", e.Number, store.LastRule-1)
	}
	n, named := aclProtocols[*req.Protocol]
	if !named {
		var err error
		if n, err = strconv.Atoi(*req.Protocol); err != nil || n < -1 || n > 255 {
			return e, query.Errorf("InvalidParameterValue", "Invalid value '%s' for IP protocol. Unknown protocol.", *req.Protocol)
		}
	}
	e.Protocol = n
	var err error
	switch {
	case req.CidrBlock != nil && req.Ipv6CidrBlock != nil:
		return e, query.Errorf("InvalidParameterCombination", "The parameters cidrBlock and ipv6CidrBlock exclude each other")
	case req.CidrBlock != nil:
		e.CIDR, err = ruleBlock(*req.CidrBlock, true)
	case req.Ipv6CidrBlock != nil:
		e.CIDR, err = ruleBlock(*req.Ipv6CidrBlock, false)
	default:
		err = query.Errorf("MissingParameter", "The request must contain the parameter cidrBlock")
	}
	if err != nil {
		return e, err
	}
	switch n {
	case protoTCP, protoUDP:
		if req.PortRange == nil || req.PortRange.From == nil || req.PortRange.To == nil {
			return e, query.Errorf("MissingParameter", "The request must contain the parameter portRange")
		}
		e.From, e.To = int(*req.PortRange.From), int(*req.PortRange.To)
		if e.From == -1 && e.To == -1 {
			e.From, e.To = 0, 65535
		}
		if e.From < 0 || e.To > 65535 || e.From > e.To {
			return e, query.Errorf("InvalidParameterValue", "Invalid TCP/UDP port range (%d:%d)", e.From, e.To)
		}
	case protoICMP, protoICMPv6:
		if req.Icmp == nil || req.Icmp.Type == nil || req.Icmp.Code == nil {
			return e, query.Errorf("MissingParameter", "The request must contain the parameter icmpTypeCode")
		}
		e.ICMPType, e.ICMPCode = int(*req.Icmp.Type), int(*req.Icmp.Code)
		if e.ICMPType < -1 || e.ICMPType > 255 || e.ICMPCode < -1 || e.ICMPCode > 255 || e.ICMPType == -1 && e.ICMPCode != -1 {
			return e, query.Errorf("InvalidParameterValue", "Invalid ICMP type and code (%d:%d)", e.ICMPType, e.ICMPCode)
		}
	}
	return e, nil
}

// entryAt returns the place of an entry in a network ACL, or where it would be.
func entryAt(entries []store.ACLEntry, egress bool, number int) (int, bool) {
	return slices.BinarySearchFunc(entries, store.ACLEntry{Egress: egress, Number: number}, func(x, y store.ACLEntry) int {
		if x.Egress != y.Egress {
			if y.Egress {
				return -1
			}
			return 1
		}
		return cmp.Compare(x.Number, y.Number)
	})
}

// changeEntries changes the entries of a network ACL.
func (a *API) changeEntries(id string, change func(entries []store.ACLEntry) ([]store.ACLEntry, error)) error {
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findACL(&tx.State, id)
		if err != nil {
			return err
		}
		l := *old
		if l.Entries, err = change(slices.Clone(old.Entries)); err != nil {
			return err
		}
		tx.PutACL(&l)
		return nil
	})
	return err
}

func (a *API) createNetworkACLEntry(_ context.Context, req *query.CreateNetworkAclEntryRequest) (*query.CreateNetworkAclEntryResponse, error) {
	e, err := parseACLEntry(req)
	if err != nil {
		return nil, err
	}
	return nil, a.changeEntries(*req.NetworkAclId, func(all []store.ACLEntry) ([]store.ACLEntry, error) {
		i, ok := entryAt(all, e.Egress, e.Number)
		if ok {
			return nil, query.Errorf("NetworkAclEntryAlreadyExists", "The network acl entry identified by %d already exists.", e.Number)
		}
		if err := a.roomFor(all, e); err != nil {
			return nil, err
		}
		return slices.Insert(all, i, e), nil
	})
}

// roomFor returns an error if entries have as many of the direction and address
// family of e as they may have.
func (a *API) roomFor(all []store.ACLEntry, e store.ACLEntry) error {
	beside := 0
	for _, o := range all {
		if o.Egress == e.Egress && o.CIDR.Addr().Is4() == e.CIDR.Addr().Is4() {
			beside++
		}
	}
	if most := a.quota(chaos.QuotaACLRules); beside >= most {
		return quotaReached("NetworkAclEntryLimitExceeded", "entries per direction of the network ACL", most)
	}
	return nil
}

func noEntry(n int) error {
	return query.Errorf("InvalidNetworkAclEntry.NotFound", "The network acl entry identified by %d does not exist.", n)
}

func (a *API) replaceNetworkACLEntry(_ context.Context, req *query.ReplaceNetworkAclEntryRequest) (*query.ReplaceNetworkAclEntryResponse, error) {
	e, err := parseACLEntry((*query.CreateNetworkAclEntryRequest)(req))
	if err != nil {
		return nil, err
	}
	return nil, a.changeEntries(*req.NetworkAclId, func(all []store.ACLEntry) ([]store.ACLEntry, error) {
		i, ok := entryAt(all, e.Egress, e.Number)
		if !ok {
			return nil, noEntry(e.Number)
		}
		if all[i].CIDR.Addr().Is4() != e.CIDR.Addr().Is4() {
			if err := a.roomFor(all, e); err != nil {
				return nil, err
			}
		}
		all[i] = e
		return all, nil
	})
}

func (a *API) deleteNetworkACLEntry(_ context.Context, req *query.DeleteNetworkAclEntryRequest) (*query.DeleteNetworkAclEntryResponse, error) {
	return nil, a.changeEntries(*req.NetworkAclId, func(all []store.ACLEntry) ([]store.ACLEntry, error) {
		i, ok := entryAt(all, *req.Egress, int(*req.RuleNumber))
		if !ok {
			return nil, noEntry(int(*req.RuleNumber))
		}
		return slices.Delete(all, i, i+1), nil
	})
}

// replaceNetworkACLAssociation ties a subnet to another network ACL. The
// association gets a new id, unless it is to that ACL already.
func (a *API) replaceNetworkACLAssociation(_ context.Context, req *query.ReplaceNetworkAclAssociationRequest) (*query.ReplaceNetworkAclAssociationResponse, error) {
	id := *req.AssociationId
	if err := checkID("aclassoc", id); err != nil {
		return nil, err
	}
	made := store.ACLAssociation{ID: vpc.NewID("aclassoc")}
	_, err := a.update(func(tx *store.Tx) error {
		to, err := findACL(&tx.State, *req.NetworkAclId)
		if err != nil {
			return err
		}
		for _, from := range tx.ACLs.All() {
			i := slices.IndexFunc(from.Associations, func(x store.ACLAssociation) bool { return x.ID == id })
			if i < 0 {
				continue
			}
			made.Subnet = from.Associations[i].Subnet
			switch {
			case from.ID == to.ID:
				made.ID = id
				return nil
			case from.VPC != to.VPC:
				return twoNetworks("network ACL "+string(to.ID), "subnet "+string(made.Subnet))
			}
			l := *from
			l.Associations = slices.Delete(slices.Clone(from.Associations), i, i+1)
			tx.PutACL(&l)
			m := *to
			m.Associations = append(slices.Clone(to.Associations), made)
			tx.PutACL(&m)
			return nil
		}
		return noAssociation(id)
	})
	if err != nil {
		return nil, err
	}
	return &query.ReplaceNetworkAclAssociationResponse{NewAssociationId: &made.ID}, nil
}

// denyAll is how the last entries of a network ACL are described: that of IPv4,
// and that of IPv6 if its VPC has a block of it.
func (v view) denyAll(l *store.NetworkACL, egress bool) []store.ACLEntry {
	out := []store.ACLEntry{{Number: store.LastRule, Egress: egress, Protocol: -1, CIDR: anywhere, ICMPType: -1, ICMPCode: -1}}
	if o := v.VPC(l.VPC); o != nil && len(o.IPv6CIDRs) > 0 {
		out = append(out, store.ACLEntry{Number: store.LastRuleIPv6, Egress: egress, Protocol: -1, CIDR: anywhereIPv6, ICMPType: -1, ICMPCode: -1})
	}
	return out
}

// shownEntries returns the entries of a network ACL as EC2 describes them:
// egress first, and with those that deny all.
func shownEntries(v view, l *store.NetworkACL) []store.ACLEntry {
	i, _ := entryAt(l.Entries, true, 0)
	return slices.Concat(l.Entries[i:], v.denyAll(l, true), l.Entries[:i], v.denyAll(l, false))
}

func ruleAction(e store.ACLEntry) string {
	if e.Allow {
		return "allow"
	}
	return "deny"
}

func cidrOf(p netip.Prefix, v4 bool) string {
	if p.IsValid() && p.Addr().Is4() == v4 {
		return p.String()
	}
	return ""
}

func hasPorts(e store.ACLEntry) bool { return e.Protocol == protoTCP || e.Protocol == protoUDP }
func hasICMP(e store.ACLEntry) bool  { return e.Protocol == protoICMP || e.Protocol == protoICMPv6 }

func (v view) acl(l *store.NetworkACL) query.NetworkAcl {
	return query.NetworkAcl{
		NetworkAclId: text(l.ID),
		VpcId:        text(l.VPC),
		OwnerId:      &v.api.account,
		Default:      &l.Default,
		TagSet:       v.tags(string(l.ID)),
		AssociationSet: collect(l.Associations, func(x store.ACLAssociation) query.NetworkAclAssociation {
			return query.NetworkAclAssociation{NetworkAclAssociationId: new(x.ID), NetworkAclId: text(l.ID), SubnetId: text(x.Subnet)}
		}),
		EntrySet: collect(shownEntries(v, l), func(e store.ACLEntry) query.NetworkAclEntry {
			out := query.NetworkAclEntry{
				RuleNumber: integer(e.Number), Egress: new(e.Egress), Protocol: new(strconv.Itoa(e.Protocol)), RuleAction: new(ruleAction(e)),
				CidrBlock: text(cidrOf(e.CIDR, true)), Ipv6CidrBlock: text(cidrOf(e.CIDR, false)),
			}
			if hasPorts(e) {
				out.PortRange = &query.PortRange{From: integer(e.From), To: integer(e.To)}
			}
			if hasICMP(e) {
				out.IcmpTypeCode = &query.IcmpTypeCode{Type: integer(e.ICMPType), Code: integer(e.ICMPCode)}
			}
			return out
		}),
	}
}

func entryValues(of func(e store.ACLEntry) string) func(view, *store.NetworkACL) []string {
	return values(shownEntries, func(_ view, e store.ACLEntry) string { return of(e) })
}

func numberIf(has func(e store.ACLEntry) bool, of func(e store.ACLEntry) int) func(view, *store.NetworkACL) []string {
	return entryValues(func(e store.ACLEntry) string {
		if !has(e) {
			return ""
		}
		return strconv.Itoa(of(e))
	})
}

// entryProtocols lists protocols by number, and by name those that have one.
func entryProtocols(v view, l *store.NetworkACL) []string {
	var out []string
	for _, e := range shownEntries(v, l) {
		out = append(out, strconv.Itoa(e.Protocol))
		for name, n := range aclProtocols {
			if n == e.Protocol {
				out = append(out, name)
			}
		}
	}
	return out
}

func aclAssociations(_ view, l *store.NetworkACL) []store.ACLAssociation { return l.Associations }

var aclListing = listing[*store.NetworkACL]{
	action: "DescribeNetworkAcls",
	all:    func(v view) iter.Seq2[string, *store.NetworkACL] { return entries(v.ACLs) },
	find:   findACL,
	key:    func(l *store.NetworkACL) string { return string(l.ID) },
	attrs: attributes[*store.NetworkACL]{
		"network-acl-id":             value(func(l *store.NetworkACL) string { return string(l.ID) }),
		"vpc-id":                     value(func(l *store.NetworkACL) string { return string(l.VPC) }),
		"default":                    value(func(l *store.NetworkACL) string { return strconv.FormatBool(l.Default) }),
		"owner-id":                   owned[*store.NetworkACL],
		"association.association-id": values(aclAssociations, func(_ view, x store.ACLAssociation) string { return x.ID }),
		"association.subnet-id":      values(aclAssociations, func(_ view, x store.ACLAssociation) string { return string(x.Subnet) }),
		"association.network-acl-id": func(_ view, l *store.NetworkACL) []string {
			if len(l.Associations) == 0 {
				return nil
			}
			return []string{string(l.ID)}
		},
		"entry.cidr":            entryValues(func(e store.ACLEntry) string { return cidrOf(e.CIDR, true) }),
		"entry.ipv6-cidr":       entryValues(func(e store.ACLEntry) string { return cidrOf(e.CIDR, false) }),
		"entry.protocol":        entryProtocols,
		"entry.rule-action":     entryValues(ruleAction),
		"entry.egress":          entryValues(func(e store.ACLEntry) string { return strconv.FormatBool(e.Egress) }),
		"entry.rule-number":     entryValues(func(e store.ACLEntry) string { return strconv.Itoa(e.Number) }),
		"entry.port-range.from": numberIf(hasPorts, func(e store.ACLEntry) int { return e.From }),
		"entry.port-range.to":   numberIf(hasPorts, func(e store.ACLEntry) int { return e.To }),
		"entry.icmp.type":       numberIf(hasICMP, func(e store.ACLEntry) int { return e.ICMPType }),
		"entry.icmp.code":       numberIf(hasICMP, func(e store.ACLEntry) int { return e.ICMPCode }),
	},
}

func (a *API) describeNetworkACLs(_ context.Context, req *query.DescribeNetworkAclsRequest) (*query.DescribeNetworkAclsResponse, error) {
	v := a.read()
	found, next, err := aclListing.page(v, req.NetworkAclId, req.Filter, req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	return &query.DescribeNetworkAclsResponse{NextToken: next, NetworkAclSet: collect(found, v.acl)}, nil
}
