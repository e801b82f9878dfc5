package datapath

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Who asks a port of the node that others translate to a pod (portmap, NodePort)
// knows the node's address. The pod's answer gets it back after routing only, so
// that it would leave by the pod's ENI, where the VPC drops it; that of a pod of
// another node, which comes back by an ENI, would leave by the primary one. The
// answer must go by the ENI that has the address which was asked. Two chains see
// to that:
//
//	replies     prerouting, after conntrack: in reply to what was translated
//	            → translated
//	translated  no ENI's mark: by the main table, as the node's own packets; or
//	            the mark of the secondary ENI whose primary address was asked
//
// A rule that names conntrack has the kernel track all that the node sends,
// receives and forwards. So they are there only while somebody else translates,
// and tracks, and there is a secondary ENI.
const (
	repliesChain    = "replies"
	translatedChain = "translated"

	// Comments of the rules that do not depend on the ENIs.
	toReplies = "replies to what others translated"
	byMain    = "by the main table"
)

// Of include/uapi/linux/netfilter/nf_conntrack_common.h and
// nf_conntrack_tuple_common.h.
const (
	statusDstNAT      = 1 << 5 // IPS_DST_NAT
	directionOriginal = 0      // IP_CT_DIR_ORIGINAL
	directionReply    = 1      // IP_CT_DIR_REPLY
)

// setReplies puts the chains in place for these ENIs if somebody else on the node
// translates, and takes them away if nobody does. It changes nothing when they
// are as they should be.
func (d *Datapath) setReplies(enis []ENI) error {
	c, err := guardConn(d.netns)
	if err != nil {
		return err
	}
	var secondary []ENI
	want := []string{toReplies, byMain}
	for _, e := range enis {
		if e.Index > 1 {
			secondary = append(secondary, e)
			want = append(want, asked(e))
		}
	}
	slices.Sort(want)
	needed := false
	if len(secondary) > 0 {
		if needed, err = d.translates(c); err != nil {
			return err
		}
	}
	have, err := ruleComments(d.netns, repliesChain, translatedChain)
	if err != nil {
		return err
	}
	slices.Sort(have)
	if needed && slices.Equal(have, want) || !needed && len(have) == 0 {
		return nil
	}
	replies := &nftables.Chain{
		Table: guardTable, Name: repliesChain, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle,
	}
	translated := &nftables.Chain{Table: guardTable, Name: translatedChain}

	// One transaction: add makes sure that there is something to flush and
	// delete.
	c.AddTable(guardTable)
	c.AddChain(translated)
	c.AddChain(replies)
	c.FlushChain(replies)
	c.FlushChain(translated)
	if needed {
		add := func(ch *nftables.Chain, what string, exprs []expr.Any) {
			c.AddRule(&nftables.Rule{Table: guardTable, Chain: ch, Exprs: exprs, UserData: userdata.AppendString(nil, userdata.TypeComment, what)})
		}
		add(replies, toReplies, toTranslated())
		add(translated, byMain, setMark(0))
		for _, e := range secondary {
			add(translated, asked(e), append(toAddress(e.Primary), setMark(Mark(e.Index))...))
		}
	} else {
		c.DelChain(replies)
		c.DelChain(translated)
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("set nftables chain %s of table inet underlay: %w (the kernel needs nf_tables with ct)", repliesChain, err)
	}
	d.log.Info("routing of translated connections' replies", "on", needed, "enis", len(secondary))
	return nil
}

// asked is the comment of the rule for an ENI: what the rule is made from.
func asked(e ENI) string { return fmt.Sprintf("%s by ENI %d", e.Primary, e.Index) }

// ruleComments returns the comments of the rules in some chains of our table, in
// the order of each chain. It reads them by itself: the library cannot read the
// direction of a ct expression.
func ruleComments(netns *os.File, chains ...string) ([]string, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: int(netns.Fd())})
	if err != nil {
		return nil, fmt.Errorf("open nftables socket: %w", err)
	}
	defer conn.Close()
	table, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: unix.NFTA_RULE_TABLE, Data: []byte(guardTable.Name + "\x00")}})
	if err != nil {
		return nil, err
	}
	rules, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETRULE, Flags: netlink.Request | netlink.Dump},
		Data:   append([]byte{unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0}, table...), // struct nfgenmsg
	})
	if err != nil {
		return nil, fmt.Errorf("list nftables rules: %w", err)
	}
	var comments []string
	for _, r := range rules {
		var chain, comment string
		err := eachAttribute(r, func(a *netlink.AttributeDecoder) {
			switch a.Type() {
			case unix.NFTA_RULE_CHAIN:
				chain = a.String()
			case unix.NFTA_RULE_USERDATA:
				comment, _ = userdata.GetString(a.Bytes(), userdata.TypeComment)
			}
		})
		if err != nil {
			return nil, fmt.Errorf("read nftables rules: %w", err)
		}
		if slices.Contains(chains, chain) {
			comments = append(comments, comment)
		}
	}
	return comments, nil
}

