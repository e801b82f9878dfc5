package fabric

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// ACL is a network ACL: what may leave and enter the subnets that have it. Of
// each direction the first entry that matches wins; without one, nothing
// passes.
type ACL struct {
	ID      vpc.NetworkACLID
	Ingress []ACLEntry
	Egress  []ACLEntry
}

// ACLEntry allows or denies a protocol from or to the addresses of CIDR, which
// is of IPv4 or of IPv6.
type ACLEntry struct {
	Protocol int // as in Rule
	From, To int // as in Rule
	CIDR     netip.Prefix
	Allow    bool
}

const maxACLEntries = len(bpfgen.FabricAcl{}.Entries[0])

// aclOf is an ACL in the programs' form.
type aclOf struct {
	four *bpfgen.FabricAcl
	six  *bpfgen.FabricAcl6
}

// checkACLs turns ACLs into the programs' form. An entry that is not valid, or
// one too many, ends its direction there: what an entry behind it allows, it
// may have denied.
func checkACLs(acls []ACL) (map[vpc.NetworkACLID]*aclOf, []error) {
	var errs []error
	out := map[vpc.NetworkACLID]*aclOf{}
	for _, l := range acls {
		err := vpc.CheckID("acl", string(l.ID))
		if err == nil && out[l.ID] != nil {
			err = errors.New("occurs twice")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("network ACL %s: %w", l.ID, err))
			continue
		}
		a, a6 := &bpfgen.FabricAcl{}, &bpfgen.FabricAcl6{}
		for direction, entries := range map[bpfgen.FabricDirection][]ACLEntry{egress: l.Egress, ingress: l.Ingress} {
			n, n6 := 0, 0
			for _, e := range entries {
				compiled, six, err := compile(Rule{Protocol: e.Protocol, From: e.From, To: e.To, Peers: []netip.Prefix{e.CIDR}})
				if err == nil && (n+len(compiled) > maxACLEntries || n6+len(six) > maxACLEntries) {
					err = fmt.Errorf("is behind entry %d", maxACLEntries)
				}
				if err != nil {
					errs = append(errs, fmt.Errorf("network ACL %s: entry %+v: %w; it and what follows are left out", l.ID, e, err))
					break
				}
				for _, r := range compiled {
					a.Entries[direction][n] = bpfgen.FabricAclEntry{
						Net: r.Net, Mask: r.Mask, From: r.From, To: r.To, Protocol: r.Protocol, AllProtocols: r.AllProtocols, Allow: b2u(e.Allow),
					}
					n++
				}
				for _, r := range six {
					a6.Entries[direction][n6] = bpfgen.FabricAclEntry6{
						Net: r.Net, Mask: r.Mask, From: r.From, To: r.To, Protocol: r.Protocol, AllProtocols: r.AllProtocols, Allow: b2u(e.Allow),
					}
					n6++
				}
			}
			a.Count[direction], a6.Count[direction] = uint32(n), uint32(n6)
		}
		a.Version = version(a.Count, a.Entries)
		a6.Version = version(a6.Count, a6.Entries)
		out[l.ID] = &aclOf{a, a6}
	}
	return out, errs
}

// b2u is a bool as C has it.
func b2u(b bool) uint8 {
	if b {
		return 1
	}
	return 0
}
