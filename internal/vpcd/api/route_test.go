package api

import (
	"testing"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

const rts = "routeTableSet."

func TestRouteTables(t *testing.T) {
	w := newWorld(t)
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	d := w.must("DescribeRouteTables", "Filter.1.Name=vpc-id", "Filter.1.Value.1="+vpcID)
	first := d.get(rts + "routeTableId")
	w.want(d, rts+"associationSet.main", "true")
	w.want(d, rts+"associationSet.subnetId", "")
	w.want(d, rts+"routeSet.destinationCidrBlock", "10.0.0.0/16")
	w.want(d, rts+"routeSet.gatewayId", "local")
	w.want(d, rts+"routeSet.origin", "CreateRouteTable")
	w.want(d, rts+"routeSet.state", "active")
	w.fails("InvalidParameterValue", "DisassociateRouteTable", "AssociationId="+d.get(rts+"associationSet.routeTableAssociationId"))
	w.fails("DependencyViolation", "DeleteRouteTable", "RouteTableId="+first)

	made := w.must("CreateRouteTable", "VpcId="+vpcID, "ClientToken=tok", "TagSpecification.1.ResourceType=route-table", "TagSpecification.1.Tag.1.Key=k", "TagSpecification.1.Tag.1.Value=v")
	own := made.get("routeTable.routeTableId")
	w.want(made, "routeTable.tagSet.key", "k")
	w.want(made, "routeTable.routeSet.gatewayId", "local")
	w.want(made, "routeTable.associationSet.main", "")
	w.must("DeleteTags", "ResourceId.1="+own)
	assoc := w.must("AssociateRouteTable", "RouteTableId="+own, "SubnetId="+subnet)
	w.want(assoc, "associationState.state", "associated")
	id := assoc.get("associationId")
	w.want(w.must("AssociateRouteTable", "RouteTableId="+own, "SubnetId="+subnet), "associationId", id)
	w.fails("Resource.AlreadyAssociated", "AssociateRouteTable", "RouteTableId="+first, "SubnetId="+subnet)
	w.fails("InvalidParameterCombination", "AssociateRouteTable", "RouteTableId="+first)
	w.fails("DependencyViolation", "DeleteRouteTable", "RouteTableId="+own)
	for f, v := range map[string]string{"association.subnet-id": subnet, "association.route-table-association-id": id, "association.main": "false"} {
		w.want(w.must("DescribeRouteTables", "Filter.1.Name="+f, "Filter.1.Value.1="+v), rts+"routeTableId", own)
	}
	if w.store.View().TableOf(vpc.SubnetID(subnet)).ID != vpc.RouteTableID(own) {
		t.Error("the subnet uses another table")
	}

	// The association moves, and with it the place of the main table.
	id = w.must("ReplaceRouteTableAssociation", "AssociationId="+id, "RouteTableId="+first).get("newAssociationId")
	w.must("DisassociateRouteTable", "AssociationId="+id)
	w.fails("InvalidAssociationID.NotFound", "DisassociateRouteTable", "AssociationId="+id)
	main := w.must("DescribeRouteTables", "RouteTableId.1="+first).get(rts + "associationSet.routeTableAssociationId")
	w.must("ReplaceRouteTableAssociation", "AssociationId="+main, "RouteTableId="+own)
	w.restart()
	w.want(w.must("DescribeRouteTables", "Filter.1.Name=association.main", "Filter.1.Value.1=true"), rts+"routeTableId", own)
	w.must("DeleteRouteTable", "RouteTableId="+first)

	other, _ := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	foreign := w.must("CreateRouteTable", "VpcId="+other).get("routeTable.routeTableId")
	w.fails("InvalidParameterValue", "AssociateRouteTable", "RouteTableId="+foreign, "SubnetId="+subnet)
	w.must("DeleteSubnet", "SubnetId="+subnet)
	w.must("DeleteVpc", "VpcId="+vpcID) // its main table goes along
	w.fails("InvalidRouteTableID.NotFound", "DescribeRouteTables", "RouteTableId.1="+own)
}

func TestRoutes(t *testing.T) {
	w := newWorld(t)
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	table := w.must("DescribeRouteTables", "Filter.1.Name=vpc-id", "Filter.1.Value.1="+vpcID).get(rts + "routeTableId")
	i := w.instance(subnet, "m5.large")
	eni := w.must("DescribeInstances", "InstanceId.1="+i).get("reservationSet.instancesSet.networkInterfaceSet.networkInterfaceId")
	free := w.eni(subnet)
	to := func(cidr string, params ...string) []string {
		return append([]string{"RouteTableId=" + table, "DestinationCidrBlock=" + cidr}, params...)
	}
	w.want(w.must("CreateRoute", to("192.168.1.2/16", "InstanceId="+i)...), "return", "true")
	w.must("CreateRoute", to("172.16.0.0/12", "NetworkInterfaceId="+free)...)
	w.must("CreateRoute", to("10.0.0.0/24", "NetworkInterfaceId="+eni)...) // a whole subnet
	route := func(cidr string) node {
		t.Helper()
		for _, r := range w.must("DescribeRouteTables", "RouteTableId.1="+table).at(rts + "routeSet") {
			if r.get("destinationCidrBlock") == cidr {
				return r
			}
		}
		t.Fatalf("no route to %s", cidr)
		return node{}
	}
	r := route("192.168.0.0/16")
	w.want(r, "networkInterfaceId", eni)
	w.want(r, "instanceId", i)
	w.want(r, "instanceOwnerId", "123456789012")
	w.want(r, "origin", "CreateRoute")
	w.want(r, "state", "active")
	w.want(route("172.16.0.0/12"), "state", "blackhole") // attached to nothing
	w.want(w.must("DescribeRouteTables", "Filter.1.Name=route.state", "Filter.1.Value.1=blackhole"), rts+"routeTableId", table)

	for _, c := range []struct {
		code   string
		params []string
	}{
		{"RouteAlreadyExists", to("192.168.0.0/16", "InstanceId="+i)},
		{"RouteAlreadyExists", to("10.0.0.0/16", "InstanceId="+i)},
		{"InvalidParameterValue", to("10.0.0.0/25", "InstanceId="+i)},        // half a subnet
		{"InvalidParameterValue", to("169.254.169.254/32", "InstanceId="+i)}, // the VPC's own
		{"InvalidParameterValue", to("everywhere", "InstanceId="+i)},         //
		{"InvalidParameterCombination", to("1.0.0.0/8", "InstanceId="+i, "NatGatewayId=nat-1")},
		{"InvalidParameterCombination", to("1.0.0.0/8")},
		{"InvalidParameterCombination", []string{"RouteTableId=" + table, "InstanceId=" + i}},
		{"InvalidGatewayID.NotFound", to("1.0.0.0/8", "GatewayId=igw-00000000000000000")},
		{"InvalidGatewayID.NotFound", to("1.0.0.0/8", "GatewayId=vgw-00000000000000000")},
		{"NatGatewayNotFound", to("1.0.0.0/8", "NatGatewayId=nat-00000000000000000")},
		{"InvalidVpcPeeringConnectionID.NotFound", to("1.0.0.0/8", "VpcPeeringConnectionId=pcx-00000000000000000")},
		{"InvalidNetworkInterfaceID.NotFound", to("1.0.0.0/8", "NetworkInterfaceId=eni-00000000000000000")},
		{"InvalidPrefixListID.NotFound", []string{"RouteTableId=" + table, "DestinationPrefixListId=pl-00000000000000000", "InstanceId=" + i}},
		{"InvalidRouteTableID.NotFound", []string{"RouteTableId=rtb-00000000000000000", "DestinationCidrBlock=1.0.0.0/8", "InstanceId=" + i}},
		{"UnsupportedOperation", to("1.0.0.0/8", "TransitGatewayId=tgw-1")},
	} {
		w.fails(c.code, "CreateRoute", c.params...)
	}
	_, subnet2 := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	w.fails("InvalidParameterValue", "CreateRoute", to("1.0.0.0/8", "NetworkInterfaceId="+w.eni(subnet2))...)
	w.must("AttachNetworkInterface", "NetworkInterfaceId="+free, "InstanceId="+i, "DeviceIndex=1")
	w.want(route("172.16.0.0/12"), "state", "active")
	w.fails("InvalidInstanceID", "CreateRoute", to("1.0.0.0/8", "InstanceId="+i)...)

	// The local route leaves its target and comes back.
	w.fails("InvalidRoute.NotFound", "ReplaceRoute", to("1.0.0.0/8", "NetworkInterfaceId="+eni)...)
	w.must("ReplaceRoute", to("10.0.0.0/16", "NetworkInterfaceId="+eni)...)
	w.want(route("10.0.0.0/16"), "networkInterfaceId", eni)
	w.want(route("10.0.0.0/16"), "origin", "CreateRouteTable")
	w.fails("InvalidParameterValue", "DeleteRoute", to("10.0.0.0/16")...)
	w.must("ReplaceRoute", to("10.0.0.0/16", "LocalTarget=true")...)
	w.want(route("10.0.0.0/16"), "gatewayId", "local")
	w.fails("InvalidParameterValue", "ReplaceRoute", to("192.168.0.0/16", "LocalTarget=true")...)
	w.must("ReplaceRoute", to("192.168.0.0/16", "NetworkInterfaceId="+free)...)
	w.want(route("192.168.0.0/16"), "networkInterfaceId", free)

	// A route stays and is a black hole when its target goes.
	w.must("StopInstances", "InstanceId.1="+i)
	w.want(route("192.168.0.0/16"), "state", "blackhole")
	w.must("StartInstances", "InstanceId.1="+i)
	w.must("DescribeInstances")
	w.want(route("192.168.0.0/16"), "state", "active")
	w.must("DeleteRoute", to("192.168.0.0/16")...)
	w.fails("InvalidRoute.NotFound", "DeleteRoute", to("192.168.0.0/16")...)

	// A block that a route is within does not become the VPC's.
	w.must("CreateRoute", to("100.64.1.0/24", "NetworkInterfaceId="+free)...)
	w.fails("CidrConflict", "AssociateVpcCidrBlock", "VpcId="+vpcID, "CidrBlock=100.64.0.0/16")
	w.must("DeleteRoute", to("100.64.1.0/24")...)
	block := w.must("AssociateVpcCidrBlock", "VpcId="+vpcID, "CidrBlock=100.64.0.0/16").get("cidrBlockAssociation.associationId")
	w.must("ReplaceRoute", to("100.64.0.0/16", "NetworkInterfaceId="+free)...)
	w.must("DisassociateVpcCidrBlock", "AssociationId="+block)
	if n := len(w.store.View().RouteTable(vpc.RouteTableID(table)).Routes); n != 2 {
		t.Errorf("%d routes are left", n)
	}
}

func TestRouteQuotas(t *testing.T) {
	w := newWorld(t)
	if err := w.chaos.Set(chaos.Settings{Throttle: "off", Quotas: map[chaos.Quota]int{chaos.QuotaRouteTables: 1, chaos.QuotaRoutes: 2}}); err != nil {
		t.Fatal(err)
	}
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	w.fails("RouteTableLimitExceeded", "CreateRouteTable", "VpcId="+vpcID)
	table := string(w.store.View().MainTable(vpc.VPCID(vpcID)).ID)
	eni := w.eni(subnet)
	w.must("CreateRoute", "RouteTableId="+table, "DestinationCidrBlock=1.0.0.0/8", "NetworkInterfaceId="+eni)
	w.fails("RouteLimitExceeded", "CreateRoute", "RouteTableId="+table, "DestinationCidrBlock=2.0.0.0/8", "NetworkInterfaceId="+eni)
}

// The table of a gateway holds local routes and those to interfaces.
func TestEdgeRoutes(t *testing.T) {
	w := newWorld(t)
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	const igw = "igw-00000000000000001"
	if err := w.store.Update(func(tx *store.Tx) error {
		tx.PutGateway(&store.InternetGateway{ID: igw, VPC: vpc.VPCID(vpcID)})
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	edge := w.must("CreateRouteTable", "VpcId="+vpcID).get("routeTable.routeTableId")
	eni := w.eni(subnet)
	w.must("CreateRoute", "RouteTableId="+edge, "DestinationCidrBlock=0.0.0.0/0", "GatewayId="+igw)
	w.fails("InvalidParameterValue", "AssociateRouteTable", "RouteTableId="+edge, "GatewayId="+igw)
	w.must("DeleteRoute", "RouteTableId="+edge, "DestinationCidrBlock=0.0.0.0/0")
	w.must("AssociateRouteTable", "RouteTableId="+edge, "GatewayId="+igw)
	w.want(w.must("DescribeRouteTables", "Filter.1.Name=association.gateway-id", "Filter.1.Value.1="+igw), rts+"routeTableId", edge)
	w.fails("InvalidParameterValue", "CreateRoute", "RouteTableId="+edge, "DestinationCidrBlock=0.0.0.0/0", "GatewayId="+igw)
	w.fails("InvalidParameterValue", "CreateRoute", "RouteTableId="+edge, "DestinationCidrBlock=192.168.0.0/16", "NetworkInterfaceId="+eni)
	w.must("CreateRoute", "RouteTableId="+edge, "DestinationCidrBlock=10.0.0.0/24", "NetworkInterfaceId="+eni)
}
