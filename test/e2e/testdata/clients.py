"""Drives the actions on VPCs, groups, instances and interfaces through boto3, as
its documentation shows: waiters, paginators and ClientError included. The
endpoint is the only argument. Exits non-zero with a traceback when something is
not as on EC2."""

from ec2client import ec2, equal, refused, tagged, until, wait

# Places
equal([r["RegionName"] for r in ec2.describe_regions()["Regions"]], ["us-east-1"])
zones = [z["ZoneName"] for z in ec2.describe_availability_zones()["AvailabilityZones"]]
equal(zones, ["us-east-1a", "us-east-1b", "us-east-1c"])
assert ec2.describe_account_attributes(AttributeNames=["supported-platforms"])["AccountAttributes"]

# VPC and subnets
vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16", TagSpecifications=tagged("vpc", Name="py"))["Vpc"]["VpcId"]
wait("vpc_exists", VpcIds=[vpc])
wait("vpc_available", VpcIds=[vpc])
equal(ec2.describe_vpcs(Filters=[{"Name": "tag:Name", "Values": ["p?"]}])["Vpcs"][0]["VpcId"], vpc)
ec2.modify_vpc_attribute(VpcId=vpc, EnableDnsHostnames={"Value": True})
equal(ec2.describe_vpc_attribute(VpcId=vpc, Attribute="enableDnsHostnames")["EnableDnsHostnames"]["Value"], True)
block = ec2.associate_vpc_cidr_block(VpcId=vpc, CidrBlock="10.1.0.0/16")["CidrBlockAssociation"]["AssociationId"]
ec2.disassociate_vpc_cidr_block(AssociationId=block)
subnets = []
for i in range(7):
    made = ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{i}.0/24", AvailabilityZone=zones[0])["Subnet"]
    equal(made["AvailableIpAddressCount"], 251)
    subnets.append(made["SubnetId"])
wait("subnet_available", SubnetIds=subnets)
pages = list(ec2.get_paginator("describe_subnets").paginate(PaginationConfig={"PageSize": 5}))
equal([len(p["Subnets"]) for p in pages], [5, 2])
ec2.modify_subnet_attribute(SubnetId=subnets[0], PrivateDnsHostnameTypeOnLaunch="ip-name")

# Security groups
sg = ec2.create_security_group(GroupName="app", Description="app", VpcId=vpc)["GroupId"]
wait("security_group_exists", GroupIds=[sg])
rule = [{"IpProtocol": "tcp", "FromPort": 80, "ToPort": 80, "IpRanges": [{"CidrIp": "10.0.0.0/16"}], "UserIdGroupPairs": [{"GroupId": sg}]}]
made = ec2.authorize_security_group_ingress(GroupId=sg, IpPermissions=rule)["SecurityGroupRules"]
equal(len(made), 2)
refused("InvalidPermission.Duplicate", ec2.authorize_security_group_ingress, GroupId=sg, IpPermissions=rule)
ec2.authorize_security_group_egress(GroupId=sg, IpPermissions=[{"IpProtocol": "udp", "FromPort": 53, "ToPort": 53, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}])
rules = ec2.get_paginator("describe_security_group_rules").paginate(Filters=[{"Name": "group-id", "Values": [sg]}]).build_full_result()
equal(len(rules["SecurityGroupRules"]), 4)
ec2.revoke_security_group_ingress(GroupId=sg, SecurityGroupRuleIds=[made[0]["SecurityGroupRuleId"]])
ec2.revoke_security_group_egress(GroupId=sg, IpPermissions=[{"IpProtocol": "-1", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}])
described = ec2.describe_security_groups(GroupIds=[sg])["SecurityGroups"][0]
equal([p["IpProtocol"] for p in described["IpPermissionsEgress"]], ["udp"])

