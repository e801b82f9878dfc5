package vpcmodel

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// What each packet adds to flow logs, worked out by hand.
func TestRecords(t *testing.T) {
	base, _, err := Facts()
	if err != nil {
		t.Fatal(err)
	}
	more, err := Parse(`
allow g1 out all 0.0.0.0/0
allow g2 in tcp 80 10.0.0.0/8
allow g2 in icmp 8/any 10.0.0.0/8
allow g2 out all 0.0.0.0/0
allow g3 in udp 53 0.0.0.0/0
igw w1 v1
elastic p1 198.18.0.1
associate p1 e2 10.0.1.33
vpc v6 10.6.0.0/16 2001:db8:6::/56
subnet u1 v6 10.6.1.0/24 2001:db8:6:1::/64
eni k1 u1 l1 10.6.1.10 2001:db8:6:1::10
eni k2 u1 l2 10.6.1.20 2001:db8:6:1::20 2001:db8:6:1:a::/80
group k v6
groups k1 k
groups k2 k
allow k in tcp 80 2001:db8:6::/56
allow k in icmpv6 128/any 2001:db8:6::/56
allow k out all ::/0
vpc v2 10.2.0.0/16
subnet t1 v2 10.2.1.0/24
eni f1 t1 j1 10.2.1.10
group h1 v2
groups f1 h1
allow h1 in all 10.0.0.0/8
peer x1 v1 v2
table rt1 v1
route rt1 0.0.0.0/0 igw w1
route rt1 10.2.0.0/16 peer x1
tableof s1 rt1
acl a2 v1
entry a2 in 10 deny udp 99 0.0.0.0/0
entry a2 in 20 allow all 0.0.0.0/0
entry a2 out 10 deny udp 98 0.0.0.0/0
entry a2 out 20 allow all 0.0.0.0/0
aclof s2 a2
allow g3 out all 0.0.0.0/0
`)
	if err != nil {
		t.Fatal(err)
	}
	world := append(append(Script{}, base...), more...)
	for _, c := range []struct{ name, send, want string }{
		{"accepted at both ends", "send 1 e1 tcp 10.0.1.10:5000 > 10.0.1.20:80 S", `
e1 egress 10.0.1.10 10.0.1.20 5000 80 6 ACCEPT pkt 10.0.1.10 10.0.1.20 path 1 flags 2
e2 ingress 10.0.1.10 10.0.1.20 5000 80 6 ACCEPT pkt 10.0.1.10 10.0.1.20 path - flags 2`},
		{"refused by the receiver's groups", "send 1 e1 tcp 10.0.1.10:5000 > 10.0.1.20:81 S", `
e1 egress 10.0.1.10 10.0.1.20 5000 81 6 ACCEPT pkt 10.0.1.10 10.0.1.20 path 1 flags 2
e2 ingress 10.0.1.10 10.0.1.20 5000 81 6 REJECT pkt 10.0.1.10 10.0.1.20 path - flags 2`},
		{"refused by the sender's groups", "send 1 e4 udp 10.0.2.40:5000 > 10.0.1.20:81", `
e4 egress 10.0.2.40 10.0.1.20 5000 81 17 REJECT pkt 10.0.2.40 10.0.1.20 path - flags 0`},
		{"a receiver's address of a prefix", "send 1 e1 tcp 10.0.1.10:5000 > 10.0.1.35:80 PA", `
e1 egress 10.0.1.10 10.0.1.35 5000 80 6 ACCEPT pkt 10.0.1.10 10.0.1.35 path 1 flags 0
e2 ingress 10.0.1.10 10.0.1.20 5000 80 6 ACCEPT pkt 10.0.1.10 10.0.1.35 path - flags 0`},
		{"a sender's secondary address", "send 1 e2 tcp 10.0.1.21:80 > 10.0.1.10:5000 SA", `
e2 egress 10.0.1.20 10.0.1.10 80 5000 6 ACCEPT pkt 10.0.1.21 10.0.1.10 path 1 flags 18
e1 ingress 10.0.1.21 10.0.1.10 80 5000 6 REJECT pkt 10.0.1.21 10.0.1.10 path - flags 18`},
		{"flags", "send 1 e1 tcp 10.0.1.10:5000 > 10.0.1.20:80 FA", `
e1 egress 10.0.1.10 10.0.1.20 5000 80 6 ACCEPT pkt 10.0.1.10 10.0.1.20 path 1 flags 1
e2 ingress 10.0.1.10 10.0.1.20 5000 80 6 ACCEPT pkt 10.0.1.10 10.0.1.20 path - flags 1`},
		{"no ports of ICMP", "send 1 e1 icmp 10.0.1.10 > 10.0.1.20 8/0 ident 7", `
e1 egress 10.0.1.10 10.0.1.20 0 0 1 ACCEPT pkt 10.0.1.10 10.0.1.20 path 1 flags 0
e2 ingress 10.0.1.10 10.0.1.20 0 0 1 ACCEPT pkt 10.0.1.10 10.0.1.20 path - flags 0`},
		{"refused by the receiver's ACL", "send 1 e1 udp 10.0.1.10:5000 > 10.0.2.30:99", `
e1 egress 10.0.1.10 10.0.2.30 5000 99 17 ACCEPT pkt 10.0.1.10 10.0.2.30 path 1 flags 0
e3 ingress 10.0.1.10 10.0.2.30 5000 99 17 REJECT pkt 10.0.1.10 10.0.2.30 path - flags 0`},
		{"refused by the sender's ACL", "send 1 e3 udp 10.0.2.30:5000 > 10.0.1.10:98", `
e3 egress 10.0.2.30 10.0.1.10 5000 98 17 REJECT pkt 10.0.2.30 10.0.1.10 path - flags 0`},
		{"by a peering", "send 1 e1 udp 10.0.1.10:5000 > 10.2.1.10:53", `
e1 egress 10.0.1.10 10.2.1.10 5000 53 17 ACCEPT pkt 10.0.1.10 10.2.1.10 path 4 flags 0
f1 ingress 10.0.1.10 10.2.1.10 5000 53 17 ACCEPT pkt 10.0.1.10 10.2.1.10 path - flags 0`},
		{"by an internet gateway", "send 1 e2 udp 10.0.1.33:5000 > 203.0.113.9:53", `
e2 egress 10.0.1.20 203.0.113.9 5000 53 17 ACCEPT pkt 10.0.1.33 203.0.113.9 path 8 flags 0`},
		{"from the internet", "send 1 internet tcp 203.0.113.9:5000 > 198.18.0.1:80 S", `
e2 ingress 203.0.113.9 10.0.1.20 5000 80 6 REJECT pkt 203.0.113.9 10.0.1.33 path - flags 2`},
		{"IPv6, accepted at an address of a prefix", "send 1 k1 tcp [2001:db8:6:1::10]:5000 > [2001:db8:6:1:a::5]:80 S", `
k1 egress 2001:db8:6:1::10 2001:db8:6:1:a::5 5000 80 6 ACCEPT pkt 2001:db8:6:1::10 2001:db8:6:1:a::5 path 1 flags 2 type IPv6
k2 ingress 2001:db8:6:1::10 2001:db8:6:1:a::5 5000 80 6 ACCEPT pkt 2001:db8:6:1::10 2001:db8:6:1:a::5 path - flags 2 type IPv6`},
		{"IPv6, refused", "send 1 k1 icmpv6 2001:db8:6:1::10 > 2001:db8:6:1::20 129/0 ident 4", `
k1 egress 2001:db8:6:1::10 2001:db8:6:1::20 0 0 58 ACCEPT pkt 2001:db8:6:1::10 2001:db8:6:1::20 path 1 flags 0 type IPv6
k2 ingress 2001:db8:6:1::10 2001:db8:6:1::20 0 0 58 REJECT pkt 2001:db8:6:1::10 2001:db8:6:1::20 path - flags 0 type IPv6`},
		{"neighbour discovery", "send 1 k1 icmpv6 2001:db8:6:1::10 > ff02::1:ff00:20 135/0 ident 0", ``},
		{"IPv6 services", "send 1 k1 udp [2001:db8:6:1::10]:5000 > [fd00:ec2::253]:53", ``},
		{"the VPC's services", "send 1 e1 udp 10.0.1.10:5000 > 10.0.0.2:53", ``},
	} {
		t.Run(c.name, func(t *testing.T) {
			send, err := Parse(c.send)
			if err != nil {
				t.Fatal(err)
			}
			script := append(append(Script{}, world...), send...)
			verdicts, _, err := script.Run(Defaults())
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, r := range verdicts[len(script)-1].Records {
				got = append(got, r.String())
			}
			if diff := cmp.Diff(strings.TrimSpace(c.want), strings.Join(got, "\n")); diff != "" {
				t.Errorf("%s: %s (-want +got):\n%s", c.send, verdicts[len(script)-1], diff)
			}
		})
	}
}
