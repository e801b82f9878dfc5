"""Drives the actions on IPv6 through boto3. See clients.py."""

from ec2client import ec2, equal, refused

made = ec2.create_vpc(CidrBlock="10.0.0.0/16", AmazonProvidedIpv6CidrBlock=True)["Vpc"]
vpc = made["VpcId"]
block = made["Ipv6CidrBlockAssociationSet"][0]["Ipv6CidrBlock"]
first = block.removesuffix("/56")
subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/24")["Subnet"]["SubnetId"]
association = ec2.associate_subnet_cidr_block(SubnetId=subnet, Ipv6CidrBlock=first + "/64")["Ipv6CidrBlockAssociation"]["AssociationId"]
found = ec2.describe_subnets(Filters=[{"Name": "ipv6-cidr-block-association.ipv6-cidr-block", "Values": [first + "/64"]}])["Subnets"]
equal([n["SubnetId"] for n in found], [subnet])

eni = ec2.create_network_interface(SubnetId=subnet, Ipv6AddressCount=1)["NetworkInterface"]
equal([a["Ipv6Address"] for a in eni["Ipv6Addresses"]], [first + "4"])
eni = eni["NetworkInterfaceId"]
equal(ec2.assign_ipv6_addresses(NetworkInterfaceId=eni, Ipv6Addresses=[first + "99"])["AssignedIpv6Addresses"], [first + "99"])
refused("InvalidIPAddress.InUse", ec2.assign_ipv6_addresses, NetworkInterfaceId=eni, Ipv6Addresses=[first + "99"])
equal(ec2.unassign_ipv6_addresses(NetworkInterfaceId=eni, Ipv6Addresses=[first + "4"])["UnassignedIpv6Addresses"], [first + "4"])
refused("InvalidCidrBlock.InUse", ec2.disassociate_subnet_cidr_block, AssociationId=association)

eigw = ec2.create_egress_only_internet_gateway(VpcId=vpc)["EgressOnlyInternetGateway"]["EgressOnlyInternetGatewayId"]
listed = ec2.get_paginator("describe_egress_only_internet_gateways").paginate().build_full_result()["EgressOnlyInternetGateways"]
equal([g["Attachments"][0] for g in listed], [{"State": "attached", "VpcId": vpc}])
table = ec2.describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["RouteTables"][0]
equal([r.get("DestinationIpv6CidrBlock") for r in table["Routes"]], [None, block])
ec2.create_route(RouteTableId=table["RouteTableId"], DestinationIpv6CidrBlock="::/0", EgressOnlyInternetGatewayId=eigw)
refused("DependencyViolation", ec2.delete_vpc, VpcId=vpc)

ec2.delete_egress_only_internet_gateway(EgressOnlyInternetGatewayId=eigw)
ec2.delete_network_interface(NetworkInterfaceId=eni)
ec2.disassociate_subnet_cidr_block(AssociationId=association)
ec2.delete_subnet(SubnetId=subnet)
ec2.delete_vpc(VpcId=vpc)
equal(ec2.describe_vpcs()["Vpcs"], [])
