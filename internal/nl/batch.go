package nl

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// Batch is a sequence of rtnetlink requests that Conn.Exec sends at once. The
// zero value is empty and ready to use. Not safe for concurrent use.
type Batch struct {
	buf []byte
	ops []op
}

type op struct {
	at        int // offset of the message in buf
	text      string
	tolerated []unix.Errno
}

// Tolerate makes the last request succeed if the kernel answers one of errnos
// to it: EEXIST to what is to be there, ENOENT or ESRCH to what is to be gone.
func (b *Batch) Tolerate(errnos ...unix.Errno) { b.ops[len(b.ops)-1].tolerated = errnos }

// number writes the sequence numbers, first for the first message.
func (b *Batch) number(first uint32) {
	for i, o := range b.ops {
		binary.NativeEndian.PutUint32(b.buf[o.at+8:], first+uint32(i))
	}
}

// add appends a message; body appends its payload to b.buf.
func (b *Batch) add(text string, typ, flags uint16, body func()) {
	at := len(b.buf)
	b.ops = append(b.ops, op{at: at, text: text})
	b.buf = append(b.buf, make([]byte, unix.SizeofNlMsghdr)...)
	body()
	binary.NativeEndian.PutUint32(b.buf[at:], uint32(len(b.buf)-at))
	binary.NativeEndian.PutUint16(b.buf[at+4:], typ)
	binary.NativeEndian.PutUint16(b.buf[at+6:], flags|unix.NLM_F_REQUEST)
	b.pad()
}

func (b *Batch) pad() {
	for len(b.buf)%4 != 0 {
		b.buf = append(b.buf, 0)
	}
}

func (b *Batch) raw(v ...byte) { b.buf = append(b.buf, v...) }
func (b *Batch) u32(v uint32)  { b.buf = binary.NativeEndian.AppendUint32(b.buf, v) }

func (b *Batch) attr(typ uint16, value []byte) {
	b.buf = binary.NativeEndian.AppendUint16(b.buf, uint16(unix.SizeofRtAttr+len(value)))
	b.buf = binary.NativeEndian.AppendUint16(b.buf, typ)
	b.buf = append(b.buf, value...)
	b.pad()
}

func (b *Batch) attrU32(typ uint16, v uint32) {
	b.attr(typ, binary.NativeEndian.AppendUint32(nil, v))
}

func (b *Batch) attrText(typ uint16, s string) { b.attr(typ, append([]byte(s), 0)) }

func (b *Batch) nest(typ uint16, body func()) {
	at := len(b.buf)
	b.attr(typ, nil)
	body()
	binary.NativeEndian.PutUint16(b.buf[at:], uint16(len(b.buf)-at))
}

// ifinfo appends a struct ifinfomsg.
func (b *Batch) ifinfo(index int, flags, change uint32) {
	b.raw(unix.AF_UNSPEC, 0, 0, 0)
	b.u32(uint32(index))
	b.u32(flags)
	b.u32(change)
}

const (
	ackOnly = unix.NLM_F_ACK
	create  = unix.NLM_F_ACK | unix.NLM_F_CREATE | unix.NLM_F_EXCL
	replace = unix.NLM_F_ACK | unix.NLM_F_CREATE | unix.NLM_F_REPLACE
)

// Veth is a pair to be made in place: each end at once in its namespace, with
// its name and index, so that no device is ever moved (which takes the kernel
// some 20 ms, against less than one).
type Veth struct {
	Name  string
	Index int // ifindex, 0: the kernel's choice
	MAC   net.HardwareAddr
	MTU   int
	Group uint32
	NoARP bool // the stack neither asks nor answers ARP on this end

	PeerNetns *os.File
	PeerName  string
	PeerIndex int // in the peer's namespace, 0: the kernel's choice
	PeerMAC   net.HardwareAddr
	PeerMTU   int
}

// VethAdd makes a pair, both ends down. The kernel answers EEXIST if a name or
// the host's index is taken, EBUSY if the peer's index is.
func (b *Batch) VethAdd(v Veth) {
	b.add(fmt.Sprintf("add link %s (veth)", v.Name), unix.RTM_NEWLINK, create, func() {
		var flags uint32
		if v.NoARP {
			flags = unix.IFF_NOARP
		}
		b.ifinfo(v.Index, flags, flags)
		b.attrText(unix.IFLA_IFNAME, v.Name)
		b.attr(unix.IFLA_ADDRESS, v.MAC)
		b.attrU32(unix.IFLA_MTU, uint32(v.MTU))
		b.attrU32(unix.IFLA_GROUP, v.Group)
		b.nest(unix.IFLA_LINKINFO, func() {
			b.attr(unix.IFLA_INFO_KIND, []byte("veth"))
			b.nest(unix.IFLA_INFO_DATA, func() {
				b.nest(vethInfoPeer, func() {
					b.ifinfo(v.PeerIndex, 0, 0)
					b.attrText(unix.IFLA_IFNAME, v.PeerName)
					b.attr(unix.IFLA_ADDRESS, v.PeerMAC)
					b.attrU32(unix.IFLA_MTU, uint32(v.PeerMTU))
					b.attrU32(unix.IFLA_NET_NS_FD, uint32(v.PeerNetns.Fd()))
				})
			})
		})
	})
}

