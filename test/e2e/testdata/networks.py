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

# All of it goes
ec2.delete_network_interface(NetworkInterfaceId=eni)
ec2.delete_subnet(SubnetId=subnet)
ec2.delete_vpc(VpcId=vpc)
equal(ec2.describe_vpcs()["Vpcs"], [])
