"""Drives the actions on what a VPC routes and filters with through boto3. See
clients.py."""

from ec2client import ec2, equal, refused, tagged, until, wait

vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/24")["Subnet"]["SubnetId"]
eni = ec2.create_network_interface(SubnetId=subnet)["NetworkInterface"]["NetworkInterfaceId"]


def of_vpc(name):
    return ec2.get_paginator(name).paginate(Filters=[{"Name": "vpc-id", "Values": [vpc]}]).build_full_result()


# Network ACLs
acls = of_vpc("describe_network_acls")["NetworkAcls"]
equal([(a["IsDefault"], len(a["Entries"]), a["Associations"][0]["SubnetId"]) for a in acls], [(True, 4, subnet)])
acl = ec2.create_network_acl(VpcId=vpc, TagSpecifications=tagged("network-acl", Name="own"))["NetworkAcl"]["NetworkAclId"]
entry = dict(NetworkAclId=acl, RuleNumber=100, Protocol="6", RuleAction="allow", Egress=False, CidrBlock="0.0.0.0/0", PortRange={"From": 443, "To": 443})
ec2.create_network_acl_entry(**entry)
refused("NetworkAclEntryAlreadyExists", ec2.create_network_acl_entry, **entry)
ec2.replace_network_acl_entry(**entry | {"RuleAction": "deny"})
moved = ec2.replace_network_acl_association(AssociationId=acls[0]["Associations"][0]["NetworkAclAssociationId"], NetworkAclId=acl)["NewAssociationId"]
own = ec2.describe_network_acls(NetworkAclIds=[acl])["NetworkAcls"][0]
equal(own["Associations"][0]["NetworkAclAssociationId"], moved)
equal([e["RuleAction"] for e in own["Entries"] if e["RuleNumber"] == 100], ["deny"])
ec2.delete_network_acl_entry(NetworkAclId=acl, RuleNumber=100, Egress=False)
ec2.replace_network_acl_association(AssociationId=moved, NetworkAclId=acls[0]["NetworkAclId"])
ec2.delete_network_acl(NetworkAclId=acl)

# Route tables
main = of_vpc("describe_route_tables")["RouteTables"][0]
equal([(r["DestinationCidrBlock"], r["GatewayId"], r["State"]) for r in main["Routes"]], [("10.0.0.0/16", "local", "active")])
table = ec2.create_route_table(VpcId=vpc)["RouteTable"]["RouteTableId"]
association = ec2.associate_route_table(RouteTableId=table, SubnetId=subnet)["AssociationId"]
equal(ec2.create_route(RouteTableId=table, DestinationCidrBlock="192.168.0.0/16", NetworkInterfaceId=eni)["Return"], True)
ec2.replace_route(RouteTableId=table, DestinationCidrBlock="10.0.0.0/16", NetworkInterfaceId=eni)
routes = ec2.describe_route_tables(RouteTableIds=[table])["RouteTables"][0]["Routes"]
equal([(r["NetworkInterfaceId"], r["State"]) for r in routes], [(eni, "blackhole")] * 2)
ec2.replace_route(RouteTableId=table, DestinationCidrBlock="10.0.0.0/16", LocalTarget=True)
ec2.delete_route(RouteTableId=table, DestinationCidrBlock="192.168.0.0/16")
association = ec2.replace_route_table_association(AssociationId=association, RouteTableId=main["RouteTableId"])["NewAssociationId"]
ec2.disassociate_route_table(AssociationId=association)
refused("DependencyViolation", ec2.delete_route_table, RouteTableId=main["RouteTableId"])
ec2.delete_route_table(RouteTableId=table)

# Prefix lists
plist = ec2.create_managed_prefix_list(PrefixListName="sites", MaxEntries=3, AddressFamily="IPv4", Entries=[{"Cidr": "192.0.2.0/24"}])["PrefixList"]["PrefixListId"]
changed = ec2.modify_managed_prefix_list(PrefixListId=plist, CurrentVersion=1, AddEntries=[{"Cidr": "198.51.100.0/24"}])["PrefixList"]
equal((changed["Version"], changed["State"]), (2, "modify-in-progress"))
found = ec2.get_paginator("describe_managed_prefix_lists").paginate(PrefixListIds=[plist]).build_full_result()["PrefixLists"]
equal([p["State"] for p in found], ["modify-complete"])
held = ec2.get_paginator("get_managed_prefix_list_entries").paginate(PrefixListId=plist, PaginationConfig={"PageSize": 1}).build_full_result()["Entries"]
equal([e["Cidr"] for e in held], ["192.0.2.0/24", "198.51.100.0/24"])
equal(ec2.get_paginator("describe_prefix_lists").paginate().build_full_result()["PrefixLists"], [])

