//go:build planted

package differential

import (
	"bytes"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/underlay-cni/underlay/internal/testenv"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
)

// fault is one that the comparison must find: a change of the programs' source,
// or of what the compiler of rules gives to the kernel.
type fault struct {
	name     string
	on       emphasis  // the worlds that are likely to show it
	file     string    // below bpf/
	old, new string    // old occurs exactly once
	also     [2]string // another old and new, or none
	dual     bool      // it shows in worlds with IPv6 alone
	more     bool      // it is planted with -more-faults alone
	config   func(*fabric.Config)
}

var faults = []fault{
	{name: "no egress gate", on: onGroups, file: "fabric.c", old: "gate(p, ifindex, EGRESS, named)", new: "0"},
	{name: "no ingress gate", on: onGroups, file: "fabric.c", old: "gate(p, w->to->ifindex, INGRESS, sender)", new: "0"},
	{name: "the receiver's egress rules at its ingress gate", on: onGroups, file: "fabric_gate.h", old: "q.rules = policy->rules[direction];\n\tq.count = policy->count[direction];\n\tq.address =", new: "q.rules = policy->rules[EGRESS];\n\tq.count = policy->count[EGRESS];\n\tq.address ="},
	{name: "last port of a range left out", on: onGroups, file: "fabric_gate.h", old: "q->dport <= r->to;", new: "q->dport < r->to;"},
	{name: "source port compared", on: onGroups, file: "fabric_gate.h", old: "q.dport = p->tuple.dport;", new: "q.dport = p->tuple.sport;"},
	{name: "ICMP code ignored", on: onGroups, file: "fabric_gate.h", old: " && (r->to == ANY || r->to == q->code);", new: ";"},
	{name: "protocol ignored", on: onGroups, file: "fabric_gate.h", old: "if (r->protocol != q->protocol)", new: "if (0)"},
	{name: "group references through middleboxes", on: onAll, file: "fabric.c", old: "may_enter(&packet, owner ? ifindex : 0,", new: "may_enter(&packet, ifindex,"},
	{name: "only the first group of an interface is referred to", on: onGroups, file: "fabric_gate.h", old: "for (int k = 0; k < GROUPS; k++)", new: "for (int k = 0; k < 1; k++)"},
	{name: "untracked flows outlive their rule", on: onGroups, file: "fabric_gate.h", old: "if (policy && (policy->version == f->version ||", new: "if (policy && (1 ||"},
	{name: "tracked flows end with their rule", on: onGroups, file: "fabric_gate.h", old: "\tif (f->version) {\n", new: "\tif (f->version || now) {\n"},
	{name: "answers are not known for such", on: onGroups, file: "fabric_gate.h", old: "k->local_port = t->dport;\n\t\tk->remote_port = t->sport;\n\t}", new: "k->local_port = t->sport;\n\t\tk->remote_port = t->dport;\n\t}"},
	{name: "everything untracked", on: onGroups, file: "fabric_gate.h", old: "if (!p->always_tracked && untracked(policy, direction, &p->tuple, is_syn(p)))", new: "if (1)"},
	{name: "ICMP errors belong to no flow", on: onGroups, file: "fabric_gate.h", old: "\tp->is_error = 1;", new: "\tp->is_error = 0;"},
	{name: "ICMP errors about anything", on: onGroups, file: "fabric_gate.h", old: "\tif (p->is_error) {\n", new: "\tif (p->is_error)\n\t\treturn 0;\n\tif (p->is_error) {\n"},
	{name: "ICMP identifier ignored", on: onGroups, file: "fabric_gate.h", old: "t->sport = (__u16)icmp[4] << 8 | icmp[5];", new: "t->sport = 0;"},
	{name: "fragments without their first pass", on: onGroups, file: "fabric_gate.h", old: "\t\t\treturn DROP_FRAGMENT;", new: "\t\t\treturn 0;"},
	{name: "later fragments are judged without ports", on: onGroups, file: "fabric_gate.h", old: "p->tuple.dport = first->dport;", new: "p->tuple.dport = 0;"},
	{name: "ACLs within the subnet", on: onACLs, file: "fabric.c", old: "crosses = way.to->subnet != self->subnet || way.vni != self->vni;", new: "crosses = 1;"},
	{name: "no ACL at the receiver's subnet", on: onACLs, file: "fabric.c", old: "if (crosses && !acl_allows(p, w->vni, w->to->subnet, INGRESS))", new: "if (0)"},
	{name: "ACLs allow what no entry matches", on: onACLs, file: "fabric_acl.h", old: "struct acl_question q = {};", new: "struct acl_question q = {.allow = 1};"},
	{name: "the sender's address compared by egress ACLs", on: onACLs, file: "fabric_acl.h", old: "direction == EGRESS ? p->tuple.daddr : p->tuple.saddr", new: "p->tuple.saddr"},
	{name: "what has passed is not judged anew after a change", on: onACLs, file: "fabric_again.h", old: "(__u32)passed != generation()", new: "0"},
	{name: "routes hold within the subnet", on: onRoutes, file: "fabric.c", old: "if ((iph->daddr & self->netmask) == self->subnet)", new: "if (0)"},
	{name: "no destination check", on: onRoutes, file: "fabric.c", old: "if (!w->held && (w->to->flags & ENI_SOURCE_DEST_CHECK))", new: "if (0)"},
	{name: "no source check", on: onRoutes, file: "fabric.c", old: "if (!owner && (self->flags & ENI_SOURCE_DEST_CHECK))", new: "if (0)"},

	{name: "a peering leads back into its own VPC", on: onRoutes, file: "fabric.c", old: "w->to = mapping(r->vni, iph->daddr);", new: "w->to = mapping(self->vni, iph->daddr);"},
	{name: "internet gateways take private destinations", on: onGateways, file: "fabric_nat.h", old: "if (private_address(iph->daddr))", new: "if (0)"},
	{name: "UDP's checksum stays as it was", on: onGateways, file: "fabric_nat.h", old: "if (l4 && protocol == IPPROTO_UDP &&", new: "if (0 && protocol == IPPROTO_UDP &&"},
	{name: "what ICMP errors quote is not translated", on: onGateways, file: "fabric_nat.h", old: "if (type == 3 || type == 4 || type == 5 || type == 11 || type == 12)", new: "if (0)"},
	{name: "a gateway's own table counts for nothing", on: onGateways, file: "fabric_nat.h", old: "if (public->table) {", new: "if (0) {"},
	{name: "no ACL for what comes from the internet", on: onGateways, file: "fabric_nat.h", old: "may_enter(&packet, 0, &way, 1)", new: "may_enter(&packet, 0, &way, 0)"},
	{name: "an internet gateway takes a byte too many", on: onGateways, file: "fabric_nat.h", old: "size.longest > internet_mtu && must_tell(skb)", new: "size.longest > internet_mtu + 1 && must_tell(skb)"},
	{name: "what an ACL refuses is logged as accepted", on: onACLs, file: "fabric_log.h", old: "key.verdict = VERDICT_ACL;", new: "key.verdict = VERDICT_ACCEPT;"},
	{name: "a SYN-ACK is logged as a SYN", on: onGroups, file: "fabric_log.h", old: "if (!(flags & TCP_ACK))", new: "if (1)"},
	{name: "the first packet's bytes are not logged", on: onRoutes, file: "fabric_log.h", old: "begun.bytes = p->bytes;", new: "begun.bytes = 0;"},
	{name: "identifiers of ICMP are logged as ports", on: onGroups, file: "fabric_log.h", old: "if (key.protocol == IPPROTO_TCP || key.protocol == IPPROTO_UDP) {", new: "if (1) {"},
	{name: "what is received is not logged", on: onRoutes, file: "fabric.c", old: "log_packet(p, w->to->ifindex, INGRESS, reason, PATH_NONE);", new: ""},
	{name: "a peering's traffic path is the VPC's", on: onRoutes, file: "fabric.c", old: "return PATH_PEERING;", new: "return PATH_VPC;"},

	{name: "no egress gate for IPv6", on: onGroups, dual: true, more: true, file: "fabric_ipv6.h", old: "gate6(p, ifindex, EGRESS, named)", new: "0"},
	{name: "IPv6 CIDRs of rules compared on 64 bits", on: onGroups, dual: true, file: "fabric_ipv6_gate.h", old: "if (within6(q->address, r->net, r->mask))", new: "if (!(((q->address[0] & r->mask[0]) ^ r->net[0]) | ((q->address[1] & r->mask[1]) ^ r->net[1])))"},
	{name: "IPv6 CIDRs of ACLs compared on 64 bits", on: onACLs, dual: true, more: true, file: "fabric_ipv6_gate.h", old: "if (!within6(q->address, e->net, e->mask))", new: "if (((q->address[0] & e->mask[0]) ^ e->net[0]) | ((q->address[1] & e->mask[1]) ^ e->net[1]))"},
	{name: "ICMPv6 type ignored", on: onGroups, dual: true, file: "fabric_ipv6_gate.h", old: "return (r->from == ANY || r->from == q->type) &&", new: "return"},
	{name: "ICMPv6 type ignored by ACLs", on: onACLs, dual: true, more: true, file: "fabric_ipv6_gate.h", old: "return (e->from == ANY || e->from == q->type) &&", new: "return"},
	{name: "references mean IPv4 alone", on: onGroups, dual: true, file: "fabric_ipv6_gate.h", old: "q.peer = peer ? policy6_of(peer) : 0;", new: "q.peer = peer >> 30 ? policy6_of(peer) : 0;"},
	{name: "untracked flows of IPv6 outlive their rule", on: onGroups, dual: true, more: true, file: "fabric_ipv6_gate.h", old: "if (policy && (policy->version == f->version ||", new: "if (policy && (1 ||"},
	{name: "ICMPv6 errors belong to no flow", on: onGroups, dual: true, file: "fabric_ipv6.h", old: "\tp->is_error = 1;", new: "\tp->is_error = 0;"},
	{name: "later fragments of IPv6 without their first pass", on: onGroups, dual: true, file: "fabric_ipv6.h", old: "if (!first || first->expires <= p->now || c.start < first->headers)\n\t\t\treturn DROP_FRAGMENT;", new: "if (!first)\n\t\t\treturn 0;"},
	{name: "delegated prefixes of IPv6 are nobody's", on: onRoutes, dual: true, file: "fabric_ipv6.h", old: "key.addr[2] &= bpf_htonl(0xffff0000);", new: "key.addr[2] = 0;"},
	{name: "routes of IPv6 hold within the subnet", on: onRoutes, dual: true, more: true, file: "fabric_ipv6.h", old: "if (in_subnet6(self, t->daddr))", new: "if (0)"},
	{name: "no ACL for IPv6 at the receiver's subnet", on: onACLs, dual: true, file: "fabric_ipv6.h", old: "if (crosses && !acl_allows6(p, w->vni, w->to->subnet, INGRESS))", new: "if (0)"},
	{name: "no source check of IPv6", on: onRoutes, dual: true, more: true, file: "fabric_ipv6.h", old: "((self->flags & ENI_SOURCE_DEST_CHECK) &&\n\t\t\t!own_link_local(self->mac, packet.tuple.saddr))", new: "0"},
	{name: "discovery goes to others", on: onRoutes, dual: true, file: "fabric_ipv6.h", old: "\t\tif (neighbour_discovery(type))\n\t\t\treturn from_guest_nd(skb);", new: "", also: [2]string{"if (neighbour_discovery(l4[0]))\n\t\treturn DROP_EXTENSION;", ""}},
	{name: "ICMPv6 is logged with ports", on: onGroups, dual: true, more: true, file: "fabric_ipv6_gate.h", old: "if (key.protocol == IPPROTO_TCP || key.protocol == IPPROTO_UDP) {", new: "if (1) {"},
	{name: "rules of IPv4 for everybody are for IPv6", on: onGroups, dual: true, config: eachRule(func(r *fabric.Rule) {
		if slices.Contains(r.Peers, prefix("0.0.0.0/0")) {
			r.Peers = append(r.Peers, prefix("::/0"))
		}
	})},
	{name: "delegated prefixes of IPv6 are not delivered to", on: onRoutes, dual: true, more: true, config: func(c *fabric.Config) {
		for i := range c.Interfaces {
			c.Interfaces[i].Addresses = slices.DeleteFunc(slices.Clone(c.Interfaces[i].Addresses), func(p netip.Prefix) bool { return p.Bits() == 80 })
		}
	}},

	{name: "only primary addresses have public ones", on: onGateways, config: func(c *fabric.Config) {
		c.Publics = slices.DeleteFunc(slices.Clone(c.Publics), func(p fabric.Public) bool {
			return !slices.ContainsFunc(c.Interfaces, func(i fabric.Interface) bool { return i.Primary == p.Private })
		})
	}},
	{name: "groups judge NAT gateways", on: onGateways, config: func(c *fabric.Config) {
		for i := range c.Interfaces {
			c.Interfaces[i].Ungated = false
		}
	}},
	{name: "the last rule of each group is lost", on: onGroups, config: eachGroup(func(g *fabric.Group) {
		if n := len(g.Ingress); n > 1 { // the markers' group has one
			g.Ingress = g.Ingress[:n-1]
		}
	})},
	{name: "a prefix list counts by its first entry", on: onGroups, config: eachRule(func(r *fabric.Rule) {
		r.Peers = r.Peers[:min(1, len(r.Peers))]
	})},
	{name: "CIDR blocks a bit too wide", on: onGroups, config: eachRule(func(r *fabric.Rule) {
		for i, p := range r.Peers {
			if p.Bits() > 0 {
				r.Peers[i] = netip.PrefixFrom(p.Addr(), p.Bits()-1).Masked()
			}
		}
	})},
	{name: "references mean nobody", on: onGroups, config: eachRule(func(r *fabric.Rule) {
		if r.Group != "" {
			r.Group = "sg-00000000000000001"
		}
	})},
	{name: "entries of ACLs in reverse", on: onACLs, config: func(c *fabric.Config) {
		for i := range c.ACLs {
			c.ACLs[i].Ingress = slices.Clone(c.ACLs[i].Ingress)
			c.ACLs[i].Egress = slices.Clone(c.ACLs[i].Egress)
			slices.Reverse(c.ACLs[i].Ingress)
			slices.Reverse(c.ACLs[i].Egress)
		}
	}},
	{name: "the first route of a table is lost", on: onRoutes, config: func(c *fabric.Config) {
		for i := range c.Tables {
			c.Tables[i].Routes = slices.DeleteFunc(slices.Clone(c.Tables[i].Routes), func(r fabric.Route) bool { return !r.Local })
		}
	}},
	{name: "delegated prefixes are not delivered to", on: onRoutes, config: func(c *fabric.Config) {
		for i := range c.Interfaces {
			c.Interfaces[i].Addresses = slices.DeleteFunc(slices.Clone(c.Interfaces[i].Addresses), func(p netip.Prefix) bool { return !p.IsSingleIP() })
		}
	}},
}

