package fabric

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	rtnl "github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
)

// rtnetlink is a NETLINK_ROUTE socket in one network namespace. The messages
// are written here, attribute by attribute, because the pair must be made in
// place by one of them (DESIGN: moving a device costs 20 ms).
type rtnetlink struct {
	socket map[int]*rtnl.SocketHandle
}

// dialRoute opens the socket in the namespace of the calling thread.
func dialRoute() (*rtnetlink, error) {
	s, err := rtnl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	if err := s.SetExtAck(true); err != nil {
		s.Close()
		return nil, fmt.Errorf("ask netlink for messages: %w", err)
	}
	return &rtnetlink{socket: map[int]*rtnl.SocketHandle{unix.NETLINK_ROUTE: {Socket: s}}}, nil
}

// dialRouteAt opens the socket in the namespace at nsPath.
func dialRouteAt(nsPath string) (r *rtnetlink, err error) {
	err = nl.Do(nsPath, func() error {
		r, err = dialRoute()
		return err
	})
	return r, err
}

func (r *rtnetlink) Close() {
	for _, s := range r.socket {
		s.Close()
	}
}

func (r *rtnetlink) do(proto, flags int, data ...rtnl.NetlinkRequestData) error {
	req := rtnl.NewNetlinkRequest(proto, flags|unix.NLM_F_ACK)
	req.Sockets = r.socket
	for _, d := range data {
		req.AddData(d)
	}
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func infomsg(index int, flags, change uint32) *rtnl.IfInfomsg {
	m := rtnl.NewIfInfomsg(unix.AF_UNSPEC)
	m.Index, m.Flags, m.Change = int32(index), flags, change
	return m
}

func text(s string) []byte    { return append([]byte(s), 0) }
func word(v uint32) []byte    { return binary.NativeEndian.AppendUint32(nil, v) }
func ip4(a netip.Addr) []byte { b := a.As4(); return b[:] }

// veth describes a pair to be made.
type veth struct {
	name     string // of the fabric end
	index    int    // of the fabric end
	peerName string
	peerMAC  net.HardwareAddr
	peerMTU  int
	peerNS   *os.File
}

// wireMTU is the MTU of fabric ends: no limit, so that programs see what is too
// long and can answer it.
const wireMTU = 65535

// add makes the pair, each end in its place and down: a peer that is created
// up has no carrier yet and fails with ENOTCONN. The fabric end has the
// router's MAC, so that what the stack sends through it comes from the router, and
// NOARP, so that the stack never asks for a neighbour.
func (r *rtnetlink) add(v veth) error {
	info := rtnl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(rtnl.IFLA_INFO_KIND, []byte("veth"))
	data := info.AddRtAttr(rtnl.IFLA_INFO_DATA, nil)
	peer := data.AddRtAttr(rtnl.VETH_INFO_PEER, nil)
	peer.AddChild(infomsg(0, 0, 0))
	peer.AddRtAttr(unix.IFLA_IFNAME, text(v.peerName))
	peer.AddRtAttr(unix.IFLA_ADDRESS, v.peerMAC)
	peer.AddRtAttr(unix.IFLA_MTU, word(uint32(v.peerMTU)))
	peer.AddRtAttr(unix.IFLA_NET_NS_FD, word(uint32(v.peerNS.Fd())))
	err := r.do(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL,
		infomsg(v.index, unix.IFF_NOARP, unix.IFF_NOARP),
		rtnl.NewRtAttr(unix.IFLA_IFNAME, text(v.name)),
		rtnl.NewRtAttr(unix.IFLA_ADDRESS, RouterMAC),
		rtnl.NewRtAttr(unix.IFLA_MTU, word(wireMTU)),
		info)
	if err != nil {
		return fmt.Errorf("make veth %s with %s in %s: %w", v.name, v.peerName, v.peerNS.Name(), err)
	}
	return nil
}

// enable sets the fabric end up and as it must be.
func (r *rtnetlink) enable(index int, alias string) error {
	const flags = unix.IFF_UP | unix.IFF_NOARP
	err := r.do(unix.RTM_SETLINK, 0, infomsg(index, flags, flags),
		rtnl.NewRtAttr(unix.IFLA_MTU, word(wireMTU)),
		rtnl.NewRtAttr(unix.IFLA_IFALIAS, []byte(alias)))
	if err != nil {
		return fmt.Errorf("set device of %s up: %w", alias, err)
	}
	return nil
}

// doomedGroup is the link group of what is about to be deleted ("uldl").
const doomedGroup = 0x756c646c

// remove deletes devices. Each deletion waits for the kernel's other users of
// devices; a group is deleted in one go.
func (r *rtnetlink) remove(indexes ...int) error {
	gone := func(err error) bool { return errors.Is(err, unix.ENODEV) }
	if len(indexes) == 1 {
		if err := r.do(unix.RTM_DELLINK, 0, infomsg(indexes[0], 0, 0)); err != nil && !gone(err) {
			return fmt.Errorf("delete device %d: %w", indexes[0], err)
		}
		return nil
	}
	marked := false
	for _, index := range indexes {
		err := r.do(unix.RTM_SETLINK, 0, infomsg(index, 0, 0), rtnl.NewRtAttr(unix.IFLA_GROUP, word(doomedGroup)))
		if err != nil && !gone(err) {
			return fmt.Errorf("put device %d into a group: %w", index, err)
		}
		marked = marked || err == nil
	}
	if !marked {
		return nil
	}
	err := r.do(unix.RTM_DELLINK, 0, infomsg(0, 0, 0), rtnl.NewRtAttr(unix.IFLA_GROUP, word(doomedGroup)))
	if err != nil && !gone(err) {
		return fmt.Errorf("delete %d devices: %w", len(indexes), err)
	}
	return nil
}

// device is what a dump tells of one.
type deviceInfo struct {
	name      string
	index     int
	flags     uint32
	mtu       uint32
	alias     string
	rxDropped uint64 // with statistics only
}

// devices lists the namespace's devices, except lo.
func (r *rtnetlink) devices(statistics bool) ([]deviceInfo, error) {
	var filter uint32
	if !statistics {
		filter = 1 << 3 // RTEXT_FILTER_SKIP_STATS
	}
	var out []deviceInfo
	for {
		out = out[:0]
		req := rtnl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
		req.Sockets = r.socket
		req.AddData(infomsg(0, 0, 0))
		req.AddData(rtnl.NewRtAttr(unix.IFLA_EXT_MASK, word(filter)))
		msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
		if errors.Is(err, rtnl.ErrDumpInterrupted) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list devices: %w", err)
		}
		for _, m := range msgs {
			d, err := parseDevice(m)
			if err != nil {
				return nil, err
			}
			if d.flags&unix.IFF_LOOPBACK == 0 {
				out = append(out, d)
			}
		}
		return out, nil
	}
}

