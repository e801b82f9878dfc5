package api

import (
	"fmt"
	"net/url"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
)

func TestNeeds(t *testing.T) {
	w := newWorld(t)
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	block := w.store.View().VPC(vpc.VPCID(vpcID))
	_, six := w.vpc6("10.9.0.0/16", "10.9.0.0/24")
	i := w.instance(subnet, "m5.large")
	e := w.eni(subnet)
	at := w.must("AttachNetworkInterface", "NetworkInterfaceId="+e, "InstanceId="+i, "DeviceIndex=1").get("attachmentId")
	group := w.must("CreateSecurityGroup", "GroupName=g", "GroupDescription=g", "VpcId="+vpcID).get("groupId")
	acl, table := w.store.View().DefaultACL(vpc.VPCID(vpcID)), w.store.View().MainTable(vpc.VPCID(vpcID))
	w.online(vpcID)
	address := w.elastic()
	tied := w.must("AssociateAddress", "AllocationId="+address, "NetworkInterfaceId="+e).get("associationId")
	eni, instance := "network-interface/"+e, "instance/"+i
	tags := []string{"TagSpecification.1.ResourceType=network-interface", "TagSpecification.1.Tag.1.Key=a", "TagSpecification.1.Tag.1.Value=b"}
	for _, c := range []struct {
		action string
		params []string
		want   string
	}{
		{"DescribeNetworkInterfaces", []string{"NetworkInterfaceId.1=" + e}, "DescribeNetworkInterfaces *"},
		{"GetSubnetCidrReservations", []string{"SubnetId=" + subnet}, "GetSubnetCidrReservations *"},
		{"AssignPrivateIpAddresses", []string{"NetworkInterfaceId=" + e, "Ipv4PrefixCount=1"}, "AssignPrivateIpAddresses " + eni},
		{"DetachNetworkInterface", []string{"AttachmentId=" + at}, "DetachNetworkInterface " + instance + ", DetachNetworkInterface " + eni},
		{"AttachNetworkInterface", []string{"NetworkInterfaceId=" + e, "InstanceId=" + i, "DeviceIndex=2"}, "AttachNetworkInterface " + instance + ", AttachNetworkInterface " + eni},
		{"ModifyNetworkInterfaceAttribute", []string{"NetworkInterfaceId=" + e, "SecurityGroupId.1=" + group}, "ModifyNetworkInterfaceAttribute " + eni + ", ModifyNetworkInterfaceAttribute security-group/" + group},
		{"CreateNetworkInterface", append(tags, "SubnetId="+subnet, "Description=eni-00000000000000000"),
			"CreateNetworkInterface network-interface/*, CreateNetworkInterface subnet/" + subnet + ", CreateTags network-interface/*"},
		{"CreateTags", []string{"ResourceId.1=" + e, "ResourceId.2=" + i, "Tag.1.Key=a"}, "CreateTags " + instance + ", CreateTags " + eni},
		{"ReplaceNetworkAclAssociation", []string{"AssociationId=" + acl.Associations[0].ID, "NetworkAclId=acl-00000000000000000"}, "ReplaceNetworkAclAssociation network-acl/acl-00000000000000000, " +
			"ReplaceNetworkAclAssociation network-acl/" + string(acl.ID) + ", ReplaceNetworkAclAssociation subnet/" + subnet},
		{"DisassociateRouteTable", []string{"AssociationId=" + table.Main().ID}, "DisassociateRouteTable route-table/" + string(table.ID)},
		{"DisassociateAddress", []string{"AssociationId=" + tied}, "DisassociateAddress elastic-ip/" + address + ", DisassociateAddress " + eni},
		{"DisassociateAddress", []string{"AssociationId=eipassoc-00000000000000000"}, "DisassociateAddress *"},
		{"CreateNatGateway", []string{"SubnetId=" + subnet, "AllocationId=" + address}, "CreateNatGateway elastic-ip/" + address + ", CreateNatGateway natgateway/*, CreateNatGateway subnet/" + subnet},
		{"CreateVpc", []string{"CidrBlock=10.0.0.0/16"}, "CreateVpc vpc/*"},
		{"AssignIpv6Addresses", []string{"NetworkInterfaceId=" + e, "Ipv6AddressCount=1"}, "AssignIpv6Addresses " + eni},
		{"CreateEgressOnlyInternetGateway", []string{"VpcId=" + vpcID}, "CreateEgressOnlyInternetGateway egress-only-internet-gateway/*, CreateEgressOnlyInternetGateway vpc/" + vpcID},
		{"DeleteEgressOnlyInternetGateway", []string{"EgressOnlyInternetGatewayId=eigw-00000000000000000"}, "DeleteEgressOnlyInternetGateway egress-only-internet-gateway/eigw-00000000000000000"},
		{"DisassociateVpcCidrBlock", []string{"AssociationId=" + block.CIDRs[0].ID}, "DisassociateVpcCidrBlock vpc/" + vpcID},
		{"DisassociateSubnetCidrBlock", []string{"AssociationId=" + w.store.View().Subnet(vpc.SubnetID(six)).IPv6.ID}, "DisassociateSubnetCidrBlock subnet/" + six},
		{"DetachNetworkInterface", []string{"AttachmentId=eni-attach-00000000000000000"}, "DetachNetworkInterface *"},
	} {
		values := url.Values{}
		for _, p := range c.params {
			name, value, _ := strings.Cut(p, "=")
			values.Set(name, value)
		}
		req, err := query.Actions[c.action].DecodeRequest(values)
		if err != nil {
			t.Fatalf("%s %v: %v", c.action, c.params, err)
		}
		var got []string
		for _, n := range w.api.Needs(query.Call{Action: query.Actions[c.action], Request: req}) {
			got = append(got, fmt.Sprintf("%s %s", strings.TrimPrefix(n.Action, "ec2:"), strings.TrimPrefix(n.Resource, "arn:aws:ec2:us-east-1:123456789012:")))
		}
		if d := cmp.Diff(c.want, strings.Join(got, ", ")); d != "" {
			t.Errorf("%s %v (-want +got):\n%s", c.action, c.params, d)
		}
	}
}

// What is made must be of a kind that can be tagged: the names are IAM's.
func TestMakesKnownKinds(t *testing.T) {
	kinds := map[string]bool{}
	for _, k := range resourceTypes {
		kinds[k] = true
	}
	for action, made := range makes {
		if query.Actions[action] == nil {
			t.Errorf("there is no action %s", action)
		}
		for _, k := range made {
			if !kinds[k] {
				t.Errorf("%s makes an unknown %s", action, k)
			}
		}
	}
}
