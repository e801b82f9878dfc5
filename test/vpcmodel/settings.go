package vpcmodel

import "time"

// Settings are the points where the facts infer, or are silent. Each says what
// they say.
type Settings struct {
	// ReferencesCoverPrefixes: a group reference matches "addresses in delegated
	// prefixes [inf, must hold for EKS to work]".
	ReferencesCoverPrefixes bool

	// GroupChangeKeepsFlows: "Effect of swapping the ENI's group set on tracked
	// flows: [inf] same as rule removal", that is, they go on.
	GroupChangeKeepsFlows bool

	// EgressReferencesByAddress: a reference in an egress rule matches the
	// destination's address also when the route leads through a middlebox. The
	// facts say that a reference is "not preserved through a middlebox"; what
	// could be lost on the way is the source's identity, not the destination's.
	// It does not reach over a peering: beyond it an address alone names nobody.
	EgressReferencesByAddress bool

	// MidStream: a TCP segment that no tracked flow claims is judged by the
	// rules as a SYN is, and begins a tracked flow. The facts know no TCP state
	// beyond "times out or ends".
	MidStream bool

	// TrackUndelivered: a packet that passed the sender's gate is tracked there
	// whatever becomes of it later. It follows from "independent" gates; the
	// facts do not say it. TrackUnrouted: also when no route leads anywhere, that
	// is, the gate comes before the route.
	TrackUndelivered bool
	TrackUnrouted    bool

	// PeeringChecksSource: a packet enters a peering only when its source is in
	// the sending VPC's CIDR. The facts: "no transit", and "uRPF not applied".
	PeeringChecksSource bool

	// LinkLocalRouted: routes hold for 169.254.0.0/16 outside 169.254.168.0/22.
	// The facts except that /22 alone; RFC 3927 section 7 forbids routers to
	// forward any of it. Of IPv6 nothing from or to fe80::/10 is forwarded (RFC
	// 4291, section 2.5.6); the facts name fd00:ec2::/32 alone.
	LinkLocalRouted bool

	// IGWPath is the traffic-path of what leaves by an internet gateway: "2 IGW …,
	// 8 IGW (Nitro)".
	IGWPath int

	// LogUnrouted: what no route leads anywhere is logged at its sender, as its
	// gate says. The facts know REJECT, "not allowed by SG or NACL", and say
	// nothing of what is dropped for other reasons, nor which comes first.
	LogUnrouted bool

	// Idle timeouts that the facts leave open. OtherTimeout is from "reply
	// accepted within 600 s". TCPHandshake holds until the answer to a SYN is
	// acknowledged, TCPClosed after a RST, or a FIN of each side: the segments
	// that are still on their way pass, and a SYN begins another flow.
	ICMPTimeout  time.Duration
	OtherTimeout time.Duration
	TCPHandshake time.Duration
	TCPClosed    time.Duration

	// MaxTracked flows per instance, 0 for no limit: "per-instance conntrack
	// maximum, unpublished".
	MaxTracked int
}

// Defaults are the settings that the facts suggest.
func Defaults() Settings {
	return Settings{
		ReferencesCoverPrefixes:   true,
		GroupChangeKeepsFlows:     true,
		EgressReferencesByAddress: true,
		MidStream:                 true,
		TrackUndelivered:          true,
		IGWPath:                   8,
		ICMPTimeout:               30 * time.Second,
		OtherTimeout:              600 * time.Second,
		TCPHandshake:              60 * time.Second,
		TCPClosed:                 10 * time.Second,
	}
}

// Timeouts of an interface, its ConnectionTrackingSpecification.
type Timeouts struct {
	TCPEstablished time.Duration // "60..432000, default 432000"
	UDPStream      time.Duration // "60..180 def 180 (more than one request/response)"
	UDP            time.Duration // "30..60 def 30"
}

// DefaultTimeouts are those of an instance type before Nitro v6.
var DefaultTimeouts = Timeouts{TCPEstablished: 432000 * time.Second, UDPStream: 180 * time.Second, UDP: 30 * time.Second}
