package vpcd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/testenv"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
)

var labs atomic.Int32

// labOptions are those of a lab of the test's own, with a bpffs. The name is of
// the form that package fabric's tests sweep, should this process be killed.
func labOptions(t *testing.T) Options {
	t.Helper()
	testenv.Require(t, "root", "bpf")
	name := fmt.Sprintf("t%dx%d", os.Getpid(), labs.Add(1))
	root := filepath.Join("/run/underlay", name)
	o := Options{Name: name, Dir: filepath.Join(root, "vpcd"), BPFFS: filepath.Join(root, "bpf", "vpcd")}
	if err := os.MkdirAll(filepath.Join(root, "bpf"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("bpf", filepath.Join(root, "bpf"), "bpf", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(Destroy(o), unix.Unmount(filepath.Join(root, "bpf"), unix.MNT_DETACH), os.RemoveAll(root)); err != nil {
			t.Error(err)
		}
		if nl.ExistsNamed("ul-" + name + "-fabric") {
			t.Error("the fabric's namespace is still there")
		}
	})
	return o
}

// inside returns a client whose connections are made in a network namespace.
// minTTL is the IP TTL below which it does not see packets: 2 makes it a client
// that is one hop further away.
func inside(t *testing.T, netns string, minTTL int) *http.Client {
	tr := &http.Transport{DialContext: func(ctx context.Context, network, address string) (c net.Conn, err error) {
		err = nl.Do(netns, func() (err error) {
			d := net.Dialer{Timeout: 2 * time.Second, Control: func(_, _ string, c syscall.RawConn) error {
				var set error
				err := c.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MINTTL, minTTL) })
				return errors.Join(err, set)
			}}
			d.SetMultipathTCP(false)
			c, err = d.DialContext(ctx, "tcp4", address)
			return err
		})
		return c, err
	}}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 5 * time.Second}
}

