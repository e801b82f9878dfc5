package nl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Conn is a rtnetlink socket. It stays in the network namespace in which it
// was opened, whatever thread uses it afterwards. Safe for concurrent use;
// requests queue.
type Conn struct {
	mu  sync.Mutex
	fd  int
	seq uint32
}

// buffers take one datagram of an answer each: 64 KiB, of which a dump fills at
// most half (netlink_recvmsg in net/netlink/af_netlink.c). A connection has one
// while it reads and not for life: in a burst of pods hundreds are open, and
// wait for their turn.
var buffers = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// Dial opens a socket in the calling thread's network namespace.
func Dial() (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open rtnetlink socket: %w", err)
	}
	// Each is a comfort that the kernel may lack: messages with the errors
	// (4.12), acknowledgements without a copy of the request (4.3), and dumps
	// filtered by the kernel (4.20; the parsers filter again).
	for _, opt := range []int{unix.NETLINK_EXT_ACK, unix.NETLINK_CAP_ACK, unix.NETLINK_GET_STRICT_CHK} {
		_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, opt, 1)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bind rtnetlink socket: %w", err)
	}
	return &Conn{fd: fd}, nil
}

// DialIn opens a socket in the network namespace that netns is an open file of.
func DialIn(netns *os.File) (*Conn, error) {
	var c *Conn
	err := Do(FilePath(netns), func() (err error) {
		c, err = Dial()
		return err
	})
	return c, err
}

// FilePath returns a path by which this process reaches the open file f, for
// what wants a path; it is valid as long as f is open.
func FilePath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

// Close closes the socket.
func (c *Conn) Close() error { return unix.Close(c.fd) }

// NetnsCookie returns the number that names the socket's network namespace
// for as long as the machine runs; no other namespace ever gets it.
// Linux 5.14.
func (c *Conn) NetnsCookie() (uint64, error) {
	cookie, err := unix.GetsockoptUint64(c.fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("read the network namespace's cookie: %w", err)
	}
	return cookie, nil
}

// OpError is the kernel's refusal of one message.
type OpError struct {
	Op    string // what was asked: "add link ul1234 (veth)"
	Errno unix.Errno
	Text  string // the kernel's own explanation; "" if it gave none
}

func (e *OpError) Error() string {
	if e.Text != "" {
		return fmt.Sprintf("%s: %s (%s)", e.Op, e.Errno.Error(), e.Text)
	}
	return e.Op + ": " + e.Errno.Error()
}

func (e *OpError) Unwrap() error { return e.Errno }

// execMost bounds the messages of one system call: each answer takes some 768
// bytes of a receive buffer of 212992 (net.core.rmem_default), and the kernel
// drops what does not fit.
const execMost = 64

// Exec sends the messages of b, as many as the kernel can answer in one system
// call, and reads the answer to each. The kernel goes on after a message that
// it refuses; the error joins an *OpError for each refused one, in order.
func (c *Conn) Exec(b *Batch) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	first := c.seq + 1
	c.seq += uint32(len(b.ops))
	b.number(first)
	var errs []error
	for start := 0; start < len(b.ops); start += execMost {
		end, size := min(start+execMost, len(b.ops)), len(b.buf)
		if end < len(b.ops) {
			size = b.ops[end].at
		}
		refused, err := c.exec(b.buf[b.ops[start].at:size], b.ops[start:end], first+uint32(start))
		errs = append(errs, refused...)
		if err != nil {
			return errors.Join(append(errs, err)...)
		}
	}
	return errors.Join(errs...)
}

// exec sends the messages in buf, which are ops, numbered from first on.
func (c *Conn) exec(buf []byte, ops []op, first uint32) (refused []error, err error) {
	if err := c.send(buf); err != nil {
		return nil, fmt.Errorf("send %s: %w", ops[0].text, err)
	}
	room := buffers.Get().(*[64 << 10]byte)
	defer buffers.Put(room)
	for answered := 0; answered < len(ops); {
		err := c.receive(room[:], func(m message) error {
			i := int(m.seq - first)
			if i < 0 || i >= len(ops) || m.typ != unix.NLMSG_ERROR {
				return nil // of an earlier request that was given up
			}
			answered++
			if errno, text := m.failure(); errno != 0 && !slices.Contains(ops[i].tolerated, errno) {
				refused = append(refused, &OpError{Op: ops[i].text, Errno: errno, Text: text})
			}
			return nil
		})
		if err != nil {
			return refused, fmt.Errorf("read the answer to %s: %w", ops[answered].text, err)
		}
	}
	return refused, nil
}

// dumpTries bounds the repetitions of a dump that changes under the reader's
// eyes: each takes well below a millisecond, and half a second of steady
// change means that somebody else is at fault.
const dumpTries = 64

