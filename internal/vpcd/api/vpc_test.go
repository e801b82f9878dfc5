package api

import (
	"fmt"
	"strings"
	"testing"
)

func TestVPCLife(t *testing.T) {
	w := newWorld(t)
	made := w.must("CreateVpc", "CidrBlock=10.1.2.3/16", "TagSpecification.1.ResourceType=vpc", "TagSpecification.1.Tag.1.Key=Name", "TagSpecification.1.Tag.1.Value=one")
	id := made.get("vpc.vpcId")
	w.want(made, "vpc.cidrBlock", "10.1.0.0/16") // canonical
	w.want(made, "vpc.state", "pending")
	w.want(made, "vpc.tagSet.value", "one")
	d := w.must("DescribeVpcs", "VpcId.1="+id)
	w.want(d, "vpcSet.state", "available")
	w.want(d, "vpcSet.cidrBlockAssociationSet.cidrBlockState.state", "associated")

	groups := w.must("DescribeSecurityGroups", "Filter.1.Name=vpc-id", "Filter.1.Value.1="+id)
	w.want(groups, "securityGroupInfo.groupName", "default")
	w.want(groups, "securityGroupInfo.ipPermissions.groups.groupId", groups.get("securityGroupInfo.groupId"))
	w.want(groups, "securityGroupInfo.ipPermissionsEgress.ipRanges.cidrIp", "0.0.0.0/0")

	assoc := w.must("AssociateVpcCidrBlock", "VpcId="+id, "CidrBlock=10.2.0.0/16")
	w.want(assoc, "cidrBlockAssociation.cidrBlockState.state", "associating")
	w.want(w.must("DescribeVpcs"), "vpcSet.cidrBlockAssociationSet.cidrBlock", "10.1.0.0/16,10.2.0.0/16")
	subnet := w.must("CreateSubnet", "VpcId="+id, "CidrBlock=10.2.1.0/24", "AvailabilityZoneId=use1-az2")
	w.want(subnet, "subnet.availabilityZone", "us-east-1b")
	w.want(subnet, "subnet.availableIpAddressCount", "251")
	assocID := assoc.get("cidrBlockAssociation.associationId")
	w.fails("DependencyViolation", "DisassociateVpcCidrBlock", "AssociationId="+assocID)
	w.fails("DependencyViolation", "DeleteVpc", "VpcId="+id)
	w.want(w.must("DeleteSubnet", "SubnetId="+subnet.get("subnet.subnetId")), "return", "true")
	w.want(w.must("DisassociateVpcCidrBlock", "AssociationId="+assocID), "cidrBlockAssociation.cidrBlockState.state", "disassociating")

	w.must("ModifyVpcAttribute", "VpcId="+id, "EnableDnsHostnames.Value=true")
	w.want(w.must("DescribeVpcAttribute", "VpcId="+id, "Attribute=enableDnsHostnames"), "enableDnsHostnames.value", "true")
	w.want(w.must("DescribeVpcAttribute", "VpcId="+id, "Attribute=enableDnsSupport"), "enableDnsSupport.value", "true")

	w.must("DeleteVpc", "VpcId="+id)
	w.fails("InvalidVpcID.NotFound", "DescribeVpcs", "VpcId.1="+id)
	if n := w.store.View().Groups.Len() + w.store.View().Tags.Len(); n != 0 {
		t.Errorf("%d groups and tags outlive the VPC", n)
	}
}

