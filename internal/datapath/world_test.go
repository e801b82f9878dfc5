package datapath

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/testenv"
	"github.com/underlay-cni/underlay/internal/testenv/bpfcache"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// Everything that a test makes in the kernel bears its process's number, so
// that the next run finds what a killed one left.
const netnsPrefix = "ul-tdp"

func TestMain(m *testing.M) {
	if role := os.Getenv(roleEnv); role != "" {
		os.Exit(runRole(role))
	}
	if os.Geteuid() == 0 {
		testenv.SweepDead(netnsPrefix)
		var err error
		if programs, err = bpfcache.New(filepath.Join("/run", fmt.Sprintf("%s%d-programs", netnsPrefix, os.Getpid()))); err != nil {
			fmt.Fprintln(os.Stderr, "programs are loaded anew for each test:", err)
		}
	}
	// Everything with each kind of hook: what the programs do, and what a
	// crash leaves, must not depend on it.
	code := 0
	for _, testHook = range []Hook{Clsact, TCX} {
		fmt.Printf("hooks: %s\n", testHook)
		code = max(code, m.Run())
	}
	if programs != nil {
		if err := programs.Close(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = max(code, 1)
		}
	}
	os.Exit(code)
}

// programs keeps what the verifier has looked at; nil: there is nothing to keep.
var programs *bpfcache.Cache

// testHook is the kind of hook of a Datapath that a test opens without one.
var testHook Hook

// world is a node with two ENIs, and a router at the other end of both:
//
//	node   eth0 10.0.0.10/24 (index 1), eth1 10.0.1.10/24 (index 2)
//	wire   the routers 10.0.0.1 and 10.0.1.1, and a host 10.9.9.9 behind them;
//	       pods of ENI 2 are 10.0.1.128/25
type world struct {
	t          testing.TB
	node, wire string // names of namespaces
	bpffs      string
	quiet      bool                                  // do not log
	stackOnly  bool                                  // as Options say, not direct by default
	released   func(containerID, ifName string) bool // see Remove
	uncached   bool                                  // load programs and make maps anew
	cached     bool                                  // a Datapath was opened otherwise
}

var (
	worlds atomic.Int64
	farIP  = netip.MustParseAddr("10.9.9.9")
	enis   = []ENI{
		{ID: "eni-00000000000000001", Index: 1, MAC: mac("02:00:00:00:00:10"), Primary: netip.MustParseAddr("10.0.0.10"), Subnet: netip.MustParsePrefix("10.0.0.0/24")},
		{ID: "eni-00000000000000002", Index: 2, MAC: mac("02:00:00:00:01:10"), Primary: netip.MustParseAddr("10.0.1.10"), Subnet: netip.MustParsePrefix("10.0.1.0/24")},
	}
)

func mac(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

func newWorld(t testing.TB) *world {
	t.Helper()
	testenv.Require(t, "root", "bpf")
	w := &world{t: t}
	w.node, w.wire = w.netns("node"), w.netns("wire")
	w.bpffs = mountBPFFS(t)
	w.ip(w.node, "link add eth0 address 02:00:00:00:00:10 type veth peer name r0 address 02:00:00:00:00:01 netns "+w.wire)
	w.ip(w.node, "link add eth1 address 02:00:00:00:01:10 type veth peer name r1 address 02:00:00:00:01:01 netns "+w.wire)
	w.ip(w.node, "addr add 10.0.0.10/24 dev eth0")
	w.ip(w.node, "link set eth0 up")
	w.ip(w.node, "route add default via 10.0.0.1")
	for _, args := range []string{
		"link set r0 mtu 9001 up", "link set r1 mtu 9001 up",
		"addr add 10.0.0.1/24 dev r0", "addr add 10.0.1.1/24 dev r1", "addr add 10.9.9.9/32 dev lo",
		"route add 10.0.1.128/25 via 10.0.1.10",
	} {
		w.ip(w.wire, args)
	}
	return w
}

func mountBPFFS(t testing.TB) string {
	t.Helper()
	dir := filepath.Join("/run", fmt.Sprintf("%s%d-%d", netnsPrefix, os.Getpid(), worlds.Add(1)))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "agent")
}

