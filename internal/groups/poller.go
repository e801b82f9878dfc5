package groups

import (
	"context"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/underlay-cni/underlay/internal/ec2"
	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// How often EC2 is read. Its bucket of each action belongs to all callers of the
// account, 20 calls a second as documented, and no caller sees the others: each
// goes as fast as is of use while nothing is refused, halves its rate at a
// refusal, and comes back by small steps, so that many share what there is.
const (
	fastest = 1 / 0.7  // reads/s at the most: with EC2's answer, a change is known within a second
	step    = 0.02     // reads/s more after each read that is let through
	slowest = 1 / 30.0 // reads/s at the least
	// afterFailure is the delay after a failure that is no throttling, doubled up to
	// the slowest rate.
	afterFailure = time.Second
	// gap is between two reads, whatever is wanted in between: groups that come and
	// go cost no more than those that stay.
	gap = 250 * time.Millisecond
)

// DefaultRate is how many requests a second a poller sends at the most, of all
// kinds together: a quarter of what EC2 grants an account for one action. At 200
// groups to a request that is 700 groups at full speed, and more at less.
// Burst is how many of them may come at once.
const (
	DefaultRate = 5
	Burst       = 20
)

// Reader is what is read from; see package ec2. A Client asks for leave before
// each request (ec2.Metered), so that pages count.
type Reader interface {
	SecurityGroupRules(context.Context, []vpc.SecurityGroupID) ([]vpc.SecurityGroupRule, error)
	PrefixListVersions(context.Context, []vpc.PrefixListID) (map[vpc.PrefixListID]int64, error)
	PrefixListEntries(context.Context, vpc.PrefixListID) ([]netip.Prefix, error)
	Members(context.Context, []vpc.SecurityGroupID) (map[vpc.SecurityGroupID][]netip.Prefix, error)
}

// PollerOptions configure a Poller.
type PollerOptions struct {
	Rate  float64                      // requests/s at the most; 0: DefaultRate
	Count func(call string, err error) // each call, as it ended; may be nil
	Note  func(err error)              // a read that failed; may be nil
}

// Status is how up to date something is.
type Status struct {
	Read  time.Time     // end of the last read that succeeded; zero: there was none
	Every time.Duration // between two reads
	Err   error         // of the last read
}

// Poller reads what its subscribers need while there is something.
type Poller struct {
	o      PollerOptions
	budget *rate.Limiter
	poke   chan struct{} // size 1: something is needed that is not known

	mu      sync.Mutex
	subs    map[*Subscription]struct{}
	rules   map[vpc.SecurityGroupID]int // how many need its rules
	members map[vpc.SecurityGroupID]int // of these, with the members of the groups in them
	known   *Snapshot                   // its maps change
	status  Status
	rate    float64 // reads/s
}

// NewPoller returns a poller that reads once Run is called.
func NewPoller(o PollerOptions) *Poller {
	if o.Rate == 0 {
		o.Rate = DefaultRate
	}
	if o.Count == nil {
		o.Count = func(string, error) {}
	}
	if o.Note == nil {
		o.Note = func(error) {}
	}
	return &Poller{o: o, budget: rate.NewLimiter(rate.Limit(o.Rate), Burst), poke: make(chan struct{}, 1), subs: map[*Subscription]struct{}{},
		rules: map[vpc.SecurityGroupID]int{}, members: map[vpc.SecurityGroupID]int{}, known: newSnapshot(), rate: fastest}
}

// Status is that of the reads.
func (p *Poller) Status() Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.status
	s.Every = time.Duration(float64(time.Second) / p.rate)
	return s
}

// Counts returns how many subscribers there are, and whose rules they need.
func (p *Poller) Counts() (subscribers, groups int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.subs), len(p.rules)
}

// Subscription is one subscriber's part of what a Poller knows.
type Subscription struct {
	p    *Poller
	need Need
	now  *Snapshot
	news chan struct{} // closed when now is another
}