func TestVPCErrors(t *testing.T) {
	w := newWorld(t)
	id, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	gone := "vpc-00000000000000000"
	for _, c := range []struct {
		code, action string
		params       []string
	}{
		{"MissingParameter", "CreateVpc", nil},
		{"InvalidParameterValue", "CreateVpc", []string{"CidrBlock=10.0.0.0"}},
		{"InvalidParameterValue", "CreateVpc", []string{"CidrBlock=fd00::/56"}},
		{"InvalidVpc.Range", "CreateVpc", []string{"CidrBlock=10.0.0.0/15"}},
		{"InvalidVpc.Range", "CreateVpc", []string{"CidrBlock=10.0.0.0/29"}},
		{"UnsupportedOperation", "CreateVpc", []string{"CidrBlock=10.0.0.0/16", "Ipv6CidrBlock=2001:db8::/56"}},
		{"InvalidParameterValue", "CreateVpc", []string{"CidrBlock=10.0.0.0/16", "TagSpecification.1.ResourceType=subnet", "TagSpecification.1.Tag.1.Key=a"}},
		{"InvalidVpcID.NotFound", "DeleteVpc", []string{"VpcId=" + gone}},
		{"InvalidVpcId.Malformed", "DeleteVpc", []string{"VpcId=nonsense"}},
		{"MissingParameter", "DeleteVpc", nil},
		{"InvalidParameterCombination", "ModifyVpcAttribute", []string{"VpcId=" + id, "EnableDnsHostnames.Value=true", "EnableDnsSupport.Value=true"}},
		{"InvalidParameterCombination", "ModifyVpcAttribute", []string{"VpcId=" + id}},
		{"CidrConflict", "AssociateVpcCidrBlock", []string{"VpcId=" + id, "CidrBlock=10.0.128.0/20"}},
		{"InvalidVpc.Range", "AssociateVpcCidrBlock", []string{"VpcId=" + id, "CidrBlock=192.168.0.0/24"}},
		{"InvalidVpcCidrBlockAssociationID.NotFound", "DisassociateVpcCidrBlock", []string{"AssociationId=vpc-cidr-assoc-00000000000000000"}},
		{"OperationNotPermitted", "DisassociateVpcCidrBlock", []string{"AssociationId=" + w.must("DescribeVpcs").get("vpcSet.cidrBlockAssociationSet.associationId")}},
		{"InvalidSubnet.Range", "CreateSubnet", []string{"VpcId=" + id, "CidrBlock=10.1.0.0/24"}},
		{"InvalidSubnet.Range", "CreateSubnet", []string{"VpcId=" + id, "CidrBlock=10.0.0.0/29"}},
		{"InvalidSubnet.Conflict", "CreateSubnet", []string{"VpcId=" + id, "CidrBlock=10.0.0.128/25"}},
		{"InvalidParameterValue", "CreateSubnet", []string{"VpcId=" + id, "CidrBlock=10.0.1.0/24", "AvailabilityZone=us-east-1z"}},
		{"InvalidVpcID.NotFound", "CreateSubnet", []string{"VpcId=" + gone, "CidrBlock=10.0.1.0/24"}},
		{"InvalidSubnet.Range", "CreateSubnet", []string{"VpcId=" + id, "CidrBlock=10.0.1.0/24", "Ipv6CidrBlock=2001:db8::/64"}},
		{"InvalidSubnetID.NotFound", "DeleteSubnet", []string{"SubnetId=subnet-00000000000000000"}},
		{"InvalidSubnetId.Malformed", "DescribeSubnets", []string{"SubnetId.1=vpc-00000000000000000"}},
		{"UnsupportedOperation", "ModifySubnetAttribute", []string{"SubnetId=" + subnet, "MapPublicIpOnLaunch.Value=true"}},
		{"InvalidParameterValue", "DescribeVpcs", []string{"Filter.1.Name=colour", "Filter.1.Value.1=red"}},
		{"InvalidParameterValue", "DescribeAvailabilityZones", []string{"ZoneName.1=us-east-1z"}},
		{"InvalidParameterValue", "DescribeRegions", []string{"RegionName.1=mars-1"}},
		{"DryRunOperation", "DeleteVpc", []string{"VpcId=" + id, "DryRun=true"}},
	} {
		w.fails(c.code, c.action, c.params...)
	}
	w.want(w.must("DescribeSubnets", "Filter.1.Name=map-public-ip-on-launch", "Filter.1.Value.1=false"), "subnetSet.subnetId", subnet)
}

func TestCIDRLimit(t *testing.T) {
	w := newWorld(t)
	id, _ := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	for i := range 5 - 1 {
		w.must("AssociateVpcCidrBlock", "VpcId="+id, fmt.Sprintf("CidrBlock=10.%d.0.0/16", i+1))
	}
	w.fails("CidrLimitExceeded", "AssociateVpcCidrBlock", "VpcId="+id, "CidrBlock=10.200.0.0/16")
}

