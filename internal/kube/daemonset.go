package kube

import (
	"context"
	"encoding/json"
	"fmt"
)

// findDaemonSet reads our DaemonSet once: who may not read it now will not be
// able to tell at the end whether it is gone.
func (c *Client) findDaemonSet(ctx context.Context) {
	if c.opts.DaemonSet == "" || c.opts.Namespace == "" {
		return
	}
	var retry backoff
	told := false
	for {
		_, err := c.daemonSet(ctx)
		if err == nil || absent(err) {
			c.mu.Lock()
			c.known = err == nil
			c.mu.Unlock()
			return
		}
		if refused(err) && !told {
			told = true
			c.log.Warn("own DaemonSet cannot be read: the plugin and its configuration stay when it is deleted; let the service account get it, or run underlay-agent uninstall on the node", "op", "daemonset", "err", err)
		}
		if !wait(ctx, retry.fail(err), nil) {
			return
		}
	}
}

func (c *Client) daemonSet(ctx context.Context) (*object, error) {
	b, err := c.api.Get().AbsPath("/apis/apps/v1").Namespace(c.opts.Namespace).Resource("daemonsets").Name(c.opts.DaemonSet).Do(ctx).Raw()
	if err != nil {
		return nil, err
	}
	var o object
	if err := json.Unmarshal(b, &o); err != nil {
		return nil, fmt.Errorf("decode the DaemonSet: %w", err)
	}
	return &o, nil
}

// Leaving asks whether our DaemonSet is gone or going, and not only this pod of
// it, as with an update or a drain; if so it says why we think so. Who removes
// an installation removes our rights and our service account as well, sometimes
// before this pod has ended: rights that we had and have lost mean the same.
// An API server that does not answer before ctx ends is an error; nothing is
// removed then.
func (c *Client) Leaving(ctx context.Context) (why string, err error) {
	if c.opts.DaemonSet == "" || c.opts.Namespace == "" {
		return "", nil
	}
	name := c.opts.Namespace + "/" + c.opts.DaemonSet
	o, err := c.daemonSet(ctx)
	c.mu.Lock()
	known := c.known
	c.mu.Unlock()
	switch {
	case err == nil && o.Metadata.DeletionTimestamp != nil:
		return "DaemonSet " + name + " is being deleted", nil
	case err == nil:
		return "", nil
	case absent(err):
		return "DaemonSet " + name + " is gone", nil
	case refused(err) && known:
		return "the right to read DaemonSet " + name + " is gone", nil
	}
	return "", fmt.Errorf("ask whether DaemonSet %s is gone: %w", name, err)
}