func parseDevice(m []byte) (deviceInfo, error) {
	if len(m) < unix.SizeofIfInfomsg {
		return deviceInfo{}, errors.New("list devices: message cut short")
	}
	head := rtnl.DeserializeIfInfomsg(m)
	attrs, err := rtnl.ParseRouteAttr(m[unix.SizeofIfInfomsg:])
	if err != nil {
		return deviceInfo{}, fmt.Errorf("list devices: %w", err)
	}
	d := deviceInfo{index: int(head.Index), flags: head.Flags}
	for _, a := range attrs {
		switch a.Attr.Type {
		case unix.IFLA_IFNAME:
			d.name = unix.ByteSliceToString(a.Value)
		case unix.IFLA_IFALIAS:
			d.alias = unix.ByteSliceToString(a.Value)
		case unix.IFLA_MTU:
			if len(a.Value) >= 4 {
				d.mtu = binary.NativeEndian.Uint32(a.Value)
			}
		case unix.IFLA_STATS64:
			// struct rtnl_link_stats64: rx_dropped is the seventh number.
			if len(a.Value) >= 7*8 {
				d.rxDropped = binary.NativeEndian.Uint64(a.Value[6*8:])
			}
		}
	}
	return d, nil
}

// addAddress adds an address to a device; one that is there already is no error.
func (r *rtnetlink) addAddress(index int, a netip.Prefix, scope uint8) error {
	m := rtnl.NewIfAddrmsg(unix.AF_INET)
	m.Index, m.Prefixlen, m.Scope = uint32(index), uint8(a.Bits()), scope
	data := []rtnl.NetlinkRequestData{m,
		rtnl.NewRtAttr(unix.IFA_LOCAL, ip4(a.Addr())),
		rtnl.NewRtAttr(unix.IFA_ADDRESS, ip4(a.Addr()))}
	if a.Bits() < 31 {
		last := binary.BigEndian.Uint32(ip4(a.Addr())) | ^uint32(0)>>a.Bits()
		data = append(data, rtnl.NewRtAttr(unix.IFA_BROADCAST, binary.BigEndian.AppendUint32(nil, last)))
	}
	err := r.do(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, data...)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add address %s: %w", a, err)
	}
	return nil
}