func ask(t *testing.T, c *http.Client, method, url string, headers ...string) (int, string) {
	t.Helper()
	req, err := http.NewRequest(method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range headers {
		n, v, _ := strings.Cut(h, ": ")
		req.Header.Set(n, v)
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// An instance reaches IMDS and the EC2 API through the fabric, before and after
// a restart, in two VPCs of the same addresses; destroy leaves nothing.
func TestInstancesReachTheirServices(t *testing.T) {
	o := labOptions(t)
	r := start(t, o)
	eventually(t, "healthy", func() bool {
		var h Health
		return r.admin("GET", "health", nil, &h) == 200 && h.Status == StatusOK && h.Fabric
	})
	var ids []string
	for range 2 {
		v := r.id("vpc", "CreateVpc", "CidrBlock=10.0.0.0/16")
		s := r.id("subnet", "CreateSubnet", "VpcId="+v, "CidrBlock=10.0.1.0/24")
		ids = append(ids, r.id("i", "RunInstances", "ImageId=ami-00000000000000001", "InstanceType=m5.large", "MinCount=1", "MaxCount=1", "SubnetId="+s))
	}
	var instances []InstanceInfo
	eventually(t, "running", func() bool {
		r.admin("GET", "instances", nil, &instances)
		return len(instances) == 2 && instances[0].State == "running" && instances[1].State == "running"
	})
	netns := map[string]string{}
	for _, i := range instances {
		netns[i.InstanceID] = i.Netns
	}

	tokens := map[string]string{}
	check := func() {
		t.Helper()
		for _, id := range ids {
			c := inside(t, netns[id], 1)
			if tokens[id] == "" {
				var code int
				if code, tokens[id] = ask(t, c, "PUT", "http://169.254.169.254/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 300"); code != 200 {
					t.Fatalf("token of %s: %d %s", id, code, tokens[id])
				}
			}
			for item, want := range map[string]string{"instance-id": id, "local-ipv4": "10.0.1.4", "network/interfaces/macs/": ""} {
				code, got := ask(t, c, "GET", "http://169.254.169.254/latest/meta-data/"+item, "X-aws-ec2-metadata-token: "+tokens[id])
				if code != 200 || want != "" && got != want {
					t.Errorf("%s of %s: %d %q, want %q", item, id, code, got, want)
				}
			}
			// The EC2 API is there, the admin endpoints are not.
			if code, body := ask(t, c, "GET", "http://169.254.171.24:7424/_vpcd/health"); code != 401 || !strings.Contains(body, "AuthFailure") {
				t.Errorf("EC2 from inside: %d %s", code, body)
			}
		}
	}
	check()
	if code, _ := ask(t, inside(t, netns[ids[0]], 1), "GET", "http://169.254.169.254/", "X-aws-ec2-metadata-token: "+tokens[ids[1]]); code != 401 {
		t.Errorf("another instance's token: %d", code)
	}

	// A client one hop away sees items, and no token until the limit is raised.
	away := inside(t, netns[ids[0]], 2)
	away.Timeout = 500 * time.Millisecond
	if code, _ := ask(t, away, "GET", "http://169.254.169.254/", "X-aws-ec2-metadata-token: "+tokens[ids[0]]); code != 200 {
		t.Errorf("an item, one hop away: %d", code)
	}
	const ttl = "X-aws-ec2-metadata-token-ttl-seconds"
	put, err := http.NewRequest("PUT", "http://169.254.169.254/latest/api/token", nil)
	if err != nil {
		t.Fatal(err)
	}
	put.Header.Set(ttl, "60")
	if resp, err := away.Do(put); err == nil {
		resp.Body.Close()
		t.Errorf("a token, one hop away: %s", resp.Status)
	}
	r.ec2("ModifyInstanceMetadataOptions", "InstanceId="+ids[0], "HttpPutResponseHopLimit=2")
	if code, _ := ask(t, away, "PUT", "http://169.254.169.254/latest/api/token", ttl+": 60"); code != 200 {
		t.Errorf("a token, one hop away, limit 2: %d", code)
	}

	r.stop()
	r = start(t, o)
	eventually(t, "healthy again", func() bool {
		var h Health
		return r.admin("GET", "health", nil, &h) == 200 && h.Status == StatusOK
	})
	check()

	// Stopped, the namespace is gone and IMDS with it; started, both are new, and
	// so they are when the start follows the stop at once.
	const setting = "/proc/sys/net/ipv4/ip_default_ttl" // of the namespace
	marked := func() (is bool) {
		t.Helper()
		if err := nl.Do(netns[ids[0]], func() error {
			b, err := os.ReadFile(setting)
			is = string(b) == "77\n"
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return is
	}
	mark := func() {
		t.Helper()
		if err := nl.Do(netns[ids[0]], func() error { return os.WriteFile(setting, []byte("77"), 0) }); err != nil || !marked() {
			t.Fatalf("mark the namespace: %v", err)
		}
	}
	running := func() bool {
		r.admin("GET", "instances", nil, &instances)
		return len(instances) == 2 && instances[0].State == "running" && instances[1].State == "running"
	}
	mark()
	r.ec2("StopInstances", "InstanceId.1="+ids[0])
	eventually(t, "namespace of the stopped gone", func() bool { return !nl.ExistsNamed(filepath.Base(netns[ids[0]])) })
	r.ec2("StartInstances", "InstanceId.1="+ids[0])
	eventually(t, "started", running)
	check()
	if marked() {
		t.Error("started in the namespace of before")
	}
	mark()
	r.ec2("StopInstances", "InstanceId.1="+ids[0], "Force=true")
	eventually(t, "started again", func() bool {
		answer, err := r.try("StartInstances", "InstanceId.1="+ids[0])
		return err == nil && strings.Contains(answer, "<instancesSet>")
	})
	eventually(t, "running again", running)
	check()
	if marked() {
		t.Error("started at once in the namespace of before")
	}
	mark()
	r.ec2("RebootInstances", "InstanceId.1="+ids[0])
	eventually(t, "rebooted", running)
	check()
	if marked() {
		t.Error("rebooted in the namespace of before")
	}

	// A service's namespace is there when the answer is.
	subnet := r.id("subnet", "DescribeSubnets")
	var service ManagedServiceInfo
	if code := r.admin("POST", "managed-services", ManagedService{Name: "db-1", SubnetID: subnet}, &service); code != 200 {
		t.Fatalf("managed service: %d %+v", code, service)
	}
	if err := nl.Do(service.Netns, func() error {
		l, err := net.Listen("tcp4", service.PrivateIPAddress+":0")
		if err != nil {
			return err
		}
		return l.Close()
	}); err != nil {
		t.Errorf("listen at the service's address: %v", err)
	}

	// Terminated: the namespace goes.
	r.ec2("TerminateInstances", "InstanceId.1="+ids[0])
	eventually(t, "namespace gone", func() bool { return !nl.ExistsNamed(filepath.Base(netns[ids[0]])) })
	if err := Destroy(o); err == nil {
		t.Error("a lab that is served was destroyed")
	}
	r.stop()
	if got := fabric.NetnsPath("x"); filepath.Dir(got) != filepath.Dir(netns[ids[0]]) {
		t.Errorf("namespaces are in %s", got)
	}
}
