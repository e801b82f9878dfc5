package api

import (
	"context"
	"iter"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

const (
	maxTags        = 50
	maxTagKey      = 128 // characters
	maxTagValue    = 256 // characters
	reservedPrefix = "aws:"
)

// resourceTypes are the kinds of resource that can be tagged here, by the
// prefix of their identifiers.
var resourceTypes = map[string]string{
	"vpc":    "vpc",
	"subnet": "subnet",
	"scr":    "subnet-cidr-reservation",
	"i":      "instance",
	"eni":    "network-interface",
	"sg":     "security-group",
	"sgr":    "security-group-rule",
	"rtb":    "route-table",
	"acl":    "network-acl",
	"pl":     "prefix-list",

	"igw":      "internet-gateway",
	"eigw":     "egress-only-internet-gateway",
	"eipalloc": "elastic-ip",
	"nat":      "natgateway",
	"pcx":      "vpc-peering-connection",
	"dopt":     "dhcp-options",
	"fl":       "vpc-flow-log",
}

func (a *API) tagHandlers(h map[string]query.Handler) {
	h["CreateTags"] = handle("CreateTags", "ResourceId Tag", a.createTags)
	h["DeleteTags"] = handle("DeleteTags", "ResourceId Tag", a.deleteTags)
	h["DescribeTags"] = handle("DescribeTags", "Filter NextToken MaxResults", a.describeTags)
}

// resource returns an error unless the resource exists and can be tagged.
func resource(s *store.State, id string) error {
	var err error
	switch prefixOf(id) {
	case "vpc":
		_, err = findVPC(s, id)
	case "subnet":
		_, err = findSubnet(s, id)
	case "scr":
		_, err = findReservation(s, id)
	case "i":
		_, err = findInstance(s, id)
	case "eni":
		_, err = findENI(s, id)
	case "sg":
		_, err = findGroup(s, id)
	case "sgr":
		_, _, err = findRule(s, id)
	case "rtb":
		_, err = findRouteTable(s, id)
	case "acl":
		_, err = findACL(s, id)
	case "pl":
		_, err = findPrefixList(s, id)
	case "igw":
		_, err = findGateway(s, id)
	case "eigw":
		_, err = findEgressOnly(s, id)
	case "eipalloc":
		_, err = findAddress(s, id)
	case "nat":
		_, err = findNAT(s, id)
	case "pcx":
		_, err = findPeering(s, id)
	case "dopt":
		_, err = findDHCP(s, id)
	case "fl":
		_, err = findFlowLog(s, id)
	default:
		err = query.Errorf("InvalidID", "The ID '%s' is not valid", id)
	}
	return err
}

// checkTag returns an error unless a tag may be set by a user.
func checkTag(key, value string) error {
	switch {
	case key == "":
		return query.Errorf("InvalidParameterValue", "Tag keys cannot be empty")
	case utf8.RuneCountInString(key) > maxTagKey:
		return query.Errorf("InvalidParameterValue", "Tag key exceeds the maximum length of %d characters", maxTagKey)
	case utf8.RuneCountInString(value) > maxTagValue:
		return query.Errorf("InvalidParameterValue", "Tag value exceeds the maximum length of %d characters", maxTagValue)
	case strings.HasPrefix(strings.ToLower(key), reservedPrefix):
		return query.Errorf("InvalidTagKey.Malformed", "Tag keys starting with '%s' are reserved for internal use", reservedPrefix)
	}
	return nil
}

// specified reads the tags that a creating request carries, by resource type.
// allowed are the types that the action makes.
func specified(specs []query.TagSpecification, allowed ...string) (map[string]map[string]string, error) {
	out := map[string]map[string]string{}
	for _, s := range specs {
		kind := deref(s.ResourceType)
		if kind == "" {
			return nil, query.Errorf("MissingParameter", "Tag specification resource type must have a value")
		}
		if !slices.Contains(allowed, kind) {
			return nil, query.Errorf("InvalidParameterValue", "'%s' is not a valid taggable resource type for this operation.", kind)
		}
		if out[kind] == nil {
			out[kind] = map[string]string{}
		}
		for _, t := range s.Tag {
			key, value := deref(t.Key), deref(t.Value)
			if err := checkTag(key, value); err != nil {
				return nil, err
			}
			if _, ok := out[kind][key]; ok {
				return nil, query.Errorf("InvalidParameterValue", "Duplicate tag key '%s' specified.", key)
			}
			out[kind][key] = value
		}
		if len(out[kind]) > maxTags {
			return nil, query.Errorf("TagLimitExceeded", "The maximum number of tags per resource is %d", maxTags)
		}
	}
	return out, nil
}

// tags returns the tags of a resource, by key.
func (v view) tags(id string) []query.Tag {
	m := v.TagsOf(id)
	out := make([]query.Tag, 0, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, query.Tag{Key: new(k), Value: new(m[k])})
	}
	return out
}