// netns makes a namespace for this test.
func (w *world) netns(what string) string {
	w.t.Helper()
	name := fmt.Sprintf("%s%d-%d-%s", netnsPrefix, os.Getpid(), worlds.Add(1), what)
	if err := nl.NewNamed(name); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if err := nl.DeleteNamed(name); err != nil {
			w.t.Error(err)
		}
	})
	return name
}

// ip runs the ip command in a namespace.
func (w *world) ip(netns, args string) string {
	w.t.Helper()
	return w.run("ip", append([]string{"-n", netns}, strings.Fields(args)...)...)
}

func (w *world) run(name string, args ...string) string {
	w.t.Helper()
	// Standard error is kept apart: ip warns there of namespaces that other
	// processes are taking down.
	var errOut bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		w.t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, errOut.String())
	}
	return string(out)
}

// onceForAllHooks is for tests of what stands on no hook: the package's tests run
// under each kind.
func onceForAllHooks(t testing.TB) {
	t.Helper()
	if testHook != Clsact {
		t.Skip("no hook is involved")
	}
}

// open opens the node's datapath; it is closed with the test if not before.
func (w *world) open(opts Options) *Datapath {
	w.t.Helper()
	d := w.openWith(opts, enis)
	d.eniMu.Lock()
	defer d.eniMu.Unlock()
	if err := d.setNets([]netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, nil); err != nil {
		w.t.Fatal(err)
	}
	return d
}

func (w *world) tryOpen(opts Options) (d *Datapath, err error) {
	opts.BPFFS = w.bpffs
	if opts.Hook == "" {
		opts.Hook = testHook
	}
	if !w.stackOnly {
		opts.Direct = true
	}
	if w.quiet {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if programs != nil && !w.uncached {
		opts.loader = programs.Load
		w.release()
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.NewTextHandler(w.t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	err = nl.Do(nl.Path(w.node), func() error {
		d, err = Open(opts)
		return err
	})
	return d, err
}

// release gives the maps back with the end of the test.
func (w *world) release() {
	if w.cached {
		return
	}
	w.cached = true
	node, err := os.Open(nl.Path(w.node))
	if err != nil {
		w.t.Fatal(err)
	}
	maps := mapDir(w.bpffs)
	w.t.Cleanup(func() {
		programs.Release(maps, func() error { return errors.Join(removeDevices(node), node.Close()) })
	})
}

// removeDevices removes the devices of a node whose Datapath is closed. No program
// runs on them any more when it returns; of a namespace that is deleted the kernel
// removes them later.
func removeDevices(node *os.File) error {
	c, err := nl.DialIn(node)
	if err != nil {
		return err
	}
	defer c.Close()
	const loopback, doomed = 1, 0x756c7264
	for {
		links, err := c.Links()
		if err != nil || len(links) == 1 && links[0].Index == loopback {
			return err
		}
		// A pod's end may go meanwhile, and takes the node's end with it.
		var b nl.Batch
		for _, l := range links {
			if l.Index != loopback {
				b.LinkGroupIndex(l.Index, doomed)
				b.Tolerate(unix.ENODEV)
			}
		}
		b.LinkDeleteGroup(doomed)
		b.Tolerate(unix.ENODEV)
		if err := c.Exec(&b); err != nil {
			return err
		}
	}
}

// pod is an endpoint in a namespace of its own.
type pod struct {
	Endpoint
	ns string
}

// endpoint returns what Add is to be given for the n-th pod, with address
// 10.0.1.(128+n) on ENI 2.
func endpoint(n int, netns string) Endpoint {
	return Endpoint{
		ContainerID: fmt.Sprintf("c%063d", n), IfName: "eth0", Netns: nl.Path(netns),
		Addr: netip.AddrFrom4([4]byte{10, 0, 1, byte(128 + n)}), ENI: enis[1].ID, ENIIndex: 2,
		PodNamespace: "default", PodName: fmt.Sprintf("pod-%d", n), Groups: vpc.GroupSet("sg-00000000000000001"),
	}
}

func openNetns(t testing.TB, name string) *os.File {
	t.Helper()
	f, err := os.Open(nl.Path(name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func (w *world) addPod(d *Datapath, n int) pod {
	w.t.Helper()
	ns := w.netns(fmt.Sprintf("pod%d", n))
	e, err := d.Add(context.Background(), endpoint(n, ns), openNetns(w.t, ns))
	if err != nil {
		w.t.Fatal(err)
	}
	return pod{Endpoint: e, ns: ns}
}

// udp opens a socket in a namespace.
func (w *world) udp(netns string, at netip.Addr, port uint16) *net.UDPConn {
	w.t.Helper()
	var c *net.UDPConn
	err := nl.Do(nl.Path(netns), func() (err error) {
		c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(at, port)))
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = c.Close() })
	return c
}

const echoPort = 7

// echo answers each datagram to port 7 with the sender's address as seen.
func (w *world) echo(netns string, at netip.Addr) {
	c := w.udp(netns, at, echoPort)
	go func() {
		buf := make([]byte, 65536)
		for {
			_, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteToUDPAddrPort([]byte(from.Addr().String()), from)
		}
	}()
}

// ask sends a datagram from a namespace to an echo, up to tries times, and
// returns the sender's address as the echo saw it; "" if it never answered.
func (w *world) ask(netns string, from, to netip.Addr, tries int) string {
	w.t.Helper()
	return w.askFor(200*time.Millisecond, netns, from, to, tries)
}

// keepAsking asks an echo from a pod, one datagram after the other, each of which
// has so long to be answered. stop ends it and tells how many were sent, and how
// many of them had no answer.
func (w *world) keepAsking(patience time.Duration, from pod, to netip.Addr) (stop func() (asked, lost uint64)) {
	var asked, lost uint64
	quit, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-quit:
				return
			default:
				asked++
				if w.askFor(patience, from.ns, from.Addr, to, 1) == "" {
					lost++
				}
			}
		}
	}()
	return func() (uint64, uint64) {
		close(quit)
		<-ended
		return asked, lost
	}
}

// askFor is ask, and waits so long for each answer.
func (w *world) askFor(patience time.Duration, netns string, from, to netip.Addr, tries int) string {
	w.t.Helper()
	c := w.udp(netns, from, 0)
	defer c.Close()
	buf := make([]byte, 64)
	for range tries {
		_, _ = c.WriteToUDPAddrPort([]byte("who am I?"), netip.AddrPortFrom(to, echoPort))
		_ = c.SetReadDeadline(time.Now().Add(patience))
		if n, err := c.Read(buf); err == nil {
			return string(buf[:n])
		}
	}
	return ""
}

// eventually polls until ok, and fails the test if that takes too long.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("never: %s", what)
		}
	}
}

