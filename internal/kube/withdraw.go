package kube

import (
	"context"
	"encoding/json"
	"fmt"

	"k8s.io/apimachinery/pkg/types"
)

// Withdraw takes the capacity and these annotations (without prefix) off the
// node's object: the node gives no addresses any more. A node that is gone is
// no error.
func (c *Client) Withdraw(ctx context.Context, annotations []string) error {
	none := map[string]any{}
	for _, a := range annotations {
		none[annotationPrefix+a] = nil
	}
	for _, p := range []struct {
		what, subresource string
		body              any
	}{
		{"annotations", "", map[string]any{"metadata": map[string]any{"annotations": none}}},
		{"capacity", "status", map[string]any{"status": map[string]any{"capacity": map[string]any{PodAddresses: nil}}}},
	} {
		b, err := json.Marshal(p.body)
		if err != nil {
			return fmt.Errorf("encode the node's %s: %w", p.what, err)
		}
		req := c.api.Patch(types.MergePatchType).Resource("nodes").Name(c.opts.Node).Body(b)
		if p.subresource != "" {
			req = req.SubResource(p.subresource)
		}
		if err := req.Do(ctx).Error(); err != nil && !absent(err) {
			return fmt.Errorf("take the node's %s back: %w", p.what, err)
		}
	}
	return nil
}
