package policy_test

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/underlay-cni/underlay/internal/policy"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// The cluster of the cases below. Addresses: web 10.0.0.1, api 10.0.0.2 and db
// 10.0.0.3 in shop, probe 10.0.0.9 in monitoring, agent 10.0.0.200 with the
// node's address.
var (
	web   = policy.Pod{Namespace: "shop", Name: "web", Labels: map[string]string{"app": "web"}, Addrs: addrs("10.0.0.1", "2600:1f18::1"), Ports: []policy.NamedPort{{Name: "http", Protocol: policy.TCP, Port: 8080}}}
	api   = policy.Pod{Namespace: "shop", Name: "api", Labels: map[string]string{"app": "api"}, Addrs: addrs("10.0.0.2"), Ports: []policy.NamedPort{{Name: "http", Protocol: policy.TCP, Port: 9090}}}
	db    = policy.Pod{Namespace: "shop", Name: "db", Labels: map[string]string{"app": "db"}, Addrs: addrs("10.0.0.3")}
	watch = policy.Pod{Namespace: "monitoring", Name: "probe", Labels: map[string]string{"app": "web"}, Addrs: addrs("10.0.0.9")}
	agent = policy.Pod{Namespace: "shop", Name: "agent", Labels: map[string]string{"app": "api"}, Addrs: addrs("10.0.0.200"), HostNetwork: true}

	cluster = []policy.Pod{web, api, db, watch, agent}
	labels  = map[string]map[string]string{"shop": {"team": "shop"}, "monitoring": {"team": "ops"}}
)

