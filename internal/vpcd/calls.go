package vpcd

import (
	"context"
	"maps"
	"sync"

	"github.com/underlay-cni/underlay/internal/vpcd/query"
)

// callCounter counts the well-formed EC2 calls by action since this process
// began, refused ones included: what a client costs its account. It is safe for
// concurrent use.
type callCounter struct {
	mu     sync.Mutex
	counts map[string]uint64
}

// gate counts a call and hands it to next.
func (c *callCounter) gate(next query.Gate) query.Gate {
	return func(ctx context.Context, call query.Call) error {
		c.mu.Lock()
		c.counts[call.Action.Name]++
		c.mu.Unlock()
		return next(ctx, call)
	}
}

func (c *callCounter) all() map[string]uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.counts)
}
