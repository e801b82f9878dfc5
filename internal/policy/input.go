package policy

import (
	"net/netip"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// Input is all that verdicts depend on. It is not changed by this package and
// must not be changed while a Compiler made of it is in use.
type Input struct {
	// Security groups, as far as they are known: those that endpoints of this
	// node have.
	Groups map[vpc.SecurityGroupID]SecurityGroup
	// PrefixLists are the entries of the prefix lists that rules name.
	PrefixLists map[vpc.PrefixListID][]netip.Prefix
	// Members are the private addresses of the ENIs that carry a group, of
	// those that rules name: primary, secondary, IPv6, delegated prefixes.
	Members map[vpc.SecurityGroupID][]netip.Prefix
	// Exempt is what no security group judges, by the other end's address:
	// DNS, NTP, instance metadata, the router.
	Exempt []Exemption

	// Policies of all namespaces that have endpoints on this node.
	Policies []NetworkPolicy
	// Pods are those that selectors may find: all of the cluster, without
	// those that have ended.
	Pods []Pod
	// Namespaces are their labels by name.
	Namespaces map[string]map[string]string
}

// Endpoint is whose packets are judged.
type Endpoint struct {
	Pod
	// Groups of the endpoint; "": no security group judges it.
	Groups vpc.GroupSet
	// AuditGroups: what the groups would deny passes, and is reported.
	AuditGroups bool
	// Stack keeps the endpoint's packets on the node's network stack: they are
	// never forwarded directly. For a VM's pod, whose device is a bridge, and
	// one whose bandwidth is shaped on the host's device.
	Stack bool
}

// Protocol is an IP protocol's number.
type Protocol uint8

// The protocols that have ports, or types and codes.
const (
	ICMP   Protocol = 1
	TCP    Protocol = 6
	UDP    Protocol = 17
	ICMPv6 Protocol = 58
	SCTP   Protocol = 132
)

// SecurityGroup is a group's rules. A group has no rule that denies.
type SecurityGroup struct {
	Ingress, Egress []GroupRule
}

// AnyProtocol and AnyPort are what EC2 says -1 for.
const (
	AnyProtocol = -1
	AnyPort     = -1
)

// GroupRule is a security group rule. Of CIDR, PrefixList and Group one is set.
type GroupRule struct {
	ID       string // "sgr-…"
	Protocol int    // the number, or AnyProtocol
	// Of TCP and UDP the range of destination ports, both included; of ICMP
	// and ICMPv6 type and code. AnyPort in FromPort: all; in ToPort of ICMP:
	// every code. Of other protocols they mean nothing.
	FromPort, ToPort int
	CIDR             netip.Prefix
	PrefixList       vpc.PrefixListID
	Group            vpc.SecurityGroupID
}

// Exemption is a range of addresses with what it is: "Amazon DNS".
type Exemption struct {
	Name   string
	Prefix netip.Prefix
}

// Pod is a pod as selectors see it.
type Pod struct {
	Namespace, Name string
	Labels          map[string]string
	Addrs           []netip.Addr
	// HostNetwork: it has the node's addresses, by which no selector can tell
	// it from the node: none selects it.
	HostNetwork bool
	Ports       []NamedPort // of its containers
}

// NamedPort is a container's port that has a name.
type NamedPort struct {
	Name     string
	Protocol Protocol
	Port     uint16
}

// NetworkPolicy is an object of networking.k8s.io/v1 of that kind.
type NetworkPolicy struct {
	Namespace, Name string
	PodSelector     Selector
	// Types are the directions in which the pods are isolated. None: ingress,
	// and egress if there are egress rules.
	Types           []Direction
	Ingress, Egress []PolicyRule
	// Audit: what the policy would deny passes, and is reported. On a pod that
	// another policy isolates in a direction it says nothing in that direction:
	// its rules, which can but allow more, do not count.
	Audit bool
}

// PolicyRule allows what has one of the peers at the other end and one of the
// ports as its destination.
type PolicyRule struct {
	Peers []Peer // none: everybody
	Ports []Port // none: all, of every protocol
}

// Peer is either a block of addresses or pods: those of PodSelector in the
// namespaces of NamespaceSelector. Without the former all pods there; without
// the latter those of the policy's namespace.
type Peer struct {
	Block                          *Block
	PodSelector, NamespaceSelector *Selector
}

// Block is ipBlock: CIDR without Except.
type Block struct {
	CIDR   netip.Prefix
	Except []netip.Prefix
}

// Port is one port, a range, or all of a protocol.
type Port struct {
	Protocol Protocol // 0: TCP
	// Name, if set, is that of a port of the pod that receives: the selected
	// one for ingress, whoever has the destination address for egress.
	Name string
	Port uint16 // 0 and no name: all
	End  uint16 // last of the range; 0: Port alone
}

// Selector is a label selector; without requirements it selects everything.
type Selector struct {
	MatchLabels map[string]string
	Expressions []Requirement
}

// Operator of a Requirement, as Kubernetes spells it.
type Operator string

// The operators.
const (
	In           Operator = "In"
	NotIn        Operator = "NotIn"
	Exists       Operator = "Exists"
	DoesNotExist Operator = "DoesNotExist"
)

// Requirement is one of a selector's matchExpressions.
type Requirement struct {
	Key      string
	Operator Operator
	Values   []string
}

// Direction is the endpoint's: Egress is what it sends. The numbers are those of
// bpf/node_policy.h.
type Direction uint8

// The directions.
const (
	Egress  Direction = 0
	Ingress Direction = 1
)

func (d Direction) String() string {
	if d == Egress {
		return "egress"
	}
	return "ingress"
}

// GateID names one of the two gates; the numbers are those of bpf/node_policy.h.
type GateID uint8

// The gates.
const (
	Groups   GateID = 0
	Policies GateID = 1
	Gates           = 2 // how many there are
)

func (g GateID) String() string {
	if g == Groups {
		return "security groups"
	}
	return "NetworkPolicy"
}

// Flow is the first packet of one.
type Flow struct {
	Src, Dst           netip.Addr
	Protocol           Protocol
	SrcPort, DstPort   uint16 // TCP, UDP, SCTP
	ICMPType, ICMPCode uint8
	// FromHost: the packet came from no interface, the node's own processes
	// sent it.
	FromHost bool
}

// RuleID names the rule that made a verdict.
type RuleID uint32

// The ids that stand for no rule of the input.
const (
	NoRule   RuleID = 0 // the gate does not judge the endpoint
	RuleHost RuleID = 1 // the node reaches its own pods
	RuleSelf RuleID = 2 // a pod reaches itself

	firstRule RuleID = 16
)

// Verdict is what one gate says.
type Verdict struct {
	Allow bool
	Rule  RuleID
	// Audit: the rule would deny it, but is in audit mode.
	Audit bool
	// Untracked: AWS does not track the flow, since rules allow it from and to
	// everybody, so that it is cut when they change. Security groups only.
	Untracked bool
}
