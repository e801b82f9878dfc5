package ec2

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestPeerCIDRs(t *testing.T) {
	side := func(which, id string, cidrs ...string) string {
		out := "<" + which + "><vpcId>" + id + "</vpcId><cidrBlockSet>"
		for _, c := range cidrs {
			out += "<item><cidrBlock>" + c + "</cidrBlock></item>"
		}
		return out + "</cidrBlockSet></" + which + ">"
	}
	item := func(sides ...string) string { return "<item>" + sides[0] + sides[1] + "</item>" }
	c, requests := scripted(t, map[string][]answer{"DescribeVpcPeeringConnections": {
		{200, `<r><vpcPeeringConnectionSet>` +
			item(side("requesterVpcInfo", "vpc-1", "10.0.0.0/16"), side("accepterVpcInfo", "vpc-2", "198.51.100.0/24", "10.2.0.0/16")) +
			item(side("requesterVpcInfo", "vpc-8", "10.8.0.0/16"), side("accepterVpcInfo", "vpc-9", "10.9.0.0/16")) +
			`</vpcPeeringConnectionSet><nextToken>more</nextToken></r>`},
		{200, `<r><vpcPeeringConnectionSet>` +
			item(side("requesterVpcInfo", "vpc-3", "203.0.113.0/24"), side("accepterVpcInfo", "vpc-1", "10.0.0.0/16")) +
			`</vpcPeeringConnectionSet></r>`},
		{200, `<r><vpcPeeringConnectionSet>` + item(side("requesterVpcInfo", "vpc-1"), side("accepterVpcInfo", "vpc-2", "everywhere")) + `</vpcPeeringConnectionSet></r>`},
	}})
	got, err := c.PeerCIDRs(t.Context(), "vpc-1")
	want := []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("10.2.0.0/16"), netip.MustParsePrefix("203.0.113.0/24")}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{})); err != nil || d != "" {
		t.Errorf("%v\n%s", err, d)
	}
	if asked := requests(); len(asked) != 2 || asked[0].Get("Filter.1.Value.1") != "active" || asked[1].Get("NextToken") != "more" {
		t.Errorf("asked %v", asked)
	}
	if _, err := c.PeerCIDRs(t.Context(), "vpc-1"); err == nil {
		t.Error("a range that cannot be read is left out")
	}
}
