package api

import (
	"fmt"
	"strings"
	"testing"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
)

func TestPrefixLists(t *testing.T) {
	w := newWorld(t)
	create := []string{"PrefixListName=offices", "MaxEntries=3", "AddressFamily=IPv4", "ClientToken=tok",
		"Entry.1.Cidr=198.51.100.7/24", "Entry.1.Description=one", "Entry.2.Cidr=192.0.2.0/24"}
	d := w.must("CreateManagedPrefixList", create...)
	id := d.get("prefixList.prefixListId")
	w.want(d, "prefixList.state", "create-in-progress")
	w.want(d, "prefixList.version", "1")
	w.want(d, "prefixList.prefixListArn", "arn:aws:ec2:us-east-1:123456789012:prefix-list/"+id)
	w.want(w.must("CreateManagedPrefixList", create...), "prefixList.prefixListId", id)
	create[1] = "MaxEntries=4"
	w.fails("IdempotentParameterMismatch", "CreateManagedPrefixList", create...)
	for _, c := range []struct {
		code   string
		params string
	}{
		{"InvalidParameterValue", "PrefixListName=com.amazonaws.x MaxEntries=1 AddressFamily=IPv4"},
		{"InvalidParameterValue", "PrefixListName=x MaxEntries=0 AddressFamily=IPv4"},
		{"InvalidParameterValue", "PrefixListName=x MaxEntries=1001 AddressFamily=IPv4"},
		{"InvalidParameterValue", "PrefixListName=x MaxEntries=1 AddressFamily=ipv4"},
		{"InvalidParameterValue", "PrefixListName=x MaxEntries=1 AddressFamily=IPv4 Entry.1.Cidr=2001:db8::/32"},
		{"InvalidParameterValue", "PrefixListName=x MaxEntries=1 AddressFamily=IPv6 Entry.1.Cidr=10.0.0.0/8"},
		{"InvalidParameterValue", "PrefixListName=x MaxEntries=2 AddressFamily=IPv4 Entry.1.Cidr=10.0.0.0/8 Entry.2.Cidr=10.1.0.0/8"},
		{"PrefixListMaxEntriesExceeded", "PrefixListName=x MaxEntries=1 AddressFamily=IPv4 Entry.1.Cidr=10.0.0.0/8 Entry.2.Cidr=11.0.0.0/8"},
	} {
		w.fails(c.code, "CreateManagedPrefixList", strings.Fields(c.params)...)
	}
	d = w.must("DescribeManagedPrefixLists", "Filter.1.Name=prefix-list-name", "Filter.1.Value.1=off*")
	w.want(d, "prefixListSet.state", "create-complete")
	w.want(d, "prefixListSet.maxEntries", "3")
	d = w.must("GetManagedPrefixListEntries", "PrefixListId="+id)
	w.want(d, "entrySet.cidr", "192.0.2.0/24,198.51.100.0/24")
	w.want(d, "entrySet.description", "one")

	modify := func(params ...string) []string { return append([]string{"PrefixListId=" + id}, params...) }
	d = w.must("ModifyManagedPrefixList", modify("CurrentVersion=1", "AddEntry.1.Cidr=203.0.113.0/24", "AddEntry.2.Cidr=192.0.2.0/24", "AddEntry.2.Description=two", "RemoveEntry.1.Cidr=198.51.100.0/24")...)
	w.want(d, "prefixList.version", "2")
	w.want(d, "prefixList.state", "modify-in-progress")
	w.want(w.must("GetManagedPrefixListEntries", "PrefixListId="+id), "entrySet.cidr", "192.0.2.0/24,203.0.113.0/24")
	w.want(w.must("GetManagedPrefixListEntries", "PrefixListId="+id, "TargetVersion=1"), "entrySet.cidr", "192.0.2.0/24,198.51.100.0/24")
	w.fails("InvalidParameterValue", "GetManagedPrefixListEntries", "PrefixListId="+id, "TargetVersion=3")
	w.fails("PrefixListVersionMismatch", "ModifyManagedPrefixList", modify("CurrentVersion=1", "AddEntry.1.Cidr=1.0.0.0/8")...)
	w.fails("MissingParameter", "ModifyManagedPrefixList", modify("AddEntry.1.Cidr=1.0.0.0/8")...)
	w.fails("MissingParameter", "ModifyManagedPrefixList", modify()...)
	w.fails("InvalidParameterCombination", "ModifyManagedPrefixList", modify("CurrentVersion=2", "MaxEntries=9", "AddEntry.1.Cidr=1.0.0.0/8")...)
	w.fails("InvalidParameterCombination", "ModifyManagedPrefixList", modify("CurrentVersion=2", "AddEntry.1.Cidr=192.0.2.0/24", "RemoveEntry.1.Cidr=192.0.2.0/24")...)
	w.fails("InvalidParameterValue", "ModifyManagedPrefixList", modify("CurrentVersion=2", "RemoveEntry.1.Cidr=1.0.0.0/8")...)
	w.fails("PrefixListMaxEntriesExceeded", "ModifyManagedPrefixList", modify("CurrentVersion=2", "AddEntry.1.Cidr=1.0.0.0/8", "AddEntry.2.Cidr=2.0.0.0/8")...)
	w.fails("PrefixListMaxEntriesExceeded", "ModifyManagedPrefixList", modify("MaxEntries=1")...)
	w.want(w.must("ModifyManagedPrefixList", modify("PrefixListName=sites")...), "prefixList.version", "2")
	for n := 2; n < 14; n++ {
		w.must("ModifyManagedPrefixList", modify(fmt.Sprintf("CurrentVersion=%d", n), "AddEntry.1.Cidr=192.0.2.0/24", fmt.Sprintf("AddEntry.1.Description=%d", n))...)
	}
	w.fails("InvalidParameterValue", "GetManagedPrefixListEntries", "PrefixListId="+id, "TargetVersion=4")
	w.restart()
	w.want(w.must("GetManagedPrefixListEntries", "PrefixListId="+id, "TargetVersion=5"), "entrySet.description", "4")
	page := w.must("GetManagedPrefixListEntries", "PrefixListId="+id, "MaxResults=1")
	w.want(page, "entrySet.cidr", "192.0.2.0/24")
	w.want(w.must("GetManagedPrefixListEntries", "PrefixListId="+id, "MaxResults=1", "NextToken="+page.get("nextToken")), "entrySet.cidr", "203.0.113.0/24")

	// Who uses it, it counts for with all the entries that it may have.
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	table := string(w.store.View().MainTable(vpc.VPCID(vpcID)).ID)
	group := w.must("CreateSecurityGroup", "GroupName=g", "GroupDescription=g", "VpcId="+vpcID).get("groupId")
	if err := w.chaos.Set(chaos.Settings{Throttle: "off", Quotas: map[chaos.Quota]int{chaos.QuotaRules: 4, chaos.QuotaRoutes: 6}}); err != nil {
		t.Fatal(err)
	}
	rule := []string{"GroupId=" + group, "IpPermissions.1.IpProtocol=tcp", "IpPermissions.1.FromPort=443", "IpPermissions.1.ToPort=443",
		"IpPermissions.1.PrefixListIds.1.PrefixListId=" + id, "IpPermissions.1.PrefixListIds.1.Description=sites"}
	w.want(w.must("AuthorizeSecurityGroupIngress", rule...), "securityGroupRuleSet.prefixListId", id)
	w.fails("InvalidPermission.Duplicate", "AuthorizeSecurityGroupIngress", rule...)
	rule[3] = "IpPermissions.1.ToPort=444"
	w.fails("RulesPerSecurityGroupLimitExceeded", "AuthorizeSecurityGroupIngress", rule...)
	w.want(w.must("DescribeSecurityGroups", "GroupId.1="+group), "securityGroupInfo.ipPermissions.prefixListIds.prefixListId", id)
	w.must("CreateRoute", "RouteTableId="+table, "DestinationPrefixListId="+id, "NetworkInterfaceId="+w.eni(subnet))
	w.want(w.must("DescribeRouteTables", "Filter.1.Name=route.destination-prefix-list-id", "Filter.1.Value.1="+id), rts+"routeTableId", table)
	w.want(w.must("GetManagedPrefixListAssociations", "PrefixListId="+id), "prefixListAssociationSet.resourceId", table+","+group)
	w.fails("DependencyViolation", "DeleteManagedPrefixList", "PrefixListId="+id)
	w.must("ModifyManagedPrefixList", modify("MaxEntries=4")...)
	w.must("ModifyManagedPrefixList", modify("MaxEntries=5")...)
	d = w.must("DescribeManagedPrefixLists", "PrefixListId.1="+id)
	w.want(d, "prefixListSet.state", "modify-failed")
	w.want(d, "prefixListSet.maxEntries", "4")
	rule[3] = "IpPermissions.1.ToPort=443"
	w.want(w.must("RevokeSecurityGroupIngress", rule...), "revokedSecurityGroupRuleSet.prefixListId", id)
	w.must("ModifyManagedPrefixList", modify("MaxEntries=5")...)
	w.must("DeleteRoute", "RouteTableId="+table, "DestinationPrefixListId="+id)
	w.want(w.must("DeleteManagedPrefixList", "PrefixListId="+id), "prefixList.state", "delete-in-progress")
	w.fails("InvalidPrefixListID.NotFound", "DescribeManagedPrefixLists", "PrefixListId.1="+id)

	w.want(w.must("DescribePrefixLists"), "prefixListSet.prefixListId", "")
	w.fails("InvalidPrefixListId.NotFound", "DescribePrefixLists", "PrefixListId.1=pl-00000000000000000")
}
