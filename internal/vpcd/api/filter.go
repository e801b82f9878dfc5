package api

import (
	"maps"
	"slices"
	"strings"

	"github.com/underlay-cni/underlay/internal/vpcd/query"
)

// maxFilterValues is how many values the filters of one request may have.
const maxFilterValues = 200

// attributes are the values by which filters find an object: a filter matches
// when one of its values matches one of the object's.
type attributes[T any] map[string]func(v view, o T) []string

// matcher compiles the filters of a request to an action into a predicate. The
// filter names that the action has are in query.Actions; one of those for which
// there are no attributes is of something that no object here has, and matches
// nothing. unknown lists those that are refused instead. tags returns the tags
// of an object; nil when it has none.
func matcher[T any](v view, action string, filters []query.Filter, attrs attributes[T], unknown []string, tags func(v view, o T) map[string]string) (func(T) bool, error) {
	type test struct {
		values   func(v view, o T) []string
		patterns []string
	}
	var tests []test
	n := 0
	for _, f := range filters {
		name := deref(f.Name)
		if name == "" {
			return nil, query.Errorf("InvalidParameterValue", "A filter has no name")
		}
		if len(f.Value) == 0 {
			return nil, query.Errorf("InvalidParameterValue", "The filter '%s' has no value", name)
		}
		if n += len(f.Value); n > maxFilterValues {
			return nil, query.Errorf("FilterLimitExceeded", "The filters have more than %d values", maxFilterValues)
		}
		key, isTag := strings.CutPrefix(name, "tag:")
		known := query.Actions[action].Filters
		if known == nil { // not published: those that are known here
			known = append(slices.Collect(maps.Keys(attrs)), "tag", "tag-key")
		}
		switch {
		case isTag && tags != nil && slices.ContainsFunc(known, func(k string) bool { return k == "tag" || strings.HasPrefix(k, "tag:") }):
			tests = append(tests, test{func(v view, o T) []string {
				if value, ok := tags(v, o)[key]; ok {
					return []string{value}
				}
				return nil
			}, f.Value})
		case isTag || !slices.Contains(known, name):
			return nil, query.Errorf("InvalidParameterValue", "The filter '%s' is invalid", name)
		case name == "tag-key" && tags != nil:
			tests = append(tests, test{func(v view, o T) []string {
				var keys []string
				for k := range tags(v, o) {
					keys = append(keys, k)
				}
				return keys
			}, f.Value})
		case slices.Contains(unknown, name):
			return nil, query.Errorf("UnsupportedOperation", "vpcd does not know what the filter '%s' asks for. Leave it out.", name)
		case attrs[name] != nil:
			tests = append(tests, test{attrs[name], f.Value})
		default:
			tests = append(tests, test{func(view, T) []string { return nil }, f.Value})
		}
	}
	return func(o T) bool {
		for _, t := range tests {
			values := t.values(v, o)
			if !slices.ContainsFunc(t.patterns, func(p string) bool {
				return slices.ContainsFunc(values, func(s string) bool { return like(p, s) })
			}) {
				return false
			}
		}
		return true
	}, nil
}

// like reports whether s matches a filter value: * stands for any characters or
// none, ? for one, and a backslash takes the meaning from the next character.
// It runs in time len(pattern) × len(s) at most.
func like(pattern, s string) bool {
	if !strings.ContainsAny(pattern, `*?\`) {
		return pattern == s
	}
	p, i := 0, 0
	star, mark := -1, 0 // the last *, and how much of s it stood for so far
	for i < len(s) {
		if p < len(pattern) {
			switch c := pattern[p]; {
			case c == '*':
				star, mark = p, i
				p++
				continue
			case c == '?':
				p++
				i++
				continue
			case c == '\\' && p+1 < len(pattern) && pattern[p+1] == s[i]:
				p += 2
				i++
				continue
			case c != '\\' && c == s[i] || c == '\\' && p+1 == len(pattern) && s[i] == '\\':
				p++
				i++
				continue
			}
		}
		if star < 0 {
			return false
		}
		mark++
		p, i = star+1, mark
	}
	for p < len(pattern) && pattern[p] == '*' {
		p++
	}
	return p == len(pattern)
}

// exact returns the values of the filter if all of them are free of wildcards,
// for looking objects up instead of searching for them.
func exact(filters []query.Filter, name string) ([]string, bool) {
	for _, f := range filters {
		if deref(f.Name) == name && !slices.ContainsFunc(f.Value, func(s string) bool { return strings.ContainsAny(s, `*?\`) }) {
			return f.Value, true
		}
	}
	return nil, false
}