# More on groups
sg = ec2.create_security_group(GroupName="app", Description="app", VpcId=vpc)["GroupId"]
peers = [{"IpProtocol": "tcp", "FromPort": 443, "ToPort": 443, "PrefixListIds": [{"PrefixListId": plist}]}]
rule = ec2.authorize_security_group_ingress(GroupId=sg, IpPermissions=peers)["SecurityGroupRules"][0]
equal(rule["PrefixListId"], plist)
equal(ec2.get_managed_prefix_list_associations(PrefixListId=plist)["PrefixListAssociations"][0]["ResourceId"], sg)
refused("DependencyViolation", ec2.delete_managed_prefix_list, PrefixListId=plist)
ec2.update_security_group_rule_descriptions_ingress(GroupId=sg, IpPermissions=[peers[0] | {"PrefixListIds": [{"PrefixListId": plist, "Description": "sites"}]}])
ec2.update_security_group_rule_descriptions_egress(GroupId=sg, IpPermissions=[{"IpProtocol": "-1", "IpRanges": [{"CidrIp": "0.0.0.0/0", "Description": "all"}]}])
described = ec2.describe_security_groups(GroupIds=[sg])["SecurityGroups"][0]
equal(described["IpPermissions"][0]["PrefixListIds"], [{"PrefixListId": plist, "Description": "sites"}])
ec2.modify_security_group_rules(GroupId=sg, SecurityGroupRules=[
    {"SecurityGroupRuleId": rule["SecurityGroupRuleId"], "SecurityGroupRule": {"IpProtocol": "udp", "FromPort": 53, "ToPort": 53, "CidrIpv4": "10.0.0.0/8"}}])
equal(ec2.describe_security_group_rules(SecurityGroupRuleIds=[rule["SecurityGroupRuleId"]])["SecurityGroupRules"][0]["IpProtocol"], "udp")
if "get_security_groups_for_vpc" in dir(ec2):  # newer than some boto3
    equal(len(ec2.get_paginator("get_security_groups_for_vpc").paginate(VpcId=vpc).build_full_result()["SecurityGroupForVpcs"]), 2)
equal(ec2.describe_security_group_references(GroupId=[sg])["SecurityGroupReferenceSet"], [])
equal(ec2.get_paginator("describe_stale_security_groups").paginate(VpcId=vpc).build_full_result()["StaleSecurityGroupSet"], [])
ec2.delete_security_group(GroupId=sg)
ec2.delete_managed_prefix_list(PrefixListId=plist)

# Gateways and Elastic IPs
igw = ec2.create_internet_gateway(TagSpecifications=tagged("internet-gateway", Name="py"))["InternetGateway"]["InternetGatewayId"]
refused("Gateway.NotAttached", ec2.create_route, RouteTableId=main["RouteTableId"], DestinationCidrBlock="0.0.0.0/0", GatewayId=igw)
ec2.attach_internet_gateway(InternetGatewayId=igw, VpcId=vpc)
wait("internet_gateway_exists", InternetGatewayIds=[igw])
attached = ec2.get_paginator("describe_internet_gateways").paginate(Filters=[{"Name": "tag:Name", "Values": ["py"]}]).build_full_result()
equal(attached["InternetGateways"][0]["Attachments"], [{"State": "available", "VpcId": vpc}])
address = ec2.allocate_address(Domain="vpc")
association = ec2.associate_address(AllocationId=address["AllocationId"], NetworkInterfaceId=eni)["AssociationId"]
equal(ec2.describe_addresses(PublicIps=[address["PublicIp"]])["Addresses"][0]["AssociationId"], association)
equal(ec2.describe_network_interfaces(NetworkInterfaceIds=[eni])["NetworkInterfaces"][0]["Association"]["PublicIp"], address["PublicIp"])
refused("DependencyViolation", ec2.detach_internet_gateway, InternetGatewayId=igw, VpcId=vpc)
ec2.disassociate_address(AssociationId=association)
nat = ec2.create_nat_gateway(SubnetId=subnet, AllocationId=address["AllocationId"], ClientToken="nat-1")["NatGateway"]["NatGatewayId"]
wait("nat_gateway_available", NatGatewayIds=[nat])
gateway = ec2.get_paginator("describe_nat_gateways").paginate(Filters=[{"Name": "vpc-id", "Values": [vpc]}]).build_full_result()["NatGateways"][0]
equal(gateway["NatGatewayAddresses"][0]["PublicIp"], address["PublicIp"])
ec2.create_route(RouteTableId=main["RouteTableId"], DestinationCidrBlock="0.0.0.0/0", NatGatewayId=nat)
ec2.delete_nat_gateway(NatGatewayId=nat)
until("deleted", lambda: ec2.describe_nat_gateways(NatGatewayIds=[nat])["NatGateways"][0]["State"] == "deleted")
equal([r["State"] for r in of_vpc("describe_route_tables")["RouteTables"][0]["Routes"]], ["active", "blackhole"])
ec2.release_address(AllocationId=address["AllocationId"])
ec2.detach_internet_gateway(InternetGatewayId=igw, VpcId=vpc)
ec2.delete_internet_gateway(InternetGatewayId=igw)

