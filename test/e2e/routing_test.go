package e2e

import (
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
)

// What the three clients of clients_test.go do with network ACLs, routes and
// what these lead to. boto3 does it in testdata/networks.py.

func cliRouting(c cli) {
	vpc := c.must("create-vpc --cidr-block 10.0.0.0/16", "Vpc.VpcId")
	subnet := c.must("create-subnet --cidr-block 10.0.0.0/24 --vpc-id "+vpc, "Subnet.SubnetId")
	eni := c.must("create-network-interface --subnet-id "+subnet, "NetworkInterface.NetworkInterfaceId")

	acl := c.must("create-network-acl --vpc-id "+vpc, "NetworkAcl.NetworkAclId")
	entry := " --ingress --network-acl-id " + acl + " --rule-number 100 "
	c.must("create-network-acl-entry --protocol tcp --port-range From=80,To=80 --cidr-block 0.0.0.0/0 --rule-action allow"+entry, "")
	c.must("replace-network-acl-entry --protocol icmp --icmp-type-code Type=8,Code=-1 --cidr-block 0.0.0.0/0 --rule-action allow"+entry, "")
	c.want("1 8", "describe-network-acls --network-acl-ids "+acl, "NetworkAcls[].Entries[?RuleNumber==`100`][].[Protocol,IcmpTypeCode.Type][]")
	c.must("delete-network-acl-entry"+entry, "")
	assoc := c.must("describe-network-acls --filters Name=association.subnet-id,Values="+subnet, "NetworkAcls[].Associations[].NetworkAclAssociationId")
	c.must("replace-network-acl-association --network-acl-id "+acl+" --association-id "+assoc, "NewAssociationId")
	c.refused("DependencyViolation", "delete-network-acl --network-acl-id "+acl)

	table := c.must("create-route-table --vpc-id "+vpc, "RouteTable.RouteTableId")
	tied := c.must("associate-route-table --route-table-id "+table+" --subnet-id "+subnet, "AssociationId")
	c.must("create-route --destination-cidr-block 192.168.0.0/16 --network-interface-id "+eni+" --route-table-id "+table, "")
	c.must("replace-route --destination-cidr-block 10.0.0.0/16 --local-target --route-table-id "+table, "")
	c.want("local "+eni, "describe-route-tables --route-table-ids "+table, "RouteTables[].Routes[].[GatewayId,NetworkInterfaceId][]")
	c.must("delete-route --destination-cidr-block 192.168.0.0/16 --route-table-id "+table, "")
	main := c.must("describe-route-tables --filters Name=association.main,Values=true Name=vpc-id,Values="+vpc, "RouteTables[].RouteTableId")
	tied = c.must("replace-route-table-association --association-id "+tied+" --route-table-id "+main, "NewAssociationId")
	c.must("disassociate-route-table --association-id "+tied, "")
	c.must("delete-route-table --route-table-id "+table, "")

	log := c.must("create-flow-logs --resource-type NetworkInterface --resource-ids "+eni+" --traffic-type REJECT --log-destination-type s3 --log-destination arn:aws:s3:::logs"+
		" --max-aggregation-interval 60 --destination-options FileFormat=parquet", "FlowLogIds[]")
	c.want("parquet", "describe-flow-logs --flow-log-ids "+log, "FlowLogs[].DestinationOptions.FileFormat")
	c.must("delete-flow-logs --flow-log-ids "+log, "")
	c.must("modify-network-interface-attribute --no-source-dest-check --network-interface-id "+eni, "")
	c.must("reset-network-interface-attribute --source-dest-check true --network-interface-id "+eni, "")
	c.want("True", "describe-network-interface-attribute --attribute sourceDestCheck --network-interface-id "+eni, "SourceDestCheck.Value")
	c.must("delete-network-interface --network-interface-id "+eni, "")
	c.must("delete-subnet --subnet-id "+subnet, "")
	c.must("delete-network-acl --network-acl-id "+acl, "")
	c.must("delete-vpc --vpc-id "+vpc, "")
}

