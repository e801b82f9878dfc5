package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/test/lab"
)

// What a Nomad client does with an allocation's network: ADD is tried three
// times, about a second apart, without a DEL between; after a restart of the
// client CHECK comes first, and if that fails one DEL and one ADD, under the
// same container ID.
func TestNomadSequence(t *testing.T) {
	l := lab.Up(t, "--nodes", "1")
	n := l.Nodes[0]
	const alloc = "7f7b8c9e-1d2a-4c53-9f6e-0a1b2c3d4e5f"
	netns := "ul-" + l.Name + "-alloc"
	anew := func() {
		t.Helper()
		if err := nl.NewNamed(netns); err != nil {
			t.Fatal(err)
		}
	}
	anew()
	t.Cleanup(func() { _ = nl.DeleteNamed(netns) })
	r := l.Runtime(n, "1.0.0", nil)
	conf := &libcni.RuntimeConf{ContainerID: alloc, NetNS: nl.Path(netns), IfName: "eth0", Args: [][2]string{
		{"IgnoreUnknown", "true"}, {"NOMAD_REGION", "global"}, {"NOMAD_NAMESPACE", "default"},
		{"NOMAD_JOB_ID", "api"}, {"NOMAD_GROUP_NAME", "web"}, {"NOMAD_ALLOC_ID", alloc}}}
	works := func(when string) netip.Addr {
		t.Helper()
		in := l.Inspect(n)
		var addr netip.Addr
		for _, e := range in.Endpoints {
			if e.ContainerID != alloc || e.State == "tombstone" {
				continue
			}
			if addr.IsValid() {
				t.Errorf("%s: the allocation has %s and %s", when, addr, e.IP)
			}
			addr = e.IP
			if e.Pod.String() != "default/api/web" || e.Pod.UID != alloc {
				t.Errorf("%s: the endpoint is of %+v", when, e.Pod)
			}
		}
		if out, err := exec.Command("nsenter", "--net="+nl.Path(netns), "ping", "-c", "1", "-W", "2", n.IP.String()).CombinedOutput(); err != nil {
			t.Errorf("%s: ping of the node: %v\n%s", when, err, out)
		}
		return addr
	}
	add := func() netip.Addr {
		t.Helper()
		res, err := r.Add(t.Context(), conf)
		if err != nil {
			t.Fatalf("ADD: %v", err)
		}
		return addrOf(t, res)
	}

	const others = 2 // that must not notice
	for i := range others {
		l.Run(fmt.Sprintf("other-%d", i))
	}

	// First try: no agent. Second: an agent that is starting, and that EC2
	// throttles. Third: EC2 answers again.
	l.Kill("underlay-agent", n.Name)
	_, err := r.Add(t.Context(), conf)
	if code := codeOf(err); code != 100 {
		t.Errorf("ADD without an agent: %v, want code 100", err)
	}
	l.Chaos("--fail", "DescribeNetworkInterfaces=RequestLimitExceeded:1.0", "--fail", "DescribeSubnets=RequestLimitExceeded:1.0")
	var starting sync.WaitGroup
	starting.Go(func() { l.Try("node", "restart-agent", n.Name) }) // says whether it serves, which it does later
	defer starting.Wait()
	lab.Eventually(t, 5*time.Second, "the agent listens", func() error {
		c, err := net.Dial("unix", n.AgentSocket)
		if err == nil {
			c.Close()
		}
		return err
	})
	_, err = r.Add(t.Context(), conf)
	if code := codeOf(err); code != 11 {
		t.Errorf("ADD while EC2 throttles the agent's start: %v, want code 11", err)
	}
	l.Chaos("--fail", "none")
	<-time.After(time.Second) // as Nomad does
	addr := add()
	if got := works("after three tries"); got != addr {
		t.Errorf("ADD says %s, the agent %s", addr, got)
	}

	// The client starts again, and with it or not the agent: all is as it was.
	for _, agentToo := range []bool{false, true} {
		if agentToo {
			l.Kill("underlay-agent", n.Name)
			l.Underlay("node", "restart-agent", n.Name)
		}
		r.Restart()
		if err := r.Check(t.Context(), conf); err != nil {
			t.Errorf("CHECK after a restart (of the agent too: %v): %v", agentToo, err)
		}
		if got := add(); got != addr {
			t.Errorf("ADD again answers %s, it was %s", got, addr)
		}
		if got := works("after a restart"); got != addr {
			t.Errorf("after a restart the agent says %s, it was %s", got, addr)
		}
	}

	// What CHECK finds broken, one rebuild mends. The address of before cools
	// down meanwhile: whoever knew it must not meet the wrong pod.
	for _, broken := range []struct {
		how string
		do  func()
	}{
		{"the default route is gone", func() {
			if out, err := exec.Command("nsenter", "--net="+nl.Path(netns), "ip", "route", "del", "default").CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}},
		{"the namespace was made anew", func() {
			if err := nl.DeleteNamed(netns); err != nil {
				t.Fatal(err)
			}
			anew()
		}},
	} {
		broken.do()
		r.Restart()
		if code := codeOf(r.Check(t.Context(), conf)); code != 106 {
			t.Errorf("%s: CHECK has code %d, want 106", broken.how, code)
		}
		if err := r.Del(t.Context(), conf); err != nil {
			t.Fatalf("%s: DEL: %v", broken.how, err)
		}
		before := addr
		addr = add()
		if addr == before {
			t.Errorf("%s: the rebuild has %s again, without a cooldown", broken.how, addr)
		}
		if got := works(broken.how); got != addr {
			t.Errorf("%s: ADD says %s, the agent %s", broken.how, addr, got)
		}
		if err := r.Check(t.Context(), conf); err != nil {
			t.Errorf("%s: CHECK after the rebuild: %v", broken.how, err)
		}
	}

	if !r.Cached(t, conf) {
		t.Error("the runtime keeps no result")
	}
	// The allocation ends while the agent is down; DEL twice, as clients do.
	l.Kill("underlay-agent", n.Name)
	for range 2 {
		if err := r.Del(t.Context(), conf); err != nil {
			t.Errorf("DEL: %v", err)
		}
	}
	l.Underlay("node", "restart-agent", n.Name)
	if r.Cached(t, conf) {
		t.Error("the runtime still keeps the result")
	}
	lab.Eventually(t, 5*time.Second, "nothing of the allocation is left", func() error {
		in := l.Inspect(n)
		bound := 0
		for _, a := range in.Addresses {
			if a.State == "bound" {
				bound++
			}
		}
		live := 0
		for _, e := range in.Endpoints {
			if e.State == "tombstone" {
				continue
			}
			live++
			if e.ContainerID == alloc {
				return fmt.Errorf("endpoint %+v", e)
			}
		}
		routes := strings.Fields(strings.TrimSpace(l.Underlay("node", "exec", n.Name, "--", "ip", "-o", "route", "show", "table", "30060")))
		var hosts int
		for _, f := range routes {
			if f == "dev" {
				hosts++
			}
		}
		if bound != others || live != others || hosts != others {
			return fmt.Errorf("%d addresses bound, %d endpoints, %d routes; there are %d other pods", bound, live, hosts, others)
		}
		return nil
	})
}

// codeOf returns the code of a plugin's error, 0 when there is none.
func codeOf(err error) uint {
	var e *types.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return 0
}

func addrOf(t *testing.T, res *current.Result) netip.Addr {
	t.Helper()
	if len(res.IPs) != 1 {
		t.Fatalf("%d addresses: %+v", len(res.IPs), res)
	}
	a, _ := netip.AddrFromSlice(res.IPs[0].Address.IP)
	return a.Unmap()
}
