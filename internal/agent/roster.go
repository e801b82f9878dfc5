package agent

import (
	"net/netip"
	"slices"

	"github.com/underlay-cni/underlay/internal/datapath"
	"github.com/underlay-cni/underlay/internal/groups"
	"github.com/underlay-cni/underlay/internal/policy"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// neighbours are the groups that pods with the node's own groups have beside
// them: what lets these reach each other.
const neighbours = vpc.SecurityGroupID("node-local")

// member is an endpoint with the groups that its interface carries now.
type member struct {
	ep     datapath.Endpoint
	groups vpc.GroupSet
	asked  bool // for them
	here   bool // the node alone judges by them: to the VPC they are the node's
	joins  bool // its ADD is under way, its gate shut
}

// like is what members have in common that have the same tables.
type like struct {
	groups vpc.GroupSet
	asked  bool
}

func (m *member) like() like { return like{m.groups, m.asked} }

// list returns the groups by which such members are judged.
func (l like) list() []vpc.SecurityGroupID {
	if l.asked {
		return l.groups.Groups()
	}
	return append(l.groups.Groups(), neighbours)
}

// alike are the members that have the same tables.
type alike struct {
	keys   map[key]struct{}
	tables policy.Tables
	made   bool // tables are what the latest rules and members say
}

// digest is that of the tables; judged is false when there is none.
func (a *alike) digest() (d policy.Digest, judged bool) {
	if t := a.tables.Gates[policy.Groups]; t != nil {
		return t.Digest, true
	}
	return d, false
}

// roster is who is on the node. What a change of one member costs does not
// depend on how many there are. It is not safe for concurrent use.
type roster struct {
	members map[key]member
	sets    map[like]*alike
	addrs   map[vpc.SecurityGroupID][]netip.Prefix // of who has the group, sorted
	asked   int                                    // members that asked for groups
	here    int
}

func newRoster() *roster {
	return &roster{members: map[key]member{}, sets: map[like]*alike{}, addrs: map[vpc.SecurityGroupID][]netip.Prefix{}}
}

// put makes m the member of that key, and reports whether that makes a
// difference to anybody's tables.
func (r *roster) put(k key, m member) bool {
	was, ok := r.members[k]
	if ok && was.like() == m.like() && was.here == m.here && was.ep.Addr == m.ep.Addr {
		r.members[k] = m
		return false
	}
	r.drop(k)
	r.members[k] = m
	set := r.sets[m.like()]
	if set == nil {
		set = &alike{keys: map[key]struct{}{}}
		r.sets[m.like()] = set
	}
	set.keys[k] = struct{}{}
	r.count(m, 1)
	one := netip.PrefixFrom(m.ep.Addr, m.ep.Addr.BitLen())
	for _, id := range m.like().list() {
		i, _ := slices.BinarySearchFunc(r.addrs[id], one, netip.Prefix.Compare)
		r.addrs[id] = slices.Insert(r.addrs[id], i, one)
	}
	return true
}

// drop takes a member out, and reports whether it was there.
func (r *roster) drop(k key) bool {
	m, ok := r.members[k]
	if !ok {
		return false
	}
	delete(r.members, k)
	r.count(m, -1)
	set := r.sets[m.like()]
	if delete(set.keys, k); len(set.keys) == 0 {
		delete(r.sets, m.like())
	}
	one := netip.PrefixFrom(m.ep.Addr, m.ep.Addr.BitLen())
	for _, id := range m.like().list() {
		if i, ok := slices.BinarySearchFunc(r.addrs[id], one, netip.Prefix.Compare); ok {
			r.addrs[id] = slices.Delete(r.addrs[id], i, i+1)
		}
		if len(r.addrs[id]) == 0 {
			delete(r.addrs, id)
		}
	}
	return true
}

func (r *roster) count(m member, d int) {
	if m.asked {
		r.asked += d
	}
	if m.here {
		r.here += d
	}
}

// need returns what must be known: the rules of everybody's groups if one has
// asked for some, and who carries the groups that these name if there is one by
// whose groups the node alone judges.
func (r *roster) need() (out groups.Need) {
	if r.asked == 0 {
		return out
	}
	for l := range r.sets {
		out.Groups = append(out.Groups, l.groups.Groups()...)
	}
	slices.Sort(out.Groups)
	out.Groups = slices.Compact(out.Groups)
	out.Members = r.here > 0
	return out
}

// input is what the node's pods and the rules say together. A group's members
// are those on this node: the others' packets come over the wire. For pods by
// whose groups the node alone judges EC2's members are read too. It is good until
// the roster changes.
func (r *roster) input(read *groups.Snapshot) *policy.Input {
	in := &policy.Input{
		Groups: map[vpc.SecurityGroupID]policy.SecurityGroup{}, Members: map[vpc.SecurityGroupID][]netip.Prefix{}, PrefixLists: map[vpc.PrefixListID][]netip.Prefix{},
	}
	for id, g := range read.Groups {
		var group policy.SecurityGroup // one without rules too
		for i := range g.Rules {
			r := &g.Rules[i]
			rule := policy.GroupRule{ID: r.ID, Protocol: r.Protocol, FromPort: r.FromPort, ToPort: r.ToPort, CIDR: r.CIDR, PrefixList: r.PrefixList, Group: r.Referenced}
			if r.Egress {
				group.Egress = append(group.Egress, rule)
			} else {
				group.Ingress = append(group.Ingress, rule)
			}
		}
		in.Groups[id] = group
	}
	among := policy.GroupRule{ID: "pods without groups of their own", Protocol: policy.AnyProtocol, FromPort: policy.AnyPort, ToPort: policy.AnyPort, Group: neighbours}
	in.Groups[neighbours] = policy.SecurityGroup{Ingress: []policy.GroupRule{among}, Egress: []policy.GroupRule{among}}
	for id, l := range read.Lists {
		in.PrefixLists[id] = l.Entries
	}
	for id, list := range r.addrs {
		in.Members[id] = list
	}
	for id, m := range read.Members {
		if len(m.Addrs) == 0 {
			continue
		}
		list := slices.Concat(in.Members[id], m.Addrs)
		slices.SortFunc(list, netip.Prefix.Compare) // equal nodes have equal tables
		in.Members[id] = list
	}
	return in
}