# Peering
peer = ec2.create_vpc(CidrBlock="10.1.0.0/16")["Vpc"]["VpcId"]
pcx = ec2.create_vpc_peering_connection(VpcId=vpc, PeerVpcId=peer)["VpcPeeringConnection"]["VpcPeeringConnectionId"]
wait("vpc_peering_connection_exists", VpcPeeringConnectionIds=[pcx])
equal(ec2.accept_vpc_peering_connection(VpcPeeringConnectionId=pcx)["VpcPeeringConnection"]["Status"]["Code"], "provisioning")
options = {"AllowDnsResolutionFromRemoteVpc": True}
equal(ec2.modify_vpc_peering_connection_options(VpcPeeringConnectionId=pcx, AccepterPeeringConnectionOptions=options)["AccepterPeeringConnectionOptions"], options)
found = ec2.get_paginator("describe_vpc_peering_connections").paginate(Filters=[{"Name": "status-code", "Values": ["active"]}]).build_full_result()
equal([p["VpcPeeringConnectionId"] for p in found["VpcPeeringConnections"]], [pcx])
ec2.delete_vpc_peering_connection(VpcPeeringConnectionId=pcx)
wait("vpc_peering_connection_deleted", VpcPeeringConnectionIds=[pcx])
pcx = ec2.create_vpc_peering_connection(VpcId=peer, PeerVpcId=vpc)["VpcPeeringConnection"]["VpcPeeringConnectionId"]
ec2.reject_vpc_peering_connection(VpcPeeringConnectionId=pcx)
refused("InvalidStateTransition", ec2.accept_vpc_peering_connection, VpcPeeringConnectionId=pcx)

# DHCP options
dopt = ec2.create_dhcp_options(DhcpConfigurations=[{"Key": "domain-name", "Values": ["example.org"]}])["DhcpOptions"]["DhcpOptionsId"]
ec2.associate_dhcp_options(DhcpOptionsId=dopt, VpcId=peer)
sets = ec2.get_paginator("describe_dhcp_options").paginate(Filters=[{"Name": "key", "Values": ["domain-name"]}]).build_full_result()["DhcpOptions"]
equal(len(sets), 2)
ec2.associate_dhcp_options(DhcpOptionsId="default", VpcId=peer)
ec2.delete_dhcp_options(DhcpOptionsId=dopt)
ec2.delete_vpc(VpcId=peer)

# Flow logs
to = dict(TrafficType="ALL", LogDestinationType="s3", LogDestination="arn:aws:s3:::logs/py/")
made = ec2.create_flow_logs(ResourceType="VPC", ResourceIds=[vpc], **to)
equal((len(made["FlowLogIds"]), made["Unsuccessful"]), (1, []))
again = ec2.create_flow_logs(ResourceType="VPC", ResourceIds=[vpc], **to)["Unsuccessful"]
equal([u["Error"]["Code"] for u in again], ["FlowLogAlreadyExists"])
logs = ec2.get_paginator("describe_flow_logs").paginate(Filters=[{"Name": "resource-id", "Values": [vpc]}]).build_full_result()["FlowLogs"]
equal([f["FlowLogId"] for f in logs], made["FlowLogIds"])
equal(ec2.delete_flow_logs(FlowLogIds=made["FlowLogIds"])["Unsuccessful"], [])

# All of it goes
ec2.modify_network_interface_attribute(NetworkInterfaceId=eni, SourceDestCheck={"Value": False})
ec2.reset_network_interface_attribute(NetworkInterfaceId=eni, SourceDestCheck="true")
equal(ec2.describe_network_interfaces(NetworkInterfaceIds=[eni])["NetworkInterfaces"][0]["SourceDestCheck"], True)
ec2.delete_network_interface(NetworkInterfaceId=eni)
ec2.delete_subnet(SubnetId=subnet)
ec2.delete_vpc(VpcId=vpc)
equal(ec2.describe_vpcs()["Vpcs"], [])
