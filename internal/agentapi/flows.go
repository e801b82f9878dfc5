package agentapi

import (
	"context"
	"errors"
	"time"

	"github.com/underlay-cni/underlay/internal/flowlog"
)

// MaxFlows bounds the records of each kind in one answer: it stays within
// MaxMessage.
const MaxFlows = 500

// FlowQuery asks for the node's flow records.
type FlowQuery struct {
	Since time.Time `json:"since,omitzero"` // of intervals that ended then or later
}

// Flows are flow records of the node: those of intervals that have ended, oldest
// first, and what the running one has so far.
type Flows struct {
	Interval float64          `json:"interval"` // s
	Ended    []flowlog.Object `json:"ended"`
	Running  []flowlog.Object `json:"running"`
	Omitted  int              `json:"omitted,omitempty"` // records that had no room
}

// Flows returns the node's flow records.
func (c *Client) Flows(ctx context.Context, q FlowQuery) (*Flows, error) {
	resp, err := c.Do(ctx, &Request{Op: OpFlows, Flows: &q})
	if err != nil {
		return nil, err
	}
	if resp.Flows == nil {
		return nil, errors.New("decode response: flows answered without records")
	}
	return resp.Flows, nil
}
