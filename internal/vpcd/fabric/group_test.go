package fabric

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

func prefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func TestBadGroups(t *testing.T) {
	for name, c := range map[string]struct {
		groups []Group
		want   string
		rules  int // of the first group that stay
	}{
		"no ID":               {[]Group{{ID: "web"}}, "web", 0},
		"twice":               {[]Group{{ID: testGroup(1)}, {ID: testGroup(1)}}, "occurs twice", 0},
		"the same number":     {[]Group{{ID: "sg-10000000000000001"}, {ID: "sg-20000000000000001"}}, "same last 16 digits", 0},
		"number 0":            {[]Group{{ID: "sg-00000000000000000"}}, "means none", 0},
		"protocol 256":        {[]Group{{ID: testGroup(1), Ingress: []Rule{{Protocol: 256}, {Protocol: 47, Peers: prefixes("10.0.0.0/8")}}}}, "no such protocol", 1},
		"ports the other way": {[]Group{{ID: testGroup(1), Ingress: []Rule{{Protocol: 6, From: 9, To: 8}}}}, "no such ports", 0},
		"port 65536":          {[]Group{{ID: testGroup(1), Ingress: []Rule{{Protocol: 17, From: 9, To: 65536}}}}, "no such ports", 0},
		"ICMP type 256":       {[]Group{{ID: testGroup(1), Ingress: []Rule{{Protocol: 1, From: 256, To: Any}}}}, "no such ICMP", 0},
		"two kinds of peers":  {[]Group{{ID: testGroup(1), Ingress: []Rule{{Protocol: AllProtocols, Group: testGroup(2), Peers: prefixes("10.0.0.0/8")}}}}, "as peers", 0},
		"a peer that is none": {[]Group{{ID: testGroup(1), Ingress: []Rule{{Protocol: AllProtocols, Peers: make([]netip.Prefix, 1)}}}}, "is none", 0},
	} {
		got, errs := checkGroups(c.groups)
		if len(errs) != 1 || !strings.Contains(errs[0].Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, errs, c.want)
		}
		if s := got[c.groups[0].ID]; s != nil && len(s.rules[ingress]) != c.rules {
			t.Errorf("%s: %d rules stay, want %d", name, len(s.rules[ingress]), c.rules)
		}
	}
}

// TestPolicyLimits puts more into a policy than it holds: less is allowed, and
// it is told.
func TestPolicyLimits(t *testing.T) {
	var many Group
	many.ID = testGroup(0)
	for n := range 1001 {
		many.Ingress = append(many.Ingress, Rule{Protocol: 6, From: n, To: n, Peers: prefixes("10.0.0.0/8")})
	}
	groups := []Group{many}
	ids := []vpc.SecurityGroupID{many.ID, "sg-00000000000000099"}
	for n := range 16 {
		groups = append(groups, Group{ID: testGroup(n + 1)})
		ids = append(ids, testGroup(n+1))
	}
	all, errs := checkGroups(groups)
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	p, err := policyOf(ids, IdleTimeouts{}, all)
	for _, want := range []string{"1001 rules in one direction, of which 1000", "17 security groups, of which 16", "sg-00000000000000099 is not there"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v lacks %q", err, want)
		}
	}
	if p.Count[ingress] != 1000 || slices.Contains(p.Groups[:], 0) {
		t.Errorf("%d rules, groups %x", p.Count[ingress], p.Groups)
	}
}

// TestPolicyIsItsContent: equal contents have one version, others another.
func TestPolicyIsItsContent(t *testing.T) {
	web := Rule{Protocol: 6, From: 80, To: 80, Peers: prefixes("10.0.0.0/8", "192.168.0.0/16")}
	dns := Rule{Protocol: 17, From: 53, To: 53, Group: testGroup(9)}
	open := Rule{Protocol: AllProtocols, Peers: prefixes("0.0.0.0/0")}
	version := func(timeouts IdleTimeouts, groups ...Group) uint64 {
		t.Helper()
		all, errs := checkGroups(groups)
		if len(errs) > 0 {
			t.Fatal(errs)
		}
		var ids []vpc.SecurityGroupID
		for _, g := range groups {
			ids = append(ids, g.ID)
		}
		p, err := policyOf(ids, timeouts, all)
		if err != nil {
			t.Fatal(err)
		}
		return p.Version
	}
	one := version(IdleTimeouts{}, Group{ID: testGroup(1), Ingress: []Rule{web, dns}}, Group{ID: testGroup(2), Egress: []Rule{open}})
	same := version(IdleTimeouts{UDP: 30 * time.Second}, Group{ID: testGroup(2), Egress: []Rule{open, open}, Ingress: []Rule{web}}, Group{ID: testGroup(1), Ingress: []Rule{dns, web}})
	if one != same {
		t.Errorf("the same rules in another order have versions %x and %x", one, same)
	}
	seen := map[uint64]int{one: -1}
	for i, v := range []uint64{
		version(IdleTimeouts{}),
		version(IdleTimeouts{}, Group{ID: testGroup(1), Ingress: []Rule{web, dns}}),
		version(IdleTimeouts{}, Group{ID: testGroup(1), Egress: []Rule{web, dns}}),
		version(IdleTimeouts{}, Group{ID: testGroup(2), Ingress: []Rule{web, dns}}),
		version(IdleTimeouts{UDP: 31 * time.Second}, Group{ID: testGroup(1), Ingress: []Rule{web, dns}}),
	} {
		if k, ok := seen[v]; ok || v == 0 {
			t.Errorf("policies %d and %d have one version, %x", k, i, v)
		}
		seen[v] = i
	}
}

func TestOpenTo(t *testing.T) {
	const both = bpfgen.FabricOpenFlagOPEN_TCP | bpfgen.FabricOpenFlagOPEN_UDP
	for _, c := range []struct {
		rule Rule
		want bpfgen.FabricOpenFlag
	}{
		{Rule{Protocol: AllProtocols, Peers: prefixes("0.0.0.0/0")}, both},
		{Rule{Protocol: 6, From: 0, To: 65535, Peers: prefixes("0.0.0.0/0")}, bpfgen.FabricOpenFlagOPEN_TCP},
		{Rule{Protocol: 17, From: Any, To: Any, Peers: prefixes("10.0.0.0/8", "0.0.0.0/0")}, bpfgen.FabricOpenFlagOPEN_UDP},
		{Rule{Protocol: 6, From: 1, To: 65535, Peers: prefixes("0.0.0.0/0")}, 0},
		{Rule{Protocol: 6, From: 0, To: 65535, Peers: prefixes("0.0.0.0/1", "128.0.0.0/1")}, 0},
		{Rule{Protocol: AllProtocols, Group: testGroup(1)}, 0},
		{Rule{Protocol: 1, From: Any, To: Any, Peers: prefixes("0.0.0.0/0")}, 0},
		{Rule{Protocol: AllProtocols, Peers: prefixes("::/0")}, 0},
	} {
		rules, _, err := compile(c.rule)
		if err != nil {
			t.Fatal(err)
		}
		if got := openTo(rules); got != c.want {
			t.Errorf("%+v opens %d, want %d", c.rule, got, c.want)
		}
	}
}
