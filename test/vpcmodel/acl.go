package vpcmodel

import (
	"cmp"
	"slices"
	"strconv"
)

// acl judges a packet at the boundary of a subnet: facts 3.2, "Ordered by number
// 1..32766, first match wins, `*` … deny"; "stateless", so that an answer is a
// packet like any other.
func (w *World) acl(s *Subnet, d Direction, p *Packet) (rule, why string) {
	id := cmp.Or(s.ACL, w.VPCs[s.VPC].DefaultACL)
	if id == "" {
		return "acl default", "" // "default ACL rule 100 allow all"
	}
	entries := slices.Clone(w.ACLs[id].Entries[d])
	slices.SortFunc(entries, func(a, b Entry) int { return cmp.Compare(a.Number, b.Number) })
	for _, e := range entries {
		a := p.Src
		if d == Out {
			a = p.Dst
		}
		if !e.CIDR.Contains(a) || !e.Match.matches(p) {
			continue
		}
		if !e.Allow {
			return "acl deny " + e.Match.kind(), string(id) + " rule " + strconv.Itoa(e.Number) + " denies it"
		}
		return "acl allow " + e.Match.kind(), ""
	}
	return "acl *", string(id) + " has no rule for it" // "custom ACL denies all"
}
