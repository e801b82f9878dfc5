package nl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Link is a device as the kernel describes it.
type Link struct {
	Index int
	Name  string
	MAC   net.HardwareAddr
	MTU   int
	Group uint32
	Alias string
	Kind  string // "veth", "bridge", …; "" for hardware and loopback
	Up    bool   // administratively
	NoARP bool
	Ready bool // operationally up: it has a carrier, and the kernel has acted on that
}

// Links returns all devices of the namespace.
func (c *Conn) Links() ([]Link, error) {
	var b Batch
	b.add("list links", unix.RTM_GETLINK, unix.NLM_F_DUMP, func() { b.ifinfo(0, 0, 0); b.attrU32(unix.IFLA_EXT_MASK, rtextFilterSkipStats) })
	return dumpAll(c, &b, parseLink)
}

// rtextFilterSkipStats is RTEXT_FILTER_SKIP_STATS of linux/rtnetlink.h.
const rtextFilterSkipStats = 1 << 3

// LinkByName returns the device of that name. The error wraps unix.ENODEV if
// there is none.
func (c *Conn) LinkByName(name string) (Link, error) {
	return c.link("get link "+name, 0, name)
}

// LinkByIndex returns the device of that ifindex. The error wraps unix.ENODEV
// if there is none.
func (c *Conn) LinkByIndex(index int) (Link, error) {
	return c.link(fmt.Sprintf("get link %d", index), index, "")
}

func (c *Conn) link(text string, index int, name string) (Link, error) {
	var b Batch
	b.add(text, unix.RTM_GETLINK, 0, func() {
		b.ifinfo(index, 0, 0)
		if name != "" {
			b.attrText(unix.IFLA_IFNAME, name)
		}
		b.attrU32(unix.IFLA_EXT_MASK, rtextFilterSkipStats)
	})
	links, err := dumpAll(c, &b, parseLink)
	if err != nil {
		return Link{}, err
	}
	if len(links) != 1 {
		return Link{}, fmt.Errorf("%s: %w", text, unix.ENODEV)
	}
	return links[0], nil
}

// Routes returns the IPv4 unicast routes of a table.
func (c *Conn) Routes(table uint32) ([]Route, error) {
	var b Batch
	b.add(fmt.Sprintf("list routes of table %d", table), unix.RTM_GETROUTE, unix.NLM_F_DUMP, func() {
		b.raw(unix.AF_INET, 0, 0, 0, 0, 0, 0, 0)
		b.u32(0)
		b.attrU32(unix.RTA_TABLE, table)
	})
	all, err := dumpAll(c, &b, parseRoute)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil // a table that never held a route does not exist
	}
	var out []Route
	for _, r := range all {
		if r.Table == table {
			out = append(out, r)
		}
	}
	return out, err
}

// HostRoutes returns the IPv4 unicast routes to single addresses, of all tables.
func (c *Conn) HostRoutes() ([]Route, error) {
	var b Batch
	b.add("list routes", unix.RTM_GETROUTE, unix.NLM_F_DUMP, func() {
		b.raw(unix.AF_INET, 0, 0, 0, 0, 0, 0, 0)
		b.u32(0)
	})
	all, err := dumpAll(c, &b, parseRoute)
	return slices.DeleteFunc(all, func(r Route) bool { return r.Dst.Bits() != 32 }), err
}

// Rules returns the IPv4 rules that look a table up.
func (c *Conn) Rules() ([]Rule, error) {
	var b Batch
	b.add("list rules", unix.RTM_GETRULE, unix.NLM_F_DUMP, func() {
		b.raw(unix.AF_INET, 0, 0, 0, 0, 0, 0, 0)
		b.u32(0)
	})
	return dumpAll(c, &b, parseRule)
}

// Addr is an IPv4 address of a device.
type Addr struct {
	Index  int
	Prefix netip.Prefix // the address itself with the prefix's length
}

// Addrs returns the IPv4 addresses of all devices.
func (c *Conn) Addrs() ([]Addr, error) {
	var b Batch
	b.add("list addresses", unix.RTM_GETADDR, unix.NLM_F_DUMP, func() {
		b.raw(unix.AF_INET, 0, 0, 0)
		b.u32(0)
	})
	return dumpAll(c, &b, parseAddr)
}

// Neigh is a neighbour with a link-layer address.
type Neigh struct {
	Index int
	Addr  netip.Addr
	MAC   net.HardwareAddr
	State uint16 // unix.NUD_…
}

// Neighs returns the IPv4 neighbours of all devices.
func (c *Conn) Neighs() ([]Neigh, error) {
	var b Batch
	b.add("list neighbours", unix.RTM_GETNEIGH, unix.NLM_F_DUMP, func() {
		b.raw(unix.AF_INET, 0, 0, 0)
		b.u32(0)
		b.u32(0)
	})
	return dumpAll(c, &b, parseNeigh)
}

// dumpAll sends b's one request and parses each answer; parse tells whether
// the answer is of the kind that is asked for.
func dumpAll[T any](c *Conn, b *Batch, parse func([]byte) (T, bool, error)) ([]T, error) {
	bodies, err := c.dump(b)
	if err != nil {
		return nil, err
	}
	out := make([]T, 0, len(bodies))
	for _, body := range bodies {
		v, ok, err := parse(body)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", b.ops[0].text, err)
		}
		if ok {
			out = append(out, v)
		}
	}
	return out, nil
}

