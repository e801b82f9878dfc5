package vpcmodel

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// Statement is one line of a script. Apply changes the world, or says why the
// world has no place for it.
type Statement interface {
	Apply(*World) error
	String() string
}

// The statements, by what they do.
type (
	MakeVPC    struct{ VPC }
	MakeSubnet struct{ Subnet }
	// MakeENI makes an attached interface; its instance is made with its first.
	MakeENI struct {
		ID       vpc.ENIID
		Subnet   vpc.SubnetID
		Instance vpc.InstanceID
		Primary  netip.Addr
		Others   []netip.Prefix
	}
	// MakeGroup makes a security group: As "group" without any rule, "newgroup"
	// as CreateSecurityGroup does, "defaultgroup" as CreateVpc does.
	MakeGroup struct {
		As  string
		ID  vpc.SecurityGroupID
		VPC vpc.VPCID
	}
	// MakeACL makes an ACL: As "acl" a custom one, "defaultacl" as CreateVpc does.
	MakeACL struct {
		As  string
		ID  ACLID
		VPC vpc.VPCID
	}
	MakeTable struct {
		ID  TableID
		VPC vpc.VPCID
	}
	MakePeering struct {
		ID   PeeringID
		A, B vpc.VPCID
	}
	// SetList makes a prefix list, or gives it other entries.
	SetList struct {
		ID    ListID
		CIDRs []netip.Prefix
	}

	Allow struct {
		Group vpc.SecurityGroupID
		Dir   Direction
		Rule
	}
	Revoke struct {
		Group vpc.SecurityGroupID
		Dir   Direction
		Rule
	}
	DeleteGroup struct{ ID vpc.SecurityGroupID }
	SetGroups   struct {
		ENI    vpc.ENIID
		Groups []vpc.SecurityGroupID
	}
	SetCheck struct {
		ENI vpc.ENIID
		On  bool
	}
	SetTimeouts struct {
		ENI vpc.ENIID
		Timeouts
	}
	Assign struct {
		ENI  vpc.ENIID
		CIDR netip.Prefix
	}
	Unassign struct {
		ENI  vpc.ENIID
		CIDR netip.Prefix
	}
	Detach struct{ ENI vpc.ENIID }

	AddEntry struct {
		ACL ACLID
		Dir Direction
		Entry
	}
	DeleteEntry struct {
		ACL    ACLID
		Dir    Direction
		Number int
	}
	SetACL struct {
		Subnet vpc.SubnetID
		ACL    ACLID
	}

	AddRoute struct {
		Table TableID
		Route
	}
	DeleteRoute struct {
		Table TableID
		Route
	}
	SetTable struct {
		Subnet vpc.SubnetID
		Table  TableID
	}
	DeletePeering struct{ ID PeeringID }

	Wait struct{ For time.Duration }
	// Send sends a packet. Want is the verdict that a test expects, or "".
	Send struct {
		Packet
		Want string
	}
)

// need returns an error unless the map has the key.
func need[K ~string, V any](what string, m map[K]V, id K) error {
	if _, ok := m[id]; !ok {
		return fmt.Errorf("there is no %s %s", what, id)
	}
	return nil
}

// fresh returns an error if the map has the key.
func fresh[K ~string, V any](what string, m map[K]V, id K) error {
	if _, ok := m[id]; ok {
		return fmt.Errorf("there is a %s %s already", what, id)
	}
	return nil
}

func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func (s MakeVPC) Apply(w *World) error {
	v := s.VPC
	v.CIDRs = slices.Clone(v.CIDRs)
	w.VPCs[v.ID] = &v
	return nil
}

func (s MakeSubnet) Apply(w *World) error {
	if err := first(need("VPC", w.VPCs, s.VPC), fresh("subnet", w.Subnets, s.ID)); err != nil {
		return err
	}
	c := s.Subnet
	w.Subnets[s.ID] = &c
	return nil
}

