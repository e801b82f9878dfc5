package fabric

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// ResolverAt is where ListenTCP and ListenResolver take what a guest sends to its
// VPC's resolver, by either of its addresses.
var ResolverAt = netip.AddrPortFrom(netip.IPv4Unspecified(), 53)

// ListenTCP returns a listener in the fabric's namespace for what the guest of
// one ENI sends to a service (at IMDSAddr or EndpointAddr, or ResolverAt). It is bound to
// the ENI's device, so every ENI has its own, at the same address and port, and
// clients with the same address in two VPCs are two clients. RemoteAddr of a
// connection is the address that the client has behind the ENI, a secondary
// one too.
//
// Accept returns net.ErrClosed once Set has removed or remade the ENI's
// interface; listen again if it is attached again. The TTL of answers is the
// connection's (IP_TTL).
func (f *Fabric) ListenTCP(eni vpc.ENIID, at netip.AddrPort) (net.Listener, error) {
	if at.Addr() != IMDSAddr && at.Addr() != EndpointAddr && at != ResolverAt {
		return nil, fmt.Errorf("listen at %s for %s: the fabric has the services %s, %s and %s only", at, eni, IMDSAddr, EndpointAddr, ResolverAt)
	}
	name, err := device(eni)
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w", at, err)
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var bind error
		err := c.Control(func(fd uintptr) { bind = unix.BindToDevice(int(fd), name) })
		return errors.Join(err, bind)
	}}
	// An MPTCP socket has no IP_TTL of its own for each answer.
	lc.SetMultipathTCP(false)
	var l net.Listener
	// The socket is made on this thread: an IP literal needs no resolver.
	err = nl.Do(nl.Path(f.names.fabric()), func() (err error) {
		l, err = lc.Listen(context.Background(), "tcp4", at.String())
		return err
	})
	if errors.Is(err, unix.ENODEV) {
		return nil, fmt.Errorf("listen at %s for %s: it is not attached; Set it first: %w", at, eni, err)
	}
	if err != nil {
		return nil, fmt.Errorf("listen at %s for %s: %w", at, eni, err)
	}
	return f.listening.add(eni, l), nil
}

// listening knows the open listeners, so that they end with their interface.
type listening struct {
	mu    sync.Mutex
	byENI map[vpc.ENIID][]*listener
}

type listener struct {
	net.Listener
	eni vpc.ENIID
	of  *listening
}

func (l *listening) add(eni vpc.ENIID, inner net.Listener) *listener {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.byENI == nil {
		l.byENI = map[vpc.ENIID][]*listener{}
	}
	out := &listener{inner, eni, l}
	l.byENI[eni] = append(l.byENI[eni], out)
	return out
}

func (l *listener) Close() error {
	l.of.mu.Lock()
	// After close and closeAll there is nothing to remove it from.
	if open, ok := l.of.byENI[l.eni]; ok {
		l.of.byENI[l.eni] = slices.DeleteFunc(open, func(o *listener) bool { return o == l })
	}
	l.of.mu.Unlock()
	return l.Listener.Close()
}

// close ends the listeners of one ENI.
func (l *listening) close(eni vpc.ENIID) {
	l.mu.Lock()
	doomed := l.byENI[eni]
	delete(l.byENI, eni)
	l.mu.Unlock()
	for _, o := range doomed {
		_ = o.Listener.Close() // closing a listening socket frees it, whatever it answers
	}
}

func (l *listening) closeAll() {
	l.mu.Lock()
	all := l.byENI
	l.byENI = nil
	l.mu.Unlock()
	for _, doomed := range all {
		for _, o := range doomed {
			_ = o.Listener.Close()
		}
	}
}
