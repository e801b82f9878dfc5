package agentapi

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi/pipe"
)

// ProtocolVersion is the version of the messages in this file. Fields may be
// added under the same number: both sides ignore what they do not know.
const ProtocolVersion = 1

// MaxMessage bounds a message in either direction, in bytes, without the
// length in front of it.
const MaxMessage = pipe.MaxMessage

// Op names what a request asks for.
type Op string

// The operations of people's tools. CNI's come as a pipe.Call.
const (
	OpVersion Op = "version"
	OpStatus  Op = "status"
	OpInspect Op = "inspect"
	OpFlows   Op = "flows"
	OpMonitor Op = "monitor"
)

// Code is the number of an error: CNI's own up to 99 (CNI specification 1.1,
// section "Error"), Underlay's from 100.
type Code uint

// The codes in use.
const (
	CodeIncompatibleVersion Code = 1
	CodeUnknownContainer    Code = 3
	CodeInvalidEnvironment  Code = 4
	CodeIO                  Code = 5
	CodeDecoding            Code = 6
	CodeInvalidConfig       Code = 7
	CodeInvalidNetns        Code = 8
	CodeTryAgain            Code = 11
	CodeNotAvailable        Code = 50
	CodeLimited             Code = 51

	CodeAgentUnreachable Code = 100 // nobody listens on the socket, or nobody answers
	CodeNoAddress        Code = 101 // EC2 gave no address within the deadline
	CodeSubnetFull       Code = 102 // the subnet has no address left
	CodeNodeFull         Code = 103 // the instance type holds no more addresses
	CodeDenied           Code = 104 // EC2 denies the call: an IAM permission is missing
	CodeDatapath         Code = 105 // the kernel refused a part of the endpoint
	CodeCheckFailed      Code = 106 // the endpoint is not as ADD left it
	CodeConflict         Code = 107 // the same container and interface with another namespace, or other groups
	CodeGroups           Code = 108 // the security groups that are asked for are not to be had
	CodeSetsFull         Code = 109 // other sets of security groups have the node's interfaces
	CodeInternal         Code = 199
)

// Error is an error as it travels: a code, a sentence that ends with the next
// step, and details that may be long.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
	Details string `json:"details,omitempty"`
}

func (e *Error) Error() string {
	if e.Details == "" {
		return e.Message
	}
	return e.Message + " (" + e.Details + ")"
}

// Errorf returns an Error with code and a formatted message.
func Errorf(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// Request is one request.
type Request struct {
	Version int           `json:"version"`
	Op      Op            `json:"op"`
	Flows   *FlowQuery    `json:"flows,omitempty"`   // flows: what is asked for
	Monitor *MonitorQuery `json:"monitor,omitempty"` // monitor: the same
}

// Attachment is one interface of one container, as the runtime names it. As
// JSON it is a spooled release.
type Attachment struct {
	Network     string     `json:"network,omitempty"`
	ContainerID string     `json:"containerId"`
	IfName      string     `json:"ifName"`
	Netns       string     `json:"netns,omitempty"` // path in the runtime's mounts, for people
	Pod         Pod        `json:"pod,omitzero"`
	Addr        netip.Addr `json:"addr,omitzero"` // check: the address that ADD answered
	Groups      []string   `json:"-"`             // add: IDs or names of the security groups that are asked for; none: the node's own
	GroupsMode  string     `json:"-"`             // add: who judges by them, GroupsVPC or GroupsHost; "": as the agent is set up
	Subnet      string     `json:"-"`             // add: ID of the subnet that the address is to be of; "": the node's own
}

// Who judges by a pod's security groups.
const (
	// GroupsVPC: the VPC, by the pod's interface, and the node what the VPC does
	// not see.
	GroupsVPC = "vpc"
	// GroupsHost: the node alone. To the VPC the pod has the node's groups.
	GroupsHost = "host"
)

// Pod names a workload as its orchestrator does; empty fields are unknown.
type Pod struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid,omitempty"`
}

func (p Pod) String() string {
	switch {
	case p.Name == "":
		return ""
	case p.Namespace == "":
		return p.Name
	}
	return p.Namespace + "/" + p.Name
}

// Response is the answer to a Request: Error, or the one field that belongs to
// the operation; status answers with neither when all is well.
type Response struct {
	Version  int         `json:"version"`
	Error    *Error      `json:"error,omitempty"`
	Agent    string      `json:"agent,omitempty"`    // version: the agent's own version
	Inspect  *Inspection `json:"inspect,omitempty"`  // inspect
	Flows    *Flows      `json:"flows,omitempty"`    // flows
	Verdicts *Verdicts   `json:"verdicts,omitempty"` // monitor
}

