package agent

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/ec2"
	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// How often the rules of security groups are read. EC2's bucket of
// DescribeSecurityGroupRules belongs to all nodes of the account, 20 calls a
// second as documented, and no node sees the others: each goes as fast as is of
// use while nothing is refused, halves its rate at a refusal, and comes back by
// small steps, so that many share what there is. A controller's one poller will
// take their place (D12).
const (
	rulesRate = 1 / 0.7  // calls/s at the most: with EC2's answer, a change is in the kernel within a second
	rulesStep = 0.02     // calls/s more after each call that is let through
	rulesSlow = 1 / 30.0 // calls/s at the least
	// rulesFail is the delay after a failure that is no throttling, doubled up to
	// the slowest rate.
	rulesFail = time.Second
	// rulesGap is between two reads, whatever is wanted in between: sets that come
	// and go cost no more than those that stay.
	rulesGap = 250 * time.Millisecond
)

// rulesError says that rules are not there in time.
type rulesError struct{ cause error }

func (e *rulesError) Error() string {
	return fmt.Sprintf("read the rules of the pod's security groups: %v", e.cause)
}
func (e *rulesError) Unwrap() error { return e.cause }

// RuleReader is what the rules are read from.
type RuleReader interface {
	SecurityGroupRules(context.Context, []vpc.SecurityGroupID) ([]vpc.SecurityGroupRule, error)
	PrefixListVersions(context.Context, []vpc.PrefixListID) (map[vpc.PrefixListID]int64, error)
	PrefixListEntries(context.Context, vpc.PrefixListID) ([]netip.Prefix, error)
	Members(context.Context, []vpc.SecurityGroupID) (map[vpc.SecurityGroupID][]netip.Prefix, error)
}

// rules is what was read at one time. It is not changed any more.
type rules struct {
	groups []vpc.SecurityGroupID // whose rules these are, sorted
	rules  []vpc.SecurityGroupRule
	lists  map[vpc.PrefixListID]prefixList
	// members are those of the groups that rules name, as far as EC2 knows them;
	// nil: nobody needed them.
	members map[vpc.SecurityGroupID][]netip.Prefix
}

type prefixList struct {
	version int64
	entries []netip.Prefix
}

// need is what has to be read.
type need struct {
	groups  []vpc.SecurityGroupID // whose rules, sorted
	members bool                  // of the groups that they name, too
}

func (n need) equal(o need) bool { return n.members == o.members && slices.Equal(n.groups, o.groups) }

// holds reports whether r has all that is needed.
func (r *rules) holds(n need) bool {
	if n.members && r.members == nil {
		return false
	}
	for _, g := range n.groups {
		if _, ok := slices.BinarySearch(r.groups, g); !ok {
			return false
		}
	}
	return true
}

func (r *rules) equal(o *rules) bool {
	return slices.Equal(r.groups, o.groups) && slices.Equal(r.rules, o.rules) &&
		maps.EqualFunc(r.lists, o.lists, func(a, b prefixList) bool { return a.version == b.version && slices.Equal(a.entries, b.entries) }) &&
		(r.members == nil) == (o.members == nil) && maps.EqualFunc(r.members, o.members, slices.Equal[[]netip.Prefix])
}

// ruleBook keeps the rules of the security groups that the node needs, as EC2
// shows them. It reads while somebody needs some, and never otherwise.
type ruleBook struct {
	count func(call string, err error)
	note  func(op, message string)
	poke  chan struct{} // size 1: what is wanted has changed

	mu     sync.Mutex
	wanted need
	now    *rules
	news   chan struct{} // closed when now is another
	read   time.Time     // end of the last read that succeeded
	rate   float64       // calls/s
	err    error         // of the last read
}

func newRuleBook(count func(string, error), note func(op, message string)) *ruleBook {
	return &ruleBook{count: count, note: note, poke: make(chan struct{}, 1), now: &rules{}, news: make(chan struct{}), rate: rulesRate}
}

// want says what is needed from now on.
func (b *ruleBook) want(n need) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.wanted.equal(n) {
		return
	}
	b.wanted = n
	select {
	case b.poke <- struct{}{}:
	default:
	}
}

// current returns what was read last, and what closes when that has changed.
func (b *ruleBook) current() (*rules, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.now, b.news
}