# Instance types
info = ec2.describe_instance_types(InstanceTypes=["m5.large"])["InstanceTypes"][0]["NetworkInfo"]
equal((info["MaximumNetworkInterfaces"], info["Ipv4AddressesPerInterface"]), (3, 10))
types = ec2.get_paginator("describe_instance_types").paginate().build_full_result()["InstanceTypes"]
assert len(types) > 1000, len(types)
offered = ec2.describe_instance_type_offerings(LocationType="availability-zone", Filters=[{"Name": "instance-type", "Values": ["m5.large"]}])
equal([o["Location"] for o in offered["InstanceTypeOfferings"]], zones)

# Reservations
kept = ec2.create_subnet_cidr_reservation(SubnetId=subnets[0], Cidr="10.0.0.240/28", ReservationType="explicit", Description="fixed",
                                          TagSpecifications=tagged("subnet-cidr-reservation", Name="kept"))["SubnetCidrReservation"]
equal(ec2.get_subnet_cidr_reservations(SubnetId=subnets[0])["SubnetIpv4CidrReservations"], [kept])
equal(ec2.describe_subnets(SubnetIds=[subnets[0]])["Subnets"][0]["AvailableIpAddressCount"], 236)
refused("InvalidParameterValue", ec2.create_subnet_cidr_reservation, SubnetId=subnets[0], Cidr="10.0.0.128/25", ReservationType="prefix")
equal(ec2.delete_subnet_cidr_reservation(SubnetCidrReservationId=kept["SubnetCidrReservationId"])["DeletedSubnetCidrReservation"], kept)
refused("InvalidSubnetCidrReservationID.NotFound", ec2.delete_subnet_cidr_reservation, SubnetCidrReservationId=kept["SubnetCidrReservationId"])

# An instance
launch = dict(
    ImageId="ami-0123456789abcdef0", InstanceType="m5.large", MinCount=1, MaxCount=1, ClientToken="token-1",
    NetworkInterfaces=[{"DeviceIndex": 0, "SubnetId": subnets[0], "Groups": [sg], "SecondaryPrivateIpAddressCount": 2}],
    MetadataOptions={"HttpTokens": "required", "HttpPutResponseHopLimit": 2}, TagSpecifications=tagged("instance", Name="node"),
)
instance = ec2.run_instances(**launch)["Instances"][0]["InstanceId"]
equal(ec2.run_instances(**launch)["Instances"][0]["InstanceId"], instance)
wait("instance_exists", InstanceIds=[instance])
wait("instance_running", InstanceIds=[instance])
wait("instance_status_ok", InstanceIds=[instance])
assert ec2.describe_instance_status(InstanceIds=[instance])["InstanceStatuses"]
node = ec2.get_paginator("describe_instances").paginate(Filters=[{"Name": "tag:Name", "Values": ["node"]}]).build_full_result()["Reservations"][0]["Instances"][0]
equal(node["MetadataOptions"]["HttpPutResponseHopLimit"], 2)
equal([a["PrivateIpAddress"] for a in node["NetworkInterfaces"][0]["PrivateIpAddresses"]], ["10.0.0.4", "10.0.0.5", "10.0.0.6"])
equal(ec2.describe_instance_attribute(InstanceId=instance, Attribute="groupSet")["Groups"][0]["GroupId"], sg)
ec2.modify_instance_attribute(InstanceId=instance, DisableApiTermination={"Value": True})
refused("OperationNotPermitted", ec2.terminate_instances, InstanceIds=[instance])
ec2.modify_instance_attribute(InstanceId=instance, DisableApiTermination={"Value": False})
equal(ec2.modify_instance_metadata_options(InstanceId=instance, HttpPutResponseHopLimit=3)["InstanceMetadataOptions"]["HttpPutResponseHopLimit"], 3)

# Interfaces
eni = ec2.create_network_interface(SubnetId=subnets[0], Description="pods", Groups=[sg], Ipv4Prefixes=[{"Ipv4Prefix": "10.0.0.64/28"}],
                                   TagSpecifications=tagged("network-interface", cluster="py"))["NetworkInterface"]["NetworkInterfaceId"]
