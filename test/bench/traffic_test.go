package bench

import (
	"errors"
	"flag"
	"math"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/test/lab"
)

// Traffic as netperf makes it: threads that block in system calls, TCP with
// cubic, Nagle off. Go's own sockets wait in epoll, and that work would be the
// same on both sides of a ratio and bring it towards 1.

var slice = flag.Duration("slice", 300*time.Millisecond, "`time` that the traffic of one turn takes")

// work is so many of something, in so much time by the clock, and of CPU time of
// this process, in which the kernel's work for it is.
type work struct {
	n         float64
	wall, cpu time.Duration
}

func (w work) perSecond() float64    { return w.n / w.wall.Seconds() }
func (w work) perCPUSecond() float64 { return w.n / w.cpu.Seconds() }

// watch is when some work began.
type watch struct {
	wall time.Time
	cpu  time.Duration
}

func startWatch() watch {
	cpu := cpuTime(unix.RUSAGE_SELF)
	return watch{time.Now(), cpu}
}

// of returns the work that was done since then.
func (w watch) of(n float64) work {
	wall := time.Since(w.wall)
	return work{n, wall, cpuTime(unix.RUSAGE_SELF) - w.cpu}
}

// cpuTime is that of RUSAGE_SELF or RUSAGE_THREAD.
func cpuTime(whose int) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(whose, &u); err != nil {
		panic(err) // it has no failure
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// tcpSocket opens a blocking socket in the calling thread's namespace.
func tcpSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	return fd, errors.Join(unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, "cubic"), unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
}

func sockaddr(a netip.AddrPort) *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
}

// tcpListen listens on the far side; the port is the kernel's choice, so that
// no round meets the last one's connections.
func (p pair) tcpListen(b testing.TB) (fd int, port uint16) {
	b.Helper()
	fd = lab.In(b, p.to, func() (int, error) {
		fd, err := tcpSocket()
		if err != nil {
			return fd, err
		}
		return fd, errors.Join(unix.Bind(fd, sockaddr(netip.AddrPortFrom(p.addr, 0))), unix.Listen(fd, 128))
	})
	name, err := unix.Getsockname(fd)
	if err != nil {
		b.Fatal(err)
	}
	return fd, uint16(name.(*unix.SockaddrInet4).Port)
}

// tcpConnect connects from the calling thread's namespace.
func (p pair) tcpConnect(port uint16) (int, error) {
	fd, err := tcpSocket()
	if err == nil {
		err = unix.Connect(fd, sockaddr(netip.AddrPortFrom(p.asked(), port)))
	}
	return fd, err
}

// apart runs fn on a thread of its own, on that CPU if it is not negative, and
// returns where its result comes.
func apart[T any](cpu int, fn func() (T, error)) chan result[T] {
	done := make(chan result[T], 1)
	go func() {
		runtime.LockOSThread() // without an Unlock, the thread ends with the goroutine
		r := result[T]{err: pin(cpu)}
		if r.err == nil {
			r.v, r.err = fn()
		}
		done <- r
	}()
	return done
}

// pin keeps the calling thread on a CPU, unless that is negative.
func pin(cpu int) error {
	if cpu < 0 {
		return nil
	}
	var set unix.CPUSet
	set.Set(cpu)
	return unix.SchedSetaffinity(0, &set)
}

type result[T any] struct {
	v   T
	err error
}

func (r result[T]) must(b testing.TB) T {
	b.Helper()
	if r.err != nil {
		b.Fatal(r.err)
	}
	return r.v
}

// full reads or writes until done or failed.
func full(fd int, buf []byte, op func(int, []byte) (int, error)) error {
	for len(buf) > 0 {
		n, err := op(fd, buf)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case n == 0:
			return unix.ECONNRESET
		}
		buf = buf[n:]
	}
	return nil
}

// stream sends as much as goes in that time from one CPU to another (negative:
// wherever), and returns the bytes.
func stream(b testing.TB, p pair, sender, receiver int, long time.Duration) work {
	const chunk = 128 << 10
	l, port := p.tcpListen(b)
	defer unix.Close(l)
	received := apart(receiver, func() (total int, err error) {
		fd, _, err := unix.Accept(l)
		if err != nil {
			return 0, err
		}
		defer unix.Close(fd)
		buf := make([]byte, chunk)
		for {
			n, err := unix.Read(fd, buf)
			if err != nil && !errors.Is(err, unix.EINTR) || n == 0 {
				return total, err
			}
			total += max(n, 0)
		}
	})
	fd := lab.In(b, p.from, func() (int, error) { return p.tcpConnect(port) })
	sent := apart(sender, func() (w watch, err error) {
		defer unix.Close(fd)
		buf := make([]byte, chunk)
		for w = startWatch(); err == nil && time.Since(w.wall) < long; {
			err = full(fd, buf, unix.Write)
		}
		return w, err
	})
	w := (<-sent).must(b)
	return w.of(float64((<-received).must(b)))
}

// streamParts is how much longer than asked for a stream is: its windows grow for a
// while.
const streamParts = 3

// tcp1 is stream on one CPU, tcp2 between two.
func tcp1(b testing.TB, p pair, long time.Duration) work {
	return stream(b, p, -1, -1, streamParts*long)
}

func tcp2(b testing.TB, p pair, long time.Duration) work {
	client, server := twoCPUs(b)
	return stream(b, p, client, server, streamParts*long)
}