// addAddress6 adds an IPv6 address without asking whether somebody has it
// already (RFC 4862, 5.4): the VPC knows that nobody has, and it can be used at
// once.
func (r *rtnetlink) addAddress6(index int, a netip.Addr) error {
	m := rtnl.NewIfAddrmsg(unix.AF_INET6)
	m.Index, m.Prefixlen, m.Flags = uint32(index), 128, unix.IFA_F_NODAD
	err := r.do(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, m, rtnl.NewRtAttr(unix.IFA_LOCAL, a.AsSlice()))
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add address %s: %w", a, err)
	}
	return nil
}

// addDefault6 adds the default route that the router advertises, before it does,
// and with a metric of its own, so that neither is in the other's way.
func (r *rtnetlink) addDefault6(index int) error {
	m := rtnl.NewRtMsg()
	m.Family, m.Protocol = unix.AF_INET6, unix.RTPROT_DHCP
	err := r.do(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, m, rtnl.NewRtAttr(unix.RTA_OIF, word(uint32(index))),
		rtnl.NewRtAttr(unix.RTA_GATEWAY, RouterAddr6.AsSlice()), rtnl.NewRtAttr(unix.RTA_PRIORITY, word(512)))
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add default route via %s: %w", RouterAddr6, err)
	}
	return nil
}

// addDefault adds the default route that a DHCP client would; one that is
// there already is no error. Without a gateway (the zero Addr) everything is on
// the link.
func (r *rtnetlink) addDefault(index int, gateway, source netip.Addr) error {
	m := rtnl.NewRtMsg()
	m.Family, m.Protocol = unix.AF_INET, unix.RTPROT_DHCP
	data := []rtnl.NetlinkRequestData{m, rtnl.NewRtAttr(unix.RTA_PREFSRC, ip4(source)), rtnl.NewRtAttr(unix.RTA_OIF, word(uint32(index)))}
	if gateway.IsValid() {
		data = append(data, rtnl.NewRtAttr(unix.RTA_GATEWAY, ip4(gateway)))
	} else {
		m.Scope = unix.RT_SCOPE_LINK
	}
	err := r.do(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, data...)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add default route via %s: %w", gateway, err)
	}
	return nil
}

// up sets a device up, and those of flags that are not 0 (IFF_NOARP).
func (r *rtnetlink) up(index int, flags uint32) error {
	if err := r.do(unix.RTM_SETLINK, 0, infomsg(index, unix.IFF_UP|flags, unix.IFF_UP|flags)); err != nil {
		return fmt.Errorf("set device %d up: %w", index, err)
	}
	return nil
}