func TestZonesAndRegions(t *testing.T) {
	w := newWorld(t)
	z := w.must("DescribeAvailabilityZones", "Filter.1.Name=zone-name", "Filter.1.Value.1=*b")
	w.want(z, "availabilityZoneInfo.zoneName", "us-east-1b")
	w.want(z, "availabilityZoneInfo.zoneId", "use1-az2")
	w.want(w.must("DescribeAvailabilityZones"), "availabilityZoneInfo.zoneState", "available,available,available")
	w.want(w.must("DescribeRegions"), "regionInfo.regionName", "us-east-1")
	w.want(w.must("DescribeAccountAttributes", "AttributeName.1=supported-platforms"), "accountAttributeSet.attributeValueSet.attributeValue", "VPC")
	for region, want := range map[string]string{"eu-central-1": "euc1-az1", "ap-northeast-2": "apne2-az1", "us-gov-west-1": "usgw1-az1"} {
		if z := zonesOf(region, 2); z[0].id != want || z[1].name != region+"b" {
			t.Errorf("%s: %v", region, z)
		}
	}
}

func TestPagination(t *testing.T) {
	w := newWorld(t)
	id, _ := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	for i := range 11 {
		w.must("CreateSubnet", "VpcId="+id, fmt.Sprintf("CidrBlock=10.0.%d.0/24", i+1))
	}
	var seen []string
	filter := []string{"Filter.1.Name=vpc-id", "Filter.1.Value.1=" + id, "MaxResults=5"}
	token := ""
	for pages := 1; ; pages++ {
		n := w.must("DescribeSubnets", append(filter, "NextToken="+token)...)
		got := strings.Split(n.get("subnetSet.subnetId"), ",")
		seen = append(seen, got...)
		if token = n.get("nextToken"); token == "" {
			if pages != 3 || len(got) != 2 {
				t.Errorf("%d pages, %d on the last", pages, len(got))
			}
			break
		}
	}
	unique := map[string]bool{}
	for _, s := range seen {
		unique[s] = true
	}
	if len(unique) != 12 || len(seen) != 12 {
		t.Errorf("saw %d, %d different; want 12", len(seen), len(unique))
	}
	token = w.must("DescribeSubnets", "MaxResults=5").get("nextToken")
	w.must("DescribeSubnets", "MaxResults=5", "NextToken="+token)
	w.fails("InvalidPaginationToken", "DescribeSubnets", "NextToken=garbage")
	w.fails("InvalidPaginationToken", "DescribeSubnets", append(filter, "NextToken="+token)...) // another request's
	w.fails("InvalidPaginationToken", "DescribeVpcs", "NextToken="+token)
	w.fails("InvalidParameterCombination", "DescribeSubnets", "MaxResults=5", "SubnetId.1="+seen[0])
	w.want(w.must("DescribeSubnets", "SubnetId.1="+seen[0], "SubnetId.2="+seen[0]), "subnetSet.subnetId", seen[0])
	if _, status := w.post("DescribeSubnets", "MaxResults=4"); status != 400 {
		t.Error("MaxResults=4 is taken")
	}
	// Exactly as many as there are: no further page.
	w.want(w.must("DescribeSubnets", "MaxResults=12"), "nextToken", "")
}

