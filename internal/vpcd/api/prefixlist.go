package api

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strings"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func (a *API) prefixListHandlers(h map[string]query.Handler) {
	h["CreateManagedPrefixList"] = handle("CreateManagedPrefixList", "PrefixListName Entry MaxEntries AddressFamily TagSpecification ClientToken", a.createManagedPrefixList)
	h["ModifyManagedPrefixList"] = handle("ModifyManagedPrefixList", "PrefixListId CurrentVersion PrefixListName AddEntry RemoveEntry MaxEntries", a.modifyManagedPrefixList)
	h["DeleteManagedPrefixList"] = handle("DeleteManagedPrefixList", "PrefixListId", a.deleteManagedPrefixList)
	h["DescribeManagedPrefixLists"] = handle("DescribeManagedPrefixLists", "PrefixListId Filter NextToken MaxResults", a.describeManagedPrefixLists)
	h["GetManagedPrefixListEntries"] = handle("GetManagedPrefixListEntries", "PrefixListId TargetVersion NextToken MaxResults", a.getManagedPrefixListEntries)
	h["GetManagedPrefixListAssociations"] = handle("GetManagedPrefixListAssociations", "PrefixListId NextToken MaxResults", a.getManagedPrefixListAssociations)
	h["DescribePrefixLists"] = handle("DescribePrefixLists", "PrefixListId Filter NextToken MaxResults", a.describePrefixLists)
}

const (
	familyV4 = "IPv4"
	familyV6 = "IPv6"

	// maxListChanges is how many entries a request may add or remove together
	// (VPC User Guide, "Managed prefix lists", read 2026).
	maxListChanges = 100

	// keptVersions is how many versions of a prefix list can be asked for. EC2
	// keeps them all; here each change writes those that are kept.
	keptVersions = 10
)

// The states of a prefix list. What is in progress ends before it can be seen
// twice.
const (
	listCreating = "create-in-progress"
	listCreated  = "create-complete"
	listChanging = "modify-in-progress"
	listChanged  = "modify-complete"
	listFailed   = "modify-failed"
	listDeleting = "delete-in-progress"
)

func checkListName(name string) error {
	switch {
	case name == "" || len(name) > 255:
		return query.Errorf("InvalidParameterValue", "The name of a prefix list must have 1 to 255 characters")
	case strings.HasPrefix(name, "com.amazonaws"):
		return query.Errorf("InvalidParameterValue", "The name of a prefix list may not begin with com.amazonaws")
	}
	return nil
}

// checkListSize returns an error unless a prefix list may have room for so many
// entries.
func (a *API) checkListSize(n int64) error {
	if most := a.quota(chaos.QuotaListEntries); n < 1 || n > int64(most) {
		return query.Errorf("InvalidParameterValue", "Value (%d) for parameter maxEntries is invalid. Expecting a value between 1 and %d.", n, most)
	}
	return nil
}

// parseEntry reads a prefix of a list.
func parseEntry(cidr string, v6 bool) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(cidr)
	if err != nil || p.Addr().Is4() == v6 || p.Addr().Is4In6() {
		return p, query.Errorf("InvalidParameterValue", "The CIDR (%s) is not a valid CIDR of the address family of the prefix list.", cidr)
	}
	return p.Masked(), nil
}

// addEntries returns entries with others added, in order; one that is there gets
// the new description.
func addEntries(entries []store.PrefixListEntry, add []query.AddPrefixListEntry, v6 bool) ([]store.PrefixListEntry, error) {
	seen := map[netip.Prefix]bool{}
	for _, x := range add {
		p, err := parseEntry(deref(x.Cidr), v6)
		if err != nil {
			return nil, err
		}
		if seen[p] {
			return nil, query.Errorf("InvalidParameterValue", "The CIDR (%s) is given twice", p)
		}
		seen[p] = true
		e := store.PrefixListEntry{CIDR: p, Description: deref(x.Description)}
		if len(e.Description) > maxDescription {
			return nil, query.Errorf("InvalidParameterValue", "The description is longer than %d characters", maxDescription)
		}
		if i, ok := findEntry(entries, p); ok {
			entries[i] = e
		} else {
			entries = slices.Insert(entries, i, e)
		}
	}
	return entries, nil
}

func findEntry(entries []store.PrefixListEntry, p netip.Prefix) (int, bool) {
	return slices.BinarySearchFunc(entries, p, func(e store.PrefixListEntry, p netip.Prefix) int {
		return cmp.Or(e.CIDR.Addr().Compare(p.Addr()), cmp.Compare(e.CIDR.Bits(), p.Bits()))
	})
}

