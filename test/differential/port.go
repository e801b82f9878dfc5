package differential

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/packet"
)

// port is an interface as its instance has it, with a packet socket on it.
type port struct {
	fd    int
	index int
	mac   net.HardwareAddr
}

// openPort takes an interface of an instance away from its kernel, which from
// then on answers nothing, and opens a packet socket on it.
func openPort(netns, mac string) (*port, error) {
	p := &port{}
	err := nl.Do(netns, func() error {
		link, err := linkOf(mac)
		if err != nil {
			return err
		}
		p.index, p.mac = link.Attrs().Index, link.Attrs().HardwareAddr
		addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
		if err != nil {
			return fmt.Errorf("list addresses: %w", err)
		}
		for i := range addrs {
			// A second address of a network goes with the first.
			if err := netlink.AddrDel(link, &addrs[i]); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				return fmt.Errorf("remove %s: %w", addrs[i].IPNet, err)
			}
		}
		// Without IPv6 the kernel sends nothing of its own and answers nothing.
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+link.Attrs().Name+"/disable_ipv6", []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("disable IPv6: %w", err)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("set up: %w", err)
		}
		if p.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
			return fmt.Errorf("open packet socket: %w", err)
		}
		for option, value := range map[int]int{unix.SO_RCVBUFFORCE: 8 << 20} {
			if err := unix.SetsockoptInt(p.fd, unix.SOL_SOCKET, option, value); err != nil {
				return fmt.Errorf("set socket option %d: %w", option, err)
			}
		}
		if err := unix.SetsockoptInt(p.fd, unix.SOL_PACKET, packetIgnoreOutgoing, 1); err != nil {
			return fmt.Errorf("ignore what goes out: %w", err)
		}
		const all = unix.ETH_P_ALL << 8 // network byte order
		return unix.Bind(p.fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: p.index})
	})
	if err != nil {
		if p.fd > 0 {
			unix.Close(p.fd)
		}
		return nil, fmt.Errorf("open interface %s in %s: %w", mac, netns, err)
	}
	return p, nil
}

// packetIgnoreOutgoing is PACKET_IGNORE_OUTGOING (linux/if_packet.h).
const packetIgnoreOutgoing = 23

// linkOf finds the interface with a MAC in the thread's namespace.
func linkOf(mac string) (netlink.Link, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		if l.Attrs().HardwareAddr.String() == mac {
			return l, nil
		}
	}
	return nil, errors.New("no interface has that MAC")
}

func (p *port) close() { unix.Close(p.fd) }

// send sends a frame.
func (p *port) send(frame []byte) error {
	for {
		_, err := unix.Write(p.fd, frame)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// receive returns the next frame of IP that has come, or nil.
func (p *port) receive(buf []byte) ([]byte, error) {
	for {
		n, err := unix.Read(p.fd, buf)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return nil, nil
		case err != nil:
			return nil, err
		case n < 15:
		case binary.BigEndian.Uint16(buf[12:]) != packet.EtherTypeIPv4 && binary.BigEndian.Uint16(buf[12:]) != packet.EtherTypeIPv6:
		default:
			return buf[:n], nil
		}
	}
}

// await blocks until a frame has come, at most some milliseconds.
func (p *port) await(millis int) error {
	for {
		fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, millis)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == 0:
			return errors.New("nothing came")
		default:
			return nil
		}
	}
}
