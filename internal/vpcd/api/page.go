package api

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"iter"
	"strings"

	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// cursor is where a page of a Describe begins and how long it may be.
type cursor struct {
	sum   string // of what was asked for: a token continues that alone
	after string // key of the last item of the page before
	limit int    // 0: all
}

// paging reads NextToken and MaxResults of a request. ids is how many objects
// the request names: those come whole.
func paging(action string, filters []query.Filter, ids int, token *string, limit *int64) (cursor, error) {
	c := cursor{limit: int(deref(limit))}
	if limit != nil {
		lo, hi := int64(5), int64(1000) // where the model has no bounds
		if m := query.Actions[action]; m.MaxResults > 0 {
			lo, hi = m.MinResults, m.MaxResults
		}
		if *limit < lo || *limit > hi {
			return c, query.Errorf("InvalidParameterValue", "Value ( %d ) for parameter maxResults is invalid. Expecting a value between %d and %d.", *limit, lo, hi)
		}
		if ids > 0 {
			return c, query.Errorf("InvalidParameterCombination", "The parameter maxResults cannot be used with a list of ids in the same request")
		}
	}
	asked, err := json.Marshal(filters)
	if err != nil {
		return c, err
	}
	sum := sha256.Sum256(append([]byte(action+"\x00"), asked...))
	c.sum = string(sum[:8])
	if deref(token) == "" {
		return c, nil
	}
	raw, err := base64.RawURLEncoding.DecodeString(*token)
	after, ok := strings.CutPrefix(string(raw), c.sum)
	if err != nil || !ok {
		return c, query.Errorf("InvalidPaginationToken", "The token is not one that a request with these filters was given")
	}
	c.after = after
	return c, nil
}

// take returns the items of the page that match, and the token of the page
// after it, nil when there is none. items come in the order of their keys.
func take[T any](c cursor, items iter.Seq2[string, T], match func(T) bool) ([]T, *string) {
	out := []T{}
	last := ""
	for key, o := range items {
		if key <= c.after && c.after != "" || !match(o) {
			continue
		}
		if c.limit > 0 && len(out) == c.limit {
			return out, new(base64.RawURLEncoding.EncodeToString([]byte(c.sum + last)))
		}
		out = append(out, o)
		last = key
	}
	return out, nil
}

// entries iterates over a table.
func entries[K ~string, T any](t store.Table[K, T]) iter.Seq2[string, T] {
	return func(yield func(string, T) bool) {
		for k, v := range t.All() {
			if !yield(string(k), v) {
				return
			}
		}
	}
}

// listed iterates over objects that a request named, once each and in the
// order of their keys.
func listed[T any](objects []T, key func(T) string) iter.Seq2[string, T] {
	return func(yield func(string, T) bool) {
		seen := map[string]bool{}
		for _, o := range objects {
			if k := key(o); !seen[k] {
				seen[k] = true
				if !yield(k, o) {
					return
				}
			}
		}
	}
}
