package datapath

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// SNAT says by which address pods speak to networks that are not joined to the
// VPC: the internet, of whose addresses only the primary one of an ENI has a
// counterpart.
type SNAT string

const (
	// SNATNone leaves packets as they are: somebody else translates, such as a
	// NAT gateway, which takes any address of the VPC.
	SNATNone SNAT = "none"
	// SNATByENI sends by the pod's own ENI, with its primary address: the VPC
	// sees the ENI's groups.
	SNATByENI SNAT = "eni"
	// SNATByPrimary sends by the primary ENI, with its address, for subnets whose
	// way out is an internet gateway: no other ENI gets a public address by
	// itself. The VPC then sees the groups of the node, not those of the pod.
	SNATByPrimary SNAT = "primary"
)

// SNATs are all of them, the agent's default first.
var SNATs = []SNAT{SNATByENI, SNATByPrimary, SNATNone}

// neverTranslated are the ranges that no route to the internet leads to. Whoever
// has them is a peer, a network behind a gateway of the VPC, or the link's own
// services: all see pods as they are.
var neverTranslated = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"),     // RFC 1918
	netip.MustParsePrefix("172.16.0.0/12"),  // RFC 1918
	netip.MustParsePrefix("192.168.0.0/16"), // RFC 1918
	netip.MustParsePrefix("100.64.0.0/10"),  // RFC 6598, shared address space
	netip.MustParsePrefix("169.254.0.0/16"), // RFC 3927, link-local: DNS, time, metadata
}

// Two chains of the table translate:
//
//	outside  prerouting, after others' DNAT, with SNATByPrimary: the first
//	         direction of a pod's connection to outside gets the primary ENI's
//	         mark
//	sources  postrouting, after others' SNAT: what has an ENI's mark and goes to
//	         outside gets the ENI's primary address
//
// Chains of type nat see a connection's first packet alone, and the first chain
// that translates it decides: whom kube-proxy or portmap masquerade, they have
// masqueraded. A connection keeps what its first packet got, whatever changes.
//
// A chain of type nat has the kernel track what the node sends, receives and
// forwards. Not to track what stays within the VPC would break others: a
// Service's answers between two pods are translated back by the entry that its
// first packet made, and a firewall's `ct state established` would not hold.
const (
	sourcesChain = "sources"
	outsideChain = "outside"
)

// After the priorities at which everybody else translates.
var (
	afterNATDest   = nftables.ChainPriorityRef(*nftables.ChainPriorityNATDest + 1)
	afterNATSource = nftables.ChainPriorityRef(*nftables.ChainPriorityNATSource + 10)
)

// SetVPC says which ranges the VPC has. Until it is called, and while cidrs is
// empty, SNAT stays as it is: on a node that is new, there is none. Connections
// within the ranges bypass the stack if Options.Direct is set, but for
// Options.StackNetworks; those that are there go on as they began.
func (d *Datapath) SetVPC(ctx context.Context, cidrs []netip.Prefix) error {
	for _, c := range cidrs {
		if !c.IsValid() || !c.Addr().Is4() || c.Bits() == 0 {
			return fmt.Errorf("set the VPC's ranges: %s is no IPv4 range of a VPC", c)
		}
	}
	d.eniMu.Lock()
	defer d.eniMu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	sorted := slices.Clone(cidrs)
	slices.SortFunc(sorted, netip.Prefix.Compare)
	if slices.Equal(sorted, d.vpc) {
		return nil
	}
	if err := d.setNets(sorted, d.opts.StackNetworks); err != nil {
		return err
	}
	d.vpc = sorted
	if d.present == nil {
		return nil // SetENIs comes to it
	}
	return d.setSNAT()
}

// SetPeers says which ranges the VPCs have that are peered with the node's: pods
// speak to them under their own addresses.
func (d *Datapath) SetPeers(ctx context.Context, cidrs []netip.Prefix) error {
	for _, c := range cidrs {
		if !c.IsValid() || !c.Addr().Is4() || c.Bits() == 0 {
			return fmt.Errorf("set the peers' ranges: %s is no IPv4 range of a VPC", c)
		}
	}
	d.eniMu.Lock()
	defer d.eniMu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	d.peers = slices.Clone(cidrs)
	slices.SortFunc(d.peers, netip.Prefix.Compare)
	if d.present == nil {
		return nil // SetENIs comes to it
	}
	return d.setSNAT()
}

// untranslated are the ranges to which pods speak under their own addresses,
// sorted, none within another.
func (d *Datapath) untranslated() []netip.Prefix {
	return widest(slices.Concat(neverTranslated, d.vpc, d.peers, d.opts.SNATExclude))
}

// widest returns the prefixes that are not part of another one, sorted.
func widest(prefixes []netip.Prefix) []netip.Prefix {
	sorted := make([]netip.Prefix, len(prefixes))
	for i, p := range prefixes {
		sorted[i] = p.Masked()
	}
	slices.SortFunc(sorted, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits() // the wider first
	})
	var out []netip.Prefix
	for _, p := range sorted {
		if n := len(out); n > 0 && out[n-1].Contains(p.Addr()) {
			continue
		}
		out = append(out, p)
	}
	return out
}

// rule is one of a chain that is set whole. Its comment is what it is made from:
// equal comments in equal order are an equal chain.
type rule struct {
	comment string
	exprs   []expr.Any
}

