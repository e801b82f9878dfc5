package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/test/lab"
)

// A node's flow records are of what its pods sent and received, between two of
// them as well, which the VPC does not see; however often the agent dies, each
// packet is in one record of each side.
func TestNodeFlowRecordsAddUp(t *testing.T) {
	dir := t.TempDir()
	l := lab.Up(t, "--nodes", "1", "--agent-arg=--flow-dir="+dir, "--agent-arg=--flow-interval=1s", "--agent-arg=--flow-format=json")
	n := l.Nodes[0]
	a, b := l.Run("a", "--node", n.Name), l.Run("b", "--node", n.Name)
	s := lab.StartStream(t, a.Netns, b.Netns, b.IP)
	for range 4 {
		s.More(700)
		l.Kill("underlay-agent", n.AgentSocket)
		l.Underlay("node", "restart-agent", n.Name)
	}
	s.More(300)
	sent, lost := s.Stop()
	if lost != 0 {
		t.Errorf("%d of %d datagrams are lost", lost, sent)
	}

	type record struct {
		Status, Direction, Src, Dst, Pod, Action string
		DstPort                                  int
		Packets, Bytes                           int64
	}
	sums := map[string]int64{}
	lab.Eventually(t, 15*time.Second, "the files have all datagrams", func() error {
		clear(sums)
		names, err := filepath.Glob(filepath.Join(dir, "flows-*.log"))
		if err != nil {
			return err
		}
		for _, name := range names {
			text, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(text)) {
				var r record
				if err := json.Unmarshal([]byte(line), &r); err != nil {
					return fmt.Errorf("%s: %q: %w", name, line, err)
				}
				switch {
				case r.Status == "SKIPDATA":
					sums["skipped"] += r.Packets
				case r.Status == "OK" && r.Action == "ACCEPT":
					sums[fmt.Sprintf("%s %s from %s", r.Pod, r.Direction, r.Src)] += r.Packets
				}
			}
		}
		for _, key := range []string{"a egress from " + a.IP.String(), "b ingress from " + a.IP.String(), "b egress from " + b.IP.String(), "a ingress from " + b.IP.String()} {
			if sums[key] < sent {
				return fmt.Errorf("%s: %d of %d; %v", key, sums[key], sent, sums)
			}
		}
		return nil
	})
	for key, n := range sums {
		if key == "skipped" || n != sent {
			t.Errorf("%s: %d packets in records, %d were sent each way", key, n, sent)
		}
	}
	table := l.Underlay("flows", "--by", "nodes")
	for _, want := range []string{n.Name, a.IP.String() + ":", b.IP.String() + ":7007 (b)"} {
		if !strings.Contains(table, want) {
			t.Errorf("no %q in\n%s", want, table)
		}
	}
}

// A monitor shows the first packet of a connection, and what is dropped.
func TestMonitor(t *testing.T) {
	l := lab.Up(t, "--nodes", "1")
	n := l.Nodes[0]
	a, b := l.Run("a", "--node", n.Name), l.Run("b", "--node", n.Name)
	type shown struct {
		out string
		err string
	}
	watch := func(args ...string) chan shown {
		done := make(chan shown, 1)
		go func() {
			out, errOut, code := l.Try(append([]string{"monitor", "-o", "json"}, args...)...)
			if code != 0 {
				errOut = fmt.Sprintf("exit %d: %s", code, errOut)
			}
			done <- shown{out, errOut}
		}()
		return done
	}
	first, drops := watch("--pod", "a", "--verdict", "allow", "--count", "1"), watch("--verdict", "drop", "--count", "1")
	var got, dropped shown
	lab.Eventually(t, 20*time.Second, "both monitors have shown something", func() error {
		l.Try("exec", "a", "--", "ping", "-c", "1", "-W", "1", b.IP.String())
		l.Try("exec", "a", "--", "timeout", "0.2", "bash", "-c", "echo > /dev/tcp/169.254.169.254/80")
		select {
		case got = <-first:
		default:
		}
		select {
		case dropped = <-drops:
		default:
		}
		if got.out == "" || dropped.out == "" {
			return fmt.Errorf("shown: %+v, %+v", got, dropped)
		}
		return nil
	})
	for _, want := range []string{`"node":"` + n.Name + `"`, `"verdict":"allow"`, `"direction":"egress"`, a.IP.String(), b.IP.String(), `"path":"direct"`} {
		if !strings.Contains(got.out, want) {
			t.Errorf("no %s in %s", want, got.out)
		}
	}
	if !strings.Contains(dropped.out, `"reason":"imds"`) {
		t.Errorf("dropped: %s", dropped.out)
	}
	if _, errOut, code := l.Try("monitor", "--pod", "nobody"); code == 0 || !strings.Contains(errOut, "nobody") {
		t.Errorf("a pod that is not there: exit %d, %s", code, errOut)
	}
}
