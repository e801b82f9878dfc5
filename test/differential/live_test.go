package differential

import (
	"errors"
	"flag"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

var changes = flag.Int("changes", 60, "changes of each world of TestChangedUnderTraffic")

// Under traffic that does not end, the next packet after an answered change is
// judged by it, wherever interfaces are; what the change does not concern goes on.
func TestChangedUnderTraffic(t *testing.T) {
	s := newStand(t)
	first := *seed
	if first == 0 {
		first = uint64(time.Now().UnixNano())
	}
	t.Logf("-seed %d", first)
	lasting, err := s.layLasting()
	if err != nil {
		t.Fatal(err)
	}
	group, ctx := errgroup.WithContext(s.ctx)
	var worlds []*watched
	for i := range 3 {
		w, err := s.watch(first+uint64(i), Enforced, true)
		if err != nil {
			t.Fatal(err)
		}
		defer w.close()
		worlds = append(worlds, w)
	}
	var mu sync.Mutex
	var total tally
	probe := func(w *watched) error {
		n, err := w.probe(16)
		mu.Lock()
		defer mu.Unlock()
		total.add(n)
		return err
	}
	var left atomic.Int64
	left.Store(int64(len(worlds)))
	for _, w := range worlds {
		group.Go(func() error {
			defer left.Add(-1)
			for n := 0; n < *changes && ctx.Err() == nil; n++ {
				if err := w.change(func() error { return errors.New("vpcd does not answer") }); err != nil {
					return err
				}
				if err := probe(w); err != nil {
					return err
				}
			}
			return nil
		})
	}
	group.Go(func() error {
		for left.Load() > 0 && ctx.Err() == nil {
			for _, w := range worlds {
				if err := probe(w); err != nil {
					return err
				}
			}
			if err := lasting.probe(); err != nil {
				return err
			}
		}
		return nil
	})
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d changes; %d packets, %d received; of %d the verdict was sure, of %d another than before the change", len(worlds)**changes, total.sent, total.received, total.sure, total.decisive)
	if total.decisive < *changes {
		t.Errorf("only %d packets told a change from none", total.decisive)
	}
}
