package vpcd

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// names gives a lab's network namespaces their names.
type names struct{ lab string }

func (n names) instance(id vpc.InstanceID) string { return "ul-" + n.lab + "-" + string(id) }
func (n names) service(name string) string        { return "ul-" + n.lab + "-svc-" + name }

// lives reports whether an instance has a network namespace. A stopping or
// shutting-down one has, unless its power was cut.
func lives(i *store.Instance) bool { return i.State != store.Terminated && i.Power == store.PowerOn }

// plugged reports whether an attachment's interface is in the guest. A
// detaching one is until it is gone.
func plugged(a *store.Attachment) bool {
	return a != nil && (a.Status == store.Attached || a.Status == store.Detaching)
}

// desired is what the fabric should be: state's VPCs, instances and interfaces,
// with the address mapping that mapping had, an older snapshot or the same. An
// interface that mapping does not know has its primary address alone.
//
// What cannot be told is left out, and the error says so.
func desired(n names, state, mapping *store.State) (fabric.Config, error) {
	var c fabric.Config
	var errs []error
	for _, s := range state.Subnets.All() {
		v := state.VPC(s.VPC)
		if v == nil {
			errs = append(errs, fmt.Errorf("subnet %s is of VPC %s, which does not exist", s.ID, s.VPC))
			continue
		}
		sub := fabric.Subnet{ID: s.ID, VNI: v.VNI, CIDR: s.CIDR, CIDR6: s.IPv6.CIDR}
		if t := state.TableOf(s.ID); t != nil {
			sub.Table = t.ID
		}
		if l := state.ACLOf(s.ID); l != nil {
			sub.ACL = l.ID
		}
		if v.DNSSupport {
			sub.Resolver = vpc.Resolver(v.CIDRs[0].CIDR)
		}
		c.Subnets = append(c.Subnets, sub)
	}
	for _, t := range state.RouteTables.All() {
		c.Tables = append(c.Tables, table(state, t))
	}
	for _, l := range state.ACLs.All() {
		c.ACLs = append(c.ACLs, acl(l))
	}
	c.Internet = state.Gateways.Len() > 0
	c.Publics = publics(state)
	for _, i := range state.Instances.All() {
		if lives(i) {
			c.Guests = append(c.Guests, fabric.Guest{Netns: n.instance(i.ID)})
		}
	}
	for _, s := range state.Services.All() {
		c.Guests = append(c.Guests, fabric.Guest{Netns: n.service(s.Name)})
	}
	for _, g := range state.NATs.All() {
		if v := state.VPC(g.VPC); translates(g) && v != nil {
			c.Guests = append(c.Guests, fabric.Guest{Netns: n.service(string(g.ID)), NAT: nat(v, g)})
		}
	}
	for _, g := range state.Groups.All() {
		c.Groups = append(c.Groups, group(state, g))
	}
	primaries := map[addrOf]vpc.ENIID{}
	for _, e := range state.ENIs.All() {
		primaries[addrOf{e.VPC, e.Primary}] = e.ID
	}
	for _, e := range state.ENIs.All() {
		i, err := iface(n, state, mapping, primaries, e)
		if err != nil {
			errs = append(errs, err)
		} else if i != nil {
			c.Interfaces = append(c.Interfaces, *i)
		}
	}
	return c, errors.Join(errs...)
}

// addrOf is an address of a VPC.
type addrOf struct {
	vpc  vpc.VPCID
	addr netip.Addr
}

