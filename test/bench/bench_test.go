package bench

import (
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
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/test/lab"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Lookup("test.bench").Value.String() == "" {
		os.Exit(m.Run()) // nothing to build for
	}
	os.Exit(lab.Main(m))
}

// BenchmarkUnderlay measures everything in one lab and writes the rows.
func BenchmarkUnderlay(b *testing.B) {
	// A type that holds the addresses of all ADDs at once: an address that was
	// released cools down, so each ADD takes another.
	l := lab.Up(b, "--nodes", "2", "--instance-type", "m5.4xlarge")
	podA, podB := l.Run("a", "--node", "node-1"), l.Run("b", "--node", "node-2")
	podPair := pair{from: podA.Netns, to: podB.Netns, addr: podB.IP}
	nodePair := pair{from: l.Nodes[0].Netns, to: l.Nodes[1].Netns, addr: l.Nodes[1].IP}

	const base = "node to node over the same ENIs; higher is better"
	var rows []Row
	for _, m := range []struct {
		name    string
		measure func(testing.TB, pair) float64
	}{
		{"tcp1", tcpBytesPerSecond},
		{"rr", roundTripsPerSecond},
		{"crr", connectionsPerSecond},
	} {
		rows = append(rows, compare(b, "pod-node/"+m.name, base,
			func() float64 { return m.measure(b, podPair) },
			func() float64 { return m.measure(b, nodePair) }))
	}

	empty := filepath.Join(b.TempDir(), "empty")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", empty, "./empty")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("build the empty program: %v\n%s", err, out)
	}
	warm(b, l, (rounds+1)*addsPerRound+5)
	rows = append(rows, compare(b, "add/empty-go", "starting an empty Go program; lower is better",
		func() float64 { return addSeconds(b, l) },
		func() float64 {
			start := time.Now()
			for range addsPerRound {
				if err := exec.Command(empty).Run(); err != nil {
					b.Fatal(err)
				}
			}
			return time.Since(start).Seconds()
		}))
	if err := write("../../docs/bench/latest.json", rows); err != nil {
		b.Fatal(err)
	}
}

// pair is two namespaces and the address of the second.
type pair struct {
	from, to string
	addr     netip.Addr
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

// addsPerRound pods are added one after the other.
const addsPerRound = 5

// warm fills the pool of node-1 with n free addresses, so that no call to EC2
// is measured: as many pods are made and removed, and their cooldown awaited.
func warm(b *testing.B, l *lab.Lab, n int) {
	b.Helper()
	l.Underlay("run", "warm", "--node", "node-1", "--count", strconv.Itoa(n))
	for i := range n {
		l.Underlay("rm", fmt.Sprintf("warm-%d", i+1))
	}
	lab.Eventually(b, 2*time.Minute, "the pool is warm", func() error {
		free := 0
		for _, eni := range l.Inspect(l.Nodes[0]).ENIs {
			free += eni.Addresses.Free
		}
		if free < n {
			return fmt.Errorf("%d of %d addresses are free", free, n)
		}
		return nil
	})
}

// addSeconds returns what ADD takes, plugin process included, for addsPerRound
// pods. The namespaces are made before and removed after.
func addSeconds(b testing.TB, l *lab.Lab) float64 {
	config := fmt.Sprintf(`{"cniVersion":"1.1.0","name":"underlay","type":"underlay-cni","socket":%q}`, l.Nodes[0].AgentSocket)
	cni := func(command, name string) {
		cmd := exec.Command(filepath.Join(lab.Bin, "underlay-cni"))
		cmd.Env = []string{"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + name, "CNI_IFNAME=eth0", "CNI_PATH=" + lab.Bin, "CNI_NETNS=" + nl.Path(name)}
		cmd.Stdin = strings.NewReader(config)
		if out, err := cmd.Output(); err != nil {
			b.Fatalf("%s: %v\n%s", command, err, out)
		}
	}
	names := make([]string, addsPerRound)
	for i := range names {
		names[i] = fmt.Sprintf("ul-%s-pod-bench-%d", l.Name, i)
		if err := nl.NewNamed(names[i]); err != nil {
			b.Fatal(err)
		}
	}
	start := time.Now()
	for _, name := range names {
		cni("ADD", name)
	}
	took := time.Since(start)
	for _, name := range names {
		cni("DEL", name)
		if err := nl.DeleteNamed(name); err != nil {
			b.Fatal(err)
		}
	}
	return took.Seconds()
}
