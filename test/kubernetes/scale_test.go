package kubernetes

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/testenv"
	"github.com/underlay-cni/underlay/test/lab"
)

// holdings is what a node has, each counted where it is: in EC2 and in the
// kernel, not by asking the agent.
type holdings struct {
	ENIs, Addresses int // EC2's
	Veths           int
	Rules           int
	PodRoutes       int // of the table that leads to pods
	Records         map[string]int
}

// holdings counts on a node. Records are the entries of the datapath's pinned
// hash maps, by the map's name.
func (c *cluster) holdings(n lab.Node) (holdings, error) {
	h := holdings{Records: map[string]int{}}
	h.ENIs, h.Addresses = c.Held(n)
	count := func(args ...string) int { return strings.Count(n.Exec(c.t, args...), "\n") }
	// Without the node's own ENIs, which in a lab are devices of that type, too.
	h.Veths = count("sh", "-c", "ip -o link show type veth | grep -v ': eth[0-9]' || true")
	veths := map[int]bool{}
	for _, index := range strings.Fields(n.Exec(c.t, "sh", "-c", "ip -o link show type veth | cut -d: -f1")) {
		i, err := strconv.Atoi(index)
		if err != nil {
			return h, fmt.Errorf("ip link: %w", err)
		}
		veths[i] = true
	}
	h.Rules = count("ip", "-4", "-o", "rule", "show")
	h.PodRoutes = count("sh", "-c", "ip -4 -o route show table 30060 || true") // no pod yet, no table
	pins := c.Underlay("node", "exec", n.Name, "--", "sh", "-c", "ls -d /sys/fs/bpf/underlay/* /sys/fs/bpf/underlay/*/* 2>/dev/null || true")
	for _, pin := range strings.Fields(pins) {
		out, _, code := c.Try("node", "exec", n.Name, "--", "bpftool", "-j", "map", "show", "pinned", pin)
		if code != 0 {
			continue // a folder, or a link
		}
		var m struct{ Name, Type string }
		if err := json.Unmarshal([]byte(out), &m); err != nil {
			return h, fmt.Errorf("bpftool map show %s: %w", pin, err)
		}
		if m.Name == "conn_sets" {
			gone, err := c.goneInSets(n, pin, veths)
			if err != nil {
				return h, err
			}
			if gone > 0 {
				h.Records[connsGone] += gone
			}
			continue
		}
		if m.Type != "hash" && m.Type != "lru_hash" {
			continue // arrays have all their entries always
		}
		out = c.Underlay("node", "exec", n.Name, "--", "bpftool", "-j", "map", "dump", "pinned", pin)
		var entries []struct {
			Formatted struct {
				Value struct{ Ifindex json.RawMessage } // of other maps one number
			}
		}
		if err := json.Unmarshal([]byte(out), &entries); err != nil {
			return h, fmt.Errorf("bpftool map dump %s: %w", pin, err)
		}
		switch m.Name {
		case "fragments":
			continue // an LRU of what passes
		case "conns":
			// Pods that are there come and go by connections; what counts is those
			// of pods that are gone.
			for _, e := range entries {
				var ends []int
				if err := json.Unmarshal(e.Formatted.Value.Ifindex, &ends); err != nil {
					return h, fmt.Errorf("bpftool map dump %s: a connection without ifindexes: %w", pin, err)
				}
				if len(ends) != 2 {
					return h, fmt.Errorf("bpftool map dump %s: a connection with %d ifindexes", pin, len(ends))
				}
				if gone := goneEnds(ends, veths); gone > 0 {
					h.Records[connsGone] += gone
				}
			}
		default:
			h.Records[m.Name] = len(entries)
		}
	}
	if len(h.Records) == 0 {
		return h, fmt.Errorf("%s has no pinned map: %s", n.Name, pins)
	}
	return h, nil
}

// connsGone is the record of connections whose pod is not there any more.
const connsGone = "conns of pods that are gone"