// setSNAT brings the chains to what the options, the VPC's ranges and the ENIs
// that are present say, in one transaction, and changes nothing when they are
// so. The caller holds eniMu.
func (d *Datapath) setSNAT() error {
	off := d.opts.SNAT == SNATNone || d.opts.SNAT == ""
	if !off && len(d.vpc) == 0 {
		return nil
	}
	var snat, outside []rule
	if !off {
		snat, outside = d.sourceRules(), d.outsideRules()
	}
	have := map[string][]string{}
	for _, chain := range []string{sourcesChain, outsideChain} {
		var err error
		if have[chain], err = ruleComments(d.netns, chain); err != nil {
			return err
		}
	}
	if slices.Equal(have[sourcesChain], comments(snat)) && slices.Equal(have[outsideChain], comments(outside)) {
		return nil
	}
	c, err := guardConn(d.netns)
	if err != nil {
		return err
	}
	c.AddTable(guardTable)
	for _, set := range []struct {
		chain *nftables.Chain
		rules []rule
	}{
		{&nftables.Chain{Table: guardTable, Name: sourcesChain, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: afterNATSource}, snat},
		{&nftables.Chain{Table: guardTable, Name: outsideChain, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting, Priority: afterNATDest}, outside},
	} {
		if len(set.rules) == 0 && len(have[set.chain.Name]) == 0 {
			continue
		}
		c.AddChain(set.chain) // so that there is something to flush
		c.FlushChain(set.chain)
		for _, r := range set.rules {
			c.AddRule(&nftables.Rule{Table: guardTable, Chain: set.chain, Exprs: r.exprs, UserData: userdata.AppendString(nil, userdata.TypeComment, r.comment)})
		}
		if len(set.rules) == 0 {
			c.DelChain(set.chain)
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("set nftables chain %s of table inet underlay: %w (the kernel needs nf_tables with nat; --snat=none does without)", sourcesChain, err)
	}
	d.log.Info("source addresses towards the internet", "snat", string(d.opts.SNAT), "vpc", d.vpc, "exclude", d.opts.SNATExclude, "enis", len(d.present))
	return nil
}

func comments(rules []rule) []string {
	var out []string
	for _, r := range rules {
		out = append(out, r.comment)
	}
	return out
}

// sourceRules are the chain sources.
func (d *Datapath) sourceRules() []rule {
	rules := d.returns()
	for _, i := range slices.Sorted(maps.Keys(d.present)) {
		e := d.present[i]
		rules = append(rules, rule{fmt.Sprintf("ENI %d as %s", i, e.Primary), onlyIPv4(
			&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
			maskRegister(MarkMask),
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(Mark(i))},
			&expr.Immediate{Register: 1, Data: e.Primary.AsSlice()},
			// Ports by chance: in order, two pods that begin at once would be
			// given the same and one would lose its packet.
			&expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, FullyRandom: true},
		)})
	}
	return rules
}

// outsideRules are the chain outside; none unless the primary ENI is the way out.
func (d *Datapath) outsideRules() []rule {
	if d.opts.SNAT != SNATByPrimary {
		return nil
	}
	rules := []rule{
		{"from a pod", []expr.Any{
			&expr.Meta{Key: expr.MetaKeyIIFGROUP, Register: 1},
			maskRegister(^uint32(LinkGroup ^ dyingGroup)),
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(LinkGroup)},
			&expr.Verdict{Kind: expr.VerdictReturn},
		}},
		// What somebody outside began goes back by the ENI that it came by.
		{"that it began", []expr.Any{
			&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{directionOriginal}},
			&expr.Verdict{Kind: expr.VerdictReturn},
		}},
	}
	rules = append(rules, d.returns()...)
	return append(rules, rule{"by ENI 1", onlyIPv4(setMark(Mark(1))...)})
}

// returns are a return for each range to which pods speak under their own
// addresses.
func (d *Datapath) returns() []rule {
	var out []rule
	for _, p := range d.untranslated() {
		const destination = 16 // of struct iphdr
		mask := make([]byte, 4)
		for i := range p.Bits() {
			mask[i/8] |= 0x80 >> (i % 8)
		}
		out = append(out, rule{"not to " + p.String(), onlyIPv4(
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: destination, Len: 4},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask, Xor: make([]byte, 4)},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Addr().AsSlice()},
			&expr.Verdict{Kind: expr.VerdictReturn},
		)})
	}
	return out
}

// onlyIPv4 begins a rule for IPv4; nft prints what follows by its names.
func onlyIPv4(exprs ...expr.Any) []expr.Any {
	return append([]expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.NFPROTO_IPV4}},
	}, exprs...)
}

// maskRegister keeps some bits of register 1, four bytes.
func maskRegister(mask uint32) expr.Any {
	return &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(mask), Xor: binaryutil.NativeEndian.PutUint32(0)}
}

// checkSNAT refuses options that make no sense.
func checkSNAT(mode SNAT, exclude []netip.Prefix) error {
	if mode != "" && !slices.Contains(SNATs, mode) {
		return fmt.Errorf("source address towards the internet by %q: want one of %v", mode, SNATs)
	}
	var errs []error
	for _, p := range exclude {
		if !p.IsValid() || !p.Addr().Is4() {
			errs = append(errs, fmt.Errorf("keep pods' addresses towards %s: it is no IPv4 range", p))
		}
	}
	return errors.Join(errs...)
}