func sdkRouting(t *testing.T, c *ec2.Client) {
	t.Helper()
	ctx := t.Context()
	s := aws.String
	vpc := ok[*ec2.CreateVpcOutput](t)(c.CreateVpc(ctx, &ec2.CreateVpcInput{CidrBlock: s("10.0.0.0/16")})).Vpc.VpcId
	subnet := ok[*ec2.CreateSubnetOutput](t)(c.CreateSubnet(ctx, &ec2.CreateSubnetInput{VpcId: vpc, CidrBlock: s("10.0.0.0/24")})).Subnet.SubnetId
	eni := ok[*ec2.CreateNetworkInterfaceOutput](t)(c.CreateNetworkInterface(ctx, &ec2.CreateNetworkInterfaceInput{SubnetId: subnet})).NetworkInterface.NetworkInterfaceId

	acl := ok[*ec2.CreateNetworkAclOutput](t)(c.CreateNetworkAcl(ctx, &ec2.CreateNetworkAclInput{VpcId: vpc})).NetworkAcl.NetworkAclId
	ok[*ec2.CreateNetworkAclEntryOutput](t)(c.CreateNetworkAclEntry(ctx, &ec2.CreateNetworkAclEntryInput{
		NetworkAclId: acl, RuleNumber: aws.Int32(100), Protocol: s("-1"), RuleAction: types.RuleActionAllow, Egress: aws.Bool(true), CidrBlock: s("0.0.0.0/0"),
	}))
	ok[*ec2.ReplaceNetworkAclEntryOutput](t)(c.ReplaceNetworkAclEntry(ctx, &ec2.ReplaceNetworkAclEntryInput{
		NetworkAclId: acl, RuleNumber: aws.Int32(100), Protocol: s("17"), RuleAction: types.RuleActionDeny, Egress: aws.Bool(true), CidrBlock: s("10.0.0.0/8"),
		PortRange: &types.PortRange{From: aws.Int32(53), To: aws.Int32(53)},
	}))
	tied := ok[*ec2.DescribeNetworkAclsOutput](t)(c.DescribeNetworkAcls(ctx, &ec2.DescribeNetworkAclsInput{
		Filters: []types.Filter{{Name: s("association.subnet-id"), Values: []string{*subnet}}},
	})).NetworkAcls[0]
	equal(t, *tied.IsDefault, true)
	moved := ok[*ec2.ReplaceNetworkAclAssociationOutput](t)(c.ReplaceNetworkAclAssociation(ctx, &ec2.ReplaceNetworkAclAssociationInput{
		AssociationId: tied.Associations[0].NetworkAclAssociationId, NetworkAclId: acl,
	})).NewAssociationId
	own := ok[*ec2.DescribeNetworkAclsOutput](t)(c.DescribeNetworkAcls(ctx, &ec2.DescribeNetworkAclsInput{NetworkAclIds: []string{*acl}})).NetworkAcls[0]
	equal(t, *own.Entries[0].PortRange.To, 53)
	equal(t, *own.Associations[0].NetworkAclAssociationId, *moved)
	ok[*ec2.DeleteNetworkAclEntryOutput](t)(c.DeleteNetworkAclEntry(ctx, &ec2.DeleteNetworkAclEntryInput{NetworkAclId: acl, RuleNumber: aws.Int32(100), Egress: aws.Bool(true)}))

	table := ok[*ec2.CreateRouteTableOutput](t)(c.CreateRouteTable(ctx, &ec2.CreateRouteTableInput{VpcId: vpc})).RouteTable.RouteTableId
	assoc := ok[*ec2.AssociateRouteTableOutput](t)(c.AssociateRouteTable(ctx, &ec2.AssociateRouteTableInput{RouteTableId: table, SubnetId: subnet})).AssociationId
	ok[*ec2.CreateRouteOutput](t)(c.CreateRoute(ctx, &ec2.CreateRouteInput{RouteTableId: table, DestinationCidrBlock: s("192.168.0.0/16"), NetworkInterfaceId: eni}))
	ok[*ec2.ReplaceRouteOutput](t)(c.ReplaceRoute(ctx, &ec2.ReplaceRouteInput{RouteTableId: table, DestinationCidrBlock: s("192.168.0.0/16"), NetworkInterfaceId: eni}))
	routes := ok[*ec2.DescribeRouteTablesOutput](t)(c.DescribeRouteTables(ctx, &ec2.DescribeRouteTablesInput{RouteTableIds: []string{*table}})).RouteTables[0].Routes
	equal(t, routes[0].Origin, types.RouteOriginCreateRouteTable)
	equal(t, routes[1].State, types.RouteStateBlackhole)
	ok[*ec2.DeleteRouteOutput](t)(c.DeleteRoute(ctx, &ec2.DeleteRouteInput{RouteTableId: table, DestinationCidrBlock: s("192.168.0.0/16")}))
	main := ok[*ec2.DescribeRouteTablesOutput](t)(c.DescribeRouteTables(ctx, &ec2.DescribeRouteTablesInput{Filters: []types.Filter{
		{Name: s("vpc-id"), Values: []string{*vpc}}, {Name: s("association.main"), Values: []string{"true"}},
	}})).RouteTables[0].RouteTableId
	assoc = ok[*ec2.ReplaceRouteTableAssociationOutput](t)(c.ReplaceRouteTableAssociation(ctx, &ec2.ReplaceRouteTableAssociationInput{AssociationId: assoc, RouteTableId: main})).NewAssociationId
	ok[*ec2.DisassociateRouteTableOutput](t)(c.DisassociateRouteTable(ctx, &ec2.DisassociateRouteTableInput{AssociationId: assoc}))
	ok[*ec2.DeleteRouteTableOutput](t)(c.DeleteRouteTable(ctx, &ec2.DeleteRouteTableInput{RouteTableId: table}))

	logs := ok[*ec2.CreateFlowLogsOutput](t)(c.CreateFlowLogs(ctx, &ec2.CreateFlowLogsInput{
		ResourceType: types.FlowLogsResourceTypeSubnet, ResourceIds: []string{*subnet}, TrafficType: types.TrafficTypeAccept,
		LogDestinationType: types.LogDestinationTypeS3, LogDestination: s("arn:aws:s3:::logs"), LogFormat: s("${pkt-srcaddr} ${flow-direction}"),
	})).FlowLogIds
	log := ok[*ec2.DescribeFlowLogsOutput](t)(c.DescribeFlowLogs(ctx, &ec2.DescribeFlowLogsInput{FlowLogIds: logs})).FlowLogs[0]
	equal(t, *log.MaxAggregationInterval, 600)
	equal(t, len(ok[*ec2.DeleteFlowLogsOutput](t)(c.DeleteFlowLogs(ctx, &ec2.DeleteFlowLogsInput{FlowLogIds: logs})).Unsuccessful), 0)

	ok[*ec2.ResetNetworkInterfaceAttributeOutput](t)(c.ResetNetworkInterfaceAttribute(ctx, &ec2.ResetNetworkInterfaceAttributeInput{NetworkInterfaceId: eni, SourceDestCheck: s("true")}))
	ok[*ec2.DeleteNetworkInterfaceOutput](t)(c.DeleteNetworkInterface(ctx, &ec2.DeleteNetworkInterfaceInput{NetworkInterfaceId: eni}))
	ok[*ec2.DeleteSubnetOutput](t)(c.DeleteSubnet(ctx, &ec2.DeleteSubnetInput{SubnetId: subnet}))
	ok[*ec2.DeleteNetworkAclOutput](t)(c.DeleteNetworkAcl(ctx, &ec2.DeleteNetworkAclInput{NetworkAclId: acl}))
	ok[*ec2.DeleteVpcOutput](t)(c.DeleteVpc(ctx, &ec2.DeleteVpcInput{VpcId: vpc}))
}