// iface is an ENI as the fabric should have it, or nil.
func iface(n names, state, mapping *store.State, primaries map[addrOf]vpc.ENIID, e *store.ENI) (*fabric.Interface, error) {
	i := &fabric.Interface{
		ID: e.ID, Subnet: e.Subnet, Primary: e.Primary, SourceDestCheck: e.SourceDestCheck, Groups: e.Groups, Timeouts: timeouts(e.Conntrack),
		Owner: fabric.Owner{VPC: e.VPC},
	}
	if s := state.Subnet(e.Subnet); s != nil {
		i.Owner.Zone = s.Zone
	}
	switch {
	case e.Service != "":
		i.Guest, i.Configure = n.service(e.Service), true
	case e.NAT != "":
		if g := state.NAT(e.NAT); g == nil || !translates(g) {
			return nil, nil
		}
		i.Guest, i.Configure, i.Ungated, i.MTU = n.service(string(e.NAT)), true, true, fabric.NATMTU
	case !plugged(e.Attachment):
		return nil, nil
	default:
		in := state.Instance(e.Attachment.Instance)
		if in == nil || !lives(in) {
			return nil, nil
		}
		i.Guest, i.DeviceIndex = n.instance(in.ID), e.Attachment.DeviceIndex
		i.Owner.Instance = in.ID
		i.Configure = e.Attachment.DeviceIndex == 0
		if limits, ok := vpc.LimitsOf(in.Type); ok && i.Timeouts.TCPEstablished == 0 {
			i.Timeouts.TCPEstablished = time.Duration(limits.TCPEstablished) * time.Second
		}
	}
	v := state.VPC(e.VPC)
	if v == nil {
		return nil, fmt.Errorf("interface %s is of VPC %s, which does not exist", e.ID, e.VPC)
	}
	i.VNI = v.VNI
	mac, err := net.ParseMAC(e.MAC)
	if err != nil {
		return nil, fmt.Errorf("read the MAC of interface %s: %w", e.ID, err)
	}
	i.MAC = mac
	i.Addresses = []netip.Prefix{single(e.Primary)}
	if old := mapping.ENI(e.ID); old != nil {
		for _, a := range old.Secondary {
			// Since that snapshot the address may have become the primary one
			// of another interface, which does not lag.
			if _, taken := primaries[addrOf{e.VPC, a}]; !taken {
				i.Addresses = append(i.Addresses, single(a))
			}
		}
		for _, p := range old.Prefixes {
			if !anyPrimary(primaries, e.VPC, p) {
				i.Addresses = append(i.Addresses, p)
			}
		}
		i.Addresses = append(i.Addresses, addresses6(state, e, old)...)
	}
	return i, nil
}

// addresses6 are the IPv6 addresses and prefixes that an interface had in an
// older snapshot, as far as its subnet still has their block.
func addresses6(state *store.State, e, old *store.ENI) (out []netip.Prefix) {
	s := state.Subnet(e.Subnet)
	if s == nil || !s.IPv6.CIDR.IsValid() {
		return nil // the block has gone, and with it all addresses
	}
	for _, a := range old.IPv6 {
		if s.IPv6.CIDR.Contains(a) {
			out = append(out, single(a))
		}
	}
	for _, p := range old.IPv6Prefixes {
		if s.IPv6.CIDR.Contains(p.Addr()) {
			out = append(out, p)
		}
	}
	return out
}

func timeouts(c store.Conntrack) fabric.IdleTimeouts {
	return fabric.IdleTimeouts{
		TCPEstablished: time.Duration(c.TCPEstablished) * time.Second,
		UDP:            time.Duration(c.UDP) * time.Second,
		UDPStream:      time.Duration(c.UDPStream) * time.Second,
	}
}

// publics are the public addresses in use.
func publics(state *store.State) (out []fabric.Public) {
	for _, a := range state.Addresses.All() {
		e := state.ENI(a.ENI)
		if e == nil {
			continue
		}
		v, g := state.VPC(e.VPC), state.GatewayOf(e.VPC)
		if v == nil || g == nil {
			continue
		}
		p := fabric.Public{Addr: a.Public, VNI: v.VNI, Private: a.Private}
		if t := state.ExplicitTable(string(g.ID)); t != nil {
			p.Table = t.ID
		}
		out = append(out, p)
	}
	return out
}

// translates reports whether a NAT gateway has a guest.
func translates(g *store.NATGateway) bool { return g.State == store.NATAvailable }

// nat is a NAT gateway as the fabric should have it. An address that is to be
// taken from it begins no connection any more.
func nat(v *store.VPC, g *store.NATGateway) *fabric.NAT {
	out := &fabric.NAT{}
	for _, a := range g.Addresses {
		if a.Drains.IsZero() {
			out.Addresses = append(out.Addresses, a.Private)
		}
	}
	for _, c := range v.CIDRs {
		out.CIDRs = append(out.CIDRs, c.CIDR)
	}
	return out
}

