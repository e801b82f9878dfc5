package datapath

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/policy"
)

// What a policy forbids never passes: not before the endpoint is there, not while
// it is made, not while an agent dies over it, starts again or takes ENIs, and
// not when its programs are lost (D8). The sender spins in the pod's namespace
// from before Add to the end.

const (
	allowedPort = 9
	mayPass     = "may-pass-by-policy"
)

// onlyDiscard lets the endpoint send to port 9, and nothing else.
func onlyDiscard(e Endpoint) (policy.Tables, error) {
	in := &policy.Input{
		Policies: []policy.NetworkPolicy{{
			Namespace: "default", Name: "only-discard", Types: []policy.Direction{policy.Egress},
			Egress: []policy.PolicyRule{{Ports: []policy.Port{{Protocol: policy.UDP, Port: allowedPort}, {Protocol: policy.TCP, Port: allowedPort}}}},
		}},
		Namespaces: map[string]map[string]string{"default": {}},
	}
	return policy.NewCompiler(in).Compile(&policy.Endpoint{Pod: policy.Pod{Namespace: "default", Name: e.PodName, Addrs: []netip.Addr{e.Addr}}})
}

// forbid gives an endpoint that policy.
func (d *Datapath) forbid(e Endpoint) error {
	t, err := onlyDiscard(e)
	if err != nil {
		return err
	}
	return d.SetPolicy(e, t)
}

// storm sends from a namespace without a pause: by UDP sockets of both families
// and by a packet socket, to several addresses, mostly what is forbidden.
type storm struct {
	rounds atomic.Int64 // since it began
	stop   func()
}

func (w *world) storm(netns string, e Endpoint, targets ...netip.Addr) *storm {
	w.t.Helper()
	s := &storm{}
	mac := packet.MAC(podMAC(e.Addr))
	var forbidden, allowed [][]byte
	for _, to := range targets {
		udp := func(port uint16, payload string) []byte {
			return packet.UDP4(netip.AddrPortFrom(e.Addr, 4000), netip.AddrPortFrom(to, port), []byte(payload))
		}
		ip := udp(echoPort, marker)
		forbidden = append(forbidden, packet.Frame(mac, packet.MAC(hostMAC), packet.EtherTypeIPv4, ip))
		// Its first fragment, and one that never had a first.
		first, last := bytes.Clone(ip), bytes.Clone(ip)
		binary.BigEndian.PutUint16(first[6:], 0x2000)
		binary.BigEndian.PutUint16(last[6:], 200)
		for _, f := range [][]byte{first, last} {
			f[10], f[11] = 0, 0
			binary.BigEndian.PutUint16(f[10:], packet.Checksum(0, f[:20]))
			forbidden = append(forbidden, packet.Frame(mac, packet.MAC(hostMAC), packet.EtherTypeIPv4, f))
		}
		forbidden = append(forbidden, packet.Frame(mac, packet.MAC(hostMAC), packet.EtherTypeIPv4, packet.Echo4(e.Addr, to, 1, 1, []byte(marker))))
		forbidden = append(forbidden, packet.Frame(mac, packet.MAC(hostMAC), packet.EtherTypeIPv4, packet.IPv4(e.Addr, to, unix.IPPROTO_SCTP, append(make([]byte, 12), marker...))))
		allowed = append(allowed, packet.Frame(mac, packet.MAC(hostMAC), packet.EtherTypeIPv4, udp(allowedPort, mayPass)))
	}
	v6 := append([]byte{0x60, 0, 0, 0, 0, byte(8 + len(marker)), unix.IPPROTO_UDP, 64}, make([]byte, 32)...)
	copy(v6[8:], netip.MustParseAddr("fd00::1").AsSlice())
	copy(v6[24:], netip.MustParseAddr("fd00::2").AsSlice())
	v6 = append(v6, 0x0f, 0xa0, 0, echoPort, 0, byte(8+len(marker)), 0, 0)
	forbidden = append(forbidden, packet.Frame(mac, packet.MAC(hostMAC), packet.EtherTypeIPv6, append(v6, marker...)))

	var stopped atomic.Bool
	var wg sync.WaitGroup
	fail := func(err error) {
		if err != nil {
			w.t.Error(err)
		}
	}
	wg.Go(func() {
		fail(nl.Do(nl.Path(netns), func() error {
			var fds [3]int
			for i, domain := range []int{unix.AF_PACKET, unix.AF_INET, unix.AF_INET6} {
				kind := unix.SOCK_DGRAM
				if domain == unix.AF_PACKET {
					kind = unix.SOCK_RAW
				}
				fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				fds[i] = fd
			}
			raw, udp4, udp6 := fds[0], fds[1], fds[2]
			index := 0
			for n := int64(0); !stopped.Load(); n++ {
				if index == 0 {
					if ifr, err := unix.NewIfreq("eth0"); err == nil && unix.IoctlIfreq(udp4, unix.SIOCGIFINDEX, ifr) == nil {
						index = int(ifr.Uint32())
					}
				}
				list := forbidden
				if n%8 == 0 {
					list = allowed
				}
				for _, f := range list {
					if index != 0 && errors.Is(unix.Sendto(raw, f, 0, &unix.SockaddrLinklayer{Ifindex: index, Halen: 6}), unix.ENXIO) {
						index = 0
					}
				}
				for _, to := range targets {
					_ = unix.Sendto(udp4, []byte(marker), 0, &unix.SockaddrInet4{Port: echoPort, Addr: to.As4()})
				}
				_ = unix.Sendto(udp6, []byte(marker), 0, &unix.SockaddrInet6{Port: echoPort, Addr: netip.MustParseAddr("ff02::1").As16(), ZoneId: uint32(index)})
				s.rounds.Store(n)
			}
			return nil
		}))
	})
	s.stop = sync.OnceFunc(func() { stopped.Store(true); wg.Wait() })
	w.t.Cleanup(s.stop)
	return s
}