// Result is what ADD made.
type Result struct {
	Addr       netip.Addr // the pod's /32
	Gateway    netip.Addr // link-local next hop inside the pod
	MAC        string     // of the pod's interface
	HostIfName string
	HostMAC    string
	MTU        int
	ENI        string
}

// Inspection is the agent's view of its node at one moment.
type Inspection struct {
	Version    string       `json:"version"`
	Node       Node         `json:"node"`
	Healthy    bool         `json:"healthy"`
	Reason     string       `json:"reason,omitempty"` // why it is not healthy, and the next step
	Since      time.Time    `json:"since"`            // start of this agent process
	LastErrors []Incident   `json:"lastErrors"`
	ENIs       []ENI        `json:"enis"`
	Addresses  []Address    `json:"addresses"`
	Omitted    int          `json:"omitted,omitempty"` // free addresses left out of Addresses to keep the message small
	Endpoints  []Endpoint   `json:"endpoints"`
	Waiting    int          `json:"waiting"` // ADDs that wait for an address
	Sets       []GroupSet   `json:"groupSets"`
	Policy     *GroupPolicy `json:"groupPolicy,omitempty"`
	SetsLeft   int          `json:"groupSetsLeft"` // how many further sets of security groups the node has interfaces for
	Counters   Counters     `json:"counters"`
	Limits     Limits       `json:"limits"`
	Datapath   Datapath     `json:"datapath"` // which way pods' packets take
}

// Datapath is which way pods' packets take through the node.
type Datapath struct {
	// Where the programs stand, on pods' devices and on ENIs: clsact or tcx.
	Hook    string `json:"hook"`
	ENIHook string `json:"eniHook"`
	Moved   int    `json:"moved,omitempty"` // busy pods whose programs are on tcx by now, although hook is clsact
	Direct  bool   `json:"direct"`          // connections within the VPC may bypass the kernel's stack
	// Entries of conntrack, and those that bypass the stack, a few seconds ago.
	Connections       int     `json:"connections"`
	DirectConnections int     `json:"directConnections"`
	MaxConnections    int     `json:"maxConnections"`
	DirectPackets     uint64  `json:"directPackets"` // of pods, since the node started
	StackPackets      uint64  `json:"stackPackets"`
	SlowShare         float64 `json:"slowShare"` // part of pods' packets that took the stack, 0 to 1
}

// Node is the instance the agent runs on.
type Node struct {
	InstanceID       string         `json:"instanceId"`
	InstanceType     string         `json:"instanceType"`
	AvailabilityZone string         `json:"az"`
	Region           string         `json:"region"`
	VPC              string         `json:"vpc"`
	VPCCIDRs         []netip.Prefix `json:"vpcCidrs"`
	Subnet           string         `json:"subnet"`
	IP               netip.Addr     `json:"ip,omitzero"`
	Cluster          string         `json:"cluster,omitempty"`
}

// Incident is an error that the agent lived through; equal ones in a row are
// counted, not repeated.
type Incident struct {
	Time    time.Time `json:"time"` // of the last occurrence
	Op      string    `json:"op"`
	Message string    `json:"message"`
	Count   int       `json:"count"`
}

// ENI is one interface of the node with what the agent holds on it.
type ENI struct {
	ID        string         `json:"id"`
	Device    int            `json:"device"` // EC2's device index
	IfName    string         `json:"ifname,omitempty"`
	MAC       string         `json:"mac"`
	Primary   netip.Addr     `json:"primary"`
	Subnet    string         `json:"subnet"`
	Groups    []string       `json:"groups"`
	Prefixes  []netip.Prefix `json:"prefixes,omitempty"`
	Managed   bool           `json:"managed"` // false: uses a slot, never the pool
	State     string         `json:"state"`
	Addresses Counts         `json:"addresses"` // of the pool: without the primary
}

// GroupSet is what pods with one set of security groups have of the node.
type GroupSet struct {
	Groups  []string   `json:"groups"`            // IDs, sorted
	Node    bool       `json:"node,omitempty"`    // the node's own: of pods that ask for none
	ENIs    int        `json:"enis"`              // interfaces of the set, those on their way included
	InUse   int        `json:"inUse"`             // addresses that pods have
	Free    int        `json:"free"`              // addresses that the next pod may have at once
	Coming  int        `json:"coming"`            // addresses on their way
	Cooling int        `json:"cooling"`           // addresses that rest
	Waiting int        `json:"waiting"`           // pods that wait for one
	Until   *time.Time `json:"until,omitempty"`   // when the first idle interface goes back unless a pod comes
	Drifted int        `json:"drifted,omitempty"` // interfaces whose groups somebody has changed: they get no further pod
}

