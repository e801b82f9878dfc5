package vpcd

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/nl"
)

const childVariable = "UNDERLAY_VPCD_TEST_CHILD"

// TestMain is a vpcd, when childVariable holds its Options: one that a test can
// kill.
func TestMain(m *testing.M) {
	if options := os.Getenv(childVariable); options != "" {
		if err := child(options); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// childOptions are the Options that go to a child.
type childOptions struct {
	Name, Dir, BPFFS string
	NoFabric         bool
	FlowInterval     time.Duration
}

func child(options string) error {
	var c childOptions
	if err := json.Unmarshal([]byte(options), &c); err != nil {
		return err
	}
	return Run(context.Background(), Options{
		Name: c.Name, Dir: c.Dir, BPFFS: c.BPFFS, NoFabric: c.NoFabric, Listen: "127.0.0.1:0", FlowInterval: c.FlowInterval,
		Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
		Ready:  func(a net.Addr) { fmt.Println("http://" + a.String()) },
	})
}

// startChild starts a vpcd in a process of its own; kill ends it by SIGKILL.
func startChild(t *testing.T, o Options) (r *running, kill func()) {
	t.Helper()
	options, err := json.Marshal(childOptions{Name: o.Name, Dir: o.Dir, BPFFS: o.BPFFS, NoFabric: o.NoFabric, FlowInterval: o.FlowInterval})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childVariable+"="+string(options))
	cmd.Stderr = testLog{t}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill = sync.OnceFunc(func() {
		_ = cmd.Process.Kill() // SIGKILL
		_ = cmd.Wait()
	})
	t.Cleanup(kill)
	url, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("the child did not start: %v", err)
	}
	go func() { _, _ = io.Copy(io.Discard, out) }()
	return &running{t: t, url: strings.TrimSpace(url)}, kill
}

// Killed in the middle of calls, vpcd has lost none that it has answered.
func TestKillLosesNoAcknowledgedCall(t *testing.T) {
	o := Options{Name: "t", Dir: t.TempDir(), NoFabric: true}
	r, kill := startChild(t, o)
	v := r.id("vpc", "CreateVpc", "CidrBlock=10.0.0.0/16")
	s := r.id("subnet", "CreateSubnet", "VpcId="+v, "CidrBlock=10.0.0.0/20")
	eni := r.id("eni", "CreateNetworkInterface", "SubnetId="+s)
	var acknowledged []string
	for round := range 3 {
		var mu sync.Mutex
		var workers sync.WaitGroup
		var answered atomic.Int32
		stop := make(chan struct{})
		for w := range 4 {
			workers.Go(func() {
				for n := 0; ; n++ {
					select {
					case <-stop:
						return
					default:
					}
					key := fmt.Sprintf("r%dw%dn%d", round, w, n)
					answer, err := r.try("CreateSecurityGroup", "GroupName="+key, "GroupDescription=x", "VpcId="+v)
					if err != nil {
						return // killed
					}
					if strings.Contains(answer, "<groupId>") {
						mu.Lock()
						acknowledged = append(acknowledged, key)
						mu.Unlock()
						answered.Add(1)
					}
				}
			})
		}
		eventually(t, "calls answered", func() bool { return answered.Load() > 50 })
		kill()
		close(stop)
		workers.Wait()
		r, kill = startChild(t, o)
	}
	groups := r.ec2("DescribeSecurityGroups")
	lost := 0
	for _, key := range acknowledged {
		if !strings.Contains(groups, "<groupName>"+key+"</groupName>") {
			lost++
		}
	}
	if lost > 0 {
		t.Errorf("%d of %d acknowledged calls are lost", lost, len(acknowledged))
	}
	if got := r.ec2("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+eni); !strings.Contains(got, eni) {
		t.Errorf("the interface: %s", got)
	}
	t.Logf("%d calls acknowledged", len(acknowledged))
}

// Killed and started again under traffic between two instances, vpcd loses no
// packet.
func TestKillLosesNoPacket(t *testing.T) {
	o := labOptions(t)
	r, kill := startChild(t, o)
	v := r.id("vpc", "CreateVpc", "CidrBlock=10.0.0.0/16")
	s := r.id("subnet", "CreateSubnet", "VpcId="+v, "CidrBlock=10.0.1.0/24")
	for _, a := range []string{"10.0.1.10", "10.0.1.11"} {
		r.id("i", "RunInstances", "ImageId=ami-00000000000000001", "InstanceType=m5.large", "MinCount=1", "MaxCount=1", "SubnetId="+s, "PrivateIpAddress="+a)
	}
	netns := map[string]string{}
	eventually(t, "running", func() bool {
		var instances []InstanceInfo
		r.admin("GET", "instances", nil, &instances)
		for _, i := range instances {
			if i.State != "running" {
				return false
			}
			d := r.ec2("DescribeInstances", "InstanceId.1="+i.InstanceID)
			for _, a := range []string{"10.0.1.10", "10.0.1.11"} {
				if strings.Contains(d, "<privateIpAddress>"+a+"</privateIpAddress>") {
					netns[a] = i.Netns
				}
			}
		}
		return len(netns) == 2
	})
	server := listenUDP(t, netns["10.0.1.11"], "10.0.1.11:0")
	client := listenUDP(t, netns["10.0.1.10"], "10.0.1.10:0")
	to := server.LocalAddr().(*net.UDPAddr).AddrPort()

	// Every datagram waits for the one before, so that no queue overflows.
	var sent, lost atomic.Int64
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		buf := make([]byte, 64)
		for n := 0; ; n++ {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			want := strconv.Itoa(n)
			if _, err := client.WriteToUDPAddrPort([]byte(want), to); err != nil {
				done <- err
				return
			}
			sent.Add(1)
			for {
				if err := server.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
					done <- err
					return
				}
				k, _, err := server.ReadFromUDPAddrPort(buf)
				if err != nil {
					lost.Add(1)
					break
				}
				if string(buf[:k]) == want {
					break
				}
			}
		}
	}()
	more := func(what string) {
		t.Helper()
		from := sent.Load()
		eventually(t, "packets "+what, func() bool { return sent.Load() > from+200 })
	}
	more("at first")
	for range 2 {
		kill()
		more("without a vpcd")
		r, kill = startChild(t, o)
		eventually(t, "healthy", func() bool {
			var h Health
			return r.admin("GET", "health", nil, &h) == 200 && h.Status == StatusOK
		})
		more("after a restart")
	}
	close(stop)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if lost.Load() > 0 {
		t.Errorf("%d of %d packets are lost", lost.Load(), sent.Load())
	}
	t.Logf("%d packets", sent.Load())
	kill()
}

func listenUDP(t *testing.T, netns, address string) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	if err := nl.Do(netns, func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(address)))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}
