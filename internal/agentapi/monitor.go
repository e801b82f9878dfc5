package agentapi

import (
	"context"
	"errors"
	"net/netip"
	"time"
)

// MonitorQuery asks for the verdicts of the datapath as they come.
type MonitorQuery struct {
	// After is Verdicts.Next of the answer before; 0 begins.
	After uint64 `json:"after,omitempty"`
	// PerSecond bounds how many the node's programs tell; the highest that
	// somebody asks for counts. 0: DefaultVerdicts.
	PerSecond int `json:"perSecond,omitempty"`
}

// DefaultVerdicts is how many verdicts a node tells in a second, MaxVerdicts how
// many it can be asked for.
const (
	DefaultVerdicts = 1000
	MaxVerdicts     = 100_000
)

// Verdicts are what was decided since the answer before.
type Verdicts struct {
	Next     uint64    `json:"next"` // for the next MonitorQuery
	Verdicts []Verdict `json:"verdicts"`
	// Lost counts verdicts that were not told since the answer before: there were
	// more than allowed, or nobody asked in time.
	Lost uint64 `json:"lost,omitempty"`
}

// Verdict is one on a packet: the first of a connection that was let through, or
// any that was dropped.
type Verdict struct {
	Time      time.Time      `json:"time"`
	Pod       Pod            `json:"pod,omitzero"`
	Address   netip.Addr     `json:"address,omitzero"` // of the pod
	Direction string         `json:"direction"`        // egress: what the pod sends
	Verdict   string         `json:"verdict"`          // allow, audit or drop
	Reason    string         `json:"reason,omitempty"` // of a drop, as counters have it
	Rules     []string       `json:"rules,omitempty"`  // that decided
	Src       netip.AddrPort `json:"src,omitzero"`
	Dst       netip.AddrPort `json:"dst,omitzero"`
	Protocol  uint8          `json:"protocol,omitempty"`
	ICMPType  uint8          `json:"icmpType,omitempty"`
	ICMPCode  uint8          `json:"icmpCode,omitempty"`
	Bytes     int            `json:"bytes"`          // IP length
	Path      string         `json:"path,omitempty"` // direct or stack
}

// Monitor waits for verdicts, for a second or so, and returns those that there
// are then, if any.
func (c *Client) Monitor(ctx context.Context, q MonitorQuery) (*Verdicts, error) {
	resp, err := c.Do(ctx, &Request{Op: OpMonitor, Monitor: &q})
	if err != nil {
		return nil, err
	}
	if resp.Verdicts == nil {
		return nil, errors.New("decode response: monitor answered without verdicts")
	}
	return resp.Verdicts, nil
}
