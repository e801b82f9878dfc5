package fabric

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// setLinkLocal writes the budget into programs that are not loaded yet.
func (o Options) setLinkLocal(spec *ebpf.CollectionSpec) error {
	if o.LinkLocalPPS == 0 {
		return nil
	}
	if err := spec.Variables[bpfgen.FabricVarLinklocalPps].Set(uint32(max(0, o.LinkLocalPPS))); err != nil {
		return fmt.Errorf("set %s: %w", bpfgen.FabricVarLinklocalPps, err)
	}
	return nil
}

// ResolverConn is a socket for the datagrams that guests send to their resolver:
// one for all ENIs. Read and Write may be called concurrently.
type ResolverConn struct {
	fabric *Fabric
	conn   *net.UDPConn
}

// Client is who sent a datagram, and how it came.
type Client struct {
	ENI     vpc.ENIID
	Addr    netip.AddrPort // behind the ENI, a secondary address too
	ifindex int32          // of the fabric end
	to      [4]byte        // where it was sent, as the fabric's namespace has it
}

// ListenResolver returns the fabric's UDP socket at ResolverAt.
func (f *Fabric) ListenResolver() (*ResolverConn, error) {
	var c *net.UDPConn
	// The socket is made on this thread.
	err := nl.Do(nl.Path(f.names.fabric()), func() (err error) {
		if c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(ResolverAt)); err != nil {
			return err
		}
		raw, err := c.SyscallConn()
		if err != nil {
			return errors.Join(err, c.Close())
		}
		var set error
		err = raw.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1) })
		if err = errors.Join(err, set); err != nil {
			return errors.Join(err, c.Close())
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listen at %s for DNS: %w", ResolverAt, err)
	}
	return &ResolverConn{fabric: f, conn: c}, nil
}

// Close ends Read with net.ErrClosed.
func (r *ResolverConn) Close() error { return r.conn.Close() }

// Read returns the next datagram whose sender's ENI is still there.
func (r *ResolverConn) Read(buf []byte) (int, Client, error) {
	oob := make([]byte, unix.CmsgSpace(unix.SizeofInet4Pktinfo))
	for {
		n, m, _, from, err := r.conn.ReadMsgUDPAddrPort(buf, oob)
		if err != nil {
			return 0, Client{}, err
		}
		info, ok := packetInfo(oob[:m])
		if !ok {
			continue // the kernel adds it to every datagram
		}
		id, err := r.fabric.at(uint32(info.Ifindex))
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			continue // it has gone meanwhile
		}
		if err != nil {
			return 0, Client{}, err
		}
		return n, Client{ENI: id, Addr: netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), ifindex: info.Ifindex, to: info.Addr}, nil
	}
}

// Write sends an answer the way the question came.
func (r *ResolverConn) Write(b []byte, to Client) error {
	oob := unix.PktInfo4(&unix.Inet4Pktinfo{Ifindex: to.ifindex, Spec_dst: to.to})
	_, _, err := r.conn.WriteMsgUDPAddrPort(b, oob, to.Addr)
	return err
}

// packetInfo reads IP_PKTINFO.
func packetInfo(oob []byte) (unix.Inet4Pktinfo, bool) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return unix.Inet4Pktinfo{}, false
	}
	for _, m := range messages {
		if m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= unix.SizeofInet4Pktinfo {
			return *(*unix.Inet4Pktinfo)(unsafe.Pointer(&m.Data[0])), true
		}
	}
	return unix.Inet4Pktinfo{}, false
}

// at returns the ENI of a fabric end.
func (f *Fabric) at(ifindex uint32) (vpc.ENIID, error) {
	f.life.RLock()
	defer f.life.RUnlock()
	if f.objs.Enis == nil {
		return "", net.ErrClosed
	}
	var e bpfgen.FabricEni
	if err := f.objs.Enis.Lookup(ifindex, &e); err != nil {
		return "", fmt.Errorf("look up fabric end %d: %w", ifindex, err)
	}
	return eniID(e), nil
}
