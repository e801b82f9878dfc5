package sim

import "time"

// clock is virtual time: a heap of what happens next. Events of one moment
// happen in the order in which they were asked for, so that a run depends on
// its seed alone.
type clock struct {
	now  time.Duration // since the start of the run
	seq  uint64
	heap []event
	ran  uint64 // events so far
}

type event struct {
	at  time.Duration
	seq uint64
	fn  func()
}

func (e *event) before(o *event) bool { return e.at < o.at || e.at == o.at && e.seq < o.seq }

// after has fn run in d from now.
func (c *clock) after(d time.Duration, fn func()) { c.at(c.now+max(d, 0), fn) }

// at has fn run at t, which must not have passed.
func (c *clock) at(t time.Duration, fn func()) {
	c.seq++
	h := append(c.heap, event{at: max(t, c.now), seq: c.seq, fn: fn})
	i := len(h) - 1
	for i > 0 {
		p := (i - 1) / 4
		if !h[i].before(&h[p]) {
			break
		}
		h[i], h[p] = h[p], h[i]
		i = p
	}
	c.heap = h
}

// step runs the next event, and reports whether there was one.
func (c *clock) step() bool {
	h := c.heap
	if len(h) == 0 {
		return false
	}
	next := h[0]
	last := len(h) - 1
	h[0] = h[last]
	h[last] = event{}
	h = h[:last]
	c.heap = h
	for i := 0; ; {
		least := i
		for k := 4*i + 1; k <= 4*i+4 && k < len(h); k++ {
			if h[k].before(&h[least]) {
				least = k
			}
		}
		if least == i {
			break
		}
		h[i], h[least] = h[least], h[i]
		i = least
	}
	c.now = next.at
	c.ran++
	next.fn()
	return true
}
