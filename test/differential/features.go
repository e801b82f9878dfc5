package differential

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/underlay-cni/underlay/test/vpcmodel"
)

// Features are what worlds are made of besides VPCs, subnets, interfaces with
// addresses and prefixes, their source/destination checks, and packets of all kinds.
type Features struct {
	Groups    bool // security groups; without, each interface has one that allows all
	Lists     bool // prefix lists, in rules and routes
	ACLs      bool
	Tables    bool // route tables, and with them middleboxes
	Peerings  bool
	Fragments bool // fragments are judged with their datagram
	Exempt    bool // the VPC's services
	Clock     bool // the fabric's clock can be moved, so that idle flows can be tested
	Internet  bool // internet gateways, Elastic IPs, edge tables, MTU
	NAT       bool // NAT gateways
	Records   bool // flow records
	IPv6      bool // two of three worlds have blocks of IPv6
}

// Enforced are those that the fabric enforces. Whatever it learns is added here,
// and nowhere else.
var Enforced = Features{Groups: true, Lists: true, ACLs: true, Tables: true, Peerings: true, Fragments: true, Internet: true, NAT: true, Exempt: true, Records: true, IPv6: true}

// Missing names what is not enforced, for the summary of a run.
func (f Features) Missing() string {
	var names []string
	for name, there := range map[string]bool{
		"security groups": f.Groups, "prefix lists": f.Lists, "network ACLs": f.ACLs, "route tables": f.Tables,
		"peerings": f.Peerings, "fragments": f.Fragments, "exempt services": f.Exempt, "idle timeouts": f.Clock,
		"internet gateways": f.Internet, "NAT gateways": f.NAT, "flow records": f.Records, "IPv6": f.IPv6,
	} {
		if !there {
			names = append(names, name)
		}
	}
	return strings.Join(sorted(names), ", ")
}

// Lacks names what a script needs and f does not have, or "".
func (f Features) Lacks(s vpcmodel.Script) string {
	for _, st := range s {
		needs, there := "", true
		switch st := st.(type) {
		case vpcmodel.MakeSubnet:
			if st.CIDR6.IsValid() {
				needs, there = "IPv6", f.IPv6
			}
		case vpcmodel.Allow:
			needs, there = "security groups", f.Groups
			if st.List != "" {
				needs, there = "prefix lists", f.Lists
			}
		case vpcmodel.SetList:
			needs, there = "prefix lists", f.Lists
		case vpcmodel.MakeACL:
			needs, there = "network ACLs", f.ACLs
		case vpcmodel.MakeTable:
			needs, there = "route tables", f.Tables
		case vpcmodel.MakePeering:
			needs, there = "peerings", f.Peerings
		case vpcmodel.MakeGateway, vpcmodel.MakeElastic:
			needs, there = "internet gateways", f.Internet
		case vpcmodel.MakeNAT:
			needs, there = "NAT gateways", f.NAT
		case vpcmodel.Wait:
			needs, there = "idle timeouts", f.Clock
		case vpcmodel.Send:
			if st.Fragments > 0 || st.Orphan {
				needs, there = "fragments", f.Fragments
			}
			if strings.HasPrefix(st.Want, "service") && !st.Packet.Discovery() {
				needs, there = "exempt services", f.Exempt
				if !served(st.Dst) {
					needs, there = "somebody who serves at "+st.Dst.String(), false
				}
			}
			if st.Length > vpcmodel.MTU {
				needs, there = "an MTU below that of its links", false
			}
		}
		if !there {
			return needs
		}
	}
	return ""
}

// unserved are addresses of services that vpcd does not run: of the others, only
// the routers' are left out, which answer nothing but ARP and discovery.
var unserved = []string{"169.254.170.2", "169.254.169.123", "169.254.169.250", "169.254.169.251", "fd00:ec2::253", "fd00:ec2::254", "fe80:ec2::1"}

// served reports whether something answers at a service's address.
func served(a netip.Addr) bool {
	host := a.AsSlice()
	return !slices.Contains(unserved, a.String()) && (a.IsLinkLocalUnicast() || host[len(host)-1] != 1)
}

// dual reports whether the VPCs of a seed's world have blocks of IPv6: two of
// three, of each emphasis.
func (f Features) dual(seed uint64) bool {
	return f.IPv6 && (seed+seed/uint64(len(emphases)))%3 != 1
}

func sortedKeys[K ~string, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