// goneEnds counts the ends of a connection whose veth is none of these.
func goneEnds(ends []int, veths map[int]bool) (gone int) {
	for _, index := range ends {
		if index != 0 && !veths[index] {
			gone++
		}
	}
	return gone
}

// goneInSets is goneEnds for the connections that are in sets, an array next to the
// map of the sets. Those that are free are not read: bpftool would write some 200 MB.
func (c *cluster) goneInSets(n lab.Node, pin string, veths map[int]bool) (gone int, err error) {
	const ways, noKey = 8, 0xff
	array := strings.TrimSuffix(pin, "conn_sets") + "conn_ways"
	var sets []struct {
		Formatted struct {
			Key   int
			Value struct{ Tags uint64 }
		}
	}
	if err := json.Unmarshal([]byte(c.Underlay("node", "exec", n.Name, "--", "bpftool", "-j", "map", "dump", "pinned", pin)), &sets); err != nil {
		return 0, fmt.Errorf("bpftool map dump %s: %w", pin, err)
	}
	var lookups []string
	for _, s := range sets {
		for way := range ways {
			if byte(s.Formatted.Value.Tags>>(8*way)) != 0 {
				i := s.Formatted.Key*ways + way
				lookups = append(lookups, fmt.Sprintf("map lookup pinned %s key %d %d %d %d\n", array, i&255, i>>8&255, i>>16&255, i>>24))
			}
		}
	}
	for some := range slices.Chunk(lookups, 200) {
		out := c.Underlay("node", "exec", n.Name, "--", "sh", "-c", "bpftool -j batch file - <<'END'\n"+strings.Join(some, "")+"END")
		var found []struct {
			Output struct {
				Formatted struct {
					Value struct {
						Conn struct {
							Key     struct{ Pad []int }
							Ifindex []int
						}
					}
				}
			}
		}
		if err := json.Unmarshal([]byte(out), &found); err != nil {
			return 0, fmt.Errorf("bpftool map lookup in %s: %w", array, err)
		}
		if len(found) != len(some) {
			return 0, fmt.Errorf("bpftool map lookup in %s: %d of %d are found", array, len(found), len(some))
		}
		for _, f := range found {
			conn := f.Output.Formatted.Value.Conn
			if len(conn.Ifindex) != 2 || len(conn.Key.Pad) != 2 {
				return 0, fmt.Errorf("bpftool map lookup in %s: a connection without ifindexes", array)
			}
			if conn.Key.Pad[0] != noKey { // freed meanwhile
				gone += goneEnds(conn.Ifindex, veths)
			}
		}
	}
	return gone, nil
}

// allHoldings counts on all nodes.
func (c *cluster) allHoldings() map[string]holdings {
	c.t.Helper()
	all := map[string]holdings{}
	for _, n := range c.Lab.Nodes {
		h, err := c.holdings(n)
		if err != nil {
			c.t.Fatal(err)
		}
		all[n.Name] = h
	}
	return all
}

// giveBack is how long a node keeps what it no longer wants: 30 s in which an
// address cools down, four minutes in which it waits for other pods, and some to
// return it.
const giveBack = 7 * time.Minute

