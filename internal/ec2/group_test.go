package ec2

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

func TestSecurityGroupsByIDAndByName(t *testing.T) {
	group := func(id, name, in string) string {
		return `<item><groupId>` + id + `</groupId><groupName>` + name + `</groupName><vpcId>` + in + `</vpcId></item>`
	}
	c, requests := scripted(t, map[string][]answer{"DescribeSecurityGroups": {
		{200, `<r><securityGroupInfo>` + group("sg-1", "web", "vpc-2") + `</securityGroupInfo><nextToken>more</nextToken></r>`},
		{200, `<r><securityGroupInfo>` + group("sg-2", "app", "vpc-1") + `</securityGroupInfo></r>`},
		{200, `<r><securityGroupInfo>` + group("sg-3", "db", "vpc-1") + `</securityGroupInfo></r>`},
	}})
	got, err := c.SecurityGroups(t.Context(), "vpc-1", []vpc.SecurityGroupID{"sg-1", "sg-2"}, []string{"db"})
	want := []vpc.SecurityGroup{{ID: "sg-1", Name: "web", VPC: "vpc-2"}, {ID: "sg-2", Name: "app", VPC: "vpc-1"}, {ID: "sg-3", Name: "db", VPC: "vpc-1"}}
	if d := cmp.Diff(want, got); err != nil || d != "" {
		t.Errorf("%v\n%s", err, d)
	}
	asked := requests()
	if len(asked) != 3 || asked[0].Get("Filter.1.Name") != "group-id" || asked[0].Get("Filter.1.Value.2") != "sg-2" || asked[1].Get("NextToken") != "more" ||
		asked[2].Get("Filter.1.Name") != "vpc-id" || asked[2].Get("Filter.2.Value.1") != "db" || asked[2].Get("MaxResults") == "" {
		t.Errorf("asked %v", asked)
	}
}

func TestSecurityGroupRules(t *testing.T) {
	c, requests := scripted(t, map[string][]answer{"DescribeSecurityGroupRules": {
		{200, `<r><securityGroupRuleSet>
<item><securityGroupRuleId>sgr-3</securityGroupRuleId><groupId>sg-1</groupId><isEgress>true</isEgress><ipProtocol>-1</ipProtocol><fromPort>-1</fromPort><toPort>-1</toPort><cidrIpv4>0.0.0.0/0</cidrIpv4></item>
<item><securityGroupRuleId>sgr-2</securityGroupRuleId><groupId>sg-1</groupId><isEgress>false</isEgress><ipProtocol>tcp</ipProtocol><fromPort>80</fromPort><toPort>90</toPort><referencedGroupInfo><groupId>sg-2</groupId></referencedGroupInfo></item>
</securityGroupRuleSet><nextToken>more</nextToken></r>`},
		{200, `<r><securityGroupRuleSet>
<item><securityGroupRuleId>sgr-1</securityGroupRuleId><groupId>sg-1</groupId><isEgress>false</isEgress><ipProtocol>icmp</ipProtocol><fromPort>8</fromPort><toPort>-1</toPort><prefixListId>pl-1</prefixListId></item>
<item><securityGroupRuleId>sgr-0</securityGroupRuleId><groupId>sg-2</groupId><isEgress>false</isEgress><ipProtocol>50</ipProtocol><cidrIpv6>fd00::/8</cidrIpv6></item>
</securityGroupRuleSet></r>`},
		{503, fault("RequestLimitExceeded", "slow down")},
		{200, `<r><securityGroupRuleSet><item><securityGroupRuleId>sgr-9</securityGroupRuleId><ipProtocol>carrier-pigeon</ipProtocol></item></securityGroupRuleSet></r>`},
	}})
	got, err := c.SecurityGroupRules(t.Context(), []vpc.SecurityGroupID{"sg-1", "sg-2"})
	want := []vpc.SecurityGroupRule{
		{ID: "sgr-1", Group: "sg-1", Protocol: 1, FromPort: 8, ToPort: -1, PrefixList: "pl-1"},
		{ID: "sgr-2", Group: "sg-1", Protocol: 6, FromPort: 80, ToPort: 90, Referenced: "sg-2"},
		{ID: "sgr-3", Group: "sg-1", Egress: true, Protocol: -1, FromPort: -1, ToPort: -1, CIDR: netip.MustParsePrefix("0.0.0.0/0")},
		{ID: "sgr-0", Group: "sg-2", Protocol: 50, FromPort: -1, ToPort: -1, CIDR: netip.MustParsePrefix("fd00::/8")},
	}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{})); err != nil || d != "" {
		t.Errorf("%v\n%s", err, d)
	}
	if asked := requests(); len(asked) != 2 || asked[0].Get("Filter.1.Name") != "group-id" || asked[0].Get("MaxResults") == "" || asked[1].Get("Filter.1.Value.1") != "sg-1" {
		t.Errorf("asked %v", asked)
	}
	if _, err := c.SecurityGroupRules(t.Context(), []vpc.SecurityGroupID{"sg-1"}); err == nil {
		t.Error("a refused read has rules")
	} else if _, class := Outcome(err); class != ipam.ClassThrottled {
		t.Errorf("%v is of class %v", err, class)
	}
	if _, err := c.SecurityGroupRules(t.Context(), []vpc.SecurityGroupID{"sg-1"}); err == nil {
		t.Error("a rule that cannot be read is left out")
	}
}

func TestPrefixLists(t *testing.T) {
	c, _ := scripted(t, map[string][]answer{
		"DescribeManagedPrefixLists":  {{200, `<r><prefixListSet><item><prefixListId>pl-1</prefixListId><version>7</version></item><item><prefixListId>pl-2</prefixListId></item></prefixListSet></r>`}},
		"GetManagedPrefixListEntries": {{200, `<r><entrySet><item><cidr>10.0.0.0/8</cidr></item></entrySet><nextToken>more</nextToken></r>`}, {200, `<r><entrySet><item><cidr>192.0.2.1/32</cidr></item></entrySet></r>`}},
	})
	versions, err := c.PrefixListVersions(t.Context(), []vpc.PrefixListID{"pl-1", "pl-2", "pl-3"})
	if d := cmp.Diff(map[vpc.PrefixListID]int64{"pl-1": 7, "pl-2": 0}, versions); err != nil || d != "" {
		t.Errorf("%v\n%s", err, d)
	}
	entries, err := c.PrefixListEntries(t.Context(), "pl-1")
	if err != nil || len(entries) != 2 || entries[1] != netip.MustParsePrefix("192.0.2.1/32") {
		t.Errorf("%v, %v", entries, err)
	}
}
