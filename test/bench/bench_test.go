package bench

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/agentapi/pipe"
	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/testenv"
	"github.com/underlay-cni/underlay/test/lab"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Lookup("test.bench").Value.String() == "" {
		os.Exit(m.Run()) // nothing to build for
	}
	testenv.SweepDead("ul-bench")
	os.Exit(lab.Main(m))
}

// latest has the rows of all benchmarks but those with a file of their own.
const latest = "latest.json"

// kept is the path of a file of results. Those of a trial, with too few turns
// for an interval, do not take the place of what is in docs/bench.
func kept(b testing.TB, name string) string {
	b.Helper()
	if *turns >= 7 && *only == "" {
		return filepath.Join("../../docs/bench", name)
	}
	dir := filepath.Join(os.TempDir(), "underlay-bench")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		b.Fatal(err)
	}
	b.Logf("a trial of %d turns: its results are in %s", *turns, filepath.Join(dir, name))
	return filepath.Join(dir, name)
}

// BenchmarkUnderlay measures everything in one lab and writes the rows.
func BenchmarkUnderlay(b *testing.B) {
	// A type that holds the addresses of all ADDs at once, and a short cooldown:
	// what is measured is the node, not the wait for EC2. Without any, an ADD
	// would take the address whose device is just being deleted.
	l := lab.Up(b, "--nodes", "2", "--instance-type", "m5.4xlarge", "--agent-env", "IP_COOLDOWN_PERIOD=1", "--agent-arg=--metrics-listen="+metricsAddr)
	podA, podB := l.Run("a", "--node", "node-1"), l.Run("b", "--node", "node-2")
	podPair := pair{from: podA.Netns, to: podB.Netns, addr: podB.IP}
	nodePair := pair{from: l.Nodes[0].Netns, to: l.Nodes[1].Netns, addr: l.Nodes[1].IP}

	const base = "node to node over the same ENIs of vpcd; higher is better"
	var rows []Row
	for _, m := range []struct {
		name    string
		measure func(testing.TB, pair) float64
	}{
		{"tcp1", tcpBytesPerSecond},
		{"rr", roundTripsPerSecond},
		{"crr", connectionsPerSecond},
	} {
		rows = append(rows, Compare(b, "pod-node-vpcd/"+m.name, base,
			func() float64 { return m.measure(b, podPair) },
			func() float64 { return m.measure(b, nodePair) }))
	}

	empty := filepath.Join(b.TempDir(), "empty")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", empty, "./empty")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("build the empty program: %v\n%s", err, out)
	}
	ours := cniPlugin{
		lab: l, binary: filepath.Join(lab.Bin, "underlay-cni"), path: lab.Bin,
		config: fmt.Sprintf(`{"cniVersion":"1.1.0","name":"underlay","type":"underlay-cni","socket":%q}`, l.Nodes[0].AgentSocket),
	}
	ptp := cniPlugin{
		lab: l, binary: filepath.Join(testenv.PluginDir, "ptp"), path: testenv.PluginDir,
		config: fmt.Sprintf(`{"cniVersion":"1.0.0","name":"bench","type":"ptp","ipam":{"type":"host-local","subnet":"198.18.0.0/22","routes":[{"dst":"0.0.0.0/0"}],"dataDir":%q}}`, b.TempDir()),
	}
	// Started as the plugins are, in the node's namespace and with a
	// configuration to read.
	starter := cniPlugin{lab: l, binary: empty, config: ours.config}
	start := func() float64 {
		quiet()
		start := time.Now()
		for range addsPerRound {
			starter.run(b, "ADD", "nobody")
		}
		return time.Since(start).Seconds()
	}
	const lower = "; lower is better"
	warm(b, l, atOnce+5)
	rows = append(rows, Compare(b, "add/empty-go", "starting an empty Go program"+lower,
		func() float64 { add, _ := ours.cycle(b, addsPerRound); return add }, start))
	warm(b, l, atOnce+5)
	rows = append(rows, Compare(b, "add/budget", "1.3 times the start of an empty Go program and 2 ms"+lower,
		func() float64 { add, _ := ours.cycle(b, addsPerRound); return add },
		func() float64 { return 1.3*start() + addsPerRound*0.002 }))
	agent, kernel := agentSide{ours, new(pipe.Caller)}, newKernelFloor(b, l, ours)
	warm(b, l, atOnce+5)
	rows = append(rows, Compare(b, "add-agent/kernel", "the same netlink and bpf calls by themselves"+lower,
		func() float64 { before := agent.busy(b); agent.cycle(b, addsPerRound); return agent.busy(b) - before },
		func() float64 { return kernel.cycle(b, addsPerRound) }))
	warm(b, l, atOnce+5)
	rows = append(rows, Compare(b, "add-socket/kernel", "the same netlink and bpf calls by themselves"+lower,
		func() float64 { add, _ := agent.cycle(b, addsPerRound); return add },
		func() float64 { return kernel.cycle(b, addsPerRound) }))
	warm(b, l, atOnce+5)
	rows = append(rows, Compare(b, "del-agent/add-kernel", "the netlink and bpf calls of an ADD by themselves"+lower,
		func() float64 { _, del := agent.cycle(b, addsPerRound); return del },
		func() float64 { return kernel.cycle(b, addsPerRound) }))
	warm(b, l, atOnce+5)
	rows = append(rows, Compare(b, "del/empty-go", "starting an empty Go program"+lower,
		func() float64 { _, del := ours.cycle(b, addsPerRound); return del }, start))
	if _, err := os.Stat(ptp.binary); err != nil {
		b.Fatalf("%v: install containernetworking-plugins", err)
	}
	warm(b, l, atOnce+5)
	rows = append(rows, Compare(b, "add/ptp-host-local", "ADD by the CNI project's ptp and host-local"+lower,
		func() float64 { add, _ := ours.cycle(b, addsPerRound); return add },
		func() float64 { add, _ := ptp.cycle(b, addsPerRound); return add }))
	warm(b, l, atOnce+5)
	rows = append(rows, Compare(b, "add-50-at-once/ptp-host-local", "50 ADDs at once by ptp and host-local"+lower,
		func() float64 { l.AwaitFree(l.Nodes[0], atOnce, 2*time.Minute); return ours.together(b, atOnce) },
		func() float64 { return ptp.together(b, atOnce) }))
	if err := Merge(kept(b, latest), rows); err != nil {
		b.Fatal(err)
	}
}