func eachGroup(change func(*fabric.Group)) func(*fabric.Config) {
	return func(c *fabric.Config) {
		for i := range c.Groups {
			change(&c.Groups[i])
		}
	}
}

func eachRule(change func(*fabric.Rule)) func(*fabric.Config) {
	return eachGroup(func(g *fabric.Group) {
		for _, rules := range []*[]fabric.Rule{&g.Ingress, &g.Egress} {
			*rules = slices.Clone(*rules)
			for i := range *rules {
				(*rules)[i].Peers = slices.Clone((*rules)[i].Peers)
				change(&(*rules)[i])
			}
		}
	})
}

// object compiles the fabric's programs with the fault, as bpfgen does without.
func (f fault) object(t *testing.T) []byte {
	t.Helper()
	if f.file == "" {
		return nil
	}
	dir := t.TempDir()
	sources, err := filepath.Glob("../../bpf/fabric*")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range sources {
		source, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if filepath.Base(path) == f.file {
			for _, change := range [][2]string{{f.old, f.new}, f.also} {
				if n := bytes.Count(source, []byte(change[0])); n != 1 && change[0] != "" {
					t.Fatalf("%s has %q %d times: the fault must be planted elsewhere by now", f.file, change[0], n)
				}
				if change[0] != "" {
					source = bytes.ReplaceAll(source, []byte(change[0]), []byte(change[1]))
				}
			}
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(path)), source, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out := filepath.Join(dir, "fabric.o")
	cmd := exec.Command("clang-14", "-target", "bpfel", "-O2", "-g", "-Wno-everything", "-I/usr/include/x86_64-linux-gnu", "-c", filepath.Join(dir, "fabric.c"), "-o", out)
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("compile: %v\n%s", err, said)
	}
	object, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return object
}