// Subscribe returns a subscription that needs nothing.
func (p *Poller) Subscribe() *Subscription {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &Subscription{p: p, now: newSnapshot(), news: make(chan struct{})}
	p.subs[s] = struct{}{}
	return s
}

// Want says what is needed from now on.
func (s *Subscription) Want(n Need) {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	if s.need.Equal(n) {
		return
	}
	s.p.refer(n, 1)
	s.p.refer(s.need, -1)
	s.need = n
	s.look()
	if !s.now.Holds(n) {
		select {
		case s.p.poke <- struct{}{}:
		default:
		}
	}
}

// Current returns what is known of what is needed, and what closes when that has
// changed. It may be less than all.
func (s *Subscription) Current() (*Snapshot, <-chan struct{}) {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	return s.now, s.news
}

// Close ends the subscription.
func (s *Subscription) Close() {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	if _, ok := s.p.subs[s]; !ok {
		return
	}
	s.p.refer(s.need, -1)
	delete(s.p.subs, s)
}

// look takes a new view if it differs. p.mu is held.
func (s *Subscription) look() {
	v := s.p.known.view(s.need)
	if v.same(s.now) {
		return
	}
	s.now = v
	close(s.news)
	s.news = make(chan struct{})
}

// refer counts who needs what, and forgets what nobody does: it would grow old
// unread. mu is held.
func (p *Poller) refer(n Need, d int) {
	for _, id := range n.Groups {
		if p.rules[id] += d; p.rules[id] == 0 {
			delete(p.rules, id)
			delete(p.known.Groups, id)
		}
		if !n.Members {
			continue
		}
		if p.members[id] += d; p.members[id] == 0 {
			delete(p.members, id)
		}
	}
	if len(p.members) == 0 {
		clear(p.known.Members)
	}
	if len(p.rules) == 0 {
		clear(p.known.Lists)
	}
}

// Run reads until ctx ends.
func (p *Poller) Run(ctx context.Context, from Reader) {
	metered := ec2.Metered(ctx, p.budget.Wait)
	timer := time.NewTimer(0)
	defer timer.Stop()
	fails := 0
	var began time.Time // of the last read
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.poke:
			if wait := time.Until(began.Add(gap)); wait > 0 {
				timer.Reset(wait)
				continue
			}
		case <-timer.C:
		}
		rules, members, lists := p.needed()
		if len(rules) == 0 {
			timer.Stop()
			continue
		}
		began = time.Now()
		fresh, err := p.read(metered, from, rules, members, lists)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			p.o.Note(err)
		} else {
			p.take(fresh)
		}
		timer.Reset(p.pace(err, &fails))
	}
}

// needed returns whose rules are to be read, of which of them the groups that
// they name, and the prefix lists as they are known.
func (p *Poller) needed() (rules, members []vpc.SecurityGroupID, lists map[vpc.PrefixListID]*PrefixList) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Sorted(maps.Keys(p.rules)), slices.Collect(maps.Keys(p.members)), maps.Clone(p.known.Lists)
}

// take puts what was read in the place of what was known, as far as it is needed
// still, and tells who it concerns.
func (p *Poller) take(fresh *Snapshot) {
	p.mu.Lock()
	defer p.mu.Unlock()
	maps.DeleteFunc(fresh.Groups, func(id vpc.SecurityGroupID, _ *Group) bool { return p.rules[id] == 0 })
	for id, g := range fresh.Groups {
		fresh.Groups[id] = g.settle(p.known.Groups[id])
	}
	for id, l := range fresh.Lists {
		fresh.Lists[id] = l.settle(p.known.Lists[id])
	}
	if len(p.members) == 0 {
		clear(fresh.Members)
	}
	for id, m := range fresh.Members {
		fresh.Members[id] = m.settle(p.known.Members[id])
	}
	if fresh.same(p.known) {
		return
	}
	p.known = fresh
	for s := range p.subs {
		s.look()
	}
}

