package api

import (
	"fmt"
	"testing"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// fleet fills a world with instances of four interfaces each.
func fleet(b *testing.B, instances int) (w *world, enis []string) {
	w = newWorld(b)
	if err := w.chaos.Set(chaos.Settings{Throttle: "off", Quotas: map[chaos.Quota]int{chaos.QuotaInterfaces: 4 * instances}}); err != nil {
		b.Fatal(err)
	}
	vpcID := w.must("CreateVpc", "CidrBlock=10.0.0.0/16").get("vpc.vpcId")
	subnet := w.must("CreateSubnet", "VpcId="+vpcID, "CidrBlock=10.0.0.0/16").get("subnet.subnetId")
	params := []string{image, "InstanceType=m5.xlarge", fmt.Sprintf("MinCount=%d", instances), fmt.Sprintf("MaxCount=%d", instances)}
	for d := range 4 {
		params = append(params, fmt.Sprintf("NetworkInterface.%d.DeviceIndex=%d", d+1, d), fmt.Sprintf("NetworkInterface.%d.SubnetId=%s", d+1, subnet))
	}
	w.must("RunInstances", params...)
	if err := w.api.Settle(); err != nil {
		b.Fatal(err)
	}
	for id := range w.store.View().ENIs.All() {
		enis = append(enis, string(id))
	}
	return w, enis
}

// BenchmarkAssign measures one AssignPrivateIpAddresses among 8,000 interfaces,
// decoder, commit and encoder included.
func BenchmarkAssign(b *testing.B) {
	w, enis := fleet(b, 2000)
	n := 0
	for b.Loop() {
		e := enis[n%len(enis)]
		if n/len(enis)%2 == 0 {
			w.must("AssignPrivateIpAddresses", "NetworkInterfaceId="+e, "SecondaryPrivateIpAddressCount=1")
		} else {
			a := w.store.View().ENI(vpc.ENIID(e)).Secondary[0]
			w.must("UnassignPrivateIpAddresses", "NetworkInterfaceId="+e, "PrivateIpAddress.1="+a.String())
		}
		n++
	}
}

// BenchmarkDescribeOfOneInstance is what every node asks, among 8,000
// interfaces.
func BenchmarkDescribeOfOneInstance(b *testing.B) {
	w, _ := fleet(b, 2000)
	var id string
	w.store.View().Instances.All()(func(k vpc.InstanceID, _ *store.Instance) bool { id = string(k); return false })
	for b.Loop() {
		if n := w.must("DescribeNetworkInterfaces", "Filter.1.Name=attachment.instance-id", "Filter.1.Value.1="+id); len(n.at("networkInterfaceSet")) != 4 {
			b.Fatal("not four interfaces")
		}
	}
}

// BenchmarkDescribePage is a page of a thousand out of 8,000 interfaces by tag.
func BenchmarkDescribePage(b *testing.B) {
	w, _ := fleet(b, 2000)
	for b.Loop() {
		if n := w.must("DescribeNetworkInterfaces", "MaxResults=1000", "Filter.1.Name=status", "Filter.1.Value.1=in-use"); len(n.at("networkInterfaceSet")) != 1000 {
			b.Fatal("not a thousand interfaces")
		}
	}
}
