package groups

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// Need is what has to be known.
type Need struct {
	Groups  []vpc.SecurityGroupID // whose rules; sorted, each once
	Members bool                  // and who carries the groups that they name
}

// Equal reports whether both need the same.
func (n Need) Equal(o Need) bool { return n.Members == o.Members && slices.Equal(n.Groups, o.Groups) }

// Group is a security group's rules.
type Group struct {
	Rules []vpc.SecurityGroupRule // sorted by ID
}

// PrefixList is what a prefix list had in a version; AWS's own are of version 0.
type PrefixList struct {
	Version int64
	Entries []netip.Prefix
}

// Membership is who carries a group.
type Membership struct {
	Addrs []netip.Prefix // sorted, each once
}

// Snapshot is what was known at one time. It is not changed any more.
type Snapshot struct {
	Groups map[vpc.SecurityGroupID]*Group // one without rules, or that is gone, has none
	// Lists are those that the rules name, as far as EC2 has them.
	Lists map[vpc.PrefixListID]*PrefixList
	// Members are those of groups that the rules name, if they are needed.
	Members map[vpc.SecurityGroupID]*Membership
}

func newSnapshot() *Snapshot {
	return &Snapshot{Groups: map[vpc.SecurityGroupID]*Group{}, Lists: map[vpc.PrefixListID]*PrefixList{}, Members: map[vpc.SecurityGroupID]*Membership{}}
}

// Holds reports whether all that is needed is known.
func (s *Snapshot) Holds(n Need) bool {
	for _, id := range n.Groups {
		g := s.Groups[id]
		if g == nil {
			return false
		}
		if !n.Members {
			continue
		}
		for i := range g.Rules {
			if r := g.Rules[i].Referenced; r != "" && s.Members[r] == nil {
				return false
			}
		}
	}
	return true
}

// Rules counts them.
func (s *Snapshot) Rules() (n int) {
	for _, g := range s.Groups {
		n += len(g.Rules)
	}
	return n
}

// view is what of s concerns who needs n. It shares all it has with s.
func (s *Snapshot) view(n Need) *Snapshot {
	v := newSnapshot()
	for _, id := range n.Groups {
		g := s.Groups[id]
		if g == nil {
			continue
		}
		v.Groups[id] = g
		for i := range g.Rules {
			r := &g.Rules[i]
			if l := s.Lists[r.PrefixList]; l != nil {
				v.Lists[r.PrefixList] = l
			}
			if m := s.Members[r.Referenced]; m != nil && n.Members {
				v.Members[r.Referenced] = m
			}
		}
	}
	return v
}

// same reports whether both are made of the same pointers.
func (s *Snapshot) same(o *Snapshot) bool {
	return maps.Equal(s.Groups, o.Groups) && maps.Equal(s.Lists, o.Lists) && maps.Equal(s.Members, o.Members)
}

// settle returns fresh, or was where that says the same.
func (g *Group) settle(was *Group) *Group {
	if was != nil && slices.Equal(was.Rules, g.Rules) {
		return was
	}
	return g
}

func (l *PrefixList) settle(was *PrefixList) *PrefixList {
	if was != nil && was.Version == l.Version && slices.Equal(was.Entries, l.Entries) {
		return was
	}
	return l
}

func (m *Membership) settle(was *Membership) *Membership {
	if was != nil && slices.Equal(was.Addrs, m.Addrs) {
		return was
	}
	return m
}
