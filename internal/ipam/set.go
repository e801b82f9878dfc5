package ipam

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/ipam/planted"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// SetUse is what the pods of one set of security groups hold of the node.
type SetUse struct {
	Groups  vpc.GroupSet // "": the node's own
	ENIs    int          // interfaces that are the set's, those on their way included
	Pods    int          // addresses that pods have
	Free    int          // addresses that the next pod may have at once
	Cooling int          // addresses that rest
	Coming  int          // addresses on their way
	Waiting int          // pods that wait for one
	Until   time.Time    // when the first idle interface goes back unless a pod comes; zero: none is idle
	Drifted int          // interfaces whose groups somebody has changed: they get no further pod
}

// Sets returns the node's sets of security groups, the node's own first: those
// that have an interface, or a pod that waits for one. Pools of one set in
// several subnets are one.
func (s *State) Sets() []SetUse {
	var out []SetUse
	at := func(g vpc.GroupSet) *SetUse {
		i := slices.IndexFunc(out, func(u SetUse) bool { return u.Groups == g })
		if i < 0 {
			i, out = len(out), append(out, SetUse{Groups: g})
		}
		return &out[i]
	}
	for _, pool := range s.pools() {
		u := at(pool.Groups)
		free, coming, _ := s.count(pool)
		u.Free += free
		u.Coming += coming
		u.Waiting += s.waiting(pool)
	}
	for _, c := range s.Calls {
		if c.Kind == CallCreate {
			at(c.Pool.Groups).ENIs++
		}
	}
	for _, e := range s.ENIs {
		if !e.Managed {
			continue
		}
		u := at(e.Pool.Groups)
		if e.Device >= 0 {
			u.ENIs++
		}
		u.Pods += e.count(Bound)
		u.Cooling += e.count(Cooling)
		if e.drifted() {
			u.Drifted++
		}
		if idle := e.NoNeed; !idle.IsZero() && e.Device != 0 {
			if goes := idle.Add(s.linger(e.Pool)); u.Until.IsZero() || goes.Before(u.Until) {
				u.Until = goes
			}
		}
	}
	slices.SortFunc(out, func(a, b SetUse) int { return cmp.Compare(a.Groups, b.Groups) })
	return out
}

// SlotsLeft returns how many further interfaces the node may have: so many sets
// of security groups more can have pods here.
func (s *State) SlotsLeft() int {
	if s.slotsOut.After(s.Now) {
		return 0
	}
	_, n := s.devices()
	return max(0, s.Config.ENIs()-1-n)
}

// linger is how long an interface without a pod is kept. To make and attach one
// for a set of its own takes seconds and calls that all nodes share, and while
// pods are replaced a set may have none for a moment.
func (s *State) linger(pool Pool) time.Duration {
	if pool.Groups != "" && planted.Bug != planted.LingerForgotten {
		return s.Config.SetLinger
	}
	return s.Config.Linger
}

// drifted reports whether somebody has changed the groups of an interface that
// is there for one set. It gets no further pod: those would have other groups
// than they asked for.
func (e *ENI) drifted() bool {
	return e.Pool.Groups != "" && e.Groups != e.Pool.Groups && planted.Bug != planted.DriftIgnored
}

// setsFull is why there is no interface for a set.
func (p *step) setsFull(pool Pool, cause string) *Error {
	s := p.s
	e := &Error{Kind: KindSetsFull, Groups: pool.Groups, Type: s.Config.Limits.Type, Max: s.Config.ENIs(), Cause: cause}
	for _, u := range s.Sets() {
		if u.ENIs > 0 {
			e.Sets = append(e.Sets, u)
		}
	}
	for _, i := range s.ENIs {
		if !i.Managed && i.Device >= 0 {
			e.Others++
		}
	}
	return e
}

// holders says in words who has the node's interfaces.
func (e *Error) holders() string {
	var parts []string
	for _, u := range e.Sets {
		who := string(u.Groups)
		if who == "" {
			who = "the node's own groups"
		}
		part := fmt.Sprintf("%s: %d (%s", who, u.ENIs, plural(u.Pods, "pod"))
		if u.Pods == 0 && u.Groups != "" && !u.Until.IsZero() {
			part += ", goes back at " + u.Until.UTC().Format("15:04:05 UTC")
		}
		parts = append(parts, part+")")
	}
	if e.Others > 0 {
		parts = append(parts, fmt.Sprintf("not Underlay's: %d", e.Others))
	}
	return strings.Join(parts, ", ")
}

func plural(n int, of string) string {
	switch n {
	case 0:
		return "no " + of
	case 1:
		return "1 " + of
	}
	return fmt.Sprintf("%d %ss", n, of)
}
