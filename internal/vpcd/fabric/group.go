package fabric

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// Group is a security group: what it lists may pass, nothing else. An
// interface with several groups has the rules of all.
type Group struct {
	ID      vpc.SecurityGroupID
	Ingress []Rule // destination ports are the interface's own
	Egress  []Rule
}

// AllProtocols is the Protocol of a rule for any protocol, at all ports.
const AllProtocols = -1

// Any is a From or To that means all: all ports, all ICMP types, all codes.
const Any = -1

// Rule allows a protocol from or to peers, of IPv4 or IPv6.
type Rule struct {
	Protocol int // IP protocol number, or AllProtocols
	// TCP and UDP: the destination ports From to To, or Any in both. ICMP and
	// ICMPv6 (58): the type From and the code To, Any each. Other protocols:
	// without meaning.
	From, To int
	// Peers are CIDR blocks (one, or those of a prefix list), none if Group is
	// set.
	Peers []netip.Prefix
	// Group are the interfaces of the VPC that have this group, by any address
	// of theirs. A group that no interface has, or that is gone, matches nothing.
	Group vpc.SecurityGroupID
}

// IdleTimeouts are how long a tracked flow stays without a packet, in whole
// seconds; 0 stands for AWS's default. A change is for the flows that begin
// after it.
type IdleTimeouts struct {
	TCPEstablished time.Duration // default 432000 s
	UDP            time.Duration // default 30 s
	UDPStream      time.Duration // more than one request and response; default 180 s
}

// AWS's defaults (EC2 user guide, "Idle connection tracking timeout").
const (
	defaultTCPEstablished = 432000 * time.Second
	defaultUDP            = 30 * time.Second
	defaultUDPStream      = 180 * time.Second
)

// Limits of a policy, as bpf/fabric_gate.h has them.
const (
	maxGroups = len(bpfgen.FabricPolicy{}.Groups)
	maxRules  = len(bpfgen.FabricPolicy{}.Rules[0])
)

const (
	egress  = bpfgen.FabricDirectionEGRESS
	ingress = bpfgen.FabricDirectionINGRESS
	anyPort = 0xffff // ANY
)

// IANA's protocol numbers that rules treat in a way of their own.
const (
	protoICMP = 1
	protoTCP  = 6
	protoUDP  = 17

	protoICMPv6 = 58
)

// groupNumber is by which the programs know a group: the last 16 hexadecimal
// digits of its ID. check refuses two groups with one number.
func groupNumber(id vpc.SecurityGroupID) (uint64, error) {
	if err := vpc.CheckID("sg", string(id)); err != nil {
		return 0, err
	}
	digits := strings.TrimPrefix(string(id), "sg-")
	n, err := strconv.ParseUint(digits[max(0, len(digits)-16):], 16, 64)
	if err != nil {
		return 0, fmt.Errorf("read number of %s: %w", id, err)
	}
	if n == 0 {
		return 0, fmt.Errorf("group %s has number 0, which means none", id)
	}
	return n, nil
}

// ruleset is a Group in the programs' form.
type ruleset struct {
	number uint64
	rules  [2][]bpfgen.FabricRule // by direction
	rules6 [2][]bpfgen.FabricRule6
}

// checkGroups turns groups into rulesets. Rules that are not valid are left
// out: who allows less is safe.
func checkGroups(groups []Group) (map[vpc.SecurityGroupID]*ruleset, []error) {
	var errs []error
	out := map[vpc.SecurityGroupID]*ruleset{}
	owner := map[uint64]vpc.SecurityGroupID{}
	for _, g := range groups {
		n, err := groupNumber(g.ID)
		if err == nil && out[g.ID] != nil {
			err = errors.New("occurs twice")
		}
		if other, ok := owner[n]; err == nil && ok {
			err = fmt.Errorf("has the same last 16 digits as %s", other)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("security group %s: %w", g.ID, err))
			continue
		}
		owner[n] = g.ID
		s := &ruleset{number: n}
		for direction, rules := range map[bpfgen.FabricDirection][]Rule{egress: g.Egress, ingress: g.Ingress} {
			for _, r := range rules {
				compiled, six, err := compile(r)
				if err != nil {
					errs = append(errs, fmt.Errorf("security group %s: rule %+v: %w", g.ID, r, err))
					continue
				}
				s.rules[direction] = append(s.rules[direction], compiled...)
				s.rules6[direction] = append(s.rules6[direction], six...)
			}
		}
		out[g.ID] = s
	}
	return out, errs
}

