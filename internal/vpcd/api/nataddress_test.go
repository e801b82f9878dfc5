package api

import (
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

func TestNATAddresses(t *testing.T) {
	w := newWorld(t)
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	w.online(vpcID)
	one, two, three := w.elastic(), w.elastic(), w.elastic()
	id := w.must("CreateNatGateway", "SubnetId="+subnet, "AllocationId="+one).get("natGateway.natGatewayId")
	w.fails("NatGatewayNotFound", "AssociateNatGatewayAddress", "NatGatewayId=nat-00000000000000000", "AllocationId.1="+two)
	d := w.must("AssociateNatGatewayAddress", "NatGatewayId="+id, "AllocationId.1="+two, "AllocationId.2="+three, "PrivateIpAddress.1=10.0.0.77")
	const a = "natGatewayAddressSet."
	w.want(d, a+"privateIp", "10.0.0.77,10.0.0.5")
	w.want(d, a+"publicIp", "198.51.100.2,198.51.100.3")
	w.want(d, a+"status", "associating,associating")
	w.fails("Resource.AlreadyAssociated", "AssociateNatGatewayAddress", "NatGatewayId="+id, "AllocationId.1="+two)
	w.fails("InvalidParameterValue", "AssignPrivateNatGatewayAddress", "NatGatewayId="+id, "PrivateIpAddressCount=1")
	nat := func() node {
		t.Helper()
		return w.must("DescribeNatGateways", "NatGatewayId.1="+id).at("natGatewaySet")[0]
	}
	w.want(nat(), a+"isPrimary", "true,false,false")
	w.want(nat(), a+"status", "succeeded,succeeded,succeeded")
	tied := nat().at("natGatewayAddressSet")

	w.fails("InvalidParameterValue", "DisassociateNatGatewayAddress", "NatGatewayId="+id, "AssociationId.1="+tied[0].get("associationId"))
	w.fails("InvalidParameterValue", "DisassociateNatGatewayAddress", "NatGatewayId="+id, "AssociationId.1="+tied[1].get("associationId"), "MaxDrainDurationSeconds=0")
	w.fails("InvalidAssociationID.NotFound", "DisassociateNatGatewayAddress", "NatGatewayId="+id, "AssociationId.1=eipassoc-00000000000000000")
	w.want(w.must("DisassociateNatGatewayAddress", "NatGatewayId="+id, "AssociationId.1="+tied[1].get("associationId"), "MaxDrainDurationSeconds=10"), a+"status", "disassociating")
	w.must("DisassociateNatGatewayAddress", "NatGatewayId="+id, "AssociationId.1="+tied[2].get("associationId"))
	w.want(nat(), a+"status", "succeeded,disassociating,disassociating")
	w.fails("InvalidIPAddress.InUse", "ReleaseAddress", "AllocationId="+two)
	w.clock.Advance(10 * time.Second)
	w.want(nat(), a+"publicIp", "198.51.100.1,198.51.100.3")
	w.must("ReleaseAddress", "AllocationId="+two)
	w.restart()
	w.clock.Advance(340 * time.Second)
	w.want(nat(), a+"publicIp", "198.51.100.1")
	if e := w.store.View().ENI(w.store.View().NAT(vpc.NATGatewayID(id)).ENI); len(e.Secondary) != 0 {
		t.Errorf("the interface has %v", e.Secondary)
	}

	private := w.must("CreateNatGateway", "SubnetId="+subnet, "ConnectivityType=private").get("natGateway.natGatewayId")
	w.must("DescribeNatGateways") // it is available from now on
	w.fails("InvalidParameterCombination", "AssignPrivateNatGatewayAddress", "NatGatewayId="+private)
	w.fails("InvalidParameterValue", "AssignPrivateNatGatewayAddress", "NatGatewayId="+private, "PrivateIpAddressCount=8")
	d = w.must("AssignPrivateNatGatewayAddress", "NatGatewayId="+private, "PrivateIpAddress.1=10.0.0.88")
	w.want(d, a+"status", "assigning")
	w.must("AssignPrivateNatGatewayAddress", "NatGatewayId="+private, "PrivateIpAddressCount=2")
	w.fails("InvalidParameterValue", "AssignPrivateNatGatewayAddress", "NatGatewayId="+private, "PrivateIpAddress.1=10.0.0.90", "PrivateIpAddress.2=10.0.0.90")
	w.fails("InvalidParameterValue", "UnassignPrivateNatGatewayAddress", "NatGatewayId="+private, "PrivateIpAddress.1=10.0.0.99")
	w.want(w.must("UnassignPrivateNatGatewayAddress", "NatGatewayId="+private, "PrivateIpAddress.1=10.0.0.88", "MaxDrainDurationSeconds=1"), a+"status", "unassigning")
	w.clock.Advance(time.Second)
	w.want(w.must("DescribeNatGateways", "NatGatewayId.1="+private), "natGatewaySet."+a+"isPrimary", "true,false,false")
	w.must("DeleteNatGateway", "NatGatewayId="+private)
	w.fails("IncorrectState", "AssignPrivateNatGatewayAddress", "NatGatewayId="+private, "PrivateIpAddressCount=1")
}
