package fabric

import (
	"errors"
	"fmt"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// DropReason says why the fabric dropped a frame.
type DropReason string

// The reasons. Those of delivery are counted on the sender's ENI, except
// DestAddress, SGIngress and ACLIngress, which are the receiver's, and FlowsFull,
// which is that of the ENI whose flow it would be.
const (
	NoInterface   DropReason = "no_interface"   // from a device that is no ENI's
	Malformed     DropReason = "malformed"      // headers cut short or contradictory
	SourceMAC     DropReason = "source_mac"     // not the ENI's MAC
	SourceAddress DropReason = "source_address" // source check
	DestAddress   DropReason = "dest_address"   // destination check
	NoRoute       DropReason = "no_route"       // outside all routes
	NoTarget      DropReason = "no_target"      // no ENI holds the address
	UnknownMAC    DropReason = "unknown_mac"    // neither router's nor an ENI's of the subnet
	Multicast     DropReason = "multicast"      // broadcast and multicast, except ARP requests
	IPv6          DropReason = "ipv6"           // of or to an ENI whose subnet has no IPv6 block
	EtherType     DropReason = "ethertype"      // neither IPv4, IPv6 nor ARP, or with a VLAN tag
	Oversize      DropReason = "oversize"       // IP length above MTU
	ARPSpoofed    DropReason = "arp_spoofed"    // sender fields are not the ENI's
	ARPUnanswered DropReason = "arp_unanswered" // unknown or own address, gratuitous, reply
	NotService    DropReason = "not_service"    // the fabric's stack sent what is no service's
	SGEgress      DropReason = "sg_egress"      // the sender's security groups
	SGIngress     DropReason = "sg_ingress"     // the receiver's security groups
	Fragment      DropReason = "fragment"       // a later fragment whose first did not pass before it
	FlowsFull     DropReason = "flows_full"     // no room to track one more flow
	ACLEgress     DropReason = "acl_egress"     // the network ACL of the sender's subnet
	ACLIngress    DropReason = "acl_ingress"    // the network ACL of the receiver's subnet
	Blackhole     DropReason = "blackhole"      // a route whose target is not there
	IGWSource     DropReason = "igw_source"     // to the internet, from an address without a public one
	IGWPrivate    DropReason = "igw_private"    // between the internet and an address of RFC 1918 or RFC 6598
	NoPublic      DropReason = "no_public"      // from the internet, to a public address that leads nowhere

	Extension    DropReason = "extension_headers" // IPv6 extension headers that no gate can judge
	NDSpoofed    DropReason = "nd_spoofed"        // neighbour discovery from an address that is not the ENI's
	NDUnanswered DropReason = "nd_unanswered"     // unknown or own address, advertisement, redirect
	GatewayIPv6  DropReason = "gateway_ipv6"      // IPv6 to an internet gateway, which carries none here

	// LinkLocalAllowance has the name of the counter of AWS's network driver.
	LinkLocalAllowance DropReason = "linklocal_allowance_exceeded" // more to link-local services than an ENI may send
)

// dropReasons are the numbers that the programs count by.
var dropReasons = [bpfgen.FabricDropReasonDROP_REASONS]DropReason{
	bpfgen.FabricDropReasonDROP_NO_INTERFACE:   NoInterface,
	bpfgen.FabricDropReasonDROP_MALFORMED:      Malformed,
	bpfgen.FabricDropReasonDROP_SOURCE_MAC:     SourceMAC,
	bpfgen.FabricDropReasonDROP_SOURCE_ADDRESS: SourceAddress,
	bpfgen.FabricDropReasonDROP_DEST_ADDRESS:   DestAddress,
	bpfgen.FabricDropReasonDROP_NO_ROUTE:       NoRoute,
	bpfgen.FabricDropReasonDROP_NO_TARGET:      NoTarget,
	bpfgen.FabricDropReasonDROP_UNKNOWN_MAC:    UnknownMAC,
	bpfgen.FabricDropReasonDROP_MULTICAST:      Multicast,
	bpfgen.FabricDropReasonDROP_IPV6:           IPv6,
	bpfgen.FabricDropReasonDROP_ETHERTYPE:      EtherType,
	bpfgen.FabricDropReasonDROP_OVERSIZE:       Oversize,
	bpfgen.FabricDropReasonDROP_ARP_SPOOFED:    ARPSpoofed,
	bpfgen.FabricDropReasonDROP_ARP_UNANSWERED: ARPUnanswered,
	bpfgen.FabricDropReasonDROP_NOT_SERVICE:    NotService,
	bpfgen.FabricDropReasonDROP_SG_EGRESS:      SGEgress,
	bpfgen.FabricDropReasonDROP_SG_INGRESS:     SGIngress,
	bpfgen.FabricDropReasonDROP_FRAGMENT:       Fragment,
	bpfgen.FabricDropReasonDROP_FLOWS_FULL:     FlowsFull,
	bpfgen.FabricDropReasonDROP_ACL_EGRESS:     ACLEgress,
	bpfgen.FabricDropReasonDROP_ACL_INGRESS:    ACLIngress,
	bpfgen.FabricDropReasonDROP_BLACKHOLE:      Blackhole,
	bpfgen.FabricDropReasonDROP_IGW_SOURCE:     IGWSource,
	bpfgen.FabricDropReasonDROP_IGW_PRIVATE:    IGWPrivate,
	bpfgen.FabricDropReasonDROP_NO_PUBLIC:      NoPublic,

	bpfgen.FabricDropReasonDROP_LINKLOCAL_ALLOWANCE: LinkLocalAllowance,

	bpfgen.FabricDropReasonDROP_EXTENSION:     Extension,
	bpfgen.FabricDropReasonDROP_ND_SPOOFED:    NDSpoofed,
	bpfgen.FabricDropReasonDROP_ND_UNANSWERED: NDUnanswered,
	bpfgen.FabricDropReasonDROP_GATEWAY_IPV6:  GatewayIPv6,
}

// Counters are an ENI's, from its guest's point of view, since it was attached.
// Packets and bytes are of IPv4 and IPv6, without neighbour discovery, and as on
// the wire: a GSO frame counts its segments, and bytes are IP lengths (no Ethernet
// header).
type Counters struct {
	TxPackets uint64 `json:"txPackets"` // accepted from the guest
	TxBytes   uint64 `json:"txBytes"`
	RxPackets uint64 `json:"rxPackets"` // handed to the guest
	RxBytes   uint64 `json:"rxBytes"`
	// Of these, what flow logs leave out by definition (the fabric's services),
	// and what they had no room for. The rest is in records that say ACCEPT.
	ExemptTxPackets  uint64 `json:"exemptTxPackets"`
	ExemptTxBytes    uint64 `json:"exemptTxBytes"`
	ExemptRxPackets  uint64 `json:"exemptRxPackets"`
	ExemptRxBytes    uint64 `json:"exemptRxBytes"`
	SkippedTxPackets uint64 `json:"skippedTxPackets"`
	SkippedTxBytes   uint64 `json:"skippedTxBytes"`
	SkippedRxPackets uint64 `json:"skippedRxPackets"`
	SkippedRxBytes   uint64 `json:"skippedRxBytes"`
	// Drops counts frames, by reason; reasons without any are left out. Oversize
	// includes what the veth refused before a program saw it.
	Drops map[DropReason]uint64 `json:"drops,omitempty"`
}

// Counters returns each attached ENI's counters. Those under the ID "" count what
// came from a device that is no ENI's.
func (f *Fabric) Counters() (map[vpc.ENIID]Counters, error) {
	f.life.RLock()
	defer f.life.RUnlock()
	if f.objs.Counts == nil {
		return nil, errors.New("read counters: the fabric is closed")
	}
	refused, err := f.refused()
	if err != nil {
		return nil, fmt.Errorf("read counters: %w", err)
	}
	out := map[vpc.ENIID]Counters{}
	var (
		index  uint32
		perCPU []bpfgen.FabricCounters
		eni    bpfgen.FabricEni
	)
	it := f.objs.Counts.Iterate()
	for it.Next(&index, &perCPU) {
		var id vpc.ENIID
		if index != 0 {
			err := f.objs.Enis.Lookup(index, &eni)
			if err != nil || eni.Flags&flagReady == 0 {
				continue // being made or removed at this moment
			}
			id = eniID(eni)
		}
		c := Counters{Drops: map[DropReason]uint64{}}
		if n := refused[int(index)]; n > 0 {
			c.Drops[Oversize] = n
		}
		for _, one := range perCPU {
			c.TxPackets += one.TxPackets
			c.TxBytes += one.TxBytes
			c.RxPackets += one.RxPackets
			c.RxBytes += one.RxBytes
			c.ExemptTxPackets += one.ExemptTxPackets
			c.ExemptTxBytes += one.ExemptTxBytes
			c.ExemptRxPackets += one.ExemptRxPackets
			c.ExemptRxBytes += one.ExemptRxBytes
			c.SkippedTxPackets += one.SkippedTxPackets
			c.SkippedTxBytes += one.SkippedTxBytes
			c.SkippedRxPackets += one.SkippedRxPackets
			c.SkippedRxBytes += one.SkippedRxBytes
			for reason, n := range one.Drops {
				if n > 0 {
					c.Drops[dropReasons[reason]] += n
				}
			}
		}
		out[id] = c
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read counters: %w", err)
	}
	return out, nil
}

// refused returns how many frames each fabric end refused for their length: a
// veth passes no frame to an end whose MTU it exceeds, and counts it there as
// dropped on reception.
func (f *Fabric) refused() (map[int]uint64, error) {
	route, err := dialRouteAt(NetnsPath(f.names.fabric()))
	if err != nil {
		return nil, err
	}
	defer route.Close()
	devices, err := route.devices(true)
	if err != nil {
		return nil, err
	}
	out := make(map[int]uint64, len(devices))
	for _, d := range devices {
		out[d.index] = d.rxDropped
	}
	return out, nil
}