// ifOperUp is IF_OPER_UP of linux/if.h.
const ifOperUp = 6

func parseLink(b []byte) (Link, bool, error) {
	if len(b) < unix.SizeofIfInfomsg {
		return Link{}, false, errMalformed
	}
	flags := binary.NativeEndian.Uint32(b[8:])
	l := Link{
		Index: int(int32(binary.NativeEndian.Uint32(b[4:]))),
		Up:    flags&unix.IFF_UP != 0,
		NoARP: flags&unix.IFF_NOARP != 0,
	}
	err := eachAttr(b[unix.SizeofIfInfomsg:], func(typ uint16, v []byte) {
		switch typ {
		case unix.IFLA_IFNAME:
			l.Name = cstring(v)
		case unix.IFLA_IFALIAS:
			l.Alias = cstring(v)
		case unix.IFLA_ADDRESS:
			l.MAC = net.HardwareAddr(v)
		case unix.IFLA_MTU:
			l.MTU = int(u32(v))
		case unix.IFLA_GROUP:
			l.Group = u32(v)
		case unix.IFLA_OPERSTATE:
			l.Ready = len(v) == 1 && v[0] == ifOperUp
		case unix.IFLA_LINKINFO:
			_ = eachAttr(v, func(typ uint16, v []byte) {
				if typ == unix.IFLA_INFO_KIND {
					l.Kind = cstring(v)
				}
			})
		}
	})
	return l, true, err
}

func parseRoute(b []byte) (Route, bool, error) {
	if len(b) < unix.SizeofRtMsg {
		return Route{}, false, errMalformed
	}
	bits := b[1]
	r := Route{Table: uint32(b[4]), Protocol: b[5]}
	dst := netip.IPv4Unspecified()
	err := eachAttr(b[unix.SizeofRtMsg:], func(typ uint16, v []byte) {
		switch typ {
		case unix.RTA_TABLE:
			r.Table = u32(v)
		case unix.RTA_OIF:
			r.Index = int(u32(v))
		case unix.RTA_DST:
			dst, _ = netip.AddrFromSlice(v)
		case unix.RTA_GATEWAY:
			r.Gateway, _ = netip.AddrFromSlice(v)
		}
	})
	r.OnLink = binary.NativeEndian.Uint32(b[8:])&unix.RTNH_F_ONLINK != 0
	r.Dst = netip.PrefixFrom(dst, int(bits))
	ours := b[0] == unix.AF_INET && b[7] == unix.RTN_UNICAST && r.Dst.IsValid() && dst.Is4()
	return r, ours, err
}

func parseRule(b []byte) (Rule, bool, error) {
	if len(b) < unix.SizeofRtMsg { // struct fib_rule_hdr is as long
		return Rule{}, false, errMalformed
	}
	r := Rule{Table: uint32(b[4])}
	err := eachAttr(b[unix.SizeofRtMsg:], func(typ uint16, v []byte) {
		switch typ {
		case unix.FRA_PRIORITY:
			r.Priority = u32(v)
		case unix.FRA_TABLE:
			r.Table = u32(v)
		case unix.FRA_FWMARK:
			r.Mark = u32(v)
		case unix.FRA_FWMASK:
			r.Mask = u32(v)
		case unix.FRA_PROTOCOL:
			if len(v) == 1 {
				r.Protocol = v[0]
			}
		}
	})
	return r, b[0] == unix.AF_INET && b[7] == unix.FR_ACT_TO_TBL, err
}

func parseAddr(b []byte) (Addr, bool, error) {
	if len(b) < unix.SizeofIfAddrmsg {
		return Addr{}, false, errMalformed
	}
	a := Addr{Index: int(binary.NativeEndian.Uint32(b[4:]))}
	var local, address netip.Addr
	err := eachAttr(b[unix.SizeofIfAddrmsg:], func(typ uint16, v []byte) {
		switch typ {
		case unix.IFA_LOCAL:
			local, _ = netip.AddrFromSlice(v)
		case unix.IFA_ADDRESS:
			address, _ = netip.AddrFromSlice(v)
		}
	})
	if !local.IsValid() {
		local = address
	}
	a.Prefix = netip.PrefixFrom(local, int(b[1]))
	return a, b[0] == unix.AF_INET && a.Prefix.IsValid(), err
}

func parseNeigh(b []byte) (Neigh, bool, error) {
	const size = 12 // struct ndmsg
	if len(b) < size {
		return Neigh{}, false, errMalformed
	}
	n := Neigh{Index: int(binary.NativeEndian.Uint32(b[4:])), State: binary.NativeEndian.Uint16(b[8:])}
	err := eachAttr(b[size:], func(typ uint16, v []byte) {
		switch typ {
		case unix.NDA_DST:
			n.Addr, _ = netip.AddrFromSlice(v)
		case unix.NDA_LLADDR:
			n.MAC = net.HardwareAddr(v)
		}
	})
	return n, b[0] == unix.AF_INET && n.Addr.IsValid(), err
}

// u32 reads a number of four bytes; what is shorter is 0.
func u32(v []byte) uint32 {
	if len(v) < 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(v)
}
