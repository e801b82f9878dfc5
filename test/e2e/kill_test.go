package e2e

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/test/lab"
)

// The agent may die at any time: packets flow, and its successor knows every
// endpoint without changing anything in EC2.
func TestAgentKilledUnderTraffic(t *testing.T) {
	l := lab.Up(t, "--nodes", "2")
	a := l.Run("a", "--node", "node-1")
	b := l.Run("b", "--node", "node-2")
	c := l.Run("c", "--node", "node-1")
	for _, n := range l.Nodes {
		l.AwaitFree(n, 1, 20*time.Second) // the pool is as it is to be
	}
	before := l.Pods()
	writes := l.Writes()

	across := lab.StartStream(t, a.Netns, b.Netns, b.IP)
	within := lab.StartStream(t, a.Netns, c.Netns, c.IP)
	for range 3 {
		across.More(300)
		l.Kill("underlay-agent", "node-1")
		across.More(300)
		l.Underlay("node", "restart-agent", "node-1")
		across.More(300)
	}
	for name, s := range map[string]*lab.Stream{"across": across, "within": within} {
		if sent, lost := s.Stop(); lost != 0 {
			t.Errorf("%s: %d of %d datagrams lost", name, lost, sent)
		}
	}
	if diff := cmp.Diff(before, l.Pods()); diff != "" {
		t.Errorf("endpoints before and after (-before +after):\n%s", diff)
	}
	if after := l.Writes(); after != writes {
		t.Errorf("the restarts made %d EC2 writes", after-writes)
	}
	d := l.Run("d", "--node", "node-1")
	l.Underlay("exec", "d", "--", "ping", "-c", "1", "-W", "2", b.IP.String())
	if d.IP == a.IP || d.IP == c.IP {
		t.Errorf("%s was given twice", d.IP)
	}
}

// vpcd may die at any time: packets flow, and what it acknowledged stands.
func TestVpcdKilledUnderTraffic(t *testing.T) {
	l := lab.Up(t, "--nodes", "2")
	a := l.Run("a", "--node", "node-1")
	b := l.Run("b", "--node", "node-2")
	s := lab.StartStream(t, a.Netns, b.Netns, b.IP)

	for round := range 3 {
		// A client writes until vpcd is gone and notes what was acknowledged.
		var acknowledged []string
		var wg sync.WaitGroup
		started := make(chan struct{})
		wg.Go(func() {
			for i := 0; ; i++ {
				id, err := l.CreateGroup(fmt.Sprintf("round-%d-%d", round, i))
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
		l.Kill("vpcd", "serve")
		wg.Wait()
		s.More(300)
		l.Underlay("vpcd", "restart")
		s.More(300)

		known := l.Groups()
		for _, id := range acknowledged {
			if !known[id] {
				t.Errorf("round %d: %s was acknowledged and is gone", round, id)
			}
		}
		if len(acknowledged) < 6 {
			t.Errorf("round %d: only %d calls", round, len(acknowledged))
		}
	}
	if sent, lost := s.Stop(); lost != 0 {
		t.Errorf("%d of %d datagrams lost", lost, sent)
	}
	// And it goes on: new pods, addresses that nobody has.
	c := l.Run("c", "--node", "node-2")
	l.Underlay("exec", "c", "--", "ping", "-c", "1", "-W", "2", a.IP.String())
	if c.IP == b.IP {
		t.Errorf("%s was given twice", c.IP)
	}
}

// The plugin may die at any time: what it left is taken back by DEL, and no
// address is lost.
func TestPodRemovedWhileAgentIsDown(t *testing.T) {
	l := lab.Up(t, "--nodes", "1")
	a := l.Run("a", "--node", "node-1")
	l.Kill("underlay-agent", "node-1")
	l.Underlay("rm", "a")
	l.Underlay("node", "restart-agent", "node-1")
	lab.Eventually(t, 10*time.Second, "the agent knows no endpoint", func() error {
		if pods := l.Pods(); len(pods) != 0 {
			return fmt.Errorf("%v", pods)
		}
		return nil
	})
	b := l.Run("b", "--node", "node-1")
	if b.IP == a.IP {
		t.Errorf("%s was given away within its cooldown", b.IP)
	}
}

// What others on the node change in the routing is put back.
func TestRoutingIsRepaired(t *testing.T) {
	l := lab.Up(t, "--nodes", "2")
	l.Run("a", "--node", "node-1")
	b := l.Run("b", "--node", "node-2")
	rules := func() string { return l.Underlay("node", "exec", "node-1", "--", "ip", "rule") }
	routes := func() string {
		return l.Underlay("node", "exec", "node-1", "--", "ip", "route", "show", "table", "30061")
	}
	wantRules, wantRoutes := rules(), routes()
	if strings.Count(wantRules, "lookup 300") != 2 {
		t.Fatalf("rules of a node with one ENI:\n%s", wantRules)
	}
	l.Underlay("node", "exec", "node-1", "--", "ip", "rule", "del", "pref", "20")
	l.Underlay("node", "exec", "node-1", "--", "ip", "rule", "del", "pref", "31")
	l.Underlay("node", "exec", "node-1", "--", "ip", "route", "flush", "table", "30061")
	lab.Eventually(t, 5*time.Second, "rules and routes are back", func() error {
		if diff := cmp.Diff(wantRules+wantRoutes, rules()+routes()); diff != "" {
			return errors.New(diff)
		}
		return nil
	})
	l.Underlay("exec", "a", "--", "ping", "-c", "1", "-W", "2", b.IP.String())
}
