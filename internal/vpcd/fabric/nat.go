package fabric

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
)

// NATMTU is the largest IP length that a NAT gateway takes (VPC user guide,
// "NAT gateway basics").
const NATMTU = 8500

// natIdle is how long a NAT gateway remembers a connection without a packet, in
// seconds (same source). TCP in the middle of a connection that it does not
// remember is answered with a reset.
const natIdle = "350"

// A NAT gateway has 55,000 connections at once by each of its addresses to one
// destination: address, port and protocol (same source). It chooses source ports
// of 1024 to 65535; that the kernel is given the first 55,000 of them is what
// holds it to that number.
const (
	natFirstPort   = 1024
	natConnections = 55_000
)

// NAT makes a guest a NAT gateway: what the interface gets from CIDRs goes out
// of it again from one of Addresses, and the answers go back. TCP, UDP and ICMP
// alone. The kernel of the guest does it, with nftables and conntrack, so it
// goes on without this process.
type NAT struct {
	Addresses []netip.Addr   // the interface's own, 1 to 8
	CIDRs     []netip.Prefix // of the VPC
	// Connections is how many each address has at once to one destination; 0 is
	// AWS's number, 55,000.
	Connections int
}

func (n NAT) check() error {
	if len(n.Addresses) == 0 || len(n.CIDRs) == 0 {
		return errors.New("a NAT gateway has neither no address nor no VPC")
	}
	if n.Connections < 0 || n.Connections > 65536-natFirstPort {
		return fmt.Errorf("a NAT gateway cannot have %d connections to one destination", n.Connections)
	}
	for _, a := range n.Addresses {
		if !a.Is4() {
			return fmt.Errorf("address %s of a NAT gateway is not IPv4", a)
		}
	}
	for _, c := range n.CIDRs {
		if !c.IsValid() || !c.Addr().Is4() {
			return fmt.Errorf("CIDR block %s of a NAT gateway is not IPv4", c)
		}
	}
	return nil
}

// natSysctls are what the kernel of a NAT gateway's guest is told.
var natSysctls = []struct{ file, value string }{
	{"netfilter/nf_conntrack_tcp_loose", "0"}, // nothing begins in mid-connection
	{"netfilter/nf_conntrack_tcp_timeout_established", natIdle},
	{"netfilter/nf_conntrack_udp_timeout", natIdle},
	{"netfilter/nf_conntrack_udp_timeout_stream", natIdle},
	{"netfilter/nf_conntrack_icmp_timeout", natIdle},
	{"ipv4/conf/all/rp_filter", "0"},
	{"ipv4/conf/default/rp_filter", "0"},
	{"ipv4/conf/eth0/rp_filter", "0"},
	{"ipv4/conf/all/send_redirects", "0"}, // it comes and goes by one interface
	{"ipv4/conf/default/send_redirects", "0"},
	{"ipv4/conf/eth0/send_redirects", "0"},
	{"ipv4/ip_forward", "1"}, // last: nothing is forwarded untranslated before the rules stand
}

// translate puts the translation of NAT gateways in place, in the kernel of
// their guests. It replaces what is there by one transaction: connections go on.
func (f *Fabric) translate(want desired, guests map[string]uint64, errs *[]error) {
	f.gateways.set(want)
	for guest := range f.translating {
		if _, ok := want.nats[guest]; !ok {
			delete(f.translating, guest)
		}
	}
	for guest, n := range want.nats {
		id := fmt.Sprint(n, guests[guest])
		if f.translating[guest] == id || guests[guest] == 0 {
			continue
		}
		if err := nl.Do(nl.Path(guest), n.install); err != nil {
			*errs = append(*errs, fmt.Errorf("set up NAT gateway %s: %w", guest, err))
			continue
		}
		f.translating[guest] = id
		f.log.Info("NAT gateway set up", "netns", guest, "addresses", len(n.Addresses))
	}
}

// install sets up the calling thread's namespace.
func (n NAT) install() error {
	if err := n.installRules(); err != nil {
		return err
	}
	for _, s := range natSysctls {
		if err := writeSysctl("/proc/sys/net/"+s.file, s.value); err != nil {
			return err
		}
	}
	return nil
}

var natTable = &nftables.Table{Name: "nat-gateway", Family: nftables.TableFamilyIPv4}

// Offsets in headers.
const (
	ipFragOff  = 6
	ipProtocol = 9
	ipSaddr    = 12
	ipDaddr    = 16
	tcpFlags   = 13
)

// Priorities of chains (linux/netfilter_ipv4.h): before reassembly, which
// conntrack brings about.
const beforeDefrag = nftables.ChainPriority(-450)

