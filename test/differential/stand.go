package differential

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/testenv"
	"github.com/underlay-cni/underlay/internal/vpcd"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
	"github.com/underlay-cni/underlay/test/vpcmodel"
)

var stands atomic.Int32

// stand is a running vpcd with two interfaces for markers. Several scripts may run
// in it at once, each in VPCs of its own: most of the time of each is waiting.
type stand struct {
	ctx      context.Context
	endpoint string
	name     string // of the lab
	log      bytes.Buffer

	mu       sync.Mutex // one batch at a time, as markers have one receiver
	number   uint32     // of the last packet that was sent
	from, to *port      // markers go from one to the other
	marker   netip.Addr
	at       netip.Addr
	internet *port // nil until there is one
}

// newStand starts vpcd in this process, with a lab of its own, to be stopped and
// removed when the test ends. The lab's name is of the form that package fabric's
// tests sweep, should this process be killed.
func newStand(t testing.TB) *stand {
	t.Helper()
	return newStandWith(t, func(string) {})
}

// newStandWith is newStand; before is told the lab's name before vpcd starts.
func newStandWith(t testing.TB, before func(lab string)) *stand {
	t.Helper()
	o := labOptions(t)
	before(o.Name)
	s := &stand{name: o.Name}
	ctx, cancel := context.WithCancel(context.Background())
	s.ctx = ctx
	o.Logger = slog.New(slog.NewTextHandler(&s.log, &slog.HandlerOptions{Level: slog.LevelWarn}))
	ready, done := make(chan string, 1), make(chan error, 1)
	o.Ready = func(a net.Addr) { ready <- a.String() }
	go func() { done <- vpcd.Run(ctx, o) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("vpcd: %v", err)
		}
		if t.Failed() && s.log.Len() > 0 {
			t.Logf("vpcd's log:\n%s", tail(s.log.String(), 4000))
		}
	})
	select {
	case a := <-ready:
		s.endpoint = "http://" + a
	case err := <-done:
		done <- nil
		t.Fatalf("vpcd: %v", err)
	}
	s.furnish(t)
	return s
}

// labOptions are those of a vpcd with a lab of its own, which is removed when the
// test ends.
func labOptions(t testing.TB) vpcd.Options {
	t.Helper()
	testenv.Require(t, "root", "bpf")
	name := fmt.Sprintf("t%dx%d", os.Getpid(), 500+stands.Add(1))
	root := filepath.Join("/run/underlay", name)
	o := vpcd.Options{Name: name, Dir: filepath.Join(root, "vpcd"), BPFFS: filepath.Join(root, "bpf", "vpcd"), Listen: "127.0.0.1:0"}
	if err := os.MkdirAll(filepath.Join(root, "bpf"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("bpf", filepath.Join(root, "bpf"), "bpf", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(vpcd.Destroy(o), unix.Unmount(filepath.Join(root, "bpf"), unix.MNT_DETACH), os.RemoveAll(root)); err != nil {
			t.Error(err)
		}
	})
	return o
}

// furnish lifts the quotas that worlds would meet, and makes what markers need.
func (s *stand) furnish(t testing.TB) {
	t.Helper()
	if err := s.admin(http.MethodPut, "chaos", map[string]any{"quotas": map[string]int{
		"vpcs": 100000, "groups": 100000, "internet-gateways": 1000, "elastic-ips": 1000, "nat-gateways-per-zone": 1000,
	}}, nil); err != nil {
		t.Fatal(err)
	}
	s.layMarkers(t)
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

// layMarkers makes the VPC that markers cross. Its group allows all, untracked.
func (s *stand) layMarkers(t testing.TB) {
	t.Helper()
	script, err := vpcmodel.Parse(`
vpc m1 10.255.0.0/16
subnet m2 m1 10.255.1.0/24
eni from m2 m3 10.255.1.10
eni to m2 m4 10.255.1.11
group all m1
allow all in all 0.0.0.0/0
allow all out all 0.0.0.0/0
groups from all
groups to all
`)
	if err != nil {
		t.Fatal(err)
	}
	c := newCloud(s.ctx, s.endpoint)
	for _, st := range script {
		if err := c.apply(st); err != nil {
			t.Fatal(err)
		}
	}
	ports := map[string]*port{}
	if err := s.openPorts(c, ports); err != nil {
		t.Fatal(err)
	}
	s.from, s.to = ports["from"], ports["to"]
	s.marker, s.at = netip.MustParseAddr("10.255.1.10"), netip.MustParseAddr("10.255.1.11")
	t.Cleanup(func() { s.from.close(); s.to.close() })
}

// admin calls vpcd's own interface.
func (s *stand) admin(method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(s.ctx, method, s.endpoint+vpcd.AdminPath+path, body)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, b)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(b, out)
}

// settle waits until the fabric is as the API's objects say, and returns the
// namespaces of the instances.
func (s *stand) settle() (map[string]string, error) {
	var instances []vpcd.InstanceInfo
	if err := s.admin(http.MethodGet, "instances", nil, &instances); err != nil {
		return nil, err
	}
	var h vpcd.Health
	if err := s.admin(http.MethodGet, "health", nil, &h); err != nil {
		return nil, err
	}
	if h.Status != vpcd.StatusOK {
		return nil, fmt.Errorf("vpcd is %s: %s", h.Status, strings.Join(h.Errors, "; "))
	}
	out := map[string]string{}
	for _, i := range instances {
		out[i.InstanceID] = i.Netns
	}
	return out, nil
}

// terminated waits until instances are.
func (s *stand) terminated(ids []string) error {
	deadline := time.Now().Add(20 * time.Second)
	for {
		var instances []vpcd.InstanceInfo
		if err := s.admin(http.MethodGet, "instances", nil, &instances); err != nil {
			return err
		}
		left := slices.DeleteFunc(instances, func(i vpcd.InstanceInfo) bool {
			return i.State == "terminated" || !slices.Contains(ids, i.InstanceID)
		})
		if len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("after 20 s %d instances are not terminated", len(left))
		}
		<-time.After(5 * time.Millisecond)
	}
}

