package dns

import (
	"net/netip"
	"regexp"
	"strings"

	"github.com/miekg/dns"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// ttl of every record, in seconds: what the VPC's resolver gives its own names.
const ttl = 60

// maxUDP is the longest answer in a datagram, in bytes (VPC user guide: EDNS0 up
// to 4,096; without it RFC 1035's 512).
const maxUDP = 4096

// Region is what all VPCs of a vpcd share.
type Region struct {
	Name     string
	Internet netip.Addr // the lab's server on its internet; none: there is none
}

// InternetName is the name of the lab's server on its internet (RFC 6761: no
// one else's).
const InternetName = "internet.test."

// Answer answers a query of the interface's guest, or returns nil where the
// VPC has no resolver: enableDnsSupport is off.
func (r Region) Answer(s *store.State, client vpc.ENIID, query *dns.Msg) *dns.Msg {
	e := s.ENI(client)
	if e == nil {
		return nil
	}
	v := s.VPC(e.VPC)
	if v == nil || !v.DNSSupport {
		return nil
	}
	m := new(dns.Msg)
	m.SetReply(query)
	m.RecursionAvailable = true
	switch {
	case query.Opcode != dns.OpcodeQuery:
		m.Rcode = dns.RcodeNotImplemented
		return m
	case len(query.Question) != 1:
		m.Rcode = dns.RcodeFormatError
		return m
	case !query.RecursionDesired || query.Question[0].Qclass != dns.ClassINET:
		// It is a recursive resolver only; how it says so is inference.
		m.Rcode = dns.RcodeRefused
		return m
	}
	if opt := query.IsEdns0(); opt != nil {
		m.SetEdns0(maxUDP, false)
	}
	q := question{state: s, vpc: v, region: r, name: strings.ToLower(dns.Fqdn(query.Question[0].Name)), kind: query.Question[0].Qtype}
	found, zone := q.resolve()
	switch {
	case found != nil:
		found.Header().Name = query.Question[0].Name // as it was asked
		if q.kind == found.Header().Rrtype || q.kind == dns.TypeANY {
			m.Answer = []dns.RR{found}
		} else {
			m.Ns = []dns.RR{soa(zone)}
		}
	case zone != "":
		m.Rcode = dns.RcodeNameError
		if q.name == zone {
			m.Rcode = dns.RcodeSuccess // the zone's own name is there, whatever is in it
		}
		m.Ns = []dns.RR{soa(zone)}
	default:
		m.Rcode = dns.RcodeServerFailure
	}
	return m
}

type question struct {
	state  *store.State
	vpc    *store.VPC
	region Region
	name   string // lower case, with the dot at its end
	kind   uint16
}

// resolve returns the one record that the name has, and the zone that is in
// charge of it; "" when no zone of ours is.
func (q question) resolve() (dns.RR, string) {
	if label, ok := under(q.name, dns.Fqdn(vpc.PrivateDomain(q.region.Name))); ok {
		return q.private(label), dns.Fqdn(vpc.PrivateDomain(q.region.Name))
	}
	if label, ok := under(q.name, dns.Fqdn(vpc.PublicDomain(q.region.Name))); ok {
		return q.public(label), dns.Fqdn(vpc.PublicDomain(q.region.Name))
	}
	if _, ok := under(q.name, "in-addr.arpa."); ok {
		return q.reverse()
	}
	if q.name == InternetName && q.region.Internet.IsValid() {
		return address(q.region.Internet), "test."
	}
	if q.name == "localhost." { // RFC 6761, 6.3
		return address(netip.AddrFrom4([4]byte{127, 0, 0, 1})), "localhost."
	}
	for _, zone := range locally {
		if _, ok := under(q.name, zone); ok {
			return nil, zone
		}
	}
	return nil, ""
}

// locally are zones in which nobody else knows a name either: special ones (RFC
// 6761, RFC 6762), and .internal with the names of other regions' VPCs.
var locally = []string{"internal.", "localhost.", "test.", "invalid.", "local."}

// under splits a name below zone; the zone's own is "".
func under(name, zone string) (string, bool) {
	if name == zone {
		return "", true
	}
	return strings.CutSuffix(name, "."+zone)
}

var (
	ipLabel       = regexp.MustCompile(`^ip-(\d+-\d+-\d+-\d+)$`)
	publicLabel   = regexp.MustCompile(`^ec2-(\d+-\d+-\d+-\d+)$`)
	instanceLabel = regexp.MustCompile(`^i-[0-9a-f]+$`)
)

// numbered reads the address out of a label. One with leading zeros is none.
func numbered(re *regexp.Regexp, label string) (netip.Addr, bool) {
	m := re.FindStringSubmatch(label)
	if m == nil {
		return netip.Addr{}, false
	}
	a, err := netip.ParseAddr(strings.ReplaceAll(m[1], "-", "."))
	return a, err == nil
}

// private resolves a label of the region's private domain. Private names need
// both DNS attributes of the VPC.
func (q question) private(label string) dns.RR {
	if !q.vpc.DNSHostnames {
		return nil
	}
	if a, ok := numbered(ipLabel, label); ok && q.holder(a) != nil {
		return address(a)
	}
	if !instanceLabel.MatchString(label) {
		return nil
	}
	i := q.state.Instance(vpc.InstanceID(label))
	if i == nil || i.VPC != q.vpc.ID || !i.ResourceNameA {
		return nil
	}
	for e := range q.state.InterfacesOf(i.ID) {
		return address(e.Primary) // the first is the primary one
	}
	return nil
}

// public resolves a label of the region's public domain. Where the VPC of the
// address gives such names, its own guests get the private address, and those of
// a peer if that side of the peering allows it.
func (q question) public(label string) dns.RR {
	a, ok := numbered(publicLabel, label)
	if !ok {
		return nil
	}
	x := q.state.ByPublic(a)
	if x == nil {
		return nil
	}
	e := q.state.ENI(x.ENI)
	if e == nil {
		return nil // nobody's: the name comes with an interface
	}
	v := q.state.VPC(e.VPC)
	if v == nil || !v.DNSHostnames || !v.DNSSupport {
		return nil
	}
	if v.ID == q.vpc.ID || q.opened(v.ID) {
		return address(x.Private)
	}
	return address(a)
}

// opened reports whether a peer lets the client's VPC see its private addresses.
func (q question) opened(peer vpc.VPCID) bool {
	p := q.state.PeeringBetween(q.vpc.ID, peer)
	if p == nil {
		return false
	}
	return p.Requester.VPC == peer && p.Requester.DNS || p.Accepter.VPC == peer && p.Accepter.DNS
}

// reverse resolves a name of in-addr.arpa.
func (q question) reverse() (dns.RR, string) {
	labels, _ := under(q.name, "in-addr.arpa.")
	parts := strings.Split(labels, ".")
	for i, j := 0, len(parts)-1; i < j; i, j = i+1, j-1 {
		parts[i], parts[j] = parts[j], parts[i]
	}
	a, err := netip.ParseAddr(strings.Join(parts, "."))
	if err != nil {
		// Part of an address: of a private block nothing is to be had elsewhere.
		if _, ok := under(q.name, "10.in-addr.arpa."); ok {
			return nil, "10.in-addr.arpa."
		}
		return nil, ""
	}
	zone := parts[0] + ".in-addr.arpa."
	if e := q.holder(a); e != nil && q.vpc.DNSHostnames {
		return pointer(q.nameOf(e, a)), zone
	}
	if x := q.state.ByPublic(a); x != nil {
		if e := q.state.ENI(x.ENI); e != nil {
			if v := q.state.VPC(e.VPC); v != nil && v.DNSHostnames && v.DNSSupport {
				return pointer(vpc.PublicName(a, q.region.Name)), zone
			}
		}
	}
	// Reverse zones of addresses that are nobody else's are answered here (Route
	// 53 developer guide, "autodefined system rules"; RFC 6303).
	if a.IsPrivate() || a.IsLoopback() || a.IsLinkLocalUnicast() || q.inVPC(a) {
		return nil, zone
	}
	return nil, ""
}

// nameOf is the private name that EC2 shows for an address of e.
func (q question) nameOf(e *store.ENI, a netip.Addr) string {
	if e.Attachment != nil && e.Attachment.DeviceIndex == 0 && a == e.Primary {
		if i := q.state.Instance(e.Attachment.Instance); i != nil && i.HostType == "resource-name" {
			return string(i.ID) + "." + vpc.PrivateDomain(q.region.Name)
		}
	}
	return vpc.PrivateName(a, q.region.Name)
}

func (q question) inVPC(a netip.Addr) bool {
	for _, c := range q.vpc.CIDRs {
		if c.CIDR.Contains(a) {
			return true
		}
	}
	return false
}

// holder returns the interface of the VPC that has the address, or nil.
func (q question) holder(a netip.Addr) *store.ENI {
	if !q.inVPC(a) {
		return nil
	}
	for _, n := range q.state.Subnets.All() {
		if n.VPC == q.vpc.ID && n.CIDR.Contains(a) {
			return q.state.ByAddress(n.ID, a)
		}
	}
	return nil
}

func header(kind uint16) dns.RR_Header {
	return dns.RR_Header{Rrtype: kind, Class: dns.ClassINET, Ttl: ttl}
}

func address(a netip.Addr) dns.RR {
	return &dns.A{Hdr: header(dns.TypeA), A: a.AsSlice()}
}

func pointer(name string) dns.RR {
	return &dns.PTR{Hdr: header(dns.TypePTR), Ptr: dns.Fqdn(name)}
}

// soa says for how long what is not there may be taken for not there.
func soa(zone string) dns.RR {
	h := header(dns.TypeSOA)
	h.Name = zone
	return &dns.SOA{Hdr: h, Ns: "ns0." + zone, Mbox: "hostmaster.amazon.com.", Serial: 1, Refresh: 3600, Retry: 3600, Expire: 3600, Minttl: ttl}
}