// vethInfoPeer is VETH_INFO_PEER of linux/veth.h.
const vethInfoPeer = 1

// LinkQuiet labels the link for people (ifalias, which the kernel ignores in
// the request that makes a link) and keeps it from making up an IPv6
// link-local address, and with it from speaking IPv6 unasked. The link is to
// be down still.
func (b *Batch) LinkQuiet(index int, alias string) {
	b.add(fmt.Sprintf("set link %d: alias, no IPv6 address", index), unix.RTM_NEWLINK, ackOnly, func() {
		b.ifinfo(index, 0, 0)
		if alias != "" {
			// 255: IFALIASZ of linux/if.h, less the zero byte.
			b.attr(unix.IFLA_IFALIAS, []byte(alias[:min(len(alias), 255)]))
		}
		b.nest(unix.IFLA_AF_SPEC, func() {
			b.nest(unix.AF_INET6, func() {
				b.attr(unix.IFLA_INET6_ADDR_GEN_MODE, []byte{addrGenModeNone})
			})
		})
	})
	// A kernel without IPv6 on the link, or without IPv6, has nothing to keep quiet.
	b.Tolerate(unix.EAFNOSUPPORT)
}

// addrGenModeNone is IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
const addrGenModeNone = 1

// LinkUp sets the link up.
func (b *Batch) LinkUp(index int) {
	b.add(fmt.Sprintf("set link %d up", index), unix.RTM_NEWLINK, ackOnly, func() {
		b.ifinfo(index, unix.IFF_UP, unix.IFF_UP)
	})
}

// LinkMTU sets the link's MTU, in bytes without the Ethernet header.
func (b *Batch) LinkMTU(index, mtu int) {
	b.add(fmt.Sprintf("set link %d: mtu %d", index, mtu), unix.RTM_NEWLINK, ackOnly, func() {
		b.ifinfo(index, 0, 0)
		b.attrU32(unix.IFLA_MTU, uint32(mtu))
	})
}

// LinkDelete deletes the link of that name; of a veth, the other end as well.
// The kernel answers ENODEV if there is none.
func (b *Batch) LinkDelete(name string) {
	b.add("delete link "+name, unix.RTM_DELLINK, ackOnly, func() {
		b.ifinfo(0, 0, 0)
		b.attrText(unix.IFLA_IFNAME, name)
	})
}

// LinkDeleteIndex deletes the link of that ifindex. ENODEV: there is none.
func (b *Batch) LinkDeleteIndex(index int) {
	b.add(fmt.Sprintf("delete link %d", index), unix.RTM_DELLINK, ackOnly, func() {
		b.ifinfo(index, 0, 0)
	})
}

// LinkGroupIndex moves the link of that ifindex into a group.
func (b *Batch) LinkGroupIndex(index int, group uint32) {
	b.add(fmt.Sprintf("set link %d: group %d", index, group), unix.RTM_NEWLINK, ackOnly, func() {
		b.ifinfo(index, 0, 0)
		b.attrU32(unix.IFLA_GROUP, group)
	})
}

// LinkGroup moves the link of that name into a group.
func (b *Batch) LinkGroup(name string, group uint32) {
	b.add(fmt.Sprintf("set link %s: group %d", name, group), unix.RTM_NEWLINK, ackOnly, func() {
		b.ifinfo(0, 0, 0)
		b.attrText(unix.IFLA_IFNAME, name)
		b.attrU32(unix.IFLA_GROUP, group)
	})
}

// LinkDeleteGroup deletes all links of a group at once, in hardly more time
// than one. ENODEV: there is none.
func (b *Batch) LinkDeleteGroup(group uint32) {
	b.add(fmt.Sprintf("delete links of group %d", group), unix.RTM_DELLINK, ackOnly, func() {
		b.ifinfo(0, 0, 0)
		b.attrU32(unix.IFLA_GROUP, group)
	})
}