// table is a route table as the fabric should have it.
func table(state *store.State, t *store.RouteTable) fabric.RouteTable {
	out := fabric.RouteTable{ID: t.ID}
	seen := map[netip.Prefix]bool{}
	add := func(to netip.Prefix, r store.Route) {
		if seen[to] {
			return
		}
		seen[to] = true
		f := fabric.Route{CIDR: to, Local: r.Target.Local}
		if state.RouteState(t, r) == store.RouteActive {
			target(state, t, r.Target, &f)
		}
		out.Routes = append(out.Routes, f)
	}
	routes := state.RoutesOf(t)
	for _, r := range routes {
		if r.CIDR.IsValid() {
			add(r.CIDR, r)
		}
	}
	// A route to a block beats one to a list that has the same block. Of two
	// lists, one wins, always the same (VPC user guide, "Route priority and
	// prefix lists"); that it is the older is a choice.
	for _, r := range routes {
		for _, block := range blocks(state, r.PrefixList) {
			add(block, r)
		}
	}
	return out
}

// target gives a route that is active its target.
func target(state *store.State, t *store.RouteTable, to store.Target, f *fabric.Route) {
	switch {
	case to.ENI != "":
		f.ENI = to.ENI
	case to.Gateway != "", to.EgressOnly != "":
		f.Internet = true
	case to.NAT != "" && f.CIDR.Addr().Is6():
		// A NAT gateway here carries no IPv6: nothing goes there.
	case to.NAT != "":
		f.ENI = state.NAT(to.NAT).ENI // attached once it is available
	case to.Peering != "":
		if v := state.VPC(state.Peering(to.Peering).Other(t.VPC)); v != nil {
			f.Peer = v.VNI
		}
	}
}

// blocks returns what is in a prefix list, nothing if it is not there.
func blocks(state *store.State, id vpc.PrefixListID) (out []netip.Prefix) {
	if l := state.PrefixList(id); l != nil {
		for _, e := range l.Entries() {
			out = append(out, e.CIDR)
		}
	}
	return out
}

// acl is a network ACL as the fabric should have it.
func acl(l *store.NetworkACL) fabric.ACL {
	out := fabric.ACL{ID: l.ID}
	for _, e := range l.Entries { // by direction and number
		f := fabric.ACLEntry{Protocol: e.Protocol, From: e.From, To: e.To, CIDR: e.CIDR, Allow: e.Allow}
		if e.Protocol == protoICMP || e.Protocol == protoICMPv6 {
			f.From, f.To = e.ICMPType, e.ICMPCode
		}
		if e.Egress {
			out.Egress = append(out.Egress, f)
		} else {
			out.Ingress = append(out.Ingress, f)
		}
	}
	return out
}

const (
	protoICMP   = 1
	protoICMPv6 = 58
)

// group is a security group as the fabric should have it.
func group(state *store.State, g *store.Group) fabric.Group {
	out := fabric.Group{ID: g.ID}
	for _, r := range g.Rules {
		f := fabric.Rule{Protocol: protocol(r.Protocol), From: r.From, To: r.To, Group: r.Group}
		if r.CIDR.IsValid() {
			f.Peers = []netip.Prefix{r.CIDR}
		} else if r.PrefixList != "" {
			f.Peers = blocks(state, vpc.PrefixListID(r.PrefixList))
		}
		if r.Egress {
			out.Egress = append(out.Egress, f)
		} else {
			out.Ingress = append(out.Ingress, f)
		}
	}
	return out
}

// protocol is the number of a rule's protocol. One that is none is refused by
// the fabric, which then allows less.
func protocol(name string) int {
	switch name {
	case "tcp":
		return 6
	case "udp":
		return 17
	case "icmp":
		return protoICMP
	case "icmpv6":
		return protoICMPv6
	}
	n, err := strconv.Atoi(name) // "-1" is fabric.AllProtocols
	if err != nil {
		return noProtocol
	}
	return n
}

const noProtocol = -2

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func anyPrimary(primaries map[addrOf]vpc.ENIID, v vpc.VPCID, p netip.Prefix) bool {
	for a := p.Masked().Addr(); p.Contains(a); a = a.Next() {
		if _, taken := primaries[addrOf{v, a}]; taken {
			return true
		}
	}
	return false
}