func counters(t testing.TB, d *Datapath) map[string]uint64 {
	t.Helper()
	c, err := d.Counters()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// ping tells whether an ICMP echo is answered.
func (w *world) ping(netns string, from, to netip.Addr) bool {
	w.t.Helper()
	var c *net.IPConn
	err := nl.Do(nl.Path(netns), func() (err error) {
		c, err = net.ListenIP("ip4:icmp", &net.IPAddr{IP: from.AsSlice()})
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.Close()
	const ipHeader = 20
	request := packet.Echo4(from, to, 1, 1, []byte("ping"))[ipHeader:]
	buf := make([]byte, 1500)
	for range 20 {
		_, _ = c.WriteToIP(request, &net.IPAddr{IP: to.AsSlice()})
		_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		for {
			n, _, err := c.ReadFromIP(buf) // without the IP header
			if err != nil {
				break
			}
			if n >= 8 && buf[0] == 0 { // echo reply
				return true
			}
		}
	}
	return false
}

func containsAny(s string, any ...string) bool {
	for _, a := range any {
		if strings.Contains(s, a) {
			return true
		}
	}
	return false
}

func paths(t testing.TB, d *Datapath) Paths {
	t.Helper()
	p, err := d.Paths()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// setConstants gives programs that are not loaded yet other constants.
func setConstants(t testing.TB, spec *ebpf.CollectionSpec, constants map[string]any) {
	t.Helper()
	for name, v := range constants {
		if err := spec.Variables[name].Set(v); err != nil {
			t.Fatal(err)
		}
	}
}
