package datapath

import "github.com/underlay-cni/underlay/internal/datapath/bpfgen"

// What is ours in tables that everybody shares. Nothing that carries other
// numbers is ever changed or removed.
const (
	// MarkMask are the bits of a packet's mark that carry the index of the
	// ENI by which it leaves: 1, 2, 6, 12, 13. They are free of kube-proxy's
	// (0x4000, 0x8000), the AWS VPC CNI's (0x80), Istio's (0x539), Cilium's
	// (0x0f00) and Calico's (0xffff0000).
	MarkMask = uint32(bpfgen.NodeNodeConstNODE_MARK_MASK)
	// MaxENIIndex is the largest index that fits the mask's five bits; 0 is
	// kept for "no mark".
	MaxENIIndex = 31

	// LinkGroup is the device group of host veths: "ul".
	LinkGroup = 0x756c
	// dyingGroup is where host veths wait to be deleted together; it differs
	// from LinkGroup in the lowest bit, so that the guard covers both.
	dyingGroup = LinkGroup | 1
	// Protocol is the origin of our routes and rules ("u"); iproute2's
	// rt_protos names none of that number.
	Protocol = 0x75
	// PodTable holds the pods' /32 routes; its rule has PodRulePriority.
	PodTable        = 30060
	PodRulePriority = 20
	// An ENI of index i has table ENITable+i and the rule of priority
	// ENIRulePriority+i.
	ENITable        = 30060
	ENIRulePriority = 30
)

// Mark returns the packet mark of the ENI of this index, 1..31: the index's
// bits, lowest first, spread over the mask's.
func Mark(index int) uint32 {
	var mark uint32
	for bit := uint32(1); bit != 0; bit <<= 1 {
		if MarkMask&bit == 0 {
			continue
		}
		if index&1 != 0 {
			mark |= bit
		}
		index >>= 1
	}
	return mark
}

// ourGroup tells whether a device's group is one of ours.
func ourGroup(group uint32) bool { return group|1 == dyingGroup }
