package load

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/test/lab"
)

// freeSoon bounds the wait for a free address: a cooldown, and a call.
const freeSoon = 40 * time.Second

// While EC2 does not answer, for longer than an ADD waits: pods that run are
// not touched, what is free is handed out, then ADDs fail with a reason, and
// when EC2 is back they are served. That also holds for an agent which is
// killed meanwhile, as to the pods; it cannot know what is free.
func TestEC2Away(t *testing.T) {
	l := lab.Up(t, "--nodes", "2")
	a := l.Run("a", "--node", "node-1")
	b := l.Run("b", "--node", "node-2")
	before := l.Pods()
	l.AwaitFree(l.Nodes[0], 1, freeSoon)
	s := lab.StartStream(t, a.Netns, b.Netns, b.IP)
	l.Chaos("--fail", "*=Unavailable:1.0")

	l.Run("spare", "--node", "node-1") // by what is free
	began := time.Now()
	_, message, code := l.Try("run", "none", "--node", "node-1")
	if code == 0 || !strings.Contains(message, "EC2 does not answer") || !strings.Contains(message, "check the node's route") {
		t.Errorf("after %s: exit %d, %s", time.Since(began).Round(time.Second), code, message)
	}
	s.More(300)
	l.Kill("underlay-agent", "node-1")
	restarted := make(chan string, 1)
	go func() { // it waits until the new agent serves
		_, message, code := l.Try("node", "restart-agent", "node-1")
		restarted <- fmt.Sprintf("exit %d %s", code, message)
	}()
	lab.Eventually(t, 20*time.Second, "the new agent says what it waits for", func() error {
		err := (&agentapi.Client{Socket: l.Nodes[0].AgentSocket}).Status(t.Context())
		if err == nil {
			t.Fatal("it serves, though it cannot know what it has")
		}
		if !strings.Contains(err.Error(), "EC2 does not answer") {
			return err
		}
		return nil
	})
	s.More(300)

	l.Chaos("--fail", "none")
	if end := <-restarted; !strings.HasPrefix(end, "exit 0") {
		t.Errorf("EC2 is back: %s", end)
	}
	l.Run("late", "--node", "node-1")
	if sent, lost := s.Stop(); lost != 0 {
		t.Errorf("%d of %d datagrams lost", lost, sent)
	}
	after := l.Pods()
	for name, ip := range before {
		if after[name] != ip {
			t.Errorf("%s had %s and has %q", name, ip, after[name])
		}
	}
	if len(after) != len(before)+2 {
		t.Errorf("endpoints: %v", after)
	}
}

// The agent is killed at moments spread over ADD and DEL. Its successor and the
// runtime's second try set all right: no address twice, none of a live pod
// given away, nothing left of what is gone.
func TestKilledAgain(t *testing.T) {
	l := lab.Up(t, "--nodes", "1", "--instance-type", "m5.4xlarge")
	n := l.Nodes[0]
	live := l.Run("live")
	s := lab.StartStream(t, l.Run("peer").Netns, live.Netns, live.IP)
	before := l.Pods()
	links := podLinks(t, n)

	config := fmt.Sprintf(`{"cniVersion":"1.1.0","name":"underlay","type":"underlay-cni","socket":%q}`, n.AgentSocket)
	netns := "ul-" + l.Name + "-pod-killed"
	if err := nl.NewNamed(netns); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nl.DeleteNamed(netns) })
	call := func(command string, i int) error {
		_, err := lab.Plugin(t, config, "CNI_COMMAND="+command, fmt.Sprintf("CNI_CONTAINERID=c%d", i), "CNI_NETNS="+nl.Path(netns))
		return err
	}
	// An ADD or DEL takes some 10 ms here when an address is free; when not, the
	// ADD waits for EC2 and IMDS, most of a second.
	interrupted := 0
	killed := func(command string, i int) {
		t.Helper()
		pid := l.Process("underlay-agent", n.Name)
		done := make(chan error, 1)
		go func() { done <- call(command, i) }()
		after := time.Duration(i*7%29) * 500 * time.Microsecond
		if i%8 == 4 {
			after *= 60
		}
		<-time.After(after)
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			interrupted++
		}
		l.Underlay("node", "restart-agent", n.Name)
	}
	for i := range *kills {
		command := "ADD"
		if i%4 != 0 {
			l.AwaitFree(n, 1, freeSoon)
		}
		if i%2 == 1 {
			command = "DEL"
			if err := call("ADD", i); err != nil {
				t.Fatalf("round %d: ADD: %v", i, err)
			}
		}
		killed(command, i)
		if command == "ADD" {
			if err := call("ADD", i); err != nil { // as the kubelet does
				t.Fatalf("round %d: ADD after the kill: %v", i, err)
			}
		}
		pods := l.Inspect(n).Endpoints
		seen := map[string]string{}
		for _, e := range pods {
			if other := seen[e.IP.String()]; other != "" && e.State == "live" {
				t.Fatalf("round %d: %s and %s both have %s", i, other, e.ContainerID, e.IP)
			}
			if e.State == "live" {
				seen[e.IP.String()] = e.ContainerID
			}
		}
		if err := call("DEL", i); err != nil {
			t.Fatalf("round %d: DEL: %v", i, err)
		}
	}
	if interrupted == 0 {
		t.Error("no kill hit an ADD or a DEL: the moments are badly chosen")
	}
	t.Logf("%d kills, of which %d ended an ADD or a DEL", *kills, interrupted)
	if sent, lost := s.Stop(); lost != 0 {
		t.Errorf("%d of %d datagrams between other pods lost", lost, sent)
	}
	if diff := cmp.Diff(before, l.Pods()); diff != "" {
		t.Errorf("endpoints (-before +after):\n%s", diff)
	}
	lab.Eventually(t, 10*time.Second, "no link is left of the pods that are gone", func() error {
		if diff := cmp.Diff(links, podLinks(t, n)); diff != "" {
			return errors.New(diff)
		}
		return nil
	})
	// What the killed agents asked of EC2 and did not hear is not lost either.
	lab.Eventually(t, 20*time.Second, "agent and EC2 agree", func() error {
		in := l.Inspect(n)
		enis, held := l.Held(n)
		if known := len(in.Addresses) + in.Omitted + len(in.ENIs); enis != len(in.ENIs) || held != known {
			return fmt.Errorf("EC2 has %d addresses on %d ENIs, the agent %d on %d", held, enis, known, len(in.ENIs))
		}
		return nil
	})
}