var moreFaults = flag.Bool("more-faults", false, "TestFaults plants those of IPv6 too that are as one of IPv4")

// worldsPerFault bounds how many worlds a fault may stay unseen in.
const worldsPerFault = 24

// Each fault shows in a few worlds of the kind that it is about.
func TestFaults(t *testing.T) {
	testenv.Require(t, "root", "bpf", "clang")
	for _, f := range faults {
		if f.more && !*moreFaults {
			continue
		}
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			s := newStandWith(t, func(lab string) { fabric.Plant(lab, fabric.Fault{Object: f.object(t), Config: f.config}) })
			sent, seed := 0, uint64(0)
			for range worldsPerFault {
				for emphases[seed%uint64(len(emphases))] != f.on || f.dual && !Enforced.dual(seed) {
					seed++
				}
				o, err := s.run(Generate(seed, Enforced, 250))
				if err != nil {
					t.Fatal(err)
				}
				if bad := o.mismatches(); len(bad) > 0 {
					for i := range o.verdicts {
						if i <= bad[0] {
							sent++
						}
					}
					t.Logf("caught by packet %d: %s", sent, o.said(bad[0]))
					return
				}
				sent += len(o.verdicts)
				seed++
			}
			t.Errorf("not caught by %d packets in %d worlds", sent, worldsPerFault)
		})
	}
}

// said is what model and fabric say of one packet.
func (o *outcome) said(i int) string {
	who := o.received[i]
	if who == "" {
		who = "nobody"
	}
	text := fmt.Sprintf("%s; model: %s; received by %s", strings.TrimSpace(o.script[i].String()), o.verdicts[i], who)
	for _, d := range o.records {
		if d.index == i {
			return text + "; " + d.text
		}
	}
	return text
}