func cliGroups(c cli) {
	list := c.must("create-managed-prefix-list --prefix-list-name sites --max-entries 2 --address-family IPv4 --entries Cidr=192.0.2.0/24", "PrefixList.PrefixListId")
	c.want("2", "modify-managed-prefix-list --current-version 1 --add-entries Cidr=198.51.100.0/24 --prefix-list-id "+list, "PrefixList.Version")
	c.want("192.0.2.0/24 198.51.100.0/24", "get-managed-prefix-list-entries --prefix-list-id "+list, "Entries[].Cidr")
	c.want("modify-complete", "describe-managed-prefix-lists --prefix-list-ids "+list, "PrefixLists[].State")
	c.want("", "describe-prefix-lists", "PrefixLists[].PrefixListId")
	vpc := c.must("create-vpc --cidr-block 10.0.0.0/16", "Vpc.VpcId")
	sg := c.must("create-security-group --group-name app --description app --vpc-id "+vpc, "GroupId")
	rule := c.must("authorize-security-group-ingress --ip-permissions IpProtocol=tcp,FromPort=443,ToPort=443,PrefixListIds=[{PrefixListId="+list+"}] --group-id "+sg,
		"SecurityGroupRules[].SecurityGroupRuleId")
	c.want(sg, "get-managed-prefix-list-associations --prefix-list-id "+list, "PrefixListAssociations[].ResourceId")
	c.must("modify-security-group-rules --group-id "+sg+" --security-group-rules SecurityGroupRuleId="+rule+",SecurityGroupRule={IpProtocol=udp,FromPort=53,ToPort=53,CidrIpv4=10.0.0.0/8}", "")
	c.must("update-security-group-rule-descriptions-ingress --group-id "+sg+" --security-group-rule-descriptions SecurityGroupRuleId="+rule+",Description=dns", "")
	c.must("update-security-group-rule-descriptions-egress --group-id "+sg+" --ip-permissions IpProtocol=-1,IpRanges=[{CidrIp=0.0.0.0/0,Description=all}]", "")
	c.want("dns", "describe-security-group-rules --security-group-rule-ids "+rule, "SecurityGroupRules[].Description")
	c.must("describe-security-group-references --group-id "+sg, "")
	c.must("describe-stale-security-groups --vpc-id "+vpc, "")
	c.must("delete-managed-prefix-list --prefix-list-id "+list, "")
	c.must("delete-security-group --group-id "+sg, "")
	c.must("delete-vpc --vpc-id "+vpc, "")
}

