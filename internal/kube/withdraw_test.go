package kube

import (
	"context"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestWithdraw(t *testing.T) {
	run(t, Options{}, func(f *fakeAPI, c *Client) {
		c.Publish(Status{Ready: true, Addresses: 27, Annotations: map[string]string{"enis": "1/3", "agent-version": "v1"}})
		settle(time.Second)
		f.set(func() { f.node.Annotations["somebody"] = "else's" })
		if err := c.Withdraw(context.Background(), []string{"enis", "agent-version", "never-set"}); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(map[string]string{"somebody": "else's"}, f.node.Annotations); diff != "" {
			t.Error(diff)
		}
		if len(f.node.Status.Capacity) != 0 || len(f.node.Status.Conditions) != 2 {
			t.Errorf("%+v", f.node.Status)
		}
		f.set(func() { f.node = nil })
		if err := c.Withdraw(context.Background(), []string{"enis"}); err != nil {
			t.Errorf("the node is gone: %v", err)
		}
		f.set(func() { f.status = 503 })
		if err := c.Withdraw(context.Background(), nil); err == nil {
			t.Error("no API server, and no error")
		}
	})
}