// A Deployment that comes and goes leaves nothing behind. It has a lab of its
// own, in which nothing else comes and goes, and waits for minutes there: beside
// upstream's specs.
func TestScaleUpAndDown(t *testing.T) {
	testenv.Require(t, "cluster")
	t.Parallel()
	args := upArgs()
	if *replicas > 75 { // what three m5.large hold beside the cluster's own
		args = upArgs("--instance-type", "m5.4xlarge")
	}
	c := newCluster(t, lab.Up(t, args...))
	c.awaitWhole()
	ns := c.namespace("scale")
	c.apply(ns, fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: many}
spec:
  replicas: 0
  selector: {matchLabels: {app: many}}
  template:
    metadata: {labels: {app: many}}
    spec:
      terminationGracePeriodSeconds: 1 # with 0 they would be gone from the API before they are from the node
      containers: [{name: c, image: %q, args: [pause]}]
`, agnhost))
	scale := func(n int) []pod {
		c.kubectl("scale", "deployment", "many", "-n", ns, fmt.Sprintf("--replicas=%d", n))
		return c.awaitPods(ns, n, 10*time.Minute)
	}
	for _, n := range c.Lab.Nodes {
		c.AwaitFree(n, 1, time.Minute) // the pool is as it is to be
	}
	before := c.allHoldings()
	for round := range *rounds {
		start := time.Now()
		pods := scale(*replicas)
		up := time.Since(start)
		seen := map[netip.Addr]string{}
		for _, p := range pods {
			if other, ok := seen[p.ip()]; ok || !p.ip().IsValid() {
				t.Errorf("%s and %s have the address %s", other, p.Metadata.Name, p.Status.PodIP)
			}
			seen[p.ip()] = p.Metadata.Name
		}
		start = time.Now()
		scale(0)
		t.Logf("round %d: %d pods Ready in %v, gone in %v", round+1, *replicas, up.Round(100*time.Millisecond), time.Since(start).Round(100*time.Millisecond))
	}
	lab.Eventually(t, giveBack, fmt.Sprintf("the nodes hold what they held before %d times %d pods", *rounds, *replicas), func() error {
		if diff := cmp.Diff(before, c.allHoldings()); diff != "" {
			return fmt.Errorf("-before +after:\n%s", diff)
		}
		return nil
	})
}

// What status and metrics say is what the kernel and EC2 say.
func TestStatusTellsTheTruth(t *testing.T) {
	testenv.Require(t, "cluster")
	var c *cluster
	if *dense <= 25 { // an m5.large holds them, and what else is on it
		c = shared(t)
	} else {
		c = newCluster(t, lab.Up(t, "--kubernetes", "--nodes", "1", "--instance-type", "m5.4xlarge", "--kube-proxy", *proxy))
		c.awaitWhole()
	}
	ns := c.namespace("status")
	n := c.Lab.Nodes[0]
	var manifest strings.Builder
	for i := range *dense {
		manifest.WriteString(idle(fmt.Sprintf("p-%d", i), n.Name, ""))
	}
	c.apply(ns, manifest.String())
	pods := c.awaitPods(ns, *dense, 5*time.Minute)

	var status struct {
		NodeStatus []struct {
			Name      string
			Addresses struct{ InUse int }
		}
		Pods []struct{ Name, Node, IP, State string }
	}
	lab.Eventually(t, 30*time.Second, "status, metrics, kernel and EC2 agree", func() error {
		h, err := c.holdings(n)
		if err != nil {
			return err
		}
		if err := json.Unmarshal([]byte(c.Underlay("status", "-o", "json")), &status); err != nil {
			return err
		}
		inUse, shown := 0, 0
		for _, s := range status.NodeStatus {
			if s.Name == n.Name {
				inUse = s.Addresses.InUse
			}
		}
		for _, p := range status.Pods {
			if p.Node == n.Name && p.State == "live" {
				shown++
			}
		}
		metrics := c.Underlay("node", "exec", n.Name, "--", "curl", "-sf", "http://127.0.0.1:9464/metrics")
		bound := metric(metrics, `underlay_addresses{state="bound"}`)
		if inUse != h.Veths || shown != h.Veths || h.PodRoutes != h.Veths || bound != h.Veths {
			return fmt.Errorf("%d veths, %d routes; status: %d in use, %d pods; metrics: %d bound", h.Veths, h.PodRoutes, inUse, shown, bound)
		}
		return nil
	})
	for _, p := range pods {
		if !slices.ContainsFunc(status.Pods, func(s struct{ Name, Node, IP, State string }) bool {
			return s.IP == p.Status.PodIP && strings.Contains(s.Name, p.Metadata.Name)
		}) {
			t.Errorf("status does not show %s at %s", p.Metadata.Name, p.Status.PodIP)
		}
	}
}

// metric returns the value of a sample in Prometheus' text form, or -1.
func metric(text, sample string) int {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, sample+" "); ok {
			var v float64
			if _, err := fmt.Sscan(rest, &v); err == nil {
				return int(v)
			}
		}
	}
	return -1
}
