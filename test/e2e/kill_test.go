package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// The agent may die at any time: packets flow, and its successor knows every
// endpoint without changing anything in EC2.
func TestAgentKilledUnderTraffic(t *testing.T) {
	l := up(t, "--nodes", "2")
	a := l.run("a", "--node", "node-1")
	b := l.run("b", "--node", "node-2")
	c := l.run("c", "--node", "node-1")
	before := l.pods()
	writes := l.writes()

	across := startStream(t, a.Netns, b.Netns, b.IP)
	within := startStream(t, a.Netns, c.Netns, c.IP)
	for range 3 {
		across.more(300)
		l.kill("underlay-agent", "node-1")
		across.more(300)
		l.underlay("node", "restart-agent", "node-1")
		across.more(300)
	}
	for name, s := range map[string]*stream{"across": across, "within": within} {
		if sent, lost := s.stop(); lost != 0 {
			t.Errorf("%s: %d of %d datagrams lost", name, lost, sent)
		}
	}
	if diff := cmp.Diff(before, l.pods()); diff != "" {
		t.Errorf("endpoints before and after (-before +after):\n%s", diff)
	}
	if after := l.writes(); after != writes {
		t.Errorf("the restarts made %d EC2 writes", after-writes)
	}
	d := l.run("d", "--node", "node-1")
	l.underlay("exec", "d", "--", "ping", "-c", "1", "-W", "2", b.IP.String())
	if d.IP == a.IP || d.IP == c.IP {
		t.Errorf("%s was given twice", d.IP)
	}
}

// vpcd may die at any time: packets flow, and what it acknowledged stands.
func TestVpcdKilledUnderTraffic(t *testing.T) {
	l := up(t, "--nodes", "2")
	a := l.run("a", "--node", "node-1")
	b := l.run("b", "--node", "node-2")
	s := startStream(t, a.Netns, b.Netns, b.IP)

	for round := range 3 {
		// A client writes until vpcd is gone and notes what was acknowledged.
		var acknowledged []string
		var wg sync.WaitGroup
		started := make(chan struct{})
		wg.Go(func() {
			for i := 0; ; i++ {
				id, err := l.createGroup(fmt.Sprintf("round-%d-%d", round, i))
				if err != nil {
					return
				}
				acknowledged = append(acknowledged, id)
				if i == 5 {
					close(started)
				}
			}
		})
		select {
		case <-started:
		case <-time.After(20 * time.Second):
			t.Fatal("no six calls in 20 s")
		}
		l.kill("vpcd", "serve")
		wg.Wait()
		s.more(300)
		l.underlay("vpcd", "restart")
		s.more(300)

		known := l.groups()
		for _, id := range acknowledged {
			if !known[id] {
				t.Errorf("round %d: %s was acknowledged and is gone", round, id)
			}
		}
		if len(acknowledged) < 6 {
			t.Errorf("round %d: only %d calls", round, len(acknowledged))
		}
	}
	if sent, lost := s.stop(); lost != 0 {
		t.Errorf("%d of %d datagrams lost", lost, sent)
	}
	// And it goes on: new pods, addresses that nobody has.
	c := l.run("c", "--node", "node-2")
	l.underlay("exec", "c", "--", "ping", "-c", "1", "-W", "2", a.IP.String())
	if c.IP == b.IP {
		t.Errorf("%s was given twice", c.IP)
	}
}

// The plugin may die at any time: what it left is taken back by DEL, and no
// address is lost.
func TestPodRemovedWhileAgentIsDown(t *testing.T) {
	l := up(t, "--nodes", "1")
	a := l.run("a", "--node", "node-1")
	l.kill("underlay-agent", "node-1")
	l.underlay("rm", "a")
	l.underlay("node", "restart-agent", "node-1")
	eventually(t, 10*time.Second, "the agent knows no endpoint", func() error {
		if pods := l.pods(); len(pods) != 0 {
			return fmt.Errorf("%v", pods)
		}
		return nil
	})
	b := l.run("b", "--node", "node-1")
	if b.IP == a.IP {
		t.Errorf("%s was given away within its cooldown", b.IP)
	}
}

// pods returns the live endpoints of all nodes as their agents know them.
func (l *lab) pods() map[string]netip.Addr {
	l.t.Helper()
	out := map[string]netip.Addr{}
	for _, n := range l.Nodes {
		in := l.inspect(n)
		for _, e := range in.Endpoints {
			if e.State == "live" {
				out[n.Name+"/"+e.Pod.Name] = e.IP
			}
		}
	}
	return out
}

var errNotYet = errors.New("not yet")
