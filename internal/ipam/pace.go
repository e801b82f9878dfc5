package ipam

import (
	"time"
)

// pressure is how long after a throttled call the account still counts as
// short of requests: nothing is returned meanwhile, and calls ask for more.
const pressure = time.Minute

// pace is how fast calls of one kind may go. EC2 keeps a bucket of tokens per
// account and action, which a node shares with all others and cannot see. What
// it can do: after a refusal try with one call, twice as many after each that
// is let through; and wait for a share of the time that the shortage lasts
// already. So the last node of many is late by that share at the most, however
// many they are, and refused calls become rare the longer it takes, where
// doubled delays would either come too often at first or too late at the end.
type pace struct {
	until  time.Time // no call before
	since  time.Time // first refusal of the shortage
	last   time.Time // latest refusal
	tries  uint64    // refusals in all, for the jitter
	window int       // calls in flight at the most; 0: any number
	least  int       // addresses that a call asks for at the least
}

const (
	paceShare = 12                     // the delay is a twelfth of the shortage
	paceFirst = 300 * time.Millisecond // a token and a half at EC2's 5 per second
	paceLimit = time.Minute
	wideOpen  = 32 // calls in flight from which on nothing is limited
)

func (c *pace) throttled(now time.Time, seed uint64) {
	if c.last.IsZero() || now.Sub(c.last) > pressure {
		c.since, c.least = now, 0
	}
	c.last = now
	c.tries++
	c.window = max(1, c.window/2)
	c.least = min(max(2, 2*c.least), PrefixAddresses)
	c.until = now.Add(spread(min(max(now.Sub(c.since)/paceShare, paceFirst), paceLimit), seed, c.tries))
}

func (c *pace) passed() {
	if c.window *= 2; c.window >= wideOpen {
		c.window = 0
	}
}

// may reports whether a call of the kind may start now.
func (p *step) may(k CallKind) bool {
	c := &p.s.Pace[k]
	if !p.due(c.until) {
		return false
	}
	if c.window == 0 || !p.scarce(k) {
		return true
	}
	n := 0
	for _, o := range p.s.Calls {
		if o.Kind == k && !o.Retry {
			n++
		}
	}
	return n < c.window
}

// pressed reports whether EC2 throttled a call not long ago.
func (p *step) pressed() bool {
	for k := range p.s.Pace {
		if last := p.s.Pace[k].last; !last.IsZero() && !p.due(last.Add(pressure)) {
			return true
		}
	}
	return false
}

// While calls are scarce, one for addresses waits until no request has come for
// a moment, or until the first has waited for holdBack: a token that is not
// taken stays in the account's bucket, and one that is taken for the first few
// of many pods costs a second one. If they still come then, the call asks for
// those of the time ahead too. (Five tokens a second give each of twenty nodes
// its next one some four seconds later.)
const (
	quiet    = 100 * time.Millisecond
	holdBack = 500 * time.Millisecond
	ahead    = 5 * time.Second
)

// scarce reports whether EC2 throttled calls of the kind not long ago.
func (p *step) scarce(k CallKind) bool {
	last := p.s.Pace[k].last
	return !last.IsZero() && p.now.Sub(last) <= pressure
}

// gathering reports whether it is better to wait for further requests than to
// ask for what waits now, and if not, how many are to come soon.
func (p *step) gathering(pool Pool) (wait bool, soon int) {
	if !p.scarce(CallAssign) {
		return false, 0
	}
	var first, last time.Time
	n := 0
	for _, r := range p.s.Waiting { // in order of arrival
		if r.Pool != pool {
			continue
		}
		if n++; n == 1 {
			first = r.Since
		}
		last = r.Since
	}
	switch {
	case n == 0 || p.now.Sub(last) >= quiet:
		return false, 0
	case p.now.Sub(first) < holdBack:
		p.at(earlier(last.Add(quiet), first.Add(holdBack)))
		return true, 0
	}
	// No more than the pods that the type takes, whatever it can hold: prefixes
	// could make a subnet's worth of it.
	limit := p.s.Config.Limits.MaxPods(1)
	for _, e := range p.s.ENIs {
		limit -= len(e.Addrs)
	}
	came := int64(n) * int64(ahead) / int64(last.Sub(first)+quiet)
	return false, max(0, min(int(came), limit-n))
}

// atLeast returns n, or as many as are worth a call while calls are scarce,
// within room.
func (p *step) atLeast(n, room int) int {
	if !p.scarce(CallAssign) {
		return n
	}
	return min(max(n, p.s.Pace[CallAssign].least), room)
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
