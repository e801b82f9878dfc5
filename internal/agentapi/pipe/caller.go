package pipe

import (
	"errors"
	"syscall"
)

// ErrUnreachable is wrapped by what Do returns when nobody answered on the
// socket: no such file, nobody listening, connection cut before an answer.
// ErrTimeout: somebody took the call, and did not answer in time.
var (
	ErrUnreachable = errors.New("the agent does not answer")
	ErrTimeout     = errors.New("the agent gave no answer in time")
	ErrTooLong     = errors.New("longer than a mebibyte")
	errHungUp      = errors.New("it hung up")
	errAnswer      = errors.New("the answer is no message of this protocol")
)

// unreachable is ErrUnreachable with its cause.
type unreachable struct{ cause error }

func (e unreachable) Error() string   { return ErrUnreachable.Error() + ": " + e.cause.Error() }
func (e unreachable) Is(t error) bool { return t == ErrUnreachable }
func (e unreachable) Unwrap() error   { return e.cause }

// Caller holds one call. Its memory is part of it, and so of the program's
// image when it is a variable: pages that are not reached are never made.
type Caller struct {
	msg    [headerLen + MaxMessage]byte // length, call
	n      int                          // bytes in msg
	stdin  int                          // where it begins in msg
	answer [headerLen + MaxMessage + 1]byte
}

// Take makes the call of this process: the variables of env that begin with
// CNI_, and what is to be read from file descriptor 0.
func (c *Caller) Take(env []string) error {
	b := append(c.msg[:headerLen], 0, Version)
	for _, e := range env {
		if len(e) > 4 && e[:4] == "CNI_" {
			if len(b)+len(e)+2 > len(c.msg) {
				return ErrTooLong
			}
			b = append(append(b, e...), 0)
		}
	}
	b = append(b, 0)
	c.stdin, c.n = len(b), len(b)
	for {
		if c.n == len(c.msg) {
			return ErrTooLong
		}
		n, err := retry(func() (int, error) { return syscall.Read(0, c.msg[c.n:]) })
		if err != nil {
			return err
		}
		if n <= 0 {
			break
		}
		c.n += n
	}
	putLength(&c.msg, c.n-headerLen)
	return nil
}

// Put makes a call of the caller's own, to be sent by Do. It must fit.
func (c *Caller) Put(call *Call) {
	b := AppendCall(c.msg[:headerLen], call)
	c.n, c.stdin = len(b), len(b)-len(call.Stdin)
	putLength(&c.msg, c.n-headerLen)
}

// Stdin returns the call's.
func (c *Caller) Stdin() []byte { return c.msg[c.stdin:c.n] }

// Do sends the call to the agent on socket, and with it the open file netns
// unless that is negative, and returns its exit status and output. It waits
// for seconds at most.
func (c *Caller) Do(socket string, netns int, seconds int) (exit byte, stdout []byte, err error) {
	fd, err := dial(socket, seconds)
	if err != nil {
		return 0, nil, unreachable{err}
	}
	defer syscall.Close(fd)
	var rights []byte
	if netns >= 0 {
		rights = syscall.UnixRights(netns)
	}
	for sent := 0; sent < c.n; {
		n, err := retry(func() (int, error) {
			return syscall.SendmsgN(fd, c.msg[sent:c.n], rights, nil, syscall.MSG_NOSIGNAL)
		})
		if err != nil {
			return 0, nil, broken(err)
		}
		sent, rights = sent+n, nil
	}
	whole := headerLen
	for got := 0; got < whole; {
		n, err := retry(func() (int, error) { return syscall.Read(fd, c.answer[got:]) })
		if err != nil {
			return 0, nil, broken(err)
		}
		if n <= 0 {
			return 0, nil, unreachable{errHungUp}
		}
		if got += n; got >= headerLen && whole == headerLen {
			size := int(c.answer[0])<<24 | int(c.answer[1])<<16 | int(c.answer[2])<<8 | int(c.answer[3])
			if size < 1 || size > MaxMessage {
				return 0, nil, errAnswer
			}
			whole += size
		}
		if got > whole {
			return 0, nil, errAnswer
		}
	}
	if exit = c.answer[headerLen]; exit > ExitFailed {
		return 0, nil, errAnswer
	}
	return exit, c.answer[headerLen+1 : whole], nil
}

func putLength(b *[headerLen + MaxMessage]byte, n int) {
	b[0], b[1], b[2], b[3] = byte(n>>24), byte(n>>16), byte(n>>8), byte(n)
}

func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, syscall.EINTR) {
			return n, err
		}
	}
}

// broken is the error of a connection that stood.
func broken(err error) error {
	if errors.Is(err, syscall.EAGAIN) {
		return ErrTimeout
	}
	return unreachable{err}
}

// dial connects to a unix socket. Time-outs are the socket's own, which hold
// for each wait; an answer is one.
func dial(path string, seconds int) (int, error) {
	var addr syscall.RawSockaddrUnix
	if len(path) >= len(addr.Path) {
		return -1, syscall.ENAMETOOLONG
	}
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	wait := syscall.NsecToTimeval(int64(seconds) * 1e9)
	for _, opt := range [...]int{syscall.SO_SNDTIMEO, syscall.SO_RCVTIMEO} {
		if err = syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, opt, &wait); err != nil {
			break
		}
	}
	if err == nil {
		err = syscall.Connect(fd, &syscall.SockaddrUnix{Name: path})
	}
	if err != nil {
		syscall.Close(fd)
		return -1, err
	}
	return fd, nil
}
