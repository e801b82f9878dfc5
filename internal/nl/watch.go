package nl

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Watcher hears what changes in a network namespace. Somebody who brings the
// namespace's rules, routes and addresses to a wanted state learns by it that
// somebody else took a part away, or put addresses of his own there.
type Watcher struct{ file *os.File }

// WatchIn opens a Watcher in the network namespace that netns is an open file
// of. What happens from now on is heard, also before Run.
func WatchIn(netns *os.File) (*Watcher, error) {
	var fd int
	err := Do(FilePath(netns), func() (err error) {
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open rtnetlink socket: %w", err)
		}
		if err := hearOnly(fd, kinds); err != nil {
			unix.Close(fd)
			return err
		}
		const groups = 1<<(unix.RTNLGRP_IPV4_IFADDR-1) | 1<<(unix.RTNLGRP_IPV4_ROUTE-1) | 1<<(unix.RTNLGRP_IPV4_RULE-1) | 1<<(unix.RTNLGRP_TC-1)
		if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
			unix.Close(fd)
			return fmt.Errorf("join rtnetlink's groups: %w", err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &Watcher{os.NewFile(uintptr(fd), "rtnetlink")}, nil
}

// kinds are those of the messages that can matter.
var kinds = []uint16{
	unix.RTM_DELRULE, unix.RTM_NEWADDR, unix.RTM_DELADDR, unix.RTM_NEWROUTE, unix.RTM_DELROUTE,
	unix.RTM_DELQDISC, unix.RTM_DELTFILTER,
}

// hearOnly has the kernel drop messages of other kinds than kinds before they
// wake us: each pod that comes makes a handful, on the way of its ADD.
func hearOnly(fd int, kinds []uint16) error {
	// nlmsg_type is in the machine's order, the filter loads in the network's.
	program := []bpf.Instruction{bpf.LoadAbsolute{Off: 4, Size: 2}}
	for i, kind := range kinds {
		var b [2]byte
		binary.NativeEndian.PutUint16(b[:], kind)
		program = append(program, bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(binary.BigEndian.Uint16(b[:])), SkipTrue: uint8(len(kinds) - i)})
	}
	program = append(program, bpf.RetConstant{Val: 0}, bpf.RetConstant{Val: math.MaxUint32})
	raw, err := bpf.Assemble(program)
	if err != nil {
		return fmt.Errorf("assemble the filter of rtnetlink's messages: %w", err)
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
	if err != nil {
		return fmt.Errorf("filter rtnetlink's messages: %w", err)
	}
	return nil
}

// Run calls changed for each IPv4 rule that is deleted, each address that comes
// or goes, each unicast route that comes or goes and for which route returns
// true, and each clsact qdisc or filter that is deleted from a link for which
// link returns true (not those that go with their link); and once when the
// kernel had to drop messages. It closes the watcher and returns nil when ctx
// ends.
func (w *Watcher) Run(ctx context.Context, route func(r Route, gone bool) bool, link func(index int) bool, changed func()) error {
	defer w.file.Close()
	stop := context.AfterFunc(ctx, func() { w.file.Close() })
	defer stop()
	buf := make([]byte, 64<<10)
	for {
		n, err := w.file.Read(buf)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			changed()
			continue
		case err != nil:
			return fmt.Errorf("read rtnetlink's messages: %w", err)
		}
		err = eachMessage(buf[:n], func(m message) error {
			if matters(m, route, link) {
				changed()
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("read rtnetlink's messages: %w", err)
		}
	}
}

func matters(m message, route func(Route, bool) bool, link func(int) bool) bool {
	switch m.typ {
	case unix.RTM_DELRULE, unix.RTM_DELADDR, unix.RTM_NEWADDR:
		return true
	case unix.RTM_DELROUTE, unix.RTM_NEWROUTE:
		r, unicast, err := parseRoute(m.body)
		return err == nil && unicast && route(r, m.typ == unix.RTM_DELROUTE)
	case unix.RTM_DELQDISC, unix.RTM_DELTFILTER:
		return len(m.body) >= sizeofTcmsg && link(int(int32(binary.NativeEndian.Uint32(m.body[4:]))))
	}
	return false
}