func sdkGroups(t *testing.T, c *ec2.Client) {
	t.Helper()
	ctx := t.Context()
	s := aws.String
	list := ok[*ec2.CreateManagedPrefixListOutput](t)(c.CreateManagedPrefixList(ctx, &ec2.CreateManagedPrefixListInput{
		PrefixListName: s("sites"), MaxEntries: aws.Int32(2), AddressFamily: s("IPv4"), Entries: []types.AddPrefixListEntry{{Cidr: s("192.0.2.0/24")}},
	})).PrefixList.PrefixListId
	ok[*ec2.ModifyManagedPrefixListOutput](t)(c.ModifyManagedPrefixList(ctx, &ec2.ModifyManagedPrefixListInput{
		PrefixListId: list, CurrentVersion: aws.Int64(1), RemoveEntries: []types.RemovePrefixListEntry{{Cidr: s("192.0.2.0/24")}},
	}))
	equal(t, len(ok[*ec2.GetManagedPrefixListEntriesOutput](t)(c.GetManagedPrefixListEntries(ctx, &ec2.GetManagedPrefixListEntriesInput{PrefixListId: list})).Entries), 0)
	found := ok[*ec2.DescribeManagedPrefixListsOutput](t)(c.DescribeManagedPrefixLists(ctx, &ec2.DescribeManagedPrefixListsInput{PrefixListIds: []string{*list}})).PrefixLists[0]
	equal(t, found.State, types.PrefixListStateModifyComplete)
	ok[*ec2.DescribePrefixListsOutput](t)(c.DescribePrefixLists(ctx, &ec2.DescribePrefixListsInput{}))

	vpc := ok[*ec2.CreateVpcOutput](t)(c.CreateVpc(ctx, &ec2.CreateVpcInput{CidrBlock: s("10.0.0.0/16")})).Vpc.VpcId
	sg := ok[*ec2.CreateSecurityGroupOutput](t)(c.CreateSecurityGroup(ctx, &ec2.CreateSecurityGroupInput{GroupName: s("app"), Description: s("app"), VpcId: vpc})).GroupId
	rule := ok[*ec2.AuthorizeSecurityGroupIngressOutput](t)(c.AuthorizeSecurityGroupIngress(ctx, &ec2.AuthorizeSecurityGroupIngressInput{
		GroupId: sg, IpPermissions: []types.IpPermission{{IpProtocol: s("-1"), PrefixListIds: []types.PrefixListId{{PrefixListId: list}}}},
	})).SecurityGroupRules[0]
	equal(t, *rule.PrefixListId, *list)
	users := ok[*ec2.GetManagedPrefixListAssociationsOutput](t)(c.GetManagedPrefixListAssociations(ctx, &ec2.GetManagedPrefixListAssociationsInput{PrefixListId: list}))
	equal(t, *users.PrefixListAssociations[0].ResourceId, *sg)
	ok[*ec2.ModifySecurityGroupRulesOutput](t)(c.ModifySecurityGroupRules(ctx, &ec2.ModifySecurityGroupRulesInput{GroupId: sg, SecurityGroupRules: []types.SecurityGroupRuleUpdate{{
		SecurityGroupRuleId: rule.SecurityGroupRuleId,
		SecurityGroupRule:   &types.SecurityGroupRuleRequest{IpProtocol: s("icmp"), FromPort: aws.Int32(8), ToPort: aws.Int32(-1), ReferencedGroupId: sg},
	}}}))
	described := []types.SecurityGroupRuleDescription{{SecurityGroupRuleId: rule.SecurityGroupRuleId, Description: s("ping")}}
	ok[*ec2.UpdateSecurityGroupRuleDescriptionsIngressOutput](t)(c.UpdateSecurityGroupRuleDescriptionsIngress(ctx, &ec2.UpdateSecurityGroupRuleDescriptionsIngressInput{GroupId: sg, SecurityGroupRuleDescriptions: described}))
	_, err := c.UpdateSecurityGroupRuleDescriptionsEgress(ctx, &ec2.UpdateSecurityGroupRuleDescriptionsEgressInput{GroupId: sg, SecurityGroupRuleDescriptions: described})
	refused(t, "InvalidSecurityGroupRuleId.NotFound", err)
	ok[*ec2.UpdateSecurityGroupRuleDescriptionsEgressOutput](t)(c.UpdateSecurityGroupRuleDescriptionsEgress(ctx, &ec2.UpdateSecurityGroupRuleDescriptionsEgressInput{
		GroupId: sg, IpPermissions: []types.IpPermission{{IpProtocol: s("-1"), IpRanges: []types.IpRange{{CidrIp: s("0.0.0.0/0"), Description: s("all")}}}},
	}))
	equal(t, len(ok[*ec2.GetSecurityGroupsForVpcOutput](t)(c.GetSecurityGroupsForVpc(ctx, &ec2.GetSecurityGroupsForVpcInput{VpcId: vpc})).SecurityGroupForVpcs), 2)
	ok[*ec2.DescribeSecurityGroupReferencesOutput](t)(c.DescribeSecurityGroupReferences(ctx, &ec2.DescribeSecurityGroupReferencesInput{GroupId: []string{*sg}}))
	ok[*ec2.DescribeStaleSecurityGroupsOutput](t)(c.DescribeStaleSecurityGroups(ctx, &ec2.DescribeStaleSecurityGroupsInput{VpcId: vpc}))
	other := ok[*ec2.CreateVpcOutput](t)(c.CreateVpc(ctx, &ec2.CreateVpcInput{CidrBlock: s("10.1.0.0/16")})).Vpc.VpcId
	equal(t, ok[*ec2.AssociateSecurityGroupVpcOutput](t)(c.AssociateSecurityGroupVpc(ctx, &ec2.AssociateSecurityGroupVpcInput{GroupId: sg, VpcId: other})).State, types.SecurityGroupVpcAssociationStateAssociated)
	there := ok[*ec2.DescribeSecurityGroupVpcAssociationsOutput](t)(c.DescribeSecurityGroupVpcAssociations(ctx, &ec2.DescribeSecurityGroupVpcAssociationsInput{
		Filters: []types.Filter{{Name: s("group-id"), Values: []string{*sg}}},
	})).SecurityGroupVpcAssociations
	equal(t, len(there), 1)
	equal(t, *there[0].VpcId, *other)
	ok[*ec2.DisassociateSecurityGroupVpcOutput](t)(c.DisassociateSecurityGroupVpc(ctx, &ec2.DisassociateSecurityGroupVpcInput{GroupId: sg, VpcId: other}))
	ok[*ec2.DeleteVpcOutput](t)(c.DeleteVpc(ctx, &ec2.DeleteVpcInput{VpcId: other}))
	blocked := ok[*ec2.DescribeVpcBlockPublicAccessOptionsOutput](t)(c.DescribeVpcBlockPublicAccessOptions(ctx, &ec2.DescribeVpcBlockPublicAccessOptionsInput{}))
	equal(t, blocked.VpcBlockPublicAccessOptions.InternetGatewayBlockMode, types.InternetGatewayBlockModeOff)
	ok[*ec2.DeleteSecurityGroupOutput](t)(c.DeleteSecurityGroup(ctx, &ec2.DeleteSecurityGroupInput{GroupId: sg}))
	ok[*ec2.DeleteManagedPrefixListOutput](t)(c.DeleteManagedPrefixList(ctx, &ec2.DeleteManagedPrefixListInput{PrefixListId: list}))
	ok[*ec2.DeleteVpcOutput](t)(c.DeleteVpc(ctx, &ec2.DeleteVpcInput{VpcId: vpc}))
}