// AddrAdd gives the link an IPv4 address, without the route to its prefix that
// the kernel would add by itself. EEXIST: it has it.
func (b *Batch) AddrAdd(index int, p netip.Prefix) {
	b.add(fmt.Sprintf("add address %s to link %d", p, index), unix.RTM_NEWADDR, create, func() {
		b.raw(unix.AF_INET, byte(p.Bits()), 0, unix.RT_SCOPE_UNIVERSE)
		b.u32(uint32(index))
		b.attr(unix.IFA_LOCAL, p.Addr().AsSlice())
		b.attr(unix.IFA_ADDRESS, p.Addr().AsSlice())
		b.attrU32(unix.IFA_FLAGS, unix.IFA_F_NOPREFIXROUTE)
	})
}

// Route is an IPv4 unicast route.
type Route struct {
	Dst      netip.Prefix
	Gateway  netip.Addr // zero: the destination is on the link
	Index    int        // ifindex of the link
	Table    uint32
	Protocol uint8
	OnLink   bool // the gateway is on the link, whatever other routes say
}

func (r Route) String() string {
	s := "route " + r.Dst.String()
	if r.Gateway.IsValid() {
		s += " via " + r.Gateway.String()
	}
	return fmt.Sprintf("%s dev %d table %d", s, r.Index, r.Table)
}

// RouteSet adds the route, or puts it in the place of one to the same
// destination in the same table.
func (b *Batch) RouteSet(r Route) { b.route("set ", unix.RTM_NEWROUTE, replace, r) }

// RouteDelete deletes the route. ESRCH: there is none.
func (b *Batch) RouteDelete(r Route) { b.route("delete ", unix.RTM_DELROUTE, ackOnly, r) }

func (b *Batch) route(verb string, typ, flags uint16, r Route) {
	b.add(verb+r.String(), typ, flags, func() {
		scope, rtflags := byte(unix.RT_SCOPE_LINK), uint32(0)
		if r.Gateway.IsValid() {
			scope = unix.RT_SCOPE_UNIVERSE
		}
		if r.OnLink {
			rtflags = unix.RTNH_F_ONLINK
		}
		b.raw(unix.AF_INET, byte(r.Dst.Bits()), 0, 0, unix.RT_TABLE_UNSPEC, r.Protocol, scope, unix.RTN_UNICAST)
		b.u32(rtflags)
		b.attr(unix.RTA_DST, r.Dst.Addr().AsSlice())
		b.attrU32(unix.RTA_TABLE, r.Table)
		if r.Gateway.IsValid() {
			b.attr(unix.RTA_GATEWAY, r.Gateway.AsSlice())
		}
		if r.Index != 0 {
			b.attrU32(unix.RTA_OIF, uint32(r.Index))
		}
	})
}

// NeighSet makes mac the permanent link-layer address of addr on the link.
func (b *Batch) NeighSet(index int, addr netip.Addr, mac net.HardwareAddr) {
	b.add(fmt.Sprintf("set neighbour %s on link %d", addr, index), unix.RTM_NEWNEIGH, replace, func() {
		b.raw(unix.AF_INET, 0, 0, 0)
		b.u32(uint32(index))
		b.buf = binary.NativeEndian.AppendUint16(b.buf, unix.NUD_PERMANENT)
		b.raw(0, 0) // flags, type
		b.attr(unix.NDA_DST, addr.AsSlice())
		b.attr(unix.NDA_LLADDR, mac)
	})
}

// Rule is an IPv4 routing policy rule that looks a table up.
type Rule struct {
	Priority uint32
	Table    uint32
	Mark     uint32
	Mask     uint32 // 0: the rule does not look at the mark
	Protocol uint8
}

func (r Rule) String() string {
	s := fmt.Sprintf("rule %d:", r.Priority)
	if r.Mask != 0 {
		s += fmt.Sprintf(" fwmark %#x/%#x", r.Mark, r.Mask)
	}
	return fmt.Sprintf("%s lookup %d", s, r.Table)
}

// RuleAdd adds the rule. EEXIST: the same is there.
func (b *Batch) RuleAdd(r Rule) { b.rule("add ", unix.RTM_NEWRULE, create, r) }

// RuleDelete deletes the rule. ENOENT: there is none.
func (b *Batch) RuleDelete(r Rule) { b.rule("delete ", unix.RTM_DELRULE, ackOnly, r) }

func (b *Batch) rule(verb string, typ, flags uint16, r Rule) {
	b.add(verb+r.String(), typ, flags, func() {
		b.raw(unix.AF_INET, 0, 0, 0, unix.RT_TABLE_UNSPEC, 0, 0, unix.FR_ACT_TO_TBL)
		b.u32(0)
		b.attrU32(unix.FRA_PRIORITY, r.Priority)
		b.attrU32(unix.FRA_TABLE, r.Table)
		if r.Mask != 0 {
			b.attrU32(unix.FRA_FWMARK, r.Mark)
			b.attrU32(unix.FRA_FWMASK, r.Mask)
		}
		b.attr(unix.FRA_PROTOCOL, []byte{r.Protocol})
	})
}