func (s MakeENI) Apply(w *World) error {
	if err := first(need("subnet", w.Subnets, s.Subnet), fresh("interface", w.ENIs, s.ID)); err != nil {
		return err
	}
	for _, c := range append([]netip.Prefix{single(s.Primary)}, s.Others...) {
		if err := w.free(s.Subnet, c); err != nil {
			return err
		}
	}
	w.ENIs[s.ID] = &ENI{ID: s.ID, Subnet: s.Subnet, Instance: s.Instance, Attached: true, Primary: s.Primary,
		Others: slices.Clone(s.Others), Timeouts: DefaultTimeouts}
	return nil
}

// free returns an error unless c is in the subnet and nobody's.
func (w *World) free(id vpc.SubnetID, c netip.Prefix) error {
	s := w.Subnets[id]
	if block := s.block(c.Addr()); !block.Contains(c.Addr()) || c.Bits() < block.Bits() {
		return fmt.Errorf("%s is not in subnet %s", c, id)
	}
	for _, n := range w.NATs {
		if !n.Deleted && w.Subnets[n.Subnet].VPC == s.VPC && c.Contains(n.Private) {
			return fmt.Errorf("%s is %s's", c, n.ID)
		}
	}
	for _, e := range w.ENIs {
		if w.vpcOf(e) == s.VPC && (c.Contains(e.Primary) || slices.ContainsFunc(e.Others, c.Overlaps)) {
			return fmt.Errorf("%s is %s's", c, e.ID)
		}
	}
	return nil
}

