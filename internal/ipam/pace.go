package ipam

import "time"

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
	if c.window == 0 || p.now.Sub(c.last) > pressure {
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

// atLeast returns n, or as many as are worth a call while calls are scarce,
// within room.
func (p *step) atLeast(n, room int) int {
	c := &p.s.Pace[CallAssign]
	if c.last.IsZero() || p.now.Sub(c.last) > pressure {
		return n
	}
	return min(max(n, c.least), room)
}
