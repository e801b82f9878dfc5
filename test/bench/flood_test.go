package bench

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/testenv"
	"github.com/underlay-cni/underlay/test/lab"
)

// victim are two established flows between pods of two nodes, with both ends of
// each in one thread: what carries them is that thread's CPU time.
type victim struct {
	*underlay
	tcp, udp [2]int // sockets: near end, far end
	flooder  benchPod
	far      benchPod // whom it floods
}

func newVictim(b testing.TB, name string) *victim {
	v := &victim{underlay: newUnderlay(b, name)}
	near, far := v.pod(0), v.pod(1)
	v.flooder, v.far = v.pod(0), v.pod(1)
	p := pairTo(near.ns, far.ns, far.addr)
	l, port := p.tcpListen(b)
	defer unix.Close(l)
	v.tcp[0] = lab.In(b, p.from, func() (int, error) { return p.tcpConnect(port) })
	v.tcp[1] = lab.In(b, p.to, func() (int, error) { fd, _, err := unix.Accept(l); return fd, err })
	addrs := [2]netip.AddrPort{netip.AddrPortFrom(near.addr, 9000), netip.AddrPortFrom(far.addr, 9000)}
	for i, ns := range []string{p.from, p.to} {
		v.udp[i] = lab.In(b, ns, func() (int, error) {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return fd, err
			}
			return fd, errors.Join(unix.Bind(fd, sockaddr(addrs[i])), unix.Connect(fd, sockaddr(addrs[1-i])))
		})
	}
	b.Cleanup(func() {
		for _, fd := range append(v.tcp[:], v.udp[:]...) {
			_ = unix.Close(fd)
		}
	})
	return v
}

// carry has messages of so many bytes go there and a byte come back over a pair of
// sockets, on one CPU, and returns bytes per second of the thread's CPU time.
func carry(b testing.TB, cpu int, ends [2]int, size int) float64 {
	b.Helper()
	return (<-apart(cpu, func() (float64, error) {
		for _, fd := range ends { // whoever loses something is told, and does not wait for ever
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
				return 0, err
			}
		}
		message, answer := make([]byte, size), make([]byte, 1)
		began, sent := cpuTime(unix.RUSAGE_THREAD), 0
		for start := time.Now(); time.Since(start) < *slice; sent += size {
			if err := errors.Join(full(ends[0], message, unix.Write), full(ends[1], message, unix.Read), full(ends[1], answer, unix.Write), full(ends[0], answer, unix.Read)); err != nil {
				return 0, err
			}
		}
		return float64(sent) / (cpuTime(unix.RUSAGE_THREAD) - began).Seconds(), nil
	})).must(b)
}

// flood has a pod begin flows without end, UDP and SYN by turns, from another CPU,
// and returns once what it sends is refused for want of room.
func (v *victim) flood(b testing.TB, cpu int) (stop func()) {
	b.Helper()
	e := v.flooder.endpoint
	fd := lab.In(b, nl.Path(v.flooder.ns), func() (int, error) {
		dev, err := net.InterfaceByName("eth0")
		if err != nil {
			return -1, err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fd, err
		}
		return fd, unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: dev.Index, Protocol: 0})
	})
	var host packet.MAC
	copy(host[:], []byte{0x02, 0x6c, 0x75, 0, 0, 1}) // of every host veth
	udp := packet.Frame(packet.MAC(e.MAC), host, packet.EtherTypeIPv4, packet.UDP4(netip.AddrPortFrom(e.Addr, 1), netip.AddrPortFrom(v.far.addr, 1), nil))
	syn := packet.Frame(packet.MAC(e.MAC), host, packet.EtherTypeIPv4, packet.IPv4(e.Addr, v.far.addr, unix.IPPROTO_TCP, append(make([]byte, 12), 5<<4, 0x02, 0, 0, 0, 0, 0, 0)))
	udp[14+20+6], udp[14+20+7] = 0, 0 // no checksum
	var stopped atomic.Bool
	done := apart(cpu, func() (int, error) {
		for i := uint32(0); !stopped.Load(); i++ {
			frame := udp
			if i%2 == 1 {
				frame = syn
			}
			binary.BigEndian.PutUint16(frame[34:], uint16(1024+i%60000))
			binary.BigEndian.PutUint16(frame[36:], uint16(100+i/60000))
			if _, err := unix.Write(fd, frame); err != nil && !errors.Is(err, unix.ENOBUFS) {
				return 0, err
			}
		}
		return 0, nil
	})
	refused := func() uint64 {
		n, err := v.d[0].Counters()
		if err != nil {
			b.Fatal(err)
		}
		return n["conntrack_share"] + n["conntrack_full"]
	}
	before := refused()
	for deadline := time.Now().Add(time.Minute); refused() < before+10000; {
		if time.Now().After(deadline) {
			b.Fatal("the flood does not fill the table")
		}
		<-time.After(10 * time.Millisecond)
	}
	return func() {
		stopped.Store(true)
		(<-done).must(b)
		_ = unix.Close(fd)
	}
}

// BenchmarkFlood measures what a flood of flows that another pod begins costs the
// flows that were there: they on one CPU and by their thread's time, the flood on
// another.
func BenchmarkFlood(b *testing.B) {
	testenv.Require(b, "root", "bpf")
	near, other := twoCPUs(b)
	if near == other {
		b.Skip("one CPU: the flood would be in the figure")
	}
	quiet, flooded := newVictim(b, "quiet"), newVictim(b, "flood")
	var rows []Row
	for _, m := range []struct {
		name string
		of   func(v *victim) float64
	}{
		{"tcp", func(v *victim) float64 { return carry(b, near, v.tcp, 64<<10) }},
		{"udp64", func(v *victim) float64 { return carry(b, near, v.udp, 64) }},
	} {
		samples := Interleave(b, 1, []Subject{
			{"under a flood", func() float64 { stop := flooded.flood(b, other); defer stop(); return m.of(flooded) }},
			{"without", func() float64 { return m.of(quiet) }},
		})
		r := RowOf("flood/"+m.name, "the same flow on nodes where nobody floods, pod to pod across nodes; higher is better", samples[0], samples[1])
		r.Subject, r.Floor, r.Unit = Median(samples[0]), Median(samples[1]), "bytes/s"
		rows = append(rows, r)
	}
	if err := Merge(kept(b, latest), rows); err != nil {
		b.Fatal(err)
	}
}