// ears listen where nothing forbidden may arrive.
type ears struct {
	t                  *testing.T
	forbidden, allowed atomic.Int64
}

func (w *world) listen(t *testing.T, at map[string]string) *ears {
	t.Helper()
	e := &ears{t: t}
	quit := make(chan struct{})
	var wg sync.WaitGroup
	for netns, device := range at {
		fd := w.rawSocket(netns, device)
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20)
		wg.Go(func() {
			poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			for {
				for _, f := range received(t, fd) {
					switch {
					case containsMarker(f):
						if e.forbidden.Add(1) == 1 {
							t.Errorf("on %s of %s: %x", device, netns, f)
						}
					case bytes.Contains(f, []byte(mayPass)):
						e.allowed.Add(1)
					}
				}
				select {
				case <-quit:
					// What was missed might have been what must not pass.
					if st, err := unix.GetsockoptTpacketStats(fd, unix.SOL_PACKET, unix.PACKET_STATISTICS); err != nil || st.Drops != 0 {
						t.Errorf("the ear on %s missed %+v, %v", device, st, err)
					}
					return
				default:
					_, _ = unix.Poll(poll, 5)
				}
			}
		})
	}
	t.Cleanup(func() { close(quit); wg.Wait() })
	return e
}

// passesOnly waits until what may pass passes, beside a storm of what may not.
func (e *ears) passesOnly(s *storm) {
	e.t.Helper()
	before, rounds := e.allowed.Load(), s.rounds.Load()
	eventually(e.t, "what is allowed passes", func() bool { return e.allowed.Load() > before+20 && s.rounds.Load() > rounds+50 })
	if n := e.forbidden.Load(); n != 0 {
		e.t.Fatalf("%d forbidden frames passed", n)
	}
}

// silent waits for a while of the storm in which nothing passes at all.
func (e *ears) silent(s *storm, why string) {
	e.t.Helper()
	rounds := s.rounds.Load()
	eventually(e.t, "the storm goes on", func() bool { return s.rounds.Load() > rounds+100 })
	if f, a := e.forbidden.Load(), e.allowed.Load(); f != 0 || a != 0 {
		e.t.Fatalf("%s: %d forbidden frames passed, and %d others", why, f, a)
	}
}