// pair is two namespaces and the address of the second.
type pair struct {
	from, to string
	addr     netip.Addr
	via      netip.Addr // where the first connects to, if not to addr: a ClusterIP
}

// asked is the address that the near side connects to.
func (p pair) asked() netip.Addr {
	if p.via.IsValid() {
		return p.via
	}
	return p.addr
}

// cubic makes a TCP socket use cubic: the machine's default may be bbr, which
// paces and so hides differences.
func cubic(_, _ string, c syscall.RawConn) error {
	var inner error
	err := c.Control(func(fd uintptr) {
		inner = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "cubic")
	})
	if err != nil {
		return err
	}
	return inner
}

// listen starts a server on the far side of p.
func (p pair) listen(b testing.TB, handle func(net.Conn)) net.Listener {
	config := net.ListenConfig{Control: cubic}
	l := lab.In(b, p.to, func() (net.Listener, error) {
		return config.Listen(b.Context(), "tcp4", netip.AddrPortFrom(p.addr, 0).String())
	})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				handle(c)
				c.Close()
			}()
		}
	}()
	return l
}

// dial connects from the near side of p.
func (p pair) dial(b testing.TB, to net.Addr) net.Conn {
	dialer := net.Dialer{Control: cubic, Timeout: 5 * time.Second}
	return lab.In(b, p.from, func() (net.Conn, error) { return dialer.Dial("tcp4", to.String()) })
}

func tcpBytesPerSecond(b testing.TB, p pair) float64 {
	received := make(chan int64, 1)
	l := p.listen(b, func(c net.Conn) {
		n, _ := io.CopyBuffer(struct{ io.Writer }{io.Discard}, c, make([]byte, 1<<18))
		received <- n
	})
	defer l.Close()
	c := p.dial(b, l.Addr())
	buf := make([]byte, 1<<18)
	start := time.Now()
	for time.Since(start) < 500*time.Millisecond {
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
	c.Close()
	n := <-received
	return float64(n) / time.Since(start).Seconds()
}

func roundTripsPerSecond(b testing.TB, p pair) float64 {
	l := p.listen(b, func(c net.Conn) {
		var one [1]byte
		for {
			if _, err := io.ReadFull(c, one[:]); err != nil {
				return
			}
			if _, err := c.Write(one[:]); err != nil {
				return
			}
		}
	})
	defer l.Close()
	c := p.dial(b, l.Addr())
	defer c.Close()
	var one [1]byte
	n, start := 0, time.Now()
	for time.Since(start) < 300*time.Millisecond {
		if _, err := c.Write(one[:]); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, one[:]); err != nil {
			b.Fatal(err)
		}
		n++
	}
	return float64(n) / time.Since(start).Seconds()
}

