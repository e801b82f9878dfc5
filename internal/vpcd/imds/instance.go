package imds

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// Source tells what IMDS knows of an instance; false: nothing (any more).
type Source interface {
	Metadata(id vpc.InstanceID) (*Instance, bool)
}

// Instance is all that IMDS tells about an instance.
type Instance struct {
	ID          vpc.InstanceID
	Type        string
	Image       string
	Reservation string
	LaunchIndex int
	Launched    time.Time
	Account     string
	Region      string
	Zone        string // us-east-1a
	ZoneID      string // use1-az1
	Arch        string // x86_64 or arm64
	UserData    []byte
	Profile     string // ARN or name of the instance profile, or ""
	Tags        map[string]string
	Interfaces  []Interface // attached ones; device 0 of card 0 is the primary
	ByResource  bool        // the host name is the instance's id, not its address
	Domain      string      // what host names end with, of the VPC's DHCP options; "" is the region's
	Options     Options
}

// Options are the instance's metadata options.
type Options struct {
	Disabled      bool // HttpEndpoint
	TokenRequired bool // HttpTokens
	HopLimit      int  // HttpPutResponseHopLimit, 1..64
	Tags          bool // InstanceMetadataTags
}

// Interface is an attached ENI as IMDS shows it.
type Interface struct {
	ID          vpc.ENIID
	MAC         string // 02:…, lower case
	Device      int
	Card        int
	Subnet      vpc.SubnetID
	SubnetCIDR  netip.Prefix
	VPC         vpc.VPCID
	VPCCIDRs    []netip.Prefix // the primary block first
	Primary     netip.Addr
	Secondary   []netip.Addr
	Prefixes    []netip.Prefix
	GroupIDs    []vpc.SecurityGroupID
	GroupNames  []string // len(GroupNames) == len(GroupIDs)
	OwnerID     string
	Description string
	Elastic     []Elastic // by private address

	IPv6         []netip.Addr
	IPv6Prefixes []netip.Prefix
	SubnetIPv6   []netip.Prefix // none or one
	VPCIPv6      []netip.Prefix
}

// Elastic is an Elastic IP address that leads to an address of an interface.
type Elastic struct{ Public, Private netip.Addr }

// primary returns the instance's first interface, or nil.
func (i *Instance) primary() *Interface {
	for k := range i.Interfaces {
		if n := &i.Interfaces[k]; n.Device == 0 && n.Card == 0 {
			return n
		}
	}
	return nil
}

// hostname is the name that an address has as DHCP gives it: the private name,
// ip-10-0-0-5.ec2.internal, or one in the domain of the VPC's DHCP options.
func (i *Instance) hostname(a netip.Addr) string {
	host, domain, _ := strings.Cut(vpc.PrivateName(a, i.Region), ".")
	if i.ByResource {
		host = string(i.ID)
	}
	return host + "." + cmp.Or(i.Domain, domain)
}

// role is the name of the role of the instance profile; by convention of the
// console the two have one name.
func (i *Instance) role() string {
	return i.Profile[strings.LastIndexByte(i.Profile, '/')+1:]
}

func (i *Instance) profileARN() string {
	if strings.HasPrefix(i.Profile, "arn:") {
		return i.Profile
	}
	return fmt.Sprintf("arn:aws:iam::%s:instance-profile/%s", i.Account, i.Profile)
}