// pace returns when to read again.
func (p *Poller) pace(err error, fails *int) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.status.Err = err
	_, class := ec2.Outcome(err)
	switch {
	case err == nil:
		*fails, p.status.Read = 0, time.Now()
		p.rate = min(p.rate+step, fastest)
	case class == ipam.ClassThrottled:
		p.rate = max(p.rate/2, slowest)
	default:
		*fails++
		return min(afterFailure<<min(*fails-1, 5), time.Duration(float64(time.Second)/slowest))
	}
	d := float64(time.Second) / p.rate
	return time.Duration(d * (0.9 + 0.1*rand.Float64())) // those that began together do not stay together
}

// read reads the rules of groups, who carries the groups that some of them name,
// and of the prefix lists in them those whose version is another than before.
func (p *Poller) read(ctx context.Context, from Reader, groups, withMembers []vpc.SecurityGroupID, lists map[vpc.PrefixListID]*PrefixList) (*Snapshot, error) {
	rules, err := from.SecurityGroupRules(ctx, groups)
	p.o.Count("describe-rules", err)
	if err != nil {
		return nil, err
	}
	out := newSnapshot()
	for _, id := range groups {
		out.Groups[id] = &Group{}
	}
	named := map[vpc.PrefixListID]bool{}
	for i := range rules {
		r := &rules[i]
		g := out.Groups[r.Group]
		if g == nil {
			continue // not asked for
		}
		g.Rules = append(g.Rules, *r)
		if r.PrefixList != "" {
			named[r.PrefixList] = true
		}
	}
	for _, g := range out.Groups {
		slices.SortFunc(g.Rules, func(a, b vpc.SecurityGroupRule) int { return strings.Compare(a.ID, b.ID) })
	}
	if err := p.readMembers(ctx, from, withMembers, out); err != nil {
		return nil, err
	}
	return out, p.readLists(ctx, from, slices.Sorted(maps.Keys(named)), lists, out)
}

// readMembers reads who carries the groups that those of these groups name.
func (p *Poller) readMembers(ctx context.Context, from Reader, of []vpc.SecurityGroupID, out *Snapshot) error {
	for _, id := range of {
		g := out.Groups[id]
		if g == nil {
			continue // it came while we were at it
		}
		for i := range g.Rules {
			if named := g.Rules[i].Referenced; named != "" {
				out.Members[named] = &Membership{}
			}
		}
	}
	if len(out.Members) == 0 {
		return nil
	}
	members, err := from.Members(ctx, slices.Sorted(maps.Keys(out.Members)))
	p.o.Count("describe-members", err)
	if err != nil {
		return err
	}
	for id, addrs := range members {
		if m := out.Members[id]; m != nil {
			m.Addrs = slices.Clone(addrs)
			slices.SortFunc(m.Addrs, netip.Prefix.Compare)
			m.Addrs = slices.Compact(m.Addrs)
		}
	}
	return nil
}

// readLists reads those of the prefix lists that are not known in their version.
func (p *Poller) readLists(ctx context.Context, from Reader, ids []vpc.PrefixListID, known map[vpc.PrefixListID]*PrefixList, out *Snapshot) error {
	if len(ids) == 0 {
		return nil
	}
	versions, err := from.PrefixListVersions(ctx, ids)
	p.o.Count("describe-prefix-lists", err)
	if err != nil {
		return err
	}
	for _, id := range ids {
		v, ok := versions[id]
		if !ok {
			continue // deleted: it matches nothing
		}
		if was := known[id]; was != nil && was.Version == v && v != 0 {
			out.Lists[id] = was
			continue
		}
		entries, err := from.PrefixListEntries(ctx, id)
		p.o.Count("prefix-list-entries", err)
		if err != nil {
			return err
		}
		out.Lists[id] = &PrefixList{Version: v, Entries: slices.Clone(entries)}
	}
	return nil
}