func connectionsPerSecond(b testing.TB, p pair) float64 {
	l := p.listen(b, func(c net.Conn) {
		var one [1]byte
		if _, err := io.ReadFull(c, one[:]); err == nil {
			_, _ = c.Write(one[:])
		}
	})
	defer l.Close()
	dialer := net.Dialer{Timeout: 5 * time.Second}
	n := 0
	var took time.Duration
	// The namespace is entered once per round: its cost is not the network's.
	err := nl.Do(p.from, func() error {
		start := time.Now()
		for time.Since(start) < 300*time.Millisecond {
			c, err := dialer.Dial("tcp4", l.Addr().String())
			if err != nil {
				return err
			}
			var one [1]byte
			if _, err := c.Write(one[:]); err != nil {
				return err
			}
			if _, err := io.ReadFull(c, one[:]); err != nil {
				return err
			}
			c.Close()
			n++
		}
		took = time.Since(start)
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	return float64(n) / took.Seconds()
}

// addsPerRound pods are added one after the other, or atOnce of them together.
const (
	addsPerRound = 5
	atOnce       = 50
)

// warm fills the pool of node-1 with n free addresses, so that no call to EC2
// is measured: as many pods are made and removed.
func warm(b *testing.B, l *lab.Lab, n int) {
	b.Helper()
	l.Underlay("run", "warm", "--node", "node-1", "--count", strconv.Itoa(n))
	for i := range n {
		l.Underlay("rm", fmt.Sprintf("warm-%d", i+1))
	}
	l.AwaitFree(l.Nodes[0], n, 2*time.Minute)
}

// cniPlugin is a plugin with its config, run as a runtime would in the network
// namespace of node-1.
type cniPlugin struct {
	lab                  *lab.Lab
	binary, path, config string
}

func (p cniPlugin) run(b testing.TB, command, name string) {
	cmd := exec.Command(p.binary)
	cmd.Env = []string{"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + name, "CNI_IFNAME=eth0", "CNI_PATH=" + p.path, "CNI_NETNS=" + nl.Path(name)}
	cmd.Stdin = strings.NewReader(p.config)
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := nl.Do(p.lab.Nodes[0].Netns, cmd.Start); err != nil {
		b.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		b.Errorf("%s %s: %v\n%s", p.binary, command, err, out.String())
	}
}

// namespaces makes n network namespaces for pods.
func (p cniPlugin) namespaces(b testing.TB, n int) (names []string) {
	for i := range n {
		name := fmt.Sprintf("ul-%s-pod-bench-%d", p.lab.Name, i)
		if err := nl.NewNamed(name); err != nil {
			b.Fatal(err)
		}
		names = append(names, name)
	}
	return names
}

// quiet lets the kernel finish what it deletes in the background, devices and
// namespaces, with the lock held that every ADD needs.
func quiet() { <-time.After(time.Second) }

// cycle adds n pods one after the other, then deletes them, and returns the
// seconds of all ADDs and of all DELs, the plugin's process included.
func (p cniPlugin) cycle(b testing.TB, n int) (add, del float64) {
	names := p.namespaces(b, n)
	quiet()
	start := time.Now()
	for _, name := range names {
		p.run(b, "ADD", name)
	}
	add = time.Since(start).Seconds()
	start = time.Now()
	for _, name := range names {
		p.run(b, "DEL", name)
	}
	del = time.Since(start).Seconds()
	for _, name := range names {
		if err := nl.DeleteNamed(name); err != nil {
			b.Fatal(err)
		}
	}
	return add, del
}

// together adds n pods at once and returns the seconds until all are up.
func (p cniPlugin) together(b testing.TB, n int) float64 {
	names := p.namespaces(b, n)
	quiet()
	var wg sync.WaitGroup
	start := time.Now()
	for _, name := range names {
		wg.Go(func() { p.run(b, "ADD", name) })
	}
	wg.Wait()
	took := time.Since(start).Seconds()
	b.Logf("%s: %d ADDs at once, %.0f per second", filepath.Base(p.binary), n, float64(n)/took)
	for _, name := range names {
		p.run(b, "DEL", name)
		if err := nl.DeleteNamed(name); err != nil {
			b.Fatal(err)
		}
	}
	return took
}