wait("network_interface_available", NetworkInterfaceIds=[eni])
attachment = ec2.attach_network_interface(NetworkInterfaceId=eni, InstanceId=instance, DeviceIndex=1)["AttachmentId"]


def interface():
    return ec2.describe_network_interfaces(NetworkInterfaceIds=[eni])["NetworkInterfaces"][0]


until("attached", lambda: interface()["Attachment"]["Status"] == "attached")
ec2.modify_network_interface_attribute(NetworkInterfaceId=eni, Attachment={"AttachmentId": attachment, "DeleteOnTermination": True})
ec2.modify_network_interface_attribute(NetworkInterfaceId=eni, SourceDestCheck={"Value": False})
equal(ec2.describe_network_interface_attribute(NetworkInterfaceId=eni, Attribute="sourceDestCheck")["SourceDestCheck"]["Value"], False)
got = ec2.assign_private_ip_addresses(NetworkInterfaceId=eni, SecondaryPrivateIpAddressCount=3)["AssignedPrivateIpAddresses"]
equal(len(got), 3)
equal(ec2.assign_private_ip_addresses(NetworkInterfaceId=eni, Ipv4PrefixCount=1)["AssignedIpv4Prefixes"], [{"Ipv4Prefix": "10.0.0.16/28"}])
equal([p["Ipv4Prefix"] for p in interface()["Ipv4Prefixes"]], ["10.0.0.64/28", "10.0.0.16/28"])
refused("PrivateIpAddressLimitExceeded", ec2.assign_private_ip_addresses, NetworkInterfaceId=eni, SecondaryPrivateIpAddressCount=5)
ec2.unassign_private_ip_addresses(NetworkInterfaceId=eni, PrivateIpAddresses=[got[0]["PrivateIpAddress"]])
ec2.unassign_private_ip_addresses(NetworkInterfaceId=eni, Ipv4Prefixes=["10.0.0.16/28"])
mine = ec2.get_paginator("describe_network_interfaces").paginate(Filters=[{"Name": "attachment.instance-id", "Values": [instance]}]).build_full_result()
equal(len(mine["NetworkInterfaces"]), 2)

# Tags
ec2.create_tags(Resources=[eni, vpc], Tags=[{"Key": "k", "Value": "v"}])
tags = ec2.get_paginator("describe_tags").paginate(Filters=[{"Name": "key", "Values": ["k"]}]).build_full_result()["Tags"]
equal({(t["ResourceId"], t["ResourceType"]) for t in tags}, {(eni, "network-interface"), (vpc, "vpc")})
ec2.delete_tags(Resources=[eni, vpc], Tags=[{"Key": "k"}])

# Errors
e = refused("InvalidNetworkInterfaceID.NotFound", ec2.describe_network_interfaces, NetworkInterfaceIds=["eni-00000000000000000"])
equal(e.response["ResponseMetadata"]["HTTPStatusCode"], 400)
assert e.response["ResponseMetadata"]["RequestId"], e.response
refused("DryRunOperation", ec2.delete_vpc, VpcId=vpc, DryRun=True)
refused("DependencyViolation", ec2.delete_vpc, VpcId=vpc)

# All of it goes
ec2.detach_network_interface(AttachmentId=attachment)
wait("network_interface_available", NetworkInterfaceIds=[eni])
ec2.delete_network_interface(NetworkInterfaceId=eni)
ec2.stop_instances(InstanceIds=[instance])
wait("instance_stopped", InstanceIds=[instance])
refused("IncorrectInstanceState", ec2.reboot_instances, InstanceIds=[instance])
ec2.start_instances(InstanceIds=[instance])
wait("instance_running", InstanceIds=[instance])
ec2.reboot_instances(InstanceIds=[instance])
ec2.terminate_instances(InstanceIds=[instance])
wait("instance_terminated", InstanceIds=[instance])
ec2.delete_security_group(GroupId=sg)
for s in subnets:
    ec2.delete_subnet(SubnetId=s)
ec2.delete_vpc(VpcId=vpc)
equal(ec2.describe_vpcs()["Vpcs"], [])
