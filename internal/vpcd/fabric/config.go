package fabric

import (
	"bytes"
	"cmp"
	"encoding/base32"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// MTU is the largest IP length that the fabric carries: what AWS gives
// interfaces within a VPC (jumbo frames, VPC user guide).
const MTU = 9001

// The services that the fabric's own namespace answers for, to every ENI of
// every VPC. The resolver has a second address in each VPC, Subnet.Resolver.
var (
	IMDSAddr     = netip.AddrFrom4([4]byte{169, 254, 169, 254})
	EndpointAddr = netip.AddrFrom4([4]byte{169, 254, 171, 24})
	ResolverAddr = netip.AddrFrom4([4]byte{169, 254, 169, 253})
)

// resolverAlias stands for Subnet.Resolver in the fabric's namespace (see
// bpf/fabric_service.h).
var resolverAlias = netip.AddrFrom4([4]byte{169, 254, 169, 252})

// RouterMAC is the MAC of every subnet's router. It is locally administered; no
// ENI may have it.
var RouterMAC = net.HardwareAddr{0x02, 0x00, 0x5e, 0x00, 0x00, 0x01}

// Config is the desired state of the fabric, whole.
type Config struct {
	Subnets    []Subnet
	Internet   bool // whether there is an internet; once made, it stays
	Publics    []Public
	Guests     []Guest
	Groups     []Group
	ACLs       []ACL
	Tables     []RouteTable
	Interfaces []Interface
}

// Subnet is one that interfaces are in. Without an ACL nothing leaves or enters
// it, without a route table nothing finds its way out of it.
type Subnet struct {
	ID   vpc.SubnetID
	VNI  uint32 // one number per VPC, > 0
	CIDR netip.Prefix
	// CIDR6 is its IPv6 block, the zero Prefix: it has none, and its interfaces
	// neither send nor receive IPv6.
	CIDR6 netip.Prefix
	Table vpc.RouteTableID
	ACL   vpc.NetworkACLID
	// Resolver is the address that the VPC's DNS resolver has beside
	// ResolverAddr. Without one nothing answers at either.
	Resolver netip.Addr
}

// Guest is a network namespace of which the fabric makes and removes the name:
// "ul-LAB-i-…" (an instance) or "ul-LAB-svc-…" (a managed service).
type Guest struct {
	Netns string // name under /run/netns
	NAT   *NAT   // it is a NAT gateway
}

// Interface is an attached ENI.
type Interface struct {
	ID              vpc.ENIID
	VNI             uint32 // its subnet's
	Subnet          vpc.SubnetID
	MAC             net.HardwareAddr
	Guest           string // a Guest's Netns
	DeviceIndex     int    // it is called eth%d inside
	Primary         netip.Addr
	Addresses       []netip.Prefix // each /32 and /28, Primary included; of IPv6 each /128 and /80
	SourceDestCheck bool
	Groups          []vpc.SecurityGroupID // without any, nothing passes but the fabric's services
	Timeouts        IdleTimeouts
	Owner           Owner
	Ungated         bool // no security group judges it: a NAT gateway's
	MTU             int  // IP length that it takes; 0 is MTU
	// Configure gives the guest's end Primary, the first IPv6 address if there
	// is one, the default routes and the MTU, as DHCP would, when the interface is
	// made and never again. Without it the link appears down.
	Configure bool
}

// port is an Interface that check has accepted.
type port struct {
	Interface
	subnet Subnet
	device string // name of the fabric end
	policy *bpfgen.FabricPolicy
	six    *bpfgen.FabricPolicy6 // nil: it has no IPv6
	table  uint64                // number of the subnet's route table, 0: none
}

// desired is a Config that check has gone through: only what is valid.
type desired struct {
	guests map[string]bool
	ports  map[vpc.ENIID]*port
	order  []*port            // as in the Config, so that Set works in a stable order
	routes map[uint64][]Route // by number of the table
	acls   map[bpfgen.FabricSubnetKey]*aclOf

	internet bool
	publics  map[uint32]bpfgen.FabricPublic  // by public address
	elastics map[bpfgen.FabricAddress]uint32 // the other way round
	nats     map[string]NAT                  // by guest
}

// namespaces knows the names of a lab's network namespaces.
type namespaces struct{ lab string }

var labName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,19}$`)

// ambiguous are the names of labs whose namespaces would read as another
// lab's: ul-demo-svc-fabric is the fabric of lab demo-svc, or demo's service "fabric".
var ambiguous = regexp.MustCompile(`-(i|svc|pod)(-|$)`)

func checkLab(lab string) error {
	switch {
	case !labName.MatchString(lab):
		return fmt.Errorf("lab name %q: must be 1 to 20 of a-z, 0-9 and -, beginning with a letter; choose another", lab)
	case ambiguous.MatchString(lab):
		return fmt.Errorf("lab name %q: the parts -i, -svc and -pod are kept for namespaces inside a lab; choose another", lab)
	}
	return nil
}

func (n namespaces) fabric() string   { return "ul-" + n.lab + "-fabric" }
func (n namespaces) internet() string { return "ul-" + n.lab + "-internet" }

var (
	instanceSuffix = regexp.MustCompile(`^i-([0-9a-f]{8}|[0-9a-f]{17})$`)
	serviceSuffix  = regexp.MustCompile(`^svc-[A-Za-z0-9][A-Za-z0-9._-]*$`)
)

// guest tells whether name is that of a guest of this lab.
func (n namespaces) guest(name string) bool {
	suffix, ok := strings.CutPrefix(name, "ul-"+n.lab+"-")
	return ok && len(name) <= 255 && (instanceSuffix.MatchString(suffix) || serviceSuffix.MatchString(suffix))
}

// device returns the name of an ENI's fabric end: "e" and the number of the
// ENI in base 32, 15 characters for a number of 17 hexadecimal digits, which is all
// that IFNAMSIZ leaves room for.
func device(id vpc.ENIID) (string, error) {
	if err := vpc.CheckID("eni", string(id)); err != nil {
		return "", err
	}
	digits := strings.TrimPrefix(string(id), "eni-")
	if len(digits)%2 == 1 {
		digits = "0" + digits
	}
	number, err := hex.DecodeString(digits)
	if err != nil {
		return "", fmt.Errorf("read number of %s: %w", id, err)
	}
	// 17 digits are 68 bits, 14 characters of 5 bits; 80 bits are 16, of which
	// the first two are then always 0. A short ID (8 digits, as EC2 once gave
	// them) has 8 characters, so that the two kinds never meet.
	wide := make([]byte, 10)
	copy(wide[10-len(number):], number)
	text := strings.ToLower(base32.HexEncoding.EncodeToString(wide)) // 16 characters
	if len(number) == 4 {
		return "e" + text[8:], nil
	}
	return "e" + text[2:], nil
}

// check turns a Config into what can be applied; the error joins what it left out.
func check(n namespaces, c Config) (desired, error) {
	d := desired{
		guests: map[string]bool{}, ports: map[vpc.ENIID]*port{}, acls: map[bpfgen.FabricSubnetKey]*aclOf{},
		internet: c.Internet, nats: map[string]NAT{},
	}
	tables, routes, errs := checkTables(c.Tables)
	d.routes = routes
	var bad []error
	d.publics, d.elastics, bad = checkPublics(c.Publics, tables)
	errs = append(errs, bad...)
	acls, bad := checkACLs(c.ACLs)
	errs = append(errs, bad...)

	subnets := map[vpc.SubnetID]Subnet{}
	for _, s := range c.Subnets {
		if err := checkSubnet(s, subnets); err != nil {
			errs = append(errs, fmt.Errorf("subnet %s: %w", s.ID, err))
			continue
		}
		s.CIDR, s.CIDR6 = s.CIDR.Masked(), s.CIDR6.Masked()
		if tables[s.Table] == 0 {
			errs = append(errs, fmt.Errorf("subnet %s: its route table %q is not there or not valid", s.ID, s.Table))
		}
		if a := acls[s.ACL]; a != nil {
			d.acls[bpfgen.FabricSubnetKey{Vni: s.VNI, Subnet: be32(s.CIDR.Addr())}] = a
		} else {
			errs = append(errs, fmt.Errorf("subnet %s: its network ACL %q is not there or not valid", s.ID, s.ACL))
		}
		subnets[s.ID] = s
	}
	for _, g := range c.Guests {
		if !n.guest(g.Netns) {
			errs = append(errs, fmt.Errorf("guest %q: want ul-%s-i-… or ul-%s-svc-…", g.Netns, n.lab, n.lab))
			continue
		}
		d.guests[g.Netns] = true
		if g.NAT != nil {
			if err := g.NAT.check(); err != nil {
				errs = append(errs, fmt.Errorf("guest %q: %w; it forwards nothing", g.Netns, err))
				d.nats[g.Netns] = NAT{}
			} else {
				d.nats[g.Netns] = *g.NAT
			}
		}
	}

	type held struct {
		vni  uint32
		addr netip.Addr
	}
	type named struct {
		guest string
		index int
	}
	type station struct {
		vni uint32
		mac string
	}
	groups, bad := checkGroups(c.Groups)
	errs = append(errs, bad...)
	policies := map[string]*bpfgen.FabricPolicy{} // interfaces with the same groups share one
	policies6 := map[string]*bpfgen.FabricPolicy6{}
	holder := map[held]vpc.ENIID{}
	holders6 := newHolders6()
	names := map[named]vpc.ENIID{}
	macs := map[station]vpc.ENIID{}
	for _, i := range c.Interfaces {
		p, err := checkInterface(i, subnets, d)
		if err == nil {
			if other, ok := names[named{i.Guest, i.DeviceIndex}]; ok {
				err = fmt.Errorf("eth%d of %s is %s", i.DeviceIndex, i.Guest, other)
			}
			if other, ok := macs[station{i.VNI, i.MAC.String()}]; ok {
				err = fmt.Errorf("MAC %s is that of %s", i.MAC, other)
			}
			for a := range each(i.Addresses) {
				if other, ok := holder[held{i.VNI, a}]; ok {
					err = fmt.Errorf("address %s is held by %s", a, other)
					break
				}
			}
			if err == nil {
				err = holders6.check(i)
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("interface %s: %w", i.ID, err))
			continue
		}
		names[named{i.Guest, i.DeviceIndex}] = i.ID
		macs[station{i.VNI, i.MAC.String()}] = i.ID
		for a := range each(i.Addresses) {
			holder[held{i.VNI, a}] = i.ID
		}
		holders6.add(i)
		key := fmt.Sprint(slices.Sorted(slices.Values(i.Groups)), i.Timeouts)
		if policies[key] == nil {
			if policies[key], err = policyOf(i.Groups, i.Timeouts, groups); err != nil {
				errs = append(errs, fmt.Errorf("interface %s: %w", i.ID, err))
			}
		}
		if p.flags()&ipv6 != 0 && policies6[key] == nil {
			if policies6[key], err = policy6Of(i.Groups, policies[key].Groups, i.Timeouts, groups); err != nil {
				errs = append(errs, fmt.Errorf("interface %s: %w", i.ID, err))
			}
		}
		if p.flags()&ipv6 != 0 {
			p.six = policies6[key]
		}
		p.policy, p.table = policies[key], tables[p.subnet.Table]
		d.ports[i.ID] = p
		d.order = append(d.order, p)
	}
	return d, errors.Join(errs...)
}

func checkSubnet(s Subnet, seen map[vpc.SubnetID]Subnet) error {
	if _, ok := seen[s.ID]; ok {
		return errors.New("occurs twice")
	}
	if s.VNI == 0 {
		return errors.New("has VNI 0")
	}
	// AWS: /16 to /28 (VPC user guide, "Subnet sizing").
	if !s.CIDR.IsValid() || !s.CIDR.Addr().Is4() || s.CIDR.Bits() < 16 || s.CIDR.Bits() > 28 {
		return fmt.Errorf("CIDR %s is not IPv4 of /16 to /28", s.CIDR)
	}
	if s.CIDR6.IsValid() && !isBlock6(s.CIDR6) {
		return fmt.Errorf("CIDR %s is not IPv6 of /44 to /64 in steps of 4", s.CIDR6)
	}
	if s.Resolver.IsValid() && !s.Resolver.Is4() {
		return fmt.Errorf("resolver %s is no IPv4 address", s.Resolver)
	}
	for _, other := range seen {
		if other.VNI == s.VNI && other.CIDR.Overlaps(s.CIDR) {
			return fmt.Errorf("CIDR %s overlaps %s of %s", s.CIDR, other.CIDR, other.ID)
		}
		if other.VNI == s.VNI && s.CIDR6.IsValid() && other.CIDR6.IsValid() && other.CIDR6.Overlaps(s.CIDR6) {
			return fmt.Errorf("CIDR %s overlaps %s of %s", s.CIDR6, other.CIDR6, other.ID)
		}
	}
	return nil
}

func checkInterface(i Interface, subnets map[vpc.SubnetID]Subnet, d desired) (*port, error) {
	name, err := device(i.ID)
	if err != nil {
		return nil, err
	}
	if _, ok := d.ports[i.ID]; ok {
		return nil, errors.New("occurs twice")
	}
	s, ok := subnets[i.Subnet]
	if !ok {
		return nil, fmt.Errorf("its subnet %s is not there or not valid", i.Subnet)
	}
	if s.VNI != i.VNI {
		return nil, fmt.Errorf("has VNI %d, its subnet %d", i.VNI, s.VNI)
	}
	if !d.guests[i.Guest] {
		return nil, fmt.Errorf("its guest %q is not there or not valid", i.Guest)
	}
	if len(i.MAC) != 6 || i.MAC[0]&1 == 1 || bytes.Equal(i.MAC, make([]byte, 6)) || bytes.Equal(i.MAC, RouterMAC) {
		return nil, fmt.Errorf("MAC %q is not one that an interface can have", i.MAC)
	}
	// eth%d must fit IFNAMSIZ; AWS's own limit is far below.
	if i.DeviceIndex < 0 || i.DeviceIndex > 9999 {
		return nil, fmt.Errorf("device index %d is not within 0 and 9999", i.DeviceIndex)
	}
	if !s.CIDR.Contains(i.Primary) {
		return nil, fmt.Errorf("primary address %s is not in its subnet's %s", i.Primary, s.CIDR)
	}
	// The least that IPv4 allows (RFC 791), and the most that the wires carry.
	if i.MTU != 0 && (i.MTU < 68 || i.MTU > MTU) {
		return nil, fmt.Errorf("MTU %d is not within 68 and %d", i.MTU, MTU)
	}
	i.MTU = cmp.Or(i.MTU, MTU)
	if s.CIDR6.IsValid() && !i.Ungated && i.MTU < minMTU6 {
		return nil, fmt.Errorf("MTU %d is below IPv6's least, %d", i.MTU, minMTU6)
	}
	hasPrimary := false
	for _, a := range i.Addresses {
		if a.IsValid() && a.Addr().Is6() {
			if err := checkAddress6(a, s); err != nil {
				return nil, err
			}
			continue
		}
		if !a.IsValid() || !a.Addr().Is4() || a.Bits() != 32 && a.Bits() != vpc.PrefixBits || a != a.Masked() {
			return nil, fmt.Errorf("address %s is neither a /32 nor an aligned /%d", a, vpc.PrefixBits)
		}
		if !s.CIDR.Overlaps(a) || a.Bits() < s.CIDR.Bits() {
			return nil, fmt.Errorf("address %s is not in its subnet's %s", a, s.CIDR)
		}
		hasPrimary = hasPrimary || a.Contains(i.Primary)
	}
	if !hasPrimary {
		return nil, fmt.Errorf("addresses %v lack its primary, %s", i.Addresses, i.Primary)
	}
	return &port{Interface: i, subnet: s, device: name}, nil
}

// each yields every single IPv4 address of the prefixes.
func each(prefixes []netip.Prefix) func(yield func(netip.Addr) bool) {
	return func(yield func(netip.Addr) bool) {
		for _, p := range prefixes {
			if !p.Addr().Is4() {
				continue
			}
			for a := p.Addr(); p.Contains(a); a = a.Next() {
				if !yield(a) {
					return
				}
			}
		}
	}
}

// be32 is an IPv4 address as the C side has it in a __be32.
func be32(a netip.Addr) uint32 {
	b := a.As4()
	return binary.NativeEndian.Uint32(b[:])
}

// address4 is the address that the C side has in a __be32.
func address4(a uint32) netip.Addr {
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], a)
	return netip.AddrFrom4(b)
}

func netmask(p netip.Prefix) uint32 {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], ^uint32(0)<<(32-p.Bits()))
	return binary.NativeEndian.Uint32(b[:])
}