func TestNothingForbiddenEverPasses(t *testing.T) {
	w := newWorld(t)
	w.quiet = true
	var d *Datapath
	var heard *ears
	var gale *storm
	opts := Options{BeforeReady: func(_ context.Context, e Endpoint) error {
		if gale == nil { // another pod's
			return nil
		}
		before := counters(t, d)["not_ready"]
		eventually(t, "the sender runs into the gate", func() bool { return counters(t, d)["not_ready"] > before+200 })
		heard.silent(gale, "before policy")
		return d.forbid(e)
	}}
	d = w.open(opts)
	neighbour := w.addPod(d, 2)
	heard = w.listen(t, map[string]string{w.wire: "r1", neighbour.ns: "eth0"})
	heard.alsoOn(w, w.wire, "r0")

	ns := w.netns("pod")
	e := endpoint(1, ns)
	gale = w.storm(ns, e, farIP, neighbour.Addr, enis[0].Primary)
	heard.silent(gale, "before Add")
	e, err := d.Add(context.Background(), e, openNetns(t, ns))
	if err != nil {
		t.Fatal(err)
	}
	heard.passesOnly(gale)
	if c := counters(t, d); c["policy_netpol"] == 0 || c["ipv6"] == 0 {
		t.Errorf("the storm is no storm: %v", c)
	}

	// An agent after the other takes over, with other programs.
	for range 3 {
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		heard.passesOnly(gale)
		d = w.open(opts)
		heard.passesOnly(gale)
	}

	// An ENI comes and goes.
	for _, list := range [][]ENI{enis[:1], enis} {
		if err := d.SetENIs(context.Background(), list); err != nil {
			t.Fatal(err)
		}
		rounds := gale.rounds.Load()
		eventually(t, "the storm goes on", func() bool { return gale.rounds.Load() > rounds+50 })
	}
	heard.passesOnly(gale)

	// The policy is put in place again and again, also as another that says the
	// same.
	for i := range 20 {
		tables, err := onlyDiscard(Endpoint{Addr: netip.AddrFrom4([4]byte{10, 0, 9, byte(i)}), PodName: e.PodName})
		if err == nil {
			err = d.SetPolicy(e, tables)
		}
		if err == nil {
			err = d.forbid(e)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	heard.passesOnly(gale)

	// The programs are lost: nothing passes, allowed or not, until they are back.
	if err := d.hooks.detach(e.device()); err != nil {
		t.Fatal(err)
	}
	last, since := heard.allowed.Load(), gale.rounds.Load()
	eventually(t, "nothing passes without programs", func() bool { // once what was under way has arrived
		if n := heard.allowed.Load(); n != last {
			last, since = n, gale.rounds.Load()
		}
		return gale.rounds.Load() > since+200
	})
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = w.open(opts)
	heard.passesOnly(gale)

	// It is deleted, and its address is another's, with another policy or none.
	if _, err := d.Delete(context.Background(), e.ContainerID, e.IfName); err != nil {
		t.Fatal(err)
	}
	rounds := gale.rounds.Load()
	eventually(t, "the storm goes on", func() bool { return gale.rounds.Load() > rounds+50 })
	if n := heard.forbidden.Load(); n != 0 {
		t.Errorf("%d forbidden frames passed", n)
	}
}

// alsoOn adds an ear.
func (e *ears) alsoOn(w *world, netns, device string) {
	e.t.Helper()
	more := w.listen(e.t, map[string]string{netns: device})
	e.t.Cleanup(func() {
		if n := more.forbidden.Load(); n != 0 {
			e.t.Errorf("%d forbidden frames passed on %s", n, device)
		}
	})
}

// Wherever an agent is killed over an Add, policy in place or not: nothing that
// the policy forbids passes, neither then nor when the next agent clears up.
func TestKilledOverPolicy(t *testing.T) {
	w := newWorld(t)
	w.quiet = true
	d := w.open(Options{})
	neighbour := w.addPod(d, 2)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	for _, step := range []string{"programs", "carrier", "policy", "gate", "live"} {
		t.Run("before "+step, func(t *testing.T) {
			heard := w.listen(t, map[string]string{w.wire: "r1", neighbour.ns: "eth0"})
			ns := w.netns("pod")
			gale := w.storm(ns, endpoint(1, ns), farIP, neighbour.Addr)
			w.dies(role{Op: "add", Pod: ns, N: 1, DieAt: step, Policy: true})
			if step == "live" { // the gate is open, and the policy holds
				heard.passesOnly(gale)
			} else {
				heard.silent(gale, "the agent died before "+step)
			}
			d := w.open(Options{})
			defer d.Close()
			assertNothingLeft(t, w, d, 1)
			rounds := gale.rounds.Load()
			eventually(t, "the storm goes on", func() bool { return gale.rounds.Load() > rounds+50 })
			if n := heard.forbidden.Load(); n != 0 {
				t.Errorf("%d forbidden frames passed", n)
			}
			gale.stop()
		})
	}
}

// One flow's packets on both CPUs at once, each of which enters the flow anew as it
// is refused: no packet takes for its own verdict what the other makes of the entry.
func TestOneFlowOnTwoCPUs(t *testing.T) {
	w := newWorld(t)
	w.quiet = true
	d := w.open(Options{BeforeReady: func(context.Context, Endpoint) error { return nil }})
	neighbour := w.addPod(d, 2)
	heard := w.listen(t, map[string]string{w.wire: "r1", neighbour.ns: "eth0"})
	ns := w.netns("pod")
	e, err := d.Add(context.Background(), endpoint(1, ns), openNetns(t, ns))
	if err == nil {
		err = d.forbid(e)
	}
	if err != nil {
		t.Fatal(err)
	}
	gales := []*storm{w.storm(ns, e, farIP, neighbour.Addr), w.storm(ns, e, farIP, neighbour.Addr)}
	for _, gale := range gales {
		rounds := gale.rounds.Load()
		eventually(t, "the storm goes on", func() bool { return gale.rounds.Load() > rounds+10000 })
	}
	heard.passesOnly(gales[0])
}
