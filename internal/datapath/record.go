package datapath

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// recordVersion is that of the commit record's fields within one layout.
const recordVersion = 1

// clock converts between CLOCK_BOOTTIME, in which records are kept because no
// correction of the wall clock moves it, and time.Time.
type clock struct{ boot time.Time }

func newClock() clock {
	return clock{boot: time.Now().Add(-time.Duration(bootNow())).Round(0)}
}

func bootNow() uint64 {
	var ts unix.Timespec
	// CLOCK_BOOTTIME exists since Linux 2.6.39; the call has no other failure.
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return uint64(ts.Nano())
}

// at returns the time of ns after boot; the zero time for 0.
func (c clock) at(ns uint64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return c.boot.Add(time.Duration(ns))
}

// ns is the inverse of at.
func (c clock) ns(t time.Time) uint64 {
	if t.IsZero() {
		return 0
	}
	return uint64(max(t.Sub(c.boot), 1))
}

func addrKey(a netip.Addr) bpfgen.NodeAddr { return bpfgen.NodeAddr{B: a.As16()} }

// encode returns the record of an endpoint, or an error that names the field
// that is too long for it.
func (c clock) encode(e *Endpoint) (*bpfgen.NodeEndpoint, error) {
	r := &bpfgen.NodeEndpoint{
		Version:     recordVersion,
		State:       uint32(e.State),
		NetnsCookie: e.NetnsCookie,
		CreatedNs:   c.ns(e.Created),
		ReleasedNs:  c.ns(e.Released),
		EniIndex:    uint32(e.ENIIndex),
		HostIfindex: uint32(e.HostIfIndex),
		PeerIfindex: uint32(e.PeerIfIndex),
		Mtu:         uint32(e.MTU),
	}
	copy(r.Mac[:], e.MAC)
	if e.StackOnly {
		r.StackOnly = 1
	}
	for _, f := range []struct {
		name string
		to   []byte
		from string
	}{
		{"container ID", r.ContainerId[:], e.ContainerID},
		{"interface name", r.Ifname[:], e.IfName},
		{"host interface name", r.HostIfname[:], e.HostIfName},
		{"network namespace path", r.Netns[:], e.Netns},
		{"ENI ID", r.Eni[:], string(e.ENI)},
		{"pod namespace", r.PodNamespace[:], e.PodNamespace},
		{"pod name", r.PodName[:], e.PodName},
		{"security group set", r.Groups[:], groupsText(e)},
		{"pod UID", r.PodUid[:], e.PodUID},
	} {
		if len(f.from) > len(f.to) {
			return nil, fmt.Errorf("%s is %d bytes long, at most %d can be recorded", f.name, len(f.from), len(f.to))
		}
		copy(f.to, f.from)
	}
	return r, nil
}

// decode is the inverse of encode. It refuses the record of a later version.
func (c clock) decode(k bpfgen.NodeAddr, r *bpfgen.NodeEndpoint) (Endpoint, error) {
	addr := netip.AddrFrom16(k.B).Unmap()
	if r.Version > recordVersion {
		return Endpoint{}, fmt.Errorf("the record of %s has version %d, this agent knows up to %d: run the agent version that wrote it", addr, r.Version, recordVersion)
	}
	return Endpoint{
		ContainerID:  text(r.ContainerId[:]),
		IfName:       text(r.Ifname[:]),
		Netns:        text(r.Netns[:]),
		NetnsCookie:  r.NetnsCookie,
		Addr:         addr,
		ENI:          vpc.ENIID(text(r.Eni[:])),
		ENIIndex:     int(r.EniIndex),
		StackOnly:    r.StackOnly != 0,
		MAC:          net.HardwareAddr(bytes.Clone(r.Mac[:])),
		HostIfName:   text(r.HostIfname[:]),
		HostIfIndex:  int(r.HostIfindex),
		PeerIfIndex:  int(r.PeerIfindex),
		PodNamespace: text(r.PodNamespace[:]),
		PodName:      text(r.PodName[:]),
		PodUID:       text(r.PodUid[:]),
		Groups:       vpc.GroupSet(strings.TrimPrefix(text(r.Groups[:]), groupsHere)),
		GroupsHere:   strings.HasPrefix(text(r.Groups[:]), groupsHere),
		MTU:          int(r.Mtu),
		State:        State(r.State),
		Created:      c.at(r.CreatedNs),
		Released:     c.at(r.ReleasedNs),
	}, nil
}

// groupsHere stands before the groups of an endpoint with GroupsHere. No group's
// ID begins so.
const groupsHere = "here:"

func groupsText(e *Endpoint) string {
	if e.GroupsHere {
		return groupsHere + string(e.Groups)
	}
	return string(e.Groups)
}

func text(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}
