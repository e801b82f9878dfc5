package fabric

import (
	"fmt"
	"net"
	"runtime"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
)

// BenchmarkProgram measures from_guest alone, in CPU time per frame. Frames
// that are delivered cannot be repeated, as they are rewritten: these go all
// the way to the receiver and are dropped there, or at the sender's rules.
func BenchmarkProgram(b *testing.B) {
	l := newLab(b)
	from := l.add(subnetA, "10.0.0.4")
	to := l.add(subnetB, "10.0.1.4")
	l.set()
	away := dgram4(from.addr, to.addr, 1, 2)
	for _, rules := range []int{0, 60, 300, 1000} {
		var out []Rule
		for n := range rules {
			out = append(out, Rule{Protocol: 17, From: n + 10, To: n + 10, Group: testGroup(99)})
		}
		from.groups(l.group(1, nil, out))
		l.set()
		b.Run(fmt.Sprintf("refused/rules=%d", rules), func(b *testing.B) { from.repeat(b, away) })
	}
	// A neighbour's MAC and another's address: the sender's gate is passed, and
	// the receiver's destination check refuses.
	near := l.add(subnetA, "10.0.0.5")
	for name, rules := range map[string][]Rule{"tracked": allTracked, "untracked": all} {
		from.groups(l.group(1, rules, rules))
		l.set()
		l.forgetFlows()
		b.Run(name, func(b *testing.B) { from.repeatBy(b, near.mac, away) })
	}
}

func (h *host) repeat(b *testing.B, packet []byte) { h.repeatBy(b, RouterMAC, packet) }

func (h *host) repeatBy(b *testing.B, mac net.HardwareAddr, packet []byte) {
	b.Helper()
	var ifindex uint32
	for i, r := range h.l.seen.enis {
		if eniID(r) == h.eni {
			ifindex = i
		}
	}
	o := ebpf.RunOptions{Data: ethernet(mac, h.mac, 0x0800, packet), Repeat: uint32(b.N), Context: skbuff{Ifindex: ifindex}}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, after unix.Rusage
	err := nl.Do(NetnsPath(h.l.names.fabric()), func() error {
		if err := unix.Getrusage(unix.RUSAGE_THREAD, &before); err != nil {
			return err
		}
		_, err := h.l.objs.FromGuest.Run(&o)
		if err != nil {
			return err
		}
		return unix.Getrusage(unix.RUSAGE_THREAD, &after)
	})
	if err != nil {
		b.Fatal(err)
	}
	cpu := after.Stime.Nano() - before.Stime.Nano() + after.Utime.Nano() - before.Utime.Nano()
	b.ReportMetric(float64(cpu)/float64(b.N), "cpu-ns/op")
}