// dump sends the one message of b, a dump request, and returns the answers'
// payloads. A dump that the kernel declares inconsistent (NLM_F_DUMP_INTR), or
// that a signal cut short, is repeated.
func (c *Conn) dump(b *Batch) ([][]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for range dumpTries {
		out, whole, err := c.dumpOnce(b)
		if errors.Is(err, unix.EINTR) || (err == nil && !whole) {
			continue
		}
		return out, err
	}
	return nil, fmt.Errorf("%s: interrupted by changes %d times: %w", b.ops[0].text, dumpTries, unix.EINTR)
}

func (c *Conn) dumpOnce(b *Batch) (out [][]byte, whole bool, err error) {
	c.seq++
	b.number(c.seq)
	if err := c.send(b.buf); err != nil {
		return nil, false, fmt.Errorf("send %s: %w", b.ops[0].text, err)
	}
	room := buffers.Get().(*[64 << 10]byte)
	defer buffers.Put(room)
	whole = true
	for done := false; !done; {
		var refused error
		err := c.receive(room[:], func(m message) error {
			if m.seq != c.seq {
				return nil
			}
			whole = whole && m.flags&unix.NLM_F_DUMP_INTR == 0
			switch m.typ {
			case unix.NLMSG_DONE, unix.NLMSG_ERROR:
				done = true
				if errno, text := m.failure(); errno != 0 {
					refused = &OpError{Op: b.ops[0].text, Errno: errno, Text: text}
				}
			default:
				out = append(out, append([]byte(nil), m.body...))
				done = m.flags&unix.NLM_F_MULTI == 0 // the answer to a get of one
			}
			return nil
		})
		if err != nil {
			return nil, false, fmt.Errorf("read the answer to %s: %w", b.ops[0].text, err)
		}
		if refused != nil {
			return nil, whole, refused
		}
	}
	return out, whole, nil
}

func (c *Conn) send(buf []byte) error {
	for {
		err := unix.Sendto(c.fd, buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// receive reads one datagram into buf and calls fn for each message in it,
// whose body is valid during the call only.
func (c *Conn) receive(buf []byte, fn func(message) error) error {
	n, _, err := unix.Recvfrom(c.fd, buf, unix.MSG_TRUNC)
	if errors.Is(err, unix.EINTR) {
		return nil // the caller asks again: its answers are still queued
	}
	if err != nil {
		return err
	}
	if n > len(buf) {
		return fmt.Errorf("datagram of %d bytes exceeds the buffer of %d", n, len(buf))
	}
	return eachMessage(buf[:n], fn)
}

// message is one netlink message, header taken apart.
type message struct {
	typ, flags uint16
	seq        uint32
	body       []byte
}

var errMalformed = errors.New("malformed netlink message")

func eachMessage(b []byte, fn func(message) error) error {
	for len(b) >= unix.SizeofNlMsghdr {
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.SizeofNlMsghdr || size > len(b) {
			return errMalformed
		}
		m := message{
			typ:   binary.NativeEndian.Uint16(b[4:]),
			flags: binary.NativeEndian.Uint16(b[6:]),
			seq:   binary.NativeEndian.Uint32(b[8:]),
			body:  b[unix.SizeofNlMsghdr:size],
		}
		if err := fn(m); err != nil {
			return err
		}
		b = b[min(align(size), len(b)):]
	}
	return nil
}

// failure returns the error that an NLMSG_ERROR or NLMSG_DONE message carries
// (0: none) and the kernel's explanation.
func (m message) failure() (unix.Errno, string) {
	if len(m.body) < 4 {
		return 0, ""
	}
	errno := unix.Errno(-int32(binary.NativeEndian.Uint32(m.body)))
	if m.flags&unix.NLM_F_ACK_TLVS == 0 {
		return errno, ""
	}
	// After the number comes, in an error, the header of the request and, if
	// it was not capped, the rest of the request.
	rest := m.body[4:]
	if m.typ == unix.NLMSG_ERROR {
		skip := unix.SizeofNlMsghdr
		if m.flags&unix.NLM_F_CAPPED == 0 && len(rest) >= 4 {
			skip = align(int(min(binary.NativeEndian.Uint32(rest), uint32(len(rest)))))
		}
		rest = rest[min(skip, len(rest)):]
	}
	text := ""
	_ = eachAttr(rest, func(typ uint16, v []byte) {
		if typ == unix.NLMSGERR_ATTR_MSG {
			text = cstring(v)
		}
	})
	return errno, text
}

// eachAttr calls fn for each attribute in b; the nested and byte-order flags
// are taken off the type.
func eachAttr(b []byte, fn func(typ uint16, value []byte)) error {
	for len(b) >= unix.SizeofRtAttr {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofRtAttr || size > len(b) {
			return errMalformed
		}
		fn(binary.NativeEndian.Uint16(b[2:])&0x3fff, b[unix.SizeofRtAttr:size])
		b = b[min(align(size), len(b)):]
	}
	return nil
}

// align rounds up to 4, as both messages and attributes are laid out.
func align(n int) int { return (n + 3) &^ 3 }

func cstring(b []byte) string {
	s, _, _ := strings.Cut(string(b), "\x00")
	return s
}