func (a *API) createTags(_ context.Context, req *query.CreateTagsRequest) (*query.CreateTagsResponse, error) {
	set, err := specified([]query.TagSpecification{{ResourceType: new("any"), Tag: req.Tag}}, "any")
	if err != nil {
		return nil, err
	}
	_, err = a.update(func(tx *store.Tx) error {
		for _, id := range req.ResourceId {
			if err := resource(&tx.State, id); err != nil {
				return err
			}
			tags := maps.Clone(tx.TagsOf(id))
			if tags == nil {
				tags = map[string]string{}
			}
			maps.Copy(tags, set["any"])
			if len(tags) > maxTags {
				return query.Errorf("TagLimitExceeded", "The maximum number of tags per resource is %d; '%s' would have %d", maxTags, id, len(tags))
			}
			tx.SetTags(id, tags)
		}
		return nil
	})
	return nil, err
}

func (a *API) deleteTags(_ context.Context, req *query.DeleteTagsRequest) (*query.DeleteTagsResponse, error) {
	for _, t := range req.Tag {
		if strings.HasPrefix(strings.ToLower(deref(t.Key)), reservedPrefix) {
			return nil, query.Errorf("InvalidTagKey.Malformed", "Tag keys starting with '%s' are reserved for internal use", reservedPrefix)
		}
	}
	_, err := a.update(func(tx *store.Tx) error {
		for _, id := range req.ResourceId {
			if err := resource(&tx.State, id); err != nil {
				return err
			}
			tags := maps.Clone(tx.TagsOf(id))
			if len(req.Tag) == 0 {
				clear(tags)
			}
			for _, t := range req.Tag {
				// A value that is given must be the tag's, the empty one too.
				if have, ok := tags[deref(t.Key)]; ok && (t.Value == nil || *t.Value == have) {
					delete(tags, deref(t.Key))
				}
			}
			tx.SetTags(id, tags)
		}
		return nil
	})
	return nil, err
}

type tag struct{ resource, key, value string }

var tagAttributes = attributes[tag]{
	"key":           func(_ view, t tag) []string { return []string{t.key} },
	"value":         func(_ view, t tag) []string { return []string{t.value} },
	"resource-id":   func(_ view, t tag) []string { return []string{t.resource} },
	"resource-type": func(_ view, t tag) []string { return []string{resourceTypes[prefixOf(t.resource)]} },
}

func (a *API) describeTags(_ context.Context, req *query.DescribeTagsRequest) (*query.DescribeTagsResponse, error) {
	v := a.read()
	match, err := matcher(v, "DescribeTags", req.Filter, tagAttributes, nil, func(_ view, t tag) map[string]string { return map[string]string{t.key: t.value} })
	if err != nil {
		return nil, err
	}
	c, err := paging("DescribeTags", req.Filter, 0, req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	found, next := take(c, allTags(v.State), match)
	return &query.DescribeTagsResponse{NextToken: next, TagSet: collect(found, func(t tag) query.TagDescription {
		return query.TagDescription{Key: &t.key, Value: &t.value, ResourceId: &t.resource, ResourceType: new(resourceTypes[prefixOf(t.resource)])}
	})}, nil
}

// allTags iterates over all tags by resource and key.
func allTags(s *store.State) iter.Seq2[string, tag] {
	return func(yield func(string, tag) bool) {
		for id, tags := range s.Tags.All() {
			for _, k := range slices.Sorted(maps.Keys(tags)) {
				// NUL sorts before what ids are made of: resource, then key.
				if !yield(id+"\x00"+k, tag{id, k, tags[k]}) {
					return
				}
			}
		}
	}
}