// eachAttribute calls fn for each attribute of an nftables message.
func eachAttribute(m netlink.Message, fn func(*netlink.AttributeDecoder)) error {
	const header = 4 // struct nfgenmsg
	if len(m.Data) < header {
		return fmt.Errorf("nftables message of %d bytes", len(m.Data))
	}
	attrs, err := netlink.NewAttributeDecoder(m.Data[header:])
	if err != nil {
		return err
	}
	for attrs.Next() {
		fn(attrs)
	}
	return attrs.Err()
}

// toTranslated sends a packet in reply to a translated one on.
func toTranslated() []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{directionReply}},
		&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(statusDstNAT),
			Xor:  binaryutil.NativeEndian.PutUint32(0),
		},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(0)},
		&expr.Verdict{Kind: expr.VerdictJump, Chain: translatedChain},
	}
}

// toAddress is true for what was sent to an address. The library writes the
// direction as four bytes where the kernel wants one, which takes the first and
// grumbles: original is 0 either way.
func toAddress(asked netip.Addr) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.NFPROTO_IPV4}},
		&expr.Ct{Key: expr.CtKeyDST, Direction: directionOriginal, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: asked.AsSlice()},
	}
}

// setMark replaces our bits of a packet's mark.
func setMark(mark uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(^MarkMask),
			Xor:  binaryutil.NativeEndian.PutUint32(mark),
		},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
	}
}

// translates tells whether somebody on the node may translate where packets from
// outside go to: there is a chain of type nat for them in nftables, or the table
// nat of iptables from before nftables.
func (d *Datapath) translates(c *nftables.Conn) (bool, error) {
	for _, family := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyINet} {
		chains, err := c.ListChainsOfTableFamily(family)
		if err != nil {
			return false, fmt.Errorf("list nftables chains: %w", err)
		}
		for _, ch := range chains {
			if ch.Type == nftables.ChainTypeNAT && ch.Hooknum != nil && *ch.Hooknum == *nftables.ChainHookPrerouting {
				return true, nil
			}
		}
	}
	var names []byte
	err := d.in(func() (err error) {
		names, err = os.ReadFile("/proc/thread-self/net/ip_tables_names")
		return err
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) { // a kernel without it
		return false, fmt.Errorf("list the tables of iptables: %w", err)
	}
	return slices.Contains(strings.Fields(string(names)), "nat"), nil
}

// watchNAT calls changed whenever a chain of type nat or with the policy drop
// appears in nftables, or our table is deleted (as `nft flush ruleset` does), until
// ctx ends. iptables from before nftables tells nobody.
func watchNAT(ctx context.Context, netns *os.File, changed func()) error {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: int(netns.Fd()), Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)})
	if err != nil {
		return fmt.Errorf("watch nftables: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	for {
		messages, err := conn.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			changed() // some were dropped
			continue
		case err != nil:
			return fmt.Errorf("watch nftables: %w", err)
		}
		if slices.ContainsFunc(messages, newNAT) || slices.ContainsFunc(messages, newDrop) || slices.ContainsFunc(messages, tableDeleted) {
			changed()
		}
	}
}

// newNAT tells whether a message is of a chain of type nat that was made. Other
// chains, of which kube-proxy makes many, have no type.
func newNAT(m netlink.Message) bool {
	if m.Header.Type != unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWCHAIN {
		return false
	}
	is := false
	err := eachAttribute(m, func(a *netlink.AttributeDecoder) {
		is = is || a.Type() == unix.NFTA_CHAIN_TYPE && a.String() == string(nftables.ChainTypeNAT)
	})
	return is && err == nil
}

// newDrop tells whether a message is of a chain that drops unless it is told
// otherwise: see Obstacle.
func newDrop(m netlink.Message) bool {
	if m.Header.Type != unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWCHAIN {
		return false
	}
	is := false
	err := eachAttribute(m, func(a *netlink.AttributeDecoder) {
		const drop = 0 // NF_DROP, in the network's order
		is = is || a.Type() == unix.NFTA_CHAIN_POLICY && len(a.Bytes()) == 4 && binary.BigEndian.Uint32(a.Bytes()) == drop
	})
	return is && err == nil
}

// tableDeleted tells whether a message is of our table's end.
func tableDeleted(m netlink.Message) bool {
	if m.Header.Type != unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_DELTABLE {
		return false
	}
	ours := false
	err := eachAttribute(m, func(a *netlink.AttributeDecoder) {
		ours = ours || a.Type() == unix.NFTA_TABLE_NAME && a.String() == guardTable.Name
	})
	return ours && err == nil && m.Data[0] == unix.NFPROTO_INET
}
