package api

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// Options of New. Store and Chaos are required.
type Options struct {
	Store   *store.Store
	Chaos   *chaos.Control
	Region  string           // "" is us-east-1
	Account string           // "" is 123456789012
	Zones   int              // availability zones of the region, 1..26; 0 is 3
	Now     func() time.Time // nil is time.Now
	Logger  *slog.Logger     // nil is slog.Default()
	// Delivered tells how the last delivery of a flow log went, SUCCESS or FAILED
	// and why, or "" before the first; nil without any.
	Delivered func(id string) (status, message string)
}

// API is the EC2 API over a store.
type API struct {
	store   *store.Store
	chaos   *chaos.Control
	region  string
	account string
	zones   []zone
	now     func() time.Time
	log     *slog.Logger

	delivered func(id string) (status, message string)
}

// New makes an API. It makes the store keep snapshots for as long as the longest
// of the lags.
func New(o Options) *API {
	a := &API{
		store:   o.Store,
		chaos:   o.Chaos,
		region:  cmp.Or(o.Region, "us-east-1"),
		account: cmp.Or(o.Account, "123456789012"),
		now:     o.Now,
		log:     o.Logger,

		delivered: o.Delivered,
	}
	if a.delivered == nil {
		a.delivered = func(string) (string, string) { return "", "" }
	}
	if a.now == nil {
		a.now = time.Now
	}
	if a.log == nil {
		a.log = slog.Default()
	}
	a.zones = zonesOf(a.region, cmp.Or(o.Zones, 3))
	a.store.KeepHistory(func() time.Duration { s := a.chaos.Get(); return s.LongestLag() })
	return a
}

// view is what a Describe reads.
type view struct {
	*store.State
	api *API
}

// read returns the view of a Describe: the newest snapshot, or the one that was
// newest before the read lag, unless this call is one that is let off.
func (a *API) read() view {
	if s := a.chaos.Get(); s.ReadLag > 0 && rand.Float64() >= s.FreshReads {
		return view{a.store.At(a.now().Add(-s.ReadLag)), a}
	}
	return view{a.store.View(), a}
}

// fresh returns the view that a transaction, or what has just been committed,
// is described from.
func (a *API) fresh(s *store.State) view { return view{s, a} }

// update runs fn as one transaction and returns the state that it made.
func (a *API) update(fn func(tx *store.Tx) error) (view, error) {
	var made store.State
	if err := a.store.Update(func(tx *store.Tx) error {
		if err := fn(tx); err != nil {
			return err
		}
		made = tx.State
		return nil
	}); err != nil {
		return view{}, err
	}
	return a.fresh(&made), nil
}

// arn returns the ARN of an EC2 resource of the account.
func (a *API) arn(kind, id string) string {
	return fmt.Sprintf("arn:aws:ec2:%s:%s:%s/%s", a.region, a.account, kind, id)
}

// Handlers returns the handlers of all actions that there are.
func (a *API) Handlers() map[string]query.Handler {
	h := map[string]query.Handler{}
	for _, add := range []func(map[string]query.Handler){
		a.zoneHandlers, a.vpcHandlers, a.subnetHandlers, a.reservationHandlers, a.instanceHandlers, a.powerHandlers, a.instanceTypeHandlers,
		a.eniHandlers, a.groupHandlers, a.tagHandlers, a.aclHandlers, a.routeTableHandlers, a.routeHandlers, a.prefixListHandlers, a.groupRefHandlers,
		a.gatewayHandlers, a.elasticHandlers, a.natHandlers, a.natAddressHandlers, a.peeringHandlers, a.dhcpHandlers, a.flowLogHandlers, a.ipv6Handlers, a.egressOnlyHandlers,
	} {
		add(h)
	}
	return h
}

// Run finishes the transitions whose time has come until ctx ends, beginning
// with those that came while nothing ran.
func (a *API) Run(ctx context.Context) error {
	changed := a.store.Subscribe()
	timer := time.NewTimer(0)
	defer timer.Stop()
	hourly := time.NewTicker(time.Hour)
	defer hourly.Stop()
	for {
		if err := a.Settle(); err != nil {
			a.log.Error("transitions not finished", "err", err)
			timer.Reset(time.Second)
		} else if at, ok := a.store.View().NextDue(); ok {
			timer.Reset(max(0, at.Sub(a.now())))
		} else {
			timer.Stop()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-timer.C:
		case <-hourly.C:
			if err := a.forget(); err != nil {
				a.log.Error("client tokens not forgotten", "err", err)
			}
		}
	}
}

// quota returns a limit of the account.
func (a *API) quota(q chaos.Quota) int { s := a.chaos.Get(); return s.Quota(q) }

// quotaReached is the answer to who wants more than the account may have. The
// codes are EC2's, the words are not.
func quotaReached(code, what string, max int) error {
	return query.Errorf(code, "The maximum number of %s has been reached: %d.", what, max)
}

func deref[T any](p *T) T {
	if p == nil {
		var zero T
		return zero
	}
	return *p
}

// text returns s as an optional element: absent when empty.
func text[S ~string](s S) *string {
	if s == "" {
		return nil
	}
	return new(string(s))
}

func integer(n int) *int64 { return new(int64(n)) }

// quoted joins ids for a message: 'a, b'.
func quoted[S ~string](ids []S) string {
	parts := make([]string, len(ids))
	for i, id := range ids {
		parts[i] = string(id)
	}
	return "'" + strings.Join(parts, ", ") + "'"
}
