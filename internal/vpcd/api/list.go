package api

import (
	"iter"
	"time"

	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// listing is how a Describe finds objects that have an identifier and tags.
type listing[T any] struct {
	action string
	all    func(v view) iter.Seq2[string, T]
	find   func(s *store.State, id string) (T, error)
	key    func(o T) string
	attrs  attributes[T]
}

// page returns the objects of a page and the token of the next one.
func (l listing[T]) page(v view, ids []string, filters []query.Filter, token *string, limit *int64) ([]T, *string, error) {
	match, err := matcher(v, l.action, filters, l.attrs, nil, func(v view, o T) map[string]string { return v.TagsOf(l.key(o)) })
	if err != nil {
		return nil, nil, err
	}
	c, err := paging(l.action, filters, len(ids), token, limit)
	if err != nil {
		return nil, nil, err
	}
	items := l.all(v)
	if len(ids) > 0 {
		named, err := findAll(v.State, ids, l.find)
		if err != nil {
			return nil, nil, err
		}
		items = listed(named, l.key)
	}
	found, next := take(c, items, match)
	return found, next, nil
}

// onceOnly returns the id that an earlier request with the same client token
// made, or makes one and remembers it.
func onceOnly(tx *store.Tx, action string, token *string, params any, now time.Time, makeOne func() (string, error)) (string, error) {
	before, err := once(tx, action, token, params)
	if err != nil {
		return "", err
	}
	if len(before) == 1 {
		return before[0], nil
	}
	id, err := makeOne()
	if err != nil {
		return "", err
	}
	return id, remember(tx, action, token, params, now, []string{id})
}

// value makes an attribute of one string; an empty one is none.
func value[T any](of func(o T) string) func(view, T) []string {
	return func(_ view, o T) []string {
		if s := of(o); s != "" {
			return []string{s}
		}
		return nil
	}
}

// owned is the attribute owner-id: all is the account's.
func owned[T any](v view, _ T) []string { return []string{v.api.account} }

// values makes an attribute of what an object has several of.
func values[T, P any](parts func(v view, o T) []P, of func(v view, p P) string) func(view, T) []string {
	return func(v view, o T) []string {
		var out []string
		for _, p := range parts(v, o) {
			if s := of(v, p); s != "" {
				out = append(out, s)
			}
		}
		return out
	}
}