func (a *API) createManagedPrefixList(_ context.Context, req *query.CreateManagedPrefixListRequest) (*query.CreateManagedPrefixListResponse, error) {
	if err := checkListName(*req.PrefixListName); err != nil {
		return nil, err
	}
	if err := a.checkListSize(*req.MaxEntries); err != nil {
		return nil, err
	}
	if f := *req.AddressFamily; f != familyV4 && f != familyV6 {
		return nil, query.Errorf("InvalidParameterValue", "Value (%s) for parameter addressFamily is invalid. Expecting IPv4 or IPv6.", f)
	}
	if len(req.Entry) > maxListChanges {
		return nil, query.Errorf("InvalidParameterValue", "A request may add %d entries at most", maxListChanges)
	}
	v6 := *req.AddressFamily == familyV6
	list, err := addEntries(nil, req.Entry, v6)
	if err != nil {
		return nil, err
	}
	if len(list) > int(*req.MaxEntries) {
		return nil, tooManyEntries(*req.MaxEntries)
	}
	tags, err := specified(req.TagSpecification, "prefix-list")
	if err != nil {
		return nil, err
	}
	params := *req
	params.ClientToken, params.DryRun = nil, nil
	var made string
	after, err := a.update(func(tx *store.Tx) error {
		var err error
		made, err = onceOnly(tx, "CreateManagedPrefixList", req.ClientToken, params, a.now(), func() (string, error) {
			if most := a.quota(chaos.QuotaPrefixLists); tx.PrefixLists.Len() >= most {
				return "", quotaReached("PrefixListLimitExceeded", "prefix lists", most)
			}
			p := &store.PrefixList{
				ID: vpc.PrefixListID(vpc.NewID("pl")), Name: *req.PrefixListName, V6: v6, MaxEntries: int(*req.MaxEntries), State: listCreated,
				Versions: []store.PrefixListVersion{{Entries: list}}, LatestVersion: 1, ClientToken: deref(req.ClientToken), Created: a.now(),
			}
			tx.PutPrefixList(p)
			tx.SetTags(string(p.ID), tags["prefix-list"])
			return string(p.ID), nil
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	p, err := findPrefixList(after.State, made)
	if err != nil {
		return nil, err
	}
	return &query.CreateManagedPrefixListResponse{PrefixList: after.prefixListIn(p, listCreating)}, nil
}

func tooManyEntries(most int64) error {
	return query.Errorf("PrefixListMaxEntriesExceeded", "You've reached the maximum number of entries for the prefix list: %d.", most)
}

// modifyManagedPrefixList makes a new version of a prefix list, or gives it
// another name or size. A size that one who uses the list has no room for
// leaves the list as it was, in the state modify-failed.
func (a *API) modifyManagedPrefixList(_ context.Context, req *query.ModifyManagedPrefixListRequest) (*query.ModifyManagedPrefixListResponse, error) {
	changes := len(req.AddEntry) + len(req.RemoveEntry)
	switch {
	case changes > 0 && req.MaxEntries != nil:
		return nil, query.Errorf("InvalidParameterCombination", "You cannot modify the entries of a prefix list and modify the size of a prefix list at the same time.")
	case changes > maxListChanges:
		return nil, query.Errorf("InvalidParameterValue", "A request may add and remove %d entries at most", maxListChanges)
	case changes > 0 && req.CurrentVersion == nil:
		return nil, query.Errorf("MissingParameter", "The request must contain the parameter currentVersion")
	case changes == 0 && req.MaxEntries == nil && req.PrefixListName == nil:
		return nil, query.Errorf("MissingParameter", "The request must contain one of the parameters addEntry, removeEntry, maxEntries, prefixListName")
	}
	var p store.PrefixList
	after, err := a.update(func(tx *store.Tx) error {
		old, err := findPrefixList(&tx.State, *req.PrefixListId)
		if err != nil {
			return err
		}
		if req.CurrentVersion != nil && *req.CurrentVersion != old.LatestVersion {
			return query.Errorf("PrefixListVersionMismatch", "The prefix list has the incorrect version number: %d is not the current version %d.", *req.CurrentVersion, old.LatestVersion)
		}
		p = *old
		p.State, p.StateMessage = listChanged, ""
		if req.PrefixListName != nil {
			if err := checkListName(*req.PrefixListName); err != nil {
				return err
			}
			p.Name = *req.PrefixListName
		}
		if req.MaxEntries != nil {
			if err := a.checkListSize(*req.MaxEntries); err != nil {
				return err
			}
			if len(old.Entries()) > int(*req.MaxEntries) {
				return tooManyEntries(*req.MaxEntries)
			}
			p.MaxEntries = int(*req.MaxEntries)
			tx.PutPrefixList(&p)
			if full := a.fullWith(&tx.State, &p); full != "" {
				p.MaxEntries, p.State = old.MaxEntries, listFailed
				p.StateMessage = fmt.Sprintf("The maximum number of entries %d is more than %s has room for.", *req.MaxEntries, full)
			}
		}
		if changes > 0 {
			if err := changeList(&p, req); err != nil {
				return err
			}
		}
		tx.PutPrefixList(&p)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.ModifyManagedPrefixListResponse{PrefixList: after.prefixListIn(&p, listChanging)}, nil
}

// changeList gives a prefix list its next version.
func changeList(p *store.PrefixList, req *query.ModifyManagedPrefixListRequest) error {
	list := slices.Clone(p.Entries())
	added := map[netip.Prefix]bool{}
	for _, x := range req.AddEntry {
		if c, err := parseEntry(deref(x.Cidr), p.V6); err == nil {
			added[c] = true
		}
	}
	for _, x := range req.RemoveEntry {
		c, err := parseEntry(deref(x.Cidr), p.V6)
		if err != nil {
			return err
		}
		i, ok := findEntry(list, c)
		if !ok {
			return query.Errorf("InvalidParameterValue", "The CIDR (%s) is not in the prefix list %s.", c, p.ID)
		}
		if added[c] {
			return query.Errorf("InvalidParameterCombination", "The CIDR (%s) is both to be added and to be removed", c)
		}
		list = slices.Delete(list, i, i+1)
	}
	list, err := addEntries(list, req.AddEntry, p.V6)
	if err != nil {
		return err
	}
	if len(list) > p.MaxEntries {
		return tooManyEntries(int64(p.MaxEntries))
	}
	p.Versions = append(slices.Clone(p.Versions), store.PrefixListVersion{Entries: list})
	p.Versions = p.Versions[max(0, len(p.Versions)-keptVersions):]
	p.LatestVersion++
	return nil
}

// fullWith names one of those who use a prefix list that has more than it may
// have with it, or "".
func (a *API) fullWith(s *store.State, p *store.PrefixList) string {
	for _, id := range listUsers(s, p.ID) {
		if t := s.RouteTable(vpc.RouteTableID(id)); t != nil && routeSlots(s, s.RoutesOf(t), p.V6) > a.quota(chaos.QuotaRoutes) {
			return id
		}
		if g := s.Group(vpc.SecurityGroupID(id)); g != nil {
			for _, egress := range []bool{false, true} {
				if a.checkRuleCount(s, g.Rules, egress) != nil {
					return id
				}
			}
		}
	}
	return ""
}

// listUsers returns the ids of the route tables and groups that use a prefix
// list, in order.
func listUsers(s *store.State, id vpc.PrefixListID) []string {
	var out []string
	for _, t := range s.RouteTables.All() {
		if slices.ContainsFunc(t.Routes, func(r store.Route) bool { return r.PrefixList == id }) {
			out = append(out, string(t.ID))
		}
	}
	for _, g := range s.Groups.All() {
		if slices.ContainsFunc(g.Rules, func(r store.Rule) bool { return r.PrefixList == string(id) }) {
			out = append(out, string(g.ID))
		}
	}
	return out
}

func (a *API) deleteManagedPrefixList(_ context.Context, req *query.DeleteManagedPrefixListRequest) (*query.DeleteManagedPrefixListResponse, error) {
	var gone *query.ManagedPrefixList
	_, err := a.update(func(tx *store.Tx) error {
		p, err := findPrefixList(&tx.State, *req.PrefixListId)
		if err != nil {
			return err
		}
		if users := listUsers(&tx.State, p.ID); len(users) > 0 {
			return query.Errorf("DependencyViolation", "The prefix list '%s' is used by %s and cannot be deleted.", p.ID, quoted(users))
		}
		gone = a.fresh(&tx.State).prefixListIn(p, listDeleting) // with its tags
		tx.DeletePrefixList(p.ID)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &query.DeleteManagedPrefixListResponse{PrefixList: gone}, nil
}

func (v view) prefixList(p *store.PrefixList) query.ManagedPrefixList {
	return *v.prefixListIn(p, p.State)
}

func (v view) prefixListIn(p *store.PrefixList, state string) *query.ManagedPrefixList {
	family := familyV4
	if p.V6 {
		family = familyV6
	}
	return &query.ManagedPrefixList{
		PrefixListId: text(p.ID), PrefixListName: &p.Name, AddressFamily: &family, State: &state, StateMessage: text(p.StateMessage),
		PrefixListArn: new(v.api.arn("prefix-list", string(p.ID))), MaxEntries: integer(p.MaxEntries), Version: &p.LatestVersion,
		TagSet: v.tags(string(p.ID)), OwnerId: &v.api.account,
	}
}

var prefixListListing = listing[*store.PrefixList]{
	action: "DescribeManagedPrefixLists",
	all:    func(v view) iter.Seq2[string, *store.PrefixList] { return entries(v.PrefixLists) },
	find:   findPrefixList,
	key:    func(p *store.PrefixList) string { return string(p.ID) },
	attrs: attributes[*store.PrefixList]{
		"owner-id":         owned[*store.PrefixList],
		"prefix-list-id":   value(func(p *store.PrefixList) string { return string(p.ID) }),
		"prefix-list-name": value(func(p *store.PrefixList) string { return p.Name }),
	},
}

func (a *API) describeManagedPrefixLists(_ context.Context, req *query.DescribeManagedPrefixListsRequest) (*query.DescribeManagedPrefixListsResponse, error) {
	v := a.read()
	found, next, err := prefixListListing.page(v, req.PrefixListId, req.Filter, req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	return &query.DescribeManagedPrefixListsResponse{NextToken: next, PrefixListSet: collect(found, v.prefixList)}, nil
}

// within is what the token of a page of something's parts is bound to.
func within(id string) []query.Filter { return []query.Filter{{Value: []string{id}}} }

func (a *API) getManagedPrefixListEntries(_ context.Context, req *query.GetManagedPrefixListEntriesRequest) (*query.GetManagedPrefixListEntriesResponse, error) {
	p, err := findPrefixList(a.read().State, *req.PrefixListId)
	if err != nil {
		return nil, err
	}
	version := p.LatestVersion
	if req.TargetVersion != nil {
		version = *req.TargetVersion
	}
	list, ok := p.Version(version)
	if !ok {
		return nil, query.Errorf("InvalidParameterValue", "The version %d of the prefix list %s does not exist, or is none of the last %d, which alone are kept.", version, p.ID, keptVersions)
	}
	c, err := paging("GetManagedPrefixListEntries", within(fmt.Sprint(p.ID, version)), 0, req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	found, next := take(c, func(yield func(string, store.PrefixListEntry) bool) {
		for i, e := range list {
			if !yield(fmt.Sprintf("%04d", i), e) {
				return
			}
		}
	}, func(store.PrefixListEntry) bool { return true })
	return &query.GetManagedPrefixListEntriesResponse{NextToken: next, EntrySet: collect(found, func(e store.PrefixListEntry) query.PrefixListEntry {
		return query.PrefixListEntry{Cidr: new(e.CIDR.String()), Description: text(e.Description)}
	})}, nil
}

func (a *API) getManagedPrefixListAssociations(_ context.Context, req *query.GetManagedPrefixListAssociationsRequest) (*query.GetManagedPrefixListAssociationsResponse, error) {
	v := a.read()
	p, err := findPrefixList(v.State, *req.PrefixListId)
	if err != nil {
		return nil, err
	}
	c, err := paging("GetManagedPrefixListAssociations", within(string(p.ID)), 0, req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	found, next := take(c, listed(listUsers(v.State, p.ID), func(id string) string { return id }), func(string) bool { return true })
	return &query.GetManagedPrefixListAssociationsResponse{NextToken: next, PrefixListAssociationSet: collect(found, func(id string) query.PrefixListAssociation {
		return query.PrefixListAssociation{ResourceId: &id, ResourceOwner: &a.account}
	})}, nil
}

// describePrefixLists lists the prefix lists of AWS's own services. There are
// none here.
func (a *API) describePrefixLists(_ context.Context, req *query.DescribePrefixListsRequest) (*query.DescribePrefixListsResponse, error) {
	if _, err := matcher(a.read(), "DescribePrefixLists", req.Filter, attributes[struct{}]{}, nil, nil); err != nil {
		return nil, err
	}
	if _, err := paging("DescribePrefixLists", req.Filter, len(req.PrefixListId), req.NextToken, req.MaxResults); err != nil {
		return nil, err
	}
	if len(req.PrefixListId) > 0 {
		return nil, query.Errorf("InvalidPrefixListId.NotFound", "The prefix list ID '%s' does not exist. Customer-managed ones are described by DescribeManagedPrefixLists.", req.PrefixListId[0])
	}
	return &query.DescribePrefixListsResponse{PrefixListSet: []query.PrefixList{}}, nil
}