func addrs(s ...string) (out []netip.Addr) {
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func app(value string) *policy.Selector {
	return &policy.Selector{MatchLabels: map[string]string{"app": value}}
}

func team(value string) *policy.Selector {
	return &policy.Selector{MatchLabels: map[string]string{"team": value}}
}

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// ask is a flow with what is expected of it.
type ask struct {
	from, to string
	protocol policy.Protocol
	port     uint16
	want     string // the rule's name if it is allowed, "!" before it if not, "?" if it would be denied
}

// What Kubernetes' documents say of NetworkPolicy, each in one case.
func TestNetworkPolicy(t *testing.T) {
	in := []policy.Direction{policy.Ingress}
	for _, tc := range []struct {
		name     string
		of       policy.Pod
		dir      policy.Direction
		policies []policy.NetworkPolicy
		asks     []ask
	}{
		{"no policy: not isolated", web, policy.Ingress, nil, []ask{
			{"10.0.0.9", "10.0.0.1", policy.TCP, 80, "no policy"},
		}},
		{"another namespace's policy", watch, policy.Ingress, []policy.NetworkPolicy{{Namespace: "shop", Name: "deny"}}, []ask{
			{"10.0.0.1", "10.0.0.9", policy.TCP, 80, "no policy"},
		}},
		{"default deny of ingress leaves egress", web, policy.Egress, []policy.NetworkPolicy{{Namespace: "shop", Name: "deny"}}, []ask{
			{"10.0.0.1", "10.0.0.9", policy.TCP, 80, "no policy"},
		}},
		{"default deny", web, policy.Ingress, []policy.NetworkPolicy{{Namespace: "shop", Name: "deny"}}, []ask{
			{"10.0.0.2", "10.0.0.1", policy.TCP, 80, "!shop/deny ingress: no rule allows it"},
			{"10.0.0.1", "10.0.0.1", policy.TCP, 80, "the pod itself"},
		}},
		{"egress rules isolate egress without policyTypes", web, policy.Egress, []policy.NetworkPolicy{{Namespace: "shop", Name: "out",
			Egress: []policy.PolicyRule{{Peers: []policy.Peer{{PodSelector: app("api")}}}}}}, []ask{
			{"10.0.0.1", "10.0.0.2", policy.UDP, 53, "shop/out egress[0]"},
			{"10.0.0.1", "10.0.0.3", policy.UDP, 53, "!shop/out egress: no rule allows it"},
		}},
		{"egress rules mean nothing if policyTypes is Ingress alone", web, policy.Egress, []policy.NetworkPolicy{{Namespace: "shop", Name: "out", Types: in,
			Egress: []policy.PolicyRule{{Peers: []policy.Peer{{PodSelector: app("api")}}}}}}, []ask{
			{"10.0.0.1", "10.0.0.3", policy.UDP, 53, "no policy"},
		}},
		{"a rule without peers is for everybody, one without ports for every protocol", web, policy.Ingress, []policy.NetworkPolicy{{Namespace: "shop", Name: "all",
			Ingress: []policy.PolicyRule{{}}}}, []ask{
			{"192.0.2.1", "10.0.0.1", policy.SCTP, 7, "shop/all ingress[0]"},
			{"192.0.2.1", "10.0.0.1", policy.ICMP, 0, "shop/all ingress[0]"},
		}},
		{"policies add up", web, policy.Ingress, []policy.NetworkPolicy{
			{Namespace: "shop", Name: "b", Ingress: []policy.PolicyRule{{Peers: []policy.Peer{{PodSelector: app("api")}}}}},
			{Namespace: "shop", Name: "a", Ingress: []policy.PolicyRule{{Peers: []policy.Peer{{PodSelector: app("db")}}}}},
		}, []ask{
			{"10.0.0.2", "10.0.0.1", policy.TCP, 80, "shop/b ingress[0]"},
			{"10.0.0.3", "10.0.0.1", policy.TCP, 80, "shop/a ingress[0]"},
			{"10.0.0.9", "10.0.0.1", policy.TCP, 80, "!shop/a,shop/b ingress: no rule allows it"},
		}},
		{"a pod selector is of the policy's namespace, with a namespace selector of those", db, policy.Ingress, []policy.NetworkPolicy{{Namespace: "shop", Name: "p",
			Ingress: []policy.PolicyRule{{Peers: []policy.Peer{{PodSelector: app("web")}}}}}}, []ask{
			{"10.0.0.1", "10.0.0.3", policy.TCP, 5432, "shop/p ingress[0]"},
			{"10.0.0.9", "10.0.0.3", policy.TCP, 5432, "!shop/p ingress: no rule allows it"},
		}},
		{"a namespace selector means all pods there, with a pod selector those of them", db, policy.Ingress, []policy.NetworkPolicy{{Namespace: "shop", Name: "p",
			Ingress: []policy.PolicyRule{{Peers: []policy.Peer{{NamespaceSelector: team("ops")}}}, {Peers: []policy.Peer{{NamespaceSelector: team("shop"), PodSelector: app("api")}}}}}}, []ask{
			{"10.0.0.9", "10.0.0.3", policy.TCP, 5432, "shop/p ingress[0]"},
			{"10.0.0.2", "10.0.0.3", policy.TCP, 5432, "shop/p ingress[1]"},
			{"10.0.0.1", "10.0.0.3", policy.TCP, 5432, "!shop/p ingress: no rule allows it"},
			{"10.0.0.200", "10.0.0.3", policy.TCP, 5432, "!shop/p ingress: no rule allows it"},
		}},
		{"a block without its exceptions", web, policy.Egress, []policy.NetworkPolicy{{Namespace: "shop", Name: "p",
			Egress: []policy.PolicyRule{{Peers: []policy.Peer{{Block: &policy.Block{CIDR: pfx("10.0.0.0/8"), Except: []netip.Prefix{pfx("10.1.0.0/16")}}}}}}}}, []ask{
			{"10.0.0.1", "10.0.255.255", policy.TCP, 80, "shop/p egress[0]"},
			{"10.0.0.1", "10.1.0.0", policy.TCP, 80, "!shop/p egress: no rule allows it"},
			{"10.0.0.1", "10.1.255.255", policy.TCP, 80, "!shop/p egress: no rule allows it"},
			{"10.0.0.1", "10.2.0.0", policy.TCP, 80, "shop/p egress[0]"},
			{"2600:1f18::1", "2600:1f18::2", policy.TCP, 80, "!shop/p egress: no rule allows it"},
		}},
		{"a port without protocol is TCP; endPort is included", web, policy.Ingress, []policy.NetworkPolicy{{Namespace: "shop", Name: "p",
			Ingress: []policy.PolicyRule{{Ports: []policy.Port{{Port: 8000, End: 8010}}}, {Ports: []policy.Port{{Protocol: policy.SCTP, Port: 7}}}, {Ports: []policy.Port{{Protocol: policy.UDP}}}}}}, []ask{
			{"10.0.0.2", "10.0.0.1", policy.TCP, 8010, "shop/p ingress[0]"},
			{"10.0.0.2", "10.0.0.1", policy.TCP, 8011, "!shop/p ingress: no rule allows it"},
			{"10.0.0.2", "10.0.0.1", policy.SCTP, 7, "shop/p ingress[1]"},
			{"10.0.0.2", "10.0.0.1", policy.SCTP, 8, "!shop/p ingress: no rule allows it"},
			{"10.0.0.2", "10.0.0.1", policy.UDP, 8011, "shop/p ingress[2]"},
			{"10.0.0.2", "10.0.0.1", policy.ICMP, 0, "!shop/p ingress: no rule allows it"},
		}},
		{"a named port of ingress is the pod's own", web, policy.Ingress, []policy.NetworkPolicy{{Namespace: "shop", Name: "p",
			Ingress: []policy.PolicyRule{{Ports: []policy.Port{{Name: "http"}}}}}}, []ask{
			{"10.0.0.2", "10.0.0.1", policy.TCP, 8080, "shop/p ingress[0]"},
			{"10.0.0.2", "10.0.0.1", policy.TCP, 9090, "!shop/p ingress: no rule allows it"},
		}},
		{"a named port of egress is the receiver's, each its own", db, policy.Egress, []policy.NetworkPolicy{{Namespace: "shop", Name: "p",
			Egress: []policy.PolicyRule{{Ports: []policy.Port{{Name: "http"}}}}}}, []ask{
			{"10.0.0.3", "10.0.0.1", policy.TCP, 8080, "shop/p egress[0]"},
			{"10.0.0.3", "10.0.0.2", policy.TCP, 9090, "shop/p egress[0]"},
			{"10.0.0.3", "10.0.0.2", policy.TCP, 8080, "!shop/p egress: no rule allows it"},
			{"10.0.0.3", "192.0.2.1", policy.TCP, 8080, "!shop/p egress: no rule allows it"},
		}},
		{"audit lets pass and says so", web, policy.Ingress, []policy.NetworkPolicy{{Namespace: "shop", Name: "p", Audit: true,
			Ingress: []policy.PolicyRule{{Peers: []policy.Peer{{PodSelector: app("api")}}}}}}, []ask{
			{"10.0.0.2", "10.0.0.1", policy.TCP, 80, "shop/p ingress[0]"},
			{"10.0.0.3", "10.0.0.1", policy.TCP, 80, "?shop/p ingress: no rule allows it"},
		}},
		{"beside a policy in force, one in audit opens nothing", web, policy.Ingress, []policy.NetworkPolicy{
			{Namespace: "shop", Name: "p", Audit: true, Ingress: []policy.PolicyRule{{Peers: []policy.Peer{{PodSelector: app("api")}}}}},
			{Namespace: "shop", Name: "q", Ingress: []policy.PolicyRule{{Peers: []policy.Peer{{PodSelector: app("db")}}}}},
		}, []ask{
			{"10.0.0.2", "10.0.0.1", policy.TCP, 80, "!shop/q ingress: no rule allows it"},
			{"10.0.0.3", "10.0.0.1", policy.TCP, 80, "shop/q ingress[0]"},
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			input := policy.Input{Policies: tc.policies, Pods: cluster, Namespaces: labels}
			judge(t, &input, &policy.Endpoint{Pod: tc.of}, tc.dir, policy.Policies, tc.asks)
		})
	}
}

// judge asks the reference and the tables.
func judge(t *testing.T, in *policy.Input, ep *policy.Endpoint, dir policy.Direction, gate policy.GateID, asks []ask) {
	t.Helper()
	c := policy.NewCompiler(in)
	tables, err := c.Compile(ep)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range asks {
		f := policy.Flow{Src: netip.MustParseAddr(a.from), Dst: netip.MustParseAddr(a.to), Protocol: a.protocol, SrcPort: 40000, DstPort: a.port}
		if a.protocol == policy.ICMP {
			f.ICMPType, f.ICMPCode = uint8(a.port>>8), uint8(a.port)
		}
		j := policy.Evaluate(in, ep, dir, f)[gate]
		v := tables.Judge(dir, f)[gate]
		for who, got := range map[string]policy.Judgement{
			"reference": j, "tables": {Allow: v.Allow, Audit: v.Audit, Untracked: v.Untracked, Rule: c.Rules().Name(v.Rule)},
		} {
			said := got.Rule
			switch {
			case got.Audit && got.Allow:
				said = "?" + said
			case !got.Allow:
				said = "!" + said
			case got.Untracked:
				said = "~" + said
			}
			if said != a.want {
				t.Errorf("%s of %s → %s protocol %d port %d: %q, want %q", who, a.from, a.to, a.protocol, a.port, said, a.want)
			}
		}
	}
}

// What AWS's documents say of security groups; "~" before a rule's name: the flow
// is not tracked.
func TestSecurityGroups(t *testing.T) {
	const a, b, none = vpc.SecurityGroupID("sg-a"), vpc.SecurityGroupID("sg-b"), vpc.SecurityGroupID("sg-none")
	input := policy.Input{
		Groups: map[vpc.SecurityGroupID]policy.SecurityGroup{
			a: {
				Ingress: []policy.GroupRule{
					{ID: "sgr-2", Protocol: 6, FromPort: 443, ToPort: 443, CIDR: pfx("0.0.0.0/0")},
					{ID: "sgr-1", Protocol: 6, FromPort: 80, ToPort: 90, Group: b},
					{ID: "sgr-3", Protocol: 1, FromPort: 8, ToPort: -1, CIDR: pfx("10.0.0.0/8")},
					{ID: "sgr-4", Protocol: 1, FromPort: 3, ToPort: 4, CIDR: pfx("10.0.0.0/8")},
					{ID: "sgr-5", Protocol: 17, FromPort: 53, ToPort: 53, PrefixList: "pl-1"},
					{ID: "sgr-6", Protocol: 50, FromPort: 1, ToPort: 1, CIDR: pfx("10.0.0.0/8")},
				},
				Egress: []policy.GroupRule{{ID: "sgr-9", Protocol: policy.AnyProtocol, CIDR: pfx("0.0.0.0/0")}},
			},
			b:    {Ingress: []policy.GroupRule{{ID: "sgr-7", Protocol: policy.AnyProtocol, Group: b}}},
			none: {},
		},
		PrefixLists: map[vpc.PrefixListID][]netip.Prefix{"pl-1": {pfx("10.7.0.0/16"), pfx("10.8.0.0/16")}},
		// A secondary address and a delegated prefix.
		Members: map[vpc.SecurityGroupID][]netip.Prefix{b: {pfx("10.0.0.5/32"), pfx("10.0.1.16/28")}},
		Exempt:  []policy.Exemption{{Name: "Amazon DNS", Prefix: pfx("10.0.0.2/32")}},
	}
	const no = "!sg-a ingress: no rule allows it"
	judge(t, &input, &policy.Endpoint{Groups: vpc.GroupSet(a)}, policy.Ingress, policy.Groups, []ask{
		{"192.0.2.1", "10.0.0.1", policy.TCP, 443, "~sg-a ingress sgr-2"},
		{"192.0.2.1", "10.0.0.1", policy.UDP, 443, no},
		{"10.0.0.5", "10.0.0.1", policy.TCP, 90, "sg-a ingress sgr-1"},
		{"10.0.1.31", "10.0.0.1", policy.TCP, 80, "sg-a ingress sgr-1"},
		{"10.0.1.32", "10.0.0.1", policy.TCP, 80, no},
		{"10.0.0.5", "10.0.0.1", policy.TCP, 91, no},
		{"10.2.0.1", "10.0.0.1", policy.ICMP, 8<<8 | 5, "sg-a ingress sgr-3"},
		{"10.2.0.1", "10.0.0.1", policy.ICMP, 3<<8 | 4, "sg-a ingress sgr-4"},
		{"10.2.0.1", "10.0.0.1", policy.ICMP, 3<<8 | 1, no},
		{"10.8.1.1", "10.0.0.1", policy.UDP, 53, "sg-a ingress sgr-5"},
		{"10.9.1.1", "10.0.0.1", policy.UDP, 53, no},
		{"10.9.1.1", "10.0.0.1", 50, 0, "sg-a ingress sgr-6"},
		{"10.0.0.2", "10.0.0.1", policy.UDP, 53, "exempt: Amazon DNS"},
	})
	judge(t, &input, &policy.Endpoint{Groups: vpc.NewGroupSet([]vpc.SecurityGroupID{b, a})}, policy.Ingress, policy.Groups, []ask{
		{"10.0.0.5", "10.0.0.1", policy.TCP, 80, "sg-a ingress sgr-1"},
		{"10.0.0.5", "10.0.0.1", policy.SCTP, 80, "sg-b ingress sgr-7"},
	})
	// Tracked: the way back is not open to everybody.
	judge(t, &input, &policy.Endpoint{Groups: vpc.GroupSet(b)}, policy.Egress, policy.Groups, []ask{
		{"10.0.0.1", "192.0.2.1", policy.TCP, 443, "!sg-b egress: no rule allows it"},
	})
	judge(t, &input, &policy.Endpoint{Groups: vpc.GroupSet(a)}, policy.Egress, policy.Groups, []ask{
		{"10.0.0.1", "192.0.2.1", policy.TCP, 443, "sg-a egress sgr-9"},
	})
	judge(t, &input, &policy.Endpoint{Groups: vpc.GroupSet(none), AuditGroups: true}, policy.Ingress, policy.Groups, []ask{
		{"10.0.0.5", "10.0.0.1", policy.TCP, 80, "?sg-none ingress: no rule allows it"},
	})
	judge(t, &input, &policy.Endpoint{}, policy.Ingress, policy.Groups, []ask{
		{"10.0.0.5", "10.0.0.1", policy.TCP, 80, "no policy"},
	})
}

// An endpoint whose group nobody knows has no policy that could be set.
func TestUnknownGroup(t *testing.T) {
	_, err := policy.NewCompiler(&policy.Input{}).Compile(&policy.Endpoint{Groups: "sg-x"})
	var unknown *policy.UnknownGroupError
	if !errors.As(err, &unknown) || unknown.Group != "sg-x" {
		t.Errorf("%v", err)
	}
}

// Equal policy has equal tables, whatever the order in which the input tells it;
// and other policy has others.
func TestDigest(t *testing.T) {
	group := func(rules ...policy.GroupRule) policy.Digest {
		in := policy.Input{Groups: map[vpc.SecurityGroupID]policy.SecurityGroup{"sg-a": {Ingress: rules}}}
		tables, err := policy.NewCompiler(&in).Compile(&policy.Endpoint{Groups: "sg-a"})
		if err != nil {
			t.Fatal(err)
		}
		return tables.Gates[policy.Groups].Digest
	}
	one := policy.GroupRule{ID: "sgr-1", Protocol: 6, FromPort: 80, ToPort: 80, CIDR: pfx("10.0.0.0/8")}
	two := policy.GroupRule{ID: "sgr-2", Protocol: 6, FromPort: 81, ToPort: 81, CIDR: pfx("10.0.0.0/8")}
	if group(one, two) != group(two, one) {
		t.Error("the order of rules makes another table")
	}
	other := one
	other.ID = "sgr-3"
	if group(one) == group(two) || group(one) == group(other) {
		t.Error("two policies have one table")
	}
}