// compile returns a rule in the programs' form, one for each peer: those of IPv4
// and those of IPv6. One for a group is of both.
func compile(r Rule) ([]bpfgen.FabricRule, []bpfgen.FabricRule6, error) {
	var head bpfgen.FabricRule
	switch {
	case r.Protocol == AllProtocols:
		head.AllProtocols = 1
	case r.Protocol < 0 || r.Protocol > 255:
		return nil, nil, errors.New("no such protocol")
	case r.Protocol == protoTCP || r.Protocol == protoUDP:
		head.Protocol = uint8(r.Protocol)
		head.From, head.To = 0, 65535
		if r.From != Any || r.To != Any {
			if r.From < 0 || r.To > 65535 || r.From > r.To {
				return nil, nil, errors.New("no such ports")
			}
			head.From, head.To = uint16(r.From), uint16(r.To)
		}
	case r.Protocol == protoICMP || r.Protocol == protoICMPv6:
		head.Protocol = uint8(r.Protocol)
		for _, v := range []struct {
			in  int
			out *uint16
		}{{r.From, &head.From}, {r.To, &head.To}} {
			switch {
			case v.in == Any:
				*v.out = anyPort
			case v.in < 0 || v.in > 255:
				return nil, nil, errors.New("no such ICMP type or code")
			default:
				*v.out = uint16(v.in)
			}
		}
	default:
		head.Protocol = uint8(r.Protocol)
	}
	if r.Group != "" {
		if len(r.Peers) > 0 {
			return nil, nil, errors.New("has a group and CIDR blocks as peers")
		}
		n, err := groupNumber(r.Group)
		if err != nil {
			return nil, nil, err
		}
		head.Group = n
		return []bpfgen.FabricRule{head}, []bpfgen.FabricRule6{rule6(head)}, nil
	}
	var out []bpfgen.FabricRule
	var six []bpfgen.FabricRule6
	for _, p := range r.Peers {
		if !p.IsValid() {
			return nil, nil, errors.New("has a CIDR block that is none")
		}
		if !p.Addr().Is4() {
			one := rule6(head)
			one.Net, one.Mask, one.Everybody = words(p.Masked().Addr()), netmask6(p), b2u(p.Bits() == 0)
			six = append(six, one)
			continue
		}
		one := head
		one.Net, one.Mask = be32(p.Masked().Addr()), netmask(p)
		out = append(out, one)
	}
	return out, six, nil
}

// anywhere tells whether the rule is for 0.0.0.0/0.
func anywhere(r bpfgen.FabricRule) bool { return r.Group == 0 && r.Mask == 0 }

// compareRules puts rules for 0.0.0.0/0 first: the first that matches tells
// whether a flow may go untracked. The rest of the order is of no meaning, but
// the same for equal sets.
func compareRules(a, b bpfgen.FabricRule) int {
	first := func(r bpfgen.FabricRule) int {
		if anywhere(r) {
			return 0
		}
		return 1
	}
	return cmp.Or(cmp.Compare(first(a), first(b)), cmp.Compare(a.Group, b.Group), cmp.Compare(a.Net, b.Net), cmp.Compare(a.Mask, b.Mask),
		cmp.Compare(a.AllProtocols, b.AllProtocols), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.From, b.From), cmp.Compare(a.To, b.To))
}

// policyOf puts groups together. What does not fit is left out, and the error
// says so.
func policyOf(groups []vpc.SecurityGroupID, timeouts IdleTimeouts, all map[vpc.SecurityGroupID]*ruleset) (*bpfgen.FabricPolicy, error) {
	var errs []error
	p := &bpfgen.FabricPolicy{
		TcpTimeout:    seconds(timeouts.TCPEstablished, defaultTCPEstablished),
		UdpTimeout:    seconds(timeouts.UDP, defaultUDP),
		StreamTimeout: seconds(timeouts.UDPStream, defaultUDPStream),
	}
	var numbers []uint64
	var rules [2][]bpfgen.FabricRule
	for _, id := range groups {
		s := all[id]
		if s == nil {
			errs = append(errs, fmt.Errorf("its security group %s is not there or not valid", id))
			continue
		}
		numbers = append(numbers, s.number)
		for d := range rules {
			rules[d] = append(rules[d], s.rules[d]...)
		}
	}
	slices.Sort(numbers)
	numbers = slices.Compact(numbers)
	if len(numbers) > maxGroups {
		errs = append(errs, fmt.Errorf("has %d security groups, of which %d count", len(numbers), maxGroups))
		numbers = numbers[:maxGroups]
	}
	copy(p.Groups[:], numbers)
	for d := range rules {
		slices.SortFunc(rules[d], compareRules)
		rules[d] = slices.Compact(rules[d])
		if len(rules[d]) > maxRules {
			errs = append(errs, fmt.Errorf("has %d rules in one direction, of which %d count", len(rules[d]), maxRules))
			rules[d] = rules[d][:maxRules]
		}
		p.Count[d] = uint32(copy(p.Rules[d][:], rules[d]))
		p.Open[d] = uint32(openTo(rules[d]))
	}
	p.Version = digest(p)
	return p, errors.Join(errs...)
}

// openTo tells of which protocols rules open all ports to 0.0.0.0/0.
func openTo(rules []bpfgen.FabricRule) (open bpfgen.FabricOpenFlag) {
	for _, r := range rules {
		switch {
		case !anywhere(r):
		case r.AllProtocols == 1:
			open |= bpfgen.FabricOpenFlagOPEN_TCP | bpfgen.FabricOpenFlagOPEN_UDP
		case r.From != 0 || r.To != 65535:
		case r.Protocol == protoTCP:
			open |= bpfgen.FabricOpenFlagOPEN_TCP
		case r.Protocol == protoUDP:
			open |= bpfgen.FabricOpenFlagOPEN_UDP
		}
	}
	return open
}

func seconds(d, otherwise time.Duration) uint32 { return uint32(cmp.Or(d, otherwise) / time.Second) }

// digest is a policy's version: the same for equal policies, in each process.
func digest(p *bpfgen.FabricPolicy) uint64 {
	return version(p.Groups, p.TcpTimeout, p.UdpTimeout, p.StreamTimeout, p.Count, p.Rules[egress][:p.Count[egress]], p.Rules[ingress][:p.Count[ingress]])
}

// version is a digest of values of fixed size, never 0.
func version(values ...any) uint64 {
	h := sha256.New()
	for _, v := range values {
		if err := binary.Write(h, binary.LittleEndian, v); err != nil {
			panic(err) // a hash takes everything, and these have a fixed size
		}
	}
	return max(1, binary.LittleEndian.Uint64(h.Sum(nil)))
}
