package api

import (
	"context"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func TestRunFinishesWhatIsDue(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	synctest.Test(t, func(t *testing.T) {
		open := func() (*store.Store, *API, func()) {
			s, err := store.Open(path, store.Options{})
			if err != nil {
				t.Fatal(err)
			}
			c := chaos.New(nil)
			if err := c.Set(chaos.Settings{AttachLatency: 10 * time.Second, Throttle: "off"}); err != nil {
				t.Fatal(err)
			}
			a := New(Options{Store: s, Chaos: c})
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- a.Run(ctx) }()
			return s, a, func() {
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}
		}
		s, a, stop := open()
		ctx := t.Context()
		v, err := a.createVpc(ctx, &query.CreateVpcRequest{CidrBlock: new("10.0.0.0/16")})
		if err != nil {
			t.Fatal(err)
		}
		n, err := a.createSubnet(ctx, &query.CreateSubnetRequest{VpcId: v.Vpc.VpcId, CidrBlock: new("10.0.0.0/24")})
		if err != nil {
			t.Fatal(err)
		}
		run := &query.RunInstancesRequest{ImageId: new("ami-0123456789abcdef0"), InstanceType: new("m5.large"), MinCount: new(int64(1)), MaxCount: new(int64(1)), SubnetId: n.Subnet.SubnetId}
		i, err := a.runInstances(ctx, run)
		if err != nil {
			t.Fatal(err)
		}
		state := func(s *store.Store, id *string) store.InstanceState {
			return s.View().Instance(vpc.InstanceID(*id)).State
		}
		first := i.InstancesSet[0].InstanceId
		<-time.After(10*time.Second - 1) // of the bubble's clock
		synctest.Wait()
		if got := state(s, first); got != store.Pending {
			t.Errorf("%s before its time", got)
		}
		<-time.After(1)
		synctest.Wait()
		if got := state(s, first); got != store.Running {
			t.Errorf("%s at its time", got)
		}
		// A second one is under way when the process ends.
		i, err = a.runInstances(ctx, run)
		if err != nil {
			t.Fatal(err)
		}
		second := i.InstancesSet[0].InstanceId
		stop()
		<-time.After(time.Minute)
		s, _, stop = open()
		defer stop()
		synctest.Wait()
		if got := state(s, second); got != store.Running {
			t.Errorf("%s, a minute after it was due", got)
		}
	})
}