// Who reads the rules of security groups.
const (
	SourceOwn    = "own"    // the agent
	SourcePoller = "poller" // one that other agents follow, too
)

// GroupPolicy is how the node judges by security groups what the VPC does not
// see: the traffic between its own pods.
type GroupPolicy struct {
	Mode         string     `json:"mode"`    // "vpc": what comes over the wire the VPC has judged
	Judged       int        `json:"judged"`  // pods
	Host         int        `json:"host"`    // of these, pods by whose groups the node judges alone: to the VPC they have the node's
	Members      int        `json:"members"` // addresses with a group that rules name, outside of the node; for pods of mode host
	Groups       int        `json:"groups"`  // whose rules are read
	Rules        int        `json:"rules"`
	Read         *time.Time `json:"read,omitempty"` // when they were read last
	EverySeconds float64    `json:"everySeconds,omitempty"`
	Error        string     `json:"error,omitempty"`       // of the last read
	Source       string     `json:"source,omitempty"`      // SourceOwn or SourcePoller
	Poller       string     `json:"poller,omitempty"`      // its socket, if the agent has been told of one
	PollerError  string     `json:"pollerError,omitempty"` // why it is not followed
}

// Counts is a number of addresses by state.
type Counts struct {
	Assigned int `json:"assigned"`
	Free     int `json:"free"`
	Bound    int `json:"bound"`
	Cooling  int `json:"cooling"`
	Foreign  int `json:"foreign"` // in use by the node itself, an Elastic IP or another CNI
	Total    int `json:"total"`
	Limit    int `json:"limit"` // what the interface can hold beside its primary
}

// Address is one address of the pool.
type Address struct {
	IP       netip.Addr `json:"ip"`
	State    string     `json:"state"` // assigned, free, bound, cooling, foreign
	ENI      string     `json:"eni"`
	Endpoint string     `json:"endpoint,omitempty"` // containerId/ifName, when bound
	Until    *time.Time `json:"until,omitempty"`    // end of the cooldown
}

// Endpoint is one pod interface.
type Endpoint struct {
	ContainerID string     `json:"containerId"`
	IfName      string     `json:"ifName"`
	Netns       string     `json:"netns"`
	IP          netip.Addr `json:"ip"`
	ENI         string     `json:"eni"`
	MAC         string     `json:"mac"`
	HostIfName  string     `json:"hostIfName"`
	Pod         Pod        `json:"pod"`
	Groups      []string   `json:"groups,omitempty"`     // its security groups: what its ENI carried when it got the address
	GroupsMode  string     `json:"groupsMode,omitempty"` // "host": the node judges by Groups, and the VPC sees the node's
	Since       time.Time  `json:"since"`
	State       string     `json:"state"`             // adding, live, tombstone
	Problem     string     `json:"problem,omitempty"` // e.g. EC2 no longer lists the address
}

// Counters are counts since the datapath was first loaded.
type Counters struct {
	Drops map[string]uint64 `json:"drops"` // packets by reason
}

// Limits is what the instance type allows, as the agent is set up.
type Limits struct {
	ENIs       int `json:"enis"` // for pods: on the default network card
	IPv4PerENI int `json:"ipv4PerEni"`
	Addresses  int `json:"addresses"` // for pods, on all of them
	MaxPods    int `json:"maxPods"`   // the type's well-known figure: with pods in the node's own network
}

// decodeRequest parses and checks one request.
func decodeRequest(b []byte) (*Request, error) {
	var r Request
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, Errorf(CodeDecoding, "decode request: %v; speak to this socket with underlay-cni or underlay", err)
	}
	if r.Version != ProtocolVersion {
		return &r, Errorf(CodeIncompatibleVersion, "the agent speaks protocol version %d, the request is of version %d; install the underlay that came with this agent", ProtocolVersion, r.Version)
	}
	switch r.Op {
	case OpVersion, OpStatus, OpInspect, OpFlows, OpMonitor:
	default:
		return &r, Errorf(CodeDecoding, "unknown operation %q; install the underlay that came with this agent", r.Op)
	}
	return &r, nil
}

// What the commit record holds, in bytes of UTF-8. A container is known by its
// ID, so that a longer one is refused; a Pod's fields are cut to fit.
const (
	MaxContainerID  = 128
	MaxPodNamespace = 64
	MaxPodName      = 256
	MaxPodUID       = 40
)
