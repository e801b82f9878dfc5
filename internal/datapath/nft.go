package datapath

import (
	"fmt"
	"os"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
)

// noMark is the name of the counter in nftables and in Counters: packets from
// a pod's veth that no program of ours had looked at.
const noMark = "no_mark"

const guardChain = "prerouting"

var guardTable = &nftables.Table{Name: "underlay", Family: nftables.TableFamilyINet}

func guardConn(netns *os.File) (*nftables.Conn, error) {
	c, err := nftables.New(nftables.WithNetNSFd(int(netns.Fd())))
	if err != nil {
		return nil, fmt.Errorf("open nftables socket: %w", err)
	}
	return c, nil
}

// installGuard puts the table `inet underlay` in place: what comes from a host
// veth without a mark of ours is dropped and counted, so that a program that
// was lost does not open the node. One transaction replaces the rule; the
// counter is an object of its own and goes on counting.
//
// The hook is prerouting at raw priority: before conntrack, and before the
// decision between forwarding and local delivery, so that it guards both.
func installGuard(netns *os.File) error {
	c, err := guardConn(netns)
	if err != nil {
		return err
	}
	table := c.AddTable(guardTable)
	chain := c.AddChain(&nftables.Chain{
		Table:    table,
		Name:     guardChain,
		Type:     nftables.ChainTypeFilter,
		Hooknum:  nftables.ChainHookPrerouting,
		Priority: nftables.ChainPriorityRaw,
	})
	c.AddObj(&nftables.NamedObj{Table: table, Name: noMark, Type: nftables.ObjTypeCounter, Obj: &expr.Counter{}})
	c.FlushChain(chain)
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFGROUP, Register: 1},
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(^uint32(LinkGroup ^ dyingGroup)),
			Xor:  binaryutil.NativeEndian.PutUint32(0),
		},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(LinkGroup)},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(MarkMask),
			Xor:  binaryutil.NativeEndian.PutUint32(0),
		},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(0)},
		&expr.Objref{Type: int(nftables.ObjTypeCounter), Name: noMark},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}})
	if err := c.Flush(); err != nil {
		return fmt.Errorf("install nftables table inet underlay: %w (the kernel needs nf_tables with inet, meta, bitwise and objref)", err)
	}
	return nil
}

// repairGuard installs the guard again if somebody removed it, as
// `nft flush ruleset` does. It tells whether it was missing.
func repairGuard(netns *os.File) (missing bool, err error) {
	c, err := guardConn(netns)
	if err != nil {
		return false, err
	}
	rules, err := c.GetRules(guardTable, &nftables.Chain{Table: guardTable, Name: guardChain})
	if err == nil && len(rules) == 1 {
		return false, nil
	}
	return true, installGuard(netns)
}

// guardCount returns how many packets the guard has dropped.
func guardCount(netns *os.File) (uint64, error) {
	c, err := guardConn(netns)
	if err != nil {
		return 0, err
	}
	obj, err := c.GetObject(&nftables.NamedObj{Table: guardTable, Name: noMark, Type: nftables.ObjTypeCounter})
	if err != nil {
		return 0, fmt.Errorf("read nftables counter %s of table inet underlay: %w (restart the agent to install the table again)", noMark, err)
	}
	if named, ok := obj.(*nftables.NamedObj); ok {
		if counter, ok := named.Obj.(*expr.Counter); ok {
			return counter.Packets, nil
		}
	}
	return 0, fmt.Errorf("read nftables counter %s of table inet underlay: it is a %T", noMark, obj)
}