// sendMarker sends the frame that shows that all frames before it are through, and
// waits for it.
func (s *stand) sendMarker() error {
	s.number++
	p := &vpcmodel.Packet{Src: s.marker, Dst: s.at, Proto: packet.ProtoUDP, SrcPort: 1, DstPort: 1}
	d := datagrams(p, s.number)[0]
	if err := s.from.send(frame(packet.MAC(s.from.mac), packet.MAC(fabric.RouterMAC), d)); err != nil {
		return fmt.Errorf("send marker: %w", err)
	}
	buf := make([]byte, 1<<14)
	deadline := time.Now().Add(10 * time.Second)
	for time.Now().Before(deadline) {
		if err := s.to.await(10000); err != nil {
			break
		}
		got, err := s.to.receive(buf)
		if err != nil {
			return fmt.Errorf("receive marker: %w", err)
		}
		if len(got) >= 14 && bytes.Equal(got[14:], d) {
			return nil
		}
	}
	return errors.New("the marker did not come within 10 s; does the fabric deliver at all?")
}

// onOneCPU runs fn on a thread of its own that stays on one CPU, so that the
// frames it sends pass the fabric one after the other.
func onOneCPU(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // without an Unlock, the thread ends with the goroutine
		var allowed, one unix.CPUSet
		if err := unix.SchedGetaffinity(0, &allowed); err != nil {
			done <- fmt.Errorf("read CPU affinity: %w", err)
			return
		}
		for cpu := range 1024 {
			if allowed.IsSet(cpu) {
				one.Set(cpu)
				break
			}
		}
		if err := unix.SchedSetaffinity(0, &one); err != nil {
			done <- fmt.Errorf("stay on one CPU: %w", err)
			return
		}
		done <- fn()
	}()
	return <-done
}

// openPorts waits for the fabric and opens those interfaces of a cloud's script
// that are not in ports yet.
func (s *stand) openPorts(c *cloud, ports map[string]*port) error {
	namespaces, err := s.settle()
	if err != nil {
		return err
	}
	if err := s.openInternet(c); err != nil {
		return err
	}
	for name, e := range c.world.ENIs {
		if !e.Attached || ports[string(name)] != nil {
			continue
		}
		netns := namespaces[c.ids[string(e.Instance)]]
		if !nl.ExistsNamed(filepath.Base(netns)) {
			return fmt.Errorf("instance %s of %s has no namespace", e.Instance, name)
		}
		p, err := openPort(netns, c.macs[name])
		if err != nil {
			return err
		}
		ports[string(name)] = p
	}
	return nil
}