// twoCPUs are those of client and server, the same if there is but one.
func twoCPUs(b testing.TB) (client, server int) {
	cpus := allowedCPUs(b)
	return cpus[0], cpus[len(cpus)-1]
}

// pingPong sends a byte and waits for it, again and again for that time, client and
// server on these CPUs (negative: wherever), and returns the round trips and the
// 99th percentile of their time, in seconds.
func pingPong(b testing.TB, p pair, client, server int, long time.Duration) (trips work, p99 float64) {
	l, port := p.tcpListen(b)
	defer unix.Close(l)
	served := apart(server, func() (int, error) {
		fd, _, err := unix.Accept(l)
		if err != nil {
			return 0, err
		}
		defer unix.Close(fd)
		one := make([]byte, 1)
		for {
			if full(fd, one, unix.Read) != nil || full(fd, one, unix.Write) != nil {
				return 0, nil // the client has enough
			}
		}
	})
	fd := lab.In(b, p.from, func() (int, error) { return p.tcpConnect(port) })
	times := make([]time.Duration, 0, 1<<16)
	trips = (<-apart(client, func() (work, error) {
		defer unix.Close(fd)
		one := make([]byte, 1)
		w := startWatch()
		for last := w.wall; last.Sub(w.wall) < long; {
			if err := errors.Join(full(fd, one, unix.Write), full(fd, one, unix.Read)); err != nil {
				return work{}, err
			}
			now := time.Now()
			times = append(times, now.Sub(last))
			last = now
		}
		return w.of(float64(len(times))), nil
	})).must(b)
	(<-served).must(b)
	slices.Sort(times)
	return trips, times[int(math.Ceil(0.99*float64(len(times))))-1].Seconds()
}

// rr1 is pingPong on one CPU.
func rr1(b testing.TB, p pair, long time.Duration) work {
	trips, _ := pingPong(b, p, -1, -1, long)
	return trips
}

// crr is connect between two CPUs, crr1 on one.
func crr(b testing.TB, p pair, long time.Duration) work {
	client, server := twoCPUs(b)
	return connect(b, p, client, server, long)
}

func crr1(b testing.TB, p pair, long time.Duration) work { return connect(b, p, -1, -1, long) }

// connect connects, sends a byte, waits for it and closes, again and again for that
// time, and returns the connections.
func connect(b testing.TB, p pair, client, server int, long time.Duration) work {
	l, port := p.tcpListen(b)
	served := apart(server, func() (int, error) {
		one := make([]byte, 1)
		for {
			fd, _, err := unix.Accept(l)
			if err != nil {
				return 0, nil // the listener was shut down
			}
			if full(fd, one, unix.Read) == nil {
				_ = full(fd, one, unix.Write)
			}
			_ = unix.Close(fd)
		}
	})
	// The namespace is entered once: its cost is not the network's.
	made := lab.In(b, p.from, func() (work, error) {
		if err := pin(client); err != nil {
			return work{}, err
		}
		one := make([]byte, 1)
		w, n := startWatch(), 0
		for ; time.Since(w.wall) < long; n++ {
			fd, err := p.tcpConnect(port)
			if err == nil {
				err = errors.Join(full(fd, one, unix.Write), full(fd, one, unix.Read))
			}
			if err = errors.Join(err, unix.Close(fd)); err != nil {
				return work{}, err
			}
		}
		return w.of(float64(n)), nil
	})
	_ = unix.Shutdown(l, unix.SHUT_RDWR) // wakes the accept
	(<-served).must(b)
	_ = unix.Close(l)
	return made
}

// udp64 sends datagrams of 64 bytes (IP length 92) for that time, as netperf does,
// and returns those that were received.
func udp64(b testing.TB, p pair, long time.Duration) work {
	const size, batch = 64, 32
	server := lab.In(b, p.to, func() (int, error) { return udpSocket(netip.AddrPortFrom(p.addr, 0), unix.Bind) })
	defer unix.Close(server)
	if err := unix.SetNonblock(server, true); err != nil {
		b.Fatal(err)
	}
	name, err := unix.Getsockname(server)
	if err != nil {
		b.Fatal(err)
	}
	to := netip.AddrPortFrom(p.asked(), uint16(name.(*unix.SockaddrInet4).Port))
	client := lab.In(b, p.from, func() (int, error) { return udpSocket(to, unix.Connect) })
	defer unix.Close(client)
	out, in := make([]byte, size), make([]byte, size)
	w, received := startWatch(), 0
	for time.Since(w.wall) < long {
		for range batch {
			if _, err := unix.Write(client, out); err != nil {
				b.Fatal(err)
			}
		}
		// On one CPU they have arrived by now, but for what was lost.
		for range batch {
			if _, err := unix.Read(server, in); err != nil {
				break
			}
			received++
		}
	}
	return w.of(float64(received))
}

// udpSocket opens a blocking socket in the calling thread's namespace, and binds
// or connects it.
func udpSocket(to netip.AddrPort, how func(int, unix.Sockaddr) error) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	return fd, errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<20), how(fd, sockaddr(to)))
}

// allowedCPUs are those that the process began with.
func allowedCPUs(b testing.TB) []int {
	b.Helper()
	if startCPUs.Count() == 0 {
		if err := unix.SchedGetaffinity(0, &startCPUs); err != nil {
			b.Fatal(err)
		}
	}
	var out []int
	for cpu := range len(startCPUs) * 64 {
		if startCPUs.IsSet(cpu) {
			out = append(out, cpu)
		}
	}
	return out
}

var startCPUs unix.CPUSet
