package load

import (
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/test/lab"
)

var kills = flag.Int("kills", 60, "how often TestKilledAgain kills the agent")

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(lab.Main(m))
}

// EC2 as slow as it is, for what the AWS VPC CNI was measured with.
var slowEC2 = []string{"--latency", "50ms", "--attach-latency", "1s", "--imds-lag", "500ms"}

// 230 pods at once on one m6i.4xlarge: each gets its address by its first ADD,
// in calls of the order of ENIs, and the agent stays small.
func TestBurst(t *testing.T) {
	for _, tc := range []struct {
		name string
		args []string
		enis int // at the most
		held int // addresses of the VPC, at the most: 230, the floor, primaries, whole prefixes
	}{
		{"single addresses", nil, 8, 230 + 1 + 8},
		{"prefixes", []string{"--prefixes"}, 2, 15*16 + 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			const pods = 230
			l := lab.Up(t, append([]string{"--nodes", "1", "--instance-type", "m6i.4xlarge"}, tc.args...)...)
			l.Chaos(slowEC2...)
			n := l.Nodes[0]
			writes := l.Writes()
			began := time.Now()
			var made []lab.Pod
			out := l.Underlay("run", "many", "--count", strconv.Itoa(pods), "-o", "json")
			took := time.Since(began)
			if err := json.Unmarshal([]byte(out), &made); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			slowest := 0.0
			seen := map[netip.Addr]string{}
			for _, p := range made {
				if p.Error != "" {
					t.Errorf("%s: %s", p.Name, p.Error)
				}
				if other := seen[p.IP]; other != "" {
					t.Errorf("%s and %s both have %s", p.Name, other, p.IP)
				}
				seen[p.IP] = p.Name
				slowest = max(slowest, p.AddMillis)
			}
			if len(made) != pods {
				t.Errorf("%d pods of %d", len(made), pods)
			}
			writes = l.Writes() - writes

			enis, held := l.Held(n)
			rules := rulesOf(t, n)
			rss := rssKiB(t, l, n)
			log, err := os.Stat(filepath.Join(l.Dir(), "nodes", n.Name, "agent.log"))
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("all up after %s, slowest ADD %.1f s, %d EC2 writes, %d ENIs, %d addresses, %d rules, agent at most %.1f MB, log %.3f MB",
				took.Round(100*time.Millisecond), slowest/1000, writes, enis, held, rules, float64(rss)/1000, float64(log.Size())/1e6)
			if enis > tc.enis || held > tc.held {
				t.Errorf("%d addresses on %d ENIs, want at most %d on %d", held, enis, tc.held, tc.enis)
			}
			// Create, attach, keep for each ENI, and a few to fill them.
			if limit := 5 * tc.enis; writes > limit {
				t.Errorf("%d EC2 writes for %d ENIs, want at most %d", writes, enis, limit)
			}
			if limit := 3 + 1 + 2*enis; rules > limit { // the kernel's three, the pods' table
				t.Errorf("%d rules for %d ENIs", rules, enis)
			}
			if rss > 40_000 {
				t.Errorf("the agent took %d KiB", rss)
			}
			if log.Size() > 200_000 {
				t.Errorf("the agent wrote %d bytes of log", log.Size())
			}
		})
	}
}

// rulesOf counts the routing rules of a node.
func rulesOf(t *testing.T, n lab.Node) int {
	t.Helper()
	out, err := exec.Command("nsenter", "--net="+n.Netns, "ip", "rule").Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(out), "\n")
}

// rssKiB returns the most memory that the node's agent had resident.
func rssKiB(t *testing.T, l *lab.Lab, n lab.Node) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", l.Process("underlay-agent", n.Name)))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.Atoi(strings.Fields(v)[0])
			if err != nil {
				t.Fatal(err)
			}
			return kib
		}
	}
	t.Fatal("no VmHWM in the agent's status")
	return 0
}

// podLinks returns the names of the node's links that lead to pods.
func podLinks(t *testing.T, n lab.Node) []string {
	t.Helper()
	out, err := exec.Command("nsenter", "--net="+n.Netns, "ip", "-br", "link").Output()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for line := range strings.Lines(string(out)) {
		if name := strings.Fields(line)[0]; strings.HasPrefix(name, "ul") {
			names = append(names, name)
		}
	}
	return names
}
