package fabric

import (
	"crypto/sha256"
	"encoding/binary"
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

// checkACLs turns ACLs into the programs' form. An entry that is not valid, or
// one too many, ends its direction there: what an entry behind it allows, it
// may have denied.
func checkACLs(acls []ACL) (map[vpc.NetworkACLID]*bpfgen.FabricAcl, []error) {
	var errs []error
	out := map[vpc.NetworkACLID]*bpfgen.FabricAcl{}
	for _, l := range acls {
		err := vpc.CheckID("acl", string(l.ID))
		if err == nil && out[l.ID] != nil {
			err = errors.New("occurs twice")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("network ACL %s: %w", l.ID, err))
			continue
		}
		a := &bpfgen.FabricAcl{}
		for direction, entries := range map[bpfgen.FabricDirection][]ACLEntry{egress: l.Egress, ingress: l.Ingress} {
			n := 0
			for _, e := range entries {
				compiled, err := compile(Rule{Protocol: e.Protocol, From: e.From, To: e.To, Peers: []netip.Prefix{e.CIDR}})
				if err == nil && n+len(compiled) > maxACLEntries {
					err = fmt.Errorf("is behind entry %d", maxACLEntries)
				}
				if err != nil {
					errs = append(errs, fmt.Errorf("network ACL %s: entry %+v: %w; it and what follows are left out", l.ID, e, err))
					break
				}
				for _, r := range compiled { // none for IPv6
					one := bpfgen.FabricAclEntry{Net: r.Net, Mask: r.Mask, From: r.From, To: r.To, Protocol: r.Protocol, AllProtocols: r.AllProtocols}
					if e.Allow {
						one.Allow = 1
					}
					a.Entries[direction][n] = one
					n++
				}
			}
			a.Count[direction] = uint32(n)
		}
		a.Version = aclVersion(a)
		out[l.ID] = a
	}
	return out, errs
}

func aclVersion(a *bpfgen.FabricAcl) uint64 {
	h := sha256.New()
	if err := binary.Write(h, binary.LittleEndian, struct {
		Count   [2]uint32
		Entries [2][maxACLEntries]bpfgen.FabricAclEntry
	}{a.Count, a.Entries}); err != nil {
		panic(err) // a hash takes everything, and these have a fixed size
	}
	return max(1, binary.LittleEndian.Uint64(h.Sum(nil)))
}