// block is the subnet's CIDR block of an address's family.
func (s *Subnet) block(a netip.Addr) netip.Prefix {
	if a.Is6() {
		return s.CIDR6
	}
	return s.CIDR
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// everyone lists the blocks that stand for everybody in a VPC: "egress all IPv4
// (and `::/0` when the VPC has IPv6)".
func (v *VPC) everyone() []netip.Prefix {
	all := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
	if v.hasIPv6() {
		all = append(all, netip.MustParsePrefix("::/0"))
	}
	return all
}

func (s MakeGroup) Apply(w *World) error {
	if err := first(need("VPC", w.VPCs, s.VPC), fresh("group", w.Groups, s.ID)); err != nil {
		return err
	}
	g := &Group{ID: s.ID, VPC: s.VPC, Rules: map[Direction][]Rule{}}
	all := Match{Proto: -1, From: -1, To: -1}
	if s.As != "group" {
		// "new SG: no ingress, egress all IPv4 (and `::/0` when the VPC has IPv6)".
		for _, c := range w.VPCs[s.VPC].everyone() {
			g.Rules[Out] = append(g.Rules[Out], Rule{Match: all, CIDR: c})
		}
	}
	if s.As == "defaultgroup" {
		// "default SG: ingress from itself all, egress all".
		g.Rules[In] = []Rule{{Match: all, Group: s.ID}}
	}
	w.Groups[s.ID] = g
	return nil
}

func (s MakeACL) Apply(w *World) error {
	if err := first(need("VPC", w.VPCs, s.VPC), fresh("ACL", w.ACLs, s.ID)); err != nil {
		return err
	}
	a := &ACL{ID: s.ID, VPC: s.VPC, Entries: map[Direction][]Entry{}}
	if s.As == "defaultacl" {
		w.VPCs[s.VPC].DefaultACL = s.ID
		// "default ACL rule 100 allow all (101 for v6)".
		for _, d := range []Direction{In, Out} {
			for i, c := range w.VPCs[s.VPC].everyone() {
				a.Entries[d] = append(a.Entries[d], Entry{Number: 100 + i, Allow: true, Match: Match{Proto: -1, From: -1, To: -1}, CIDR: c})
			}
		}
	}
	w.ACLs[s.ID] = a
	return nil
}

func (s MakeTable) Apply(w *World) error {
	if err := first(need("VPC", w.VPCs, s.VPC), fresh("table", w.Tables, s.ID)); err != nil {
		return err
	}
	w.Tables[s.ID] = &Table{ID: s.ID, VPC: s.VPC}
	return nil
}

func (s MakePeering) Apply(w *World) error {
	if err := first(need("VPC", w.VPCs, s.A), need("VPC", w.VPCs, s.B), fresh("peering", w.Peerings, s.ID)); err != nil {
		return err
	}
	// "overlap -> object in state `failed`".
	active := s.A != s.B
	for _, a := range w.VPCs[s.A].CIDRs {
		active = active && !slices.ContainsFunc(w.VPCs[s.B].CIDRs, a.Overlaps)
	}
	w.Peerings[s.ID] = &Peering{ID: s.ID, A: s.A, B: s.B, Active: active}
	return nil
}

func (s SetList) Apply(w *World) error {
	w.Lists[s.ID] = slices.Clone(s.CIDRs)
	return nil
}

func (s Allow) Apply(w *World) error {
	if err := first(need("group", w.Groups, s.Group), w.known(s.Rule)); err != nil {
		return err
	}
	g := w.Groups[s.Group]
	if o := w.Groups[s.Rule.Group]; o != nil && !o.usable(g.VPC) && !w.peered(o.VPC, g.VPC) {
		return fmt.Errorf("%s is of a VPC that is not a peer of %s's", o.ID, g.ID)
	}
	if slices.Contains(g.Rules[s.Dir], s.Rule) {
		return fmt.Errorf("%s has this rule already", s.Group)
	}
	g.Rules[s.Dir] = append(g.Rules[s.Dir], s.Rule)
	return nil
}

func (w *World) known(r Rule) error {
	switch {
	case r.Group != "":
		return need("group", w.Groups, r.Group)
	case r.List != "":
		return need("list", w.Lists, r.List)
	}
	return nil
}

func (s Revoke) Apply(w *World) error {
	if err := need("group", w.Groups, s.Group); err != nil {
		return err
	}
	g := w.Groups[s.Group]
	i := slices.Index(g.Rules[s.Dir], s.Rule)
	if i < 0 {
		return fmt.Errorf("%s has no such rule", s.Group)
	}
	g.Rules[s.Dir] = slices.Delete(g.Rules[s.Dir], i, i+1)
	return nil
}

func (s DeleteGroup) Apply(w *World) error {
	if err := need("group", w.Groups, s.ID); err != nil {
		return err
	}
	for _, e := range w.ENIs {
		if slices.Contains(e.Groups, s.ID) {
			return fmt.Errorf("%s carries %s", e.ID, s.ID)
		}
	}
	own := w.Groups[s.ID].VPC
	if also := w.Groups[s.ID].Also; len(also) > 0 {
		return fmt.Errorf("%s is associated with %v", s.ID, also)
	}
	for _, g := range w.Groups {
		for _, rules := range g.Rules {
			// A reference from the same VPC keeps a group; from a peer it goes stale.
			if g.VPC == own && g.ID != s.ID && slices.ContainsFunc(rules, func(r Rule) bool { return r.Group == s.ID }) {
				return fmt.Errorf("%s refers to %s", g.ID, s.ID)
			}
		}
	}
	delete(w.Groups, s.ID)
	return nil
}

func (s SetGroups) Apply(w *World) error {
	if err := need("interface", w.ENIs, s.ENI); err != nil {
		return err
	}
	for _, g := range s.Groups {
		if err := need("group", w.Groups, g); err != nil {
			return err
		}
		if !w.Groups[g].usable(w.vpcOf(w.ENIs[s.ENI])) {
			return fmt.Errorf("%s is of another VPC than %s", g, s.ENI)
		}
	}
	e := w.ENIs[s.ENI]
	e.Groups = slices.Clone(s.Groups)
	if !w.Settings.GroupChangeKeepsFlows {
		e.flows = nil
	}
	return nil
}

func (s SetCheck) Apply(w *World) error {
	if err := need("interface", w.ENIs, s.ENI); err != nil {
		return err
	}
	w.ENIs[s.ENI].NoCheck = !s.On
	return nil
}

func (s SetTimeouts) Apply(w *World) error {
	if err := need("interface", w.ENIs, s.ENI); err != nil {
		return err
	}
	w.ENIs[s.ENI].Timeouts = s.Timeouts
	return nil
}

func (s Assign) Apply(w *World) error {
	if err := need("interface", w.ENIs, s.ENI); err != nil {
		return err
	}
	e := w.ENIs[s.ENI]
	if err := w.free(e.Subnet, s.CIDR); err != nil {
		return err
	}
	e.Others = append(e.Others, s.CIDR)
	return nil
}

func (s Unassign) Apply(w *World) error {
	if err := need("interface", w.ENIs, s.ENI); err != nil {
		return err
	}
	e := w.ENIs[s.ENI]
	i := slices.Index(e.Others, s.CIDR)
	if i < 0 {
		return fmt.Errorf("%s does not have %s", s.ENI, s.CIDR)
	}
	for _, x := range w.Elastics {
		if x.ENI == s.ENI && s.CIDR.Contains(x.Private) {
			return fmt.Errorf("%s has %s", x.Private, x.ID)
		}
	}
	e.Others = slices.Delete(e.Others, i, i+1)
	return nil
}

func (s Detach) Apply(w *World) error {
	if err := need("interface", w.ENIs, s.ENI); err != nil {
		return err
	}
	e := w.ENIs[s.ENI]
	e.Attached, e.flows = false, nil
	return nil
}

func (s AddEntry) Apply(w *World) error {
	if err := need("ACL", w.ACLs, s.ACL); err != nil {
		return err
	}
	a := w.ACLs[s.ACL]
	if slices.ContainsFunc(a.Entries[s.Dir], func(e Entry) bool { return e.Number == s.Number }) {
		return fmt.Errorf("%s has an entry %d already", s.ACL, s.Number)
	}
	a.Entries[s.Dir] = append(a.Entries[s.Dir], s.Entry)
	return nil
}

func (s DeleteEntry) Apply(w *World) error {
	if err := need("ACL", w.ACLs, s.ACL); err != nil {
		return err
	}
	a := w.ACLs[s.ACL]
	i := slices.IndexFunc(a.Entries[s.Dir], func(e Entry) bool { return e.Number == s.Number })
	if i < 0 {
		return fmt.Errorf("%s has no entry %d", s.ACL, s.Number)
	}
	a.Entries[s.Dir] = slices.Delete(a.Entries[s.Dir], i, i+1)
	return nil
}

func (s SetACL) Apply(w *World) error {
	if err := first(need("subnet", w.Subnets, s.Subnet), need("ACL", w.ACLs, s.ACL)); err != nil {
		return err
	}
	if w.ACLs[s.ACL].VPC != w.Subnets[s.Subnet].VPC {
		return fmt.Errorf("%s is of another VPC than %s", s.ACL, s.Subnet)
	}
	w.Subnets[s.Subnet].ACL = s.ACL
	return nil
}

// destination reports whether two routes have the same one.
func (r Route) destination(o Route) bool { return r.CIDR == o.CIDR && r.List == o.List }

func (s AddRoute) Apply(w *World) error {
	if err := need("table", w.Tables, s.Table); err != nil {
		return err
	}
	t := w.Tables[s.Table]
	if s.List != "" {
		if err := need("list", w.Lists, s.List); err != nil {
			return err
		}
	}
	switch {
	case s.Route.ENI != "":
		if err := need("interface", w.ENIs, s.Route.ENI); err != nil {
			return err
		}
		if w.vpcOf(w.ENIs[s.Route.ENI]) != t.VPC {
			return fmt.Errorf("%s is of another VPC than %s", s.Route.ENI, s.Table)
		}
	case s.Gateway != "":
		if g := w.Gateways[s.Gateway]; g == nil || g.VPC != t.VPC {
			return fmt.Errorf("no internet gateway %s of %s", s.Gateway, t.VPC)
		}
	case s.NAT != "":
		if n := w.NATs[s.NAT]; n == nil || n.Deleted || w.Subnets[n.Subnet].VPC != t.VPC {
			return fmt.Errorf("no NAT gateway %s of %s", s.NAT, t.VPC)
		}
	default:
		x := w.Peerings[s.Peering]
		if x == nil || x.A != t.VPC && x.B != t.VPC {
			return fmt.Errorf("no peering %s of %s", s.Peering, t.VPC)
		}
		if !x.Active {
			return fmt.Errorf("peering %s has failed or is deleted", s.Peering)
		}
	}
	if slices.ContainsFunc(t.Routes, s.Route.destination) {
		return fmt.Errorf("%s has a route to that already", s.Table)
	}
	for _, c := range w.VPCs[t.VPC].CIDRs {
		// "More-specific-than-local only if the destination equals a whole subnet
		// CIDR and target is NAT GW, ENI or GWLBe".
		if s.CIDR.IsValid() && s.CIDR != c && c.Bits() <= s.CIDR.Bits() && c.Contains(s.CIDR.Addr()) {
			whole := false
			for _, n := range w.Subnets {
				whole = whole || n.VPC == t.VPC && (n.CIDR == s.CIDR || n.CIDR6 == s.CIDR)
			}
			if !whole || s.Route.ENI == "" && s.NAT == "" {
				return fmt.Errorf("%s is within the local route and not a subnet's, or its target neither interface nor NAT gateway", s.CIDR)
			}
		}
	}
	for _, c := range unforwarded {
		if s.CIDR.IsValid() && c.Bits() <= s.CIDR.Bits() && c.Contains(s.CIDR.Addr()) {
			return fmt.Errorf("%s is refused as a destination", s.CIDR)
		}
	}
	t.Routes = append(t.Routes, s.Route)
	return nil
}

func (s DeleteRoute) Apply(w *World) error {
	if err := need("table", w.Tables, s.Table); err != nil {
		return err
	}
	t := w.Tables[s.Table]
	i := slices.IndexFunc(t.Routes, s.Route.destination)
	if i < 0 {
		return fmt.Errorf("%s has no such route", s.Table)
	}
	t.Routes = slices.Delete(t.Routes, i, i+1)
	return nil
}

func (s SetTable) Apply(w *World) error {
	if err := first(need("subnet", w.Subnets, s.Subnet), need("table", w.Tables, s.Table)); err != nil {
		return err
	}
	if w.Tables[s.Table].VPC != w.Subnets[s.Subnet].VPC {
		return fmt.Errorf("%s is of another VPC than %s", s.Table, s.Subnet)
	}
	w.Subnets[s.Subnet].Table = s.Table
	return nil
}

func (s DeletePeering) Apply(w *World) error {
	if err := need("peering", w.Peerings, s.ID); err != nil {
		return err
	}
	w.Peerings[s.ID].Active = false
	return nil
}

func (s Wait) Apply(w *World) error {
	w.Now += s.For
	return nil
}

// Apply of a packet sends it and forgets the verdict; Run returns it.
func (s Send) Apply(w *World) error {
	_, err := s.Judge(w)
	return err
}

// Judge sends the packet.
func (s Send) Judge(w *World) (Verdict, error) {
	if s.From != Internet {
		if err := need("interface", w.ENIs, s.From); err != nil {
			return Verdict{}, err
		}
	}
	p := s.Packet
	return w.Send(&p), nil
}

// Script is a list of statements.
type Script []Statement

// Run applies a script to an empty world and returns the verdict of each Send, by
// the statement's index.
func (s Script) Run(settings Settings) (map[int]Verdict, *World, error) {
	w := NewWorld(settings)
	verdicts := map[int]Verdict{}
	for i, st := range s {
		var err error
		if send, ok := st.(Send); ok {
			verdicts[i], err = send.Judge(w)
		} else {
			err = st.Apply(w)
		}
		if err != nil {
			return verdicts, w, fmt.Errorf("statement %d, %q: %w", i+1, st, err)
		}
	}
	return verdicts, w, nil
}