func TestTags(t *testing.T) {
	w := newWorld(t)
	id, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	w.must("CreateTags", "ResourceId.1="+id, "ResourceId.2="+subnet, "Tag.1.Key=team", "Tag.1.Value=net", "Tag.2.Key=empty", "Tag.2.Value=")
	w.want(w.must("DescribeTags"), "tagSet.key", "empty,team,empty,team")
	w.want(w.must("DescribeTags", "Filter.1.Name=resource-type", "Filter.1.Value.1=vpc", "Filter.2.Name=tag:team", "Filter.2.Value.1=n*"), "tagSet.resourceId", id)
	w.want(w.must("DescribeSubnets", "Filter.1.Name=tag:team", "Filter.1.Value.1=net"), "subnetSet.subnetId", subnet)
	w.want(w.must("DescribeSubnets", "Filter.1.Name=tag-key", "Filter.1.Value.1=other"), "subnetSet.subnetId", "")
	w.must("DeleteTags", "ResourceId.1="+id, "Tag.1.Key=team", "Tag.1.Value=other") // another value: stays
	w.must("DeleteTags", "ResourceId.1="+id, "Tag.1.Key=empty", "Tag.1.Value=")
	w.want(w.must("DescribeTags", "Filter.1.Name=resource-id", "Filter.1.Value.1="+id), "tagSet.key", "team")
	w.must("DeleteTags", "ResourceId.1="+subnet)
	w.want(w.must("DescribeTags"), "tagSet.resourceId", id)

	many := []string{"ResourceId.1=" + id}
	for i := range 50 {
		many = append(many, fmt.Sprintf("Tag.%d.Key=k%d", i+1, i), fmt.Sprintf("Tag.%d.Value=v", i+1))
	}
	w.fails("TagLimitExceeded", "CreateTags", many...)
	for _, c := range []struct {
		code   string
		params []string
	}{
		{"InvalidTagKey.Malformed", []string{"ResourceId.1=" + id, "Tag.1.Key=aws:x", "Tag.1.Value=y"}},
		{"InvalidParameterValue", []string{"ResourceId.1=" + id, "Tag.1.Key=" + strings.Repeat("k", 129), "Tag.1.Value=y"}},
		{"InvalidParameterValue", []string{"ResourceId.1=" + id, "Tag.1.Key=k", "Tag.1.Value=" + strings.Repeat("v", 257)}},
		{"InvalidParameterValue", []string{"ResourceId.1=" + id, "Tag.1.Key=k", "Tag.1.Value=a", "Tag.2.Key=k", "Tag.2.Value=b"}},
		{"InvalidVpcID.NotFound", []string{"ResourceId.1=vpc-00000000000000000", "Tag.1.Key=k", "Tag.1.Value=v"}},
		{"InvalidID", []string{"ResourceId.1=vol-00000000000000000", "Tag.1.Key=k", "Tag.1.Value=v"}},
		{"InvalidID", []string{"ResourceId.1=nonsense", "Tag.1.Key=k", "Tag.1.Value=v"}},
	} {
		w.fails(c.code, "CreateTags", c.params...)
	}
	// A failing resource spoils the whole call.
	w.fails("InvalidSubnetID.NotFound", "CreateTags", "ResourceId.1="+id, "ResourceId.2=subnet-00000000000000000", "Tag.1.Key=new", "Tag.1.Value=v")
	w.want(w.must("DescribeTags"), "tagSet.key", "team")
}

func TestLike(t *testing.T) {
	for _, c := range []struct {
		pattern, s string
		want       bool
	}{
		{"", "", true}, {"", "a", false}, {"abc", "abc", true}, {"abc", "ABC", false},
		{"*", "", true}, {"*", "x", true}, {"a*c", "abbbc", true}, {"a*c", "ab", false}, {"a*b*c", "axbxbxc", true},
		{"a?c", "abc", true}, {"a?c", "ac", false}, {"?*", "", false}, {"**", "x", true},
		{`a\*c`, "a*c", true}, {`a\*c`, "abc", false}, {`a\?`, "a?", true}, {`a\\b`, `a\b`, true}, {`a\`, `a\`, true},
		{"*.*", "m5.large", true}, {"eni-*1", "eni-0121", true}, {"*a*a*a*a*a*b", strings.Repeat("a", 200), false},
	} {
		if got := like(c.pattern, c.s); got != c.want {
			t.Errorf("like(%q, %q) = %v", c.pattern, c.s, got)
		}
	}
}

// FuzzLike compares with the plain recursive definition.
func FuzzLike(f *testing.F) {
	f.Add("a*b?c", "axxbyc")
	f.Add(`\*\`, `*\`)
	f.Fuzz(func(t *testing.T, pattern, s string) {
		if len(pattern) > 12 || len(s) > 24 {
			return
		}
		if got, want := like(pattern, s), slowLike(pattern, s); got != want {
			t.Errorf("like(%q, %q) = %v, want %v", pattern, s, got, want)
		}
	})
}

func slowLike(p, s string) bool {
	switch {
	case p == "":
		return s == ""
	case p[0] == '*':
		return slowLike(p[1:], s) || s != "" && slowLike(p, s[1:])
	case s == "":
		return false
	case p[0] == '?':
		return slowLike(p[1:], s[1:])
	case p[0] == '\\' && len(p) > 1:
		return p[1] == s[0] && slowLike(p[2:], s[1:])
	default:
		return p[0] == s[0] && slowLike(p[1:], s[1:])
	}
}
