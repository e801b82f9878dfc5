package vpcd

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/imds"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// metadata is the imds.Source over the store.
type metadata struct {
	store           *store.Store
	lag             func() time.Duration
	mapped          func() *store.State // the address mapping that is on the wire; nil: as the store says
	now             func() time.Time
	account, region string
	zoneIDs         map[string]string // by name
}

// Metadata tells what was true of the instance before the IMDS lag, and never
// an address that is not on the wire yet: clients ask IMDS to learn just that.
// The instance's options are those of now, and an instance younger than the lag
// is as it is now: it knows itself from the first moment.
func (m *metadata) Metadata(id vpc.InstanceID) (*imds.Instance, bool) {
	state := m.store.View()
	current := state.Instance(id)
	if current == nil || !lives(current) {
		return nil, false
	}
	if old := m.view(); old.Instance(id) != nil {
		state = old
	}
	i := state.Instance(id)
	// What cannot be decoded was refused by RunInstances.
	userData, _ := base64.StdEncoding.DecodeString(i.UserData)
	out := &imds.Instance{
		ID: i.ID, Type: i.Type, Image: i.Image, Reservation: i.Reservation, LaunchIndex: i.LaunchIndex, Launched: i.Launched,
		Account: m.account, Region: m.region, Zone: i.Zone, ZoneID: m.zoneIDs[i.Zone], Arch: architecture(i.Type),
		UserData: userData, Profile: i.Profile, Tags: state.TagsOf(string(i.ID)),
		ByResource: i.HostType == "resource-name",
		Options: imds.Options{
			Disabled:      current.Metadata.Endpoint == "disabled",
			TokenRequired: current.Metadata.Tokens == "required",
			HopLimit:      current.Metadata.HopLimit,
			Tags:          current.Metadata.Tags == "enabled",
		},
	}
	if v := state.VPC(i.VPC); v != nil {
		out.Domain = domainOf(state.DHCP(v.DHCPOptions))
	}
	for e := range state.InterfacesOf(id) {
		// The first interface is there before the instance can ask.
		if e.Attachment.Status == store.Attaching && e.Attachment.DeviceIndex != 0 {
			continue
		}
		out.Interfaces = append(out.Interfaces, m.iface(state, e))
	}
	return out, true
}

// domainOf is the domain name of a set of DHCP options, "" for the region's own.
// Of several, which Linux would search, it is the first.
func domainOf(o *store.DHCPOptions) string {
	if o == nil || o.Default {
		return ""
	}
	for _, x := range o.Options {
		if x.Key == "domain-name" && len(x.Values) > 0 {
			first, _, _ := strings.Cut(x.Values[0], " ")
			return first
		}
	}
	return ""
}

// view is the older of what lags and what is mapped.
func (m *metadata) view() *store.State {
	state := m.store.View()
	if lag := m.lag(); lag > 0 {
		state = m.store.At(m.now().Add(-lag))
	}
	if m.mapped != nil {
		if on := m.mapped(); on != nil && on.Seq < state.Seq {
			state = on
		}
	}
	return state
}

func (m *metadata) iface(state *store.State, e *store.ENI) imds.Interface {
	n := imds.Interface{
		ID: e.ID, MAC: e.MAC, Device: e.Attachment.DeviceIndex, Card: e.Attachment.NetworkCard,
		Subnet: e.Subnet, VPC: e.VPC, Primary: e.Primary, Secondary: e.Secondary, Prefixes: e.Prefixes,
		GroupIDs: e.Groups, OwnerID: m.account, IPv6: e.IPv6, IPv6Prefixes: e.IPv6Prefixes,
	}
	for x := range state.ElasticsOf(e.ID) {
		n.Elastic = append(n.Elastic, imds.Elastic{Public: x.Public, Private: x.Private})
	}
	if s := state.Subnet(e.Subnet); s != nil {
		n.SubnetCIDR = s.CIDR
		if s.IPv6.CIDR.IsValid() {
			n.SubnetIPv6 = append(n.SubnetIPv6, s.IPv6.CIDR)
		}
	}
	if v := state.VPC(e.VPC); v != nil {
		for _, a := range v.CIDRs {
			n.VPCCIDRs = append(n.VPCCIDRs, a.CIDR)
		}
		for _, a := range v.IPv6CIDRs {
			n.VPCIPv6 = append(n.VPCIPv6, a.CIDR)
		}
	}
	for _, id := range e.Groups {
		name := string(id)
		if g := state.Group(id); g != nil {
			name = g.Name
		}
		n.GroupNames = append(n.GroupNames, name)
	}
	return n
}

// graviton matches the families whose processors are Arm: a1, and those with a
// g among the attributes after the generation (m6g, c7gn, im4gn, t4g).
var graviton = regexp.MustCompile(`^(a1|[a-z]+\d+[a-z-]*g[a-z-]*)\.`)

func architecture(instanceType string) string {
	if graviton.MatchString(instanceType) {
		return "arm64"
	}
	return "x86_64"
}

// imdsKey reads the key of IMDS tokens, or makes it. It is kept with the state,
// so that a restart does not log out every instance.
func imdsKey(dir string) ([]byte, error) {
	path := filepath.Join(dir, keyFile)
	key, err := os.ReadFile(path)
	if err == nil && len(key) == imds.KeySize {
		return key, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read the key of IMDS tokens: %w", err)
	}
	key = make([]byte, imds.KeySize)
	_, _ = rand.Read(key) // never fails since Go 1.24
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, key, 0o600); err != nil {
		return nil, fmt.Errorf("write the key of IMDS tokens: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return nil, fmt.Errorf("write the key of IMDS tokens: %w", err)
	}
	return key, nil
}