func (n NAT) installRules() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables socket: %w", err)
	}
	table := c.AddTable(natTable)
	c.DelTable(table)
	table = c.AddTable(natTable)
	drop := nftables.ChainPolicyDrop
	chain := func(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority nftables.ChainPriority, policy *nftables.ChainPolicy) func(exprs ...[]expr.Any) {
		at := c.AddChain(&nftables.Chain{Table: table, Name: name, Type: kind, Hooknum: hook, Priority: &priority, Policy: policy})
		return func(exprs ...[]expr.Any) {
			c.AddRule(&nftables.Rule{Table: table, Chain: at, Exprs: slices.Concat(exprs...)})
		}
	}
	// No fragments of TCP and ICMP.
	early := chain("fragments", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, beforeDefrag, nil)
	for _, protocol := range []byte{protoTCP, protoICMP} {
		early(network(ipFragOff, 2), masked([]byte{0x3f, 0xff}), differs(0, 0), network(ipProtocol, 1), equals(protocol), verdict(expr.VerdictDrop))
	}
	// It is nobody's host.
	input := chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, 0, &drop)
	input(state(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), verdict(expr.VerdictAccept))

	forward := chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, 0, &drop)
	// What is not of a connection: forgotten after natIdle, or never begun.
	for _, from := range n.CIDRs {
		forward(state(expr.CtStateBitINVALID), within(ipSaddr, from), protocolIs(protoTCP), transport(tcpFlags, 1), masked([]byte{0x04}), equals(0),
			[]expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}})
	}
	forward(state(expr.CtStateBitINVALID), verdict(expr.VerdictDrop))
	// The maximum segment size of both sides, by the MTU of the way.
	forward(protocolIs(protoTCP), transport(tcpFlags, 1), masked([]byte{0x02}), differs(0), []expr.Any{
		&expr.Rt{Register: 1, Key: expr.RtTCPMSS},
		&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 2, Size: 2},
		&expr.Exthdr{SourceRegister: 1, Type: 2, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt}, // option 2: MSS
	})
	forward(state(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), verdict(expr.VerdictAccept))
	for _, own := range n.Addresses {
		a := own.As4()
		forward(network(ipDaddr, 4), equals(a[:]...), verdict(expr.VerdictDrop))
	}
	for _, from := range n.CIDRs {
		for _, protocol := range []byte{protoTCP, protoUDP, protoICMP} {
			forward(within(ipSaddr, from), network(ipProtocol, 1), equals(protocol), verdict(expr.VerdictAccept))
		}
	}
	source := chain("source", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, *nftables.ChainPriorityNATSource, nil)
	last := natFirstPort + cmp.Or(n.Connections, natConnections) - 1
	for i, a := range n.Addresses {
		// One of those left, each as likely.
		var pick []expr.Any
		if left := len(n.Addresses) - i; left > 1 {
			pick = append([]expr.Any{&expr.Numgen{Register: 1, Modulus: uint32(left), Type: unix.NFT_NG_RANDOM}}, equals(binaryutil.NativeEndian.PutUint32(0)...)...)
		}
		b := a.As4()
		address := []expr.Any{&expr.Immediate{Register: 1, Data: b[:]}}
		nat := expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegAddrMax: 1}
		ports := nat
		ports.RegProtoMin, ports.RegProtoMax, ports.Specified = 2, 3, true
		jump := "address" + fmt.Sprint(i)
		to := c.AddChain(&nftables.Chain{Table: table, Name: jump})
		for _, protocol := range []byte{protoTCP, protoUDP} {
			c.AddRule(&nftables.Rule{Table: table, Chain: to, Exprs: slices.Concat(protocolIs(protocol), address, []expr.Any{
				&expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(natFirstPort)},
				&expr.Immediate{Register: 3, Data: binaryutil.BigEndian.PutUint16(uint16(last))},
				&ports,
			})})
		}
		c.AddRule(&nftables.Rule{Table: table, Chain: to, Exprs: slices.Concat(address, []expr.Any{&nat})})
		source(pick, []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: jump}})
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("install nftables table ip %s: %w (the kernel needs nf_tables with nat, ct, reject, exthdr, rt and numgen)", natTable.Name, err)
	}
	return nil
}

// Parts of rules: load something into register 1, compare it.

func network(offset, length uint32) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length}}
}

func transport(offset, length uint32) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: length}}
}

func masked(mask []byte) []expr.Any {
	return []expr.Any{&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(len(mask)), Mask: mask, Xor: make([]byte, len(mask))}}
}

func equals(data ...byte) []expr.Any {
	return []expr.Any{&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data}}
}

func differs(data ...byte) []expr.Any {
	return []expr.Any{&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: data}}
}

func within(offset uint32, p netip.Prefix) []expr.Any {
	net := p.Masked().Addr().As4()
	mask := binaryutil.BigEndian.PutUint32(uint32(^uint64(0) << (32 - p.Bits())))
	return slices.Concat(network(offset, 4), masked(mask), equals(net[:]...))
}

func protocolIs(p byte) []expr.Any {
	return append([]expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}}, equals(p)...)
}

func state(bits uint32) []expr.Any {
	return slices.Concat([]expr.Any{&expr.Ct{Key: expr.CtKeySTATE, Register: 1}}, masked(binaryutil.NativeEndian.PutUint32(bits)), differs(0, 0, 0, 0))
}

func verdict(k expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: k}} }