// await waits until all that is needed is there. It must be wanted.
func (b *ruleBook) await(ctx context.Context, n need) (*rules, error) {
	for {
		r, news := b.current()
		if r.holds(n) {
			return r, nil
		}
		select {
		case <-news:
		case <-ctx.Done():
			b.mu.Lock()
			err := b.err
			b.mu.Unlock()
			if err == nil {
				err = context.Cause(ctx)
			}
			return nil, &rulesError{err}
		}
	}
}

// run reads until ctx ends.
func (b *ruleBook) run(ctx context.Context, from RuleReader) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	fails := 0
	var began time.Time // of the last read
	for {
		select {
		case <-ctx.Done():
			return
		case <-b.poke:
			if wait := time.Until(began.Add(rulesGap)); wait > 0 {
				timer.Reset(wait)
				continue
			}
		case <-timer.C:
		}
		b.mu.Lock()
		wanted, old := b.wanted, b.now
		b.mu.Unlock()
		if len(wanted.groups) == 0 {
			timer.Stop()
			b.take(&rules{})
			continue
		}
		began = time.Now()
		r, err := b.readAll(ctx, from, wanted, old)
		if ctx.Err() != nil {
			return
		}
		timer.Reset(b.pace(err, &fails))
		if err != nil {
			b.note("rules", stable(err)+"; pods on this node are judged by the rules as they were read before")
			continue
		}
		b.take(r)
	}
}

// take puts r in the place of what was read before.
func (b *ruleBook) take(r *rules) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if r.equal(b.now) {
		return
	}
	b.now = r
	close(b.news)
	b.news = make(chan struct{})
}

// pace returns when to read again.
func (b *ruleBook) pace(err error, fails *int) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.err = err
	_, class := ec2.Outcome(err)
	switch {
	case err == nil:
		*fails, b.read = 0, time.Now()
		b.rate = min(b.rate+rulesStep, rulesRate)
	case class == ipam.ClassThrottled:
		b.rate = max(b.rate/2, rulesSlow)
	default:
		*fails++
		return min(rulesFail<<min(*fails-1, 5), time.Duration(float64(time.Second)/rulesSlow))
	}
	d := float64(time.Second) / b.rate
	return time.Duration(d * (0.9 + 0.1*rand.Float64())) // nodes that began together do not stay together
}

// readAll reads the groups' rules, the members of groups in them if those are
// needed, and of the prefix lists in them those whose version is another than in
// old.
func (b *ruleBook) readAll(ctx context.Context, from RuleReader, n need, old *rules) (*rules, error) {
	list, err := from.SecurityGroupRules(ctx, n.groups)
	b.count("describe-rules", err)
	if err != nil {
		return nil, err
	}
	out := &rules{groups: n.groups, rules: list, lists: map[vpc.PrefixListID]prefixList{}}
	if n.members {
		if err := b.readMembers(ctx, from, out); err != nil {
			return nil, err
		}
	}
	var ids []vpc.PrefixListID
	for _, r := range list {
		if r.PrefixList != "" && !slices.Contains(ids, r.PrefixList) {
			ids = append(ids, r.PrefixList)
		}
	}
	if len(ids) == 0 {
		return out, nil
	}
	slices.Sort(ids)
	versions, err := from.PrefixListVersions(ctx, ids)
	b.count("describe-prefix-lists", err)
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		v, ok := versions[id]
		if !ok {
			continue // deleted: it matches nothing
		}
		if was, ok := old.lists[id]; ok && was.version == v && v != 0 {
			out.lists[id] = was
			continue
		}
		entries, err := from.PrefixListEntries(ctx, id)
		b.count("prefix-list-entries", err)
		if err != nil {
			return nil, err
		}
		out.lists[id] = prefixList{version: v, entries: entries}
	}
	return out, nil
}

// readMembers reads who carries the groups that the rules name.
func (b *ruleBook) readMembers(ctx context.Context, from RuleReader, r *rules) (err error) {
	var named []vpc.SecurityGroupID
	for _, rule := range r.rules {
		if rule.Referenced != "" {
			named = append(named, rule.Referenced)
		}
	}
	slices.Sort(named)
	if named = slices.Compact(named); len(named) == 0 {
		r.members = map[vpc.SecurityGroupID][]netip.Prefix{}
		return nil
	}
	r.members, err = from.Members(ctx, named)
	b.count("describe-members", err)
	return err
}
