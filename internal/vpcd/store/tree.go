package store

import (
	"hash/maphash"
	"iter"
)

// Table is an immutable ordered map. Put and Delete of a Tx make a new one
// that shares all but O(log n) nodes with the old.
//
// It is a treap: a search tree by key that is a heap by the hash of the key,
// which balances it without bookkeeping.
type Table[K comparable, V any] struct {
	root *node[K, V]
	n    int
	cmp  func(a, b K) int
}

type node[K comparable, V any] struct {
	key         K
	val         V
	prio        uint64
	left, right *node[K, V]
}

var treeSeed = maphash.MakeSeed()

// Len returns the number of entries.
func (t Table[K, V]) Len() int { return t.n }

// Get returns the value under key, and whether there is one.
func (t Table[K, V]) Get(key K) (V, bool) {
	for n := t.root; n != nil; {
		switch c := t.cmp(key, n.key); {
		case c == 0:
			return n.val, true
		case c < 0:
			n = n.left
		default:
			n = n.right
		}
	}
	var zero V
	return zero, false
}

// All iterates over all entries in the order of their keys.
func (t Table[K, V]) All() iter.Seq2[K, V] {
	return func(yield func(K, V) bool) { walk(t.root, yield) }
}

// From iterates over the entries whose key is not below key, in order.
func (t Table[K, V]) From(key K) iter.Seq2[K, V] {
	return func(yield func(K, V) bool) { walkFrom(t.root, key, t.cmp, yield) }
}

func walk[K comparable, V any](n *node[K, V], yield func(K, V) bool) bool {
	return n == nil || walk(n.left, yield) && yield(n.key, n.val) && walk(n.right, yield)
}

func walkFrom[K comparable, V any](n *node[K, V], from K, cmp func(a, b K) int, yield func(K, V) bool) bool {
	if n == nil {
		return true
	}
	if cmp(n.key, from) < 0 {
		return walkFrom(n.right, from, cmp, yield)
	}
	return walkFrom(n.left, from, cmp, yield) && yield(n.key, n.val) && walk(n.right, yield)
}

// with returns the table with key bound to val.
func (t Table[K, V]) with(key K, val V) Table[K, V] {
	root, added := t.insert(t.root, key, val)
	n := t.n
	if added {
		n++
	}
	return Table[K, V]{root: root, n: n, cmp: t.cmp}
}

// insert returns a copy of n with key bound to val; the node it returns is
// never shared, so that the caller may rotate it in place.
func (t Table[K, V]) insert(n *node[K, V], key K, val V) (*node[K, V], bool) {
	if n == nil {
		return &node[K, V]{key: key, val: val, prio: maphash.Comparable(treeSeed, key)}, true
	}
	c := *n
	var added bool
	switch d := t.cmp(key, n.key); {
	case d == 0:
		c.val = val
	case d < 0:
		if c.left, added = t.insert(n.left, key, val); c.left.prio > c.prio {
			up := c.left
			c.left, up.right = up.right, &c
			return up, added
		}
	default:
		if c.right, added = t.insert(n.right, key, val); c.right.prio > c.prio {
			up := c.right
			c.right, up.left = up.left, &c
			return up, added
		}
	}
	return &c, added
}

// without returns the table with nothing under key.
func (t Table[K, V]) without(key K) Table[K, V] {
	if _, ok := t.Get(key); !ok {
		return t
	}
	return Table[K, V]{root: t.remove(t.root, key), n: t.n - 1, cmp: t.cmp}
}

func (t Table[K, V]) remove(n *node[K, V], key K) *node[K, V] {
	d := t.cmp(key, n.key)
	if d == 0 {
		return merge(n.left, n.right)
	}
	c := *n
	if d < 0 {
		c.left = t.remove(n.left, key)
	} else {
		c.right = t.remove(n.right, key)
	}
	return &c
}

// merge joins two trees; every key of a is below every key of b.
func merge[K comparable, V any](a, b *node[K, V]) *node[K, V] {
	switch {
	case a == nil:
		return b
	case b == nil:
		return a
	case a.prio > b.prio:
		c := *a
		c.right = merge(a.right, b)
		return &c
	default:
		c := *b
		c.left = merge(a, b.left)
		return &c
	}
}
