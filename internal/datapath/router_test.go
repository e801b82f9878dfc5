package datapath

import (
	"strings"
	"testing"
	"time"
)

// The programs keep the MAC of an ENI's router, and follow the kernel's neighbour:
// they keep it in use, go where it goes, and have it looked for when it is gone.
func TestRouterOfAnENI(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	p := w.addPod(d, 1)
	w.echo(w.wire, farIP)
	if w.ask(p.ns, p.Addr, farIP, 20) == "" {
		t.Fatal("no answer from behind the router")
	}
	const router = "10.0.1.1"
	neighbour := func() string { return w.ip(w.node, "neigh show to "+router+" dev eth1") }
	// Of one flow: what begins another asks the kernel in any case.
	c := w.connected(p.ns, farIP)
	asking := func(what, state string) {
		t.Helper()
		eventually(t, what, func() bool { return answers(c, true) && strings.Contains(state, lastWord(neighbour())) })
	}

	w.ip(w.node, "neigh replace "+router+" lladdr 02:00:00:00:01:01 nud stale dev eth1")
	asking("the neighbour is in use", "DELAY PROBE REACHABLE")

	w.ip(w.wire, "link set r1 address 02:00:00:00:01:02")
	w.ip(w.node, "neigh replace "+router+" lladdr 02:00:00:00:01:02 nud reachable dev eth1")
	asking("packets go to the router's new MAC", "REACHABLE")

	<-time.After(150 * time.Millisecond) // now no CPU goes by what it knew before
	w.ip(w.node, "neigh del "+router+" dev eth1")
	const burst = 30
	every := time.Tick(10 * time.Millisecond)
	for range burst {
		if _, err := c.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		<-every
	}
	for n := range burst {
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Read(make([]byte, 64)); err != nil {
			t.Fatalf("%d of %d packets were answered when the neighbour was removed: %v", n, burst, err)
		}
	}
	asking("a neighbour that was removed is found again", "REACHABLE")

	got := paths(t, d)
	if got.Direct == 0 || got.Stack != 0 || got.Exceptions != 0 {
		t.Errorf("paths: %+v", got)
	}
}

func lastWord(s string) string {
	f := strings.Fields(s)
	if len(f) == 0 {
		return "nothing"
	}
	return f[len(f)-1]
}
